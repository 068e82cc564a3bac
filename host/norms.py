"""Regions that group normalisation, which brings all of a picture to one scale, brings to a scale of their own. UNets have it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.norms import normalised
from ..ops.shares import Shares
from .dispatcher import Call, Effect
from .places import Place
from .window import course


class NormPart:
    """A place's part in one group normalisation."""

    @classmethod
    def join(cls, parts: Sequence[NormPart], module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> NormAct:
        return NormAct(module, device)


class Setting(NamedTuple):
    own: torch.Tensor
    places: list[int]
    shares: Shares


class NormAct:
    """Stands around a group normalisation."""

    called = False

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.module, self.device = module, device
        self.set: Setting

    def setting(self, strengths: Sequence[float], places: Sequence[int], shares: Shares) -> Setting:
        return Setting(torch.tensor(strengths, device=self.device), list(places), shares)

    def use(self, setting: Setting) -> None:
        self.set = setting

    def run(self, inner: Callable, x: torch.Tensor, *args, **kwargs) -> Any:
        self.called = True
        own, places, shares = self.set
        # Looked up in each call: masks that come of the sampling itself are others from step to step.
        rows = shares.rows[places]
        if x.ndim != 4 or rows.shape[2] != x.shape[2] * x.shape[3] or rows.shape[1] not in (1, len(x)):
            shares.missed = True
            return inner(x, *args, **kwargs)
        module = self.module
        # Weight and bias are asked of the module itself, which knows where they lie and what is patched onto them: of mean 0 and
        # variance 1, it gives back what it is given but for eps.
        ones = x.new_ones(1, x.shape[1], 1, 1)
        more, less = inner(torch.cat([ones, -ones], 3), *args, **kwargs).float().split(1, 3)
        weight, bias = (more - less) * (0.5 * (1 + module.eps) ** 0.5), (more + less) / 2
        return (normalised(x, rows, own, module.num_groups, module.eps) * weight + bias).to(x.dtype)


class NormEffect(Effect):
    """A place brought to a scale of its own: by `amount`, from 0 to 1, in a window of sampling."""

    text = "none"

    def __init__(self, name: str, model, place: Place, amount: float, start: float = 0.0, end: float = 1.0):
        super().__init__(name, {norm: NormPart() for norm in norms_of(model)})
        self.place, self.amount, self.start, self.end = place, amount, start, end

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        factor = course(model_sampling, self.start, self.end)
        return lambda call: self.amount * factor(call)


def norms_of(model) -> list[str]:
    """The group normalisations in a host model's network, by their names from the model."""
    found = model.diffusion_model.named_modules()
    return [f"diffusion_model.{name}" for name, module in found if isinstance(module, torch.nn.GroupNorm)]
