"""What only a run knows, kept where the sampled latent can find it again.

A sampler node hands on a latent and nothing else, and the host may serve that latent from its cache prompts later. So the record of a run
is kept under the content of the latent that came out of it: a digest of its values in float16, which no cast of the host's on the way
changes.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

KEPT = 64
UNHEARD = "another extension replaced the model's apply_model during this run, so its effects could not act. Switch that extension off."
_records: OrderedDict[str, RunRecord] = OrderedDict()
_lock = threading.Lock()


class EffectRecord(NamedTuple):
    """What one effect did: in how many steps and model calls, and between which sigmas (None if it never acted)."""

    name: str
    steps: int
    calls: int
    sigmas: tuple[float, float] | None


class RunRecord(NamedTuple):
    """One sampling: `steps` of its schedule, `calls` of models with effects, their `sigmas` (high, low), and the schedule's `end`."""

    steps: int
    calls: int
    sigmas: tuple[float, float] | None
    end: float
    effects: tuple[EffectRecord, ...]

    def unheard(self) -> bool:
        """Whether the model was evaluated without asking us."""
        return self.steps > 0 and self.calls == 0

    def describe(self) -> str:
        if self.unheard():
            return f"{self.steps} steps; {UNHEARD}"
        span = f", sigma {self.sigmas[0]:.4g} to {self.sigmas[1]:.4g}" if self.sigmas else ""
        lines = [f"{self.steps} steps, {self.calls} model calls, none of them added by Concept Nodes{span}."]
        if self.end > 0:
            lines.append(f"Stopped at sigma {self.end:.4g}: the latent still holds noise.")
        for effect in self.effects:
            if effect.sigmas is None:
                lines.append(f"{effect.name}: never acted, no step lay in its window.")
            else:
                lines.append(
                    f"{effect.name}: acted in {effect.steps} of {self.steps} steps ({effect.calls} calls), "
                    f"sigma {effect.sigmas[0]:.4g} to {effect.sigmas[1]:.4g}."
                )
        return "\n".join(lines)


def make_record(schedule: Sequence[float], sigmas: Sequence[float], acted: Sequence[tuple[str, Sequence[float]]]) -> RunRecord:
    """The record of a run: its schedule of sigmas, those of all model calls, and by effect those of the calls it acted in."""
    effects = tuple(EffectRecord(name, _steps(schedule, active), len(active), _span(active)) for name, active in acted)
    return RunRecord(len(schedule) - 1, len(sigmas), _span(sigmas), schedule[-1], effects)


def _span(sigmas: Sequence[float]) -> tuple[float, float] | None:
    return (max(sigmas), min(sigmas)) if sigmas else None


def _steps(schedule: Sequence[float], sigmas: Sequence[float]) -> int:
    """How many steps the calls lie in. A step reaches from its own sigma down to the next one's."""
    starts = sorted(-sigma for sigma in schedule[:-1])
    return len({max(0, bisect_right(starts, -sigma) - 1) for sigma in sigmas})


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
