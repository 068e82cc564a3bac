"""Region Filter: what a region reads without the concepts, what the others read, and who may not have one."""

import comfy.sample
import models
import pytest
import text_encoders
import torch

from concept_nodes.host import lab
from concept_nodes.host.dispatcher import attached
from concept_nodes.host.filter import METHODS, OURS, PAPER, Settings, keep_out
from concept_nodes.host.regions import Hung, Regions, RegionsError, TextEffect
from concept_nodes.lab.eye import Eye
from concept_nodes.nodes.regions import RegionFilter, RegionsApply
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region

LEFT, RIGHT = "a large red star on the left on a grey background", "a large red circle on the right on a grey background"
COMMON = "a red star and a red circle on a grey background"
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def loaded():
    return lab.load("unet")


def halves(left=LEFT, right=RIGHT, **others) -> Regions:
    regions = Regions()
    for name, x, prompt in (("left", 0.0, left), ("right", 0.5, right)):
        regions = regions.with_region(Region(name, shapes=(Box(x, 0, 0.5, 1),), prompt=prompt, **others))
    return regions


def kept_out(regions, concepts="red", region="right", preset="none", method=OURS, strength=1.0, **options) -> Regions:
    return RegionFilter.execute(regions, region, concepts, preset, method, strength, **options).result[0]


def applied(loaded, regions, common=COMMON, prompt="", **options):
    positive = text_encoders.encode(loaded.clip, common)
    return RegionsApply.execute(
        loaded.model, positive, text_encoders.encode(loaded.clip, ""), regions, clip=loaded.clip, prompt=prompt, **options
    )


def read(model) -> dict:
    """(region, condition, start, end) -> the context that is read there."""
    effects = [effect for effect in attached(model) if isinstance(effect, TextEffect)]
    return {
        (effect.name.split("'")[1], name, effect.start, effect.end): context
        for effect in effects
        for name, context in effect.place.texts.items()
    }


def context(clip, text) -> torch.Tensor:
    return text_encoders.encode(clip, text)[0][0]


def drawn(loaded, model, common=COMMON, seeds=(3,), size=16, cfg=4.0, steps=4):
    noise = torch.cat([torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    positive, negative = (text_encoders.encode(loaded.clip, text) for text in (common, ""))
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True
        )


class TestWhatIsRead:
    @pytest.mark.parametrize("method", METHODS)
    def test_the_region_reads_what_keep_concept_out_gives_and_the_other_what_it_read(self, loaded, method):
        plain = read(applied(loaded, halves()).result[0])
        filtered = read(applied(loaded, kept_out(halves(), method=method, self_validating="off", alpha=0.0)).result[0])
        expected = keep_out(loaded.clip, RIGHT, ["red"], Settings(method, alpha=0.0, self_validating="off"))
        assert expected.window and filtered.keys() == plain.keys()
        assert torch.equal(filtered["left", "positive", 0.0, 1.0], plain["left", "positive", 0.0, 1.0])
        assert torch.equal(filtered["right", "positive", 0.0, 1.0], expected.conditioning[0][0])
        assert not torch.equal(filtered["right", "positive", 0.0, 1.0], plain["right", "positive", 0.0, 1.0])

    def test_negatives_stay(self, loaded):
        regions = halves(negative="a red square")
        plain, filtered = (read(applied(loaded, one).result[0]) for one in (regions, kept_out(regions)))
        for name in ("left", "right"):
            assert torch.equal(filtered[name, "negative", 0.0, 1.0], plain[name, "negative", 0.0, 1.0])

    def test_in_a_window_the_region_reads_both_in_turn(self, loaded):
        """And its LoRA acts in every step of its own window, once."""
        lora = Hung("lora", models.lora(loaded.model), 0.5, 0.0, 0.1, 0.5)
        model = applied(loaded, kept_out(halves(), start_percent=0.3, end_percent=0.8).with_lora("right", lora)).result[0]
        found = read(model)
        plain, filtered = context(loaded.clip, RIGHT), keep_out(loaded.clip, RIGHT, ["red"], Settings()).conditioning[0][0]
        for window, expected in (((0.0, 0.3), plain), ((0.3, 0.8), filtered), ((0.8, 1.0), plain)):
            assert torch.equal(found.pop(("right", "positive", *window)), expected)
        assert [key[0] for key in found] == ["left"]
        acting = [effect for effect in attached(model) if not isinstance(effect, TextEffect)]
        assert [(effect.start_percent, effect.end_percent) for effect in acting] == [(0.1, 0.3), (0.3, 0.5)]

    def test_a_region_that_takes_turns_is_one_to_isolation(self, loaded):
        model = applied(loaded, kept_out(halves(), start_percent=0.3), isolation=2.0).result[0]
        (apart,) = [effect.apart for effect in attached(model) if effect.apart]
        assert len(apart) == 2 and drawn(loaded, model).isfinite().all()

    def test_the_published_window_is_kept(self, loaded):
        done = keep_out(loaded.clip, RIGHT, ["red"], Settings(PAPER, alpha=0.0))
        found = read(applied(loaded, kept_out(halves(), method=PAPER, alpha=0.0)).result[0])
        assert done.window[1] < 1.0 and ("right", "positive", *done.window) in found and ("right", "positive", done.window[1], 1.0) in found

    def test_a_second_filter_adds_its_concepts(self, loaded):
        twice = kept_out(kept_out(halves()), "circle\nred")
        found = read(applied(loaded, twice).result[0])["right", "positive", 0.0, 1.0]
        assert torch.equal(found, keep_out(loaded.clip, RIGHT, ["red", "circle"], Settings()).conditioning[0][0])
        assert "Kept out of 'right': red, circle." in applied(loaded, twice).result[3]

    def test_the_text_part_of_the_regions_lora_is_in_what_is_filtered(self, loaded):
        key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
        state = {f"{key}.lora_down.weight": models.seeded((2, 128), 1), f"{key}.lora_up.weight": models.seeded((512, 2), 2, 0.05)}
        regions = halves().with_lora("right", Hung("words", state, 0.0, 1.0))
        plain, filtered = (
            read(applied(loaded, one).result[0])["right", "positive", 0.0, 1.0] for one in (regions, kept_out(regions, gate=0.1))
        )
        bare = read(applied(loaded, kept_out(halves(), gate=0.1)).result[0])["right", "positive", 0.0, 1.0]
        assert not torch.allclose(filtered, plain, atol=1e-2) and not torch.allclose(filtered, bare, atol=1e-2)
        assert torch.equal(context(loaded.clip, RIGHT), read(applied(loaded, halves()).result[0])["right", "positive", 0.0, 1.0])


class TestTheCommonPrompt:
    def test_is_filtered_where_its_text_is_known(self, loaded):
        regions = kept_out(halves("", ""))
        model, _, _, report = applied(loaded, regions, prompt=COMMON).result
        found = read(model)
        assert list(found) == [("right", "positive", 0.0, 1.0)]
        assert torch.equal(found["right", "positive", 0.0, 1.0], keep_out(loaded.clip, COMMON, ["red"], Settings()).conditioning[0][0])
        assert "'right': 50% of the picture; reads the common prompt" in report and "'red' (" in report

    def test_without_the_text_part_of_the_regions_lora_which_reads_it_as_it_is(self, loaded):
        key = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
        state = {f"{key}.lora_down.weight": models.seeded((2, 128), 1), f"{key}.lora_up.weight": models.seeded((512, 2), 2)}
        regions = kept_out(halves("", "")).with_lora("right", Hung("words", state, 0.0, 1.0))
        found = read(applied(loaded, regions, prompt=COMMON).result[0])["right", "positive", 0.0, 1.0]
        assert torch.equal(found, keep_out(loaded.clip, COMMON, ["red"], Settings()).conditioning[0][0])

    def test_a_region_of_everything_is_the_prompt_filtered(self, loaded):
        regions = kept_out(Regions().with_region(Region("right", shapes=(Box(0, 0, 1, 1),))))
        model = applied(loaded, regions, prompt=COMMON).result[0]
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        filtered = keep_out(loaded.clip, COMMON, ["red"], Settings()).conditioning
        with torch.inference_mode():
            expected = comfy.sample.sample(
                loaded.model,
                noise,
                4,
                4.0,
                "euler",
                "normal",
                filtered,
                text_encoders.encode(loaded.clip, ""),
                torch.zeros_like(noise),
                disable_pbar=True,
            )
        torch.testing.assert_close(drawn(loaded, model), expected, **CLOSE)

    @pytest.mark.parametrize(
        "options, told",
        [
            ({"prompt": ""}, "'right' has a filter and reads the common prompt, and its text is not known: prompt is empty"),
            ({"prompt": "a green hill"}, "positive was not made of the text in prompt by this CLIP.*Give Apply Regions the text"),
            ({"prompt": COMMON, "text": "span"}, "text is 'span', by which region 'right'"),
        ],
    )
    def test_is_refused_where_it_is_not(self, loaded, options, told):
        regions = kept_out(halves("", "")).with_lora("right", Hung("lora", models.lora(loaded.model), 1.0, 0.0))
        named = Regions(
            regions.document.__class__((regions.document.regions[0], Region("right", shapes=(Box(0.5, 0, 0.5, 1),), prompt="red circle"))),
            regions.hung,
            filters=regions.filters,
        )
        with pytest.raises(RegionsError, match=told):
            applied(loaded, named if "text" in options else regions, **options)

    def test_and_without_a_clip(self, loaded):
        with pytest.raises(RegionsError, match="no clip is connected.*a prompt of its own"):
            RegionsApply.execute(loaded.model, [], [], kept_out(halves("", "")), prompt=COMMON)


class TestNothing:
    @pytest.mark.parametrize(
        "settings, reason",
        [
            ({"strength": 0.0}, "strength is 0"),
            ({"concepts": " "}, "no concept to keep out"),
            ({"start_percent": 0.4, "end_percent": 0.4}, "both 0.4"),
            ({"concepts": "green"}, "bit for bit"),
        ],
    )
    @pytest.mark.parametrize("text", ["own", "common"])
    def test_is_the_regions_without_it(self, loaded, settings, reason, text):
        regions = halves() if text == "own" else halves("", "").with_lora("left", Hung("lora", models.lora(loaded.model), 0.5))
        model, _, _, report = applied(loaded, kept_out(regions, **settings), prompt=COMMON).result
        assert reason in report and "'right'" in report
        assert torch.equal(drawn(loaded, model), drawn(loaded, applied(loaded, regions).result[0]))

    def test_asks_for_no_clip(self, loaded):
        model = RegionsApply.execute(loaded.model, [], [], kept_out(halves("", ""), strength=0.0)).result[0]
        assert model is loaded.model

    def test_gives_way_to_another_filter(self):
        """In either order."""
        one = kept_out(halves())
        for both in (kept_out(one, strength=0.0), kept_out(kept_out(halves(), strength=0.0))):
            assert both.filters == one.filters

    def test_is_done_to_the_list_that_came(self):
        regions = halves()
        kept_out(regions)
        assert regions.filters == {}


class TestRefusals:
    def test_a_region_that_is_not_there(self):
        with pytest.raises(RegionsError, match="no region named 'middle'. Regions: 'left', 'right'"):
            kept_out(halves(), region="middle")

    def test_a_second_filter_of_another_kind(self):
        with pytest.raises(RegionsError, match="'right' has a filter with other settings already"):
            kept_out(kept_out(halves()), strength=0.5)

    def test_numbers_that_are_none(self):
        with pytest.raises(ValueError, match="push is nan"):
            kept_out(halves(), push=float("nan"))

    def test_what_the_filter_refuses_is_told_with_the_region(self, loaded):
        with pytest.raises(RegionsError, match="The filter of region 'right': The concept .* takes 2 windows"):
            applied(loaded, kept_out(halves(), "red " * 90))


def test_it_runs_on_flux_in_a_window():
    """Texts that change in mid-run, in one sequence with the picture; what is read is the filtered text in its window alone."""
    loaded = lab.load("dit")
    pictures = []
    for regions in (halves(), kept_out(halves(), start_percent=0.0, end_percent=0.5), kept_out(halves())):
        model = RegionsApply.execute(loaded.model, *([text_encoders.encode(loaded.clip, COMMON)] * 2), regions, clip=loaded.clip).result[0]
        pictures.append(drawn(loaded, model, size=8, cfg=1.0))
    assert all(picture.isfinite().all() for picture in pictures)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(pictures, pictures[1:] + pictures[:1], strict=True))


def test_red_goes_from_its_region_alone(loaded):
    """On the lab's UNet, 16 pictures: the right figure is not red, the left one stays."""
    eye, red = Eye.load(), {}
    for name, regions in (("plain", halves()), ("filtered", kept_out(halves()))):
        latent = drawn(loaded, applied(loaded, regions, "a grey background").result[0], "a grey background", range(16), steps=20)
        with torch.inference_mode():
            readings = eye.read(loaded.vae.decode(latent).cpu())
        found = [(seen.x > 32, seen.colour) for reading in readings for seen in reading.objects]
        red[name] = [sum(side == right and colour == "red" for right, colour in found) for side in (False, True)]
    assert red["plain"][0] >= 12 and red["plain"][1] >= 12
    assert red["filtered"][0] >= 12 and red["filtered"][1] <= 1
