"""Keep concepts out of a prompt: the words that bring them are found by leaving each out, and what they bring is taken out of the context.

No model is touched and no evaluation of it added. Ours leaves the words out of the prompt itself and goes on beyond that; the published
way (SAFREE, arXiv 2410.12761) projects the rows of these words. `ops.filter` has the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops import filter as ops
from .encoders import Reader, Seat, Word, ends, seats, without, words
from .poles import POOLED, windowed

OURS, PAPER, RELEASED = "ours", "paper", "released_code"
METHODS = (OURS, PAPER, RELEASED)
OWN = "as the method does"
CONTENT, END, ALL_ROWS = "words", "words and end", "all"
ROWS = (OWN, CONTENT, END, ALL_ROWS)
ORDERS = (OWN, *ops.ORDERS)
ON, OFF = "on", "off"
SWITCH = (OWN, ON, OFF)
GATE = 0.45
PUBLISHED_STEPS = 50  # what the published windows count their steps in
CARRIERS = ("a {}", "a picture of a {}", "{} in the background")
ALONE = ("{}",)  # what a single word is compared with: words weigh less in an otherwise empty text
MOST_CONCEPTS = 200
LONGEST = 12  # rounds of looking for what is left after words were left out


class FilterError(ValueError):
    """Prompts, concepts or conditions that cannot be filtered, and what to do about it."""


class Settings(NamedTuple):
    """How to filter. strength: 0 nothing, 1 as meant; push (ours): how far beyond leaving out; gate: how much of a concept a word must
    bring, 0 the method's own; alpha: by how much a word must stand out among the others (published methods).
    """

    method: str = OURS
    strength: float = 1.0
    push: float = 0.5
    gate: float = 0.0
    alpha: float = 0.01
    order: str = OWN
    rows: str = OWN
    pooled: str = OWN
    self_validating: str = OWN
    start_percent: float = 0.0
    end_percent: float = 1.0


class Found(NamedTuple):
    """A word that brings a concept, and how much of it, 0 to 1 and more."""

    word: Word
    concept: str
    brought: float


class Filtered(NamedTuple):
    """What came out: CONDITIONING, report lines, and whether anything was changed."""

    conditioning: list
    report: list[str]
    changed: bool


def listed(text: str) -> list[str]:
    """Concepts from lines, each once. Raises FilterError where there are too many."""
    found = list(dict.fromkeys(line.strip().strip(",").strip() for line in text.splitlines()))
    found = [line for line in found if line]
    if len(found) > MOST_CONCEPTS:
        raise FilterError(f"concepts has {len(found)} lines, and {MOST_CONCEPTS} is the most. Take some out.")
    return found


def keep_out(clip, text: str, concepts: Sequence[str], settings: Settings, conditioning: Sequence | None = None) -> Filtered:
    """CONDITIONING of a text without the concepts. conditioning: entries that were made of this text by this CLIP, which keep what else
    they hold (areas, masks, ControlNets). Raises FilterError, EncoderError.
    """
    own = seats(clip)
    tokens = clip.tokenize(text, return_word_ids=True)
    whole = encoded(clip, tokens)
    entries = [[whole[0], dict(whole[1])]] if conditioning is None else matching(conditioning, whole)
    texts = {seat: words(clip, seat, tokens[seat.key]) for seat in own}
    idle = None
    if not concepts:
        idle = "there is no concept to keep out"
    elif not any(texts.values()):
        idle = "the text has no words"
    elif settings.strength == 0.0:
        idle = "strength is 0"
    elif settings.start_percent == settings.end_percent:
        idle = f"start_percent and end_percent are both {settings.start_percent:g}, so no step lies between them"
    if idle:
        return Filtered(entries, [f"Nothing done: {idle}. The prompt is as it was."], False)

    reader, report = Reader(clip), []
    if settings.method == OURS:
        changed, window = _ours(clip, reader, own, tokens, texts, concepts, settings, whole, report)
    else:
        changed, window = _published(clip, reader, own, tokens, texts, concepts, settings, whole, report)
    if changed is None:
        return Filtered(entries, [*report, "The prompt is as it was, bit for bit."], False)
    made = [[changed[0], {**options, **({} if changed[1] is None else {POOLED: changed[1]})}] for _, options in entries]
    if window != (0.0, 1.0):
        made = windowed(entries, made, *window)
    return Filtered(made, [*report, f"{reader.calls} batches of readings, no model call."], True)


def encoded(clip, tokens) -> tuple[torch.Tensor, dict]:
    """Context and options of tokens, as the host's own text node makes them."""
    plain = {key: [[item[:2] for item in window] for window in windows] for key, windows in tokens.items()}
    entries = clip.encode_from_tokens_scheduled(plain, show_pbar=False)
    if len(entries) != 1:
        raise FilterError(
            "This CLIP carries scheduled hooks, which give the prompt a context for each part of sampling. Filter a CLIP without."
        )
    return entries[0][0], entries[0][1]


def matching(conditioning: Sequence, whole: tuple[torch.Tensor, dict]) -> list:
    """The entries of CONDITIONING, all of which must hold the context of the text. Raises FilterError that names the one that does not."""
    if not conditioning:
        raise FilterError("conditioning is empty. Connect the encoded text, or nothing.")
    for number, (context, _) in enumerate(conditioning, 1):
        same = context.shape == whole[0].shape and torch.allclose(context.float(), whole[0].to(context).float(), atol=1e-3, rtol=1e-3)
        if not same:
            raise FilterError(
                f"Entry {number} of conditioning was not made of this text by this CLIP: its {tuple(context.shape)} numbers differ from "
                f"the text's {tuple(whole[0].shape)}. Connect the same CLIP and write the same text, or filter before conditions are "
                "combined."
            )
    return [[context, dict(options)] for context, options in conditioning]


# --- ours -------------------------------------------------------------------------------------------------------------------------


def directions(reader: Reader, clip, seat: Seat, concepts: Sequence[str], carriers: Sequence[str] = CARRIERS) -> torch.Tensor:
    """(K, D) what each concept's words bring to a text: the mean over carriers of the vector with them less that with fillers instead."""
    windows, bare = [], []
    for concept in concepts:
        for carrier in carriers:
            window = clip.tokenize(carrier.format(concept), return_word_ids=True)[seat.key][0]
            around = [len(_contents(clip.tokenize(part, return_word_ids=True)[seat.key][0])) for part in carrier.split("{}")]
            inside = _contents(window)
            windows.append(window)
            bare.append(without(window, inside[around[0] : len(inside) - around[1]]))
    vectors = reader.read(seat, windows + bare)[0]
    brought = vectors[: len(windows)] - vectors[len(windows) :]
    return brought.view(len(concepts), len(carriers), -1).mean(1)


def _contents(window: Sequence[tuple]) -> list[int]:
    return [position for position, (_, _, segment) in enumerate(window) if segment]


def find(
    reader: Reader, seat: Seat, windows, there: Sequence[Word], concepts: Sequence[str], brought_by: torch.Tensor, gate: float
) -> list[Found]:
    """The words of a text that bring a concept, window by window. Those found are left out and the rest is looked through again, until no
    word brings more than the gate: a description in several words hides each of them behind the others.
    """
    found: list[Found] = []
    for number, window in enumerate(windows):
        left = [word for word in there if word.window == number]
        for _ in range(LONGEST):
            if not left:
                break
            gone = [position for one in found if one.word.window == number for position in one.word.at]
            now = without(window, gone)
            vectors = reader.read(seat, [now, *(without(now, word.at) for word in left)])[0]
            amount = ops.amount_brought(vectors[1:], vectors[0], brought_by)
            most, which = amount.max(1)
            hits = [i for i in range(len(left)) if float(most[i]) >= gate]
            if not hits:
                break
            found += [Found(left[i], concepts[int(which[i])], float(most[i])) for i in hits]
            left = [word for i, word in enumerate(left) if i not in hits]
    return found


def _ours(clip, reader, own, tokens, texts, concepts, settings: Settings, whole, report):
    gate = settings.gate or GATE
    found: dict[Seat, list[Found]] = {}
    for seat in own:
        alone = max(len([word for word in texts[seat] if word.window == number]) for number in range(len(tokens[seat.key]))) < 2
        brought_by = directions(reader, clip, seat, concepts, ALONE if alone else CARRIERS)
        found[seat] = find(reader, seat, tokens[seat.key], texts[seat], concepts, brought_by, gate)
        told = ", ".join(f"'{one.word.text}' ({one.brought:.2f} of '{one.concept}')" for one in found[seat])
        report.append(f"{seat.part}: {told or 'no word brings a concept'}; gate {gate:g}.")
    if not any(found.values()):
        return None, None
    bare = {key: list(windows) for key, windows in tokens.items()}
    for seat, ones in found.items():
        for one in ones:
            bare[seat.key][one.word.window] = without(bare[seat.key][one.word.window], one.word.at)
    context, options = encoded(clip, bare)
    amount = settings.strength * (1 + settings.push)
    rows = _rows(own, tokens, texts, settings.rows if settings.rows != OWN else ALL_ROWS, whole[0])
    changed = ops.taken_out(whole[0], context, amount)
    changed = torch.where(rows, changed, whole[0])
    pooled = whole[1].get(POOLED)
    if pooled is not None and settings.pooled != OFF:
        pooled = ops.taken_out(pooled, options[POOLED], amount)
    report.append(f"What they bring was taken out {amount:g} times, from {_told(settings.rows, ALL_ROWS)}.")
    if settings.order != OWN:
        report.append(f"The order '{settings.order}' is for the published methods: nothing is projected here.")
    window = settings.start_percent, settings.end_percent
    if settings.self_validating == ON:
        window = _settled(window, ops.drift(whole[0][rows].view(1, -1).cpu(), changed[rows].view(1, -1).cpu()), False, report)
    return (changed, pooled), window


def _settled(window: tuple[float, float], beta: float, released: bool, report: list[str]) -> tuple[float, float]:
    """The window, cut where the filter's own drift ends it."""
    steps = ops.steps_as_released(beta) if released else round(ops.steps_as_published(beta))
    last = min(1.0, (steps + 1) / PUBLISHED_STEPS)  # both act while the number of a step, from 0 on, is not above it
    report.append(f"The filter would change the rows by {beta:.3f}, so it acts up to {last:g} of sampling.")
    return window[0], max(min(window[1], last), window[0])


def _told(rows: str, own: str) -> str:
    rows = own if rows == OWN else rows
    return {CONTENT: "the rows of the words", END: "the rows of the words and the end", ALL_ROWS: "all rows"}[rows]


def _rows(own: Sequence[Seat], tokens, texts, which: str, context: torch.Tensor) -> torch.Tensor:
    """(1, rows, width) bool: the numbers of a context that may be changed."""
    mask = torch.zeros(context.shape, dtype=torch.bool)
    for seat in own:
        if seat.columns is None:
            continue
        start = _start(own, tokens, seat)
        for number, window in enumerate(tokens[seat.key]):
            at = start + sum(len(one) for one in tokens[seat.key][:number])
            if which == ALL_ROWS:
                mask[:, at : at + len(window), slice(*seat.columns)] = True
                continue
            for position in _contents(window) + ([ends(seat, window)] if which == END else []):
                mask[:, at + position, slice(*seat.columns)] = True
    return mask.to(context.device)


def _start(own: Sequence[Seat], tokens, seat: Seat) -> int:
    """A seat's first row in the context."""
    before = [sum(map(len, tokens[other.key])) for other in own if other.columns is not None and not other.after]
    return min(before, default=0) if seat.after else 0


# --- as published -----------------------------------------------------------------------------------------------------------------


def _published(clip, reader, own, tokens, texts, concepts, settings: Settings, whole, report):
    """SAFREE: rows of flagged tokens are projected, in steps that it settles itself."""
    released = settings.method == RELEASED
    order = settings.order if settings.order != OWN else ("concepts last" if released else "prompt last")
    which = settings.rows if settings.rows != OWN else CONTENT
    changed, pooled, drifts, any_flagged = whole[0].clone(), whole[1].get(POOLED), [], False
    pooled = None if pooled is None else pooled.clone()
    for seat in own:
        phrases = [clip.tokenize(concept, return_word_ids=True)[seat.key][0] for concept in concepts]
        unwanted, _, unwanted_pooled = reader.read(seat, phrases)
        span = ops.Span.of(unwanted)
        start = _start(own, tokens, seat)
        names = []
        for number, window in enumerate(tokens[seat.key]):
            at = start + sum(len(one) for one in tokens[seat.key][:number])
            inside = _contents(window)
            if not inside:
                continue
            vectors, _, vectors_pooled = reader.read(seat, [window, *(without(window, [position]) for position in inside)])
            prompt, told = ops.Span.of(vectors[1:]), ops.distances(vectors[1:], span)
            flags = ops.flagged(told, settings.alpha, alone=released)
            if settings.gate:
                near = torch.nn.functional.cosine_similarity(vectors[:1].double(), unwanted.double(), dim=1)
                flags &= bool((near >= settings.gate).any())
            hit = [position for position, flag in zip(inside, flags.tolist(), strict=True) if flag]
            names += [word.text for word in texts[seat] if word.window == number and set(word.at) & set(hit)]
            if seat.columns is not None:
                rows = whole[0][0, at : at + len(window), slice(*seat.columns)]
                clean = ops.cleaned(rows.cpu(), span, prompt, order)
                stop = ends(seat, window)
                if released:
                    drifts.append(ops.drift(rows[: stop + 1].cpu(), clean[: stop + 1]))
                else:
                    drifts.append(ops.drift(vectors[:1], ops.cleaned(vectors[:1], span, prompt, order)))
                edited = list(hit)
                if hit and which != CONTENT:
                    edited += [stop] if which == END else range(stop, len(window))
                for position in edited:
                    moved = rows[position].double() + settings.strength * (clean[position].to(rows.device) - rows[position].double())
                    changed[0, at + position, slice(*seat.columns)] = moved.to(changed.dtype)
            # The host's pooled vector is that of the first window.
            if hit and settings.pooled == ON and seat.pooled and number == 0 and pooled is not None and vectors_pooled is not None:
                mine = pooled[:, slice(*seat.pooled)].double().cpu()
                clean = ops.cleaned(mine, ops.Span.of(unwanted_pooled), ops.Span.of(vectors_pooled[1:]), order)
                clean = clean * (mine.norm() / clean.norm().clamp_min(1e-12))
                pooled[:, slice(*seat.pooled)] = (mine + settings.strength * (clean - mine)).to(pooled)
            any_flagged |= bool(hit)
        report.append(
            f"{seat.part}: {', '.join(repr(name) for name in dict.fromkeys(names)) or 'no word'} flagged, {span.rank} directions."
        )
    window = settings.start_percent, settings.end_percent
    if settings.self_validating != OFF:
        window = _settled(window, sum(drifts) / max(len(drifts), 1), released, report)
    if not any_flagged or window[0] == window[1]:
        return None, None
    if not (len(own) == 1 and own[0].key == "l"):
        report.append("Published for Stable Diffusion 1.x alone: each encoder in its own space is our reading of it.")
    return (changed, pooled), window
