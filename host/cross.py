"""Attention of UNets in places: cross-attention in which regions read texts of their own, or the common text through adapters of their
own, and self-attention in which regions keep to themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from comfy.ldm.modules.attention import optimized_attention

from ..ops.attention import blend_sorted, repeated, sort_texts
from ..ops.shares import Shares

KEPT_BYTES = 128 * 2**20


class Kept:
    """How many bytes of keys and values all cross-attentions of a run may still keep from step to step."""

    def __init__(self):
        self.left = KEPT_BYTES


class CrossAct:
    """In the place of one cross-attention's forward: every segment's text, weighted by its share of each position.

    The texts lie behind one another in one sequence, so that `to_k` and `to_v` are called once, with whatever acts on them told apart by
    token. What they give is kept for as long as texts and strengths stay.
    """

    def __init__(self, module: torch.nn.Module, kept: Kept):
        self.module, self.budget = module, kept
        self.shares: Shares | None = None
        self.texts: Sequence[Sequence[torch.Tensor | None]] = ()
        self.lengths: Sequence[int] = ()
        self.tokens = self.batch = 0
        self.called = False
        self.of: Hashable = None
        self._kept: dict[Hashable, tuple[list, int]] = {}

    def set_texts(
        self, shares: Shares, texts: Sequence[Sequence[torch.Tensor | None]], lengths: Sequence[int], tokens: int, batch: int
    ) -> None:
        """shares: those of S segments; texts: for each of them, for each chunk of the batch, a context (1, n, width) or None for the
        chunk's own; lengths: tokens of each segment, a multiple of all that its chunks read; tokens, batch: of the common text, and rows.
        """
        self.shares, self.texts, self.lengths, self.tokens, self.batch = shares, texts, lengths, tokens, batch

    def forget(self) -> None:
        """What acts on the keys and values has changed."""
        self.budget.left += sum(size for _, size in self._kept.values())
        self._kept.clear()

    def run(self, inner, x, context=None, value=None, mask=None, transformer_options=None):
        """The module's output; `inner` is its own forward, for calls that are not over the picture's own tokens."""
        module, options = self.module, transformer_options or {}
        ours = context is not None and mask is None and x.shape[-2] == self.shares.tokens
        # Another extension's patch may have made the words more, or the rows.
        if not ours or context.shape[:2] != (self.batch, self.tokens) or (value is not None and value.shape[:2] != context.shape[:2]):
            return inner(x, context=context, value=value, mask=mask, transformer_options=options)
        self.called = True

        # Keys and values are kept as the attention sorts them, head by head; who overrides it is given what a module would give.
        sorts = "optimized_attention_override" not in options

        def attend(q, k, v):
            q = _by_heads(q, module.heads) if sorts else q
            how = {"attn_precision": module.attn_precision, "transformer_options": options}
            return optimized_attention(q, k, v, module.heads, **how, **({"skip_reshape": True} if sorts else {}))

        q = module.to_q(x)
        key = None if self.of is None else (self.of, x.shape, x.dtype, context.shape, sorts)
        if key in self._kept:
            texts = self._kept[key][0]
        else:
            words = self._behind_one_another(context)
            keys = module.to_k(words).split(self.lengths, 1)
            values = module.to_v(words if value is None else self._behind_one_another(value)).split(self.lengths, 1)
            texts = sort_texts(q, keys, values, self.shares)
            if sorts:
                texts = [(bucket, _by_heads(k, module.heads), _by_heads(v, module.heads)) for bucket, k, v in texts]
            if key is not None:
                self._keep(key, texts)
        return module.to_out(blend_sorted(attend, q, texts))

    def _keep(self, key: Hashable, texts: list) -> None:
        size = sum(part.nbytes for _, k, v in texts for part in (k, v))
        if size <= self.budget.left:
            self.budget.left -= size
            self._kept[key] = texts, size

    def _behind_one_another(self, context: torch.Tensor) -> torch.Tensor:
        """(rows, sum of lengths, width): what every segment reads, row by row."""
        return torch.cat([self._read(context, texts, length) for texts, length in zip(self.texts, self.lengths, strict=True)], 1)

    def _read(self, context: torch.Tensor, texts: Sequence[torch.Tensor | None], length: int) -> torch.Tensor:
        if all(text is None for text in texts):
            return repeated(context, length)
        rows = len(context) // len(texts)
        chunks = zip(context.split(rows), texts, strict=True)
        return torch.cat([repeated(own if text is None else text.to(own).expand(rows, -1, -1), length) for own, text in chunks])


def _by_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, n, width) as (rows, heads, n, width / heads)"""
    return x.unflatten(2, (heads, -1)).transpose(1, 2).contiguous()


class SelfAct:
    """In the place of one self-attention's forward: with a bias between the positions of different regions."""

    def __init__(self):
        self.bias: torch.Tensor | None = None
        self.called = False

    def run(self, inner, x, context=None, value=None, mask=None, transformer_options=None):
        bias = self.bias
        keys = x if context is None else context
        fits = bias is not None and x.shape[-2] == keys.shape[-2] == bias.shape[-1] and len(bias) in (1, len(x))
        if fits and mask is None:
            self.called = True
            mask = bias.to(x.dtype).expand(len(x), -1, -1, -1)
        return inner(x, context=context, value=value, mask=mask, transformer_options=transformer_options or {})
