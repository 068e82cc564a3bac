"""Effects in their places: exact against what the same adapters and texts do on the whole picture."""

import models
import pytest
import torch
from sampling import count_calls

import nodes
from concept_nodes.host import adapters, lab
from concept_nodes.host.dispatcher import Effect, attach
from concept_nodes.host.places import Place, group, segments
from concept_nodes.host.run_record import find
from concept_nodes.host.sites import IMAGE, JOINT, MAP, TEXT, VECTOR, Pyramid, Site, sites
from concept_nodes.host.spread import Crop, Kind, Spread
from concept_nodes.lab import measure
from concept_nodes.lab.eye import Eye
from concept_nodes.nodes.regions import MaskedLoRA
from concept_nodes.ops.masks import pool

KINDS = list(models.KINDS)
UNETS = ["sd15", "sdxl"]
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
ONES, NONE = torch.ones(32, 32), torch.zeros(32, 32)
LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1
SLOPE = torch.linspace(0, 1, 32).expand(32, 32)


class Reads(Effect):
    """A place that reads a text of its own."""

    def __init__(self, place):
        super().__init__("reads", {})
        self.place = place

    def strengths(self, model_sampling):
        return lambda call: 1.0


def adapted(model, place=None, text="own", seed=5, strength=0.8, **lora):
    """A clone with a random LoRA in a place."""
    placement = adapters.place(model, models.lora(model, seed=seed, **lora), "random")
    effect = adapters.AdapterEffect("random", placement.parts, strength)
    effect.place, effect.text = place, text
    model = model.clone()
    attach(model, effect)
    return model


def reading(model, *places):
    model = model.clone()
    for place in places:
        attach(model, Reads(place))
    return model


def context(seed, tokens=7):
    return models.seeded((1, tokens, models.CONTEXT), seed)


def drawn(model, positive, negative, size=8, batch=1, cfg=3.0):
    """What KSampler gives for two contexts."""
    with torch.inference_mode():
        asked, not_wanted = models.conditioning(model, 10), models.conditioning(model, 20)
        asked[0][0], not_wanted[0][0] = positive, negative
        (out,) = nodes.common_ksampler(model, 3, 4, cfg, "euler", "normal", asked, not_wanted, models.latent(model, batch, size))
    return out["samples"]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return models.build(request.param)


@pytest.fixture(scope="module", params=UNETS)
def unet(request):
    return models.build(request.param)


class TestMaskedAdapters:
    @pytest.mark.parametrize("text", ["own", "all"])
    def test_everywhere_is_the_plain_adapter(self, model, text):
        assert torch.equal(models.sample(adapted(model, Place(ONES), text)), models.sample(adapted(model)))

    @pytest.mark.parametrize("text", ["own", "none"])
    def test_nowhere_is_the_model_without_it(self, model, text):
        torch.testing.assert_close(models.sample(adapted(model, Place(NONE), text)), models.sample(model), **CLOSE)

    def test_half_is_neither(self, model):
        half = models.sample(adapted(model, Place(LEFT)))
        assert not torch.allclose(half, models.sample(model), atol=0.1)
        assert not torch.allclose(half, models.sample(adapted(model)), atol=0.1)

    @pytest.mark.parametrize("size", [7, 8, 9])
    @pytest.mark.parametrize("mask", [LEFT, SLOPE], ids=["hard", "soft"])
    def test_the_same_adapter_in_parts_that_share_the_picture_is_the_plain_adapter(self, unet, size, mask):
        places = [Place(mask), Place(1 - mask)]
        group(places)
        parts = adapted(adapted(unet, places[0]), places[1])
        torch.testing.assert_close(models.sample(parts, size=size), models.sample(adapted(unet), size=size), **CLOSE)

    @pytest.mark.parametrize("size", [7, 8, 9])
    def test_in_a_joint_sequence_too_where_no_text_row_has_it(self, size):
        flux = models.build("flux")
        places = [Place(LEFT), Place(1 - LEFT)]
        group(places)
        parts = adapted(adapted(flux, places[0], "none"), places[1], "none")
        whole = models.sample(adapted(flux, Place(ONES), "none"), size=size)
        torch.testing.assert_close(models.sample(parts, size=size), whole, **CLOSE)

    def test_two_adapters_everywhere_are_the_two_plain_ones(self, model):
        placed = adapted(adapted(model, Place(ONES)), Place(ONES), seed=9)
        assert torch.equal(models.sample(placed), models.sample(adapted(adapted(model), seed=9)))

    def test_order_does_not_matter(self, model):
        places = [Place(LEFT), Place(1 - LEFT)]
        group(places)
        one = adapted(adapted(model, places[0]), places[1], seed=9)
        other = adapted(adapted(model, places[1], seed=9), places[0])
        torch.testing.assert_close(models.sample(one), models.sample(other), **CLOSE)

    def test_a_plain_adapter_beside_a_masked_one_stays_plain(self, model):
        with_nothing = adapted(adapted(model), Place(NONE), "none", seed=9)
        torch.testing.assert_close(models.sample(with_nothing), models.sample(adapted(model)), **CLOSE)

    def test_batch(self, model):
        placed = adapted(model, Place(LEFT))
        pair = models.sample(placed, batch=2)
        assert pair.shape[0] == 2
        torch.testing.assert_close(pair[:1], models.sample(placed), rtol=1e-3, atol=2e-3)

    def test_sizes_one_after_another(self, model):
        placed = adapted(model, Place(LEFT))
        first = models.sample(placed)
        models.sample(placed, size=12)
        assert torch.equal(models.sample(placed), first)

    def test_no_call_is_added(self, model):
        places = [Place(LEFT), Place(1 - LEFT)]
        group(places)
        assert count_calls(adapted(adapted(model, places[0]), places[1])) == count_calls(model)


def test_a_masked_slider_shrinks_the_object_under_the_mask_and_not_the_other():
    """On the lab, over twelve seeds: the size slider at -2 on one half of a picture with an object in each."""
    loaded, eye = lab.load("unet"), Eye.load()
    lab.show_files()
    texts = ["a medium red star on the left and a medium blue circle on the right on a grey background"] * 12
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1

    def diameters(model) -> tuple[float, float]:
        readings = eye.read(measure.draw(loaded, texts, size=64, seed=40, model=model))
        sizes = [[seen.diameter for reading in readings for seen in reading.objects if seen.kind == kind] for kind in ("star", "circle")]
        assert min(len(found) for found in sizes) >= 8, "too few pictures hold both objects to tell anything"
        return tuple(sum(found) / len(found) for found in sizes)

    def masked(mask):
        return MaskedLoRA.execute(loaded.model, "concept_lab/sliders/unet/size.safetensors", -2.0, 0.0, 1.0, mask).result[0]

    star, circle = diameters(loaded.model)
    for mask, shrunk, kept in ((half, 0, 1), (1 - half, 1, 0)):
        now = diameters(masked(mask))
        assert (star, circle)[shrunk] - now[shrunk] > 2
        assert abs((star, circle)[kept] - now[kept]) < 1


class TestTexts:
    def test_a_region_of_everything_is_its_prompt(self, model):
        region = Place(ONES, {"positive": context(31), "negative": context(32)})
        expected = drawn(model, context(31), context(32))
        torch.testing.assert_close(drawn(reading(model, region), context(10), context(20)), expected, **CLOSE)

    @pytest.mark.parametrize("tokens", [5, 12, 14])
    def test_prompts_of_other_lengths(self, model, tokens):
        region = Place(ONES, {"positive": context(33, tokens)})
        expected = drawn(model, context(33, tokens), context(20))
        torch.testing.assert_close(drawn(reading(model, region), context(10), context(20)), expected, **CLOSE)

    @pytest.mark.parametrize("mask", [LEFT, SLOPE], ids=["hard", "soft"])
    @pytest.mark.parametrize("size", [7, 8])
    def test_regions_that_read_the_common_prompt_change_nothing(self, unet, mask, size):
        places = [Place(part, {"positive": context(10)}) for part in (mask, 1 - mask)]
        group(places)
        plain = drawn(unet, context(10), context(20), size)
        torch.testing.assert_close(drawn(reading(unet, *places), context(10), context(20), size), plain, **CLOSE)

    def test_half_reads_it(self, model):
        region = Place(LEFT, {"positive": context(31)})
        half = drawn(reading(model, region), context(10), context(20))
        assert half.isfinite().all()
        for whole in (drawn(model, context(10), context(20)), drawn(model, context(31), context(20))):
            assert not torch.allclose(half, whole, atol=0.1)

    def test_a_negative_text_is_read_by_the_negative_alone(self, model):
        region = Place(ONES, {"negative": context(32)})
        torch.testing.assert_close(drawn(reading(model, region), context(10), context(20)), drawn(model, context(10), context(32)), **CLOSE)
        alone = drawn(reading(model, region), context(10), context(20), cfg=1.0)
        torch.testing.assert_close(alone, drawn(model, context(10), context(20), cfg=1.0), **CLOSE)

    def test_with_an_adapter_of_its_own(self, unet):
        """Everything reads its own text through its own adapter: the plain adapter on the plain text."""
        region = Place(ONES, {"positive": context(31), "negative": context(32)})
        placed = reading(adapted(unet, region), region)
        expected = drawn(adapted(unet), context(31), context(32))
        torch.testing.assert_close(drawn(placed, context(10), context(20)), expected, **CLOSE)

    def test_no_call_is_added(self, model):
        places = [Place(LEFT, {"positive": context(31)}), Place(1 - LEFT, {"positive": context(32, 14)})]
        group(places)
        assert count_calls(reading(model, *places)) == count_calls(model)


class TestSegments:
    def test_one_group(self):
        places = [Place(LEFT), Place(1 - LEFT)]
        group(places)
        found, shares = segments(places, torch.stack([LEFT, 1 - LEFT]))
        assert [one.places for one in found] == [{0}, {1}]
        assert torch.equal(shares, torch.stack([LEFT, 1 - LEFT]))

    def test_what_is_left_is_the_rests(self):
        found, shares = segments([Place(LEFT)], LEFT[None])
        assert [one.places for one in found] == [set(), {0}]
        assert torch.equal(shares.sum(0), ONES)

    def test_groups_lie_over_one_another(self):
        top = LEFT.t().contiguous()
        places = [Place(LEFT), Place(top)]
        found, shares = segments(places, torch.stack([LEFT, top]))
        assert {frozenset(one.places) for one in found} == {frozenset(), frozenset({0}), frozenset({1}), frozenset({0, 1})}
        assert torch.equal(shares.sum(0), ONES)
        both = next(share for one, share in zip(found, shares, strict=True) if one.places == {0, 1})
        assert torch.equal(both, LEFT * top)

    def test_the_last_text_is_read(self):
        places = [Place(ONES, {"positive": context(1)}), Place(ONES, {"positive": context(2)}), Place(ONES)]
        (only,), _ = segments(places, torch.stack([ONES] * 3))
        assert only.places == {0, 1, 2}
        assert only.reader is places[1]


class TestSites:
    def test_every_layer_of_a_unet(self, unet):
        found = sites(unet.model, layers(unet))
        assert {site.kind for site in found.values()} == {IMAGE, MAP, TEXT, VECTOR}
        assert found["diffusion_model.input_blocks.0.0"] == Site(MAP, 0)
        assert found["diffusion_model.input_blocks.2.0.op"] == Site(MAP, 1)
        assert found["diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"] == Site(IMAGE, 1)
        assert found["diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_k"].kind == TEXT
        assert found["diffusion_model.output_blocks.1.2.conv"] == Site(MAP, 0)
        assert found["diffusion_model.input_blocks.1.0.emb_layers.1"].kind == VECTOR

    def test_every_layer_of_flux(self):
        flux = models.build("flux")
        found = sites(flux.model, layers(flux))
        kinds = {name.removeprefix("diffusion_model."): site for name, site in found.items()}
        assert kinds["double_blocks.0.img_attn.qkv"] == Site(IMAGE, 1)
        assert kinds["double_blocks.0.txt_mlp.0"].kind == TEXT
        assert kinds["single_blocks.0.linear1"] == Site(JOINT, 1)
        assert kinds["single_blocks.0.modulation.lin"].kind == kinds["time_in.in_layer"].kind == VECTOR
        assert kinds["final_layer.linear"] == kinds["img_in"] == Site(IMAGE, 1)

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_are_as_many_as_the_layer_writes(self, kind):
        """Every layer of a real forward, at a size that halves unevenly."""
        model = models.build(kind)
        names = layers(model)
        found, shapes, handles = sites(model.model, names), {}, []

        def keep(name):
            def hook(module, args, output):
                shapes[name] = output.shape

            return hook

        for name in names:
            handles.append(model.model.get_submodule(name).register_forward_hook(keep(name)))
        models.sample(model, steps=1, size=9, cfg=1.0)
        for handle in handles:
            handle.remove()
        pyramid = Pyramid(torch.ones(1, 9, 9))
        for name, shape in shapes.items():
            rows = pyramid.rows(found[name], torch.ones(7))
            if found[name].kind == MAP:
                assert rows.shape[1:] == shape[2:], name
            elif found[name].kind != VECTOR:
                assert rows.shape[1] == shape[1], name
            else:
                assert shape[:-1].numel() == 1, name


def layers(model) -> list[str]:
    """Every layer that an adapter can lie on."""
    return [
        name
        for name, module in model.model.named_modules()
        if name.startswith("diffusion_model.") and (hasattr(module, "in_features") or isinstance(module, torch.nn.Conv2d))
    ]


def joint_of(places, mask):
    """The bias that a call over 8x8 cells gets whose texts lie behind one another, one for each of `places`."""
    kind = Kind((8, 8), (Crop(0, 0, 8, 8),), ("positive",), 1, 7, 0)
    spread = Spread(kind, {index: (place, "own") for index, place in enumerate(places)}, torch.device("cpu"))
    return spread.read_jointly(True, None, 1).arguments(context(10), 0, mask)["attention_mask"]


class TestAMaskOfTheConditionsOwn:
    """Flux: a bias that came with the common text, over it and the picture."""

    @pytest.fixture(scope="class")
    def flux(self):
        return models.build("flux")

    def mask(self, seed=40, text=True):
        """(1, 7 + 16, 7 + 16) for a latent of 8x8; without `text`, between the picture's own tokens alone."""
        mask = models.seeded((1, 23, 23), seed, 3.0)
        mask[:, 8:12, 2:4] = -torch.inf
        if not text:
            mask[:, :7], mask[:, :, :7] = 0, 0
        return mask

    def drawn(self, model, mask, positive=None, **options):
        with torch.inference_mode():
            asked, not_wanted = models.conditioning(model, 10), models.conditioning(model, 20)
            asked[0][0] = context(10) if positive is None else positive
            for (_, given), own in ((asked[0], mask), (not_wanted[0], mask if mask is None else mask / 2)):
                if own is not None:
                    given |= {"attention_mask": own, "attention_mask_img_shape": (4, 4)}
            (out,) = nodes.common_ksampler(model, 3, 4, 3.0, "euler", "normal", asked, not_wanted, models.latent(model, **options))
        return out["samples"]

    def test_it_acts_at_all(self, flux):
        assert not torch.allclose(self.drawn(flux, self.mask()), self.drawn(flux, None), atol=0.1)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_it_stays_where_a_copy_of_the_text_is_read(self, flux, batch):
        """Everything reads the common text through an adapter of its own: the plain adapter under the same mask."""
        mask = self.mask()
        placed, plain = (self.drawn(model, mask, batch=batch) for model in (adapted(flux, Place(ONES)), adapted(flux)))
        torch.testing.assert_close(placed, plain, **CLOSE)

    def test_every_copy_of_the_text_keeps_it(self, flux):
        """Both halves read a copy of the common text, and their adapters add nothing: each position is under the one mask."""
        places = [Place(LEFT), Place(1 - LEFT)]
        group(places)
        whole = joint_of(places, self.mask())
        for half, first in ((LEFT, 0), (1 - LEFT, 7)):
            rows = torch.tensor([*range(first, first + 7), *(14 + pool(half[None], 4, 4)[0].flatten().nonzero().flatten())])
            alone = torch.cat([torch.arange(7), rows[7:] - 7])
            torch.testing.assert_close(whole[0, 0][rows][:, rows], self.mask()[0][alone][:, alone])

    def test_a_text_of_ones_own_is_free_of_it(self, flux):
        """What the region reads is not what the mask was made for; the picture's part of it holds."""
        region = Place(ONES, {"positive": context(31, 9), "negative": context(32, 5)})
        placed = [self.drawn(reading(flux, region), self.mask(text=text)) for text in (True, False)]
        assert torch.equal(*placed)
        assert not torch.allclose(placed[0], self.drawn(reading(flux, region), None), atol=1e-2)

    def test_one_over_other_tokens_is_left_out_with_a_note(self, flux):
        placed = adapted(flux, Place(LEFT))
        samples = self.drawn(placed, models.seeded((1, 30, 30), 3))
        told = find(samples).describe()  # now, for the next run ends in the same latents
        assert "mask was left out: it is over 30 tokens, and there are 7 of text and 16 of the picture" in told
        assert torch.equal(samples, self.drawn(placed, None))
