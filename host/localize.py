"""Regions that are found while the picture is sampled: their masks come of the running model's attention to words.

Nothing is evaluated twice. The calls of a step are read, and what they showed is where the regions are in the next one; before the first
masks, and before its own start, a region is nowhere. Each picture of a batch has masks of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..ops import maps as ops
from ..ops.regions import Live
from . import capture
from .capture import ATTENTION, CaptureEffect, Now, grid_at
from .dispatcher import Call, Run
from .families import family_of
from .maps import Bound, together
from .sites import JOINT, sites
from .window import Window

BLOCK = "block"
ARGMAX, OTSU, QUANTILE, MEDIAN, SOFT = "argmax", "otsu", "quantile", "median", "soft"
LEAST = 3  # steps of a run that are read at least
LAYOUT = 2  # halvings of the latent at the decoder's attention that places things


def layers_of(model) -> list[str]:
    """Names of the attentions that say where things are: of a UNet the decoder's first on its third grid (Concept Conductor, arXiv
    2408.03632, holds layouts of Stable Diffusion 1.5 by that one); of others those that maps are read from. Raises UnsupportedFamily.
    """
    names = capture.layers_of(model, capture.ALL)
    levels = {} if _jointly(model) else {name: sites(model, [f"{name}.to_q"])[f"{name}.to_q"].level for name in names}
    laid_out = [name for name in names if levels.get(name) == LAYOUT and ".output_blocks." in name]
    if not laid_out:
        return capture.layers_of(model)
    spatial = laid_out[0].partition(".transformer_blocks.")[0]
    return [name for name in laid_out if name.startswith(f"{spatial}.")]


class Sought(NamedTuple):
    """A region that is found while sampling: its name, its number among all regions, the rows of its phrase and of its background's, and
    how.
    """

    name: str
    index: int
    bound: Bound
    background: tuple[Bound, ...]
    live: Live


class Masks:
    """Where the regions are in one sampling, by what its steps have shown so far. share_out(height, width, masks): the regions' shares
    (K, pictures, height, width) of what the sought ones' masks (N, pictures, height, width) are.
    """

    def __init__(self, sought: Sequence[Sought], share_out: Callable[[int, int, torch.Tensor], torch.Tensor]):
        self.sought, self.share_out = tuple(sought), share_out
        self.lock = threading.Lock()
        self.step = self.number = 0
        self.sums: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
        self.moving = [False] * len(sought)
        self.maps: torch.Tensor | None = None
        self._shares: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, grid: tuple[int, int], maps: torch.Tensor, moving: Sequence[bool]) -> None:
        """What a layer over `grid` showed in a call: maps (pictures, positions, phrases) of all sought ones, then of their backgrounds.
        moving: which of them may still move.
        """
        with self.lock:
            total, count = self.sums.get(grid, (0.0, 0))
            self.sums[grid] = total + maps.to(getattr(total, "device", maps.device)), count + 1
            self.moving = list(moving)

    def version(self, step: int) -> int:
        """The number of the masks that hold at a step: they follow the steps before it, and stay for all of its calls."""
        with self.lock:
            if step > self.step:
                self.step = step
                if self.sums:
                    self._fold()
            return self.number

    def _fold(self) -> None:
        parts = [(total / count).transpose(1, 2).unflatten(-1, grid).cpu() for grid, (total, count) in self.sums.items()]
        maps = together(parts)
        if self.maps is not None:
            keep = torch.ones(maps.shape[1])
            for index, (sought, moving) in enumerate(zip(self.sought, self.moving, strict=True)):
                keep[index] = sought.live.smoothing if moving else 1.0
            behind = [one.live.smoothing for one in self.sought for _ in one.background]
            keep[len(self.sought) :] = torch.tensor(behind)
            maps = torch.lerp(maps, self.maps, keep[:, None, None])
        self.sums, self.maps = {}, maps
        self._shares.clear()
        self.number += 1

    def masks(self, height: int, width: int) -> torch.Tensor:
        """(N, pictures, height, width) of the sought regions alone, before others and what is drawn have their say."""
        if self.maps is None:
            return torch.zeros(len(self.sought), 1, height, width)
        return cut(self.maps, self.sought, height, width)

    def within(self, maps: torch.Tensor) -> torch.Tensor:
        """(K, pictures, h, w): the regions' shares by the maps (pictures, N + M, h, w) of one attention, where they are sought in each by
        itself; by the steps before for others.
        """
        own = cut(ops.relative(maps), self.sought, *maps.shape[-2:])
        by_block = [one.live.scope == BLOCK for one in self.sought]
        if not all(by_block):
            own = torch.where(torch.tensor(by_block, device=own.device)[:, None, None, None], own, self.masks(*maps.shape[-2:]).to(own))
        return self.share_out(*maps.shape[-2:], own)

    def shares(self, height: int, width: int) -> torch.Tensor:
        """(K, pictures, height, width) of all regions."""
        if (height, width) not in self._shares:
            self._shares[height, width] = self.share_out(height, width, self.masks(height, width))
        return self._shares[height, width]


def cut(maps: torch.Tensor, sought: Sequence[Sought], height: int, width: int) -> torch.Tensor:
    """(N, pictures, height, width) in 0..1, from maps (pictures, N + M, h, w) of N phrases and M of their backgrounds. Where several are
    sought, a place goes to the one whose map is the highest in comparison with itself, with all maps balanced; soft ones share it. A soft
    one without rivals is as high as its map.
    """
    cell = max(1, round(height / maps.shape[-2]))
    rivals, maps = ops.resized(ops.balanced(ops.log_relative(maps)), height, width), ops.resized(maps, height, width)
    (own, mine), others = (part[:, : len(sought)] for part in (maps, rivals)), rivals[:, len(sought) :]
    won, heights, first, found = ops.winners(mine), ops.heights(own), 0, []
    for index, one in enumerate(sought):
        behind = others[:, first : first + len(one.background)]
        first += len(one.background)
        alone = own[:, index : index + 1]
        if one.live.threshold == SOFT:
            everyone = torch.cat([mine, behind], 1)
            found.append(everyone.softmax(1)[:, index] if everyone.shape[1] > 1 else heights[:, index])
            continue
        mask = won[:, index : index + 1]
        if behind.shape[1]:
            mask = mask & (mine[:, index : index + 1] >= behind.amax(1, keepdim=True))
        if one.live.threshold == OTSU:
            mask = mask & ops.over_otsu(alone)
        elif one.live.threshold != ARGMAX:
            mask = mask & ops.over_quantile(alone, 0.5 if one.live.threshold == MEDIAN else one.live.level)
        if one.live.largest:
            mask = ops.largest(mask)
        found.append(ops.dilated(mask, one.live.grown * cell)[:, 0].float())
    return torch.stack(found)


class LocalizeEffect(CaptureEffect):
    """Reads attention as `CaptureEffect` does, and keeps the masks of sought regions by it, under `source` in `Sampling.kept`.

    length: rows of the prompt that the phrases are bound in.
    """

    asks = True

    def __init__(self, model, layers: Sequence[str], sought: Sequence[Sought], length: int, share_out, source: object = None):
        self.sought, self.length, self.share_out = tuple(sought), length, share_out
        # In a block of its own a region is read wherever it acts.
        super().__init__(model, layers, 0.0, max(1.0 if one.live.scope == BLOCK else one.live.until for one in sought))
        self.source = source or object()
        self.followed = frozenset(layers_of(model)) & {*layers} or frozenset(layers)
        if any(one.live.scope == BLOCK for one in sought):
            self.behind = behind(model, layers)
        phrases = ", ".join(repr(one.bound.phrase) for one in sought)
        self.name = f"Maps of {phrases} in {len(layers)} {'layer' if len(layers) == 1 else 'layers'}"

    def again(self, model) -> LocalizeEffect:
        return LocalizeEffect(model, self.layers, self.sought, self.length, self.share_out, self.source)

    def in_run(self, run: Run) -> LocalizeEffect:
        copy = super().in_run(run)
        copy.masks = run.sampling.kept.setdefault(self.source, Masks(self.sought, self.share_out))
        copy.noted, copy.told = 0, ""
        return copy

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        self.ends = [Window.of(model_sampling, 0.0, one.live.until) for one in self.sought]
        reads = super().strengths(model_sampling)
        return lambda call: reads(call) or float(self._early() and bool(self._positive(call)))

    def _early(self) -> bool:
        """Whether so few steps have been seen that this one is read wherever in sampling it is: a second pass begins in the middle."""
        return len(self.sampling.ended) < LEAST

    def _reads_its_own(self, chunk: int) -> bool:
        return False  # of several texts the common one is looked up

    def enter(self, call: Call) -> None:
        super().enter(call)
        self.moving = [self._early() or end.holds(call.sigma) for end in self.ends]

    def look_back(self, call: Call) -> None:
        super().look_back(call)
        if self.masks.number != self.noted:
            self.noted = self.masks.number
            shares = self.masks.shares(*self.found.latent)
            listed = ", ".join(f"'{one.name}' {float(shares[one.index].mean()):.0%}" for one in self.sought)
            self.run.notes.pop(self.told, None)
            self.told = f"Found by words, of the picture at the end: {listed}."
            self.run.notes[self.told] = None

    def _tell(self) -> None:
        super()._tell()
        spread, first, words = self.run.spread, 0, 0
        if self.open and spread is not None and spread.lengths:
            words = self.open[-1].words
            at = next((at for at, texts in enumerate(spread.texts) if all(text is None for text in texts)), None)
            if at is None:
                words = 0
            else:
                first = sum(spread.lengths[:at])
        gates = bool(self.open) and spread is not None and bool(self.behind)
        for name, tap in self.taps.items():
            if spread is not None and spread.lengths:
                tap.first, tap.words = first, words
            tap.then = partial(self._gate, name) if gates and name in self.behind.values() else None

    def _gate(self, name: str, maps: torch.Tensor) -> None:
        """What an attention shows is where the regions are on the layers behind it, in the same call."""
        now = self.open[-1]
        each = len(maps) // max(1, len(now.chunks))
        for number, (entry, part) in enumerate(now.chunks):
            grid = grid_at(self.found.latent, self.levels[name])
            if entry == 0 and part == (0, 0, *self.found.latent) and maps.shape[1] == grid[0] * grid[1]:
                own = self._of_phrases(maps[number * each : (number + 1) * each])
                if own is not None:
                    shares = self.masks.within(own.transpose(1, 2).unflatten(-1, grid))
                    self.run.spread.draw(name, self.source, shares)

    def _add(self, name: str, source: str, maps: torch.Tensor, now: Now, words: int) -> bool:
        if not super()._add(name, source, maps, now, words):
            return False
        if source == ATTENTION and name in self.followed:
            chunks = [number for number, (entry, *_) in enumerate(now.chunks) if entry == 0]
            each = len(maps) // max(1, len(now.chunks))
            for number in chunks:
                self._follow(name, maps[number * each : (number + 1) * each], now.chunks[number][1])
        return True

    def _follow(self, name: str, maps: torch.Tensor, part: tuple[int, int, int, int]) -> None:
        """Maps (pictures, positions, words) of a layer in one call, of the whole picture."""
        picked = self._of_phrases(maps) if part == (0, 0, *self.found.latent) else None
        if picked is not None:
            level = self.levels.get(name, self.patch)
            self.masks.add(grid_at(self.found.latent, level), picked, self.moving)

    def _of_phrases(self, maps: torch.Tensor) -> torch.Tensor | None:
        """(pictures, positions, phrases) of (pictures, positions, words); None where these are no repeats of the prompt."""
        if maps.shape[-1] % self.length:
            return None
        maps = ops.fold(maps, self.length)
        phrases = [one.bound for one in self.sought] + [bound for one in self.sought for bound in one.background]
        return torch.stack([maps[..., self._rows(bound)].mean(-1) for bound in phrases], -1)

    def _rows(self, bound: Bound) -> list[int]:
        """Of a UNet's prompt, whose encoder reads from left to right, the last row of a phrase knows all of it."""
        return list(bound.rows) if self.patch else [row for row in bound.rows if row + 1 not in bound.rows]


def _jointly(model) -> bool:
    return any(kind == JOINT for kind in family_of(model).rows)


def behind(model, attentions: Sequence[str]) -> dict[str, str]:
    """The layers of a UNet whose input has been through one of `attentions` and through no later one, by name, and its name: within their
    spatial transformer the rest of the block, the beginning of the next, and what projects out.
    """
    found = {}
    for name in attentions:
        blocks, _, number = name.removesuffix(".attn2").rpartition(".")
        spatial, own, after = blocks.rpartition(".")[0], f"{blocks}.{number}.", f"{blocks}.{int(number) + 1}."
        last = not any(other.startswith(after) for other, _ in model.named_modules())
        for other, _ in model.named_modules():
            rest = other.startswith((f"{own}attn2.to_out", f"{own}ff."))
            ahead = other.startswith(after) and not other.startswith((f"{after}attn2.to_out", f"{after}attn2.to_k", f"{after}attn2.to_v"))
            if rest or (ahead and ".ff." not in other) or (last and other.startswith(f"{spatial}.proj_out")):
                found[other] = name
    return found
