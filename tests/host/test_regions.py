"""Apply Regions and its list: areas, tiles, isolation, words of their own, and every way to get it wrong."""

import math
from types import SimpleNamespace

import comfy.hooks
import folder_paths
import models
import pytest
import sampling
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

import nodes
from concept_nodes.host import adapters, files, lab, run_record
from concept_nodes.host.cross import SelfAct
from concept_nodes.host.dispatcher import attach
from concept_nodes.host.norms import NormEffect, norms_of
from concept_nodes.host.places import Place, group
from concept_nodes.host.regions import Hung, IsolationEffect, Regions, RegionsError
from concept_nodes.nodes.regions import RegionLoRA, RegionNode, RegionsApply, RegionsToMasks
from concept_nodes.ops.lora import Stack
from concept_nodes.ops.masks import Box, Ellipse, Stroke
from concept_nodes.ops.norms import normalised
from concept_nodes.ops.regions import Document, DocumentError, LoraFile, Region

CLOSE = {"rtol": 1e-4, "atol": 2e-4}
LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1


@pytest.fixture(scope="module")
def unet():
    return models.build("sd15")


def halves(unet, *loras):
    """Two regions, each with a LoRA."""
    regions = Regions()
    for name, x, lora in zip(("left", "right"), (0.0, 0.5), loras, strict=True):
        regions = regions.with_region(Region(name, shapes=(Box(x, 0, 0.5, 1),))).with_lora(name, Hung(f"{name} lora", lora))
    return regions


def put(model, regions, **options):
    return RegionsApply.execute(model, [], [], regions, **options).result[0]


def told(samples) -> str:
    return run_record.find(samples).describe()


def drawn(model, positive, negative, size=8, cfg=1.0):
    with torch.inference_mode():
        (out,) = nodes.common_ksampler(model, 3, 4, cfg, "euler", "normal", positive, negative, models.latent(model, 1, size))
    return out["samples"]


class TestAreas:
    """Where the host cuts the latent for a condition's area, the masks are cut with it."""

    def entries(self, model, hooked=None):
        """The left and the right half as conditions with areas of their own, the left one under a hook if given."""
        found = []
        for seed, x in ((10, 0), (11, 4)):
            [[context, options]] = models.conditioning(model, seed)
            found.append([context, options | {"area": (8, 4, 0, x), "strength": 1.0, "set_area_to_bounds": False}])
        if hooked is not None:
            found[0][1]["hooks"] = hooked
        return found

    def test_is_the_hosts_hook_lora_on_the_entry_of_that_area(self, unet):
        state = models.lora(unet, only="attn")
        hooks = comfy.hooks.create_hook_lora(lora=state, strength_model=1.0, strength_clip=0.0)
        expected = drawn(unet, self.entries(unet, hooks), models.conditioning(unet, 20))
        left = Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),))).with_lora("left", Hung("lora", state))
        torch.testing.assert_close(
            drawn(put(unet, left), self.entries(unet), models.conditioning(unet, 20)), expected, rtol=1e-3, atol=1e-3
        )

    def test_one_lora_on_both_halves_is_the_plain_lora(self, unet):
        state = models.lora(unet)
        placed = put(unet, halves(unet, state, state))
        plain = adapters.place(unet, state, "lora")
        whole = unet.clone()
        attach(whole, adapters.AdapterEffect("plain", plain.parts, 1.0))
        for cfg in (1.0, 3.0):
            pair = [drawn(model, self.entries(unet), models.conditioning(unet, 20), cfg=cfg) for model in (placed, whole)]
            torch.testing.assert_close(*pair, **CLOSE)

    def test_the_negatives_counterpart_of_an_area_reads_the_negative_text(self, unet):
        """The host copies the positive entry to make it, its uuid too."""
        places = [Place(LEFT, {"negative": models.conditioning(unet, 20)[0][0]}), Place(1 - LEFT)]
        group(places)

        class Reads(IsolationEffect):
            apart = ()

            def __init__(self, place):
                super().__init__((), 1.0, 1.0)
                self.apart, self.place = (), place

        model = unet.clone()
        for place in places:
            attach(model, Reads(place))
        arms = [drawn(one, self.entries(unet), models.conditioning(unet, 20), cfg=3.0) for one in (model, unet)]
        torch.testing.assert_close(*arms, **CLOSE)


class TestTiles:
    def test_parts_whose_place_is_unknown_are_reported(self, unet):
        """A wrapper that shows the model one half after the other, as tiled sampling does."""
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9))).clone()

        def by_halves(apply, args):
            x, t, c = args["input"], args["timestep"], args["c"]
            return torch.cat([apply(part.contiguous(), t, **c) for part in x.chunk(2, -1)], -1)

        placed.set_model_unet_function_wrapper(by_halves)
        samples = models.sample(placed)
        assert "shown 8x4 of a latent of 8x8" in told(samples)
        assert samples.isfinite().all()

    def test_nothing_is_reported_of_an_ordinary_run(self, unet):
        samples = models.sample(put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9))))
        assert run_record.find(samples).notes == ()


class TestAround:
    def test_an_attention_that_another_pack_replaces_is_reported(self, unet):
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9))).clone()
        placed.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)
        assert "1 of 7 attentions did not follow the regions" in told(models.sample(placed))


class TestKeysKept:
    def count(self, model, name="middle_block.1.transformer_blocks.0.attn2.to_k"):
        calls = []
        handle = model.model.diffusion_model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        samples = models.sample(model, steps=4)
        handle.remove()
        return len(calls), samples

    def test_keys_are_computed_once_for_all_steps(self, unet):
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9)))
        assert self.count(unet)[0] == 4
        assert self.count(placed)[0] == 1

    def test_and_give_the_same_picture(self, unet, monkeypatch):
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9)))
        kept = models.sample(placed)
        monkeypatch.setattr("concept_nodes.host.cross.KEPT_BYTES", 0)
        count, samples = self.count(placed)
        assert count == 4
        assert torch.equal(samples, kept)

    def test_not_where_another_pack_changes_the_words_step_by_step(self, unet):
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9))).clone()
        placed.set_model_attn2_patch(lambda n, context, value, options: (n, context, value))
        assert self.count(placed)[0] == 4

    def test_who_overrides_attention_gets_what_modules_give(self, unet):
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9)))
        overridden, shapes = placed.clone(), []

        def override(attend, q, k, v, heads, *args, **kwargs):
            shapes.append((q.ndim, k.ndim, v.ndim, kwargs.get("skip_reshape", False)))
            return attend(q, k, v, heads, *args, **kwargs)

        overridden.model_options["transformer_options"]["optimized_attention_override"] = override
        torch.testing.assert_close(models.sample(overridden), models.sample(placed), **CLOSE)
        assert set(shapes) == {(3, 3, 3, False)}

    def test_a_strength_that_changes_is_followed(self, unet):
        """A window that ends in the middle: the second half of the steps has other keys."""
        state = models.lora(unet, only="attn2")
        regions = Regions().with_region(Region("all", shapes=(Box(0, 0, 1, 1),))).with_lora("all", Hung("lora", state, end=0.5))
        placement = adapters.place(unet, state, "lora")
        plain = unet.clone()
        attach(plain, adapters.AdapterEffect("plain", placement.parts, 1.0, 0.0, 0.5))
        torch.testing.assert_close(models.sample(put(unet, regions)), models.sample(plain), **CLOSE)


class TestKindsThatTakeTurns:
    """Conditions in calls of their own: two kinds of calls, in turn."""

    @pytest.fixture
    def made(self, monkeypatch):
        """How many settings the layers were asked for."""
        made, setting = [], Stack.setting

        def count(stack, *args):
            made.append(stack)
            return setting(stack, *args)

        monkeypatch.setattr(Stack, "setting", count)
        return made

    def test_each_layer_gets_its_gains_once_for_each_kind(self, unet, made):
        placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9)))
        models.sample(placed)
        together, layers = len(made), len(set(map(id, made)))
        made.clear()
        models.sample(sampling.one_by_one(placed), steps=6)
        assert (together, len(made)) == (layers, 2 * layers)

    def test_a_strength_that_changes_reaches_them(self, unet, made):
        """A window that ends in the middle, while another LoRA acts on."""
        state = models.lora(unet)
        arms = []
        for change in (sampling.one_by_one, lambda model: model):
            regions = halves(unet, state, models.lora(unet, seed=9)).with_lora("left", Hung("early", models.lora(unet, seed=3), end=0.5))
            arms.append(models.sample(change(put(unet, regions)), steps=6))
        torch.testing.assert_close(*arms, rtol=1e-3, atol=1e-3)


class TestIsolation:
    def test_zero_is_the_node_without_it(self, unet):
        regions = halves(unet, models.lora(unet), models.lora(unet, seed=9))
        assert torch.equal(models.sample(put(unet, regions, isolation=0.0, isolation_end=1.0)), models.sample(put(unet, regions)))

    def test_ended_before_it_began_is_none(self, unet):
        regions = halves(unet, models.lora(unet), models.lora(unet, seed=9))
        assert torch.equal(models.sample(put(unet, regions, isolation=5.0, isolation_end=0.0)), models.sample(put(unet, regions)))

    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_it_acts_on_every_family(self, kind):
        model = models.build(kind)
        regions = halves(model, models.lora(model), models.lora(model, seed=9))
        isolated = models.sample(put(model, regions, isolation=6.0, isolation_end=1.0))
        assert isolated.isfinite().all()
        assert not torch.allclose(isolated, models.sample(put(model, regions)), atol=1e-2)

    def test_whole_isolation_is_attention_within_each_region(self, unet):
        """A self-attention of the model over 8x8 positions: the left half as if the right one were not there."""
        attention = unet.model.diffusion_model.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1")
        left = pooled = (torch.arange(64) % 8 < 4).float()
        rows = torch.stack([left, 1 - pooled])
        apart = rows.sum(0)[:, None] * rows.sum(0)[None] - rows.t() @ rows
        act = SelfAct()
        act.bias = -1e9 * apart[None, None]
        x = models.seeded((2, 64, attention.to_q.in_features), 3)
        with torch.inference_mode():
            whole = act.run(attention.forward, x)
            alone = attention(x[:, left.bool()])
        torch.testing.assert_close(whole[:, left.bool()], alone, **CLOSE)

    def test_no_call_is_added(self, unet):
        regions = halves(unet, models.lora(unet), models.lora(unet, seed=9))
        assert sampling.count_calls(put(unet, regions, isolation=3.0)) == sampling.count_calls(unet)


class TestOwnScale:
    @pytest.fixture
    def regions(self, unet):
        return halves(unet, models.lora(unet), models.lora(unet, seed=9))

    def test_zero_is_the_node_without_it(self, unet, regions):
        assert torch.equal(models.sample(put(unet, regions, own_scale=0.0)), models.sample(put(unet, regions)))

    def test_where_no_region_does_anything_it_does_nothing(self, unet):
        idle = Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),)))
        assert put(unet, idle, own_scale=1.0) is unet

    def test_one_region_of_all_is_the_region_without_it(self, unet):
        regions = Regions().with_region(Region("all", shapes=(Box(0, 0, 1, 1),))).with_lora("all", Hung("lora", models.lora(unet)))
        torch.testing.assert_close(models.sample(put(unet, regions, own_scale=1.0)), models.sample(put(unet, regions)), **CLOSE)

    def test_every_normalisation_gives_what_its_places_own_moments_make(self, unet, regions):
        """Each is met in one call with what it gets and gives: weight, bias and the regions' shares of its grid."""
        seen = {}
        model = put(unet, regions, own_scale=1.0)
        norms = {name: unet.model.get_submodule(name) for name in norms_of(unet.model)}

        def watch(executor, *args, **kwargs):
            forwards = {name: norm.forward for name, norm in norms.items()}
            for name, norm in norms.items():

                def forward(x, _name=name, _inner=forwards[name]):
                    out = _inner(x)
                    seen.setdefault(_name, (x.clone(), out.clone()))
                    return out

                norm.forward = forward
            try:
                return executor(*args, **kwargs)
            finally:
                for name, norm in norms.items():
                    norm.forward = forwards[name]

        models.sample(sampling.wrapped(model, WrappersMP.DIFFUSION_MODEL, watch))
        assert len(seen) == len(norms) > 10
        for name, (x, out) in seen.items():
            norm, (height, width) = norms[name], x.shape[2:]
            left = torch.nn.functional.interpolate(LEFT[None, None], (height, width), mode="area").flatten()
            rows = torch.stack([left, 1 - left])[:, None]
            alone = normalised(x, rows, torch.ones(2), norm.num_groups, norm.eps)
            expected = alone * norm.weight[:, None, None] + norm.bias[:, None, None]
            torch.testing.assert_close(out, expected, **CLOSE)
            if width > 1:
                assert not torch.allclose(out, norm(x), atol=1e-3), name

    def test_two_lists_in_a_row_add_up_whatever_their_order(self, unet, regions):
        other = Regions().with_region(Region("low", shapes=(Box(0, 0.5, 1, 0.5),))).with_lora("low", Hung("c", models.lora(unet, seed=4)))
        first, second = (
            models.sample(put(put(unet, one, own_scale=1.0), two, own_scale=0.5 if two is other else 1.0))
            if one is regions
            else models.sample(put(put(unet, one, own_scale=0.5), two, own_scale=1.0))
            for one, two in ((regions, other), (other, regions))
        )
        torch.testing.assert_close(first, second, **CLOSE)

    def test_areas_and_batches_run(self, unet, regions):
        placed = put(unet, regions, own_scale=1.0)
        areas = drawn(placed, TestAreas().entries(unet), models.conditioning(unet, 20))
        assert areas.isfinite().all() and "other tokens" not in told(areas)
        assert models.sample(placed, batch=2).isfinite().all()

    def test_it_has_a_window(self, unet):
        """That of a region which is found while sampling; outside of it the region is nowhere."""
        sampling_of = unet.get_model_object("model_sampling")
        strength = NormEffect("x", unet.model, Place(lambda *_: None), 0.5, 0.5, 0.75).strengths(sampling_of)
        calls = [SimpleNamespace(sigma=float(sampling_of.percent_to_sigma(percent))) for percent in (0.2, 0.6, 0.9)]
        assert [strength(call) for call in calls] == [0.0, 0.5, 0.0]

    def test_no_call_is_added_and_the_modules_are_as_they_were(self, unet, regions):
        before = {name: unet.model.get_submodule(name).forward for name in norms_of(unet.model)}
        assert sampling.count_calls(put(unet, regions, own_scale=1.0)) == sampling.count_calls(unet)
        assert before == {name: unet.model.get_submodule(name).forward for name in before}

    def test_a_family_without_such_layers_is_told_so(self):
        flux = models.build("flux")
        regions = halves(flux, models.lora(flux), models.lora(flux, seed=9))
        output = RegionsApply.execute(flux, [], [], regions, own_scale=1.0).result
        assert "own_scale: nothing done, no layer of Flux" in output[3]
        assert torch.equal(models.sample(output[0]), models.sample(put(flux, regions)))

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_out_of_range(self, unet, regions, value):
        with pytest.raises(ValueError, match="own_scale is .*from 0 to 1"):
            put(unet, regions, own_scale=value)


def test_two_lists_in_a_row_add_up_whatever_their_order(unet):
    one = Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),))).with_lora("left", Hung("a", models.lora(unet)))
    other = Regions().with_region(Region("top", shapes=(Box(0, 0, 1, 0.5),))).with_lora("top", Hung("b", models.lora(unet, seed=9)))
    pair = [models.sample(put(put(unet, first), second)) for first, second in ((one, other), (other, one))]
    torch.testing.assert_close(*pair, **CLOSE)


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 128)])
def test_a_round_brush_stays_round_on_any_canvas(shape):
    regions = Regions().with_region(Region("dot", shapes=(Stroke(((0.5, 0.5),), 0.25),)))
    mask = regions.drawn(*shape)[0] > 0.5
    height, width = mask.any(1).sum(), mask.any(0).sum()
    assert abs(int(height) - int(width)) <= 1


class TestList:
    """Region, Region LoRA and Regions to Masks."""

    def region(self, name="a", regions=None, shape="box", box=(0.0, 0.0, 0.5, 1.0), mask=None, prompt=""):
        return RegionNode.execute(name, prompt, "", shape, *box, 0.0, 1.0, mask=mask, regions=regions).result[0]

    @pytest.fixture
    def file(self, unet):
        folder = folder_paths.get_folder_paths("loras")[0]
        path = f"{folder}/in/regions_case.safetensors"
        import pathlib

        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(models.lora(unet), path)
        folder_paths.filename_list_cache.clear()
        return "in/regions_case.safetensors"

    def test_masks_come_in_order_and_share_the_picture(self):
        regions = self.region("b", self.region("a"), box=(0.25, 0.0, 0.75, 1.0))
        regions = self.region("c", regions, shape="rest")
        masks = RegionsToMasks.execute(regions, 16, 8).result[0]
        assert masks.shape == (3, 8, 16)
        assert torch.allclose(masks.sum(0), torch.ones(8, 16))
        assert masks[0, 0].tolist() == [1.0] * 4 + [0.5] * 4 + [0.0] * 8

    def test_a_mask_stands_for_the_shape(self):
        regions = self.region(mask=LEFT[None])
        assert torch.equal(RegionsToMasks.execute(regions, 32, 32).result[0][0], LEFT)

    def test_an_ellipse_lies_in_its_box(self):
        (region,) = self.region(shape="ellipse").document.regions
        assert region.shapes == (Ellipse(0.0, 0.0, 0.5, 1.0),)

    def test_the_callers_list_is_not_changed(self):
        first = self.region("a")
        self.region("b", first)
        assert first.names() == ["a"]

    def test_a_file_a_connected_lora_and_a_stack_on_one_region(self, unet, file):
        regions = RegionLoRA.execute(self.region(), "a", file, 0.5, 1.0, 0.0, 1.0).result[0]
        regions = RegionLoRA.execute(regions, "a", "none", 0.7, 1.0, 0.0, 1.0, lora=models.lora(unet)).result[0]
        regions = RegionLoRA.execute(regions, "a", "none", 1.0, 1.0, 0.0, 0.5, lora_stack=[(file.replace("/", "\\"), 0.2, 0.3)]).result[0]
        assert [(hung.model, hung.end) for hung in regions.hung["a"]] == [(0.5, 1.0), (0.7, 1.0), (0.2, 0.5)]
        report = RegionsApply.execute(unet, [], [], regions).result[3]
        assert report.count("119 layers") == 3

    def test_one_mask_of_a_batch_is_asked_for(self):
        with pytest.raises(ValueError, match=r"shape \(2, 8, 8\).*pick it from a batch"):
            self.region(mask=torch.ones(2, 8, 8))

    def test_two_of_one_name(self):
        with pytest.raises(RegionsError, match="already a region named 'a'"):
            self.region("a", self.region("a"))

    def test_without_a_name(self):
        with pytest.raises(ValueError, match="no name"):
            self.region("  ")

    def test_sixty_five(self):
        regions = None
        for index in range(64):
            regions = self.region(str(index), regions)
        with pytest.raises((RegionsError, DocumentError), match="64"):
            self.region("one more", regions)

    def test_a_box_without_area(self):
        with pytest.raises(ValueError, match="covers nothing"):
            self.region(box=(0.0, 0.0, 0.0, 1.0))

    def test_a_region_that_is_not_there(self, unet):
        with pytest.raises(RegionsError, match="no region named 'b'. Regions: 'a'"):
            RegionLoRA.execute(self.region(), "b", "none", 1.0, 1.0, 0.0, 1.0, lora=models.lora(unet))

    def test_a_missing_file_offers_near_names(self, file):
        told = RegionLoRA.validate_inputs("in\\regions_cese.safetensors")
        assert "There is no file" in told
        assert f"'{file}'" in told
        with pytest.raises(files.MissingFile, match="regions_case"):
            RegionLoRA.execute(self.region(), "a", "none", 1.0, 1.0, 0.0, 1.0, lora_stack=[("in/regions_cese.safetensors", 1.0, 1.0)])

    def test_a_file_named_in_the_document(self, unet, file):
        region = Region("a", shapes=(Box(0, 0, 1, 1),), loras=(LoraFile(file, 0.5),))
        report = RegionsApply.execute(unet, [], [], Regions(Document((region,)))).result[3]
        assert f"'{file}' at 0.5" in report


class TestApplyRefuses:
    def test_a_lora_of_another_family(self, unet):
        flux = models.build("flux")
        with pytest.raises(adapters.AdapterError, match="'left lora'"):
            put(unet, halves(unet, models.lora(flux), models.lora(unet)))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_lora_that_is_no_numbers(self, unet, value):
        state = models.lora(unet)
        state[next(iter(state))][0] = value
        with pytest.raises(adapters.AdapterError, match="NaN or infinity"):
            put(unet, halves(unet, state, models.lora(unet)))

    def test_a_prompt_without_a_clip(self, unet):
        with pytest.raises(RegionsError, match="'a' has a prompt, and no clip"):
            put(unet, Regions().with_region(Region("a", shapes=(Box(0, 0, 1, 1),), prompt="a cat")))

    def test_a_region_off_the_canvas_does_nothing_and_says_so(self, unet):
        regions = Regions().with_region(Region("away", shapes=(Box(1.5, 0, 0.2, 1),))).with_lora("away", Hung("lora", models.lora(unet)))
        model, *_, report = RegionsApply.execute(unet, [], [], regions).result
        assert model is unet
        assert "'away': nothing done, it covers no part of the picture" in report

    def test_an_isolation_that_is_no_number(self, unet):
        with pytest.raises(ValueError, match="isolation is nan"):
            put(unet, halves(unet, models.lora(unet), models.lora(unet)), isolation=math.nan)

    def test_and_the_next_prompt_runs(self, unet):
        before = models.sample(unet)
        with pytest.raises(adapters.AdapterError):
            put(unet, halves(unet, {"nothing.weight": torch.zeros(1)}, models.lora(unet)))
        assert torch.equal(models.sample(unet), before)


class TestOnTheLab:
    """Two prompts in two regions, read by the lab's own text encoder."""

    @pytest.fixture(scope="class")
    def loaded(self):
        return lab.load("unet")

    def test_a_region_of_everything_is_its_prompt(self, loaded):
        """Through the node, with the host's own text encoding."""
        texts = ("a large red star in the centre on a grey background", "a small blue circle on the left on a white background")
        common, own = ([[loaded.clip.encode_from_tokens(loaded.clip.tokenize(text)), {}]] for text in texts)
        empty = [[loaded.clip.encode_from_tokens(loaded.clip.tokenize("")), {}]]
        regions = Regions().with_region(Region("all", shapes=(Box(0, 0, 1, 1),), prompt=texts[1]))
        placed = RegionsApply.execute(loaded.model, common, empty, regions, clip=loaded.clip).result[0]
        torch.testing.assert_close(drawn(placed, common, empty, cfg=4.0), drawn(loaded.model, own, empty, cfg=4.0), **CLOSE)

    def test_the_text_part_of_a_lora_acts_on_its_regions_prompt(self, loaded):
        key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
        state = {f"{key}.lora_down.weight": models.seeded((2, 128), 1), f"{key}.lora_up.weight": models.seeded((512, 2), 2)}
        regions = Regions().with_region(Region("all", shapes=(Box(0, 0, 1, 1),), prompt="a red star"))
        empty = [[loaded.clip.encode_from_tokens(loaded.clip.tokenize("")), {}]]
        pictures = []
        for strength in (0.0, 1.0):
            hung = regions.with_lora("all", Hung("words", state, 0.0, strength))
            placed = RegionsApply.execute(loaded.model, empty, empty, hung, clip=loaded.clip).result[0]
            pictures.append(drawn(placed, empty, empty, cfg=4.0))
        assert not torch.allclose(*pictures, atol=1e-2)


def test_wrappers_of_others_see_one_call_a_step(unet):
    """What a second pack counts: as many calls with eight regions as with none."""
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    regions = Regions()
    for index in range(8):
        regions = regions.with_region(Region(str(index), shapes=(Box(index / 8, 0, 1 / 8, 1),)))
        regions = regions.with_lora(str(index), Hung("lora", models.lora(unet, seed=index)))
    models.sample(sampling.wrapped(put(unet, regions), WrappersMP.DIFFUSION_MODEL, count))
    assert len(calls) == 4


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_isolation_while_no_lora_acts_yet(kind):
    """Its window ends before theirs begin: the first steps have isolation alone."""
    model = models.build(kind)
    regions = Regions()
    for name, x in (("left", 0.0), ("right", 0.5)):
        regions = regions.with_region(Region(name, shapes=(Box(x, 0, 0.5, 1),))).with_lora(
            name, Hung("lora", models.lora(model), start=0.6)
        )
    samples = models.sample(put(model, regions, isolation=3.0, isolation_end=0.5))
    assert samples.isfinite().all()
    assert "Isolation of regions at 3: acted in" in told(samples)


def test_words_that_a_function_wrapper_changes_step_by_step_are_read_anew(unet):
    placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9))).clone()
    placed.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    assert TestKeysKept().count(placed)[0] == 4


@pytest.mark.parametrize("words", [7 + 4, 3])
def test_more_or_fewer_words_by_another_pack_go_around_with_a_note(unet, words):
    placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9))).clone()

    def patch(n, context, value, options):
        context = torch.cat([context, context], 1)[:, :words]
        return n, context, context

    placed.set_model_attn2_patch(patch)
    assert "attentions did not follow the regions" in told(models.sample(placed))


def test_under_a_shrunk_picture_it_runs_and_says_what_it_left_out(unet):
    """The host's own Deep Shrink halves the picture within the network."""
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9)))
    shrunk = PatchModelAddDownscale.execute(placed, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic").result[0]
    samples = models.sample(shrunk, size=16)
    assert samples.isfinite().all()
    assert "got nothing of what has a place" in told(samples)


def test_a_model_evaluated_again_within_a_call_changes_nothing(unet):
    """By a wrapper around the network, with one condition only, as some guidances do."""
    placed = put(unet, halves(unet, models.lora(unet), models.lora(unet, seed=9)), isolation=2.0, isolation_end=1.0)
    inner = []

    def again(executor, x, t, context, y, control, options, **kwargs):
        if not inner:
            inner.append(1)
            one = options | {"uuids": options["uuids"][:1], "cond_or_uncond": options["cond_or_uncond"][:1]}
            placed.model.apply_model(x[:1], t[:1], c_crossattn=context[:1], transformer_options=one)
            inner.clear()
        return executor(x, t, context, y, control, options, **kwargs)

    assert torch.equal(models.sample(sampling.wrapped(placed, WrappersMP.DIFFUSION_MODEL, again)), models.sample(placed))


class TestSpan:
    """A LoRA on the region's own words of the common prompt."""

    PROMPT = "a large red robot on the left and a small blue alien on the right"

    @pytest.fixture(scope="class")
    def loaded(self):
        return lab.load("dit")

    def regions(self, loaded, prompt="red robot", name="one", box=(0, 0, 1, 1), **lora):
        state = models.lora(loaded.model, **lora)
        return Regions().with_region(Region(name, shapes=(Box(*box),), prompt=prompt)).with_lora(name, Hung("lora", state))

    def put(self, loaded, regions, prompt=PROMPT, **options):
        given = {"clip": loaded.clip, "prompt": prompt} | options
        return RegionsApply.execute(loaded.model, encoded(loaded, self.PROMPT), [], regions, "span", **given).result

    def changed_rows(self, loaded, model, layer="txt_in"):
        """The rows of a layer's output that differ from the plain model's, for each condition of the first step."""
        outputs = []
        for one in (model, loaded.model):
            module = one.model.diffusion_model.get_submodule(layer)
            handle = module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
            drawn(one, encoded(loaded, self.PROMPT), encoded(loaded, "a red robot"), cfg=3.0)
            handle.remove()
        half = len(outputs) // 2
        return [set((one != other).any(-1).nonzero().flatten().tolist()) for one, other in zip(outputs[0], outputs[half], strict=True)]

    def test_it_acts_on_those_rows_alone_and_not_on_the_negative(self, loaded):
        """One prompt is read: start, a, large, red, robot."""
        model, *_, report = self.put(loaded, self.regions(loaded, only="txt_in"))
        assert "words 'red robot' (tokens 3-4)" in report
        assert sorted(self.changed_rows(loaded, model), key=len) == [set(), {3, 4}]

    def test_a_region_without_a_prompt_is_found_by_its_name(self, loaded):
        assert "words 'blue alien' (tokens 11-12)" in self.put(loaded, self.regions(loaded, "", "blue alien"))[3]

    def test_wherever_they_stand(self, loaded):
        assert "(tokens 1, 9)" in self.put(loaded, self.regions(loaded, "a"))[3]

    def test_every_word_of_the_prompt_everywhere_is_the_policy_all_on_them(self, loaded):
        """Where the words are the whole prompt, only what stands before and behind it is left out."""
        model = self.put(loaded, self.regions(loaded, self.PROMPT, only="txt_in"))[0]
        count = len(loaded.clip.tokenizer.clip_l.tokenizer(self.PROMPT)["input_ids"])
        assert max(self.changed_rows(loaded, model), key=len) == set(range(1, count - 1))

    def test_the_picture_differs_from_each_other_policy(self, loaded):
        regions = self.regions(loaded, "red robot", box=(0, 0, 0.5, 1))
        pictures = [drawn(self.put(loaded, regions)[0], encoded(loaded, self.PROMPT), encoded(loaded, ""), cfg=4.0)]
        for text in ("own", "none", "all"):
            unnamed = self.regions(loaded, "", box=(0, 0, 0.5, 1))
            pictures.append(drawn(put(loaded.model, unnamed, text=text), encoded(loaded, self.PROMPT), encoded(loaded, ""), cfg=4.0))
        assert not any(torch.allclose(pictures[0], other, atol=1e-3) for other in pictures[1:])

    def test_no_text_is_added(self, loaded):
        """The sequence is as long as without regions."""
        lengths = []
        for model in (loaded.model, self.put(loaded, self.regions(loaded, box=(0, 0, 0.5, 1)))[0]):
            module = model.model.diffusion_model.get_submodule("single_blocks.0.linear1")
            handle = module.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
            drawn(model, encoded(loaded, self.PROMPT), encoded(loaded, ""), cfg=4.0)
            handle.remove()
        assert len(set(lengths)) == 1

    def test_in_a_unet_the_region_alone_reads_its_words_through_it(self):
        """On words whose row is all that has the LoRA: the same rows of the region's own copy of the prompt."""
        unet = lab.load("unet")
        regions = self.regions(unet, box=(0, 0, 0.5, 1), only="attn2.to_k")
        model = self.put(unet, regions)[0]
        rows = max(self.changed_rows_of_copies(unet, model), key=len)
        assert rows in ({3, 4}, {77 + 3, 77 + 4})

    def changed_rows_of_copies(self, loaded, model, layer="middle_block.1.transformer_blocks.0.attn2.to_k"):
        """The rows of keys over two copies of the common prompt that are not those of the plain prompt."""
        outputs = []
        for one in (loaded.model, model):
            module = one.model.diffusion_model.get_submodule(layer)
            handle = module.register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
            drawn(one, encoded(loaded, self.PROMPT), encoded(loaded, "a red robot"), cfg=3.0)
            handle.remove()
        plain, placed = outputs[0], outputs[-1]
        twice = torch.cat([plain, plain], 1)
        assert placed.shape == twice.shape
        return [set((~torch.isclose(*pair, atol=1e-5)).any(-1).nonzero().flatten().tolist()) for pair in zip(placed, twice, strict=True)]

    @pytest.mark.parametrize(
        "region, options, told",
        [
            ("green robot", {}, "'one', 'green robot', are not in prompt"),
            ("red robot", {"prompt": " "}, "prompt is empty"),
            ("red robot", {"clip": None}, "no clip is connected to find words with"),
            ("red robot", {"prompt": " ".join(["red robot"] * 60)}, "prompt takes 154 tokens, and positive was made from 77"),
        ],
    )
    def test_what_cannot_be_found_stops_the_node(self, loaded, region, options, told):
        with pytest.raises(RegionsError, match=told):
            self.put(loaded, self.regions(loaded, region), **options)

    def test_a_region_without_a_lora_reads_its_own_prompt(self, loaded):
        regions = Regions().with_region(Region("one", shapes=(Box(0, 0, 1, 1),), prompt="a small yellow heart"))
        model, *_, report = self.put(loaded, regions, prompt="")
        assert "reads a prompt of its own" in report
        own = [[encoded(loaded, "a small yellow heart")[0][0], encoded(loaded, self.PROMPT)[0][1]]]  # the pooled prompt is the common one
        expected = drawn(loaded.model, own, encoded(loaded, ""), cfg=4.0)
        torch.testing.assert_close(drawn(model, encoded(loaded, self.PROMPT), encoded(loaded, ""), cfg=4.0), expected, **CLOSE)


def encoded(loaded, text):
    context, pooled = loaded.clip.encode_from_tokens(loaded.clip.tokenize(text), return_pooled=True)
    return [[context, {"pooled_output": pooled}]]
