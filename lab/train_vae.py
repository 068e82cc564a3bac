"""Train the lab's autoencoder: 3 channels to 4 at a quarter of the size, by reconstruction, with latents of unit spread."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ..host import lab as host_lab
from .pools import Bank
from .scenes import render, sample_scenes
from .training import Leg, export, initialise, log, mixed, take_over

LATENT_SCALE = 0.18215  # the host multiplies SD1.5 latents by this on their way in
NOISE = 0.15  # up to this share of the latents' spread


def _edges(picture):
    return picture[..., :, 1:] - picture[..., :, :-1], picture[..., 1:, :] - picture[..., :-1, :]


def train(
    folder: Path,
    *,
    device: str,
    steps: int,
    minutes: float,
    finish: bool,
    batch: int,
    lr: float = 1e-3,
    seed: int = 11,
    start: Path | None = None,
    decoder_only: bool = False,
) -> None:
    """Train the autoencoder; or, `decoder_only`, go on with the decoder of the one in `folder`: its latents, and all that has been trained
    on them, stay as they are. Where a UNet lies beside it, every second batch is of latents that it redrew, so that the decoder learns to
    show clean pictures of its small faults.
    """
    seed += decoder_only  # other pictures
    from .redrawn import Redrawn  # it takes the UNet's training, which takes this one

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    module = host_lab.build_vae_module()
    initialise(module)
    take_over(module, folder if decoder_only else start, "vae")
    if decoder_only:
        for part in (module.encoder, module.quant_conv):
            part.requires_grad_(False)
    # On a processor the plain layout is two to three times as fast.
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    module.to(device, memory_format=layout).train()
    torch.backends.cudnn.benchmark = True
    redrawn = Redrawn(folder, device, generator) if decoder_only and (folder / "unet.safetensors").exists() else None
    bank = Bank(device, generator, characters=0.2)
    leg = Leg("decoder" if decoder_only else "vae", module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish)
    while leg.running():
        kl = torch.zeros((), device=device)
        if redrawn and leg.step % 2:
            latent, picture = redrawn.draw(batch)
            picture, latent = (picture * 2 - 1).contiguous(memory_format=layout), latent / LATENT_SCALE
        else:
            picture = (bank.draw(batch)[1] * 2 - 1).contiguous(memory_format=layout)
            with mixed(device):
                moments = module.quant_conv(module.encoder(picture)).float()
            mean, log_variance = moments.chunk(2, 1)
            log_variance = log_variance.clamp(-12, 4)
            latent = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            # The denoiser's latents are never exact: the decoder learns to bear some noise, and the encoder to spend its numbers on it.
            latent = latent + NOISE * mean.detach().std() * torch.rand(len(mean), 1, 1, 1, device=device) * torch.randn_like(mean)
            kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        with mixed(device):
            drawn = module.decoder(module.post_quant_conv(latent)).float()
        edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(drawn), _edges(picture), strict=True))
        leg.update(F.mse_loss(drawn, picture) * 4 + F.l1_loss(drawn, picture) + edge + 2e-4 * kl)
    leg.close(state=not finish)
    if not decoder_only:
        _fold(leg.averaged, device, generator)
    _export(leg.averaged.eval(), folder, device, generator)


@torch.no_grad()
def _fold(module, device: str, generator) -> None:
    """Fold the latents' spread into the 1x1 convolutions, so that the host's fixed scale yields unit spread."""
    mean = module.quant_conv(module.encoder(_pictures(device, generator))).chunk(2, 1)[0]
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


@torch.no_grad()
def _export(module, folder: Path, device: str, generator) -> None:
    pictures = _pictures(device, generator)
    latent = module.quant_conv(module.encoder(pictures)).chunk(2, 1)[0]
    rebuilt = module.decoder(module.post_quant_conv(latent))
    error = F.mse_loss(rebuilt.clamp(-1, 1), pictures) / 4
    log.info("vae: PSNR %.2f dB on new scenes", float(-10 * torch.log10(error)))
    export(module.state_dict(), folder / "vae.safetensors", host_lab.VAE_CONFIGS["vae"])


def _pictures(device: str, generator) -> torch.Tensor:
    """512 new scenes, -1 to 1."""
    return torch.cat([render(sample_scenes(64, generator=generator, counts={1: 1, 2: 1}).to(device)) for _ in range(8)]) * 2 - 1
