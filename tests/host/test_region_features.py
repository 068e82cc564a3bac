"""Region Features: where features act that hang on a region, what it reads, and who may not have them."""

import models
import pytest
import sampling
import text_encoders
import torch
from comfy.patcher_extension import WrappersMP
from test_region_filter import COMMON, RIGHT, applied, context, drawn, halves, kept_out, read

import nodes
from concept_nodes.host import lab
from concept_nodes.host.directions import AUTO, WORDS, Runs, in_model, in_text
from concept_nodes.host.dispatcher import attached
from concept_nodes.host.features import FeaturesError
from concept_nodes.host.filter import Settings, keep_out
from concept_nodes.host.regions import Hung, Regions, RegionsError, TextEffect
from concept_nodes.host.text_steering import BUT_FIRST, TextSteer, steered
from concept_nodes.lab.eye import Eye
from concept_nodes.nodes.regions import RegionsApply
from concept_nodes.nodes.steering import RegionFeatures, SteerModel
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region
from concept_nodes.ops.steering import ADD, Steer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SHAPES = ("circle", "square", "triangle", "star")
PLAIN = [f"a {colour} {shape} on a grey background" for colour, shape in zip(("blue", "green", "yellow", "purple"), SHAPES, strict=True)]
RED = [f"a red {shape} on a grey background" for shape in SHAPES], PLAIN


@pytest.fixture(scope="module")
def loaded():
    return lab.load("unet")


@pytest.fixture(scope="module")
def red(loaded):
    """Of the text encoder."""
    return in_text(loaded.clip, "clip_l.2", *RED, WORDS, "red").features


def leaning(regions, features, region="right", strength=1.0, mode=ADD, start=0.0, end=1.0, side="cond", schedule="", **options):
    return RegionFeatures.execute(regions, region, "none", strength, mode, start, end, side, schedule, features, **options).result[0]


def top_half() -> Regions:
    return Regions().with_region(Region("right", shapes=(Box(0, 0, 1, 0.5),)))


def first(model, site, **options):
    """What a site gives in the first call of a sampling of pictures that are not square: (rows, d, height, width)."""
    seen, module = [], model.model.diffusion_model.get_submodule(site)

    def watch(executor, *args, **kwargs):
        handle = module.register_forward_hook(lambda _, given, output: seen.append(output))
        try:
            return executor(*args, **kwargs)
        finally:
            handle.remove()

    with torch.inference_mode():
        start = {"samples": torch.zeros(3, models.channels(model), 12, 6)}
        watched = sampling.wrapped(model, WrappersMP.APPLY_MODEL, watch)
        nodes.common_ksampler(watched, 3, 1, 3.0, "euler", "normal", *sampling.prompts(model, 2), start, **options)
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output if output.ndim == 4 else output.mT.unflatten(-1, (6, 3))


class TestOnTheModel:
    @pytest.mark.parametrize("mode", ["add", "scale", "clamp", "ablate"])
    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_positions_outside_are_bit_for_bit_what_they_were(self, kind, mode):
        model = models.build(kind)
        found = models.features(model, latents=True)
        acting = RegionsApply.execute(model, [], [], leaning(top_half(), found, mode=mode, side="both", level=1.0)).result[0]
        moved = (first(acting, found.site) - first(model, found.site)).abs().amax(1)
        half = moved.shape[1] // 2
        assert moved[:, :half].any() and not moved[:, half:].any()

    @pytest.mark.parametrize("side", ["cond", "cond + uncond -"])
    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_is_steer_model_with_the_regions_mask(self, kind, side):
        model = models.build(kind)
        found = models.features(model)
        regions = leaning(top_half(), found, strength=0.7, start=0.2, end=0.9, side=side, schedule="0:1,1:.5")
        mask = torch.zeros(1, 64, 64)
        mask[:, :32] = 1
        by_mask = SteerModel.execute(model, "none", 0.7, "add", 0.2, 0.9, side, "0:1,1:.5", mask, found).result[0]
        by_region = RegionsApply.execute(model, [], [], regions).result[0]
        assert torch.equal(models.sample(by_region), models.sample(by_mask))

    def test_divides_no_text(self):
        """Beside a LoRA on another region, the sequence that Flux reads is as long as without."""
        model = models.build("flux")
        regions = top_half().with_region(Region("others", rest=True))
        regions = regions.with_lora("others", Hung("random", models.lora(model), 0.8))
        lengths = []
        for one in (regions, leaning(regions, models.features(model))):
            shapes = []

            def watch(executor, *args, shapes=shapes, **kwargs):
                shapes += [arg.shape for arg in args if isinstance(arg, torch.Tensor)]
                return executor(*args, **kwargs)

            models.sample(sampling.wrapped(RegionsApply.execute(model, [], [], one).result[0], WrappersMP.DIFFUSION_MODEL, watch))
            lengths.append(shapes)
        assert lengths[0] == lengths[1]

    def test_several_add_up_and_each_has_its_place(self):
        model = models.build()
        found = models.features(model)
        regions = top_half().with_region(Region("others", rest=True))
        twice = leaning(leaning(regions, found, strength=0.5, keep_norm="off"), found, strength=0.3, keep_norm="off")
        once = leaning(regions, found, strength=0.8, keep_norm="off")
        one, other = (models.sample(RegionsApply.execute(model, [], [], two).result[0]) for two in (twice, once))
        torch.testing.assert_close(one, other, **CLOSE)
        everywhere = leaning(once, found, region="others", strength=0.8, keep_norm="off")
        whole = SteerModel.execute(model, "none", 0.8, "add", 0.0, 1.0, "cond", features=found, keep_norm="off").result[0]
        torch.testing.assert_close(models.sample(RegionsApply.execute(model, [], [], everywhere).result[0]), models.sample(whole), **CLOSE)

    def test_the_report_says_what_acts_where(self):
        model = models.build()
        found = models.features(model)._replace(fingerprint="other")
        report = RegionsApply.execute(model, [], [], leaning(top_half(), found, start=0.5, schedule="0:1")).result[3]
        for part in (
            "'right': 50% of the picture",
            "'random': 2 directions",
            "add at strength 1 (cond), from 0.5 to 1 of sampling, times",
            "Note: the weights at output_blocks.1.1 are not those",
        ):
            assert part in report, report


class TestOnWhatIsRead:
    def test_the_region_reads_what_steer_text_gives_and_the_other_what_it_read(self, loaded, red):
        plain = read(applied(loaded, halves(negative="a red square")).result[0])
        regions = leaning(halves(negative="a red square"), red, strength=-0.8)
        model, _, _, report = applied(loaded, regions).result
        found = read(model)
        expected = context(steered(loaded.clip, TextSteer(red, Steer(red.operand(), ADD, keep=True), -0.8, BUT_FIRST)), RIGHT)
        assert torch.equal(found.pop(("right", "positive", 0.0, 1.0)), expected)
        assert not torch.equal(expected, plain.pop(("right", "positive", 0.0, 1.0)))
        assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)
        assert "what it reads (skip first): add at strength -0.8 (cond), in all steps" in report

    @pytest.mark.parametrize(("side", "strength"), [("both", 0.8), ("cond + uncond -", -0.8)])
    def test_sides_are_the_texts_of_the_two_conditions(self, loaded, red, side, strength):
        regions = leaning(halves(negative="a red square"), red, strength=0.8, side=side)
        expected = context(steered(loaded.clip, TextSteer(red, Steer(red.operand(), ADD, keep=True), strength)), "a red square")
        assert torch.equal(read(applied(loaded, regions).result[0])["right", "negative", 0.0, 1.0], expected)
        with pytest.raises(RegionsError, match="its negative prompt, and it has none of its own"):
            applied(loaded, leaning(halves(), red, side=side))

    def test_in_a_window_the_region_reads_both_in_turn(self, loaded, red):
        """And its LoRA acts in every step of its own window, once."""
        regions = leaning(halves(), red, start=0.3, end=0.8).with_lora("right", Hung("lora", models.lora(loaded.model), 0.5, 0.0, 0.1, 0.5))
        model = applied(loaded, regions).result[0]
        found, plain = read(model), context(loaded.clip, RIGHT)
        leant = context(steered(loaded.clip, TextSteer(red, Steer(red.operand(), ADD, keep=True), 1.0)), RIGHT)
        for window, expected in (((0.0, 0.3), plain), ((0.3, 0.8), leant), ((0.8, 1.0), plain)):
            assert torch.equal(found.pop(("right", "positive", *window)), expected)
        assert [key[0] for key in found] == ["left"]
        acting = [effect for effect in attached(model) if not isinstance(effect, TextEffect)]
        assert [(effect.start_percent, effect.end_percent) for effect in acting] == [(0.1, 0.3), (0.3, 0.5)]

    def test_windows_that_meet_share_the_run_out(self, loaded, red):
        regions = leaning(leaning(halves(), red, end=0.6), red, strength=-0.5, start=0.4)
        windows = sorted(key[2:] for key in read(applied(loaded, regions).result[0]) if key[0] == "right")
        assert windows == [(0.0, 0.4), (0.4, 0.6), (0.6, 1.0)]

    def test_a_filter_reads_the_steered_text(self, loaded, red):
        both = kept_out(leaning(halves(), red, strength=0.3), "circle")
        found = read(applied(loaded, both).result[0])["right", "positive", 0.0, 1.0]
        clip = steered(loaded.clip, TextSteer(red, Steer(red.operand(), ADD, keep=True), 0.3))
        assert torch.equal(found, keep_out(clip, RIGHT, ["circle"], Settings()).conditioning[0][0])

    def test_the_common_prompt_is_read_where_its_text_is_known(self, loaded, red):
        regions = leaning(halves("", ""), red)
        found = read(applied(loaded, regions, prompt=COMMON).result[0])
        expected = context(steered(loaded.clip, TextSteer(red, Steer(red.operand(), ADD, keep=True), 1.0)), COMMON)
        assert list(found) == [("right", "positive", 0.0, 1.0)] and torch.equal(found["right", "positive", 0.0, 1.0], expected)
        with pytest.raises(RegionsError, match="'right' has features of a text encoder and reads the common prompt, and its text"):
            applied(loaded, regions)

    @pytest.mark.parametrize("kind", ["sdxl", "flux"])
    def test_on_other_encoders(self, kind):
        """Their contexts are those of a steered CLIP, whatever the model is."""
        clip, model = text_encoders.build(kind), models.build(kind)
        found = in_text(clip, "auto", *RED, WORDS, "red").features
        regions = leaning(halves(), found)
        model = RegionsApply.execute(model, [], [], regions, clip=clip).result[0]
        expected = context(steered(clip, TextSteer(found, Steer(found.operand(), ADD, keep=True), 1.0)), RIGHT)
        assert torch.equal(read(model)["right", "positive", 0.0, 1.0], expected)


class TestNothing:
    @pytest.mark.parametrize("options", [{"strength": 0.0}, {"start": 0.4, "end": 0.4}])
    @pytest.mark.parametrize("where", ["text", "model"])
    def test_is_the_regions_without_it(self, loaded, red, where, options):
        features = red if where == "text" else in_model_of(loaded)
        model, _, _, report = applied(loaded, leaning(halves(), features, **options)).result
        assert "nothing done, their strength" in report
        assert torch.equal(drawn(loaded, model), drawn(loaded, applied(loaded, halves()).result[0]))

    def test_alone_on_a_region_is_the_model_itself(self):
        model = models.build()
        one = leaning(top_half(), models.features(model), schedule="0:0")
        assert RegionsApply.execute(model, [], [], one).result[0] is model
        assert RegionFeatures.execute(top_half(), "right", "none", 1.0, "add", 0.0, 1.0, "cond").result[0].features == {}

    def test_is_done_to_the_list_that_came(self):
        regions = top_half()
        leaning(regions, models.features(models.build()))
        assert regions.features == {}


def in_model_of(loaded):
    """Any features of the lab's UNet."""
    width = loaded.model.model.diffusion_model.middle_block[1].in_channels
    found = models.features(models.build())
    directions = models.seeded((2, width), 4)
    return found._replace(site="middle_block.1", directions=directions, mean=torch.zeros(width))


class TestRefusals:
    def test_a_region_that_is_not_there(self):
        with pytest.raises(RegionsError, match="no region named 'middle'. Regions: 'left', 'right'"):
            leaning(halves(), models.features(models.build()), region="middle")

    @pytest.mark.parametrize("number", ["strength", "gate", "most"])
    def test_numbers_that_are_none(self, number):
        with pytest.raises(ValueError, match=f"{number} is nan"):
            leaning(halves(), models.features(models.build()), **{number: float("nan")})

    def test_a_schedule_for_a_text(self, red):
        with pytest.raises(FeaturesError, match="once and not step by step"):
            leaning(halves(), red, schedule="0:1")

    def test_features_of_another_model_are_told_with_the_region(self):
        with pytest.raises(RegionsError, match="The features of region 'right': 'random' was found on Flux.1, and this model is of"):
            RegionsApply.execute(models.build(), [], [], leaning(top_half(), models.features(models.build("flux"))))

    def test_features_of_another_encoder_are_told_with_the_region(self, loaded, red):
        with pytest.raises(RegionsError, match="The features of region 'right': This CLIP has no site 'clip_g.0'"):
            applied(loaded, leaning(halves(), red._replace(site="clip_g.0")))

    def test_no_clip(self, loaded, red):
        with pytest.raises(RegionsError, match="'right' has features of a text encoder, and no clip is connected"):
            RegionsApply.execute(loaded.model, [], [], leaning(halves("", ""), red))

    def test_words_of_the_common_prompt(self, loaded, red):
        regions = leaning(halves("", "red circle"), red).with_lora("right", Hung("lora", models.lora(loaded.model), 1.0, 0.0))
        with pytest.raises(RegionsError, match="text is 'span', by which region 'right' .* features of a text encoder hang"):
            applied(loaded, regions, prompt=COMMON, text="span")


def test_red_comes_in_its_region_alone(loaded):
    """On the lab's UNet, 12 pictures of two blue figures: a direction of the model on the right half."""
    eye = Eye.load()
    found = in_model(loaded.model, loaded.clip, AUTO, "out", *RED, Runs(64, 64, 10, 4.0, 3, 1, 0), "red").features
    # No texts of their own: both halves read the common prompt.
    common = "a large blue heart on the left and a large blue cross on the right on a grey background"
    red = {}
    for name, regions in (("plain", halves("", "")), ("steered", leaning(halves("", ""), found, strength=1.5))):
        latent = drawn(loaded, applied(loaded, regions, common).result[0], common, range(12), steps=12)
        with torch.inference_mode():
            readings = eye.read(loaded.vae.decode(latent).cpu())
        seen = [(one.x > 32, one.colour) for reading in readings for one in reading.objects]
        red[name] = [sum(side == right and colour == "red" for right, colour in seen) for side in (False, True)]
    assert red["plain"] == [0, 0]
    assert red["steered"][0] <= 2 and red["steered"][1] >= 8, red
