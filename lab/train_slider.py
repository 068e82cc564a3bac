"""Train a lab slider with the text objective of Concept Sliders (Gandikota et al., arXiv 2311.12092), as its released code has it:

    L = MSE( e_slider(x_t, target), stopgrad[ e(x_t, target) + eta (e(x_t, positive) - e(x_t, negative)) ] )

x_t comes from noise, denoised by the model with the slider on to a random step; all four predictions are plain conditional ones. Only
strength +1 is trained. Rank 4, alpha 1, the layers of the published default ("noxattn": self-attention, residual blocks and samplers, no
cross-attention).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ..host import lab as host_lab
from .captions import COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS
from .train_denoiser import sd_alphas
from .train_text import load_encoder, states

log = logging.getLogger("concept_nodes.lab")

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


class Adapter(nn.Module):
    """One layer's low-rank pair while it trains; replaces the layer's forward."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            rank = min(RANK, layer.in_channels, layer.out_channels)
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            rank = min(RANK, layer.in_features, layer.out_features)
            self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.strength, self.scale = 0.0, ALPHA / rank
        self.plain = layer.forward
        layer.forward = self.forward  # the method, not the module: torch would take a module for a part of the layer

    def forward(self, x):
        y = self.plain(x)
        return y + self.strength * self.scale * self.up(self.down(x)) if self.strength else y


def adapt(unet: nn.Module) -> dict[str, Adapter]:
    """Adapters on every layer of the published default, by module name."""
    adapters = {}
    for name, layer in list(unet.named_modules()):
        wanted = isinstance(layer, (nn.Linear, nn.Conv2d)) and any(
            part in name for part in (".attn1.", ".in_layers.", ".out_layers.", ".emb_layers.", ".skip_connection", ".op", ".conv")
        )
        if wanted:
            adapters[name] = Adapter(layer)
    return adapters


def train(name: str, folder: Path, output: Path, *, device: str, steps: int, eta: float, batch: int, lr: float, seed: int) -> None:
    """Train the slider `name` on the UNet in `folder` and write a LoRA file that any Stable Diffusion 1.5 loader reads."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    concept = CONCEPTS[name]
    encoder = load_encoder(folder, device)
    tensors, config = host_lab.read_weights(folder / "unet.safetensors")
    unet = host_lab.build_unet_module()
    unet.load_state_dict({key: value.float() for key, value in tensors.items()})
    unet.to(device).eval().requires_grad_(False)
    adapters = adapt(unet)
    trained = nn.ModuleList(adapters.values()).to(device)
    for adapter in adapters.values():
        adapter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
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
    write(adapters, output, about)


def write(adapters: dict[str, Adapter], path: Path, about: dict) -> None:
    """A LoRA file under the published names (`lora_unet_<diffusers path>`), what it is in its header."""
    import comfy.utils

    names = {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for theirs, ours in comfy.utils.unet_to_diffusers(host_lab.UNET_CONFIG).items()
    }
    state = {}
    for name, adapter in adapters.items():
        key = "lora_unet_" + names[name].replace(".", "_")
        state[f"{key}.lora_down.weight"] = adapter.down.weight.detach().half().cpu().contiguous()
        state[f"{key}.lora_up.weight"] = adapter.up.weight.detach().half().cpu().contiguous()
        state[f"{key}.alpha"] = torch.tensor(ALPHA)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt", "concept_nodes": json.dumps(about)})
    log.info("wrote %s (%d layers, %.0f kB)", path, len(adapters), path.stat().st_size / 1e3)


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
