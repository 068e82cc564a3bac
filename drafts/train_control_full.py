"""Train a small edge ControlNet for each lab model, in layouts that the host's own loader reads.

UNet: a Control-LoRA. The loader copies the model it is applied to and lays low-rank changes, a hint encoder and zero convolutions over it.
DiT: the layout of InstantX, a transformer of its own that reads the edges as the autoencoder's latents. That loader gives every head 128
channels, so this one has a single head.

The base model is frozen. Half of the captions are dropped, so that the edges are needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..host import lab as host_lab
from .pools import read_pools
from .scenes import Scenes, render
from .train_denoiser import KINDS, cached_latents, load_vae, mend, new_dit, sd_alphas
from .train_text import load_encoder, states
from .training import Leg, export, initialise, mixed, zero

RANK = 8
BLIND_CHANCE = 0.5


def edges(scenes: Scenes) -> torch.Tensor:
    """(N, 3, H, W): the objects' outlines, one pixel wide, white on black."""
    masks = (render(scenes, masks=True)[1] > 0.5).float()
    inner = -F.max_pool2d(-masks, 3, 1, 1)
    return (masks - inner).amax(1, keepdim=True).expand(-1, 3, -1, -1)


class LowRank(nn.Module):
    """A layer's weight plus `up @ down`, as the host's Control-LoRA layers compute it."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.layer = [layer]  # in a list: the layer is no part of this module
        rank = min(RANK, layer.weight.shape[0])
        self.up = nn.Parameter(torch.zeros(layer.weight.shape[0], rank))
        self.down = nn.Parameter(torch.randn(rank, layer.weight[0].numel()) / rank**0.5)
        layer.forward = self.forward

    def forward(self, x):
        (layer,) = self.layer
        weight = layer.weight + (self.up @ self.down).view_as(layer.weight)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        return F.linear(x, weight, layer.bias)


class UNetControl(nn.Module):
    """The host's ControlNet on a frozen copy of the UNet's encoder; what trains: low-rank changes, hint encoder, zero convolutions."""

    file = "unet_edges"

    def __init__(self, base: nn.Module):
        super().__init__()
        import comfy.ops
        from comfy.cldm.cldm import ControlNet

        config = {key: value for key, value in host_lab.UNET_CONFIG.items() if key != "out_channels"}
        self.net = ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
        initialise(self.net)
        self.net.load_state_dict(base.state_dict(), strict=False)
        self.net.requires_grad_(False)
        self.own = nn.ModuleDict({"input_hint_block": self.net.input_hint_block, "zero_convs": self.net.zero_convs})
        self.own["middle_block_out"] = self.net.middle_block_out
        for part in self.own.values():
            part.requires_grad_(True)
        zero(self.net.input_hint_block[-1], self.net.zero_convs, self.net.middle_block_out)
        self.changes = nn.ModuleDict()
        for name, layer in self.net.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.split(".")[0] in ("input_blocks", "middle_block"):
                self.changes[name.replace(".", "/")] = LowRank(layer)

    def hint(self, scenes: Scenes, vae) -> torch.Tensor:
        # The host enlarges hints to eight pixels a latent.
        return F.interpolate(edges(scenes), scale_factor=8 / host_lab.downscale("unet"), mode="nearest-exact")

    def guide(self, base: nn.Module, hint: torch.Tensor):
        """The base model with this control on it, called as the base is."""

        def module(x, step, context):
            return base(x, step, context=context, control=self.net(x, hint, step, context))

        return module

    def tensors(self) -> dict[str, torch.Tensor]:
        out = {"lora_controlnet": torch.zeros(1)}
        for part, module in self.own.items():
            out |= {f"{part}.{key}": value for key, value in module.state_dict().items()}
        for name, change in self.changes.items():
            key = name.replace("/", ".")
            out |= {f"{key}.up": change.up, f"{key}.down": change.down}
        return out


class DiTControl(nn.Module):
    """The host's Flux ControlNet: one double block that reads the noisy latents and the edges' latents; all of it trains."""

    file = "dit_edges"

    def __init__(self, base: nn.Module):
        super().__init__()
        import comfy.ops
        from comfy.ldm.flux.controlnet import ControlNetFlux

        # The loader takes heads of 128 channels with Flux's own axes for granted.
        config = host_lab.DIT_CONFIG | {"num_heads": 1, "axes_dim": [16, 56, 56], "depth": 1, "depth_single_blocks": 0}
        self.config = config
        self.net = ControlNetFlux(
            latent_input=True,
            control_latent_channels=4,
            dtype=torch.float32,
            device="cpu",
            operations=comfy.ops.disable_weight_init,
            **config,
        )
        initialise(self.net)
        own = self.net.state_dict()
        fitting = {key: value for key, value in base.state_dict().items() if key in own and own[key].shape == value.shape}
        self.net.load_state_dict(fitting, strict=False)
        zero(self.net.pos_embed_input, self.net.controlnet_blocks)
        mend(self.net)

    def hint(self, scenes: Scenes, vae) -> torch.Tensor:
        import comfy.latent_formats

        latent = vae.quant_conv(vae.encoder(edges(scenes) * 2 - 1)).chunk(2, 1)[0]
        return comfy.latent_formats.Flux().process_in(latent)  # whatever the model's own format is, the loader's is Flux's

    def guide(self, base: nn.Module, hint: torch.Tensor):
        """The base model with this control on it, called as the base is."""

        def module(x, sigma, context, pooled):
            return base(x, sigma, context, pooled, control=self.net(x, sigma, context, pooled, hint=hint))

        return module

    def tensors(self) -> dict[str, torch.Tensor]:
        import comfy.utils

        own, out, named = self.net.state_dict(), {}, set()
        for theirs, place in comfy.utils.flux_to_diffusers(self.config).items():
            ours, part = (place, None) if isinstance(place, str) else place[:2]
            # Some tensors have a second name there, for other trainers' files.
            if ours in own and (ours, part) not in named:
                named.add((ours, part))
                out[theirs] = own[ours].narrow(*part) if part else own[ours]
        return out | {key: value for key, value in own.items() if key.startswith("controlnet_blocks.")}


CONTROLS = {"unet": UNetControl, "dit": DiTControl}


def train(
    kind: str, folder: Path, *, device: str, steps: int, minutes: float, finish: bool, batch: int, lr: float = 1e-3, seed: int = 17
) -> None:
    """Train the edge ControlNet of the model `kind` whose weights lie in `folder`."""
    torch.manual_seed(seed)
    loss_of, alphas = KINDS[kind][1], sd_alphas(device)
    tensors, _ = host_lab.read_weights(folder / f"{kind}.safetensors")
    base = new_dit() if kind == "dit" else host_lab.build_unet_module()
    base.load_state_dict({key: value.float() for key, value in tensors.items()})
    control = CONTROLS[kind](base).to(device).train()
    base.to(device).eval().requires_grad_(False)
    encoder, vae = load_encoder(folder, device), load_vae(folder, device, kind)
    pools = list(read_pools(folder).values())
    latents = [cached_latents(pool, kind, vae, device, folder) for pool in pools]
    sizes = torch.tensor([float(len(latent)) for latent in latents])
    empty = torch.tensor(host_lab.tokenizer()("", padding="max_length", max_length=77)["input_ids"], device=device)
    leg = Leg(f"{kind}_edges", control, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish, average=0.995)
    while leg.running():
        which = int(torch.multinomial(sizes, 1))
        pool, latent = pools[which], latents[which]
        n = max(1, batch * 64 * 64 // (pool.scenes.height * pool.scenes.width))
        rows = torch.randint(len(latent), (n,))
        words = pool.tokens[rows, 0].to(device).long()
        words = torch.where(torch.rand(n, 1, device=device) < BLIND_CHANCE, empty, words)
        with mixed(device):
            with torch.no_grad():
                context, pooled = states(encoder, words)
                hint = control.hint(pool.scenes[rows].to(device), vae)
            loss = loss_of(control.guide(base, hint), latent[rows.to(device)].float(), context, pooled, alphas)
        leg.update(loss)
    leg.close(state=not finish)
    export(leg.averaged.tensors(), folder / f"{control.file}.safetensors")
