"""Several texts read by one picture, each in its place.

    out = sum_k m_k(t) softmax(q_t K_k^T / sqrt(d)) V_k,    sum_k m_k(t) = 1

The softmaxes are separate: one softmax over all keys with a bias of log m_k is another function, because a region's share would then also
depend on how well its words match. (Correcting that bias by each region's own log-sum-exp makes the two equal: `corrected_bias`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def blend(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Tensor
) -> Tensor:
    """`attend(q, k, v)` for each text, weighted by `shares` (rows or 1, tokens, K): (rows, tokens, channels).

    A text that no token has a share of is not read; where shares are 0 or 1 throughout, each token reads its own text only.
    """
    used = shares.flatten(0, -2)
    hard = bool(((used == 0) | (used == 1)).all()) and shares.shape[0] == 1
    out = None
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        share = shares[..., index]
        if not share.any():
            continue
        if hard:
            at = torch.nonzero(share[0]).flatten()
            out = torch.zeros_like(q) if out is None else out
            out[:, at] = attend(q[:, at].contiguous(), k, v)
        else:
            part = attend(q, k, v) * share[..., None].to(q.dtype)
            out = part if out is None else out.add_(part)
    return torch.zeros_like(q) if out is None else out


def repeated(context: Tensor, tokens: int) -> Tensor:
    """A context (rows, n, width) repeated to a multiple of its length: no softmax over it changes."""
    return context.repeat(1, tokens // context.shape[1], 1)


def joint_bias(shares: Tensor, lengths: Sequence[int], real: Sequence[Sequence[int]], references: int = 0) -> Tensor:
    """(rows, 1, L, L) bias for attention over [texts, picture, references], in which each text and its part of the picture see each other.

    shares (S, T): each text's share of the picture's tokens; lengths: rows that each text takes in the sequence; real: for each row of the
    batch, how many of them it fills. A token with a share m of a text sees it with a bias of log m, so not at all where m is 0. The picture
    sees all of itself, and references see and are seen by all. Nothing sees padding.
    """
    tokens, texts = shares.shape[1], sum(lengths)
    total = texts + tokens + references
    bias = torch.zeros(len(real), total, total)
    seen = shares.log()
    first = 0
    for index, length in enumerate(lengths):
        own, picture = slice(first, first + length), slice(texts, texts + tokens)
        bias[:, own, :first], bias[:, own, first + length : texts] = -torch.inf, -torch.inf
        bias[:, own, picture] = seen[index]
        bias[:, picture, own] = seen[index][:, None]
        for row, filled in enumerate(real):
            # Padding sees itself, or its softmax would be over nothing.
            bias[row, :, first + filled[index] : first + length] = -torch.inf
        at = torch.arange(first, first + length)
        bias[:, at, at] = 0
        first += length
    return bias[:, None]
