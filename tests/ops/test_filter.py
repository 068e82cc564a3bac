"""The filter's maths against closed forms. No prompt is needed for any of it: random vectors do."""

import math

import pytest
import torch

from concept_nodes.ops import filter as ops
from concept_nodes.ops.filter import Span

D = 24


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collinear(condition):
    """Four vectors, two of which are all but the same."""
    vectors = random(4, D, seed=1)
    vectors[1] = vectors[0] + vectors[1] / condition
    return vectors


@pytest.mark.parametrize(
    "vectors", [random(5, D), collinear(1e4), collinear(1e6), random(40, D)], ids=["plain", "1e4", "1e6", "more than D"]
)
def test_a_projection_is_one(vectors):
    span = Span.of(vectors.float() if len(vectors) == 5 else vectors)
    p = span.inside(torch.eye(D))
    assert torch.allclose(p, p.T, atol=1e-5) and torch.allclose(p @ p, p, atol=1e-5)
    assert float(p.trace()) == pytest.approx(span.rank, abs=1e-5) and span.rank == min(len(vectors), D)
    assert torch.allclose(span.inside(vectors), vectors, atol=1e-5 * float(vectors.norm()))
    assert float(span.outside(vectors).abs().max()) < 1e-5 * float(vectors.norm())


def test_the_published_inverse_fails_where_concepts_are_close():
    """Why there is no pseudo-inverse of the Gram matrix here."""
    vectors = collinear(1e6).float()
    gram = vectors @ vectors.T
    p = vectors.T @ torch.linalg.pinv(gram, rcond=1e-15) @ vectors
    assert float((p @ p - p).abs().max()) > 1e-3
    q = Span.of(vectors).inside(torch.eye(D))
    assert float((q @ q - q).abs().max()) < 1e-9


def test_only_what_is_spanned_matters():
    vectors, rows, prompt = random(3, D), random(7, D, seed=2), Span.of(random(6, D, seed=3))
    mixed = random(3, 3, seed=4) @ vectors
    same = [
        vectors,
        vectors[[2, 0, 1]],
        vectors * torch.tensor([[3.0], [0.01], [700.0]]),
        torch.cat([vectors, vectors, vectors * 0]),
        mixed,
    ]
    for order in ops.ORDERS:
        first, *others = (ops.cleaned(rows, Span.of(basis), prompt, order) for basis in same)
        for other in others:
            assert torch.allclose(first, other, atol=1e-9)


def test_concepts_last_leaves_nothing_of_them_and_prompt_last_stays_in_the_prompt():
    concepts, prompt, rows = random(3, D), Span.of(random(6, D, seed=3)), random(7, D, seed=2)
    span = Span.of(concepts)
    last = ops.cleaned(rows, span, prompt, "concepts last")
    assert float((last @ concepts.T).abs().max()) <= 1e-5 * float(concepts.norm() * rows.norm())
    paper = ops.cleaned(rows, span, prompt, "prompt last")
    assert float(prompt.outside(paper).abs().max()) < 1e-9
    assert float((paper @ concepts.T).abs().max()) > 1e-3 and float(prompt.outside(last).abs().max()) > 1e-3


def test_the_orders_agree_where_the_projections_commute():
    basis = torch.linalg.qr(random(D, D)).Q.T
    rows = random(5, D, seed=2)
    nested = Span.of(basis[:2]), Span.of(basis[:6])
    apart = Span.of(basis[:2]), Span.of(basis[4:8])
    for concepts, prompt in (nested, apart):
        one, other = (ops.cleaned(rows, concepts, prompt, order) for order in ("concepts last", "prompt last"))
        assert torch.allclose(one, other, atol=1e-9)
    with pytest.raises(ValueError, match="no order 'sideways'"):
        ops.cleaned(rows, *apart, "sideways")


@pytest.mark.parametrize("a", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.2])
def test_which_word_is_flagged_has_a_closed_form(a, alpha):
    """One prompt-without-a-word is at right angles to the concept, the others lean on it by a: their residual is sqrt(1 - a^2)."""
    concept = torch.eye(D)[:1]
    without = torch.eye(D)[1:6] * math.sqrt(1 - a * a) + a * concept
    without[2] = torch.eye(D)[3]
    told = ops.flagged(ops.distances(without, Span.of(concept)), alpha)
    assert told.tolist() == [False, False, (1 + alpha) * math.sqrt(1 - a * a) < 1, False, False]
    assert ops.flagged(ops.distances(7.5 * without, Span.of(concept)), alpha).tolist() == told.tolist()


def test_alike_words_and_single_ones_are_not_flagged():
    assert not ops.flagged(torch.full((4,), 0.7), 0.0).any()
    assert ops.flagged(torch.tensor([0.5]), 0.0).tolist() == [False]
    assert ops.flagged(torch.tensor([0.5]), 0.0, alone=True).tolist() == [True]  # as the released code has it
    assert ops.flagged(torch.zeros(0), 0.0).tolist() == []


@pytest.mark.parametrize(
    "middle, table",
    [(5.333, {0.45: 0, 0.50: 2, 0.52: 3, 0.533: 5, 0.55: 7, 0.60: 10}), (5.5, {0.50: 0, 0.55: 5, 0.60: 10})],
    ids=["nudity", "artists"],
)
def test_steps_follow_the_released_table(middle, table):
    slope = 2.5 if middle == 5.333 else 3.5
    assert {beta: ops.steps_as_released(beta, middle=middle, slope=slope) for beta in table} == table
    steps = [ops.steps_as_released(beta / 100, middle=middle, slope=slope) for beta in range(0, 200)]
    assert steps == sorted(steps)
    assert ops.steps_as_released(0.9, most=0) == 0


def test_the_papers_own_steps_never_reach_none():
    steps = [ops.steps_as_published(beta / 100) for beta in range(0, 201)]
    assert steps == sorted(steps) and steps[0] == 5.0 and 8.8 < steps[-1] < 9.0


def test_drift():
    rows = random(6, D)
    assert ops.drift(rows, rows) == pytest.approx(0, abs=1e-12) and ops.drift(rows, -3 * rows) == pytest.approx(2)
    assert ops.drift(rows, rows * 0) == 0 and ops.drift(rows[:0], rows[:0]) == 0


def test_how_much_of_a_concept_a_word_brings():
    concept, across = torch.eye(D)[0].double() * 3, torch.eye(D)[1].double()
    share, cosine = ops.heard(torch.stack([0.8 * concept, 0 * concept, -concept, 0.8 * concept + 2.4 * across]), concept[None])
    assert share[:, 0].tolist() == pytest.approx(
        [0.8, 0, -1, 0.8]
    )  # brings .8 of it; nothing; takes it away; as much of something else, too
    assert cosine[:, 0].tolist() == pytest.approx([1, 0, -1, math.sqrt(0.5)])
    assert [one.tolist() for one in ops.heard(concept[None], torch.zeros(1, D))] == [[[0.0]], [[0.0]]]


def test_words_point_to_a_concept_together():
    """By hand: the two best of three that point there, one that brings too little of it, one that points away, and another concept."""
    share = torch.tensor([[0.2, 0.2], [0.1, 0.2], [0.3, 0.2], [0.01, 0.2], [-0.5, 0.2]]).double()
    cosine = torch.tensor([[0.3, 0.0], [0.5, 0.0], [0.4, 0.1], [0.9, 0.0], [-0.9, 0.0]]).double()
    assert ops.together(share, cosine, 0.03, 2).tolist() == pytest.approx([0.5**2 + 0.4**2, 0.1**2])
    assert ops.together(share, cosine, 0.03, 8).tolist() == pytest.approx([0.5**2 + 0.4**2 + 0.3**2, 0.1**2])
    assert ops.together(share[:0], cosine[:0], 0.03, 8).tolist() == [0, 0]


def test_what_vectors_have_in_common():
    """Their mean, and beside it the directions in which they lie furthest."""
    axes = torch.eye(D)
    vectors = torch.stack([axes[0] + sign * much * axes[k] for k, much in ((1, 3.0), (2, 2.0), (3, 0.1)) for sign in (1, -1)])
    for more, inside in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2])):
        span = ops.in_common(vectors, more)
        assert span.rank == more + 1
        assert torch.allclose(span.inside(axes[:4]).norm(dim=1), torch.tensor([float(k in inside) for k in range(4)]).double(), atol=1e-6)


def test_taking_out_is_exact_at_its_ends_and_keeps_lengths_beyond():
    rows, without = random(4, D).half(), random(4, D, seed=6).half()
    assert ops.taken_out(rows, without, 0.0) is rows
    assert torch.allclose(ops.taken_out(rows, without, 1.0), without, atol=2e-3)
    assert torch.allclose(ops.taken_out(rows, without, 0.5).float(), (rows.float() + without.float()) / 2, atol=2e-3)
    beyond, straight = ops.taken_out(rows, without, 1.5), rows.float() + 1.5 * (without.float() - rows.float())
    assert beyond.dtype == torch.float16
    assert torch.allclose(beyond.float().norm(dim=-1), without.float().norm(dim=-1), rtol=2e-3)
    assert torch.allclose(torch.cosine_similarity(beyond.float(), straight, dim=-1), torch.ones(4), atol=1e-5)
    untouched = ops.taken_out(rows, rows, 1.5)
    assert torch.allclose(untouched, rows, atol=2e-3)
