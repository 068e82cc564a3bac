"""Export a lab model as diffusers folders, so that published reference code can run on the very same weights.

`python run.py lab export --output FOLDER` writes `unet/` and `dit/`. The first is a whole StableDiffusionPipeline; the second holds the
transformer and what belongs to it without a pipeline, since diffusers' FluxPipeline expects a T5 encoder that the lab has none of: feed
the CLIP states as `encoder_hidden_states` and the pooled ones as `pooled_projections`.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import torch

from ..host import lab as host_lab

log = logging.getLogger("concept_nodes.lab")


def vae_names(names) -> dict[str, str]:
    """{host's name: diffusers' name} for every tensor of an autoencoder, whatever the number of its levels."""
    top = max(int(found[1]) for name in names if (found := re.match(r"decoder\.up\.(\d+)\.", name)))
    steps = (
        (r"encoder\.down\.(\d+)\.block\.(\d+)\.", lambda m: f"encoder.down_blocks.{m[1]}.resnets.{m[2]}."),
        (r"encoder\.down\.(\d+)\.downsample\.", lambda m: f"encoder.down_blocks.{m[1]}.downsamplers.0."),
        (r"decoder\.up\.(\d+)\.block\.(\d+)\.", lambda m: f"decoder.up_blocks.{top - int(m[1])}.resnets.{m[2]}."),
        (r"decoder\.up\.(\d+)\.upsample\.", lambda m: f"decoder.up_blocks.{top - int(m[1])}.upsamplers.0."),
        (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
    mapped = {}
    for name in names:
        theirs = name
        for pattern, to in steps:
            theirs = re.sub(pattern, to, theirs)
        mapped[name] = theirs
    return mapped


def export_vae(folder: Path, name: str):
    """diffusers' AutoencoderKL with the weights of a lab model's autoencoder."""
    from diffusers import AutoencoderKL

    source = host_lab.VAES[name]
    tensors, _ = host_lab.read_weights(folder / f"{source}.safetensors")
    config = host_lab.VAE_CONFIGS[source]
    widths = [config["ch"] * factor for factor in config["ch_mult"]]
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        norm_num_groups=32,
        sample_size=config["resolution"],
        scaling_factor=0.18215,
    )
    state = {}
    for name, theirs in vae_names(tensors).items():
        value = tensors[name].float()
        state[theirs] = value[:, :, 0, 0] if ".attentions." in theirs and value.ndim == 4 else value
    model.load_state_dict(state)
    return model.eval()


def export_unet(folder: Path):
    """diffusers' UNet2DConditionModel with the lab's weights."""
    import comfy.utils
    from diffusers import UNet2DConditionModel

    tensors, _ = host_lab.read_weights(folder / "unet.safetensors")
    config = host_lab.UNET_CONFIG
    crossed = config["transformer_depth"]
    model = UNet2DConditionModel(
        sample_size=64 // host_lab.downscale("unet"),
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in crossed],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(crossed)],
        block_out_channels=[config["model_channels"] * factor for factor in config["channel_mult"]],
        layers_per_block=config["num_res_blocks"][0],
        cross_attention_dim=config["context_dim"],
        attention_head_dim=config["num_heads"],  # diffusers' name for the number of heads
    )
    names = comfy.utils.unet_to_diffusers(config)
    wanted = model.state_dict()
    model.load_state_dict(
        {theirs: tensors[ours].float().reshape(wanted[theirs].shape) for theirs, ours in names.items() if theirs in wanted}
    )
    return model.eval()


def export_dit(folder: Path):
    """diffusers' FluxTransformer2DModel with the lab's weights."""
    import comfy.utils
    from diffusers import FluxTransformer2DModel

    tensors, _ = host_lab.read_weights(folder / "dit.safetensors")
    config = host_lab.DIT_CONFIG
    model = FluxTransformer2DModel(
        patch_size=1,  # diffusers packs patches before the model: see `pack`
        in_channels=config["in_channels"] * config["patch_size"] ** 2,
        num_layers=config["depth"],
        num_single_layers=config["depth_single_blocks"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        num_attention_heads=config["num_heads"],
        joint_attention_dim=config["context_in_dim"],
        pooled_projection_dim=config["vec_in_dim"],
        guidance_embeds=False,
        axes_dims_rope=tuple(config["axes_dim"]),
    )
    state, wanted = {}, model.state_dict()
    for theirs, place in comfy.utils.flux_to_diffusers(config).items():
        if theirs not in wanted:
            continue
        if isinstance(place, str):
            state[theirs] = tensors[place].float()
        else:
            # (name, (axis, from, length)) is a part of a fused weight; (name, None, swap) exchanges shift and scale, and back again.
            ours, part, *swap = place
            value = tensors[ours].float()
            state[theirs] = swap[0](value) if swap else value.narrow(*part)
    model.load_state_dict(state)
    return model.eval()


def scheduler_of(name: str):
    """The scheduler of a lab model: Stable Diffusion's betas for the UNet, a straight path for the DiT."""
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    if name == "dit":
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")


def export(output: Path, folder: Path = host_lab.WEIGHTS) -> None:
    """Write `output/unet` and `output/dit` from the weights in `folder`. Raises LabError where weights are missing."""
    from .train_text import load_encoder

    encoder, tokenizer = load_encoder(folder, "cpu"), host_lab.tokenizer()
    tokenizer.model_max_length = host_lab.TEXT_CONFIG["max_position_embeddings"]
    for name, model, part in (("unet", export_unet(folder), "unet"), ("dit", export_dit(folder), "transformer")):
        parts = {
            part: model,
            "vae": export_vae(folder, name),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
            "scheduler": scheduler_of(name),
        }
        for key, value in parts.items():
            value.save_pretrained(output / name / key)
        log.info("wrote %s", output / name)
    index = {key: ["diffusers" if key in ("unet", "vae", "scheduler") else "transformers", kind] for key, kind in _PIPELINE.items()}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
    (output / "unet" / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


_PIPELINE = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "scheduler": "EulerDiscreteScheduler",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}


def pack(latent: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, H, W) as diffusers' Flux transformer reads them, one token a patch: (N, tokens, C * patch * patch)."""
    n, c, h, w = latent.shape
    p = host_lab.DIT_CONFIG["patch_size"]
    return latent.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // p) * (w // p), c * p * p)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack`, for latents of height by width."""
    n, _, c = tokens.shape
    p = host_lab.DIT_CONFIG["patch_size"]
    return tokens.view(n, height // p, width // p, c // p**2, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, c // p**2, height, width)
