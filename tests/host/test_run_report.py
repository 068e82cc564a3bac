"""A run's record is found again from the latent that came out of it, however the host hands that latent on."""

from collections import OrderedDict

import cases
import comfy.nested_tensor
import comfy.samplers
import models
import pytest
import sampling
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom

from concept_nodes.host import adapters, dispatcher, run_record
from concept_nodes.host.run_record import Evaluation, digest, find, make_record, remember
from concept_nodes.nodes.run_report import RunReport


@pytest.fixture(scope="module")
def plain():
    return models.build()


@pytest.fixture(autouse=True)
def _no_record_of_other_tests(monkeypatch):
    """A run in which nothing could act ends in the plain model's latent, and its record is kept under that."""
    monkeypatch.setattr(run_record, "_records", OrderedDict())


def report(samples) -> str:
    return RunReport.execute({"samples": samples}).result[1]


class TestFindingTheRecord:
    @pytest.mark.parametrize("way", sampling.WAYS)
    def test_every_sampler_and_guider(self, plain, way):
        samples = sampling.WAYS[way](cases.slide(plain, 0.8))
        assert "at 0.8: acted in" in report(samples)
        assert find(sampling.WAYS[way](plain)) is None

    def test_denoised_output_of_the_advanced_sampler(self, plain):
        samples = sampling.by_guider(sampling.cfg, cases.slide(plain, 0.8), denoised=True)
        assert "acted in 4 of 4 steps" in report(samples)

    @pytest.mark.parametrize("cast", [torch.float16, torch.float32, torch.float64])
    def test_casts_of_the_host(self, plain, cast):
        samples = models.sample(cases.slide(plain, 0.8))
        assert find(samples.to(torch.float16).to(cast)) is find(samples) is not None

    def test_cached_latent_after_other_runs(self, plain):
        samples = models.sample(cases.slide(plain, 0.6))
        told = report(samples)
        for seed in (7, 8):
            models.sample(cases.slide(plain, 0.6), seed=seed)
        assert report(samples.clone()) == told

    def test_another_strength_is_another_record(self, plain):
        told = [report(models.sample(cases.slide(plain, strength))) for strength in (0.5, 0.7)]
        assert "at 0.5" in told[0]
        assert "at 0.7" in told[1]

    @pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x[:, :, 1:], lambda x: x.flip(0).transpose(2, 3)])
    def test_changed_latent_has_none(self, plain, change):
        assert find(change(models.sample(cases.slide(plain, 0.8)))) is None

    def test_interrupted_run_leaves_none(self, plain):
        before = dict(run_record._records)
        sampling.interrupted(cases.slide(plain, 0.8), plain)
        assert run_record._records == before

    def test_nested_latents_are_found_by_their_packed_form(self):
        record = make_record([1.0, 0.0], [0], [], [Evaluation(1.0, 0, ())])
        parts = [models.seeded((2, 4, 3, 3), 1), models.seeded((2, 8, 5), 2)]
        packed = torch.cat([part.reshape(2, 1, -1) for part in parts], dim=-1)
        remember(record, packed)
        assert find(comfy.nested_tensor.NestedTensor(parts)) is record

    def test_only_so_many_are_kept(self):
        record = make_record([1.0, 0.0], [0], [], [])
        latents = [torch.full((1, 4, 2, 2), float(index)) for index in range(2 * run_record.KEPT + 1)]
        for latent in latents:
            remember(record, latent)
        assert find(latents[0]) is None
        assert find(latents[1]) is record
        assert len(run_record._records) == 2 * run_record.KEPT

    def test_digest_tells_shapes_apart(self):
        assert digest(torch.zeros(1, 4, 2, 8)) != digest(torch.zeros(1, 4, 4, 4))


class TestWhatItSays:
    def test_latent_passes_through_as_the_same_object(self, plain):
        latent = {"samples": models.sample(cases.slide(plain, 0.8))}
        assert RunReport.execute(latent).result[0] is latent

    def test_no_effect(self, plain):
        told = report(models.sample(plain))
        assert "No effect of Concept Nodes" in told
        assert "sampler" in told

    def test_steps_within_a_window(self, plain):
        told = report(models.sample(cases.slide(plain, 0.8, start=0.25, end=0.75), steps=8))
        assert "acted in 4 of 8 steps" in told

    def test_window_that_no_step_hit(self, plain):
        assert "never acted" in report(models.sample(cases.slide(plain, 0.8, start=0.6, end=0.61), steps=3))

    def test_samplers_that_evaluate_twice_per_step(self, plain):
        told = report(models.sample(cases.slide(plain, 0.8, start=0.5), steps=6, sampler="heun"))
        assert "acted in 3 of 6 steps" in told
        assert "11 model calls" in told

    def test_sampler_that_raises_the_noise_before_it_evaluates(self, plain):
        """What is asked for in a step then lies above the step's own sigma."""
        model = cases.slide(plain, 0.8)
        with torch.inference_mode():
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 10)
            churning = comfy.samplers.ksampler("euler", {"s_churn": 20.0})
            start = models.latent(model)
            out = SamplerCustom.execute(model, True, 3, 3.0, *sampling.prompts(model, 2), churning, sigmas, start).result[0]
        assert "acted in 10 of 10 steps (10 calls)" in report(out["samples"])

    @pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
    def test_sampler_with_steps_of_its_own(self, plain, sampler):
        """Its calls are told, because they belong to no step of the schedule."""
        model = cases.slide(plain, 0.8)
        calls = sampling.count_calls(model, sampler=sampler)
        assert f"acted in {calls} of {calls} model calls" in report(models.sample(model, sampler=sampler))

    def test_calls_that_an_effect_adds(self, plain):
        """Each effect says how many it adds to a call; the record adds them up over the calls it acted in."""

        class Adding(adapters.AdapterEffect):
            added = 2

        model = cases.slide(plain, 0.8)
        parts = adapters.place(plain, models.lora(plain), "test").parts
        adding = model.clone()
        dispatcher.attach(adding, Adding("test", parts, 1.0, 0.5))
        assert "4 model calls, none of them added by Concept Nodes" in report(models.sample(model))
        assert "4 model calls, 4 of them added by Concept Nodes" in report(models.sample(adding))

    def test_calls_of_a_split_batch(self, plain):
        # Two prompts of unequal length, each on the whole and on a part of the picture.
        assert "16 model calls" in report(sampling.in_areas(cases.slide(plain, 0.8)))

    def test_sigmas_as_they_were(self, plain):
        model_sampling = plain.get_model_object("model_sampling")
        told = report(models.sample(cases.slide(plain, 0.8), steps=3))
        assert f"sigma {float(model_sampling.sigma_max):.4g} to" in told

    def test_run_that_stops_early(self, plain):
        with torch.inference_mode():
            import nodes

            positive, negative = sampling.prompts(plain, 2)
            model = cases.slide(plain, 0.8)
            (out,) = nodes.common_ksampler(model, 3, 4, 3.0, "euler", "normal", positive, negative, models.latent(model), last_step=2)
        assert "Stopped at sigma" in report(out["samples"])
        assert "acted in 2 of 2 steps" in report(out["samples"])

    def test_chained_effects_in_order(self, plain):
        told = report(models.sample(cases.slide(cases.slide(plain, 0.8), -0.4, seed=400, start=0.5)))
        assert told.index("at 0.8: acted in 4") < told.index("at -0.4: acted in 2")

    def test_negative_model_alone_is_named_as_not_recorded(self, plain):
        """Its calls are seen, but only the main model's options lead to the latent that comes out."""

        def sample(negative):
            return sampling.by_guider(lambda model: sampling.dual_model(negative, model), plain)

        samples = sample(lambda model: cases.slide(model, 0.8))
        assert not torch.equal(samples, sample(lambda model: model.clone()))
        assert "negative model of DualModelGuider act, but no record" in report(samples)

    def test_both_models_of_a_guider(self, plain):
        other = sampling.other_model(plain)
        samples = sampling.by_guider(lambda model: sampling.dual_model(lambda _: cases.slide(other, 0.3), model), cases.slide(plain, 0.8))
        assert "8 model calls" in report(samples)
        assert "at 0.3: acted in 4" in report(samples)
        assert "at 0.8: acted in 4" in report(samples)


@pytest.mark.parametrize(
    "ended, calls, told",
    [
        ([0, 1, 2], [0, 1, 2], "in 3 of 3 steps (3 calls)"),
        ([0, 1, 2], [0, 0, 1, 1], "in 2 of 3 steps (4 calls)"),
        ([0, 1, 2], [2, 3], "in 1 of 3 steps (2 calls)"),
        ([0, 1, 2], [], "never acted"),
        ([0, 1], [0, 1, 1], "in 3 of 3 model calls"),
        ([0, 1, 2, 3], [0, 1, 2, 3], "in 4 of 4 model calls"),
    ],
)
def test_steps_are_counted_once(ended, calls, told):
    effect = dispatcher.Effect("a", {})
    record = make_record(
        [9.0, 5.0, 1.0, 0.0], ended, [effect], [Evaluation(5.0, step, (effect,)) for step in calls] or [Evaluation(5.0, 0, ())]
    )
    assert told in record.describe()
