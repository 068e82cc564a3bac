"""The slider benchmark's own parts: what it asks, how it ranks, and that its control is of equal size."""

import math

import pytest
import torch

from concept_nodes.benchmarks import sliders as bench
from concept_nodes.host import adapters, lab
from concept_nodes.lab import sliders
from concept_nodes.lab.attributes import RANGES
from concept_nodes.lab.captions import BACKGROUND_WORDS, SIZE_WORDS
from concept_nodes.lab.eye import Reading, Seen
from concept_nodes.lab.scenes import COLOURS, SHAPES

FILES = sorted((lab.LORAS / "concept_lab" / "sliders" / "unet").glob("*.safetensors"))


class TestSpearman:
    @pytest.mark.parametrize(
        "values, expected",
        [
            ([1, 2, 3, 4], 1.0),
            ([0.1, 0.2, 70.0, 70.1], 1.0),
            ([4, 3, 2, 1], -1.0),
            # 1 - 6 sum(d^2) / (n (n^2 - 1)), without ties: d = 0, 1, 1, 0 and d = 2, 1, 1, 2, 0.
            ([1, 3, 2, 4], 1 - 6 * 2 / 60),
            ([3, 1, 4, 2, 5], 1 - 6 * 10 / 120),
            # Ties at their middle rank: ranks 1.5, 1.5, 3 against 1, 2, 3 -> 1.5 / sqrt(1.5 * 2).
            ([5, 5, 9], 1.5 / 3**0.5),
            # Ranks 1, 3, 3, 3, 5 -> 8 / sqrt(8 * 10).
            ([0, 1, 1, 1, 2], 8 / 80**0.5),
            ([7, 7, 7], 0.0),
        ],
    )
    def test_known_values(self, values, expected):
        assert float(bench.spearman(torch.tensor([values], dtype=torch.float64))) == pytest.approx(expected)

    def test_rows_are_independent(self):
        values = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
        alone = torch.cat([bench.spearman(row[None]) for row in values])
        assert torch.equal(bench.spearman(values), alone)
        assert alone.abs().max() <= 1
        torch.testing.assert_close(bench.spearman(values.flip(1)), -alone)

    def test_only_the_order_counts(self):
        values = torch.rand(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(bench.spearman(values), bench.spearman(values.exp() * 100 - 3))


class TestAsking:
    @pytest.mark.parametrize(
        "slider, table, middle", [("background", BACKGROUND_WORDS, "on a grey background"), ("size", SIZE_WORDS, "a medium ")]
    )
    def test_prompts_leave_the_attribute_at_its_middle(self, slider, table, middle):
        texts = [bench.prompt(slider, seed) for seed in range(200)]
        others = [word for word in table if word not in middle]
        for text in texts:
            assert middle in text
            assert not any(f" {word} " in text for word in others), text
        assert {colour for colour in COLOURS if any(colour in text for text in texts)} == set(COLOURS)
        assert {shape for shape in SHAPES if any(shape in text for text in texts)} == set(SHAPES)
        assert texts == [bench.prompt(slider, seed) for seed in range(200)]

    def test_attribute(self):
        reading, picture = Reading(0.4, "flat", 1.0, [Seen("star", "red", "solid", 21.0, 32.0, 32.0, 0.9)]), torch.zeros(64, 64, 3)
        assert bench.attribute("background", picture, reading) == 0.4
        assert bench.attribute("size", picture, reading) == 21.0
        assert math.isnan(bench.attribute("size", picture, Reading(0.4, "flat", 1.0)))

    @pytest.mark.parametrize("slider", RANGES)
    def test_span_is_a_share_of_the_range(self, slider):
        whole = torch.linspace(0, RANGES[slider], 9)
        torch.testing.assert_close(bench.span(slider, torch.stack([whole, whole / 2, whole.flip(0)])), torch.tensor([1.0, 0.5, -1.0]))

    def test_strengths_are_nine_around_zero(self):
        assert len(bench.STRENGTHS) == 9
        assert sorted(bench.STRENGTHS) == bench.STRENGTHS
        assert 0.0 in bench.STRENGTHS


class TestShipped:
    def test_every_shipped_slider_is_measured(self):
        assert sorted(sliders.shipped("unet")) == [file.stem for file in FILES]
        assert {f"unet_{name}_span" for name in sliders.shipped("unet")} <= bench.claims().keys()
        assert FILES

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
    def test_the_control_has_the_sliders_layers_and_norms(self, file):
        state = adapters.read(file)
        twin = bench.random_twin(state)
        assert twin.keys() == state.keys()
        for key, tensor in state.items():
            assert twin[key].shape == tensor.shape
            assert float(twin[key].norm()) == pytest.approx(float(tensor.float().norm()), rel=1e-3)
            assert key.endswith("alpha") or not torch.equal(twin[key], tensor.float())
