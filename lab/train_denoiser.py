"""Train the lab's image models on captioned latents: the UNet to predict noise on Stable Diffusion's schedule, the DiT to predict
velocity on a straight path. The text encoder and the autoencoder are frozen; pictures are drawn and encoded once, at the start of each
leg.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..host import lab as host_lab
from .pools import read_pools
from .scenes import render
from .train_text import load_encoder, states
from .train_vae import LATENT_SCALE
from .training import Leg, export, initialise, log, zero

EMPTY_CHANCE = 0.10  # captions dropped, for classifier-free guidance
SKIP_CHANCE = 0.10  # batches that read the text encoder's last layer but one, so that CLIP skip works


def sd_alphas(device) -> torch.Tensor:
    """(1000,) cumulative alphas of Stable Diffusion's schedule (betas linear in their square roots, 0.00085 to 0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def _uniform(n, device):
    """Half of the noise levels evenly, half from the noisier part, where what goes where is decided."""
    level = torch.rand(n, device=device)
    return torch.where(torch.rand(n, device=device) < 0.5, level, 0.45 + 0.55 * level)


def unet_loss(module, latent, context, pooled, alphas):
    """Noise prediction; weighted so that middle levels count as errors of the picture (weight sigma^2, clamped)."""
    step = (_uniform(len(latent), latent.device) * 999.999).long()
    alpha = alphas[step][:, None, None, None]
    noise = torch.randn_like(latent)
    drawn = module(alpha.sqrt() * latent + (1 - alpha).sqrt() * noise, step, context=context).float()
    weight = ((1 - alpha) / alpha).clamp(0.15, 10.0)
    return (weight * (drawn - noise) ** 2).mean()


def dit_loss(module, latent, context, pooled, alphas):
    """Velocity prediction (flow matching): x_s = (1 - s) x + s n, target n - x; s logit-normal, leaning to the noisy side."""
    sigma = torch.sigmoid(torch.randn(len(latent), device=latent.device) + 0.35)
    wide = sigma[:, None, None, None]
    noise = torch.randn_like(latent)
    drawn = module((1 - wide) * latent + wide * noise, sigma, context, pooled).float()
    return ((drawn - (noise - latent)) ** 2).mean()


def new_unet() -> nn.Module:
    module = host_lab.build_unet_module()
    initialise(module)
    zero(module.out[2])
    for name, part in module.named_modules():
        if name.endswith(("out_layers.3", "proj_out")):
            zero(part)
    return module


def new_dit() -> nn.Module:
    """The Flux class with zeroed modulation. Its blocks add in place into what their norms saved for the backward pass, which makes
    gradients wrong; a copy before each such norm mends that.
    """
    import comfy.model_management

    comfy.model_management.in_training = True  # the host's fast rotary code has no gradient
    module = host_lab.build_dit_module()
    initialise(module)
    for name, part in module.named_modules():
        if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
            zero(part)
        if name.rsplit(".", 1)[-1] in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm"):
            part.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
        if hasattr(part, "scale") and isinstance(part.scale, nn.Parameter):
            nn.init.ones_(part.scale)
        if type(part).__name__ == "RMSNorm" and getattr(part, "weight", None) is not None:
            nn.init.ones_(part.weight)
    return module


KINDS = {"unet": (new_unet, unet_loss), "dit": (new_dit, dit_loss)}


@torch.no_grad()
def encode_pool(pool, vae, device, chunk: int = 1024) -> torch.Tensor:
    """Latents of unit spread of every scene of a pool, (N, 4, h, w) half precision on the device."""
    parts = []
    for at in range(0, len(pool), chunk):
        scenes = pool.scenes[at : at + chunk].to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            moments = vae.quant_conv(vae.encoder(render(scenes) * 2 - 1))
        parts.append((moments.chunk(2, 1)[0].float() * LATENT_SCALE).half())
    return torch.cat(parts)


def load_vae(folder: Path, device: str) -> nn.Module:
    tensors, _ = host_lab.read_weights(folder / "vae.safetensors")
    module = host_lab.build_vae_module()
    module.load_state_dict({key: value.float() for key, value in tensors.items()})
    return module.to(device).eval().requires_grad_(False)


def train(
    kind: str,
    folder: Path,
    *,
    device: str,
    steps: int,
    minutes: float,
    finish: bool,
    batch: int,
    lr: float = 1e-3,
    seed: int = 13,
    limit: int | None = None,
) -> None:
    torch.manual_seed(seed)
    make, loss_of = KINDS[kind]
    encoder, vae = load_encoder(folder, device), load_vae(folder, device)
    pools, latents = [], []
    for pool in read_pools(folder).values():
        if limit:
            pool.scenes, pool.tokens, pool.orders = pool.scenes[:limit], pool.tokens[:limit], pool.orders[:limit]
        latents.append(encode_pool(pool, vae, device))
        pools.append(pool.tokens.to(device).short())  # ids reach 49407: read back as unsigned
    log.info("%s: %d latents, spread %.3f", kind, sum(map(len, latents)), float(latents[0].float().std()))
    empty = torch.tensor(host_lab.tokenizer()("", padding="max_length", max_length=77)["input_ids"], device=device)
    alphas = sd_alphas(device)
    module = make().to(device).train()
    leg = Leg(kind, module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish, average=0.9995)
    sizes = torch.tensor([float(len(latent)) for latent in latents])
    while leg.running():
        which = int(torch.multinomial(sizes, 1))
        latent, tokens = latents[which], pools[which]
        n = max(1, batch * 64 // (latent.shape[2] * latent.shape[3]))
        rows = torch.randint(len(latent), (n,), device=device)
        words = tokens[rows, torch.randint(2, (n,), device=device)].long() & 0xFFFF
        words = torch.where(torch.rand(n, 1, device=device) < EMPTY_CHANCE, empty, words)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                context, pooled = states(encoder, words, layer=-2 if torch.rand(()) < SKIP_CHANCE else -1)
            loss = loss_of(module, latent[rows].float(), context, pooled, alphas)
        leg.update(loss)
    leg.close(state=True)
    export(leg.averaged.state_dict(), folder / f"{kind}.safetensors", {"unet": host_lab.UNET_CONFIG, "dit": host_lab.DIT_CONFIG}[kind])
