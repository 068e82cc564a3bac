"""The things that a prompt names, read from its wording where that is plain: each with what stands before its noun."""

from __future__ import annotations

import re

ARTICLES = ("a", "an", "the", "one", "two", "three", "four", "five", "six", "his", "her", "their", "its", "my", "your", "another", "some")
# What ends a noun phrase.
BETWEEN = (
    *("and", "or", "with", "without", "of", "in", "on", "at", "by", "from", "to", "for", "over", "under", "above", "below", "beneath"),
    *("behind", "beside", "near", "next", "between", "inside", "onto", "into", "through", "against", "around", "along", "across", "while"),
    *("wearing", "holding", "standing", "sitting", "lying", "riding", "is", "are"),
    *("left", "right", "top", "bottom", "upper", "lower", "middle", "centre", "center"),
)
RELATIVE = ("that", "which", "who")
BEHIND = ("background", "backdrop", "foreground")
# Nouns that stand for a part of the picture, for the picture, or for something named otherwise.
PARTS = (
    *("side", "corner", "edge", "front", "distance", "style", "other", "others", "same", "pair", "group", "couple"),
    *("picture", "image", "photo", "photograph", "painting", "drawing", "illustration", "scene", "view", "icon", "sketch", "portrait"),
)
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*|[^\w\s]")


def things(text: str) -> list[str]:
    """The phrases of a prompt that begin with an article or the like and name a thing, as they are written, from the article's next word
    to the noun: "a small red circle on the left" gives "small red circle". One that stands at several places bears the number of its own:
    "red circle #2".
    """
    found: list[str] = []
    begun = end = None
    before = ""

    def close() -> None:
        nonlocal begun
        if begun is not None and end is not None and end > begun:
            phrase = text[begun:end]
            places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)]
            said = phrase.lower().split()
            if said[-1] not in PARTS and not set(said) & set(BEHIND):
                found.append(phrase if len(places) == 1 else f"{phrase} #{places.index(begun) + 1}")
        begun = None

    for match in WORD.finditer(text):
        word = match[0].lower()
        if word in ARTICLES:
            close()
            begun, end = match.end(), None
            begun += len(text[begun:]) - len(text[begun:].lstrip())
        elif word in RELATIVE or (word in ("is", "are") and before in RELATIVE):
            pass  # what follows is said of the noun
        elif not word[0].isalnum() or word in BETWEEN:
            close()
        else:
            end = match.end()
        before = word
    close()
    return found
