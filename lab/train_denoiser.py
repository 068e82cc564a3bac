"""Train the lab's image models on captioned latents: the UNet to predict noise on Stable Diffusion's schedule, the DiT to predict
velocity on a straight path. The text encoder and the autoencoder are frozen; pictures are drawn and encoded once, at the start of each
leg.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from ..host import lab as host_lab
from .measure import sheet
from .pools import pool_file, read_pools
from .scenes import render
from .train_text import load_encoder, states
from .train_vae import LATENT_SCALE
from .training import Leg, export, initialise, log, mixed, take_over, zero

EMPTY_CHANCE = 0.10  # captions dropped, for classifier-free guidance
SHEET_EVERY = 1000  # steps between sample sheets
LONG_CHANCE = 0.05  # batches with an empty second window of tokens behind the first, as prompts over 77 tokens have
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
    """Noise prediction, weighted by 1 + sigma^2 up to the noise of sigma 7: sigma^2 counts errors of the picture, so that places and
    sizes are settled where the noise is strong; the 1 keeps small faults from passing where it is weak.
    """
    step = (_uniform(len(latent), latent.device) * 999.999).long()
    alpha = alphas[step][:, None, None, None]
    noise = torch.randn_like(latent)
    drawn = module(alpha.sqrt() * latent + (1 - alpha).sqrt() * noise, step, context=context).float()
    weight = (1 / alpha).clamp(max=50.0)  # 1 + sigma^2
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


def mend(module: nn.Module) -> None:
    """Make the host's Flux classes trainable. Their blocks add in place into what their norms saved for the backward pass, which makes
    gradients wrong: a copy before each such norm mends that. And their fast rotary code has no gradient: the host's switch for training is
    on during each forward.
    """
    import comfy.model_management

    before = []

    def begin(*_):
        before.append(comfy.model_management.in_training)
        comfy.model_management.in_training = True

    def end(*_):
        comfy.model_management.in_training = before.pop()

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end, always_call=True)
    for name, part in module.named_modules():
        if name.rsplit(".", 1)[-1] in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm"):
            part.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))


def new_dit() -> nn.Module:
    """The Flux class with zeroed modulation, mended for training."""
    module = host_lab.build_dit_module()
    initialise(module)
    mend(module)
    for name, part in module.named_modules():
        if name.endswith((".lin", "adaLN_modulation.1", "final_layer.linear")):
            zero(part)
        if hasattr(part, "scale") and isinstance(part.scale, nn.Parameter):
            nn.init.ones_(part.scale)
        if type(part).__name__ == "RMSNorm" and getattr(part, "weight", None) is not None:
            nn.init.ones_(part.weight)
    return module


KINDS = {"unet": (new_unet, unet_loss), "dit": (new_dit, dit_loss)}


@torch.no_grad()
def encode_scenes(scenes, vae, device) -> torch.Tensor:
    """Latents of unit spread of drawn scenes, (N, 4, h, w) half precision on the device."""
    parts = []
    chunk = 1024 if device == "cuda" else 32  # a processor's caches hold no more
    for at in range(0, len(scenes), chunk):
        with mixed(device):
            moments = vae.quant_conv(vae.encoder(render(scenes[at : at + chunk].to(device)) * 2 - 1))
        parts.append((moments.chunk(2, 1)[0].float() * LATENT_SCALE).half())
    return torch.cat(parts)


def cached_latents(pool, kind: str, vae, device, folder: Path) -> torch.Tensor:
    """Latents of a pool, kept in the folder from leg to leg for as long as pool and autoencoder stay the same."""
    file = folder / f"latents_{host_lab.VAES[kind]}_{pool.scenes.height}x{pool.scenes.width}.pt"
    encoder = hashlib.sha256()
    for key, tensor in sorted(vae.state_dict().items()):
        if key.startswith(("encoder.", "quant_conv.")):
            encoder.update(tensor.cpu().numpy().tobytes())
    told = [len(pool), encoder.hexdigest(), (folder / pool_file(pool)).stat().st_mtime_ns]
    if file.exists():
        kept = torch.load(file, map_location=device, weights_only=True)
        if kept["of"] == told:
            return kept["latents"]
    latents = encode_scenes(pool.scenes, vae, device)
    torch.save({"of": told, "latents": latents}, file)
    return latents


SHEET = (
    "a large red circle in the centre on a white background",
    "a small blue star at the top left on a grey background",
    "a medium green heart at the bottom right on a black background",
    "a large striped yellow square on the right on a dark grey background",
    "a large dotted pink triangle in the centre on a light grey background",
    "a medium outlined cyan diamond on the left on a black background",
    "a medium purple crescent at the top on a white background neon",
    "a large orange cross at the bottom on a grey background shaded",
    "a medium red square at the left side and a medium blue circle at the right side on a white background",
    "a small green triangle at the top left and a large pink heart at the bottom right on a black background",
    "a large yellow star above a small purple circle on a grey background",
    "a small cyan cross on the left and a small orange star on the right on a white background vintage",
)


@torch.no_grad()
def walk(kind: str, module, x, context, pooled, *, device: str, start: float = 1.0, steps: int = 20, cfg: float = 4.0) -> torch.Tensor:
    """Latents x (B, 4, h, w) as they are at the noise of `start` (1: nothing else), led to clean ones in steps of DDIM (UNet) or Euler
    (DiT). context and pooled hold the captions' states and behind them as many of the empty caption.
    """
    alphas = sd_alphas(device)
    # Both are walked as x = a * clean + s * noise, from one (a, s) to the next.
    if kind == "unet":
        grid = torch.linspace(999 * start, 0, steps + 1, device=device).long()
        clean_share, noise_share = alphas[grid].sqrt(), (1 - alphas[grid]).sqrt()
    else:
        grid = torch.linspace(start, 0, steps + 1, device=device)
        clean_share, noise_share = 1 - grid, grid
    for i in range(steps):
        with mixed(device):
            now = grid[i].expand(2 * len(x))
            drawn = module(x.repeat(2, 1, 1, 1), now, context, *(() if kind == "unet" else (pooled,))).float()
        asked, plain = drawn.chunk(2)
        drawn = plain + cfg * (asked - plain)
        a, s = clean_share[i], noise_share[i]
        clean, noise = ((x - s * drawn) / a, drawn) if kind == "unet" else (x - s * drawn, x + a * drawn)
        x = clean_share[i + 1] * clean + noise_share[i + 1] * noise
    return x


@torch.no_grad()
def draw_sheet(kind: str, module, encoder, vae, device: str, path: Path, size: int = 64) -> None:
    """Draw SHEET as the model does now, the same noise every time."""
    words = torch.tensor(host_lab.tokenizer()(list(SHEET), padding="max_length", max_length=77)["input_ids"], device=device)
    empty = torch.tensor(host_lab.tokenizer()("", padding="max_length", max_length=77)["input_ids"], device=device).expand(len(SHEET), -1)
    context, pooled = states(encoder, torch.cat([words, empty]))
    side = size // host_lab.downscale(kind)
    x = torch.randn(len(SHEET), 4, side, side, generator=torch.Generator().manual_seed(7)).to(device)
    x = walk(kind, module, x, context, pooled, device=device)
    pictures = vae.decoder(vae.post_quant_conv(x / LATENT_SCALE)).float() / 2 + 0.5
    sheet(pictures.movedim(1, -1).cpu(), path, columns=6)


def load_vae(folder: Path, device: str, kind: str = "unet") -> nn.Module:
    """The autoencoder of a model, frozen."""
    source = host_lab.VAES[kind]
    tensors, _ = host_lab.read_weights(folder / f"{source}.safetensors")
    module = host_lab.build_vae_module(source)
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
    start: Path | None = None,
    average: float = 0.9995,
) -> None:
    torch.manual_seed(seed)
    make, loss_of = KINDS[kind]
    encoder, vae = load_encoder(folder, device), load_vae(folder, device, kind)
    pools, latents = [], []
    for pool in read_pools(folder).values():
        latents.append(cached_latents(pool, kind, vae, device, folder))
        pools.append(pool.tokens.to(device).short())  # ids reach 49407: read back as unsigned
    log.info("%s: %d latents, spread %.3f", kind, sum(map(len, latents)), float(latents[0].float().std()))
    empty = torch.tensor(host_lab.tokenizer()("", padding="max_length", max_length=77)["input_ids"], device=device)
    alphas = sd_alphas(device)
    module = make()
    take_over(module, start, kind)
    module.to(device).train()
    leg = Leg(kind, module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish, average=average)
    # Every batch holds as many pixels: so that every scene comes as often as any other, whatever its size.
    sizes = torch.tensor([float(len(latent) * latent.shape[2] * latent.shape[3]) for latent in latents])
    while leg.running():
        which = int(torch.multinomial(sizes, 1))
        latent, tokens = latents[which], pools[which]
        n = max(1, batch * 64 * 64 // (latent.shape[2] * latent.shape[3] * host_lab.downscale(kind) ** 2))
        rows = torch.randint(len(latent), (n,), device=device)
        words = tokens[rows, torch.randint(2, (n,), device=device)].long() & 0xFFFF
        words = torch.where(torch.rand(n, 1, device=device) < EMPTY_CHANCE, empty, words)
        with mixed(device):
            with torch.no_grad():
                context, pooled = states(encoder, words, layer=-2 if torch.rand(()) < SKIP_CHANCE else -1)
                if torch.rand(()) < LONG_CHANCE:
                    context = torch.cat([context, states(encoder, empty[None])[0].expand_as(context)], 1)
            loss = loss_of(module, latent[rows].float(), context, pooled, alphas)
        leg.update(loss)
        if leg.step % SHEET_EVERY == 0:
            draw_sheet(kind, leg.averaged, encoder, vae, device, folder / f"{kind}.sheet.png")
    leg.close(state=True)
    draw_sheet(kind, leg.averaged, encoder, vae, device, folder / f"{kind}.sheet.png")
    export(leg.averaged.state_dict(), folder / f"{kind}.safetensors", {"unet": host_lab.UNET_CONFIG, "dit": host_lab.DIT_CONFIG}[kind])
