"""Latents found from prompts: which of a sparse autoencoder's stand for a concept, as features that steer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops.sae import HELD, SAE
from ..ops.sae_find import effect_size, own_share, ranked, set_difference, share_difference
from .directions import ROWS, WORDS, Found, Runs, gated, levels_of, notes_of, pooled_sides, read_texts
from .families import FAMILIES
from .feature_sites import ENCODERS, checked_site, encoders_called, family_for, text_sites, width_at
from .features import DIFF, KINDS, OUT, TEXT, Features, FeaturesError, Readers, fingerprint
from .sae_files import SAEFile

SHARE, EFFECT, SET = "share difference", "effect size", "set difference"
SCORES = (SHARE, EFFECT, SET)
MEAN, MAX = "mean", "max"
UNITS = (MEAN, MAX)
NETWORK = "diffusion_model."


class Wish(NamedTuple):
    """What is looked for. score, unit: of SCORES and UNITS; pooling: of a text's words or of all its rows but the first."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    name: str
    score: str = SHARE
    top: int = 8
    unit: str = MEAN
    pooling: str = WORDS


class Codes(NamedTuple):
    """Of texts or pictures at S noise levels: mean and greatest codes (S, N, n), mean rows (S, N, d)."""

    mean: torch.Tensor
    most: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, flat: torch.Tensor, n: int) -> Codes:
        return cls(flat[..., :n], flat[..., n : 2 * n], flat[..., 2 * n :])


class Reading:
    """Codes of rows, which are let go of at once. Where a number of latents is kept, also the mean of the least code that was: what a
    threshold has to be to keep about as many.
    """

    def __init__(self, sae: SAE):
        self.sae = sae
        self.least, self.count = 0.0, 0

    def __call__(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """(N, 2 n + d) mean and greatest code and mean row of N texts or pictures (N, T, d), by the rows' shares (N, T)."""
        return torch.stack([self._one(*one) for one in zip(x, share, strict=True)])

    def _one(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        there = share > 0
        x, share = x[there].float(), share[there].float()
        sae = self.sae = self.sae if self.sae.W_enc.device == x.device else self.sae.to(x.device)
        total = most = torch.zeros(sae.n, device=x.device)
        step = max(1, HELD // sae.n)
        for rows, shares in zip(x.split(step), share.split(step), strict=True):
            codes = sae.encode(rows)
            total, most = total + shares @ codes, torch.maximum(most, codes.amax(0))
            if sae.counts:
                self.least += float(codes.topk(sae.k, dim=-1).values[:, -1].sum())
                self.count += len(rows)
        return torch.cat([total / share.sum(), most, (share @ x) / share.sum()])

    def thresholds(self, indices: torch.Tensor) -> torch.Tensor:
        return thresholds(self.sae, indices, self.least / max(1, self.count))


def thresholds(sae: SAE, indices: torch.Tensor, least: float) -> torch.Tensor:
    """(m,) that activations of latents must exceed. least: the mean of the least that was kept of a vector, for autoencoders that keep a
    number of latents.
    """
    if sae.counts:
        return torch.full((len(indices),), least)
    if sae.threshold is None:
        return torch.zeros(len(indices))
    threshold = sae.threshold.float().cpu()
    return threshold[indices] if threshold.ndim else threshold.expand(len(indices)).clone()


def io_of(file: SAEFile) -> str:
    """Of what rows an autoencoder is: as its file says, else by its site's name; a model's are then taken to be what the module gives."""
    told = file.config.get("io")
    if told in KINDS:
        return told
    return TEXT if str(file.config.get("site", "")).split("+")[0].strip().rpartition(".")[0] in ENCODERS else OUT


def site_of(file: SAEFile) -> str:
    """Raises FeaturesError where it is not said."""
    site = str(file.config.get("site") or "").strip().removeprefix(NETWORK)
    if not site:
        raise FeaturesError("The autoencoder's file does not say at which site it was trained. Name it in Load Sparse Autoencoder.")
    return site


def find_in_text(clip, file: SAEFile, wish: Wish) -> Found:
    """At the autoencoder's block of a CLIP's text encoder. Raises FeaturesError, EncoderError."""
    site = site_of(file)
    sites, called = text_sites(clip, site), encoders_called(site)
    check_fits(file, called, sum(one.width for one in sites), site, "this CLIP", {family.name for family in FAMILIES})
    notes, read = notes_of(clip, sites), read_texts(clip, sites, (*wish.positive, *wish.negative))
    reading = Reading(file.sae)

    def codes(side: Sequence[str]) -> Codes:
        found = []
        for rows, content in (read[text] for text in side):
            there = content.clone()
            if wish.pooling == ROWS:
                there[:], there[:, 0] = True, False
            found.append(reading(rows.flatten(0, 1)[None], there.flatten()[None].float())[0])
        return Codes.of(torch.stack(found)[None], file.sae.n)

    features, told = _found(file, reading, *map(codes, (wish.positive, wish.negative)), wish, site)
    printed = "+".join(fingerprint(one.module) for one in sites)
    features = features._replace(family=called, io=TEXT, sigmas=torch.zeros(1), whole=wish.pooling == ROWS, fingerprint=printed).checked()
    features, gate = gated(features, read)
    return Found(features, [*notes, *told, gate])


def find_in_model(patcher, clip, file: SAEFile, wish: Wish, runs: Runs) -> Found:
    """At the autoencoder's module of a MODEL, while pictures of the prompts are sampled from the same noise with and without the concept.
    Raises FeaturesError, UnsupportedFamily.
    """
    site, io, family = site_of(file), io_of(file), family_for(patcher.model).name
    module = checked_site(patcher.model, site, io)
    check_fits(file, family, width_at(patcher.model, site), site, "this model", set())
    reading, levels = Reading(file.sae), levels_of(patcher, runs)
    sides = pooled_sides(patcher, clip, [module], io, levels, (wish.positive, wish.negative), runs, reading)
    features, told = _found(file, reading, *(Codes.of(side[module], file.sae.n) for side in sides), wish, site)
    printed = fingerprint(patcher.model.diffusion_model.get_submodule(site))
    features = features._replace(family=family, io=io, sigmas=torch.tensor(levels), fingerprint=printed).checked()
    pictures = (len(wish.positive) + len(wish.negative)) * runs.pictures
    told.append(f"{pictures} pictures of {runs.steps} steps at CFG {runs.cfg:g}.")
    if file.config.get("io") not in KINDS:
        told.append(f"The file does not say of what rows it is: taken to be what {site} gives ('{OUT}', not '{DIFF}').")
    return Found(features, told)


def check_fits(file: SAEFile, family: str, width: int, site: str, what: str, also: set[str]) -> None:
    """Raises FeaturesError where an autoencoder is not of a site's rows, or spoilt. also: other names that its family may have."""
    own = file.config.get("family")
    if own and own != family and own not in also:
        raise FeaturesError(
            f"The autoencoder was trained on {own}, and {what} is of {family}. Take one of {family}; if the file is wrong, say so at Load "
            "Sparse Autoencoder (`family`)."
        )
    spoilt = [name for name, part in file.sae._asdict().items() if isinstance(part, torch.Tensor) and not _finite(part)]
    if spoilt:
        raise FeaturesError(f"The autoencoder holds NaN or infinity in {' and '.join(spoilt)}: its training failed. Take another copy.")
    if file.sae.d != width:
        raise FeaturesError(
            f"The autoencoder is of vectors of {file.sae.d} numbers, and {site} of {what} has {width}: it was trained at another site, or "
            "on a model of another size. Take one that fits, or say its site at Load Sparse Autoencoder."
        )


def _finite(tensor: torch.Tensor) -> bool:
    """A sum is finite only where all are; it may overflow where all are, so that what is not is looked at once more."""
    return math.isfinite(float(tensor.sum(dtype=torch.float64))) or bool(tensor.isfinite().all())


def _found(file: SAEFile, reading: Reading, positive: Codes, negative: Codes, wish: Wish, site: str) -> tuple[Features, list[str]]:
    if not all(bool(part.isfinite().all()) for side in (positive, negative) for part in side):
        raise FeaturesError(f"Codes at {site} hold NaN or infinity. Load the model or the autoencoder in another type.")
    scores = _scores(positive, negative, wish.score)
    chosen = ranked(scores, wish.top)
    if not len(chosen):
        raise FeaturesError(
            f"No latent stands for the concept at {site} by {wish.score}: the prompts with it bring nothing more than those without. "
            "Write prompts that differ, or take another score."
        )
    sae = file.sae.to("cpu")
    rows, bias = sae.readers(chosen)
    tables = [side.mean[..., chosen].mean(1) for side in (positive, negative)]  # (S, m)
    unit = tables[0].mean(0) if wish.unit == MEAN else positive.most[..., chosen].amax((0, 1))
    averages = [table.mean(0) for table in tables]
    weights = own_share(*averages)
    if not bool(weights.any()):
        raise FeaturesError(
            f"The latents that {wish.score} finds at {site} are as busy without the concept as with it: steering them would do nothing. "
            "Write prompts that differ in the concept alone, or take another score."
        )
    features = Features(
        name=wish.name,
        family="",
        site=site,
        io="",
        directions=sae.directions(chosen),
        weights=weights,
        unit=unit,
        mean=negative.rows.mean((0, 1)),
        sigmas=torch.zeros(len(tables[0])),
        positive=tables[0],
        negative=tables[1],
        readers=Readers(rows, bias, reading.thresholds(chosen)),
        prompts=(wish.positive, wish.negative),
    )
    way = positive.rows.mean((0, 1)) - negative.rows.mean((0, 1))
    likeness = float(torch.cosine_similarity((unit * weights) @ features.directions, way, dim=0))
    features = features._replace(likeness=likeness)
    told = [f"By {wish.score}, of {sae.n} latents {int((scores > 0).sum())} are more the concept's than not; kept:"]
    told += [
        f"  {index}: score {float(scores[index]):.3g}, {float(unit[at]):.3g} counts as 1; on average {float(averages[0][at]):.3g} with the "
        f"concept, {float(averages[1][at]):.3g} without, so that its steps count {float(weights[at]):.2f}."
        for at, index in enumerate(chosen.tolist())
    ]
    told.append(f"What they add together has a cosine of {likeness:.2f} with the difference that Find Direction goes along.")
    if sae.counts:
        told.append(
            f"It keeps the {sae.k} greatest latents of a vector. A few of them alone are read by a threshold instead, the mean of the "
            f"least that was kept ({float(features.readers.thresholds[0]):.3g}): an approximation, which add does not use."
        )
    return features, told


def _scores(positive: Codes, negative: Codes, score: str) -> torch.Tensor:
    """(n,)"""
    if score == SHARE:
        return share_difference(*(side.mean.mean((0, 1)) for side in (positive, negative)))
    if score == EFFECT:
        return effect_size(*(side.mean.mean(0) for side in (positive, negative)))
    return set_difference(*(side.most.amax(0) for side in (positive, negative)))
