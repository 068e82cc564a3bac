"""Words of a prompt as rows of its context, found by the host's own tokenizer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .families import Family


class Words(NamedTuple):
    """rows: numbers of a prompt's rows; length: how many the whole prompt has, after which the host repeats it where it needs more."""

    rows: tuple[int, ...]
    length: int

    def on(self, tokens: int) -> torch.Tensor:
        """(tokens,) 1 at the rows and 0 elsewhere."""
        within = torch.arange(tokens) % self.length
        return torch.isin(within, torch.tensor(self.rows)).float()


def find(clip, family: Family, prompt: str, words: str) -> tuple[int, ...]:
    """The rows of `words` in `prompt`, wherever they stand in it as they are written; none where they do not."""
    return tuple(sorted({row for place in places(clip, family, prompt, words) for row in place}))


def places(clip, family: Family, prompt: str, words: str) -> list[tuple[int, ...]]:
    """The same, place by place in their order."""
    there, sought = _tokens(clip, family, prompt), [token for _, token in _tokens(clip, family, words)]
    starts = [at for at in range(len(there) - len(sought) + 1) if [token for _, token in there[at : at + len(sought)]] == sought]
    return [tuple(row for row, _ in there[at : at + len(sought)]) for at in starts] if sought else []


def length_of(clip, family: Family, prompt: str) -> int:
    """Rows of the prompt's context."""
    return sum(len(part) for part in _lists(clip, family, prompt))


def _tokens(clip, family: Family, text: str) -> list[tuple[int, object]]:
    """(row, token) of the words themselves, without what stands before, behind and between them."""
    rows = [item for part in _lists(clip, family, text) for item in part]
    # An embedding's vectors stand for themselves alone; word 0 is padding and the like.
    return [(row, token if isinstance(token, int) else object()) for row, (token, _, word) in enumerate(rows) if word]


def _lists(clip, family: Family, text: str) -> list[list[tuple]]:
    tokens = clip.tokenize(text, return_word_ids=True)
    return tokens[next((name for name in family.tokenizers if name in tokens), next(iter(tokens)))]
