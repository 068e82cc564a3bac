"""How much of a concept pictures hold, in numbers that still move where a reading has long been sure. Doses are told apart by them.

A word's probability says nothing between "none" and "all": nine strengths of which the first three and the last four read alike would be
ranked by noise. So each kind of concept is measured by what it is in a picture:

    shape                its logit less the mean of the other shapes', mean of both eyes over the picture, its mirror image and their
                         moves by one pixel to four sides
    colour, fill, style  of the drawn difference: <x - a, b - a> / |b - a|^2 of a picture x, a and b the scene drawn without the concept
                         and with it

Log-odds over all other shapes at once follow whichever is nearest: what a picture has of it wanders while the shape itself grows. Nearness
to the named colour falls again where a picture comes past it.

The scene is what the first eye reads in the picture without the concept. Seeds whose picture holds the concept already are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..lab.concepts import CONCEPTS, TINY, holds, index_of, with_concept
from ..lab.eye import Eye, Reading, as_scenes
from ..lab.scenes import SHAPES, render

UNSEEN = -15.0  # of a picture without an object: what pictures of another shape have


def amounts(concept: str, pictures: torch.Tensor, eyes: Sequence[Eye]) -> torch.Tensor:
    """(n, K) of pictures (K, N, H, W, 3) at K strengths, the first without the concept; n of the N seeds."""
    readings = eyes[0].read(pictures[0])
    fresh = without(concept, readings)
    if not fresh:
        return torch.zeros(0, len(pictures), dtype=torch.float64)
    pictures, readings = pictures[:, fresh].float(), [readings[i] for i in fresh]
    told = _logits(concept, pictures, eyes) if CONCEPTS[concept] == "shape" else _drawn(concept, pictures, readings)
    return told.double().T


def without(concept: str, readings: Sequence[Reading]) -> list[int]:
    """Which pictures of an object do not hold the concept."""
    return [i for i, one in enumerate(readings) if one.objects and not holds(concept, one)]


def _logits(concept: str, pictures: torch.Tensor, eyes: Sequence[Eye]) -> torch.Tensor:
    def logit(reading: Reading) -> float:
        if not reading.objects:
            return UNSEEN
        logits = reading.objects[0].odds["kind"][: len(SHAPES)].double().clamp_min(TINY).log()  # but for a constant
        return float((logits[index_of(concept)] - logits.mean()) * len(SHAPES) / (len(SHAPES) - 1))

    def of(one: torch.Tensor) -> torch.Tensor:
        read = [[logit(seen) for seen in eye.read(moved)] for eye in eyes for moved in _moved(one)]
        return torch.tensor(read, dtype=torch.float64).mean(0)

    return torch.stack([of(one) for one in pictures])


def _moved(pictures: torch.Tensor) -> Iterator[torch.Tensor]:
    height, width = pictures.shape[1:3]
    wider = torch.nn.functional.pad(pictures.movedim(-1, 1), (1, 1, 1, 1), mode="replicate").movedim(1, -1)
    for top, left in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2)):
        moved = wider[:, top : top + height, left : left + width]
        yield from (moved, moved.flip(2))


def _drawn(concept: str, pictures: torch.Tensor, readings: Sequence[Reading]) -> torch.Tensor:
    scenes = as_scenes(readings, *pictures.shape[2:4])
    a, b = (render(one).movedim(1, -1) for one in (scenes, with_concept(scenes, concept)))
    way = b - a
    return ((pictures - a) * way).sum((2, 3, 4)) / way.square().sum((1, 2, 3)).clamp_min(TINY)  # none of what is read as a character
