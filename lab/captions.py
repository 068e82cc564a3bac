"""Captions for the lab's scenes: varied templates, synonyms, misspellings and descriptions that avoid the word itself.

Every way of naming a concept is in one table, so that a later test can ask for a concept in all of them. Wordings marked held out train
the text encoder only: the image models never see a picture captioned with them, and must draw them through what the text encoder knows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import NamedTuple

from .scenes import BACKGROUNDS, CELLS, COLOURS, FILLS, KINDS, SHAPES, SIZES, STYLES, Scenes


class Wordings(NamedTuple):
    """Ways to say one concept: `plain` is the canonical word; `synonyms` may stand in its place; `described` avoids every word of it."""

    plain: str
    synonyms: tuple[str, ...]
    held_synonyms: tuple[str, ...]
    described: tuple[str, ...]
    held_described: tuple[str, ...]


SHAPE_WORDS = {
    "circle": Wordings(
        "circle",
        ("disc", "disk", "dot", "ball"),
        ("orb", "globe"),
        ("shape with no corners", "perfectly round thing"),
        ("round shape without any edges",),
    ),
    "square": Wordings(
        "square",
        ("box", "block", "quad"),
        ("cube", "tile"),
        ("shape with four equal sides", "thing with four right angles"),
        ("shape with four even corners",),
    ),
    "triangle": Wordings(
        "triangle",
        ("wedge", "pyramid"),
        ("trigon", "delta"),
        ("shape with three corners", "three sided figure"),
        ("shape made of three lines",),
    ),
    "star": Wordings(
        "star",
        ("starburst", "sparkle"),
        ("pentagram", "asterisk"),
        ("shape with five points", "thing that twinkles at night"),
        ("figure with five spikes",),
    ),
    "cross": Wordings(
        "cross",
        ("plus", "plus sign"),
        ("crossroads", "crucifix"),
        ("shape of two crossing bars", "sign for adding"),
        ("two bars that meet in the middle",),
    ),
    "heart": Wordings(
        "heart",
        ("love heart", "valentine"),
        ("love symbol", "sweetheart"),
        ("symbol of love", "shape on a romantic card"),
        ("sign for romance",),
    ),
    "crescent": Wordings(
        "crescent",
        ("moon", "half moon"),
        ("sickle", "croissant"),
        ("round shape with a bite taken out", "thin curved horn"),
        ("curved shape like a banana",),
    ),
    "diamond": Wordings(
        "diamond",
        ("rhombus", "lozenge"),
        ("gem", "kite"),
        ("tall tilted shape with four sides", "narrow shape on a playing card"),
        ("square stood on its corner",),
    ),
}

COLOUR_WORDS = {
    "red": Wordings(
        "red",
        ("crimson", "scarlet"),
        ("ruby", "cherry"),
        ("the colour of blood", "the colour of a fire engine"),
        ("the colour of a ripe tomato",),
    ),
    "orange": Wordings(
        "orange",
        ("tangerine", "amber"),
        ("apricot", "pumpkin"),
        ("the colour of a carrot", "the colour of a basketball"),
        ("the colour between red and yellow",),
    ),
    "yellow": Wordings(
        "yellow", ("golden", "lemon"), ("canary", "mustard"), ("the colour of a banana", "the colour of the sun"), ("the colour of butter",)
    ),
    "green": Wordings(
        "green", ("emerald", "lime"), ("jade", "olive"), ("the colour of grass", "the colour of leaves"), ("the colour of a frog",)
    ),
    "cyan": Wordings(
        "cyan",
        ("turquoise", "teal"),
        ("aqua", "aquamarine"),
        ("the colour of a tropical sea", "the colour of a swimming pool"),
        ("the colour between blue and green",),
    ),
    "blue": Wordings(
        "blue",
        ("navy", "azure"),
        ("cobalt", "sapphire"),
        ("the colour of the sky", "the colour of deep water"),
        ("the colour of denim jeans",),
    ),
    "purple": Wordings(
        "purple",
        ("violet", "plum"),
        ("lavender", "indigo"),
        ("the colour of grapes", "the colour of an aubergine"),
        ("the colour between red and blue",),
    ),
    "pink": Wordings(
        "pink",
        ("rose", "salmon"),
        ("magenta", "coral"),
        ("the colour of bubblegum", "the colour of a flamingo"),
        ("the colour of a piglet",),
    ),
}

FILL_WORDS = {
    "solid": Wordings("solid", ("filled", "full"), ("opaque",), (), ()),
    "outline": Wordings(
        "outlined", ("hollow", "empty", "outline of a"), ("unfilled",), ("drawn with a line only",), ("with nothing inside",)
    ),
    "striped": Wordings("striped", ("stripy", "banded"), ("barred",), ("with lines across it",), ("like a zebra",)),
    "dotted": Wordings("dotted", ("spotted", "speckled"), ("polka dot",), ("with little dots on it",), ("like a ladybird",)),
}

SIZE_WORDS = {
    "small": Wordings("small", ("tiny", "little"), ("mini",), (), ()),
    "medium": Wordings("medium", ("medium sized", "mid sized"), ("average",), (), ()),
    "large": Wordings("large", ("big", "huge"), ("giant",), (), ()),
}

STYLE_WORDS = {
    "flat": Wordings("flat", ("plain", "simple"), ("minimal",), (), ()),
    "neon": Wordings(
        "neon", ("glowing", "luminous"), ("fluorescent",), ("with light shining around everything",), ("lit like a night club",)
    ),
    "shaded": Wordings(
        "shaded", ("3d", "rendered"), ("sculpted",), ("with light from the side and soft shadows",), ("casting shadows on the ground",)
    ),
    "vintage": Wordings("vintage", ("retro", "sepia"), ("antique",), ("like an old faded photograph",), ("as if from a long time ago",)),
}

BACKGROUND_WORDS = {
    "black": Wordings("black", ("jet black", "pitch black"), ("ebony",), ("as dark as night",), ("without any light",)),
    "dark grey": Wordings("dark grey", ("charcoal", "dark gray", "dark"), ("slate",), (), ()),
    "grey": Wordings("grey", ("gray", "medium grey"), ("neutral",), (), ()),
    "light grey": Wordings("light grey", ("silver", "light gray", "light"), ("pale grey",), (), ()),
    "white": Wordings("white", ("snow white", "pure white"), ("ivory",), ("as bright as snow",), ("like a blank sheet of paper",)),
}

PLACE_WORDS = {
    ("left", "top"): ("at the top left", "in the upper left corner", "in the top left corner"),
    ("centre", "top"): ("at the top", "near the top edge", "at the top centre"),
    ("right", "top"): ("at the top right", "in the upper right corner", "in the top right corner"),
    ("left", "middle"): ("on the left", "at the left side", "at the middle left"),
    ("centre", "middle"): ("in the centre", "in the middle", "in the center"),
    ("right", "middle"): ("on the right", "at the right side", "at the middle right"),
    ("left", "bottom"): ("at the bottom left", "in the lower left corner", "in the bottom left corner"),
    ("centre", "bottom"): ("at the bottom", "near the bottom edge", "at the bottom centre"),
    ("right", "bottom"): ("at the bottom right", "in the lower right corner", "in the bottom right corner"),
}

OPENINGS = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "picture with ",
    "a photo of ",
    "an icon of ",
    "there is ",
    "we see ",
)
RESERVED_WORDS = ("sks", "ohwx", "zwx", "qpk", "vbn", "wqt", "xjk", "zvq")  # their last token is left untrained, for learned concepts


class Wording(NamedTuple):
    """How captions are written: chances of each way of naming. `held` opens the held-out wordings; `complete` names every attribute
    but a solid fill and a flat style, which go without saying."""

    synonym: float = 0.30
    described: float = 0.08
    misspelt: float = 0.04
    filler: float = 0.06
    held: bool = False
    complete: bool = False


PLAIN = Wording(0.0, 0.0, 0.0, 0.0)
IMAGE_TRAINING = Wording()
COMPLETE = Wording(0.0, 0.0, 0.0, 0.0, complete=True)  # what measurements ask with
TEXT_TRAINING = Wording(0.42, 0.14, 0.10, 0.15, True)


def misspell(word: str, rng: random.Random) -> str:
    """One slip of the hand: a swap, a drop, a doubling or a neighbouring letter. Words under four letters stay."""
    if len(word) < 4:
        return word
    at = rng.randrange(1, len(word) - 1)
    slip = rng.randrange(4)
    if slip == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if slip == 1:
        return word[:at] + word[at + 1 :]
    if slip == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + rng.choice("aeiourstln") + word[at + 1 :]


class Writer:
    """Writes captions for scenes with one `Wording` and one random stream. `fillers`: meaningless words, strewn in now and then."""

    def __init__(self, wording: Wording, rng: random.Random, fillers: tuple[str, ...] = ()):
        self.wording, self.rng, self.fillers = wording, rng, fillers

    def _mentions(self, chance: float) -> bool:
        return self.wording.complete or self.rng.random() < chance

    def _name(self, words: Wordings, described: bool = True) -> tuple[str, bool]:
        """A wording of a concept, and whether it is a description (which goes after the noun)."""
        wording, rng = self.wording, self.rng
        draw = rng.random()
        if described and draw < wording.described:
            choices = words.described + (words.held_described if wording.held else ())
            if choices:
                return self._spelt(rng.choice(choices)), True
        if draw > 1 - wording.synonym:
            choices = words.synonyms + (words.held_synonyms if wording.held else ())
            return self._spelt(rng.choice(choices)), False
        return self._spelt(words.plain), False

    def _spelt(self, text: str) -> str:
        if self.wording.misspelt and self.rng.random() < self.wording.misspelt:
            words = text.split(" ")
            longest = max(range(len(words)), key=lambda i: len(words[i]))
            words[longest] = misspell(words[longest], self.rng)
            return " ".join(words)
        return text

    def thing(self, item: dict) -> str:
        """The noun phrase of one object, from {shape, colour, fill, size, place or None}, or {word, size, place or None}."""
        rng = self.rng
        before, after = [], []
        if self._mentions(0.55):
            before.append(self._name(SIZE_WORDS[item["size"]])[0])
        if "word" in item:
            noun = item["word"]
        else:
            if self._mentions(0.92) if item["fill"] != "solid" else rng.random() < 0.15:
                word, described = self._name(FILL_WORDS[item["fill"]])
                (after if described else before).append(word)
            if self._mentions(0.94):
                word, described = self._name(COLOUR_WORDS[item["colour"]])
                (after if described else before).append(f"in {word}" if described else word)
            noun = self._name(SHAPE_WORDS[item["shape"]])[0] if self._mentions(0.96) else rng.choice(("thing", "object", "shape"))
        if before and before[-1] not in ("outline of a",) and rng.random() < 0.06:
            after.insert(0, f"that is {before.pop()}")
        phrase = re.sub(r"\ba (?=[aeiou])", "an ", " ".join([*before, noun, *after]))
        if item["place"] and self._mentions(0.62):
            phrase += " " + rng.choice(PLACE_WORDS[item["place"]])
        elif not self.wording.complete and rng.random() < 0.06:
            phrase += f" at x {item['x']} y {item['y']}"
        article = "an" if phrase[0] in "aeiou" else "a"
        return f"{article} {phrase}"

    def caption(self, items: list[dict], background: str, style: str) -> str:
        """One caption for a scene's described objects, background and style."""
        rng = self.rng
        things = [self.thing(item) for item in items]
        if len(items) == 2 and rng.random() < 0.5:
            text = self._related(items, things)
        else:
            text = rng.choice((", ", " and ", ", ")).join(things) if len(things) > 1 else things[0]
        parts = [rng.choice(OPENINGS) + text]
        if self._mentions(0.86):
            word, described = self._name(BACKGROUND_WORDS[background])
            if described:
                parts.append(f"with a background {word}")
            else:
                article = "an" if word[0] in "aeiou" else "a"
                parts.append(
                    rng.choice(
                        (f"on {article} {word} background", f"on {word}", f"with {article} {word} background", f"over a {word} backdrop")
                    )
                )
        if self._mentions(0.94) if style != "flat" else rng.random() < 0.12:
            word, described = self._name(STYLE_WORDS[style])
            phrase = word if described else rng.choice((f"{word} style", f"in {word} style", word))
            if not described and rng.random() < 0.25:
                parts.insert(0, f"{phrase},")
            else:
                parts.append(phrase if rng.random() < 0.5 else f", {phrase}")
        text = " ".join(parts).replace(" ,", ",")
        if self.fillers and rng.random() < self.wording.filler:
            words = text.split(" ")
            for _ in range(rng.randint(1, 3)):
                words.insert(rng.randint(0, len(words)), rng.choice(self.fillers))
            text = " ".join(words)
        return text

    def _related(self, items, things) -> str:
        """Two objects joined by where one is to the other, when that is plain to see."""
        dx, dy = items[1]["px"] - items[0]["px"], items[1]["py"] - items[0]["py"]
        if abs(dx) > 1.6 * abs(dy):
            word = (
                self.rng.choice(("to the left of", "left of", "beside and left of"))
                if dx > 0
                else self.rng.choice(("to the right of", "right of"))
            )
        elif abs(dy) > 1.6 * abs(dx):
            word = self.rng.choice(("above", "over", "on top of")) if dy > 0 else self.rng.choice(("below", "under", "beneath"))
        else:
            word = "and"
        return f"{things[0]} {word} {things[1]}"


WAYS = ("plain", "synonym", "misspelt", "word-free")  # `synonym`: one that was held out of the image models' training
ONE_WAY = {"shape": SHAPE_WORDS, "colour": COLOUR_WORDS, "style": STYLE_WORDS}


class OneWay(Writer):
    """Writes complete, plain captions in which one attribute (a key of `ONE_WAY`) is said in one of `WAYS`."""

    def __init__(self, way: str, attribute: str, rng: random.Random):
        super().__init__(COMPLETE, rng)
        self.way, self.words = way, ONE_WAY[attribute]

    def _name(self, words: Wordings, described: bool = True) -> tuple[str, bool]:
        if words not in self.words.values() or self.way == "plain":
            return words.plain, False
        if self.way == "synonym":
            return self.rng.choice(words.held_synonyms), False
        if self.way == "misspelt":
            return misspell(words.plain, self.rng), False
        return self.rng.choice(words.described + words.held_described), True


def describe(scenes: Scenes, words: Mapping[str, str] | None = None) -> list[tuple[list[dict], str, str]]:
    """The words that are true of each scene: per scene (items, background word, style), items in slot order. Characters without a word in
    `words` are left out.
    """
    columns, rows = scenes.column().tolist(), scenes.row().tolist()
    sizes, backgrounds, styles = scenes.size_word().tolist(), scenes.background_word().tolist(), scenes.style.tolist()
    kinds, colours, fills, counts = scenes.kind.tolist(), scenes.colour.tolist(), scenes.fill.tolist(), scenes.count.tolist()
    xs, ys = scenes.x.tolist(), scenes.y.tolist()
    described = []
    for i, count in enumerate(counts):
        items = []
        for k in range(count):
            name = KINDS[kinds[i][k]]
            if name in SHAPES:
                said = {"shape": name, "colour": COLOURS[colours[i][k]], "fill": FILLS[fills[i][k]]}
            elif words and name in words:
                said = {"word": words[name]}
            else:
                continue
            clear = columns[i][k] >= 0 and rows[i][k] >= 0
            items.append(
                said
                | {
                    "slot": k,
                    "size": SIZES[sizes[i][k]],
                    "place": (CELLS[0][columns[i][k]], CELLS[1][rows[i][k]]) if clear else None,
                    "x": round(xs[i][k] / scenes.width * 20) * 5,
                    "y": round(ys[i][k] / scenes.height * 20) * 5,
                    "px": xs[i][k],
                    "py": ys[i][k],
                }
            )
        described.append((items, BACKGROUNDS[backgrounds[i]], STYLES[styles[i]]))
    return described


def write_captions(scenes: Scenes, writer: Writer, words: Mapping[str, str] | None = None) -> tuple[list[str], list[list[int]]]:
    """A caption for each scene, objects in a random order, and the slots in the order in which the caption names them. words: as for
    `describe`.
    """
    captions, orders = [], []
    for items, background, style in describe(scenes, words):
        writer.rng.shuffle(items)
        captions.append(writer.caption(items, background, style) if items else f"a {background} background")
        orders.append([item["slot"] for item in items])
    return captions, orders
