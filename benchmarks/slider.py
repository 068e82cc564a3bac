"""A shipped slider moves its attribute steadily and far, spoils no picture, and gives the stock LoRA loader's picture at each strength.

For every seed: one prompt, nine strengths from -2 to 2, the attribute read by the eye. Figures, each over seeds:

    spearman             mean rank correlation of strength and attribute
    span                 attribute at +2 minus at -2, as a share of its range in the scenes
    seen                 share of pictures in which there is anything to measure; the two above leave out seeds with one unseen
    validity_zero        share of valid pictures at strength 0
    validity_loss_worst  validity_zero minus the share at the worst strength
    stock_difference     largest difference of our latent from the stock loader's, over four strengths
    control_span         span of a random LoRA of the same layers and norms: must be small, or the measure has no power
"""

from __future__ import annotations

import random

import torch

from ..host import adapters, lab
from ..host.files import resolve
from ..lab import sliders
from ..lab.attributes import attribute
from ..lab.eye import Eye
from ..lab.measure import draw
from ..lab.scenes import COLOURS, SHAPES, SIZES
from ..lab.sliders import file_of
from ..nodes.sliders import Slider
from . import _report
from ._report import Claim, Figure, mean, share
from .sliders import random_twin, span, spearman, stock_differences

STRENGTHS = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
SEEDS, SAMPLE = 240, 40
FIRST_SEED = 20_000

CLAIMS = {
    "spearman": Claim(low=0.9),
    "span": Claim(low=0.5),
    "seen": Claim(low=0.97),
    "validity_loss_worst": Claim(high=0.03),
    "stock_difference": Claim(high=1e-3),
    "control_span": Claim(high=0.1),
}


def prompt(slider: str, seed: int) -> str:
    """The prompt of a seed: it leaves the attribute at its middle."""
    rng = random.Random(seed)
    size = rng.choice(SIZES) if slider == "background" else "medium"
    background = "grey" if slider == "background" else rng.choice(("black", "dark grey", "light grey", "white"))
    return f"a {size} {rng.choice(COLOURS)} {rng.choice(SHAPES)} on a {background} background"


def sweep(lab_model, eye: Eye, slider: str, file: str, seeds: list[int], lora=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(seeds, strengths) attribute (NaN where nothing is seen) and validity, through the Slider node and the host's sampler."""
    texts = [prompt(slider, seed) for seed in seeds]
    values, valid = [], []
    for strength in STRENGTHS:
        model = Slider.execute(lab_model.model, "none" if lora else file, strength, 0.0, 1.0, lora).result[0]
        pictures = draw(lab_model, texts, size=64, seeds=seeds, model=model)
        readings = eye.read(pictures)
        values.append([attribute(slider, *pair) for pair in zip(pictures, readings, strict=True)])
        valid.append([float(reading.valid > 0.5) for reading in readings])
    return torch.tensor(values).T, torch.tensor(valid).T


def measure_slider(slider: str, file: str, seeds: list[int], *, full: bool) -> tuple[dict[str, Figure], list[dict]]:
    """The figures of one slider, under its name, and what each arm did strength by strength."""
    lab_model, eye = lab.load("unet"), Eye.load()
    values, valid = sweep(lab_model, eye, slider, file, seeds)
    whole = values[~values.isnan().any(1)]
    plain = valid[:, STRENGTHS.index(0.0)]
    figures = {
        "spearman": mean(spearman(whole)),
        "span": mean(span(slider, whole)),
        "seen": share(~values.isnan().flatten()),
        "validity_zero": share(plain),
    }
    arms = [arm(slider, "ours", values, valid)]
    if full:
        lost = plain[:, None] - valid
        figures["validity_loss_worst"] = mean(lost[:, int(lost.mean(0).argmax())])
        figures["stock_difference"] = mean(stock_differences(lab_model, [prompt(slider, seed) for seed in seeds[:8]], file, seeds[:8]))
        twin = random_twin(adapters.read(resolve("loras", file)))
        values, valid = sweep(lab_model, eye, slider, file, seeds[: len(seeds) // 4], lora=twin)
        figures["control_span"] = mean(span(slider, values[~values.isnan().any(1)]).abs())
        arms.append(arm(slider, "random LoRA of equal norms", values, valid))
    return {f"{slider}_{key}": figure for key, figure in figures.items()}, arms


def arm(slider: str, name: str, values: torch.Tensor, valid: torch.Tensor) -> dict:
    """One arm's course: mean attribute, where seen, and share of valid pictures at each strength."""
    return {
        "slider": slider,
        "arm": name,
        "n": len(values),
        "strength": STRENGTHS,
        "attribute": [round(value, 4) for value in values.nanmean(0).tolist()],
        "valid": [round(value, 4) for value in valid.mean(0).tolist()],
    }


def _measure(sample: bool):
    seeds = list(range(FIRST_SEED, FIRST_SEED + SEEDS))
    if sample:
        seeds = sorted(random.SystemRandom().sample(seeds, SAMPLE))
    figures: dict[str, Figure] = {}
    arms: list[dict] = []
    with torch.inference_mode():
        for slider in shipped():
            found, courses = measure_slider(slider, file_of("unet", slider), seeds, full=not sample)
            figures |= found
            arms += courses
    return figures, arms


def claims() -> dict[str, Claim]:
    """What is claimed of every shipped slider, by the figure's name."""
    return {f"{slider}_{key}": claim for slider in shipped() for key, claim in CLAIMS.items()}


def shipped() -> list[str]:
    """The sliders that ship with the pack."""
    return [name for name in ("background", "size") if name in sliders.shipped("unet")]


def main(argv: list[str]) -> int:
    lab.show_files()
    return _report.run("slider", argv, _measure, claims())
