"""The judge of the eyes: a faultless eye is told so, a faulty one is told where."""

import pytest
import torch
from readings import true_reading

from concept_nodes.lab import corruptions, judge
from concept_nodes.lab.scenes import SHAPES, render


@pytest.fixture(scope="module")
def parts():
    return judge.judged_scenes(120, seed=4)


class TestScenes:
    def test_every_canvas_and_number_of_objects(self, parts):
        assert {(scenes.height, scenes.width) for scenes in parts} == set(judge.SCENES)
        assert sum(map(len, parts)) == 120
        assert {int(count) for scenes in parts for count in scenes.count} >= {1, 2, 3, 6}
        assert any((scenes.kind[scenes.present()] >= len(SHAPES)).any() for scenes in parts)

    def test_a_seed_gives_the_same_scenes(self, parts):
        for first, again, other in zip(parts, judge.judged_scenes(120, seed=4), judge.judged_scenes(120, seed=5), strict=True):
            assert torch.equal(first.x, again.x)
            assert not torch.equal(first.x, other.x)


class TestCompare:
    def test_a_faultless_eye(self, parts):
        for scenes in parts:
            told = judge.compare(scenes, [true_reading(scenes, i) for i in range(len(scenes))])
            assert all(all(right) for right in told.values())
            assert len(told["kind"]) == int(scenes.count.sum())
            assert len(told["style"]) == len(scenes)
            assert len(told["character"]) + len(told["colour"]) == len(told["kind"])

    @pytest.mark.parametrize(
        "change, falls",
        [
            (lambda reading: setattr(reading.objects[0], "kind", "none"), {"kind"}),
            (lambda reading: setattr(reading.objects[0], "colour", "none"), {"colour"}),
            (lambda reading: setattr(reading.objects[0], "fill", "none"), {"fill"}),
            (lambda reading: setattr(reading.objects[0], "diameter", 99.0), {"size"}),
            (lambda reading: setattr(reading, "style", "none"), {"style"}),
            (lambda reading: setattr(reading, "background", reading.background - 0.5), {"background"}),
            (lambda reading: reading.objects.append(reading.objects[0]), {"count"}),
        ],
    )
    def test_one_fault_shows_in_its_own_attribute(self, parts, change, falls):
        scenes = parts[0]
        readings = [true_reading(scenes, i) for i in range(len(scenes))]
        at = next(i for i, r in enumerate(readings) if r.objects[0].kind in SHAPES and r.objects[0].diameter < 24 and r.background > 0.6)
        change(readings[at])
        told = judge.compare(scenes, readings)
        assert {key for key, right in told.items() if not all(right)} == falls

    def test_a_blind_eye_is_wrong_about_every_object(self, parts):
        scenes = parts[0]
        readings = [true_reading(scenes, i) for i in range(len(scenes))]
        for reading in readings:
            reading.objects.clear()
        told = judge.compare(scenes, readings)
        assert not any(any(told[key]) for key in ("kind", "colour", "fill", "size", "place", "count"))


class TestAuroc:
    def test_known_values(self):
        good, bad = torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.8])
        assert judge.auroc(good, bad) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
        assert judge.auroc(good, good) == 0.5
        assert judge.auroc(torch.tensor([1.0]), torch.tensor([0.0])) == 1.0


@pytest.mark.parametrize("kind", [*corruptions.TAUGHT, *corruptions.UNSEEN])
def test_corruptions_keep_the_shape_and_change_most_pictures(parts, kind):
    torch.manual_seed(0)
    for scenes in parts:
        pictures = render(scenes)
        spoilt = (corruptions.TAUGHT | corruptions.UNSEEN)[kind](pictures)
        assert spoilt.shape == pictures.shape
        assert spoilt.isfinite().all()
        changed = ((spoilt - pictures).abs().amax(1) > 0.1).flatten(1).sum(1) >= 12
        assert changed.float().mean() > 0.7
