"""What only a run knows, kept where the sampled latent can find it again.

A sampler node hands on a latent and nothing else, and the host may serve that latent from its cache prompts later. So the record of a run
is kept under the content of the latent that came out of it: a digest of its values in float16, which no cast of the host's on the way
changes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

KEPT = 64
UNHEARD = "another extension replaced the model's apply_model during this run, so its effects could not act. Switch that extension off."
_records: OrderedDict[str, RunRecord] = OrderedDict()
_lock = threading.Lock()


class Evaluation(NamedTuple):
    """One model call: its noise level, how many steps the sampler had ended by then, and the effects that acted in it."""

    sigma: float
    step: int
    effects: tuple


class EffectRecord(NamedTuple):
    """What one effect did: in how many steps (None if they cannot be told from the calls) and model calls, and between which sigmas
    (None if it never acted)."""

    name: str
    steps: int | None
    calls: int
    sigmas: tuple[float, float] | None


class RunRecord(NamedTuple):
    """One sampling: `steps` of its schedule, `calls` of models with effects, how many of them the effects `added`, their `sigmas`
    (high, low), the schedule's `end`, and `notes` on what did not go as asked."""

    steps: int
    calls: int
    added: int
    sigmas: tuple[float, float] | None
    end: float
    effects: tuple[EffectRecord, ...]
    notes: tuple[str, ...] = ()

    def unheard(self) -> bool:
        """Whether the model was evaluated without asking us."""
        return self.steps > 0 and self.calls == 0

    def describe(self) -> str:
        if self.unheard():
            return f"{self.steps} steps; {UNHEARD}"
        span = f", {_between(self.sigmas)}" if self.sigmas else ""
        lines = [f"{self.steps} steps, {self.calls} model calls, {self.added or 'none'} of them added by Concept Nodes{span}."]
        if self.end > 0:
            lines.append(f"Stopped at sigma {self.end:.4g}: the latent still holds noise.")
        return "\n".join([*lines, *(f"{effect.name}: {self._told(effect)}." for effect in self.effects), *self.notes])

    def _told(self, effect: EffectRecord) -> str:
        if effect.sigmas is None:
            return "never acted: no step lay in its window, or it found nothing to do"
        if effect.steps is None:
            return f"acted in {effect.calls} of {self.calls} model calls, {_between(effect.sigmas)}"
        return f"acted in {effect.steps} of {self.steps} steps ({effect.calls} calls), {_between(effect.sigmas)}"


def make_record(
    schedule: Sequence[float], ended: Sequence[int], effects: Iterable, calls: Sequence[Evaluation], notes: tuple[str, ...] = ()
) -> RunRecord:
    """The record of a run: its schedule of sigmas, the steps as the sampler ended them, all effects in it and all its model calls."""
    steps = len(schedule) - 1
    # Some samplers (dpm_adaptive, dpm_fast, restart) take steps of their own instead of the schedule's.
    own = list(ended) != list(range(steps))

    def told(effect) -> EffectRecord:
        acted = [call for call in calls if effect in call.effects]
        # What is evaluated after the last step's end (sa_solver_pece) belongs to that step.
        in_steps = None if own else len({min(call.step, steps - 1) for call in acted})
        return EffectRecord(effect.name, in_steps, len(acted), _span(acted))

    added = sum(effect.added for call in calls for effect in call.effects)
    return RunRecord(steps, len(calls), added, _span(calls), schedule[-1], tuple(told(effect) for effect in effects), notes)


def _span(calls: Sequence[Evaluation]) -> tuple[float, float] | None:
    levels = [call.sigma for call in calls]
    return (max(levels), min(levels)) if levels else None


def _between(sigmas: tuple[float, float]) -> str:
    return f"sigma {sigmas[0]:.4g} to {sigmas[1]:.4g}"


def digest(samples) -> str:
    """A latent's content as text: a tensor of any shape, or the host's nested tensor in the packed form that its samplers work on."""
    if getattr(samples, "is_nested", False):
        samples = torch.cat([part.reshape(part.shape[0], 1, -1) for part in samples.unbind()], dim=-1)
    values = samples.detach().to("cpu", torch.float16).contiguous()
    return hashlib.blake2b(values.numpy().tobytes() + repr(tuple(values.shape)).encode(), digest_size=16).hexdigest()


def remember(record: RunRecord, *latents) -> None:
    """Keep `record` under each of the latents; the oldest records go."""
    with _lock:
        for latent in latents:
            key = digest(latent)
            _records[key] = record
            _records.move_to_end(key)
        while len(_records) > 2 * KEPT:
            _records.popitem(last=False)


def find(latent) -> RunRecord | None:
    """The record of the run that this latent came out of, if it was in this session and not too long ago."""
    with _lock:
        return _records.get(digest(latent))
