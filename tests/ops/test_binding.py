"""The equations of binding against their definitions."""

import pytest
import torch

from concept_nodes.ops import binding as ops

GRID = (3, 5)


def logits(batch=2, heads=3, words=7, seed=0):
    return 3 * torch.randn(batch, heads, GRID[0] * GRID[1], words, generator=torch.manual_seed(seed))


def members(*groups, words=7):
    found = torch.zeros(1, len(groups), words, dtype=torch.bool)
    for number, rows in enumerate(groups):
        found[0, number, list(rows)] = True
    return found


def places(groups=2, seed=1):
    return torch.rand(1, groups, GRID[0] * GRID[1], generator=torch.manual_seed(seed))


class TestDense:
    def test_is_the_published_sum(self):
        given, there, own = logits(), places(), members((1, 2), (4,))
        bias = ops.dense(given, own, there, 0.7)
        high, low = given.amax(-1), given.amin(-1)
        for group, rows in enumerate(((1, 2), (4,))):
            share, size = there[:, group, None], there[:, group].mean()
            for row in rows:
                one = given[..., row]
                expected = 0.7 * (1 - size) * (share * (high - one) - (1 - share) * (one - low))
                torch.testing.assert_close(bias[..., row], expected)
        assert not bias[..., [0, 3, 5, 6]].any()

    def test_weight_0_is_nothing(self):
        assert not ops.dense(logits(), members((1, 2), (4,)), places(), 0.0).any()

    @pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
    def test_logits_stay_between_those_of_their_row(self, weight):
        given = logits()
        moved = given + ops.dense(given, members((1, 2), (2, 4)), places(), weight)
        assert (moved <= given.amax(-1, keepdim=True) + 1e-5).all() and (moved >= given.amin(-1, keepdim=True) - 1e-5).all()

    def test_a_group_without_words_is_nothing(self):
        assert not ops.dense(logits(), members((), ()), places(), 1.0).any()


class TestSuppression:
    def test_of_one_group_nothing_is_lost(self):
        own = members((2,))
        assert not ops.losing(torch.rand(2, 1, 15), own).any()

    def test_only_the_strongest_is_read(self):
        own, maps = members((1, 2), (4,)), torch.rand(2, 2, 15)
        lost = ops.losing(maps, own)
        first = maps[:, 0] >= maps[:, 1]
        assert torch.equal(lost[..., 1], ~first) and torch.equal(lost[..., 2], ~first) and torch.equal(lost[..., 4], first)
        assert not lost[..., [0, 3, 5, 6]].any()

    def test_a_word_of_both_is_never_lost(self):
        lost = ops.losing(torch.rand(2, 2, 15), members((1, 2), (2, 4)))
        assert not lost[..., 2].any() and lost[..., [1, 4]].any()

    def test_a_group_without_words_wins_nothing(self):
        maps = torch.stack([torch.zeros(15), torch.ones(15)])[None]
        assert not ops.losing(maps, members((1,), ())).any()

    def test_maps_are_means_over_the_groups_words(self):
        shares = torch.rand(2, 15, 7)
        found = ops.group_maps(shares, members((1, 2), (4,)))
        torch.testing.assert_close(found, torch.stack([shares[..., [1, 2]].mean(-1), shares[..., 4]], 1))

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_with_a_sink_shares_are_multiplied_as_published(self, share):
        given = logits()
        lost = ops.losing(torch.rand(2, 2, 15), members((1, 2), (4,)))
        bias = ops.shut(lost, share)[:, None].expand_as(given)
        whole = torch.cat([given + bias, ops.sink(given, lost, share)], -1).softmax(-1)
        expected = given.softmax(-1) * torch.where(lost, 1 - share, 1.0)[:, None]
        torch.testing.assert_close(whole[..., :-1], expected, rtol=1e-4, atol=1e-6)

    def test_without_one_they_add_up_to_1_again(self):
        given = logits()
        lost = ops.losing(torch.rand(2, 2, 15), members((1, 2), (4,)))
        kept = given.softmax(-1) * ~lost[:, None]
        found = (given + ops.shut(lost, 1.0)[:, None]).softmax(-1)
        torch.testing.assert_close(found, kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)

    def test_share_0_is_nothing(self):
        assert not ops.shut(torch.ones(1, 2, 3, dtype=torch.bool), 0.0).any()


class TestBlur:
    def test_keeps_what_is_even(self):
        torch.testing.assert_close(ops.smoothed(torch.full((2, 3, 15), 0.4), GRID), torch.full((2, 3, 15), 0.4))

    def test_spreads_over_rows_of_the_grid(self):
        maps = torch.zeros(1, 1, 15)
        maps[0, 0, 1 * 5 + 2] = 1
        found = ops.smoothed(maps, GRID).view(GRID)
        side = torch.exp(torch.tensor([-2.0, 0.0, -2.0]))
        expected = torch.outer(side, side) / side.sum() ** 2
        torch.testing.assert_close(found[:, 1:4], expected)
        assert not found[:, [0, 4]].any()


class TestSimilarity:
    def test_is_the_weighted_sum(self):
        rows, words = torch.randn(6, 4, generator=torch.manual_seed(0)), torch.tensor([False, True, True, True, True, False])
        found = ops.alike(rows, words, 0.4, 2, 0.2)
        unit = rows / rows.norm(dim=-1, keepdim=True)
        for at in range(1, 5):
            cosines = {other: float(unit[at] @ unit[other]) for other in range(1, 5) if abs(other - at) <= 2}
            weights = {other: one for other, one in cosines.items() if one >= 0.2}
            mean = sum(one * rows[other] for other, one in weights.items()) / sum(weights.values())
            torch.testing.assert_close(found[at], 0.6 * rows[at] + 0.4 * mean)
        assert torch.equal(found[[0, 5]], rows[[0, 5]])

    @pytest.mark.parametrize(("share", "words"), [(0.0, True), (1.0, False)])
    def test_no_share_or_no_words_is_nothing(self, share, words):
        rows = torch.randn(6, 4)
        assert torch.equal(ops.alike(rows, torch.full((6,), words), share, 3, 0.2), rows)

    def test_a_word_like_none_stays(self):
        rows = torch.eye(4)
        torch.testing.assert_close(ops.alike(rows, torch.ones(4, dtype=torch.bool), 1.0, 4, 0.5), rows)
