"""Latent re-attention: low frequencies of a feature map held down where they exceed those under another prompt.

The second branch of SAFREE (Yoon et al., arXiv 2410.12761). With F the Fourier transform of a map under the filtered prompt over its
positions, O the same under the original prompt, s < 1, and k over the low frequencies,

    F'_k = s F_k  where |F_k| > |O_k|,  F_k elsewhere

The paper compares F_k with O_k, which are complex: lengths are meant here. Its code compares real parts, puts s itself in the place of
s F_k, and has a window of two by two frequencies, of which three lack the other half of their pair +-k, so that a map that was real comes
out complex and half of what was done is dropped. Here both of a pair are low or neither is, and the map stays real.

As few frequencies are low, they are summed up one by one: no transform of all is needed, and maps in which none exceeds stay as they are,
bit for bit.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch


class Waves(NamedTuple):
    """The low frequencies of a grid, one of each pair +-k. basis (2 K, positions): cosines, then sines; weights (2 K,): what brings sums
    with the basis back onto the grid.
    """

    basis: torch.Tensor
    weights: torch.Tensor

    @classmethod
    @cache
    def of(cls, height: int, width: int, radius: int) -> Waves:
        """Of a grid of height x width positions: all with at most `radius` periods across it in either direction."""
        pairs = {
            min((y % height, x % width), (-y % height, -x % width)): None
            for y in range(-radius, radius + 1)
            for x in range(-radius, radius + 1)
            if abs(y) <= height // 2 and abs(x) <= width // 2
        }
        ys, xs = torch.meshgrid(torch.arange(height).double() / height, torch.arange(width).double() / width, indexing="ij")
        angles = torch.stack([2 * math.pi * (y * ys + x * xs).flatten() for y, x in pairs])
        single = torch.tensor([(2 * y % height, 2 * x % width) == (0, 0) for y, x in pairs])
        weights = torch.where(single, 1.0, 2.0) / (height * width)
        return cls(torch.cat([angles.cos(), angles.sin()]).float(), weights.repeat(2).float())

    def to(self, device: torch.device) -> Waves:
        return Waves(self.basis.to(device), self.weights.to(device))


def low(maps: torch.Tensor, waves: Waves) -> torch.Tensor:
    """(N, C, 2 K) float32: real and negated imaginary parts of the low frequencies of maps (N, C, height, width)."""
    return maps.flatten(2).float() @ waves.basis.T


def reattended(maps: torch.Tensor, original: torch.Tensor, scale: float, waves: Waves, rounding: float = 0.0) -> torch.Tensor:
    """Maps (N, C, height, width) with their low frequencies times `scale` where these are longer than those of the original prompt,
    `original` as `low` gives it, by more than `rounding` of that and of the map's length. In the maps' own type.
    """
    if scale == 1.0:
        return maps
    own = low(maps, waves)
    lengths, others = (parts.unflatten(2, (2, -1)).norm(dim=2) for parts in (own, original))
    exceeds = lengths > others + rounding * (others + maps.flatten(2).float().norm(dim=2)[..., None])
    change = (scale - 1.0) * own * exceeds.repeat(1, 1, 2) * waves.weights
    return (maps.float() + (change @ waves.basis).view(maps.shape)).to(maps.dtype)
