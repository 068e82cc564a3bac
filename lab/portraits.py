"""Drawn pictures of a character, to teach it from: with its mask and a caption that names it by a word of its own."""

from __future__ import annotations

import random

import torch

from .captions import COMPLETE, Writer, write_captions
from .characters import show
from .measure import placed_in_words
from .scenes import SHAPES, render, sample_scenes


def draw_portraits(
    name: str, count: int, *, word: str, height: int, width: int, seed: int, beside: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Pictures (count, height, width, 3) of one character each, `beside` ordinary objects with it, on plain backgrounds; its masks
    (count, height, width); captions that say all of it and call the character `word`. Raises ValueError where so much does not fit.
    """
    drawn = sample_scenes(
        64 * count + 64 * 8 * beside,
        height=height,
        width=width,
        counts={1 + beside: 1.0},
        characters=1.0 if not beside else 1 / (1 + beside),
        plain=True,
        generator=torch.Generator().manual_seed(seed),
    )
    held = (drawn.kind >= len(SHAPES)) & drawn.present()
    keep = torch.nonzero((held.sum(1) == 1) & (drawn.count == 1 + beside) & placed_in_words(drawn)).flatten()[:count]
    if len(keep) < count:
        raise ValueError(
            f"Only {len(keep)} of {count} pictures with {beside} objects beside fit on {width} x {height} pixels. Ask for less."
        )
    scenes = show(name, drawn[keep])
    pictures, silhouettes = render(scenes, masks=True)
    masks = silhouettes[torch.arange(count), held[keep].to(torch.uint8).argmax(1)]
    captions, _ = write_captions(scenes, Writer(COMPLETE, random.Random(seed)), {name: word})
    return pictures.movedim(1, -1), masks, captions
