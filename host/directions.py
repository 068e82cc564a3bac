"""Directions found from prompts: the mean of a site's rows with a concept less that without it, in a text encoder or while pictures are
sampled (the baseline that sparse autoencoders have to beat; CASteer, arXiv 2503.09630, finds its own so).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import comfy.sample
import comfy.utils
import torch

from ..ops.steering import mean_difference, threshold
from .dispatcher import READS, Call, Effect, attach
from .feature_sites import (
    AUTO,
    NETWORK,
    TextSite,
    checked_site,
    default_text_site,
    encoders_called,
    family_for,
    model_sites,
    picture_at,
    skipped,
    text_sites,
    which_words,
)
from .features import DIFF, TEXT, Features, FeaturesError, fingerprint
from .places import Place
from .steering import _rows, everywhere
from .text_steering import captured, score

WORDS, ROWS, POSITIONS = "content words", "all rows", "each position"
POOLINGS = (WORDS, ROWS, POSITIONS)
AT_ONCE = 8  # pictures sampled side by side
SAMPLER, SCHEDULER = "euler", "normal"


class Runs(NamedTuple):
    """How pictures are sampled for their activations. levels: at how many noise levels rows are kept; pictures: of each prompt."""

    width: int
    height: int
    steps: int
    cfg: float
    levels: int
    pictures: int
    seed: int


class Found(NamedTuple):
    """Features, and lines for the report."""

    features: Features
    report: list[str]


def prompts_of(text: str, name: str) -> tuple[str, ...]:
    """One prompt for each line. Raises FeaturesError where there is none."""
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise FeaturesError(f"{name} is empty. Write prompts there, one in each line: the same with the concept and without it.")
    return lines


def in_text(clip, site: str, positive: Sequence[str], negative: Sequence[str], pooling: str, name: str) -> Found:
    """At a block of a text encoder. Raises FeaturesError, EncoderError."""
    site = default_text_site(clip) if site == AUTO else site
    sites = text_sites(clip, site)
    notes = notes_of(clip, sites)
    read = read_texts(clip, sites, (*positive, *negative))
    if pooling == POSITIONS:
        length = min(rows.shape[1] for rows, _ in read.values())
        means = {text: rows[0, :length] for text, (rows, _) in read.items()}
    elif pooling == ROWS:
        means = {text: rows[:, 1:].mean((0, 1))[None] for text, (rows, _) in read.items()}
    else:
        means = {text: rows[content].mean(0, keepdim=True) for text, (rows, content) in read.items()}
    with_it, without = (torch.stack([means[text] for text in side]).mean(0) for side in (positive, negative))  # (T, d) or (1, d)
    way = with_it - without
    unit = way.norm(dim=1)
    there = unit > 1e-5 * with_it.norm(dim=1).clamp_min(1e-12)
    if not bool(there.any()):
        raise FeaturesError(f"The prompts with and without the concept are the same at {site}: there is no direction between them.")
    way, unit, without = way[there], unit[there], without[there]
    mean = without.mean(0)
    directions = way / unit[:, None]
    zero = ((without - mean) * directions).sum(1)
    features = Features(
        name=name,
        family=encoders_called(site),
        site=site,
        io=TEXT,
        directions=directions,
        weights=torch.ones(len(directions)),
        unit=unit,
        mean=mean,
        sigmas=torch.zeros(1),
        positive=(zero + unit)[None],
        negative=zero[None],
        positions=there.nonzero()[:, 0] if pooling == POSITIONS else None,
        whole=pooling == ROWS,
        fingerprint="+".join(fingerprint(one.module) for one in sites),
        prompts=(tuple(positive), tuple(negative)),
    ).checked()
    features, told = gated(features, read)
    report = [
        *notes,
        told,
        f"The difference is {float(unit.norm() / with_it.norm(dim=1)[there].norm()):.0%} of the rows' length.",
    ]
    return Found(features, report)


def notes_of(clip, sites: Sequence[TextSite]) -> list[str]:
    """What to tell of blocks that clip skip leaves out. Raises FeaturesError where nothing would come of them."""
    return [f"{note[0].upper()}{note[1:]}" for note in filter(None, (skipped(clip, one) for one in sites))]


def read_texts(clip, sites: Sequence[TextSite], texts: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What `captured` gives for each text. Raises FeaturesError for one without words, and for rows that are no numbers."""
    read = {text: captured(clip, sites, clip.tokenize(text)) for text in dict.fromkeys(texts)}
    for text, (rows, content) in read.items():
        if not bool(content.any()):
            raise FeaturesError(f"The prompt '{text}' has no words. Take it out.")
        if not bool(rows.isfinite().all()):
            called = "+".join(f"{one.seat.part}.{one.block}" for one in sites)
            raise FeaturesError(
                f"{called} gives NaN or infinity for '{text}'. Load the text encoder in another type, or take another site."
            )
    return read


def gated(features: Features, read: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[Features, str]:
    """Features with the gate between the scores of their own texts, and what to tell of it. Of latents, as many as tell the texts apart
    best: those further down fire on other concepts of the kind as well, and one alone may not know every wording.
    """
    scores = {telling: _scores(features._replace(telling=telling), read) for telling in _first(features)}
    telling, (with_it, without) = max(scores.items(), key=lambda one: _apart(*one[1]))
    features = features._replace(gate=threshold(with_it, without), telling=telling)
    told = "They lie apart" if float(with_it.min()) > float(without.max()) else "They do not lie apart"
    by = f" by the first {telling} of the latents" if telling > 1 else " by the first of the latents" if telling else ""
    return features, f"Scores{by} with the concept {_span(with_it)}, without {_span(without)}. {told}; the gate is {features.gate:.2f}."


def _first(features: Features) -> list[int]:
    """How many latents a score may count: powers of two, and all."""
    if features.readers is None:
        return [0]
    m = len(features.directions)
    return [2**power for power in range(m.bit_length()) if 2**power < m] + [m]


def _scores(features: Features, read: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the texts with the concept and of those without."""
    with_it, without = (torch.tensor([score(features, *read[text]) for text in side]) for side in features.prompts)
    return with_it, without


def _apart(with_it: torch.Tensor, without: torch.Tensor) -> tuple[float, float]:
    """In what share of the pairs the one with the concept scores more, and by how much at least, in units of the mean difference."""
    pairs = float((with_it[:, None] > without[None]).float().mean())
    return pairs, float((with_it.min() - without.max()) / (with_it.mean() - without.mean()).abs().clamp_min(1e-12))


def _span(scores: torch.Tensor) -> str:
    return f"{float(scores.min()):.2f} to {float(scores.max()):.2f}"


# --- in the model -----------------------------------------------------------------------------------------------------------------


def mean_rows(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(pictures, d)"""
    return (x * share[..., None]).sum(1) / share.sum(1)[:, None]


class Tapped(NamedTuple):
    """What is placed on a block to keep what `pool` makes of its rows (pictures, T, d) and their shares (pictures, T), at first their
    means: `sink` takes (sigma, (pictures, ...)).
    """

    sink: Callable[[float, torch.Tensor], None]
    io: str
    pool: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = mean_rows

    turn = READS

    @classmethod
    def join(cls, parts: Sequence[Tapped], module, device, dtype) -> Tap:
        return Tap(parts, picture_at(module))


class Tap:
    """What is made of the rows of each picture in which any has a share."""

    def __init__(self, parts: Sequence[Tapped], at: int = 0):
        self.parts, self.at = parts, at

    def setting(self, strengths, places=(), shares=None):
        return [sigma for _, sigma in strengths], [shares.rows[place] for place in places]

    def use(self, setting) -> None:
        self.sigmas, self.shares = setting

    def __call__(self, output: Any, fresh: bool, *args, **kwargs) -> Any:
        rows = _rows(output[self.at] if isinstance(output, tuple) else output).detach().float()
        differs = any(part.io == DIFF for part in self.parts)
        given = _rows(args[self.at]).detach().float() if differs else None
        for part, sigma, share in zip(self.parts, self.sigmas, self.shares, strict=True):
            share = torch.nn.functional.pad(share, (0, rows.shape[1] - share.shape[-1])).expand(len(rows), -1)
            counts = share.sum(1) > 0
            x = rows - given if part.io == DIFF else rows
            if bool(counts.any()):
                part.sink(sigma, part.pool(x[counts], share[counts]).cpu())
        return output


class TapEffect(Effect):
    """Listens at some noise levels to the rows of what is wanted."""

    def __init__(self, parts: Mapping[str, Tapped], sigmas: Sequence[float], name: str = "Find Direction", text: str = "none"):
        super().__init__(name, parts)
        self.sigmas, self.text = sigmas, text
        self.place = Place(everywhere, factors=lambda name: 0.0 if "negative" in name else 1.0)

    def strengths(self, model_sampling) -> Callable[[Call], tuple[float, float] | float]:
        def strength(call: Call):
            near = [sigma for sigma in self.sigmas if abs(call.sigma - sigma) <= 1e-4 * sigma]
            return (1.0, near[0]) if near else 0.0

        return strength


def in_model(patcher, clip, site: str, io: str, positive: Sequence[str], negative: Sequence[str], runs: Runs, name: str) -> Found:
    """At blocks or layers of the model, while pictures of the prompts are sampled from the same noise with and without the concept. Raises
    FeaturesError, UnsupportedFamily.
    """
    sites = model_sites(patcher.model, site)
    modules = [checked_site(patcher.model, one, io) for one in sites]
    levels = levels_of(patcher, runs)
    sides = pooled_sides(patcher, clip, modules, io, levels, (positive, negative), runs)
    prompts = tuple(positive), tuple(negative)
    found, right = [], {}
    for one, module in zip(sites, modules, strict=True):
        features, right[one] = _between(one, *(side[module] for side in sides))
        family, printed = family_for(patcher.model).name, fingerprint(patcher.model.diffusion_model.get_submodule(one))
        found.append(
            features._replace(name=name, family=family, io=io, sigmas=torch.tensor(levels), fingerprint=printed, prompts=prompts).checked()
        )
    worst = min(right, key=right.get)
    told = f", least at {worst} ({right[worst]:.0%})" if len(right) > 1 else ""
    report = [
        f"{(len(positive) + len(negative)) * runs.pictures} pictures of {runs.steps} steps at CFG {runs.cfg:g}.",
        f"It tells pictures with the concept from those without in {sum(right.values()) / len(right):.0%} of the pairs{told}.",
    ]
    return Found(found[0]._replace(more=tuple(found[1:])), report)


def levels_of(patcher, runs: Runs) -> list[float]:
    """The noise levels at which rows are kept, spread evenly over the steps."""
    schedule = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), SCHEDULER, runs.steps)[:-1].tolist()
    at = torch.linspace(0, len(schedule) - 1, min(runs.levels, len(schedule))).round().long().unique().tolist()
    return [schedule[number] for number in at]


def pooled_sides(
    patcher, clip, modules: Sequence[str], io: str, levels: Sequence[float], sides: Sequence[Sequence[str]], runs: Runs, pool=mean_rows
) -> list[dict[str, torch.Tensor]]:
    """For each side's prompts what `pool` makes of each module's rows, (S, pictures, ...): the same noise for the same number whatever
    the texts.
    """
    encoded = {
        text: clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in ("", *(text for side in sides for text in side))
    }
    bar = comfy.utils.ProgressBar(sum(map(len, sides)) * runs.pictures * runs.steps)
    found = []
    for side in sides:
        kept: dict[str, dict[float, list[torch.Tensor]]] = {module: {level: [] for level in levels} for module in modules}
        parts = {module: Tapped(_keep(kept[module]), io, pool) for module in modules}
        effect = TapEffect(parts, levels, text=which_words(patcher.model, modules))
        for _ in sampled(patcher, effect, [encoded[text] for text in side], encoded[""], runs, bar):
            pass
        for module, by in kept.items():
            if not all(by.values()):
                raise FeaturesError(
                    f"Nothing passed through {module.removeprefix(NETWORK)} while the model sampled: another extension computes what lies "
                    "there. Take another site, or a model without that extension's node."
                )
        found.append({module: torch.stack([torch.cat(by[level]) for level in levels]) for module, by in kept.items()})
    return found


def _between(site: str, with_it: torch.Tensor, without: torch.Tensor) -> tuple[Features, float]:
    """Features of one site from means (S, pictures, d) of its rows, and in what share of the pairs they tell the two sides apart."""
    if not bool(with_it.isfinite().all() and without.isfinite().all()):
        raise FeaturesError(f"{site} gives NaN or infinity while the model samples. Load the model in another type, or take another site.")
    means = with_it.mean(1), without.mean(1)
    try:
        direction, lengths = mean_difference(*means)
    except ValueError as error:
        raise FeaturesError(f"No direction was found at {site}: {error}. Write prompts that differ in the concept alone.") from None
    mean = means[1].mean(0)
    positive, negative = ((side - mean) @ direction[:, None] for side in means)
    unit = lengths.mean().clamp_min(1e-12)[None]
    none = torch.zeros(len(lengths))
    features = Features("", "", site, "", direction[None], torch.ones(1), unit, mean, none, positive, negative)
    of = [((side - mean) @ direction).mean(0) for side in (with_it, without)]
    return features, float((of[0][:, None] > of[1][None]).float().mean())


def sampled(patcher, effect: Effect, texts: Sequence, empty, runs: Runs, bar) -> Iterator[torch.Tensor]:
    """Sample pictures of encoded texts with an effect on a clone of a MODEL; gives the latents of each batch, in the texts' order and
    round after round of them.
    """
    listening = patcher.clone()
    attach(listening, effect)
    asked = [(number, text) for number in range(runs.pictures) for text in texts]
    down = patcher.model.latent_format.spacial_downscale_ratio
    for batch in _alike(asked):
        blank = torch.zeros(1, 4, runs.height // down, runs.width // down)
        blank = comfy.sample.fix_empty_latent_channels(listening, blank)
        noise = torch.cat([comfy.sample.prepare_noise(blank, runs.seed + number) for number, _ in batch])
        conditions = [
            [[torch.cat([context for context, _ in side]), _pooled([pooled for _, pooled in side])]]
            for side in ([text for _, text in batch], [empty] * len(batch))
        ]
        with torch.inference_mode():  # closed again before the caller goes on, who may train
            latents = comfy.sample.sample(
                listening, noise, runs.steps, runs.cfg, SAMPLER, SCHEDULER, *conditions, blank.repeat(len(batch), *[1] * (blank.ndim - 1)),
                callback=_advance(bar, len(batch)), disable_pbar=True, seed=runs.seed,
            )  # fmt: skip
        yield latents


def _keep(kept: dict[float, list[torch.Tensor]]) -> Callable[[float, torch.Tensor], None]:
    return lambda sigma, rows: kept[sigma].append(rows)


def _advance(bar, pictures: int) -> Callable:
    """A sampler's callback that moves a bar on by the pictures of a batch."""
    return lambda *_: bar.update(pictures)


def _pooled(found: Sequence[torch.Tensor | None]) -> dict:
    return {} if found[0] is None else {"pooled_output": torch.cat(list(found))}


def _alike(asked: Sequence) -> list[list]:
    """Batches of texts of the same length, in their order."""
    batches: list[list] = []
    for one in asked:
        last = batches[-1] if batches else None
        if last and len(last) < AT_ONCE and last[0][1][0].shape == one[1][0].shape:
            last.append(one)
        else:
            batches.append([one])
    return batches
