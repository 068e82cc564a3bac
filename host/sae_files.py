"""Sparse autoencoders in files: ours, and the layouts in which others publish theirs.

Ours is one safetensors file with the tensor names of EleutherAI's sparsify (`encoder.weight`, `encoder.bias`, `W_dec`, `b_dec`), the rest
under names of its own (`threshold`, `norm.mean`, `norm.std`, `stats.*`), and all that is to be told as JSON under `sae_cfg` in its header.

Read besides: sparsify's pair (SAeUron, SAEmnesia), SAELens, OpenAI's (Concept Steerers, Interpret-then-Deactivate, sdxl-unbox),
dictionary_learning and SAEdit. A layout is told by the names of its tensors, its settings by the JSON file beside it; nothing but tensors
is ever unpickled. What an `SAE` cannot say (gates, shortcuts, vectors normalised one by one) is refused by name.

Concept Steerers' own files rebuild x - b_dec, not x: their trainer compares with the wrong vector. Directions and codes are as they
should be.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ops.sae import ACTIVATIONS, BATCH_TOPK, JUMPRELU, RELU, SAE, TOPK
from . import files

FOLDER = "sae"
HEADER = "sae_cfg"
PAIR = "sae.safetensors", "cfg.json"
ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
TENSOR_FILES = ("sae.safetensors", "sae_weights.safetensors", "state_dict.pth", "ae.pt", "pytorch_model.bin")
CONFIGS = ("cfg.json", "config.json")
SIDE_FILES = ("mean.pt", "std.pt", "stats.safetensors", "sparsity.safetensors", "activation_whitening.safetensors")
STATS = ("mean", "max", "freq", "std")
OURS, SPARSIFY, SAELENS, OPENAI, LEARNING, SAEDIT = "concept nodes", "sparsify", "SAELens", "OpenAI", "dictionary_learning", "SAEdit"
LAYOUTS = (OURS, SPARSIFY, SAELENS, OPENAI, LEARNING, SAEDIT)
# What readers of tensor files raise for bytes that are none.
DAMAGED = (SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, struct.error)


class SAEError(ValueError):
    """A file that cannot be read as a sparse autoencoder, and what to do about it."""


class SAEFile(NamedTuple):
    """A sparse autoencoder and what its file says of it.

    config  as it is written in our header: `family`, `site`, `io` ("out": a module's output, "diff": output less input, "text": an
            encoder's rows), `model` and `data` (digests), `fvu`, `l0`, `dead`, `name`, ...; of others' files their own settings. `layout`
            is what was read.
    stats   (n,) each, where known: "mean" over all vectors, those in which a latent is 0 too; "max"; "freq", the share in which it fires
    """

    sae: SAE
    config: dict[str, Any]
    stats: dict[str, torch.Tensor]


def show_folder() -> None:
    """Let the host list models/sae, whatever an extra-paths file has added to it."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, known = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*known, *ENDINGS})


def names() -> list[str]:
    """Files of models/sae that may hold an autoencoder."""
    return [name for name in files.names(FOLDER) if name.rsplit("/", 1)[-1] not in SIDE_FILES]


def fingerprint(name: str) -> str:
    """Changes when the file does, or what is told beside it."""
    try:
        folder = files.resolve(FOLDER, name).parent
    except files.MissingFile:
        return f"{name}: missing"
    beside = [folder / other for other in (*CONFIGS, *SIDE_FILES)]
    told = [f"{path.name}: {path.stat().st_size} bytes, {path.stat().st_mtime_ns}" for path in beside if path.exists()]
    return "; ".join([files.fingerprint(FOLDER, name), *told])


def read(path: Path | str) -> SAEFile:
    """A file, or a folder that holds one of a published layout, in the type in which it was saved. Raises SAEError."""
    path = _tensor_file(Path(path))
    state, header = _tensors(path)
    config = _config(path, header)
    layout = _layout(path, state, header, config)
    sae, stats = _READERS[layout](_State(path, state), config)
    _check(path, sae)
    stats = {name: tensor.float() for name, tensor in stats.items()}
    for name, tensor in stats.items():
        if tensor.shape != (sae.n,):
            what = f"has {tuple(tensor.shape)} numbers for the statistic '{name}' of {sae.n} latents"
            raise _wrong(path, what, "Take the file beside it away that holds them, or download it again")
    return SAEFile(sae, config | {"layout": layout}, stats)


def write(path: Path | str, file: SAEFile) -> None:
    """Ours, in one file that is there whole or not at all. Raises OSError."""
    sae, path = file.sae, Path(path)
    state = _canonical(sae)
    extra = {"threshold": sae.threshold, "norm.mean": sae.mean, "norm.std": sae.std}
    state |= {name: tensor for name, tensor in extra.items() if tensor is not None}
    state |= {f"stats.{name}": tensor for name, tensor in file.stats.items()}
    own = {"activation": sae.activation, "k": sae.k, "center": sae.center, "d_in": sae.d, "num_latents": sae.n, "version": 1}
    _save(path, state, {HEADER: json.dumps(file.config | own)})


def export_sparsify(folder: Path | str, file: SAEFile) -> None:
    """The strict pair that sparsify and SAELens load, and stats.safetensors beside it. Normalisation is made part of the weights. A
    threshold is left out: what was trained as BatchTopK is read there as topk with the same k. Raises SAEError for kinds that keep no
    number of latents.
    """
    sae, folder = file.sae, Path(folder)
    if sae.activation not in (TOPK, BATCH_TOPK) or sae.k < 1:
        raise SAEError(
            f"'{sae.activation}' cannot be exported: the format knows only a number of latents that are kept. Train one of 'topk'."
        )
    sae = _folded(sae)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / PAIR[0], _canonical(sae), {})
    if file.stats:
        _save(folder / "stats.safetensors", dict(file.stats), {})
    told = {"d_in": sae.d, "num_latents": sae.n, "k": sae.k, "activation": "topk", "expansion_factor": max(1, sae.n // sae.d)}
    told |= {"normalize_decoder": False, "multi_topk": False, "skip_connection": False, "transcode": not sae.center}
    part = folder / (PAIR[1] + ".part")
    part.write_text(json.dumps(told), encoding="utf-8")
    part.replace(folder / PAIR[1])


def _canonical(sae: SAE) -> dict[str, torch.Tensor]:
    return {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


def _folded(sae: SAE) -> SAE:
    """The same without norms. Codes and vectors are the same; centred where std is the same for all numbers or there is none of either."""
    if sae.mean is None and sae.std is None:
        return sae
    std = torch.ones_like(sae.b_dec, dtype=torch.float32) if sae.std is None else sae.std.float()
    mean = torch.zeros_like(std) if sae.mean is None else sae.mean.float()
    # W ((x - mean) / std - b) = (W / std) (x - (mean + std b)), with the decoder's bias what is taken from x.
    weight, bias = sae.W_enc.float() / std, mean + std * sae.b_dec.float()
    own = sae.b_enc.float() if sae.center else sae.b_enc.float() + sae.W_enc.float() @ sae.b_dec.float()
    return sae._replace(W_enc=weight, b_enc=own, W_dec=sae.W_dec.float() * std, b_dec=bias, center=True, mean=None, std=None)


def _save(path: Path, state: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, part, metadata=header)
        part.replace(path)
    except SafetensorError as error:  # which is what a full disk is to safetensors
        raise OSError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def _wrong(path: Path, what: str, do: str) -> SAEError:
    return SAEError(f"'{path.name}' {what}. {do}. It lies at {path}.")


def _tensor_file(path: Path) -> Path:
    """The file that holds the tensors."""
    if not path.is_dir():
        return path
    found = [path / name for name in TENSOR_FILES if (path / name).exists()]
    if not found:
        raise _wrong(
            path, f"is a folder without {', '.join(TENSOR_FILES[:-1])} or {TENSOR_FILES[-1]}", "Choose the folder that holds one of them"
        )
    return found[0]


def _tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file holds, by name, and its header where it has one."""
    try:
        if path.suffix in (".safetensors", ".sft"):
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _wrong(
            path, "holds more than tensors and was not opened, because opening it could run code", "Ask for it as safetensors"
        ) from error
    except OSError as error:
        raise _wrong(path, f"cannot be opened ({error})", "Check that it is there and may be read") from error
    except DAMAGED as error:
        reason = str(error).strip().splitlines()
        raise _wrong(
            path,
            f"cannot be read ({reason[0] if reason else type(error).__name__}): it is damaged or cut short",
            "Download or save it again",
        ) from error
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    if not isinstance(held, Mapping):
        raise _wrong(path, "is no dictionary of tensors", "Choose the file with the autoencoder's weights")
    return dict(held), {}


def _config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Settings from the header, or from the JSON file beside it."""
    beside = [path.with_name(name) for name in CONFIGS if path.with_name(name).exists()]
    text, where = header.get(HEADER), path
    try:
        if text is None and beside:
            where = beside[0]
            text = where.read_text(encoding="utf-8")
        told = json.loads(text or "{}")
    except (OSError, ValueError) as error:
        raise _wrong(where, f"has settings that cannot be read ({error})", "Download or save it again") from error
    if not isinstance(told, dict):
        raise _wrong(where, "has settings that are no JSON object", "Download or save it again")
    return told


def _layout(path: Path, state: Mapping[str, Any], header: Mapping[str, str], config: Mapping[str, Any]) -> str:
    if HEADER in header:
        return OURS
    for layout, wanted in _SIGNS.items():
        if wanted <= set(state):
            if layout == SAELENS:  # three write these names, and only their settings tell them apart
                return SAEDIT if "act_size" in config else LEARNING if isinstance(config.get("trainer"), dict) else SAELENS
            return layout
    known = ", ".join(sorted(state)[:6]) or "nothing"
    raise _wrong(
        path, f"is of no layout that is known here: it holds {known}", f"Known are {', '.join(LAYOUTS)}; ask for it as one of these"
    )


_SIGNS = {
    OPENAI: {"encoder.weight", "decoder.weight", "latent_bias", "pre_bias"},
    SPARSIFY: {"encoder.weight", "encoder.bias", "W_dec", "b_dec"},
    LEARNING: {"encoder.weight", "encoder.bias", "decoder.weight"},
    SAELENS: {"W_enc", "W_dec", "b_dec"},
}


class _State:
    """The tensors of a file, asked for by name."""

    def __init__(self, path: Path, held: Mapping[str, Any]):
        self.path, self.held = path, held

    def __contains__(self, name: str) -> bool:
        return isinstance(self.held.get(name), torch.Tensor)

    def get(self, name: str) -> torch.Tensor:
        if name not in self:
            raise _wrong(self.path, f"lacks the tensor '{name}'", "Download or save it again")
        return self.held[name]

    def optional(self, name: str) -> torch.Tensor | None:
        return self.held[name] if name in self else None

    def refuse(self, what: str) -> SAEError:
        return _wrong(self.path, what, "It cannot be used here: choose another file")

    def beside(self, name: str) -> torch.Tensor | None:
        """The one tensor of a file next to it, None where there is none."""
        path = self.path.with_name(name)
        if not path.exists():
            return None
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, OSError, *DAMAGED) as error:
            raise _wrong(path, f"cannot be read as one tensor ({type(error).__name__})", "Download it again or take it away") from error
        return held if isinstance(held, torch.Tensor) else None

    def number(self, config: Mapping[str, Any], *names: str) -> int:
        """A whole number that the settings or the tensors have under one of these names; 0 where neither has."""
        for name in names:
            value = config.get(name, self.held.get(name))
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
                return int(value)
        return 0


def _read_ours(state: _State, config: dict[str, Any]) -> tuple[SAE, dict]:
    activation = config.get("activation")
    if activation not in ACTIVATIONS:
        raise state.refuse(f"has the activation '{activation}', which is none of {', '.join(ACTIVATIONS)}")
    sae = SAE(
        *(state.get(name) for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")), activation, state.number(config, "k"),
        state.optional("threshold"), bool(config.get("center", True)), state.optional("norm.mean"), state.optional("norm.std"),
    )  # fmt: skip
    return sae, {name: state.get(f"stats.{name}") for name in STATS if f"stats.{name}" in state}


def _read_sparsify(state: _State, config: dict[str, Any]) -> tuple[SAE, dict]:
    activation = config.get("activation", "topk")
    if activation != "topk" or "W_skip" in state:
        raise state.refuse("has a shortcut past the latents (W_skip)" if "W_skip" in state else f"has the activation '{activation}'")
    _refuse_each_by_itself(state, config, "input_unit_norm")
    # What is BatchTopK in training is topk with the same k afterwards: no threshold is kept.
    sae = SAE(
        *(state.get(name) for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")), TOPK, state.number(config, "k"),
        center=not config.get("transcode", False),
    )  # fmt: skip
    path = state.path.with_name("stats.safetensors")
    held = _tensors(path)[0] if path.exists() else {}
    return sae, {name: held[name] for name in STATS if name in held}


def _read_openai(state: _State, config: dict[str, Any]) -> tuple[SAE, dict]:
    k = state.number(config, "k")
    sae = SAE(
        state.get("encoder.weight"), state.get("latent_bias"), state.get("decoder.weight").T.contiguous(), state.get("pre_bias"),
        TOPK if k else RELU, k,
    )  # fmt: skip
    stats = {"mean": state.beside("mean.pt"), "std": state.beside("std.pt")}
    return sae, {name: tensor.flatten() for name, tensor in stats.items() if tensor is not None}


def _read_learning(state: _State, config: dict[str, Any]) -> tuple[SAE, dict]:
    if "W_enc" in state:
        return _read_columns(state, config)
    trainer = config.get("trainer", config)
    trainer = trainer if isinstance(trainer, dict) else {}
    k, threshold = state.number(trainer, "k"), state.optional("threshold")
    bias = state.optional("b_dec")
    bias = state.optional("bias") if bias is None else bias
    center = bias is not None
    if bias is None:
        bias = state.get("decoder.bias")  # the later plain kind, which does not take it from the vector first
    activation = RELU if not k else BATCH_TOPK if threshold is not None else TOPK
    if threshold is not None and float(threshold) < 0:
        threshold = None  # -1: none was found yet
    sae = SAE(
        state.get("encoder.weight"),
        state.get("encoder.bias"),
        state.get("decoder.weight").T.contiguous(),
        bias,
        activation,
        k,
        threshold,
        center,
    )
    return sae, {}


def _read_columns(state: _State, config: dict[str, Any]) -> tuple[SAE, dict]:
    """Files with W_enc (d, n): SAELens, and dictionary_learning's JumpReLU and Matryoshka."""
    trainer = config.get("trainer")
    learning = isinstance(trainer, dict)
    told = trainer if learning else config
    architecture = str(told.get("dict_class" if learning else "architecture", "")).lower()
    if "gated" in architecture or "b_gate" in state or "r_mag" in state or "transcoder" in architecture or "W_skip" in state:
        raise state.refuse(f"is of the architecture '{architecture or 'gated'}', which has more than one code for a vector")
    norm = told.get("normalize_activations", "none")
    if norm not in ("none", None) or state.path.with_name("activation_whitening.safetensors").exists():
        raise state.refuse(f"was trained on vectors normalised by '{norm}', of which the file says no more")
    k, threshold = state.number(told, "k"), state.optional("threshold")
    if threshold is not None and threshold.numel() == 1 and float(threshold) < 0:
        threshold = None
    batch = learning and k > 0
    activation = BATCH_TOPK if batch else JUMPRELU if threshold is not None else TOPK if k else RELU
    center = True if batch else bool(told.get("apply_b_dec_to_input", not learning))
    encoder, decoder = state.get("W_enc").T.contiguous(), state.get("W_dec")
    bias = state.optional("b_enc")
    bias = encoder.new_zeros(len(encoder)) if bias is None else bias
    if told.get("rescale_acts_by_decoder_norm") or (learning and not batch):
        # Codes in lengths of their directions: the directions are made 1 long, and what codes are read from takes their lengths.
        lengths = decoder.float().norm(dim=1).to(decoder)
        encoder, bias, decoder = encoder * lengths[:, None], bias * lengths, decoder / lengths[:, None]
        threshold = threshold if threshold is None else threshold * lengths
    return SAE(encoder, bias, decoder, state.get("b_dec"), activation, k, threshold, center), {}


def _read_saedit(state: _State, config: dict[str, Any]) -> tuple[SAE, dict]:
    _refuse_each_by_itself(state, config, "input_unit_norm")
    encoder = state.get("W_enc").T.contiguous()
    # The file holds a b_enc that its own code never reads.
    return SAE(
        encoder, encoder.new_zeros(len(encoder)), state.get("W_dec"), state.get("b_dec"), BATCH_TOPK, state.number(config, "top_k"),
        state.optional("threshold"),
    ), {}  # fmt: skip


def _refuse_each_by_itself(state: _State, config: Mapping[str, Any], name: str) -> None:
    if config.get(name):
        raise state.refuse(f"normalises each vector by its own mean and spread ({name}), which no direction can be read from")


_READERS = {
    OURS: _read_ours,
    SPARSIFY: _read_sparsify,
    SAELENS: _read_columns,
    OPENAI: _read_openai,
    LEARNING: _read_learning,
    SAEDIT: _read_saedit,
}


def _check(path: Path, sae: SAE) -> None:
    """Raises SAEError where tensors do not fit one another or hold what is no number."""
    if sae.W_enc.ndim != 2:
        raise _wrong(path, f"has an encoder of the shape {tuple(sae.W_enc.shape)}, not (latents, numbers)", "Download or save it again")
    n, d = sae.W_enc.shape
    shapes = {"b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "mean": (d,), "std": (d,)}
    for name, shape in shapes.items():
        tensor = getattr(sae, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            what = f"has {name} of the shape {tuple(tensor.shape)} beside an encoder of {n} latents for {d} numbers, which asks for {shape}"
            raise _wrong(path, what, "It is put together from two files, or of another layout: download or save it again")
    if sae.threshold is not None and tuple(sae.threshold.shape) not in ((), (n,)):
        raise _wrong(path, f"has {tuple(sae.threshold.shape)} thresholds for {n} latents", "Download or save it again")
    for name, tensor in sae._asdict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if not tensor.is_floating_point():
            raise _wrong(path, f"has {name} in {tensor.dtype}, which holds no fractions", "Ask for it in float16, bfloat16 or float32")
        # A sum is finite only where all are; it may overflow where all are, so that what is not is looked at once more.
        if not math.isfinite(float(tensor.sum(dtype=torch.float64))) and not tensor.isfinite().all():
            raise _wrong(path, f"holds NaN or infinity in {name}: its training failed or it is damaged", "Use another copy")
    if sae.std is not None and not (sae.std > 0).all():
        raise _wrong(path, "divides by a std that is not above 0", "Train it again")
    if sae.activation == JUMPRELU and sae.threshold is None:
        raise _wrong(path, "has no thresholds, which jumprelu needs", "Download or save it again")
    if sae.counts and not 1 <= sae.k <= n:
        what = f"keeps {sae.k} of {n} latents" if sae.k else "does not say how many latents are kept (k)"
        raise _wrong(path, what, f"Put the {' or '.join(CONFIGS)} that was published with it beside it")
