"""Localized attention-guided sampling (LAG), of Personalized Residuals (Ham et al., CVPR 2024, arXiv 2405.12978): a residual acts where its
own block attends to its words.

In a UNet's attention block the cross-attention runs before the layer `proj_out` that the residual lies beside, so that the mask is there in
time, in the same call. With a_i the attention of block i's positions to the subject's words C (mean over heads, and over the layers of a
deep block; sum over C),

    M_i = 1[a_i > median(a_i)],   y = W x + M_i s B_i A_i x

The median turns half of all positions on, however small the subject is; Otsu's cut goes by the map's own histogram. A map that is the same
everywhere turns none on. Where the mask comes from is not published for CFG: here it is the positive prompt's, of the same picture, for all
conditions of a call. A call without it takes the mask of the last one that had it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.lora import Factors, Stack
from ..ops.maps import over_otsu, over_quantile
from .adapters import AdapterEffect, AdapterError, LowRank, convolution_of
from .capture import ATTENTION, POSITIVE, Keys, Queries, Reading, Tap
from .dispatcher import Call, Effect, Run
from .families import family_of
from .window import course
from .words import Words

MEDIAN, OTSU = "median", "otsu"
CUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {MEDIAN: lambda maps: over_quantile(maps, 0.5), OTSU: over_otsu}
OUTPUT = ".proj_out"


class WordTap(Tap):
    """A tap that knows the words. on (rows of the context,): 1 at theirs."""

    def __init__(self):
        super().__init__()
        self.on: torch.Tensor | None = None

    def map(self) -> torch.Tensor | None:
        """(pictures, positions): the attention to the words in the call under way; None where it could not be read."""
        seen = self.seen.get(ATTENTION)
        return seen @ self.on if seen is not None and self.on is not None and seen.shape[-1] == len(self.on) else None


class Block:
    """What one block attends to in a run, by its cross-attentions' taps, and the mask made of it."""

    def __init__(self, names: Sequence[str], cut: str):
        self.taps = {name: WordTap() for name in names}
        self.cut = CUTS[cut]
        self.last: torch.Tensor | None = None
        self.missed = False

    def mask(self, batch: int, positions: int) -> torch.Tensor | None:
        """(batch, positions), in 0 and 1; None where nothing fits."""
        maps = [found for tap in self.taps.values() if (found := tap.map()) is not None]
        if maps:
            self.last = self.cut(torch.stack(maps).mean(0)[:, None])[:, 0].float()
        mask = self.last
        if mask is None or mask.shape[1] != positions or batch % len(mask):
            self.missed = True
            return None
        return mask.repeat(batch // len(mask), 1)


class MaskedRank(NamedTuple):
    """What a residual adds to one layer, where its block's mask is."""

    factors: tuple[Factors, ...]
    block: Block | None = None

    @classmethod
    def join(cls, parts, module, device, dtype) -> MaskedStack:
        return MaskedStack([(Stack([part.factors], device, dtype, convolution_of(module)), part.block) for part in parts])


class MaskedStack:
    """The act of such parts on a layer."""

    def __init__(self, parts: Sequence[tuple[Stack, Block]]):
        self.parts = tuple(parts)

    def __call__(self, output, fresh, *args, **kwargs):
        plane = output.ndim == 4
        positions = output.shape[2] * output.shape[3] if plane else output.shape[1]
        for stack, block in self.parts:
            mask = block.mask(len(output), positions)
            if mask is not None:
                mask = mask.to(output)
                mask = mask.view(len(mask), 1, *output.shape[2:]) if plane else mask[..., None]
                output = output + mask * stack(torch.zeros_like(output), True, *args, **kwargs)
        return output

    def setting(self, strengths, places=(), shares=None) -> list:
        places = tuple(places) if shares is not None else (None,) * len(strengths)
        return [stack.setting((strengths[at],), (places[at],), shares) for at, (stack, _) in enumerate(self.parts)]

    def use(self, setting: list) -> None:
        for (stack, _), own in zip(self.parts, setting, strict=True):
            stack.use(own)


class LocalEffect(AdapterEffect):
    """A residual that acts where its blocks attend to its words; beside it, `reader` must be attached. parts: by module name, attention
    blocks' outputs of a UNet only. Raises AdapterError where other layers are among them.
    """

    def __init__(self, name: str, model, parts: Mapping[str, LowRank], words: Words, cut: str, *how):
        check(model, parts)
        super().__init__(name, {module: MaskedRank(part.factors) for module, part in parts.items()}, *how)
        self.words, self.cut, self.how = words, cut, how
        self.attentions = {module: _attentions(model, module) for module in parts}
        self.reader = Reader(self)

    def blocks(self, run: Run) -> dict[str, Block]:
        """By module name: what the residual and its reader share in a run."""
        key = self, id(run)  # copies of a model on further GPUs have runs of their own in one sampling
        return run.sampling.kept.setdefault(key, {module: Block(names, self.cut) for module, names in self.attentions.items()})

    def in_run(self, run: Run) -> Effect:
        blocks = self.blocks(run)
        copy = AdapterEffect(self.name, {module: part._replace(block=blocks[module]) for module, part in self.parts.items()}, *self.how)
        copy.place, copy.text = self.place, self.text
        return copy


class Reader(Effect):
    """Reads the attention that a residual's masks come of, whenever it acts; changes nothing."""

    def __init__(self, of: LocalEffect):
        self.of = of
        super().__init__(f"Attention to the words of {of.name}", self._parts({name: Tap() for name in sum(of.attentions.values(), [])}, {}))

    @staticmethod
    def _parts(taps: Mapping[str, Tap], heads: Mapping[str, int]) -> dict[str, Reading]:
        parts: dict[str, Reading] = {}
        for name, tap in taps.items():
            parts[f"{name}.to_q"], parts[f"{name}.to_k"] = Queries(tap), Keys(tap, heads.get(name, 1))
        return parts

    def in_run(self, run: Run) -> Reader:
        copy = Reader(self.of)
        copy.run, copy.made = weakref.proxy(run), list(self.of.blocks(run).values())
        copy.taps = {name: tap for block in copy.made for name, tap in block.taps.items()}
        copy.parts = self._parts(copy.taps, {name: run.patcher.model.get_submodule(name).heads for name in copy.taps})
        return copy

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        of = self.of
        factor = course(model_sampling, of.start_percent, of.end_percent, of.schedule)
        return lambda call: float(of.strength * factor(call) != 0.0)

    def enter(self, call: Call) -> None:
        sampling, size = self.run.sampling, len(call.x) // max(1, len(call.options.get("uuids", ())))
        chunk = next((chunk for chunk, key in enumerate(_keys(call)) if _name(sampling, key) == POSITIVE), None)
        rows = None if chunk is None else torch.arange(chunk * size, (chunk + 1) * size, device=call.x.device)
        on = None if call.context is None else self.of.words.on(call.context.shape[1]).to(call.x.device)
        for tap in self.taps.values():
            tap.clear()
            tap.rows, tap.on, tap.batch = rows, on, 0 if rows is None else len(call.x)

    def look_back(self, call: Call) -> None:
        if any(block.missed for block in self.made):
            self.run.notes[
                "In some calls a localized residual did not act: its block's attention could not be read. Regions that read texts of their "
                "own do that, and extensions that replace the attention."
            ] = None

    def leave(self, call: Call) -> None:
        for tap in self.taps.values():
            tap.clear()


def check(model, parts: Mapping[str, Any]) -> None:
    """Raises AdapterError where what a residual is on has no attention of its own before it."""
    family = family_of(model)
    if not hasattr(model.diffusion_model, "input_blocks"):
        raise AdapterError(
            f"localize reads a UNet's cross-attention, which {family.name} has not. Set localize to 'off', or connect a mask."
        )
    others = [name for name in parts if not name.endswith(OUTPUT)]
    if others:
        raise AdapterError(
            f"localize is for residuals on the attention blocks' outputs, and this one is on {len(others)} other layers, such as "
            f"{others[0].removeprefix('diffusion_model.')}. Set localize to 'off', or train on 'attention outputs'."
        )
    if any(one.gain is not None for part in parts.values() for one in part.factors):
        raise AdapterError("localize cannot act on a DoRA, which scales the layer itself. Set localize to 'off', or connect a mask.")


def _attentions(model, module: str) -> list[str]:
    """The cross-attentions of the block that a layer gives the output of."""
    block = module.removesuffix(OUTPUT)
    return [f"{block}.{name}" for name, _ in model.get_submodule(block).named_modules() if name.endswith("attn2")]


def _keys(call: Call) -> list[tuple]:
    return list(zip(call.options.get("uuids", ()), call.options.get("cond_or_uncond", ()), strict=False))


def _name(sampling, key: tuple) -> str:
    return sampling.entries.get(key, (sampling.names.get(key[0], ""), None))[0]
