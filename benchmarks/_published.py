"""Train a lab slider with the text objective of Concept Sliders (Gandikota et al., arXiv 2311.12092), as its released code has it:

    L = MSE( e_slider(x_t, target), stopgrad[ e(x_t, target) + eta (e(x_t, positive) - e(x_t, negative)) ] )

x_t comes from noise, denoised by the model with the slider on to a random step; all four predictions are plain conditional ones. Only
strength +1 is trained. Rank 4, alpha 1, the layers of the published default ("noxattn": self-attention, residual blocks and samplers, no
cross-attention).
"""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..host import lab as host_lab
from .captions import COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS
from .lowrank import adapt, frozen, parameters, write
from .train_denoiser import sd_alphas
from .train_text import load_encoder, states
from .training import log

RANK, ALPHA = 4, 1.0


class Concept(NamedTuple):
    """What a slider turns: templates for its target and poles; `{thing}` is filled with what must stay as it is."""

    attribute: str
    target: str
    positive: str
    negative: str
    sized: bool = True


CONCEPTS = {
    "background": Concept("background", "{thing} on a grey background", "{thing} on a white background", "{thing} on a black background"),
    "size": Concept("diameter", "a medium {thing}", "a large {thing}", "a small {thing}", sized=False),
}


def things(rng: random.Random, sized: bool) -> str:
    """A thing to preserve: colour and shape, and its size where the slider is not about size (the published preservation prompts)."""
    words = f"{rng.choice(list(COLOUR_WORDS))} {rng.choice(list(SHAPE_WORDS))}"
    if not sized:
        return words
    return f"a {rng.choice(list(SIZE_WORDS))} {words}"


def rank_of(module: str) -> int:
    """The published default's rank for a module; 0 where it has none."""
    wanted = (".attn1.", ".in_layers.", ".out_layers.", ".emb_layers.", ".skip_connection", ".op", ".conv")
    return RANK if any(part in module for part in wanted) else 0


def train(name: str, folder: Path, output: Path, *, device: str, steps: int, eta: float, batch: int, lr: float, seed: int) -> None:
    """Train the slider `name` on the UNet in `folder` and write a LoRA file that any Stable Diffusion 1.5 loader reads."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    concept = CONCEPTS[name]
    encoder = load_encoder(folder, device)
    unet = frozen("unet", folder, device)
    adapters = adapt(unet, rank_of, ALPHA)
    optimizer = torch.optim.AdamW(parameters(adapters), lr=lr, weight_decay=0.0)
    tokenizer, alphas = host_lab.tokenizer(), sd_alphas(device)
    grid = torch.linspace(999, 0, 21, device=device).long()

    def encode(texts):
        ids = torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=77)["input_ids"], device=device)
        return states(encoder, ids)[0]

    def predict(x, t, context, strength):
        for adapter in adapters.values():
            adapter.strength = strength
        return unet(x, t.expand(len(x)), context=context)

    empty = encode([""]).expand(batch, -1, -1)
    for step in range(1, steps + 1):
        phrases = [things(rng, concept.sized) for _ in range(batch)]
        target, positive, negative = (
            encode([template.format(thing=thing) for thing in phrases]) for template in (concept.target, concept.positive, concept.negative)
        )
        with torch.no_grad():
            # A point on the slider's own path: DDIM with guidance 3 from noise to a random step of the grid.
            x = torch.randn(batch, 4, 64 // host_lab.downscale("unet"), 64 // host_lab.downscale("unet"), device=device)
            stop = rng.randrange(0, len(grid) - 1)
            for i in range(stop):
                drawn = predict(torch.cat([x, x]), grid[i], torch.cat([empty, target]), 1.0)
                plain, asked = drawn.chunk(2)
                noise = plain + 3.0 * (asked - plain)
                now, later = alphas[grid[i]], alphas[grid[i + 1]]
                clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
                x = later.sqrt() * clean + (1 - later).sqrt() * noise
            t = grid[stop]
            neutral = predict(x, t, target, 0.0)
            wanted = neutral + eta * (predict(x, t, positive, 0.0) - predict(x, t, negative, 0.0))
        loss = F.mse_loss(predict(x, t, target, 1.0), wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == 1:
            log.info("slider %s: step %d loss %.5f", name, step, float(loss))
    about = {
        "concept": name,
        "poles": [concept.negative.format(thing="").strip(), concept.positive.format(thing="").strip()],
        "range": [-2, 2],
        "objective": f"Concept Sliders text objective, eta {eta:g}, {steps} steps of {batch}, lr {lr:g}, seed {seed}",
        "base": "lab unet",
    }
    write(adapters, "unet", output, about)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py lab slider", description="Train one of the lab's sliders.")
    parser.add_argument("name", choices=sorted(CONCEPTS))
    parser.add_argument("--folder", type=Path, default=host_lab.WEIGHTS, help="where the models lie (default: the shipped ones)")
    parser.add_argument("--output", type=Path, help="file to write (default: lab/runs/NAME.safetensors)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=21)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    output = options.output or Path(__file__).resolve().parent / "runs" / f"{options.name}.safetensors"
    train(
        options.name,
        options.folder,
        output,
        device=options.device,
        steps=options.steps,
        eta=options.eta,
        batch=options.batch,
        lr=options.lr,
        seed=options.seed,
    )
    return 0
