"""Slider from Prompts: both forms against what the host itself makes of the prompts."""

import cases
import models
import pytest
import sampling
import torch

import nodes
from concept_nodes.host import run_record
from concept_nodes.host.poles import Pole, Poles, PolesError, windowed
from concept_nodes.nodes.sliders import SliderPrompts

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def plain():
    return models.build()


def drawn(model, positive, *, cfg=1.0, steps=1, negative=None):
    """KSampler with conditions of the test's own. One Euler step to the end gives the denoised picture itself."""
    with torch.inference_mode():
        negative = models.conditioning(model, 20) if negative is None else negative
        out = nodes.common_ksampler(model, 3, steps, cfg, "euler", "normal", positive, negative, models.latent(model))
    return out[0]["samples"]


def poles_of(model):
    return [models.conditioning(model, seed) for seed in (10, 30, 40)]


def run(model, positive, more, less, form="guidance", strength=1.0, start=0.0, end=1.0, schedule=""):
    return SliderPrompts.execute(model, positive, more, less, form, strength, start, end, schedule).result


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("kind", list(models.KINDS))
class TestGuidance:
    def test_adds_the_difference_of_the_two_pictures(self, kind, cfg):
        model = models.build(kind)
        positive, more, less = poles_of(model)
        expected = drawn(model, positive, cfg=cfg) + 1.7 * (drawn(model, more) - drawn(model, less))
        torch.testing.assert_close(drawn(run(model, positive, more, less, strength=1.7)[0], positive, cfg=cfg), expected, **CLOSE)

    def test_swapped_poles_are_the_other_way(self, kind, cfg):
        model = models.build(kind)
        positive, more, less = poles_of(model)
        there = drawn(run(model, positive, more, less, strength=0.5)[0], positive, cfg=cfg, steps=3)
        back = drawn(run(model, positive, less, more, strength=-0.5)[0], positive, cfg=cfg, steps=3)
        torch.testing.assert_close(there, back, **CLOSE)


class TestGuidanceInARun:
    def test_adds_calls_in_its_window_only_and_says_so(self, plain):
        model = cases.put_prompts(plain, start=0.5)
        counted = [sampling.count_calls(patcher) for patcher in (plain, model)]
        assert counted == [4, 6]
        samples = models.sample(model)
        told = run_record.find(samples).describe()
        assert "6 model calls, 2 of them added" in told
        assert "acted in 2 of 4 steps" in told

    def test_two_in_a_row_add_up(self, plain):
        positive, more, less = poles_of(plain)
        twice = run(run(plain, positive, more, less, strength=0.6)[0], positive, more, less, strength=0.4)[0]
        torch.testing.assert_close(drawn(twice, positive), drawn(run(plain, positive, more, less)[0], positive), **CLOSE)

    def test_schedule_is_a_strength_step_by_step(self, plain):
        whole = models.sample(cases.put_prompts(plain, 0.8))
        assert torch.equal(models.sample(cases.put_prompts(plain, 1.6, schedule="0:.5")), whole)
        windows = models.sample(cases.put_prompts(plain, 0.8, end=0.35))
        assert torch.equal(models.sample(cases.put_prompts(plain, 0.8, schedule="0:1, .35:1, .35:0")), windows)

    def test_keeps_to_the_area_of_the_prompt(self, plain):
        """An entry with an area gives its area to the prompts, too: beyond it nothing changes."""
        positive, more, less = poles_of(plain)
        whole = models.conditioning(plain, 11)
        half = [[positive[0][0], {**positive[0][1], "area": (8, 4, 0, 0), "strength": 1.0}]]
        entries = [*half, *whole]
        slid = drawn(run(plain, half, more, less, strength=2.0)[0], entries)
        assert not torch.equal(slid, drawn(plain, entries))
        only = drawn(run(plain, half, more, less, strength=2.0)[0], half)
        before = drawn(plain, half)
        assert not torch.allclose(only[..., :4], before[..., :4])
        torch.testing.assert_close(only[..., 5:], before[..., 5:], **CLOSE)


class TestEmbedding:
    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_half_way_between_one_is_the_pole(self, kind):
        model = models.build(kind)
        _, more, less = poles_of(model)
        middle = [[(more[0][0] + less[0][0]) / 2, {key: (value + less[0][1][key]) / 2 for key, value in more[0][1].items()}]]
        for strength, pole in ((1.0, more), (-1.0, less)):
            slid = run(model, middle, more, less, "embedding", strength)[1]
            torch.testing.assert_close(slid[0][0], pole[0][0])
            torch.testing.assert_close(drawn(model, slid, steps=2), drawn(model, pole, steps=2), **CLOSE)

    def test_model_and_prompt_are_not_touched(self, plain):
        positive, more, less = poles_of(plain)
        before = positive[0][0].clone()
        model, slid, report = run(plain, positive, more, less, "embedding", 0.5)
        assert model is plain
        assert torch.equal(positive[0][0], before)
        assert not torch.equal(slid[0][0], before)
        assert "No model call is added" in report

    def test_window_by_the_hosts_own_ranges(self, plain):
        positive, more, less = poles_of(plain)
        slid = run(plain, positive, more, less, "embedding", 1.0, 0.4, 1.0)[1]
        assert [(entry[1]["start_percent"], entry[1]["end_percent"]) for entry in slid] == [(0.0, 0.4), (0.4, 1.0)]
        assert torch.equal(slid[0][0], positive[0][0])
        assert sampling.count_calls(plain) == 4

    def test_window_within_an_entrys_own(self):
        entry = [[torch.zeros(1, 2, 3), {"start_percent": 0.2, "end_percent": 0.6}]]
        spans = [(made[1]["start_percent"], made[1]["end_percent"]) for made in windowed(entry, entry, 0.5, 0.9)]
        assert spans == [(0.2, 0.5), (0.5, 0.6)]

    def test_lengths_that_differ_are_refused(self, plain):
        positive, more, _ = poles_of(plain)
        longer = models.conditioning(plain, 40, tokens=9)
        with pytest.raises(PolesError, match="more has 7 x .* numbers, less 9 x .* and positive 7 x"):
            run(plain, positive, more, longer, "embedding")
        run(plain, positive, more, longer, "guidance")

    def test_schedule_needs_guidance(self, plain):
        with pytest.raises(ValueError, match="needs the form 'guidance'"):
            run(plain, *poles_of(plain), "embedding", schedule="0:0, 1:1")


class TestPoles:
    def test_a_schedule_of_noughts_does_nothing(self, plain):
        model, _, report = run(plain, *poles_of(plain), schedule="0:0, 1:0")
        assert model is plain
        assert "the schedule 0:0, 1:0 is 0 throughout" in report

    def test_a_batch_is_refused(self, plain):
        positive, more, less = poles_of(plain)
        with pytest.raises(PolesError, match="more holds a batch of 2"):
            run(plain, positive, [[more[0][0].expand(2, -1, -1), {}]], less)

    def test_several_prompts_are_refused(self, plain):
        positive, more, less = poles_of(plain)
        with pytest.raises(PolesError, match="more holds 2 prompts"):
            run(plain, positive, more + less, less)

    def test_equal_poles_do_nothing_at_any_strength(self, plain):
        positive, more, _ = poles_of(plain)
        model, same, report = run(plain, positive, more, more, strength=9.0)
        assert model is plain
        assert same is positive
        assert "more and less are the same" in report

    def test_sameness_minds_the_pooled_vector(self):
        pole = Pole(torch.ones(1, 2, 3), torch.ones(1, 4))
        assert Poles(pole, Pole(torch.ones(1, 2, 3), torch.ones(1, 4))).same()
        assert not Poles(pole, Pole(torch.ones(1, 2, 3), torch.zeros(1, 4))).same()
        assert not Poles(pole, Pole(torch.ones(1, 2, 3), None)).same()
