"""Reading a reference is one softmax over both pictures' keys, in whatever pieces it is computed."""

import pytest
import torch

from concept_nodes.ops import reference
from concept_nodes.ops.reference import join, log_sum_exp, read

B, H, N, M, D = 2, 3, 10, 7, 8
SCALE = D**-0.5


def made(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 2


@pytest.fixture
def own():
    """(q, k, v) of a picture."""
    return made(1, B, H, N, D), made(2, B, H, N, D), made(3, B, H, N, D)


def other(seed=4):
    """(k, v, weights) of a reference; some weigh nothing."""
    weight = torch.rand(M, generator=torch.Generator().manual_seed(seed + 2))
    weight[0] = 0
    return made(seed, 1, H, M, D), made(seed + 1, 1, H, M, D), weight


def plain(q, k, v, bias=None):
    logits = q @ k.mT * SCALE
    return (logits if bias is None else logits + bias).softmax(-1) @ v


def full(q, k, v, others, bias=None):
    """One softmax over all keys, those of `others` [(k, v, weights of the keys, strengths (N,))] with a bias."""
    own = torch.zeros(N, N) if bias is None else bias
    biases = [own.expand(B, H, N, N)]
    for _, _, weight, strength in others:
        biases.append((strength[:, None] * weight).log().expand(B, H, N, M))
    keys = torch.cat([k, *(one[0].expand(B, -1, -1, -1) for one in others)], 2)
    values = torch.cat([v, *(one[1].expand(B, -1, -1, -1) for one in others)], 2)
    return plain(q, keys, values, torch.cat(biases, -1))


def joined(q, k, v, others, bias=None):
    out, lse = plain(q, k, v, bias), log_sum_exp(q, k, SCALE, bias)
    for keys, values, weight, strength in others:
        there = weight > 0
        more, sums = read(q, keys[:, :, there], values[:, :, there], weight[there].log(), SCALE)
        out, lse = join(out, lse, more, sums + strength.log())
    return out


@pytest.mark.parametrize("most", [reference.MOST_LOGITS, 50])
def test_is_the_full_softmax(own, most, monkeypatch):
    monkeypatch.setattr(reference, "MOST_LOGITS", most)
    strength = torch.linspace(0, 3, N)
    torch.testing.assert_close(joined(*own, [(*other(), strength)]), full(*own, [(*other(), strength)]), rtol=1e-6, atol=2e-6)


def test_several_are_one_softmax_in_any_order(own):
    others = [(*other(4), torch.linspace(0, 3, N)), (*other(14), torch.linspace(5, 0, N))]
    expected = full(*own, others)
    torch.testing.assert_close(joined(*own, others), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(joined(*own, others[::-1]), expected, rtol=1e-6, atol=2e-6)


def test_with_a_bias_of_the_models_own(own):
    bias = made(9, B, 1, N, N)
    bias[..., 4:6] = -torch.inf
    others = [(*other(), torch.ones(N))]
    torch.testing.assert_close(joined(*own, others, bias), full(*own, others, bias), rtol=1e-6, atol=2e-6)


def test_a_weight_of_nothing_changes_no_bit(own):
    strength = torch.ones(N)
    strength[3:] = 0
    out = joined(*own, [(*other(), strength)])
    assert torch.equal(out[:, :, 3:], plain(*own)[:, :, 3:])
    assert not torch.equal(out[:, :, :3], plain(*own)[:, :, :3])


def test_the_picture_itself_adds_nothing_whatever_the_strength(own):
    q, k, v = own
    out = plain(q, k, v)
    more, sums = read(q, k, v, torch.zeros(N), SCALE)
    for strength in (0.1, 1.0, 50.0):
        result, _ = join(out, log_sum_exp(q, k, SCALE), more, sums + torch.tensor(strength).log())
        torch.testing.assert_close(result, out, rtol=1e-6, atol=2e-6)


def test_without_end_the_reference_alone_is_read(own):
    keys, values, weight = other()
    result = joined(*own, [(keys, values, weight, torch.full((N,), 1e30))])
    torch.testing.assert_close(
        result, plain(own[0], keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1), weight.log()), rtol=1e-5, atol=1e-5
    )


def test_outputs_keep_their_type(own):
    q, k, v = (part.to(torch.bfloat16) for part in own)
    more, sums = read(q, k, v, torch.zeros(N), SCALE)
    assert join(plain(q, k, v), log_sum_exp(q, k, SCALE), more, sums)[0].dtype == torch.bfloat16
