"""The lab's concepts that features ship for: what asks for each, with and without it, and whether a picture holds it."""

from __future__ import annotations

import math
import random

import torch

from .captions import COMPLETE, PLACE_WORDS, Writer, describe, write_captions
from .eye import Reading
from .measure import Asked, ask
from .scenes import COLOURS, FILLS, SHAPES, STYLES, Scenes

VALUES = {"shape": SHAPES, "colour": COLOURS, "fill": FILLS, "style": STYLES}
# Each by the word that prompts have for it.
CONCEPTS = {
    **dict.fromkeys(("circle", "star", "heart", "triangle"), "shape"),
    **dict.fromkeys(("red", "yellow", "green", "blue"), "colour"),
    "striped": "fill",
    **dict.fromkeys(("neon", "vintage", "shaded"), "style"),
}
TINY, LIMIT = 1e-30, 40.0


def index_of(concept: str) -> int:
    return VALUES[CONCEPTS[concept]].index(concept)


def _set(scenes: Scenes, attribute: str, values: torch.Tensor) -> None:
    if attribute == "style":
        scenes.style = values
    else:
        column = {"shape": scenes.kind, "colour": scenes.colour, "fill": scenes.fill}[attribute]
        column[:, 0] = values


def with_concept(scenes: Scenes, concept: str) -> Scenes:
    """The same scenes, their first object with a concept."""
    scenes = scenes[torch.arange(len(scenes))]
    _set(scenes, CONCEPTS[concept], torch.full((len(scenes),), index_of(concept)))
    return scenes


def scenes_of(n: int, seed: int, size: int = 64) -> Scenes:
    """n one-object scenes, plain but for what the concepts change in them."""
    return ask(n, objects=1, size=size, seed=seed, plain=True).scenes


def asked(concept: str, n: int, seed: int, size: int = 64, there: bool = True) -> Asked:
    """n one-object scenes with a concept and captions that name all of them; not `there`: with other values in its place, drawn by lot."""
    scenes, attribute, index = scenes_of(n, seed, size), CONCEPTS[concept], index_of(concept)
    if there:
        values = torch.full((n,), index)
    else:
        generator = torch.Generator().manual_seed(seed)
        moved = torch.randint(1, len(VALUES[attribute]), (n,), generator=generator)
        values = (index + moved) % len(VALUES[attribute])
    _set(scenes, attribute, values)
    captions, _ = write_captions(scenes, Writer(COMPLETE, random.Random(seed)))
    return Asked(scenes, captions)


def prompts(concept: str, n: int, seed: int) -> tuple[list[str], list[str]]:
    """n captions with a concept, and of the same scenes with something else in its place."""
    return list(asked(concept, n, seed)), list(asked(concept, n, seed, there=False))


def holds(concept: str, reading: Reading) -> bool:
    """Whether a picture holds a concept."""
    attribute = CONCEPTS[concept]
    if attribute == "style":
        return reading.style == concept
    return any({"shape": seen.kind, "colour": seen.colour, "fill": seen.fill}[attribute] == concept for seen in reading.objects)


def open_captions(concept: str, n: int, seed: int) -> list[str]:
    """n captions of the same scenes for every concept of an attribute, which say nothing of it."""
    said, attribute = [], CONCEPTS[concept]
    for items, background, _ in describe(scenes_of(n, seed)):
        (item,) = items
        colour = "" if attribute == "colour" else f"{item['colour']} "
        noun = "shape" if attribute == "shape" else item["shape"]
        said.append(f"a {item['size']} {colour}{noun} {PLACE_WORDS[item['place']][0]} on a {background} background")
    return said


def amount(concept: str, reading: Reading) -> float:
    """How much of a concept a picture has: log-odds of its word over all others, at most LIMIT; -LIMIT where nothing is seen."""
    attribute = CONCEPTS[concept]
    if attribute == "style":
        shares = reading.styles
    elif reading.objects:
        shares = reading.objects[0].odds[{"shape": "kind"}.get(attribute, attribute)]
    else:
        return -LIMIT
    index, shares = index_of(concept), shares.double()
    share, rest = shares[index], torch.cat([shares[:index], shares[index + 1 :]]).sum()  # not 1 - share, which is 0 where it is sure
    return max(-LIMIT, min(LIMIT, math.log(max(float(share), TINY)) - math.log(max(float(rest), TINY))))
