"""Concepts steered by the latents of sparse autoencoders and along dense directions, beside other ways. `python run.py bench steer`.

The lab's models at 64 pixels, 12 Euler steps, CFG 4, and what ships for them: an autoencoder of the text encoder and one of each model, and
twelve concepts found in them. The eye says what is drawn.

    erase_rate_max    pictures that hold the concept that was asked for, ours on the text, the worst concept; erase_rate: of all
    erase_power_min   the same unsteered, the worst concept; erase_power: of all
    model_erase_rate  ours inside the model; both_erase_rate: on the text and inside the model
    rest_kept         pictures whose other attributes are all right, ours on the text over unsteered
    retain_drop_max   texts without the concept: attributes right, unsteered less ours on the text, gate 1, the worst concept
    free_retain_drop  the same without a gate; model_retain_drop: ours inside the model, which has none
    gate_identical    texts without the concept whose encoding stays bit for bit as it was, gate 1
    gate_passed       texts with the concept that the gate lets through to be steered
    spearman_min      rank correlation of strength and how much of the concept there is (_rulers), mean over seeds, over nine strengths of
                      add on the text, the worst concept; spearman: of all
    span_min          how far the concept's log-odds go between the outermost strengths, of their range, the worst concept
    dose_validity     valid pictures at strength 0 less those at the worst strength, text
    model_spearman    rank correlation inside the model
    concepts_above_random      concepts in which ours erases and adds more than random latents of equal length
    concepts_level_with_dense  concepts in which adding ours brings as much as the dense direction at equal distance of the pictures
    fvu_max, alive_min, loss_recovered  the worst of the three autoencoders, on captions and pictures that they were not trained on
    train_seconds_max the longest of their trainings
    step_ratio_add    seconds a step over the plain model's, add inside a UNet of Stable Diffusion 1.5's width
    text_calls_ratio  model calls with Steer Text over those without

dit_ stands before those of the lab's DiT, in fewer cases. Arms: none, negative (the concept as a negative prompt), filter (Keep Concept
Out), random (random latents of equal length), dense and dense model (Find Direction), steerers and SAeUron (as published; and mended),
ours, ours free (no gate), ours model, ours both.

`--again PART ...` measures some of PARTS anew and keeps the others' committed figures.
"""

from __future__ import annotations

import bisect
import logging
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..host import features as host_features
from ..host import lab as host_lab
from ..host import sae_files, sae_loss
from ..host.directions import Runs, levels_of
from ..host.feature_sites import blocks, checked_site, layers, text_sites, width_at
from ..host.features import Features
from ..host.filter import OURS, Settings, keep_out
from ..host.poles import POOLED
from ..host.sae_finding import io_of, site_of
from ..host.sae_sources import model_rows, text_rows
from ..host.text_steering import BUT_FIRST
from ..lab.captions import IMAGE_TRAINING, Writer, write_captions
from ..lab.concepts import CONCEPTS, amount, asked, holds, open_captions, prompts
from ..lab.eye import Eye, Reading
from ..lab.features import DENSE, LATENTS, TEXT, features_path, sae_path
from ..lab.measure import Asked, hits
from ..lab.scenes import COLOURS, FILLS, KINDS, STYLES, render, sample_scenes
from ..nodes._shared import NONE
from ..nodes.steering import PLAIN, SteerModel, SteerText
from ..ops.sae_training import measure as measure_rows
from ..ops.steering import ABLATE, ADD
from . import _report, _rulers
from ._report import Claim, Figure, mean, ratio, share
from ._steering import Steerers, course_of, shuffled, with_saeuron
from .regional import Graph, _middle, random_context, ratios, wide_model
from .sliders import spearman

log = logging.getLogger("concept_nodes.bench")
SIZE, STEPS, CFG, SEED = 64, 12, 4.0, 61_000
DOSED_AT = 64_000  # seed of the texts and noises of doses: rulers and ranges were settled on others
LEVELS = 4  # of noise, at which autoencoders are measured
FIND_SEED = 300  # captions that SAeUron's statistics are of
OUT = 1.5  # strength of ablate: 1 takes out, 2 turns around
DOSES = tuple(step / 8 for step in range(9))  # of the full strength
SURE = 6.0  # log-odds past which a word is as sure as drawn scenes make it: 400 to 1
FULL, TRIED = 0.8 * SURE, tuple(step / 8 for step in range(1, 17))  # log-odds on average, of other texts, that a full strength brings
N, FEW, SAMPLE = 24, 6, 4  # texts a concept: of what is claimed, of other arms, of a check
GATED, DOSED, TRIALS = 50, 20, 12  # texts a concept: at the gate; of ours in doses; that its full strength is found on
INSIDE = ("circle", "red", "striped", "neon")  # whose doses are measured inside the model, and on the DiT
ON_DIT = (*INSIDE, "star", "blue")
PARTS = ("autoencoders", "gate", "erase", "dose", "dit", "cost")
CLAIMS = {
    "erase_rate_max": Claim(high=0.05),
    "erase_power_min": Claim(low=0.90),
    "retain_drop_max": Claim(high=0.02),
    "gate_identical": Claim(low=1.0),
    "spearman_min": Claim(low=0.9),
    "span_min": Claim(low=0.5),
    "dose_validity": Claim(high=0.03),
    "concepts_above_random": Claim(low=12),
    "concepts_level_with_dense": Claim(low=9),
    "train_seconds_max": Claim(high=180),
    "fvu_max": Claim(high=0.15),
    "alive_min": Claim(low=0.80),
    "loss_recovered": Claim(low=0.95),
    "step_ratio_add": Claim(high=1.02),
    "text_calls_ratio": Claim(1.0, 1.0),
}


class Shipped(NamedTuple):
    """A lab model with what ships for it."""

    kind: str
    loaded: host_lab.LabModel
    eye: Eye
    second: Eye
    text: sae_files.SAEFile
    own: sae_files.SAEFile

    @classmethod
    def load(cls, kind: str) -> Shipped:
        eyes = Eye.load(), Eye.load("eye2")
        return cls(kind, host_lab.load(kind), *eyes, *(sae_files.read(sae_path(name)) for name in (TEXT, kind)))

    def features(self, concept: str, way: str = LATENTS, where: str = TEXT) -> Features:
        return host_features.read(features_path(where, concept, way))


Encoded = tuple[torch.Tensor, torch.Tensor]


def encode(clip, text: str) -> Encoded:
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


class Way(NamedTuple):
    """A way to draw: what encodes a prompt, the encoded negative prompt, the model."""

    encode: Callable[[str], Encoded]
    negative: Encoded
    model: object


def draw(shipped: Shipped, way: Way, texts: Sequence[str], seed: int = SEED) -> torch.Tensor:
    """Pictures (N, H, W, 3) of texts, the i-th from noise of seed + i."""
    import comfy.sample

    def conditioning(encoded: Sequence[Encoded]) -> list:
        contexts, pooled = zip(*encoded, strict=True)
        return [[torch.cat(contexts), {POOLED: torch.cat(pooled)}]]

    side = SIZE // host_lab.downscale(shipped.kind)
    noise = torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(texts))])
    positive, negative = conditioning([way.encode(text) for text in texts]), conditioning([way.negative])
    latent = comfy.sample.sample(
        way.model, noise, STEPS, CFG, "euler", "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True, seed=0
    )
    return shipped.loaded.vae.decode(latent).cpu()


# --- the arms ---------------------------------------------------------------------------------------------------------------------


def plain(shipped: Shipped) -> Way:
    clip = shipped.loaded.clip
    return Way(lambda text: encode(clip, text), encode(clip, ""), shipped.loaded.model)


def on_text(shipped: Shipped, found: Features, strength: float, mode: str, gate: float = 0.0) -> Way:
    """Steer Text with its defaults."""
    clip = SteerText.execute(shipped.loaded.clip, NONE, strength, mode, BUT_FIRST, gate, PLAIN, features=found).result[0]
    return plain(shipped)._replace(encode=lambda text: encode(clip, text))


def in_model(shipped: Shipped, found: Features, strength: float, mode: str, way: Way | None = None) -> Way:
    """Steer Model with its defaults."""
    model = SteerModel.execute(shipped.loaded.model, NONE, strength, mode, 0.0, 1.0, "cond", features=found).result[0]
    return (way or plain(shipped))._replace(model=model)


def as_negative(shipped: Shipped, concept: str) -> Way:
    return plain(shipped)._replace(negative=encode(shipped.loaded.clip, concept))


def filtered(shipped: Shipped, concept: str) -> Way:
    def encoded(text: str) -> Encoded:
        context, options = keep_out(shipped.loaded.clip, text, [concept], Settings(OURS)).conditioning[0]
        return context, options[POOLED]

    return plain(shipped)._replace(encode=encoded)


def steerers(shipped: Shipped, concept: str) -> Way:
    clip, steer = shipped.loaded.clip, Steerers.of(shipped.loaded.clip, shipped.text, concept, -0.5)
    return plain(shipped)._replace(encode=lambda text: steer.encode(clip, text), negative=steer.encode(clip, "", against=True))


def saeurons(shipped: Shipped, concept: str) -> dict[str, Way]:
    """As the code is and mended; gamma is chosen for objects on pictures of their own, as the authors do, and is -1 for styles."""
    style = CONCEPTS[concept] == "style"
    runs = Runs(SIZE, SIZE, STEPS, CFG, STEPS, 1, 0)
    course = course_of(shipped.loaded, shipped.own, prompts(concept, 4, FIND_SEED), runs, 1 if style else 8)
    wished, found = asked(concept, 2, FIND_SEED + 1), {}
    for name, mended in (("SAeUron", False), ("SAeUron mended", True)):
        told = []
        for gamma in (-1.0,) if style else (-1.0, -5.0, -30.0):
            way = plain(shipped)._replace(model=with_saeuron(shipped.loaded, shipped.own, course, gamma, mended))
            if not style:
                readings = shipped.eye.read(draw(shipped, way, wished, SEED - 100))
                kept = rest_right(concept, wished, readings)
                told.append((sum(holds(concept, one) for one in readings) - sum(kept), len(told), way))
            else:
                told.append((0, 0, way))
        found[name] = min(told, key=lambda one: one[:2])[2]
    return found


def ways(shipped: Shipped, concept: str, few: bool) -> dict[str, Way]:
    """All arms, or the claimed ones alone."""
    ours, own = shipped.features(concept), shipped.features(concept, where=shipped.kind)
    text = on_text(shipped, ours, OUT, ABLATE, gate=1.0)
    found = {
        "none": plain(shipped),
        "ours": text,
        "ours model": in_model(shipped, own, OUT, ABLATE),
        "ours both": in_model(shipped, own, OUT, ABLATE, text),
        "random": on_text(shipped, shuffled(ours, shipped.text.sae, SEED), OUT, ABLATE),
    }
    if few:
        return found
    return found | {
        "negative": as_negative(shipped, concept),
        "filter": filtered(shipped, concept),
        "dense": on_text(shipped, shipped.features(concept, DENSE), OUT, ABLATE),
        "dense model": in_model(shipped, shipped.features(concept, DENSE, shipped.kind), OUT, ABLATE),
        "steerers": steerers(shipped, concept),
        **saeurons(shipped, concept),
        "ours free": on_text(shipped, ours, OUT, ABLATE),
        "ours at 1": on_text(shipped, ours, 1.0, ABLATE, gate=1.0),
    }


CLAIMED = ("none", "ours", "ours model", "ours free")
RETAINED = ("none", "filter", "steerers", "SAeUron mended", "ours", "ours free", "ours model")  # asked for without the concept, too


# --- what is told of pictures -----------------------------------------------------------------------------------------------------


def rest_right(concept: str, wished: Asked, readings: Sequence[Reading]) -> list[bool]:
    """Per picture, whether all that was asked for beside the concept is there."""
    right = hits(wished, list(readings))
    keys = {"background": "", "place": "", "colours": "colour", "shapes": "shape", "fill": "fill", "style": "style"}
    return [all(row) for row in zip(*(right[key] for key, of in keys.items() if of != CONCEPTS[concept]), strict=True)]


def attributes_right(wished: Asked, readings: Sequence[Reading]) -> list[float]:
    """Per picture, the share of shape, colour, fill and style that are as asked for."""
    told, scenes = [], wished.scenes
    for i, reading in enumerate(readings):
        seen = reading.objects[0] if reading.objects else None
        wanted = KINDS[int(scenes.kind[i, 0])], COLOURS[int(scenes.colour[i, 0])], FILLS[int(scenes.fill[i, 0])]
        right = [False] * 3 if seen is None else [a == b for a, b in zip((seen.kind, seen.colour, seen.fill), wanted, strict=True)]
        right.append(reading.style == STYLES[int(scenes.style[i])])
        told.append(sum(right) / len(right))
    return told


class Told(NamedTuple):
    """An arm's pictures of one concept, picture by picture: with the concept asked for, and without."""

    held: list[bool]
    rest: list[bool]
    valid: list[bool]
    right: list[float]

    def row(self) -> dict[str, float]:
        return {key: round(sum(map(float, values)) / len(values), 4) for key, values in self._asdict().items() if values}


def tell(shipped: Shipped, way: Way, concept: str, n: int, others: int) -> Told:
    wished, right = asked(concept, n, SEED), []
    readings = shipped.eye.read(draw(shipped, way, wished))
    held, valid = [holds(concept, one) for one in readings], [one.valid > 0.5 for one in readings]
    if others:
        other = asked(concept, others, SEED + 1, there=False)
        right = attributes_right(other, shipped.eye.read(draw(shipped, way, other, SEED + 1000)))
    return Told(held, rest_right(concept, wished, readings), valid, right)


class Cases(NamedTuple):
    """Texts a concept: of the claimed arms, of the others, of texts without it; and of which concepts."""

    n: int
    few: int
    others: int
    concepts: Sequence[str] = tuple(CONCEPTS)


def measure_erasing(shipped: Shipped, cases: Cases, sample: bool, prefix: str = "") -> tuple[dict[str, Figure], list[dict]]:
    told: dict[str, dict[str, Told]] = {}
    rows = []
    concepts = cases.concepts
    for concept in concepts:
        for arm, way in ways(shipped, concept, sample).items():
            n, others = cases.n if arm in CLAIMED else cases.few, cases.others if arm in RETAINED else 0
            one = tell(shipped, way, concept, n, others)
            told.setdefault(arm, {})[concept] = one
            rows.append({"part": "erase", "model": shipped.kind, "concept": concept, "arm": arm, "n": len(one.held), **one.row()})
            log.info("%s", rows[-1])

    def rates(arm: str) -> Figure:
        return share([held for one in told[arm].values() for held in one.held])

    def drop(arm: str, of: Sequence[str] = concepts) -> Figure:
        return mean([a - b for concept in of for a, b in zip(told["none"][concept].right, told[arm][concept].right, strict=True)])

    def flat(arm: str, key: str) -> list:
        return [value for one in told[arm].values() for value in getattr(one, key)]

    held = {arm: [share(one.held) for one in told[arm].values()] for arm in ("none", "ours")}
    figures = {
        "erase_rate": rates("ours"),
        "erase_rate_max": max(held["ours"]),
        "erase_power": rates("none"),
        "erase_power_min": min(held["none"]),
        "model_erase_rate": rates("ours model"),
        "both_erase_rate": rates("ours both"),
        "rest_kept": ratio(flat("ours", "rest"), flat("none", "rest")),
        "retain_drop": drop("ours"),
        "retain_drop_max": max(drop("ours", [concept]) for concept in concepts),
        "model_retain_drop": drop("ours model"),
    }
    if "ours free" in told:
        figures["free_retain_drop"] = drop("ours free")
    return {prefix + key: figure for key, figure in figures.items()}, rows


def measure_gate(shipped: Shipped, n: int) -> tuple[dict[str, Figure], list[dict]]:
    same, passed, rows = [], [], []
    for concept in CONCEPTS:
        way, bare = on_text(shipped, shipped.features(concept), OUT, ABLATE, gate=1.0), plain(shipped)
        told = []
        for there in (False, True):
            texts = asked(concept, n, SEED + (not there), there=there)
            told.append([all(map(torch.equal, way.encode(text), bare.encode(text))) for text in texts])
        same += told[0]
        passed += [not one for one in told[1]]
        rows.append({"part": "gate", "concept": concept, "n": n, "identical": sum(told[0]) / n, "passed": 1 - sum(told[1]) / n})
        log.info("%s", rows[-1])
    return {"gate_identical": share(same), "gate_passed": share(passed)}, rows


# --- dose and response ------------------------------------------------------------------------------------------------------------


class Dose(NamedTuple):
    """Of N pictures at every strength: the concept's log-odds, distance to the picture at 0 (mean of a pixel's change), validity; and of
    those n of them that do not hold it at 0 (fresh) how much of the concept there is by its ruler. Past SURE log-odds are all one.
    """

    amount: torch.Tensor
    distance: torch.Tensor
    valid: torch.Tensor
    told: torch.Tensor
    fresh: list[int]

    @property
    def spans(self) -> torch.Tensor:
        """(n,) of the log-odds' range, from surely not to surely."""
        amount = self.amount[self.fresh].clamp(-SURE, SURE)
        return (amount[:, -1] - amount[:, 0]) / (2 * SURE)

    def first(self, n: int) -> Dose:
        return self._replace(amount=self.amount[:n], distance=self.distance[:n], valid=self.valid[:n])

    def at(self, distances: torch.Tensor) -> torch.Tensor:
        """Mean log-odds at distances (K,), along the strengths from 0 up, by straight lines; NaN beyond the greatest."""
        zero = DOSES.index(0.0)
        x, y = self.distance[:, zero:].mean(0), self.amount[:, zero:].clamp(-SURE, SURE).mean(0)
        x = x.cummax(0).values
        at = torch.searchsorted(x, distances).clamp(1, len(x) - 1)
        part = ((distances - x[at - 1]) / (x[at] - x[at - 1]).clamp_min(1e-9)).clamp(0, 1)
        return torch.where(distances <= x[-1], y[at - 1] + part * (y[at] - y[at - 1]), torch.nan)


def full_strength(shipped: Shipped, concept: str, steers: Callable[[float], Way]) -> float:
    """The least of TRIED at which other texts' pictures hold the concept surely, or the greatest; found by halving, as if more always held
    more. Beyond it there is no more to come, and what is told of pictures is noise.
    """
    texts = open_captions(concept, TRIALS, SEED + 3)

    def full(strength: float) -> bool:
        readings = shipped.eye.read(draw(shipped, steers(strength), texts, SEED + 3000))
        return sum(max(-SURE, min(SURE, amount(concept, one))) for one in readings) >= FULL * len(texts)

    return TRIED[min(bisect.bisect_left(TRIED, True, key=full), len(TRIED) - 1)]


def dose(shipped: Shipped, concept: str, steers: Callable[[float], Way], texts: Sequence[str], zero: torch.Tensor, full: float) -> Dose:
    """At DOSES of the full strength. zero: the texts' pictures at strength 0."""
    pictures = [draw(shipped, steers(full * part), texts, DOSED_AT) if part else zero for part in DOSES]
    readings = [shipped.eye.read(one) for one in pictures]
    return Dose(
        torch.tensor([[amount(concept, one) for one in many] for many in readings], dtype=torch.float64).T,
        torch.stack([(one - zero).abs().flatten(1).mean(1) for one in pictures], 1).double(),
        torch.tensor([[one.valid > 0.5 for one in many] for many in readings]).T,
        _rulers.amounts(concept, torch.stack(pictures), (shipped.eye, shipped.second)),
        _rulers.without(concept, readings[0]),
    )


def lead(ours: Dose, dense: Dose, resamples: int = 500) -> Figure:
    """Mean log-odds of ours less the dense direction's at equal distances, up to where both reach, with a bootstrap interval over seeds."""
    zero, generator, found = DOSES.index(0.0), torch.Generator().manual_seed(0), []
    for number in range(resamples + 1):
        rows = torch.arange(len(ours.amount)) if not number else torch.randint(len(ours.amount), (len(ours.amount),), generator=generator)
        a, b = (one._replace(amount=one.amount[rows], distance=one.distance[rows]) for one in (ours, dense))
        most = min(float(one.distance[:, zero:].mean(0).max()) for one in (a, b))
        distances = torch.linspace(0, most, 17, dtype=torch.float64)[1:]
        found.append(float((a.at(distances) - b.at(distances)).nanmean()))
    low, high = torch.tensor(found[1:], dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(found[0], low, high, len(ours.amount))


def measure_doses(shipped: Shipped, n: int, sample: bool, prefix: str = "", concepts: Sequence[str] = tuple(CONCEPTS)):
    rows, dosed = [], {}
    for concept in concepts:
        ours = shipped.features(concept)
        arms = {"ours": ours}
        if not sample:
            arms |= {"dense": shipped.features(concept, DENSE), "random": shuffled(ours, shipped.text.sae, SEED)}
        steers = {arm: lambda strength, found=found: on_text(shipped, found, strength, ADD) for arm, found in arms.items()}
        if not sample and concept in INSIDE:
            own = {way: shipped.features(concept, way, shipped.kind) for way in (LATENTS, DENSE)}
            for arm, found in {"ours model": own[LATENTS], "dense model": own[DENSE]}.items():
                steers[arm] = lambda strength, found=found: in_model(shipped, found, strength, ADD)
        texts = open_captions(concept, n, DOSED_AT)
        zero, fulls = draw(shipped, plain(shipped), texts, DOSED_AT), {}
        for arm, steer in steers.items():
            full = fulls["ours"] if arm == "random" else fulls.setdefault(arm, full_strength(shipped, concept, steer))
            some = n if arm == "ours" else min(n, FEW)
            told = dosed.setdefault(arm, {})[concept] = dose(shipped, concept, steer, texts[:some], zero[:some], full)
            rows.append(
                {
                    "part": "dose", "model": shipped.kind, "concept": concept, "arm": arm, "n": some, "full": full,
                    "seeds": len(told.told), "spearman": round(float(spearman(told.told).mean()), 4),
                    "span": round(float(told.spans.mean()), 4),
                    "told": [round(value, 3) for value in told.told.mean(0).tolist()],
                    "amount": [round(value, 3) for value in told.amount.clamp(-SURE, SURE).mean(0).tolist()],
                    "distance": [round(value, 4) for value in told.distance.mean(0).tolist()],
                    "valid": [round(value, 4) for value in told.valid.double().mean(0).tolist()],
                }
            )  # fmt: skip
            log.info("%s", rows[-1])

    def ranks(arm: str) -> list[Figure]:
        return [mean(spearman(one.told)) for one in dosed[arm].values()]

    def ranked(arm: str) -> Figure:
        return mean(torch.cat([spearman(one.told) for one in dosed[arm].values()]))

    def lost(arm: str) -> Figure:
        valid = torch.cat([one.valid for one in dosed[arm].values()]).double()
        worst = int(valid.mean(0).argmin())
        return mean(valid[:, DOSES.index(0.0)] - valid[:, worst])

    figures = {
        "spearman": ranked("ours"),
        "spearman_min": min(ranks("ours")),
        "span_min": min(mean(one.spans) for one in dosed["ours"].values()),
        "dose_validity": lost("ours"),
    }
    if not sample:
        figures["model_spearman"] = ranked("ours model")
        figures["dense_spearman"] = ranked("dense")
        leads = {concept: lead(dosed["ours"][concept].first(FEW), dosed["dense"][concept]) for concept in concepts}
        for row in rows:
            if row["arm"] == "ours":
                row["lead"] = [round(value, 3) for value in leads[row["concept"]][:3]]
        level = [one.high >= 0 and one.value >= -1 for one in leads.values()]
        figures["concepts_level_with_dense"] = Figure(sum(level), sum(level), sum(level), len(level))
    return {prefix + key: figure for key, figure in figures.items()}, rows


# --- the autoencoders -------------------------------------------------------------------------------------------------------------


def fresh(n: int) -> Asked:
    """n scenes and captions of the kind that the autoencoders were trained on, others than those."""
    scenes = sample_scenes(n, counts={1: 0.6, 2: 0.4}, generator=torch.Generator().manual_seed(SEED))
    return Asked(scenes, write_captions(scenes, Writer(IMAGE_TRAINING, random.Random(SEED)))[0])


def rows_of(shipped: Shipped, file: sae_files.SAEFile, kind: str, texts: Sequence[str]) -> list[torch.Tensor]:
    """Rows of fresh captions at an autoencoder's site, in eight parts of whole texts or pictures."""
    site, loaded = site_of(file), shipped.loaded
    if kind == TEXT:
        parts = list(text_rows(loaded.clip, text_sites(loaded.clip, site), texts, "all rows", SEED, endless=False))
    else:
        runs = Runs(SIZE, SIZE, STEPS, CFG, LEVELS, 1, SEED)
        module = checked_site(loaded.model.model, site, io_of(file))
        source = model_rows(loaded.model, loaded.clip, module, io_of(file), texts, runs, 256)
        parts, count = [], 0
        while count < len(texts):
            parts.append(next(source))
            count += 8
    return [torch.cat(parts[at::8]) for at in range(8) if parts[at::8]]


def recovered(told: sae_loss.Losses, resamples: int = 500) -> Figure:
    """With a bootstrap interval over the pictures."""
    generator, n = torch.Generator().manual_seed(0), told.plain.shape[1]
    drawn = []
    for _ in range(resamples):
        chosen = torch.randint(n, (n,), generator=generator)
        drawn.append(sae_loss.Losses(*(part[:, chosen] for part in told)).recovered)
    low, high = torch.tensor(drawn, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(told.recovered, low, high, n)


def measure_autoencoders(kinds: dict[str, Shipped]) -> tuple[dict[str, Figure], list[dict]]:
    """kinds: by model; the text encoder's is measured with the UNet. Whole in a check, too: the more rows, the more latents fire."""
    figures: dict[str, Figure] = {}
    rows = []
    for kind, shipped in {TEXT: kinds["unet"], **kinds}.items():
        file = shipped.text if kind == TEXT else shipped.own
        parts = rows_of(shipped, file, kind, fresh(400 if kind == TEXT else 96))
        measured = measure_rows(file.sae, parts)
        told = {
            "fvu_max": mean([measure_rows(file.sae, [part]).metrics.fvu for part in parts]),
            "alive_min": share(measured.stats["freq"] > 0),
            "train_seconds_max": Figure(*[float(file.config["seconds"])] * 3, 1),
        }
        wished = fresh(64)
        latents = shipped.loaded.vae.encode(render(wished.scenes).movedim(1, -1))
        sigmas = levels_of(shipped.loaded.model, Runs(SIZE, SIZE, STEPS, CFG, LEVELS, 1, 0))
        losses = sae_loss.measure(shipped.loaded.model, shipped.loaded.clip, file, wished, latents, sigmas, SEED)
        told["loss_recovered"] = recovered(losses)
        rows.append({"part": "autoencoders", "kind": kind, "site": file.config["site"], "latents": file.sae.n, "k": file.sae.k})
        rows[-1] |= {key: [round(value, 5) for value in figure] for key, figure in told.items()}
        rows[-1]["losses"] = {key: [round(value, 5) for value in part.mean(1).tolist()] for key, part in losses._asdict().items()}
        log.info("%s", rows[-1])
        for key, figure in told.items():
            worse = min if key in ("alive_min", "loss_recovered") else max
            figures[key] = worse((figures.get(key, figure), figure), key=lambda one: one.value)
    return figures, rows


# --- what a step costs ------------------------------------------------------------------------------------------------------------


def measure_cost(repeats: int = 9, steps: int = 1) -> tuple[dict[str, Figure], list[dict]]:
    """Add with its defaults, eight directions at the block in the middle of a wide UNet and one at each of its cross-attentions."""
    model = wide_model()

    def features(sites: Sequence[str], m: int) -> Features:
        generator, made = torch.Generator().manual_seed(1), []
        for site in sites:
            width = width_at(model.model, site)
            rows, zeros = torch.randn(m, width, generator=generator), torch.zeros(1, m)
            made.append(
                Features(
                    "random", "Stable Diffusion 1.5", site, "out", rows, torch.ones(m), torch.ones(m), torch.zeros(width), torch.zeros(1),
                    zeros + 1, zeros,
                )
            )  # fmt: skip
        return made[0]._replace(more=tuple(made[1:]))

    there = blocks(model.model)
    conditions = [[random_context(768, 77, 1), {}]], [[random_context(768, 77, 2), {}]]
    graphs = {"plain": Graph(model, *conditions, 64, 1.0)}
    placed = {"step_ratio_add": features(there[len(there) // 2 :][:1], 8), "step_ratio_all": features(layers(model.model), 1)}
    for name, found in placed.items():
        steered = SteerModel.execute(model, NONE, 1.0, ADD, 0.0, 1.0, "cond", features=found).result[0]
        graphs[name] = Graph(steered, *conditions, 64, 1.0)
    measured = ratios(graphs, repeats, steps)
    rows = [{"part": "cost", "arm": arm, "ratios": [round(value, 4) for value in values]} for arm, values in measured.items()]
    return {arm: _middle(values) for arm, values in measured.items() if arm != "plain"}, rows


def calls_ratio(shipped: Shipped) -> Figure:
    """Model calls of one picture with Steer Text over those without."""
    from comfy.patcher_extension import WrappersMP

    counts = []
    for way in (on_text(shipped, shipped.features("red"), 1.0, ADD), plain(shipped)):
        calls: list[int] = []

        def count(executor, *args, _calls=calls, **kwargs):
            _calls.append(1)
            return executor(*args, **kwargs)

        model = way.model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", count)
        draw(shipped, way._replace(model=model), ["a large red star on a grey background"])
        counts.append(len(calls))
    return Figure(*[counts[0] / counts[1]] * 3, 1)


# --- the whole --------------------------------------------------------------------------------------------------------------------


def _measure(sample: bool, parts: Sequence[str]) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    host_lab.show_files()
    figures: dict[str, Figure] = {}
    rows: list[dict] = []

    def take(found: tuple) -> None:
        figures.update(found[0])
        rows.extend(found[1])

    with torch.inference_mode():
        unet = Shipped.load("unet")
        if "autoencoders" in parts:
            take(measure_autoencoders({kind: Shipped.load(kind) for kind in host_lab.MODELS}))
        if "gate" in parts:
            take(measure_gate(unet, SAMPLE if sample else GATED))
        if "erase" in parts:
            take(measure_erasing(unet, Cases(SAMPLE, SAMPLE, SAMPLE) if sample else Cases(N, FEW, 2 * FEW), sample))
        if "dose" in parts:
            take(measure_doses(unet, 3 if sample else DOSED, sample))
        if "dit" in parts and not sample:
            dit = Shipped.load("dit")
            take(measure_erasing(dit, Cases(FEW, FEW, SAMPLE, ON_DIT), True, "dit_"))
            take(measure_doses(dit, 4, True, "dit_", INSIDE))
        if "cost" in parts:
            figures["text_calls_ratio"] = calls_ratio(unet)
            if not sample:
                take(measure_cost())
    return figures, rows


def above_random(rows: Sequence[dict]) -> dict[str, Figure]:
    """Concepts in which ours takes out more than random latents, and adds more at the greatest strength."""
    found = {(row["part"], row["arm"], row["concept"]): row for row in rows if row.get("model") == "unet"}
    if not {(part, "random", concept) for part in ("erase", "dose") for concept in CONCEPTS} <= set(found):
        return {}

    def value(part: str, arm: str, concept: str, key: str):
        return found[part, arm, concept][key]

    above = [
        value("erase", "ours", one, "held") < value("erase", "random", one, "held")
        and value("dose", "ours", one, "amount")[-1] > value("dose", "random", one, "amount")[-1]
        for one in CONCEPTS
    ]
    return {"concepts_above_random": Figure(*[float(sum(above))] * 3, len(above))}


def main(argv: list[str]) -> int:
    return _report.run_parts("steer", argv, PARTS, _measure, CLAIMS, part_of, above_random)


def part_of(row: dict) -> str:
    """The DiT's rows are a part of their own."""
    return "dit" if row.get("model") == "dit" else row["part"]


def table(rows: Sequence[dict], model: str = "unet") -> str:
    """The share of pictures that hold the concept, by arm and concept, and what is left of all else, as lines of Markdown."""
    rows = [row for row in rows if row["part"] == "erase" and row["model"] == model]
    arms, concepts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("arm", "concept"))
    lines = ["| | " + " | ".join(concepts) + " | mean | rest right | valid | others right |", "|---" * (len(concepts) + 5) + "|"]
    for arm in arms:
        own = {row["concept"]: row for row in rows if row["arm"] == arm}
        told = [f"{own[one]['held']:.2f}" for one in concepts]
        for key in ("held", "rest", "valid", "right"):
            values = [row[key] for row in own.values() if key in row]
            told.append(f"{sum(values) / len(values):.2f}" if values else "")
        lines.append(f"| {arm} (n={sum(row['n'] for row in own.values())}) | " + " | ".join(told) + " |")
    return "\n".join(lines)


def doses(rows: Sequence[dict], model: str = "unet") -> str:
    """Rank correlation of strength and attribute by concept and arm, and the lead over the dense direction, as lines of Markdown."""
    rows = [row for row in rows if row["part"] == "dose" and row["model"] == model]
    arms, concepts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("arm", "concept"))
    lines = ["| | " + " | ".join(arms) + " | lead over dense |", "|---" * (len(arms) + 2) + "|"]
    for concept in concepts:
        own = {row["arm"]: row for row in rows if row["concept"] == concept}
        lead = own["ours"].get("lead")
        told = f"{lead[0]:.2f} [{lead[1]:.2f}, {lead[2]:.2f}]" if lead else ""
        lines.append(f"| {concept} | " + " | ".join(f"{own[arm]['spearman']:.2f}" if arm in own else "" for arm in arms) + f" | {told} |")
    return "\n".join(lines)
