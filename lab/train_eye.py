"""Train the eyes on drawn scenes, on the autoencoder's rebuilds of them, and on spoilt ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from . import corruptions
from .eye import CELL, NETS, Eye
from .judge import auroc, judge, validity
from .pools import Bank
from .scenes import MAX_DIAMETER, SHAPES, Scenes
from .train_denoiser import load_vae
from .train_vae import LATENT_SCALE
from .training import Leg, export, log, mixed, take_over


def targets(scenes: Scenes):
    """Heat map (N, h, w), and the cells that answer for an object: index tensors (picture, row, column, slot)."""
    h, w = scenes.height // CELL, scenes.width // CELL
    device = scenes.count.device
    row = (torch.arange(h, device=device) + 0.5)[:, None] * CELL
    column = (torch.arange(w, device=device) + 0.5)[None, :] * CELL
    distance2 = (column - scenes.x[..., None, None]) ** 2 + (row - scenes.y[..., None, None]) ** 2
    present = scenes.present()[..., None, None]
    heat = torch.where(present, torch.exp(-distance2 / (2 * (0.8 * CELL) ** 2)), 0.0)
    # The cell nearest the centre must read 1 exactly, for the focal loss counts it as the centre.
    nearest = distance2 <= distance2.amin((2, 3), keepdim=True)
    heat = torch.where(nearest & present, 1.0, heat).amax(1)
    answer = torch.nonzero((distance2 < (1.6 * CELL) ** 2) & present, as_tuple=True)
    return heat, (answer[0], answer[2], answer[3], answer[1])


def scene_loss(grid, scene, scenes: Scenes):
    heat, (picture, row, column, slot) = targets(scenes)
    logit = grid["heat"][:, 0].float()
    p = torch.sigmoid(logit).clamp(1e-5, 1 - 1e-5)
    centre = heat == 1
    focal = torch.where(centre, (1 - p) ** 2 * -p.log(), (1 - heat) ** 4 * p**2 * -(1 - p).log())
    loss = focal.sum() / centre.sum().clamp(min=1)

    def at(key):
        return grid[key][picture, :, row, column].float()

    kind = scenes.kind[picture, slot]
    drawn = kind < len(SHAPES)
    loss = loss + F.cross_entropy(at("kind"), kind)
    for key in ("colour", "fill"):
        loss = loss + F.cross_entropy(at(key)[drawn], getattr(scenes, key)[picture, slot][drawn])
    loss = loss + 10 * F.l1_loss(torch.sigmoid(at("diameter")[:, 0]), scenes.diameter[picture, slot] / (1.5 * MAX_DIAMETER))
    # Only where the cell itself can reach the centre: |offset| <= 1 cell.
    dx = scenes.x[picture, slot] / CELL - (column + 0.5)
    dy = scenes.y[picture, slot] / CELL - (row + 0.5)
    loss = loss + F.l1_loss(torch.tanh(at("offset")), torch.stack([dx, dy], 1).clamp(-0.98, 0.98))
    loss = loss + 10 * F.l1_loss(torch.sigmoid(scene["background"][:, 0].float()), scenes.background)
    return loss + F.cross_entropy(scene["style"].float(), scenes.style)


class _Rebuild:
    """The autoencoder, with optional noise on its latents."""

    def __init__(self, vae, device):
        self.vae, self.device = vae, device

    @torch.no_grad()
    def __call__(self, pictures, noise: float = 0.0):
        with mixed(self.device):
            latent = self.vae.quant_conv(self.vae.encoder(pictures * 2 - 1)).chunk(2, 1)[0]
            if noise:
                latent = latent + noise / LATENT_SCALE * torch.randn_like(latent)
            return (self.vae.decoder(self.vae.post_quant_conv(latent)).float() / 2 + 0.5).clamp(0, 1)


def spoilt(kind: int, scenes: Scenes, pictures, rebuild):
    """Pictures spoilt in the taught way number `kind`."""
    ways = list(corruptions.TAUGHT.values())
    if kind < len(ways):
        return ways[kind](pictures)
    if kind == len(ways):
        return corruptions.merge(scenes)
    return rebuild(pictures, noise=0.6 + 0.9 * float(torch.rand(())))


def shaken(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures a little lighter or darker, with a little noise or none: good and spoilt ones alike, or that would tell them apart."""
    light = 0.03 * torch.randn(len(pictures), 1, 1, 1, device=pictures.device)
    noise = 0.012 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device) * torch.randn_like(pictures)
    return (pictures + light + noise).clamp(0, 1)


def train(
    name: str,
    folder: Path,
    *,
    device: str,
    steps: int,
    minutes: float,
    finish: bool,
    batch: int,
    lr: float = 2e-3,
    seed: int = 14,
    start: Path | None = None,
) -> None:
    seed += list(NETS).index(name)  # the eyes share no picture and no batch
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rebuild = _Rebuild(load_vae(folder, device), device)
    # Rebuilds, some a little noisy, stand beside the drawn pictures: they are what image models can reach at best.
    bank = Bank(
        device,
        generator,
        characters=0.12,
        any_background=True,
        rebuild=lambda pictures: rebuild(pictures, noise=0.15 * float(torch.rand(()))),
    )
    module = NETS[name]()
    take_over(module, start, name)
    module.to(device).train()
    leg = Leg(name, module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish)
    ways = len(corruptions.TAUGHT) + 2
    while leg.running():
        scenes, pictures, rebuilt = bank.draw(batch)
        half = len(pictures) // 2
        good = torch.cat([pictures[:half], rebuilt[half:]])
        bad = spoilt(int(torch.randint(ways, ())), scenes, pictures, rebuild)[::2]
        with mixed(device):
            grid, scene = module(torch.cat([shaken(good), shaken(bad)]))
        n = len(good)
        loss = scene_loss({k: v[:n] for k, v in grid.items()}, {k: v[:n] for k, v in scene.items()}, scenes)
        truth = torch.cat([torch.ones(n, device=device), torch.zeros(len(bad), device=device)])
        # A picture that the spoiling happened to leave as it was says nothing.
        changed = ((bad - pictures[::2]).abs().amax(1) > 0.1).flatten(1).sum(1) >= 12
        counts = torch.cat([torch.ones(n, device=device), changed.float()])
        leg.update(loss + F.binary_cross_entropy_with_logits(scene["valid"][:, 0].float(), truth, weight=counts))
    leg.close(state=not finish)
    export(leg.averaged.state_dict(), folder / f"{name}.safetensors")
    _report(Eye(leg.averaged), lambda pictures: rebuild(pictures.to(device)).cpu())


def _report(eye: Eye, rebuild) -> None:
    for shown, told in judge(eye, rebuild, n=1000).items():
        log.info("eye, %s: %s", shown, {key: round(sum(right) / len(right), 4) for key, right in told.items() if right})
    good, spoilt = validity(eye, rebuild, n=500)
    log.info("eye, unseen corruptions, AUROC: %s", {name: round(auroc(good, bad), 4) for name, bad in spoilt.items()})
