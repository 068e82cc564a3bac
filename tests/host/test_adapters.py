"""LoRA files of every key style land where the stock LoRA loader puts them, and what cannot be placed is told."""

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import models
import pytest
import safetensors.torch
import torch

from concept_nodes.host import adapters
from concept_nodes.host.adapters import AdapterError
from concept_nodes.host.dispatcher import attach
from concept_nodes.ops.lora import delta_weight


@pytest.fixture(scope="module")
def built():
    return {kind: models.build(kind) for kind in models.KINDS}


def layers(model) -> dict[str, torch.Size]:
    return {name: adapters._weight_shape(module) for name, module in model.model.named_modules() if name and adapters._weight_shape(module)}


def entry(state, name, out, inputs, *, kernel=(), rank=2, alpha=1.0, seed=0, ends=("lora_down", "lora_up")):
    """Adds one adapter to a state dict."""
    down, up = ends
    state[f"{name}.{down}.weight"] = models.seeded((rank, inputs, *kernel), seed, 0.1)
    state[f"{name}.{up}.weight"] = models.seeded((out, rank, *[1] * len(kernel)), seed + 1, 0.1)
    if alpha is not None:
        state[f"{name}.alpha"] = torch.tensor(float(alpha))
    return state


def in_style(model, style) -> dict[str, torch.Tensor]:
    """A LoRA on every layer of a model, with the keys of one of the styles in use."""
    state = {}
    diffusers = {}
    config = model.model.model_config.unet_config
    if "flux" in style:
        diffusers = comfy.utils.flux_to_diffusers(config, output_prefix="diffusion_model.")
    elif style != "host" and style != "kohya native":
        diffusers = {key: f"diffusion_model.{value}" for key, value in comfy.utils.unet_to_diffusers(config).items()}
    shapes = layers(model)
    names = (
        {name: (name, None) for name in shapes}
        if not diffusers
        else {
            key.removesuffix(".weight"): ((target, None) if isinstance(target, str) else target[:2])
            for key, target in diffusers.items()
            if key.endswith(".weight")
        }
    )
    seen = set()
    for index, (name, (target, offset)) in enumerate(names.items()):
        shape = shapes.get(target.removesuffix(".weight"))
        # The host knows several names for some layers, for files of different origin.
        if shape is None or (target, offset) in seen:
            continue
        seen.add((target, offset))
        if style == "peft unet" and len(shape) > 2:
            continue
        out = offset[2] if offset else shape[0]
        ends = ("lora_A", "lora_B") if "peft" in style else ("lora_down", "lora_up")
        alpha = None if "peft" in style else 1.0
        entry(state, rename(name, style), out, shape[1], kernel=shape[2:], alpha=alpha, seed=10 * index, ends=ends)
    return state


def rename(name: str, style: str) -> str:
    underscored = name.removeprefix("diffusion_model.").replace(".", "_")
    return {
        "host": name,
        "kohya native": f"lora_unet_{underscored}",
        "kohya diffusers": f"lora_unet_{underscored}",
        "peft unet": "unet." + name.replace(".to_", ".processor.to_").removesuffix(".0" if ".to_out.0" in name else "\0"),
        "flux transformer": f"transformer.{name}",
        "flux peft transformer": f"transformer.{name}",
        "flux onetrainer": f"lora_transformer_{underscored}",
        "flux slider": f"lora_unet_{underscored}",
    }[style]


STYLES = [
    *[(kind, style) for kind in ("sd15", "sdxl") for style in ("host", "kohya native", "kohya diffusers", "peft unet")],
    *[("flux", style) for style in ("host", "kohya native", "flux transformer", "flux peft transformer", "flux onetrainer", "flux slider")],
]


def dense(parts, model) -> dict[str, torch.Tensor]:
    """What each part adds to its layer's weight."""
    weights = {}
    for name, part in parts.items():
        weights[name] = torch.zeros(layers(model)[name])
        for factors in part.factors:
            first, count = factors.rows or (0, len(weights[name]))
            weights[name][first : first + count] += delta_weight(factors)
    return weights


@pytest.mark.parametrize("kind, style", STYLES)
def test_every_key_style_lands_where_the_stock_loader_puts_it(built, kind, style):
    model = built[kind]
    state = in_style(model, style)
    placement = adapters.place(model, state, "test")
    assert "Not applied" not in placement.report
    adapters_in_file = {key.removesuffix(".alpha").rsplit(".lora_", 1)[0] for key in state}
    assert sum(len(part.factors) for part in placement.parts.values()) == len(adapters_in_file)

    known = {key.replace("lora_unet_", "lora_transformer_", 1): value for key, value in state.items()} if style == "flux slider" else state
    stock = comfy.sd.load_lora_for_models(model, None, known, 1.0, 0)[0]
    for name, delta in dense(placement.parts, model).items():
        key = f"{name}.weight"
        weight = torch.zeros(layers(model)[name])
        baked = comfy.lora.calculate_weight(stock.patches[key], weight.clone(), key)
        torch.testing.assert_close(delta, baked, rtol=1e-5, atol=1e-6)
    assert {f"{name}.weight" for name in placement.parts} == stock.patches.keys()


@pytest.mark.parametrize("kind, style", [("sd15", "kohya diffusers"), ("flux", "flux slider"), ("flux", "flux transformer")])
def test_file_and_state_dict_are_the_same(built, kind, style, tmp_path):
    state = in_style(built[kind], style)
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(state, path)
    parts = [adapters.place(built[kind], source, "test").parts for source in (state, adapters.read(path))]
    one, other = (dense(placed, built[kind]) for placed in parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_conv_adapters_with_a_middle_matrix(built):
    model = built["sd15"]
    name = "diffusion_model.input_blocks.1.0.in_layers.2"
    state = {
        f"{name}.lora_down.weight": models.seeded((3, 32, 1, 1), 1),
        f"{name}.lora_mid.weight": models.seeded((3, 3, 3, 3), 2),
        f"{name}.lora_up.weight": models.seeded((32, 3, 1, 1), 3),
        f"{name}.alpha": torch.tensor(1.5),
    }
    stock = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]
    baked = comfy.lora.calculate_weight(stock.patches[f"{name}.weight"], torch.zeros(32, 32, 3, 3), f"{name}.weight")
    torch.testing.assert_close(dense(adapters.place(model, state, "test").parts, model)[name], baked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["linear factors on a 1x1 convolution", "1x1 convolution factors on a linear layer"])
def test_factors_are_brought_to_the_layers_shape(built, shape):
    if shape.startswith("linear"):
        kind, name, kernel = "sd15", "diffusion_model.input_blocks.1.1.proj_in", ()
    else:
        kind, name, kernel = "sdxl", "diffusion_model.input_blocks.1.1.proj_in", (1, 1)
    state = entry({}, name, 32, 32, kernel=kernel)
    assert adapters.place(built[kind], state, "test").parts.keys() == {name}


def test_alpha_over_rank(built):
    model = built["sd15"]
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    placed = [adapters.place(model, entry({}, name, 32, 32, rank=4, alpha=alpha), "test").parts[name] for alpha in (4, 1, None)]
    assert [part.factors[0].scale for part in placed] == [1.0, 0.25, 1.0]


NAME = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
OTHER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k"
LOHA = {
    f"{OTHER}.hada_{end}": torch.zeros(*shape)
    for end, shape in {"w1_a": (32, 2), "w1_b": (2, 32), "w2_a": (32, 2), "w2_b": (2, 32)}.items()
}


class TestWhatIsNotPlacedIsTold:
    def report(self, model, more) -> str:
        return adapters.place(model, entry({}, NAME, 32, 32) | more, "test").report

    @pytest.mark.parametrize(
        "told, more",
        [
            ("text encoder", entry({}, "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 8)),
            ("text encoder", entry({}, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 8, 8)),
            ("LoHa", LOHA),
            ("LoKr", {f"{OTHER}.lokr_w1": torch.zeros(4, 4), f"{OTHER}.lokr_w2": torch.zeros(8, 8)}),
            ("DoRA that scales a layer's inputs", entry({f"{OTHER}.dora_scale": torch.ones(1, 32)}, OTHER, 32, 32)),
            ("full weight difference", {"diffusion_model.input_blocks.1.1.norm.diff": torch.zeros(32)}),
            ("layers this model does not have", entry({}, "diffusion_model.input_blocks.99.0", 4, 4)),
            ("another shape", entry({}, OTHER, 7, 9)),
        ],
    )
    def test_and_the_rest_is_applied(self, built, told, more):
        report = self.report(built["sd15"], more)
        assert "Placed on 1 layers" in report
        assert f"1 {'for the ' if told == 'text encoder' else ''}" in report.split("Not applied: ")[1]
        assert told in report.split("Not applied: ")[1].splitlines()[0]
        if told == "text encoder":
            assert "CLIP" in report

    @pytest.mark.parametrize(
        "wrong, kind, says",
        [
            ("flux", "sd15", "Flux.1"),
            ("sd15", "flux", "Stable Diffusion 1.5"),
        ],
    )
    def test_a_file_of_another_family(self, built, wrong, kind, says):
        names = {"flux": ("lora_unet_double_blocks_0_img_attn_proj", 3072), "sd15": ("lora_unet_up_blocks_3_attentions_0_proj_in", 320)}
        name, width = names[wrong]
        with pytest.raises(AdapterError) as error:
            adapters.place(built[kind], entry({}, name, width, width), "other.safetensors")
        for part in ("other.safetensors", f"made for {says}", name):
            assert part in str(error.value)

    def test_sdxl_file_of_which_some_layers_would_fit(self, built):
        """The narrow layers of both UNets have the same names and sizes: placing those alone would be a silent failure."""
        base = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_{}_attn1_to_q"
        state = entry(entry({}, base.format(0), 64, 64), base.format(1), 64, 64)
        with pytest.raises(AdapterError, match="made for SDXL, and this model is Stable Diffusion 1.5"):
            adapters.place(built["sd15"], state, "test")

    def test_only_text_encoder_keys(self, built):
        state = entry({}, "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 8)
        with pytest.raises(AdapterError, match="needs CLIP"):
            adapters.place(built["sd15"], state, "test")

    def test_keys_of_nothing_known(self, built):
        with pytest.raises(AdapterError, match=r"Nothing in 'test' fits this model \(SDXL\).*weird"):
            adapters.place(built["sdxl"], {"weird": torch.zeros(2)}, "test")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("key", ["lora_down.weight", "lora_up.weight", "alpha", "dora_scale"])
    def test_nan_and_infinity_are_refused_by_key(self, built, key, value):
        state = entry({f"{NAME}.dora_scale": torch.ones(32, 1)} if key == "dora_scale" else {}, NAME, 32, 32)
        state[f"{NAME}.{key}"].view(-1)[0] = value
        with pytest.raises(AdapterError, match=NAME.replace(".", r"\.")):
            adapters.place(built["sd15"], state, "test")


def with_magnitudes(model, state) -> dict[str, torch.Tensor]:
    """The same LoRA as a DoRA: lengths near those that the layers have."""
    lengths = {}
    for index, key in enumerate(key for key in state if key.endswith((".lora_up.weight", ".lora_B.weight"))):
        up = state[key]
        lengths[key.rsplit(".lora_", 1)[0] + ".dora_scale"] = 1 + 0.2 * models.seeded((len(up), *[1] * (up.ndim - 1)), 900 + index)
    return state | lengths


class TestDoRA:
    @pytest.mark.parametrize("kind, style", [("sd15", "kohya diffusers"), ("sdxl", "host"), ("flux", "flux transformer")])
    def test_is_what_the_stock_loader_makes_of_the_weights(self, built, kind, style):
        """Linear layers, convolutions, and q, k, v in one weight."""
        model = built[kind]
        # One that is on a fused layer as a whole and on its parts would divide by lengths that its own other half has changed.
        state = with_magnitudes(model, {key: tensor for key, tensor in in_style(model, style).items() if "to_qkv_mlp_proj" not in key})
        placement = adapters.place(model, state, "test")
        assert f"DoRA on {len(placement.parts)} of them, which is not linear: made for strength 1 only" in placement.report
        assert "Not applied" not in placement.report
        stock = comfy.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]
        for name, part in placement.parts.items():
            key = f"{name}.weight"
            own = comfy.utils.get_attr(model.model, key)
            delta = torch.zeros_like(own)
            for factors in part.factors:
                first, count = factors.rows or (0, len(own))
                delta[first : first + count] += delta_weight(factors, own)
            baked = comfy.lora.calculate_weight(stock.patches[key], own.clone(), key)
            torch.testing.assert_close(delta, baked - own, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
    @pytest.mark.parametrize("kind", models.KINDS)
    def test_picture_is_the_stock_loaders(self, built, kind, strength):
        model = built[kind]
        state = with_magnitudes(model, models.lora(model, size=0.2))
        stock = models.sample(comfy.sd.load_lora_for_models(model, None, state, strength, 0)[0])
        ours = model.clone()
        attach(ours, adapters.AdapterEffect("dora", adapters.place(model, state, "test").parts, strength))
        difference = (models.sample(ours) - stock).norm() / (stock - models.sample(model)).norm()
        assert difference < 1e-3

    def test_the_weights_are_asked_for_as_they_were_loaded(self, built):
        """Another node's merged LoRA must not change the lengths: its weights stay in the model after it sampled."""
        model = built["sd15"]
        state = with_magnitudes(model, entry({}, NAME, 32, 32))
        before = adapters.place(model, state, "test").parts[NAME].factors[0].gain
        stock = comfy.sd.load_lora_for_models(model, None, models.lora(model), 1.0, 0)[0]
        models.sample(stock)
        assert f"{NAME}.weight" in stock.backup
        adapters._LENGTHS.clear()
        assert torch.equal(adapters.place(stock, state, "test").parts[NAME].factors[0].gain, before)

    def test_scaled_fp8_weights_have_their_length_too(self):
        model = models.build_quantised()
        state = with_magnitudes(model, entry({}, NAME, 32, 32))
        gain, plain = (adapters.place(one, state, "test").parts[NAME].factors[0].gain for one in (model, models.build("sd15")))
        torch.testing.assert_close(gain, plain, rtol=0.05, atol=0.03)

    def test_packed_weights_cannot_tell_it(self):
        model = models.build_packed()
        state = entry({}, OTHER, 32, 32) | with_magnitudes(model, entry({}, NAME, 32, 32))
        assert "1 DoRA on packed layers" in adapters.place(model, state, "test").report

    def test_weights_are_read_once(self, built, monkeypatch):
        model = built["sd15"]
        state = with_magnitudes(model, entry({}, NAME, 32, 32))
        adapters.place(model, state, "test")
        read, tensor = [], adapters.Held.tensor
        monkeypatch.setattr(adapters.Held, "tensor", lambda held, end: read.append(end) or tensor(held, end))
        adapters.place(model.clone(), state, "test")
        assert read == ["bias"]

    def test_comparable_units(self):
        model = models.build("sd15")
        placement = adapters.place(model, with_magnitudes(model, entry({}, NAME, 32, 32)), "test")
        delta = delta_weight(placement.parts[NAME].factors[0], comfy.utils.get_attr(model.model, f"{NAME}.weight"))
        assert placement.response() == pytest.approx(float(delta.square().sum() / 32) ** 0.5, rel=1e-4)


class TestReading:
    @pytest.fixture
    def good(self, tmp_path):
        path = tmp_path / "slider.safetensors"
        safetensors.torch.save_file({"a.lora_up.weight": torch.ones(64, 64)}, path)
        return path

    def test_round_trip(self, good):
        assert torch.equal(adapters.read(good)["a.lora_up.weight"], torch.ones(64, 64))

    def test_pt_of_tensors(self, tmp_path):
        torch.save({"a": torch.ones(2)}, tmp_path / "slider.pt")
        assert torch.equal(adapters.read(tmp_path / "slider.pt")["a"], torch.ones(2))

    @pytest.mark.parametrize("keep", [0, 5, 40, 1000])
    def test_truncated(self, good, keep):
        good.write_bytes(good.read_bytes()[:keep])
        with pytest.raises(AdapterError, match=r"slider\.safetensors.*again"):
            adapters.read(good)

    @pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
    def test_something_else_under_that_name(self, tmp_path, content, suffix):
        path = tmp_path / f"slider{suffix}"
        path.write_bytes(content)
        with pytest.raises(AdapterError, match=f"slider{suffix}"):
            adapters.read(path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_file_that_went_away_is_not_called_damaged(self, tmp_path, suffix):
        with pytest.raises(AdapterError, match="cannot be opened") as error:
            adapters.read(tmp_path / f"slider{suffix}")
        assert "damaged" not in str(error.value)
        assert str(tmp_path) in str(error.value)

    def test_running_out_of_memory_is_not_the_files_fault(self, good):
        class Path(type(good)):
            def __str__(self):
                raise MemoryError

        with pytest.raises(MemoryError):
            adapters.read(Path(good))

    @pytest.mark.parametrize("content", [[1, 2], {"a": "text"}, {}])
    def test_pt_that_is_no_dictionary_of_tensors(self, tmp_path, content):
        torch.save(content, tmp_path / "slider.pt")
        with pytest.raises(AdapterError, match=r"slider\.pt"):
            adapters.read(tmp_path / "slider.pt")


def test_incomplete_file_names_what_is_missing(built):
    state = entry({}, NAME, 32, 32)
    del state[f"{NAME}.lora_down.weight"]
    with pytest.raises(AdapterError, match=r"incomplete.*attn1\.to_q\.lora_down\.weight"):
        adapters.place(built["sd15"], state, "test")


def test_adapter_on_a_part_of_the_inputs(built):
    """Some of the host's names stand for columns of a weight; what is beside them must not be read."""
    module = built["sd15"].model.get_submodule(NAME)
    patch = comfy.lora.load_lora(entry({}, "x", 32, 8), {"x": "y"}, log_missing=False)["y"]
    factors = adapters._fit(patch, module, (1, 4, 8), None)
    delta = delta_weight(factors)
    assert torch.count_nonzero(delta[:, :4]) == torch.count_nonzero(delta[:, 12:]) == 0
    torch.testing.assert_close(delta[:, 4:12], 0.5 * patch.weights[0] @ patch.weights[1])


def test_host_function_that_is_no_reordering_is_not_bent(built):
    module = built["sd15"].model.get_submodule(NAME)
    patch = comfy.lora.load_lora(entry({}, "x", 32, 32), {"x": "y"}, log_missing=False)["y"]
    assert adapters._fit(patch, module, None, lambda weight: weight * 2) == "of another shape than the layer"
