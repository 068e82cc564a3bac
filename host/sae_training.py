"""A sparse autoencoder trained on vectors as they come: from a source into a ring, from the ring into steps.

What it takes in memory is known beforehand (`memory`), a cancel leaves a checkpoint to go on from, and numbers that run away end in the
last good state. The vectors that are measured on at the end are never trained on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ops.sae import SAE
from ..ops.sae_training import JUMPRELU, MATRYOSHKA, WHITEN, Measured, Ring, Settings, Step, Trainer, measure
from .training import GOOD_EVERY, TrainingError

SAMPLE = 32_768  # vectors that mean, scale and first bias are taken from
HELD_OUT = 4096  # vectors that are measured on, at most a sixteenth of the ring


class Outcome(NamedTuple):
    """What was learnt, how well it does on vectors that it was not trained on, its steps, and what to tell."""

    sae: SAE
    measured: Measured
    steps: list[Step]
    told: list[str]


class Memory(NamedTuple):
    """Bytes: of weights, gradients and Adam's two averages; of one step at its fullest; of the ring, in main memory."""

    weights: int
    step: int
    ring: int


def memory(settings: Settings, d: int, ring: int, vector_bytes: int = 4) -> Memory:
    """What a training of vectors of d numbers takes, with a ring of so many, of `vector_bytes` for each number.

    weights  16 (2 n d + n + d): float32 four times; 8 d^2 more where vectors are whitened
    step     4 (B n c + B d e): what is of the codes' size c times, of the vectors' size e times, as counted in a step with dead latents
    """
    n, batch = settings.n, settings.batch
    codes = 7.0 if settings.kind == JUMPRELU else 4.0
    vectors = 8.0 + (2.0 * (len(settings.sizes()) - 1) if settings.kind == MATRYOSHKA else 0.0)
    thresholds = n if settings.kind == JUMPRELU else 0
    weights = 16 * (2 * n * d + n + d + thresholds) + (8 * d * d if settings.normalise == WHITEN else 0)
    return Memory(weights, int(4 * batch * (n * codes + d * vectors)), ring * d * vector_bytes)


def train(
    source: Iterator[torch.Tensor],
    settings: Settings,
    *,
    ring: int,
    identity: str = "",
    file: Path | None = None,
    device: torch.device | str | None = None,
    each: Callable[[int, Step], None] = lambda step, seen: None,
    broken_off: Callable[[SAE, list[Step]], None] = lambda sae, steps: None,
) -> Outcome:
    """Train to the last step on vectors from `source`, in batches (N, d) of any N; where they end, those in memory come again. `each` is
    called after every step and may raise to cancel; `broken_off` then takes what there is, if a step was done. identity: what the training
    is of; a checkpoint in `file` of another one is not resumed.

    A resumed training goes on with the same weights on new vectors of the source: the ring is not kept, being gigabytes. Raises
    TrainingError where the source has too few vectors, ValueError for settings and vectors that cannot be worked with.
    """
    device = comfy.model_management.get_torch_device() if device is None else device
    with torch.inference_mode(False):
        flow = _Flow(source, ring, settings.seed)
        held_out = flow.held_out()
        trainer = Trainer(settings, flow.sample().to(device))
        steps, told = _resume(trainer, file, identity), []
        if steps:
            told.append(f"Resumed at step {len(steps)}.")
        good = (len(steps), trainer.state())
        try:
            for number in range(len(steps), settings.steps):
                comfy.model_management.throw_exception_if_processing_interrupted()
                seen = trainer.step(flow.batch(settings.batch))
                if not seen.finite:
                    trainer.restore(good[1])
                    told.append(
                        f"Stopped at step {number + 1} of {settings.steps}: the loss was {seen.loss}. What is kept is the state after step "
                        f"{good[0]}. Train again with a lower learning rate."
                    )
                    break
                steps.append(seen)
                if len(steps) % GOOD_EVERY == 0:
                    good = (len(steps), trainer.state())
                each(number, seen)
        except BaseException:
            _save(trainer, steps, file, identity)
            if steps:
                broken_off(trainer.sae(), steps)
            raise
        if flow.rounds:
            told.append(f"The source ended after {flow.seen} vectors; those in memory were trained on {flow.rounds + 1} times.")
        if file is not None:
            file.unlink(missing_ok=True)
        sae = trainer.sae()
        return Outcome(sae, measure(sae, [held_out]), steps, told)


class _Flow:
    """Vectors from a source through a ring. seen: how many came; rounds: how often those in memory were begun again."""

    def __init__(self, source: Iterator[torch.Tensor], size: int, seed: int):
        self.source, self.ring, self.seed = iter(source), Ring(size, seed), seed
        self.rest: torch.Tensor | None = None
        self.seen, self.rounds, self.ended = 0, 0, False

    def held_out(self) -> torch.Tensor:
        """The vectors that are kept from training: a sixteenth of the first that come, so that they are not of one picture. By lot: every
        sixteenth of prompts with four words each would be one word.
        """
        wanted = max(2, min(HELD_OUT, self.ring.size // 16))
        first, count = [], 0
        while count < 16 * wanted and (more := self._next()) is not None:
            first.append(more)
            count += len(more)
        if count < 32:
            raise TrainingError(f"The source has {count} vectors, which is too few. Collect from more prompts, steps or tokens.")
        first = torch.cat(first)
        chosen = torch.zeros(len(first), dtype=torch.bool)
        chosen[torch.randperm(len(first), generator=torch.Generator().manual_seed(self.seed))[: -(-len(first) // 16)]] = True
        self.source = itertools.chain([first[~chosen]], self.source)
        self.seen, self.ended = 0, False
        return first[chosen].float()

    def sample(self) -> torch.Tensor:
        """Vectors of a ring that is at least half full."""
        self._fill()
        return self.ring.kept[self.ring.unread[:SAMPLE]].float()

    def batch(self, count: int) -> torch.Tensor:
        self._fill()
        if not len(self.ring):
            self.ring.again()
            self.rounds += 1
        return self.ring.draw(count)

    def _fill(self) -> None:
        while not self.ring.mixed and not self.ended:
            if self.rest is None or not len(self.rest):
                self.rest = self._next()
                if self.rest is None:
                    return
                self.seen += len(self.rest)
            self.rest = self.rest[self.ring.put(self.rest) :]

    def _next(self) -> torch.Tensor | None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        more = next(self.source, None)
        self.ended = more is None
        return None if more is None else more.detach().cpu()


def _save(trainer: Trainer, steps: list[Step], file: Path | None, identity: str) -> None:
    if file is None or not steps:
        return
    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: tensor.contiguous() for name, tensor in trainer.state().items()}
        save_file(kept, part, metadata={"identity": identity, "steps": json.dumps(steps)})
        part.replace(file)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)  # a full disk loses the checkpoint, and must not hide why the training stopped


def _resume(trainer: Trainer, file: Path | None, identity: str) -> list[Step]:
    """The steps that were done; none where there is no checkpoint of this training."""
    if file is None or not file.exists():
        return []
    try:
        with safe_open(file, framework="pt") as held:
            told, names = held.metadata() or {}, held.keys()
            state = {name: held.get_tensor(name) for name in names}
    except (OSError, SafetensorError):  # cut short or not ours: begin anew
        return []
    now = trainer.state()
    fits = all(name in state and state[name].shape == tensor.shape for name, tensor in now.items())
    if told.get("identity") != identity or not fits:
        return []
    trainer.restore(state)
    return [Step(*step) for step in json.loads(told["steps"])]
