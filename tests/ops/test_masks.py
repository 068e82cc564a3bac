"""Shapes drawn as masks, and masks shared out and fitted to grids."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concept_nodes.ops.masks import Box, Ellipse, Polygon, Stroke, combine, harden, pool, rasterize

SIZES = [(64, 64), (48, 80), (33, 57)]


def area(shape, height=256, width=256, **options) -> float:
    """Share of the canvas that a shape covers."""
    return float(rasterize([shape], height, width, **options).mean())


class TestShapes:
    @pytest.mark.parametrize("height, width", SIZES)
    def test_boxes_on_pixel_edges_are_exact(self, height, width):
        mask = rasterize([Box(4 / width, 8 / height, 16 / width, 20 / height)], height, width)
        expected = torch.zeros(height, width)
        expected[8:28, 4:20] = 1
        assert torch.equal(mask, expected)

    def test_areas(self):
        assert area(Box(0.1, 0.2, 0.5, 0.3)) == pytest.approx(0.15, abs=1e-3)
        assert area(Ellipse(0.1, 0.2, 0.6, 0.4)) == pytest.approx(math.pi * 0.3 * 0.2, abs=1e-3)
        assert area(Polygon(((0.1, 0.1), (0.9, 0.1), (0.1, 0.9)))) == pytest.approx(0.32, abs=2e-3)
        assert area(Stroke(((0.5, 0.5),), 0.2)) == pytest.approx(math.pi * 0.04, abs=1e-3)
        assert area(Stroke(((0.3, 0.5), (0.7, 0.5)), 0.1)) == pytest.approx(0.4 * 0.2 + math.pi * 0.01, abs=1e-3)

    def test_areas_are_the_same_at_any_size(self):
        shapes = [Box(0.13, 0.22, 0.41, 0.37), Ellipse(0.2, 0.1, 0.5, 0.7), Polygon(((0.2, 0.1), (0.8, 0.5), (0.3, 0.9)))]
        for shape in shapes:
            assert area(shape, 32, 32) == pytest.approx(area(shape, 512, 512), abs=0.01)

    def test_an_outline_that_crosses_itself_has_a_hole(self):
        star = Polygon(tuple((0.5 + 0.45 * math.sin(4 * math.pi * i / 5), 0.5 - 0.45 * math.cos(4 * math.pi * i / 5)) for i in range(5)))
        mask = rasterize([star], 101, 101)
        assert mask[50, 50] == 0
        assert mask.max() == 1

    def test_later_shapes_erase_earlier_ones_only(self):
        whole, hole = Box(0.0, 0.0, 1.0, 1.0), Box(0.25, 0.25, 0.5, 0.5, erase=True)
        assert float(rasterize([whole, hole], 64, 64).mean()) == pytest.approx(0.75)
        assert float(rasterize([hole, whole], 64, 64).mean()) == 1

    def test_feather_softens_around_the_edge_and_keeps_the_middle(self):
        hard, soft = (rasterize([Box(0.0, 0.0, 0.5, 1.0)], 64, 64, feather) for feather in (0.0, 0.25))
        assert float(soft[:, 31:33].mean()) == pytest.approx(0.5)
        assert torch.equal(soft[:, :20], hard[:, :20])
        assert ((soft[0, 1:] - soft[0, :-1]) <= 0).all()

    def test_nothing_and_shapes_outside(self):
        assert rasterize([], 8, 8).sum() == 0
        assert rasterize([Box(1.5, 1.5, 0.5, 0.5), Ellipse(-2.0, 0.0, 0.5, 0.5)], 8, 8).sum() == 0
        assert rasterize([Box(-1.0, -1.0, 3.0, 3.0)], 8, 8).min() == 1


class TestOverlap:
    @pytest.fixture
    def masks(self):
        return torch.rand(4, 9, 7, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("rule", ["normalize", "priority", "max"])
    def test_shares_add_up_to_one_at_most(self, masks, rule):
        shares = combine(masks, torch.ones(4), rule)
        assert shares.shape == masks.shape
        assert (shares >= 0).all()
        assert shares.sum(0).max() <= 1 + 1e-6

    def test_normalize_keeps_proportions_and_what_does_not_overlap(self):
        masks = torch.tensor([[[1.0, 0.4]], [[1.0, 0.2]]])
        assert torch.allclose(combine(masks, torch.ones(2), "normalize"), torch.tensor([[[0.5, 0.4]], [[0.5, 0.2]]]))
        assert torch.allclose(combine(masks, torch.tensor([1.0, 0.5]), "normalize")[:, 0, 0], torch.tensor([2 / 3, 1 / 3]))

    def test_priority_gives_to_the_first(self):
        masks = torch.tensor([[[0.7]], [[0.6]], [[1.0]]])
        assert torch.allclose(combine(masks, torch.ones(3), "priority").flatten(), torch.tensor([0.7, 0.3, 0.0]))

    def test_max_gives_to_the_strongest_and_the_first_of_equals(self):
        masks = torch.tensor([[[0.5, 0.5]], [[0.5, 0.9]]])
        assert torch.equal(combine(masks, torch.ones(2), "max"), torch.tensor([[[0.5, 0.0]], [[0.0, 0.9]]]))

    def test_unknown_rule_names_the_known(self):
        with pytest.raises(ValueError, match="normalize, priority, max"):
            combine(torch.ones(1, 1, 1), torch.ones(1), "average")


class TestPool:
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
    def test_means_and_sums_stay(self, height, width, rows, columns):
        masks = torch.rand(2, height, width, generator=torch.Generator().manual_seed(1))
        masks = masks / masks.sum(0)
        pooled = pool(masks, rows, columns)
        assert pooled.shape == (2, rows, columns)
        assert torch.allclose(pooled.sum(0), torch.ones(rows, columns), atol=1e-5)
        assert torch.allclose(pooled.mean((1, 2)), masks.mean((1, 2)), atol=1e-5)

    def test_known_values(self):
        row = torch.tensor([[[1.0, 0.0, 0.0]]])
        assert torch.allclose(pool(row, 1, 2), torch.tensor([[[2 / 3, 0.0]]]))
        assert torch.equal(pool(row, 1, 6), torch.tensor([[[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]]))

    def test_harden_gives_each_place_to_the_largest(self):
        shares = torch.tensor([[[0.5, 0.2, 0.3]], [[0.3, 0.7, 0.3]]])
        assert torch.equal(harden(shares), torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]))
