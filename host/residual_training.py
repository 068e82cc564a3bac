"""A subject taught from a few pictures: Personalized Residuals (Ham et al., CVPR 2024, arXiv 2405.12978).

Pairs of low rank beside the layers that give each block's attention to the picture, in a UNet the 1x1 convolutions `proj_out`, learn the
model's own denoising loss on pictures whose captions name the subject by a word that means nothing yet. The text encoder stays as it is.
Rank: a share of .05 of a layer's width, which is 16, 32 and 64 for the widths of Stable Diffusion 1.5. With a mask m for a picture,

    L = sum m (e(x_t, caption) - n)^2 / sum m,

summed over channels and positions, so that a photograph of several subjects teaches one, however small. The paper has no masks.

Nothing but the word is to change. So what is asked for by other captions c may be held to what the untaught model e_0 says of the same
pictures, half as many of them in a step, the whole of each:

    L_keep = w (e(x_t, c) - stopgrad[ e_0(x_t, c) ])^2

With it the residual becomes the word's own, and guidance, which adds what the word changes against the empty prompt, draws more of it. The
paper has no such loss; DreamBooth's (Ruiz et al., arXiv 2208.12242) is on pictures of other things, and none are needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..ops.masks import pool
from .families import Family
from .slider_training import Text, condition
from .training import Memory, Objective, Trainee, sizes

LEAST = 4  # rank of a block's only pair
OUTPUTS, BLOCKS, PICTURE = "attention outputs", "attention and feed-forward", "attention and feed-forward of the picture"
LAYERS = (OUTPUTS, BLOCKS, PICTURE)


def layers_of(family: Family, choice: str) -> str:
    """The pattern of the layers that a choice of LAYERS trains: PICTURE leaves those out whose output is the prompt's rows."""
    if choice == PICTURE:
        return rf"^(?!.*(?:{family.rows['text']}))(?=.*(?:{family.residual_blocks}))"
    return family.residual_layers if choice == OUTPUTS else family.residual_blocks


def least_rank(choice: str) -> int:
    """The least rank with a choice of LAYERS: a block that has a pair on every layer learns with one of rank 1."""
    return LEAST if choice == OUTPUTS else 1


def rank_of(share: float, least: int = LEAST) -> Callable[[nn.Module], int]:
    """The rank of a layer's pair: a share of its width, the smaller one where there are two, and no less than `least`."""
    return lambda layer: max(least, round(share * min(sizes(layer))))


class Lesson(NamedTuple):
    """A picture to learn from: its latent (channels, height, width), its subject's mask (height, width) in 0..1 of any size, or None for
    all of it, and its captions, of which each step draws one.
    """

    latent: torch.Tensor
    mask: torch.Tensor | None
    captions: tuple[Text, ...]


class ResidualObjective(Objective):
    """The model's own loss on the pictures, inside of their masks. Each step draws `batch` of one size, with new noise.

    preserve  other captions, whose predictions of them stay as they were; weight: of that loss
    end       share of sampling up to whose noise the lesson is learnt; others are held at all noise
    """

    def __init__(
        self,
        trainee: Trainee,
        lessons: Sequence[Lesson],
        *,
        batch: int,
        seed: int,
        preserve: Sequence[Text] = (),
        weight: float = 1.0,
        end: float = 1.0,
    ):
        self.trainee, self.batch, self.seed = trainee, batch, seed
        self.preserve, self.weight, self.end = tuple(preserve), weight, end
        self.captions = [lesson.captions for lesson in lessons]
        self.latents = [trainee.model.process_latent_in(lesson.latent).to(trainee.device) for lesson in lessons]
        self.masks = [
            latent.new_ones(latent.shape[-2:]) if lesson.mask is None else pool(lesson.mask[None], *latent.shape[-2:])[0].to(latent)
            for lesson, latent in zip(lessons, self.latents, strict=True)
        ]

    def losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        trainee = self.trainee
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step + 1) % 2**63)
        first = int(torch.randint(len(self.latents), (), generator=generator))
        alike = [at for at, latent in enumerate(self.latents) if latent.shape == self.latents[first].shape]
        chosen = [alike[index] for index in torch.randint(len(alike), (self.batch,), generator=generator).tolist()]
        texts = [self.captions[at][int(torch.randint(len(self.captions[at]), (), generator=generator))] for at in chosen]
        clean = torch.stack([self.latents[at] for at in chosen])
        weights = torch.stack([self.masks[at] / self.masks[at].mean() for at in chosen])[:, None]
        x, sigma, given = self._noised(clean, texts, generator, self.end)

        def learn() -> torch.Tensor:
            return (weights * (trainee.predict(x.clone(), sigma, given, 1.0) - (x - clean) / sigma[:, None, None, None]) ** 2).mean()

        if not self.preserve:
            return [learn]
        few = clean[: max(1, self.batch // 2)]
        others = [self.preserve[index] for index in torch.randint(len(self.preserve), (len(few),), generator=generator).tolist()]
        of_others = self._noised(few, others, generator)

        def keep() -> torch.Tensor:
            with torch.no_grad():
                wanted = trainee.predict(of_others[0].clone(), *of_others[1:], 0.0)
            return self.weight * nn.functional.mse_loss(trainee.predict(of_others[0].clone(), *of_others[1:], 1.0), wanted)

        return [learn, keep]

    def _noised(self, clean: torch.Tensor, texts: Sequence[Text], generator: torch.Generator, end: float = 1.0) -> tuple:
        """Pictures with new noise, how much of it, and the condition of their texts."""
        trainee = self.trainee
        # Uniform over the steps that the model was trained at; at 0 the host answers with no noise level but a sign.
        shares = (end * torch.rand(len(clean), generator=generator)).clamp(1e-3, 0.999)
        sigma = torch.tensor([trainee.sampling.percent_to_sigma(share) for share in shares.tolist()]).to(trainee.device)
        noise = trainee.noise(len(clean), *clean.shape[-2:], generator)
        given = condition(trainee, texts, noise)
        return trainee.sampling.noise_scaling(sigma, noise, clean), sigma, given

    def memory(self) -> Memory:
        x = max(self.latents, key=torch.Tensor.numel).expand(self.batch, -1, -1, -1).clone()
        sigma = torch.full((self.batch,), float(self.trainee.sampling.percent_to_sigma(0.5)), device=x.device)
        return self.trainee.memory(x, sigma, condition(self.trainee, [self.captions[0][0]] * self.batch, x), 0, 1)
