"""Sparse autoencoders trained on vectors, a batch at a time.

    loss = |x - x^|^2 / V + c |e - e^|^2 / V        V: the variance of the vectors, so that 1 is what their mean alone would leave

x is the vector that was encoded and x^ what is decoded from it, both with their bias: drive x^ to x - b_dec, as one published trainer
does, and no figure of explained variance will show it. The second term revives dead latents (Gao et al., arXiv 2406.04093): e = x - x^ is
what the others leave, e^ the best that the greatest of the dead make of it. With e the other way round, as published elsewhere, it drives
them off.

Kinds: `topk`, `batch_topk` (a threshold for later is kept as it goes), `matryoshka` (batch_topk in which every prefix of the latents has
to do as well as it can, so that the first are general and the last particular) and `jumprelu` (thresholds learnt through a rectangle of
width `band` about each, and |L0 / k - 1|^2 added, more of it as training goes on).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from .sae import BATCH_TOPK, HELD, JUMPRELU, SAE, TOPK, kept_of_batch, prefixes

MATRYOSHKA = "matryoshka"
KINDS = (TOPK, BATCH_TOPK, MATRYOSHKA, JUMPRELU)
NONE, MEAN, STANDARDISE, WHITEN = "none", "mean", "standardise", "whiten"
NORMALISATIONS = (NONE, MEAN, STANDARDISE, WHITEN)
GROUPS = (1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
DEAD_AFTER, DEAD_SHARE = 10_000_000, 0.05  # vectors without firing; of a short training, this share of it
EPSILON = 6.25e-10  # Adam's
CLIP_NORM = 1.0
WARM, COOL = 0.02, 0.2  # shares of the training in which the rate rises to what it is, and falls to nothing
MEMORY = 0.999  # of the running threshold
WEISZFELD = 100  # steps towards a geometric median
TINY = 1e-12
FEW = 4096  # vectors of the sample that jumprelu's first thresholds are read from


class Settings(NamedTuple):
    """How to train. n latents, k of them active; steps of `batch` vectors.

    rate        of Adam; 0: 2e-4 / sqrt(n / 2^14)
    auxiliary   c, the weight of what revives dead latents
    dead_after  vectors after which a latent that did not fire is dead; 0: 10 million, or a twentieth of a short training
    revive      latents that are dead become what is left over of some vector, once in `dead_after` vectors, until the rate falls
    normalise   `mean` takes the mean off and scales all numbers alike; `standardise` scales each by itself, for models whose variance
                lies in few of them; `whiten` scales along the principal axes, where it lies in few directions; `none` scales only
    centre      b_dec at first: "mean", or "median" (geometric)
    groups      shares of the latents (matryoshka)
    band        of jumprelu's rectangle;  penalty: the weight of |L0 / k - 1|^2 at the end
    """

    n: int
    k: int
    kind: str = TOPK
    steps: int = 10_000
    batch: int = 4096
    rate: float = 0.0
    auxiliary: float = 1 / 32
    dead_after: int = 0
    revive: bool = True
    normalise: str = MEAN
    centre: str = "median"
    groups: tuple[float, ...] = GROUPS
    band: float = 0.01
    penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError that names what cannot be worked with."""
        choices = (("kind", KINDS), ("normalise", NORMALISATIONS), ("centre", ("mean", "median")))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'. Choose one of: {', '.join(known)}.")
        if not 1 <= self.k <= self.n:
            raise ValueError(f"k is {self.k} with {self.n} latents. Set it to a number from 1 to {self.n}.")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Set it to 1 or more.")
        for name in ("rate", "auxiliary", "penalty", "band", "dead_after"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}. Set it to a finite number from 0.")

    def full_rate(self) -> float:
        return self.rate or 2e-4 / math.sqrt(self.n / 2**14)

    def patience(self) -> int:
        """Vectors without firing after which a latent is dead."""
        return self.dead_after or max(self.batch, min(DEAD_AFTER, int(DEAD_SHARE * self.steps * self.batch)))

    def sizes(self) -> list[int]:
        """Latents of each group; the last takes what is left over."""
        ends = [round(self.n * share) for share in torch.tensor(self.groups).cumsum(0).tolist()]
        ends = sorted({end for end in ends[:-1] if 0 < end < self.n}) + [self.n]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


class Step(NamedTuple):
    """What a step saw before it learnt: its loss, the share of the variance left over, latents active per vector, latents dead."""

    loss: float
    fvu: float
    l0: float
    dead: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


class Trainer:
    """A sparse autoencoder while it learns, in float32 on the device of `sample`: some thousands of vectors (N, d), from which mean, scale
    and variance are taken and kept. The same settings, sample and batches give the same numbers (on a CPU, bit for bit).
    """

    def __init__(self, settings: Settings, sample: torch.Tensor):
        settings.check()
        if sample.ndim != 2 or len(sample) < 2:
            raise ValueError(f"The sample has the shape {tuple(sample.shape)}. Give two vectors or more, as (N, d).")
        sample = sample.float()
        if not sample.isfinite().all():
            raise ValueError("The sample holds NaN or infinity. Look for the layer or the step that makes it.")
        self.settings, self.device = settings, sample.device
        self.mean, self.std = normalisation(sample, settings.normalise)
        self.axes = whitening((sample - self.mean) / self.std) if settings.normalise == WHITEN else None
        sample = self._normalised(sample)
        self.variance = float((sample - sample.mean(0)).square().sum(-1).mean())
        if self.variance < TINY:
            raise ValueError("All vectors of the sample are the same. Collect vectors of several prompts, steps or places.")
        generator = torch.Generator().manual_seed(settings.seed)
        rows = torch.nn.functional.normalize(torch.randn(settings.n, sample.shape[1], generator=generator), dim=1).to(self.device)
        middle = sample.mean(0) if settings.centre == "mean" else geometric_median(sample)
        self.learnt = {"W_enc": rows.clone(), "b_enc": rows.new_zeros(settings.n), "W_dec": rows, "b_dec": middle}
        if settings.kind == JUMPRELU:
            # Each exceeded as often as k of n are: begun lower, many active latents learn to share a vector and do not come apart again.
            pre = (sample[:FEW] - middle) @ rows.T
            first = pre.quantile(1 - settings.k / settings.n, dim=0).clamp_min(settings.band)
            self.learnt["log_threshold"] = first.log()
        for tensor in self.learnt.values():
            tensor.requires_grad_()
        self.optimizer = torch.optim.Adam(self.learnt.values(), lr=settings.full_rate(), eps=EPSILON)
        self.idle = torch.zeros(settings.n, dtype=torch.int64, device=self.device)  # vectors since each latent fired
        self.threshold = torch.zeros((), device=self.device)
        self.noted, self.done = 0, 0  # thresholds that went into the running one; steps

    def step(self, vectors: torch.Tensor) -> Step:
        """Learn from a batch (B, d). One whose loss or gradient is not finite is not learnt from."""
        with torch.enable_grad():
            x = self._normalised(vectors.to(self.device).float())
            own = self.learnt
            pre = torch.nn.functional.linear(x - own["b_dec"], own["W_enc"], own["b_enc"])
            z, penalty = self._codes(pre)
            sums = prefixes(z, own["W_dec"], self.settings.sizes()) if self.settings.kind == MATRYOSHKA else [z @ own["W_dec"]]
            left = [(x - (added + own["b_dec"])).square().sum(-1).mean() / self.variance for added in sums]
            dead = self.idle >= self.settings.patience()
            error = (x - (sums[-1] + own["b_dec"])).detach()
            loss = sum(left) / len(left) + penalty
            if self.settings.auxiliary and bool(dead.any()):
                loss = loss + self.settings.auxiliary * auxiliary_loss(pre, error, dead, own["W_dec"], self.variance)
            seen = Step(float(loss.detach()), float(left[-1].detach()), float((z > 0).sum(-1).float().mean()), int(dead.sum()))
            if seen.finite:
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                seen = self._learn(seen)
        if seen.finite:
            self._note(z.detach())
            self._revive(error)
        return seen

    def _normalised(self, vectors: torch.Tensor) -> torch.Tensor:
        x = (vectors - self.mean) / self.std
        return x if self.axes is None else x @ self.axes.into

    def _codes(self, pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        settings = self.settings
        if settings.kind == TOPK:
            values, chosen = pre.topk(settings.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, chosen, values.clamp_min(0)), 0.0
        if settings.kind != JUMPRELU:
            return kept_of_batch(pre, settings.k), 0.0
        threshold = self.learnt["log_threshold"].exp()
        active = Heaviside.apply(pre, threshold, settings.band).sum(-1).mean()
        ramp = min(1.0, self.done / max(1, settings.steps // 2))
        return JumpReLU.apply(pre, threshold, settings.band), settings.penalty * ramp * (active / settings.k - 1).square()

    def _learn(self, seen: Step) -> Step:
        rows = self.learnt["W_dec"]
        with torch.no_grad():
            # What lies along a row would be undone by its going back to length 1, but would stay in the optimiser's averages.
            rows.grad -= (rows.grad * rows).sum(-1, keepdim=True) * rows
        norm = torch.nn.utils.clip_grad_norm_(self.learnt.values(), CLIP_NORM)
        if not bool(norm.isfinite()):
            return seen._replace(loss=math.nan)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.full_rate() * course(self.done, self.settings.steps)
        self.optimizer.step()
        with torch.no_grad():
            rows /= rows.norm(dim=-1, keepdim=True).clamp_min(TINY)
        self.done += 1
        return seen

    @torch.no_grad()
    def _note(self, z: torch.Tensor) -> None:
        """Which latents fired, and the least that was kept."""
        fired = (z > 0).any(0)
        self.idle = torch.where(fired, 0, self.idle + len(z))
        if self.settings.kind in (BATCH_TOPK, MATRYOSHKA) and bool(fired.any()):
            # A mean of the later part of what there is until that is long enough for an average of its own.
            memory = min(MEMORY, self.noted / (self.noted + 10))
            self.threshold = memory * self.threshold + (1 - memory) * z[z > 0].min()
            self.noted += 1

    @torch.no_grad()
    def _revive(self, error: torch.Tensor) -> None:
        """Latents that the auxiliary loss did not bring back become what is left over (B, d) of vectors, the likelier the more is left."""
        settings, every = self.settings, max(1, self.settings.patience() // self.settings.batch)
        if not settings.revive or self.done % every or self.done > (1 - COOL) * settings.steps:
            return
        dead = self.idle >= settings.patience()
        left = error.square().sum(-1).double().cpu()
        if not bool(dead.any()) or bool(dead.all()) or not float(left.sum()) > 0:
            return
        generator = torch.Generator().manual_seed(settings.seed + self.done)
        places = torch.multinomial(left, int(dead.sum()), replacement=True, generator=generator)
        rows = torch.nn.functional.normalize(error[places.to(error.device)], dim=1)
        made = {"W_dec": rows, "W_enc": rows * self.learnt["W_enc"][~dead].norm(dim=1).mean(), "b_enc": torch.zeros_like(rows[:, 0])}
        if "log_threshold" in self.learnt:
            made["log_threshold"] = self.learnt["log_threshold"][~dead].mean().expand(len(rows))
        for name, new in made.items():
            self.learnt[name][dead] = new
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[self.learnt[name]][key][dead] = 0.0
        self.idle[dead] = 0

    def sae(self) -> SAE:
        """What has been learnt, as it is meant to be used: copies, on the CPU."""
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.learnt.items()}
        if self.axes is not None:
            # W (A x - b) = W A (x - A^-1 b), and what is added goes back by A^-1: weights say it, in every file.
            into, back = (axes.cpu() for axes in self.axes)
            own |= {"W_enc": own["W_enc"] @ into.T, "W_dec": own["W_dec"] @ back, "b_dec": own["b_dec"] @ back}
        threshold, kind = None, self.settings.kind
        if "log_threshold" in own:
            threshold = own.pop("log_threshold").exp()
        elif kind != TOPK and self.noted:
            threshold = self.threshold.cpu().clone()
        norms = {"mean": None if self.settings.normalise == NONE else self.mean.cpu().clone(), "std": self.std.cpu().clone()}
        k = 0 if kind == JUMPRELU else self.settings.k
        return SAE(**own, activation=BATCH_TOPK if kind == MATRYOSHKA else kind, k=k, threshold=threshold, center=True, **norms)

    def state(self) -> dict[str, torch.Tensor]:
        """All that a training goes on from, as tensors of its own."""
        kept = {f"learnt.{name}": tensor for name, tensor in self.learnt.items()}
        for name, tensor in self.learnt.items():
            kept |= {f"{key}.{name}": torch.as_tensor(value) for key, value in self.optimizer.state.get(tensor, {}).items()}
        kept |= {"idle": self.idle, "threshold": self.threshold, "mean": self.mean, "std": self.std}
        kept |= {} if self.axes is None else {f"axes.{name}": axes for name, axes in self.axes._asdict().items()}
        kept |= {"counts": torch.tensor([self.done, self.noted]), "variance": torch.tensor(self.variance, dtype=torch.float64)}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in kept.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a `state` of a trainer with the same settings."""
        with torch.no_grad():
            for name, tensor in self.learnt.items():
                tensor.copy_(state[f"learnt.{name}"])
                moments = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in state}
                # The optimiser counts its steps on the CPU.
                self.optimizer.state[tensor] = {key: value.clone() if key == "step" else value.to(tensor) for key, value in moments.items()}
        self.idle, self.threshold, self.mean, self.std = (
            state[name].to(self.device, copy=True) for name in ("idle", "threshold", "mean", "std")
        )
        if self.axes is not None:
            self.axes = Axes(*(state[f"axes.{name}"].to(self.device, copy=True) for name in Axes._fields))
        self.done, self.noted = state["counts"].tolist()
        self.variance = float(state["variance"])


def auxiliary_loss(pre: torch.Tensor, error: torch.Tensor, dead: torch.Tensor, W_dec: torch.Tensor, variance: float) -> torch.Tensor:
    """|e^ - e|^2 / V, where e (B, d) = x - x^ without a gradient, and e^ the dead latents' greatest half of d pre-activations (B, n),
    decoded without a bias. Few dead latents count for less. dead (n,) bool, of which at least one holds.
    """
    count, most = int(dead.sum()), max(1, error.shape[-1] // 2)
    # -inf, not 0: among zeros the choice would fall on living latents as well.
    values, chosen = pre.masked_fill(~dead, -math.inf).topk(min(most, count), dim=-1, sorted=False)
    guess = torch.zeros_like(pre).scatter(-1, chosen, values.clamp_min(0)) @ W_dec
    return min(count / most, 1.0) * (guess - error).square().sum(-1).mean() / variance


def course(step: int, steps: int) -> float:
    """The share of the full rate in a step."""
    rise, fall = max(1.0, WARM * steps), max(1.0, COOL * steps)
    return min(1.0, (step + 1) / rise, (steps - step) / fall) if step < steps else 1 / fall


class Heaviside(torch.autograd.Function):
    """1 where a pre-activation exceeds its threshold. The gradient goes to the threshold alone, -1 / band within half a band of it (arXiv
    2407.14435, eq. 11).
    """

    @staticmethod
    def forward(ctx, pre, threshold, band):
        ctx.save_for_backward(pre, threshold)
        ctx.band = band
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.band / 2).to(grad.dtype)
        return None, (-near / ctx.band * grad).sum(0), None


class JumpReLU(torch.autograd.Function):
    """A pre-activation where it exceeds its threshold, else 0, with -threshold / band for the threshold near it (the same, eq. 10)."""

    @staticmethod
    def forward(ctx, pre, threshold, band):
        ctx.save_for_backward(pre, threshold)
        ctx.band = band
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.band / 2).to(grad.dtype)
        return grad * (pre > threshold), (-threshold / ctx.band * near * grad).sum(0), None


def normalisation(vectors: torch.Tensor, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std), both (d,), after which vectors (N, d) have length 1 on average: thresholds and rates mean the same for every layer."""
    mean = vectors.mean(0) if way != NONE else torch.zeros_like(vectors[0])
    centred = vectors - mean
    length = centred.square().sum(-1).mean().sqrt()
    std = length.expand_as(mean)
    if way == STANDARDISE:
        # Numbers that hardly vary are noise: enlarged to the others' size they would be learnt like them.
        spread = centred.square().mean(0).sqrt()
        std = spread.clamp_min(1e-3 * float(spread.square().mean().sqrt())) * math.sqrt(vectors.shape[1])
    return mean, std.clamp_min(TINY).clone()


class Axes(NamedTuple):
    """Vectors into principal axes that all vary alike, x @ into, and back; both (d, d), each the other's inverse."""

    into: torch.Tensor
    back: torch.Tensor


def whitening(vectors: torch.Tensor) -> Axes:
    """Of vectors (N, d) around 0: along each principal axis a variance of 1 / d, so that they have length 1 on average. As with single
    numbers, an axis that hardly varies is noise and stays small.
    """
    x = vectors.cpu().double()  # not every device has so many digits
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    spread = variances.clamp_min(1e-6 * float(variances.mean().clamp_min(TINY))).sqrt() * math.sqrt(x.shape[1])
    return Axes((axes / spread).to(vectors), (axes * spread).T.contiguous().to(vectors))


def geometric_median(vectors: torch.Tensor) -> torch.Tensor:
    """(d,) the point with the least sum of distances to vectors (N, d), by Weiszfeld's steps from their mean."""
    middle = vectors.mean(0)
    for _ in range(WEISZFELD):
        weights = 1 / (vectors - middle).norm(dim=1).clamp_min(TINY)
        nearer = (weights[:, None] * vectors).sum(0) / weights.sum()
        moved, middle = float((nearer - middle).norm()), nearer
        if moved <= 1e-6 * float(middle.norm()) + TINY:
            break
    return middle


class Metrics(NamedTuple):
    """How well an autoencoder does on some vectors.

    fvu      sum |x - x^|^2 / sum |x - mean|^2: the share of the variance left over, in the vectors' own units
    l0       latents active per vector
    dead     share of the latents that never fired
    cosine   mean cosine of x and x^
    density  (BINS,) latents by how often they fire, from once in a million to always, in equal steps of the logarithm; not the dead
    """

    fvu: float
    l0: float
    dead: float
    cosine: float
    density: torch.Tensor


BINS, RAREST = 24, -6.0  # of the density, and its lower end as a power of ten


class Measured(NamedTuple):
    """Metrics, and each latent's statistics (n,): "mean" over all vectors, those included in which it is 0, "max", and "freq", the share of
    vectors in which it fires. Its mean while active is mean / freq.
    """

    metrics: Metrics
    stats: dict[str, torch.Tensor]


@torch.no_grad()
def measure(sae: SAE, batches: Iterable[torch.Tensor]) -> Measured:
    """What an autoencoder makes of vectors, given in batches (N, d) and seen once. Raises ValueError where there are none."""
    count, left, cosine = 0, 0.0, 0.0
    total = square = None
    sums = sae.b_enc.new_zeros(sae.n, dtype=torch.float64)
    fired, most = sums.clone(), sums.float()
    for batch in batches:
        for x in batch.split(max(1, HELD // sae.n)):
            z = sae.encode(x)
            x = x.double()
            rebuilt = sae.decode(z).double()
            left += float((x - rebuilt).square().sum())
            cosine += float(torch.nn.functional.cosine_similarity(x, rebuilt, dim=-1).sum())
            total = x.sum(0) + (0 if total is None else total)
            square = x.square().sum(0) + (0 if square is None else square)
            sums += z.sum(0, dtype=torch.float64)
            fired += (z > 0).sum(0)
            most = torch.maximum(most, z.amax(0).float())
            count += len(x)
    if not count:
        raise ValueError("There are no vectors to measure on.")
    variance = float((square - total.square() / count).sum())
    often = fired / count
    density = often[often > 0].log10().float().cpu().histc(BINS, RAREST, 0.0) if bool(fired.any()) else torch.zeros(BINS)
    fvu = left / variance if variance > 0 else math.nan
    metrics = Metrics(fvu, float(fired.sum()) / count, float((fired == 0).double().mean()), cosine / count, density)
    return Measured(metrics, {"mean": (sums / count).float(), "max": most, "freq": often.float()})


class Ring:
    """Vectors in memory of a fixed size, drawn at random, each once: what was drawn makes room for new ones. Drawing from many pictures'
    vectors at a time is what keeps a batch from being one picture.

    size: how many fit. Vectors are kept in the type in which the first come.
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise ValueError(f"size is {size}. Set it to 1 or more.")
        self.size, self.kept = size, None
        self.generator = torch.Generator().manual_seed(seed)
        self.unread = torch.empty(0, dtype=torch.long)  # places, in the order in which they will be drawn
        self.free = torch.arange(size)
        self.filled = 0  # places that ever held a vector: the first ones, because new places are taken before those that were drawn

    def __len__(self) -> int:
        """Vectors that were not drawn yet."""
        return len(self.unread)

    @property
    def room(self) -> int:
        """New vectors that fit."""
        return len(self.free)

    @property
    def mixed(self) -> bool:
        """Whether it is at least half full of vectors that were not drawn yet."""
        return 2 * len(self) >= self.size

    def put(self, vectors: torch.Tensor) -> int:
        """Take in as many of vectors (N, d) as there is room for, the first of them; says how many. Raises ValueError for NaN, infinity and
        another width.
        """
        if vectors.ndim != 2 or (self.kept is not None and vectors.shape[1] != self.kept.shape[1]):
            wanted = "N, d" if self.kept is None else f"N, {self.kept.shape[1]}"
            raise ValueError(f"Vectors of the shape {tuple(vectors.shape)} came where ({wanted}) were to come. They are of another site.")
        taken = vectors[: self.room].detach().cpu()
        if not taken.isfinite().all():
            raise ValueError("The vectors hold NaN or infinity. The model's activations do not fit its type: load it in another one.")
        if self.kept is None:
            self.kept = torch.empty(self.size, vectors.shape[1], dtype=vectors.dtype)
        places, self.free = self.free[: len(taken)], self.free[len(taken) :]
        self.kept[places] = taken.to(self.kept.dtype)
        self.filled = max(self.filled, int(places.max()) + 1) if len(places) else self.filled
        self._add(places)
        return len(taken)

    def draw(self, count: int) -> torch.Tensor:
        """Up to `count` vectors (M, d) that were not drawn yet; fewer where no more are left."""
        if self.kept is None:
            raise ValueError("Nothing has been put in yet.")
        places, self.unread = self.unread[:count], self.unread[count:]
        self.free = torch.cat([self.free, places])
        return self.kept[places]

    def again(self) -> None:
        """Let all that is in memory be drawn once more: for sources that have ended."""
        self.free = torch.arange(self.filled, self.size)
        self.unread = torch.empty(0, dtype=torch.long)
        self._add(torch.arange(self.filled))

    def _add(self, places: torch.Tensor) -> None:
        whole = torch.cat([self.unread, places])
        self.unread = whole[torch.randperm(len(whole), generator=self.generator)]
