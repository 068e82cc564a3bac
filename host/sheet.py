"""Pictures side by side under their labels, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN_SHARE = 16  # of a picture's side
LINES_SHARE = 12
LEAST_LINE = 12


class Sheet(NamedTuple):
    """page: (1, H, W, 3) in 0..1. columns: for every label where its pictures lie, {label, pictures: [{x, y, width, height}]} in pixels."""

    page: torch.Tensor
    columns: list[dict]


def lay_out(batches: Sequence[torch.Tensor], labels: Sequence[str], title: str, side: int, across: int) -> Sheet:
    """A column for every batch of pictures (n, h, w, 3), which stand below one another under its label; after `across` columns (0: never)
    a new band begins. Each picture is drawn `side` pixels long.
    """
    pictures = [[_fitted(picture, side) for picture in batch] for batch in batches]
    width, height = (max(picture.size[axis] for column in pictures for picture in column) for axis in (0, 1))
    margin, line = max(4, side // MARGIN_SHARE), max(LEAST_LINE, side // LINES_SHARE)
    across = min(across or len(pictures), len(pictures))
    bands = [range(first, min(first + across, len(pictures))) for first in range(0, len(pictures), across)]
    rows = [max(len(pictures[column]) for column in band) for band in bands]
    top = margin + (2 * line if title else 0)
    page_height = top + sum(2 * line + count * (height + margin) for count in rows)
    page = Image.new("RGB", (margin + across * (width + margin), page_height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=line)
    if title:
        draw.text((margin, margin), _cut(title, font, page.width - 2 * margin), fill="black", font=font)
    columns = []
    for band, count in zip(bands, rows, strict=True):
        for place, column in enumerate(band):
            left = margin + place * (width + margin)
            draw.text((left + width // 2, top + line), _cut(labels[column], font, width), fill="black", font=font, anchor="ms")
            places = []
            for row, picture in enumerate(pictures[column]):
                at = left + (width - picture.width) // 2, top + 2 * line - line // 2 + row * (height + margin)
                page.paste(picture, at)
                places.append({"x": at[0], "y": at[1], "width": picture.width, "height": picture.height})
            columns.append({"label": labels[column], "pictures": places})
        top += 2 * line + count * (height + margin)
    return Sheet(torch.from_numpy(np.asarray(page).astype(np.float32) / 255)[None], columns)


def _fitted(picture: torch.Tensor, side: int) -> Image.Image:
    """A picture (h, w, 3) with its longer side `side` pixels long; small ones keep their pixels as squares."""
    image = Image.fromarray((picture[..., :3].expand(-1, -1, 3).float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    scale = side / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _cut(text: str, font, width: int) -> str:
    """As much of a text as fits on a line of this width."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
