"""Group normalisation in which places of a picture keep moments of their own."""

from __future__ import annotations

import torch
from torch import Tensor

LENT = 1.0  # cells' worth of the whole picture's moments in each place's own: a place of a few cells has too few to go by


def normalised(x: Tensor, rows: Tensor, own: Tensor, groups: int, eps: float) -> Tensor:
    """x (B, C, h, w) of mean 0 and variance 1 in each group of channels (Wu & He 2018, arXiv 1803.08494, eq. 2), without weight and bias.

    Each place by moments of its own: rows (P, B or 1, h * w) are the places' shares of the positions, own (P,) from 0 to 1 how far. Where
    nobody has a share, and as far as the rest of `own`, by those of all of the picture. Shares that add up to more than 1 are scaled to 1.
    """
    batch, channels, *size = x.shape
    cells = x.float().reshape(batch, groups, channels // groups, -1)
    centred = cells - cells.mean((2, 3), keepdim=True)
    squares = centred.square().mean(2)
    variance = squares.mean(2)
    rows = rows.float()
    rows = (rows / rows.sum(0).clamp(min=1)).expand(-1, batch, -1)
    count = rows.sum(2).t()[:, None] + LENT  # (B, 1, P)
    mean = torch.einsum("bgn,pbn->bgp", centred.mean(2), rows) / count
    scale = ((torch.einsum("bgn,pbn->bgp", squares, rows) + LENT * variance[..., None]) / count - mean.square() + eps).rsqrt()
    acting = rows * own.float()[:, None, None]
    gain = (1 - acting.sum(0))[:, None] * (variance + eps).rsqrt()[..., None] + torch.einsum("bgp,pbn->bgn", scale, acting)
    shift = torch.einsum("bgp,pbn->bgn", mean * scale, acting)
    return (centred * gain[:, :, None] - shift[:, :, None]).reshape(batch, channels, *size)
