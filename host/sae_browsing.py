"""Where latents of a sparse autoencoder fire: over prompts in a text encoder, or over pictures sampled from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch

from ..ops.sae import SAE
from ..ops.sae_browse import Survey, nearest, neighbours, of_latent
from .directions import ROWS, Runs, TapEffect, Tapped, levels_of, notes_of, read_texts, sampled
from .encoders import BEGINS, ENDS, windows_of
from .families import FAMILIES
from .feature_sites import NETWORK, checked_site, encoders_called, family_for, text_sites, which_words, width_at
from .features import KINDS, TEXT, Features, FeaturesError, Readers, fingerprint
from .sae_files import SAEFile
from .sae_finding import check_fits, io_of, site_of, thresholds
from .sae_sources import encoded
from .sites import sites

NEAR = 6  # neighbours told of each latent
WORDS_TOLD = 8
SAME = 0.999  # cosine at which a direction is a latent's own
BEHIND = "(behind)"  # what stands for the rows behind a text's words


class Item(NamedTuple):
    """A prompt, or a picture of one. values, indices (R, k): the codes of its rows as `SAE.sparse` gives them.

    words    of a text: what each row stands for
    grid     of a picture: rows are levels x height x width
    picture  (H, W, 3), None without a VAE
    """

    text: str
    values: torch.Tensor
    indices: torch.Tensor
    words: tuple[str, ...] = ()
    grid: tuple[int, int] = (0, 0)
    picture: torch.Tensor | None = None


class Browsed(NamedTuple):
    """What was gone through. levels: noise levels, none for text; least: as `thresholds` takes it; config: family, site, io, whole and
    fingerprint of features made of it; report: lines.
    """

    sae: SAE
    items: list[Item]
    survey: Survey
    levels: list[float]
    least: float
    config: dict
    report: list[str]


class Firing(NamedTuple):
    """How a latent fires in one item. heat: (R,) of a text's rows, (height, width) of a picture, mean over the levels."""

    item: Item
    most: float
    heat: torch.Tensor


class Latent(NamedTuple):
    """What is told of one latent.

    density   share of rows in which it fires;  items: in how many items
    mean      of the rows in which it fires;  most: the greatest
    counts    (bins,) rows by activation, from 0 to the greatest
    by_level  [(noise level, mean activation)] over all rows, none for text
    words     [(word, activation)]: the mean over a text's rows, none for pictures
    said      [(word, activation)]: the mean over items whose prompt has the word, less that over the others
    near      [(latent, cosine, its best word)]
    firing    where it fires most
    """

    number: int
    density: float
    items: int
    mean: float
    most: float
    counts: torch.Tensor
    by_level: list[tuple[float, float]]
    words: list[tuple[str, float]]
    said: list[tuple[str, float]]
    near: list[tuple[int, float, str]]
    firing: list[Firing]

    def told(self) -> dict:
        """As JSON says it."""
        own = {name: getattr(self, name) for name in ("density", "items", "mean", "most", "by_level", "words", "said", "near")}
        examples = [{"prompt": one.item.text, "most": one.most} for one in self.firing]
        return {"latent": self.number, **own, "counts": self.counts.int().tolist(), "examples": examples}


def browse_text(clip, file: SAEFile, prompts: Sequence[str], pooling: str) -> Browsed:
    """At the autoencoder's block of a CLIP's text encoder. Raises FeaturesError, EncoderError."""
    site = site_of(file)
    places, called = text_sites(clip, site), encoders_called(site)
    check_fits(file, called, sum(one.width for one in places), site, "this CLIP", {family.name for family in FAMILIES})
    notes, gathered = notes_of(clip, places), _Gathered(file.sae)
    bar = comfy.utils.ProgressBar(len(prompts))
    for text in prompts:
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows, content = read_texts(clip, places, [text])[text]
        there = content.clone()
        if pooling == ROWS:
            there[:], there[:, 0] = True, False
        windows = windows_of(clip, places[0].seat, clip.tokenize(text))
        spoken = [
            _piece(clip, places[0].seat.part, windows[number][position][0]) if content[number, position] else BEHIND
            for number, position in there.nonzero().tolist()
        ]
        gathered.add(text, *gathered.sae.sparse(rows[there].to(gathered.sae.W_enc.device)), words=tuple(spoken))
        bar.update(1)
    printed = "+".join(fingerprint(one.module) for one in places)
    config = {"family": called, "site": site, "io": TEXT, "whole": pooling == ROWS, "fingerprint": printed}
    return gathered.browsed([], config, notes)


def browse_model(patcher, clip, file: SAEFile, prompts: Sequence[str], runs: Runs, decode: Callable | None) -> Browsed:
    """At the autoencoder's module of a MODEL, while it samples. decode: latents -> pictures (N, H, W, 3), None for heat alone. Raises
    FeaturesError, UnsupportedFamily.
    """
    site, io, family = site_of(file), io_of(file), family_for(patcher.model).name
    module = checked_site(patcher.model, site, io)
    check_fits(file, family, width_at(patcher.model, site), site, "this model", set())
    gathered, levels = _Gathered(file.sae), levels_of(patcher, runs)
    kept: dict[float, list[torch.Tensor]] = {level: [] for level in levels}

    def codes(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        x = x[:, share[0] > 0]
        if not bool(x.isfinite().all()):
            raise FeaturesError(f"{site} gives NaN or infinity while the model samples. Load the model in another type.")
        return torch.cat([part.float() for part in gathered.sae.sparse(x)], -1)

    if which_words(patcher.model, [module]) != "none":
        raise FeaturesError(f"{site} has the prompt's rows, which lie nowhere on a picture. Browse an autoencoder of the picture's.")
    effect = TapEffect({module: Tapped(lambda sigma, x: kept[sigma].append(x), io, codes)}, levels, "Browse Latents")
    bar = comfy.utils.ProgressBar(len(prompts) * runs.pictures * runs.steps)
    asked = iter([text for _ in range(runs.pictures) for text in prompts])
    level = sites(patcher.model, [module])[module].level
    for latents in sampled(patcher, effect, [encoded(clip, text) for text in prompts], encoded(clip, ""), runs, bar):
        if not all(kept.values()):
            raise FeaturesError(
                f"Nothing passed through {module.removeprefix(NETWORK)} while the model sampled: another extension computes what lies "
                "there. Take a model without that extension's node."
            )
        grid = tuple(-(-length // 2**level) for length in latents.shape[-2:])
        with torch.inference_mode():
            pictures = [None] * len(latents) if decode is None else decode(latents).float().cpu()
        by_level = _level_by_level([torch.cat(kept[sigma]) for sigma in levels])
        for picture, values, indices in zip(pictures, *by_level, strict=True):
            gathered.add(next(asked), values.flatten(0, 1), indices.flatten(0, 1), grid=grid, picture=picture)
        for one in kept.values():
            one.clear()
    printed = fingerprint(patcher.model.diffusion_model.get_submodule(site))
    report = [f"{len(gathered.items)} pictures of {runs.steps} steps at CFG {runs.cfg:g}, at {len(levels)} noise levels."]
    if decode is None:
        report.append("No vae is connected: the sheets show where latents fire, without the pictures.")
    return gathered.browsed(levels, {"family": family, "site": site, "io": io, "fingerprint": printed}, report)


def _level_by_level(kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures, S, T, k) values and latents' numbers from what was kept at each level, (pictures, T, 2 k) of any k."""
    halves = [[half for half in one.chunk(2, -1)] for one in kept]
    most = max(half.shape[-1] for half, _ in halves)
    filled = [[torch.nn.functional.pad(half, (0, most - half.shape[-1])) for half in pair] for pair in halves]
    values, indices = (torch.stack(parts, 1) for parts in zip(*filled, strict=True))
    return values, indices.int()


class _Gathered:
    """Items as they come; of their rows only the sparse codes are kept."""

    def __init__(self, sae: SAE):
        self.sae = sae.to(comfy.model_management.get_torch_device())
        self.items: list[Item] = []
        self.survey, self.least, self.count = Survey(sae.n), 0.0, 0

    def add(self, text: str, values: torch.Tensor, indices: torch.Tensor, **about) -> None:
        values, indices = values.cpu(), indices.cpu()
        if not bool(values.isfinite().all()):
            raise FeaturesError(f"Codes of '{text}' hold NaN or infinity. Load the model or the autoencoder in another type.")
        if self.sae.counts:
            self.least, self.count = self.least + float(values.amin(-1).sum()), self.count + len(values)
        indices = indices.int()
        self.survey.add(values, indices)
        self.items.append(Item(text, values, indices, **about))

    def browsed(self, levels: list[float], config: dict, report: list[str]) -> Browsed:
        least = self.least / max(1, self.count)
        return Browsed(self.sae.to("cpu"), self.items, self.survey, levels, least, config, report)


def _piece(clip, part: str, token) -> str:
    """What a token reads as."""
    if not isinstance(token, int):
        return "embedding"
    piece = getattr(clip.tokenizer, part).inv_vocab.get(token, "?")
    return piece.removesuffix(ENDS).removeprefix(BEGINS).replace(BEGINS, " ").strip() or piece


def numbers_in(text: str, n: int) -> list[int]:
    """Latents' numbers from "3, 17, 40-44". Raises FeaturesError."""
    found: list[int] = []
    for part in text.replace(";", ",").split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first and not dash:
            continue
        if not first.isdigit() or (dash and not last.isdigit()):
            raise FeaturesError(f"'{part.strip()}' is no latent's number. Write numbers and spans, such as 3, 17, 40-44.")
        span = range(int(first), int(last or first) + 1)
        if not span or span[-1] >= n:
            raise FeaturesError(f"There is no latent '{part.strip()}': the autoencoder has the latents 0 to {n - 1}.")
        found += span
    return list(dict.fromkeys(found))


def latents_of(features: Features, browsed: Browsed) -> tuple[list[int], list[str]]:
    """The latents that features are of, or lie nearest to, and report lines. Raises FeaturesError where they are of another site."""
    own = next((one for one in features.each() if (one.site, one.io) == (browsed.config["site"], browsed.config["io"])), None)
    if own is None or own.width != browsed.sae.d:
        raise FeaturesError(
            f"'{features.name}' lie at {features.site} ({features.io}, {features.width} numbers), and the autoencoder is of "
            f"{browsed.config['site']} ({browsed.config['io']}, {browsed.sae.d}): none of its latents are theirs."
        )
    found = nearest(browsed.sae, own.directions)
    told = [
        f"Direction {at} of '{own.name}' is no latent; the nearest is {latent}, at a cosine of {cosine:.2f}."
        for at, (latent, cosine) in enumerate(found)
        if cosine < SAME
    ]
    return list(dict.fromkeys(latent for latent, _ in found)), told


def latent_of(browsed: Browsed, number: int, examples: int, bins: int = 24) -> Latent:
    """What is told of one latent."""
    survey, firing, amounts = browsed.survey, [], []
    for item in browsed.items:
        amounts.append(of_latent(item.values, item.indices, number))
    best = survey.best(number, examples)
    for at in best:
        item, heat = browsed.items[at], amounts[at]
        firing.append(Firing(item, float(heat.max()), heat.unflatten(0, (-1, *item.grid)).mean(0) if browsed.levels else heat))
    every = torch.cat(amounts)
    most = float(every.max())
    counts = torch.histc(every[every > 0], bins, 0.0, most) if most > 0 else torch.zeros(bins)
    by_level = []
    if browsed.levels:
        means = torch.stack([amount.unflatten(0, (len(browsed.levels), -1)).mean(1) for amount in amounts]).mean(0).tolist()
        by_level = list(zip(browsed.levels, means, strict=True))
    near = [(other, cosine, _best_word(browsed, other)) for other, cosine in neighbours(browsed.sae, number, NEAR)]
    return Latent(
        number,
        float(survey.density[number]),
        int((survey.most[:, number] > 0).sum()),
        float(survey.mean[number]),
        most,
        counts,
        by_level,
        [] if browsed.levels else _fired_on(browsed, amounts),
        _said(browsed, amounts),
        near,
        firing,
    )


def _best_word(browsed: Browsed, number: int) -> str:
    best = browsed.survey.best(number, 1)
    if not best or browsed.levels:
        return ""
    item = browsed.items[best[0]]
    return item.words[int(of_latent(item.values, item.indices, number).argmax())]


def _fired_on(browsed: Browsed, amounts: Sequence[torch.Tensor]) -> list[tuple[str, float]]:
    """[(word, mean activation)] over the rows of texts, greatest first."""
    by_word: dict[str, list[float]] = {}
    for item, amount in zip(browsed.items, amounts, strict=True):
        for word, value in zip(item.words, amount.tolist(), strict=True):
            by_word.setdefault(word, []).append(value)
    return _greatest({word: sum(values) / len(values) for word, values in by_word.items()})


def _said(browsed: Browsed, amounts: Sequence[torch.Tensor]) -> list[tuple[str, float]]:
    """[(word, activation)] of the prompts' words: how much more there is where they are said. Words of at least two prompts and not of all:
    a word of one tells the prompt and not the word.
    """
    said = [{word.strip(".,;:()").lower() for word in item.text.split()} - {""} for item in browsed.items]
    means, found = torch.stack([amount.mean() for amount in amounts]), {}
    for word in sorted(set().union(*said)):
        there = torch.tensor([word in words for words in said])
        prompts = {item.text for item, with_it in zip(browsed.items, there.tolist(), strict=True) if with_it}
        if len(prompts) > 1 and not there.all():
            found[word] = float(means[there].mean() - means[~there].mean())
    return _greatest(found)


def _greatest(found: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(((word, value) for word, value in found.items() if value > 0), key=lambda one: -one[1])[:WORDS_TOLD]


def features_of(browsed: Browsed, numbers: Sequence[int], name: str) -> Features:
    """Features of latents: 1 is a latent's mean activation where it fires, at each noise level its own. Raises FeaturesError."""
    chosen = torch.tensor(numbers)
    rows, bias = browsed.sae.readers(chosen)
    unit = browsed.survey.mean[chosen]
    # One that fires nowhere in these prompts has no amount that counts as 1.
    unit = torch.where(unit > 0, unit, 1.0)
    levels = browsed.levels or [0.0]
    table = torch.stack([_by_level(browsed, number, len(levels)) for number in numbers], 1)
    prompts = dict.fromkeys(browsed.items[at].text for number in numbers for at in browsed.survey.best(number, 8))
    return Features(
        name=name,
        directions=browsed.sae.directions(chosen),
        weights=torch.ones(len(chosen)),
        unit=unit,
        mean=torch.zeros(browsed.sae.d),
        sigmas=torch.tensor(levels),
        positive=table,
        negative=torch.zeros_like(table),
        readers=Readers(rows, bias, thresholds(browsed.sae, chosen, browsed.least)),
        prompts=(tuple(prompts), ()),
        **browsed.config,
    ).checked()


def _by_level(browsed: Browsed, number: int, levels: int) -> torch.Tensor:
    """(S,) mean activation over all rows of each level."""
    amounts = [of_latent(item.values, item.indices, number) for item in browsed.items]
    if levels == 1:
        return torch.cat(amounts).mean()[None]
    return torch.stack([amount.unflatten(0, (levels, -1)).mean(1) for amount in amounts]).mean(0)


def of_rows(file: SAEFile) -> bool:
    """Whether an autoencoder is of a text encoder."""
    return io_of(file) == TEXT


def told_site(file: SAEFile) -> list[str]:
    """A note where a file does not say of what rows it is."""
    return [] if file.config.get("io") in KINDS else [f"The file does not say of what rows it is: taken to be '{io_of(file)}'."]
