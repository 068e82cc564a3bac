"""Where effects act: places on the picture, and the words that are read there.

Places come in groups. Those of one group share the picture out among them (their masks add up to at most 1, what is left is the rest's);
groups are laid over one another independently. Each way to choose one place, or the rest, from every group is a *segment*: its share of a
position is the product of the chosen ones', so that shares add up to 1 everywhere, and where masks are hard each position belongs to one
segment. A segment reads one text, with the adapters of all its places on it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.masks import pool


class Place:
    """A part of the picture. mask (height, width) in 0..1, of any size, or what draws it for a height and width; texts: condition name
    ("positive", "negative") -> the context that is read there instead of the common one; factors: condition name -> what the place's shares
    are multiplied by in its rows, 1 where there are none.
    """

    source: Hashable = None

    def __init__(
        self,
        mask: torch.Tensor | Callable[[int, int], torch.Tensor],
        texts: Mapping[str, torch.Tensor] | None = None,
        factors: Callable[[str], float] | None = None,
    ):
        self.mask, self.texts, self.factors = mask, dict(texts or {}), factors
        self.group: tuple[Place, ...] = (self,)

    def on(self, height: int, width: int, kept: Mapping[Any, Any]) -> torch.Tensor:
        """(pictures, height, width): the place's share of each cell of a grid over each picture of a batch; one where all are alike. `kept`
        is the sampling's.
        """
        return (self.mask(height, width) if callable(self.mask) else pool(self.mask[None].float(), height, width)[0])[None]

    def text(self, condition: str) -> torch.Tensor | None:
        """What the entries of a condition read here, None for the common text. Guiders have more names than two: all that tell what is not
        wanted read the negative text.
        """
        return self.texts.get("negative" if "negative" in condition else "positive") if condition else None


class LivePlace(Place):
    """A place whose mask comes of the sampling itself and changes in the course of it. `Sampling.kept[source]` has the masks of several
    such places: `version(step)`, the number of those that hold at a step, and `shares(height, width)` (places, pictures, height, width).
    """

    def __init__(
        self,
        source: Hashable,
        index: int,
        texts: Mapping[str, torch.Tensor] | None = None,
    ):
        super().__init__(torch.zeros(0, 0), texts)
        self.source, self.index = source, index

    def on(self, height: int, width: int, kept: Mapping[Any, Any]) -> torch.Tensor:
        return kept[self.source].shares(height, width)[self.index]


def group(places: Sequence[Place]) -> None:
    """Make places share the picture among them."""
    for place in places:
        place.group = tuple(places)


class Segment(NamedTuple):
    """places: those whose effects act on its words; reader: the one whose texts are read, None for the common ones."""

    places: frozenset[int]
    reader: Place | None


def segments(places: Sequence[Place], masks: torch.Tensor, every: bool = False) -> tuple[list[Segment], torch.Tensor]:
    """The segments that have any share, and their shares (S, ...), from the masks (K, ...) of `places`.

    Of several texts for one position, that of the group that came last is read. every: those too that
    have nothing.
    """
    at = {id(place): index for index, place in enumerate(places)}
    found = [(Segment(frozenset(), None), torch.ones(masks.shape[1:]))]
    seen: set[int] = set()
    for place in places:
        if id(place) in seen:
            continue
        members = [member for member in place.group if id(member) in at]
        seen |= {id(member) for member in members}
        shares = [masks[at[id(member)]] for member in members]
        choices = [(None, (1 - sum(shares)).clamp(min=0)), *zip(members, shares, strict=True)]
        crossed = []
        for segment, share in found:
            for chosen, own in choices:
                both = share * own
                if every or both.any():
                    one = (
                        segment
                        if chosen is None
                        else Segment(segment.places | {at[id(chosen)]}, chosen if chosen.texts else segment.reader)
                    )
                    crossed.append((one, both))
        found = crossed
    return [segment for segment, _ in found], torch.stack([share for _, share in found])
