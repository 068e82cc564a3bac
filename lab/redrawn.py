"""Drawn scenes as the UNet redraws them: what the decoder gets to see, beside what it should show."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ..host import lab as host_lab
from .captions import COMPLETE, Writer, write_captions
from .lowrank import frozen
from .scenes import render, sample_scenes
from .train_denoiser import encode_scenes, load_vae, sd_alphas, walk
from .train_text import load_encoder, states

# (height, width): ({objects: weight}, pictures for every 1,000 of `size`)
SHARES = {(64, 64): ({1: 0.6, 2: 0.4}, 200), (128, 128): ({1: 0.6, 2: 0.2, 3: 0.1, 6: 0.1}, 400), (64, 96): ({1: 0.4, 2: 0.4, 3: 0.2}, 80)}
STARTS = (0.15, 0.55)  # shares of the schedule: the noise of sigma .3 to 2, where places and shapes stay and small faults come in
STEPS, GUIDANCE, BATCH = 6, 3.0, 32


class Redrawn:
    """Pairs of latents that the UNet in a folder made of noised scenes and the scenes' pictures, made once."""

    def __init__(self, folder: Path, device: str, generator: torch.Generator, size: int = 4000):
        module, encoder, vae = frozen("unet", folder, device), load_encoder(folder, device), load_vae(folder, device)
        tokenizer, rng, alphas = host_lab.tokenizer(), random.Random(generator.initial_seed()), sd_alphas(device)
        self.parts, self.device = [], device
        for (height, width), (counts, share) in SHARES.items():
            latents, pictures = [], []
            for _ in range(max(1, size * share // 1000 // BATCH)):
                scenes = sample_scenes(BATCH, height=height, width=width, counts=counts, generator=generator)
                captions, _ = write_captions(scenes, Writer(COMPLETE, rng))
                words = tokenizer([*captions, *[""] * BATCH], padding="max_length", truncation=True, max_length=77)["input_ids"]
                with torch.no_grad():
                    context, pooled = states(encoder, torch.tensor(words, device=device))
                start = STARTS[0] + (STARTS[1] - STARTS[0]) * rng.random()
                alpha = alphas[int(999 * start)]
                clean = encode_scenes(scenes, vae, device).float()
                noise = torch.randn(clean.shape, generator=generator).to(device)
                noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
                settings = {"device": device, "start": start, "steps": STEPS, "cfg": GUIDANCE}
                latents.append(walk("unet", module, noised, context, pooled, **settings).half())
                pictures.append((render(scenes.to(device)) * 255).round().to(torch.uint8))
            self.parts.append((torch.cat(latents), torch.cat(pictures)))
        self.shares = torch.tensor([float(len(latents)) for latents, _ in self.parts])

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next random batch: latents and pictures (m, 3, H, W) in 0..1, with m so that they hold about n * 64 * 64 pixels."""
        latents, pictures = self.parts[int(torch.multinomial(self.shares, 1))]
        rows = torch.randint(len(latents), (max(1, n * 64 * 64 // (pictures.shape[2] * pictures.shape[3])),)).to(self.device)
        return latents[rows].float(), pictures[rows].float() / 255
