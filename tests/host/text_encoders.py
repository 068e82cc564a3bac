"""Small CLIPs of the host's own classes with seeded random weights, and the host's own tokenizers."""

import copy
from functools import cache

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import models
import torch

WIDTH_L, WIDTH_G = 24, 32
CLIP_L = {"hidden_size": WIDTH_L, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
CLIP_G = {"hidden_size": WIDTH_G, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "projection_dim": WIDTH_G}
T5 = {"d_model": 40, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2}
# Stable Diffusion 3 lays T5's rows behind the others' at the published width.
T5_WIDE = T5 | {"d_model": 4096, "num_layers": 1}
KINDS = {
    "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    "sd3": (comfy.text_encoders.sd3_clip.SD3Tokenizer, comfy.text_encoders.sd3_clip.sd3_clip()),
    "sd3 without t5": (comfy.text_encoders.sd3_clip.SD3Tokenizer, comfy.text_encoders.sd3_clip.sd3_clip(t5=False)),
    "flux": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip()),
}


@cache
def build(kind: str):
    """A CLIP of a kind. Its weights are random: shared, and never to be changed."""
    tokenizer, model = KINDS[kind]
    half = torch.float16 if kind == "sd3" else torch.float32  # its word table alone is 132 million numbers
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(tokenizer, model),
        parameters=0,
        state_dict={},
        model_options={
            "dtype": half,
            "clip_l_model_config": CLIP_L,
            "clip_g_model_config": CLIP_G,
            "t5xxl_model_config": T5_WIDE if kind == "sd3" else T5,
        },
    )
    with torch.no_grad():
        models.fill(clip.cond_stage_model, 3)
    return clip


def encode(clip, text: str) -> list:
    """CONDITIONING of a text, as the host's text node makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def short(kind: str, rows: int = 7):
    """A CLIP whose tokenizers make so many rows of a text that fits into them."""
    clip = build(kind).clone()
    clip.tokenizer = copy.deepcopy(clip.tokenizer)
    for tokenizer in vars(clip.tokenizer).values():
        if hasattr(tokenizer, "max_length"):
            tokenizer.max_length, tokenizer.min_length = (rows, None) if tokenizer.pad_to_max_length else (tokenizer.max_length, rows)
    return clip
