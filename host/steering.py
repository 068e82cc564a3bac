"""Steers on a model: the effect that a node attaches, and what happens on a block's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.schedule import Schedule
from ..ops.shares import Shares
from ..ops.steering import Scale, Steer, together
from .dispatcher import STEERS, Call, Effect, Strength
from .feature_sites import fitting, picture_at, which_words
from .features import DIFF, Features, FeaturesError
from .places import Place
from .window import course

COND, BOTH, AGAINST = "cond", "both", "cond + uncond -"
SIDES = (COND, BOTH, AGAINST)
NEGATIVE = {COND: 0.0, BOTH: 1.0, AGAINST: -1.0}


class Steered(NamedTuple):
    """What one steer places on a block."""

    features: Features
    steer: Steer

    turn = STEERS

    @classmethod
    def join(cls, parts: Sequence[Steered], module, device, dtype) -> Steers:
        return Steers(parts, device, picture_at(module))


class Setting(NamedTuple):
    """strengths (), scales, shares (B or 1, T) of one model call, for each steer."""

    strengths: list[torch.Tensor]
    scales: list[Scale]
    places: list[int | None]
    shares: Shares | None


class Steers:
    """All steers of one block, called with its output and its arguments (an `Act` of host.dispatcher).

    Rows are the positions of a map (B, d, height, width) or of a sequence (B, T, d), output number `at` where there are several.
    The change alone is added to the output, in its own type: where it is nothing, the output is what it was, bit for bit.
    """

    def __init__(self, parts: Sequence[Steered], device, at: int = 0):
        self.at = at
        self.features = [part.features for part in parts]
        self.steers = [part.steer._replace(directions=part.steer.directions.to(device)) for part in parts]
        self.reads = any(steer.reads for steer in self.steers)
        # Those of one block may differ in what they call its rows; the lengths of each kind are its own.
        self.kinds = {
            differ: [at for at, one in enumerate(self.features) if (one.io == DIFF) == differ]
            for differ in dict.fromkeys(one.io == DIFF for one in self.features)
        }
        self.device = device

    def setting(self, strengths: Sequence[Strength], places: Sequence[int | None] = (), shares: Shares | None = None) -> Setting:
        """Strengths are (strength, sigma)."""
        places = places or [None] * len(strengths)
        return Setting(
            [torch.tensor(float(strength), device=self.device) for strength, _ in strengths],
            [Scale(*(part.to(self.device) for part in one.scale(sigma))) for one, (_, sigma) in zip(self.features, strengths, strict=True)],
            list(places),
            shares,
        )

    def use(self, setting: Setting) -> None:
        self.strengths, self.scales, self.places, self.whole = setting

    def __call__(self, output: Any, fresh: bool, *args, **kwargs) -> Any:
        own = output[self.at] if isinstance(output, tuple) else output
        rows = _rows(own)
        # Looked up in each call: masks that come of the sampling itself are others from step to step.
        shares = [None if place is None else self._fitted(self.whole.rows[place], *rows.shape[:2]) for place in self.places]
        if any(share is None and place is not None for share, place in zip(shares, self.places, strict=True)):
            return output
        for differ, at in self.kinds.items():
            x = rows.float() if self.reads else rows
            if differ and self.reads:
                x = x - _rows(args[self.at] if args else next(iter(kwargs.values()))).float()
            picked = [[values[one] for one in at] for values in (self.steers, self.strengths, self.scales, shares)]
            delta = together(x, *picked).to(own.dtype)
            if own.ndim == 4:
                delta = delta[:, None, None] if delta.ndim == 1 else delta.mT.unflatten(-1, own.shape[2:])
            own = own + delta
        return (*output[: self.at], own, *output[self.at + 1 :]) if isinstance(output, tuple) else own

    def _fitted(self, share: torch.Tensor, batch: int, tokens: int) -> torch.Tensor | None:
        """Shares for a block's rows: those past ours belong to nobody; of fewer rows than ours nobody has anything."""
        if share.shape[-1] > tokens:
            if self.whole is not None:
                self.whole.missed = True
            return None
        share = torch.nn.functional.pad(share.to(self.device), (0, tokens - share.shape[-1]))
        if 1 < len(share) < batch:
            share = torch.nn.functional.pad(share, (0, 0, 0, batch - len(share)))
        return share[:batch]


def _rows(output: torch.Tensor) -> torch.Tensor:
    """(B, T, d)"""
    return output.flatten(2).mT if output.ndim == 4 else output


class SteerEffect(Effect):
    """Features steered with at one strength, times a schedule where there is one, within a window, on the rows of one or both sides."""

    text = "none"

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Steered],
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        schedule: Schedule | None = None,
        mask: torch.Tensor | None = None,
        side: str = COND,
    ):
        super().__init__(name, parts)
        self.strength, self.course = strength, (start_percent, end_percent, schedule)
        self.mapped = any(len(part.features.sigmas) > 1 for part in parts.values())
        negative = NEGATIVE[side]
        # A guider's own entries have no name: they count as what is wanted, for a steer that does not act is worse.
        self.place = Place(everywhere if mask is None else mask, factors=lambda name: negative if "negative" in name else 1.0)

    def strengths(self, model_sampling) -> Callable[[Call], Strength]:
        """With the noise level, where the features' tables depend on it: reading it waits for the GPU."""
        factor = course(model_sampling, *self.course)

        def strength(call: Call) -> Strength:
            now = self.strength * factor(call)
            return (now, call.sigma if self.mapped else 0.0) if now != 0.0 else 0.0

        return strength


def everywhere(height: int, width: int) -> torch.Tensor:
    return torch.ones(height, width)


def steer_model(
    patcher, features: Features, how: Callable[[Features], Steer], strength: float, *course, mask=None, side: str = COND
) -> SteerEffect:
    """The effect of features on a MODEL; `how` to steer with those of each site. Raises FeaturesError and UnsupportedFamily."""
    parts = {fitting(patcher.model, one): Steered(one, how(one)) for one in features.each()}
    if len(parts) <= len(features.more):
        raise FeaturesError(f"'{features.name}' names one site twice. Take one of the two out.")
    called = f"{next(iter(parts.values())).steer.mode} '{features.name}' at {strength:g}"
    effect = SteerEffect(called, parts, strength, *course, mask=mask, side=side)
    effect.text = which_words(patcher.model, parts)
    if effect.text != "none" and mask is not None:
        raise FeaturesError(
            f"'{features.name}' lie at the prompt's rows ({features.site}), which all of the picture reads: a mask has no meaning there. "
            "Disconnect it, or take a site of the picture's rows."
        )
    return effect
