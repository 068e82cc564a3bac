"""What `bench binding` measures with: groups read out of captions, boxes of their objects, and Attend-and-Excite."""

import comfy.sample
import comfy.samplers
import pytest
import torch

from concept_nodes.benchmarks import binding as bench
from concept_nodes.benchmarks._excite import Excite
from concept_nodes.host import lab
from concept_nodes.lab.measure import ask
from concept_nodes.ops.phrases import things


@pytest.fixture(scope="module")
def loaded():
    return lab.load("unet")


def test_captions_of_two_things_are_read_as_two():
    asked = ask(200, objects=2, size=64, seed=1)
    assert [len(things(caption)) for caption in asked] == [2] * 200


def test_each_group_has_its_own_objects_box():
    asked = ask(40, objects=2, size=64, seed=2)
    for number, caption in enumerate(asked):
        for at, (box, phrase) in enumerate(zip(bench.boxes_of(asked, number, things(caption)), things(caption), strict=True)):
            rows, columns = box.any(1).nonzero().float().mean(), box.any(0).nonzero().float().mean()
            near = torch.hypot(asked.scenes.x[number, :2] - columns, asked.scenes.y[number, :2] - rows).argmin()
            assert bench.COLOURS[int(asked.scenes.colour[number, near])] in phrase, (caption, at)


def test_all_of_it_runs(monkeypatch):
    for name, value in {"N": 3, "MANY": 3, "FEW": 2, "SAMPLE": 2, "STEPS": 2, "BATCH": 2}.items():
        monkeypatch.setattr(bench, name, value)
    figures, arms = bench._measure(False, bench.PARTS)
    assert set(bench.CLAIMS) <= set(figures)
    assert {arm["arm"] for arm in arms if arm["model"] == "unet"} == set(bench.ARMS)
    assert figures["unet_binding_plain"].n == 3 and figures["unet_binding_dense"].n == 2
    assert bench.table(figures).count("\n") == len(bench.ARMS) + 1
    sampled, _ = bench._measure(True, bench.PARTS)
    assert set(sampled) <= set(figures)


def test_excite_attends_to_the_words_more(loaded):
    """One step of it from the same latent lowers its loss; a step of no size is Euler's."""
    asked = bench.task(loaded, 2, 64, 2)
    found = {}
    for size in (0.0, 20.0):
        exciting = Excite([[group[-1:] for group in groups] for groups in asked.groups], 8)
        losses = []

        def loss(exciting=exciting, losses=losses):
            value = Excite.loss(exciting)
            losses.append(float(value.detach()))
            return value

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("concept_nodes.benchmarks._excite.SIZE", size)
            patch.setattr(exciting, "loss", loss)
            noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
            model = exciting.watching(loaded.model)
            sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
            conds = [[[asked.contexts[:2], {"pooled_output": asked.pooled[:2]}]] for _ in range(2)]
            comfy.sample.sample_custom(model, noise, 1.0, exciting.sampler(), sigmas, *conds, torch.zeros_like(noise), disable_pbar=True)
        found[size] = losses
    assert len(found[0.0]) == 2 and found[0.0][0] == pytest.approx(found[20.0][0])
    assert found[20.0][1] < found[0.0][1]
