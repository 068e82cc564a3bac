"""Attend-and-Excite (Chefer et al., arXiv 2301.13826), for UNets: before each step of the first half of sampling the latent is moved so
that each thing's word is attended to somewhere.

    L = max over words of (1 - max over positions of A_word),    z <- z - alpha dL/dz,    alpha = 20 sqrt(1 -> 0.5)

A: attention to the word on one grid, averaged over heads and layers, the softmax over words but the first sharpened by 100, blurred. The
paper's repeated steps at its thresholds are left out: this is one gradient a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import comfy.samplers
import torch

from ..ops.binding import smoothed

FIRST, SIZE, SHARP = 0.5, 20.0, 100.0


class Excite:
    """rows: for each picture, a word's rows for each thing; side: positions a side of the grid that is read."""

    def __init__(self, rows: Sequence[Sequence[Sequence[int]]], side: int):
        self.rows, self.side, self.seen = rows, side, []

    def watching(self, model):
        """A clone of a UNet whose cross-attentions are whole softmaxes that can be seen."""

        def attend(q, k, v, options):
            q, k, v = (part.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for part in (q, k, v))
            shares = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            if torch.is_grad_enabled() and q.shape[2] == self.side**2:
                at, each = options["cond_or_uncond"].index(0), len(q) // len(options["cond_or_uncond"])
                self.seen.append(shares[at * each : (at + 1) * each].mean(1))
            return (shares @ v).transpose(1, 2).flatten(2)

        model = model.clone()
        for block in ("input", "middle", "output"):
            for number in range(12):
                model.set_model_attn2_replace(attend, block, number)
        return model

    def loss(self) -> torch.Tensor:
        """(): the sum over pictures, each of which has a latent of its own."""
        shares = torch.stack(self.seen).mean(0)[..., 1:]
        maps = smoothed((SHARP * shares).softmax(-1).transpose(1, 2), (self.side, self.side))
        worst = [
            torch.stack([1 - maps[picture, [row - 1 for row in word]].mean(0).max() for word in words]).max()
            for picture, words in enumerate(self.rows)
        ]
        return torch.stack(worst).sum()

    def sampler(self):
        """Euler's method, with the latent moved before each step of the first half."""

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
            steps = len(sigmas) - 1
            for step in range(steps):
                sigma = sigmas[step].expand(len(x))
                if step < FIRST * steps:
                    self.seen.clear()
                    with torch.enable_grad():
                        moved = x.detach().requires_grad_()
                        model(moved, sigma, **extra_args)
                        (slope,) = torch.autograd.grad(self.loss(), moved)
                    # The latent of the paper keeps its variance: x is that times sqrt(1 + sigma^2), and its slope as much smaller.
                    size = SIZE * math.sqrt(1 - 0.5 * step / (FIRST * steps))
                    x = x - size * (1 + sigmas[step] ** 2) * slope
                    self.seen.clear()
                with torch.no_grad():
                    denoised = model(x, sigma, **extra_args)
                x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
                if callback is not None:
                    callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
            return x

        return comfy.samplers.KSAMPLER(sample)
