"""Ways to spoil a picture, for teaching validity. Each takes pictures (N, 3, H, W) in 0..1 and returns spoilt ones of the same shape.

`TAUGHT` kinds train the eye; `UNSEEN` kinds only judge it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .scenes import Scenes, render


def noise(pictures: torch.Tensor) -> torch.Tensor:
    """Grain over all of it, 8 to 35 % strong."""
    level = 0.08 + 0.27 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    return (pictures + level * torch.randn_like(pictures)).clamp(0, 1)


def blur(pictures: torch.Tensor) -> torch.Tensor:
    """Everything out of focus."""
    factor = 6
    small = F.avg_pool2d(pictures, factor, factor, ceil_mode=True)
    return F.interpolate(small, pictures.shape[-2:], mode="bilinear", align_corners=False)


def blend(pictures: torch.Tensor) -> torch.Tensor:
    """Two scenes shining through each other."""
    share = 0.35 + 0.3 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    return share * pictures + (1 - share) * pictures.roll(1, 0)


def smear(pictures: torch.Tensor) -> torch.Tensor:
    """Motion along one direction, 9 to 15 pixels long."""
    length = 5 + int(torch.randint(3, ()))
    kernel = torch.zeros(2 * length + 1, 2 * length + 1, device=pictures.device)
    for t in range(-length, length + 1):
        kernel[length + round(t * 0.5), length + t] = 1
    if torch.rand(()) < 0.5:
        kernel = kernel.T
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(pictures, (length,) * 4, mode="replicate"), kernel.contiguous(), groups=3)


def blank(pictures: torch.Tensor) -> torch.Tensor:
    """Background alone."""
    edge = pictures[:, :, :2].mean((2, 3), keepdim=True)
    return (edge + 0.01 * torch.randn_like(pictures)).clamp(0, 1)


def merge(scenes: Scenes) -> torch.Tensor:
    """Objects on top of one another: every second object moved on to the first."""
    moved = scenes[torch.arange(len(scenes), device=scenes.count.device)]
    spread = 0.3 * scenes.diameter[:, :1]
    moved.x = torch.where(moved.present(), scenes.x[:, :1] + spread * torch.randn_like(scenes.x), scenes.x)
    moved.y = torch.where(moved.present(), scenes.y[:, :1] + spread * torch.randn_like(scenes.y), scenes.y)
    moved.count = moved.count.clamp(min=2)
    moved.x, moved.y = moved.x.clamp(8, scenes.width - 8), moved.y.clamp(8, scenes.height - 8)
    return render(moved)


def halves(pictures: torch.Tensor) -> torch.Tensor:
    """Left and right halves of two scenes put together."""
    width = pictures.shape[-1] // 2
    return torch.cat([pictures[..., :width], pictures.roll(1, 0)[..., width:]], -1)


def mosaic(pictures: torch.Tensor) -> torch.Tensor:
    """Coarse squares of four to six pixels."""
    size = 4 + int(torch.randint(3, ()))
    small = F.avg_pool2d(pictures, size, size, ceil_mode=True)
    return small.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., : pictures.shape[2], : pictures.shape[3]]


def twirl(pictures: torch.Tensor) -> torch.Tensor:
    """Turned about a point, the more the nearer."""
    n, _, h, w = pictures.shape
    device = pictures.device
    y, x = torch.meshgrid(torch.arange(h, device=device) + 0.5, torch.arange(w, device=device) + 0.5, indexing="ij")
    cx, cy = (length * (0.25 + 0.5 * torch.rand(n, 1, 1, device=device)) for length in (w, h))
    angle = 2.5 * torch.exp(-torch.hypot(x - cx, y - cy) / 14)
    u = cx + (x - cx) * torch.cos(angle) - (y - cy) * torch.sin(angle)
    v = cy + (x - cx) * torch.sin(angle) + (y - cy) * torch.cos(angle)
    return F.grid_sample(pictures, torch.stack([2 * u / w - 1, 2 * v / h - 1], -1), padding_mode="border", align_corners=False)


def jitter(pictures: torch.Tensor) -> torch.Tensor:
    """Each cell of three to five pixels taken from up to three pixels away."""
    n, _, h, w = pictures.shape
    size = 3 + int(torch.randint(3, ()))
    shift = 6 * torch.rand(n, 2, h // size + 1, w // size + 1, device=pictures.device) - 3
    across, down = shift.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :h, :w].unbind(1)
    y, x = torch.meshgrid(torch.arange(h, device=pictures.device) + 0.5, torch.arange(w, device=pictures.device) + 0.5, indexing="ij")
    grid = torch.stack([2 * (x + across) / w - 1, 2 * (y + down) / h - 1], -1)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def bite(pictures: torch.Tensor) -> torch.Tensor:
    """Squares of eight to sixteen pixels copied from elsewhere in the picture."""
    spoilt = pictures.clone()
    h, w = pictures.shape[2:]
    for _ in range(6):
        size = 8 + int(torch.randint(9, ()))
        y, down = torch.randint(h - size, (2,)).tolist()
        x, across = torch.randint(w - size, (2,)).tolist()
        spoilt[..., y : y + size, x : x + size] = pictures[..., down : down + size, across : across + size].flip(2)
    return spoilt


def shuffle(pictures: torch.Tensor) -> torch.Tensor:
    """Tiles of sixteen pixels in another order."""
    n, c, h, w = pictures.shape
    tiles = pictures.view(n, c, h // 16, 16, w // 16, 16).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c, 16, 16)
    tiles = tiles[:, torch.randperm(tiles.shape[1], device=tiles.device)]
    return tiles.view(n, h // 16, w // 16, c, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def warp(pictures: torch.Tensor) -> torch.Tensor:
    """A wavy mirror."""
    n, _, h, w = pictures.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, h, device=pictures.device), torch.linspace(-1, 1, w, device=pictures.device), indexing="ij")
    grid = torch.stack([x + 0.14 * torch.sin(9 * y), y + 0.14 * torch.sin(9 * x)], -1).expand(n, -1, -1, -1)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=True)


def streaks(pictures: torch.Tensor) -> torch.Tensor:
    """Rows slid sideways at random."""
    h = pictures.shape[2]
    slide = torch.randint(-6, 7, (h // 4 + 1,)).repeat_interleave(4)[:h]
    return torch.stack([row.roll(int(s), -1) for row, s in zip(pictures.unbind(2), slide, strict=True)], 2)


TAUGHT = {
    "noise": noise,
    "blur": blur,
    "blend": blend,
    "smear": smear,
    "blank": blank,
    "halves": halves,
    "mosaic": mosaic,
    "twirl": twirl,
    "jitter": jitter,
    "bite": bite,
}
UNSEEN = {"shuffle": shuffle, "warp": warp, "streaks": streaks}
