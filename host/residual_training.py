"""A subject taught from a few pictures: Personalized Residuals (Ham et al., CVPR 2024, arXiv 2405.12978).

Pairs of low rank beside the layers that give each block's attention to the picture, in a UNet the 1x1 convolutions `proj_out`, learn the
model's own denoising loss on pictures whose captions name the subject by a word that means nothing yet. The text encoder stays as it is.
Rank: a share of .05 of a layer's width, which is 16, 32 and 64 for the widths of Stable Diffusion 1.5. With a mask m for a picture,

    L = sum m (e(x_t, caption) - n)^2 / sum m,

summed over channels and positions, so that a photograph of several subjects teaches one, however small. The paper has no masks.
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

LEAST = 4  # rank
OUTPUTS, BLOCKS = "attention outputs", "attention and feed-forward"
LAYERS = (OUTPUTS, BLOCKS)


def layers_of(family: Family, choice: str) -> str:
    """The pattern of the layers that a choice of LAYERS trains."""
    return family.residual_layers if choice == OUTPUTS else family.residual_blocks


def rank_of(share: float) -> Callable[[nn.Module], int]:
    """The rank of a layer's pair: a share of its width, the smaller one where there are two, and no less than LEAST."""
    return lambda layer: max(LEAST, round(share * min(sizes(layer))))


class Lesson(NamedTuple):
    """A picture to learn from: its latent (channels, height, width), its subject's mask (height, width) in 0..1 of any size, or None for
    all of it, and its captions, of which each step draws one.
    """

    latent: torch.Tensor
    mask: torch.Tensor | None
    captions: tuple[Text, ...]


class ResidualObjective(Objective):
    """The model's own loss on the pictures, inside of their masks. Each step draws `batch` of one size, with new noise."""

    def __init__(self, trainee: Trainee, lessons: Sequence[Lesson], *, batch: int, seed: int):
        self.trainee, self.batch, self.seed = trainee, batch, seed
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
        # Uniform over the steps that the model was trained at; at 0 the host answers with no noise level but a sign.
        shares = torch.rand(self.batch, generator=generator).clamp(1e-3, 0.999)
        sigma = torch.tensor([trainee.sampling.percent_to_sigma(share) for share in shares.tolist()]).to(trainee.device)
        clean = torch.stack([self.latents[at] for at in chosen])
        weights = torch.stack([self.masks[at] / self.masks[at].mean() for at in chosen])[:, None]
        noise = trainee.noise(self.batch, *clean.shape[-2:], generator)
        given = condition(trainee, texts, noise)

        def loss() -> torch.Tensor:
            x = trainee.sampling.noise_scaling(sigma, noise.clone(), clean)
            return (weights * (trainee.predict(x, sigma, given, 1.0) - (x - clean) / sigma[:, None, None, None]) ** 2).mean()

        return [loss]

    def memory(self) -> Memory:
        x = max(self.latents, key=torch.Tensor.numel).expand(self.batch, -1, -1, -1).clone()
        sigma = torch.full((self.batch,), float(self.trainee.sampling.percent_to_sigma(0.5)), device=x.device)
        return self.trainee.memory(x, sigma, condition(self.trainee, [self.captions[0][0]] * self.batch, x), 0, 1)
