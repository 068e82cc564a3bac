"""Train the lab's autoencoder: 3 channels to 4 at an eighth of the size, by reconstruction, with latents of unit spread."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ..host import lab as host_lab
from .pools import Bank
from .scenes import render, sample_scenes
from .training import Leg, export, initialise, log

LATENT_SCALE = 0.18215  # the host multiplies SD1.5 latents by this on their way in


def _edges(picture):
    return picture[..., :, 1:] - picture[..., :, :-1], picture[..., 1:, :] - picture[..., :-1, :]


def train(folder: Path, *, device: str, steps: int, minutes: float, finish: bool, batch: int, lr: float = 1e-3, seed: int = 11) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = host_lab.build_vae_module()
    initialise(module)
    module.to(device, memory_format=torch.channels_last).train()
    torch.backends.cudnn.benchmark = True
    bank = Bank(device, generator, characters=0.2)
    leg = Leg("vae", module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish)
    noise_level = 0.05
    while leg.running():
        picture = (bank.draw(batch)[1] * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            moments = module.quant_conv(module.encoder(picture)).float()
            mean, log_variance = moments.chunk(2, 1)
            log_variance = log_variance.clamp(-12, 4)
            latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            # The denoiser's latents are never exact: the decoder learns to bear a little noise.
            latent = latent + noise_level * mean.detach().std() * torch.rand(len(mean), 1, 1, 1, device=device) * torch.randn_like(mean)
            drawn = module.decoder(module.post_quant_conv(latent)).float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(drawn), _edges(picture), strict=True))
        leg.update(F.mse_loss(drawn, picture) * 4 + F.l1_loss(drawn, picture) + edge + 2e-4 * kl)
    leg.close(state=not finish)
    _export(leg.averaged.eval(), folder, device, generator)


@torch.no_grad()
def _export(module, folder: Path, device: str, generator) -> None:
    """Fold the latents' spread into the 1x1 convolutions, so that the host's fixed scale yields unit spread, and write the file."""
    pictures = torch.cat([render(sample_scenes(64, generator=generator, counts={1: 1, 2: 1}).to(device)) for _ in range(8)]) * 2 - 1
    mean = module.quant_conv(module.encoder(pictures)).chunk(2, 1)[0]
    spread, centre = mean.std((0, 2, 3)), mean.mean((0, 2, 3))
    quant, post = module.quant_conv, module.post_quant_conv
    channels = len(centre)
    scale = (1 / (spread * LATENT_SCALE)).to(quant.weight)
    # post_quant_conv first: it must undo (z - centre) * scale.
    post.bias.add_(torch.einsum("oi,i->o", post.weight[:, :, 0, 0], centre))
    post.weight.mul_((1 / scale)[None, :, None, None])
    quant.bias[:channels].sub_(centre).mul_(scale)
    quant.weight[:channels].mul_(scale[:, None, None, None])
    quant.bias[channels:].add_(2 * torch.log(scale))
    rebuilt = module.decoder(post(quant(module.encoder(pictures)).chunk(2, 1)[0]))
    error = F.mse_loss(rebuilt.clamp(-1, 1), pictures) / 4
    log.info("vae: PSNR %.2f dB on new scenes", float(-10 * torch.log10(error)))
    export(module.state_dict(), folder / "vae.safetensors", host_lab.VAE_CONFIG)
