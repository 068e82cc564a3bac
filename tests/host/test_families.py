"""Models and files are recognised, and the table's rows hold for models of the published size."""

import models
import pytest
import torch

from concept_nodes.host import adapters, families
from concept_nodes.host.families import FAMILIES, UnsupportedFamily, family_of, family_of_file, layer_kind

NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "flux": "Flux.1"}
UNET_ATTENTION = [f"attn{number}.to_{end}" for number in (1, 2) for end in ("q", "k", "v", "out.0")]
# The layers that published sliders adapt, in the names of their files.
PUBLISHED = {
    "sd15": [
        *[f"down_blocks.{i}.attentions.{j}.transformer_blocks.0.{end}" for i in range(3) for j in range(2) for end in UNET_ATTENTION],
        *[f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.{end}" for i in range(1, 4) for j in range(3) for end in UNET_ATTENTION],
        *[
            f"up_blocks.{i}.resnets.{j}.{end}"
            for i in range(4)
            for j in range(3)
            for end in ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
        ],
        *[f"down_blocks.{i}.downsamplers.0.conv" for i in range(3)],
        *[f"up_blocks.{i}.upsamplers.0.conv" for i in range(3)],
        *[f"mid_block.attentions.0.transformer_blocks.0.{end}" for end in UNET_ATTENTION],
    ],
    "sdxl": [
        *[f"down_blocks.2.attentions.{j}.transformer_blocks.{k}.{end}" for j in range(2) for k in range(10) for end in UNET_ATTENTION],
        *[f"up_blocks.1.attentions.{j}.transformer_blocks.{k}.{end}" for j in range(3) for k in range(2) for end in UNET_ATTENTION],
        *[f"mid_block.attentions.0.transformer_blocks.{k}.{end}" for k in range(10) for end in UNET_ATTENTION],
    ],
    "flux": [
        *[
            f"transformer_blocks.{i}.attn.{end}"
            for i in range(19)
            for end in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        ],
        *[f"single_transformer_blocks.{i}.attn.{end}" for i in range(38) for end in ("to_q", "to_k", "to_v")],
    ],
}


@pytest.fixture(scope="module")
def full():
    return {kind: models.full_size(kind) for kind in models.KINDS}


def published_file(model, kind) -> dict[str, torch.Tensor]:
    """A slider file as its authors save it, of zeros, for a model of the published size."""
    targets = adapters.comfy.lora.model_lora_keys_unet(model.model, {})
    state = {}
    for name in PUBLISHED[kind]:
        key = f"lora_unet_{name.replace('.', '_')}"
        target = targets[key.replace("lora_unet_", "lora_transformer_") if kind == "flux" else key]
        path, offset = (target[0], target[1]) if isinstance(target, tuple) else (target, None)
        shape = adapters._weight_shape(model.model.get_submodule(path.removesuffix(".weight")))
        state[f"{key}.lora_down.weight"] = torch.zeros(4, *shape[1:])
        state[f"{key}.lora_up.weight"] = torch.zeros(offset[2] if offset else shape[0], 4, *[1] * (len(shape) - 2))
        state[f"{key}.alpha"] = torch.tensor(1.0, dtype=torch.bfloat16)
    return state


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_published_sliders_are_placed_whole_on_models_of_the_published_size(full, kind):
    placement = adapters.place(full[kind], published_file(full[kind], kind), "test")
    assert sum(len(part.factors) for part in placement.parts.values()) == len(PUBLISHED[kind])
    assert "Not applied" not in placement.report
    assert " other" not in placement.report


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_models_are_recognised(full, kind):
    assert family_of(full[kind].model).name == NAMES[kind]
    assert family_of(models.build(kind).model).name == NAMES[kind]


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_published_files_are_recognised(full, kind):
    shapes = {key: tuple(tensor.shape) for key, tensor in published_file(full[kind], kind).items()}
    assert family_of_file(shapes).name == NAMES[kind]


def test_a_file_that_does_not_tell_is_not_guessed():
    assert family_of_file({"diffusion_model.input_blocks.1.0.in_layers.2.lora_down.weight": (4, 320, 3, 3)}) is None


def test_unsupported_models_are_refused_with_the_list():
    with pytest.raises(UnsupportedFamily, match=r"SD20.*Stable Diffusion 1\.5, SDXL, Flux\.1"):
        family_of(models.build("sd20").model)


def test_no_host_class_stands_in_two_rows():
    configs = [config for family in FAMILIES for config in family.configs]
    assert len(configs) == len(set(configs))
    assert all(hasattr(adapters.comfy.supported_models, config) for config in configs)


@pytest.mark.parametrize(
    "module, kind",
    [
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k", "cross-attention"),
        ("diffusion_model.input_blocks.1.0.emb_layers.1", "residual"),
        ("diffusion_model.time_embed.0", "other"),
    ],
)
def test_layers_are_told_apart(module, kind):
    assert layer_kind(FAMILIES[0], module) == kind


def test_table_has_a_line_for_each_family():
    lines = families.format_table().splitlines()
    assert len(lines) == 1 + len(FAMILIES)
    assert all(family.name in line for family, line in zip(FAMILIES, lines[1:], strict=True))
