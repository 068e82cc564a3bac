"""A shipped slider moves its attribute steadily and far, spoils no picture, and gives the stock LoRA loader's picture at each strength.

For every seed: one prompt, nine strengths from -2 to 2, the attribute read by the eye. Figures, each a mean over seeds:

    spearman        rank correlation of strength and attribute
    span            attribute at +2 minus at -2, as a share of its range in the scenes
    validity_loss   share of valid pictures at strength 0 minus that over all strengths; `_worst`: at the worst strength
    control_span    absolute span of a random LoRA of the same layers and norms: must be small, or the measure has no power
    stock_difference  largest difference of our latent from the stock loader's, over strengths
"""

from __future__ import annotations

import random

import torch

from ..host import adapters, lab
from ..host.files import resolve
from ..lab.eye import Eye, Reading
from ..lab.measure import draw, draw_latents
from ..lab.scenes import BACKGROUND_RANGES, COLOURS, MAX_DIAMETER, MIN_DIAMETER, SHAPES, SIZES
from ..nodes.sliders import Slider
from . import _report
from ._report import Figure, mean

STRENGTHS = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
SEEDS, CHECK_SEEDS = 240, 40
RANGES = {"background": BACKGROUND_RANGES[-1][1] - BACKGROUND_RANGES[0][0], "size": MAX_DIAMETER - MIN_DIAMETER}


def prompts(slider: str, n: int, seed: int) -> list[str]:
    """One prompt per seed that leaves the attribute at its middle."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        size = rng.choice(SIZES) if slider == "background" else "medium"
        background = "grey" if slider == "background" else rng.choice(("black", "dark grey", "light grey", "white"))
        made.append(f"a {size} {rng.choice(COLOURS)} {rng.choice(SHAPES)} on a {background} background")
    return made


def attribute(slider: str, reading: Reading) -> float:
    """What the slider is meant to move, as the eye reads it; where no object is seen its size is nothing."""
    if slider == "background":
        return reading.background
    return reading.objects[0].diameter if reading.objects else 0.0


def spearman(values: torch.Tensor) -> torch.Tensor:
    """(N, K) values at K rising strengths -> (N,) rank correlations, ties at their middle rank."""
    less = (values[:, :, None] > values[:, None, :]).sum(-1).double()
    equal = (values[:, :, None] == values[:, None, :]).sum(-1).double()
    ranks = less + (equal - 1) / 2
    steps = torch.arange(values.shape[1], dtype=torch.float64)
    ranks, steps = ranks - ranks.mean(1, keepdim=True), steps - steps.mean()
    spread = ranks.norm(dim=1) * steps.norm()
    return torch.where(spread > 0, (ranks * steps).sum(1) / spread.clamp(min=1e-12), torch.zeros_like(spread))


def sweep(lab_model, eye: Eye, slider: str, file: str, n: int, seed: int, lora=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, strengths) attribute and validity, through the Slider node and the host's sampler."""
    texts = prompts(slider, n, seed)
    values, valid = [], []
    for strength in STRENGTHS:
        model = Slider.execute(lab_model.model, "none" if lora else file, strength, 0.0, 1.0, lora).result[0]
        readings = eye.read(draw(lab_model, texts, size=64, seed=seed, model=model))
        values.append([attribute(slider, reading) for reading in readings])
        valid.append([float(reading.valid > 0.5) for reading in readings])
    return torch.tensor(values).T, torch.tensor(valid).T


def random_twin(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA of the same layers and norms pointing nowhere in particular."""
    generator = torch.Generator().manual_seed(7)

    def like(tensor):
        drawn = torch.randn(tensor.shape, generator=generator)
        return drawn * tensor.float().norm() / drawn.norm()

    return {key: tensor if key.endswith("alpha") else like(tensor) for key, tensor in state.items()}


def measure_slider(slider: str, file: str, n: int, seed: int, *, control: bool) -> tuple[dict[str, Figure], list[dict]]:
    """All figures of one slider, under its name, and what each arm did strength by strength."""
    lab_model, eye = lab.load("unet"), Eye.load()
    values, valid = sweep(lab_model, eye, slider, file, n, seed)
    plain = valid[:, STRENGTHS.index(0.0)]
    lost = plain[:, None] - valid
    worst = int(lost.mean(0).argmax())
    figures = {
        "spearman": mean(spearman(values)),
        "span": mean((values[:, -1] - values[:, 0]) / RANGES[slider]),
        "validity_zero": mean(plain),
        "validity_loss": mean(lost.mean(1)),
        "validity_loss_worst": mean(lost[:, worst]),
        "stock_difference": mean(stock_differences(lab_model, slider, file, seed)),
    }
    arms = [arm(slider, "ours", values, valid)]
    if control:
        twin = random_twin(adapters.read(resolve("loras", file)))
        values, valid = sweep(lab_model, eye, slider, file, n // 4, seed, lora=twin)
        figures["control_span"] = mean((values[:, -1] - values[:, 0]).abs() / RANGES[slider])
        arms.append(arm(slider, "random LoRA of equal norms", values, valid))
    return {f"{slider}_{key}": figure for key, figure in figures.items()}, arms


def arm(slider: str, name: str, values: torch.Tensor, valid: torch.Tensor) -> dict:
    """One arm's course: mean attribute and share of valid pictures at each strength."""
    return {
        "slider": slider,
        "arm": name,
        "n": len(values),
        "strength": STRENGTHS,
        "attribute": [round(value, 4) for value in values.mean(0).tolist()],
        "valid": [round(value, 4) for value in valid.mean(0).tolist()],
    }


def stock_differences(lab_model, slider: str, file: str, seed: int, n: int = 8) -> torch.Tensor:
    """(n,) largest absolute difference of a latent, Slider against the stock loader, over four strengths."""
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(resolve("loras", file)), safe_load=True)
    texts = prompts(slider, n, seed)
    differences = []
    for strength in (-2.0, -0.5, 1.0, 2.0):
        ours = Slider.execute(lab_model.model, file, strength, 0.0, 1.0).result[0]
        theirs, _ = comfy.sd.load_lora_for_models(lab_model.model, None, state, strength, 0.0)
        pair = [draw_latents(lab_model, texts, size=64, seed=seed, model=model) for model in (ours, theirs)]
        differences.append((pair[0] - pair[1]).abs().flatten(1).amax(1))
    return torch.stack(differences).amax(0)


def _measure(sample: bool):
    n, seed = (CHECK_SEEDS, 40_000) if sample else (SEEDS, 20_000)
    figures: dict[str, Figure] = {}
    arms: list[dict] = []
    with torch.inference_mode():
        for slider in shipped():
            found, courses = measure_slider(slider, f"concept_lab/{slider}.safetensors", n, seed, control=not sample)
            figures |= found
            arms += courses
    if sample:
        # What is nearly nothing by design is bounded by tests; a small sample of it says no more.
        figures = {key: figure for key, figure in figures.items() if not key.endswith(("stock_difference", "_worst"))}
    return figures, arms


def shipped() -> list[str]:
    """The sliders that ship with the pack."""
    return sorted(path.stem for path in (lab.LORAS / "concept_lab").glob("*.safetensors") if path.stem in RANGES)


def main(argv: list[str]) -> int:
    lab.show_loras()
    return _report.run("slider", argv, _measure)
