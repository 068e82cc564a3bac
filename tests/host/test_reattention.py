"""Latent re-attention in the host's UNets: whose features are compared with whose, in which calls, and where nothing may change."""

import cases
import comfy.sample
import models
import pytest
import sampling
import torch

import nodes
from concept_nodes.host import run_record
from concept_nodes.host.reattention import ReattentionError, skips
from concept_nodes.nodes.filter import FilterReattention
from concept_nodes.ops.reattention import Waves, low, reattended

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def plain():
    return models.build()


def put(model, original=30, strength=1.0, start=0.0, end=1.0, **options):
    return FilterReattention.execute(model, models.conditioning(model, original), strength, start, end, **options).result[0]


def drawn(model, positive, *, cfg=1.0, steps=1, batch=1, size=8, negative=None):
    with torch.inference_mode():
        negative = models.conditioning(model, 20) if negative is None else negative
        return nodes.common_ksampler(model, 3, steps, cfg, "euler", "normal", positive, negative, models.latent(model, batch, size))[0][
            "samples"
        ]


class Skips:
    """Skip connections as another pack's patch sees them, or as it would have them: {(call, row, block): (channels, height, width)}."""

    def __init__(self):
        self.seen, self.calls = {}, 0

    def watched(self, model):
        def watch(h, skip, options):
            self.calls += options["block"] == ("output", 0)
            self.seen |= {(self.calls - 1, row, options["block"][1]): skip[row].clone() for row in range(len(skip))}
            return h, skip

        model = model.clone()
        model.set_model_output_block_patch(watch)
        return model

    def held_down(self, model, originals, scales, radius=1):
        """A clone whose skips in row 0 are the equation's, by those of another run's call and row 0."""

        def replace(h, skip, options):
            scale, key = scales.get(h.shape[1], 1.0), (0, 0, options["block"][1])
            waves = Waves.of(*skip.shape[-2:], radius)
            first = reattended(skip[:1], low(originals.seen[key][None], waves), scale, waves, 1e-5)
            return h, torch.cat([first, skip[1:]])

        model = model.clone()
        model.set_model_output_block_patch(replace)
        return model


@pytest.mark.parametrize("cfg, size, kind", [(1.0, 8, "sd15"), (3.0, 8, "sd15"), (3.0, 9, "sd15"), (1.0, 8, "sdxl")])
def test_one_step_is_the_equation(cfg, size, kind):
    """The host's own model with the equation written by hand into its skip connections."""
    model, skipped = models.build(kind), Skips()
    positive, original = models.conditioning(model, 10), models.conditioning(model, 30)
    drawn(skipped.watched(model), original, size=size)
    by_hand = drawn(Skips().held_down(model, skipped, {128: 0.9, 64: 0.2}), positive, size=size)
    if cfg != 1.0:
        by_hand = drawn(model, models.conditioning(model, 20), size=size) * (1 - cfg) + by_hand * cfg
    found = drawn(put(model), positive, cfg=cfg, size=size)
    torch.testing.assert_close(found, by_hand, **CLOSE)
    assert not torch.allclose(found, drawn(model, positive, cfg=cfg, size=size), atol=1e-2)


def test_each_picture_of_a_batch_is_its_own(plain):
    positive = models.conditioning(plain, 10)
    batch = drawn(put(plain), positive, cfg=3.0, steps=2, batch=3)
    noise = torch.randn(batch.shape, generator=torch.manual_seed(3))
    for number in range(3):
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        with torch.inference_mode():
            one = comfy.sample.sample(
                put(plain),
                noise[number : number + 1],
                2,
                3.0,
                "euler",
                "normal",
                positive,
                models.conditioning(plain, 20),
                latent["samples"],
                disable_pbar=True,
            )
        torch.testing.assert_close(one, batch[number : number + 1], **CLOSE)


def test_conditions_one_by_one_and_in_any_order_are_the_same(plain):
    expected = models.sample(put(plain))
    for model in (sampling.one_by_one(put(plain)), sampling.one_by_one(put(plain), -1), sampling.turned_around(put(plain))):
        torch.testing.assert_close(models.sample(model), expected, **CLOSE)


def test_prompts_of_other_lengths_can_be_compared(plain):
    longer = models.conditioning(plain, 30, tokens=12)
    model = FilterReattention.execute(plain, longer, 1.0, 0.0, 1.0).result[0]
    assert not torch.equal(models.sample(model), models.sample(plain))


class TestCalls:
    def test_one_is_added_in_the_window_and_said_so(self, plain):
        model = put(plain, start=0.5)
        assert [sampling.count_calls(one) for one in (plain, model)] == [4, 6]
        told = run_record.find(models.sample(model)).describe()
        assert "6 model calls, 2 of them added" in told and "acted in 2 of 4 steps" in told

    def test_none_where_the_prompt_is_the_original(self, plain):
        model = put(plain, original=10)
        assert torch.equal(models.sample(model), models.sample(plain)) and sampling.count_calls(model) == 4

    def test_only_for_the_entries_that_differ(self, plain):
        """A filter's window: the prompt is filtered in the first half of the steps only."""
        filtered, original = models.conditioning(plain, 10), models.conditioning(plain, 30)
        entries = [
            [filtered[0][0], {"start_percent": 0.0, "end_percent": 0.5}],
            [original[0][0], {"start_percent": 0.5, "end_percent": 1.0}],
        ]
        counted = Skips()
        drawn(counted.watched(put(plain)), entries, steps=4)
        plainly = Skips()
        drawn(plainly.watched(plain), entries, steps=4)
        assert 0 < counted.calls - plainly.calls < 4

    def test_areas_are_compared_each_with_its_own(self, plain):
        """The counterpart that the host gives the negative bears the positive entry's uuid, and keeps its features."""
        part = [[models.conditioning(plain, 11)[0][0], {"area": (8, 4, 0, 0), "strength": 1.0, "set_area_to_bounds": False}]]
        entries = models.conditioning(plain, 10) + part
        expected = drawn(plain, entries, cfg=0.0, steps=2)
        torch.testing.assert_close(drawn(put(plain), entries, cfg=0.0, steps=2), expected, **CLOSE)
        assert not torch.allclose(drawn(put(plain), entries, cfg=3.0, steps=2), drawn(plain, entries, cfg=3.0, steps=2), atol=1e-2)


class TestNothing:
    @pytest.mark.parametrize(
        "settings, reason",
        [
            ({"strength": 0.0}, "strength is 0"),
            ({"start": 0.4, "end": 0.4}, "both 0.4"),
            ({"deep": 0.0, "middle": 0.0}, "deep and middle are 0"),
            ({"middle": 0.0}, "no features of this model have the widths"),
        ],
    )
    def test_is_the_model_itself(self, plain, settings, reason):
        original = models.conditioning(plain, 30)
        strength, start, end = settings.pop("strength", 1.0), settings.pop("start", 0.0), settings.pop("end", 1.0)
        model, report = FilterReattention.execute(plain, original, strength, start, end, **settings).result
        assert model is plain and reason in report

    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_asks_for_no_skip_connections(self, kind):
        model = models.build(kind)
        assert put(model, strength=0.0) is model


class TestModels:
    def test_flux_is_refused_with_the_reason(self):
        with pytest.raises(ReattentionError, match=r"Flux\.1\) has no skip connections.*Stable Diffusion 1\.5, SDXL"):
            put(models.build("flux"))

    def test_widths_are_those_that_the_host_shows(self, plain):
        for kind in ("sd15", "sdxl"):
            model, seen = models.build(kind), []
            watched = model.clone()
            watched.set_model_output_block_patch(lambda h, skip, options, seen=seen: (seen.append(h.shape[1]), (h, skip))[1])
            models.sample(watched, steps=1)
            assert skips(model.model) == seen

    @pytest.mark.parametrize("kind, acted", [("sd15", {1280: 7, 640: 3}), ("sdxl", {1280: 4, 640: 3})])
    def test_published_sizes_have_the_published_widths(self, kind, acted):
        found = skips(models.full_size(kind).model)
        assert {width: found.count(width) for width in (1280, 640)} == acted

    def test_several_prompts_are_refused(self, plain):
        with pytest.raises(ReattentionError, match="original holds 2 prompts"):
            FilterReattention.execute(plain, models.conditioning(plain, 1) + models.conditioning(plain, 2), 1.0, 0.0, 1.0)


def test_the_stronger_the_further(plain):
    before = drawn(plain, models.conditioning(plain, 10))
    moved = [float((drawn(put(plain, strength=strength), models.conditioning(plain, 10)) - before).norm()) for strength in (0.25, 0.5, 1.0)]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_two_with_originals_of_their_own_both_act(plain):
    once, other, both = (models.sample(model) for model in (put(plain), put(plain, original=50), put(put(plain), original=50)))
    assert not torch.equal(both, once) and not torch.equal(both, other)
    assert sampling.count_calls(put(put(plain), original=50)) == 12


def test_another_packs_skip_patch_is_seen_before_ours_in_either_order(plain):
    def double(h, skip, options):
        return h, 1.5 * skip

    pictures = []
    for first in (True, False):
        model = plain.clone() if first else put(plain).clone()
        model.set_model_output_block_patch(double)
        pictures.append(models.sample(put(model) if first else model))
    assert torch.equal(*pictures)


def test_beside_a_slider_from_prompts(plain):
    """Whose added calls are no evaluation of the positive prompt."""
    model = cases.put_prompts(put(plain))
    assert sampling.count_calls(model) == sampling.count_calls(cases.put_prompts(plain)) + 4
