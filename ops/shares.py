"""Who has which rows of a layer, and how much of each.

Several places share the rows of a layer (tokens of the picture or of the text). What belongs to a place is computed on that place's rows
alone: they are picked, worked on side by side, and added back, times the place's share of each. Places of like size go together, so that
the work grows with the rows that places have and the number of operations does not grow with the number of places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Places of like size. rows (P * B * n,): numbers of their rows in a flattened (B * tokens) sequence, place by place; weight
    (P, B or 1, n, 1): their shares of them, 0 where a place has fewer than n.
    """

    places: tuple[int, ...]
    rows: Tensor
    weight: Tensor

    def part(self, at: list[int]) -> Bucket:
        """Some of the places."""
        if len(at) == len(self.places):
            return self
        rows = self.rows.view(len(self.places), -1)[at].flatten()
        return Bucket(tuple(self.places[one] for one in at), rows, self.weight[at])

    def pick(self, x: Tensor) -> Tensor:
        """(P, B * n, channels): the rows of x (B, tokens, channels), place by place."""
        return x.flatten(0, -2).index_select(0, self.rows).view(len(self.places), -1, x.shape[-1])

    def add(self, y: Tensor, part: Tensor) -> None:
        """Add rows (P, B * n, channels) back where they were picked, to y (B * tokens, channels)."""
        y.index_add_(0, self.rows, part.flatten(0, -2).to(y.dtype))


def weigh(z: Tensor, weight: Tensor, factor: Tensor | None = None) -> Tensor:
    """z (P, B * n, channels) times shares (P, B or 1, n, 1), in place, and times a factor (P, 1, 1, channels or 1)."""
    weight = weight if factor is None else weight * factor
    z.view(weight.shape[0], -1, weight.shape[2], z.shape[-1]).mul_(weight)
    return z


class Shares:
    """The shares that P places have of a layer's rows: `rows` (P, B or 1, tokens), B where those of one batch differ; grid (height, width)
    where the rows are positions on a plane; whole: they change too often to be picked, and all rows are worked on (picking waits for the
    device, and gives operations other shapes).
    """

    TIMES = 4  # settings of gains whose products with the shares are kept

    def __init__(self, rows: Tensor, grid: tuple[int, int] | None = None, whole: bool = False):
        self.rows, self.grid, self.whole = rows, grid, whole
        self._buckets: dict[tuple[int, int], list[Bucket]] = {}
        self._times: dict[tuple, Tensor] = {}
        self._gained: dict[tuple, Tensor] = {}
        self._picked: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        # Whether a layer had other rows than these, and so got nothing of them.
        self.missed = False

    @cached_property
    def _counts(self) -> list[int]:
        """Rows that each place has, at most, in a picture of the batch."""
        return (self.rows != 0).sum(-1).amax(1).tolist()

    @cached_property
    def _sizes(self) -> dict[int, list[int]]:
        sizes: dict[int, list[int]] = {}
        for place, count in enumerate(self._counts):
            if count:
                # Powers of two: no place is padded to more than twice its rows.
                sizes.setdefault((count - 1).bit_length(), []).append(place)
        return sizes

    @cached_property
    def picked(self) -> int:
        """Rows that are worked on where they are picked."""
        return sum(len(places) * max(self._counts[place] for place in places) for places in self._sizes.values())

    def groups(self) -> list[tuple[int, ...]]:
        """The places of each bucket."""
        return [tuple(places) for places in self._sizes.values()]

    @property
    def tokens(self) -> int:
        return self.rows.shape[-1]

    @cached_property
    def boxes(self) -> list[tuple[tuple[int, int], tuple[int, int]] | None]:
        """The box around each place, in all pictures of the batch: ((top, bottom), (left, right)), ends beyond; None where it has none."""
        found = []
        for there in (self.rows != 0).any(1).view(-1, *self.grid).cpu():
            axes = [there.any(1).nonzero(), there.any(0).nonzero()]
            found.append(tuple((int(axis[0]), int(axis[-1]) + 1) for axis in axes) if len(axes[0]) else None)
        return found

    def area(self, place: int) -> int:
        """Positions in the box around a place."""
        box = self.boxes[place]
        return 0 if box is None else (box[0][1] - box[0][0]) * (box[1][1] - box[1][0])

    def buckets(self, batch: int, tokens: int) -> list[Bucket]:
        """The places that have any row, for a batch of so many rows of `tokens` each, of which those past ours belong to nobody. Of a
        sequence that is shorter than ours nobody has anything: it is not the one that was shared out.
        """
        if tokens < self.tokens:
            self.missed = True
            return []
        if (batch, tokens) not in self._buckets:
            self._buckets[batch, tokens] = [self._bucket(places, batch, tokens) for places in self.groups()]
        return self._buckets[batch, tokens]

    def times(self, columns: Sequence[int], gains: Sequence[float]) -> Tensor:
        """(B or 1, tokens, R): for R columns the shares of one place times a gain. Layers of like adapters have one between them."""

        def make():
            return self.rows.movedim(0, -1)[..., list(columns)] * torch.tensor(gains, device=self.rows.device)

        return self._product(self._times, (tuple(columns), tuple(gains)), make)

    def gained(self, places: tuple[int, ...], gains: Sequence[float]) -> Tensor:
        """(P, B or 1, n, 1): what the places of a bucket have of its rows, each times its gain. Layers of like adapters have one between
        them.
        """
        weight = self._pick(places)[1]

        def make():
            return weight * torch.tensor(gains, device=weight.device).view(-1, 1, 1, 1)

        return self._product(self._gained, (places, tuple(gains)), make)

    def _product(self, kept: dict, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        if key not in kept:
            while len(kept) >= self.TIMES * max(1, len(self._sizes)):  # strengths may change in every step
                kept.pop(next(iter(kept)))
            kept[key] = make()
        return kept[key]

    def weights(self) -> dict[tuple[int, ...], Tensor]:
        """What the places of each bucket have of its rows (P, B or 1, n, 1), whatever the batch."""
        return {places: self._pick(places)[1] for places in self.groups()}

    def _pick(self, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Numbers of the rows of places, (P, B or 1, n), and their shares, (P, B or 1, n, 1)."""
        if places not in self._picked:
            shares = self.rows[list(places)]
            n = max(self._counts[place] for place in places)
            # The rows that a place has, in order, come first; what fills up behind them weighs nothing.
            order = torch.argsort((shares == 0).to(torch.uint8), dim=-1, stable=True)[..., :n]
            self._picked[places] = order, shares.gather(-1, order)[..., None]
        return self._picked[places]

    def _bucket(self, places: tuple[int, ...], batch: int, tokens: int) -> Bucket:
        order, weight = self._pick(places)
        first = torch.arange(batch, device=order.device)[:, None] * tokens
        return Bucket(places, (order + first).flatten(), weight)
