"""Browsing: counts over sparse codes against the dense ones, and the orders on latents planted for them."""

import pytest
import torch

from concept_nodes.ops.sae import RELU, SAE, TOPK
from concept_nodes.ops.sae_browse import DENSE, ORDERS, SPECIFIC, STRONG, Survey, nearest, neighbours, of_latent


def seeded(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def autoencoder(n=24, d=8, **options) -> SAE:
    return SAE(seeded((n, d), 1), seeded((n,), 2) * 0.1, seeded((n, d), 3), seeded((d,), 4), **options)


@pytest.mark.parametrize("sae", [autoencoder(activation=TOPK, k=3), autoencoder(activation=RELU)])
def test_counts_are_those_of_the_dense_codes(sae):
    items = [seeded((rows, sae.d), 10 + rows) for rows in (5, 1, 9)]
    survey, dense = Survey(sae.n), [sae.encode(item) for item in items]
    for item, codes in zip(items, dense, strict=True):
        values, indices = sae.sparse(item)
        survey.add(values, indices)
        for latent in range(sae.n):
            assert torch.equal(of_latent(values, indices, latent), codes[:, latent])
    every = torch.cat(dense)
    assert survey.rows == 15
    torch.testing.assert_close(survey.density, (every > 0).float().mean(0))
    torch.testing.assert_close(survey.mean, every.sum(0) / (every > 0).sum(0).clamp_min(1))
    assert torch.equal(survey.most, torch.stack([codes.amax(0) for codes in dense]))


def planted() -> Survey:
    """Latent 0 fires in every row, 1 in few items and strongly, 2 in one item only and most strongly, 3 in some, 4 nowhere."""
    survey = Survey(5)
    for item in range(12):
        codes = torch.zeros(4, 5)
        codes[:, 0] = 1.0
        codes[0, 1] = 5.0 if item < 3 else 0.0
        codes[0, 2] = 9.0 if item == 7 else 0.0
        codes[:2, 3] = 2.0 if item % 2 else 0.5
        survey.add(codes, torch.arange(5).expand(4, 5))
    return survey


def test_orders_find_what_was_planted_and_leave_out_what_never_fires():
    survey = planted()
    assert survey.ranked(DENSE, 9) == [0, 3, 1, 2]
    assert survey.ranked(STRONG, 9) == [2, 1, 3, 0]
    # Latent 2 fires in one item: that says nothing of what it is specific to.
    assert survey.ranked(SPECIFIC, 9) == [1, 3, 0]
    assert survey.ranked(DENSE, 2) == [0, 3]
    spread = survey.spread()
    assert float(spread[1]) == pytest.approx(3) and float(spread[0]) == pytest.approx(12) and not spread[2].isfinite()


def test_the_best_items_come_first_and_those_without_are_left_out():
    survey = planted()
    assert survey.best(1, 8) == [0, 1, 2] and survey.best(2, 8) == [7] and survey.best(4, 8) == []
    assert survey.best(3, 3) == [1, 3, 5]


@pytest.mark.parametrize("order", ORDERS)
def test_of_nothing_there_is_nothing(order):
    assert Survey(5).ranked(order, 3) == [] and Survey(5).best(0, 3) == []


@pytest.mark.parametrize("std", [None, torch.linspace(0.1, 3, 8)])
def test_neighbours_are_those_of_the_directions_as_they_are(std):
    sae = autoencoder(activation=TOPK, k=3, std=std)
    rows = torch.nn.functional.normalize(sae.directions(torch.arange(sae.n)), dim=1)
    cosines = rows @ rows.T - 2 * torch.eye(sae.n)
    for latent in (0, 11):
        found = neighbours(sae, latent, 4)
        assert [index for index, _ in found] == cosines[latent].topk(4).indices.tolist()
        torch.testing.assert_close(torch.tensor([cosine for _, cosine in found]), cosines[latent].topk(4).values)


def test_features_made_of_latents_are_known_again():
    sae = autoencoder(activation=TOPK, k=3, std=torch.linspace(0.1, 3, 8))
    found = nearest(sae, 2.5 * sae.directions(torch.tensor([7, 3])))
    assert [index for index, _ in found] == [7, 3] and all(cosine > 0.9999 for _, cosine in found)
    assert nearest(sae, seeded((1, 8), 99))[0][1] < 0.99
