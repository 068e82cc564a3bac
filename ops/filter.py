"""Keep concepts out of a prompt's embedding: which words bring them, and what is left without them.

Equations of SAFREE (Yoon et al., arXiv 2410.12761), in its paper's form and in that of its released code, which differ; and our own. Rows
are vectors of D numbers, one for each token. A concept is one vector of the same space, as is the prompt without one of its words.

    P_C, P_I    projections on the span of the concepts' vectors, and of the prompt's vectors without a word each
    d_i         |(I - P_C) p_i|, p_i the prompt without word i: how far from the concepts the prompt is without that word
    m_i         whether d_i exceeds the mean of the others by more than a share alpha: word i brought the concept
    paper       P_I (I - P_C) x          released code  (I - P_C) P_I x
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

NARROW = 3e-7  # of the widest direction: what is narrower is an encoder's rounding, not a concept


class Span(NamedTuple):
    """The span of some vectors: an orthonormal basis (D, rank) in float64. An empty one has rank 0."""

    basis: torch.Tensor

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Span:
        """Of vectors (K, D). Their lengths, order and repetitions do not matter; vectors of nothing add no direction. By singular values:
        the inverse of the Gram matrix that is published loses half of the digits, and with them concepts that lie close to one another.
        """
        vectors = vectors.double()
        lengths = vectors.norm(dim=1, keepdim=True)
        vectors = (vectors / lengths.clamp_min(torch.finfo(torch.float64).tiny))[lengths[:, 0] > 0]
        if not len(vectors):
            return cls(vectors.new_zeros(vectors.shape[1], 0))
        _, widths, directions = torch.linalg.svd(vectors, full_matrices=False)
        return cls(directions[widths > NARROW * widths[0]].T)

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        """The part of rows (..., D) in the span, float64."""
        return (rows.double() @ self.basis) @ self.basis.T

    def outside(self, rows: torch.Tensor) -> torch.Tensor:
        """What is left of rows (..., D), float64."""
        return rows.double() - self.inside(rows)


ORDERS = ("concepts last", "prompt last", "concepts only")


def cleaned(rows: torch.Tensor, concepts: Span, prompt: Span, order: str) -> torch.Tensor:
    """Rows (..., D) without the concepts, float64: `concepts last` as the released code does, which leaves nothing of them; `prompt last`
    as the paper writes, which stays among what the prompt can say; `concepts only` without the prompt's span, which changes least.
    """
    if order == "concepts last":
        return concepts.outside(prompt.inside(rows))
    if order == "prompt last":
        return prompt.inside(concepts.outside(rows))
    if order == "concepts only":
        return concepts.outside(rows)
    raise ValueError(f"There is no order '{order}'. Choose one of: {', '.join(ORDERS)}.")


def distances(without: torch.Tensor, concepts: Span) -> torch.Tensor:
    """(N,) how far from the concepts the prompt's vectors (N, D) without a word each are."""
    return concepts.outside(without).norm(dim=-1)


def flagged(distances: torch.Tensor, alpha: float, alone: bool = False) -> torch.Tensor:
    """(N,) bool: the words whose distance exceeds (1 + alpha) times the mean of the other words'. A single word has no others to be
    compared with: it is flagged or not as `alone` says (the released code divides by nothing there, and flags it).
    """
    n = len(distances)
    if n < 2:
        return torch.full((n,), alone, dtype=torch.bool)
    others = (distances.sum() - distances) / (n - 1)
    return distances > (1 + alpha) * others


def drift(before: torch.Tensor, after: torch.Tensor) -> float:
    """1 - the mean cosine between rows (N, D) before and after: how much a filter would change. Rows of nothing count as unchanged."""
    before, after = before.double(), after.double()
    lengths = before.norm(dim=-1) * after.norm(dim=-1)
    cosines = torch.where(lengths > 0, (before * after).sum(-1) / lengths.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return float(1 - cosines.mean()) if cosines.numel() else 0.0


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def steps_as_published(drift: float, most: float = 10.0) -> float:
    """Steps from the first in which the paper's filter acts: most * sigmoid(drift). From half of `most` on; never none."""
    return most * _sigmoid(drift)


def steps_as_released(drift: float, most: float = 10.0, middle: float = 5.333, slope: float = 2.5) -> int:
    """The same in the released code, where it acts while i <= steps: round(most * sigmoid(2 slope (10 drift - middle)))."""
    return round(most * _sigmoid(2 * slope * (10 * drift - middle)))


def in_common(vectors: torch.Tensor, more: int) -> Span:
    """The span of the mean of vectors (K, D) and of the `more` directions beside it in which they lie furthest."""
    vectors = vectors.double()
    mean = vectors.mean(0, keepdim=True)
    _, _, beside = torch.linalg.svd(Span.of(mean).outside(vectors), full_matrices=False)
    return Span.of(torch.cat([mean, beside[:more]]))


def heard(brought: torch.Tensor, concepts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what N words bring (N, D), against what the own words of K concepts bring (K, D): (N, K) its length along each concept in lengths
    of it, and the cosine between the two. The first alone is large for whatever changes the prompt much, the second alone for what changes
    it little.
    """
    tiny = torch.finfo(torch.float64).tiny
    brought, concepts = brought.double(), concepts.double()
    along, lengths = brought @ concepts.T, concepts.norm(dim=1)
    return along / lengths.square().clamp_min(tiny), along / (brought.norm(dim=1)[:, None] * lengths).clamp_min(tiny)


def together(share: torch.Tensor, cosine: torch.Tensor, least: float, most: int) -> torch.Tensor:
    """(K,) how far N words (N, K) point to a concept together: the sum of squared cosines of the `most` words that point there best, of
    those that bring at least a share of `least`. Words of other meanings point anywhere, and their squares stay small.
    """
    counted = torch.where(share >= least, cosine.clamp_min(0), 0.0)
    return counted.topk(min(most, len(counted)), dim=0).values.square().sum(0)


def taken_out(rows: torch.Tensor, without: torch.Tensor, amount: float) -> torch.Tensor:
    """Rows (..., D) less `amount` times what the flagged words bring to them: at 0 as they are, at 1 the prompt without these words, beyond
    it pushed away from what they say, at the length that a row has without them (longer rows cost clean pictures). In the rows' own type.
    """
    if amount == 0.0:
        return rows
    moved = rows.float() + amount * (without.float() - rows.float())
    if amount > 1.0:
        moved = moved * (without.float().norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return moved.to(rows.dtype)
