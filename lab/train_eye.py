"""Train the eye on drawn scenes, on the autoencoder's rebuilds of them, and on spoilt ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from . import corruptions
from .eye import CELL, EyeNet, _decode
from .pools import Bank
from .scenes import KINDS, MAX_DIAMETER, SHAPES, Scenes
from .train_denoiser import load_vae
from .train_vae import LATENT_SCALE
from .training import Leg, export, log


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
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
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


def train(folder: Path, *, device: str, steps: int, minutes: float, finish: bool, batch: int, lr: float = 2e-3, seed: int = 14) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rebuild = _Rebuild(load_vae(folder, device), device)
    bank = Bank(device, generator, characters=0.12, any_background=True)
    module = EyeNet().to(device).train()
    leg = Leg("eye", module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish)
    ways = len(corruptions.TAUGHT) + 2
    while leg.running():
        scenes, pictures = bank.draw(batch)
        half = len(pictures) // 2
        # Rebuilds, some a little noisy, stand beside the drawn pictures: they are what image models can reach at best.
        good = torch.cat([pictures[:half], rebuild(pictures[half:], noise=0.15 * float(torch.rand(())))])
        good = (good + 0.03 * torch.randn(len(good), 1, 1, 1, device=device) + 0.008 * torch.randn_like(good)).clamp(0, 1)
        bad = spoilt(int(torch.randint(ways, ())), scenes, pictures, rebuild)[::2]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            grid, scene = module(torch.cat([good, bad]))
        n = len(good)
        loss = scene_loss({k: v[:n] for k, v in grid.items()}, {k: v[:n] for k, v in scene.items()}, scenes)
        truth = torch.cat([torch.ones(n, device=device), torch.zeros(len(bad), device=device)])
        leg.update(loss + F.binary_cross_entropy_with_logits(scene["valid"][:, 0].float(), truth))
    leg.close(state=not finish)
    judge(leg.averaged.eval(), Bank(device, generator, characters=0.12, size=3000), rebuild)
    export(leg.averaged.state_dict(), folder / "eye.safetensors")


@torch.no_grad()
def judge(net, bank, rebuild) -> dict[str, float]:
    """Shares read rightly on new scenes, drawn and rebuilt; area under the ROC curve of validity on corruptions never taught."""
    figures: dict[str, float] = {}
    for name, change in (("true", lambda p: p), ("recon", rebuild)):
        right, total = {"found": 0, "kind": 0, "colour": 0, "fill": 0}, 0
        scene_right, scenes_seen, size_error = {"background": 0, "style": 0}, 0, []
        for _ in range(8):
            scenes, pictures = bank.draw(256)
            grid, scene = net(change(pictures))
            readings = _decode(grid, scene, 0.35)
            truth = scenes.to("cpu")
            for i, reading in enumerate(readings):
                scenes_seen += 1
                scene_right["background"] += abs(reading.background - float(truth.background[i])) < 0.08
                scene_right["style"] += reading.style == ("flat", "neon", "shaded", "vintage")[int(truth.style[i])]
                right["found"] += len(reading.objects) == int(truth.count[i])
                for k in range(int(truth.count[i])):
                    total += 1
                    seen = min(reading.objects, key=lambda o: (o.x - truth.x[i, k]) ** 2 + (o.y - truth.y[i, k]) ** 2, default=None)
                    if seen is None:
                        continue
                    kind = int(truth.kind[i, k])
                    right["kind"] += seen.kind == KINDS[kind]
                    size_error.append(abs(seen.diameter - float(truth.diameter[i, k])))
                    if kind < len(SHAPES):
                        from .scenes import COLOURS, FILLS

                        right["colour"] += seen.colour == COLOURS[int(truth.colour[i, k])]
                        right["fill"] += seen.fill == FILLS[int(truth.fill[i, k])]
                    else:
                        right["colour"] += 1
                        right["fill"] += 1
        figures |= {f"{name}_{key}": value / (scenes_seen if key == "found" else total) for key, value in right.items()}
        figures |= {f"{name}_{key}": value / scenes_seen for key, value in scene_right.items()}
        figures[f"{name}_size_error"] = sum(size_error) / max(1, len(size_error))
    good, spoilt_scores = [], {name: [] for name in corruptions.UNSEEN}
    for _ in range(8):
        _, pictures = bank.draw(256)
        good.append(net(rebuild(pictures))[1]["valid"][:, 0])
        for name, way in corruptions.UNSEEN.items():
            spoilt_scores[name].append(net(way(pictures))[1]["valid"][:, 0])
    good = torch.cat(good)
    for name, scores in spoilt_scores.items():
        figures[f"auroc_{name}"] = float((good[:, None] > torch.cat(scores)[None]).float().mean())
    log.info("eye: %s", {key: round(value, 4) for key, value in figures.items()})
    return figures
