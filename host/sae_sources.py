"""Vectors for a sparse autoencoder to be trained on, as they come: rows of a text encoder's block, and of a model's while it samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import comfy.model_management
import torch

from .directions import ROWS, Runs, TapEffect, Tapped, levels_of, read_texts, sampled
from .encoders import windows_of
from .feature_sites import TextSite, which_words

AT_ONCE = 8  # prompts encoded and sampled before their rows are given on


def text_bound(clip, sites: Sequence[TextSite], prompts: Sequence[str]) -> int:
    """No more rows than these come of prompts."""
    windows = (windows_of(clip, sites[0].seat, clip.tokenize(text)) for text in prompts)
    return sum(len(window) for text in windows for window in text)


def text_rows(clip, sites: Sequence[TextSite], prompts: Sequence[str], pooling: str, seed: int, endless: bool) -> Iterator[torch.Tensor]:
    """(N, d) of each prompt, in an order by the seed: of its words, or of all rows but the first of each window. Once, or again and again
    in other orders. Raises FeaturesError.
    """
    for number in count() if endless else range(1):
        for at in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed + number)).tolist():
            rows, content = read_texts(clip, sites, [prompts[at]])[prompts[at]]
            # The first row only marks the beginning: the same for all, and many times as long as the others.
            yield rows[:, 1:].flatten(0, 1) if pooling == ROWS else rows[content]


def model_rows(patcher, clip, module: str, io: str, prompts: Sequence[str], runs: Runs, tokens: int) -> Iterator[torch.Tensor]:
    """(N, d) of pictures sampled for prompts, at most `tokens` rows of each at each of the noise levels, drawn at random; without an end,
    from other noise each time.
    """
    generator = torch.Generator().manual_seed(runs.seed)
    levels = levels_of(patcher, runs)
    kept: list[torch.Tensor] = []

    def some(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        there = share[0].nonzero()[:, 0]
        chosen = there[torch.randperm(len(there), generator=generator)[:tokens].to(there.device)]
        return x[:, chosen].flatten(0, 1)

    parts = {module: Tapped(lambda sigma, rows: kept.append(rows), io, some)}
    effect = TapEffect(parts, levels, "Train Sparse Autoencoder", which_words(patcher.model, [module]))
    for number in count():
        order = torch.randperm(len(prompts), generator=generator).tolist()
        for first in range(0, len(order), AT_ONCE):
            texts = [encoded(clip, prompts[at]) for at in order[first : first + AT_ONCE]]
            # Noise of its own for each: the pictures of one batch begin alike, because their prompts are what differs.
            own = runs._replace(pictures=1, seed=runs.seed + number * len(order) + first)
            for _ in sampled(patcher, effect, texts, encoded(clip, ""), own, Interruptible()):
                yield torch.cat(kept)
                kept.clear()


def encoded(clip, text: str):
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


class Interruptible:
    """In the place of a progress bar, where the bar is the training's."""

    def update(self, *_) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
