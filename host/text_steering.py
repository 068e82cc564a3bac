"""Steers on a CLIP: its blocks carry them while a prompt is encoded, and only then."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch

from ..ops.shares import Shares
from ..ops.steering import ADD, Steer
from .dispatcher import Layer
from .encoders import Seat, windows_of
from .feature_sites import TextSite, fitting_text, skipped
from .features import Features, FeaturesError
from .steering import Steered, Steers

log = logging.getLogger("concept_nodes")

ALL_ROWS, BUT_FIRST, CONTENT = "all", "skip first", "content only"
SCOPES = (ALL_ROWS, BUT_FIRST, CONTENT)


class TextSteer(NamedTuple):
    """features and how to steer with them; scope: which rows of a prompt; gate: a prompt is left as it is, bit for bit, where its score
    does not reach this share of the features' own gate; 0 for none.
    """

    features: Features
    steer: Steer
    strength: float
    scope: str = BUT_FIRST
    gate: float = 0.0


def steered(clip, steer: TextSteer):
    """A clone of a CLIP that steers whatever it encodes, beside what it steers already. Clones of it do, too. Raises FeaturesError."""
    sites = fitting_text(clip, steer.features)
    if len(sites) > 1 and steer.steer.mode != ADD:
        raise FeaturesError(
            f"'{steer.features.name}' lies in {len(sites)} encoders, which are read one after the other: only the mode '{ADD}' works there."
        )
    if steer.gate > 0 and steer.features.gate is None:
        raise FeaturesError(f"'{steer.features.name}' have no gate of their own. Set gate to 0, or find them anew from prompts.")
    for site in sites:
        skipped(clip, site)
    return _with(clip.clone(), (*getattr(clip, "steers", ()), steer))


def _with(clip, steers: tuple[TextSteer, ...]):
    if not isinstance(clip, Steering):
        clip.__class__ = _kind(type(clip))
    clip.steers, clip.busy = steers, False
    return clip


@cache
def _kind(base: type) -> type:
    return type("SteeredCLIP", (Steering, base), {})


class Steering:
    """What a CLIP's class is mixed with, so that its clones keep the steers and nothing of them lies in the model between encodings."""

    steers: tuple[TextSteer, ...]
    busy: bool

    def clone(self, *args, **kwargs):
        return _with(super().clone(*args, **kwargs), self.steers)

    def encode_from_tokens(self, tokens, *args, **kwargs):
        with self._steering(tokens):
            return super().encode_from_tokens(tokens, *args, **kwargs)

    def encode_from_tokens_scheduled(self, tokens, *args, **kwargs):
        with self._steering(tokens):
            return super().encode_from_tokens_scheduled(tokens, *args, **kwargs)

    @contextlib.contextmanager
    def _steering(self, tokens: Mapping) -> Iterator[None]:
        if self.busy:  # the host's scheduled way leads through the plain one
            yield
            return
        self.busy = True
        try:
            sites = [fitting_text(self, steer.features) for steer in self.steers]
            for note in filter(None, (skipped(self, site) for group in sites for site in group)):
                log.warning("Steer Text: %s", note)  # clip skip may have been set behind the node
            open_ones = [one for one in zip(self.steers, sites, strict=True) if self._passes(*one, tokens)]
            with placed(_acts(self, open_ones, tokens)):
                yield
        finally:
            self.busy = False

    def _passes(self, steer: TextSteer, sites: Sequence[TextSite], tokens: Mapping) -> bool:
        """Whether a prompt reaches a steer's gate."""
        if steer.gate <= 0:
            return True
        rows, content = captured(self, sites, tokens, super().encode_from_tokens)
        return score(steer.features, rows, content) >= steer.gate * steer.features.gate


@contextlib.contextmanager
def placed(acts: Sequence[tuple[torch.nn.Module, object]]) -> Iterator[None]:
    """Acts on modules, for as long as the context lasts."""
    layers = [Layer(module, (act,)) for module, act in acts]
    try:
        for layer in layers:
            layer.place()
        yield
    finally:
        for layer in reversed(layers):
            layer.remove()


def _acts(clip, steers: Sequence[tuple[TextSteer, Sequence[TextSite]]], tokens: Mapping) -> list[tuple[torch.nn.Module, Steers]]:
    """One act for each block that is steered, over the windows of these tokens."""
    found: dict[int, list[tuple[TextSteer, TextSite, Features]]] = {}
    for steer, sites in steers:
        first = 0
        for site in sites:
            own = _columns(steer.features, first, first + site.width) if len(sites) > 1 else steer.features
            found.setdefault(id(site.module), []).append((steer, site, own))
            first += site.width
    device, made = clip.patcher.load_device, []
    for group in found.values():
        site = group[0][1]
        windows = windows_of(clip, site.seat, tokens)
        if not windows:
            continue
        act = Steers([Steered(own, steer.steer._replace(directions=own.operand())) for steer, _, own in group], device)
        scopes = Shares(torch.stack([scope_of(clip, site.seat, windows, steer.scope).to(device) for steer, _, _ in group]))
        act.use(act.setting([(steer.strength, 0.0) for steer, _, _ in group], range(len(group)), scopes))
        made.append((site.module, act))
    return made


def _columns(features: Features, first: int, last: int) -> Features:
    """One encoder's part of features that lie in several."""
    return features._replace(directions=features.directions[:, first:last], mean=features.mean[first:last])


def scope_of(clip, seat: Seat, windows: Sequence[Sequence[tuple]], scope: str) -> torch.Tensor:
    """(windows + 1, T) 1 for the rows of a prompt that are steered. The row behind the windows stands for the empty prompt that the host
    reads with weighted ones: it is what weights count from, and stays as it is.
    """
    rows = torch.zeros(len(windows) + 1, max(map(len, windows)))
    for number, window in enumerate(windows):
        if scope == CONTENT:
            rows[number, spoken(clip, seat, window)] = 1
        else:
            rows[number, int(scope == BUT_FIRST) : len(window)] = 1
    return rows


def spoken(clip, seat: Seat, window: Sequence[tuple]) -> list[int]:
    """Positions of a window's words, by the encoder's own marks of beginning and end."""
    special = getattr(clip.cond_stage_model, seat.part).special_tokens
    start, end, pad = (special.get(name) for name in ("start", "end", "pad"))
    there = []
    for position, (token, *_) in enumerate(window):
        number = token if isinstance(token, int) else None
        if number is not None and number == (pad if end is None else end):
            break
        if not (position == 0 and number is not None and number == start):
            there.append(position)
    return there


class Tap:
    """Keeps what a text encoder's block gives. The blocks after it write over that, so it is a copy."""

    def __call__(self, output, fresh: bool, *args, **kwargs):
        self.rows = (output[0] if isinstance(output, tuple) else output).detach().float().cpu().clone()
        return output


def captured(clip, sites: Sequence[TextSite], tokens: Mapping, encode=None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the blocks give for a prompt: rows (windows, T, d), several encoders' side by side, and (windows, T) which of them are words.
    None of either, where one of the encoders has no windows to read: for an empty text, some of the host's nodes give it none.
    """
    windows = [windows_of(clip, site.seat, tokens) for site in sites]
    if not all(windows):
        return torch.zeros(0, 0, sum(site.width for site in sites)), torch.zeros(0, 0, dtype=torch.bool)
    taps = [(site.module, Tap()) for site in sites]
    with placed(taps), torch.inference_mode():
        (encode or clip.encode_from_tokens)(tokens)
    content = torch.zeros(len(windows[0]), max(map(len, windows[0])), dtype=torch.bool)
    for number, window in enumerate(windows[0]):
        content[number, spoken(clip, sites[0].seat, window)] = True
    rows = torch.cat([tap.rows[: len(content), : content.shape[1]] for _, tap in taps], -1)
    return rows, content


def score(features: Features, rows: torch.Tensor, content: torch.Tensor) -> float:
    """How much of a concept a prompt brings, about 0 without it and 1 with it: by the word that brings most, or all rows but the first
    together where the features are of these; without rows, less than any gate.
    """
    if not content.numel():
        return -torch.inf
    scale, operand = features.scale(0.0), features.operand()
    amounts = (operand.activations(rows) - scale.zero) * features.weights
    if features.readers is None:
        amounts = amounts / scale.unit.abs().clamp_min(1e-12)
    else:
        # By what each adds: counted in units of their own, latents that hardly fire on the concept would outweigh its best.
        lengths, telling = features.directions.norm(dim=1), slice(features.telling or None)
        whole = (scale.unit * features.weights * lengths)[telling].sum()
        amounts = (amounts * lengths)[..., telling] / whole.abs().clamp_min(1e-12)
    if features.positions is not None:
        at = torch.arange(rows.shape[1])[:, None]
        amounts = torch.where((features.positions == at) | (features.positions < 0), amounts, 0.0)
    total = amounts.sum(-1)
    if features.whole:
        return float(total[:, 1:].mean())
    return float(total[content].max()) if bool(content.any()) else -torch.inf
