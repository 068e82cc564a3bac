"""Regions on a host model: the document and what nodes hang on its regions, made into places and effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ..ops.masks import pool
from ..ops.regions import MOST, Document, Region
from ..ops.schedule import Schedule
from ..ops.steering import Steer
from . import adapters, files
from .dispatcher import Call, Effect, attach
from .encoders import EncoderError
from .families import ALL, Family, family_of
from .feature_sites import on_other_weights, skipped, text_sites
from .features import TEXT, Features, FeaturesError
from .filter import FilterError, Prompt, Settings, keep_out, matching
from .places import Place, group
from .steering import COND, NEGATIVE, steer_model
from .text_steering import BUT_FIRST, TextSteer, steered
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


class Unwanted(NamedTuple):
    """Concepts to keep out of what a region reads, and how."""

    concepts: tuple[str, ...]
    settings: Settings

    def idle(self) -> str | None:
        """Why it does nothing, or None."""
        return self.settings.idle(self.concepts)


@dataclass(frozen=True)
class Leaning:
    """Features hung on a region: of a model, they act on its positions; of a text encoder, on what it reads. how: to steer with those of
    each site; told: that in words. scope, gate: of a text's rows, as `TextSteer` has them.
    """

    features: Features
    how: Callable[[Features], Steer]
    told: str
    strength: float
    start: float = 0.0
    end: float = 1.0
    schedule: Schedule | None = None
    side: str = COND
    scope: str = BUT_FIRST
    gate: float = 0.0

    @property
    def of_text(self) -> bool:
        return self.features.io == TEXT

    def idle(self) -> bool:
        return self.strength == 0 or self.start == self.end or (self.schedule is not None and self.schedule.silent())

    def on(self, clip, condition: str):
        """A CLIP that steers a condition's texts, or as it came where they are left alone."""
        strength = self.strength * (NEGATIVE[self.side] if condition == "negative" else 1.0)
        return steered(clip, TextSteer(self.features, self.how(self.features), strength, self.scope, self.gate)) if strength else clip


class Reading(NamedTuple):
    """What a region reads in a part of sampling: by condition, a text of its own in the common one's place."""

    texts: Mapping[str, torch.Tensor]
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Regions:
    """CONCEPT_REGIONS: the document, and by region name the LoRAs, the mask, the filter and the features that nodes hung on it."""

    document: Document = Document()
    hung: Mapping[str, tuple[Hung, ...]] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    filters: Mapping[str, Unwanted] = field(default_factory=dict)
    features: Mapping[str, tuple[Leaning, ...]] = field(default_factory=dict)

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

    def with_features(self, name: str, leaning: Leaning) -> Regions:
        self.check_name(name)
        return replace(self, features={**self.features, name: (*self.features.get(name, ()), leaning)})

    def with_filter(self, name: str, unwanted: Unwanted) -> Regions:
        """Keep concepts out of a region. A second filter adds its concepts; raises RegionsError where it works another way. One that does
        nothing gives way to the other.
        """
        self.check_name(name)
        before = self.filters.get(name, unwanted)
        if unwanted.idle() and name in self.filters:
            return self
        if before.idle():
            before = unwanted
        if before.settings != unwanted.settings:
            raise RegionsError(
                f"Region '{name}' has a filter with other settings already. Set both alike, or write all concepts into one of them."
            )
        concepts = tuple(dict.fromkeys((*before.concepts, *unwanted.concepts)))
        return replace(self, filters={**self.filters, name: unwanted._replace(concepts=concepts)})

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
    positive: Sequence = (),
) -> tuple[Any, list[str]]:
    """A clone of MODEL `patcher` with the regions on it, and report lines. `positive` is the common CONDITIONING and `prompt` its text: for
    the words that a LoRA acts on where `text` is "span", and for filters and features of regions that read it. Raises RegionsError,
    AdapterError, FeaturesError, DocumentError and MissingFile.
    """
    family = family_of(patcher.model)
    document = regions.document
    if not document.regions:
        return patcher, ["Nothing done: there are no regions. The model passes through unchanged."]
    drawing = Drawing(regions)
    effects: list[Effect] = []
    lines, places, parts, prompted = [], [], [], 0
    for index, region in enumerate(document.regions):
        share = float(drawing.shares(64, 64)[index].mean())
        if share == 0:
            lines.append(f"'{region.name}': nothing done, it covers no part of the picture.")
            continue
        loras = [_read(lora) for lora in region.loras] + list(regions.hung.get(region.name, ()))
        acting = not all(lora.idle() for lora in loras)
        named = text == "span" and acting
        policy = _span(region, clip, family, prompt, positive) if named else text
        # What tells words of the common prompt is no text of its own to be read beside it.
        own = replace(region, prompt="") if named else region
        leanings = regions.features.get(region.name, ())
        read = Sources(own, clip, loras, regions.filters.get(region.name), named, prompt, positive)
        readings, told = read.readings([leaning for leaning in leanings if leaning.of_text and not leaning.idle()])
        if named:
            told.insert(0, f"Acts on the common prompt's words '{_words_of(region)}' (tokens {_listed(policy.rows)}).")
        # A place reads one text: where a filter has a window, places of one mask take turns.
        turns = [(Place(drawing.of(index), texts), start, end) for texts, start, end in readings]
        before = len(effects)
        for lora in loras:
            if lora.idle():
                told.append(f"'{lora.label}': nothing done on the model, its strength or schedule is 0 or its window empty.")
                continue
            placement = adapters.place(patcher, lora.state, lora.label, lora.layers)
            strength = lora.model * (placement.to_comparable() if lora.comparable else 1.0)
            label = f"'{region.name}': {lora.kind} '{lora.label}' at {lora.model:g}"
            for place, start, end in turns:
                first, last = max(lora.start, start), min(lora.end, end)
                if first < last:
                    effect = adapters.AdapterEffect(label, placement.parts, strength, first, last, lora.schedule)
                    effect.place, effect.text = place, policy
                    effects.append(effect)
            units = f" in comparable units ({strength:.3g} in its own)" if lora.comparable else ""
            times = f", times {lora.schedule} over sampling" if lora.schedule else ""
            told.append(f"'{lora.label}' at {lora.model:g}{units}{times}. {placement.report}")
        effects += [TextEffect(f"'{region.name}': prompt", place, start, end) for place, start, end in turns if place.texts]
        for leaning in leanings:
            if not leaning.of_text and not leaning.idle():
                # A place of its own, which no text has: what is steered divides nothing.
                effects.append(_leaning_effect(patcher, leaning, region.name, drawing.of(index)))
            told += _told_of(leaning, patcher.model, clip)
        if len(effects) == before:
            lines += told
            lines.append(f"'{region.name}' ({share:.0%} of the picture): nothing done, it has neither a prompt nor a LoRA.")
            continue
        places.append(turns[0][0])
        parts += [place for place, _, _ in turns]
        prompted += bool(_wanted(own))
        lines.append("\n".join([f"'{region.name}': {share:.0%} of the picture; reads {_reads(own)}.", *told]))
    if not effects:
        return patcher, [*lines, "The model passes through unchanged."]
    group(parts)
    if prompted > 1:
        lines.append(MISSING)
    if isolation > 0 and isolation_end > 0 and len(places) > 1:
        effects.append(IsolationEffect(places, isolation, isolation_end))
        lines.append(f"Regions see less of one another: {isolation:g} off the logits between them, until {isolation_end:g} of sampling.")
    patcher = patcher.clone()
    for effect in effects:
        attach(patcher, effect)
    lines.append(f"What no region covers keeps the prompt ({family.name}; no model call is added).")
    return patcher, lines


def _wanted(region: Region) -> dict[str, str]:
    """The region's own texts, by condition."""
    return {name: text for name, text in (("positive", region.prompt), ("negative", region.negative)) if text.strip()}


def _reads(region: Region) -> str:
    own = {(): "the common prompt", ("positive",): "a prompt of its own", ("negative",): "a negative prompt of its own"}
    return own.get(tuple(_wanted(region)), "a prompt and a negative prompt of its own")


def _read(lora) -> Hung:
    state = adapters.read(files.resolve("loras", lora.file))
    return Hung(lora.file, state, lora.model, lora.clip, lora.start, lora.end)


def _words_of(region: Region) -> str:
    """What of the common prompt is the region's."""
    return region.prompt.strip() or region.name


def _span(region: Region, clip, family: Family, prompt: str, positive: Sequence) -> Words:
    """The region's words in the common prompt."""
    if clip is None:
        raise RegionsError("text is 'span', and no clip is connected to find words with. Connect the model's CLIP, or choose another text.")
    if not prompt.strip():
        raise RegionsError("text is 'span', and prompt is empty. Connect the text that positive was made from, or choose another text.")
    words, length = _words_of(region), length_of(clip, family, prompt)
    rows = positive[0][0].shape[1] if positive else None
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


def _leaning_effect(patcher, leaning: Leaning, name: str, mask: Callable[[int, int], torch.Tensor]) -> Effect:
    course = leaning.start, leaning.end, leaning.schedule
    try:
        effect = steer_model(patcher, leaning.features, leaning.how, leaning.strength, *course, mask=mask, side=leaning.side)
    except FeaturesError as error:
        raise RegionsError(f"The features of region '{name}': {error}") from error
    effect.name = f"'{name}': {effect.name}"
    return effect


def _told_of(leaning: Leaning, model, clip) -> list[str]:
    """Report lines."""
    called = f"'{leaning.features.name}'"
    if leaning.idle():
        return [f"Features {called}: nothing done, their strength or schedule is 0 or their window empty."]
    when = "in all steps" if (leaning.start, leaning.end) == (0.0, 1.0) else f"from {leaning.start:g} to {leaning.end:g} of sampling"
    times = f", times {leaning.schedule} over sampling" if leaning.schedule else ""
    where = f"what it reads ({leaning.scope})" if leaning.of_text else "its positions"
    lines = [f"Features {leaning.features.describe()}", f"On {where}: {leaning.told} ({leaning.side}), {when}{times}."]
    if leaning.of_text:
        lines += [f"Note: {note}" for note in filter(None, (skipped(clip, site) for site in text_sites(clip, leaning.features.site)))]
    return lines + on_other_weights(leaning.features, model, clip)


class Sources(NamedTuple):
    """What a region's texts are made of. named: its LoRAs act on words of the common prompt, which it reads as it is."""

    region: Region
    clip: Any
    loras: Sequence[Hung]
    unwanted: Unwanted | None
    named: bool
    prompt: str
    positive: Sequence

    def readings(self, leanings: Sequence[Leaning]) -> tuple[list[Reading], list[str]]:
        """What the region reads from the first step to the last, and report lines. leanings: on texts, and not idle."""
        if leanings and self.named:
            raise RegionsError(self._span_reads_plain("features of a text encoder hang", "with Steer Text"))
        borders = sorted({0.0, 1.0, *(border for one in leanings for border in (one.start, one.end))})
        found, told = [], []
        for start, end in pairwise(borders):
            parts, lines = self._one([one for one in leanings if one.start <= start and end <= one.end])
            cut = (part._replace(start=max(start, part.start), end=min(end, part.end)) for part in parts)
            found += [part for part in cut if part.start < part.end]
            told += [line for line in lines if line not in told]
        return found, told

    def _one(self, leanings: Sequence[Leaning]) -> tuple[list[Reading], list[str]]:
        """The same, where these features act all along."""
        region, unwanted, wanted, own = self.region, self.unwanted, _wanted(self.region), self.clip
        if (wanted or leanings) and self.clip is None:
            what = "a prompt" if wanted else "features of a text encoder"
            raise RegionsError(
                f"Region '{region.name}' has {what}, and no clip is connected to read it. Connect the model's CLIP, or empty it."
            )
        for lora in self.loras if wanted else ():
            if lora.clip != 0:
                own = _with_text_part(own, lora)
        if any(one.side != COND for one in leanings) and "negative" not in wanted:
            raise RegionsError(
                f"Features of a text encoder on region '{region.name}' are to steer its negative prompt, and it has none of its own. Write "
                f"it one, or set cfg_mode to '{COND}'."
            )
        texts = {name: _read_by(self._leaning(own, leanings, name), text) for name, text in wanted.items()}
        if leanings and "positive" not in wanted:
            texts["positive"] = _read_by(self._leaning(self.clip, leanings, "positive"), self._common("features of a text encoder"))
        if unwanted is None:
            return [Reading(texts)], []
        idle = unwanted.idle()
        if idle:
            return [Reading(texts)], [f"Filter of '{region.name}': nothing done, {idle}."]
        if self.named:
            raise RegionsError(self._span_reads_plain("a filter hangs", "with Keep Concept Out"))
        try:
            if "positive" in wanted:
                done = keep_out(self._leaning(own, leanings, "positive"), wanted["positive"], unwanted.concepts, unwanted.settings)
            else:
                clip = self._leaning(self.clip, leanings, "positive")
                done = keep_out(clip, self._common("a filter"), unwanted.concepts, unwanted.settings)
        except (FilterError, EncoderError) as error:
            raise RegionsError(f"The filter of region '{region.name}': {error}") from error
        told = [f"Kept out of '{region.name}': {', '.join(unwanted.concepts)}.", *done.report]
        if done.window is None:
            return [Reading(texts)], told
        start, end = done.window
        told.append(
            "The filter acts in all steps." if done.window == (0.0, 1.0) else f"The filter acts from {start:g} to {end:g} of sampling."
        )
        filtered = texts | {"positive": done.inside()}
        parts = (Reading(texts, 0.0, start), Reading(filtered, start, end), Reading(texts, end, 1.0))
        return [reading for reading in parts if reading.start < reading.end], told

    def _leaning(self, clip, leanings: Iterable[Leaning], condition: str):
        try:
            for one in leanings:
                clip = one.on(clip, condition)
        except (FeaturesError, EncoderError) as error:
            raise RegionsError(f"The features of region '{self.region.name}': {error}") from error
        return clip

    def _span_reads_plain(self, what: str, instead: str) -> str:
        return (
            f"text is 'span', by which region '{self.region.name}' reads the common prompt as it is, and {what} on the region. Choose "
            f"another text, or encode the common prompt {instead} instead."
        )

    def _common(self, what: str) -> str:
        """The text that a region without a prompt reads. Raises RegionsError where it is not known."""
        region, clip = self.region, self.clip
        ways = "Give Apply Regions the text in prompt and the CLIP that positive was made with, or the region a prompt of its own."
        if clip is None or not self.prompt.strip():
            missing = "no clip is connected" if clip is None else "its text is not known: prompt is empty"
            raise RegionsError(f"Region '{region.name}' has {what} and reads the common prompt, and {missing}. {ways}")
        try:
            matching(self.positive, Prompt(clip, self.prompt))
        except FilterError as error:
            raise RegionsError(
                f"Region '{region.name}' has {what} and reads the common prompt, and positive was not made of the text in prompt by this "
                f"CLIP. {ways}"
            ) from error
        return self.prompt


def _read_by(clip, text: str) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(text))
