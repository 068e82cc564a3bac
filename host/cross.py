"""Cross-attention of UNets in which regions read texts of their own, or the common text through adapters of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.ldm.modules.attention import optimized_attention

from ..ops.attention import blend, repeated


class CrossAct:
    """In the place of one cross-attention's forward: every segment's text, weighted by its share of each position.

    The texts lie behind one another in one sequence, so that `to_k` and `to_v` are called once, with whatever acts on them told apart by
    token.
    """

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self.shares = torch.ones(1, 1, 1)
        self.texts: Sequence[Sequence[torch.Tensor | None]] = ()
        self.lengths: Sequence[int] = ()

    def set_texts(self, shares: torch.Tensor, texts: Sequence[Sequence[torch.Tensor | None]], lengths: Sequence[int]) -> None:
        """shares (1, tokens, S); texts: for each of S segments, for each chunk of the batch, a context (1, n, width) or None for the
        chunk's own; lengths: tokens of each segment, a multiple of all that its chunks read.
        """
        self.shares, self.texts, self.lengths = shares, texts, lengths

    def run(self, inner, x, context=None, value=None, mask=None, transformer_options=None):
        """The module's output; `inner` is its own forward, for calls that are not over the picture's own tokens."""
        module, options = self.module, transformer_options or {}
        if context is None or mask is not None or x.shape[-2] != self.shares.shape[-2]:
            return inner(x, context=context, value=value, mask=mask, transformer_options=options)

        def attend(q, k, v):
            return optimized_attention(q, k, v, module.heads, attn_precision=module.attn_precision, transformer_options=options)

        keys = module.to_k(self._behind_one_another(context)).split(self.lengths, 1)
        values = module.to_v(self._behind_one_another(context if value is None else value)).split(self.lengths, 1)
        return module.to_out(blend(attend, module.to_q(x), keys, values, self.shares))

    def _behind_one_another(self, context: torch.Tensor) -> torch.Tensor:
        """(rows, sum of lengths, width): what every segment reads, row by row."""
        return torch.cat([self._read(context, texts, length) for texts, length in zip(self.texts, self.lengths, strict=True)], 1)

    def _read(self, context: torch.Tensor, texts: Sequence[torch.Tensor | None], length: int) -> torch.Tensor:
        if all(text is None for text in texts):
            return repeated(context, length)
        rows = len(context) // len(texts)
        chunks = zip(context.split(rows), texts, strict=True)
        return torch.cat([repeated(own if text is None else text.to(own).expand(rows, -1, -1), length) for own, text in chunks])
