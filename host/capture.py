"""What the picture's positions attended to while it was sampled: taken from the model's own queries and keys as it runs, and kept where the
sampled latent finds it again.

Nothing is replaced: the model's attention stays the kernel that it is, and what it computes is not touched. Of UNets the outputs of `to_q`
and `to_k` are read, of Flux models those of the double blocks' norms; the share that each word has in a position's attention is made of
them beside the model's own work, for the positive prompt alone.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from comfy.ldm.flux.layers import apply_mod
from comfy.ldm.flux.math import apply_rope1

from ..ops.maps import columns, concept_attention, output_scores, split_heads
from .dispatcher import READS, Call, Effect, Run, Sampling
from .families import FINE, Family, family_of
from .run_record import digest
from .sites import JOINT, patch_level, sites
from .window import Window, course

STAGES = 10  # parts of sampling that are kept apart
UNIT = 2**10  # shares times this keep their digits in float16 down to some 1e-8
KEPT_BYTES = 512 * 2**20
POSITIVE = "positive"
ATTENTION, CONCEPTS = "attention", "concepts"
DEFAULT, ALL = "default", "all"


class Group(NamedTuple):
    """What was seen in one layer, or in all layers of a UNet on one grid.

    entry   number of the prompt among the guider's positive ones (0 where they are not combined)
    source  ATTENTION: shares of a position's attention; CONCEPTS: products of attention outputs
    layer   its name in reports
    grid    height and width of its positions
    kept    (STAGES, pictures, height * width, rows of the prompt): means over the calls of each stage of sampling; shares as float16 in
            units of 1 / UNIT, products, which know no bounds, as float32
    calls   calls in each stage, times layers
    """

    entry: int
    source: str
    layer: str
    grid: tuple[int, int]
    kept: torch.Tensor
    calls: tuple[int, ...]

    def shown(self, first: int = 0, past: int = STAGES) -> torch.Tensor:
        """The maps of stages first ... past - 1, in float32."""
        kept = self.kept[first:past].float()
        return kept / UNIT if self.source == ATTENTION else kept

    @property
    def maps(self) -> torch.Tensor:
        return self.shown()

    def with_stages_of(self, other: Group) -> Group:
        """With those stages of another capture of the same layer of which that has more calls."""
        if other.kept.shape != self.kept.shape:
            return self
        kept, calls = self.kept.clone(), list(self.calls)
        for stage, count in enumerate(other.calls):
            if count > calls[stage]:
                kept[stage], calls[stage] = other.kept[stage], count
        return self._replace(kept=kept, calls=tuple(calls))


class Captured(NamedTuple):
    """What one sampling showed. scale: pixels a side for each cell of its latent; latent: its height and width; calls: those captured, by
    stage; concepts: names of what travelled beside the prompt; notes: what was not captured, and why."""

    family: Family
    scale: int
    latent: tuple[int, int]
    calls: tuple[int, ...]
    groups: tuple[Group, ...]
    concepts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pictures(self) -> int:
        return self.groups[0].kept.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the decoded pictures."""
        return self.latent[0] * self.scale, self.latent[1] * self.scale

    def nbytes(self) -> int:
        return sum(group.kept.nbytes for group in self.groups)

    def joined(self, other: Captured) -> Captured:
        """With what another node captured of the same sampling, stage by stage; what both did counts once."""
        notes = dict.fromkeys((*self.notes, *other.notes))
        groups = {group[:3]: group for group in self.groups}
        differ = bool(self.concepts and other.concepts) and self.concepts != other.concepts
        if differ:
            notes["Two Capture Attention nodes have different concepts: those of the first were captured."] = None
        for group in other.groups:
            if not differ or group.source != CONCEPTS:
                own = groups.get(group[:3])
                groups[group[:3]] = group if own is None else own.with_stages_of(group)
        calls = tuple(max(pair) for pair in zip(self.calls, other.calls, strict=True))
        ordered = tuple(sorted(groups.values(), key=lambda group: group.entry))
        return self._replace(groups=ordered, concepts=self.concepts or other.concepts, notes=tuple(notes), calls=calls)


_captures: OrderedDict[str, Captured] = OrderedDict()
_lock = threading.Lock()


def find(latent) -> Captured | None:
    """What was captured while this latent was sampled, if it was in this session and not too long ago."""
    with _lock:
        return _captures.get(digest(latent))


def _keep(captured: Captured, latents: Sequence) -> None:
    """Keep it under each of the latents; the oldest go, but never the last."""
    with _lock:
        for latent in latents:
            key = digest(latent)
            _captures[key] = captured
            _captures.move_to_end(key)
        while len({id(kept) for kept in _captures.values()}) > 1 and _held() > KEPT_BYTES:
            _captures.popitem(last=False)


def _held() -> int:
    return sum(kept.nbytes() for kept in {id(kept): kept for kept in _captures.values()}.values())


class Sums:
    """A group while the sampling lasts: the stage under way on the model's device, those before it on the host's side."""

    def __init__(self, grid: tuple[int, int]):
        self.grid = grid
        self.ended: dict[int, tuple[torch.Tensor, int]] = {}
        self.stage, self.sum, self.calls = -1, None, 0

    def add(self, stage: int, maps: torch.Tensor) -> None:
        if stage != self.stage:
            self.end()
            self.stage = stage
        self.sum = maps.clone() if self.sum is None else self.sum.add_(maps.to(self.sum.device))
        self.calls += 1

    def end(self) -> None:
        if self.sum is not None:
            before, calls = self.ended.get(self.stage, (0.0, 0))
            self.ended[self.stage] = before + self.sum.cpu(), calls + self.calls
        self.sum, self.calls = None, 0

    def group(self, entry: int, source: str, layer: str) -> Group:
        self.end()
        shape = next(iter(self.ended.values()))[0].shape
        shares = source == ATTENTION
        kept = torch.zeros(STAGES, *shape, dtype=torch.float16 if shares else torch.float32)
        for stage, (total, calls) in self.ended.items():
            kept[stage] = total * ((UNIT if shares else 1) / calls)
        return Group(entry, source, layer, self.grid, kept, tuple(self.ended.get(stage, (None, 0))[1] for stage in range(STAGES)))


class Found:
    """What one sampling has shown so far. Copies of a model on further GPUs add to it from threads of their own."""

    def __init__(self):
        self.lock = threading.Lock()
        self.entries: list[Any] = []
        self.sums: dict[tuple[int, str, str], Sums] = {}
        self.latent = (0, 0)
        self.calls = [0] * STAGES
        self.notes: dict[str, None] = {}


class Now(NamedTuple):
    """One call: of which rows, as an index and chunk by chunk with the prompt's number and its part of the latent; its stage; how many
    rows it has in all, and positions."""

    rows: torch.Tensor
    batch: int
    tokens: int
    chunks: list[tuple[int, tuple[int, int, int, int]]]
    stage: int
    words: int


class Tap:
    """What the parts on one attention hand to one another within a call. All that changes between calls lies in tensors.

    rows, batch   rows of the positive prompt, and how many a call has
    tokens        positions of the picture (a Flux sequence may have more, for reference pictures); 0 where that need not be known
    first, words  of the keys those of the common text, where several texts lie behind one another; no words for all of them
    seen          (rows, positions, words) what the call showed, by source
    then          who is told what a cross-attention shows before the call goes on
    """

    def __init__(self):
        self.rows: torch.Tensor | None = None
        self.then: Callable[[torch.Tensor], None] | None = None
        self.batch = self.tokens = self.first = self.words = 0
        self.held: dict[str, Any] = {}
        self.seen: dict[str, torch.Tensor] = {}

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().index_select(0, self.rows)

    def clear(self) -> None:
        self.held, self.seen = {}, {}


class Reading:
    """A part and its own act: several of them on a module act one after another. What a module gives is not changed."""

    turn = READS

    def __init__(self, tap: Tap):
        self.tap = tap

    @classmethod
    def join(cls, parts, module, device, dtype) -> Readings:
        return Readings(parts, module)

    def read(self, module, output, args, kwargs) -> None:
        """Take what is needed of what a module was given and gave; each kind of reading has its own."""
        raise NotImplementedError


class Readings:
    """The act of readings that meet on a module."""

    def __init__(self, parts: Sequence[Reading], module: torch.nn.Module):
        self.parts, self.module = tuple(parts), module

    def __call__(self, output, fresh, *args, **kwargs):
        for part in self.parts:
            part.read(self.module, output, args, kwargs)
        return output

    def setting(self, strengths, places=(), shares=None) -> None:
        return None

    def use(self, setting) -> None:
        pass


class Queries(Reading):
    """On a cross-attention's `to_q`."""

    def read(self, module, output, args, kwargs) -> None:
        self.tap.held = {"q": output} if len(output) == self.tap.batch else {}


class Keys(Reading):
    """On its `to_k`, which is asked next."""

    def __init__(self, tap: Tap, heads: int):
        super().__init__(tap)
        self.heads = heads

    def read(self, module, output, args, kwargs) -> None:
        tap = self.tap
        if "q" in tap.held and len(output) == tap.batch:
            keys = output[:, tap.first : tap.first + tap.words] if tap.words else output
            q, k = (split_heads(tap.pick(part), self.heads) for part in (tap.held["q"], keys))
            tap.seen = {ATTENTION: columns(q, k)}
            if tap.then is not None:
                tap.then(tap.seen[ATTENTION])
        tap.held = {}


class Normed(Reading):
    """On the norm of a double block's queries and keys, of the picture or of the text; its third argument are the values."""

    def __init__(self, tap: Tap, name: str):
        super().__init__(tap)
        self.name = name

    def read(self, module, output, args, kwargs) -> None:
        if len(output[0]) == self.tap.batch:
            self.tap.held[self.name] = *output, args[2]


class Output(Reading):
    """On what comes behind a double block's attention to the picture: its input is what the attention gave."""

    def read(self, module, output, args, kwargs) -> None:
        if len(args[0]) == self.tap.batch:
            self.tap.held["output"] = args[0]


class Stream:
    """Concepts on their way through the double blocks. words (1, concepts, width): as they are encoded; rows: what the blocks have made of
    them; pooled: the prompt's pooled vector's part in the modulation; shift: what takes it out, as published.
    """

    def __init__(self, words: torch.Tensor, network: torch.nn.Module):
        self.words, self.network = words, network
        self.rows = self.pooled = self.shift = None

    def begin(self, tap: Tap, like: torch.Tensor) -> None:
        rows = self.network.txt_in(self.words.to(like))
        self.rows, self.shift = rows.expand(len(like), -1, -1), None
        if self.pooled is not None:
            pooled = tap.pick(self.pooled)
            self.shift = self.network.vector_in(torch.zeros(1, self.network.vector_in.in_layer.in_features).to(like)) - pooled

    def go_on(self, block, vec: torch.Tensor, turns: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(B, concepts, width) what the block's attention gives them; then the rest of the block, as the text goes through it."""
        vec = vec if self.shift is None else vec + self.shift
        attend, pass_on = block.txt_mod(vec)
        qkv = block.txt_attn.qkv(apply_mod(block.txt_norm1(self.rows), 1 + attend.scale, attend.shift))
        own_q, own_k, own_v = qkv.unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
        own_q, own_k = block.txt_attn.norm(own_q, own_k, own_v)
        read = concept_attention(apply_rope1(own_q, turns), apply_rope1(own_k, turns), own_v, k, v)
        rows = self.rows + apply_mod(block.txt_attn.proj(read), attend.gate)
        self.rows = rows + apply_mod(block.txt_mlp(apply_mod(block.txt_norm2(rows), 1 + pass_on.scale, pass_on.shift)), pass_on.gate)
        return read


class Pooled(Reading):
    """On what makes the prompt's pooled vector part of the modulation, which concepts go without."""

    def __init__(self, tap: Tap, stream: Stream):
        super().__init__(tap)
        self.stream = stream

    def read(self, module, output, args, kwargs) -> None:
        if len(output) == self.tap.batch:
            self.stream.pooled = output


class Block(Reading):
    """On a double block, behind its forward: what its attention showed, where it is `read`."""

    def __init__(self, tap: Tap, first: bool, read: bool, stream: Stream | None):
        super().__init__(tap)
        self.first, self.shown, self.stream = first, read, stream

    def read(self, module, output, args, kwargs) -> None:
        tap, held = self.tap, self.tap.held
        tap.held = {}
        pe, mask = kwargs.get("pe"), kwargs.get("attn_mask")
        if "text" not in held or "picture" not in held or pe is None:
            return
        (_, text_k, _), (q, k, v) = held["text"], held["picture"]
        words = text_k.shape[2]
        turns = pe.detach() if len(pe) == 1 else tap.pick(pe)
        k = apply_rope1(tap.pick(k), turns[:, :, words:])
        seen = {}
        if self.shown:
            several = 0 < tap.words < words  # where everything would see the common text, not where it does
            own = slice(tap.first, tap.first + tap.words) if several else slice(words)
            keys = torch.cat([apply_rope1(tap.pick(text_k)[:, :, own], turns[:, :, own]), k], 2)
            asked = apply_rope1(tap.pick(q), turns[:, :, words:])[:, :, : tap.tokens]
            plain = several or mask is None
            bias = None if plain else _bias(mask if len(mask) == 1 else tap.pick(mask), words, tap.tokens)
            seen[ATTENTION] = columns(asked, keys, 0, own.stop - (own.start or 0), bias)
        if self.stream is not None:
            vec = tap.pick(kwargs["vec"])
            if self.first:
                self.stream.begin(tap, vec)
            # Where the text is, at the origin: all of its rows are turned alike.
            turn = turns[:, :, :1].expand(-1, -1, self.stream.words.shape[1], -1, -1, -1)
            read = self.stream.go_on(module, vec, turn, k, tap.pick(v))
            if self.shown and "output" in held:
                seen[CONCEPTS] = output_scores(tap.pick(held["output"])[:, : tap.tokens], read)
        tap.seen, tap.held = seen, {}


def _bias(mask: torch.Tensor, words: int, tokens: int) -> torch.Tensor:
    """The rows of the picture's positions, as a bias with a dimension of heads."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    mask = mask[..., words : words + tokens, :] if mask.shape[-2] > 1 else mask
    return torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask.float()


class CaptureEffect(Effect):
    """Reads attention in a window of sampling; acts in calls that hold rows of the positive prompt, and changes nothing in them.

    layers: names of attentions (UNet) or double blocks (Flux), from the host's BaseModel; concepts: their names, and words (1, concepts,
    width), as encoded, for Flux models.
    """

    def __init__(
        self,
        model,
        layers: Sequence[str],
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        concepts: Sequence[str] = (),
        words: torch.Tensor | None = None,
    ):
        self.family = family_of(model)
        self.window, self.layers, self.concepts, self.words = (start_percent, end_percent), tuple(layers), tuple(concepts), words
        self.scale = _scale(model)
        parts, self.taps, self.stream = _parts(model, self.layers, words)
        super().__init__(f"Capture of {len(self.layers)} layers", parts)

    def in_run(self, run: Run) -> CaptureEffect:
        model = run.patcher.model
        copy = self.again(model)
        copy.sampling, copy.run = weakref.proxy(run.sampling), weakref.proxy(run)  # which hold this
        copy.found = run.sampling.kept.setdefault(self, Found())
        copy.open, copy.indices = [], {}
        jointly = _jointly(model)
        names = [] if jointly else [f"{name}.to_q" for name in self.layers]
        copy.levels = {name.removesuffix(".to_q"): site.level for name, site in sites(model, names).items()}
        copy.patch = patch_level(model) if jointly else 0
        return copy

    def again(self, model) -> CaptureEffect:
        """The same, for a model."""
        return type(self)(model, self.layers, *self.window, self.concepts, self.words)

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        within = course(model_sampling, *self.window)
        self.borders = [Window.of(model_sampling, stage / STAGES, 1.0).start for stage in range(1, STAGES)]
        return lambda call: within(call) if self._positive(call) else 0.0

    def _positive(self, call: Call) -> list[tuple[int, str, Any]]:
        """(chunk, name, key) of the chunks that the positive prompt has in a call."""
        found = []
        for chunk, key in enumerate(zip(call.options.get("uuids", ()), call.options.get("cond_or_uncond", ()), strict=False)):
            name, area = self.sampling.entries.get(key, (self.sampling.names.get(key[0], ""), None))
            if name == POSITIVE:
                found.append((chunk, key[0], area))
        return found

    def _reads_its_own(self, chunk: int) -> bool:
        """Whether a region's text is read in a chunk of the call, anywhere: it may have as many rows as the prompt."""
        spread = self.run.spread
        return spread is not None and any(texts[chunk] is not None for texts in spread.texts)

    def enter(self, call: Call) -> None:
        chunks, size = [], len(call.x) // max(1, len(call.options["uuids"]))
        shown = tuple(call.x.shape[-2:])
        full = self.sampling.full or shown
        known = True
        positive = self._positive(call)
        common = [chunk for chunk in positive if not self._reads_its_own(chunk[0])]
        if len(common) < len(positive):
            self.found.notes["Where regions read texts of their own, attention is not to the prompt alone, and was not captured."] = None
        positive = common or positive  # rows there must be
        for _, uuid, area in common:
            with self.found.lock:
                if not self.found.entries:
                    # The guider's order: the host takes the chunks of a call from the end, and some prompts late.
                    self.found.entries = [uuid for uuid, name in self.sampling.names.items() if name == POSITIVE]
                if uuid not in self.found.entries:
                    self.found.entries.append(uuid)
                entry = self.found.entries.index(uuid)
            # Sizes first, then offsets.
            top, left, height, width = (0, 0, *full) if area is None else (*area[2:4], *area[:2])
            known = known and shown == (min(height, full[0] - top), min(width, full[1] - left))
            chunks.append((entry, (top, left, *shown)))
        if not known:
            self.found.notes["Parts of the picture that another extension cuts out by itself (tiles?) were not captured."] = None
            chunks = []
        key = (tuple(chunk for chunk, *_ in positive), size, call.x.device)
        if key not in self.indices:
            rows = torch.cat([torch.arange(chunk * size, (chunk + 1) * size) for chunk in key[0]])
            self.indices[key] = rows.to(call.x.device)
        stage = sum(call.sigma <= border for border in self.borders)
        self.found.latent = full
        words = 0 if call.context is None else call.context.shape[1]
        self.open.append(Now(self.indices[key], len(call.x), _count(shown, self.patch), chunks, stage, words))
        self._tell()

    def _tell(self) -> None:
        """The numbers lie in the taps one by one: were the stage among them, torch.compile would compile anew for each."""
        for tap in self.taps.values():
            tap.clear()
            if self.open:
                tap.rows, tap.batch, tap.tokens = self.open[-1][:3]
                # In cross-attention, what stands behind the prompt was put there: a word of no value, by Bind Words. Not where regions read
                # it for themselves, once for each: no one of these is what the picture reads.
                tap.first, tap.words = 0, self.open[-1].words if self.levels and not self._several() else 0

    def _several(self) -> bool:
        return self.run.spread is not None and len(self.run.spread.lengths) > 1

    def look_back(self, call: Call) -> None:
        now, missed = self.open[-1], 0
        for name, tap in self.taps.items():
            missed += not tap.seen and name in self.layers
            for source, maps in tap.seen.items():
                words = len(self.concepts) if source == CONCEPTS else now.words
                missed += not self._add(name, source, maps, now, words)
        with self.found.lock:
            self.found.calls[now.stage] += 1
            if missed and now.chunks:
                self.found.notes[
                    f"{missed} of {len(self.layers)} layers could not be read in some calls: there, regions read texts of their own, or "
                    "another extension replaces the attention or the tokens that it works on."
                ] = None

    def _add(self, name: str, source: str, maps: torch.Tensor, now: Now, words: int) -> bool:
        """Whether maps (rows, positions, words) were what they should be."""
        level = self.levels.get(name, self.patch)
        each = len(maps) // max(1, len(now.chunks))
        for number, (entry, (top, left, height, width)) in enumerate(now.chunks):
            part = maps[number * each : (number + 1) * each]
            grid, full = grid_at((height, width), level), grid_at(self.found.latent, level)
            if part.shape[1] != grid[0] * grid[1] or part.shape[2] != words:
                return False
            if grid != full:
                whole = part.new_zeros(each, *full, words)
                top, left = min(top >> level, full[0] - grid[0]), min(left >> level, full[1] - grid[1])
                whole[:, top : top + grid[0], left : left + grid[1]] = part.unflatten(1, grid)
                part = whole.flatten(1, 2)
            layer = f"{full[0]} x {full[1]}" if self.levels else name.rpartition("diffusion_model.")[2]
            with self.found.lock:
                sums = self.found.sums.setdefault((entry, source, layer), Sums(full))
                if sums.grid != full or (sums.sum is not None and sums.sum.shape != part.shape):
                    return False
                sums.add(now.stage, part)
        return True

    def leave(self, call: Call) -> None:
        # A call around this one goes on; what it held of the attention under way is lost, and missed.
        self.open.pop()
        self._tell()

    def come_out(self, sampling: Sampling, latents: Sequence[torch.Tensor]) -> None:
        found = sampling.kept.pop(self, None)
        if found is None:
            return
        groups = tuple(sums.group(*key) for key, sums in sorted(found.sums.items(), key=lambda item: item[0][0]))
        captured = Captured(self.family, self.scale, found.latent, tuple(found.calls), groups, self.concepts, tuple(found.notes))
        others = sampling.kept.get(CaptureEffect)
        captured = sampling.kept[CaptureEffect] = captured if others is None else others.joined(captured)
        _keep(captured, latents)


def grid_at(latent: tuple[int, int], level: int) -> tuple[int, int]:
    """Height and width of the positions at a level: odd edges count whole."""
    height, width = latent
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def _count(latent: Sequence[int], level: int) -> int:
    height, width = grid_at((latent[0], latent[1]), level)
    return height * width


def _scale(model) -> int:
    """Pixels a side for each cell of the latent."""
    return getattr(model.latent_format, "spacial_downscale_ratio", None) or 8


def _jointly(model) -> bool:
    """Whether prompt and picture are one sequence."""
    return any(kind == JOINT for kind in family_of(model).rows)


def _parts(model, layers: Sequence[str], words: torch.Tensor | None) -> tuple[dict[str, Reading], dict[str, Tap], Stream | None]:
    """The parts by module, a tap for each layer (and for each block that concepts pass on their way), and the concepts' stream."""
    if not _jointly(model):
        taps, parts = {name: Tap() for name in layers}, {}
        for name, tap in taps.items():
            parts[f"{name}.to_q"], parts[f"{name}.to_k"] = Queries(tap), Keys(tap, model.get_submodule(name).heads)
        return parts, taps, None
    network, prefix = model.diffusion_model, layers[0].rpartition(".")[0]
    stream = None if words is None else Stream(words, network)
    passed = max(int(name.rpartition(".")[2]) for name in layers) + 1
    names = layers if stream is None else [f"{prefix}.{number}" for number in range(passed)]
    taps, parts = {name: Tap() for name in names}, {}
    for name, tap in taps.items():
        parts[f"{name}.img_attn.norm"], parts[f"{name}.txt_attn.norm"] = Normed(tap, "picture"), Normed(tap, "text")
        parts[name] = Block(tap, name == names[0], name in layers, stream)
        if stream is not None and name in layers:
            parts[f"{name}.img_attn.proj"] = Output(tap)
    if stream is not None and network.vector_in is not None:
        parts["diffusion_model.vector_in"] = Pooled(taps[names[0]], stream)
    return parts, taps, stream


def layers_of(model, choice: str = DEFAULT) -> list[str]:
    """Names of the layers to read: those of the family's row, or all that attend from the picture to words. Raises UnsupportedFamily."""
    family = family_of(model)
    names = [name for name, _ in model.named_modules() if re.search(family.maps, f".{name}")]
    if choice == ALL or len(names) < 2:
        return names
    if family.maps_read != FINE:
        return names[len(names) * 4 // 5 :]
    found = sites(model, [f"{name}.to_q" for name in names])
    coarsest = max(site.level for site in found.values())
    return [name for name in names if found[f"{name}.to_q"].level < coarsest] or names
