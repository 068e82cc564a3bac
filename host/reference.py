"""Regions that read a reference picture: in the layers in which the picture attends to itself, a region's positions attend to a second
picture's as well (ops.reference).

What they read are the layers' own keys and values of the reference, noised to the level of the step. It goes through the model in a call of
its own just before the step's, once for all of the guider's conditions: references whose texts are of one length go together. A call of its
own, because rows added to the step's call would have to bring every condition, ControlNet and patch that comes with a batch, and would be
evaluated once for each side of CFG.
"""

from __future__ import annotations

import copy
import re
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..ops.masks import pool
from ..ops.reference import join, log_sum_exp, read
from ..ops.schedule import Schedule
from .dispatcher import KEY, Call, Effect, Run, Sampling
from .families import family_of
from .places import Place
from .sites import Pyramid, sites
from .window import course

OVERRIDE = "optimized_attention_override"
MARK = f"{KEY} reference"  # an entry's group of references
# What belongs to the picture that is sampled, and not to the reference.
CONTROLS = ("control", "gligen")
NOT_ITS_OWN = (
    "area",
    "attention_mask",
    "attention_mask_img_shape",
    *CONTROLS,
    "control_apply_to_uncond",
    "default",
    "hooks",
    "mask",
    "mask_strength",
    "reference_latents",
    "set_area_to_bounds",
    "strength",
    *("start_percent", "end_percent", "timestep_start", "timestep_end", "clip_start_percent", "clip_end_percent"),
)


class ReferenceError(ValueError):
    """A reference that cannot be read, and what to do about it."""


class Picture:
    """A reference picture (height, width, 3) in 0..1 and a mask (height, width) of the concept in it, as the host's VAE encodes them."""

    def __init__(self, image: torch.Tensor, mask: torch.Tensor | None, vae):
        self.image, self.vae = image, vae
        given = torch.ones(image.shape[:2]) if mask is None else mask
        # Masks of another size are stretched over the picture, as the host's nodes do it.
        self.mask = given if given.shape == image.shape[:2] else pool(given[None].float(), *image.shape[:2])[0]
        self._last: tuple[tuple[int, int], torch.Tensor] | None = None

    def latent(self, height: int, width: int) -> torch.Tensor:
        """(1, channels, height, width), as the VAE gives it."""
        if self._last is None or self._last[0] != (height, width):
            scale = self.vae.spacial_compression_encode()
            pixels = fitted(self.image.movedim(-1, 0), self.mask, height * scale, width * scale).clamp(0, 1)
            self._last = (height, width), self.vae.encode(pixels.movedim(0, -1)[None])
        return self._last[1]

    def shares(self, height: int, width: int) -> torch.Tensor:
        """(height, width): how much of each cell of the latent is the concept."""
        return fitted(self.mask[None], self.mask, height, width)[0].clamp(0, 1)


def fitted(picture: torch.Tensor, mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A picture (channels, H, W) cut to a format and scaled to it; what is cut off lies as far from the mask's middle as can be."""
    tall, wide = picture.shape[-2:]
    ratio = min(tall / height, wide / width)
    sides = max(1, round(height * ratio)), max(1, round(width * ratio))
    firsts = []
    for axis, (side, whole) in enumerate(zip(sides, (tall, wide), strict=True)):
        there = (mask > 0).any(1 - axis).nonzero()
        middle = float(there[0] + there[-1] + 1) / 2 if len(there) else whole / 2
        firsts.append(min(max(0, round(middle - side / 2)), whole - side))
    cut = picture[:, firsts[0] : firsts[0] + sides[0], firsts[1] : firsts[1] + sides[1]]
    return F.interpolate(cut[None].float(), (height, width), mode="bilinear", antialias=True)[0]


class Reference(NamedTuple):
    """A reference hung on a region. label: the region's name; picture: with `latent` and `shares` like `Picture`; prompt: what it shows,
    empty where it is read with what the region reads; seed: of its noise.
    """

    label: str
    picture: Any
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    layers: str = "all"
    prompt: str = ""
    seed: int = 0
    schedule: Schedule | None = None

    def idle(self) -> str | None:
        """Why it does nothing, or None."""
        if self.strength == 0:
            return "strength is 0"
        if self.start == self.end:
            return f"start_percent and end_percent are both {self.start:g}, so no step lies between them"
        if self.schedule is not None and self.schedule.silent():
            return f"the schedule {self.schedule} is 0 throughout"
        if not self.picture.shares(64, 64).any():
            return "the mask is empty"
        return None

    def describe(self, model) -> str:
        names, every = layers_of(model, self.layers), layers_of(model, ALL)
        when = "" if (self.start, self.end) == (0.0, 1.0) else f" from {self.start:g} to {self.end:g} of sampling"
        times = f", times {self.schedule} over sampling" if self.schedule else ""
        where = f"{len(names)} of {len(every)} layers in which the picture attends to itself"
        return f"Reference at {self.strength:g}{when}{times}, in {where}."


ALL, LATE = "all", "last third"
LAYERS = (ALL, "second half", LATE)


def layers_of(model, choice: str) -> list[str]:
    """Names of the layers in which the picture attends to itself, in the model's order, those of a choice. Raises UnsupportedFamily."""
    pattern = family_of(model).pictures
    names = [name for name, _ in model.named_modules() if re.search(pattern, f".{name}")]
    parts = ("input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks")
    order = {name: at for at, name in enumerate(names)}
    names.sort(key=lambda name: (next(at for at, part in enumerate(parts) if part in name), order[name]))
    skipped = {ALL: 0, "second half": len(names) // 2, LATE: len(names) * 2 // 3}[choice]
    return names[skipped:]


class Kept(NamedTuple):
    """A reference in one layer: k, v (1, heads, positions, d) where the concept is, and the logarithms of its share of them."""

    k: torch.Tensor
    v: torch.Tensor
    log_share: torch.Tensor


class Memory:
    """One sampling's: references as latents, and what the layers made of them at the noise level of the last evaluation.

    sigma: that level; latents: by number, latent in the model's scale and noise; masks: by number, the concept's share at every halving;
    seen: by layer and number.
    """

    def __init__(self):
        self.sigma: float | None = None
        self.latents: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.masks: dict[int, Pyramid] = {}
        self.seen: dict[tuple[str, int], Kept] = {}
        self.under_way: tuple[int, ...] = ()
        self._at: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def where(self, number: int, level: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of a level where the concept is, and the logarithms of its share of them."""
        if (number, level) not in self._at:
            shares = self.masks[number].at(level).flatten()
            positions = shares.nonzero()[:, 0]
            self._at[number, level] = positions.to(device), shares[positions].log().to(device)
        positions, logs = self._at[number, level]
        return positions.to(device), logs.to(device)


class Asked(NamedTuple):
    """One attention as the model asks for it: q, k, v (B, heads, L, d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float

    @classmethod
    def of(cls, q, k, v, heads, mask=None, skip_reshape=False, scale=None, **_) -> Asked:
        if not skip_reshape:
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        if mask is not None:
            mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()
            mask = mask[:, None] if mask.ndim == 3 else mask
        return cls(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


class Attending:
    """An act around a layer that sees the attention in it, whatever computes that."""

    def __init__(self):
        self.called = False

    def run(self, inner, *args, **kwargs):
        options = kwargs.get("transformer_options")
        if options is None:
            return inner(*args, **kwargs)
        chained = partial(self._attend, options.get(OVERRIDE))
        return inner(*args, **kwargs | {"transformer_options": options | {OVERRIDE: chained}})

    # What there is to read comes and goes from step to step, which a compiled model would have to be compiled for again.
    @torch.compiler.disable
    def _attend(self, before, attention: Callable, *args, **kwargs):
        out = attention(*args, **kwargs) if before is None else before(attention, *args, **kwargs)
        return self.attend(out, Asked.of(*args, **kwargs), kwargs.get("skip_output_reshape", False))

    def attend(self, out: torch.Tensor, asked: Asked, by_heads: bool) -> torch.Tensor:
        """The attention's output as the layer shall see it: (B, L, heads * d), or by heads (B, heads, L, d). Each kind has its own way."""
        raise NotImplementedError


class Keep:
    """On a layer, in the references' own calls: keeps their keys and values. turn as of all parts that adapt."""

    def __init__(self, name: str, level: int, memory: Memory | None = None):
        self.name, self.level, self.memory = name, level, memory

    @classmethod
    def join(cls, parts, module, device, dtype) -> Keeping:
        return Keeping(parts[0])


class Keeping(Attending):
    def __init__(self, part: Keep):
        super().__init__()
        self.part = part

    def setting(self, strengths, places=(), shares=None) -> None:
        return None

    def use(self, setting) -> None:
        pass

    def attend(self, out, asked, by_heads):
        memory, part = self.part.memory, self.part
        for row, number in enumerate(memory.under_way):
            if row >= len(asked.k):
                return out
            grid = memory.masks[number].at(part.level)
            first = asked.k.shape[2] - grid.shape[-2] * grid.shape[-1]  # text goes first, where there is any
            if first < 0:
                return out
            positions, logs = memory.where(number, part.level, asked.k.device)
            k, v = (found[row : row + 1].index_select(2, positions + first) for found in (asked.k, asked.v))
            memory.seen[part.name, number] = Kept(k, v, logs)
        self.called = True
        return out


class Look:
    """On a layer: the positions of a place read reference `number`."""

    def __init__(self, name: str, number: int, memory: Memory | None = None):
        self.name, self.number, self.memory = name, number, memory

    @classmethod
    def join(cls, parts, module, device, dtype) -> Looking:
        return Looking(parts)


class Rows(NamedTuple):
    """Positions that read: batch (b,) rows of the batch, None for all of them; at (b, n) positions; log_weight (b, n), -inf for those that
    only fill up."""

    batch: torch.Tensor | None
    at: torch.Tensor
    log_weight: torch.Tensor

    @classmethod
    def of(cls, shares: torch.Tensor) -> Rows | None:
        """From shares (B or 1, tokens); None where there are none."""
        there = shares != 0
        if not there.any():
            return None
        batch = None
        if len(shares) > 1:
            batch = there.any(1).nonzero()[:, 0]
            shares, there = shares[batch], there[batch]
        at = torch.argsort((~there).to(torch.uint8), dim=-1, stable=True)[:, : int(there.sum(1).max())]
        return cls(batch, at, shares.gather(1, at).log())

    def index(self, batch: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """To pick (b, n, ...) of what is (batch, L, ...)."""
        rows = torch.arange(batch, device=self.at.device) if self.batch is None else self.batch
        at = self.at.expand(len(rows), -1) + first
        return rows[:, None].expand_as(at), at


class Plan:
    """Who reads what in one kind of call: made of shares, and anew where these have come to hold others."""

    def __init__(self, parts: Sequence[Look], strengths: Sequence[float], places: Sequence[int | None], shares):
        self.shares, self._made_of = shares, None
        self._reads = [
            (part, strength, place)
            for part, strength, place in zip(parts, strengths, places, strict=True)
            if place is not None and strength
        ]
        self.every: Rows | None = None
        self.own: tuple[tuple[Look, Rows], ...] = ()

    def follow(self) -> None:
        if self._made_of is self.shares.rows:
            return
        shares = self._made_of = self.shares.rows
        found = [(part, Rows.of(shares[place] * strength)) for part, strength, place in self._reads]
        self.own = tuple((part, rows) for part, rows in found if rows is not None)
        self.every = Rows.of(shares[[place for _, _, place in self._reads]].sum(0)) if self.own else None


class Looking(Attending):
    """References of several places, in one softmax with the picture's own positions."""

    def __init__(self, parts: Sequence[Look]):
        super().__init__()
        self.parts = tuple(parts)
        self.plan: Plan | None = None

    def setting(self, strengths, places=(), shares=None) -> Plan | None:
        return None if shares is None else Plan(self.parts, strengths, places, shares)

    def use(self, setting: Plan | None) -> None:
        self.plan = setting
        if setting is not None:
            setting.follow()

    def attend(self, out, asked, by_heads):
        plan = self.plan
        if plan is None or plan.every is None:
            self.called = True
            return out
        # Text goes first, where there is any. What else works on other tokens than the picture's is not ours.
        first, of_batch = asked.q.shape[2] - plan.shares.tokens, plan.shares.rows.shape[1]
        if first < 0 or of_batch not in (1, len(out)):
            return out
        self.called = True
        found = [(part.memory.seen.get((part.name, part.number)), rows) for part, rows in plan.own]
        if all(kept is None for kept, _ in found):
            return out
        heads = asked.q.shape[1]
        result = (out.transpose(1, 2) if by_heads else out.unflatten(-1, (heads, -1))).clone()
        total = result.new_zeros(result.shape[:3], dtype=torch.float32)
        index = plan.every.index(len(out), first)
        total[index] = log_sum_exp(_picked(asked.q, index), asked.k[_whole(index)], asked.scale, _bias(asked.mask, index)).transpose(1, 2)
        for kept, rows in found:
            if kept is None:
                continue
            index = rows.index(len(out), first)
            k, v, log_share = (part.to(out.device) for part in kept)
            more, lse = read(_picked(asked.q, index), k, v, log_share, asked.scale)
            own = result[index].transpose(1, 2), total[index].transpose(1, 2)
            made, sums = join(*own, more, lse + rows.log_weight[:, None])
            result[index], total[index] = made.transpose(1, 2), sums.transpose(1, 2)
        return result.transpose(1, 2) if by_heads else result.flatten(-2)


def _picked(x: torch.Tensor, index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """(b, heads, n, d) of x (B, heads, L, d)."""
    return x.transpose(1, 2)[index].transpose(1, 2)


def _whole(index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The rows of the batch that are asked for."""
    return index[0][:, 0]


def _bias(mask: torch.Tensor | None, index: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | None:
    """(b, heads or 1, n or 1, m) of a mask (B or 1, heads or 1, L or 1, m); a mask without a dimension of rows stands for all of them."""
    if mask is None:
        return None
    mask = mask[None, None] if mask.ndim == 2 else mask
    rows = index[0] if len(mask) > 1 else torch.zeros_like(index[0])
    if mask.shape[2] == 1:
        return mask[_whole((rows, rows))]
    return mask.transpose(1, 2)[rows, index[1]].transpose(1, 2)


def wanted(condition: str) -> float:
    """References are read by the rows of what is wanted: read by the negative prompt's as well, CFG would take most of them out again."""
    return 0.0 if "negative" in condition else 1.0


class ReferenceEffect(Effect):
    """The positions of a place read one of a reader's references, in the rows of what is wanted."""

    text = "none"

    def __init__(self, reader: Reader, number: int, place: Place, start: float, end: float):
        self.reader, self.number, self.start, self.end = reader, number, start, end
        # A place of its own: the region's acts on both sides of CFG, and divides the texts.
        self.place = copy.copy(place)
        self.place.texts, self.place.factors, self.place.group = {}, wanted, (self.place,)
        self.reference = reader.references[number]
        super().__init__(
            f"'{self.reference.label}': reference at {self.reference.strength:g}",
            {layer: Look(layer, number) for layer in reader.layers[number]},
        )

    def in_run(self, run: Run) -> ReferenceEffect:
        acting = copy.copy(self)
        memory = run.sampling.kept.setdefault(self.reader, Memory())
        acting.parts = {name: Look(name, self.number, memory) for name in self.parts}
        return acting

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        factor = course(model_sampling, self.start, self.end, self.reference.schedule)
        return lambda call: self.reference.strength * factor(call)


class Reader(Effect):
    """Evaluates references just before each evaluation in which one is read; acts in the calls that it adds."""

    added = 1

    def __init__(self, model, references: Sequence[Reference], texts: Sequence[torch.Tensor | None]):
        """texts: for each reference a context (1, n, width), or None for the positive condition's."""
        self.references, self.texts = tuple(references), tuple(texts)
        self.layers = [layers_of(model, reference.layers) for reference in references]
        names = list(dict.fromkeys(name for layers in self.layers for name in layers))
        self.levels = {name: site.level for name, site in sites(model, names).items()}
        super().__init__(f"Reading of {_counted(len(references), 'reference')}", {name: Keep(name, self.levels[name]) for name in names})
        lengths = [None if text is None else text.shape[1] for text in texts]
        # References whose texts are of one length are evaluated together.
        self.groups = [tuple(at for at, own in enumerate(lengths) if own == length) for length in dict.fromkeys(lengths)]
        self.condition = f"{KEY} {uuid.uuid4().hex} references"
        self.elsewhere = (self.condition,)

    def conditions(self, conds: Mapping[str, Sequence[dict]]) -> dict[str, list[dict]]:
        """An entry for each group: the positive condition's first, without what belongs to the sampled picture."""
        like = conds.get("positive") or next(iter(conds.values()), ())
        made = []
        for group, members in enumerate(self.groups) if like else ():
            entry = {key: value for key, value in like[0].items() if key not in NOT_ITS_OWN}
            if self.texts[members[0]] is not None:
                entry["cross_attn"] = torch.cat([self.texts[number] for number in members])
            made.append({**entry, "model_conds": {}, "uuid": uuid.uuid4(), MARK: group})
        return {self.condition: made}

    def in_run(self, run: Run) -> Reader:
        acting = copy.copy(self)
        acting.sampling = weakref.proxy(run.sampling)  # which holds this; threads of several devices have none of their own
        memory = run.sampling.kept.setdefault(self, Memory())
        acting.parts = {name: Keep(name, self.levels[name], memory) for name in self.parts}
        return acting

    def come_in(self, sampling: Sampling, latent: torch.Tensor) -> None:
        memory = sampling.kept[self] = Memory()
        model = sampling.guider.model_patcher.model
        for number, reference in enumerate(self.references):
            found = reference.picture.latent(*latent.shape[-2:])
            if found.shape[1:] != latent.shape[1:]:
                raise ReferenceError(
                    f"The reference of '{reference.label}' is a latent of {tuple(found.shape[1:])}, and the model samples one of "
                    f"{tuple(latent.shape[1:])}. Give Region Reference the model's own VAE."
                )
            noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(reference.seed))
            memory.latents[number] = model.process_latent_in(found.float().cpu()), noise
            memory.masks[number] = Pyramid(reference.picture.shares(*latent.shape[-2:])[None])

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        def strength(call: Call) -> float:
            names = self.sampling.names
            return float(any(names.get(entry) == self.condition for entry in call.options.get("uuids", ())))

        return strength

    def ahead(self, this: Sampling, evaluate, model, x, sigma, options: dict[str, Any]) -> dict[str, Any]:
        memory = this.kept.get(self)
        entries = [entry for entry in this.guider.conds.get(self.condition, ()) if MARK in entry]
        if memory is None or not entries or not any(wanted(name) for name, _ in this.entries.values()):
            return options
        if not hasattr(memory, "courses"):
            sampled = model.model_sampling
            memory.courses = [course(sampled, one.start, one.end, one.schedule) for one in self.references]
        call = Call(model, x, sigma, {})
        acting = {number for number, factor in enumerate(memory.courses) if factor(call) != 0.0}
        if not acting or memory.sigma == call.sigma:
            return options
        memory.seen.clear()
        for entry in entries:
            memory.under_way = self.groups[entry[MARK]]
            if acting.isdisjoint(memory.under_way):
                continue
            pairs = [memory.latents[number] for number in memory.under_way]
            latent, noise = (torch.cat(parts).to(x) for parts in zip(*pairs, strict=True))
            # The host gives what controls the sampled picture to every condition, whatever it had before.
            plain = {key: value for key, value in entry.items() if key not in CONTROLS}
            evaluate([plain], options, model.model_sampling.noise_scaling(sigma[:1], noise, latent))
        memory.sigma = call.sigma
        return options


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("s" if count != 1 else "")
