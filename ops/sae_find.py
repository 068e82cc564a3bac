"""Which latents stand for a concept: scores (n,) from the codes of vectors with it and without.

Each is greater the more a latent is the concept's own; `ranked` gives the best. Statistics of codes (N, n) count zeros.

    share difference   mu_i / sum_j mu_j with it, less the same without (Cywinski & Deja, SAeUron, arXiv 2501.18052, eq. 5)
    effect size        (mu_i - mu'_i) / sqrt((s_i^2 + s'_i^2) / 2): how far the two lie apart in units of their spread
    set difference     the greatest code over a text's tokens, among the m greatest of its text and not among those of any text without
                       (Interpret-then-Deactivate, arXiv 2503.09446)
"""

from __future__ import annotations

import torch

EPSILON = 1e-8


def share_difference(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """From mean codes (n,) with the concept and without. Exchanging the two changes the sign alone; the codes' scale is without effect."""
    return _share(positive) - _share(negative)


def _share(means: torch.Tensor) -> torch.Tensor:
    total = means.double().sum()
    # Relative to the sum: an absolute one would weigh more the smaller the codes are.
    return (means.double() / (total * (1 + EPSILON)).clamp_min(torch.finfo(torch.float64).tiny)).float()


def effect_size(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """From codes (N, n) with the concept and (M, n) without. Of latents that are constant in both, the sign of the difference times the
    greatest finite score, so that one which always fires with it and never without comes first; 0 where there is no difference.
    """
    difference = positive.double().mean(0) - negative.double().mean(0)
    spread = ((positive.double().var(0, correction=0) + negative.double().var(0, correction=0)) / 2).sqrt()
    known = spread > EPSILON * (positive.double().abs().amax(0) + negative.double().abs().amax(0))
    score = torch.where(known, difference / torch.where(known, spread, 1.0), 0.0)
    most = score.abs().max().clamp_min(1.0)
    return torch.where(known, score, difference.sign() * most).float()


def set_difference(positive: torch.Tensor, negative: torch.Tensor, most: int = 128) -> torch.Tensor:
    """From each text's greatest codes, (N, n) with the concept and (M, n) without: the mean of the codes with it, of latents among the
    `most` greatest of a text with it and of none without; 0 for all others.
    """
    own = _among(positive, most).any(0) & ~_among(negative, most).any(0)
    return torch.where(own, positive.float().mean(0), 0.0)


def _among(codes: torch.Tensor, most: int) -> torch.Tensor:
    """(N, n) bool: among the `most` greatest of a row, and not 0."""
    chosen = codes.topk(min(most, codes.shape[-1]), dim=-1).indices
    return torch.zeros_like(codes, dtype=torch.bool).scatter_(-1, chosen, True) & (codes > 0)


def own_share(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """(m,) 0 to 1 from mean codes (m,) with the concept and without: how much of what a latent does with it is the concept's doing. One
    that is as busy without it has other things to do, and steering it by its whole length would undo those.
    """
    return ((positive - negative) / positive.clamp_min(torch.finfo(positive.dtype).tiny)).clamp(0.0, 1.0)


def ranked(scores: torch.Tensor, most: int) -> torch.Tensor:
    """The latents of the `most` greatest scores (n,) above 0, best first; of equals the lower number."""
    order = scores.argsort(descending=True, stable=True)[:most]
    return order[scores[order] > 0]
