"""A picture of regions: their colours over a background, with their names."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..ops.masks import pool
from .regions import Regions

TINT = 0.5
GROUND = 0.16
LABEL_SHARE = 28  # a label's height is this part of the picture's shorter side


def draw(regions: Regions, masks: torch.Tensor, background: torch.Tensor | None = None) -> torch.Tensor:
    """(1, H, W, 3) in 0..1 of masks (K, H, W) in the regions' colours, over a background (h, w, 3) of any size or a dark ground."""
    height, width = masks.shape[-2:]
    if background is None:
        picture = torch.full((height, width, 3), GROUND)
    else:
        picture = pool(background.movedim(-1, 0).float().cpu(), height, width).movedim(0, -1).clone()
    listed = list(zip(regions.document.regions, masks, strict=True))
    for region, mask in listed:
        colour = torch.tensor([int(region.colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        picture += TINT * mask[..., None] * (colour - picture)
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    pen = ImageDraw.Draw(image, "RGBA")
    font = ImageFont.load_default(max(9, min(height, width) // LABEL_SHARE))
    for region, mask in reversed(listed):
        rows, columns = (mask >= 0.5).any(1).nonzero(), (mask >= 0.5).any(0).nonzero()
        if not len(rows):
            continue
        at = int(columns[0]) + 4, int(rows[0]) + 3
        left, top, right, bottom = pen.textbbox(at, region.name, font=font)
        pen.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=(0, 0, 0, 184))
        pen.text(at, region.name, font=font, fill="white")
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]
