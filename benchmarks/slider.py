"""A shipped slider moves its attribute steadily and far, spoils no picture, and gives the stock LoRA loader's picture at each strength.

For every seed: one prompt, nine strengths from -2 to 2, the attribute read by the eye. Figures, each a mean over seeds:

    spearman        rank correlation of strength and attribute
    span            attribute at +2 minus at -2, as a share of its range in the scenes
    validity_loss   share of valid pictures at strength 0 minus that over all strengths
    control_span    span of a random LoRA of the same layers and norms: must be small, or the measure has no power
    stock_difference  largest difference of our latent from the stock loader's, over strengths
"""

from __future__ import annotations

import random

import torch

from ..host import adapters, lab
from ..host.files import resolve
from ..lab.eye import Eye, Reading
from ..lab.measure import draw
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


def measure_slider(slider: str, file: str, n: int, seed: int, *, lab_model=None, control: bool = True) -> dict[str, Figure]:
    """All figures but the comparison with the stock loader, under the slider's name."""
    lab_model, eye = lab_model or lab.load("unet"), Eye.load()
    values, valid = sweep(lab_model, eye, slider, file, n, seed)
    zero = STRENGTHS.index(0.0)
    figures = {
        f"{slider}_spearman": mean(spearman(values)),
        f"{slider}_span": mean((values[:, -1] - values[:, 0]) / RANGES[slider]),
        f"{slider}_validity_loss": mean(valid[:, zero] - valid.mean(1)),
        f"{slider}_validity_zero": mean(valid[:, zero]),
    }
    if control:
        twin = random_twin(adapters.read(resolve("loras", file)))
        drift, _ = sweep(lab_model, eye, slider, file, max(20, n // 4), seed, lora=twin)
        figures[f"{slider}_control_span"] = mean((drift[:, -1] - drift[:, 0]).abs() / RANGES[slider])
    return figures


def stock_difference(slider: str, file: str) -> Figure:
    """Largest absolute difference of latents, Slider against the stock loader, at four strengths."""
    import comfy.sample
    import comfy.sd
    import comfy.utils

    lab_model = lab.load("unet")
    state = comfy.utils.load_torch_file(str(resolve("loras", file)), safe_load=True)
    tokens = [
        [t, {"pooled_output": p}]
        for t, p in [lab_model.clip.encode_from_tokens(lab_model.clip.tokenize(prompts(slider, 1, 3)[0]), return_pooled=True)]
    ]
    empty = [[t, {"pooled_output": p}] for t, p in [lab_model.clip.encode_from_tokens(lab_model.clip.tokenize(""), return_pooled=True)]]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    differences = []
    for strength in (-2.0, -0.5, 1.0, 2.0):
        ours = Slider.execute(lab_model.model, file, strength, 0.0, 1.0).result[0]
        theirs, _ = comfy.sd.load_lora_for_models(lab_model.model, None, state, strength, 0.0)
        latents = [
            comfy.sample.sample(model, noise, 20, 4.0, "euler", "normal", tokens, empty, torch.zeros_like(noise), disable_pbar=True, seed=1)
            for model in (ours, theirs)
        ]
        differences.append(float((latents[0] - latents[1]).abs().max()))
    return Figure(max(differences), max(differences), max(differences), len(differences))


def _measure(sample: bool):
    n = CHECK_SEEDS if sample else SEEDS
    figures: dict[str, Figure] = {}
    with torch.inference_mode():
        for slider in shipped():
            figures |= measure_slider(slider, f"concept_lab/{slider}.safetensors", n, 40_000 if sample else 20_000, control=not sample)
            if not sample:
                figures[f"{slider}_stock_difference"] = stock_difference(slider, f"concept_lab/{slider}.safetensors")
    return figures, [{"arm": "ours"}, {"arm": "random LoRA of equal norms"}]


def shipped() -> list[str]:
    """The sliders that ship with the pack."""
    return sorted(path.stem for path in (lab.WEIGHTS.parent / "loras" / "concept_lab").glob("*.safetensors") if path.stem in RANGES)


def main(argv: list[str]) -> int:
    return _report.run("slider", argv, _measure)
