"""Judge an eye: what share of each attribute it reads rightly, and how well its validity score tells scenes from spoilt pictures."""

from __future__ import annotations

import torch

from . import corruptions
from .eye import Eye, Reading, Seen, cell_of, size_word
from .scenes import BACKGROUNDS, CELLS, COLOURS, FILLS, KINDS, SHAPES, SIZES, STYLES, Scenes, render, sample_scenes

# (height, width): {objects: weight}, pictures per 100
SCENES = {(64, 64): ({1: 0.5, 2: 0.5}, 40), (64, 96): ({1: 0.4, 2: 0.4, 3: 0.2}, 20), (128, 128): ({1: 0.3, 3: 0.4, 6: 0.3}, 40)}


def judged_scenes(n: int, *, seed: int, characters: float = 0.12) -> list[Scenes]:
    """About n new scenes of every kind, one part for each canvas size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        sample_scenes(n * share // 100, height=height, width=width, counts=counts, characters=characters, generator=generator)
        for (height, width), (counts, share) in SCENES.items()
    ]


def nearest(reading: Reading, x: float, y: float) -> Seen | None:
    """The seen object nearest to a point."""
    return min(reading.objects, key=lambda seen: (seen.x - x) ** 2 + (seen.y - y) ** 2, default=None)


def compare(scenes: Scenes, readings: list[Reading]) -> dict[str, list[bool]]:
    """What was read rightly. Per object: kind, colour, fill, size, place (each where the truth has it), character (which of the six); per
    scene: count, background, style.
    """
    right = {key: [] for key in ("kind", "character", "colour", "fill", "size", "place", "count", "background", "style")}
    sizes, columns, rows, backgrounds = scenes.size_word(), scenes.column(), scenes.row(), scenes.background_word()
    for i, reading in enumerate(readings):
        count = int(scenes.count[i])
        right["count"].append(len(reading.objects) == count)
        right["background"].append(reading.background_word() == BACKGROUNDS[int(backgrounds[i])])
        right["style"].append(reading.style == STYLES[int(scenes.style[i])])
        for k in range(count):
            kind = int(scenes.kind[i, k])
            seen = nearest(reading, float(scenes.x[i, k]), float(scenes.y[i, k]))
            right["kind"].append(seen is not None and seen.kind == KINDS[kind])
            if kind >= len(SHAPES):
                right["character"].append(right["kind"][-1])
            else:
                right["colour"].append(seen is not None and seen.colour == COLOURS[int(scenes.colour[i, k])])
                right["fill"].append(seen is not None and seen.fill == FILLS[int(scenes.fill[i, k])])
                right["size"].append(seen is not None and SIZES[size_word(seen.diameter)] == SIZES[int(sizes[i, k])])
            if columns[i, k] >= 0 and rows[i, k] >= 0:
                cell = CELLS[0][int(columns[i, k])], CELLS[1][int(rows[i, k])]
                right["place"].append(seen is not None and cell_of(seen.x / scenes.width, seen.y / scenes.height) == cell)
    return right


def judge(eye: Eye, rebuild, *, n: int = 2000, seed: int = 990) -> dict[str, dict[str, list[bool]]]:
    """{"true": ..., "recon": ...}: `compare` on about n new scenes as drawn, and as `rebuild` (pictures (N, 3, H, W) in and out) gives
    them back.
    """
    told = {"true": {}, "recon": {}}
    for scenes in judged_scenes(n, seed=seed):
        pictures = render(scenes)
        for key, shown in (("true", pictures), ("recon", torch.cat([rebuild(part) for part in pictures.split(64)]))):
            for attribute, right in compare(scenes, eye.read(shown.movedim(1, -1))).items():
                told[key].setdefault(attribute, []).extend(right)
    return told


def validity(eye: Eye, rebuild, *, n: int = 1000, seed: int = 991) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Validity scores of the autoencoder's rebuilds of about n new scenes, and of other scenes spoilt in each of the unseen ways."""
    good, spoilt = [], {name: [] for name in corruptions.UNSEEN}
    for valid, other in zip(judged_scenes(n, seed=seed), judged_scenes(n, seed=seed + 1), strict=True):
        shown = torch.cat([rebuild(part) for part in render(valid).split(64)])
        good += [reading.valid for reading in eye.read(shown.movedim(1, -1))]
        pictures = render(other)
        for name, way in corruptions.UNSEEN.items():
            spoilt[name] += [reading.valid for reading in eye.read(way(pictures).movedim(1, -1))]
    return torch.tensor(good), {name: torch.tensor(scores) for name, scores in spoilt.items()}


def auroc(good: torch.Tensor, bad: torch.Tensor) -> float:
    """Chance that a good score lies above a bad one, ties counting half."""
    return float(((good[:, None] > bad).float() + 0.5 * (good[:, None] == bad)).mean())
