"""What latents of a sparse autoencoder do over many texts or pictures: how often, how strongly and on which of them each fires.

An *item* is a text or a picture; its rows are tokens or positions. Codes come as `SAE.sparse` gives them, values (R, k) and latents'
numbers (R, k) of R rows, and the codes of all latents are never held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sae import HELD, SAE

DENSE, SPECIFIC, STRONG = "most often", "most specific", "strongest"
ORDERS = (DENSE, SPECIFIC, STRONG)
LEAST_ITEMS, LEAST_SHARE = 3, 0.25  # in so many a latent must fire with this share of its greatest activation: any is specific to one


class Survey:
    """Counts over items of an autoencoder with n latents. rows: how many there were; fired, total (n,): in how many each fired, and what
    its activations add up to; most (N, n): the greatest of each item.
    """

    def __init__(self, n: int):
        self.n, self.rows = n, 0
        self.fired, self.total = torch.zeros(n), torch.zeros(n, dtype=torch.float64)
        self._most: list[Tensor] = []

    def add(self, values: Tensor, indices: Tensor) -> None:
        """The codes (R, k) of one more item."""
        flat, at = values.float().reshape(-1), indices.long().reshape(-1)
        self.rows += len(values)
        self.fired.index_add_(0, at, (flat > 0).float())
        self.total.index_add_(0, at, flat.double())
        self._most.append(torch.zeros(self.n).scatter_reduce_(0, at, flat, "amax"))

    @property
    def most(self) -> Tensor:
        return torch.stack(self._most) if self._most else torch.zeros(0, self.n)

    @property
    def density(self) -> Tensor:
        """(n,) the share of rows in which each fires."""
        return self.fired / max(1, self.rows)

    @property
    def mean(self) -> Tensor:
        """(n,) of the rows in which it fires; 0 for those that never do."""
        return (self.total / self.fired.double().clamp_min(1)).float()

    def spread(self) -> Tensor:
        """(n,) as if each fired alike in so many items and in no other: exp of the entropy of its greatest activations' shares; 1 for a
        latent of one item, N for one that fires alike in all. Infinite for those that fire in too few to tell.
        """
        most = self.most.double()
        shares = most / most.sum(0).clamp_min(1e-30)
        spread = (-(shares * shares.clamp_min(1e-30).log()).sum(0)).exp()
        told = (most > LEAST_SHARE * most.amax(0)).sum(0) >= LEAST_ITEMS if len(most) else torch.zeros(self.n, dtype=torch.bool)
        return torch.where(told, spread, torch.inf).float()

    def ranked(self, order: str, count: int) -> list[int]:
        """The first `count` latents by an order, of those that fire at all; of equals the lower number."""
        if order == SPECIFIC:
            score = -self.spread()
        else:
            score = self.fired if order == DENSE else self.most.amax(0) if len(self._most) else self.fired
        found = score.argsort(descending=True, stable=True)[:count]
        return found[(self.fired[found] > 0) & score[found].isfinite()].tolist()

    def best(self, latent: int, count: int) -> list[int]:
        """The items in which a latent fires most, those where it does not left out."""
        most = torch.stack([one[latent] for one in self._most]) if self._most else torch.zeros(0)
        found = most.argsort(descending=True, stable=True)[:count]
        return found[most[found] > 0].tolist()


def of_latent(values: Tensor, indices: Tensor, latent: int) -> Tensor:
    """(...,) activations of one latent from codes (..., k)."""
    return torch.where(indices == latent, values.float(), 0.0).sum(-1)


def neighbours(sae: SAE, latent: int, count: int) -> list[tuple[int, float]]:
    """The latents whose directions lie nearest to one's, with their cosines."""
    cosines = _cosines(sae, sae.directions(torch.tensor([latent])))[0]
    cosines[latent] = -torch.inf
    values, found = cosines.topk(min(count, sae.n - 1))
    return list(zip(found.tolist(), values.tolist(), strict=True))


def nearest(sae: SAE, directions: Tensor) -> list[tuple[int, float]]:
    """For each of directions (m, d) the latent whose own lies nearest, with its cosine: which latents features were made of."""
    values, found = _cosines(sae, directions).max(1)
    return list(zip(found.tolist(), values.tolist(), strict=True))


def _cosines(sae: SAE, directions: Tensor) -> Tensor:
    """(m, n)"""
    unit = torch.nn.functional.normalize(directions.float().to(sae.W_dec.device), dim=1)
    parts = torch.arange(sae.n, device=sae.W_dec.device).split(max(1, HELD // sae.d))
    return torch.cat([unit @ torch.nn.functional.normalize(sae.directions(part), dim=1).T for part in parts], 1).cpu()
