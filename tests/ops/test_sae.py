"""Sparse autoencoders: their algebra, what training finds in vectors of a known make, and the published slips, which fail here."""

import math

import pytest
import torch
from torch.nn.functional import linear, normalize

from concept_nodes.ops import sae_find
from concept_nodes.ops.sae import ACTIVATIONS, BATCH_TOPK, JUMPRELU, RELU, SAE, TOPK, kept_of_batch, prefixes
from concept_nodes.ops.sae_training import (
    KINDS,
    MATRYOSHKA,
    NORMALISATIONS,
    Heaviside,
    JumpReLU,
    Ring,
    Settings,
    Trainer,
    auxiliary_loss,
    geometric_median,
    measure,
    normalisation,
    whitening,
)

D, N, K = 24, 80, 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(activation=TOPK, threshold=None, normalised=True, center=True, dtype=torch.float32):
    """An autoencoder of random numbers, with rows of any length."""
    norms = {"mean": random(D, seed=5), "std": random(D, seed=6).abs() + 0.5} if normalised else {}
    sae = SAE(
        random(N, D), random(N, seed=1), random(N, D, seed=2), random(D, seed=3), activation, K if activation in (TOPK, BATCH_TOPK) else 0,
        threshold, center, **norms,
    )  # fmt: skip
    return sae.to(dtype=dtype)


def thresholds():
    return random(N, seed=4).abs() + 1


def below(number):
    return torch.nextafter(number, torch.zeros(()))


KINDS_OF_CODE = {
    "topk": made(),
    "as it came": made(normalised=False),
    "not centred": made(center=False),
    "batch, no threshold": made(BATCH_TOPK),
    "batch": made(BATCH_TOPK, torch.tensor(6.0)),
    "jumprelu": made(JUMPRELU, thresholds()),
    "relu": made(RELU),
}
each = pytest.mark.parametrize("sae", KINDS_OF_CODE.values(), ids=KINDS_OF_CODE)


class TestAlgebra:
    @each
    def test_against_the_equations_in_float64(self, sae):
        x = random(7, D, seed=9).double()
        own = {name: value.double() for name, value in sae._asdict().items() if isinstance(value, torch.Tensor)}
        scaled = (x - own.get("mean", 0)) / own.get("std", 1)
        pre = (scaled - (own["b_dec"] if sae.center else 0)) @ own["W_enc"].T + own["b_enc"]
        z = pre.clamp_min(0)
        if sae.counts:
            z = torch.where(pre >= pre.sort(-1, descending=True).values[:, K - 1 : K], z, 0)
        elif sae.threshold is not None:
            z = torch.where(pre > own["threshold"], z, 0)
        rebuilt = (z @ own["W_dec"] + own["b_dec"]) * own.get("std", 1) + own.get("mean", 0)
        torch.testing.assert_close(sae.pre(x), pre)
        torch.testing.assert_close(sae.encode(x), z)
        torch.testing.assert_close(sae.decode(z), rebuilt)
        torch.testing.assert_close(sae.decode(sae.encode(x.float())), rebuilt.float(), rtol=1e-4, atol=1e-4)

    @each
    def test_sparse_is_dense(self, sae):
        x = random(3, 11, D, seed=9)
        z, (values, indices) = sae.encode(x), sae.sparse(x)
        assert values.shape == indices.shape and values.shape[:2] == (3, 11)
        assert torch.equal(torch.zeros_like(z).scatter_add(-1, indices, values), z)
        torch.testing.assert_close(sae.decode_sparse(values, indices), sae.decode(z), rtol=1e-5, atol=1e-4)

    @each
    def test_a_change_is_worth_what_decoding_says(self, sae):
        """x + delta is decode(z') + (x - x^), so that no change is nothing; the published slip (x^ - x kept instead) is something else."""
        x, z = random(9, D, seed=9), sae.encode(random(9, D, seed=9))
        changed = z * random(9, N, seed=7)
        steered = x + sae.delta(changed - z)
        close = {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(steered, sae.decode(changed) + (x - sae.decode(z)), **close)
        assert torch.equal(x + sae.delta(z - z), x)
        published = sae.decode(changed) + (sae.decode(z) - x)
        assert float((published - steered).norm() / steered.norm()) > 0.1
        unchanged = sae.decode(z) + (sae.decode(z) - x)
        torch.testing.assert_close(unchanged, 2 * sae.decode(z) - x, **close)
        assert float((unchanged - x).norm() / x.norm()) > 0.1

    @each
    def test_scaling_to_nothing_clamping_to_nothing_and_taking_out_are_one(self, sae):
        x = random(9, D, seed=9)
        z, chosen = sae.encode(x), torch.tensor([3, 40, 41, 77])
        clamped = z.clone()
        clamped[:, chosen] = 0
        out = x - z[:, chosen] @ sae.directions(chosen)
        torch.testing.assert_close(x + sae.delta((0.0 - 1) * z[:, chosen], chosen), out, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(x + sae.delta(clamped - z), out, rtol=1e-5, atol=1e-4)
        assert torch.equal(x + sae.delta((1.0 - 1) * z[:, chosen], chosen), x)

    @each
    def test_one_unit_of_a_latent_adds_its_direction(self, sae):
        z, chosen = random(1, N, seed=9).abs(), torch.tensor([2, 9])
        for row, direction in zip(chosen, sae.directions(chosen), strict=True):
            more = z.clone()
            more[:, row] += 1
            torch.testing.assert_close(sae.decode(more) - sae.decode(z), direction[None], rtol=1e-4, atol=1e-4)

    @each
    def test_chosen_latents_alone(self, sae):
        x, chosen = random(2, 3, D, seed=9), torch.tensor([70, 0, 33])
        torch.testing.assert_close(sae.pre(x, chosen), sae.pre(x)[..., chosen])
        if sae.counts:
            with pytest.raises(ValueError, match="need the rest"):
                sae.act(sae.pre(x, chosen), chosen)
        else:
            torch.testing.assert_close(sae.act(sae.pre(x, chosen), chosen), sae.encode(x)[..., chosen])

    @each
    @pytest.mark.parametrize("shape", [(), (4,), (2, 3, 5), (0,), (0, 7)])
    def test_any_shape_before_the_last(self, sae, shape):
        x = random(*shape, D, seed=9)
        z = sae.encode(x)
        assert z.shape == (*shape, N)
        assert sae.decode(z).shape == sae.decode_sparse(*sae.sparse(x)).shape == sae.delta(z).shape == x.shape
        torch.testing.assert_close(z.reshape(-1, N), sae.encode(x.reshape(-1, D)))

    @each
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_weights_and_half_vectors(self, sae, dtype):
        """Sums are exact to float32: what is off is the weights' and vectors' own rounding, not 80 roundings on the way."""
        half, x = sae.to(dtype=dtype), random(50, D, seed=9)
        assert half.b_dec.dtype == torch.float32 and half.W_dec.dtype == dtype
        size = 2**-8 if dtype == torch.bfloat16 else 2**-11
        torch.testing.assert_close(half.pre(x), sae.pre(x), rtol=0, atol=8 * size * float(sae.pre(x).std()))
        z = sae.encode(x)
        for values in (half.decode(z), half.decode_sparse(*sae.sparse(x))):
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, sae.decode(z), rtol=0, atol=8 * size * float(sae.decode(z).std()))
        assert half.encode(x.to(dtype)).dtype == torch.float32

    def test_topk_keeps_k_and_none_below_zero(self):
        sae, x = made(), random(200, D, seed=9)
        active = (sae.encode(x) > 0).sum(-1)
        assert int(active.max()) == K
        low = sae._replace(b_enc=sae.b_enc - 12)
        z = low.encode(x)
        assert int((z > 0).sum(-1).min()) < K and float(z.min()) == 0.0

    def test_batch_topk_keeps_k_for_each_of_the_batch_and_its_threshold_is_what_was_least(self):
        pre = made().pre(random(40, D, seed=9))
        kept = kept_of_batch(pre, K)
        counts = (kept > 0).sum(-1)
        assert int(counts.sum()) == 40 * K and int(counts.min()) < K < int(counts.max())
        least = kept[kept > 0].min()
        for threshold, fewer in ((below(least), 0), (least, 1)):
            assert int((made(BATCH_TOPK, threshold).act(pre) > 0).sum()) == 40 * K - fewer

    def test_a_threshold_at_the_kth_value_is_topk(self):
        x = random(1, D, seed=9)
        kth = made().pre(x).topk(K).values[0, -1]
        assert torch.equal(made(JUMPRELU, below(kth)).encode(x), made().encode(x))

    def test_prefixes_are_nested(self):
        sae, sizes = made(normalised=False), [2, 3, 25, 50]
        z = sae.encode(random(6, D, seed=9))
        sums = prefixes(z, sae.W_dec, sizes)
        for end, total in zip((2, 5, 30, 80), sums, strict=True):
            first = torch.where(torch.arange(N) < end, z, 0)
            torch.testing.assert_close(total + sae.b_dec, sae.decode(first), rtol=1e-5, atol=1e-4)

    def test_many_vectors_are_taken_in_parts(self, monkeypatch):
        from concept_nodes.ops import sae as module

        whole = {name: sae.sparse(random(30, D, seed=9)) for name, sae in KINDS_OF_CODE.items()}
        monkeypatch.setattr(module, "HELD", 4 * N)
        for name, sae in KINDS_OF_CODE.items():
            values, indices = sae.sparse(random(30, D, seed=9))
            torch.testing.assert_close(values.sort(-1).values, whole[name][0].sort(-1).values)
            torch.testing.assert_close(sae.decode_sparse(values, indices), sae.decode_sparse(*whole[name]), rtol=1e-5, atol=1e-4)

    def test_all_kinds_are_covered(self):
        assert {sae.activation for sae in KINDS_OF_CODE.values()} == set(ACTIVATIONS)


def packed(count, d, seed=0):
    """(count, d) unit vectors as far from one another as they will go."""
    atoms = random(count, d, seed=1000 + seed).requires_grad_()
    optimizer = torch.optim.Adam([atoms], lr=0.01)
    for _ in range(400):
        cosines = normalize(atoms, dim=1) @ normalize(atoms, dim=1).T - torch.eye(count)
        optimizer.zero_grad()
        (cosines**8).sum().backward()
        optimizer.step()
    return normalize(atoms.detach(), dim=1)


class World:
    """Vectors x = sum a_i g_i of 3 of 64 directions in 32 dimensions, a from .7 to 1.3. The directions lie apart (cosines up to .17)
    because an encoder is one matrix: begun at the truth, random ones (cosines up to .6) with a from .5 to 1.5 leave .044 of the variance
    whatever is learnt.
    """

    def __init__(self, seed=0, count=64, d=32, active=3):
        self.atoms, self.active = packed(count, d, seed), active

    def draw(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(count, len(self.atoms), generator=generator).topk(self.active).indices
        sizes = 0.7 + 0.6 * torch.rand(count, self.active, generator=generator)
        return torch.zeros(count, len(self.atoms)).scatter(1, chosen, sizes) @ self.atoms

    def trained(self, steps=3000, batch=512, shift=0.0, **options):
        trainer = Trainer(Settings(**{"n": 64, "k": 3, "steps": steps, "batch": batch} | options), self.draw(8192, 1) + shift)
        for step in range(steps):
            trainer.step(self.draw(batch, 100 + step) + shift)
        return trainer

    def found(self, sae):
        """(64,) of each direction, the cosine of the latent nearest to it."""
        return (self.atoms @ normalize(sae.directions(torch.arange(sae.n)), dim=1).T).amax(1)


@pytest.fixture(scope="module")
def world():
    return World()


class TestTraining:
    @pytest.mark.parametrize(
        "kind, steps, fvu", [(TOPK, 3000, 0.03), (BATCH_TOPK, 2000, 0.06), (JUMPRELU, 2000, 0.06), (MATRYOSHKA, 2000, 0.08)]
    )
    def test_the_directions_that_vectors_are_made_of_are_found(self, world, kind, steps, fvu):
        """Only topk knows that there are three in each vector."""
        sae = world.trained(kind=kind, steps=steps).sae()
        metrics = measure(sae, [world.draw(4096, 7)]).metrics
        assert float(world.found(sae).mean()) > 0.95 and metrics.fvu < fvu and metrics.dead < 0.03
        assert metrics.l0 == pytest.approx(3, abs=0.3)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_seed_is_the_same_bit_for_bit_and_resumed_too(self, world, kind):
        first, second = (world.trained(30, 64, kind=kind, dead_after=128, seed=3) for _ in range(2))
        assert all(torch.equal(first.state()[name], tensor) for name, tensor in second.state().items())
        other = world.trained(30, 64, kind=kind, dead_after=128, seed=4)
        assert not torch.equal(first.sae().W_dec, other.sae().W_dec)

        settings = Settings(64, 3, kind, 30, 64, dead_after=128, seed=3)
        stopped = Trainer(settings, world.draw(8192, 1))
        for step in range(17):
            stopped.step(world.draw(64, 100 + step))
        resumed = Trainer(settings, world.draw(8192, 2))
        resumed.restore(stopped.state())
        for step in range(17, 30):
            resumed.step(world.draw(64, 100 + step))
        assert all(torch.equal(first.state()[name], tensor) for name, tensor in resumed.state().items())

    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_have_length_1_after_every_step(self, world, kind):
        rows = world.trained(20, 64, kind=kind).sae().W_dec.norm(dim=1)
        torch.testing.assert_close(rows, torch.ones(64), rtol=0, atol=1e-6)

    def test_nothing_along_a_row_reaches_the_optimiser(self, world):
        trainer = world.trained(1, 64)
        before = Trainer(trainer.settings, world.draw(8192, 1)).learnt["W_dec"].detach()
        moment = trainer.optimizer.state[trainer.learnt["W_dec"]]["exp_avg"]
        assert float(moment.norm()) > 0
        assert float((moment * before).sum(-1).abs().max()) < 1e-6 * float(moment.norm(dim=-1).max())

    @pytest.mark.parametrize("way", NORMALISATIONS)
    @pytest.mark.parametrize("centre", ["mean", "median"])
    def test_vectors_moved_are_vectors_rebuilt_moved(self, world, way, centre):
        """What drives x^ to x - b_dec, as one published trainer does, fails here."""
        shift = 3 * random(32, seed=8)
        options = {"steps": 300, "batch": 256, "normalise": way, "centre": centre}
        sae, x = world.trained(shift=shift, **options).sae(), world.draw(2000, 7)
        rebuilt = sae.decode(sae.encode(x + shift))
        assert float((rebuilt.mean(0) - shift - x.mean(0)).norm()) < 0.1
        assert measure(sae, [x + shift]).metrics.fvu < 0.2
        published = rebuilt - (sae.b_dec * sae.std + (0 if sae.mean is None else sae.mean))
        assert float((published.mean(0) - shift - x.mean(0)).norm()) > 1.0

    def test_vectors_of_any_size_train_alike(self, world):
        one, large = (Trainer(Settings(64, 3, batch=64), size * world.draw(4096, 1)) for size in (1.0, 1000.0))
        losses = [[trainer.step(size * world.draw(64, 9)).loss for _ in range(5)] for trainer, size in ((one, 1.0), (large, 1000.0))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    def test_what_is_not_finite_is_not_learnt_from(self, world):
        trainer = world.trained(5, 64)
        before = trainer.state()
        spoilt = world.draw(64, 5)
        spoilt[3, 4] = math.inf
        assert not trainer.step(spoilt).finite
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state().items())
        assert trainer.step(world.draw(64, 5)).finite

    def test_what_cannot_be_trained_on_is_told(self, world):
        for sample, told in ((torch.ones(5, 4), "the same"), (torch.ones(4), "two vectors"), (torch.full((3, 4), math.nan), "NaN")):
            with pytest.raises(ValueError, match=told):
                Trainer(Settings(8, 2), sample)
        for wrong, told in (
            ({"k": 0}, "k is 0"),
            ({"k": 9}, "from 1 to 8"),
            ({"kind": "lasso"}, "Choose one of"),
            ({"rate": math.nan}, "rate"),
        ):
            with pytest.raises(ValueError, match=told):
                Settings(**{"n": 8, "k": 2} | wrong).check()

    def test_the_rate_follows_the_number_of_latents(self):
        assert Settings(2**14, 32).full_rate() == pytest.approx(2e-4)
        assert Settings(2**12, 32).full_rate() == pytest.approx(4e-4)
        assert Settings(2**12, 32, rate=0.5).full_rate() == 0.5

    def test_groups_are_all_of_the_latents(self):
        assert Settings(64, 3).sizes() == [2, 2, 4, 8, 16, 32]
        for n in (1, 5, 31, 1000):
            assert sum(Settings(n, 1).sizes()) == n and min(Settings(n, 1).sizes()) > 0


class TestAuxiliary:
    """Dead latents are to take up what the others leave."""

    def test_a_step_makes_what_is_left_smaller(self, world):
        x = normalize(world.draw(256, 1), dim=1)
        W = random(64, 32, seed=2)
        rows = normalize(W, dim=1)
        pre, dead = linear(x, rows), torch.arange(64) >= 32
        living = torch.where(dead, 0, pre.clamp_min(0)) * 0.2
        error = x - living @ rows
        pre_dead = pre.masked_fill(~dead, -math.inf)
        values, chosen = pre_dead.topk(16)
        codes = torch.zeros_like(pre).scatter(-1, chosen, values.clamp_min(0))

        def left_after(target):
            learnt = torch.where(dead[:, None], 0, rows).requires_grad_()
            auxiliary_loss(pre, target, dead, learnt, 1.0).backward()
            assert bool((learnt.grad[~dead] == 0).all()) and bool((learnt.grad[dead] != 0).any())
            with torch.no_grad():
                return float((error - codes @ (0.05 * -learnt.grad)).square().sum())

        before = float(error.square().sum())
        assert left_after(error) < before
        assert left_after(-error) > before, "the published sign, x^ - x, is to fail"

    def test_living_latents_are_never_chosen(self):
        """Masked with 0 as published, a living latent is among the greatest of a vector in which no dead one is positive."""
        pre = torch.tensor([[-1.0, -2.0, -3.0, 4.0]], requires_grad=True)
        dead = torch.tensor([True, True, False, False])
        rows = torch.eye(4)[:, :4].requires_grad_()
        auxiliary_loss(pre, torch.ones(1, 4), dead, rows, 1.0).backward()
        assert float(pre.grad[0, 2:].abs().max()) == 0 and float(rows.grad[2:].abs().max()) == 0
        published = (pre.detach() * dead).topk(2).indices
        assert not bool(dead[published].all())

    def test_few_dead_count_for_less(self):
        pre, error = random(5, 40, seed=1), random(5, 20, seed=2)
        one = torch.arange(40) == 7
        codes = torch.where(one, pre.clamp_min(0), 0)
        rows = random(40, 20, seed=3)
        expected = (codes @ rows - error).square().sum(-1).mean() / 10 / 2.5
        torch.testing.assert_close(auxiliary_loss(pre, error, one, rows, 2.5), expected)

    def test_without_it_more_stay_dead(self, world):
        dead = {}
        for weight in (0.0, 1 / 32):
            trainer = Trainer(Settings(64, 3, steps=400, batch=256, auxiliary=weight, revive=False), world.draw(4096, 1))
            with torch.no_grad():
                trainer.learnt["b_enc"][:32] = -0.5
            for step in range(400):
                trainer.step(world.draw(256, 100 + step))
            dead[weight] = measure(trainer.sae(), [world.draw(4096, 7)]).metrics.dead
        assert dead[1 / 32] < 0.5 * dead[0.0] and dead[0.0] > 0.2

    def test_latents_that_cannot_be_called_back_are_made_anew(self, world):
        dead = {}
        for revive in (False, True):
            trainer = Trainer(Settings(64, 3, steps=400, batch=256, revive=revive), world.draw(4096, 1))
            with torch.no_grad():
                trainer.learnt["b_enc"][:32] = -50.0
            for step in range(400):
                trainer.step(world.draw(256, 100 + step))
            dead[revive] = measure(trainer.sae(), [world.draw(4096, 7)]).metrics.dead
        assert dead == {False: 0.5, True: pytest.approx(0.0, abs=0.05)}


class TestGradientsOfJumpReLU:
    def test_are_those_of_the_paper(self):
        pre, threshold = torch.tensor([[0.96, 0.5, 1.04, 2.0]]), torch.ones(4, requires_grad=True)
        pre.requires_grad_()
        (JumpReLU.apply(pre, threshold, 0.1) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
        assert pre.grad.tolist() == [[0, 0, 3, 4]]
        torch.testing.assert_close(threshold.grad, torch.tensor([-10.0, 0, -30.0, 0]))
        threshold.grad = None
        Heaviside.apply(pre, threshold, 0.1).sum().backward()
        torch.testing.assert_close(threshold.grad, torch.tensor([-10.0, 0, -10.0, 0]))

    def test_follow_the_mean_over_many(self):
        """Of one vector the jump has no gradient; its mean over many vectors has one, which differences show."""
        pre = random(400_000, 1, seed=1)

        def mean(threshold):
            return float(torch.where(pre > threshold, pre, 0).mean())

        threshold = torch.tensor([0.7], requires_grad=True)
        JumpReLU.apply(pre, threshold, 0.05).mean().backward()
        assert float(threshold.grad) == pytest.approx((mean(0.75) - mean(0.65)) / 0.1, rel=0.1)


class TestMeasures:
    def test_fvu_and_the_others_are_what_they_say(self):
        sae = SAE(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4), RELU, center=False)
        x = torch.tensor([[1.0, 2, 0, 0], [3, 0, -2, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
        measured = measure(sae, [x[:3], x[3:]])
        variance = float((x - x.mean(0)).square().sum())
        assert measured.metrics.fvu == pytest.approx(4 / variance)
        assert (measured.metrics.l0, measured.metrics.dead) == (1.5, 0.5)
        assert measured.metrics.cosine == pytest.approx((1 + 3 / math.sqrt(13) + 1 + 1) / 4)
        assert measured.stats["mean"].tolist() == [1.25, 1, 0, 0]
        assert measured.stats["max"].tolist() == [3, 2, 0, 0] and measured.stats["freq"].tolist() == [0.75, 0.75, 0, 0]
        assert int(measured.metrics.density.sum()) == 2

    def test_no_vectors_are_no_measure(self):
        with pytest.raises(ValueError, match="no vectors"):
            measure(made(), [])

    def test_geometric_median_is_not_drawn_by_what_lies_far_off(self):
        x = torch.cat([random(900, 6, seed=1) + 2, 1000 + random(100, 6, seed=2)])
        median = geometric_median(x)
        assert float((median - 2).abs().max()) < 0.5 < float((x.mean(0) - 2).abs().min())

        def distances(point):
            return float((x - point).norm(dim=1).sum())

        assert distances(median) < min(distances(median + 0.05 * direction) for direction in random(40, 6, seed=3))

    @pytest.mark.parametrize("way", NORMALISATIONS)
    def test_normalised_vectors_have_length_1_on_average(self, way):
        x = random(5000, 6, seed=1) * torch.tensor([1.0, 1, 1, 1, 50, 0.1]) + 4
        mean, std = normalisation(x, way)
        scaled = (x - mean) / std
        assert float(scaled.square().sum(-1).mean()) == pytest.approx(1, abs=1e-3)
        if way == "standardise":
            torch.testing.assert_close(scaled.std(0), torch.full((6,), 6**-0.5), rtol=1e-2, atol=0)

    def test_whitened_vectors_vary_alike_along_all_axes_and_come_back(self):
        """As far as they vary at all: an axis with next to nothing on it is noise and stays small."""
        turned = torch.linalg.qr(random(6, 6, seed=3)).Q
        x = random(5000, 6, seed=1) * torch.tensor([1.0, 1, 3, 0.1, 50, 0.0]) @ turned
        axes = whitening(x)
        white = x @ axes.into
        torch.testing.assert_close(white.T @ white / len(x), torch.diag(torch.tensor([0.0, 1, 1, 1, 1, 1])) / 6, rtol=0, atol=1e-4)
        torch.testing.assert_close(white @ axes.back, x, rtol=0, atol=1e-4)
        torch.testing.assert_close(axes.into @ axes.back, torch.eye(6), rtol=0, atol=1e-4)

    def test_what_was_learnt_of_whitened_vectors_is_said_by_the_weights(self, world):
        """Codes are those of the whitened vectors, and what they add is brought back, without a matrix beside them."""
        spread = torch.linspace(0.05, 3, 32).diag() @ torch.linalg.qr(random(32, 32, seed=4)).Q
        trainer = Trainer(Settings(64, 3, batch=64, normalise="whiten"), world.draw(4096, 1) @ spread)
        for number in range(20):
            trainer.step(world.draw(64, number) @ spread)
        x, sae = world.draw(100, 5) @ spread, trainer.sae()
        with torch.no_grad():
            own, white = trainer.learnt, trainer._normalised(x)
            pre = (white - own["b_dec"]) @ own["W_enc"].T + own["b_enc"]
            torch.testing.assert_close(sae.pre(x), pre, rtol=1e-4, atol=1e-4)
            rebuilt = (sae.encode(x) @ own["W_dec"] + own["b_dec"]) @ trainer.axes.back * trainer.std + trainer.mean
        torch.testing.assert_close(sae.decode(sae.encode(x)), rebuilt, rtol=1e-4, atol=1e-4)
        again = Trainer(trainer.settings, world.draw(4096, 2) @ spread)
        again.restore(trainer.state())
        assert torch.equal(again.sae().W_dec, sae.W_dec) and torch.equal(again.sae().W_enc, sae.W_enc)

    def test_whitening_finds_atoms_that_single_numbers_do_not_show(self, world):
        """Where most of the variance lies along one direction across all numbers: scaled number by number, the rest stays small."""
        loud = torch.nn.functional.normalize(random(1, 32, seed=6), dim=1)

        def drawn(n, seed):
            return world.draw(n, seed) + 30 * random(n, 1, seed=seed + 50) * loud

        quiet = {}
        for way in ("standardise", "whiten"):
            trainer = Trainer(Settings(64, 4, batch=256, rate=3e-3, normalise=way), drawn(8192, 1))
            for number in range(300):
                trainer.step(drawn(256, 100 + number))
            x, sae = drawn(2000, 7), trainer.sae()
            left = (x - sae.decode(sae.encode(x))) @ (torch.eye(32) - loud.T @ loud)
            quiet[way] = float(left.square().sum() / (x @ (torch.eye(32) - loud.T @ loud)).square().sum())
        assert quiet["whiten"] < 0.75 * quiet["standardise"], quiet


class TestRing:
    def test_each_vector_comes_once_in_no_order(self):
        ring, x = Ring(100), torch.arange(250.0)[:, None].repeat(1, 3)
        given, drawn = 0, []
        while given < 250 or len(ring):
            given += ring.put(x[given : given + 40])
            if ring.mixed or given == 250:
                drawn.append(ring.draw(16)[:, 0].clone())
        drawn = torch.cat(drawn)
        assert torch.equal(drawn.sort().values, x[:, 0])
        assert not torch.equal(drawn, x[:, 0]) and float((drawn[1:] < drawn[:-1]).float().mean()) > 0.2

    def test_memory_is_fixed_and_of_the_vectors_own_type(self):
        ring = Ring(10)
        assert ring.put(random(25, 3).half()) == 10 and ring.room == 0 and ring.put(random(5, 3).half()) == 0
        place = ring.kept.data_ptr()
        ring.draw(4)
        assert ring.put(random(5, 3)) == 4
        assert (ring.kept.data_ptr(), ring.kept.shape, ring.kept.dtype) == (place, (10, 3), torch.float16)

    def test_what_is_there_can_be_drawn_again(self):
        ring = Ring(10, seed=1)
        ring.put(torch.arange(7.0)[:, None])
        first = ring.draw(5)[:, 0].clone()
        ring.again()
        assert (len(ring), ring.room) == (7, 3)
        second = ring.draw(10)[:, 0]
        assert second.sort().values.tolist() == list(range(7)) and not torch.equal(second[:5], first)

    def test_the_same_seed_is_the_same_order(self):
        orders = []
        for seed in (1, 1, 2):
            ring = Ring(50, seed)
            ring.put(torch.arange(50.0)[:, None])
            orders.append(ring.draw(50)[:, 0])
        assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])

    def test_what_does_not_fit_is_told(self):
        ring = Ring(4)
        with pytest.raises(ValueError, match="NaN"):
            ring.put(torch.full((2, 3), math.nan))
        ring.put(random(1, 3))
        with pytest.raises(ValueError, match="another site"):
            ring.put(random(1, 4))


class TestFinding:
    PLANTED = 17

    def codes(self, planted):
        codes = random(200, 60, seed=3 + planted).clamp_min(0)
        codes[:, self.PLANTED] = planted * (0.3 + random(200, seed=5).abs())
        return codes

    def scores(self, positive, negative):
        return {
            "share": sae_find.share_difference(positive.mean(0), negative.mean(0)),
            "effect": sae_find.effect_size(positive, negative),
            "set": sae_find.set_difference(positive, negative, 60),
        }

    def test_what_fires_for_the_concept_alone_comes_first(self):
        for name, score in self.scores(self.codes(1), self.codes(0)).items():
            assert sae_find.ranked(score, 3)[0] == self.PLANTED, name

    def test_the_concepts_own_share_of_a_latent(self):
        """All of one that never fires without it; none of one that is as busy or busier without, or never fires at all."""
        with_it, without = torch.tensor([2.0, 2.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.5, 1.0, 3.0, 0.0])
        assert sae_find.own_share(with_it, without).tolist() == [1.0, 0.75, 0.0, 0.0, 0.0]
        torch.testing.assert_close(sae_find.own_share(1e-6 * with_it, 1e-6 * without), sae_find.own_share(with_it, without))

    def test_sets_exchanged_turn_the_sign(self):
        there, back = self.scores(self.codes(1), self.codes(0)), self.scores(self.codes(0), self.codes(1))
        assert torch.equal(there["share"], -back["share"])
        assert torch.equal(there["effect"], -back["effect"])

    @pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
    def test_the_scale_of_the_codes_is_without_effect(self, scale):
        plain, scaled = self.scores(self.codes(1), self.codes(0)), self.scores(scale * self.codes(1), scale * self.codes(0))
        for name in ("share", "effect"):
            torch.testing.assert_close(plain[name], scaled[name], rtol=1e-4, atol=1e-7)
        assert torch.equal(sae_find.ranked(plain["set"], 60), sae_find.ranked(scaled["set"], 60))

    def test_what_never_fires_scores_nothing(self):
        empty = torch.zeros(4, 9)
        for name, score in self.scores(empty, empty).items():
            assert score.tolist() == [0] * 9 and len(sae_find.ranked(score, 9)) == 0, name

    def test_what_is_constant_in_both_and_differs_is_as_good_as_the_best(self):
        score = sae_find.effect_size(torch.tensor([[1.0, 2, 0], [1, 4, 0]]), torch.tensor([[0.0, 1, 0], [0, 3, 0]]))
        assert score.tolist() == [1.0, 1.0, 0.0]

    def test_set_difference_leaves_out_what_any_other_text_has_among_its_greatest(self):
        positive, negative = torch.tensor([[5.0, 4, 3, 1]]), torch.tensor([[0.0, 9, 0.1, 0], [7, 0, 0, 0]])
        assert sae_find.set_difference(positive, negative, 3).tolist() == [0, 0, 0, 0]
        assert sae_find.set_difference(positive, negative, 1).tolist() == [0, 0, 0, 0]
        assert sae_find.set_difference(positive, negative[:1], 1).tolist() == [5, 0, 0, 0]
