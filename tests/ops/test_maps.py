"""Columns of attention are those of a full softmax; masks do what their names say."""

import pytest
import torch

from concept_nodes.ops import maps
from concept_nodes.ops.overlay import overlay


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def full(q, k, bias=None):
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (logits if bias is None else logits + bias).softmax(-1).mean(1)


class TestColumns:
    q, k = random(2, 4, 30, 8), random(2, 4, 11, 8, seed=2)

    @pytest.mark.parametrize("at_once", [1, 300, 2**25])
    @pytest.mark.parametrize("first, past", [(0, None), (3, 5), (10, 11)])
    def test_are_a_full_softmaxs(self, monkeypatch, at_once, first, past):
        monkeypatch.setattr(maps, "AT_ONCE", at_once)
        found = maps.columns(self.q, self.k, first, past)
        torch.testing.assert_close(found, full(self.q, self.k)[..., first:past], rtol=0, atol=1e-6)

    def test_all_add_up_to_one(self):
        torch.testing.assert_close(maps.columns(self.q, self.k).sum(-1), torch.ones(2, 30))

    @pytest.mark.parametrize("rows", [1, 30])
    def test_with_a_bias(self, monkeypatch, rows):
        monkeypatch.setattr(maps, "AT_ONCE", 2 * 4 * 11 * 7)
        bias = torch.where(random(2, 1, rows, 11, seed=3) > 1, -torch.inf, random(2, 1, rows, 11, seed=4))
        torch.testing.assert_close(maps.columns(self.q, self.k, 2, 9, bias), full(self.q, self.k, bias)[..., 2:9], rtol=0, atol=1e-6)

    def test_large_logits_in_half_precision(self):
        """Unscaled, their products would overflow."""
        q, k = torch.full((1, 2, 5, 64), 80.0).half(), torch.full((1, 2, 3, 64), 80.0).half()
        assert (q @ k.transpose(-1, -2)).isinf().all()
        torch.testing.assert_close(maps.columns(q, k), torch.full((1, 5, 3), 1 / 3), rtol=0, atol=1e-6)

    def test_no_full_map_is_held(self, monkeypatch):
        """Of many rows only so many logits exist at a time."""
        largest = []
        softmax = torch.Tensor.softmax
        monkeypatch.setattr(maps, "AT_ONCE", 1000)
        monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: largest.append(x.numel()) or softmax(x, *a, **k))
        maps.columns(random(1, 2, 200, 8), random(1, 2, 50, 8), 0, 3)
        assert max(largest) <= 1000

    def test_a_repeated_prompt_shares(self):
        twice = maps.columns(self.q, self.k.repeat(1, 1, 2, 1))
        torch.testing.assert_close(maps.fold(twice, 11), maps.columns(self.q, self.k))
        with pytest.raises(ValueError, match="no repeats"):
            maps.fold(twice, 7)


class TestConcepts:
    q, k, v = (random(2, 3, 4, 8, seed=seed) for seed in (1, 2, 3))
    picture = random(2, 3, 20, 8, seed=4), random(2, 3, 20, 8, seed=5)

    def attend(self, order=(0, 1, 2, 3)):
        return maps.concept_attention(*(part[:, :, list(order)] for part in (self.q, self.k, self.v)), *self.picture)

    def test_see_the_picture_and_one_another(self):
        keys, values = torch.cat([self.picture[0], self.k], 2), torch.cat([self.picture[1], self.v], 2)
        expected = (self.q @ keys.transpose(-1, -2) / 8**0.5).softmax(-1) @ values
        torch.testing.assert_close(self.attend(), expected.transpose(1, 2).flatten(2))

    def test_permuted_concepts_permute_maps_and_doubles_are_alike(self):
        shown = random(2, 20, 24, seed=6)
        scores = maps.output_scores(shown, self.attend())
        torch.testing.assert_close(maps.output_scores(shown, self.attend((2, 0, 3, 1))), scores[..., [2, 0, 3, 1]])
        doubled = maps.output_scores(shown, self.attend((0, 1, 1, 3)))
        assert torch.equal(doubled[..., 1], doubled[..., 2])

    def test_scores_are_products_over_all_heads(self):
        shown = random(2, 20, 24, seed=6)
        read = self.attend()
        torch.testing.assert_close(maps.output_scores(shown, read)[1, 7, 2], (shown[1, 7] * read[1, 2]).sum())


BLOB = torch.zeros(1, 1, 9, 12)
BLOB[..., 2:5, 3:7] = 1.0
BLOB[..., 7, 10] = 0.8


class TestMasks:
    def test_heights_go_from_median_to_peak(self):
        found = maps.heights(3 * BLOB + 5)
        assert torch.equal(found, BLOB)
        assert not maps.heights(torch.full((1, 1, 4, 4), 7.0)).any()

    @pytest.mark.parametrize("count", [8, 9])
    def test_median_leaves_half_of_the_places(self, count):
        assert maps.over_quantile(random(1, 2, 1, count), 0.5).sum(-1).unique().tolist() == [count // 2]

    def test_quantiles(self):
        mixed = random(2, 3, 10, 10)
        assert maps.over_quantile(mixed, 0.9).sum((-1, -2)).unique().tolist() == [10]
        assert maps.over_quantile(mixed, 0.0).all()
        assert not maps.over_quantile(mixed, 1.0).any()
        assert not maps.over_quantile(torch.ones(1, 1, 3, 3), 0.5).any()

    def test_otsu_parts_two_heaps(self):
        parts = torch.cat([random(1, 1, 1, 60) * 0.1, random(1, 1, 1, 20, seed=2) * 0.1 + 3], -1)
        assert torch.equal(maps.over_otsu(parts)[0, 0, 0], torch.arange(80) >= 60)

    @pytest.mark.parametrize("seed", range(4))
    def test_otsu_is_the_best_of_all_cuts(self, seed):
        values = random(1, 1, 1, 25, seed=seed)

        def between(mask):
            one, other = values[0, 0, 0][mask], values[0, 0, 0][~mask]
            return len(one) * len(other) * (one.mean() - other.mean()) ** 2

        found = between(maps.over_otsu(values)[0, 0, 0])
        assert found >= max(between(values[0, 0, 0] > cut) for cut in values[0, 0, 0].sort().values[:-1]) - 1e-5
        assert not maps.over_otsu(torch.ones(1, 1, 3, 3)).any()

    def test_winners_share_every_place_out(self):
        mixed = random(2, 3, 5, 6)
        assert torch.equal(maps.winners(mixed).sum(1), torch.ones(2, 5, 6, dtype=torch.long))
        beaten = maps.winners(mixed, torch.full((2, 1, 5, 6), 0.3))
        assert torch.equal(beaten.any(1), mixed.amax(1) >= 0.3)

    def test_largest_part_touches_side_by_side(self):
        rows = [
            "11000011",
            "00100001",
            "00110111",
            "10000100",
            "11111100",
        ]  # fmt: skip
        mask = torch.tensor([[int(cell) for cell in row] for row in rows]).bool()
        kept = maps.largest(mask[None])[0]
        expected = ["00000011", "00000001", "00000111", "10000100", "11111100"]
        assert ["".join(str(int(cell)) for cell in row) for row in kept] == expected

    @pytest.mark.parametrize("seed", range(6))
    def test_largest_part_is_what_flooding_finds(self, seed):
        mask = random(13, 17, seed=seed) > 0.1
        sizes, left = {}, {tuple(at) for at in torch.nonzero(mask).tolist()}
        while left:
            part, heap = set(), [min(left)]
            while heap:
                at = heap.pop()
                if at in left:
                    left.discard(at)
                    part.add(at)
                    heap += [(at[0] + dy, at[1] + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            sizes.setdefault(len(part), part)
        kept = maps.largest(mask[None, None])[0, 0]
        assert {tuple(at) for at in torch.nonzero(kept).tolist()} == sizes[max(sizes)]

    def test_nothing_has_no_largest_part(self):
        assert not maps.largest(torch.zeros(2, 3, 4, 5)).any()

    def test_dilation_grows_every_side(self):
        point = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
        point[..., 3, 2] = True
        grown = maps.dilated(point, 2)
        assert grown.dtype == torch.bool
        assert torch.equal(torch.nonzero(grown[0, 0]).amin(0), torch.tensor([1, 0]))
        assert torch.equal(torch.nonzero(grown[0, 0]).amax(0), torch.tensor([5, 4]))
        assert torch.equal(maps.dilated(point, 0), point)

    def test_resizing_keeps_place_and_never_falls_below(self):
        grown = maps.resized(BLOB, 36, 24)
        assert grown.shape == (1, 1, 36, 24)
        assert grown.min() >= 0
        at = torch.nonzero(grown[0, 0] > 0.9).float().mean(0)
        torch.testing.assert_close(at, torch.tensor([13.5, 9.5]), rtol=0, atol=0.6)


class TestBalanced:
    """A softmax over the maps is the oracle: all have the same share of it."""

    def test_all_have_the_same_share(self):
        logs = random(2, 4, 6, 5)
        even = maps.balanced(logs)
        torch.testing.assert_close(even.softmax(1).mean((-2, -1)), torch.full((2, 4), 0.25), rtol=0, atol=1e-3)
        moved = even - logs
        torch.testing.assert_close(moved, moved[..., :1, :1].expand_as(moved))
        torch.testing.assert_close(moved.mean(1), torch.zeros(2, 6, 5), rtol=0, atol=1e-5)

    def test_a_map_between_two_others_gets_its_third(self):
        """Slopes to either side are high over more places than what falls off to both."""
        across = torch.linspace(-1, 1, 30)
        logs = torch.stack([-2 * across, -2 * across.abs() + 0.6, 2 * across])[None, :, None]
        won, even = (maps.winners(each)[0, 1].float().mean() for each in (logs, maps.balanced(logs)))
        assert won < 0.25 < 0.3 < even < 0.36


class TestLed:
    """The picture has a square of a colour of its own, and the map only knows about where it is."""

    @pytest.fixture
    def square(self):
        truth = torch.zeros(48, 48, dtype=torch.bool)
        truth[10:26, 18:34] = True
        rows, columns = torch.arange(48.0)[:, None], torch.arange(48.0)[None]
        blob = (-((rows - 20) ** 2 + (columns - 24) ** 2) / 150).exp()
        picture = torch.where(truth[..., None], torch.tensor([0.9, 0.2, 0.1]), torch.tensor([0.5, 0.6, 0.5])) + 0.03 * random(48, 48, 3)
        return truth, blob[None, None], picture[None]

    def test_a_blob_becomes_what_is_there(self, square):
        truth, blob, picture = square

        def overlap(found):
            mask = maps.heights(found)[0, 0] > 0.6
            return float((mask & truth).sum() / (mask | truth).sum())

        assert overlap(blob) < 0.65 < 0.8 < overlap(maps.led(blob, picture))

    def test_keeps_what_lies_below_the_median_stays_below_the_peak_and_knows_no_other_picture(self, square):
        _, blob, picture = square
        both = torch.cat([3 * blob + 2, random(1, 1, 48, 48)]), torch.cat([picture, random(1, 48, 48, 3, seed=5)])
        found = maps.led(*both)
        torch.testing.assert_close(found[:1], 3 * maps.led(blob, picture) + 2)
        low = both[0].flatten(2).median(-1).values[..., None, None]
        below = both[0] < low
        torch.testing.assert_close(found[below], both[0][below])
        assert below.any() and (found >= low)[~below].all()
        assert (found.amax((-2, -1)) <= both[0].amax((-2, -1))).all()

    def test_colours_may_be_in_any_unit(self, square):
        _, blob, picture = square
        torch.testing.assert_close(maps.led(blob, 40 * picture - 7), maps.led(blob, picture), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("value", [0.0, 0.5])
    def test_a_picture_without_edges_leads_nowhere(self, square, value):
        blob = square[1]
        led = maps.led(blob, torch.full((1, 48, 48, 3), value))
        torch.testing.assert_close(maps.heights(led), maps.heights(blob))

    def test_a_map_without_a_peak_stays(self, square):
        flat = torch.full((1, 2, 48, 48), 0.3)
        assert torch.equal(maps.led(flat, square[2]), flat)


def test_overlay_over_pictures_phrase_by_phrase():
    heights = torch.zeros(6, 4, 5)
    heights[4, 1, 2] = 1.0
    pictures = torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    drawn = overlay(heights, pictures, 2)
    assert drawn.shape == (6, 4, 5, 3)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    torch.testing.assert_close(drawn[0], pictures[0].mean(-1, keepdim=True).expand(-1, -1, 3))
    torch.testing.assert_close(drawn[5], pictures[2].mean(-1, keepdim=True).expand(-1, -1, 3))
    assert not torch.allclose(drawn[4, 1, 2], drawn[1, 1, 2], atol=0.05)
    assert overlay(heights, None).shape == (6, 4, 5, 3)
