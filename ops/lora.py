"""Low-rank adapters beside a frozen layer: y = W x + sum_i s_i (alpha_i / r_i) B_i (A_i x).

LoRA (arXiv 2106.09685) for linear layers, LoCon for convolutions: A keeps the layer's kernel, stride, padding and dilation, B is 1x1.
All adapters of a layer run as one: their ranks are concatenated, so that x is read once and y written once whatever their number.

    z = x A^T          (..., R), R the sum of the ranks
    y = y + (z * S) B^T

S scales rank by rank: strength times alpha / r, and, where an adapter has a place, its share of every token of a linear layer and of every
position of a convolution's output. Masking z is masking the adapter's output, exactly, because B acts on each position alone; so is
computing z on the tokens alone that the place has, or in the box around it, which is done where it saves work.

DoRA (arXiv 2402.09353) also sets the length of each output's weights, which the layer's own output y shows, so that no weight is needed:

    W' = c (W + s B A), c = m / ||W||     y' = y + S ((c - 1) (y - bias) + c B A x)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .shares import Bucket, Shares, weigh

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Factors(NamedTuple):
    """One adapter of one layer.

    down  (r, in) for a linear layer, (r, in, *kernel) for a convolution
    up    (n, r), n the outputs it writes to
    scale alpha / r, or 1 where the file names no alpha
    rows  (first, n): the outputs written to, where a layer holds several fused (q, k and v in one); None for all of them
    gain  (out,) c - 1 for each output of the whole layer, and shift (out,), which keeps the bias out of it, where the adapter is a DoRA
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    rows: tuple[int, int] | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]  # len of a tensor takes microseconds, and this is asked a hundred times for a layer


def merge_middle(down: Tensor, middle: Tensor) -> Tensor:
    """The (r, in, *kernel) matrix A of a Tucker-decomposed adapter: a 1x1 `down` (r, in, 1, ...) followed by `middle` (r, r, *kernel)."""
    return torch.einsum("ab...,bi->ai...", middle, down.flatten(1))


DEAD = 1e-4  # of the longest row: weights that short are an output nobody uses, and no length to divide by


def decomposed(factors: Factors, magnitude: Tensor, lengths: Tensor, bias: Tensor | None = None) -> Factors:
    """The factors of a DoRA: `magnitude` m (n,) is the length that the weights of each output written to shall have; lengths (out,), those
    that the layer's weights have, and bias (out,) are the layer's own.

    m is divided by ||W||, as ComfyUI merges such files; the paper and the trainers divide by ||W + s B A||.
    """
    first, count = factors.rows or (0, len(lengths))
    own = lengths[first : first + count].float().to(factors.up.device)
    ratio = torch.where(own > DEAD * own.max(), magnitude.float().flatten() / own, 1.0)
    gain = own.new_zeros(len(lengths))
    gain[first : first + count] = ratio - 1
    shift = None if bias is None else -gain * bias.to(gain)
    return factors._replace(up=ratio[:, None] * factors.up.float(), gain=gain, shift=shift)


def delta_weight(factors: Factors, weight: Tensor | None = None) -> Tensor:
    """scale * B A in float32, (n, in, *kernel): what strength 1 adds to the weight's rows. A DoRA's is told only beside the layer's own
    weight (out, in, *kernel).
    """
    down = factors.down.float()
    delta = factors.scale * (factors.up.float() @ down.flatten(1)).reshape(-1, *down.shape[1:])
    return delta if factors.gain is None else delta + _gained(factors, weight).view(delta.shape)


def delta_square(factors: Factors, weight: Tensor | None = None) -> float:
    """The squared Frobenius norm of `delta_weight`, from products of its small side: ||B A||^2 = sum(B^T B * A A^T)."""
    up, down = factors.scale * factors.up.double(), factors.down.double().flatten(1)
    square = float(((up.t() @ up) * (down @ down.t())).sum())
    if factors.gain is None:
        return square
    own = _gained(factors, weight)
    return square + float(own.square().sum(dtype=torch.float64)) + 2 * float(((own @ down.t().float()) * up).sum(dtype=torch.float64))


def _gained(factors: Factors, weight: Tensor) -> Tensor:
    """(n, in * kernel) what a DoRA's gain alone adds to the rows written to."""
    return _narrow(factors.gain[:, None] * weight.to(factors.gain).flatten(1), factors.rows, 0)


class _Together:
    """Adapters of a layer in one pass over all of its rows.

    down (R, in, *kernel); ups: (rows, first column, B side by side (n, columns)) for each group of outputs written to; gain (R,), and the
    place of each column where they have places.
    """

    def __init__(self, flat: Sequence[tuple[int, Factors]], device, dtype: torch.dtype):
        # Factors of the same rows lie side by side, so that each group is one slice of z.
        spans = _spans(factors for _, factors in flat)
        flat = sorted(flat, key=lambda item: spans.index(item[1].rows))
        self.down = torch.cat([factors.down.to(device, dtype) for _, factors in flat])
        self.ups = []
        first = 0
        for rows in spans:
            up = torch.cat([factors.up.to(device, dtype) for _, factors in flat if factors.rows == rows], dim=1)
            self.ups.append((rows, first, up))
            first += up.shape[1]
        ranks = torch.tensor([factors.down.shape[0] for _, factors in flat])
        self._owners = torch.tensor([owner for owner, _ in flat]).repeat_interleave(ranks)
        self._scales = torch.tensor([factors.scale for _, factors in flat], dtype=torch.float32).repeat_interleave(ranks)

    def setting(self, strengths: Sequence[float], places: Sequence[int | None], shares: Shares | None) -> tuple:
        """What `use` takes: the gain of each rank, its place, the shares, and for tokens the shares times the gains, where these stay."""
        gains = (torch.tensor(strengths, dtype=torch.float32)[self._owners] * self._scales).tolist()
        gain = torch.tensor(gains, device=self.down.device)
        if shares is None:
            return gain, None, None, None
        columns = [places[owner] for owner in self._owners.tolist()]
        return gain, torch.tensor(columns, device=self.down.device), shares, None if shares.whole else shares.times(columns, gains)

    def use(self, setting: tuple) -> None:
        gain, columns, self.shares, self.factors = setting
        self.gain, self.columns = gain.to(self.down.device), None if columns is None else columns.to(self.down.device)

    def follow(self, x: Tensor) -> None:
        self.down, self.gain = self.down.to(x.device, x.dtype), self.gain.to(x.device)
        self.ups = [(rows, first, up.to(x.device, x.dtype)) for rows, first, up in self.ups]

    def add_linear(self, y: Tensor, x: Tensor) -> None:
        z = F.linear(x, self.down)
        if self.factors is not None and z.ndim == 3 and z.shape[1] == self.shares.tokens:
            z = z.mul_(self.factors)
        else:
            z = z.mul_(self.gain)
            if self.shares is not None and z.ndim == 2:  # one row for each picture of the batch
                z = z.mul_(self.shares.rows[..., 0].t()[:, self.columns])
            elif self.shares is not None:
                missing = z.shape[-2] - self.shares.tokens
                if missing < 0:  # not the sequence that was shared out
                    self.shares.missed = True
                    return
                rows = self.shares.rows.movedim(0, -1)[..., self.columns]
                z = z.mul_(F.pad(rows, (0, 0, 0, missing)) if missing else rows)
        z, flat = z.flatten(0, -2), y.view(-1, y.shape[-1])
        for rows, first, up in self.ups:
            out, part = _narrow(flat, rows), z.narrow(1, first, up.shape[1])
            if out.dtype == z.dtype:
                out.addmm_(part, up.t())
            else:
                out.add_(part @ up.t())

    def add_convolution(self, y: Tensor, x: Tensor, convolution: dict) -> None:
        z = CONVOLUTIONS[x.ndim](x, self.down, **convolution).flatten(2)
        if self.shares is not None and z.shape[-1] != self.shares.tokens:
            self.shares.missed = True
            return
        if self.factors is not None:
            z = z.mul_(self.factors.transpose(1, 2))
        else:
            z = z.mul_(self.gain[:, None])
            if self.shares is not None:
                z = z.mul_(self.shares.rows.movedim(0, 1)[:, self.columns])
        flat = y.view(*y.shape[:2], -1)
        for rows, first, up in self.ups:
            out, part, matrix = _narrow(flat, rows), z.narrow(1, first, up.shape[1]), up.expand(z.shape[0], -1, -1)
            if out.dtype == z.dtype:
                out.baddbmm_(matrix, part)
            else:
                out.add_(matrix @ part)


class _Apart:
    """Adapters of a linear layer or of a 1x1 convolution, each place's on its own rows. For every place p: A (r, in) and B (n, r), filled
    up with zeros to one r.

    down (P, in, r); ups: (rows, first column, B (P, columns, n)). They lie in memory like this: products with small transposed matrices
    take twice as long on a processor.
    """

    PARTS = 8  # buckets whose matrices stay cut out
    trio: tuple[_Trio, int] | None = None  # which computes its ranks, and its number there

    def __init__(self, flat: Sequence[tuple[int, Factors]], places: Sequence[int | None], device, dtype: torch.dtype):
        flat = sorted(flat, key=lambda item: places[item[0]])
        self._of = sorted({places[owner] for owner, _ in flat})
        self._parts: dict[tuple[int, ...], tuple[Tensor, list]] = {}
        if len(flat) == len(self._of) and len({(factors.rank, factors.rows) for _, factors in flat}) == 1:  # nothing to fill up
            self._gains = [[(owner, factors.scale, factors.rank)] for owner, factors in flat]
            self.ups = [(flat[0][1].rows, 0, torch.stack([factors.up.t().to(dtype) for _, factors in flat]).to(device))]
            downs = [factors.down if factors.down.ndim == 2 else factors.down.flatten(1) for _, factors in flat]
            self.down = torch.stack([down.t().to(dtype) for down in downs]).to(device)
            return
        downs: list[list[Tensor]] = [[] for _ in self._of]
        # Of each place: owner, scale and rank, one after another. What fills up, which is zeros, goes by the place's first.
        self._gains: list[list[tuple[int, float, int]]] = [[] for _ in self._of]
        leading = [next((owner, factors.scale) for owner, factors in flat if places[owner] == place) for place in self._of]
        self.ups, first = [], 0
        for rows in _spans(factors for _, factors in flat):
            own = [[item for item in flat if item[1].rows == rows and places[item[0]] == place] for place in self._of]
            width = max(sum(factors.rank for _, factors in items) for items in own)
            outputs = next(factors.up.shape[0] for items in own for _, factors in items)
            ups = []
            for at, items in enumerate(own):
                missing = width - sum(factors.rank for _, factors in items)
                parts = [factors.up.to(dtype) for _, factors in items]  # one dtype: float8 joins no other
                downs[at] += [factors.down.flatten(1).to(dtype) for _, factors in items]
                self._gains[at] += [(owner, factors.scale, factors.rank) for owner, factors in items]
                if missing:
                    parts.append(torch.zeros(outputs, missing, dtype=dtype))
                    downs[at].append(torch.zeros(missing, flat[0][1].down[0].numel(), dtype=dtype))
                    self._gains[at].append((*leading[at], missing))
                ups.append(_beside(parts, 1))
            self.ups.append((rows, first, torch.stack([up.t() for up in ups]).to(device)))
            first += width
        self.down = torch.stack([_beside(parts, 0).t() for parts in downs]).to(device)

    def setting(self, strengths: Sequence[float], places: Sequence[int | None], shares: Shares) -> tuple:
        """What `use` takes: for each bucket's places their shares times their gains, or these apart where the ranks of a place have unlike
        ones; and the shares.
        """
        gains = [[strengths[owner] * scale for owner, scale, _ in row] for row in self._gains]
        if all(len(set(row)) == 1 for row in gains):
            by_place = dict(zip(self._of, (row[0] for row in gains), strict=True))
            return {own: (shares.gained(own, [by_place[place] for place in own]), None) for own in shares.groups()}, shares
        every = zip(gains, self._gains, strict=True)
        gain = torch.tensor([[one for one, (*_, rank) in zip(*row, strict=True) for _ in range(rank)] for row in every])
        gain = gain[:, None, None, :].to(self.down.device)
        factors = {}
        for places, weight in shares.weights().items():
            at = self._at(places)
            factors[places] = weight, gain if self._is_all(at) else gain[at]
        return factors, shares

    def use(self, setting: tuple) -> None:
        self.factors, self.shares = setting
        self._cut()

    def _at(self, places: Sequence[int]) -> list[int]:
        return [self._of.index(place) for place in places]

    def _is_all(self, at: Sequence[int]) -> bool:
        return at == list(range(len(self._of)))

    def _cut(self) -> None:
        """The matrices of each bucket's places, cut out once and not in every call."""
        for places in self.factors:
            at = self._at(places)
            if self._is_all(at):
                self._parts[places] = self.down, self.ups
            elif places not in self._parts:
                self._parts[places] = self.down[at], [(rows, first, up[at]) for rows, first, up in self.ups]
        while len(self._parts) > max(self.PARTS, len(self.factors)):
            self._parts.pop(next(places for places in self._parts if places not in self.factors))

    def follow(self, x: Tensor) -> None:
        self.down = self.down.to(x.device, x.dtype)
        self.ups = [(rows, first, up.to(x.device, x.dtype)) for rows, first, up in self.ups]
        self._parts.clear()
        self._cut()
        self.trio = None

    def add_linear(self, y: Tensor, x: Tensor) -> None:
        flat = y.view(-1, y.shape[-1])
        for bucket in self.shares.buckets(x.shape[:-1].numel() // x.shape[-2], x.shape[-2]):
            ups = self.matrices(bucket.places)[1]
            z = self.ranks(x, bucket)
            for rows, first, up in ups:
                bucket.add(_narrow(flat, rows), torch.bmm(z if len(ups) == 1 else z.narrow(2, first, up.shape[1]), up))

    def ranks(self, x: Tensor, bucket: Bucket) -> Tensor:
        """(P, B * n, r): x A^T of a bucket's rows, times shares and gains."""
        factors = self.factors[bucket.places]
        if not torch.compiler.is_compiling() and self.trio and not torch.is_grad_enabled():
            together = self.trio[0].ranks(self.trio[1], x, bucket, factors)
            if together is not None:
                return together
        return weigh(torch.bmm(bucket.pick(x), self.matrices(bucket.places)[0]), *factors)

    def lie_in(self, places: tuple[int, ...], down: Tensor) -> None:
        """Have A of a bucket's places there, which is the same A, and not twice."""
        self._parts[places] = down, self._parts[places][1]
        if self._is_all(self._at(places)):
            self.down = down

    def amounts(self) -> list:
        """By what its ranks are multiplied, place by place and as objects; None where ranks of one place differ."""
        return [(places, id(weight) if gain is None else None) for places, (weight, gain) in self.factors.items()]

    def matrices(self, places: tuple[int, ...]) -> tuple[Tensor, list]:
        """A (P, in, r) of a bucket's places, and their groups of B."""
        return self._parts[places]

    def add_convolution(self, y: Tensor, x: Tensor, convolution: dict) -> None:
        if tuple(y.shape[2:]) != self.shares.grid and (self.shares.grid or y.shape[2:].numel() != self.shares.tokens):
            self.shares.missed = True
            return
        added = y.new_zeros(len(y), y.shape[2:].numel(), y.shape[1])
        self.add_linear(added, x.flatten(2).transpose(1, 2).contiguous())
        y.view(*y.shape[:2], -1).add_(added.transpose(1, 2).contiguous())  # adding across the grain takes longer than both


class _Trio:
    """The ranks of several layers that are called one after another with the same x, which the first call computes for all. It knows
    nothing of those it serves but their numbers.

    x is known by being the same object, and is not held. Where an x was not read by all (another pack gives some of the layers one of
    their own), each computes its own ranks from then on. downs: A of all (P, in, sum of r) by bucket.
    """

    def __init__(self):
        self.downs: dict[tuple[int, ...], Tensor] = {}
        self.spans: list[tuple[int, int]] = []
        self.apart = False
        self.begin([])

    def begin(self, parts: Sequence[_Apart]) -> None:
        """Serve them, by what they use now."""
        self._x: weakref.ref | None = None
        self._found: dict[tuple[int, ...], Tensor] = {}
        self._served: set[tuple[int, tuple[int, ...]]] = set()
        if not parts:
            return
        ends = list(accumulate((part.down.shape[2] for part in parts), initial=0))
        self.spans = [(first, end - first) for first, end in pairwise(ends)]
        self.places = parts[0].factors.keys()
        for places in [known for known in self.downs if known not in self.places]:
            if len(self.downs) > _Apart.PARTS:
                del self.downs[places]
        for places in self.places - self.downs.keys():
            self.downs[places] = torch.cat([part.matrices(places)[0] for part in parts], 2)
            for part, span in zip(parts, self.spans, strict=True):
                part.lie_in(places, self.downs[places].narrow(2, *span))

    def ranks(self, at: int, x: Tensor, bucket: Bucket, factors: tuple) -> Tensor | None:
        """(P, B * n, r) of the layer of number `at`, as its own `_Apart.ranks` is; None where it is to compute them itself."""
        places = bucket.places
        if self._x is None or self._x() is not x or (at, places) in self._served:
            self.apart |= bool(self._served)
            self._x, self._found, self._served = weakref.ref(x), {}, set()
        if self.apart:
            self.begin([])
            return None
        if places not in self._found:
            self._found[places] = weigh(torch.bmm(bucket.pick(x), self.downs[places]), *factors)
        found = self._found[places].narrow(2, *self.spans[at])
        self._served.add((at, places))
        if len(self._served) == len(self.spans) * len(self.places):
            self.begin([])
        return found


class _Crops:
    """Adapters of a convolution over a plane, each place's in the box around it: A reads the box and what the kernel reaches beyond it.

    parts: place -> A (r, in, *kernel), and (rows, first column, B (n, columns, 1, 1)) for each group of outputs written to.
    """

    def __init__(self, flat: Sequence[tuple[int, Factors]], places: Sequence[int | None], device, dtype: torch.dtype):
        self.parts, self._owners, self._scales = {}, {}, {}
        for place in sorted({places[owner] for owner, _ in flat}):
            spans = _spans(factors for owner, factors in flat if places[owner] == place)
            own = sorted((item for item in flat if places[item[0]] == place), key=lambda item: spans.index(item[1].rows))
            ups, first = [], 0
            for rows in spans:
                up = torch.cat([factors.up.to(device, dtype) for _, factors in own if factors.rows == rows], dim=1)
                ups.append((rows, first, up[:, :, None, None]))
                first += up.shape[1]
            self.parts[place] = torch.cat([factors.down.to(device, dtype) for _, factors in own]), ups
            self._owners[place] = torch.tensor([owner for owner, factors in own for _ in range(factors.rank)])
            self._scales[place] = torch.tensor([factors.scale for _, factors in own for _ in range(factors.rank)])

    def setting(self, strengths: Sequence[float], places: Sequence[int | None], shares: Shares) -> tuple:
        """What `use` takes: the gains (r, 1, 1) of each place, and the shares."""
        strength = torch.tensor(strengths, dtype=torch.float32)
        device = next(iter(self.parts.values()))[0].device
        return {place: (strength[self._owners[place]] * self._scales[place])[:, None, None].to(device) for place in self.parts}, shares

    def use(self, setting: tuple) -> None:
        gains, self.shares = setting
        self.gains = {place: gain.to(self.parts[place][0].device) for place, gain in gains.items()}

    def follow(self, x: Tensor) -> None:
        for place, (down, ups) in self.parts.items():
            self.parts[place] = down.to(x.device, x.dtype), [(rows, first, up.to(x.device, x.dtype)) for rows, first, up in ups]
            self.gains[place] = self.gains[place].to(x.device)

    def add_convolution(self, y: Tensor, x: Tensor, convolution: dict) -> None:
        if tuple(y.shape[2:]) != self.shares.grid:
            self.shares.missed = True
            return
        for place, (down, ups) in self.parts.items():
            box = self.shares.boxes[place]
            if box is None:
                continue
            (top, bottom), (left, right) = box
            z = F.conv2d(self._reached(x, box, down, convolution), down, stride=convolution["stride"], dilation=convolution["dilation"])
            share = self.shares.rows[place].view(-1, 1, *self.shares.grid)[..., top:bottom, left:right]
            z = z.mul_(self.gains[place] * share)
            for rows, first, up in ups:
                out = _narrow(y, rows)[..., top:bottom, left:right]
                out.add_(F.conv2d(z.narrow(1, first, up.shape[1]), up))

    @staticmethod
    def _reached(x: Tensor, box, down: Tensor, convolution: dict) -> Tensor:
        """What the kernel sees for the outputs in a box: x cut to it, with zeros where it reaches over the edge."""
        beyond = []
        for axis, (first, last) in enumerate(box):
            step, pad = convolution["stride"][axis], convolution["padding"][axis]
            start = first * step - pad
            stop = (last - 1) * step - pad + convolution["dilation"][axis] * (down.shape[2 + axis] - 1) + 1
            low = max(start, 0)
            high = max(low, min(stop, x.shape[2 + axis]))
            x = x.narrow(2 + axis, low, high - low)
            beyond.append((low - start, stop - high))
        edges = (*beyond[1], *beyond[0])
        return F.pad(x, edges) if any(edges) else x


class _Magnitudes:
    """What the DoRAs of a layer make of its own output y: y + sum_i s_i S_i (g_i y + h_i). gains, shifts (I, out)."""

    def __init__(self, flat: Sequence[tuple[int, Factors]], device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._owners = torch.tensor([owner for owner, _ in flat])
        self._gains = torch.stack([factors.gain for _, factors in flat])
        self._shifts = torch.stack([torch.zeros_like(one.gain) if one.shift is None else one.shift for _, one in flat])

    def setting(self, strengths: Sequence[float], places: Sequence[int | None], shares: Shares | None) -> tuple:
        """What `use` takes: gains and shifts times the strengths, the place of each, which have none, and the shares."""
        strength = torch.tensor(strengths, dtype=torch.float32)[self._owners][:, None]
        both = [(strength * part).to(self.device, self.dtype) for part in (self._gains, self._shifts)]
        own = [places[owner] for owner in self._owners.tolist()]
        if shares is None or all(place is None for place in own):
            return *both, None, None, None
        columns = torch.tensor([place or 0 for place in own], device=self.device)
        return *both, columns, torch.tensor([place is None for place in own], device=self.device), shares

    def use(self, setting: tuple) -> None:
        self.gains, self.shifts, self.columns, self.free, self.shares = setting
        self._move()

    def follow(self, x: Tensor) -> None:
        self.device, self.dtype = x.device, x.dtype
        self._move()

    def _move(self) -> None:
        self.gains, self.shifts = (part.to(self.device, self.dtype) for part in (self.gains, self.shifts))
        if self.shares is not None:
            self.columns, self.free = self.columns.to(self.device), self.free.to(self.device)

    def _amounts(self, missing: int) -> Tensor:
        """(B or 1, tokens, I): how much of each acts on a row. Past the rows that are shared out, and on other rows than these (missing
        less than none), only those without a place act.
        """
        if self.shares is None:
            return self.gains.new_ones(1, 1, len(self.gains))
        if missing < 0:
            self.shares.missed = True
            return self.free.to(self.gains)[None, None]
        amounts = self.shares.rows.movedim(0, -1)[..., self.columns].masked_fill(self.free, 1.0).to(self.gains)
        if not missing:
            return amounts
        return torch.cat([amounts, self.free.to(self.gains).expand(len(amounts), missing, -1)], dim=1)

    def apply_linear(self, y: Tensor) -> None:
        if y.ndim == 2:  # one row for each picture of the batch
            amounts = self._amounts(0)[:, 0]
        else:
            amounts = self._amounts(y.shape[-2] - self.shares.tokens if self.shares is not None else 0)
        y.addcmul_(y, (amounts @ self.gains).to(y.dtype)).add_(amounts @ self.shifts)

    def apply_convolution(self, y: Tensor) -> None:
        flat = y.view(*y.shape[:2], -1)
        other = self.shares is not None and flat.shape[-1] != self.shares.tokens
        amounts = self._amounts(-1 if other else 0)
        flat.addcmul_(flat, (amounts @ self.gains).transpose(1, 2).to(y.dtype)).add_((amounts @ self.shifts).transpose(1, 2))


class Setting(NamedTuple):
    """One way for a `Stack` to act: of whom it is built, and what its parts take."""

    places: tuple[int | None, ...]
    apart: bool
    plain: tuple | None
    placed: tuple | None
    magnitudes: tuple | None


class Stack:
    """All adapters of one layer, called with the layer's output and input: returns the output with what they add.

    `adapters` holds one sequence of factors per adapter (several where it writes to several groups of rows), `convolution` the stride,
    padding and dilation of the layer where it is one. A and B are kept in `dtype`, gains in float32. It acts once it was told how strongly.
    Strengths change by `set_strengths`, which replaces tensors by some of the same shape, so that torch.compile keeps its graph.
    """

    # Rows times ranks that picking rows, or cutting boxes, must save to be worth its own cost: measured on a processor at widths from 64
    # to 640.
    WORTH = 0.45

    def __init__(self, adapters: Sequence[Sequence[Factors]], device, dtype: torch.dtype, convolution: dict | None = None):
        self._flat = [(owner, factors) for owner, group in enumerate(adapters) for factors in group]
        self._ranks = [(owner, factors.rank) for owner, factors in self._flat]
        self.convolution, self.device, self.dtype = convolution, device, dtype
        # Each row of the output comes of one of the input.
        self._by_rows = convolution is None or _is_pointwise(convolution, {tuple(one.down.shape[2:]) for _, one in self._flat})
        self._built: dict[tuple, tuple[_Together | None, _Together | _Apart | _Crops | None]] = {}
        dora = [item for item in self._flat if item[1].gain is not None]
        self._magnitudes = _Magnitudes(dora, device, dtype) if dora else None

    def set_strengths(self, strengths: Sequence[float], places: Sequence[int | None] = (), shares: Shares | None = None) -> None:
        """One strength per adapter, in the order they were given in, and the place in `shares` of each that has one: rows are the tokens
        of a linear layer, and the positions of a convolution's output.
        """
        self.use(self.setting(strengths, places, shares))

    def setting(self, strengths: Sequence[float], places: Sequence[int | None] = (), shares: Shares | None = None) -> Setting:
        """What `set_strengths` would set, for `use` to take as often as it is asked for: its tensors are on the device already."""
        places = tuple(places) if shares is not None else (None,) * len(strengths)
        apart = shares is not None and self._saves(places, shares)
        plain, placed = self._parts(places, apart)
        return Setting(
            places,
            apart,
            plain.setting(strengths, places, None) if plain else None,
            placed.setting(strengths, places, shares) if placed else None,
            self._magnitudes.setting(strengths, places, shares) if self._magnitudes else None,
        )

    def use(self, setting: Setting) -> None:
        self._plain, self._placed = self._parts(setting.places, setting.apart)
        if self._plain:
            self._plain.use(setting.plain)
        if self._placed:
            self._placed.use(setting.placed)
        if self._magnitudes:
            self._magnitudes.use(setting.magnitudes)

    @staticmethod
    def share(stacks: Sequence[Stack]) -> None:
        """Of stacks on layers that are called one after another with the same x, once they were told what to use: what is the same for all
        is computed once.
        """
        parts = [stack._placed for stack in stacks]
        apart = [part for part in parts if type(part) is _Apart]
        if len(apart) < len(parts):
            for part in apart:
                part.trio = None
            return
        first, amounts = parts[0], parts[0].amounts()
        alike = all(part.down.shape[:2] == first.down.shape[:2] and part.shares is first.shares for part in parts)
        alike = alike and all(part.amounts() == amounts and None not in dict(amounts).values() for part in parts)
        now = first.trio[0] if alike and first.trio else None
        if now is None or [part.trio for part in parts] != [(now, at) for at in range(len(parts))]:
            now = _Trio() if alike else None
            for at, part in enumerate(parts):
                part.trio = (now, at) if now else None
        if now is not None:
            now.begin(parts)

    def _parts(self, places: tuple[int | None, ...], apart: bool) -> tuple[_Together | None, _Together | _Apart | _Crops | None]:
        if (places, apart) not in self._built:
            while len(self._built) > 1:  # calls over the whole picture and over a part of it may take turns
                self._built.pop(next(iter(self._built)))
            self._built[places, apart] = self._build(places, apart)
        return self._built[places, apart]

    def _build(self, places: tuple[int | None, ...], apart: bool) -> tuple[_Together | None, _Together | _Apart | _Crops | None]:
        """The adapters without a place, and those with one."""
        plain = [item for item in self._flat if places[item[0]] is None]
        placed = [item for item in self._flat if places[item[0]] is not None]
        first = _Together(plain, self.device, self.dtype) if plain else None
        if not placed:
            return first, None
        if not apart:
            return first, _Together(placed, self.device, self.dtype)
        return first, (_Apart if self._by_rows else _Crops)(placed, places, self.device, self.dtype)

    def _saves(self, places: Sequence[int | None], shares: Shares) -> bool:
        """Whether it takes less work to compute each place's adapters on its own rows."""
        ranks: dict[int, int] = {}
        for owner, rank in self._ranks:
            place = places[owner]
            if place is not None:
                ranks[place] = ranks.get(place, 0) + rank
        if shares.tokens == 1 or len(ranks) < 2 or shares.whole:
            return False
        if not self._by_rows:
            plane = shares.grid is not None and all(factors.down.ndim == 4 for _, factors in self._flat)
            if not plane or isinstance(self.convolution["padding"], str):
                return False
            return sum(shares.area(place) * rank for place, rank in ranks.items()) < self.WORTH * shares.tokens * sum(ranks.values())
        return shares.picked * max(ranks.values()) < self.WORTH * shares.tokens * sum(ranks.values())

    def __call__(self, y: Tensor, fresh: bool, *args, **kwargs) -> Tensor:
        """`y` (..., out) or (B, out, *size) plus the adapters' part of x; written in place where nobody else holds y (`fresh`).

        x is the layer's first argument, by place or by whatever name its caller used.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        if self.dtype != x.dtype or self.device != x.device:
            self._follow(x)
        if not (fresh and y.is_contiguous()):
            y = y.clone(memory_format=torch.contiguous_format)
        if self._magnitudes and self.convolution is None:  # before anything is added: it is about the layer's own output
            self._magnitudes.apply_linear(y)
        elif self._magnitudes:
            self._magnitudes.apply_convolution(y)
        for part in (self._plain, self._placed):
            if part is None:
                continue
            if self.convolution is None:
                part.add_linear(y, x)
            else:
                part.add_convolution(y, x, self.convolution)
        return y

    def _follow(self, x: Tensor) -> None:
        """Some layers compute in another dtype than the model at large: the stack is cast once and stays with it."""
        self.device, self.dtype = x.device, x.dtype
        self._built = {key: built for key, built in self._built.items() if built[0] is self._plain and built[1] is self._placed}
        for part in (self._plain, self._placed, self._magnitudes):
            if part is not None:
                part.follow(x)


def _spans(factors: Iterable[Factors]) -> list[tuple[int, int] | None]:
    """The groups of outputs that are written to."""
    return sorted({one.rows for one in factors}, key=lambda rows: rows or (0, 0))


def _is_pointwise(convolution: dict, kernels: Iterable[tuple[int, ...]]) -> bool:
    padding = convolution["padding"]
    still = set(convolution["stride"]) == {1} and not isinstance(padding, str) and set(padding) == {0}
    return still and all(set(kernel) == {1} for kernel in kernels)


def _beside(parts: Sequence[Tensor], dimension: int) -> Tensor:
    return torch.cat(list(parts), dimension) if len(parts) > 1 else parts[0]


def _narrow(y: Tensor, rows: tuple[int, int] | None, dimension: int = 1) -> Tensor:
    return y if rows is None else y.narrow(dimension, *rows)
