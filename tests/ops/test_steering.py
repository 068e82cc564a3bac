"""The equations of steering, against what they promise and against dense sparse autoencoders written out here."""

import math

import pytest
import torch

from concept_nodes.ops.steering import (
    ABLATE,
    ADD,
    CLAMP,
    MODES,
    SCALE,
    Directions,
    Scale,
    Steer,
    capped,
    course,
    kept,
    mean_difference,
    threshold,
    together,
)

ROWS = (2, 6, 8)  # B, T, d


def seeded(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def amount(value):
    return torch.tensor(float(value))


class Autoencoder:
    """Of n latents on d numbers: relu(W (x - b) + c) above thresholds, decoded with D."""

    def __init__(self, n=20, d=8):
        self.encoder, self.decoder = seeded((n, d), 1), seeded((n, d), 2)
        self.bias, self.before, self.thresholds = seeded((n,), 3), seeded((d,), 4), torch.rand(n) * 0.5

    def encode(self, x):
        z = (x - self.before) @ self.encoder.T + self.bias
        return torch.where(z > self.thresholds, z, torch.zeros(())).relu()

    def decode(self, z):
        return z @ self.decoder + self.before

    def chosen(self, at, weights=None) -> Directions:
        bias = self.bias - self.encoder @ self.before
        weights = torch.ones(len(at)) if weights is None else weights
        return Directions(self.decoder[at], weights, self.encoder[at], bias[at], self.thresholds[at])


def dense(m=2, d=8, positions=None) -> tuple[Directions, Scale]:
    write = torch.linalg.qr(seeded((d, m), 5))[0].T
    mean = seeded((d,), 6)
    return Directions(write, torch.ones(m), write, -(write @ mean), None, positions), Scale(torch.full((m,), 1.5), torch.zeros(m))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("most", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_strength_0_is_exactly_nothing(mode, most, keep):
    x = seeded(ROWS, 7)
    for directions, scale in (dense(), (Autoencoder().chosen([3, 5]), Scale(torch.ones(2), torch.zeros(2)))):
        steer = Steer(directions, mode, 0.7, keep, most)
        assert torch.equal(x + together(x, [steer], [amount(0)], [scale], [None]), x)
        nowhere = torch.zeros(1, ROWS[1])
        assert torch.equal(x + together(x, [steer], [amount(3)], [scale], [nowhere]), x)
        assert not torch.equal(x + together(x, [steer], [amount(3)], [scale], [None]), x)


def test_by_difference_is_decoding_the_changed_code_with_the_error_kept():
    sae, x, at = Autoencoder(), seeded(ROWS, 8), [1, 4, 9, 17]
    scale = Scale(torch.rand(4) + 0.5, torch.zeros(4))
    z = sae.encode(x)
    assert 0 < int((z[..., at] > 0).sum()) < z[..., at].numel()
    for mode, s, changed in (
        (ADD, 0.8, lambda z: z + 0.8 * scale.unit),
        (SCALE, 1.5, lambda z: 2.5 * z),
        (CLAMP, 1.0, lambda z: 0.6 * scale.unit.expand_as(z)),
        (ABLATE, 1.0, lambda z: torch.zeros_like(z)),
    ):
        after = z.clone()
        after[..., at] = changed(z[..., at])
        expected = sae.decode(after) + (x - sae.decode(z))
        moved = x + Steer(sae.chosen(at), mode, 0.6).change(x, amount(s), scale)
        torch.testing.assert_close(moved.expand_as(x), expected, rtol=1e-5, atol=1e-5)


def test_scaling_to_nothing_holding_at_nothing_and_ablating_are_one():
    sae, x = Autoencoder(), seeded(ROWS, 9)
    scale = Scale(torch.ones(3), torch.zeros(3))
    directions = sae.chosen([2, 6, 11])
    changes = [Steer(directions, mode, 0.0).change(x, amount(s), scale) for mode, s in ((SCALE, -1), (CLAMP, 1), (ABLATE, 1))]
    torch.testing.assert_close(changes[0], changes[1])
    torch.testing.assert_close(changes[0], changes[2])


def test_steers_add_up_whatever_their_order():
    x = seeded(ROWS, 10)
    directions, scale = dense()
    adds = [Steer(directions, ADD) for _ in range(2)]
    one = together(x, adds[:1], [amount(1.7)], [scale], [None])
    torch.testing.assert_close(together(x, adds, [amount(1.0), amount(0.7)], [scale] * 2, [None] * 2), one)
    mixed = [Steer(directions, ADD, keep=True), Steer(directions, ABLATE), Steer(directions, SCALE, most=0.1)]
    strengths = [amount(s) for s in (0.5, 1.0, -0.6)]
    there = together(x, mixed, strengths, [scale] * 3, [None] * 3)
    back = together(x, mixed[::-1], strengths[::-1], [scale] * 3, [None] * 3)
    torch.testing.assert_close(there, back)


def test_change_is_linear_in_strength():
    x = seeded(ROWS, 11)
    for mode in MODES:
        directions, scale = dense()
        steer = Steer(directions, mode, 0.3)
        torch.testing.assert_close(steer.change(x, amount(2.4), scale), 3 * steer.change(x, amount(0.8), scale))


def test_ablation_is_one_sided():
    directions, scale = dense(1)
    x = seeded(ROWS, 12)
    z = directions.activations(x)
    after = directions.activations(x + Steer(directions, ABLATE).change(x, amount(1), scale))
    torch.testing.assert_close(after, z.clamp(max=0))
    assert bool((z < 0).any()) and bool((z > 0).any())


def test_a_dense_direction_is_set_to_what_is_asked():
    directions, scale = dense(1)
    x = seeded(ROWS, 13)
    held = directions.activations(x + Steer(directions, CLAMP, 0.4).change(x, amount(1), scale))
    torch.testing.assert_close(held, torch.full_like(held, 0.4 * 1.5))


def test_lengths_are_kept_and_changes_capped():
    x, delta = seeded(ROWS, 14), seeded(ROWS, 15) * 3
    torch.testing.assert_close((x + kept(x, delta)).norm(dim=-1), x.norm(dim=-1))
    turned = torch.cosine_similarity(x + kept(x, delta), x + delta, dim=-1)
    torch.testing.assert_close(turned, torch.ones_like(turned))
    shares = capped(delta, x, 0.5).norm(dim=-1) / x.norm(dim=-1)
    assert float(shares.max()) <= 0.5 + 1e-6
    small = delta * 1e-3
    assert torch.equal(capped(small, x, 0.5), small)
    blank = torch.zeros_like(x)
    assert torch.equal(blank + kept(blank, blank), blank) and bool(capped(delta, blank, 0.5).isfinite().all())


def test_shares_are_of_each_row_and_may_be_against():
    x = seeded(ROWS, 16)
    directions, scale = dense()
    share = torch.tensor([[0, 0.5, 1, 1, 1, 1.0], [-1] * 6])
    steer = Steer(directions, ADD)
    whole = steer.change(x, amount(1), scale).expand(1, 6, -1)
    torch.testing.assert_close(steer.change(x, amount(1), scale, share), whole * share[..., None])


def test_positions_have_directions_of_their_own():
    x = seeded(ROWS, 17)
    directions, scale = dense(3, positions=torch.tensor([1, 4, -1]))
    moved = Steer(directions, ADD).change(x, amount(1), scale)
    write = directions.write * 1.5
    expected = torch.stack([write[2] + (write[0] if t == 1 else 0) + (write[1] if t == 4 else 0) for t in range(6)])
    torch.testing.assert_close(moved, expected)


class TestIdentity:
    """With W_enc = W_dec = 1, no bias and rows that are not negative, directions are the concept's rows themselves."""

    x_c = seeded((6, 8), 18).abs()

    def directions(self) -> Directions:
        return Directions(self.x_c, torch.ones(6), torch.zeros(6, 8), torch.zeros(6), None, torch.arange(6))

    def test_adds_the_concepts_own_rows(self):
        x = seeded(ROWS, 19)
        scale = Scale(torch.ones(6), torch.zeros(6))
        torch.testing.assert_close(x + Steer(self.directions()).change(x, amount(0.7), scale), x + 0.7 * self.x_c)

    def test_takes_a_prompt_that_is_the_concept_to_nothing(self):
        scale = Scale(torch.ones(6), torch.zeros(6))
        moved = self.x_c + Steer(self.directions()).change(self.x_c[None], amount(-1), scale)
        torch.testing.assert_close(moved, torch.zeros(6, 8), atol=1e-6, rtol=0)


def test_tables_go_by_noise_level_in_straight_lines_of_its_logarithm():
    sigmas, table = torch.tensor([10.0, 1.0, 0.1]), torch.tensor([[1.0, 0], [3.0, 6], [7.0, 0]])
    levels = {50: [1, 0], 10: [1, 0], math.sqrt(10): [2, 3], 1: [3, 6], 10**-0.5: [5, 3], 0.01: [7, 0], 0: [7, 0]}
    for sigma, expected in levels.items():
        torch.testing.assert_close(course(sigmas, table, float(sigma)), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    assert torch.equal(course(torch.zeros(1), table[:1], 3.0), table[0])


def test_a_planted_direction_is_found_and_swapping_turns_it():
    planted = torch.nn.functional.normalize(seeded((16,), 20), dim=0)
    base = seeded((3, 16), 21)
    sizes = torch.tensor([5.0, 2.0, 0.5])
    direction, lengths = mean_difference(base + sizes[:, None] * planted, base)
    torch.testing.assert_close(direction, planted)
    torch.testing.assert_close(lengths, sizes)
    torch.testing.assert_close(mean_difference(base, base + sizes[:, None] * planted)[0], -planted)
    torch.testing.assert_close(mean_difference(7 * (base + sizes[:, None] * planted), 7 * base)[0], planted)
    with pytest.raises(ValueError, match="nothing differs"):
        mean_difference(base, base)
    with pytest.raises(ValueError, match="cancel"):
        mean_difference(base[:2] + torch.tensor([[1.0], [-2.0]]) * planted, base[:2])


def test_a_threshold_separates_what_can_be_separated():
    assert threshold(torch.tensor([0.9, 1.3]), torch.tensor([-0.1, 0.3])) == pytest.approx(0.6)
    assert threshold(torch.tensor([0.2, 1.0, 1.2]), torch.tensor([0.0, 0.1, 0.5])) == pytest.approx(0.55)
