"""Other ways to train a lab slider, for the slider benchmark: each is the slider's own workflow with one thing changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..host import slider_training, training
from ..lab import sliders
from ..nodes import slider_training as node

PAIRS = {
    "size": "small to large",
    "hue": "green to blue",
    "fill": "outline to solid",
    "background": "dark to light",
    "neon": "flat to neon",
}


class ReleasedWays(slider_training.Ways):
    """As the released trainer walks: for every step of the optimiser a new noise, denoised with the slider on to a random step of the
    path; only its last point is trained at.
    """

    def __init__(self, trainee, entries: int, batch: int, size: tuple[int, int], seed: int, *, walked: Callable):
        super().__init__(trainee, entries, batch, size, seed)
        self.walked, self.generator = walked, torch.Generator().manual_seed(seed)
        self.walk(None, 0)

    def walk(self, prediction, step: int) -> None:
        """Begin anew, and walk all the way. What the last point predicted is thrown away."""
        end = int(torch.randint(slider_training.PATH, (), generator=self.generator))
        self.entry = torch.randint(self.entries, (len(self.at),), generator=self.generator)
        self.x = torch.cat([self._noise(self.generator) for _ in self.at])
        for at in range(end):
            self.at = torch.full_like(self.at, at)
            self.x = self.x + (self.sigmas[at + 1] - self.sigmas[at]) * self.walked(self)
        self.at = torch.full_like(self.at, end)


class ReleasedObjective(slider_training.TextObjective):
    """The published objective on `ReleasedWays`, which walk by themselves."""

    WALKS = False

    def __init__(self, trainee, entries, empty, ways, *, eta, strengths=(1.0,)):
        super().__init__(trainee, entries, empty, ways, eta=eta, strengths=strengths)
        self.ways = ReleasedWays(trainee, len(entries), len(ways.x), ways.size, ways.seed, walked=self.walked)

    def done(self, step: int) -> None:
        self.ways.walk(None, step)

    @torch.no_grad()
    def walked(self, ways) -> torch.Tensor:
        """The slider's own guided prediction where the ways are."""
        texts = [self.entries[index].target for index in ways.entry.tolist()]
        both = ways.x.repeat(2, 1, 1, 1)
        given = slider_training.condition(self.trainee, [*texts, *[self.empty] * len(texts)], both)
        told, plain = self.trainee.predict(both, ways.sigma.repeat(2), given, 1.0).chunk(2)
        return plain + slider_training.GUIDANCE * (told - plain)


def trained(graph: dict, **changes: Any) -> tuple[dict[str, torch.Tensor], float]:
    """The slider of a workflow with changes to its training node, and the seconds of its training loop alone."""
    sliders.settings(graph).update(changes, previews=0)
    name = next(one["class_type"] for one in graph.values() if one["class_type"] in sliders.TRAINERS)
    took, run = [], training.Loop.run

    def timed(loop, *args):
        began = time.monotonic()
        try:
            return run(loop, *args)
        finally:
            took.append(time.monotonic() - began)

    training.Loop.run = timed
    try:
        with sliders.scratch_folders():
            return sliders.execute(graph, name)[0], took[0]
    finally:
        training.Loop.run = run


def released(model: str, slider: str, **changes: Any) -> tuple[dict[str, torch.Tensor], float]:
    """By the published loop."""
    ours, node.TextObjective = node.TextObjective, ReleasedObjective
    try:
        return trained(sliders.workflow(model, slider), objective="published", **changes)
    finally:
        node.TextObjective = ours


def full_rank(model: str, slider: str) -> tuple[dict[str, torch.Tensor], float]:
    """Matrices of rank 256, or a layer's smaller side, in the slider's place: nearly a fine-tune of its layers. A lower rate, for there
    is more to move.
    """
    rate = sliders.settings(sliders.workflow(model, slider))["learning_rate"]
    return trained(sliders.workflow(model, slider), rank=256, alpha=256.0, learning_rate=rate / 10)


def from_pairs(model: str, slider: str) -> tuple[dict[str, torch.Tensor], float]:
    """From drawn pairs, by the image slider's workflow."""
    graph = sliders.workflow(model, "neon")
    graph["2"]["inputs"]["change"] = PAIRS[slider]
    return trained(graph)


WAYS = {"published loop": released, "full rank": full_rank, "image pairs": from_pairs}
