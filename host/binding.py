"""Groups of a prompt's words kept together while a model samples: biases on its attention from positions to words, and embeddings moved
before. `ops.binding` has the equations.

No model call is added and no gradient taken. What a layer's words win is told by its own queries and keys in the same call, so that
nothing is carried from step to step; the model's attention stays the kernel that it is and gets a bias. Of UNets it is the cross-attentions
that get it; of Flux models every block's joint attention, from the picture's positions to words, by the host's own `attn1_patch`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from comfy.ldm.flux.math import apply_rope1

from ..ops import binding as ops
from ..ops.maps import split_heads
from ..ops.masks import pool
from ..ops.phrases import things
from .capture import POSITIVE
from .dispatcher import Call, Effect, Run, attach
from .families import family_of
from .maps import Bound
from .maps import bind as find_words
from .regions import Drawing, Regions
from .sites import JOINT, Pyramid, patch_level, sites
from .window import course, remaining
from .words import length_of

MOST = 2**30  # numbers in the bias of one joint attention


class BindingError(ValueError):
    """Words that cannot be bound, and what to do about it."""


class Members(NamedTuple):
    """groups: for each prompt of a batch, the rows of each group of its words; length: rows that a whole prompt has, after which the host
    repeats it where it needs more.
    """

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    length: int

    def on(self, tokens: int, batch: int) -> torch.Tensor:
        """(1 or batch, groups, tokens) bool: which rows are whose. Pictures of a batch take turns with the prompts, as the host has it."""
        most = max(len(groups) for groups in self.groups)
        found = torch.zeros(len(self.groups), most, self.length, dtype=torch.bool)
        for prompt, groups in enumerate(self.groups):
            for number, rows in enumerate(groups):
                found[prompt, number, list(rows)] = True
        found = found[..., torch.arange(tokens) % self.length]
        return found if len(found) == 1 else found[torch.arange(batch) % len(found)]


class Now(NamedTuple):
    """What a layer needs to know of a call; numbers that change from step to step lie in tensors.

    rows     of the batch that read the positive prompt
    batch    rows in all
    members  (pictures or 1, G, words) bool
    places   (pictures or 1, G, positions) of this layer's grid; None where the form has none
    grid     height and width of the layer's positions
    weight   how strongly the form acts
    """

    rows: torch.Tensor
    batch: int
    members: torch.Tensor
    places: torch.Tensor | None
    grid: tuple[int, int]
    weight: torch.Tensor


class Form(Protocol):
    """What binds words in a layer. strength: as a node has it; `weight` makes of it what acts at a call, given what is left of sampling."""

    needs_places: bool
    sinks: bool  # whether what is taken goes to nobody in cross-attention: a word of no value behind the others takes it

    def weight(self, strength: float, left: float) -> float: ...

    def bias(self, logits: torch.Tensor, now: Now) -> torch.Tensor:
        """(rows, heads or 1, positions, words, and one more where it `sinks`) from logits (rows, heads, positions, words)."""


class Suppress:
    """At every position only the words of the group that is strongest there are read: all of it in the first step, and less and less, as
    Dense has it, because what is where is settled early and words held back later are missed in the details. alone: every word is a group
    by itself, what the others would have got goes to nobody, and nothing fades, as published for cross-attention.
    """

    needs_places = False

    def __init__(self, alone: bool = False):
        self.sinks = alone

    def weight(self, strength: float, left: float) -> float:
        return min(strength, 1.0) * (1.0 if self.sinks else left**ops.POWER)

    def bias(self, logits: torch.Tensor, now: Now) -> torch.Tensor:
        maps = ops.smoothed(ops.group_maps(logits.softmax(-1).mean(1), now.members), now.grid)
        lost = ops.losing(maps, now.members)
        bias = ops.shut(lost, now.weight)[:, None]
        if not self.sinks:
            return bias
        taken = ops.sink(logits, lost, now.weight)
        return torch.cat([bias.expand(-1, taken.shape[1], -1, -1), taken], -1)


class Dense:
    """Every group's words are drawn to its place."""

    needs_places, sinks = True, False

    def weight(self, strength: float, left: float) -> float:
        return strength * left**ops.POWER

    def bias(self, logits: torch.Tensor, now: Now) -> torch.Tensor:
        return ops.dense(logits, now.members, now.places, now.weight)


class Attention:
    """What both kinds of attention have in common: what is known of the call, and whether it could be followed."""

    def __init__(self, form: Form):
        self.form = form
        self.now: Now | None = None
        self.called = False

    def among(self, bias: torch.Tensor, now: Now, elsewhere: float = 0.0) -> torch.Tensor:
        """(batch, heads or 1, positions, words): `elsewhere` for the rows of other prompts."""
        return bias.new_full((now.batch, *bias.shape[1:]), elsewhere).index_copy(0, now.rows, bias)


class CrossBound(Attention):
    """Around a UNet's cross-attention."""

    def __init__(self, form: Form, module: torch.nn.Module):
        super().__init__(form)
        self.module = module

    def run(self, inner, x, context=None, value=None, mask=None, transformer_options=None):
        now, options = self.now, transformer_options or {}
        fits = now is not None and context is not None and len(x) == len(context) == now.batch
        if not fits or x.shape[1] != now.grid[0] * now.grid[1] or context.shape[1] < now.members.shape[-1]:
            return inner(x, context=context, value=value, mask=mask, transformer_options=options)
        self.called = True
        q, k = (split_heads(part.index_select(0, now.rows), self.module.heads) for part in (self.module.to_q(x), self.module.to_k(context)))
        words = now.members.shape[-1]  # a form within this one may have put a word of no value behind them
        logits = (q * q.shape[-1] ** -0.5 @ k[:, :, :words].transpose(-1, -2)).float()
        found = self.form.bias(logits, now)
        bias = self.among(found[..., :words], now).to(x.dtype)
        bias = torch.nn.functional.pad(bias, (0, context.shape[1] - words))
        bias = bias if mask is None else bias + as_bias(mask, x.dtype)
        if self.form.sinks:
            # Of what other prompts' rows have nothing is taken.
            taken = self.among(found[..., words:], now, ops.SHUT).to(x.dtype)
            heads = max(bias.shape[1], taken.shape[1])
            bias = torch.cat([part.expand(-1, heads, -1, -1) for part in (bias, taken)], -1)
            context = torch.nn.functional.pad(context, (0, 0, 0, 1))
            value = None if value is None else torch.nn.functional.pad(value, (0, 0, 0, 1))
        return inner(x, context=context, value=value, mask=bias, transformer_options=options)


class BlockBound(Attention):
    """Around a Flux block: its attention gets a bias from the picture's positions to words."""

    def run(self, inner, *args, **kwargs):
        options = kwargs.get("transformer_options") or {}
        patches = options.get("patches", {})
        # Behind all other patches: what is bound is what the model would have read.
        patches = patches | {"attn1_patch": [*patches.get("attn1_patch", ()), self.patch]}
        return inner(*args, **(kwargs | {"transformer_options": {**options, "patches": patches}}))

    def patch(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        now, words = self.now, extra_options["img_slice"][0]
        tokens = 0 if now is None else now.grid[0] * now.grid[1]
        if now is None or len(q) != now.batch or words != now.members.shape[-1] or q.shape[2] < words + tokens or pe is None:
            return {}
        turns = pe if len(pe) == 1 else pe.index_select(0, now.rows)
        asked = apply_rope1(q.index_select(0, now.rows)[:, :, words : words + tokens], turns[:, :, words : words + tokens])
        keys = apply_rope1(k.index_select(0, now.rows)[:, :, :words], turns[:, :, :words])
        logits = (asked * q.shape[-1] ** -0.5 @ keys.transpose(-1, -2)).float()
        found = self.form.bias(logits, now)[..., :words]
        found = found[:, :1] if self.form.sinks else found  # alike in all heads but for what a UNet's sink takes
        if found.shape[1] * len(q) * q.shape[2] * k.shape[2] > MOST:
            return {}
        bias = self.among(found, now).to(q.dtype)
        self.called = True
        behind = q.shape[2] - words - tokens
        bias = torch.nn.functional.pad(bias, (0, k.shape[2] - words, words, behind))
        return {"attn_mask": bias if attn_mask is None else bias + as_bias(attn_mask, q.dtype)}


def as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An attention mask, as the host takes it, as a bias with dimensions of batch and heads."""
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask[:, None] if mask.ndim == 3 else mask
    return torch.where(mask, 0.0, ops.SHUT).to(dtype) if mask.dtype == torch.bool else mask.to(dtype)


Places = Callable[[int, int], torch.Tensor]


class BindEffect(Effect):
    """Acts in calls that hold rows of the positive prompt. places: (height, width) -> (P, G, height, width), each group's mask on the
    picture, of P the pictures of a batch by turns; None where the form has none.
    """

    def __init__(
        self,
        model,
        name: str,
        form: Form,
        members: Members,
        strength: float,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        places: Places | None = None,
    ):
        super().__init__(name, {})
        self.family = family_of(model)
        self.form, self.members, self.strength, self.places = form, members, strength, places
        self.percents = start_percent, end_percent

    def in_run(self, run: Run) -> BindEffect:
        model = run.patcher.model
        copy = BindEffect(model, self.name, self.form, self.members, self.strength, *self.percents, self.places)
        copy.sampling, copy.run = weakref.proxy(run.sampling), weakref.proxy(run)  # which hold this
        copy.acts, copy.levels = attentions(model, self.form)
        copy.open, copy.known = [], {}
        return copy

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        within, left = course(model_sampling, *self.percents), remaining(model_sampling)

        def strength(call: Call) -> float:
            if within(call) == 0.0 or not self._positive(call):
                return 0.0
            return self.form.weight(self.strength, left(call))

        self.strength_of = strength
        return strength

    def around(self) -> Mapping[str, Any]:
        return self.acts

    def _positive(self, call: Call) -> list[tuple[int, Any]]:
        """(chunk, area) of the chunks that the positive prompt has in a call."""
        found = []
        for chunk, key in enumerate(zip(call.options.get("uuids", ()), call.options.get("cond_or_uncond", ()), strict=False)):
            name, area = self.sampling.entries.get(key, (self.sampling.names.get(key[0], ""), None))
            if name == POSITIVE:
                found.append((chunk, area))
        return found

    def enter(self, call: Call) -> None:
        positive = self._positive(call)
        size = len(call.x) // len(call.options["uuids"])
        words = 0 if call.context is None else call.context.shape[1]
        shown = tuple(call.x.shape[-2:])
        key = (tuple((chunk, None if area is None else tuple(area)) for chunk, area in positive), size, words, shown, self.sampling.full)
        if key not in self.known:
            if len(self.known) >= Run.SPREADS:
                self.known.clear()
            self.known[key] = self._layers(call.x.device, positive, size, words, shown)
        self.open.append((len(call.x), self.known[key], torch.tensor(self.strength_of(call), device=call.x.device)))
        for act in self.acts.values():
            act.called = False
        self._tell()

    def _layers(self, device, positive, size: int, words: int, shown: tuple[int, int]) -> dict[int, tuple]:
        """(rows, members, places, grid) by level, for one kind of call."""
        rows = torch.cat([torch.arange(chunk * size, (chunk + 1) * size) for chunk, _ in positive]).to(device)
        members = self.members.on(words, size)
        members = members if len(members) == 1 else members.repeat(len(positive), 1, 1)
        masks = [] if self.places is None else [self._cut(area, shown) for _, area in positive]
        pyramids = [Pyramid(one.flatten(0, 1)) for one in masks]
        found = {}
        for level in sorted(set(self.levels.values())):
            grid = (-(-shown[0] // 2**level), -(-shown[1] // 2**level))
            places = None
            if pyramids:
                turns = torch.arange(size) % len(masks[0])
                places = torch.cat([one.at(level).flatten(1).unflatten(0, masks[0].shape[:2])[turns] for one in pyramids]).to(device)
            found[level] = rows, members.to(device), places, grid
        return found

    def _cut(self, area, shown: tuple[int, int]) -> torch.Tensor:
        """The groups' masks on the part of the latent that is shown; on all of it, where that part is not known."""
        full = self.sampling.full or shown
        if area is not None:
            half = len(area) // 2
            (height, width), (top, left) = area[:half][-2:], area[half:][-2:]
            if (min(height, full[0] - top), min(width, full[1] - left)) == shown:
                return self.places(*full)[..., top : top + shown[0], left : left + shown[1]]
        return self.places(*shown)

    def _tell(self) -> None:
        for name, act in self.acts.items():
            act.now = None
            if self.open:
                batch, layers, weight = self.open[-1]
                rows, members, places, grid = layers[self.levels[name]]
                act.now = Now(rows, batch, members, places, grid, weight)

    def look_back(self, call: Call) -> None:
        around = sum(not act.called for act in self.acts.values())
        if around:
            self.run.notes[
                f"{self.name}: {around} of {len(self.acts)} attentions could not be followed in some calls. There, regions read texts of "
                "their own, the picture is too large for it, or another extension replaces the attention or what it works on."
            ] = None

    def leave(self, call: Call) -> None:
        self.open.pop()
        self._tell()


def attentions(model, form: Form) -> tuple[dict[str, Attention], dict[str, int]]:
    """The attentions from a model's picture to words by module name, and the level of each one's positions."""
    if _jointly(model):
        names = [
            f"diffusion_model.{kind}.{number}"
            for kind in ("double_blocks", "single_blocks")
            for number in range(len(getattr(model.diffusion_model, kind)))
        ]
        return {name: BlockBound(form) for name in names}, dict.fromkeys(names, patch_level(model))
    names = [name for name, _ in model.named_modules() if name.endswith(".attn2")]
    levels = {name.removesuffix(".to_q"): site.level for name, site in sites(model, [f"{name}.to_q" for name in names]).items()}
    return {name: CrossBound(form, model.get_submodule(name)) for name in names}, levels


def _jointly(model) -> bool:
    """Whether prompt and picture are one sequence."""
    return any(kind == JOINT for kind in family_of(model).rows)


GROUPS, WORDS, DENSE, SIMILARITY = "groups", "words", "dense", "similarity"
# Forms that act inside the model; similarity moves embeddings before.
FORMS: Mapping[str, Callable[[], Form]] = {GROUPS: Suppress, WORDS: lambda: Suppress(alone=True), DENSE: Dense}
MODES = (*FORMS, SIMILARITY)


class Settings(NamedTuple):
    """mode: one of MODES; reach: rows to either side that similarity looks at; likeness: the least cosine that counts there."""

    mode: str = GROUPS
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 0.5
    reach: int = 8
    likeness: float = 0.3

    def idle(self) -> str | None:
        """Why they do nothing, or None."""
        if self.strength == 0:
            return "strength is 0"
        if self.start_percent == self.end_percent:
            return f"start_percent and end_percent are both {self.start_percent:g}, so no step lies between them"
        return None


def written(groups: str) -> list[str]:
    """The phrases of `groups`, by lines and bars."""
    return list(dict.fromkeys(phrase.strip() for phrase in groups.replace("|", "\n").splitlines() if phrase.strip()))


def bind(
    patcher,
    positive: Sequence,
    clip,
    text: str,
    groups: str,
    settings: Settings,
    regions: Regions | None = None,
    masks: torch.Tensor | None = None,
) -> tuple[Any, Sequence, list[str]]:
    """MODEL and CONDITIONING with the groups of a prompt's words bound, each the one that was given where nothing is done to it, and report
    lines. masks (G, height, width). Raises BindingError, MapsError and UnsupportedFamily.
    """
    family = family_of(patcher.model)
    idle = settings.idle()
    if idle:
        return patcher, positive, [f"Nothing done: {idle}. The model passes through unchanged."]
    if clip is None:
        raise BindingError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
    phrases = written(groups)
    told = "Groups, as written" if phrases else "Groups, read out of the prompt"
    phrases = phrases or things(text)
    least = 2 if settings.mode in (GROUPS, WORDS) else 1
    if len(phrases) < least:
        found = f"'{phrases[0]}' alone" if phrases else "none"
        why = f"of groups of words there is {found}, and {'two must be there to compete' if least == 2 else 'one is needed'}"
        return patcher, positive, [f"Nothing done: {why}. Write them into `groups`, one a line. The model passes through unchanged."]
    bound = find_words(clip, family, text, phrases)
    lines = [f"{told}: {'; '.join(item.told for item in bound)}."]
    length = length_of(clip, family, text)
    if settings.mode == SIMILARITY:
        return patcher, _alike(positive, bound, length, settings, lines), lines
    places = _places(bound, regions, masks, lines) if settings.mode == DENSE else None
    rows = [item.rows for item in bound]
    if settings.mode == WORDS:
        rows = [(row,) for row in sorted({row for group in rows for row in group})]
    form = FORMS[settings.mode]()
    name = f"Bind ({settings.mode}) at {settings.strength:g}"
    members = Members((tuple(rows),), length)
    effect = BindEffect(patcher.model, name, form, members, settings.strength, settings.start_percent, settings.end_percent, places)
    patcher = patcher.clone()
    attach(patcher, effect)
    there = len(attentions(patcher.model, form)[0])
    lines.append(f"{settings.mode.capitalize()} at {settings.strength:g} in {there} attentions ({family.name}).")
    if form.sinks and _jointly(patcher.model):
        lines.append("As published, what words lose goes to nobody; here, where they share it with the picture, it goes to all others.")
    return patcher, positive, lines


def _alike(positive: Sequence, bound: Sequence[Bound], length: int, settings: Settings, lines: list[str]) -> list:
    """CONDITIONING whose groups' rows moved towards those like them."""
    words = torch.zeros(length, dtype=torch.bool)
    words[[row for item in bound for row in item.rows]] = True
    found = []
    for context, options in positive:
        if context.shape[1] != length:
            raise BindingError(
                f"positive has {context.shape[1]} rows and `text` {length}: connect the prompt in `text`, encoded by this CLIP."
            )
        rows = [ops.alike(one, words.to(one.device), settings.strength, settings.reach, settings.likeness) for one in context]
        found.append([torch.stack(rows), options.copy()])
    lines.append(
        f"{int(words.sum())} rows of the embedding moved {settings.strength:g} of the way towards those up to {settings.reach} rows away "
        f"with a cosine of {settings.likeness:g} or more. It holds in all steps."
    )
    return found


def _places(bound: Sequence[Bound], regions: Regions | None, masks: torch.Tensor | None, lines: list[str]) -> Places:
    """What draws each group's mask. Raises BindingError."""
    if regions is None and masks is None:
        raise BindingError("The mode dense needs to know where each group belongs: connect regions or masks, one for each group, in order.")
    if regions is not None and masks is not None:
        raise BindingError("Both regions and masks are connected. Disconnect one of them.")
    names = regions.names() if regions is not None else [f"mask {number + 1}" for number in range(len(masks))]
    if len(names) != len(bound):
        raise BindingError(f"There are {len(bound)} groups and {len(names)} places for them: give each group one, in the same order.")
    lines.append("; ".join(f"'{item.phrase}' in {name}" for item, name in zip(bound, names, strict=True)) + ".")
    draw = Drawing(regions).shares if regions is not None else lambda height, width: pool(masks, height, width)
    return lambda height, width: draw(height, width)[None]
