"""Low-rank adapters against merged weights, in exact and in rounded arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_nodes.ops.lora import Factors, Stack, decomposed, delta_square, delta_weight, merge_middle
from concept_nodes.ops.shares import Shares

CPU = torch.device("cpu")
CONVOLUTION = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(out=6, inputs=5, rank=3, scale=1.0, seed=0, kernel=(), rows=None, dtype=torch.float32):
    down = random(rank, inputs, *kernel, seed=seed, dtype=dtype)
    return Factors(down, random(rows[1] if rows else out, rank, seed=seed + 1, dtype=dtype), scale, rows)


def stack(*adapters, strengths=None, dtype=torch.float32, convolution=None):
    made = Stack([[one] if isinstance(one, Factors) else one for one in adapters], CPU, dtype, convolution)
    made.set_strengths(strengths or [1.0] * len(adapters))
    return made


def added(made, x, out=6):
    """What a stack adds to a linear layer's output of zeros."""
    return made(torch.zeros(*x.shape[:-1], out, dtype=x.dtype), True, x)


def whole(adapter, shape, own=None):
    """The adapter's delta laid into a whole weight of zeros."""
    weight = torch.zeros(shape)
    first, count = adapter.rows or (0, shape[0])
    weight[first : first + count] = delta_weight(adapter, own)
    return weight


@given(
    out=st.integers(1, 8),
    inputs=st.integers(1, 8),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_merged_weight(out, inputs, ranks, lead, seed):
    """Any number of adapters, any rank (above the layer's own too), any shape of x."""
    adapters = [factors(out, inputs, rank, scale=0.5 + index, seed=seed + 7 * index) for index, rank in enumerate(ranks)]
    strengths = [0.3 - 0.8 * index for index in range(len(ranks))]
    base, x = random(out, inputs, seed=seed + 100), random(*lead, inputs, seed=seed + 101)
    merged = base + sum(strength * delta_weight(adapter) for strength, adapter in zip(strengths, adapters, strict=True))
    y = stack(*adapters, strengths=strengths)(F.linear(x, base), True, x)
    torch.testing.assert_close(y, F.linear(x, merged), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "kernel, options",
    [
        ((1, 1), {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}),
        ((3, 3), CONVOLUTION),
        ((3, 3), {"stride": (1, 1), "padding": (2, 2), "dilation": (2, 2)}),
        ((3, 3), {"stride": (1, 1), "padding": "same", "dilation": (1, 1)}),
        ((3,), {"stride": (2,), "padding": (1,), "dilation": (1,)}),
        ((3, 1, 1), {"stride": (1, 1, 1), "padding": (1, 0, 0), "dilation": (1, 1, 1)}),
    ],
)
def test_convolution_equals_the_merged_weight(kernel, options):
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    adapters = [factors(6, 5, rank, scale=0.7, seed=rank, kernel=kernel) for rank in (2, 4)]
    base, x = random(6, 5, *kernel, seed=50), random(2, 5, *[9] * len(kernel), seed=51)
    merged = base + 0.4 * delta_weight(adapters[0]) - 1.1 * delta_weight(adapters[1])
    y = stack(*adapters, strengths=[0.4, -1.1], convolution=options)(convolve(x, base, **options), True, x)
    torch.testing.assert_close(y, convolve(x, merged, **options), rtol=1e-5, atol=1e-4)


def test_input_given_by_name():
    x, y = random(3, 5), torch.zeros(3, 6)
    assert torch.equal(stack(factors())(y.clone(), True, input=x), stack(factors())(y.clone(), True, x))


def test_convolution_in_channels_last():
    x = random(2, 5, 8, 8).to(memory_format=torch.channels_last)
    adapter, base = factors(6, 5, 2, kernel=(3, 3)), random(6, 5, 3, 3, seed=9)
    y = stack(adapter, convolution=CONVOLUTION)(F.conv2d(x, base, **CONVOLUTION), True, x)
    torch.testing.assert_close(y, F.conv2d(x, base + delta_weight(adapter), **CONVOLUTION), rtol=1e-5, atol=1e-4)


def test_middle_matrix_equals_the_three_convolutions():
    down, middle, up = random(3, 5, 1, 1), random(4, 3, 3, 3, seed=1), random(6, 4, seed=2)
    x = random(2, 5, 8, 8, seed=3)
    expected = F.conv2d(F.conv2d(F.conv2d(x, down), middle, **CONVOLUTION), up[..., None, None])
    made = stack(Factors(merge_middle(down, middle), up), convolution=CONVOLUTION)
    torch.testing.assert_close(made(torch.zeros_like(expected), True, x), expected, rtol=1e-5, atol=1e-4)


def test_rows_of_a_fused_layer():
    """q, k and v of one adapter and a whole-layer adapter on the same fused layer: each writes its own rows."""
    q, v = factors(rank=2, rows=(0, 2), seed=1), factors(rank=3, rows=(4, 2), seed=2)
    everything = factors(6, 5, 2, seed=3)
    x = random(4, 5, seed=4)
    merged = 0.5 * (whole(q, (6, 5)) + whole(v, (6, 5))) - 2.0 * whole(everything, (6, 5))
    torch.testing.assert_close(added(stack([q, v], everything, strengths=[0.5, -2.0]), x), F.linear(x, merged), rtol=1e-5, atol=1e-5)
    assert torch.count_nonzero(added(stack([q, v]), x)[:, 2:4]) == 0


@given(strength=st.floats(-8, 8, width=16, allow_subnormal=False), power=st.integers(-3, 3), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_linear_and_odd_in_the_strength(strength, power, seed):
    made, x = stack(factors(seed=seed)), random(4, 5, seed=seed + 3)
    made.set_strengths([strength])
    once = added(made, x)
    made.set_strengths([-strength])
    assert torch.equal(added(made, x), -once)
    made.set_strengths([strength * 2.0**power])
    assert torch.equal(added(made, x), once * 2.0**power)


def test_alpha_over_rank_scales():
    x = random(4, 5)
    four, one, none = (added(stack(factors(rank=4, scale=scale)), x) for scale in (4 / 4, 1 / 4, 1.0))
    assert torch.equal(four, 4 * one)
    assert torch.equal(none, four)


def test_order_of_adapters_does_not_matter():
    adapters = [factors(rank=rank, seed=rank) for rank in (1, 2, 3)]
    x = random(4, 5)
    one = added(stack(*adapters, strengths=[0.5, -1.0, 2.0]), x)
    other = added(stack(*adapters[::-1], strengths=[2.0, -1.0, 0.5]), x)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_an_adapter_and_its_negation_cancel():
    adapter, x = factors(rank=4), random(4, 5)
    assert added(stack(adapter, adapter, strengths=[1.7, -1.7]), x).abs().max() <= 1e-6 * x.abs().max()


def test_norm_of_many_grows_as_their_alignment_says():
    """k orthonormal deltas add up to norm sqrt(k), k equal ones to k."""
    count, size = 5, 8
    axes = torch.eye(size)
    apart = [Factors(axes[i : i + 1], axes[:, i : i + 1]) for i in range(count)]
    same = [apart[0]] * count
    norms = [added(stack(*adapters), axes, size).norm().item() for adapters in (apart, same)]
    assert norms == pytest.approx([count**0.5, count])


def test_strength_zero_adds_nothing_even_to_a_neighbour():
    adapters = [factors(seed=1), factors(seed=9)]
    x = random(4, 5)
    torch.testing.assert_close(added(stack(*adapters, strengths=[0.0, 1.0]), x), added(stack(adapters[1]), x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_half_precision_stays_in_its_format(dtype, tolerance, kernel):
    adapter = factors(6, 5, 3, scale=0.5, kernel=kernel)
    options = CONVOLUTION if kernel else None
    x = random(2, 5, 8, 8) if kernel else random(7, 5)
    expected = F.conv2d(x, delta_weight(adapter), **CONVOLUTION) if kernel else F.linear(x, delta_weight(adapter))
    y = stack(adapter, dtype=dtype, convolution=options)(torch.zeros_like(expected, dtype=dtype), True, x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_follows_a_layer_that_computes_in_another_dtype(kernel):
    adapter = factors(6, 5, 3, kernel=kernel)
    made = stack(adapter, dtype=torch.bfloat16, convolution=CONVOLUTION if kernel else None)
    x = random(2, 5, 8, 8) if kernel else random(7, 5)
    y = torch.zeros(2, 6, 4, 4) if kernel else torch.zeros(7, 6)
    assert made(y, True, x).dtype == torch.float32
    # An output kept in more precision than the input keeps it.
    assert made(y.double(), True, x).dtype == torch.float64


class TestDoRA:
    """Against the merged weights c (W + s B A), c = m / ||W||, with the layer's own weights and bias."""

    SHAPES = {"linear": (6, 5), "convolution": (6, 5, 3, 3)}

    def made(self, kernel=(), rows=None, seed=10):
        """The layer's weight and bias, a DoRA, and the weight that it stands for, written out."""
        plain = factors(kernel=kernel, rows=rows, scale=0.4, seed=seed)
        weight, bias = random(6, 5, *kernel, seed=1), random(6, seed=2)
        magnitude = random(len(plain.up), *[1] * (1 + len(kernel)), seed=seed + 2).abs() + 0.5
        first, count = rows or (0, 6)
        own = weight[first : first + count]
        merged = weight.clone()
        flat = own.flatten(1).norm(dim=1).view(-1, *[1] * (own.ndim - 1))
        merged[first : first + count] = magnitude.view(flat.shape) / flat * (own + delta_weight(plain))
        return weight, bias, decomposed(plain, magnitude, weight.flatten(1).norm(dim=1), bias), merged

    def run(self, weight, bias, x, kernel=()):
        return F.conv2d(x, weight, bias, **CONVOLUTION) if kernel else F.linear(x, weight, bias)

    def x(self, kernel=()):
        return random(2, 5, 8, 8, seed=3) if kernel else random(2, 16, 5, seed=3)

    @pytest.mark.parametrize("kernel", [(), (3, 3)])
    @pytest.mark.parametrize("rows", [None, (2, 3)])
    @pytest.mark.parametrize("strength", [1.0, 0.5, -2.0, 0.0])
    def test_equals_the_merged_weight(self, kernel, rows, strength):
        weight, bias, dora, merged = self.made(kernel, rows)
        x = self.x(kernel)
        y = stack(dora, strengths=[strength], convolution=CONVOLUTION if kernel else None)(self.run(weight, bias, x, kernel), True, x)
        expected = self.run(weight + strength * (merged - weight), bias, x, kernel)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kernel", [(), (3, 3)])
    def test_several_and_plain_ones_beside_it_add_up(self, kernel):
        """Each is about the layer's own output, whatever order they were given in."""
        weight, bias, one, first = self.made(kernel, (0, 4))
        _, _, other, second = self.made(kernel, None, seed=30)
        plain = factors(kernel=kernel, seed=50)
        x = self.x(kernel)
        expected = weight + 0.7 * (first - weight) - 0.4 * (second - weight) + 1.5 * delta_weight(plain)
        for adapters, strengths in [((one, other, plain), (0.7, -0.4, 1.5)), ((plain, other, one), (1.5, -0.4, 0.7))]:
            made = stack(*adapters, strengths=strengths, convolution=CONVOLUTION if kernel else None)
            y = made(self.run(weight, bias, x, kernel), True, x)
            torch.testing.assert_close(y, self.run(expected, bias, x, kernel), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("worth", [0.0, 100.0], ids=["together", "apart"])
    @pytest.mark.parametrize("kernel", [(), (3, 3)])
    def test_in_its_place(self, monkeypatch, kernel, worth):
        """The masked sum of the outputs of the merged weights; one more adapter acts everywhere."""
        monkeypatch.setattr(Stack, "WORTH", worth)
        weight, bias, one, first = self.made(kernel)
        _, _, other, second = self.made(kernel, seed=30)
        _, _, everywhere, third = self.made(kernel, seed=60)
        x = self.x(kernel)
        rows = torch.zeros(2, 1, 16)
        rows[0, 0, :5], rows[1, 0, 9:] = 1.0, 0.25
        made = stack(one, other, everywhere, convolution=CONVOLUTION if kernel else None)
        made.set_strengths([0.8, 1.0, -0.5], [0, 1, None], Shares(rows))
        y = made(self.run(weight, bias, x, kernel), True, x)
        shares = [row.view(1, 4, 4) if kernel else row.view(16, 1) for row in rows]
        base = self.run(weight, bias, x, kernel)
        expected = base - 0.5 * (self.run(third, bias, x, kernel) - base)
        for share, strength, merged in zip(shares, (0.8, 1.0), (first, second), strict=True):
            expected = expected + strength * share * (self.run(merged, bias, x, kernel) - base)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    def test_rows_past_those_that_are_shared_out(self):
        """Text after the picture's tokens has the adapters without a place only; a shorter sequence too, and it is told."""
        weight, bias, one, _ = self.made()
        _, _, everywhere, third = self.made(seed=60)
        made, shares = stack(one, everywhere), Shares(torch.ones(1, 1, 10))
        made.set_strengths([1.0, 1.0], [0, None], shares)
        x = self.x()
        y = made(self.run(weight, bias, x), True, x)
        torch.testing.assert_close(y[:, 10:], self.run(third, bias, x)[:, 10:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y[:, :10], self.run(third, bias, x)[:, :10], atol=1e-2)
        short = x[:, :6]
        torch.testing.assert_close(made(self.run(weight, bias, short), True, short), self.run(third, bias, short), rtol=1e-4, atol=1e-4)
        assert shares.missed

    def test_one_row_for_each_picture(self):
        weight, bias, one, merged = self.made()
        x = random(2, 5, seed=3)
        made = stack(one)
        made.set_strengths([1.0], [0], Shares(torch.tensor([[[0.3]]])))
        base = self.run(weight, bias, x)
        torch.testing.assert_close(made(base.clone(), True, x), base + 0.3 * (self.run(merged, bias, x) - base), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("rows", [None, (2, 3)])
    def test_what_it_adds_to_the_weight(self, rows):
        weight, _, dora, merged = self.made(rows=rows)
        torch.testing.assert_close(whole(dora, (6, 5), weight), merged - weight, rtol=1e-4, atol=1e-5)
        assert delta_square(dora, weight) == pytest.approx(float((merged - weight).square().sum()), rel=1e-4)

    def test_an_output_without_weights_is_left_at_its_length(self):
        plain, lengths = factors(), torch.ones(6)
        lengths[2] = 1e-9
        dora = decomposed(plain, torch.full((6, 1), 2.0), lengths)
        assert dora.gain.tolist() == [1, 1, 0, 1, 1, 1]
        assert torch.equal(dora.up[2], plain.up[2])

    def test_half_precision(self):
        weight, bias, dora, merged = self.made()
        x = self.x()
        y = stack(dora, dtype=torch.bfloat16)(self.run(weight, bias, x).bfloat16(), True, x.bfloat16())
        expected = self.run(merged, bias, x)
        assert y.dtype == torch.bfloat16
        assert (y.float() - expected).abs().max() <= 2e-2 * expected.abs().max()


class TestWritingInPlace:
    def test_fresh_output_is_written(self):
        x, y = random(3, 5), torch.zeros(3, 6)
        assert stack(factors())(y, True, x) is y

    def test_output_that_others_hold_is_not(self):
        x, y = random(3, 5), torch.zeros(3, 6)
        result = stack(factors())(y, False, x)
        assert result is not y
        assert torch.count_nonzero(y) == 0
        assert torch.equal(result, added(stack(factors()), x))

    def test_output_that_is_a_view_of_more_is_copied(self):
        x, wide = random(3, 5), torch.zeros(3, 12)
        result = stack(factors())(wide[:, :6], True, x)
        assert torch.count_nonzero(wide) == 0
        assert torch.equal(result, added(stack(factors()), x))


def test_gradients_reach_the_input():
    """Nodes that train or guide through the model differentiate through what is added."""
    made, x = stack(factors(), dtype=torch.float64), random(3, 5, dtype=torch.float64).requires_grad_()
    base = random(6, 5, seed=8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: made(F.linear(x, base), True, x), (x,))


def test_gradients_under_weights_made_in_inference_mode():
    """The host runs its nodes in inference mode, so a file's tensors are inference tensors; a run outside of it must still work."""
    with torch.inference_mode():
        adapter = factors()
    x = random(3, 5).requires_grad_()
    stack(adapter)(F.linear(x, random(6, 5, seed=8)), True, x).sum().backward()
    assert x.grad is not None
