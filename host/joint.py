"""Models that read prompt and picture as one sequence (Flux): several texts behind one another, and who sees whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.attention import joint_bias, with_mask


class MaskUnfit(ValueError):
    """A condition's attention mask is over other tokens than the call's; the message says over how many."""


class Joint:
    """What one call's prompt is replaced by."""

    def __init__(
        self,
        shares: torch.Tensor,
        texts: Sequence[Sequence[torch.Tensor | None]],
        lengths: Sequence[int],
        apart: torch.Tensor | None = None,
    ):
        """shares (S, C or 1, tokens) for C chunks of the batch, or (S, B, tokens) for its rows; texts: for each of S segments, for each
        chunk, a context (1, n, width) or None for the chunk's own; lengths: rows of each segment, the longest that its chunks read; apart
        (1, C or B, tokens, tokens): what is added to the attention of the picture to itself.
        """
        self.shares, self.texts, self.lengths, self.apart = shares, texts, lengths, apart
        self._bias: dict[tuple, torch.Tensor] = {}

    def arguments(self, context: torch.Tensor, references: int = 0, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The context (rows, sum of lengths, width) and the attention's bias, as the host's model takes them. mask: the bias that came with
        the common text, over it and the picture; it stays between those, wherever the text is read. Raises MaskUnfit.
        """
        chunks = context.chunk(len(self.texts[0]))
        read = [
            [own if text is None else text.to(own).expand(len(own), -1, -1) for own, text in zip(chunks, texts, strict=True)]
            for texts in self.texts
        ]
        whole = torch.cat(
            [
                torch.cat([torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1])) for text in texts])
                for texts, length in zip(read, self.lengths, strict=True)
            ],
            1,
        )
        key = (context.device, context.dtype, context.shape, references)
        if key not in self._bias:
            apart = None if self.apart is None else self.apart.cpu()
            rows = max(self.shares.shape[1], 0 if apart is None else len(apart))
            each = max(1, rows // len(chunks))  # pictures with shares of their own, or apart in ways of their own
            real = [[texts[chunk].shape[1] for texts in read] for chunk in range(len(chunks)) for _ in range(each)]
            shares, apart = (
                part if part is None or part.shape[at] in (1, len(real)) else part.repeat_interleave(len(real) // part.shape[at], at)
                for part, at in ((self.shares.cpu(), 1), (apart, 0))
            )
            bias = joint_bias(shares, self.lengths, real, references, apart)
            self._bias = {key: bias.repeat_interleave(len(context) // len(real), 0).to(context)}
        bias = self._bias[key]
        return {"c_crossattn": whole, "attention_mask": bias if mask is None else self._with(bias, mask, context)}

    def _with(self, bias: torch.Tensor, mask: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        words, tokens = context.shape[1], self.shares.shape[-1]
        if mask.shape[-1] != words + tokens:
            raise MaskUnfit(f"is over {mask.shape[-1]} tokens, and there are {words} of text and {tokens} of the picture")
        mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        each = len(context) // len(self.texts[0])
        firsts = [sum(self.lengths[:at]) for at in range(len(self.lengths))]
        copies = [
            [first for first, texts in zip(firsts, self.texts, strict=True) if texts[row // each] is None] for row in range(len(context))
        ]
        return with_mask(bias, mask.to(bias), copies, words, sum(self.lengths), tokens)
