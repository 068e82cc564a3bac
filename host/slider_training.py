"""Sliders trained from prompts: the text objective of Concept Sliders (Gandikota et al., arXiv 2311.12092) and its kin.

For an entry (target, neutral, more, less) and a strength s on the adapters,

    L = MSE( e_s(x_t, target), stopgrad[ e_0(x_t, neutral) + s eta (e_0(x_t, more) - e_0(x_t, less)) ] )

    published   neutral = target, s = +1 only
    both poles  the same at s = +1 and s = -1, each by itself
    erase       (ESD, Gandikota et al., arXiv 2303.07345) neutral = less = the empty prompt, more = target, eta negative
    ablate      (Kumari et al., arXiv 2303.13516) neutral = the anchor, eta = 0

x_t lies on the slider's own way through sampling at guidance 3. The released trainer draws a new way from noise for every step of the
optimiser, and throws all of it but its last point away. Here a batch of ways is walked on by one step of sampling for each step of the
optimiser, and every point of them is trained at: the same points, for about a third of the model's evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import comfy.samplers
import torch
import torch.nn.functional as F

from .training import Trainee

GUIDANCE = 3.0
PATH = 20  # steps of sampling in a way


class Text(NamedTuple):
    """A prompt as its encoder gives it: (1, rows, width), and (1, width) where the family has a pooled vector."""

    context: torch.Tensor
    pooled: torch.Tensor | None


class Entry(NamedTuple):
    """One row of the objective."""

    target: Text
    neutral: Text
    more: Text
    less: Text


class Ways:
    """A batch of ways from noise to picture, each at its own noise level, and the entry that it is walked with."""

    def __init__(self, trainee: Trainee, entries: int, batch: int, size: tuple[int, int], seed: int):
        self.trainee, self.entries, self.size, self.seed = trainee, entries, size, seed
        self.sigmas = comfy.samplers.calculate_sigmas(trainee.sampling, "normal", PATH)[:-1].to(trainee.device)
        start = torch.Generator().manual_seed(seed)
        self.x = torch.cat([self._noise(start) for _ in range(batch)])
        self.at = torch.zeros(batch, dtype=torch.long)
        # The first ways end early, each at another point, so that later ones are spread over all noise levels.
        self.ends = torch.randint(1, PATH + 1, (batch,), generator=start)
        self.entry = torch.randint(entries, (batch,), generator=start)

    def _noise(self, generator: torch.Generator) -> torch.Tensor:
        noise = self.trainee.noise(1, *self.size, generator)
        return self.trainee.sampling.noise_scaling(self.sigmas[0], noise, torch.zeros_like(noise), True)

    @property
    def sigma(self) -> torch.Tensor:
        return self.sigmas[self.at.to(self.sigmas.device)]

    def walk(self, prediction: torch.Tensor, step: int) -> None:
        """One Euler step along predictions (batch, channels, height, width); ways that are at their end begin anew."""
        later = torch.cat([self.sigmas, self.sigmas.new_zeros(1)])[self.at.to(self.sigmas.device) + 1]
        x, at, ends, entry = (
            self.x + (later - self.sigma)[:, None, None, None] * prediction,
            self.at + 1,
            self.ends.clone(),
            self.entry.clone(),
        )
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step + 1) % 2**63)
        for way in (at >= ends).nonzero().flatten().tolist():
            x[way], at[way], ends[way] = self._noise(generator)[0], 0, PATH
            entry[way] = int(torch.randint(self.entries, (), generator=generator))
        self.x, self.at, self.ends, self.entry = x, at, ends, entry

    def state(self) -> dict[str, torch.Tensor]:
        return {"x": self.x.cpu(), "at": self.at, "ends": self.ends, "entry": self.entry}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.x = state["x"].to(self.trainee.device)
        self.at, self.ends, self.entry = state["at"], state["ends"], state["entry"]


class TextObjective:
    """The losses of a step, for `training.Loop`."""

    def __init__(
        self, trainee: Trainee, entries: Sequence[Entry], empty: Text, ways: Ways, *, eta: float, strengths: Sequence[float] = (1.0,)
    ):
        self.trainee, self.entries, self.empty, self.ways, self.eta, self.strengths = trainee, entries, empty, ways, eta, tuple(strengths)
        self._next: tuple[torch.Tensor, int] | None = None

    def losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """One loss for each strength that is trained, at the ways' points; the first also walks the ways on."""
        ways, trainee = self.ways, self.trainee
        x, sigma = ways.x, ways.sigma
        chosen = [self.entries[index] for index in ways.entry.tolist()]
        parts = ["neutral", "more", "less"] if self.eta else ["neutral"]
        with torch.no_grad():
            texts = [getattr(entry, part) for part in parts for entry in chosen]
            told = trainee.predict(*self._repeated(x, sigma, len(parts)), self._condition(texts, x), 0.0).chunk(len(parts))
            neutral, way = told[0], told[1] - told[2] if self.eta else 0.0
        target = self._condition([entry.target for entry in chosen], x)

        def loss(strength: float) -> torch.Tensor:
            drawn = trainee.predict(x, sigma, target, strength)
            if strength == self.strengths[0]:
                with torch.no_grad():
                    plain = trainee.predict(x, sigma, self._condition([self.empty] * len(x), x), strength)
                    self._next = plain + GUIDANCE * (drawn.detach() - plain), step
            return F.mse_loss(drawn, neutral + strength * self.eta * way)

        return [lambda strength=strength: loss(strength) for strength in self.strengths]

    def done(self, step: int) -> None:
        """After the step: walk on."""
        if self._next is not None:
            self.ways.walk(*self._next)
            self._next = None

    @staticmethod
    def _repeated(x: torch.Tensor, sigma: torch.Tensor, times: int) -> tuple[torch.Tensor, torch.Tensor]:
        return x.repeat(times, 1, 1, 1), sigma.repeat(times)

    def _condition(self, texts: Sequence[Text], x: torch.Tensor) -> dict:
        contexts = torch.cat([text.context for text in texts])
        pooled = None if texts[0].pooled is None else torch.cat([text.pooled for text in texts])
        like = x.repeat(len(texts) // len(x), 1, 1, 1)
        return self.trainee.condition(contexts, pooled, like)
