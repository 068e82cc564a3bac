"""Drawn scenes that differ in one thing: pictures before and after a change."""

from __future__ import annotations

import torch

from .scenes import COLOURS, FILLS, MAX_DIAMETER, MIN_DIAMETER, STYLES, Scenes, render, sample_scenes

# What changes: an attribute of all objects or of the scene, and its values before and after.
CHANGES: dict[str, tuple[str, float | int, float | int]] = {
    "small to large": ("diameter", MIN_DIAMETER, MAX_DIAMETER),
    "dark to light": ("background", 0.07, 0.93),
    "green to blue": ("colour", COLOURS.index("green"), COLOURS.index("blue")),
    "outline to solid": ("fill", FILLS.index("outline"), FILLS.index("solid")),
    "vintage to neon": ("style", STYLES.index("vintage"), STYLES.index("neon")),
    **{f"flat to {style}": ("style", STYLES.index("flat"), STYLES.index(style)) for style in STYLES if style != "flat"},
}


def changed(scenes: Scenes, change: str, after: bool) -> Scenes:
    """The scenes with what changes set to how it is before or after."""
    attribute, *values = CHANGES[change]
    copy = scenes[torch.arange(len(scenes))]
    setattr(copy, attribute, torch.full_like(getattr(copy, attribute), values[after]))
    return copy


def draw_pairs(change: str, count: int, *, height: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures before and after, (count, height, width, 3) in 0..1 each: plain scenes of one object, of every kind."""
    scenes = sample_scenes(count, height=height, width=width, plain=True, generator=torch.Generator().manual_seed(seed))
    margin = MAX_DIAMETER / 2 + 1  # the largest still fits
    scenes.x, scenes.y = scenes.x.clamp(margin, width - margin), scenes.y.clamp(margin, height - margin)
    before, after = (render(changed(scenes, change, side)).movedim(1, -1) for side in (False, True))
    return before, after
