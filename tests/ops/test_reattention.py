"""Latent re-attention against the Fourier transform of the whole map."""

import pytest
import torch

from concept_nodes.ops.reattention import Waves, low, reattended

SIZES = [(8, 8), (6, 10), (7, 9), (5, 4), (1, 1), (1, 6), (2, 2), (3, 2)]


def maps(height, width, seed=0, n=2, channels=3):
    return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def is_low(height, width, radius):
    """(height, width) bool, in the order of torch.fft."""
    ys, xs = (torch.fft.fftfreq(size, 1 / size).abs() for size in (height, width))
    return (ys[:, None] <= radius) & (xs[None] <= radius)


def whole(safe, original, scale, radius):
    """The published equation on the whole transform, with lengths compared."""
    f, o = (torch.fft.fft2(one.double()) for one in (safe, original))
    hit = is_low(*safe.shape[-2:], radius) & (f.abs() > o.abs() + 1e-9)
    return torch.fft.ifft2(torch.where(hit, scale * f, f))


@pytest.mark.parametrize("radius", [0, 1, 2, 20])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_equation(size, radius):
    safe, original, waves = maps(*size), maps(*size, seed=1), Waves.of(*size, radius)
    found = reattended(safe, low(original, waves), 0.2, waves)
    expected = whole(safe, original, 0.2, radius)
    assert found.dtype == safe.dtype and found.shape == safe.shape
    assert float(expected.imag.abs().max()) < 1e-12, "the equation makes a real map complex"
    torch.testing.assert_close(found, expected.real.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_only_low_frequencies_that_exceed_change(size):
    safe, original, waves = maps(*size), maps(*size, seed=1), Waves.of(*size, 1)
    before, after, other = (torch.fft.fft2(one.double()) for one in (safe, reattended(safe, low(original, waves), 0.5, waves), original))
    exceeds = is_low(*size, 1) & (before.abs() > other.abs() + 1e-9)
    assert exceeds.any() and not exceeds.all()
    torch.testing.assert_close(after[exceeds], 0.5 * before[exceeds], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[~exceeds], before[~exceeds], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_nothing(size):
    safe, waves = maps(*size), Waves.of(*size, 1)
    assert reattended(safe, low(maps(*size, seed=1), waves), 1.0, waves) is safe
    assert torch.equal(reattended(safe, low(safe, waves), 0.2, waves), safe)
    assert torch.equal(reattended(safe, 1.001 * low(safe, waves), 0.2, waves), safe)


def test_rows_that_exceed_nowhere_stay_as_they_are():
    safe, waves = maps(6, 10), Waves.of(6, 10, 1)
    original = low(safe, waves)
    original[1] *= 0.5
    found = reattended(safe, original, 0.2, waves)
    assert torch.equal(found[0], safe[0]) and not torch.equal(found[1], safe[1])


def test_what_rounding_makes_does_not_count():
    """The same map from a call of another batch size differs in its last digits."""
    safe = maps(16, 16) + 1.0
    waves = Waves.of(16, 16, 1)
    original = low(safe * (1 - 1e-6), waves)
    assert not torch.equal(reattended(safe, original, 0.2, waves), safe)
    assert torch.equal(reattended(safe, original, 0.2, waves, rounding=1e-5), safe)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    safe, original, waves = maps(7, 9).to(dtype), maps(7, 9, seed=1).to(dtype), Waves.of(7, 9, 1)
    found = reattended(safe, low(original, waves), 0.2, waves)
    assert found.dtype == dtype and found.isfinite().all()
    assert torch.equal(found, reattended(safe.float(), low(original.float(), waves), 0.2, waves).to(dtype))


def test_each_pair_of_frequencies_is_there_once():
    assert [len(Waves.of(8, 8, radius).weights) // 2 for radius in (0, 1, 2)] == [1, 5, 13]
    assert len(Waves.of(2, 2, 5).weights) // 2 == 4 and len(Waves.of(1, 1, 5).weights) // 2 == 1
