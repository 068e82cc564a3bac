"""What the lab's sliders move, as numbers that can be read off any picture, and what must not move with it."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import torch

from .eye import Reading
from .scenes import BACKGROUND_RANGES, COLOUR_RGB, COLOURS, FILLS, MAX_DIAMETER, MIN_DIAMETER, STYLES

SURE = 6.0  # log-odds past which a word is as sure as drawn scenes make it: 400 to 1
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
    "fill": 2 * SURE,
    "background": BACKGROUND_RANGES[-1][1] - BACKGROUND_RANGES[0][0],
    "neon": 8.0,  # as the eye reads drawn scenes
}
MEASURES = {
    "size": "diameter in pixels",
    "hue": "hue in degrees, 127 green to 232 blue",
    "fill": "solid 6 to outlined -6, log-odds",
    "background": "background lightness, 0 to 1",
    "neon": "neon 4 to vintage -4, log-odds",
}


def attribute(slider: str, picture: torch.Tensor, reading: Reading) -> float:
    """The attribute that a slider moves, in a picture (H, W, 3) and the eye's reading of it; NaN where there is no object to read."""
    if slider == "background":
        return reading.background
    if slider == "neon":
        return _odds(reading.styles, STYLES, "neon", "vintage")
    if not reading.objects:
        return NAN
    seen = reading.objects[0]
    if slider == "size":
        return seen.diameter
    if slider == "fill":
        return _odds(seen.odds["fill"], FILLS, "solid", "outline")
    return _hue(picture, seen)


def _odds(shares: torch.Tensor, words: Sequence[str], more: str, less: str) -> float:
    """Log-odds of one word over another."""
    shares = shares.double().clamp(min=1e-9).log()
    return float((shares[words.index(more)] - shares[words.index(less)]).clamp(-SURE, SURE))


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
