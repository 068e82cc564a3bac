"""What a few pictures teach. `python run.py bench residual`.

A character that the lab's models never saw, taught by Train Personalized Residual from four drawn pictures of 64 pixels and read by the eye
(10 Euler steps, CFG 4). In parts: unet, blocks, crowd, dit. For each model,

    MODEL_untaught_identity     pictures of the character where its word is said and nothing was taught
    MODEL_identity, _valid      the same with the residual, and pictures that are not spoilt: the UNet's is on the outputs of the attention
                                blocks, as published, the DiT's on all layers of those blocks but the prompt's; ordinary prompts preserved
    MODEL_shape, _bind          ordinary objects, with it on: right shape; right shape in the right colour
    MODEL_plain_shape, ...      the same without it
    MODEL_mistaken              ordinary objects that became the character
    MODEL_bytes                 of the file; residual_train_seconds: of the longest training
    MODEL_published_*           with nothing preserved and at all noise

and on the UNet, each against one thing changed,

    unet_blocks_*               all layers of the attention blocks, at a rate of their own
    unet_HOW_identity, _moved   prompts of the character on one side, the residual everywhere (off) or localized (median, otsu): pictures of
                                it, and how far the pixels of the other side are from the untaught model's (mean difference, 0 to 1)
    unet_masked_*, unmasked_*   pictures with another object in them and captions that name the character alone: with masks, and without.
                                `alone`: nothing else is drawn
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..host import lab as host_lab
from ..host.localize import MEDIAN, OTSU
from ..host.residual_training import BLOCKS, OUTPUTS, PICTURE
from ..lab.characters import WORDS, ask_for, drawn_hits, surest
from ..lab.eye import Eye
from ..lab.measure import ask, draw, hits
from ..lab.portraits import draw_portraits
from ..lab.scenes import BACKGROUNDS
from ..lab.sliders import scratch_folders
from ..nodes.residual import Residual, ResidualTrain
from ._report import Claim, Figure, mean, run_parts, share

log = logging.getLogger("concept_nodes.bench")
NAME, PICTURES, SIZE, STEPS = "cat", 4, 64, 10
N, SAMPLE = 32, 12  # pictures of each figure: in full, in a check
# Ordinary things that must stay what they are; none of the captions that are measured.
PRESERVED = """a small red circle on the left on a white background
a large blue square in the centre on a dark grey background
a green triangle on the right on a light grey background
a large yellow star at the top on a black background
a small purple heart at the bottom on a white background
a large orange crescent in the centre on a light grey background"""
PUBLISHED = {"preserve": "", "end_percent": 1.0}
UNET = {"steps": 250, "batch": 4, "learning_rate": 1e-2, "rank_share": 0.2, "layers": OUTPUTS, "end_percent": 0.6}
UNET |= {"preserve": PRESERVED, "preserve_weight": 0.1}
DIT = {"steps": 150, "batch": 8, "learning_rate": 4e-3, "rank_share": 0.0125, "layers": PICTURE}
DIT |= {"preserve": PRESERVED, "preserve_weight": 1.0}
WIDE = {"steps": 150, "batch": 4, "learning_rate": 4e-3, "rank_share": 0.05, "layers": BLOCKS, "end_percent": 0.6}
CROWD = {"steps": 150, "batch": 4, "learning_rate": 1e-2, "rank_share": 0.15, "layers": OUTPUTS, "end_percent": 0.6}
CROWD |= {"beside": 1, "prompt": f"a large {WORDS[NAME]}"}
ARMS = {
    "unet": {"unet": UNET, "unet_published": UNET | PUBLISHED},
    "blocks": {"unet_blocks": WIDE},
    "crowd": {"unet_masked": {**CROWD, "masked": True}, "unet_unmasked": CROWD},
    "dit": {"dit": DIT, "dit_published": DIT | PUBLISHED},
}
PARTS = tuple(ARMS)
CLAIMS = {
    "unet_identity": Claim(low=0.8),
    "dit_identity": Claim(low=0.8),
    "unet_shape": Claim(low=0.8),
    "dit_shape": Claim(low=0.8),
    "residual_train_seconds": Claim(high=180),
    "unet_bytes": Claim(high=100_000),
    "dit_bytes": Claim(high=100_000),
}


def teach(loaded, *, beside: int = 0, prompt: str = "", masked: bool = False, **changes) -> tuple[dict, float, int]:
    """The residual, the seconds of the processor's own time that it took, and the bytes of its file."""
    word = WORDS[NAME]
    drawn, masks, captions = draw_portraits(NAME, PICTURES, word=word, height=SIZE, width=SIZE, seed=1, beside=beside)
    given = {"prompt": prompt or "\n".join(captions), "identifier": word, "class_word": "", "seed": 0, "name": NAME, "previews": 0}
    listed = {key: [value] for key, value in (given | changes).items()}
    began = time.process_time()
    with scratch_folders(), torch.inference_mode():
        lora, _, path, report = ResidualTrain.execute(
            [loaded.model], [loaded.clip], [loaded.vae], [drawn], **listed, **({"masks": [masks]} if masked else {})
        ).result
        seconds, size = time.process_time() - began, Path(path).stat().st_size
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


def on_one_side(loaded, lora: dict | None, n: int, localize: str = "off") -> torch.Tensor:
    """Pictures (n, SIZE, SIZE, 3) of prompts that ask for the character on the left, and on the right, in turns."""
    asked = itertools.islice(zip(itertools.cycle(("left", "right")), itertools.cycle(BACKGROUNDS), strict=False), n)
    prompts = [f"a large {WORDS[NAME]} on the {side} on a {ground} background" for side, ground in asked]
    how = {} if localize == "off" else {"localize": localize, "clip": loaded.clip, "prompt": prompts[0]}  # the word stands alike in all
    model = loaded.model if lora is None else put(loaded, lora, **how)
    return draw(loaded, prompts, size=SIZE, seed=9000, model=model, steps=STEPS)


def other_side(pictures: torch.Tensor) -> torch.Tensor:
    """(n, SIZE, SIZE // 2, 3): where the character was not asked for."""
    return torch.stack([picture[:, SIZE // 2 :] if at % 2 == 0 else picture[:, : SIZE // 2] for at, picture in enumerate(pictures)])


def _measure(sample: bool, parts: Sequence[str]) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    eye, n = Eye.load(), SAMPLE if sample else N
    figures: dict[str, Figure] = {}
    rows: list[dict] = []

    def add(part: str, arm: str, found: dict[str, list[bool]], *keys: str, **more) -> None:
        figures.update({f"{arm}_{key}": share(found[key]) for key in keys})
        rows.append({"part": part, "arm": arm, "n": n} | {key: round(sum(values) / n, 4) for key, values in found.items()} | more)
        log.info("%s", rows[-1])

    for part in parts:
        kind = "dit" if part == "dit" else "unet"
        with torch.inference_mode():
            loaded = host_lab.load(kind)
        if part == kind:
            add(part, f"{kind}_untaught", said(loaded, loaded.model, eye, n), "identity", "valid")
            add(part, f"{kind}_plain", ordinary(loaded, loaded.model, eye, n), "shape", "bind")
        for arm, changes in ARMS[part].items():
            lora, seconds, size = teach(loaded, **changes)
            model, crowded = put(loaded, lora), "beside" in changes
            if arm == "unet":
                untaught = other_side(on_one_side(loaded, None, n))
                for how in ("off", MEDIAN, OTSU):
                    pictures = on_one_side(loaded, lora, n, how)
                    moved = (other_side(pictures) - untaught).abs().flatten(1).mean(1)
                    add(part, f"unet_{how}", {"identity": [surest(one) == NAME for one in eye.read(pictures)]}, "identity")
                    figures[f"unet_{how}_moved"] = mean(moved)
            add(part, arm, said(loaded, model, eye, n), "identity", "alone" if crowded else "valid", seconds=round(seconds, 1))
            if not crowded:
                add(part, arm, ordinary(loaded, model, eye, n), "shape", "bind", "mistaken")
                if not sample:
                    figures[f"{arm}_bytes"] = Figure(size, size, size, 1)
    return figures, rows


def seconds_of(rows: list[dict]) -> dict[str, Figure]:
    """The longest of all trainings."""
    took = [row["seconds"] for row in rows if "seconds" in row]
    return {"residual_train_seconds": Figure(max(took), min(took), max(took), len(took))} if took else {}


ROWS = {
    "unet": "UNet, attention outputs",
    "unet_published": "the same at all noise, nothing preserved, as published",
    "unet_blocks": "UNet, attention and feed-forward, nothing preserved",
    "dit": "DiT, attention and feed-forward of the picture",
    "dit_published": "the same, nothing preserved",
    "unet_masked": "UNet, something else in each picture, masks",
    "unet_unmasked": "the same without masks",
    "unet_untaught": "UNet, untaught",
    "dit_untaught": "DiT, untaught",
    "unet_plain": "UNet without a residual",
    "dit_plain": "DiT without a residual",
}
PLACES = {"off": "everywhere", MEDIAN: "localized, median", OTSU: "localized, otsu"}
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
    lines += ["", "| UNet, attention outputs | is the character | the other side moves by |", "|---|---|---|"]
    for how, told in PLACES.items():
        moved = figures[f"unet_{how}_moved"]
        lines.append(f"| {told} | {cell(figures[f'unet_{how}_identity'])} | {moved.value:.4f} [{moved.low:.4f}, {moved.high:.4f}] |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return run_parts("residual", argv, PARTS, _measure, CLAIMS, joint=seconds_of)
