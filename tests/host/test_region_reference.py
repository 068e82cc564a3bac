"""Region Reference: what is read where, against one softmax written out by hand, in every way to sample."""

import models
import pytest
import sampling
import state
import torch

import nodes
from concept_nodes.host import lab, run_record
from concept_nodes.host.adapters import LowRank
from concept_nodes.host.families import UnsupportedFamily
from concept_nodes.host.reference import OVERRIDE, Picture, Reference, ReferenceError, fitted, layers_of
from concept_nodes.host.regions import Hung, Regions, RegionsError
from concept_nodes.nodes.reference import RegionReference
from concept_nodes.nodes.regions import RegionsApply
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region

HEIGHT, WIDTH = 8, 12
TOKENS = 7  # of the prompts


class Drawn:
    """A reference without an autoencoder: a random latent, and a soft mask over its upper part."""

    def __init__(self, channels=4, seed=40, mask=None):
        self.channels, self.seed, self.mask = channels, seed, mask

    def latent(self, height, width):
        return models.seeded((1, self.channels, height, width), self.seed)

    def shares(self, height, width):
        if self.mask is not None:
            return torch.full((height, width), self.mask)
        shares = torch.zeros(height, width)
        shares[: height // 2], shares[height // 2, : width // 2] = 1.0, 0.5
        return shares


def soft_left(height, width):
    """A region's mask with an edge of halves."""
    mask = torch.zeros(height, width)
    mask[:, : width // 2], mask[:, width // 2] = 1.0, 0.5
    return mask


def listed(model, *references, mask=None, **options):
    regions = Regions().with_region(Region("left"), soft_left(HEIGHT, WIDTH) if mask is None else mask)
    for reference in references or [hung(model, **options)]:
        regions = regions.with_reference("left", reference)
    return regions


def hung(model, strength=2.0, seed=40, picture=None, **options):
    return Reference("left", picture or Drawn(models.channels(model), seed), strength, **options)


def put(model, regions, **options):
    return RegionsApply.execute(model, [], [], regions, **options).result[0]


def acts(model):
    return put(model, listed(model))


def drawn(model, *, batch=2, steps=3, cfg=3.0, start=None, denoise=1.0, seed=3, height=HEIGHT, width=WIDTH):
    """Pictures that are wider than high."""
    latent = {"samples": torch.zeros(batch, models.channels(model), height, width) if start is None else start}
    with torch.inference_mode():
        positive, negative = models.conditioning(model, 10, TOKENS), models.conditioning(model, 20, TOKENS)
        return nodes.common_ksampler(model, seed, steps, cfg, "euler", "normal", positive, negative, latent, denoise=denoise)[0]["samples"]


class ByHand:
    """The same without the pack: the references go through a model of their own, and every attention of the picture to itself is written
    out over both pictures' keys, in one softmax with a bias.
    """

    def __init__(self, kind, references, grids):
        """references: [(reference, mask (height, width) of its place)]; grids: of the layers, in their order."""
        self.plain, self.references, self.grids = models.build(kind), references, grids
        self.kept, self.at, self.writing = [], 0, None

    def on(self, model):
        model = model.clone()
        model.model_options["transformer_options"][OVERRIDE] = self.attend
        model.set_model_unet_function_wrapper(self.step)
        return model

    def step(self, apply, args):
        c = args["c"]
        each = len(args["input"]) // len(args["cond_or_uncond"])
        self.wanted = (1 - torch.tensor(args["cond_or_uncond"])).repeat_interleave(each)
        row = args["cond_or_uncond"].index(0) * len(args["input"]) // len(args["cond_or_uncond"])
        own = {key: value[row : row + 1] if isinstance(value, torch.Tensor) else value for key, value in c.items()}
        self.kept = []
        for reference, _ in self.references:
            noise = torch.randn((1, *args["input"].shape[1:]), generator=torch.Generator().manual_seed(reference.seed))
            latent = self.plain.model.process_latent_in(reference.picture.latent(*noise.shape[-2:]))
            x = self.plain.model.model_sampling.noise_scaling(args["timestep"][:1], noise, latent)
            self.writing, self.at = [], 0
            self.plain.model.apply_model(x, args["timestep"][:1], **own | {"transformer_options": {OVERRIDE: self.attend}})
            self.kept.append(self.writing)
        self.writing, self.at = None, 0
        return apply(args["input"], args["timestep"], **c)

    def attend(self, func, q, k, v, heads, mask=None, skip_reshape=False, **_):
        split = [part if skip_reshape else part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v)]
        bias = torch.zeros(()) if mask is None else mask
        logits = split[0] @ split[1].mT * split[0].shape[-1] ** -0.5 + bias
        values = split[2]
        if skip_reshape or k.shape[1] != TOKENS:
            grid = self.grids[self.at]
            words = split[1].shape[2] - grid[0] * grid[1]
            if self.writing is not None:
                self.writing.append([part[:, :, words:] for part in split[1:]])
            for number, (reference, place) in enumerate(self.references if self.writing is None else ()):
                keys, more = self.kept[number][self.at]
                weight = (
                    reference.strength
                    * pooled(place, grid).flatten()[:, None]
                    * pooled(reference.picture.shares(HEIGHT, WIDTH), grid).flatten()
                )
                weight = torch.nn.functional.pad(weight, (0, 0, words, 0)) * self.wanted[:, None, None, None]
                logits = torch.cat([logits, split[0] @ keys.mT * split[0].shape[-1] ** -0.5 + weight.log()], -1)
                values = torch.cat([values, more.expand(len(values), -1, -1, -1)], 2)
            self.at += 1
        return (logits.softmax(-1) @ values).transpose(1, 2).flatten(-2)


def pooled(mask, grid):
    return torch.nn.functional.adaptive_avg_pool2d(mask[None], grid)[0]


GRIDS = {
    "sd15": [(8, 12), (4, 6), (4, 6), (4, 6), (4, 6), (8, 12), (8, 12)],
    "sdxl": [(8, 12), (4, 6), (4, 6), (4, 6), (4, 6), (8, 12), (8, 12)],
    "flux": [(4, 6), (4, 6)],
}
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
each_kind = pytest.mark.parametrize("kind", list(models.KINDS))


class TestIsOneSoftmax:
    """Over wide pictures, a batch, soft masks of the region and of the concept."""

    @each_kind
    def test_one_reference(self, kind):
        model = models.build(kind)
        ours = drawn(acts(model))
        by_hand = drawn(ByHand(kind, [(hung(model), soft_left(HEIGHT, WIDTH))], GRIDS[kind]).on(model))
        torch.testing.assert_close(ours, by_hand, **CLOSE)
        assert (ours - drawn(model)).norm() > 20 * (ours - by_hand).norm()

    @each_kind
    def test_two_in_one_region_and_one_in_the_rest(self, kind):
        model = models.build(kind)
        two = [hung(model), hung(model, 0.7, seed=60)]
        third = Reference("others", Drawn(models.channels(model), 80), 1.5, seed=9)
        regions = listed(model, *two).with_region(Region("others", rest=True)).with_reference("others", third)
        places = [soft_left(HEIGHT, WIDTH)] * 2 + [1 - soft_left(HEIGHT, WIDTH)]
        by_hand = ByHand(kind, list(zip([*two, third], places, strict=True)), GRIDS[kind])
        torch.testing.assert_close(drawn(put(model, regions)), drawn(by_hand.on(model)), **CLOSE)

    @each_kind
    def test_beside_a_lora_in_the_same_region(self, kind):
        """The region's positions ask through the LoRA; the reference is what the model itself makes of it."""
        model = models.build(kind)
        lora = Hung("random", models.lora(model))
        placed = put(model, listed(model).with_lora("left", lora), text="none")
        alone = put(model, Regions().with_region(Region("left"), soft_left(HEIGHT, WIDTH)).with_lora("left", lora), text="none")
        by_hand = ByHand(kind, [(hung(model), soft_left(HEIGHT, WIDTH))], GRIDS[kind]).on(alone)
        torch.testing.assert_close(drawn(placed), drawn(by_hand), **CLOSE)

    @pytest.mark.parametrize("kind", ["sd15", "flux"])
    def test_beside_isolation(self, kind):
        """The model's own bias is part of its softmax."""
        model = models.build(kind)
        regions = listed(model).with_region(Region("others", rest=True))
        lora = Hung("random", models.lora(model, only="ff" if kind == "sd15" else "img_mlp"))
        options = {"isolation": 3.0, "isolation_end": 1.0, "text": "none"}
        without = Regions(regions.document, masks=regions.masks)
        for name in ("left", "others"):
            regions, without = regions.with_lora(name, lora), without.with_lora(name, lora)
        by_hand = ByHand(kind, [(hung(model), soft_left(HEIGHT, WIDTH))], GRIDS[kind]).on(put(model, without, **options))
        torch.testing.assert_close(drawn(put(model, regions, **options)), drawn(by_hand), **CLOSE)

    @pytest.mark.parametrize("kind", ["sd15", "sdxl"])
    def test_the_picture_itself_changes_nothing(self, kind):
        """One step from a picture, with the same picture under the same noise as reference. (Where the softmax is over text as well, the
        picture would count more than it did.)
        """
        model = models.build(kind)
        itself = Drawn(models.channels(model), mask=1.0)
        regions = listed(model, hung(model, 5.0, picture=itself), mask=torch.ones(8, 8))
        setting = {"batch": 1, "steps": 1, "cfg": 1.0, "start": itself.latent(HEIGHT, WIDTH), "denoise": 0.5, "seed": 0}
        torch.testing.assert_close(drawn(put(model, regions), **setting), drawn(model, **setting), rtol=1e-4, atol=1e-4)
        other = listed(model, hung(model, 5.0, seed=41), mask=torch.ones(8, 8))
        assert (drawn(put(model, other), **setting) - drawn(model, **setting)).abs().max() > 1e-3


class TestWhere:
    @pytest.mark.parametrize(
        "kind, layer", [("sd15", "input_blocks.1.1.transformer_blocks.0.attn1"), ("flux", "double_blocks.0.img_attn.proj")]
    )
    def test_positions_outside_of_the_region_are_what_they_were_at_that_layer(self, kind, layer):
        model = models.build(kind)
        hard = torch.zeros(HEIGHT, WIDTH)
        hard[..., : WIDTH // 2] = 1
        seen = []
        handle = model.model.diffusion_model.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        for one in (model, put(model, listed(model, mask=hard))):
            drawn(one, steps=1, cfg=1.0)
        handle.remove()
        plain, reference, acted = seen
        grid = (HEIGHT, WIDTH) if kind == "sd15" else (HEIGHT // 2, WIDTH // 2)
        inside = pooled(hard, grid).flatten() > 0
        assert len(reference) == 1
        assert torch.equal(plain[:, ~inside], acted[:, ~inside])
        assert ((plain - acted)[:, inside].abs().amax(-1) > 0).all()


class TestZero:
    @each_kind
    def test_is_nothing(self, kind):
        model = models.build(kind)
        for setting in ({"strength": 0.0}, {"start": 0.5, "end": 0.5}, {"picture": Drawn(models.channels(model), mask=0.0)}):
            assert put(model, listed(model, **setting)) is model
        assert put(model, listed(model, mask=torch.zeros(8, 8))) is model

    @each_kind
    def test_outside_of_its_window_it_adds_no_call_and_no_bit(self, kind):
        model = models.build(kind)
        late = put(model, listed(model, start=0.999, end=1.0))
        assert torch.equal(drawn(late, denoise=1.0, steps=1), drawn(model, steps=1))
        assert sampling.count_calls(late, steps=1) == sampling.count_calls(model, steps=1)


class TestCalls:
    def count(self, model, **options):
        return sampling.count_calls(model, **options)

    def told(self, model, **options):
        return run_record.find(models.sample(model, **options))

    @pytest.mark.parametrize("sampler, cfg", [("euler", 3.0), ("euler", 1.0), ("heun", 3.0), ("dpmpp_2m", 3.0)])
    def test_adds_as_many_as_it_says(self, sampler, cfg):
        model = models.build()
        setting = {"sampler": sampler, "cfg": cfg}
        told = self.told(acts(model), **setting)
        assert told.calls == self.count(acts(model), **setting) == self.count(model, **setting) + told.added
        assert told.added == 4, "one for each noise level"

    def test_one_for_conditions_that_are_evaluated_one_by_one(self):
        model = models.build()
        assert self.count(sampling.one_by_one(acts(model))) == self.count(sampling.one_by_one(model)) + 4

    def test_references_whose_texts_are_alike_in_length_go_together(self):
        model = models.build()
        regions = listed(model).with_region(Region("others", rest=True))
        together = regions.with_reference("others", hung(model, seed=60))
        report = RegionsApply.execute(model, [], [], together).result[3]
        assert "1 model call of 2 pictures in all is added to each step that reads a reference" in report
        assert self.count(put(model, together)) == self.count(model) + 4

    def test_the_report_says_what_was_done(self):
        model = models.build()
        report = RegionsApply.execute(model, [], [], listed(model, layers="last third")).result[3]
        assert "Reference at 2, in 3 of 7 layers in which the picture attends to itself." in report
        assert "1 model call of 1 picture in all is added" in report
        assert "'left': reference at 2: acted in 4 of 4 steps" in self.told(acts(model)).describe()


SAMPLERS = ("euler", "heun", "dpm_2_ancestral", "lms", "dpm_adaptive", "dpmpp_2m_sde", "ddim", "uni_pc", "res_multistep", "sa_solver_pece")


def plain_ways():
    return [f"KSampler {name}" for name in SAMPLERS] + [way for way in sampling.WAYS if not way.startswith(("scheduler", "KSampler"))]


@pytest.fixture(scope="module")
def unet():
    return models.build()


@pytest.mark.parametrize("way", plain_ways())
def test_every_stock_sampler_and_guider(way, unet):
    acting = sampling.WAYS[way](acts(unet))
    assert acting.isfinite().all()
    assert not torch.equal(acting, sampling.WAYS[way](unet))


@pytest.mark.parametrize("name", sampling.SITUATIONS)
def test_nothing_is_mutated(name):
    situation = sampling.situation(name, ())
    model = situation.model()
    expected = situation.plain(model)
    before = state.of_model(model.model), state.of_patcher(model)
    acting = model
    for _ in range(situation.nodes):
        acting = acts(acting)
    situation.run(acting, model)
    assert state.differences(before[0], state.of_model(model.model)) == []
    assert state.differences(before[1], state.of_patcher(model)) == []
    assert torch.equal(situation.plain(model), expected)


class TestTurns:
    def test_rows_of_a_batch_are_what_they_are_alone(self, unet):
        start = models.seeded((2, 4, HEIGHT, WIDTH), 70)
        placed = acts(unet)
        both = drawn(placed, start=start, denoise=0.5)
        noise = drawn(placed, start=start[:1], batch=1, denoise=0.5)
        torch.testing.assert_close(both[:1], noise, **CLOSE)

    def test_the_order_of_conditions_does_not_matter(self, unet):
        torch.testing.assert_close(models.sample(sampling.turned_around(acts(unet))), models.sample(acts(unet)), **CLOSE)
        torch.testing.assert_close(models.sample(sampling.one_by_one(acts(unet))), models.sample(acts(unet)), **CLOSE)

    def test_a_run_and_another_size_and_the_run_again(self, unet):
        placed = acts(unet)
        first, larger, again = drawn(placed), drawn(placed, height=16, width=8), drawn(placed)
        assert torch.equal(first, again)
        assert larger.isfinite().all()

    def test_loras_are_joined_once_for_all_steps(self, unet, monkeypatch):
        """The references' calls, in which no region's LoRA acts, take turns with the picture's."""
        made, join = [], LowRank.join.__func__
        monkeypatch.setattr(LowRank, "join", classmethod(lambda cls, *args: made.append(1) or join(cls, *args)))
        placed = put(unet, listed(unet).with_lora("left", Hung("random", models.lora(unet))))
        models.sample(placed, steps=2)
        few = len(made)
        made.clear()
        models.sample(placed, steps=6)
        assert len(made) == few > 0

    def test_another_packs_replacement_is_reported(self, unet):
        placed = acts(unet).clone()
        placed.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0)
        assert "1 of 7 attentions did not follow the regions" in run_record.find(models.sample(placed)).describe()

    def test_another_packs_override_is_asked_first(self, unet):
        seen = []

        def override(attention, *args, **kwargs):
            seen.append(1)
            return attention(*args, **kwargs)

        placed = acts(unet)
        expected = models.sample(placed)
        placed = placed.clone()
        placed.model_options["transformer_options"][OVERRIDE] = override
        assert torch.equal(models.sample(placed), expected)
        assert len(seen) == 2 * 4 * 14


class TestPicture:
    def test_is_cut_about_the_concept_and_scaled(self):
        picture, mask = torch.zeros(3, 40, 100), torch.zeros(40, 100)
        picture[:, 10:30, 70:90], mask[10:30, 70:90] = 1.0, 1.0
        cut = fitted(picture, mask, 20, 20)
        assert cut.shape == (3, 20, 20)
        assert cut.mean() == pytest.approx(400 / 1600, abs=0.02), "nothing of it is cut off"
        assert cut[:, 5:15].mean(0).std(1).min() > 0

    def test_of_the_right_format_it_stays_what_it_is(self):
        picture = models.seeded((3, 16, 24), 3)
        assert torch.equal(fitted(picture, torch.ones(16, 24), 16, 24), picture)

    def test_is_encoded_for_the_latent_that_is_sampled(self):
        loaded = lab.load("unet")
        picture = Picture(torch.rand(32, 48, 3), None, loaded.vae)
        with torch.inference_mode():
            assert picture.latent(8, 12).shape == (1, 4, 8, 12)
            assert picture.latent(8, 12) is picture.latent(8, 12)
            torch.testing.assert_close(picture.latent(8, 12), loaded.vae.encode(picture.image[None]), rtol=1e-4, atol=1e-4)
        assert torch.equal(picture.shares(8, 12), torch.ones(8, 12))


class TestNode:
    def node(self, model_regions, **options):
        given = {"region": "left", "image": torch.rand(1, 32, 32, 3), "vae": lab.load("unet").vae, "strength": 1.0} | options
        return RegionReference.execute(model_regions, **given).result[0]

    def test_hangs_a_reference_that_acts(self, unet):
        loaded = lab.load("unet")
        regions = self.node(Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),))))
        placed = put(loaded.model, regions)
        with torch.inference_mode():
            context, pooled = loaded.clip.encode_from_tokens(loaded.clip.tokenize("a red star"), return_pooled=True)
            conditions = [[context, {"pooled_output": pooled}]]
            latent = {"samples": torch.zeros(1, 4, 8, 12)}
            arms = [
                nodes.common_ksampler(one, 1, 2, 1.0, "euler", "normal", conditions, conditions, latent)[0]["samples"]
                for one in (placed, loaded.model)
            ]
        assert not torch.equal(*arms)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"region": "right"}, r"no region named 'right'. Regions: 'left'"),
            ({"image": torch.rand(2, 8, 8, 3)}, r"image holds 2 pictures"),
            ({"mask": torch.full((1, 8, 8), torch.nan)}, r"mask holds NaN"),
            ({"strength": -1.0}, r"strength is -1"),
            ({"schedule": "0:1, 1:-.5"}, r"schedule is 0:1, 1:-0.5, and a position cannot"),
            ({"start_percent": 0.8, "end_percent": 0.2}, r"start_percent 0.8 lies after"),
        ],
    )
    def test_says_what_is_wrong(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.node(Regions().with_region(Region("left")), **options)

    def test_a_prompt_needs_a_clip(self, unet):
        regions = listed(unet, prompt="a robot")
        with pytest.raises(RegionsError, match="reference of region 'left' has a prompt, and no clip"):
            put(unet, regions)

    def test_another_models_autoencoder_is_refused(self, unet):
        placed = put(unet, listed(unet, hung(unet, picture=Drawn(16))))
        with pytest.raises(ReferenceError, match=r"latent of \(16, 8, 8\).*one of \(4, 8, 8\).*own VAE"):
            models.sample(placed)
        assert torch.equal(models.sample(unet), models.sample(models.build()))

    def test_an_unsupported_family_is_refused(self):
        model = models.build("sd20")
        with pytest.raises(UnsupportedFamily):
            layers_of(model.model, "all")
