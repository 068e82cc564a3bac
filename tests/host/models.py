"""Small models of the host's own classes with seeded random weights: they prove plumbing and exact equalities, not behaviour."""

import json

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch

CONTEXT = 64
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": CONTEXT,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "num_classes": None,
    "legacy": False,
    "use_temporal_attention": False,
}
SDXL = UNET | {"use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 32,
    "context_in_dim": CONTEXT,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
KINDS = {
    "sd15": (comfy.supported_models.SD15, UNET),
    "sdxl": (comfy.supported_models.SDXL, SDXL),
    "flux": (comfy.supported_models.FluxSchnell, FLUX),
}
SD3 = {
    "in_channels": 16,
    "pos_embed_scaling_factor": None,
    "patch_size": 2,
    "input_size": None,
    "depth": 1,
    "num_blocks": 3,
    "adm_in_channels": 56,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 64}},
    "pos_embed_max_size": 32,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}
# On these, features alone work.
FEATURES_ONLY = {"sd3": (comfy.supported_models.SD3, SD3)}
# A class of the host's that the pack does not support yet.
OTHERS = {"sd20": (comfy.supported_models.SD20, UNET)}


def seeded(shape, seed: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def fill(module: torch.nn.Module, seed: int) -> None:
    """Weights of a size that keeps activations near one; the host's layers start out uninitialised."""
    for index, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.ndim > 1:
            value = seeded(parameter.shape, seed + index, parameter[0].numel() ** -0.5)
        else:
            value = seeded(parameter.shape, seed + index, 0.1) + (1.0 if "norm" in name and name.endswith(("weight", "scale")) else 0.0)
        parameter.data.copy_(value)


def build(kind: str = "sd15", dtype: str = "float32", compute: str | None = None, seed: int = 0, disable_dynamic: bool = False):
    """A ready MODEL of the class `kind`. `dtype` is what weights are kept in, `compute` what they are cast to for the work, as the host's
    loaders set it. It can be rebuilt by the host when it wants a pristine copy."""
    config_class, unet_config = (KINDS | FEATURES_ONLY | OTHERS)[kind]
    config = config_class(dict(unet_config))
    config.unet_config = dict(unet_config)
    config.set_inference_dtype(getattr(torch, dtype), getattr(torch, compute) if compute else None)
    with torch.inference_mode(False):
        device = comfy.model_management.get_torch_device()
        model = config.get_model({}, "", device="cpu")
        with torch.no_grad():
            fill(model.diffusion_model, seed)
        patcher = comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
    patcher.cached_patcher_init = (build, (kind, dtype, compute, seed))
    return patcher


def build_quantised():
    """A UNet whose linear layers are in the host's scaled fp8 format, as quantised checkpoints are loaded."""
    source = build("sd15")
    layers = {name for name, module in source.model.diffusion_model.named_modules() if isinstance(module, torch.nn.Linear)}
    state = {}
    for key, tensor in source.model.diffusion_model.state_dict().items():
        name, kind = key.rsplit(".", 1)
        if name in layers and kind == "weight":
            scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            state[f"{name}.weight_scale"] = scale
            state[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
            tensor = (tensor / scale).to(torch.float8_e4m3fn)
        state[key] = tensor
    config = comfy.supported_models.SD15(dict(UNET))
    config.unet_config = dict(UNET)
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    # In the mode that the host runs its loader nodes in.
    with torch.inference_mode():
        model = config.get_model({}, "", device="cpu")
        missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


class Packed(comfy.ops.manual_cast):
    """Operations as packs for quantised files bring them: a linear layer holds codes of its weight, of another shape and type, and makes
    the weight of them in every forward.
    """

    class Linear(comfy.ops.manual_cast.Linear):
        BLOCK = 32  # codes that share a scale

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            codes = torch.zeros(out_features, in_features // self.BLOCK, self.BLOCK + 2, dtype=torch.uint8)
            self.weight = torch.nn.Parameter(codes, requires_grad=False)
            self.bias = torch.nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

        @classmethod
        def packed(cls, weight: torch.Tensor) -> torch.Tensor:
            """(out, blocks, 2 + 32) bytes: a scale in float16, then whole numbers from -127 to 127."""
            blocks = weight.unflatten(1, (-1, cls.BLOCK))
            scales = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6).half()
            codes = (blocks / scales.float()).round().clamp(-127, 127).to(torch.int8)
            return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], -1)

        def forward_comfy_cast_weights(self, input):
            packed = self.weight.to(input.device)
            scales, codes = packed[..., :2].contiguous().view(torch.float16), packed[..., 2:].contiguous().view(torch.int8)
            weight = (codes.to(input.dtype) * scales.to(input.dtype)).flatten(1)
            return torch.nn.functional.linear(input, weight, None if self.bias is None else self.bias.to(input))


def build_packed(kind: str = "sd15"):
    """A model of the class `kind` whose linear layers make their weights anew in every forward."""
    source = build(kind)
    config = KINDS[kind][0](dict(KINDS[kind][1]))
    config.unet_config, config.custom_operations = dict(KINDS[kind][1]), Packed
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = config.get_model({}, "", device="cpu")
        with torch.no_grad():
            for name, module in model.diffusion_model.named_modules():
                given = source.model.diffusion_model.get_submodule(name)
                for key, parameter in module.named_parameters(recurse=False):
                    tensor = getattr(given, key)
                    parameter.copy_(module.packed(tensor) if key == "weight" and isinstance(module, Packed.Linear) else tensor)
    return comfy.model_patcher.ModelPatcher(model, source.load_device, source.offload_device)


FULL_SIZE = {
    "sd15": UNET
    | {
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "context_dim": 768,
        "num_heads": 8,
    },
    "sdxl": SDXL
    | {
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "num_heads": -1,
        "num_head_channels": 64,
    },
    "flux": FLUX
    | {
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
        "guidance_embed": True,
    },
    "sd3": SD3
    | {
        "depth": 24,
        "num_blocks": 24,
        "adm_in_channels": 2048,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
        "x_block_self_attn_layers": list(range(13)),
    },
}


def full_size(kind: str):
    """A MODEL of the published size whose weights take no memory and cannot be computed with."""
    config = (KINDS | FEATURES_ONLY)[kind][0](dict(FULL_SIZE[kind]))
    config.unet_config = dict(FULL_SIZE[kind])
    config.set_inference_dtype(torch.float32, None)
    with torch.device("meta"):
        model = config.get_model({}, "", device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def channels(model) -> int:
    return model.model.latent_format.latent_channels


def kind_of(model) -> str:
    known = KINDS | FEATURES_ONLY
    return next((kind for kind, (config, _) in known.items() if type(model.model.model_config) is config), "sd15")


def conditioning(model, seed: int, tokens: int = 7):
    widths = {"sdxl": 1280, "flux": 32, "sd3": 56}
    width = widths.get(kind_of(model))
    return [[seeded((1, tokens, CONTEXT), seed), {} if width is None else {"pooled_output": seeded((1, width), seed + 1)}]]


def latent(model, batch: int = 1, size: int = 8) -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(batch, channels(model), size, size)}


def sample(model, *, steps=4, seed=3, cfg=3.0, sampler="euler", scheduler="normal", batch=1, size=8, **options) -> torch.Tensor:
    """What the stock KSampler node returns for a model."""
    import nodes

    with torch.inference_mode():
        positive, negative = conditioning(model, 10), conditioning(model, 20)
        start = latent(model, batch, size)
        (out,) = nodes.common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative, start, **options)
    return out["samples"]


def lora(model, *, rank=2, alpha=1.0, seed=5, only="", size=0.5) -> dict[str, torch.Tensor]:
    """A random LoRA on every linear and convolution layer of a model whose name holds `only`, in the host's own key style."""
    state = {}
    for index, (name, module) in enumerate(model.model.named_modules()):
        if only not in name or not name.startswith("diffusion_model."):
            continue
        if hasattr(module, "in_features"):
            shape = torch.Size((module.out_features, module.in_features))
        elif isinstance(module, torch.nn.Conv2d):
            shape = module.weight.shape
        else:
            continue
        state[f"{name}.lora_down.weight"] = seeded((rank, *shape[1:]), seed + index, size * shape[1:].numel() ** -0.5)
        state[f"{name}.lora_up.weight"] = seeded((shape[0], rank, *[1] * (len(shape) - 2)), seed + 1000 + index, size)
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


# A block of each kind of model, for features; a second one of Flux's, where text and picture are one sequence.
SITES = {"sd15": "output_blocks.1.1", "sdxl": "middle_block.1", "flux": "double_blocks.0", "sd3": "joint_blocks.1"}


def features(model, site: str = "", *, io: str = "out", latents: bool = False, m: int = 2, seed: int = 50, size: float = 3.0):
    """Random CONCEPT_FEATURES at a site of a model, over three noise levels."""
    from concept_nodes.host.families import FEATURES, family_of
    from concept_nodes.host.feature_sites import width_at
    from concept_nodes.host.features import Features, Readers

    kind = kind_of(model)
    site = site or SITES[kind]
    width = width_at(model.model, site)
    directions = torch.nn.functional.normalize(seeded((m, width), seed), dim=1)
    readers = Readers(seeded((m, width), seed + 1, width**-0.5), seeded((m,), seed + 2, 0.1), torch.full((m,), 0.2)) if latents else None
    levels = torch.tensor([1.0, 0.5, 0.1]) if kind in ("flux", "sd3") else torch.tensor([14.0, 1.0, 0.05])
    positive = seeded((3, m), seed + 3).abs() + 1
    return Features(
        name="random",
        family=family_of(model.model, FEATURES).name,
        site=site,
        io=io,
        directions=directions,
        weights=torch.linspace(1, 0.5, m),
        unit=torch.full((m,), size),
        mean=seeded((width,), seed + 4, 0.1),
        sigmas=levels,
        positive=positive,
        negative=torch.zeros(3, m),
        readers=readers,
        prompts=(("with it",), ("without it",)),
    )
