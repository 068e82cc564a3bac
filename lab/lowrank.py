"""Low-rank adapters while they train, and the LoRA files they become: what the lab's characters are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..host import lab as host_lab
from .training import log

BUILD = {"unet": host_lab.build_unet_module, "dit": host_lab.build_dit_module}


class Adapter(nn.Module):
    """One layer's low-rank pair while it trains; replaces the layer's forward. alpha: as in LoRA files; None is a scale of 1."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float | None = None):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            rank = min(rank, layer.in_channels, layer.out_channels)
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            rank = min(rank, layer.in_features, layer.out_features)
            self.down, self.up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.strength, self.alpha, self.scale = 0.0, alpha, 1.0 if alpha is None else alpha / rank
        self.plain = layer.forward
        layer.forward = self.forward  # the method, not the module: torch would take a module for a part of the layer

    def forward(self, x):
        y = self.plain(x)
        return y + self.strength * self.scale * self.up(self.down(x)) if self.strength else y


def frozen(kind: str, folder: Path, device: str) -> nn.Module:
    """The network of a lab model with the weights in a folder, to be adapted."""
    tensors, _ = host_lab.read_weights(folder / f"{kind}.safetensors")
    module = BUILD[kind]()
    module.load_state_dict({key: value.float() for key, value in tensors.items()})
    return module.to(device).eval().requires_grad_(False)


def adapt(module: nn.Module, rank: Callable[[str], int], alpha: float | None = None) -> dict[str, Adapter]:
    """Adapters on every linear layer and convolution whose name `rank` gives a rank above 0, by module name."""
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)) and rank(name)]
    return {name: Adapter(layer, rank(name), alpha).to(layer.weight.device) for name, layer in layers}


def parameters(adapters: dict[str, Adapter]) -> list[nn.Parameter]:
    """What an optimiser trains."""
    return [parameter for adapter in adapters.values() for parameter in (adapter.down.weight, adapter.up.weight)]


def file_name(kind: str) -> Callable[[str], str]:
    """Module name -> its name in published LoRA files: `lora_unet_<diffusers path>` for the UNet, `lora_unet_<module>` for Flux."""
    import comfy.utils

    paths = comfy.utils.unet_to_diffusers(host_lab.UNET_CONFIG) if kind == "unet" else {}
    names = {ours.removesuffix(".weight"): theirs.removesuffix(".weight") for theirs, ours in paths.items()}
    return lambda module: "lora_unet_" + names.get(module, module).replace(".", "_")


def write(adapters: dict[str, Adapter], kind: str, path: Path, about: dict) -> None:
    """A LoRA file under the published names, half precision, what it is in its header."""
    name_of, state = file_name(kind), {}
    for module, adapter in adapters.items():
        name = name_of(module)
        state[f"{name}.lora_down.weight"] = adapter.down.weight.detach().half().cpu().contiguous()
        state[f"{name}.lora_up.weight"] = adapter.up.weight.detach().half().cpu().contiguous()
        if adapter.alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(adapter.alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt", "concept_nodes": json.dumps(about)})
    log.info("wrote %s (%d layers, %.0f kB)", path, len(adapters), path.stat().st_size / 1e3)
