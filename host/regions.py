"""Regions on a host model: the document and what nodes hang on its regions, made into places and effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..ops.masks import pool
from ..ops.regions import MOST, Document, Region
from ..ops.schedule import Schedule
from . import adapters, files
from .dispatcher import Call, Effect, attach
from .families import ALL, Family, family_of
from .places import Place, group
from .window import course
from .words import Words, find, length_of

MISSING = (
    "If figures are missing: leave the regions' prompts empty and say in the common prompt what stands where. Each LoRA still acts in its "
    "own region only."
)


class RegionsError(ValueError):
    """Regions that cannot be applied, and what to do about it."""


@dataclass(frozen=True)
class Hung:
    """A LoRA hung on a region by a node: its tensors under a label, instead of a file name in the document."""

    label: str
    state: Mapping[str, torch.Tensor]
    model: float = 1.0
    clip: float = 1.0
    start: float = 0.0
    end: float = 1.0
    schedule: Schedule | None = None
    layers: str = ALL
    comparable: bool = False
    kind: str = "LoRA"

    def idle(self) -> bool:
        """Whether it does nothing on the model."""
        return self.model == 0 or self.start == self.end or (self.schedule is not None and self.schedule.silent())


@dataclass(frozen=True)
class Regions:
    """CONCEPT_REGIONS: the document, and by region name the LoRAs and the mask that nodes hung on it."""

    document: Document = Document()
    hung: Mapping[str, tuple[Hung, ...]] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [region.name for region in self.document.regions]

    def check_name(self, name: str) -> None:
        """Raises RegionsError that lists the names where there is no such region."""
        if name not in self.names():
            known = ", ".join(f"'{known}'" for known in self.names()) or "none yet"
            raise RegionsError(f"There is no region named '{name}'. Regions: {known}.")

    def with_region(self, region: Region, mask: torch.Tensor | None = None) -> Regions:
        """One more region, below the others. Raises RegionsError where the name is taken or there are too many."""
        if region.name in self.names():
            raise RegionsError(f"There is already a region named '{region.name}'. Give every region a name of its own.")
        if len(self.document.regions) >= MOST:
            raise RegionsError(f"There are {MOST} regions already, which is the most. Remove some, or join those with one prompt.")
        document = replace(self.document, regions=(*self.document.regions, region))
        return replace(self, document=document, masks=self.masks if mask is None else {**self.masks, region.name: mask})

    def with_lora(self, name: str, lora: Hung) -> Regions:
        self.check_name(name)
        return replace(self, hung={**self.hung, name: (*self.hung.get(name, ()), lora)})

    def drawn(self, height: int, width: int) -> torch.Tensor:
        """(K, height, width): the regions' shares in order."""
        return self.document.masks(height, width, self.masks)


class TextEffect(Effect):
    """A region that reads a text of its own; what it does happens where the model reads."""

    def __init__(self, name: str, place: Place, start: float = 0.0, end: float = 1.0):
        super().__init__(name, {})
        self.place, self.start, self.end = place, start, end

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        return course(model_sampling, self.start, self.end)


class IsolationEffect(Effect):
    """Regions whose positions see less of one another's: `strength` is taken from the logits of attention between them, until `end`."""

    def __init__(self, places: Sequence[Place], strength: float, end: float):
        super().__init__(f"Isolation of regions at {strength:g}", {})
        self.apart, self.strength, self.end = tuple(places), strength, end

    def strengths(self, model_sampling) -> Callable[[Call], float]:
        factor = course(model_sampling, 0.0, self.end)
        return lambda call: self.strength * factor(call)


class Drawing:
    """The regions' shares drawn for grids over the picture, each once: strokes and feathers depend on its proportions."""

    FINER = 4  # dots a side for each cell

    def __init__(self, regions: Regions):
        self.regions = regions
        self._drawn: tuple[tuple[int, int], torch.Tensor] | None = None

    def shares(self, height: int, width: int) -> torch.Tensor:
        """(K, height, width)"""
        if self._drawn is None or self._drawn[0] != (height, width):
            fine = self.regions.drawn(self.FINER * height, self.FINER * width)
            self._drawn = (height, width), pool(fine, height, width)
        return self._drawn[1]

    def of(self, index: int) -> Callable[[int, int], torch.Tensor]:
        """What draws one region alone."""
        return lambda height, width: self.shares(height, width)[index]


def apply(
    patcher,
    regions: Regions,
    clip=None,
    text: str = "own",
    isolation: float = 0.0,
    isolation_end: float = 1.0,
    prompt: str = "",
    rows: int | None = None,
) -> tuple[Any, list[str]]:
    """A clone of MODEL `patcher` with the regions on it, and report lines. `prompt` is the common one as text, for the words that a LoRA
    acts on where `text` is "span", and `rows` how many its context has. Raises RegionsError, AdapterError, DocumentError and MissingFile.
    """
    family = family_of(patcher.model)
    document = regions.document
    if not document.regions:
        return patcher, ["Nothing done: there are no regions. The model passes through unchanged."]
    drawing = Drawing(regions)
    effects: list[Effect] = []
    lines, places = [], []
    for index, region in enumerate(document.regions):
        share = float(drawing.shares(64, 64)[index].mean())
        if share == 0:
            lines.append(f"'{region.name}': nothing done, it covers no part of the picture.")
            continue
        loras = [_read(lora) for lora in region.loras] + list(regions.hung.get(region.name, ()))
        acting = not all(lora.idle() for lora in loras)
        named = text == "span" and acting
        policy = _span(region, clip, family, prompt, rows) if named else text
        # What tells words of the common prompt is no text of its own to be read beside it.
        place = Place(drawing.of(index), _texts(replace(region, prompt="") if named else region, clip, loras))
        told = [f"Acts on the common prompt's words '{_words_of(region)}' (tokens {_listed(policy.rows)})."] if named else []
        for lora in loras:
            if lora.idle():
                told.append(f"'{lora.label}': nothing done on the model, its strength or schedule is 0 or its window empty.")
                continue
            placement = adapters.place(patcher, lora.state, lora.label, lora.layers)
            strength = lora.model * (placement.to_comparable() if lora.comparable else 1.0)
            effect = adapters.AdapterEffect(
                f"'{region.name}': {lora.kind} '{lora.label}' at {lora.model:g}",
                placement.parts,
                strength,
                lora.start,
                lora.end,
                lora.schedule,
            )
            effect.place, effect.text = place, policy
            effects.append(effect)
            units = f" in comparable units ({strength:.3g} in its own)" if lora.comparable else ""
            times = f", times {lora.schedule} over sampling" if lora.schedule else ""
            told.append(f"'{lora.label}' at {lora.model:g}{units}{times}. {placement.report}")
        if place.texts:
            effects.append(TextEffect(f"'{region.name}': prompt", place))
        if not place.texts and not any(effect.place is place for effect in effects):
            lines += told
            lines.append(f"'{region.name}' ({share:.0%} of the picture): nothing done, it has neither a prompt nor a LoRA.")
            continue
        places.append(place)
        lines.append("\n".join([f"'{region.name}': {share:.0%} of the picture; reads {_reads(place)}.", *told]))
    if not effects:
        return patcher, [*lines, "The model passes through unchanged."]
    group(places)
    if sum(bool(place.texts) for place in places) > 1:
        lines.append(MISSING)
    if isolation > 0 and isolation_end > 0 and len(places) > 1:
        effects.append(IsolationEffect(places, isolation, isolation_end))
        lines.append(f"Regions see less of one another: {isolation:g} off the logits between them, until {isolation_end:g} of sampling.")
    patcher = patcher.clone()
    for effect in effects:
        attach(patcher, effect)
    lines.append(f"What no region covers keeps the prompt ({family.name}; no model call is added).")
    return patcher, lines


def _reads(place: Place) -> str:
    own = {("positive",): "a prompt of its own", ("negative",): "a negative prompt of its own"}
    return own.get(tuple(place.texts), "a prompt and a negative prompt of its own") if place.texts else "the common prompt"


def _read(lora) -> Hung:
    state = adapters.read(files.resolve("loras", lora.file))
    return Hung(lora.file, state, lora.model, lora.clip, lora.start, lora.end)


def _words_of(region: Region) -> str:
    """What of the common prompt is the region's."""
    return region.prompt.strip() or region.name


def _span(region: Region, clip, family: Family, prompt: str, rows: int | None) -> Words:
    """The region's words in the common prompt."""
    if clip is None:
        raise RegionsError("text is 'span', and no clip is connected to find words with. Connect the model's CLIP, or choose another text.")
    if not prompt.strip():
        raise RegionsError("text is 'span', and prompt is empty. Connect the text that positive was made from, or choose another text.")
    words, length = _words_of(region), length_of(clip, family, prompt)
    if rows is not None and rows < length:
        raise RegionsError(
            f"prompt takes {length} tokens, and positive was made from {rows}. Put the words into prompt that positive was made from."
        )
    found = find(clip, family, prompt, words)
    if not found:
        raise RegionsError(
            f"The words of region '{region.name}', '{words}', are not in prompt, which is '{prompt.strip()}'. Write them there as "
            "they are in the region (its prompt, or its name where that is empty), or choose another text than 'span'."
        )
    return Words(found, rows or length)


def _listed(rows: Sequence[int]) -> str:
    """Numbers with runs joined: 3-5, 9."""
    starts = [row for row in rows if row - 1 not in rows]
    ends = [row for row in rows if row + 1 not in rows]
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True))


def _with_text_part(clip, lora: Hung):
    """A clone of CLIP with what a LoRA has for it. Not by the host's loader, which would warn of every key that is the model's."""
    import comfy.lora
    import comfy.lora_convert

    targets = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora.state)), targets, log_missing=False)
    clip = clip.clone()
    clip.add_patches(patches, lora.clip)
    return clip


def _texts(region: Region, clip, loras: Sequence[Hung]) -> dict[str, torch.Tensor]:
    """The region's own texts as contexts, by condition."""
    wanted = {name: text for name, text in (("positive", region.prompt), ("negative", region.negative)) if text.strip()}
    if not wanted:
        return {}
    if clip is None:
        raise RegionsError(
            f"Region '{region.name}' has a prompt, and no clip is connected to read it. Connect the model's CLIP, or empty it."
        )
    for lora in loras:
        if lora.clip != 0:
            clip = _with_text_part(clip, lora)
    return {name: clip.encode_from_tokens(clip.tokenize(text)) for name, text in wanted.items()}
