"""What a sparse autoencoder's reconstruction costs the model that it was trained on.

    recovered = (L_mean - L_sae) / (L_mean - L)

L is the denoising loss as the model is, L_sae with every row of the autoencoder's site replaced by what it makes of it, L_mean with every
row replaced by their mean at that noise level: 1 where the reconstruction does as well as the rows, 0 where it does no better than one row
for all. For an autoencoder of a text encoder the rows are replaced while the prompts are encoded, all but the first of each, which it was
not trained on.

The loss is that of one prediction at a noise level, |x0^ - x0|^2 / sigma^2: for models that predict noise the squared error of that, for
flow models that of the velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import torch

from ..ops.sae import SAE
from .directions import _pooled, read_texts
from .dispatcher import STEERS, Call, Effect, attach
from .feature_sites import checked_site, text_sites
from .features import DIFF, TEXT
from .places import Place
from .sae_files import SAEFile
from .sae_finding import io_of, site_of
from .steering import _rows, everywhere
from .text_steering import placed

Change = Callable[[torch.Tensor, float], torch.Tensor]  # of rows (B, T, d) at a noise level; at 0 in text encoders


class Losses(NamedTuple):
    """Mean losses, and those of each picture (S, N) at S noise levels: as it is, reconstructed, mean-ablated."""

    plain: torch.Tensor
    rebuilt: torch.Tensor
    ablated: torch.Tensor

    @property
    def recovered(self) -> float:
        """Raises ValueError where the site does not matter to the loss: there is nothing to recover."""
        plain, rebuilt, ablated = (float(part.double().mean()) for part in self)
        if not ablated > plain:
            raise ValueError(f"the loss is {plain:.4g} as it is and {ablated:.4g} without the site's rows: the site does not matter to it")
        return (ablated - rebuilt) / (ablated - plain)


def rebuilt(sae: SAE) -> Change:
    return lambda rows, sigma: sae.decode(sae.encode(rows))


class Replaced(NamedTuple):
    """What is placed on a module to put `change` of its rows in their place."""

    change: Change
    io: str

    turn = STEERS

    @classmethod
    def join(cls, parts: Sequence[Replaced], module, device, dtype) -> Replacing:
        (part,) = parts
        return Replacing(part.change, part.io)


class Replacing:
    """Puts other rows in the place of a module's own: those in which the picture has a share, in text encoders those behind the first
    `kept` of each.
    """

    def __init__(self, change: Change, io: str, kept: int = 0):
        self.change, self.io, self.kept, self.sigma, self.share = change, io, kept, 0.0, None

    def setting(self, strengths, places=(), shares=None) -> tuple:
        return strengths[0][1], shares.rows[places[0]]

    def use(self, setting: tuple) -> None:
        self.sigma, self.share = setting

    def __call__(self, output: Any, fresh: bool, *args, **kwargs) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        rows = _rows(first).float()
        x = rows - _rows(args[0]).float() if self.io == DIFF else rows
        other = self.change(x, self.sigma)
        other = rows - x + other if self.io == DIFF else other
        there = torch.arange(rows.shape[1], device=rows.device)[None] >= self.kept
        if self.share is not None:
            there = torch.nn.functional.pad(self.share, (0, rows.shape[1] - self.share.shape[-1])).to(rows.device) > 0
        other = torch.where(there[..., None], other, rows).to(first.dtype)
        if first.ndim == 4:
            other = other.mT.unflatten(-1, first.shape[2:])
        return (other, *output[1:]) if isinstance(output, tuple) else other


class ReplaceEffect(Effect):
    """The picture's rows replaced in every call, whatever they are asked for."""

    text = "none"

    def __init__(self, parts: Mapping[str, Replaced]):
        super().__init__("replace", parts)
        self.place = Place(everywhere)

    def strengths(self, model_sampling) -> Callable[[Call], tuple[float, float]]:
        return lambda call: (1.0, call.sigma)


def replaced(patcher, site: str, io: str, change: Change):
    """A clone of a MODEL in which a site's rows are replaced. Raises FeaturesError."""
    model = patcher.clone()
    attach(model, ReplaceEffect({checked_site(patcher.model, site, io): Replaced(change, io)}))
    return model


class Conditions(NamedTuple):
    """Encoded texts: contexts (N, T, D) and pooled vectors (N, P), or None."""

    contexts: torch.Tensor
    pooled: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, clip, texts: Sequence[str]) -> Conditions:
        contexts, pooled = zip(*(clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in texts), strict=True)
        return cls(torch.cat(contexts), _pooled(pooled))


def losses(patcher, conditions: Conditions, latents: torch.Tensor, sigmas: Sequence[float], seed: int) -> torch.Tensor:
    """(S, N) of latents (N, C, h, w), as the autoencoder gives them, each with its text and noise of its own, the same at every level."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    positive = [[conditions.contexts, dict(conditions.pooled)]]
    told, scaled = [], patcher.model.process_latent_in
    for sigma in sigmas:
        # One step of Euler's to 0 is the prediction of the clean latent.
        schedule, euler = torch.tensor([sigma, 0.0]), comfy.samplers.sampler_object("euler")
        clean = comfy.sample.sample_custom(patcher, noise, 1.0, euler, schedule, positive, positive, latents, disable_pbar=True, seed=seed)
        told.append((scaled(clean) - scaled(latents)).square().flatten(1).mean(1).double() / sigma**2)
    return torch.stack(told)


def measure(patcher, clip, file: SAEFile, texts: Sequence[str], latents: torch.Tensor, sigmas: Sequence[float], seed: int = 0) -> Losses:
    """Losses of pictures' latents and their texts under an autoencoder of this CLIP or this MODEL. Raises FeaturesError."""
    with torch.inference_mode():
        if io_of(file) == TEXT:
            told = [losses(patcher, each, latents, sigmas, seed) for each in _encoded(clip, file, texts)]
            return Losses(*told)
        site, io, conditions, sae = site_of(file), io_of(file), Conditions.of(clip, texts), file.sae
        told = []
        for sigma in sigmas:  # the mean is another at every level
            seen: list[torch.Tensor] = []

            def note(rows, sigma, seen=seen):
                seen.append(rows.flatten(0, 1).mean(0))
                return rows

            def level(change: Change, sigma=sigma) -> torch.Tensor:
                return losses(replaced(patcher, site, io, change), conditions, latents, [sigma], seed)

            plain = level(note)
            mean = torch.stack(seen).mean(0)
            told.append((plain, level(rebuilt(sae)), level(lambda rows, sigma, mean=mean: mean.expand_as(rows))))
        return Losses(*(torch.cat(part) for part in zip(*told, strict=True)))


def _encoded(clip, file: SAEFile, texts: Sequence[str]) -> tuple[Conditions, Conditions, Conditions]:
    """Texts as they are, reconstructed at the site, and with the mean row there."""
    (site,) = text_sites(clip, site_of(file))
    rows = torch.cat([one[:, 1:].flatten(0, 1) for one, _ in read_texts(clip, [site], texts).values()])
    mean = rows.mean(0)

    def under(change: Change) -> Conditions:
        with placed([(site.module, Replacing(change, TEXT, kept=1))]):
            return Conditions.of(clip, texts)

    return Conditions.of(clip, texts), under(rebuilt(file.sae)), under(lambda rows, sigma: mean.expand_as(rows))
