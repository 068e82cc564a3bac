"""What the lab's sliders move, as numbers that can be read off any picture, and what must not move with it.

Size, hue and background are lengths, degrees and lightness, and the eye reads them as such. Of a fill and a style it reads words, whose
odds say nothing between surely one and surely the other: nine strengths of which six read alike would be ranked by noise, while the
pictures turn step by step. These two are told by the share of the drawn difference, <x - a, b - a> / |b - a|^2 of a picture x, a and b its
scene drawn at the one pole and at the other: 0 as drawn at the one, 1 as at the other, and exact in between. The scene is what the eye
reads in the picture without the slider, one for all strengths, so that a reading that wavers moves no number.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch

from .eye import Reading, as_scenes
from .scenes import BACKGROUND_RANGES, COLOUR_RGB, COLOURS, FILLS, MAX_DIAMETER, MIN_DIAMETER, STYLES, render

LEAST = 1.0  # of |b - a|^2, in pixels of full contrast: below it the poles look alike, as with a thin shape that is all outline
CHROMA = 0.2  # of a pixel, from which on it has a colour
NAN = math.nan


def hue_of(rgb: Sequence[float]) -> float:
    """Degrees, 0 red, 120 green, 240 blue."""
    return 360 * colorsys.rgb_to_hsv(*rgb)[0]


HUES = {name: hue_of(rgb) for name, rgb in zip(COLOURS, COLOUR_RGB, strict=True)}
# How far each attribute goes in the scenes.
RANGES = {
    "size": MAX_DIAMETER - MIN_DIAMETER,
    "hue": HUES["blue"] - HUES["green"],
    "fill": 1.0,
    "background": BACKGROUND_RANGES[-1][1] - BACKGROUND_RANGES[0][0],
    "neon": 1.0,
}
# Of those that are told by the drawn difference, the poles.
POLES = {"fill": (FILLS.index("outline"), FILLS.index("solid")), "neon": (STYLES.index("vintage"), STYLES.index("neon"))}
MEASURES = {
    "size": "diameter in pixels",
    "hue": "hue in degrees, 127 green to 232 blue",
    "fill": "fill, 0 outlined to 1 solid",
    "background": "background lightness, 0 to 1",
    "neon": "style, 0 vintage to 1 neon",
}


def attribute(slider: str, picture: torch.Tensor, reading: Reading, plain: Reading | None = None) -> float:
    """The attribute that a slider moves, in a picture (H, W, 3) and the eye's reading of it; NaN where there is nothing to read. plain:
    what the eye reads in the picture without the slider, if that is another one; `fill` and `neon` are told by its scene.
    """
    if slider == "background":
        return reading.background
    if slider in POLES:
        return _share(slider, picture, plain or reading)
    if not reading.objects:
        return NAN
    seen = reading.objects[0]
    return seen.diameter if slider == "size" else _hue(picture, seen)


def _share(slider: str, picture: torch.Tensor, plain: Reading) -> float:
    """Of the way from one pole's drawing of a scene to the other's."""
    if not plain.objects:
        return NAN
    scene = as_scenes([plain], *picture.shape[:2])
    ends = []
    for value in POLES[slider]:
        drawn = scene[torch.arange(1)]
        if slider == "neon":
            drawn.style[:] = value
        else:
            drawn.fill[:] = value
        ends.append(render(drawn)[0].movedim(0, -1).double())
    way = ends[1] - ends[0]
    length = float(way.square().sum())
    return float(((picture.double() - ends[0]) * way).sum()) / length if length >= LEAST else NAN


def _hue(picture: torch.Tensor, seen) -> float:
    """Of the mean colour of the coloured pixels within the object's circle; NaN where there are fewer than eight."""
    height, width = picture.shape[:2]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    inside = torch.hypot(x - seen.x, y - seen.y) < seen.diameter / 2
    pixels = picture[inside]
    coloured = pixels[pixels.amax(-1) - pixels.amin(-1) > CHROMA]
    return hue_of(coloured.mean(0).tolist()) if len(coloured) >= 8 else NAN


def others(slider: str, plain: Reading, moved: Reading) -> float:
    """How much changed between two readings beside what the slider moves: the mean over the other attributes, each as a share of its range
    (0 nothing, 1 all). An object that is gone counts as all.
    """
    changes = {}
    if slider != "background":
        changes["background"] = abs(moved.background - plain.background) / RANGES["background"]
    if slider != "neon":
        changes["style"] = _moved(plain.styles, moved.styles)
    if plain.objects:
        before, after = plain.objects[0], moved.objects[0] if moved.objects else None
        for name, of in (("kind", ""), ("colour", "hue"), ("fill", "fill")):
            if slider != of:
                changes[name] = 1.0 if after is None else _moved(before.odds[name], after.odds[name])
        if slider != "size":
            changes["size"] = 1.0 if after is None else min(1.0, abs(after.diameter - before.diameter) / RANGES["size"])
    return sum(changes.values()) / len(changes)


def shift(plain: Reading, moved: Reading) -> float:
    """Pixels between the surest objects' centres; NaN where one has none."""
    if not plain.objects or not moved.objects:
        return NAN
    return math.hypot(moved.objects[0].x - plain.objects[0].x, moved.objects[0].y - plain.objects[0].y)


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of the odds that went elsewhere (total variation)."""
    return float((after - before).abs().sum()) / 2
