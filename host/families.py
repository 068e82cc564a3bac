"""The table of model families: how a model is recognised, what its files look like and what is known to suit it.

A new family is a new row. Names of the host's classes are compared as text, so that the table can be printed without the host.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Family(NamedTuple):
    """A family of diffusion models.

    name           how it is called in reports and errors
    configs        class names of the host's model configurations (comfy.supported_models)
    layers         kind of layer -> pattern of its module names; the first match counts
    text_width     width of the text states its cross-attention reads; None where a file's keys do not show it
    file_pattern   what only LoRA files of this family have in their keys
    renamed        prefixes of published files that the host does not know -> the host's
    rows           kind of rows (host.sites) -> pattern of the modules whose output has them; the picture's tokens where none matches
    tokenizers     of a CLIP's tokenizers, those whose tokens the context's rows stand for; the first that there is counts
    slider_layers  pattern of the modules that published sliders of the family adapt
    residual_layers  pattern of the modules that give a block's attention to the picture's rows, where personalized residuals lie
    residual_blocks  pattern of all of the layers of those blocks
    blocks         class names of the modules that a training may compute again instead of keeping what they computed
    maps           pattern of the modules that attend from the picture to words
    maps_read      which of them are read by default: FINE, all but those on the coarsest grid, or LATE, the last fifth
    pictures       pattern of the modules in which the picture attends to itself, in their order
    site_blocks    class names of the blocks that features may lie at
    site_layers    pattern of layers that they may lie at as well
    site           of both, what is taken where none is named: one, or all of a kind of layer
    slider_start   where published sliders of the family start, as a share of sampling: later keeps layout, earlier changes more
    site_words     pattern of further layers that features may lie at, over the prompt's rows; none where empty
    only           what of the pack alone is known to work on it; all of it where empty
    """

    name: str
    configs: tuple[str, ...]
    layers: dict[str, str]
    text_width: int | None
    file_pattern: str
    renamed: dict[str, str]
    rows: dict[str, str]
    tokenizers: tuple[str, ...]
    slider_layers: str
    residual_layers: str
    residual_blocks: str
    blocks: tuple[str, ...]
    maps: str
    maps_read: str
    pictures: str
    site_blocks: tuple[str, ...]
    site_layers: str
    site: str
    slider_start: float
    site_words: str = ""
    only: str = ""


FINE, LATE = "all but the coarsest", "the last fifth"


UNET_LAYERS = {
    "self-attention": r"\.attn1\.",
    "cross-attention": r"\.attn2\.",
    "feed-forward": r"\.ff\.",
    "residual": r"\.(in_layers|out_layers|emb_layers|skip_connection)",
    "resampling": r"_blocks\.\d+\.\d+\.(op|conv)$",
}

UNET_ROWS = {"text": r"\.attn2\.to_[kv]$", "vector": r"\.emb_layers\.|^time_embed\.|^label_emb\."}
# "noxattn": self-attention, residual blocks and samplers; nothing that reads words.
UNET_SLIDER = r"\.attn1\.to_|\.(in_layers|out_layers|emb_layers|skip_connection)|_blocks\.\d+\.\d+\.(op|conv)$"
UNET_RESIDUAL = r"\.proj_out$"
UNET_TRANSFORMER = r"\.attn[12]\.to_|\.ff\.|\.proj_(in|out)$"
CROSS_ATTENTION = "cross-attention"
UNET_SITES = r"\.attn2$"
UNET_BLOCKS = ("ResBlock", "BasicTransformerBlock")
FLUX_SITES = r"\.img_attn\.proj$|^single_blocks\.\d+\.linear2$"
FLUX_SLIDER = r"_attn\.(qkv|proj)$|single_blocks\.\d+\.linear[12]$"
FLUX_TRANSFORMER = r"_attn\.(qkv|proj)$|_mlp\.|single_blocks\.\d+\.linear[12]$"
FLUX_ROWS = {
    "vector": r"_mod\.|\.modulation\.|^(time|vector|guidance)_in\.|adaLN_modulation",
    "text": r"\.txt_|^txt_in$",
    "joint": r"^single_blocks\.",
}

MMDIT_ROWS = {
    "vector": r"adaLN_modulation|^[ty]_embedder\.",
    "text": r"\.context_block\.|^context_(embedder|processor)\b",
}
FEATURES = "features"
NOWHERE = "(?!)"  # a pattern of no name

FAMILIES = (
    Family(
        name="Stable Diffusion 1.5",
        configs=("SD15", "SD15_instructpix2pix"),
        layers=UNET_LAYERS,
        text_width=768,
        file_pattern=r"up_blocks[_.]3[_.]attentions",
        renamed={},
        rows=UNET_ROWS,
        tokenizers=("l",),
        slider_layers=UNET_SLIDER,
        residual_layers=UNET_RESIDUAL,
        residual_blocks=UNET_TRANSFORMER,
        blocks=UNET_BLOCKS,
        maps=r"\.attn2$",
        maps_read=FINE,
        pictures=r"\.attn1$",
        site_blocks=("SpatialTransformer",),
        site_layers=UNET_SITES,
        site=CROSS_ATTENTION,
        slider_start=0.2,
    ),
    Family(
        name="SDXL",
        configs=("SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B", "SDXL_instructpix2pix"),
        layers=UNET_LAYERS,
        text_width=2048,
        file_pattern=r"(attentions|input_blocks|output_blocks|middle_block)[_.].*transformer_blocks[_.][1-9]",
        renamed={},
        rows=UNET_ROWS,
        tokenizers=("l", "g"),
        slider_layers=UNET_SLIDER,
        residual_layers=UNET_RESIDUAL,
        residual_blocks=UNET_TRANSFORMER,
        blocks=UNET_BLOCKS,
        maps=r"\.attn2$",
        maps_read=FINE,
        pictures=r"\.attn1$",
        site_blocks=("SpatialTransformer",),
        site_layers=UNET_SITES,
        site=CROSS_ATTENTION,
        slider_start=0.25,
    ),
    Family(
        name="Flux.1",
        configs=("Flux", "FluxSchnell", "FluxInpaint"),
        layers={"double blocks": r"double_blocks\.", "single blocks": r"single_blocks\."},
        text_width=None,
        file_pattern=r"(double_blocks|single_blocks|single_transformer_blocks)[_.]",
        renamed={"lora_unet_": "lora_transformer_"},
        rows=FLUX_ROWS,
        tokenizers=("t5xxl", "l"),
        slider_layers=FLUX_SLIDER,
        residual_layers=FLUX_SITES,
        residual_blocks=FLUX_TRANSFORMER,
        blocks=("DoubleStreamBlock", "SingleStreamBlock"),
        maps=r"\.double_blocks\.\d+$",
        maps_read=LATE,
        pictures=r"\.(double|single)_blocks\.\d+$",
        site_blocks=("DoubleStreamBlock", "SingleStreamBlock"),
        site_layers=FLUX_SITES,
        site="double_blocks.18",
        slider_start=0.05,
    ),
    Family(
        name="Stable Diffusion 3",
        configs=("SD3",),
        layers={},
        text_width=None,
        file_pattern=r"joint_blocks[_.]",
        renamed={},
        rows=MMDIT_ROWS,
        tokenizers=("l", "g", "t5xxl"),
        slider_layers=NOWHERE,
        residual_layers=NOWHERE,
        residual_blocks=NOWHERE,
        blocks=("JointBlock",),
        maps=NOWHERE,
        maps_read=LATE,
        pictures=NOWHERE,
        site_blocks=("JointBlock",),
        site_layers=r"\.x_block\.attn\.proj$",
        site="joint_blocks.12",
        slider_start=0.0,
        site_words=r"\.context_block\.attn\.proj$",
        only=FEATURES,
    ),
)

# Blocks of these classes give the prompt's rows first and the picture's second; all others the picture's first.
PICTURE_SECOND = ("JointBlock",)


# The host's layers of these have no gradient: their norm and rotation are one fused operation that knows the way forward only.
NO_GRADIENT = ("CosmosT2IPredict2", "CosmosI2VPredict2", "Anima")

ALL = "all"
BUT = "all but "
MIDDLE = "middle block"


class UnsupportedFamily(ValueError):
    """The model's family has no row in the table."""


def row_of(model) -> Family | None:
    """The row of a host model (comfy.model_base.BaseModel), whatever works on it; None where it has none."""
    config = type(model.model_config).__name__
    return next((family for family in FAMILIES if config in family.configs), None)


def family_of(model, use: str = "") -> Family:
    """The family of a host model, for a use of it. Raises UnsupportedFamily that lists what is supported."""
    family = row_of(model)
    if family is None:
        config = type(model.model_config).__name__
        raise UnsupportedFamily(
            f"This model is of the family {config}, which Concept Nodes do not support yet. Supported: {supported(use)}."
        )
    if family.only not in ("", use):
        raise UnsupportedFamily(
            f"This model is of the family {family.name}, on which only nodes for {family.only} work so far. "
            f"Supported here: {supported(use)}."
        )
    return family


def family_of_file(shapes: dict[str, tuple[int, ...]]) -> Family | None:
    """The family that a LoRA file was made for, from its keys and shapes; None where they do not tell."""
    widths = {
        shape[-1] if len(shape) == 2 else shape[1]
        for key, shape in shapes.items()
        if re.search(r"attn2[_.]to[_.][kv]\.(lora_down|lora_A|lora\.down)", key) and len(shape) > 1
    }
    for family in FAMILIES:
        if family.text_width in widths:
            return family
    for family in reversed(FAMILIES):
        if any(re.search(family.file_pattern, key) for key in shapes):
            return family
    return None


def layer_kind(family: Family, module: str) -> str:
    """Which of the family's kinds of layer a module is."""
    return next((kind for kind, pattern in family.layers.items() if re.search(pattern, module)), "other")


def layer_choices() -> list[str]:
    """What a choice of layers may be: all, those of one kind, all but one kind (as published sliders are made), or the middle block."""
    kinds = dict.fromkeys(kind for family in FAMILIES for kind in family.layers)
    return [ALL, *kinds, BUT + "cross-attention", MIDDLE]


def is_chosen(family: Family, module: str, choice: str) -> bool:
    """Whether a module is among the layers of a choice."""
    if choice == MIDDLE:
        return "middle_block." in module
    if choice.startswith(BUT):
        return layer_kind(family, module) != choice.removeprefix(BUT)
    return choice in (ALL, layer_kind(family, module))


def supported(use: str = "") -> str:
    return ", ".join(family.name for family in FAMILIES if family.only in ("", use))


def rows() -> list[dict[str, str]]:
    """The table as text, a dictionary per family, for `run.py families`."""
    return [
        {
            "family": family.name,
            "host classes": ", ".join(family.configs),
            "layers told apart": ", ".join(family.layers),
            "sliders usually start at": "" if family.only else f"{family.slider_start:.0%}",
            "only": family.only,
        }
        for family in FAMILIES
    ]


def format_table() -> str:
    """The table as aligned columns."""
    table = rows()
    head = list(table[0])
    lines = [head, *[[row[name] for name in head] for row in table]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
