"""What a few pictures teach. `python run.py bench residual`.

A character that the lab's models never saw, taught by Train Personalized Residual from four drawn pictures of 64 pixels and read by the eye
(10 Euler steps, CFG 4). For each model,

    MODEL_untaught_identity     pictures of the character where its word is said and nothing was taught
    MODEL_identity, _valid      the same with the residual, trained as published but for the rate; and pictures that are not spoilt
    MODEL_shape, _bind          ordinary objects, with it on: right shape; right shape in the right colour
    MODEL_plain_shape, ...      the same without it
    MODEL_mistaken              ordinary objects that became the character
    residual_train_seconds      of the longest of these trainings; residual_bytes: of the largest file

and on the UNet, each against one thing changed,

    unet_blocks_*               all layers of the attention blocks instead of their outputs, at a rate of their own
    unet_pair_HOW_*             prompts of the character and another object beside it, with the residual everywhere (off) or localized
                                (median, otsu): pictures with the character, with the other as it was asked for, with both
    unet_masked_*, unmasked_*   pictures with another object in them and captions that name the character alone: with masks, and
                                without. `alone`: nothing else is drawn
"""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path

import torch

from ..host import lab as host_lab
from ..host.localize import MEDIAN, OTSU
from ..host.residual_training import BLOCKS, OUTPUTS
from ..lab.characters import WORDS, ask_for, drawn_hits, surest
from ..lab.eye import Eye
from ..lab.measure import ask, draw, hits
from ..lab.portraits import draw_portraits
from ..lab.scenes import COLOURS, SHAPES
from ..lab.sliders import scratch_folders
from ..nodes.residual import Residual, ResidualTrain
from ._report import Claim, Figure, run, share

log = logging.getLogger("concept_nodes.bench")
NAME, PICTURES, SIZE, STEPS = "cat", 4, 64, 10
N, SAMPLE = 32, 12  # pictures of each figure: in full, in a check
RECIPES = {
    "unet": {"steps": 150, "batch": 4, "learning_rate": 1e-2, "rank_share": 0.15, "layers": OUTPUTS},
    "dit": {"steps": 150, "batch": 8, "learning_rate": 3e-3, "rank_share": 0.05, "layers": OUTPUTS},
}
CLAIMS = {
    "unet_identity": Claim(low=0.8),
    "dit_identity": Claim(low=0.8),
    "unet_shape": Claim(low=0.8),
    "dit_shape": Claim(low=0.8),
    "residual_train_seconds": Claim(high=180),
    "residual_bytes": Claim(high=100_000),
}


def teach(loaded, *, beside: int = 0, prompt: str = "", masked: bool = False, **changes) -> tuple[dict, float, int]:
    """The residual, the seconds that it took, the bytes of its file."""
    word = WORDS[NAME]
    drawn, masks, captions = draw_portraits(NAME, PICTURES, word=word, height=SIZE, width=SIZE, seed=1, beside=beside)
    given = {"prompt": prompt or "\n".join(captions), "identifier": word, "class_word": "", "seed": 0, "name": NAME, "previews": 0}
    listed = {key: [value] for key, value in (given | changes).items()}
    began = time.monotonic()
    with scratch_folders(), torch.inference_mode():
        lora, _, path, report = ResidualTrain.execute(
            [loaded.model], [loaded.clip], [loaded.vae], [drawn], **listed, **({"masks": [masks]} if masked else {})
        ).result
        seconds, size = time.monotonic() - began, Path(path).stat().st_size
    log.info("%s: %.0f s, %d bytes", report.splitlines()[1], seconds, size)
    return lora, seconds, size


def put(loaded, lora: dict, **how):
    """The model with the residual on it."""
    return Residual.execute(loaded.model, "none", 1.0, 0.0, 1.0, lora=lora, **how).result[0]


def said(loaded, model, eye: Eye, n: int) -> dict[str, list[bool]]:
    """What pictures hold whose prompts say the character's word, picture by picture."""
    asked = ask_for(NAME, n, size=SIZE, seed=764)
    return drawn_hits(NAME, asked, eye.read(draw(loaded, list(asked), size=SIZE, seed=7000, model=model, steps=STEPS)))


def ordinary(loaded, model, eye: Eye, n: int) -> dict[str, list[bool]]:
    """The same of ordinary objects."""
    asked = ask(n, objects=1, size=SIZE, seed=864, plain=True)
    readings = eye.read(draw(loaded, list(asked), size=SIZE, seed=8000, model=model, steps=STEPS))
    found = hits(asked, readings)
    return {"shape": found["shapes"], "bind": found["bind"], "mistaken": [surest(reading) == NAME for reading in readings]}


def beside(loaded, lora: dict | None, eye: Eye, n: int, localize: str) -> dict[str, list[bool]]:
    """What pictures hold that ask for the character on the left and an ordinary object on the right: it, the other as asked, both."""
    both = list(itertools.product(SHAPES, COLOURS))
    others = [both[at * len(both) // n] for at in range(n)]
    prompts = [f"a large {WORDS[NAME]} on the left and a large {colour} {shape} on the right" for shape, colour in others]
    how = {} if localize == "off" else {"localize": localize, "clip": loaded.clip, "prompt": prompts[0]}  # the word stands alike in all
    model = loaded.model if lora is None else put(loaded, lora, **how)
    readings = eye.read(draw(loaded, prompts, size=SIZE, seed=9000, model=model, steps=STEPS))
    found: dict[str, list[bool]] = {"character": [], "other": [], "both": []}
    for (shape, colour), reading in zip(others, readings, strict=True):
        seen = {(one.kind, one.colour) for one in reading.objects}
        found["character"].append(any(kind == NAME for kind, _ in seen))
        found["other"].append((shape, colour) in seen)
        found["both"].append(found["character"][-1] and found["other"][-1])
    return found


def _measure(sample: bool) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    eye, n = Eye.load(), SAMPLE if sample else N
    figures: dict[str, Figure] = {}
    rows, took, sizes = [], [], []

    def add(arm: str, found: dict[str, list[bool]], *keys: str) -> None:
        figures.update({f"{arm}_{key}": share(found[key]) for key in keys})
        rows.append({"arm": arm, "n": n} | {key: round(sum(values) / n, 4) for key, values in found.items()})
        log.info("%s", rows[-1])

    for kind in host_lab.MODELS:
        with torch.inference_mode():
            loaded = host_lab.load(kind)
        arms = {kind: RECIPES[kind]}
        if kind == "unet":
            arms["unet_blocks"] = RECIPES[kind] | {"layers": BLOCKS, "learning_rate": 4e-3, "rank_share": 0.05}
            crowd = RECIPES[kind] | {"beside": 1, "prompt": f"a large {WORDS[NAME]}"}
            arms |= {"unet_masked": {**crowd, "masked": True}, "unet_unmasked": crowd}
        add(f"{kind}_untaught", said(loaded, loaded.model, eye, n), "identity", "valid")
        add(f"{kind}_plain", ordinary(loaded, loaded.model, eye, n), "shape", "bind")
        for arm, changes in arms.items():
            lora, seconds, size = teach(loaded, **changes)
            model, crowded = put(loaded, lora), "beside" in changes
            if arm == "unet":
                for how in ("off", MEDIAN, OTSU):
                    add(f"unet_pair_{how}", beside(loaded, lora, eye, n, how), "character", "other", "both")
                add("unet_pair_untaught", beside(loaded, None, eye, n, "off"), "character", "other", "both")
            add(arm, said(loaded, model, eye, n), "identity", "alone" if crowded else "valid")
            if not crowded:
                add(arm, ordinary(loaded, model, eye, n), "shape", "bind", "mistaken")
                took.append(seconds)
                sizes.append(size)
    if not sample:
        figures |= {
            key: Figure(max(values), min(values), max(values), len(values))
            for key, values in (("residual_train_seconds", took), ("residual_bytes", sizes))
        }
    return figures, rows


ROWS = {
    "unet": "UNet, as published",
    "unet_blocks": "UNet, all layers of the blocks",
    "dit": "DiT, as published",
    "unet_masked": "UNet, something else in each picture, masks",
    "unet_unmasked": "the same without masks",
    "unet_untaught": "UNet, untaught",
    "dit_untaught": "DiT, untaught",
    "unet_plain": "UNet without a residual",
    "dit_plain": "DiT without a residual",
}
PAIRS = {"untaught": "untaught", "off": "everywhere", MEDIAN: "localized, median", OTSU: "localized, otsu"}
COLUMNS = {
    "identity": "is the character",
    "alone": "and nothing else",
    "valid": "not spoilt",
    "shape": "ordinary: shape",
    "bind": "and colour",
    "mistaken": "became it",
}


def table(figures: dict[str, Figure]) -> str:
    """The figures as lines of Markdown, an arm in each."""

    def cell(figure: Figure | None) -> str:
        return "" if figure is None else f"{figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]"

    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {told} | {' | '.join(cell(figures.get(f'{arm}_{key}')) for key in COLUMNS)} |" for arm, told in ROWS.items()]
    lines += ["", "| the character and another object | the character | the other | both |", "|---|---|---|---|"]
    for how, told in PAIRS.items():
        lines.append(f"| {told} | {' | '.join(cell(figures[f'unet_pair_{how}_{key}']) for key in ('character', 'other', 'both'))} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return run("residual", argv, _measure, CLAIMS)
