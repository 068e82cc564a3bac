"""What `bench localize` and `bench maps` measure with: published ways by forward hooks, truths of pictures, and figures made of cases."""

import pytest
import torch

from concept_nodes.benchmarks import _published, _report
from concept_nodes.benchmarks import localize as bench
from concept_nodes.benchmarks import maps as of_maps
from concept_nodes.benchmarks._layouts import Layout, base, encode, loras_of, sample, stacked
from concept_nodes.host import lab
from concept_nodes.lab.eye import Reading, Seen
from concept_nodes.lab.measure import ask
from concept_nodes.lab.scenes import COLOURS, KINDS, render


@pytest.fixture(scope="module")
def loaded():
    return lab.load("unet")


@pytest.fixture(autouse=True)
def as_in_a_node():
    with torch.inference_mode():
        yield


def drawn(loaded, way, size=32, steps=3) -> torch.Tensor:
    return sample(loaded, *way, [1, 2], steps, size=size, last_step=steps)


def seen_of(scenes, i) -> Reading:
    """What an eye without fault reads."""

    def one(k: int) -> Seen:
        diameter, x, y = (float(values[i, k]) for values in (scenes.diameter, scenes.x, scenes.y))
        return Seen(KINDS[scenes.kind[i, k]], COLOURS[scenes.colour[i, k]], "solid", diameter, x, y, 1.0)

    objects = [one(k) for k in range(int(scenes.count[i]))]
    return Reading(0.5, "flat", 1.0, objects)


class TestPublished:
    def test_hooked_loras_are_the_stock_loaders(self, loaded):
        layout, loras = Layout(2), loras_of("unet")
        adapted = _published.Adapted(loaded.model, [loras[name] for name in layout.names], lambda *_: 1.0)
        plain = base(loaded, layout, loras)
        with adapted.on():
            mine = drawn(loaded, plain)
        assert torch.allclose(mine, drawn(loaded, stacked(loaded, layout, loras)), atol=1e-3)
        before = drawn(loaded, plain)
        assert not torch.allclose(mine, before, atol=1e-2)
        assert torch.equal(before, drawn(loaded, plain)) and not loaded.model.model.diffusion_model._forward_hooks

    def test_lag_takes_half_of_every_block(self, loaded):
        layout, loras = Layout(2), loras_of("unet")
        words = bench.words_of(layout)
        gated = _published.Lag(loaded, [loras[name] for name in layout.names], layout.whole(), words)
        with gated.on():
            drawn(loaded, base(loaded, layout, loras), size=64)
        assert {len(mask) for mask in gated.masks.values()} == {2} and len(gated.masks) > 4
        for mask in gated.masks.values():
            assert mask.shape[1] == 4  # two pictures, twice: the second half is the negative prompt's
            assert torch.equal(mask[:, :2], mask[:, 2:])
            share = mask.mean(-1)
            assert (share <= 0.5).all() and (share > 0.2).all()

    @pytest.mark.parametrize("shape", [(2, 64, 7), (2, 7, 8, 8), (2, 16, 7), (2, 7, 16, 16), (2, 7)])
    def test_a_mask_has_its_area_on_every_kind_of_output(self, shape):
        mask = torch.zeros(2, 64)
        mask[:, :32] = 1
        spread = (torch.ones(shape) * _published.spread_out(mask, torch.ones(shape))).mean()
        assert float(spread) == 0.5

    def test_freefuse_gives_every_place_to_one_concept(self, loaded):
        layout = Layout(2)
        way = base(loaded, layout, {})

        def draw(model, steps):
            return sample(loaded, model, *way[1:], [1], size=64, last_step=steps)

        masks = _published.freefuse(loaded, draw, layout.whole(), bench.words_of(layout), 20)
        assert masks.shape == (1, 2, 8, 8)
        assert torch.equal(masks.sum(1), torch.ones(1, 8, 8, dtype=torch.long))
        assert masks.any((-2, -1)).all()

    def test_conductors_paths(self, loaded):
        """A concept's path is the whole of its mask; nothing of it is nothing; each is one model call more."""
        layout, loras = Layout(2), loras_of("unet")
        plain, calls = base(loaded, layout, loras), []
        states = [loras[name] for name in layout.names]
        handle = loaded.model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            found = []
            for masks in (torch.zeros(2, 8, 8), torch.tensor([1.0, 0.0])[:, None, None].expand(2, 8, 8)):
                paths = _published.Conductor(loaded, states, masks)
                calls.clear()
                with paths.on():
                    found.append(drawn(loaded, (paths.model(loaded.model), *plain[1:])))
                assert len(calls) == 3 * 3
        finally:
            handle.remove()
        before = drawn(loaded, plain)
        assert torch.allclose(found[0], before, atol=1e-4) and not torch.allclose(found[1], before, atol=1e-2)


class TestTruth:
    def test_silhouettes_are_the_drawings(self):
        scenes = ask(8, objects=2, size=64, seed=3).scenes
        _, masks = render(scenes, masks=True)
        found = [of_maps.silhouettes(scenes, i, seen_of(scenes, i)) for i in range(8)]
        kept = [i for i, one in enumerate(found) if one is not None]
        assert len(kept) >= 6
        assert all(torch.equal(found[i], masks[i, :2] > 0.5) for i in kept)

    def test_a_picture_of_something_else_has_none(self):
        scenes = ask(2, objects=2, size=64, seed=3).scenes
        assert of_maps.silhouettes(scenes, 0, Reading(0.5, "flat", 1.0, seen_of(scenes, 0).objects[:1])) is None

    def test_iou(self):
        truth = torch.zeros(2, 4, 4, dtype=torch.bool)
        truth[0, :2], truth[1, 2:] = True, True
        half = truth.clone()
        half[1, 3] = False
        assert float(of_maps.iou(truth, truth)) == 1.0 and float(of_maps.iou(half, truth)) == 0.75
        assert float(of_maps.iou(truth.flip(0), truth)) == 0.0

    def test_the_best_cut_is_found(self):
        truth = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
        graded = truth * 0.68 + ~truth * 0.52
        level, found = of_maps.at_best(list(graded), list(truth))
        assert 0.52 <= level < 0.68 and torch.equal(found, torch.ones(3))


def test_maps_of_one_model_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(_report, "RESULTS", tmp_path)
    eyes = []
    monkeypatch.setattr(of_maps.Eye, "load", lambda: eyes.append(1))
    monkeypatch.setattr(of_maps, "cost", lambda sample: ({"capture_step_ratio": _report.mean([1.0])}, [{"arm": "wide"}]))

    def of(value):
        def quality(kind, loaded, eye, size, n):
            return {f"{kind}_map_miou_{size}": _report.mean([value])}, [{"model": kind, "size": size}]

        monkeypatch.setattr(of_maps, "quality", quality)

    of(0.5)
    of_maps.main([])
    before = _report.committed("maps")
    of(0.75)
    of_maps.main(["--again", "dit"])
    after = _report.committed("maps")
    values = {key: figure["value"] for key, figure in after["figures"].items()}
    assert values == {
        "capture_step_ratio": 1.0,
        "unet_map_miou_64": 0.5,
        "unet_map_miou_128": 0.5,
        "dit_map_miou_64": 0.75,
        "dit_map_miou_128": 0.75,
    }
    assert after["arms"] == before["arms"] and [row["part"] for row in after["arms"]] == ["cost", "unet", "unet", "dit", "dit"]
    assert of_maps.main(["--check"]) == 1 and len(eyes) == 5  # three parts, one again, and a sample of 64 pixels that moved


def place(arm, in_place, swap, k=3, model="unet"):
    return {"part": "places", "model": model, "k": k, "arm": arm, "n": 1, "in_place": in_place, "swap": swap}


def rest(arm, change, identity, adapter="spoilt"):
    return {"part": "rest", "model": "unet", "adapter": adapter, "arm": arm, "n": 2, "change": change, "identity": identity}


class TestFigures:
    ROWS = (
        place("ours", "1101", "0010"),
        place("plain", "0000", "1111"),
        place("ours", "11", "00", model="dit"),
        rest("everywhere", [0.2, 0.2], "11"),
        rest("ours", [0.05, 0.05], "10"),
    )

    def test_known_values(self):
        figures = bench.figures_of(self.ROWS)
        assert {key: round(figure.value, 6) for key, figure in figures.items()} == {
            "auto3_in_place": 0.75,
            "auto3_swap": 0.25,
            "dit_auto3_in_place": 1.0,
            "dit_auto3_swap": 0.0,
            "lag_background_cut": 0.75,
            "lag_identity_loss": 0.5,
        }
        assert figures["lag_background_cut"].low <= 0.75 <= figures["lag_background_cut"].high

    def test_arms_measured_again_take_the_place_of_the_committed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_report, "RESULTS", tmp_path)
        monkeypatch.setattr(bench, "measure", lambda sample_only, arms: [row for row in self.ROWS if row["arm"] in arms])
        assert bench.main([]) == 1  # claims are missed
        assert list(_report.committed("localize")["parts"]) == list(bench.PARTS)
        better = place("ours", "1111", "0000")
        monkeypatch.setattr(bench, "measure", lambda sample_only, arms: [better, self.ROWS[2], self.ROWS[4]])
        bench.main(["--again", "ours"])
        result = _report.committed("localize")
        found = {key: figure["value"] for key, figure in result["figures"].items()}
        assert found["auto3_in_place"] == 1.0 and found["lag_background_cut"] == 0.75 and found["lag_identity_loss"] == 0.5
        assert len(result["arms"]) == len(self.ROWS) and better in result["arms"]
        made = bench.figures_of(result["arms"])
        assert {key: round(figure.value, 6) for key, figure in made.items()} == found

    def test_a_swap_is_another_of_the_named_characters(self):
        layout = Layout(3)
        here = [Seen(name, "red", "solid", 20.0, 20.0 + 43 * index, 64.0, 0.9) for index, name in enumerate(layout.names)]
        assert bench.swaps(layout, [Reading(0.5, "flat", 1.0, here)]) == [False] * 3
        stray = Seen(layout.names[1], "red", "solid", 20.0, 20.0, 100.0, 0.5)
        ordinary = Seen("circle", "red", "solid", 20.0, 64.0, 100.0, 0.5)
        assert bench.swaps(layout, [Reading(0.5, "flat", 1.0, [*here, stray, ordinary])]) == [True, False, False]

    def test_what_is_outside(self):
        beside = bench.Beside("robot", 0)
        own, other = (Seen("robot", "red", "solid", 16.0, x, 32.0, 0.9) for x in (16.0, 48.0))
        free = bench.outside(beside, [Reading(0.5, "flat", 1.0, [other, own])])
        assert int((~free).sum()) == 20 * 20 and not free[32, 16] and free[32, 48]
        assert bench.outside(beside, [Reading(0.5, "flat", 1.0, [other])]).all()


def test_prompts_name_what_they_weight(loaded):
    layout = Layout(3)
    way = bench.weighting(loaded, layout, loras_of("unet"), [1])
    assert not torch.equal(way.positive[0][0], encode(loaded, layout.whole())[0])
