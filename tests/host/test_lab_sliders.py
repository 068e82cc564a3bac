"""The lab's sliders: what their attributes read, the workflows that train them, and the benchmark's own parts."""

import math

import pytest
import torch
from safetensors.torch import load_file

from concept_nodes.benchmarks import _released, _trainings
from concept_nodes.benchmarks import sliders as bench
from concept_nodes.host import lab
from concept_nodes.lab import pairs, sliders
from concept_nodes.lab.attributes import HUES, POLES, RANGES, attribute, others, shift
from concept_nodes.lab.captions import COLOUR_WORDS, SIZE_WORDS
from concept_nodes.lab.eye import Eye
from concept_nodes.lab.scenes import render, sample_scenes
from concept_nodes.nodes import NODES
from concept_nodes.nodes.slider_training import prompts

BOTH = [(model, name) for model in lab.MODELS for name in sliders.NAMES]


@pytest.fixture(scope="module")
def eye():
    return Eye.load()


def readings(eye, change, after):
    """Eight drawn scenes before or after a change, and what is read in them."""
    pictures = pairs.draw_pairs(change, 8, height=64, width=64, seed=5)[after]
    return list(zip(pictures, eye.read(pictures), strict=True))


class TestAttributes:
    @pytest.mark.parametrize("slider", [name for name in sliders.NAMES if name not in POLES])
    def test_drawn_pairs_span_the_range(self, eye, slider):
        before, after = (readings(eye, _trainings.PAIRS[slider], side) for side in (False, True))
        spans = [(attribute(slider, *more) - attribute(slider, *less)) / RANGES[slider] for less, more in zip(before, after, strict=True)]
        assert sum(spans) / len(spans) == pytest.approx(0.9, abs=0.15)

    @pytest.mark.parametrize("slider", sliders.NAMES)
    def test_a_change_of_its_own_is_none_of_others(self, eye, slider):
        """What a slider is to move does not count as interference; what another moves does."""
        before, after = (readings(eye, _trainings.PAIRS[slider], side) for side in (False, True))
        own = [others(slider, less, more) for (_, less), (_, more) in zip(before, after, strict=True)]
        other = "size" if slider != "size" else "fill"
        told = [others(other, less, more) for (_, less), (_, more) in zip(before, after, strict=True)]
        assert sum(own) / 8 < 0.05
        assert sum(told) / 8 > 0.12

    @pytest.mark.parametrize(("slider", "change"), [("fill", "outline to solid"), ("neon", "vintage to neon")])
    def test_what_turns_by_shares_is_read_by_shares(self, eye, slider, change):
        """Where the eye has long been sure as well, in large shapes; whichever of the drawings the scene is read in."""
        scenes = sample_scenes(8, plain=True, generator=torch.Generator().manual_seed(2))
        scenes.diameter[:], scenes.x, scenes.y = 27.0, scenes.x.clamp(18, 46), scenes.y.clamp(18, 46)
        drawn = [render(pairs.changed(scenes, change, side)).movedim(1, -1) for side in (False, True)]
        for read in map(eye.read, drawn):
            spans = []
            for less, more, plain in zip(*drawn, read, strict=True):
                told = [attribute(slider, less + part * (more - less), plain, plain) for part in (0.0, 0.05, 0.5, 0.95, 1.0)]
                assert told == sorted(told)
                assert told[2] - told[0] == pytest.approx((told[4] - told[0]) / 2, abs=1e-5)
                spans.append(told[4] - told[0])
            assert sum(spans) / 8 == pytest.approx(1, abs=0.15)

    def test_a_shape_that_is_all_outline_has_no_fill(self, eye):
        scenes = sample_scenes(4, plain=True, generator=torch.Generator().manual_seed(2))
        scenes.kind[:], scenes.diameter[:], scenes.fill[:] = 4, 16.0, 0  # small crosses
        pictures = render(scenes).movedim(1, -1)
        assert all(math.isnan(attribute("fill", *pair)) for pair in zip(pictures, eye.read(pictures), strict=True))

    def test_nothing_changed_is_nothing(self, eye):
        for _, reading in readings(eye, "small to large", False):
            assert others("size", reading, reading) == 0
            assert shift(reading, reading) == 0

    def test_an_object_that_went_counts_as_all(self, eye):
        (_, reading), *_ = readings(eye, "small to large", True)
        gone = eye.read(torch.full((1, 64, 64, 3), reading.background))[0]
        assert not gone.objects
        assert others("neon", reading, gone) > 0.75
        assert math.isnan(shift(reading, gone))
        assert math.isnan(attribute("size", torch.zeros(64, 64, 3), gone))

    @pytest.mark.parametrize("colour", ["green", "cyan", "blue", "purple"])
    def test_hue_of_drawn_objects(self, eye, colour):
        scenes = sample_scenes(16, plain=True, generator=torch.Generator().manual_seed(2))
        scenes.colour[:] = list(COLOUR_WORDS).index(colour)
        pictures = render(scenes).movedim(1, -1)
        hues = [attribute("hue", *pair) for pair in zip(pictures, eye.read(pictures), strict=True)]
        assert all(hue == pytest.approx(HUES[colour], abs=4) for hue in hues)

    def test_shift_is_in_pixels(self, eye):
        scenes = sample_scenes(8, plain=True, generator=torch.Generator().manual_seed(2))
        scenes.x, scenes.y = scenes.x.clamp(20, 40), scenes.y.clamp(20, 40)
        moved = scenes[torch.arange(8)]
        moved.x, moved.y = scenes.x + 3, scenes.y + 4
        read = [eye.read(render(some).movedim(1, -1)) for some in (scenes, moved)]
        assert sum(shift(*pair) for pair in zip(*read, strict=True)) / 8 == pytest.approx(5, abs=0.5)


class TestWorkflows:
    @pytest.mark.parametrize(("model", "name"), BOTH)
    def test_every_slider_has_one_that_its_node_takes(self, model, name):
        graph = sliders.workflow(model, name)
        classes = {node.define_schema().node_id: node.define_schema() for node in NODES}
        for node in graph.values():
            inputs = {one.id: one for one in classes[node["class_type"]].inputs}
            assert node["inputs"].keys() <= inputs.keys()
            assert {key for key, one in inputs.items() if not one.optional} <= node["inputs"].keys()
        assert graph["1"]["inputs"] == {"model": model}
        settings = sliders.settings(graph)
        assert settings["name"] == name
        if "target" in settings:
            rows = prompts(settings)
            assert len(rows) == 24
            assert len({row for row in rows}) >= 20
            assert all(row[2] != row[3] for row in rows)

    def test_trains_a_file_by_it(self, tmp_path, monkeypatch):
        graph = sliders.workflow("unet", "size")
        sliders.settings(graph).update(steps=2, batch=2, previews=0)
        monkeypatch.setattr(sliders, "workflow", lambda model, name: graph)
        sliders.train("unet", "size", tmp_path / "made" / "size.safetensors")
        state = load_file(tmp_path / "made" / "size.safetensors")
        assert len(state) == 3 * 98
        assert {tensor.dtype for tensor in state.values()} == {torch.float16}


class TestAsking:
    @pytest.mark.parametrize("slider", sliders.NAMES)
    def test_poles_change_the_attributes_word_alone(self, slider):
        for seed in range(50):
            text = bench.prompt(slider, seed)
            more, less = bench.pole(slider, text, True), bench.pole(slider, text, False)
            assert len({text, more, less}) == 3
            words = set(text.replace(",", "").split())
            assert len(words - set(more.replace(",", "").split())) <= 1
            assert len(words - set(less.replace(",", "").split())) <= 1

    def test_size_and_hue_stand_at_their_middle(self):
        for seed in range(50):
            assert " medium " in bench.prompt("size", seed)
            assert " cyan " in bench.prompt("hue", seed)
            assert not any(f" {word} " in bench.prompt("size", seed) for word in SIZE_WORDS if word != "medium")


class TestEqualEffect:
    def sweep(self, attribute, changed):
        strengths = [-2.0, -1.0, 0.0, 1.0, 2.0]
        column = RANGES["neon"] * torch.tensor([attribute]).expand(4, -1)
        return bench.Sweep(strengths, column, torch.ones(4, 5), torch.tensor([changed]).expand(4, -1), torch.zeros(4, 5))

    def test_between_the_strengths_that_were_drawn(self):
        sweep = self.sweep([0.0, 0.3, 0.5, 0.7, 1.0], [0.4, 0.2, 0.0, 0.1, 0.3])
        found = bench.at_effect("neon", sweep, 0.25)
        assert found.keys() == {1, -1}
        # Up: .2 at 1, .5 at 2, so a sixth of the way; down likewise.
        torch.testing.assert_close(found[1], torch.full((4,), 0.1 + 0.2 / 6))
        torch.testing.assert_close(found[-1], torch.full((4,), 0.2 + 0.2 / 6))

    def test_a_way_that_leads_nowhere_is_left_out(self):
        sweep = self.sweep([0.0, 0.3, 0.5, 0.51, 0.52], [0.4, 0.2, 0.0, 0.1, 0.3])
        assert bench.at_effect("neon", sweep, 0.25).keys() == {-1}

    def test_rivals_are_compared_on_the_ways_that_both_lead(self):
        mine = {1: torch.full((4,), 0.1), -1: torch.full((4,), 0.9)}
        rivals = [{1: torch.full((4,), 0.4)}, {1: torch.full((4,), 0.2)}, {}]
        assert bench.best_rival(mine, rivals).value == pytest.approx(0.5)
        assert bench.best_rival(mine, [{}]) is None


def test_released_ways_train_at_random_steps(monkeypatch):
    """From a new noise each time, at any step of the path, all of a batch at the same one."""
    seen = []
    losses = _trainings.ReleasedObjective.losses

    def told(objective, step):
        seen.append((objective.ways.at.tolist(), objective.ways.x.clone()))
        return losses(objective, step)

    monkeypatch.setattr(_trainings.ReleasedObjective, "losses", told)
    state, seconds = _trainings.released("unet", "background", steps=6, batch=2)
    assert len(state) == 3 * 98
    assert seconds > 0
    assert all(len(set(at)) == 1 for at, _ in seen)
    assert len({at[0] for at, _ in seen}) > 2
    noisiest = [float(x.std()) for at, x in seen if at[0] == 0]
    assert all(not torch.equal(seen[0][1], x) for _, x in seen[1:])
    assert all(std > 10 for std in noisiest)


def test_moving_a_strength_writes_no_weight_where_the_stock_loader_writes_all():
    lab.show_files()
    with torch.inference_mode():
        figures, told = bench.moving(bench.Bench("unet"), "background")
    assert figures["unet_repatch_count"] == (0, 0, 0, 5)
    assert 0 < figures["unet_set_up_seconds"].value < 2
    assert [arm["written"] > 0 for arm in told] == [False, True]


def test_released_trainer_is_looked_for_where_it_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no train_lora\.py in .*name a checkout"):
        _released.train(tmp_path, "size")
