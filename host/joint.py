"""Models that read prompt and picture as one sequence (Flux): several texts behind one another, and who sees whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.attention import joint_bias


class Joint:
    """What one call's prompt is replaced by."""

    def __init__(self, shares: torch.Tensor, texts: Sequence[Sequence[torch.Tensor | None]], lengths: Sequence[int]):
        """shares (S, tokens); texts: for each of S segments, for each chunk of the batch, a context (1, n, width) or None for the chunk's
        own; lengths: rows of each segment, the longest that its chunks read.
        """
        self.shares, self.texts, self.lengths = shares, texts, lengths
        self._bias: dict[tuple, torch.Tensor] = {}

    def arguments(self, context: torch.Tensor, references: int = 0) -> dict[str, torch.Tensor]:
        """The context (rows, sum of lengths, width) and the attention's bias, as the host's model takes them."""
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
        real = tuple(tuple(texts[chunk].shape[1] for texts in read) for chunk in range(len(chunks)))
        key = (real, references, context.device)
        if key not in self._bias:
            self._bias = {key: joint_bias(self.shares, self.lengths, real, references).to(context.device)}
        return {"c_crossattn": whole, "attention_mask": self._bias[key].repeat_interleave(len(chunks[0]), 0)}
