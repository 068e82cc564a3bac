"""LoRA files on a host model: read, placed on layers by the host's own key maps, and made into an effect.

Whatever name the stock LoRA loader knows is placed here on the same weight. Adapters that are not plain low-rank sums are told, not bent.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import struct
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter
from safetensors import SafetensorError, safe_open
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..ops.lora import Factors, Stack, decomposed, delta_square, merge_middle
from ..ops.schedule import Schedule
from .dispatcher import Call, Effect
from .families import ALL, Family, family_of, family_of_file, is_chosen, layer_kind
from .window import course

log = logging.getLogger("concept_nodes")

TEXT = "for the text encoder"
TEXT_KEY = re.compile(r"^(lora_te|lora_prior_te|text_encoder|te\d?[._]|clip_[lgh]\.|t5xxl\.)")
DIFFERENCE = "full weight difference"
OTHER_KINDS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "OFT": r"\.oft_",
    "DoRA": r"\.dora_scale$",
    DIFFERENCE: r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$",
}
# What the host's readers raise for bytes that are no LoRA. Others, such as running out of memory, are not the file's fault.
DAMAGED = (SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, struct.error)
KEYS_SHOWN = 3
MOST = 10.0  # how far a slider is ever turned
UNIT = 0.03  # the response (see Placement) at strength 1 in comparable units: about that of the lab's sliders as trained


class AdapterError(ValueError):
    """A LoRA that cannot be read or placed, and what to do about it."""


class Told(dict):
    """A LORA_MODEL (tensors by key) that says of itself what the header of its file says."""

    def __init__(self, state: Mapping[str, torch.Tensor], about: Mapping):
        super().__init__(state)
        self.about = _known(about)


class LowRank(NamedTuple):
    """What one file adds to one layer; several factors where the layer fuses projections that the file keeps apart."""

    factors: tuple[Factors, ...]

    @classmethod
    def join(cls, parts, module, device, dtype) -> Stack:
        """One stacked pass for the adapters of all effects on the layer."""
        return Stack([part.factors for part in parts], device, dtype, _convolution(module))


class AdapterEffect(Effect):
    """A LoRA acting at one strength, times a schedule where there is one, within a window, given in shares of sampling."""

    def __init__(
        self,
        name: str,
        parts: Mapping[str, LowRank],
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        schedule: Schedule | None = None,
    ):
        super().__init__(name, parts)
        self.strength, self.start_percent, self.end_percent, self.schedule = strength, start_percent, end_percent, schedule

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        factor = course(model_sampling, self.start_percent, self.end_percent, self.schedule)
        return lambda call: self.strength * factor(call)


class Placement(NamedTuple):
    """A LoRA placed on a model: its parts by module name, and what to tell about it."""

    parts: dict[str, LowRank]
    report: str
    weight: Callable[[str], torch.Tensor]

    def response(self) -> float:
        """How much the layers' outputs change at strength 1, for inputs of unit variance: the root of the mean square over all of them.
        Near the relative change of the weights where these keep the variance, and had without reading any but those under a DoRA.
        """
        factors = [(name, one) for name, part in self.parts.items() for one in part.factors]
        squares = (delta_square(one, None if one.gain is None else self.weight(name)) for name, one in factors)
        return math.sqrt(sum(squares) / sum(len(one.up) for _, one in factors))

    def to_comparable(self) -> float:
        """What strengths are multiplied by to be in comparable units: the same response for every file at strength 1."""
        return UNIT / (self.response() or UNIT)


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file (safetensors, or .pt read as tensors only). Raises AdapterError that names the file."""
    try:
        state = comfy.utils.load_torch_file(str(path), safe_load=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"'{path.name}' holds more than tensors and was not opened, because opening it could run code. Ask for it as safetensors."
        ) from error
    except OSError as error:
        raise AdapterError(
            f"'{path.name}' cannot be opened ({error}). Check that it is still there and may be read. It lies at {path}."
        ) from error
    except DAMAGED as error:
        reason = str(error).strip().splitlines()
        raise AdapterError(
            f"'{path.name}' cannot be read ({reason[0] if reason else type(error).__name__}). It is damaged, cut short or no LoRA: "
            f"download or save it again. It lies at {path}."
        ) from error
    return checked(state, path.name)


def about(path: Path) -> dict:
    """What a file of this pack says of itself in its header, as far as it can be used: its `poles` (two texts) and `range` (two numbers),
    its `identifier` and `class_word` (texts).
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("concept_nodes", "{}"))
    except (*DAMAGED, OSError):
        return {}
    return _known(told if isinstance(told, dict) else {})


def _known(told: Mapping) -> dict:
    poles, span = told.get("poles"), told.get("range")
    checked = {}
    if isinstance(poles, list) and len(poles) == 2 and all(isinstance(pole, str) for pole in poles):
        checked["poles"] = poles
    if isinstance(span, list) and len(span) == 2 and all(isinstance(end, int | float) and abs(end) <= MOST for end in span):
        checked["range"] = [float(end) for end in span]
    return checked | {key: told[key] for key in ("identifier", "class_word") if isinstance(told.get(key), str) and told[key]}


def checked(state, label: str) -> dict[str, torch.Tensor]:
    """`state` if it is a dictionary of tensors. Raises AdapterError otherwise."""
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise AdapterError(f"'{label}' is no LoRA: it is not a dictionary of tensors. Choose a LoRA file, or save it again as safetensors.")
    if not state:
        raise AdapterError(f"'{label}' is empty. Download or save it again.")
    return dict(state)


def place(patcher, state: Mapping[str, torch.Tensor], label: str, layers: str = ALL) -> Placement:
    """Put the LoRA `state` on the layers of a MODEL, those of a choice only (`families.layer_choices`). `label` names it in messages.

    Raises AdapterError when nothing of it fits or is on the chosen layers, when it was made for another family or when it holds NaN or
    infinity, and UnsupportedFamily.
    """
    model = patcher.model
    family = family_of(model)
    targets = comfy.lora.model_lora_keys_unet(model, {})
    state = _renamed(comfy.lora_convert.convert_lora(dict(state)), family, targets)
    names = {id(tensor): key for key, tensor in state.items()}
    parts: dict[str, LowRank] = {}
    skipped: Counter[str] = Counter()
    used: set[str] = set()
    for target, patch in _patches(state, targets, label).items():
        if isinstance(patch, tuple):
            # A whole difference, told by its keys below.
            continue
        used |= patch.loaded_keys
        key, offset, function = (*target, None)[:3] if isinstance(target, tuple) else (target, None, None)
        name = key.removesuffix(".weight")
        placed = _fit(patch, _layer(model, key), offset, function, Held(patcher, name))
        if isinstance(placed, str):
            skipped[placed] += 1
            continue
        _check_finite(patch, names, label)
        parts[name] = LowRank((*parts[name].factors, placed) if name in parts else (placed,))
    unused = [key for key in state if key not in used or re.search(OTHER_KINDS[DIFFERENCE], key)]
    skipped += Counter(_kind_of_key(key) for key in _first_of_each(unused))
    made_for = family_of_file({key: tuple(tensor.shape) for key, tensor in state.items()})
    foreign = made_for not in (None, family) and set(skipped) - {TEXT}
    if foreign or not parts:
        raise AdapterError(_refusal(label, family, made_for if foreign else None, skipped, list(state)))
    chosen = {name: part for name, part in parts.items() if is_chosen(family, name, layers)}
    if not chosen:
        kinds = Counter(layer_kind(family, name) for name in parts)
        raise AdapterError(f"'{label}' has nothing for the layers '{layers}': it is on {_counts(kinds)}. Choose other layers, or all.")
    skipped[f"left out by the choice '{layers}'"] += len(parts) - len(chosen)
    if unused:
        log.info("%s: %d keys not applied: %s", label, len(unused), ", ".join(unused))
    return Placement(chosen, _report(chosen, family, +skipped, unused), lambda name: Held(patcher, name).tensor("weight"))


def _patches(state: dict[str, torch.Tensor], targets: Mapping, label: str) -> dict:
    """The host's own reading of a file: target -> adapter or ("diff", ...)."""
    try:
        return comfy.lora.load_lora(state, targets, log_missing=False)
    except KeyError as error:
        raise AdapterError(f"'{label}' is incomplete: {error.args[0]} is missing from it. Download or save it again.") from error


def _renamed(state: dict[str, torch.Tensor], family: Family, targets: Mapping) -> dict[str, torch.Tensor]:
    """Keys under the prefixes the host knows; published sliders of some families carry others."""

    def rename(key: str) -> str:
        name, _, end = key.partition(".")
        for old, new in family.renamed.items():
            known = new + name.removeprefix(old)
            if name.startswith(old) and name not in targets and known in targets:
                return f"{known}.{end}"
        return key

    return {rename(key): tensor for key, tensor in state.items()}


def _layer(model, key: str):
    """The module whose weight `key` is; None for parameters that no layer multiplies its input by."""
    return model.get_submodule(key.removesuffix(".weight")) if key.endswith(".weight") else None


# Lengths of the weights' rows, for DoRA, by the host's model and key: reading all of a model takes seconds, and strengths are moved often.
_LENGTHS: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, torch.Tensor]] = weakref.WeakKeyDictionary()


class Held:
    """What a layer has of its own, as the model was loaded: without what other nodes have merged into it since."""

    def __init__(self, patcher, name: str):
        self.patcher, self.name = patcher, name

    def tensor(self, end: str) -> torch.Tensor | None:
        """Its "weight" or "bias"; None where it has none."""
        backup = self.patcher.backup.get(f"{self.name}.{end}")
        tensor = backup.weight if backup is not None else getattr(self.patcher.model.get_submodule(self.name), end, None)
        return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor

    def lengths(self, inputs: torch.Size) -> torch.Tensor | None:
        """(out,) of the weights of each output, of shape `inputs`; None where the weights are packed in a way of their own."""
        kept = _LENGTHS.setdefault(self.patcher.model, {})
        if self.name not in kept:
            weight = self.tensor("weight")
            if weight is None or weight.shape[1:] != inputs or not weight.is_floating_point():
                return None
            kept[self.name] = weight.float().flatten(1).norm(dim=1).cpu()
        return kept[self.name]


def _check_finite(patch: LoRAAdapter, names: Mapping[int, str], label: str) -> None:
    up, down, alpha, middle, dora, *_ = patch.weights
    for tensor in (up, down, middle, dora):
        if tensor is not None and not torch.isfinite(tensor.float()).all():
            key = names.get(id(tensor), "a tensor")
            raise AdapterError(f"'{label}' holds NaN or infinity in {key}: its training failed or the file is damaged. Use another copy.")
    if alpha is not None and not math.isfinite(alpha):
        key = names.get(id(down), "a layer")
        raise AdapterError(f"'{label}' has {alpha} for the alpha of {key}: its training failed or the file is damaged. Use another copy.")


def _fit(patch, module, offset, function, held: Held | None = None) -> Factors | str:
    """A host adapter as factors for `module`, or what keeps it from being applied.

    offset = (dimension, first, length): the part of the weight it is for; function: how the host reorders that part's outputs; held: what
    the layer has of its own, for DoRA.
    """
    if not isinstance(patch, LoRAAdapter):
        return {"loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA"}.get(patch.name, patch.name.upper())
    up, down, alpha, middle, dora, reshape = patch.weights
    shape = _weight_shape(module)
    if shape is None or reshape is not None:
        return "for layers that are neither linear nor convolution"
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    if middle is not None:
        down = merge_middle(down.float(), middle.float())
    dimension, first, length = offset or (None, 0, 0)
    down = _on_inputs(down, shape, (first, length) if dimension == 1 else None)
    up = _reordered(up.flatten(1), function)
    if down is None or up is None or up.shape != (length if dimension == 0 else shape[0], down.shape[0]):
        return "of another shape than the layer"
    factors = Factors(down, up, scale, (first, length) if dimension == 0 else None)
    return factors if dora is None else _decomposed(factors, dora, dimension, held)


def _decomposed(factors: Factors, magnitude: torch.Tensor, dimension: int | None, held: Held) -> Factors | str:
    if magnitude.shape[0] != len(factors.up) or magnitude.numel() != len(factors.up) or dimension == 1:
        return "DoRA that scales a layer's inputs"
    lengths = held.lengths(factors.down.shape[1:])
    if lengths is None:
        return "DoRA on packed layers"
    return decomposed(factors, magnitude, lengths, held.tensor("bias"))


def _on_inputs(down: torch.Tensor, shape: tuple[int, ...], columns: tuple[int, int] | None) -> torch.Tensor | None:
    """A in the layer's own shape (r, in, *kernel), zero outside of `columns` (first, length); None where the sizes differ."""
    inputs = (columns[1], *shape[2:]) if columns else shape[1:]
    if down.flatten(1).shape[1] != math.prod(inputs):
        return None
    down = down.reshape(-1, *inputs)
    if columns is None:
        return down
    whole = down.new_zeros(down.shape[0], *shape[1:])
    whole.narrow(1, *columns).copy_(down)
    return whole


def _reordered(up: torch.Tensor, function) -> torch.Tensor | None:
    """B with its outputs in the host's order; None where the host's function is more than a new order, which B alone cannot take."""
    if function is None:
        return up
    order = function(torch.arange(up.shape[0]))
    if sorted(order.tolist()) != list(range(up.shape[0])):
        return None
    return up[order]


def _weight_shape(module) -> tuple[int, ...] | None:
    """(out, in, *kernel) of a layer that can carry a LoRA, without touching its weight; None for any other module."""
    if isinstance(module, _ConvNd):
        plain = not isinstance(module, _ConvTransposeNd) and module.groups == 1 and module.padding_mode == "zeros"
        return (module.out_channels, module.in_channels, *module.kernel_size) if plain else None
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return (module.out_features, module.in_features)
    return None


def _convolution(module) -> dict | None:
    if not isinstance(module, _ConvNd):
        return None
    return {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}


def _first_of_each(keys: list[str]) -> list[str]:
    """One key per layer: a layer's up, down and alpha are one adapter."""
    return list({re.sub(r"\.(lora|hada|lokr|oft)_?[^.]*(\.\w+)*$|\.(alpha|dora_scale)$", "", key): key for key in keys}.values())


def _kind_of_key(key: str) -> str:
    if TEXT_KEY.match(key):
        return TEXT
    return next((kind for kind, pattern in OTHER_KINDS.items() if re.search(pattern, key)), "for layers this model does not have")


def _refusal(label: str, family: Family, made_for: Family | None, skipped: Counter, keys: list[str]) -> str:
    shown = ", ".join(keys[:KEYS_SHOWN])
    if made_for is not None:
        return (
            f"'{label}' looks made for {made_for.name}, and this model is {family.name}. Choose a LoRA for {family.name}, or load the "
            f"model it was made for. Its keys: {shown}, ..."
        )
    if set(skipped) == {TEXT}:
        return f"'{label}' is for the text encoder only and needs CLIP: use the host's Load LoRA node for it. Its keys: {shown}, ..."
    return (
        f"Nothing in '{label}' fits this model ({family.name}): {_counts(skipped)}. Choose a plain LoRA (on linear and convolution layers) "
        f"that was made for {family.name}. Its keys: {shown}, ..."
    )


def _counts(counter: Counter) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counter.most_common())


def _report(parts: Mapping[str, LowRank], family: Family, skipped: Counter, unused: list[str]) -> str:
    factors = [factors for part in parts.values() for factors in part.factors]
    kinds = Counter(layer_kind(family, name) for name in parts)
    ranks, scales = _range(one.down.shape[0] for one in factors), _range(one.scale for one in factors)
    lines = [f"Placed on {len(parts)} layers of {family.name} ({_counts(kinds)}); rank {ranks}, alpha / rank {scales}."]
    dora = sum(any(one.gain is not None for one in part.factors) for part in parts.values())
    if dora:
        lines.append(
            f"DoRA on {dora} of them, which is not linear: made for strength 1 only. Other strengths lie on the straight line through it, "
            "as Load LoRA's do."
        )
    if skipped:
        lines.append(f"Not applied: {_counts(skipped)}.")
    if TEXT in skipped:
        lines.append("Text encoder adapters need CLIP: use the host's Load LoRA node for those, with the model strength at 0.")
    if unused:
        lines.append(f"Keys not applied, for instance: {', '.join(unused[:KEYS_SHOWN])}.")
    return "\n".join(lines)


def _range(values: Iterable[float]) -> str:
    values = [f"{value:g}" for value in sorted(values)]
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
