"""Rows picked place by place, worked on, and added back."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concept_nodes.ops.attention import blend
from concept_nodes.ops.lora import Factors, Stack, _Apart, _Crops, _Together
from concept_nodes.ops.shares import Bucket, Shares, weigh

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shared(places, tokens, seed=0, hard=True, batch=1):
    """Shares of a few places and a rest that nobody has, adding up to at most 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(places + 1, batch, tokens, generator=generator) * 2
    if hard:
        return torch.nn.functional.one_hot(logits.argmax(0), places + 1).movedim(-1, 0)[:-1].float()
    soft = torch.softmax(logits * 3, 0)[:-1]
    return torch.where(soft > 0.2, soft, 0.0)


class TestShares:
    @given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_what_is_picked_weighed_and_added_back_is_the_shares_times_it(self, places, tokens, batch, hard, seed):
        rows = shared(places, tokens, seed, hard)
        x, y = random(batch, tokens, 3, seed=seed + 1), torch.zeros(batch, tokens, 3)
        for bucket in Shares(rows).buckets(batch, tokens):
            bucket.add(y.view(-1, 3), weigh(bucket.pick(x), bucket.weight))
        torch.testing.assert_close(y, x * rows.sum(0)[..., None], rtol=1e-5, atol=1e-6)

    def test_places_of_like_size_go_together(self):
        rows = torch.zeros(4, 1, 64)
        for place, (first, last) in enumerate([(0, 30), (30, 34), (34, 37), (37, 64)]):
            rows[place, 0, first:last] = 1
        shares = Shares(rows)
        assert sorted(bucket.places for bucket in shares.buckets(1, 64)) == [(0, 3), (1, 2)]
        assert shares.picked == 2 * 30 + 2 * 4

    def test_places_without_rows_are_left_out(self):
        rows = torch.zeros(3, 1, 8)
        rows[1] = 1
        (only,) = Shares(rows).buckets(2, 8)
        assert only.places == (1,)
        assert Shares(torch.zeros(3, 1, 8)).buckets(1, 8) == []

    def test_rows_of_one_batch_may_differ(self):
        rows = shared(3, 20, seed=4, batch=2)
        x, y = random(2, 20, 5), torch.zeros(2, 20, 5)
        for bucket in Shares(rows).buckets(2, 20):
            bucket.add(y.view(-1, 5), weigh(bucket.pick(x), bucket.weight))
        torch.testing.assert_close(y, x * rows.sum(0)[..., None])

    def test_a_shorter_sequence_is_not_the_one_shared_out(self):
        assert Shares(torch.ones(2, 1, 6)).buckets(1, 5) == []

    def test_tokens_behind_ours_belong_to_nobody(self):
        rows = torch.ones(1, 1, 6)
        x, y = random(2, 9, 4), torch.zeros(2, 9, 4)
        for bucket in Shares(rows).buckets(2, 9):
            bucket.add(y.view(-1, 4), bucket.pick(x))
        assert torch.equal(y[:, :6], x[:, :6])
        assert not y[:, 6:].any()


class TestStackInPlaces:
    """Adapters in places, on all rows at once and each on its own rows: the same."""

    def adapters(self, k, ranks, out=12, inputs=10, rows=None):
        made = []
        for index in range(k):
            rank = ranks[index % len(ranks)]
            spans = [(0, out // 3), (2 * out // 3, out // 3)] if rows else [None]
            made.append(
                [
                    Factors(
                        random(rank, inputs, seed=10 * index),
                        random(span[1] if span else out, rank, seed=10 * index + 1),
                        0.5 + index,
                        span,
                    )
                    for span in spans
                ]
            )
        return made

    def expected(self, adapters, strengths, places, rows, x, out):
        y = torch.zeros(*x.shape[:-1], out)
        for factors, strength, place in zip(adapters, strengths, places, strict=True):
            share = torch.ones(1, x.shape[1]) if place is None else rows[place]
            for one in factors:
                part = strength * one.scale * share[..., None] * (x @ one.down.t() @ one.up.t())
                first, n = one.rows or (0, out)
                y[..., first : first + n] += part
        return y

    @pytest.mark.parametrize("worth", [0.0, 100.0], ids=["together", "apart"])
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("hard", [False, True])
    @pytest.mark.parametrize("k, ranks", [(2, [4]), (3, [2, 5, 1]), (6, [3, 4])])
    def test_is_the_sum_of_each_times_its_share(self, monkeypatch, worth, fused, hard, k, ranks):
        monkeypatch.setattr(Stack, "WORTH", worth)
        adapters = self.adapters(k, ranks, rows=fused)
        rows, x = shared(k - 1, 24, seed=k, hard=hard), random(2, 24, 10, seed=7)
        # One adapter everywhere, two that share a place.
        places = [None, *range(k - 1)]
        adapters, places = [*adapters, self.adapters(1, [2], rows=fused)[0]], [*places, 0]
        strengths = [0.7 - 0.3 * index for index in range(len(adapters))]
        stack = Stack(adapters, CPU, torch.float32)
        stack.set_strengths(strengths, places, Shares(rows))
        y = stack(torch.zeros(2, 24, 12), True, x)
        torch.testing.assert_close(y, self.expected(adapters, strengths, places, rows, x, 12), rtol=1e-4, atol=1e-4)

    def test_rows_that_nobody_has_stay_as_they_are(self):
        rows = shared(4, 40, seed=3)
        stack = Stack(self.adapters(4, [3]), CPU, torch.float32)
        stack.set_strengths([1.0] * 4, range(4), Shares(rows))
        base, x = random(2, 40, 12, seed=9), random(2, 40, 10, seed=8)
        y = stack(base.clone(), True, x)
        nobody = rows.sum((0, 1)) == 0
        assert nobody.any()
        assert torch.equal(y[:, nobody], base[:, nobody])
        assert not torch.equal(y, base)

    def test_work_does_not_grow_with_the_number_of_disjoint_places(self):
        """Multiplications in the low-rank products, by torch's own counter."""
        from torch.utils.flop_counter import FlopCounterMode

        def work(k):
            rows = torch.nn.functional.one_hot(torch.arange(64) * k // 64, k).t().float()[:, None]
            stack = Stack(self.adapters(k, [4]), CPU, torch.float32)
            stack.set_strengths([1.0] * k, range(k), Shares(rows))
            with FlopCounterMode(display=False) as counter:
                stack(torch.zeros(1, 64, 12), True, random(1, 64, 10))
            return counter.get_total_flops()

        assert work(4) == work(8) == work(16) == 2 * 64 * 4 * (10 + 12)

    def test_a_convolution_is_masked_at_its_output(self):
        convolution = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
        down, up = random(3, 5, 3, 3), random(6, 3, seed=1)
        rows = shared(1, 16, seed=2, hard=False)
        stack = Stack([[Factors(down, up)]], CPU, torch.float32, convolution)
        stack.set_strengths([1.0])
        x = random(2, 5, 8, 8, seed=3)
        plain = stack(torch.zeros(2, 6, 4, 4), True, x)
        stack.set_strengths([1.0], [0], Shares(rows))
        torch.testing.assert_close(stack(torch.zeros(2, 6, 4, 4), True, x), plain * rows.view(1, 1, 4, 4))

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize(
        "kernel, options",
        [
            ((1, 1), {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}),
            ((3, 3), {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}),
            ((3, 3), {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}),
            ((3, 5), {"stride": (1, 2), "padding": (2, 3), "dilation": (2, 1)}),
        ],
    )
    def test_a_convolution_in_boxes_is_the_whole_one(self, monkeypatch, kernel, options, batch, fused):
        """Boxes in the middle, at the edges and over all of it; two adapters in one; one that has nothing; soft shares; pictures of a
        batch with shares of their own.
        """
        x = random(2, 5, 12, 14, seed=7)
        height, width = torch.nn.functional.conv2d(x, torch.zeros(1, 5, *kernel), **options).shape[2:]
        rows = torch.zeros(5, batch, height, width)
        rows[0, :, 1:3, 2:5], rows[1, :, -2:, -3:], rows[2] = 1.0, 0.6, 0.3
        rows[3, 0, :1, :4] = 1.0  # 4 has nothing
        spans = [(0, 4), (4, 2), (1, 3), (0, 6), None, (2, 2)] if fused else [None] * 6
        adapters = [
            [Factors(random(rank, 5, *kernel, seed=rank), random(span[1] if span else 6, rank, seed=rank + 9), 0.5, span)]
            for rank, span in zip((2, 5, 3, 1, 4, 2), spans, strict=True)
        ]
        strengths, places = [0.7, -0.4, 1.0, 2.0, 0.3, -1.1], [0, 1, 2, 3, 4, 0]
        made = {}
        for worth in (0.0, 100.0):
            monkeypatch.setattr(Stack, "WORTH", worth)
            stack = Stack(adapters, CPU, torch.float32, options)
            stack.set_strengths(strengths, places, Shares(rows.flatten(2), (height, width)))
            assert type(stack._placed) is (_Together if worth == 0 else _Apart if kernel == (1, 1) else _Crops)
            made[worth] = stack(random(2, 6, height, width, seed=1), True, x)
        torch.testing.assert_close(made[100.0], made[0.0], rtol=1e-4, atol=1e-4)
        assert not torch.equal(made[0.0], random(2, 6, height, width, seed=1))

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_a_map_of_another_size_gets_nothing_and_it_is_told(self, monkeypatch, kernel):
        monkeypatch.setattr(Stack, "WORTH", 100.0)
        options = {"stride": (1, 1), "padding": (kernel // 2,) * 2, "dilation": (1, 1)}
        stack = Stack([[Factors(random(2, 5, kernel, kernel), random(6, 2))] for _ in range(2)], CPU, torch.float32, options)
        shares = Shares(shared(2, 16, seed=1), (4, 4))
        stack.set_strengths([1.0, 1.0], [0, 1], shares)
        assert torch.count_nonzero(stack(torch.zeros(1, 6, 2, 8), True, random(1, 5, 2, 8))) == 0
        assert shares.missed

    def test_boxes_pay_where_they_are_small(self):
        options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
        rows = torch.zeros(4, 1, 8, 8)
        rows[0, :, :4, :4] = rows[1, :, :4, 4:] = rows[2, :, 4:, :4] = rows[3, :, 4:, 4:] = 1.0
        scattered = torch.zeros(4, 1, 8, 8)
        scattered[torch.arange(64) % 4, 0, torch.arange(64) // 8, torch.arange(64) % 8] = 1.0
        for shares, kind in ((rows, _Crops), (scattered, _Together)):
            stack = Stack([[Factors(random(2, 5, 3, 3), random(6, 2))] for _ in range(4)], CPU, torch.float32, options)
            stack.set_strengths([1.0] * 4, range(4), Shares(shares.flatten(2), (8, 8)))
            assert type(stack._placed) is kind


class TestShare:
    """Stacks on layers that read the same x one after another: each gives what it gives alone."""

    def stacks(self, shares, strengths=(1.0, 0.5, -0.7), ranks=(3, 3, 3)):
        k_of = range(len(strengths))
        made = []
        for at, rank in enumerate(ranks):
            adapters = [[Factors(random(rank, 10, seed=9 * at + k), random(12, rank, seed=70 + 9 * at + k), 0.5)] for k in k_of]
            made.append(Stack(adapters, CPU, torch.float32))
            made[-1].set_strengths(strengths, k_of, shares)
        return made

    def work(self, stacks, x, times=1):
        """Products of matrices."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            found = [stack(torch.zeros(2, 24, 12), True, x) for _ in range(times) for stack in stacks]
        return found, sum(counter.get_flop_counts()["Global"].values())

    def rows(self, counts=(12, 9, 3)):
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Shares(torch.nn.functional.one_hot(owners, len(counts)).t().float()[:, None])

    @pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 1, 4)])
    def test_is_what_each_gives_alone(self, ranks):
        shares, x = self.rows(), random(2, 24, 10, seed=5)
        alone, _ = self.work(self.stacks(shares, ranks=ranks), x)
        stacks = self.stacks(shares, ranks=ranks)
        Stack.share(stacks)
        assert len(shares.buckets(2, 24)) == 2 and len({stack._placed.trio[0] for stack in stacks}) == 1
        for _ in range(2):  # with another x as well
            together, _ = self.work(stacks, x, times=2)
            torch.testing.assert_close(together[:3], alone)
            torch.testing.assert_close(together[3:], alone)
            x = x * 2
            alone = [one * 2 for one in alone]

    def test_picks_once(self, monkeypatch):
        shares, x = self.rows(), random(2, 24, 10, seed=5)
        stacks, picked = self.stacks(shares), []
        monkeypatch.setattr(Bucket, "pick", lambda bucket, x, pick=Bucket.pick: picked.append(bucket) or pick(bucket, x))
        self.work(stacks, x)
        assert len(picked) == 6
        Stack.share(stacks)
        self.work(stacks, x)
        assert len(picked) == 8

    def test_lets_go_of_x_when_all_were_served(self):
        stacks = self.stacks(self.rows())
        Stack.share(stacks)
        x = random(2, 24, 10, seed=5)
        self.work(stacks, x)
        gone = weakref.ref(x)
        del x
        assert gone() is None

    def test_an_x_that_is_read_by_some_only_is_not_taken_for_another(self):
        shares, first, second = self.rows(), random(2, 24, 10, seed=5), random(2, 24, 10, seed=6)
        alone = self.stacks(shares)
        stacks = self.stacks(shares)
        Stack.share(stacks)
        for x, reading in ((first, [0]), (second, [0, 1]), (first, [2, 0, 1]), (second, [1, 1, 2])):
            expected, _ = self.work([alone[at] for at in reading], x)
            found, _ = self.work([stacks[at] for at in reading], x)
            torch.testing.assert_close(found, expected)

    def test_strengths_that_come_to_differ_end_it(self):
        shares, x = self.rows(), random(2, 24, 10, seed=5)
        stacks, alone = self.stacks(shares), self.stacks(shares)
        Stack.share(stacks)
        for one in (stacks, alone):
            one[1].set_strengths([0.3, 0.2, 0.1], range(3), shares)
        Stack.share(stacks)
        assert all(stack._placed.trio is None for stack in stacks)
        torch.testing.assert_close(self.work(stacks, x)[0], self.work(alone, x)[0])

    def test_other_rows_are_not_shared(self):
        stacks = self.stacks(self.rows())
        stacks[1].set_strengths([1.0, 0.5, -0.7], range(3), self.rows())
        Stack.share(stacks)
        assert all(stack._placed.trio is None for stack in stacks)

    def test_another_dtype_ends_it(self):
        stacks = self.stacks(self.rows())
        Stack.share(stacks)
        x = random(2, 24, 10, seed=5).double()
        alone = self.stacks(self.rows())
        with torch.inference_mode():
            found, expected = ([stack(torch.zeros(2, 24, 12).double(), True, x) for stack in made] for made in (stacks, alone))
        torch.testing.assert_close(found, expected)
        assert all(stack._placed.trio is None for stack in stacks)

    @pytest.mark.parametrize("counts", [(8, 8, 8), (16, 6, 2), (12, 9, 3)], ids=["one bucket", "three", "two"])
    def test_kinds_of_calls_take_turns(self, counts):
        """Places of other sizes from call to call, as for another part of the picture."""
        first, second = self.rows(counts), self.rows((9, 12, 3))
        stacks, x = self.stacks(first), random(2, 24, 10, seed=5)
        for shares in (first, second, first, second):
            for stack in stacks:
                stack.set_strengths((1.0, 0.5, -0.7), range(3), shares)
            Stack.share(stacks)
            torch.testing.assert_close(self.work(stacks, x)[0], self.work(self.stacks(shares), x)[0])
            assert all(stack._placed.trio for stack in stacks)

    def test_one_that_works_on_all_rows_ends_it_for_the_others(self, monkeypatch):
        first, second = self.rows(), self.rows((8, 8, 8))
        stacks, x = self.stacks(first), random(2, 24, 10, seed=5)
        Stack.share(stacks)
        for at, stack in enumerate(stacks):
            monkeypatch.setattr(stack, "WORTH", 0.0 if at == 1 else 100.0)
            stack.set_strengths((1.0, 0.5, -0.7), range(3), second)
        Stack.share(stacks)
        assert [type(stack._placed) for stack in stacks] == [_Apart, _Together, _Apart]
        torch.testing.assert_close(self.work(stacks, x)[0], self.work(self.stacks(second), x)[0])

    def test_five_sizes_are_shared_too(self):
        shares = self.rows((1, 2, 3, 5, 13))
        assert len(shares.groups()) == 5
        stacks, x = self.stacks(shares, (1.0, 0.5, -0.7, 0.2, 0.3)), random(2, 24, 10, seed=5)
        Stack.share(stacks)
        assert all(stack._placed.trio for stack in stacks)
        torch.testing.assert_close(self.work(stacks, x)[0], self.work(self.stacks(shares, (1.0, 0.5, -0.7, 0.2, 0.3)), x)[0])

    @pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
    def test_float8_files_join_others(self, ranks):
        """Which torch does not promote."""
        adapters = [[Factors(random(rank, 10, seed=rank), random(12, rank, seed=9))] for rank in ranks]
        coarse = [[Factors(adapters[0][0].down.to(torch.float8_e4m3fn), adapters[0][0].up.to(torch.float8_e4m3fn))], adapters[1]]
        exact = [[Factors(coarse[0][0].down.float(), coarse[0][0].up.float())], adapters[1]]
        shares, x, found = Shares(shared(2, 24, seed=1)), random(2, 24, 10, seed=5), []
        for made in (coarse, exact):
            stack = Stack(made, CPU, torch.float32)
            stack.set_strengths([1.0, 1.0], [0, 1], shares)
            assert type(stack._placed) is _Apart
            found.append(stack(torch.zeros(2, 24, 12), True, x))
        torch.testing.assert_close(*found)

    def test_gains_and_columns_of_one_number_are_not_mistaken(self):
        """As many ranks as places, by the same strengths."""
        shares = self.rows()
        columns = shares.times((0, 2), (1.0, 0.5))
        shares = Shares(shares.rows)
        bucket = next(places for places in shares.groups() if len(places) == 2)
        both = shares.times(bucket, (1.0, 0.5)), shares.gained(bucket, (1.0, 0.5))
        assert columns.shape == both[0].shape == (1, 24, 2) and both[1].shape == (2, 1, 12, 1)


class TestBlend:
    """Texts read in their places, against a softmax for each of them over the whole picture."""

    def attend(self, q, k, v):
        return torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v

    def texts(self, lengths, batch=2, channels=8):
        keys = [random(batch, n, channels, seed=20 + index) * 2 for index, n in enumerate(lengths)]
        return keys, [random(batch, n, channels, seed=50 + index) for index, n in enumerate(lengths)]

    def expected(self, q, keys, values, rows):
        return sum(row[..., None] * self.attend(q, k, v) for row, k, v in zip(rows, keys, values, strict=True))

    @pytest.mark.parametrize("hard", [True, False])
    @pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 7, 5, 3], [4] * 8])
    def test_is_the_weighted_sum_of_their_own_softmaxes(self, hard, lengths):
        q, (keys, values) = random(2, 30, 8, seed=1), self.texts(lengths)
        rows = shared(len(lengths), 30, seed=len(lengths), hard=hard)
        out = blend(self.attend, q, keys, values, Shares(rows))
        torch.testing.assert_close(out, self.expected(q, keys, values, rows), rtol=1e-5, atol=1e-5)

    def test_one_softmax_with_a_bias_is_right_for_hard_shares(self):
        """Block-masked concatenation: the other way to compute it."""
        q, (keys, values) = random(2, 30, 8, seed=1), self.texts([5, 7, 4])
        rows = torch.nn.functional.one_hot(torch.arange(30) % 3, 3).t().float()[:, None]
        bias = torch.cat([row.log()[..., None].expand(-1, -1, k.shape[1]) for row, k in zip(rows, keys, strict=True)], 2)
        k, v = torch.cat(keys, 1), torch.cat(values, 1)
        concatenated = torch.softmax(q @ k.transpose(1, 2) / 8**0.5 + bias, -1) @ v
        torch.testing.assert_close(blend(self.attend, q, keys, values, Shares(rows)), concatenated, rtol=1e-5, atol=1e-5)

    def test_for_soft_shares_a_bias_of_their_logarithm_is_wrong_and_the_corrected_one_right(self):
        q, (keys, values) = random(2, 30, 8, seed=1), self.texts([5, 7, 4])
        rows = torch.softmax(random(3, 1, 30, seed=6), 0)
        logits = [q @ k.transpose(1, 2) / 8**0.5 for k in keys]
        v = torch.cat(values, 1)

        def one_softmax(corrected):
            biased = [
                logit + row.log()[..., None] - (torch.logsumexp(logit, -1, keepdim=True) if corrected else 0.0)
                for logit, row in zip(logits, rows, strict=True)
            ]
            return torch.softmax(torch.cat(biased, 2), -1) @ v

        out = blend(self.attend, q, keys, values, Shares(rows))
        torch.testing.assert_close(one_softmax(True), out, rtol=1e-5, atol=1e-5)
        assert (one_softmax(False) - out).abs().mean() > 0.05 * out.abs().mean()
