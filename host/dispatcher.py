"""The engine: everything of this pack that acts inside a model acts through here.

A node hands an `Effect` to `attach`; nothing is touched until the model samples. Then:

    ON_PRE_RUN        a `Run` resolves the effects' modules by name and their windows by the schedule, in the patcher that will sample
                      (clones, deep copies, delegates and copies on further GPUs included), and a `Gate` takes the place of the model's
                      `apply_model`
    ON_PREPARE_STATE  a gate that went with someone else's override comes back
    each call         the gate asks whose call it is and which effects act at its sigma, puts a `Layer` in the place of every module's
                      `forward` for as long as the call lasts, and takes them away again; a call in which nothing acts is the plain
                      model's call
    ON_CLEANUP        the gate goes

While gradients are recorded, the layers stay until the next call or the end of the run: the backward pass may evaluate them again.

Why forward exists only during the call: other code may replace, restore or re-inject forwards between calls (the host ejects and injects at
every load), two patchers may share one model in one sampling (DualModelGuider), and an error at any point must leave plain modules.
Why forward and no forward hook: torch.compile ignores hooks that are added after it compiled. It guards on the function behind a bound
method, not on the object it is bound to, so that the `Layer`s of every run compile once; strengths reach it as tensors.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP, add_wrapper_with_key, get_wrappers_with_key

from ..ops.shares import Shares
from .cross import CrossAct, Kept, SelfAct
from .families import row_of
from .joint import Joint, MaskUnfit
from .places import Place
from .run_record import UNHEARD, Evaluation, make_record, remember
from .sites import JOINT, attentions, patch_level, sites
from .spread import Crop, Kind, Spread
from .words import Words

log = logging.getLogger("concept_nodes")

KEY = "concept_nodes"
Strength = float | tuple[float, ...]
INSIDE = (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)  # what may change a prompt within a call
RUN = "concept_nodes_run"
ADAPTS, STEERS, READS = range(3)  # turns of parts on a module: as if in its weights, on its rows, and what changes nothing


class Act(Protocol):
    """What happens on one module after its forward. What changes between calls lies in tensors, or torch.compile compiles again."""

    def __call__(self, output: Any, fresh: bool, *args, **kwargs) -> Any:
        """The module's output as the model shall see it, given its output and its arguments. `output` may be written to where it is
        `fresh`, and must not be kept: the host's blocks write to it."""

    def setting(self, strengths: Sequence[Strength], places: Sequence[int | None] = (), shares: Shares | None = None) -> Any:
        """What `use` takes: one strength for each of the parts it was joined from, and where it acts on a part of the module's rows, its
        place in `shares`.
        """

    def use(self, setting: Any) -> None:
        """Act by a setting; called between model calls."""


class Part(Protocol):
    """What an effect places on one module. Parts of one class that meet on a module are joined into one act. The acts follow one another by
    `turn`, whatever the order of the nodes: each sees what those before it made of the module's output. An act that has a method
    `run(inner, *args, **kwargs)` and a mark `called` stands around the module's forward, `inner`, instead of following it. A class of acts
    with a method `share(acts)` is handed those on an attention's q, k and v, once they were told what to use."""

    turn = ADAPTS

    @classmethod
    def join(cls, parts: Sequence[Part], module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Act:
        """One act for all `parts` that meet on `module`. The model computes on `device`, for the most part in `dtype`."""


class Call:
    """One evaluation of a model, as the host announces it."""

    def __init__(
        self, model, x: torch.Tensor, t: torch.Tensor, options: Mapping[str, Any], context: torch.Tensor | None = None, references: int = 0
    ):
        self.model, self.x, self.t, self.options, self.context, self.references = model, x, t, options, context, references

    @cached_property
    def sigma(self) -> float:
        """The noise level. Reading it waits for the GPU: ask only when something depends on it."""
        return float(self.t.flatten()[0])

    @property
    def owner(self):
        """The patcher whose call this is. Two patchers may share one model in one sampling, and the host then remembers only the last."""
        for uuid in self.options.get("uuids", ()):
            patcher = _claims.get(uuid)
            if patcher is not None and patcher.model is self.model:
                return patcher
        return self.model.current_patcher


class Effect:
    """What a node adds to a model: parts by module name (from the host's BaseModel, "diffusion_model...."), and how strongly they act.

    `added` is how many model evaluations it adds to each call that it acts in. `place` is where on the picture it acts, None for
    everywhere; `text` says which of the prompt's rows get it then, in models that read prompt and picture as one sequence: those
    that its place reads ("own"), "none", "all", or `Words` of the common prompt. `apart` are places that the picture's attention to itself
    keeps apart: the strength is taken from the logits between positions of different ones. `elsewhere` are conditions of its own that are
    evaluated on another picture than the one that is sampled: what has a place on that does not act in them.
    """

    added = 0
    place: Place | None = None
    text: str | Words = "own"
    apart: tuple[Place, ...] = ()
    asks = False  # whether it needs what projections of words give in every call, kept keys and values or not
    behind: Mapping[str, str] = {}  # modules whose masks it draws anew in each call, and by what name it calls those it draws at once
    elsewhere: tuple[str, ...] = ()

    def __init__(self, name: str, parts: Mapping[str, Part]):
        self.name, self.parts = name, parts

    def conditions(self, conds: Mapping[str, Sequence[dict]]) -> Mapping[str, list[dict]]:
        """Conditions of its own that the guider shall prepare beside those it has, by a name that nobody else uses."""
        return {}

    def come_in(self, sampling: Sampling, latent: torch.Tensor) -> None:
        """Before a sampling, with the latent that it begins from, in the model's channels. The model is not yet where it will be."""

    def ahead(self, this: Sampling, evaluate: Callable, model, x: torch.Tensor, sigma: torch.Tensor, options: dict) -> dict:
        """Before the host evaluates a model's conditions (`this.entries`) at x: the model_options that it shall do so with. Those given are
        never written to. `evaluate(entries, options)` evaluates conditions of the effect's own there and then, and with a third argument
        at another x, which may have another number of rows.
        """
        return options

    def strengths(self, model_sampling) -> Callable[[Call], Strength]:
        """The strength call by call, 0.0 for calls left exactly as they are without the effect; several numbers where its parts need
        more than one, such as the noise level. Asked once per run, because nodes behind the effect's own may still change the model's
        schedule. Every effect has its own."""
        raise NotImplementedError

    def around(self) -> Mapping[str, Any]:
        """What computes modules in its calls, by module name: objects whose `run(inner, *args, **kwargs)` stands in a forward's place and
        calls it. Those of several effects lie over one another; whoever reads regions' texts lies above them all.
        """
        return {}

    def in_run(self, run: Run) -> Effect:
        """The effect as it acts in one run: a copy, where it keeps something of the run."""
        return self

    def enter(self, call: Call) -> None:
        """Before a call in which it acts."""

    def look_back(self, call: Call) -> None:
        """After a call that went well, in which it acted."""

    def leave(self, call: Call) -> None:
        """After a call in which it acted, however it went."""

    def come_out(self, sampling: Sampling, latents: Sequence[torch.Tensor]) -> None:
        """After a sampling that went well, with the latents that samplers hand out of it."""


def attach(patcher, effect: Effect) -> None:
    """Let `effect` act whenever `patcher`, which must be a clone of the caller's own, samples. Effects add up over chained nodes."""
    patcher.set_attachments(KEY, (*attached(patcher), effect))
    if patcher.get_callbacks(CallbacksMP.ON_PRE_RUN, KEY):
        return
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _begin)
    patcher.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, _stay)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, _end)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sample)
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _calculate)
    # A guider's second model is prepared with its own options only; what the patcher itself holds is not asked.
    if not get_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY, patcher.model_options, is_model_options=True):
        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _prepare, patcher.model_options, is_model_options=True)


def attached(patcher) -> tuple[Effect, ...]:
    """The effects on a patcher, in the order their nodes were chained."""
    return patcher.get_attachment(KEY) or ()


class Overlay:
    """A method of one object replaced through the object's `__dict__`, and put back.

    If someone replaces it again on top and is still there when ours is to go, ours stays in their chain and passes through; it goes when
    it is next called with nobody above it.
    """

    method: str

    def __init__(self, owner):
        self.owner = owner
        self.bound = None

    def place(self) -> None:
        held = vars(self.owner)
        self.before = held.get(self.method)
        self.inner = getattr(self.owner, self.method)
        self.alone = getattr(self.inner, "__func__", None) is getattr(type(self.owner), self.method)
        self.bound = held[self.method] = self.replacement

    def lost(self) -> bool:
        """Whether someone who was there before us took the method back, and ours with it. What is called then cannot lead to ours."""
        now = getattr(self.owner, self.method)
        return now is self.before or getattr(now, "__func__", None) is getattr(type(self.owner), self.method)

    def remove(self) -> None:
        held = vars(self.owner)
        if self.bound is None or held.get(self.method) is not self.bound:
            return
        if self.before is None:
            del held[self.method]
        else:
            held[self.method] = self.before
        # Without this the overlay and its own bound method would keep each other, and with them tensors on the device.
        self.bound = None

    def replacement(self, *args, **kwargs):
        """What is called in the method's place: each kind of overlay has its own."""
        raise NotImplementedError


class Layer(Overlay):
    """A module's forward, followed by the acts on it. It acts between `place` and `remove` only, whoever else still calls it."""

    method = "forward"

    def __init__(self, module: torch.nn.Module, acts: tuple[Act, ...]):
        super().__init__(module)
        self.acts = acts
        self.placed = self.muted = False
        self.last = False  # whether it is not placed again

    @property
    def free(self) -> bool:
        """Whether it may be placed again: not while it is in its place, and not where somebody else's forward is, which may lead to it."""
        return self.bound is None and self.method not in vars(self.owner)

    def place(self) -> None:
        super().place()
        self.placed = True

    def remove(self) -> None:
        super().remove()
        self.placed = False
        if self.last or self.bound is not None:
            self.empty()

    def empty(self) -> None:
        """Let go of what acts."""
        self.acts = ()

    def replacement(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        if self.muted:
            return output
        if not self.placed:
            self._go()
            return output
        for act in self.acts:
            output = act(output, self.alone, *args, **kwargs)
        return output

    def _go(self) -> None:
        if not torch.compiler.is_compiling():
            Overlay.remove(self)


class Around(Layer):
    """A module's forward as another act computes it, which may call the module's own."""

    def __init__(self, module: torch.nn.Module, act):
        super().__init__(module, ())
        self.act = act

    def empty(self) -> None:
        self.act = None

    def replacement(self, *args, **kwargs):
        if self.muted:
            return self.inner(*args, **kwargs)
        if not self.placed:
            self._go()
            return self.inner(*args, **kwargs)
        return self.act.run(self.inner, *args, **kwargs)


class Gate(Overlay):
    """A model's apply_model: every call of every patcher that shares the model passes here."""

    method = "apply_model"

    def __init__(self, model):
        super().__init__(model)
        self.runs: list[Run] = []
        self.layers: list[Layer] | None = None
        self.kept: list[Layer] = []

    @classmethod
    def of(cls, model) -> Gate:
        """The gate on top of `model`, placed now if there is none."""
        gate = getattr(vars(model).get(cls.method), "__self__", None)
        if not isinstance(gate, cls):
            gate = cls(model)
            gate.place()
        return gate

    def replacement(self, x, t, *args, **kwargs):
        if not self.runs:
            self.remove()
            return self.inner(x, t, *args, **kwargs)
        # apply_model(x, t, c_concat, c_crossattn, control, transformer_options)
        options = kwargs.get("transformer_options") or (args[3] if len(args) > 3 else {})
        references = _reference_tokens(self.owner, kwargs.get("ref_latents"))
        call = Call(self.owner, x, t, options, kwargs.get("c_crossattn", args[1] if len(args) > 1 else None), references)
        owner = call.owner
        run = next((run for run in reversed(self.runs) if run.patcher is owner), None)
        with self._acting(run.layers(call) if run else []):
            if run is None:
                return self.inner(x, t, *args, **kwargs)
            try:
                output = self.inner(x, t, *args, **run.arguments(kwargs, references))
                run.look_back()
                return output
            finally:
                run.leave()

    def release(self) -> None:
        """Take away the layers kept from the last call."""
        while self.kept:
            self.kept.pop().remove()

    @contextlib.contextmanager
    def _acting(self, layers: list[Layer]) -> Iterator[None]:
        # A call from within a call (some wrappers evaluate the model again) sees its own layers only. The outer call's stay where they
        # are: someone may have replaced a forward above them.
        self.release()
        outer, self.layers = self.layers, layers
        for layer in outer or ():
            layer.muted = True
        try:
            for layer in layers:
                layer.place()
            yield
        finally:
            self.kept += layers
            # With gradient checkpointing a backward pass evaluates parts of the call again: it must find the layers.
            if outer is not None or not torch.is_grad_enabled():
                self.release()
            for layer in outer or ():
                layer.muted = False
            self.layers = outer


class Sampling:
    """One sampling under way: the runs in it, the steps that its sampler has ended so far, and the last denoised latent."""

    def __init__(self, guider=None):
        self.guider = guider
        self.runs: list[Run] = []
        # Condition entry (by the host's uuid) -> its name in the guider: "positive", "negative", "middle", ...
        self.names: dict[Any, str] = {}
        # The same for the evaluation under way, by (uuid, its number among the conditions): the host copies entries, uuid and all, to give
        # every area a counterpart. With the latent's height and width, and each entry's area in it.
        self.entries: dict[tuple[Any, int], tuple[str, Sequence[int] | None]] = {}
        self.full: tuple[int, int] | None = None
        # Whether nobody is known to change a condition's words from call to call.
        self.steady = False
        self.ended: list[int] = []
        self.denoised: torch.Tensor | None = None
        self.kept: dict[Any, Any] = {}  # what effects make once for all of it


class Joined(NamedTuple):
    """The acts on one module, each with the effects that it joins, and those of them that follow its forward."""

    acts: list[tuple[Act, list[int]]]
    following: tuple[Act, ...]


class Run:
    """One patcher's effects from its pre_run to its cleanup; tensors on the device live no longer than this."""

    SPREADS = 8  # kinds of calls remembered: conditions of other sizes or areas take turns in every step
    MOST_PAIRS = 2**26  # positions times positions that a bias between them is made for
    # On a processor, what a run keeps fills the gaps in which a small model's temporary tensors lay. They move to the end of the heap,
    # which glibc gives back to the system with each that is freed, and faults in again page by page: a tenth of a step. It stops doing so
    # for tensors up to the largest that it saw come and go (it counts none above 32 MiB), as it does after any model with such tensors.
    GROWS_BY = 31 * 2**20

    def __init__(self, patcher):
        if patcher.load_device.type == "cpu":
            torch.empty(self.GROWS_BY, dtype=torch.uint8)
        self.patcher = patcher
        self.depth = len(_nested())
        self.sampling = _nested()[-1] if _nested() else Sampling()
        self.effects = attached(patcher)
        names = dict.fromkeys(name for effect in self.effects for name in effect.parts)
        self.modules = {name: patcher.model.get_submodule(name) for name in names}
        self.acting = [effect.in_run(self) for effect in self.effects]
        self.strengths = [effect.strengths(patcher.get_model_object("model_sampling")) for effect in self.acting]
        masked = any(effect.place is not None or effect.apart for effect in self.effects)
        self.sites = sites(patcher.model, self.modules) if masked else {}
        kept = Kept()
        selves, crosses = attentions(patcher.model) if masked else ([], [])
        self.selves = {name: SelfAct() for name in selves}
        self.crosses = {name: CrossAct(patcher.model.get_submodule(name), kept) for name in crosses}
        # The effects that act on keys and values of words.
        self.wording = {
            index for index, effect in enumerate(self.effects) if any(name.endswith((".to_k", ".to_v")) for name in effect.parts)
        }
        self.reads_jointly = masked and any(kind == JOINT for kind in row_of(patcher.model).rows)
        self.joint: Joint | None = None
        self.attention_sites = sites(patcher.model, [f"{name}.to_q" for name in (*self.selves, *self.crosses)])
        self.behind = {name: key for effect in self.effects for name, key in effect.behind.items()}
        self.notes: dict[str, None] = {}
        self._around: list[tuple[str, Any]] = []
        self._calls: list[tuple[torch.Tensor, int, tuple[int, ...]]] = []
        self.spread: Spread | None = None  # of the call under way
        self._key = self._told = self._read = None
        self._acts: dict[str, Joined] = {}
        # The last call's, for the next one: a hundred objects made anew in each call would set off the garbage collector, which goes
        # through all that a host holds.
        self._laid: tuple[Mapping, list, list[Layer]] = {}, [], []
        # Calls on another picture than the sampled one take turns with those on it, step by step: each kind keeps its acts.
        self._elsewhere, self._aside = False, (None, {}, {})
        self._others = {name for effect in self.effects for name in effect.elsewhere}
        self._spreads: dict[tuple, Spread] = {}
        # What the acts use, by what was told: kinds of calls that take turns find theirs again.
        self._settings: dict[tuple, list[tuple[Act, Any]]] = {}
        # The calls under way, and what was told for them: some wrappers evaluate the model again from within a call.
        self._open: list[tuple] = []

    def layers(self, call: Call) -> list[Layer]:
        """The layers for one call: none when no effect acts in it."""
        elsewhere = self._shows_another(call)
        strengths = tuple(
            0.0 if elsewhere and (effect.place is not None or effect.apart) else strength(call)
            for effect, strength in zip(self.effects, self.strengths, strict=True)
        )
        active = tuple(index for index, strength in enumerate(strengths) if strength != 0.0)
        self._calls.append((call.t.detach().flatten()[:1].float(), len(self.sampling.ended), active))
        if not active:
            self.joint, self._told, self._around = None, None, []
            self._open.append(None)
            return []
        if elsewhere != self._elsewhere:
            aside = self._key, self._acts, self._settings
            self._key, self._acts, self._settings = self._aside
            self._elsewhere, self._aside, self._told = elsewhere, aside, None
        # Effects without parts (texts, isolation, what only adds a call) come and go from call to call, and join nothing.
        with_parts = tuple(index for index in active if self.acting[index].parts)
        key = (with_parts, call.x.device, call.model.get_dtype_inference())
        if key != self._key:
            self._acts = {name: self._join(name, *key) for name in self.modules}
            self._key, self._told = key, None
            self._settings.clear()
        told = (strengths, self._kind(call, active), self._live(active))
        if told != self._told:
            self._tell(*told, active, call)
            self._told = told
        self._open.append((self._key, self._acts, told, active, call))
        for index in active:
            self.acting[index].enter(call)
        kept = None if any(self.acting[index].asks for index in active) else self._texts_stay(call)
        for _, act in self._around:
            act.called = False
            if isinstance(act, CrossAct):
                act.of = None if kept is None else (kept, told[1:])
        around = [pair for index in active for pair in self.acting[index].around().items()] + self._around
        acts, before, layers = self._laid
        # A call within a call finds the outer one's in their places.
        if acts is not self._acts or before != around or not all(layer.free for layer in layers):
            self._let_go()
            # Those that compute a module anew lie below those that change what it gives.
            layers = [Around(self.patcher.model.get_submodule(name), act) for name, act in around]
            layers += [Layer(self.modules[name], joined.following) for name, joined in self._acts.items() if joined.following]
            self._laid = self._acts, around, layers
        return layers

    def _let_go(self) -> None:
        """Other layers from now on. Those that are in their places are their call's until it ends."""
        for layer in self._laid[2]:
            layer.last = True
            if layer.bound is None:
                layer.empty()
        self._laid = {}, [], []

    def close(self) -> None:
        """At its end: nothing leads from what others may still hold to what is on the device."""
        self.sampling = None  # which holds the run for its record
        self._let_go()

    def arguments(self, arguments: dict[str, Any], references: int) -> dict[str, Any]:
        """A call's keyword arguments, with the prompt that is read instead of its own."""
        if self.joint is None or "c_crossattn" not in arguments:
            return arguments
        context = arguments["c_crossattn"]
        try:
            return arguments | self.joint.arguments(context, references, arguments.get("attention_mask"))
        except MaskUnfit as unfit:
            self.notes[f"A condition's own attention mask was left out: it {unfit}."] = None
            return arguments | self.joint.arguments(context, references)

    def leave(self) -> None:
        """After a call: what was told for the call around it holds again."""
        ended = self._open.pop()
        for index in ended[3] if ended else ():
            self.acting[index].leave(ended[4])
        if self._open and self._open[-1] is not None:
            key, self._acts, told, active, call = self._open[-1]
            if key != self._key:
                self._key = key
                self._settings.clear()  # they are for other acts
            if told != self._told:
                self._tell(*told, active, call)
                self._told = told
            for _, act in self._around:
                if isinstance(act, CrossAct):
                    act.of = None  # what the rest of the call reads is not the inner call's

    def look_back(self) -> None:
        """After a call that went well: what it showed, and what of it went around us."""
        *_, active, call = self._open[-1] or ((), None)
        for index in active:
            self.acting[index].look_back(call)
        if any(spread.missed() for spread in self._spreads.values()):
            self.notes["Layers that worked on other tokens than the picture's (a shrunk one?) got nothing of what has a place."] = None
        around = sum(not act.called for _, act in self._around)
        if around:
            told = "another extension replaces them, or changed how many tokens they work on"
            self.notes[f"{around} of {len(self._around)} attentions did not follow the regions: {told}."] = None

    def _join(self, name: str, active: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Joined:
        """The acts on one module."""
        members: dict[type, list[int]] = {}
        for index in active:
            if name in self.acting[index].parts:
                members.setdefault(type(self.acting[index].parts[name]), []).append(index)

        def parts(indices):
            return [self.acting[index].parts[name] for index in indices]

        ordered = sorted(members.items(), key=lambda item: getattr(item[0], "turn", ADAPTS))
        acts = [(kind.join(parts(indices), self.modules[name], device, dtype), indices) for kind, indices in ordered]
        return Joined(acts, tuple(act for act, _ in acts if not hasattr(act, "run")))

    def _share(self) -> None:
        """Let acts on layers that read the same rows compute together what they can, where they have a `share`."""
        for name in self.selves:
            kinds: dict[type, list[Act]] = {}
            for end in ("to_q", "to_k", "to_v"):
                for act, _ in self._acts[f"{name}.{end}"].acts if f"{name}.{end}" in self._acts else ():
                    kinds.setdefault(type(act), []).append(act)
            for kind, acts in kinds.items():
                if len(acts) > 1 and hasattr(kind, "share"):
                    kind.share(acts)

    def _kind(self, call: Call, active: tuple[int, ...]) -> Kind | None:
        """What the masks of the active effects have to be fitted to; None where none has a mask."""
        if all(self.effects[index].place is None and not self.effects[index].apart for index in active):
            return None
        shown = tuple(call.x.shape[-2:])
        full, names, crops = self.sampling.full or shown, [], []
        for uuid, number in zip(call.options.get("uuids", ()), call.options.get("cond_or_uncond", ()), strict=False):
            # Entries that a guider made itself have no name; they stand for nothing in particular, and read the common text.
            name, area = self.sampling.entries.get((uuid, number), (self.sampling.names.get(uuid, ""), None))
            names.append(name)
            crops.append(_crop(full, area))
        crops = crops or [Crop(0, 0, *full)]
        if any((crop.height, crop.width) != shown for crop in crops):
            self.notes[
                f"The model was shown {shown[0]}x{shown[1]} of a latent of {full[0]}x{full[1]}, and where in it is not known (tiles?): "
                "the regions were fitted to each part."
            ] = None
            full, crops = shown, [Crop(0, 0, *shown)]
        if len(set(crops)) == 1:
            crops = crops[:1]
        tokens = call.context.shape[1] if call.context is not None else 0
        return Kind(full, tuple(crops), tuple(names), len(call.x), tokens, call.references)

    def _live(self, active: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of the masks that come of the sampling itself, where any do."""
        places = [place for index in active for place in (self.effects[index].place, *self.effects[index].apart)]
        sources = dict.fromkeys(place.source for place in places if place is not None and place.source is not None)
        return tuple(self.sampling.kept[source].version(len(self.sampling.ended)) for source in sources)

    def _tell(self, strengths: tuple[Strength, ...], kind: Kind | None, live: tuple[int, ...], active: tuple[int, ...], call: Call) -> None:
        """Hand strengths and places to the acts."""
        self.joint, self._around = None, []
        # Kept keys and values stay where only strengths change that have no say in them, as those of steers do from step to step.
        read = live, tuple(strength if index in self.wording else strength != 0.0 for index, strength in enumerate(strengths))
        if self._told is None or read != self._read:
            self._read = read
            for cross in self.crosses.values():
                cross.forget()
        placed = {index: (self.effects[index].place, self.effects[index].text) for index in active if self.effects[index].place}
        spread = self.spread = self._spread(kind, live, active, placed, call) if kind else None
        settings = self._settings.pop((strengths, kind), None)
        if settings is None:
            settings = list(self._made(strengths, placed, spread))
        while len(self._settings) >= self.SPREADS:
            self._settings.pop(next(iter(self._settings)))
        self._settings[strengths, kind] = settings  # the last used goes last
        for act, setting in settings:
            act.use(setting)
        self._share()
        around = [(name, act) for name, joined in self._acts.items() for act, _ in joined.acts if hasattr(act, "run")]
        if spread and self.crosses:
            self._read_apart(spread, placed)
        if kind and self.selves:
            self._keep_apart(strengths, spread, active)
        self._around += around

    def _shows_another(self, call: Call) -> bool:
        """Whether a call is of conditions on another picture than the one that is sampled."""
        return bool(self._others) and any(self.sampling.names.get(uuid) in self._others for uuid in call.options.get("uuids", ()))

    def _made(self, strengths: tuple[Strength, ...], placed: Mapping, spread: Spread | None) -> Iterator[tuple[Act, Any]]:
        """Every act with what it is to use."""
        for name, joined in self._acts.items():
            for act, members in joined.acts:
                values = [strengths[index] for index in members]
                own = [index for index in members if index in placed]
                if not own:
                    yield act, act.setting(values)
                else:
                    numbers, shares = spread.shares(self.sites[name], own, self.behind.get(name, ""))
                    number_of = dict(zip(own, numbers, strict=True))
                    yield act, act.setting(values, [number_of.get(index) for index in members], shares)

    def _spread(self, kind: Kind, live: tuple[int, ...], active: tuple[int, ...], placed: Mapping, call: Call) -> Spread:
        # A joint sequence depends on isolation's strength, which is part of its bias; a spread for cross-attention does not.
        apart = tuple((index, self.strengths[index](call)) for index in active if self.effects[index].apart)
        key = (kind, active, call.x.device, apart if self.reads_jointly else ())
        if key not in self._spreads or self._spreads[key].live != live:
            spread = self._spreads.get(key) or Spread(kind, placed, call.x.device, self.sampling.kept)
            if spread.live != live:
                spread.follow(live)
            if self.reads_jointly:
                level = patch_level(call.model)
                few = spread.tokens(level) ** 2 * len(kind.crops) <= self.MOST_PAIRS
                biases = [-strength * spread.apart(level, self.effects[index].apart) for index, strength in apart if few]
                if apart and not few:
                    self._note_too_many(spread.tokens(level))
                own = any(self.effects[index].text == "own" and self.effects[index].parts for index in placed)
                spread.joint = spread.read_jointly(own, sum(biases) if biases else None, level)
            else:
                spread.read_apart()
            spread.refresh()
            while len(self._spreads) >= self.SPREADS:
                self._spreads.pop(next(iter(self._spreads)))
            self._spreads[key] = spread
        spread = self._spreads[key] = self._spreads.pop(key)  # the last used goes last
        self.joint = spread.joint
        return spread

    def _read_apart(self, spread: Spread, placed: Mapping) -> None:
        """Cross-attention: texts of segments where they differ, or where adapters on words do."""
        words = {name.rpartition(".")[0] for index in placed for name in self.effects[index].parts if name.endswith((".to_k", ".to_v"))}
        readers = any(segment.reader for segment in spread.segments)
        for name, cross in self.crosses.items():
            if readers or name in words:
                cross.set_texts(
                    spread.segment_shares(self.attention_sites[f"{name}.to_q"]),
                    spread.texts,
                    spread.lengths,
                    spread.kind.tokens,
                    spread.kind.batch,
                )
                self._around.append((name, cross))

    def _keep_apart(self, strengths: tuple[Strength, ...], spread: Spread, active: tuple[int, ...]) -> None:
        """Self-attention: less of it between places that are kept apart."""
        isolating = [index for index in active if self.effects[index].apart]
        biases: dict[int, torch.Tensor | None] = {}
        for name, act in self.selves.items() if isolating else ():
            level = self.attention_sites[f"{name}.to_q"].level
            if level not in biases:
                own = tuple((index, strengths[index]) for index in isolating)
                if (level, own) not in spread.biases:
                    spread.biases = {key: bias for key, bias in spread.biases.items() if key[1] == own}
                    spread.biases[level, own] = self._bias(spread, level, dict(own))
                biases[level] = spread.biases[level, own]
            act.bias = biases[level]
            if act.bias is not None:
                self._around.append((name, act))

    def _bias(self, spread: Spread, level: int, strengths: Mapping[int, float]) -> torch.Tensor | None:
        """(batch or 1, 1, tokens, tokens)"""
        tokens = spread.tokens(level)
        if tokens**2 * len(spread.kind.crops) > self.MOST_PAIRS:
            self._note_too_many(tokens)
            return None
        apart = sum(-strength * spread.apart(level, self.effects[index].apart) for index, strength in strengths.items())
        if len(apart) > 1:
            apart = apart.repeat_interleave(spread.kind.batch // len(apart), 0)
        return apart[:, None].to(spread.device)

    def _note_too_many(self, tokens: int) -> None:
        self.notes[f"Isolation was left out in attentions over {tokens} positions: they are too many for it."] = None

    def _texts_stay(self, call: Call):
        """By what keys and values of a call's texts are known again in later steps; None where they might differ all the same."""
        options = call.options
        if torch.is_grad_enabled() or "attn2_patch" in options.get("patches", {}) or any(_wrapped(options, kind) for kind in INSIDE):
            return None
        # Hooks change weights from step to step; the host applies them through the patcher that it began last.
        patcher = self.patcher.model.current_patcher or self.patcher
        if not self.sampling.steady or patcher.current_hooks is not None or "uuids" not in options:
            return None
        return tuple(zip(options["uuids"], options.get("cond_or_uncond", ()), strict=False))

    def evaluations(self) -> list[Evaluation]:
        """All calls of the run. Waits for the GPU, once."""
        levels = torch.cat([level for level, _, _ in self._calls]).tolist() if self._calls else []
        return [
            Evaluation(level, step, tuple(self.effects[index] for index in active))
            for level, (_, step, active) in zip(levels, self._calls, strict=True)
        ]


def _reference_tokens(model, latents) -> int:
    """Tokens that reference pictures take behind the picture's own."""
    if not latents:
        return 0
    side = 2 ** patch_level(model)
    return sum(-(-latent.shape[-2] // side) * -(-latent.shape[-1] // side) for latent in latents)


def _wrapped(options: Mapping[str, Any], kind: str) -> bool:
    return any(options.get("wrappers", {}).get(kind, {}).values())


def _crop(full: tuple[int, int], area: Sequence[int] | None) -> Crop:
    """The part of a latent that the host cuts out for a condition's area: sizes first, then offsets."""
    if area is None:
        return Crop(0, 0, *full)
    half = len(area) // 2
    (height, width), (top, left) = area[:half][-2:], area[half:][-2:]
    return Crop(top, left, min(height, full[0] - top), min(width, full[1] - left))


# Condition entry (by the host's uuid) -> the patcher that evaluates it, where a guider samples with two patchers.
_claims: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_sampling = threading.local()


def _nested() -> list[Sampling]:
    """The samplings of this thread that are under way; a node may sample from within another's."""
    return vars(_sampling).setdefault("nested", [])


def under_way() -> Sampling | None:
    """The sampling that this thread is in."""
    return _nested()[-1] if _nested() else None


def _begin(patcher) -> None:
    """ON_PRE_RUN."""
    # One run per patcher and sampling: a guider may begin the same patcher twice, and a run that died before its cleanup is replaced.
    _close(patcher)
    run = Run(patcher)
    gate = Gate.of(patcher.model)
    gate.runs.append(run)
    vars(patcher).setdefault(RUN, []).append((gate, run))
    for sampling in _nested()[-1:]:
        sampling.runs.append(run)


def _stay(patcher, *_) -> None:
    """ON_PREPARE_STATE, before each evaluation."""
    for gate, _run in vars(patcher).get(RUN, ())[-1:]:
        if gate.lost():
            gate.place()


def _end(patcher) -> None:
    """ON_CLEANUP."""
    _close(patcher)
    if RUN not in vars(patcher):
        _release(uuid for uuid, owner in _claims.items() if owner is patcher)


def _close(patcher) -> None:
    """End the patcher's run in this sampling; a sampling around this one keeps its own."""
    runs = vars(patcher).get(RUN, [])
    while runs and runs[-1][1].depth >= len(_nested()):
        gate, run = runs.pop()
        gate.runs.remove(run)
        gate.release()
        run.close()
        if not gate.runs:
            gate.remove()
    if not runs:
        vars(patcher).pop(RUN, None)


def _prepare(executor, patcher, noise_shape, conds, *args, **kwargs):
    """PREPARE_SAMPLING. Conditions belong to the first patcher that is prepared with them: a guider prepares its second model first,
    with its own conditions only, and its main model with all of them."""
    if attached(patcher):
        for entries in conds.values():
            _claim(patcher, entries)
    return executor(patcher, noise_shape, conds, *args, **kwargs)


def _claim(patcher, conds) -> None:
    for uuid in _uuids(conds):
        _claims.setdefault(uuid, patcher)


def _calculate(executor, model, conds, x_in, timestep, model_options):
    """CALC_COND_BATCH. The last place that sees whole latents, and entries with their areas."""
    for this in _nested()[-1:]:
        this.full, this.entries, this.steady = tuple(x_in.shape[-2:]), {}, _steady(model_options)
        for number, entries in enumerate(conds):
            # The first is no copy of another condition's.
            name = this.names.get(entries[0].get("uuid"), "") if entries else ""
            for entry in entries or ():
                this.entries[entry.get("uuid"), number] = name, entry.get("area")

        def evaluate(own: Sequence[dict], options: dict, x: torch.Tensor = x_in, this=this) -> list[torch.Tensor]:
            this.entries |= {(entry["uuid"], 0): (this.names.get(entry["uuid"], ""), entry.get("area")) for entry in own}
            return executor(model, [own], x, timestep if x is x_in else timestep[:1].expand(len(x)), options)

        for effect in attached(this.guider.model_patcher):
            model_options = effect.ahead(this, evaluate, model, x_in, timestep, model_options)
    return executor(model, conds, x_in, timestep, model_options)


def _steady(options: Mapping[str, Any]) -> bool:
    """Whether nobody outside of the model is known to give it other words from call to call under the same condition."""
    if any(options.get(key) is not None for key in ("context_handler", "model_function_wrapper", "sampler_calc_cond_batch_function")):
        return False
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    others = (
        key for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.PREDICT_NOISE) for key, found in wrappers.get(kind, {}).items() if found
    )
    return all(key == KEY for key in others)


def _release(uuids: Iterable) -> None:
    for uuid in list(uuids):
        _claims.pop(uuid, None)


def _uuids(conds) -> list:
    """Those of conditions that the host converted; a guider may build some itself, without."""
    return [cond["uuid"] for cond in conds if "uuid" in cond]


def _sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs):
    """OUTER_SAMPLE. Keeps the record of what the effects did, under the latents that come out."""
    guider = executor.class_obj
    # DualModelGuider gives its negative prompt to a second model, which may have none of our effects and so no say of its own.
    second = getattr(guider, "uncond_model_patcher", None)
    for effect in attached(guider.model_patcher):
        guider.conds.update(effect.conditions(guider.conds))
    uuids = [uuid for conds in guider.conds.values() for uuid in _uuids(conds)]
    this = Sampling(guider)
    this.names = {uuid: name for name, conds in guider.conds.items() for uuid in _uuids(conds)}

    def watch(step, x0, x, total):
        this.ended.append(step)
        this.denoised = x0
        return callback(step, x0, x, total) if callback is not None else None

    for effect in attached(guider.model_patcher):
        effect.come_in(this, latent_image)
    _nested().append(this)
    try:
        if second is not None:
            _claim(second, guider.conds.get("negative", ()))
        output = executor(noise, latent_image, sampler, sigmas, denoise_mask, watch, *args, **kwargs)
    finally:
        for run in this.runs:
            # The host ends them itself, unless it fails between a pre_run and the block that ends it.
            _close(run.patcher)
        _release(uuids)
        _nested().pop()
    if this.runs and isinstance(output, torch.Tensor):
        # Samplers hand out the last denoised latent too, computed like this.
        denoised = () if this.denoised is None else (guider.model_patcher.model.process_latent_out(this.denoised.cpu()),)
        record = _record(sigmas, this)
        if record.unheard():
            log.warning("%s: %s", ", ".join(effect.name for effect in record.effects), UNHEARD)
        remember(record, output, *denoised)
        for effect in _effects(this):
            effect.come_out(this, (output, *denoised))
    return output


def _effects(this: Sampling) -> list[Effect]:
    """All effects in a sampling, each once (copies on further GPUs share theirs)."""
    return list(dict.fromkeys(effect for run in this.runs for effect in run.effects))


def _record(schedule: torch.Tensor, this: Sampling):
    """The record of one sampling, over all models that had effects in it."""
    effects = _effects(this)
    notes = dict.fromkeys(note for run in this.runs for note in run.notes)
    return make_record(schedule.tolist(), this.ended, effects, [call for run in this.runs for call in run.evaluations()], tuple(notes))
