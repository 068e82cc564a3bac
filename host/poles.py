"""Sliding along the way between two prompts, with no training: on the prompt's own rows, or by two more evaluations of the model."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import comfy.samplers
import torch

from ..ops.schedule import Schedule
from .dispatcher import KEY, Call, Effect, under_way
from .window import course

POOLED = "pooled_output"


class PolesError(ValueError):
    """Prompts that cannot be slid between, and what to do about it."""


class Pole(NamedTuple):
    """A prompt as the host encodes it: its context (1, rows, width), and the pooled vector (1, width) where the family has one."""

    context: torch.Tensor
    pooled: torch.Tensor | None

    @classmethod
    def of(cls, name: str, conditioning: Sequence) -> Pole:
        """From CONDITIONING of one entry. Raises PolesError that calls it by its name."""
        if len(conditioning) != 1 or conditioning[0][0].shape[0] != 1:
            held = f"{len(conditioning)} prompts" if len(conditioning) != 1 else f"a batch of {conditioning[0][0].shape[0]}"
            raise PolesError(f"{name} holds {held}. Connect one prompt, straight from its encoder.")
        context, options = conditioning[0]
        return cls(context, options.get(POOLED))


class Poles(NamedTuple):
    """Two prompts, with more and with less of a concept."""

    more: Pole
    less: Pole

    def same(self) -> bool:
        """Whether nothing lies between the two."""
        return all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in zip(self.more, self.less, strict=True)
        )

    def slid(self, conditioning: Sequence, strength: float) -> list:
        """CONDITIONING with every entry moved by strength / 2 times the way from `less` to `more`, row by row and in its pooled vector: for
        a prompt half way between, 1 is `more` and -1 is `less`. Raises PolesError where the numbers of rows differ.
        """
        whole = [tuple(context.shape[1:]) for context in (self.more.context, self.less.context, *(context for context, _ in conditioning))]
        if len(set(whole)) > 1:
            more, less, *others = (f"{rows} x {width}" for rows, width in whole)
            raise PolesError(
                f"more has {more} numbers, less {less} and positive {' and '.join(dict.fromkeys(others))}: to go row by row they must be "
                "alike. Make the prompts about as long as one another with the same encoder, or choose the form 'guidance'."
            )
        way = self.more.context - self.less.context
        pooled = None if self.more.pooled is None or self.less.pooled is None else self.more.pooled - self.less.pooled
        moved = []
        for context, options in conditioning:
            if pooled is not None and options.get(POOLED) is not None:
                options = {**options, POOLED: options[POOLED] + strength / 2 * pooled.to(options[POOLED])}
            moved.append([context + strength / 2 * way.to(context), dict(options)])
        return moved


def windowed(before: Sequence, after: Sequence, start_percent: float, end_percent: float) -> list:
    """CONDITIONING `after` in a window of sampling and `before` outside of it; entries that have a window of their own keep within it."""
    parts = [(before, 0.0, start_percent), (after, start_percent, end_percent), (before, end_percent, 1.0)]
    made = []
    for entries, start, end in parts:
        for context, options in entries:
            first, last = max(start, options.get("start_percent", 0.0)), min(end, options.get("end_percent", 1.0))
            if first < last:
                made.append([context, {**options, "start_percent": first, "end_percent": last}])
    return made


class GuideEffect(Effect):
    """The model's prediction moved by strength times the difference that two prompts make to it (FreeSliders, arXiv 2511.00103):
    x0 + s (x0(more) - x0(less)), after the guider has done its own. As a denoised picture is linear in whatever a model predicts, it is the
    published sum of noise predictions, and that of velocities.
    """

    added = 1

    def __init__(self, name: str, poles: Poles, strength: float, start_percent: float, end_percent: float, schedule: Schedule | None):
        super().__init__(name, {})
        self.poles, self.strength, self.course = poles, strength, (start_percent, end_percent, schedule)
        own = uuid.uuid4().hex
        self.names = f"{KEY} {own} more", f"{KEY} {own} less"

    def hang(self, patcher) -> None:
        """What `attach` does not do: take part in what the guider makes of the model's predictions. Before what other nodes do to that, so
        that their order in the graph does not matter.
        """
        patcher.model_options["sampler_post_cfg_function"] = [self.guide, *patcher.model_options.get("sampler_post_cfg_function", ())]

    def conditions(self, conds: Mapping[str, Sequence[dict]]) -> dict[str, list[dict]]:
        """The positive condition's entries with the prompts in the place of its own: what else they hold (area, mask, ControlNet) stays."""
        like = conds.get("positive") or next(iter(conds.values()), ())
        return {
            name: [
                {**entry, "cross_attn": context, **({} if pooled is None else {POOLED: pooled}), "model_conds": {}, "uuid": uuid.uuid4()}
                for entry in like
            ]
            for name, (context, pooled) in zip(self.names, self.poles, strict=True)
        }

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        """It acts in the calls that it adds."""

        def strength(call: Call) -> float:
            this = under_way()
            names = {this.names.get(uuid) for uuid in call.options.get("uuids", ())} if this else set()
            return self.strength if names.intersection(self.names) else 0.0

        return strength

    def guide(self, args: Mapping[str, Any]) -> torch.Tensor:
        """sampler_post_cfg_function"""
        this, denoised, model = under_way(), args["denoised"], args["model"]
        conds = [this.guider.conds.get(name) for name in self.names] if this else []
        if not conds or None in conds:
            return denoised
        if self not in this.kept:
            this.kept[self] = course(model.model_sampling, *self.course)
        strength = self.strength * this.kept[self](Call(model, args["input"], args["sigma"], {}))
        if strength == 0.0:
            return denoised
        more, less = comfy.samplers.calc_cond_batch(model, conds, args["input"], args["sigma"], args["model_options"])
        return denoised + strength * (more - less)
