"""Group normalisation by places: against torch's own over the whole picture, and against moments written out by hand."""

import pytest
import torch
import torch.nn.functional as F

from concept_nodes.ops.norms import LENT, normalised

EPS, GROUPS = 1e-5, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def picture(batch=2, seed=0):
    x = torch.randn(batch, 8, 4, 6, generator=torch.Generator().manual_seed(seed))
    x[..., 3:] = 3 * x[..., 3:] + 2  # halves of other scales
    return x


def halves():
    left = torch.zeros(4, 6)
    left[:, :3] = 1
    return torch.stack([left, 1 - left]).flatten(1)[:, None]


def by_hand(x, rows):
    """Loops over pictures, groups and places; positions that nobody has keep the whole picture's moments."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for picture in range(len(x)):
        for group in range(GROUPS):
            cells = x[picture, 2 * group : 2 * group + 2].double().flatten(1)
            whole, spread = cells.mean(), cells.var(unbiased=False)
            done = (1 - rows[:, 0].sum(0)) * (cells - whole) / (spread + EPS).sqrt()
            for share in rows[:, 0].double():
                weight = torch.cat([share, torch.tensor([LENT])])
                mean = (weight * torch.cat([cells.mean(0), whole[None]])).sum() / weight.sum()
                square = (weight * torch.cat([cells.square().mean(0), (spread + whole**2)[None]])).sum() / weight.sum()
                done = done + share * (cells - mean) / (square - mean**2 + EPS).sqrt()
            out[picture, 2 * group : 2 * group + 2] = done.view(2, *x.shape[2:])
    return out.float()


@pytest.mark.parametrize("rows", [halves(), halves()[:1], 0.5 * halves(), halves()[:1] * 0.25], ids=["both", "one", "soft", "faint"])
def test_each_place_has_moments_of_its_own(rows):
    x = picture()
    torch.testing.assert_close(normalised(x, rows, torch.ones(len(rows)), GROUPS, EPS), by_hand(x, rows), **CLOSE)


@pytest.mark.parametrize(
    "rows", [torch.ones(1, 1, 24), torch.zeros(1, 1, 24), halves() * 0], ids=["all of it", "nothing", "two of nothing"]
)
def test_all_of_the_picture_or_nothing_is_the_plain_one(rows):
    x = picture()
    torch.testing.assert_close(normalised(x, rows, torch.ones(len(rows)), GROUPS, EPS), F.group_norm(x, GROUPS, eps=EPS), **CLOSE)


def test_between_none_and_whole_lies_the_mean():
    x, rows = picture(), halves()
    none, half, whole = (normalised(x, rows, torch.full((2,), own), GROUPS, EPS) for own in (0.0, 0.5, 1.0))
    torch.testing.assert_close(none, F.group_norm(x, GROUPS, eps=EPS), **CLOSE)
    torch.testing.assert_close(half, (none + whole) / 2, **CLOSE)


def test_a_place_knows_nothing_of_what_lies_in_another_but_what_is_lent():
    x, y = picture(), picture()
    y[..., 3:] *= 5
    rows = halves().repeat_interleave(1000, 2)  # so many cells that what is lent does not count
    wide = [normalised(one.repeat_interleave(1000, 3), rows.view(2, 1, -1), torch.ones(2), GROUPS, EPS) for one in (x, y)]
    torch.testing.assert_close(wide[0][..., :3000], wide[1][..., :3000], rtol=1e-2, atol=1e-2)
    plain = [F.group_norm(one, GROUPS, eps=EPS)[..., :3] for one in (x, y)]
    assert (plain[0] - plain[1]).abs().max() > 0.5


def test_pictures_of_a_batch_may_have_other_places():
    x, rows = picture(), halves()
    each = torch.stack([rows[:, 0], rows[:, 0].flip(1)], 1)
    both = normalised(x, each, torch.ones(2), GROUPS, EPS)
    for at in range(2):
        torch.testing.assert_close(both[at : at + 1], normalised(x[at : at + 1], each[:, at : at + 1], torch.ones(2), GROUPS, EPS), **CLOSE)


def test_shares_beyond_1_are_scaled_to_1():
    x, rows = picture(), halves()[:1].repeat(2, 1, 1)
    torch.testing.assert_close(
        normalised(x, rows, torch.ones(2), GROUPS, EPS), normalised(x, rows / 2, torch.ones(2), GROUPS, EPS), **CLOSE
    )
    assert normalised(x.half(), rows.half(), torch.ones(2).half(), GROUPS, EPS).isfinite().all()
