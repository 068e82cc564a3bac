"""Sliders trained from prompts or from pairs of pictures: the objectives of Concept Sliders (Gandikota et al., arXiv 2311.12092) and kin.

From prompts (`TextObjective`).
For an entry (target, neutral, more, less) and a strength s on the adapters,

    L = MSE( e_s(x_t, target), stopgrad[ e_0(x_t, neutral) + s eta (e_0(x_t, more) - e_0(x_t, less)) ] )

    published   neutral = target, s = +1 only
    both poles  the same at s = +1 and s = -1, each by itself
    erase       (ESD, Gandikota et al., arXiv 2303.07345) neutral = less = the empty prompt, more = target, eta negative
    ablate      (Kumari et al., arXiv 2303.13516) neutral = the anchor, eta = 0

    range       s of its own for every way, anywhere from -2 to 2; the goal is the pole itself, and it is what guidance g = 3 draws that
                is led there, not the prompt's half of it alone. With G_s(c) = e_s(x_t, "") + g (e_s(x_t, c) - e_s(x_t, "")),
                MSE( G_s(target), stopgrad[ G_0(neutral) + |s| eta (G_0(pole) - G_0(neutral)) ] ), pole = more if s > 0 else less

A difference of prompts that is added whole leads past them, and strengths that were not trained lead on as they may: at 2 the pictures are
often none that the model would draw. With `range` and eta 1/2, strengths 2 and -2 are where the prompts `more` and `less` lead. And layers
that read no words can hardly tell a prompt from none: what a slider does to both alike, guidance does not multiply, so that a goal for the
prompt alone is missed by a factor of g. A goal for what is drawn is not.

x_t lies on the slider's own way through sampling at guidance 3. The released trainer draws a new way from noise for every step of the
optimiser, and throws all of it but its last point away. Here a batch of ways is walked on by one step of sampling for each step of the
optimiser, and every point of them is trained at: the same points, for about a third of the model's evaluations.

From pairs (`ImageObjective`): the model's own loss on both pictures of a pair, at opposite strengths and with the same noise n,

    published   L = MSE( e_+1(x_t(after, n), prompt), n ) + MSE( e_-1(x_t(before, n), prompt), n )

What the pictures of a pair have in common pulls both ways and leaves no trace; what differs is learnt. But n is mostly noise to learn
from. The way between the pictures is known, so it can be the goal itself, as the text objective has it between prompts:

    difference  L = w MSE( e_+1(x_t(before, n)), stopgrad[ e_0(x_t(before, n)) + eta (before - after) / sigma ] )
                  + w MSE( e_-1(x_t(after, n)), stopgrad[ e_0(x_t(after, n)) + eta (after - before) / sigma ] ),
    w = sigma^2 / (1 + sigma^2)

which moves the picture that the model sees in x_t by a part of what is between the two (w: where the noise is low, the picture counts and
not the noise). The released trainer scales all pictures to 256 or 512 pixels; here they keep their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import comfy.samplers
import numpy as np
import torch
import torch.nn.functional as F
from latent_preview import Latent2RGBPreviewer

from .sheet import lay_out
from .training import Memory, Objective, Trainee

GUIDANCE = 3.0
END = 2.0  # strengths up to which `range` trains, both ways
PATH = 20  # steps of sampling in a way
PREVIEW_PATH = 8
PREVIEW_SIDE = 192  # of each picture, in pixels


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


def condition(trainee: Trainee, texts: Sequence[Text], like: torch.Tensor) -> dict:
    """The condition of texts, one for each of the latents `like`."""
    pooled = None if texts[0].pooled is None else torch.cat([text.pooled for text in texts])
    return trainee.condition(torch.cat([text.context for text in texts]), pooled, like)


class TextObjective(Objective):
    """From prompts."""

    WALKS = True  # by its own predictions

    def __init__(
        self, trainee: Trainee, entries: Sequence[Entry], empty: Text, ways: Ways, *, eta: float, strengths: Sequence[float] = (1.0,)
    ):
        self.trainee, self.entries, self.empty, self.ways, self.eta, self.strengths = trainee, entries, empty, ways, eta, tuple(strengths)
        self._next: tuple[torch.Tensor, int] | None = None
        self.parts = ("neutral", "more", "less") if eta else ("neutral",)

    def losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """One for each strength that is trained, at the ways' points; the first also walks the ways on."""
        ways, trainee = self.ways, self.trainee
        x, sigma = ways.x, ways.sigma
        chosen = [self.entries[index] for index in ways.entry.tolist()]
        with torch.no_grad():
            texts, many = [getattr(entry, part) for part in self.parts for entry in chosen], len(self.parts)
            like = x.repeat(many, 1, 1, 1)
            told = trainee.predict(like, sigma.repeat(many), condition(trainee, texts, like), 0.0).chunk(many)
            neutral, way = told[0], told[1] - told[2] if self.eta else 0.0
        target = condition(trainee, [entry.target for entry in chosen], x)

        def loss(strength: float) -> torch.Tensor:
            walks = self.WALKS and strength == self.strengths[0]
            if walks:  # before there is anything to keep for a gradient
                with torch.no_grad():
                    plain = trainee.predict(x, sigma, condition(trainee, [self.empty] * len(x), x), strength)
            drawn = trainee.predict(x, sigma, target, strength)
            if walks:
                self._next = plain + GUIDANCE * (drawn.detach() - plain), step
            return F.mse_loss(drawn, neutral + strength * self.eta * way)

        return [lambda strength=strength: loss(strength) for strength in self.strengths]

    def done(self, step: int) -> None:
        """Walk on."""
        if self._next is not None:
            self.ways.walk(*self._next)
            self._next = None

    def state(self) -> dict[str, torch.Tensor]:
        return self.ways.state()

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.ways.restore(state)

    def memory(self) -> Memory:
        x = self.ways.x
        given = condition(self.trainee, [self.empty] * len(x), x)
        return self.trainee.memory(x, self.ways.sigma, given, len(self.parts), len(self.strengths))


class RangeObjective(TextObjective):
    """From prompts, every strength from -END to END: each way has one of its own, and its sign turns when the way begins anew."""

    def __init__(self, trainee: Trainee, entries: Sequence[Entry], empty: Text, ways: Ways, *, eta: float):
        super().__init__(trainee, entries, empty, ways, eta=eta)
        signs = torch.tensor([1.0, -1.0]).repeat(len(ways.x))[: len(ways.x)]
        self.strength = signs * END * torch.rand(len(ways.x), generator=torch.Generator().manual_seed(ways.seed))

    def losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """One, of all ways with their prompts and without."""
        ways, trainee, s = self.ways, self.trainee, self.strength.to(self.ways.x.device)
        x, sigma = ways.x, ways.sigma
        chosen, empty = [self.entries[index] for index in ways.entry.tolist()], [self.empty] * len(ways.x)
        poles = [entry.more if up else entry.less for entry, up in zip(chosen, (s > 0).tolist(), strict=True)]
        with torch.no_grad():
            texts, like = [*(entry.neutral for entry in chosen), *poles, *empty], x.repeat(3, 1, 1, 1)
            neutral, pole, still = trainee.predict(like, sigma.repeat(3), condition(trainee, texts, like), 0.0).chunk(3)
            goal = still + GUIDANCE * (neutral + self.eta * s.abs()[:, None, None, None] * (pole - neutral) - still)

        def loss() -> torch.Tensor:
            both = x.repeat(2, 1, 1, 1)
            given = condition(trainee, [*(entry.target for entry in chosen), *empty], both)
            told, plain = trainee.predict(both, sigma.repeat(2), given, s.repeat(2)).chunk(2)
            drawn = plain + GUIDANCE * (told - plain)
            self._next = drawn.detach(), step
            return F.mse_loss(drawn, goal)

        return [loss]

    def done(self, step: int) -> None:
        """Walk on; a way that begins anew has another strength."""
        super().done(step)
        generator = torch.Generator().manual_seed(((self.ways.seed + 1) * 1_000_003 + step) % 2**63)
        new = END * torch.rand(len(self.strength), generator=generator)
        self.strength = torch.where(self.ways.at == 0, torch.where(self.strength > 0, -new, new), self.strength)

    def state(self) -> dict[str, torch.Tensor]:
        return super().state() | {"strength": self.strength}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        super().restore(state)
        self.strength = state["strength"]

    def memory(self) -> Memory:
        x = self.ways.x.repeat(2, 1, 1, 1)
        given = condition(self.trainee, [self.empty] * len(x), x)
        return self.trainee.memory(x, self.ways.sigma.repeat(2), given, 2, 1)


class ImageObjective(Objective):
    """From pairs of latents (before, after), each (channels, height, width). Each step draws `batch` pairs of one size. eta: how much of
    the difference strength 1 is; None trains as published.
    """

    def __init__(
        self,
        trainee: Trainee,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        prompt: Text,
        *,
        batch: int,
        seed: int,
        eta: float | None,
    ):
        self.trainee, self.prompt, self.batch, self.seed, self.eta = trainee, prompt, batch, seed, eta
        self.pairs = [tuple(trainee.model.process_latent_in(latent).to(trainee.device) for latent in pair) for pair in pairs]

    def losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """For +1 and for -1."""
        trainee = self.trainee
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step + 1) % 2**63)
        first = int(torch.randint(len(self.pairs), (), generator=generator))
        alike = [pair for pair in self.pairs if pair[0].shape == self.pairs[first][0].shape]
        chosen = [alike[index] for index in torch.randint(len(alike), (self.batch,), generator=generator).tolist()]
        # Uniform over the steps that the model was trained at; at 0 the host answers with no noise level but a sign.
        shares = torch.rand(self.batch, generator=generator).clamp(1e-3, 0.999)
        sigma = torch.tensor([trainee.sampling.percent_to_sigma(share) for share in shares.tolist()]).to(trainee.device)
        noise = trainee.noise(self.batch, *chosen[0][0].shape[-2:], generator)
        given = condition(trainee, [self.prompt] * self.batch, noise)
        before, after = (torch.stack([pair[side] for pair in chosen]) for side in (0, 1))
        wide = sigma[:, None, None, None]

        def published(clean: torch.Tensor, strength: float) -> torch.Tensor:
            x = trainee.sampling.noise_scaling(sigma, noise.clone(), clean)
            return F.mse_loss(trainee.predict(x, sigma, given, strength), (x - clean) / wide)

        def difference(clean: torch.Tensor, other: torch.Tensor, strength: float) -> torch.Tensor:
            x = trainee.sampling.noise_scaling(sigma, noise.clone(), clean)
            with torch.no_grad():
                goal = trainee.predict(x, sigma, given, 0.0) + self.eta * (clean - other) / wide
            return (wide**2 / (1 + wide**2) * (trainee.predict(x, sigma, given, strength) - goal) ** 2).mean()

        if self.eta is not None:
            return [lambda: difference(before, after, 1.0), lambda: difference(after, before, -1.0)]
        return [lambda: published(after, 1.0), lambda: published(before, -1.0)]

    def memory(self) -> Memory:
        largest = max((pair[0] for pair in self.pairs), key=torch.Tensor.numel)
        x = largest.expand(self.batch, -1, -1, -1).clone()
        sigma = torch.full((self.batch,), float(self.trainee.sampling.percent_to_sigma(0.5)), device=x.device)
        given = condition(self.trainee, [self.prompt] * self.batch, x)
        return self.trainee.memory(x, sigma, given, int(self.eta is not None), 2)


def decoder(trainee: Trainee, vae) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Latents (1, channels, height, width) of the model's scale -> a picture (1, h, w, 3) in 0..1: by the autoencoder, or in the latent's
    colours by the host's table; None where the format has none.
    """
    if vae is not None:

        def decode(latent: torch.Tensor) -> torch.Tensor:
            picture = vae.decode(trainee.model.process_latent_out(latent))
            trainee.load()  # the autoencoder may have pushed the model out
            return picture.float().clamp(0, 1).cpu()

        return decode
    latent_format = trainee.model.latent_format
    if latent_format.latent_rgb_factors is None:
        return None
    colours = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias, latent_format.latent_rgb_factors_reshape
    previewer = Latent2RGBPreviewer(*colours)

    def rough(latent: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(previewer.decode_latent_to_preview(latent)).astype(np.float32) / 255)[None]

    return rough


class Preview:
    """Pictures of one prompt and noise at some strengths, as the training has it so far.

    decode  as `decoder` makes it
    """

    def __init__(
        self,
        trainee: Trainee,
        prompt: Text,
        empty: Text,
        size: tuple[int, int],
        decode: Callable,
        seed: int,
        strengths: Sequence[float] = (-1.0, 0.0, 1.0),
    ):
        self.trainee, self.texts, self.decode, self.strengths = trainee, (prompt, empty), decode, tuple(strengths)
        self.sigmas = comfy.samplers.calculate_sigmas(trainee.sampling, "normal", PREVIEW_PATH).to(trainee.device)
        noise = trainee.noise(1, *size, torch.Generator().manual_seed(seed))
        self.start = trainee.sampling.noise_scaling(self.sigmas[0], noise, torch.zeros_like(noise), True)

    def page(self, title: str) -> torch.Tensor:
        """(1, height, width, 3) in 0..1."""
        with torch.no_grad():
            pictures = [self.decode(self._sampled(strength)) for strength in self.strengths]
        return lay_out(pictures, [f"{strength:+g}" if strength else "0" for strength in self.strengths], title, PREVIEW_SIDE, 0).page

    def _sampled(self, strength: float) -> torch.Tensor:
        """Euler steps at the guidance that the ways are walked with."""
        x = self.start
        for sigma, later in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            both = x.repeat(2, 1, 1, 1)
            told, plain = self.trainee.predict(both, sigma.expand(2), condition(self.trainee, self.texts, both), strength).chunk(2)
            x = x + (later - sigma) * (plain + GUIDANCE * (told - plain))
        return x
