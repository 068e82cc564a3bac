"""Ways to take a concept out with a sparse autoencoder as they were published, on this pack's autoencoders, and a control.

Concept Steerers (arXiv 2501.19066, and its code): with z_C = ReLU(W_enc (x_C - b) + b_enc) of the concept's own text, position by position
and without the k greatest alone, x' = x + strength z_C W_dec on the prompt, and the same taken away on the negative prompt.

SAeUron (arXiv 2501.18052, and its code): the latents of the greatest share difference, step by step; in a row where one exceeds its mean
over all pictures, z_i <- gamma mu_i z_i with mu_i its mean with the concept; rows of prompt and negative alike. What is decoded gets the
error of the reconstruction added: x^ - x, as the code has it, or x - x^, as is meant (`mended`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..host.directions import Runs, levels_of, pooled_sides
from ..host.feature_sites import checked_site, text_sites
from ..host.features import TEXT, Features
from ..host.sae_files import SAEFile
from ..host.sae_finding import Codes, Reading, io_of, site_of
from ..host.sae_loss import Change, Replacing, replaced
from ..host.text_steering import captured, placed
from ..ops.sae import SAE
from ..ops.sae_find import ranked, share_difference


class Steerers(NamedTuple):
    """Concept Steerers for one concept: `encode` a prompt, or with `against` a negative one."""

    site: object
    change: torch.Tensor

    @classmethod
    def of(cls, clip, file: SAEFile, concept: str, strength: float) -> Steerers:
        (site,) = text_sites(clip, site_of(file))
        rows, _ = captured(clip, [site], clip.tokenize(concept))
        codes = file.sae.pre(rows[0]).clamp_min(0)
        return cls(site, strength * file.sae.delta(codes))

    def encode(self, clip, text: str, against: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        change = -self.change if against else self.change
        with placed([(self.site.module, Replacing(lambda rows, sigma: rows + change, TEXT))]):
            return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


class Course(NamedTuple):
    """SAeUron's statistics of one concept at S noise levels: latents (S, m), their means over all pictures and with the concept (S, m)."""

    sigmas: list[float]
    latents: torch.Tensor
    everywhere: torch.Tensor
    concept: torch.Tensor


def course_of(loaded, file: SAEFile, sides: Sequence[Sequence[str]], runs: Runs, most: int) -> Course:
    """From pictures of prompts with the concept and without it; runs.levels = runs.steps."""
    module, reading = checked_site(loaded.model.model, site_of(file), io_of(file)), Reading(file.sae)
    levels = levels_of(loaded.model, runs)
    found = pooled_sides(loaded.model, loaded.clip, [module], io_of(file), levels, sides, runs, reading)
    with_it, without = (Codes.of(side[module], file.sae.n).mean for side in found)
    means, everywhere = with_it.mean(1), torch.cat([with_it, without], 1).mean(1)
    latents = []
    for level, other in zip(means, without.mean(1), strict=True):
        best = ranked(share_difference(level, other), most)
        latents.append(torch.cat([best, best[:1].repeat(most - len(best))]))
    chosen = torch.stack(latents)
    return Course(levels, chosen, everywhere.gather(1, chosen), means.gather(1, chosen))


def saeuron(course: Course, sae: SAE, gamma: float, mended: bool) -> Change:
    def change(rows: torch.Tensor, sigma: float) -> torch.Tensor:
        at = min(range(len(course.sigmas)), key=lambda level: abs(course.sigmas[level] - sigma))
        latents = course.latents[at].unique()
        order = [int((course.latents[at] == one).nonzero()[0]) for one in latents]
        codes = sae.encode(rows)
        before = sae.decode(codes)
        own = codes[..., latents]
        codes[..., latents] = torch.where(own > course.everywhere[at, order], gamma * course.concept[at, order] * own, own)
        return sae.decode(codes) + ((rows - before) if mended else (before - rows))

    return change


def with_saeuron(loaded, file: SAEFile, course: Course, gamma: float, mended: bool):
    """A clone of the MODEL."""
    return replaced(loaded.model, site_of(file), io_of(file), saeuron(course, file.sae, gamma, mended))


def shuffled(features: Features, sae: SAE, seed: int) -> Features:
    """Features that read as these do and write along others of the autoencoder's directions, as far."""
    lengths = features.directions.norm(dim=1, keepdim=True)
    drawn = torch.randperm(sae.n, generator=torch.Generator().manual_seed(seed))
    rows = torch.nn.functional.normalize(sae.directions(drawn), dim=1)
    # None that is one of ours.
    own = torch.nn.functional.normalize(features.directions, dim=1)
    rows = rows[(rows @ own.T).amax(1) < 0.9][: len(lengths)]
    return features._replace(directions=rows * lengths, name=f"{features.name} (random)")
