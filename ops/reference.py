"""Attention that reads a second picture beside its own (multi-reference self-attention; FreeCustom, Ding et al., CVPR 2024,
arXiv 2405.13870, section 3.2).

    out_t = (sum_i e^s_ti v_i + sum_j w_tj e^s'_tj v'_j) / (sum_i e^s_ti + sum_j w_tj e^s'_tj),    s = q k^T / sqrt(d)

i over the picture's own keys, j over the reference's; w_tj = strength * m_t * mu_j: how much of position t the region has, times how much
of the reference's position j the concept has. The paper multiplies the logits s' by its weights instead; its released code adds them (which
is this form with a strength of e^w: its 3 is a strength of 20 here) and takes out what lies outside of the mask. Here a weight counts a key
as often as it says: 1 is the plain concatenation of both pictures' keys, 0 the picture alone.

The picture's own attention is not computed anew: both softmaxes are joined by their log-sum-exps,

    out = own + g (ref - own),    g = sigmoid(log w_t + lse'_t - lse_t),

so that whatever kernel the model has computes its own, and positions outside of the region are not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_LOGITS = 2**24  # at a time


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None):
    """Parts of q with their logits, few enough to be held."""
    b, h, n, _ = q.shape
    step = max(1, MOST_LOGITS // max(1, b * h * k.shape[-2]))
    for first in range(0, n, step):
        part = (q[:, :, first : first + step].float() * scale) @ k.float().mT
        if bias is not None:
            part = part + (bias if bias.shape[-2] == 1 else bias[..., first : first + step, :])
        yield part


def log_sum_exp(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """(B, heads, n) in float32: of the logits of q (B, heads, n, d) and k (B or 1, heads, m, d), with a bias (B or 1, heads or 1, n or 1,
    m).
    """
    return torch.cat([part.logsumexp(-1) for part in _logits(q, k, scale, bias)], -1)


def read(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What attention to weighted keys gives, (B, heads, n, d), and its log-sum-exp (B, heads, n), both in float32. k, v (B or 1, heads, m,
    d); log_weight (m,): logarithms of the keys' weights.
    """
    found, sums = [], []
    for part in _logits(q, k, scale, log_weight.float()[None]):
        total = part.logsumexp(-1, keepdim=True)
        found.append((part - total).exp_() @ v.float())
        sums.append(total[..., 0])
    return torch.cat(found, -2), torch.cat(sums, -1)


def join(own: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over both: its output (B, heads, n, d) and log-sum-exp (B, heads, n). Where `other` weighs nothing (-inf), own is what it
    was, bit for bit.
    """
    g = torch.sigmoid(other_lse - lse)[..., None]
    return own + (g * (other - own)).to(own.dtype), torch.logaddexp(lse, other_lse)
