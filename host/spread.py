"""What the places of active effects mean for one kind of model call: shares of every layer's rows, and the texts that are read."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.shares import Shares
from .joint import Joint
from .places import Place, Segment, segments
from .sites import JOINT, MAP, TEXT, VECTOR, Pyramid, Site
from .words import Words

SEGMENTS = "segments"


class Crop(NamedTuple):
    """The part of the latent that one chunk of a batch shows, in latent cells."""

    top: int
    left: int
    height: int
    width: int


class Kind(NamedTuple):
    """What calls must have in common to share a `Spread`.

    full: height and width of the whole latent; crops: each chunk's part of it, one for all where they are the same; names: each chunk's
    condition ("positive", ...); batch: rows of x; tokens: rows of the prompt; references: tokens behind the picture's own.
    """

    full: tuple[int, int]
    crops: tuple[Crop, ...]
    names: tuple[str, ...]
    batch: int
    tokens: int
    references: int


class Spread:
    """`placed` (effect by number) over one kind of call.

    `places` are the distinct ones; a layer's `Shares` count them in this order. `kept` is the sampling's, for places that come of it.
    """

    def __init__(
        self, kind: Kind, placed: Mapping[int, tuple[Place, str | Words]], device: torch.device, kept: Mapping[Any, Any] | None = None
    ):
        self.kind, self.device, self._kept = kind, device, {} if kept is None else kept
        # What neither brings a text nor acts on words divides no text: those places go last, and are left out of the segments.
        wordless = {place: True for place, _ in placed.values()}
        for place, text in placed.values():
            wordless[place] &= text == "none" and not place.texts and place.group == (place,)
        self.places = sorted(wordless, key=wordless.get)
        self._number = {place: index for index, place in enumerate(self.places)}
        self._worded = len(self.places) - sum(wordless.values())
        self._names = kind.names or ("",)
        self._policies = {index: text for index, (_, text) in placed.items()}
        self._placed = {index: place for index, (place, _) in placed.items()}
        self._of_sites: dict = {}
        self.lengths: list[int] = []
        self._repeats = False
        self.joint: Joint | None = None
        self.biases: dict = {}
        self.live: tuple[int, ...] = ()
        self._draw()

    def _draw(self) -> None:
        whole = self._on(self.places)
        self._pictures = whole.shape[1]
        # Masks that change keep all segments there could be. Maps of words are read in the first, which is nobody's.
        moving = any(place.source is not None for place in self.places)
        self.segments, shares = segments(self.places[: self._worded], whole[: self._worded], every=moving)
        self.texts = [[segment.reader.text(name) if segment.reader else None for name in self._names] for segment in self.segments]
        self._masks, self._shared = self._cut(whole), self._cut(shares)

    def follow(self, live: tuple[int, ...]) -> None:
        """Masks of another number hold from now on; it is to be said anew how texts are read, and then to `refresh`."""
        self.live, self.biases = live, {}
        self._draw()

    def refresh(self) -> None:
        """What layers use stays in its place, with other numbers in it."""
        self._of_sites = {key: shares for key, shares in self._of_sites.items() if key[0] != SEGMENTS}
        for (site, columns, _), shares in self._of_sites.items():
            if shares.whole:
                shares.rows = self._of_site(site, columns)

    def draw(self, behind: str, source: Hashable, masks: torch.Tensor) -> None:
        """Masks (K, pictures, h, w) of a source's places on the layers behind an attention, over its grid, for the rest of the call."""
        kind = self.kind
        chunks = max(1, len(kind.names))
        if masks.shape[1] * chunks != kind.batch or kind.crops != (Crop(0, 0, *kind.full),):
            return
        found, pictures = masks.flatten(2).repeat(1, chunks, 1), masks.shape[1]

        def factors(place: Place) -> torch.Tensor:
            each = torch.tensor([self._factor(place, chunk) for chunk in range(chunks)], device=found.device)
            return each.repeat_interleave(pictures)[:, None]

        for (_, columns, own), shares in self._of_sites.items():
            if own == behind and own and shares.tokens == found.shape[-1]:
                places = [self.places[place] for place, _ in columns]
                before = shares.rows.expand(-1, kind.batch, -1)
                rows = [found[place.index] * factors(place) if place.source == source else before[at] for at, place in enumerate(places)]
                shares.rows = torch.stack(rows).to(before)

    def _cut(self, masks: torch.Tensor) -> list[Pyramid]:
        """One pyramid for each crop; where pictures have masks of their own, for each row of the batch."""
        crops, pictures = self.kind.crops, masks.shape[1]
        if pictures > 1 and len(crops) == 1:
            crops *= max(1, len(self.kind.names))
        return [Pyramid(masks[:, at, c.top : c.top + c.height, c.left : c.left + c.width]) for c in crops for at in range(pictures)]

    def read_apart(self) -> None:
        """Every segment in a softmax of its own: texts repeated to one length per segment, which no softmax notices."""
        self.lengths = [math.lcm(*(self._tokens(text) for text in texts)) for texts in self.texts]
        self._repeats = True

    def read_jointly(self, own: bool, apart: torch.Tensor | None, level: int) -> Joint | None:
        """One sequence: segments behind one another where any text differs from the common one, or where adapters act on their own rows
        (`own`); nothing where one common text serves. level: that of the picture's tokens.
        """
        several = own or any(segment.reader for segment in self.segments)
        if not several:
            self.segments, self.texts = [Segment(frozenset(range(len(self.places))), None)], [[None] * len(self.texts[0])]
            self._shared = self._cut(torch.ones(1, self._pictures, *self.kind.full))
        self.lengths = [max(self._tokens(text) for text in texts) for texts in self.texts]
        if not several and apart is None:
            return None
        shares = torch.stack([shared.at(level).flatten(1) for shared in self._shared], 1)
        return Joint(shares, self.texts, self.lengths, apart)

    def _tokens(self, text: torch.Tensor | None) -> int:
        return self.kind.tokens if text is None else text.shape[1]

    def segment_shares(self, site: Site) -> Shares:
        """Who reads which segment's text, at a layer over the picture."""
        key = (SEGMENTS, site.level, "")
        if key not in self._of_sites:
            self._of_sites[key] = Shares(self._over([shared.at(site.level).flatten(1) for shared in self._shared]))
        return self._of_sites[key]

    def shares(self, site: Site, members: Sequence[int], behind: str = "") -> tuple[list[int], Shares]:
        """For the effects `members`: the number of each one's place in the shares of a layer's rows, and these. Effects that act on other
        words of the prompt than their place does are places of their own. behind: the attention that draws the masks of the layers behind
        it anew in each call, see `draw`.
        """
        words = site.kind in (TEXT, JOINT)
        names = [(self._number[self._placed[index]], self._policies[index] if words else "") for index in members]
        columns = list(dict.fromkeys(names))
        key = (site, tuple(columns), behind)
        if key not in self._of_sites:
            whole = any(self.places[place].source is not None for place, _ in columns)
            grid = tuple(self._masks[0].at(site.level).shape[-2:]) if site.kind == MAP else None
            self._of_sites[key] = Shares(self._of_site(site, key[1]), grid, whole)
        return [columns.index(name) for name in names], self._of_sites[key]

    def _of_site(self, site: Site, columns: Sequence[tuple[int, str | Words]]) -> torch.Tensor:
        """(columns, batch rows or 1, rows)"""
        chunks = [(at // self._pictures, pyramid) for at, pyramid in enumerate(self._masks)]
        differ = any(isinstance(policy, Words) or self.places[place].factors for place, policy in columns)
        if len(chunks) < len(self._names) and differ:
            chunks = [(chunk, self._masks[0]) for chunk in range(len(self._names))]
        return self._over([self._rows(pyramid, site, columns, chunk) for chunk, pyramid in chunks])

    def _rows(self, pyramid: Pyramid, site: Site, columns: Sequence[tuple[int, str | Words]], chunk: int) -> torch.Tensor:
        """(columns, rows) in one chunk of the batch."""
        at = [place for place, _ in columns]
        factors = torch.tensor([self._factor(self.places[place], chunk) for place in at])[:, None]
        if site.kind == VECTOR:
            return pyramid.at(0)[at].mean((1, 2))[:, None] * factors
        picture = pyramid.at(site.level)[at].flatten(1) * factors
        if site.kind not in (TEXT, JOINT):
            return torch.nn.functional.pad(picture, (0, self._behind(site)))
        words = torch.stack([self._words(place, policy, chunk) for place, policy in columns]) * factors
        return words if site.kind == TEXT else torch.nn.functional.pad(torch.cat([words, picture], 1), (0, self._behind(site)))

    def _factor(self, place: Place, chunk: int) -> float:
        return 1.0 if place.factors is None else place.factors(self._names[chunk])

    def _behind(self, site: Site) -> int:
        """Reference pictures belong to nobody."""
        return self.kind.references if site.kind != MAP else 0

    def _words(self, place: int, policy: str | Words, chunk: int) -> torch.Tensor:
        if isinstance(policy, Words):
            return torch.cat([self._named(place, policy, chunk, at) for at in range(len(self.segments))])
        own = [float(policy == "all" or (policy == "own" and place in segment.places)) for segment in self.segments]
        return torch.cat([torch.full((n,), value) for value, n in zip(own, self.lengths, strict=True)])

    def _named(self, place: int, words: Words, chunk: int, at: int) -> torch.Tensor:
        """(rows of the segment,): the words themselves, where the common prompt is read by what has the place."""
        common, length, name = self.texts[at][chunk] is None, self.lengths[at], self._names[chunk]
        if not common or place not in self.segments[at].places or not name or "negative" in name:
            return torch.zeros(length)
        tokens = self.kind.tokens
        return words.on(length) if self._repeats else torch.nn.functional.pad(words.on(tokens), (0, length - tokens))

    def _over(self, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
        """(columns, batch rows or 1, rows) on the device."""
        rows = torch.stack(list(chunks), 1)
        if len(chunks) > 1:
            rows = rows.repeat_interleave(self.kind.batch // len(chunks), 1)
        return rows.to(self.device)

    def missed(self) -> bool:
        """Whether a layer had other rows than were shared out."""
        return any(shares.missed for shares in self._of_sites.values())

    def apart(self, level: int, places: Sequence[Place]) -> torch.Tensor:
        """(1, C or B: for all of the batch, each crop or each row, tokens, tokens): how much of each position belongs to another of
        `places` than each other position does, from 0 to 1. The rest is apart from nobody.
        """
        found = []
        for pyramid in self._cut(self._on(places)):
            rows = pyramid.at(level).flatten(1)
            total = rows.sum(0)
            found.append((total[:, None] * total[None] - rows.t() @ rows).clamp(min=0))
        return torch.stack(found)

    def tokens(self, level: int) -> int:
        """Positions at a level."""
        crop = self.kind.crops[0]
        return -(-crop.height // 2**level) * -(-crop.width // 2**level)

    def _on(self, places: Sequence[Place]) -> torch.Tensor:
        """(K, pictures, height, width); one picture where all are alike, or where the call's rows are others than the sampling's."""
        kind = self.kind
        if not places:
            return torch.zeros(0, 1, *kind.full)
        masks = torch.stack(torch.broadcast_tensors(*(place.on(*kind.full, self._kept) for place in places)))
        known = masks.shape[1] * max(1, len(kind.names)) == kind.batch
        return masks if known else masks.mean(1, keepdim=True)
