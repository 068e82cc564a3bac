"""Steering by directions: what is added to a layer's rows so that chosen activations become what they should be.

x (B, T, d) are rows, d_i (m, d) directions, z_i the activation of a row along each. A steer changes z to z' and the rows by the difference
alone,

    x' = x + sum_i w_i (z'_i - z_i) d_i,

so that whatever the directions do not explain (a sparse autoencoder's error among it) stays as it is, and nothing changes where z' = z.
With s the strength, u_i the activation that counts as 1, o_i the one that counts as 0:

    add     z' = z + s u                    no activation is read
    scale   z' = o + (1 + s) (z - o)
    clamp   z' = z + s (o + c u - z)        c: what it is held at
    ablate  z' = z - s max(0, z - o)        one-sided, as CASteer removes (Gaintseva et al., arXiv 2503.09630)

CASteer also gives rows their lengths back; so can every steer here. Rows may be changed by no more than a share of their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ADD, SCALE, CLAMP, ABLATE = "add", "scale", "clamp", "ablate"
MODES = (ADD, SCALE, CLAMP, ABLATE)
TINY = 1e-12


class Directions(NamedTuple):
    """m directions of d numbers, in float32.

    write       (m, d) what an activation of 1 adds
    weights     (m,) how much of each change is made
    read, bias  (m, d), (m,): z = <x, read> + bias
    thresholds  (m,): activations not above them (or 0) are 0, as in a sparse autoencoder. None: they keep their sign
    positions   (m,) the only row that each acts on, -1 for all. None: all
    """

    write: Tensor
    weights: Tensor
    read: Tensor
    bias: Tensor
    thresholds: Tensor | None = None
    positions: Tensor | None = None

    def to(self, device) -> Directions:
        return Directions(*(None if part is None else part.to(device) for part in self))

    def activations(self, x: Tensor) -> Tensor:
        """(..., m) of rows (..., d), in float32: these directions alone are evaluated."""
        z = torch.nn.functional.linear(x.float(), self.read, self.bias)
        return z if self.thresholds is None else torch.where(z > self.thresholds, z, 0.0).clamp(min=0.0)

    def written(self, coefficients: Tensor, tokens: int) -> Tensor:
        """(..., d) of coefficients (..., m): rows of one sequence of `tokens`, or one for all of them where the positions are all."""
        coefficients = coefficients * self.weights
        if self.positions is not None:
            at = torch.arange(tokens, device=coefficients.device)[:, None]
            coefficients = torch.where((self.positions == at) | (self.positions < 0), coefficients, 0.0)
        return coefficients @ self.write


class Scale(NamedTuple):
    """unit, zero (m,): the activations that count as 1 and, for scale, clamp and ablate, as 0."""

    unit: Tensor
    zero: Tensor


class Steer(NamedTuple):
    """How to act along directions. level: what clamp holds at, in units; keep: give rows their lengths back; most: by what share of a row's
    length it may be changed, 0 for any.
    """

    directions: Directions
    mode: str = ADD
    level: float = 0.0
    keep: bool = False
    most: float = 0.0

    @property
    def reads(self) -> bool:
        """Whether it depends on the rows at all, beyond their number."""
        return self.mode != ADD or self.keep or self.most > 0

    def change(self, x: Tensor, strength: Tensor, scale: Scale, share: Tensor | None = None) -> Tensor:
        """What to add to rows x (B, T, d), broadcastable to them. strength (): 0 is nothing, exactly; share (B or 1, T): of each row."""
        by = self.steps(x, strength, scale)
        delta = self.directions.written(by, x.shape[-2])
        if share is not None:
            delta = delta * share[..., None]
        return capped(delta, x, self.most) if self.most > 0 else delta

    def steps(self, x: Tensor, strength: Tensor, scale: Scale) -> Tensor:
        """z' - z, (..., m)"""
        if self.mode == ADD:
            return strength * scale.unit
        above = self.directions.activations(x) - scale.zero
        if self.mode == SCALE:
            return strength * above
        if self.mode == CLAMP:
            return strength * (self.level * scale.unit - above)
        return -strength * above.clamp(min=0.0)


def capped(delta: Tensor, x: Tensor, most: float) -> Tensor:
    """delta, nowhere longer than a share of the rows x."""
    allowed = most * _length(x)
    return delta * (allowed / _length(delta).clamp_min(TINY)).clamp(max=1.0)


def kept(x: Tensor, delta: Tensor) -> Tensor:
    """What to add to rows x instead of delta so that they keep their lengths; exactly nothing where delta is nothing."""
    moved = x + delta
    return moved * (_length(x) / _length(moved).clamp_min(TINY)) - x


def together(x: Tensor, steers: Sequence[Steer], strengths: Sequence[Tensor], scales: Sequence[Scale], shares: Sequence[Tensor | None]):
    """(B, T, d) or what broadcasts to it: what several steers add to rows x at once. Each sees the rows as they were, so that their order
    does not matter; lengths are given back after the sum of those that ask for it.
    """
    free = keeping = None
    for steer, strength, scale, share in zip(steers, strengths, scales, shares, strict=True):
        delta = steer.change(x, strength, scale, share)
        if steer.keep:
            keeping = delta if keeping is None else keeping + delta
        else:
            free = delta if free is None else free + delta
    if keeping is None:
        return free
    whole = kept(x, keeping)
    return whole if free is None else whole + free


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)


def course(sigmas: Tensor, table: Tensor, sigma: float) -> Tensor:
    """(m,) a table (S, m) at a noise level: straight lines in log sigma between the levels `sigmas` (S,), which fall, and its ends beyond.
    By noise level and never by the number of a step, so that other samplers and numbers of steps find the same.
    """
    if len(sigmas) == 1:
        return table[0]
    levels = sigmas.double().clamp_min(TINY).log()
    at = math.log(max(sigma, TINY))
    after = int((levels > at).sum())
    if after in (0, len(levels)):
        return table[min(after, len(levels) - 1)]
    share = float((levels[after - 1] - at) / (levels[after - 1] - levels[after]))
    return table[after - 1] + share * (table[after] - table[after - 1])


def mean_difference(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """(direction (d,) of length 1, its length at each level (S,)) from means (S, d) of rows with and without a concept, at S noise levels.
    Differences count alike whatever the level, because rows are of other lengths at each. Raises ValueError where there is none.
    """
    way = positive.double() - negative.double()
    lengths = way.norm(dim=1)
    if not bool((lengths > TINY).all()):
        raise ValueError("nothing differs")
    summed = (way / lengths[:, None]).sum(0)
    if not float(summed.norm()) > 1e-6:
        raise ValueError("the differences at the noise levels cancel each other")
    direction = summed / summed.norm()
    return direction.float(), (way @ direction).float()


def threshold(positive: Tensor, negative: Tensor) -> float:
    """Between the scores of texts with and without a concept: half way between the nearest where they lie apart, and between the medians
    where they do not. As ItD (arXiv 2503.09446) passes texts on untouched that do not reach what the concept's own texts do.
    """
    low, high = float(negative.max()), float(positive.min())
    return (low + high) / 2 if high > low else float(positive.median() + negative.median()) / 2
