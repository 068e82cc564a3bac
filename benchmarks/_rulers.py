"""How much of a concept pictures hold, in numbers that still move where a reading has long been sure. Doses are told apart by them.

A word's probability says nothing between "none" and "all": nine strengths of which the first three and the last four read alike would be
ranked by noise. So each kind of concept is measured by what it is in a picture:

    shape        log-odds of its word, the mean of both eyes over the picture and its moves by one pixel to four sides
    colour       1 less the distance of the object's mean colour from the named one, over that distance without the concept
    fill, style  of the drawn difference: <x - a, b - a> / |b - a|^2 of a picture x, a and b the scene drawn without the concept and with it

The scene is what the first eye reads in the picture without the concept. Seeds whose picture holds the concept already are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..lab.concepts import CONCEPTS, amount, holds, index_of, with_concept
from ..lab.eye import Eye, Reading
from ..lab.scenes import COLOUR_RGB, COLOURS, FILLS, KINDS, MAX_OBJECTS, STYLES, Scenes, render

OBJECT = 0.3  # of the most that a pixel is apart from the background, from which on it is the object's


def amounts(concept: str, pictures: torch.Tensor, eyes: Sequence[Eye]) -> torch.Tensor:
    """(n, K) of pictures (K, N, H, W, 3) at K strengths, the first without the concept; n of the N seeds."""
    readings = eyes[0].read(pictures[0])
    fresh = [i for i, one in enumerate(readings) if one.objects and not holds(concept, one)]
    pictures, readings = pictures[:, fresh].float(), [readings[i] for i in fresh]
    if not fresh:
        return torch.zeros(0, len(pictures), dtype=torch.float64)
    kind = CONCEPTS[concept]
    told = {"shape": _odds, "colour": _nearness}.get(kind, _drawn)(concept, pictures, readings, eyes)
    return told.double().T


def _odds(concept: str, pictures: torch.Tensor, readings: Sequence[Reading], eyes: Sequence[Eye]) -> torch.Tensor:
    def of(one: torch.Tensor) -> torch.Tensor:
        read = [[amount(concept, seen) for seen in eye.read(moved)] for eye in eyes for moved in _moved(one)]
        return torch.tensor(read, dtype=torch.float64).mean(0)

    return torch.stack([of(one) for one in pictures])


def _moved(pictures: torch.Tensor) -> Iterator[torch.Tensor]:
    height, width = pictures.shape[1:3]
    wider = torch.nn.functional.pad(pictures.movedim(-1, 1), (1, 1, 1, 1), mode="replicate").movedim(1, -1)
    for top, left in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
        yield wider[:, top : top + height, left : left + width]


def _nearness(concept: str, pictures: torch.Tensor, readings: Sequence[Reading], eyes: Sequence[Eye]) -> torch.Tensor:
    grounds = torch.tensor([one.background for one in readings])[:, None, None, None]
    apart = (pictures - grounds).abs().amax(-1, keepdim=True)  # (K, n, H, W, 1)
    place = apart > OBJECT * apart.amax((2, 3), keepdim=True)
    colours = (pictures * place).sum((2, 3)) / place.sum((2, 3)).clamp_min(1)
    distances = (colours - torch.tensor(COLOUR_RGB[index_of(concept)])).norm(dim=-1)
    return 1 - distances / distances[0]


def scenes_of(readings: Sequence[Reading], height: int, width: int) -> Scenes:
    """What the eye read as scenes, the surest object of each."""
    n, seen = len(readings), [one.objects[0] for one in readings]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        slots = torch.zeros(n, MAX_OBJECTS, dtype=dtype)
        slots[:, 0] = torch.tensor(values)
        return slots

    words = ((KINDS, [one.kind for one in seen]), (COLOURS, [one.colour for one in seen]), (FILLS, [one.fill for one in seen]))
    return Scenes(
        height,
        width,
        torch.ones(n, dtype=torch.long),
        *(column([known.index(word) for word in said], torch.long) for known, said in words),
        *(column([getattr(one, name) for one in seen]) for name in ("diameter", "x", "y")),
        torch.tensor([one.background for one in readings]),
        torch.tensor([STYLES.index(one.style) for one in readings]),
    )


def _drawn(concept: str, pictures: torch.Tensor, readings: Sequence[Reading], eyes: Sequence[Eye]) -> torch.Tensor:
    without = scenes_of(readings, *pictures.shape[2:4])
    a, b = (render(scenes).movedim(1, -1) for scenes in (without, with_concept(without, concept)))
    way = b - a
    return ((pictures - a) * way).sum((2, 3, 4)) / way.square().sum((1, 2, 3))
