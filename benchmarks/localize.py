"""Characters from words alone: what is in its place where nobody drew a mask, and what a localized LoRA leaves of the rest.

Places, at 128 pixels: one prompt names K characters, each with the word of its place; a LoRA for each. Pictures are read by the eye.

    autoK_in_place   share of places in which the surest object is their character, ours, masks found while sampling
    autoK_swap       share of places in which the eye sees another one of the named characters
    dit_autoK_...    the same on the lab's DiT

Arms: plain (all LoRAs everywhere by the stock loader), weighting (the same, each character's words at 1.3), prompts (masks drawn by hand,
a regional prompt each, no LoRA), composite (a pass of the whole picture for each LoRA, averaged; arXiv 2402.16843), LAG, FreeFuse and
Conductor (see _published.py; LAG and Conductor on the UNet only, Conductor with masks drawn by hand), hook (the host's hook LoRA, masks
drawn by hand, a pass for each), masks (Apply Regions, masks drawn by hand), ours (Region from Words, Apply Regions at own_scale .5) and
ours, one scale (both nodes at their defaults: own_scale 0; on the DiT, whose layers have no such scale, that is ours).

The rest, on the lab's UNet at 64 pixels: a character beside an ordinary object, against the same seed without the character's LoRA. What
counts is the mean change of a pixel outside of what the eye sees in the character's half, with and without the LoRA.

    lag_background_cut   1 - that change with the LoRA where its words are, over the same with it everywhere
    lag_identity_loss    share of pictures whose surest object in that half is the character, everywhere less localized

The lab's characters were trained on backgrounds of all kinds and hardly change one. For there to be anything to keep out, the figures above
are of a spoilt character: its LoRA and the background slider at 2 as one adapter. lag_neon_... are of one with the neon slider at 2,
lag_clean_... of the character's LoRA alone. What the clean one changes everywhere is what a character
in the place of a word without meaning changes by itself: lag_background_cut_over_clean is the cut of what is above that.

Arms are told picture by picture in the results, and every figure is made of them, so that `--again ARM ...` measures some arms anew, of
places and of the rest, and keeps the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from typing import NamedTuple

import torch

from ..host import adapters
from ..host import lab as host_lab
from ..host.regions import Hung, Regions, apply
from ..lab.characters import WORDS
from ..lab.eye import Eye, Reading
from ..nodes.localize import NEUTRAL
from ..ops.regions import Region
from . import _published, _report
from ._layouts import STEPS, Layout, composite, couple, encode, hooked, identities, loras_of, sample, stacked
from ._report import Claim, Figure, mean, ratio, share
from .regional import common as masked

log = logging.getLogger("concept_nodes.bench")
FIRST_SEED = 72_000
WEIGHT = 1.3
OWN_SCALE = 0.5
CLAIMS = {
    "auto3_in_place": Claim(low=0.85),
    "auto3_swap": Claim(high=0.05),
    "auto5_in_place": Claim(low=0.70),
    "lag_background_cut": Claim(low=0.60),
    "lag_identity_loss": Claim(high=0.03),
}

# --- places -----------------------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """A model with its conditions, and what acts on it while it samples."""

    model: object
    positive: list
    negative: list
    acting: object = nullcontext()


def words_of(layout: Layout) -> list[str]:
    return [WORDS[name] for name in layout.names]


def common(loaded, text: str) -> tuple[list, list]:
    return [encode(loaded, text)], [encode(loaded, "")]


def weighting(loaded, layout, loras, seeds) -> Way:
    model, _, negative = stacked(loaded, layout, loras)
    text = layout.whole()
    for word in words_of(layout):
        text = text.replace(f"large {word}", f"(large {word}:{WEIGHT})")
    return Way(model, [encode(loaded, text)], negative)


def lag(loaded, layout, loras, seeds) -> Way:
    text = layout.whole()
    gated = _published.Lag(loaded, [loras[name] for name in layout.names], text, words_of(layout))
    return Way(loaded.model, *common(loaded, text), gated.on())


def freefuse(loaded, layout, loras, seeds) -> Way:
    """One picture at a time: regions have one mask each."""
    text, (seed,) = layout.whole(), seeds
    positive, negative = common(loaded, text)

    def draw(model, steps: int) -> torch.Tensor:
        return sample(loaded, model, positive, negative, [seed], last_step=steps)

    masks = _published.freefuse(loaded, draw, text, words_of(layout), STEPS)[0]
    regions = Regions()
    for name, mask in zip(layout.names, masks, strict=True):
        regions = regions.with_region(Region(name), mask.float()).with_lora(name, Hung(name, loras[name]))
    # The published gate leaves all of the text to every LoRA.
    return Way(apply(loaded.model, regions, loaded.clip, text="all")[0], positive, negative)


def conductor(loaded, layout, loras, seeds) -> Way:
    masks = torch.cat([layout.mask(index) for index in range(layout.k)])
    paths = _published.Conductor(loaded, [loras[name] for name in layout.names], masks)
    return Way(paths.model(loaded.model), *common(loaded, layout.whole()), paths.on())


def localized(loaded, layout, loras, seeds, *, own_scale: float = OWN_SCALE) -> Way:
    text = layout.whole()
    positive, negative = common(loaded, text)
    regions = Regions()
    for index, name in enumerate(layout.names):
        live = replace(NEUTRAL, phrase=f"large {WORDS[name]} {layout.place(index)}")
        regions = regions.with_region(Region(name, live=live)).with_lora(name, Hung(name, loras[name]))
    model, _ = apply(loaded.model, regions, loaded.clip, prompt=text, positive=positive, own_scale=own_scale)
    return Way(model, positive, negative)


def _plain(arm: Callable) -> Callable[..., Way]:
    return lambda loaded, layout, loras, seeds: Way(*arm(loaded, layout, loras))


ARMS: dict[str, Callable[..., Way]] = {
    "plain": _plain(stacked),
    "weighting": weighting,
    "prompts": _plain(couple),
    "composite": _plain(composite),
    "LAG": lag,
    "FreeFuse": freefuse,
    "Conductor": conductor,
    "hook": _plain(hooked),
    "masks": _plain(masked),
    "ours": localized,
    "ours, one scale": partial(localized, own_scale=0.0),
}
ONE_BY_ONE = ("FreeFuse",)
ON_UNET = ("LAG", "Conductor", "ours, one scale")
FEW = ("plain", "masks", "ours", "ours, one scale")
# (model, K): (pictures, arms); of arms that are not among these few, half of them
PLACES = {
    ("unet", 3): (36, tuple(ARMS)),
    ("unet", 5): (24, FEW),
    ("dit", 3): (12, tuple(arm for arm in ARMS if arm not in ON_UNET)),
    ("dit", 5): (12, tuple(arm for arm in FEW if arm not in ON_UNET)),
}
SAMPLE = {("unet", 3): (18, ("plain", "ours")), ("unet", 5): (12, ("ours",))}


def draw_places(loaded, layout: Layout, loras, arm: str, seeds: Sequence[int]) -> torch.Tensor:
    pictures = []
    for part in [[seed] for seed in seeds] if arm in ONE_BY_ONE else [list(seeds)]:
        way = ARMS[arm](loaded, layout, loras, part)
        with way.acting:
            pictures.append(sample(loaded, way.model, way.positive, way.negative, part))
    return torch.cat(pictures)


def swaps(layout: Layout, readings: Sequence[Reading]) -> list[bool]:
    """For each picture and place: whether another one of the named characters is seen in it."""
    return [
        any(seen.kind in layout.names and seen.kind != name for seen in reading.objects if layout.of(seen.x, seen.y) == index)
        for reading in readings
        for index, name in enumerate(layout.names)
    ]


def measure_places(loaded, eye: Eye, kind: str, k: int, arm: str, n: int) -> dict:
    loras, found = loras_of(kind), {"in_place": [], "swap": [], "valid": []}
    began = time.perf_counter()
    for turn in range(len(WORDS)):
        seeds = list(range(FIRST_SEED + turn, FIRST_SEED + n, len(WORDS)))
        layout = Layout(k, turn)
        readings = eye.read(draw_places(loaded, layout, loras, arm, seeds))
        found["in_place"] += identities(layout, readings)
        found["swap"] += swaps(layout, readings)
        found["valid"] += [reading.valid > 0.5 for reading in readings]
    row = {"part": "places", "model": kind, "k": k, "arm": arm, "n": n, "seconds": round((time.perf_counter() - began) / n, 2)}
    return row | {f"{key}_share": round(sum(values) / len(values), 4) for key, values in found.items()} | _told(found)


# --- the rest of the picture ------------------------------------------------------------------------------------------------------

REST_SIZE, REST = 64, 48  # pixels a side; pictures an arm
SPOILT = 2.0
OTHERS = ("red heart", "blue square", "green star", "yellow circle", "purple diamond", "orange cross")


class Beside:
    """A character in one half of the canvas and an ordinary object in the other."""

    def __init__(self, name: str, number: int):
        self.name, self.left = name, number % 2 == 0
        sides = ("on the left", "on the right")
        own, other = sides if self.left else sides[::-1]
        self.phrase, self.other = f"large {WORDS[name]} {own}", f"large {OTHERS[number % len(OTHERS)]} {other}"
        self.text = f"a {self.phrase} and a {self.other} on a grey background"

    def holds(self, seen) -> bool:
        return (seen.x < REST_SIZE / 2) == self.left

    def seen(self, reading: Reading):
        """The surest object in the character's half, or None."""
        return next((seen for seen in reading.objects if self.holds(seen)), None)


def _clean(kind: str, name: str) -> list[tuple[dict, float]]:
    return [(loras_of(kind)[name], 1.0)]


def _with_slider(slider: str, kind: str, name: str) -> list[tuple[dict, float]]:
    state = adapters.read(host_lab.LORAS / f"concept_lab/sliders/{kind}/{slider}.safetensors")
    return [*_clean(kind, name), (state, SPOILT)]


# What is put on for a character: (LoRA, strength) pairs. Whatever Region LoRA takes may stand here.
ADAPTERS: dict[str, Callable[[str, str], list[tuple[dict, float]]]] = {
    "spoilt": partial(_with_slider, "background"),
    "neon": partial(_with_slider, "neon"),
    "clean": _clean,
}


def everywhere(loaded, beside: Beside, held) -> Way:
    import comfy.sd

    model = loaded.model
    for state, strength in held:
        model, _ = comfy.sd.load_lora_for_models(model, None, state, strength, 0.0)
    return Way(model, *common(loaded, beside.text))


def where_its_words_are(loaded, beside: Beside, held, **settings) -> Way:
    positive, negative = common(loaded, beside.text)
    live = replace(NEUTRAL, **({"phrase": beside.phrase, "background": f"{beside.other}\ngrey background"} | settings))
    regions = Regions().with_region(Region(beside.name, live=live))
    for index, (state, strength) in enumerate(held):
        regions = regions.with_lora(beside.name, Hung(str(index), state, strength))
    return Way(apply(loaded.model, regions, loaded.clip, prompt=beside.text, positive=positive)[0], positive, negative)


def in_its_half(loaded, beside: Beside, held) -> Way:
    mask = torch.zeros(REST_SIZE, REST_SIZE)
    mask[..., slice(0, REST_SIZE // 2) if beside.left else slice(REST_SIZE // 2, None)] = 1
    regions = Regions().with_region(Region(beside.name), mask)
    for index, (state, strength) in enumerate(held):
        regions = regions.with_lora(beside.name, Hung(str(index), state, strength))
    return Way(apply(loaded.model, regions, loaded.clip)[0], *common(loaded, beside.text))


def published_lag(loaded, beside: Beside, held) -> Way:
    scaled = [
        {key: value * strength if key.endswith("lora_up.weight") else value for key, value in state.items()} for state, strength in held
    ]
    gated = _published.Lag(loaded, scaled, beside.text, [beside.phrase.split()[1]] * len(scaled))
    return Way(loaded.model, *common(loaded, beside.text), gated.on())


REST_ARMS: dict[str, Callable[..., Way]] = {
    "everywhere": everywhere,
    "LAG": published_lag,
    "half": in_its_half,
    "ours": where_its_words_are,
    "ours, median": partial(where_its_words_are, threshold="median", background=""),
}


def outside(beside: Beside, readings: Sequence[Reading]) -> torch.Tensor:
    """(height, width) bool: away from what is seen in the character's half of any of the pictures."""
    axis = torch.arange(REST_SIZE) + 0.5
    free = torch.ones(REST_SIZE, REST_SIZE, dtype=torch.bool)
    for seen in filter(None, map(beside.seen, readings)):
        reach = seen.diameter / 2 + 2
        free &= ~(((axis - seen.y).abs() < reach)[:, None] & ((axis - seen.x).abs() < reach)[None])
    return free


_loaded = cache(host_lab.load)


@cache
def without(loaded, number: int, seeds: tuple[int, ...]) -> torch.Tensor:
    """The pictures of a number's prompt without the character's LoRA."""
    return sample(loaded, loaded.model, *common(loaded, asked(number).text), seeds, size=REST_SIZE)


def asked(number: int) -> Beside:
    """One of twelve: each character on either side."""
    return Beside(list(WORDS)[number % len(WORDS)], number + (number >= len(WORDS)))


def measure_rest(loaded, eye: Eye, adapter: str, arm: str, n: int) -> dict:
    found: dict[str, list] = {"change": [], "identity": [], "valid": []}
    for number in range(2 * len(WORDS)):
        beside, seeds = asked(number), tuple(range(FIRST_SEED + number, FIRST_SEED + n, 2 * len(WORDS)))
        if not seeds:
            continue
        before = without(loaded, number, seeds)
        way = REST_ARMS[arm](loaded, beside, ADAPTERS[adapter]("unet", beside.name))
        with way.acting:
            after = sample(loaded, way.model, way.positive, way.negative, seeds, size=REST_SIZE)
        for one, other, *readings in zip(before, after, eye.read(before), eye.read(after), strict=True):
            found["change"].append(round(float((one - other).abs().mean(-1)[outside(beside, readings)].mean()), 5))
            seen = beside.seen(readings[1])
            found["identity"].append(seen is not None and seen.kind == beside.name)
            found["valid"].append(readings[1].valid > 0.5)
    row = {"part": "rest", "model": "unet", "adapter": adapter, "arm": arm, "n": n}
    return row | {f"{key}_mean": round(sum(values) / len(values), 4) for key, values in found.items()} | _told(found)


# --- together ---------------------------------------------------------------------------------------------------------------------

PARTS = tuple(dict.fromkeys((*ARMS, *REST_ARMS)))


def _told(found: dict[str, list]) -> dict:
    """Case by case: yes and no as a row of ones and noughts."""
    return {key: "".join(str(int(one)) for one in own) if isinstance(own[0], bool) else own for key, own in found.items()}


def cases(row: dict, key: str) -> list:
    return [mark == "1" for mark in row[key]] if isinstance(row[key], str) else row[key]


def figures_of(rows: Sequence[dict]) -> dict[str, Figure]:
    """All figures that rows tell of."""
    figures = {}
    for row in rows:
        if row["part"] == "places" and row["arm"] == "ours":
            head = ("" if row["model"] == "unet" else f"{row['model']}_") + f"auto{row['k']}"
            figures |= {f"{head}_{key}": share(cases(row, key)) for key in ("in_place", "swap")}
    for adapter in ADAPTERS:
        own = {row["arm"]: row for row in rows if row["part"] == "rest" and row["adapter"] == adapter}
        if "everywhere" not in own or "ours" not in own:
            continue
        head = "lag" if adapter == "spoilt" else f"lag_{adapter}"
        left = ratio(cases(own["ours"], "change"), cases(own["everywhere"], "change"))
        figures[f"{head}_background_cut"] = Figure(1 - left.value, 1 - left.high, 1 - left.low, left.n)
        clean = next((row for row in rows if (row["part"], row.get("adapter"), row["arm"]) == ("rest", "clean", "everywhere")), None)
        if adapter == "spoilt" and clean is not None:
            own_share, all_of_it = (
                [a - b for a, b in zip(cases(own[arm], "change"), cases(clean, "change"), strict=True)] for arm in ("ours", "everywhere")
            )
            rest = ratio(own_share, all_of_it)
            figures["lag_background_cut_over_clean"] = Figure(1 - rest.value, 1 - rest.high, 1 - rest.low, rest.n)
        pairs = zip(cases(own["everywhere"], "identity"), cases(own["ours"], "identity"), strict=True)
        figures[f"{head}_identity_loss"] = mean([float(before) - float(after) for before, after in pairs])
    return figures


def measure(sample_only: bool, arms: Sequence[str] = PARTS) -> list[dict]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    rows, eye = [], Eye.load()

    def keep(row: dict) -> None:
        rows.append(row)
        log.info(
            "%s",
            {
                key: value
                for key, value in row.items()
                if not isinstance(value, list) and key not in ("in_place", "swap", "identity", "valid")
            },
        )

    with torch.inference_mode():
        for adapter in ("spoilt",) if sample_only else ADAPTERS:
            for arm in REST_ARMS if adapter == "spoilt" and not sample_only else ("everywhere", "ours"):
                if arm in arms:
                    keep(measure_rest(_loaded("unet"), eye, adapter, arm, 24 if sample_only else REST))
        for (kind, k), (n, own) in (SAMPLE if sample_only else PLACES).items():
            for arm in own:
                if arm in arms:
                    keep(measure_places(_loaded(kind), eye, kind, k, arm, n if arm in FEW else n // 2))
    return rows


def _measure(sample_only: bool, arms: Sequence[str]) -> tuple[dict[str, Figure], list[dict]]:
    rows = measure(sample_only, arms)
    return figures_of(rows), rows


def table(rows: Sequence[dict]) -> str:
    """Shares of places, by arm, model and K, as lines of Markdown."""
    rows = [row for row in rows if row["part"] == "places"]
    cells = list(dict.fromkeys((row["model"], row["k"]) for row in rows))
    titles = [f"{'UNet' if model == 'unet' else 'DiT'}, {k}: {key}" for model, k in cells for key in ("in place", "swapped")]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for arm in ARMS:
        told = []
        for model, k in cells:
            own = [row for row in rows if (row["arm"], row["model"], row["k"]) == (arm, model, k)]
            told += [f"{share(cases(own[0], key)).value:.2f}" if own else "" for key in ("in_place", "swap")]
        lines.append(f"| {arm} | {' | '.join(told)} |")
    return "\n".join(lines)


def rest_table(rows: Sequence[dict]) -> str:
    """What changes outside of the character, and how often it is there, by adapter and arm."""
    rows = [row for row in rows if row["part"] == "rest"]
    lines = [f"| | {' | '.join(f'{adapter}: {key}' for adapter in ADAPTERS for key in ('change', 'identity'))} |"]
    lines.append("|---" * (2 * len(ADAPTERS) + 1) + "|")
    for arm in REST_ARMS:
        told = []
        for adapter in ADAPTERS:
            own = [row for row in rows if (row["arm"], row["adapter"]) == (arm, adapter)]
            told += [f"{own[0]['change_mean']:.4f}", f"{own[0]['identity_mean']:.2f}"] if own else ["", ""]
        lines.append(f"| {arm} | {' | '.join(told)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return _report.run_parts("localize", argv, PARTS, _measure, CLAIMS, itemgetter("arm"), figures_of)
