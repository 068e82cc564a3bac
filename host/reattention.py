"""Latent re-attention in a UNet: what a prompt brings to the skip connections, held down where the prompt before its filter brought less.

The features of two prompts are compared at one noise level, so that each evaluation of the positive prompt is preceded by one of the
original prompt, of which only the low frequencies are kept. `ops.reattention` has the equation.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.reattention import Waves, low, reattended
from .dispatcher import KEY, Call, Effect, Sampling, under_way
from .families import family_of
from .poles import POOLED
from .window import course

OF = f"{KEY}_of"  # in a condition's entry: the uuid of the positive entry that it is the original of
ROUNDING = 1e-5, 4.0  # what does not count as a difference between two calls: at least the first, and the second times the type's


class ReattentionError(ValueError):
    """A model or prompt that cannot be re-attended, and what to do about it."""


class Taken(NamedTuple):
    """How much of the low frequencies is taken where they exceed, 0 none and 1 all, by the width of the features that meet the skip
    connection: four times the model's own (`deep`) and twice (`middle`); and how many periods across the map count as low.
    """

    deep: float = 0.1
    middle: float = 0.8
    radius: int = 1

    def scales(self, strength: float, channels: int) -> dict[int, float]:
        """Width of the features -> what is left of a frequency that exceeds; widths at which all is left are not in it."""
        taken = {4 * channels: strength * self.deep, 2 * channels: strength * self.middle}
        return {width: max(0.0, 1.0 - share) for width, share in taken.items() if share != 0.0}


def skips(model) -> list[int]:
    """The width of the features that meet each skip connection, in the order of the output blocks. Raises UnsupportedFamily, and
    ReattentionError for models without any.
    """
    family = family_of(model)
    unet = model.diffusion_model
    if not hasattr(unet, "output_blocks"):
        raise ReattentionError(
            f"This model ({family.name}) has no skip connections, which latent re-attention works on: it is for UNets (Stable Diffusion "
            "1.5, SDXL). Take the node out; Keep Concept Out needs no model."
        )
    behind = [block[0].out_channels for block in unet.input_blocks]
    return [block[0].channels - width for block, width in zip(unet.output_blocks, reversed(behind), strict=True)]


class Memory:
    """One sampling's: the original prompt's low frequencies of the evaluation under way, by its positive entry and the output block."""

    def __init__(self, scales: Mapping[int, float], radius: int):
        self.scales, self.radius = scales, radius
        self.kept: dict[tuple[Any, Any], torch.Tensor] = {}
        self.originals: dict[Any, Any] = {}  # uuids of entries that are listened to -> those of the positive ones
        self.pairs: set[tuple[Any, int]] = set()  # (uuid, number among the conditions) of entries that are acted on

    # Conditions come and go by name and number, which a compiled model would have to be compiled for again.
    @torch.compiler.disable
    def patch(self, h: torch.Tensor, skip: torch.Tensor | None, options: Mapping[str, Any]):
        """The host's output_block_patch: features and skip connection of one output block."""
        scale, uuids = self.scales.get(h.shape[1]), options.get("uuids", ())
        if scale is None or skip is None or not uuids or len(skip) % len(uuids):
            return h, skip
        waves = Waves.of(*skip.shape[-2:], self.radius).to(skip.device)
        rounding = max(ROUNDING[0], ROUNDING[1] * torch.finfo(skip.dtype).eps)
        made = list(skip.chunk(len(uuids)))
        for at, (entry, number) in enumerate(zip(uuids, options.get("cond_or_uncond", ()), strict=True)):
            if entry in self.originals:
                self.kept[self.originals[entry], options["block"]] = low(made[at], waves)
            elif (entry, number) in self.pairs and (entry, options["block"]) in self.kept:
                made[at] = reattended(made[at], self.kept[entry, options["block"]].to(skip.device), scale, waves, rounding)
        return h, torch.cat(made) if self.pairs else skip


class ReattentionEffect(Effect):
    """The positive prompt's skip connections against those of `original`, CONDITIONING of one entry."""

    added = 1

    def __init__(self, name: str, original: Sequence, scales: Mapping[int, float], radius: int, start_percent: float, end_percent: float):
        super().__init__(name, {})
        self.context, options = original[0]
        self.pooled = options.get(POOLED)
        self.scales, self.radius, self.course = dict(scales), radius, (start_percent, end_percent)
        self.condition = f"{KEY} {uuid.uuid4().hex} original"

    def conditions(self, conds: Mapping[str, Sequence[dict]]) -> dict[str, list[dict]]:
        """The positive condition's entries with the original prompt in the place of their own, where that differs: what else they hold
        (area, mask, ControlNet) stays.
        """
        own = {"cross_attn": self.context, "model_conds": {}} | ({} if self.pooled is None else {POOLED: self.pooled})
        return {
            self.condition: [
                {**entry, **own, "uuid": uuid.uuid4(), OF: entry["uuid"]}
                for entry in conds.get("positive", ())
                if "uuid" in entry and self._differs(entry)
            ]
        }

    def _differs(self, entry: Mapping[str, Any]) -> bool:
        pairs = [(entry.get("cross_attn"), self.context)]
        if self.pooled is not None and entry.get(POOLED) is not None:
            pairs.append((entry[POOLED], self.pooled))
        return any(one is None or not torch.equal(one.to(other), other) for one, other in pairs)

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        """It acts in the steps of the calls that it adds."""

        def strength(call: Call) -> float:
            this = under_way()
            return float(this is not None and any(this.names.get(entry) == self.condition for entry in call.options.get("uuids", ())))

        return strength

    def ahead(self, this: Sampling, evaluate, model, x, sigma, options: dict[str, Any]) -> dict[str, Any]:
        positive = {entry: number for (entry, number), (name, _) in this.entries.items() if name == "positive"}
        originals = [entry for entry in this.guider.conds.get(self.condition, ()) if entry.get(OF) in positive]
        if self not in this.kept:
            this.kept[self] = course(model.model_sampling, *self.course), Memory(self.scales, self.radius)
        factor, memory = this.kept[self]
        if not originals or factor(Call(model, x, sigma, {})) == 0.0:
            return options
        transformer = options.get("transformer_options", {})
        patches = transformer.get("patches", {})
        # Behind all other patches, whatever the order of the nodes: what is compared is what the model would have read.
        patched = patches | {"output_block_patch": [*patches.get("output_block_patch", ()), memory.patch]}
        options = options | {"transformer_options": transformer | {"patches": patched}}
        memory.kept.clear()
        memory.pairs, memory.originals = set(), {entry["uuid"]: entry[OF] for entry in originals}
        evaluate(originals, options)
        memory.pairs, memory.originals = {(entry[OF], positive[entry[OF]]) for entry in originals}, {}
        return options


def reattention(
    model, original: Sequence, strength: float, taken: Taken, start_percent: float, end_percent: float
) -> tuple[ReattentionEffect | None, str]:
    """The effect on a host model, None where it would do nothing, and what it does or why not. Raises ReattentionError and
    UnsupportedFamily.
    """
    widths = skips(model)
    if len(original) != 1:
        raise ReattentionError(f"original holds {len(original)} prompts. Connect the prompt before the filter, straight from its encoder.")
    wanted = taken.scales(strength, model.diffusion_model.model_channels)
    scales = {width: scale for width, scale in wanted.items() if width in widths}
    if not scales:
        return None, "deep and middle are 0" if not wanted else "no features of this model have the widths that are acted on"
    told = [f"{widths.count(width)} with features of {width} (to {scale:g} of itself)" for width, scale in scales.items()]
    report = (
        f"Of {len(widths)} skip connections, {' and '.join(told)}: what the positive prompt brings more of than original is held down, up "
        f"to {taken.radius} periods across the picture. One model call is added for each of the positive prompt's: the original one's."
    )
    name = f"Latent re-attention at {strength:g}"
    return ReattentionEffect(name, original, scales, taken.radius, start_percent, end_percent), report
