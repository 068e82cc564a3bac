"""Low-rank adapters beside a frozen layer: y = W x + sum_i s_i (alpha_i / r_i) B_i (A_i x).

LoRA (arXiv 2106.09685) for linear layers, LoCon for convolutions: A keeps the layer's kernel, stride, padding and dilation, B is 1x1.
All adapters of a layer run as one: their ranks are concatenated, so that x is read once and y written once whatever their number.

    z = x A^T          (..., R), R the sum of the ranks
    y = y + (z * S) B^T

S, the *gain*, scales rank by rank: strength times alpha / r, and, where an adapter has a place, its mask at every token of a linear layer
and every position of a convolution's output. Masking z is masking the adapter's output, exactly, because B acts on each position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Factors(NamedTuple):
    """One adapter of one layer.

    down  (r, in) for a linear layer, (r, in, *kernel) for a convolution
    up    (n, r), n the outputs it writes to
    scale alpha / r, or 1 where the file names no alpha
    rows  (first, n): the outputs written to, where a layer holds several fused (q, k and v in one); None for all of them
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    rows: tuple[int, int] | None = None


class Group(NamedTuple):
    """Adapters that write to the same outputs: their columns in z, and their B matrices side by side, (n, columns)."""

    rows: tuple[int, int] | None
    columns: tuple[int, int]
    up: Tensor


def merge_middle(down: Tensor, middle: Tensor) -> Tensor:
    """The (r, in, *kernel) matrix A of a Tucker-decomposed adapter: a 1x1 `down` (r, in, 1, ...) followed by `middle` (r, r, *kernel)."""
    return torch.einsum("ab...,bi->ai...", middle, down.flatten(1))


def delta_weight(factors: Factors) -> Tensor:
    """scale * B A in float32, (n, in, *kernel): what strength 1 adds to the weight's rows."""
    down = factors.down.float()
    return factors.scale * (factors.up.float() @ down.flatten(1)).reshape(-1, *down.shape[1:])


class Stack:
    """All adapters of one layer, called with the layer's output and input: returns the output with what they add.

    `adapters` holds one sequence of factors per adapter (several where it writes to several groups of rows), `convolution` the stride,
    padding and dilation of the layer where it is one. A and B are kept in `dtype`, the gain in float32. Strengths change by
    `set_strengths`, which replaces a tensor by one of the same shape, so that torch.compile keeps its graph.
    """

    def __init__(self, adapters: Sequence[Sequence[Factors]], device, dtype: torch.dtype, convolution: dict | None = None):
        flat = [(owner, factors) for owner, group in enumerate(adapters) for factors in group]
        spans = sorted({factors.rows for _, factors in flat}, key=lambda rows: rows or (0, 0))
        # Factors of the same rows lie side by side, so that each group is one slice of z.
        flat.sort(key=lambda item: spans.index(item[1].rows))
        self.convolution = convolution
        self.down = torch.cat([factors.down.to(device, dtype) for _, factors in flat])
        self.groups = []
        first = 0
        for rows in spans:
            ups = [factors.up.to(device, dtype) for _, factors in flat if factors.rows == rows]
            up = torch.cat(ups, dim=1)
            self.groups.append(Group(rows, (first, up.shape[1]), up))
            first += up.shape[1]
        ranks = torch.tensor([factors.down.shape[0] for _, factors in flat])
        self._owners = torch.tensor([owner for owner, _ in flat]).repeat_interleave(ranks)
        self._scales = torch.tensor([factors.scale for _, factors in flat], dtype=torch.float32).repeat_interleave(ranks)
        self.set_strengths([1.0] * len(adapters))

    def set_strengths(self, strengths: Sequence[float | Tensor]) -> None:
        """One strength per adapter, in the order they were given in: a number, or a tensor (rows, tokens) for a linear layer and (rows,
        height, width) at output resolution for a convolution, rows 1 where all rows of a batch share it.
        """
        spread = [strength for strength in strengths if isinstance(strength, Tensor)]
        if not spread:
            self.gain = (torch.tensor(strengths, dtype=torch.float32)[self._owners] * self._scales).to(self.down.device)
            return
        shape = torch.broadcast_shapes(*(strength.shape for strength in spread))
        whole = [torch.as_tensor(strength, dtype=torch.float32, device=spread[0].device).expand(shape) for strength in strengths]
        owners, scales = self._owners.to(spread[0].device), self._scales.to(spread[0].device)
        gain = torch.stack(whole, -1)[..., owners] * scales
        self.gain = (gain if self.convolution is None else gain.movedim(-1, 1).flatten(2)).to(self.down.device)

    def __call__(self, y: Tensor, fresh: bool, *args, **kwargs) -> Tensor:
        """`y` (..., out) or (B, out, *size) plus the adapters' part of x; written in place where nobody else holds y (`fresh`).

        x is the layer's first argument, by place or by whatever name its caller used.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        self._follow(x)
        if not (fresh and y.is_contiguous()):
            y = y.clone(memory_format=torch.contiguous_format)
        if self.convolution is None:
            self._add_linear(y, x)
        else:
            self._add_convolution(y, x)
        return y

    def _follow(self, x: Tensor) -> None:
        """Some layers compute in another dtype than the model at large: the stack is cast once and stays with it."""
        if self.down.dtype != x.dtype or self.down.device != x.device:
            self.down = self.down.to(x.device, x.dtype)
            self.groups = [group._replace(up=group.up.to(x.device, x.dtype)) for group in self.groups]
            self.gain = self.gain.to(x.device)

    def _add_linear(self, y: Tensor, x: Tensor) -> None:
        z = F.linear(x, self.down)
        z = z.mul_(self.gain if self.gain.ndim == 1 else self._over_tokens(z.shape)).flatten(0, -2)
        flat = y.view(-1, y.shape[-1])
        for rows, columns, up in self.groups:
            out = flat if rows is None else flat.narrow(1, *rows)
            if out.dtype == z.dtype:
                out.addmm_(z.narrow(1, *columns), up.t())
            else:
                out.add_(z.narrow(1, *columns) @ up.t())

    def _over_tokens(self, shape: torch.Size) -> Tensor:
        """The gain for z of a shape; tokens that it knows nothing of (reference pictures behind the picture's own) get nothing."""
        missing = shape[-2] - self.gain.shape[-2]
        return F.pad(self.gain, (0, 0, 0, missing)) if missing else self.gain

    def _add_convolution(self, y: Tensor, x: Tensor) -> None:
        z = CONVOLUTIONS[x.ndim](x, self.down, **self.convolution).flatten(2).mul_(self.gain[:, None] if self.gain.ndim == 1 else self.gain)
        flat = y.view(*y.shape[:2], -1)
        for rows, columns, up in self.groups:
            out = flat if rows is None else flat.narrow(1, *rows)
            matrix = up.expand(z.shape[0], -1, -1)
            if out.dtype == z.dtype:
                out.baddbmm_(matrix, z.narrow(1, *columns))
            else:
                out.add_(matrix @ z.narrow(1, *columns))
