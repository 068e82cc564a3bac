"""Shapes to masks, and masks to token grids.

A shape is drawn by its signed distance in pixels, negative inside, through a one-pixel ramp: antialiased at any size, the same on every
machine. Coordinates are shares of the canvas, 0 to 1, so that one drawing serves every size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Box(NamedTuple):
    """A rectangle from its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    erase: bool = False


class Ellipse(NamedTuple):
    """The ellipse that fills a rectangle."""

    x: float
    y: float
    width: float
    height: float
    erase: bool = False


class Polygon(NamedTuple):
    """A closed outline, filled by the even-odd rule."""

    points: tuple[tuple[float, float], ...]
    erase: bool = False


class Stroke(NamedTuple):
    """A brush drawn along points; the radius is a share of the canvas's shorter side."""

    points: tuple[tuple[float, float], ...]
    radius: float
    erase: bool = False


Shape = Box | Ellipse | Polygon | Stroke
Overlap = Literal["normalize", "priority", "max"]


def rasterize(shapes: Sequence[Shape], height: int, width: int, feather: float = 0.0) -> Tensor:
    """(height, width) float32 in 0..1: shapes laid over one another in order, those that erase taking away.

    `feather` is a share of the shorter side: the edge's ramp is as wide, half of it on either side.
    """
    y = (torch.arange(height, dtype=torch.float32) + 0.5)[:, None].expand(height, width)
    x = (torch.arange(width, dtype=torch.float32) + 0.5)[None].expand(height, width)
    ramp = max(1.0, feather * min(height, width))
    mask = torch.zeros(height, width)
    for shape in shapes:
        cover = (0.5 - _distance(shape, x, y, height, width, ramp / 2) / ramp).clamp(0, 1)
        mask = mask * (1 - cover) if shape.erase else torch.maximum(mask, cover)
    return mask


def _distance(shape: Shape, x: Tensor, y: Tensor, height: int, width: int, reach: float) -> Tensor:
    """(height, width) signed distance to a shape's edge in pixels; of polygons and strokes none greater than `reach`."""
    if isinstance(shape, Box):
        dx = _outside(x, shape.x, shape.width, width)
        dy = _outside(y, shape.y, shape.height, height)
        return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)
    if isinstance(shape, Ellipse):
        a, b = max(shape.width * width / 2, 1e-6), max(shape.height * height / 2, 1e-6)
        u, v = x - shape.x * width - a, y - shape.y * height - b
        # First-order distance f / |grad f| of f = sqrt(u^2/a^2 + v^2/b^2) - 1: exact on circles, right at the edge of any ellipse.
        k = torch.hypot(u / a, v / b).clamp(min=1e-6)
        return (k - 1) * k / torch.hypot(u / a**2, v / b**2).clamp(min=1e-6)
    points = torch.tensor(shape.points, dtype=torch.float32) * torch.tensor([width, height], dtype=torch.float32)
    if isinstance(shape, Stroke):
        radius = shape.radius * min(height, width)
        return _to_segments(points, x, y, radius + reach) - radius
    closed = torch.cat([points, points[:1]])
    distance = _to_segments(closed, x, y, reach)
    return torch.where(_inside(closed, height, width), -distance, distance)


def _outside(at: Tensor, start: float, length: float, pixels: int) -> Tensor:
    """Distance beyond the nearer of two edges. An edge on the canvas's own, or past it, is none: nothing softens there."""
    first = start * pixels if start > 0 else -2.0 * pixels
    last = (start + length) * pixels if start + length < 1 else 3.0 * pixels
    return torch.maximum(first - at, at - last)


def _to_segments(points: Tensor, x: Tensor, y: Tensor, reach: float) -> Tensor:
    """Distance to the nearest of the segments between successive points, and to a lone point; `reach` where they are farther.

    Each segment is measured in the rectangle that it reaches only: a drawing of thousands of points takes milliseconds.
    """
    height, width = x.shape
    nearest = torch.full_like(x, reach)
    starts, ends = (points, points) if len(points) == 1 else (points[:-1], points[1:])
    along = ends - starts
    length = along.square().sum(1).clamp(min=1e-12)
    first = (torch.minimum(starts, ends) - reach - 0.5).floor().clamp(min=0).long().tolist()
    last = (torch.maximum(starts, ends) + reach + 0.5).ceil().long().tolist()
    for (x0, y0), (dx, dy), squared, (left, top), (right, bottom) in zip(
        starts.tolist(), along.tolist(), length.tolist(), first, last, strict=True
    ):
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            continue
        part = slice(top, bottom), slice(left, right)
        u, v = x[part] - x0, y[part] - y0
        share = ((u * dx + v * dy) / squared).clamp(0, 1)
        nearest[part] = torch.minimum(nearest[part], torch.hypot(u - share * dx, v - share * dy))
    return nearest


def _inside(closed: Tensor, height: int, width: int) -> Tensor:
    """(height, width) bool by the even-odd rule: how many edges of a closed outline a ray from a pixel's centre to the left crosses."""
    flips = torch.zeros(height, width + 1, dtype=torch.int32)
    for (x0, y0), (x1, y1) in zip(closed[:-1].tolist(), closed[1:].tolist(), strict=True):
        # Rows whose centre lies in [lower, upper): a corner that two edges share counts once.
        top, bottom = max(math.ceil(min(y0, y1) - 0.5), 0), min(math.ceil(max(y0, y1) - 0.5), height)
        if top < bottom:
            rows = torch.arange(top, bottom)
            at = x0 + (rows + 0.5 - y0) / (y1 - y0) * (x1 - x0)
            flips[rows, (at - 0.5).ceil().clamp(0, width).long()] += 1
    return (flips[:, :width].cumsum(1) % 2).bool()


def combine(masks: Tensor, weights: Tensor, rule: Overlap) -> Tensor:
    """(K, h, w) masks of regions, first on top, times their weights (K,), made to share each place: their sum is at most 1 everywhere.

    normalize  where the sum passes 1, every region gets its share of it
    priority   a region has what the ones before it leave
    max        the strongest has the place, the first of equals
    """
    masks = masks * weights[:, None, None]
    if rule == "normalize":
        return masks / masks.sum(0).clamp(min=1)
    if rule == "priority":
        left = torch.ones_like(masks[0])
        shares = []
        for mask in masks:
            shares.append(torch.minimum(mask, left))
            left = left - shares[-1]
        return torch.stack(shares) if shares else masks
    if rule == "max":
        if not len(masks):
            return masks
        return masks * F.one_hot(masks.argmax(0), len(masks)).movedim(-1, 0)
    raise ValueError(f"There is no overlap rule '{rule}'. Choose one of: normalize, priority, max.")


def pool(masks: Tensor, height: int, width: int) -> Tensor:
    """(K, h, w) masks averaged over the area of each cell of another grid, whatever the ratio: (K, height, width). Sums over K stay what
    they are.
    """
    if masks.shape[-2:] == (height, width):
        return masks
    return _averages(height, masks.shape[-2], masks.device) @ masks @ _averages(width, masks.shape[-1], masks.device).t()


def _averages(cells: int, pixels: int, device) -> Tensor:
    """(cells, pixels): the share of each pixel in each cell's average, where cells and pixels divide the same length."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    first, last = edges[:-1, None], edges[1:, None]
    at = torch.arange(pixels, dtype=torch.float64)
    overlap = (torch.minimum(last, at + 1) - torch.maximum(first, at)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float().to(device)


def harden(masks: Tensor) -> Tensor:
    """(K, h, w) shares, and what they leave to the rest, to 0 or 1: each place to the largest, the first of equals, the rest last."""
    rest = (1 - masks.sum(0, keepdim=True)).clamp(min=0)
    winner = torch.cat([masks, rest]).argmax(0)
    return F.one_hot(winner, len(masks) + 1).movedim(-1, 0)[:-1].to(masks.dtype)
