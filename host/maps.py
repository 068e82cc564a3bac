"""Maps of phrases, made of what was captured while a latent was sampled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops import maps as ops
from . import words
from .capture import ATTENTION, CONCEPTS, STAGES, Captured, Group, find
from .families import Family, family_of
from .sites import JOINT

FINEST, ALL = "finest grid", "all"
PEAK, QUANTILE, OTSU, ARGMAX, SOFT = "peak", "quantile", "otsu", "argmax", "soft"
THRESHOLDS = (PEAK, QUANTILE, OTSU, ARGMAX, SOFT)
NUMBERED = re.compile(r"^(.*\S)\s*#(\d+)$")


class MapsError(ValueError):
    """Maps that cannot be drawn, and what to do about it."""


class Bound(NamedTuple):
    """A phrase and the rows of the prompt that it stands for; `told` says which for reports."""

    phrase: str
    rows: tuple[int, ...]
    told: str


class Settings(NamedTuple):
    """grids: FINEST or ALL; start, end: of sampling, in tenths; threshold: one of THRESHOLDS, level: its number; edges: masks follow those
    of the pictures, where these are given.
    """

    source: str = ATTENTION
    grids: str = FINEST
    start: float = 0.5
    end: float = 1.0
    threshold: str = PEAK
    level: float = 0.6
    largest: bool = False
    dilation: int = 0
    entry: int = 1
    edges: bool = False


class Drawn(NamedTuple):
    """masks, heights (phrases, pictures, height, width) in 0..1: the masks, and how high the maps are between background and peak."""

    masks: torch.Tensor
    heights: torch.Tensor
    report: list[str]


def captured_with(latent) -> Captured:
    """What was captured while a latent was sampled. Raises MapsError."""
    captured = find(latent)
    if captured is None:
        raise MapsError(
            "Nothing was captured while this latent was sampled. Put Capture Attention between the model and the sampler, and connect the "
            "sampler's own output here: a latent that was not sampled, or was changed after it, is not known. After a restart of the host, "
            "or after many other runs, sample again."
        )
    if not captured.groups:
        why = " ".join(captured.notes) or ("No step lay in its window, or the guider has no prompt named positive.")
        raise MapsError(f"Attention was to be captured while this latent was sampled, but nothing came of it: {why}")
    return captured


def bind(clip, family: Family, text: str, phrases: Sequence[str]) -> list[Bound]:
    """Each phrase's rows in the prompt, wherever it stands; `phrase #2` is its second place alone. Raises MapsError that offers words of
    the prompt.
    """
    return [_bind(clip, family, text, phrase) for phrase in phrases]


def _bind(clip, family: Family, text: str, phrase: str) -> Bound:
    numbered = NUMBERED.match(phrase)
    sought, number = (numbered[1], int(numbered[2])) if numbered else (phrase, 0)
    places = words.places(clip, family, text, sought)
    if not places:
        near = difflib.get_close_matches(sought.lower(), _pieces(text, len(sought.split())), n=4, cutoff=0.5)
        held = ", ".join(f"'{piece}'" for piece in near or list(dict.fromkeys(_pieces(text, 1)))[:12]) or "no words"
        raise MapsError(f"'{sought}' is not in the prompt as it is written there. {'Near it' if near else 'The prompt has'}: {held}.")
    if number > len(places):
        raise MapsError(f"'{sought}' is in the prompt {len(places)} times, so there is no #{number}.")
    chosen = [places[number - 1]] if number else places
    rows = tuple(row for place in chosen for row in place)
    where = f"{len(places)} places" if len(chosen) > 1 else f"place {number} of {len(places)}" if len(places) > 1 else "one place"
    return Bound(phrase, rows, f"'{phrase}': {'token' if len(rows) == 1 else 'tokens'} {', '.join(map(str, rows))} ({where})")


def _pieces(text: str, count: int) -> list[str]:
    """All runs of so many words of a prompt."""
    found = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower())
    return [" ".join(found[at : at + count]) for at in range(len(found) - count + 1)]


def concept_rows(captured: Captured, phrases: Sequence[str]) -> list[Bound]:
    """Each phrase among the concepts that travelled beside the prompt. Raises MapsError that lists them."""
    if not captured.concepts:
        raise MapsError("No concepts travelled beside the prompt. Write them into `concepts` of Capture Attention, and connect its clip.")
    bound = []
    for phrase in phrases:
        if phrase not in captured.concepts:
            raise MapsError(f"'{phrase}' was not among the concepts of Capture Attention: {', '.join(captured.concepts)}.")
        row = captured.concepts.index(phrase)
        bound.append(Bound(phrase, (row,), f"'{phrase}': concept {row + 1} of {len(captured.concepts)}"))
    return bound


def draw(
    captured: Captured,
    bound: Sequence[Bound],
    settings: Settings,
    background: Sequence[Bound] = (),
    length: int | None = None,
    size: tuple[int, int] | None = None,
    pictures: torch.Tensor | None = None,
) -> Drawn:
    """Masks of phrases at `size`, or that of the pictures (one, or one for each captured; height, width, channels), or of what was sampled.
    length: rows of the prompt, None for concepts. Raises MapsError.
    """
    groups = _chosen(captured, settings)
    stages = _stages(settings)
    used = sum(sum(group.calls[stage] for stage in stages) for group in groups)
    if not used:
        every = [group for group in captured.groups if group.source == settings.source]
        several = len({group.entry for group in every}) > 1
        which = f" in entry {settings.entry}" if several else ""
        there = _there(every) if several else _spans(groups)
        raise MapsError(f"No step was captured from {settings.start:g} to {settings.end:g} of sampling{which}. There are some in {there}.")
    try:
        maps = together([of_group(group, stages, [*bound, *background], length) for group in groups])
    except ValueError:
        held = groups[0].kept.shape[-1]
        raise MapsError(
            f"The prompt in `text` has {length} rows, and what was sampled had {held}: write the text of the positive prompt."
        ) from None
    maps = ops.resized(maps, *(size or (captured.size if pictures is None else pictures.shape[1:3])))
    led = pictures is not None and settings.edges
    if led:
        maps = torch.cat([ops.led(maps[:, : len(bound)], pictures.expand(len(maps), -1, -1, -1)), maps[:, len(bound) :]], 1)
    masks, heights = cut(maps, len(bound), settings)
    layers = ", ".join(dict.fromkeys(group.layer for group in groups))
    report = [item.told + "." for item in bound]
    # Concepts share out a softmax between all of them, and so the background of a soft mask, too.
    used_behind = settings.threshold != SOFT or settings.source == CONCEPTS
    if background and used_behind:
        report.append(f"Background: {'; '.join(item.told for item in background)}.")
    if settings.threshold == SOFT:
        given = {"background": background and not used_behind, "largest": settings.largest, "dilation": settings.dilation}
        idle = [name for name, value in given.items() if value]
        if idle:
            listed = " and ".join(filter(None, (", ".join(idle[:-1]), idle[-1])))
            report.append(f"With soft, {listed} {'are' if idle[1:] else 'is'} not used.")
    report.append(
        f"Of {sum(captured.calls)} captured calls, those from {settings.start:g} to {settings.end:g} of sampling, in {layers} "
        f"({settings.source})" + (", along the edges of the picture." if led else ".")
    )
    for item, mask in zip(bound, masks.transpose(0, 1), strict=True):
        report.append(f"'{item.phrase}' covers {float(mask.float().mean()):.0%}.")
    return Drawn(masks.transpose(0, 1).float(), heights.transpose(0, 1), report + list(captured.notes))


def _chosen(captured: Captured, settings: Settings) -> list[Group]:
    every = [group for group in captured.groups if group.source == settings.source]
    if not every:
        raise MapsError(f"Nothing was captured of the source '{settings.source}'. Concepts are written into Capture Attention.")
    groups = [group for group in every if group.entry == settings.entry - 1]
    if not groups:
        entries = len({group.entry for group in every})
        raise MapsError(
            f"entry is {settings.entry}, and the sampler had {entries} positive prompt(s) in the steps that were captured. There is "
            f"{_there(every)}."
        )
    finest = max(group.grid[0] * group.grid[1] for group in groups)
    return [group for group in groups if settings.grids == ALL or group.grid[0] * group.grid[1] == finest]


def _there(groups: Sequence[Group]) -> str:
    """The entries that there are, and their parts of sampling."""
    entries = sorted({group.entry for group in groups})
    return "; ".join(f"entry {entry + 1}: {_spans([group for group in groups if group.entry == entry])}" for entry in entries)


def _spans(groups: Sequence[Group]) -> str:
    """The parts of sampling that any of the groups has calls in."""
    held = [any(group.calls[stage] for group in groups) for stage in range(STAGES)]
    firsts = [stage for stage in range(STAGES) if held[stage] and not (stage and held[stage - 1])]
    pasts = [stage + 1 for stage in range(STAGES) if held[stage] and not (stage + 1 < STAGES and held[stage + 1])]
    return ", ".join(f"{first / STAGES:g} to {past / STAGES:g}" for first, past in zip(firsts, pasts, strict=True))


def _stages(settings: Settings) -> range:
    return range(round(settings.start * STAGES), round(settings.end * STAGES))


def of_group(group: Group, stages: Sequence[int], bound: Sequence[Bound], length: int | None) -> torch.Tensor:
    """(pictures, phrases, h, w): the mean over the stages' calls and each phrase's rows."""
    weights = torch.tensor([float(group.calls[stage]) for stage in stages])
    maps = (group.shown(stages.start, stages.stop) * weights[:, None, None, None]).sum(0) / weights.sum().clamp(min=1)
    if length is not None:
        maps = ops.fold(maps, length)
    picked = torch.stack([maps[..., list(item.rows)].mean(-1) for item in bound], 1)
    if group.source == CONCEPTS:
        picked = picked.softmax(1) if len(bound) > 1 else picked - picked.amin(-1, keepdim=True)
    return picked.unflatten(-1, group.grid)


def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Groups of several grids on the finest of them; each counts by how far its maps rise above their own mean."""
    height, width = max((part.shape[-2:] for part in parts), key=lambda grid: grid[0] * grid[1])
    return torch.stack([ops.resized(ops.relative(part), height, width) for part in parts]).mean(0)


def cut(maps: torch.Tensor, phrases: int, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(masks, heights) of the first `phrases` maps; the others are the background's."""
    own, others = maps[:, :phrases], maps[:, phrases:]
    heights = ops.heights(own)
    if settings.threshold == SOFT:
        return heights, heights
    if settings.threshold == QUANTILE:
        masks = ops.over_quantile(own, settings.level)
    elif settings.threshold == OTSU:
        masks = ops.over_otsu(own)
    elif settings.threshold == ARGMAX:
        # Without words for it, the background is what is low in every map.
        everything = others if others.shape[1] else torch.full_like(heights[:, :1], settings.level)
        masks = ops.winners(own, others) if others.shape[1] else ops.winners(heights, everything)
    else:
        masks = heights > settings.level
    if others.shape[1] and settings.threshold != ARGMAX:
        masks = masks & (own >= others.amax(1, keepdim=True))
    if settings.largest:
        masks = ops.largest(masks)
    return ops.dilated(masks, settings.dilation), heights


def encode_concepts(model, clip, concepts: Sequence[str]) -> torch.Tensor:
    """(1, concepts, width): each concept encoded by itself, the mean of its words' rows (the paper takes the first of them). Raises
    MapsError.
    """
    family = family_of(model)
    if not any(kind == JOINT for kind in family.rows):
        raise MapsError(f"concepts travel beside the prompt in Flux models only, and this is {family.name}. Leave `concepts` empty.")
    if clip is None:
        raise MapsError("concepts are given and clip is not: connect the text encoder that reads them.")
    encoded = []
    for concept in concepts:
        rows = words.find(clip, family, concept, concept)
        context = clip.encode_from_tokens(clip.tokenize(concept))
        encoded.append(context[0, list(rows)].mean(0) if rows else context[0, 0])
    return torch.stack(encoded)[None]
