"""The lab models through the host's own classes, all of tiny width: an SD1.5-class UNet, a Flux-class DiT, a CLIP and a KL autoencoder.

No stock loader can read them (the host detects models by full-size widths), so they are built from configuration here, and from then on
they are the host's: every sampler, LoRA loader, VAE node and text node treats them as it treats any model.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

WEIGHTS = Path(__file__).resolve().parent.parent / "lab" / "weights"
LORAS, CONTROLNETS = WEIGHTS.parent / "loras", WEIGHTS.parent / "controlnets"
SAES, FEATURES = WEIGHTS.parent / "sae", WEIGHTS.parent / "concept_features"
VOCABULARY = 49408
ROW_SEED = 20261120

TEXT_CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
VAE_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
# A quarter of the size for the UNet: objects of 16 pixels need more than the two cells of the usual eighth.
VAE_CONFIGS = {"vae": VAE_CONFIG | {"ch_mult": [1, 2, 2]}, "vae_dit": VAE_CONFIG | {"ch_mult": [1, 2, 2, 2]}}
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1, 1],
    "channel_mult": [1, 2, 2, 4],
    "transformer_depth": [0, 1, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 128,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "num_classes": None,
    "legacy": False,
    "use_temporal_attention": False,
}
DIT_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "vec_in_dim": 128,
    "context_in_dim": 128,
    "hidden_size": 160,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 5,
    "axes_dim": [8, 16, 16],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
# Colours (-1 to 1) of the four latent channels and of none, least squares over an autoencoder's own pictures: for the host's previews.
PREVIEW_COLOURS = {
    "vae": [
        [0.0425, -0.0822, 0.0176],
        [0.5873, 0.33, 0.2175],
        [-0.0747, 0.1718, 0.3524],
        [0.087, 0.006, 0.0798],
        [-0.0173, -0.0571, -0.0907],
    ],
    "vae_dit": [
        [-0.7234, -0.6527, -0.5334],
        [-1.0611, -1.1344, -1.1092],
        [0.5851, 0.7393, 0.9089],
        [-0.2781, -0.2935, -0.223],
        [0.0105, -0.0343, -0.0624],
    ],
}
MODELS = ("unet", "dit")
VAES = {"unet": "vae", "dit": "vae_dit"}  # the autoencoder of each model


class LabModel(NamedTuple):
    """What a lab model is made of: the host's MODEL (patcher), CLIP and VAE."""

    model: object
    clip: object
    vae: object


class LabError(ValueError):
    """A lab model that cannot be given, and what to do about it."""


def hashed_rows(ids: np.ndarray, width: int) -> torch.Tensor:
    """Token embeddings of words that the lab never learnt: (len(ids), width) float32, the same on every machine.

    Storing all 49,408 rows would outweigh the models, so rows that training did not touch are made from their number by an integer hash.
    """
    cell = ids.astype(np.uint32)[:, None] * np.uint32(width) + np.arange(width, dtype=np.uint32)[None]
    cell = cell + np.uint32(ROW_SEED)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        cell = (cell ^ (cell >> np.uint32(shift))) * np.uint32(factor)
    cell = cell ^ (cell >> np.uint32(16))
    uniform = cell.astype(np.float64) / 2**32
    return torch.from_numpy(((uniform - 0.5) * 0.02 * 12**0.5).astype(np.float32))


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and the configuration in the header of a lab weight file. Raises LabError with what to do when it is missing or broken."""
    if not path.is_file():
        raise LabError(
            f"The lab weights {path.name} are missing from {path.parent}: reinstall the pack, or train them with `python run.py lab`."
        )
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118 (safe_open is no mapping)
    except Exception as error:
        raise LabError(f"The lab weights {path} cannot be read ({error}): reinstall the pack.") from error


def check_tensors(path: Path, tensors: Collection[str], expected: Collection[str]) -> None:
    """Raises LabError where a weight file does not hold exactly the expected tensors: the host would leave the rest at random values."""
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise LabError(
            f"The lab weights {path} are not those of this version of the pack: {len(missing)} tensors are missing and {len(unknown)} "
            f"unknown, the first is {(missing + unknown)[0]}. Please reinstall the pack."
        )


def full_embedding(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Text weights with the stored rows laid into a whole (49408, width) embedding table."""
    tensors = dict(tensors)
    prefix = "text_model.embeddings.token_embedding."
    ids, rows = tensors.pop(prefix + "ids"), tensors.pop(prefix + "rows")
    table = hashed_rows(np.arange(VOCABULARY), rows.shape[1])
    table[ids.long()] = rows.float()
    tensors[prefix + "weight"] = table
    return tensors


def downscale(name: str) -> int:
    """Pixels a side for each latent cell of a model, or of the autoencoder of this name."""
    return 2 ** (len(VAE_CONFIGS[VAES.get(name, name)]["ch_mult"]) - 1)


def build_vae_module(name: str = "vae") -> torch.nn.Module:
    """The host's KL autoencoder at the lab's width, weights not set."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    return AutoencoderKL(ddconfig=VAE_CONFIGS[name], embed_dim=4)


def build_unet_module() -> torch.nn.Module:
    """The host's UNet at the lab's width, trainable, weights not set."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**UNET_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)


def build_dit_module() -> torch.nn.Module:
    """The host's Flux transformer at the lab's width, trainable, weights not set."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    return Flux(**DIT_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)


def tokenizer():
    """The host's CLIP tokenizer as transformers' class."""
    import comfy.sd1_clip
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer")


def _latent_format(name: str):
    """Stable Diffusion 1.5's format at a model's scale, with the lab's colours for the host's previews."""
    import comfy.latent_formats

    latent = comfy.latent_formats.SD15()
    latent.spacial_downscale_ratio = downscale(name)
    colours = PREVIEW_COLOURS[VAES[name]]
    latent.latent_rgb_factors, latent.latent_rgb_factors_bias = colours[:-1], colours[-1]
    latent.taesd_decoder_name = None
    return latent


def _model_config(name: str):
    import comfy.supported_models

    if name == "unet":
        config = comfy.supported_models.SD15(UNET_CONFIG)
        # SD15 forces eight heads on whatever it is given.
        config.unet_config = dict(UNET_CONFIG)
    else:
        config = comfy.supported_models.FluxSchnell(DIT_CONFIG)
        config.unet_config = dict(DIT_CONFIG)
    config.latent_format = _latent_format(name)
    return config


def load_model(name: str, weights: str | None = None, disable_dynamic: bool = False):
    """MODEL of a lab model, as the host's patcher. It reloads itself from the same file when the host asks for a pristine copy (deep
    copies, training, further GPUs), which is what `cached_patcher_init` promises.
    """
    import comfy.model_management
    import comfy.model_patcher

    path = Path(weights) if weights else WEIGHTS / f"{name}.safetensors"
    tensors, _ = read_weights(path)
    config = _model_config(name)
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=sum(t.numel() for t in tensors.values()),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=torch.float16,
    )
    if load_device.type == "cpu":
        dtype = torch.float32
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes))
    model = config.get_model(tensors, "", device=offload_device)
    check_tensors(path, tensors, model.diffusion_model.state_dict())
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights({key: tensor.to(dtype) for key, tensor in tensors.items()}, "", assign=patcher.is_dynamic())
    model.to(offload_device)
    patcher.cached_patcher_init = (load_model, (name, weights))
    return patcher


def load_clip(weights: str | None = None, disable_dynamic: bool = False):
    """CLIP: the host's SD1 CLIP class with the lab's text encoder in it."""
    import comfy.model_management
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base
    import folder_paths

    path = Path(weights) if weights else WEIGHTS / "text.safetensors"
    tensors, _ = read_weights(path)
    check_tensors(path, tensors, text_names())
    tensors = {"clip_l.transformer." + key: tensor.float() for key, tensor in full_embedding(tensors).items()}
    # The text encoder has no projection of its own; pooled states are used as they are.
    tensors["clip_l.transformer.text_projection.weight"] = torch.eye(TEXT_CONFIG["hidden_size"])
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"clip_l_tokenizer_class": partial(comfy.sd1_clip.SDTokenizer, embedding_size=TEXT_CONFIG["hidden_size"])},
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        state_dict=tensors,
        model_options={"clip_l_model_config": dict(TEXT_CONFIG)},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_clip_patcher, (weights,))
    return clip


def text_names() -> list[str]:
    """Names of the tensors in the text encoder's weight file."""
    parts = ["mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out"))]
    layers = [f"encoder.layers.{i}.{part}" for i in range(TEXT_CONFIG["num_hidden_layers"]) for part in parts]
    names = [f"{layer}.{kind}" for layer in (*layers, "final_layer_norm") for kind in ("weight", "bias")]
    names += [f"embeddings.{name}" for name in ("position_embedding.weight", "token_embedding.ids", "token_embedding.rows")]
    return [f"text_model.{name}" for name in names]


def _clip_patcher(weights: str | None = None, disable_dynamic: bool = False):
    return load_clip(weights, disable_dynamic).patcher


def load_vae(name: str = "vae", weights: str | None = None):
    """VAE: the host's class around its KL autoencoder at the lab's width."""
    import comfy.sd

    path = Path(weights) if weights else WEIGHTS / f"{name}.safetensors"
    tensors, _ = read_weights(path)
    with torch.device("meta"):
        check_tensors(path, tensors, build_vae_module(name).state_dict())
    vae = comfy.sd.VAE(
        sd={key: tensor.float() for key, tensor in tensors.items()},
        config={"params": {"ddconfig": dict(VAE_CONFIGS[name]), "embed_dim": 4}},
    )
    vae.downscale_ratio = vae.upscale_ratio = downscale(name)
    vae.patcher.cached_patcher_init = (_vae_patcher, (name, weights))
    return vae


def _vae_patcher(name: str = "vae", weights: str | None = None, disable_dynamic: bool = False):
    return load_vae(name, weights).patcher


def load(name: str) -> LabModel:
    """A lab model by name. Raises LabError that lists the names."""
    if name not in MODELS:
        raise LabError(unknown(name))
    return LabModel(load_model(name), load_clip(), load_vae(VAES[name]))


def show_files() -> None:
    """Let the host list the lab's own files, LoRAs and ControlNets and autoencoders and features, all under `concept_lab/`."""
    import folder_paths

    from . import features, sae_files

    for listed in (sae_files, features):
        listed.show_folder()  # first: what is trained goes to a kind's first folder
    folder_paths.add_model_folder_path("loras", str(LORAS))
    folder_paths.add_model_folder_path("controlnet", str(CONTROLNETS))
    folder_paths.add_model_folder_path(sae_files.FOLDER, str(SAES))
    folder_paths.add_model_folder_path(features.FOLDER, str(FEATURES))


def unknown(name: str) -> str:
    """What to say of a name that no lab model has."""
    return f"There is no lab model named '{name}'. Choose one of: {', '.join(MODELS)}."


def fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Size and time of a lab model's files, so that retrained weights are seen."""
    files = [WEIGHTS / f"{part}.safetensors" for part in (name, "text", VAES[name])]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
