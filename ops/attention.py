"""Several texts read by one picture, each in its place.

    out = sum_k m_k(t) softmax(q_t K_k^T / sqrt(d)) V_k,    sum_k m_k(t) = 1

The softmaxes are separate: one softmax over all keys with a bias of log m_k is another function, because a region's share would then also
depend on how well its words match. (A bias of log m_k less the text's own log-sum-exp makes the two equal.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .shares import Bucket, Shares, weigh

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def blend(attend: Attend, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Shares) -> Tensor:
    """`attend(q, k, v)` for each text, weighted by its share of every token: (B, tokens, channels). A text is read by the tokens alone that
    have a share of it. q is (B, tokens, channels), keys and values are K of (B, n, channels), `shares` those of the K texts.
    """
    return blend_sorted(attend, q, sort_texts(q, keys, values, shares))


def sort_texts(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], shares: Shares) -> list[tuple[Bucket, Tensor, Tensor]]:
    """Texts of one length whose places are of like size, side by side: their bucket, keys and values (P * B, n, channels)."""
    found = []
    for bucket in shares.buckets(*q.shape[:2]):
        lengths = {keys[place].shape[1] for place in bucket.places}
        for length in sorted(lengths):
            at = [at for at, place in enumerate(bucket.places) if keys[place].shape[1] == length]
            part = bucket.part(at)
            found.append((part, torch.cat([keys[place] for place in part.places]), torch.cat([values[place] for place in part.places])))
    return found


def blend_sorted(attend: Attend, q: Tensor, texts: Sequence[tuple[Bucket, Tensor, Tensor]]) -> Tensor:
    """`blend` over texts sorted before, which serves every call that reads the same texts."""
    out = torch.zeros_like(q)
    for bucket, k, v in texts:
        asked = bucket.pick(q)
        read = attend(asked.reshape(len(k), -1, q.shape[-1]), k, v)
        if torch.is_grad_enabled():  # some attentions keep their output for the backward pass
            read = read.clone()
        bucket.add(out.view(-1, out.shape[-1]), weigh(read.reshape(asked.shape), bucket.weight))
    return out


def repeated(context: Tensor, tokens: int) -> Tensor:
    """A context (rows, n, width) repeated to a multiple of its length: no softmax over it changes."""
    times = tokens // context.shape[1]
    return context if times == 1 else context.repeat(1, times, 1)


def joint_bias(
    shares: Tensor, lengths: Sequence[int], real: Sequence[Sequence[int]], references: int = 0, apart: Tensor | None = None
) -> Tensor:
    """(C, 1, L, L) bias for attention over [texts, picture, references], in which each text and its part of the picture see each other.

    shares (S, C or 1, T): each text's share of the picture's tokens, for C chunks of a batch; lengths: rows that each text takes in the
    sequence; real: for each chunk, how many of them it fills. A token with a share m of a text sees it with a bias of log m, so not at all
    where m is 0. The picture sees all of itself, with the bias `apart` (C or 1, T, T) where it is given; references see all and are seen by
    all.
    Nothing sees padding.
    """
    tokens, texts = shares.shape[-1], sum(lengths)
    total = texts + tokens + references
    bias = torch.zeros(len(real), total, total)
    seen = shares.log()
    picture = slice(texts, texts + tokens)
    first = 0
    for index, length in enumerate(lengths):
        own = slice(first, first + length)
        bias[:, own, :first], bias[:, own, first + length : texts] = -torch.inf, -torch.inf
        bias[:, own, picture] = seen[index][:, None]
        bias[:, picture, own] = seen[index][..., None]
        for row, filled in enumerate(real):
            # Padding sees itself, or its softmax would be over nothing.
            bias[row, :, first + filled[index] : first + length] = -torch.inf
        at = torch.arange(first, first + length)
        bias[:, at, at] = 0
        first += length
    if apart is not None:
        bias[:, picture, picture] += apart
    return bias[:, None]


def with_mask(bias: Tensor, mask: Tensor, copies: Sequence[Sequence[int]], words: int, texts: int, tokens: int) -> Tensor:
    """`bias` (rows, 1, L, L) over [texts, picture, ...] with the bias `mask` (rows or 1, heads or none, n, n) added that came with a text
    of `words` tokens, over [it, picture]: (rows, 1 or heads, L, L).

    texts, tokens: of all texts together, and of the picture. copies: for each row, where in the sequence the text begins, as often as it
    is in it; texts between these keep to themselves what they had.
    """
    mask = mask[:, None] if mask.ndim == 3 else mask
    mask = mask.expand(len(bias), -1, -1, -1)
    bias = bias.repeat(1, mask.shape[1], 1, 1)
    picture = slice(texts, texts + tokens)
    bias[..., picture, picture] += mask[..., words:, words:]
    for row, firsts in enumerate(copies):
        for first in firsts:
            own = slice(first, first + words)
            bias[row, :, own, own] += mask[row, :, :words, :words]
            bias[row, :, own, picture] += mask[row, :, :words, words:]
            bias[row, :, picture, own] += mask[row, :, words:, :words]
    # A row that saw nothing but what is elsewhere now would be a softmax over nothing: it sees itself.
    alone = (bias == -torch.inf).all(-1)
    return torch.where(torch.diag_embed(alone), torch.zeros((), dtype=bias.dtype, device=bias.device), bias)
