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
from . import adapters, capture, files, maps
from .dispatcher import Call, Effect, attach
from .encoders import EncoderError
from .families import ALL, Family, family_of
from .feature_sites import on_other_weights, skipped, text_sites
from .features import TEXT, Features, FeaturesError
from .filter import FilterError, Prompt, Settings, keep_out, matching
from .localize import ARGMAX, BLOCK, LocalizeEffect, Sought, layers_of
from .norms import NormEffect, norms_of
from .places import LivePlace, Place, group
from .reference import Reader, Reference, ReferenceEffect
from .sites import JOINT
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
    """CONCEPT_REGIONS: the document, and by region name the LoRAs, the mask, the filter, the references and the features that nodes hung
    on it."""

    document: Document = Document()
    hung: Mapping[str, tuple[Hung, ...]] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    filters: Mapping[str, Unwanted] = field(default_factory=dict)
    references: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
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

    def with_reference(self, name: str, reference: Reference) -> Regions:
        self.check_name(name)
        return replace(self, references={**self.references, name: (*self.references.get(name, ()), reference)})

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

    def live(self) -> list[int]:
        """Numbers of those that are found while sampling."""
        listed = enumerate(self.document.regions)
        return [index for index, region in listed if region.live is not None and region.visible and region.weight > 0]


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
    GRIDS = 8  # remembered

    def __init__(self, regions: Regions):
        self.regions = regions
        self._drawn: tuple[tuple[int, int], torch.Tensor] | None = None
        self._own: dict[tuple[int, int], torch.Tensor] = {}  # layers of one call have several grids

    def shares(self, height: int, width: int) -> torch.Tensor:
        """(K, height, width)"""
        if self._drawn is None or self._drawn[0] != (height, width):
            fine = self.regions.drawn(self.FINER * height, self.FINER * width)
            self._drawn = (height, width), pool(fine, height, width)
        return self._drawn[1]

    def own(self, height: int, width: int) -> torch.Tensor:
        """(K, height, width): the regions' own masks, whatever the others have. A live one that has none may be anywhere."""
        if (height, width) not in self._own:
            regions = self.regions
            own = pool(regions.document.drawn(self.FINER * height, self.FINER * width, regions.masks), height, width)
            for mask, region in zip(own, regions.document.regions, strict=True):
                if region.live is not None and not region.shapes and region.name not in regions.masks:
                    mask.fill_(float(region.visible))
            while len(self._own) >= self.GRIDS:
                self._own.pop(next(iter(self._own)))
            self._own[height, width] = own
        return self._own[height, width]

    def with_live(self, height: int, width: int, found: torch.Tensor) -> torch.Tensor:
        """(K, pictures, height, width), from the masks (N, pictures, height, width) of the live regions."""
        document = self.regions.document
        pictures = found.shape[1]
        masks = self.own(height, width).to(found.device)[:, None].repeat(1, pictures, 1, 1)
        masks[self.regions.live()] *= found
        return document.shared_out(masks.flatten(1, 2)).unflatten(1, (pictures, height))

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
    own_scale: float = 0.0,
) -> tuple[Any, list[str]]:
    """A clone of MODEL `patcher` with the regions on it, and report lines. `positive` is the common CONDITIONING and `prompt` its text: for
    the words that a LoRA acts on where `text` is "span", and for filters and features of regions that read it. own_scale, from 0 to 1: how
    far group normalisation takes each region by itself. Raises RegionsError, AdapterError, FeaturesError, DocumentError and MissingFile.
    """
    family = family_of(patcher.model)
    document = regions.document
    if not document.regions:
        return patcher, ["Nothing done: there are no regions. The model passes through unchanged."]
    drawing = Drawing(regions)
    finder = _finder(patcher, regions, drawing, clip, family, prompt, positive)
    sought = {one.name: one for one in finder.sought} if finder else {}

    def place_of(index: int, texts: Mapping[str, torch.Tensor] | None = None) -> Place:
        return Place(drawing.of(index), texts) if finder is None else LivePlace(finder.source, index, texts)

    effects: list[Effect] = []
    lines, places, parts, alone, prompted = [], [], [], [], 0
    looks: list[tuple[Reference, torch.Tensor | None, Sequence[tuple[Place, float, float]]]] = []
    for index, region in enumerate(document.regions):
        share = float((drawing.shares(64, 64) if finder is None else drawing.own(64, 64))[index].mean())
        if share == 0:
            lines.append(f"'{region.name}': nothing done, it covers no part of the picture.")
            continue
        loras = [_read(lora) for lora in region.loras] + list(regions.hung.get(region.name, ()))
        acting = not all(lora.idle() for lora in loras)
        live = sought.get(region.name)
        # Prompt and picture as one sequence: each step would need a bias between all positions anew. The region's words are known.
        named = acting and (text == "span" or (text == "own" and live is not None and _jointly(family) and not region.prompt.strip()))
        policy = text
        if named:
            policy = _span(region, clip, family, prompt, positive) if live is None else Words(live.bound.rows, finder.length)
        # What tells words of the common prompt is no text of its own to be read beside it.
        own = replace(region, prompt="") if named else region
        leanings = regions.features.get(region.name, ())
        read = Sources(own, clip, loras, regions.filters.get(region.name), named, prompt, positive)
        readings, told = read.readings([leaning for leaning in leanings if leaning.of_text and not leaning.idle()])
        if named:
            words = live.bound.phrase if live else _words_of(region)
            told.insert(0, f"Acts on the common prompt's words '{words}' (tokens {_listed(policy.rows)}).")
        # A place reads one text: where a filter has a window, places of one mask take turns.
        if live is not None:
            told.insert(0, _told(live, finder))
            readings = [
                one._replace(start=max(one.start, live.live.start), end=min(one.end, live.live.end))
                for one in readings
                if max(one.start, live.live.start) < min(one.end, live.live.end)
            ]
            if not readings:
                lines.append(f"'{region.name}': nothing done, no step lies between its start and its end.")
                continue
        turns = [(place_of(index, texts), start, end) for texts, start, end in readings]
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
        seen = [reference for reference in regions.references.get(region.name, ()) if not reference.idle()]
        told += [f"Reference: nothing done, {one.idle()}." for one in regions.references.get(region.name, ()) if one.idle()]
        for reference in seen:
            looks.append((reference, _shown(reference, turns[0][0], clip, region.name), turns))
            told.append(reference.describe(patcher.model))
        effects += [TextEffect(f"'{region.name}': prompt", place, start, end) for place, start, end in turns if place.texts]
        for leaning in leanings:
            within = leaning
            if live is not None:
                within = replace(leaning, start=max(leaning.start, live.live.start), end=min(leaning.end, live.live.end))
            if not leaning.of_text and not leaning.idle() and within.start < within.end:
                # A place of its own, which no text has: what is steered divides nothing.
                effects.append(_leaning_effect(patcher, within, region.name, place_of(index)))
            told += _told_of(leaning, patcher.model, clip)
        if len(effects) == before and not seen:
            lines += told
            lines.append(f"'{region.name}' ({share:.0%} of the picture): nothing done, it has no prompt, LoRA or reference.")
            continue
        places.append(turns[0][0])
        # A place of its own, which no text has and which stays through all turns.
        window = (0.0, 1.0) if live is None else (live.live.start, live.live.end)
        alone.append((f"'{region.name}': a scale of its own", place_of(index), *window))
        parts += [place for place, _, _ in turns]
        prompted += bool(_wanted(own))
        much = f"{share:.0%} of the picture" if live is None else "found while sampling" + (f", within {share:.0%}" if share < 1 else "")
        lines.append("\n".join([f"'{region.name}': {much}; reads {_reads(own)}.", *told]))
    read = _read_references(patcher.model, looks)
    effects += read
    if not effects:
        return patcher, [*lines, "The model passes through unchanged."]
    group(parts)
    if prompted > 1:
        lines.append(MISSING)
    if isolation > 0 and isolation_end > 0 and len(places) > 1:
        effects.append(IsolationEffect(places, isolation, isolation_end))
        lines.append(f"Regions see less of one another: {isolation:g} off the logits between them, until {isolation_end:g} of sampling.")
    if own_scale > 0 and norms_of(patcher.model):
        effects += [NormEffect(name, patcher.model, place, own_scale, *window) for name, place, *window in alone]
        lines.append(f"Each region is brought to a scale of its own by {own_scale:g} in {len(norms_of(patcher.model))} normalisations.")
    elif own_scale > 0:
        lines.append(f"own_scale: nothing done, no layer of {family.name} brings all of the picture to one scale.")
    if finder is not None:
        effects.insert(0, finder)
    patcher = patcher.clone()
    for effect in effects:
        attach(patcher, effect)
    calls = len(read[0].groups) if read else 0
    cost = f"{calls} model call{'s' * (calls > 1)} of {len(looks)} picture{'s' * (len(looks) > 1)} in all" if read else "no model call"
    verb = "are" if calls > 1 else "is"
    when = " to each step that reads a reference" if read else ""
    lines.append(f"What no region covers keeps the prompt ({family.name}; {cost} {verb} added{when}).")
    return patcher, lines


def _jointly(family: Family) -> bool:
    return any(kind == JOINT for kind in family.rows)


def _finder(patcher, regions: Regions, drawing: Drawing, clip, family: Family, prompt: str, positive: Sequence) -> LocalizeEffect | None:
    """What finds the live regions, or None where there are none. Raises RegionsError and MapsError."""
    listed = regions.document.regions
    live = regions.live()
    if not live:
        return None
    if clip is None or not prompt.strip():
        missing = "no clip is connected" if clip is None else "its text is not known: prompt is empty"
        raise RegionsError(
            f"Region '{listed[live[0]].name}' is found by words of the common prompt, and {missing}. Give Apply Regions the text "
            "in prompt that positive was made from, and its CLIP."
        )
    length = _length(clip, family, prompt, positive)
    sought = []
    for index in live:
        region = listed[index]
        phrase = region.live.phrase.strip() or _words_of(region)
        try:
            (bound,) = maps.bind(clip, family, prompt, [phrase])
            behind = tuple(maps.bind(clip, family, prompt, region.live.background.splitlines()))
        except maps.MapsError as error:
            raise RegionsError(f"Region '{region.name}' is found by words of the common prompt: {error}") from error
        sought.append(Sought(region.name, index, bound, behind, region.live))
    if any(one.live.scope == BLOCK for one in sought) and _jointly(family):
        raise RegionsError(f"scope '{BLOCK}' is for UNets, whose layers stand behind an attention to the words; this is {family.name}.")
    if len(sought) == 1 and sought[0].live.threshold == ARGMAX and not sought[0].background:
        raise RegionsError(
            f"Region '{sought[0].name}' is the only one that is found by words, and argmax compares: all of the picture would be its. "
            "Choose another threshold, or give it a background."
        )
    # In a block of its own every attention tells of what is behind it.
    by_block = any(one.live.scope == BLOCK for one in sought)
    layers = capture.layers_of(patcher.model, capture.ALL) if by_block else layers_of(patcher.model)
    return LocalizeEffect(patcher.model, layers, sought, length, drawing.with_live)


def _told(one: Sought, finder: LocalizeEffect) -> str:
    live = one.live
    when = f"there from {live.start:g} to {live.end:g} of sampling" + (f", at rest from {live.until:g}" if live.until < 1 else "")
    behind = f"; background {', '.join(item.told for item in one.background)}" if one.background else ""
    layers = [name.removeprefix("diffusion_model.").removesuffix(".attn2") for name in finder.layers]
    where = ", ".join(layers) if len(layers) < 3 else f"{len(layers)} attentions"
    how = live.threshold + (", each layer behind an attention by that one's own map" if live.scope == BLOCK else "")
    return f"Found by {one.bound.told} in {where} ({how}), {when}{behind}."


def _wanted(region: Region) -> dict[str, str]:
    """The region's own texts, by condition."""
    return {name: text for name, text in (("positive", region.prompt), ("negative", region.negative)) if text.strip()}


def _reads(region: Region) -> str:
    own = {(): "the common prompt", ("positive",): "a prompt of its own", ("negative",): "a negative prompt of its own"}
    return own.get(tuple(_wanted(region)), "a prompt and a negative prompt of its own")


def _read(lora) -> Hung:
    state = adapters.read(files.resolve("loras", lora.file))
    return Hung(lora.file, state, lora.model, lora.clip, lora.start, lora.end)


def _shown(reference: Reference, place: Place, clip, name: str) -> torch.Tensor | None:
    """What a reference is read with: its own prompt, the region's, or None for the common one."""
    if not reference.prompt.strip():
        return place.texts.get("positive")
    if clip is None:
        raise RegionsError(f"A reference of region '{name}' has a prompt, and no clip is connected to read it. Connect the model's CLIP.")
    return clip.encode_from_tokens(clip.tokenize(reference.prompt))


def _read_references(model, looks: Sequence[tuple[Reference, torch.Tensor | None, Sequence[tuple[Place, float, float]]]]) -> list[Effect]:
    """What reads references, first of all what evaluates them; nothing where there are none."""
    if not looks:
        return []
    reader = Reader(model, [reference for reference, _, _ in looks], [text for _, text, _ in looks])
    spans = [
        (number, place, max(reference.start, start), min(reference.end, end))
        for number, (reference, _, turns) in enumerate(looks)
        for place, start, end in turns
    ]
    return [reader, *(ReferenceEffect(reader, number, place, first, last) for number, place, first, last in spans if first < last)]


def _words_of(region: Region) -> str:
    """What of the common prompt is the region's."""
    return region.prompt.strip() or region.name


def _span(region: Region, clip, family: Family, prompt: str, positive: Sequence) -> Words:
    """The region's words in the common prompt."""
    if clip is None:
        raise RegionsError("text is 'span', and no clip is connected to find words with. Connect the model's CLIP, or choose another text.")
    if not prompt.strip():
        raise RegionsError("text is 'span', and prompt is empty. Connect the text that positive was made from, or choose another text.")
    words, rows = _words_of(region), _length(clip, family, prompt, positive)
    found = find(clip, family, prompt, words)
    if not found:
        raise RegionsError(
            f"The words of region '{region.name}', '{words}', are not in prompt, which is '{prompt.strip()}'. Write them there as "
            "they are in the region (its prompt, or its name where that is empty), or choose another text than 'span'."
        )
    return Words(found, rows)


def _length(clip, family: Family, prompt: str, positive: Sequence) -> int:
    """Rows of the common prompt."""
    length = length_of(clip, family, prompt)
    rows = positive[0][0].shape[1] if positive else None
    if rows is not None and rows < length:
        raise RegionsError(
            f"prompt takes {length} tokens, and positive was made from {rows}. Put the words into prompt that positive was made from."
        )
    return rows or length


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


def _leaning_effect(patcher, leaning: Leaning, name: str, place: Place) -> Effect:
    course = leaning.start, leaning.end, leaning.schedule
    try:
        effect = steer_model(patcher, leaning.features, leaning.how, leaning.strength, *course, side=leaning.side)
    except FeaturesError as error:
        raise RegionsError(f"The features of region '{name}': {error}") from error
    place.factors, effect.place = effect.place.factors, place
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
