"""Maps as colours over a picture."""

from __future__ import annotations

import torch
from torch import Tensor

# Dark to bright through blue, magenta and orange: lightness alone tells the height, whoever sees it and however it is printed.
STOPS = torch.tensor([[0.0, 0.0, 0.05], [0.25, 0.05, 0.45], [0.75, 0.2, 0.45], [0.98, 0.55, 0.25], [0.99, 0.95, 0.65]])
SHARE = 0.75  # of the colour, where a map is highest


def colours(heights: Tensor) -> Tensor:
    """(..., 3) for heights (...) in 0..1."""
    at = heights.clamp(0, 1) * (len(STOPS) - 1)
    low = at.floor().long().clamp(max=len(STOPS) - 2)
    share = (at - low)[..., None]
    stops = STOPS.to(heights)
    return stops[low] * (1 - share) + stops[low + 1] * share


def overlay(heights: Tensor, pictures: Tensor | None, phrases: int = 1) -> Tensor:
    """(N, h, w, 3): maps (N, h, w) in 0..1 over pictures (N / phrases or 1, h, w, 3), or over nothing; phrase by phrase."""
    painted = colours(heights)
    if pictures is None:
        return painted
    below = pictures[..., :3].to(heights)
    below = below.expand(len(heights) // phrases, -1, -1, -1) if len(below) == 1 else below
    grey = below.mean(-1, keepdim=True).expand(-1, -1, -1, 3).repeat(len(heights) // len(below), 1, 1, 1)
    share = SHARE * heights.clamp(0, 1)[..., None] ** 0.5
    return grey * (1 - share) + painted * share
