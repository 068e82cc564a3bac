"""The lab's captions: they say what is true of the scene, in words that belong to one concept each."""

import random
import re
from collections import Counter, defaultdict
from itertools import chain

import pytest
import torch

from concept_nodes.lab.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    COMPLETE,
    FILL_WORDS,
    IMAGE_TRAINING,
    OPENINGS,
    PLACE_WORDS,
    PLAIN,
    RESERVED_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    STYLE_WORDS,
    TEXT_TRAINING,
    Writer,
    describe,
    misspell,
    write_captions,
)
from concept_nodes.lab.scenes import sample_scenes

TABLES = {
    "shape": SHAPE_WORDS,
    "colour": COLOUR_WORDS,
    "fill": FILL_WORDS,
    "size": SIZE_WORDS,
    "style": STYLE_WORDS,
    "background": BACKGROUND_WORDS,
}
FILLERS = ("window", "august", "quickly", "market")
GREYS = "|".join(sorted(BACKGROUND_WORDS, key=len, reverse=True))
BACKGROUND = re.compile(rf"(?:on|with|over) (?:an? )?({GREYS})(?: background| backdrop)?\b")
PLACES = {phrase: cell for cell, phrases in PLACE_WORDS.items() for phrase in phrases}


def sample(n=400, seed=0, **options):
    return sample_scenes(n, generator=torch.Generator().manual_seed(seed), **options)


def written(scenes, wording, fillers=(), seed=1) -> list[str]:
    return write_captions(scenes, Writer(wording, random.Random(seed), fillers))[0]


def says(text: str, words) -> set[str]:
    """Which of these phrases stand in a text as whole words, the longest first where one begins another."""
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return set(re.findall(rf"\b(?:{either})\b", text))


def parse(caption: str) -> dict[str, set]:
    """What a caption in plain words names, by attribute. The background is read first: its greys and black are nobody's colour."""
    backgrounds = set(BACKGROUND.findall(caption))
    rest = BACKGROUND.sub("", caption)
    read = {"background": backgrounds, "place": {PLACES[phrase] for phrase in says(rest, PLACES)}}
    for attribute in ("shape", "colour", "fill", "size", "style"):
        plain = {words.plain: concept for concept, words in TABLES[attribute].items()}
        read[attribute] = {plain[word] for word in says(rest, plain)}
    return read


def truth(scene) -> dict[str, set]:
    items, background, style = scene
    told = {key: {item[key] for item in items} for key in ("shape", "colour", "fill", "size", "place")}
    return told | {"background": {background}, "style": {style}}


def wordings(words, *parts) -> list[str]:
    return [text for part in parts for text in ([words.plain] if part == "plain" else getattr(words, part))]


ALL = ("plain", "synonyms", "held_synonyms", "described", "held_described")
SHOWN, HELD = ("plain", "synonyms", "described"), ("held_synonyms", "held_described")


class TestTruth:
    @pytest.mark.parametrize("counts", [{1: 1.0}, {2: 1.0}])
    def test_plain_captions_name_only_what_is_true(self, counts):
        scenes = sample(counts=counts)
        for scene, caption in zip(describe(scenes), written(scenes, PLAIN), strict=True):
            true = truth(scene)
            for attribute, named in parse(caption).items():
                assert named <= true[attribute], (attribute, caption)

    @pytest.mark.parametrize("counts", [{1: 1.0}, {2: 1.0}])
    def test_complete_captions_name_all_of_it(self, counts):
        """Solid and flat are what goes without saying."""
        scenes = sample(counts=counts)
        for scene, caption in zip(describe(scenes), written(scenes, COMPLETE), strict=True):
            true, named = truth(scene), parse(caption)
            true["place"] -= {None}
            for attribute, silent in {"fill": {"solid"}, "style": {"flat"}}.items():
                assert named[attribute] | silent == true[attribute] | silent, caption
            for attribute in ("shape", "colour", "size", "place", "background"):
                assert named[attribute] == true[attribute], (attribute, caption)

    @pytest.mark.parametrize(
        "words, ahead, axis",
        [
            ("left of", 0, "x"),
            ("right of", 1, "x"),
            ("above|on top of", 0, "y"),
            ("below|beneath|under", 1, "y"),
        ],
    )
    def test_relations_are_true(self, words, ahead, axis):
        scenes = sample(600, counts={2: 1.0})
        captions, orders = write_captions(scenes, Writer(PLAIN, random.Random(3)))
        related = [(i, order) for i, order in enumerate(orders) if re.search(rf"\b(?:{words})\b", captions[i])]
        assert len(related) > 5
        for i, order in related:
            place = getattr(scenes, axis)[i, order]
            assert place[ahead] < place[1 - ahead], captions[i]

    def test_orders_name_every_worded_slot_once(self):
        scenes = sample_scenes(200, height=128, width=128, counts={4: 1.0}, characters=0.3, generator=torch.Generator().manual_seed(2))
        _, orders = write_captions(scenes, Writer(PLAIN, random.Random(0)))
        for i, order in enumerate(orders):
            assert sorted(order) == [k for k in range(int(scenes.count[i])) if scenes.kind[i, k] < len(SHAPE_WORDS)]

    def test_nothing_but_background_has_a_caption(self):
        assert all(re.fullmatch(r"an? [a-z ]+ background", caption) for caption in written(sample(20, counts={0: 1.0}), COMPLETE))

    def test_same_stream_same_captions(self):
        scenes = sample(50)
        assert written(scenes, TEXT_TRAINING, FILLERS) == written(scenes, TEXT_TRAINING, FILLERS)
        assert written(scenes, TEXT_TRAINING, FILLERS) != written(scenes, TEXT_TRAINING, FILLERS, seed=2)


class TestTables:
    def test_no_wording_belongs_to_two_concepts(self):
        owners = defaultdict(set)
        for name, table in TABLES.items():
            for concept, words in table.items():
                for text in wordings(words, *ALL):
                    owners[text].add((name, concept))
        for cell, phrases in PLACE_WORDS.items():
            for phrase in phrases:
                owners[phrase].add(("place", cell))
        assert {text: held for text, held in owners.items() if len(held) > 1} == {}

    @pytest.mark.parametrize("name", TABLES)
    def test_no_wording_is_listed_twice(self, name):
        for concept, words in TABLES[name].items():
            listed = wordings(words, *ALL)
            assert len(listed) == len(set(listed)), concept

    @pytest.mark.parametrize("name", TABLES)
    def test_descriptions_avoid_the_plain_word(self, name):
        for concept, words in TABLES[name].items():
            for text in wordings(words, "described", "held_described"):
                assert concept not in text.split(), text

    def test_held_out_wordings_stand_in_no_shown_one(self):
        shown = [text for table in TABLES.values() for words in table.values() for text in wordings(words, *SHOWN)]
        shown += [*OPENINGS, *chain(*PLACE_WORDS.values())]
        held = [text for table in TABLES.values() for words in table.values() for text in wordings(words, *HELD)]
        assert {text for phrase in shown for text in says(phrase, held)} == set()


class TestWording:
    def test_image_training_never_meets_held_out_wordings(self):
        held = [text for table in TABLES.values() for words in table.values() for text in wordings(words, *HELD)]
        for seed in range(4):
            scenes = sample(500, seed, counts={1: 1.0, 2: 1.0})
            for wording in (IMAGE_TRAINING, PLAIN, COMPLETE):
                assert says(" . ".join(written(scenes, wording, FILLERS, seed)), held) == set()

    def test_text_training_meets_all_of_them(self):
        scenes = sample(4000, counts={2: 1.0})
        captions = " . ".join(written(scenes, TEXT_TRAINING._replace(misspelt=0.0, filler=0.0)))
        for table in TABLES.values():
            for words in table.values():
                for text in wordings(words, *ALL):
                    assert f" {text}" in captions, text

    @pytest.mark.parametrize("wording", [IMAGE_TRAINING, PLAIN, COMPLETE, TEXT_TRAINING])
    def test_captions_hold_no_prompt_syntax_and_no_reserved_words(self, wording):
        scenes = sample(1500, counts={1: 1.0, 2: 1.0})
        for caption in written(scenes, wording, FILLERS):
            assert not set(caption) & set("()[]{}:<>|_\\\"'"), caption
            assert caption == " ".join(caption.split()), "one space between words"
            assert not set(re.findall(r"\w+", caption)) & set(RESERVED_WORDS), caption

    def test_fillers_come_only_when_asked_for(self):
        scenes = sample(800)
        assert not any(says(caption, FILLERS) for wording in (PLAIN, COMPLETE) for caption in written(scenes, wording, FILLERS))
        share = sum(bool(says(caption, FILLERS)) for caption in written(scenes, TEXT_TRAINING, FILLERS)) / 800
        assert 0.08 < share < 0.25


class TestMisspelling:
    @pytest.mark.parametrize("word", ["", "a", "red", "dot"])
    def test_short_words_stay(self, word):
        assert misspell(word, random.Random(0)) == word

    @pytest.mark.parametrize("word", ["star", "circle", "crescent", "bubblegum"])
    def test_one_slip(self, word):
        made = {misspell(word, random.Random(seed)) for seed in range(300)}
        assert len(made) > len(word)
        for slipped in made:
            assert slipped[0] == word[0]
            assert abs(len(slipped) - len(word)) <= 1
            # One edit, or a swap: at most two places differ, and no letter is far from where it was.
            assert sum((Counter(slipped) - Counter(word)).values()) <= 1
            assert sum((Counter(word) - Counter(slipped)).values()) <= 1
