"""Keep concepts out of a prompt: the words that bring them are found by leaving each out, and what they bring is taken out of the context.

No model is touched and no evaluation of it added. Ours leaves the words out of the prompt itself and goes on beyond that; the published
way (SAFREE, arXiv 2410.12761) projects the rows of these words. `ops.filter` has the equations.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops import filter as ops
from .encoders import Reader, Seat, Word, alone, brought, contents, ends, seats, windows_of, without, words
from .poles import POOLED, windowed

OURS, PAPER, RELEASED = "ours", "paper", "released_code"
METHODS = (OURS, PAPER, RELEASED)
OWN = "as the method does"
CONTENT, END, ALL_ROWS = "words", "words and end", "all"
ROWS = (OWN, CONTENT, END, ALL_ROWS)
ORDERS = (OWN, *ops.ORDERS)
ON, OFF = "on", "off"
SWITCH = (OWN, ON, OFF)
GATE = 0.15
PUBLISHED_STEPS = 50  # what the published windows count their steps in
CARRIERS = ("a {}", "a picture of a {}", "{} in the background")
ALONE = "{}"  # what a word by itself is compared with: the rougher test, so that
ALONE_COUNTS, ALONE_COSINE = 0.3, 0.6  # it counts so much of what is heard, from such a cosine on
# Words of no particular concept. What they have in common, any word brings that stands where a filler could.
NEUTRAL = ("thing", "place", "house", "water", "person", "time", "light", "hand", "road", "paper", "animal", "food")
BESIDE = 2  # directions beside the mean of these that are left aside as well: with four, concepts themselves begin to be lost
TOGETHER, LEFT = 0.66, 0.5  # what words that point to a concept together must reach, and the share of that which may be left of them
LEAST, FEW = 0.03, 8  # the share of a concept that a word must bring to count among these, and how many count
MOST_CONCEPTS = 200
COSINE = 0.37  # the least between what a word brings and the concept: words of another meaning seldom reach it, however much they bring
AGAIN = 0.65  # of the gate: what counts in a text that was found to bring the concept
FIRST = 0.25  # of what the strongest word brings: weaker ones are read again without it, beside which they may bring nothing
ROUNDS = 12  # of looking for what is left after words were left out


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

    def check(self) -> None:
        """Raises FilterError that names a number that cannot be worked with."""
        for name in ("strength", "push", "gate", "alpha"):
            if not math.isfinite(getattr(self, name)):
                raise FilterError(f"{name} is {getattr(self, name)}, which is no number to work with. Set it to a finite number.")

    def unused(self) -> list[str]:
        """What was set and means nothing to the method."""
        others = ("alpha", "order") if self.method == OURS else ("push",)
        changed = [name for name in others if getattr(self, name) != Settings._field_defaults[name]]
        return [f"{' and '.join(changed)}: not used by '{self.method}'."] if changed else []

    def which_rows(self) -> str:
        """The rows that may change."""
        return self.rows if self.rows != OWN else ALL_ROWS if self.method == OURS else CONTENT

    def idle(self, concepts: Sequence[str]) -> str | None:
        """Why nothing is to be done whatever the text is, or None."""
        if not concepts:
            return "there is no concept to keep out"
        if self.strength == 0.0:
            return "strength is 0"
        if self.start_percent == self.end_percent:
            return f"start_percent and end_percent are both {self.start_percent:g}, so no step lies between them"
        return None


class Found(NamedTuple):
    """A word that brings a concept, and how much of it, 0 to 1 and more."""

    word: Word
    concept: str
    brought: float


class Filtered(NamedTuple):
    """What came out: CONDITIONING, report lines, and the window in which it acts, None where nothing was changed."""

    conditioning: list
    report: list[str]
    window: tuple[float, float] | None

    def inside(self) -> torch.Tensor:
        """The context that is read within the window."""
        return next(context for context, options in self.conditioning if options.get("start_percent", 0.0) == self.window[0])


class Prompt:
    """A text as every encoder of a CLIP reads it: windows and words by seat, and the host's own encoding."""

    def __init__(self, clip, text: str):
        self.clip, self.seats = clip, seats(clip)
        self.tokens = clip.tokenize(text, return_word_ids=True)
        self.windows = {seat.key: windows_of(clip, seat, self.tokens) for seat in self.seats}
        self.words = {seat.key: words(clip, seat, self.windows[seat.key]) for seat in self.seats}
        self.context, self.options = encoded(clip, self.tokens)

    def rows_of(self, seat: Seat):
        """(first row in the context, window) of each of a seat's windows."""
        others = [sum(map(len, self.windows[other.key])) for other in self.seats if other.columns is not None and not other.after]
        first = min(others, default=0) if seat.after else 0
        for window in self.windows[seat.key]:
            yield first, window
            first += len(window)

    def editable(self, seat: Seat, which: str) -> torch.Tensor:
        """Numbers of the context's rows that an encoder may change."""
        found = []
        for first, window in self.rows_of(seat):
            stop = ends(seat, window)
            positions = range(len(window)) if which == ALL_ROWS else [*contents(window), *([stop] if which == END else [])]
            found += [first + position for position in positions]
        return torch.tensor([row for row in found if row < self.context.shape[1]], dtype=torch.long)


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
    settings.check()
    idle = settings.idle(concepts)
    if idle:
        entries = clip.encode_from_tokens_scheduled(clip.tokenize(text)) if conditioning is None else list(conditioning)
        return Filtered(entries, [f"Nothing done: {idle}. The prompt is as it was."], None)
    prompt, report = Prompt(clip, text), settings.unused()
    entries = [[prompt.context, dict(prompt.options)]] if conditioning is None else matching(conditioning, prompt)
    if not any(prompt.words.values()):
        return Filtered(entries, ["Nothing done: the text has no words. The prompt is as it was."], None)

    reader = Reader(clip)
    context, pooled, drift = (_ours if settings.method == OURS else _published)(prompt, reader, concepts, settings, report)
    same = torch.equal(context, prompt.context) and (pooled is None or torch.equal(pooled, prompt.options[POOLED]))
    window = None if same else _window(settings, drift, report)
    if window is None:
        return Filtered(entries, [*report, "The prompt is as it was, bit for bit."], None)
    made = []
    for number, (_, options) in enumerate(entries, 1):
        own = options.get(POOLED)
        if pooled is not None and own is not None:
            if torch.equal(own, prompt.options[POOLED]):
                options = {**options, POOLED: pooled}
            else:
                report.append(f"Entry {number} has a pooled vector of its own, which is not of this text: it stays.")
        made.append([context, options])
    made = made if window == (0.0, 1.0) else windowed(entries, made, *window)
    return Filtered(made, [*report, f"{reader.batches} batches of readings, no model call."], window)


def encoded(clip, tokens) -> tuple[torch.Tensor, dict]:
    """Context and options of tokens, as the host's own text node makes them."""
    plain = {key: [[item[:2] for item in window] for window in windows] for key, windows in tokens.items()}
    entries = clip.encode_from_tokens_scheduled(plain, show_pbar=False)
    if len(entries) != 1:
        raise FilterError(
            "This CLIP carries scheduled hooks, which give the prompt a context for each part of sampling. Filter a CLIP without."
        )
    return entries[0][0], entries[0][1]


def matching(conditioning: Sequence, prompt: Prompt) -> list:
    """The entries of CONDITIONING, all of which must hold the context of the text. Raises FilterError that names the one that does not."""
    if not conditioning:
        raise FilterError("conditioning is empty. Connect the encoded text, or nothing.")
    whole = prompt.context
    for number, (context, _) in enumerate(conditioning, 1):
        same = context.shape == whole.shape and torch.allclose(context.float(), whole.to(context).float(), atol=1e-3, rtol=1e-3)
        if not same:
            raise FilterError(
                f"Entry {number} of conditioning was not made of this text by this CLIP: its {tuple(context.shape)} numbers differ from "
                f"the text's {tuple(whole.shape)}. Connect the same CLIP and write the same text, or filter before conditions are combined."
            )
    return [[context, dict(options)] for context, options in conditioning]


def _window(settings: Settings, drift: float, report: list[str]) -> tuple[float, float] | None:
    """When the filter acts, or None where its own end leaves no step."""
    window, validating = (settings.start_percent, settings.end_percent), settings.self_validating
    if validating == OFF or (validating == OWN and settings.method == OURS):
        return window
    released = settings.method == RELEASED
    steps = ops.steps_as_released(drift) if released else round(ops.steps_as_published(drift))
    last = min(1.0, (steps + 1) / PUBLISHED_STEPS)  # it acts while the number of a step, from 0 on, is not above it
    report.append(f"It changes the rows by {drift:.3f}, so that self_validating ends it at {last:g} of sampling.")
    if window[0] >= last:
        report.append(f"start_percent {window[0]:g} lies after that end: no step is left. Set it to 0, or self_validating to off.")
        return None
    return window[0], min(window[1], last)


# --- ours -------------------------------------------------------------------------------------------------------------------------


def phrase(clip, seat: Seat, concept: str) -> list[tuple]:
    """A concept's window. Raises FilterError where it takes more than one."""
    windows = windows_of(clip, seat, clip.tokenize(concept, return_word_ids=True))
    if len(windows) > 1:
        raise FilterError(f"The concept '{concept[:40]}...' takes {len(windows)} windows of tokens. Say it in a few words.")
    return windows[0]


# What concepts' words bring, by encoder: the same list of concepts stands beside many prompts. (2, D) each: on carriers, and alone.
_brought: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def directions(reader: Reader, seat: Seat, concepts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What each concept's words bring to a text, twice (K, D): the mean over carriers of the vector with them less that with fillers
    instead, and the same for the words alone. Kept for as long as the encoder lives and has the same patches.
    """
    clip = reader.clip
    known = _known(clip, seat)
    keys, missing = [], {}
    for concept in concepts:
        # A learned embedding is told by its numbers, which may change under its name.
        window = phrase(clip, seat, ALONE.format(concept))
        tokens = tuple(item[0] if isinstance(item[0], int) else item[0].float().numpy().tobytes() for item in window)
        keys.append((clip.patcher.patches_uuid, clip.layer_idx, tokens))
        if keys[-1] not in known:
            missing[keys[-1]] = concept
    if missing:
        carriers = (*CARRIERS, ALONE)
        around = [[len(contents(phrase(clip, seat, part))) for part in carrier.split("{}")] for carrier in carriers]
        full = [phrase(clip, seat, carrier.format(concept)) for concept in missing.values() for carrier in carriers]
        inside = [
            contents(window)[before : len(contents(window)) - behind]
            for window, (before, behind) in zip(full, around * len(missing), strict=True)
        ]
        bare = [without(window, places) for window, places in zip(full, inside, strict=True)]
        rows = reader.rows(seat, full + bare)[0]
        made = [brought(seat, *pair, places) for *pair, places in zip(rows[: len(full)], rows[len(full) :], inside, strict=True)]
        made = torch.stack(made).view(len(missing), len(carriers), -1)
        known |= zip(missing, torch.stack([made[:, :-1].mean(1), made[:, -1]], 1), strict=True)
    told = torch.stack([known[key] for key in keys])
    return told[:, 0], told[:, 1]


def _known(clip, seat: Seat) -> dict:
    """What is kept for an encoder; hooks may change it unseen, so that with them nothing is."""
    return {} if clip.patcher.forced_hooks else _brought.setdefault(getattr(clip.cond_stage_model, seat.part), {})


def in_common(reader: Reader, seat: Seat) -> tuple[ops.Span, ops.Span]:
    """The directions in which any word changes an encoder's rows, twice as `directions`: what words of no particular concept share."""
    clip = reader.clip
    known, key = _known(clip, seat), (clip.patcher.patches_uuid, clip.layer_idx, NEUTRAL)
    if key not in known:
        known[key] = tuple(ops.in_common(heard, BESIDE) for heard in directions(reader, seat, NEUTRAL))
    return known[key]


def forget() -> None:
    """Let what concepts bring be read anew."""
    _brought.clear()


class Ear:
    """What an encoder hears of concepts in words: how much of each (K,) lies in what words bring (N, D), in a text and by themselves."""

    def __init__(self, reader: Reader, seat: Seat, concepts: Sequence[str]):
        self.common = dict(zip((CARRIERS, ALONE), in_common(reader, seat), strict=True))
        heard = directions(reader, seat, concepts)
        self.concepts = {key: self.common[key].outside(one) for key, one in zip((CARRIERS, ALONE), heard, strict=True)}

    def heard(self, changes: torch.Tensor, alone: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, K) shares of the concepts and cosines with them."""
        key = ALONE if alone else CARRIERS
        return ops.heard(self.common[key].outside(changes), self.concepts[key])


def find(reader: Reader, seat: Seat, prompt: Prompt, concepts: Sequence[str], gate: float) -> list[Found]:
    """The words of a text that bring a concept to an encoder. A word brings what the text loses without all of its occurrences, or what it
    brings by itself with all others left out, whichever is more: several words of one meaning hide each other from the first. Those found
    are left out and the rest is looked through again, because each word of a description hides behind the others. Where no word brings
    enough, a few may do so together.
    """
    ear = Ear(reader, seat, concepts)
    found: list[Found] = []
    for number, window in enumerate(prompt.windows[seat.key]):
        left: dict[str, list[Word]] = {}
        for word in prompt.words[seat.key]:
            if word.window == number and any(map(str.isalnum, word.text)):
                left.setdefault(word.text.lower(), []).append(word)
        gone: set[int] = set()
        for turn in range(ROUNDS):
            if not left:
                break
            now, groups = without(window, gone), list(left.values())
            places = [{position for word in group for position in word.at} for group in groups]
            rows = reader.rows(seat, [now, *(without(now, place) for place in places)])[0]
            n = len(groups)
            # Words that stand in a text often ("a") change it much when all of them are left out.
            often = torch.tensor([len(group) for group in groups], dtype=torch.float64).sqrt()[:, None]
            losses = torch.stack([brought(seat, rows[0], less, place) for less, place in zip(rows[1:], places, strict=True)])
            share, cosine = ear.heard(losses)
            share = share / often
            amount = torch.where(cosine >= COSINE, share, 0.0)
            if turn == 0:
                own, near = ear.heard(_by_themselves(reader, seat, window, [group[0].at for group in groups]), alone=True)
                amount = torch.maximum(amount, torch.where(near >= ALONE_COSINE, ALONE_COUNTS * own, 0.0))
            most, which = amount.max(1)
            least = max(gate * (AGAIN if turn else 1.0), FIRST * float(most.max()))
            hits = [(i, int(which[i]), float(most[i])) for i in range(n) if float(most[i]) >= least]
            hits = hits or _together(share, cosine, gate / GATE)
            if not hits:
                break
            for i, concept, much in hits:
                found += [Found(word, concepts[concept], much) for word in groups[i]]
                gone |= places[i]
                del left[groups[i][0].text.lower()]
    return found


def _by_themselves(reader: Reader, seat: Seat, window: list[tuple], words: Sequence[Sequence[int]]) -> torch.Tensor:
    """(N, D) what each of some words brings that is all the text there is."""
    first = contents(window)[0]
    places = [range(first, first + len(word)) for word in words]
    full = [alone(window, word) for word in words]
    bare = {len(place): without(one, place) for place, one in zip(places, full, strict=True)}
    rows = reader.rows(seat, [*full, *bare.values()])[0]
    empty = dict(zip(bare, rows[len(full) :], strict=True))
    return torch.stack([brought(seat, one, empty[len(place)], place) for place, one in zip(places, rows, strict=False)])


def _together(share: torch.Tensor, cosine: torch.Tensor, scale: float) -> list[tuple[int, int, float]]:
    """(group, concept, share) of the words (N, K) that bring most of a concept to which a text's words point together, until the others do
    not: a text may be made of words none of which stands out. scale: of what is enough.
    """
    pointing = ops.together(share, cosine, LEAST, FEW)
    concept = int(pointing.argmax())
    if float(pointing[concept]) < TOGETHER * scale:
        return []
    own, near = share[:, [concept]], cosine[:, [concept]]
    order, found = (own * near.clamp_min(0)).flatten().argsort(descending=True).tolist(), []
    while float(ops.together(own[order], near[order], LEAST, FEW)) >= LEFT * TOGETHER * scale:
        found.append((order[0], concept, float(own[order.pop(0)])))
    return found


def _ours(prompt: Prompt, reader: Reader, concepts, settings: Settings, report: list[str]):
    gate = settings.gate or GATE
    texts: set[str] = set()
    for seat in prompt.seats:
        found = find(reader, seat, prompt, concepts, gate)
        texts |= {one.word.text.lower() for one in found}
        told = ", ".join(dict.fromkeys(f"'{one.word.text}' ({one.brought:.2f} of '{one.concept}')" for one in found))
        report.append(f"{seat.part}: {told or 'no word brings a concept'}; gate {gate:g}.")
    if not texts:
        return prompt.context, None, 0.0
    bare = dict(prompt.tokens)
    for seat in prompt.seats:  # what one encoder hears in a word, the others would bring in by the back door
        gone = [word for word in prompt.words[seat.key] if word.text.lower() in texts]
        bare[seat.key] = [
            without(window, {position for word in gone if word.window == number for position in word.at})
            for number, window in enumerate(prompt.windows[seat.key])
        ]
    without_them, options = encoded(prompt.clip, bare)
    amount, which = settings.strength * (1 + settings.push), settings.which_rows()
    context, drifts = prompt.context.clone(), []
    for seat in prompt.seats:
        if seat.columns is None:
            continue
        rows, columns = prompt.editable(seat, which).to(context.device), slice(*seat.columns)
        before = prompt.context[0, rows][:, columns]
        context[0, rows, columns] = ops.taken_out(before, without_them[0, rows][:, columns], amount)
        drifts.append(ops.drift(before.cpu(), context[0, rows][:, columns].cpu()))
    pooled = None
    if prompt.options.get(POOLED) is not None and settings.pooled != OFF:
        pooled = prompt.options[POOLED].clone()
        for seat in prompt.seats:
            if seat.pooled:
                columns = slice(*seat.pooled)
                pooled[:, columns] = ops.taken_out(pooled[:, columns], options[POOLED][:, columns], amount)
    told = {CONTENT: "the rows of the words", END: "the rows of the words and the end", ALL_ROWS: "all rows"}[which]
    report.append(f"What they bring was taken out {amount:g} times, from {told}{'' if pooled is None else ' and the pooled vector'}.")
    return context, pooled, sum(drifts) / max(len(drifts), 1)


# --- as published -----------------------------------------------------------------------------------------------------------------


def _published(prompt: Prompt, reader: Reader, concepts, settings: Settings, report: list[str]):
    """SAFREE: rows of flagged tokens are projected, each encoder's in its own space."""
    released, which = settings.method == RELEASED, settings.which_rows()
    order = settings.order if settings.order != OWN else ("concepts last" if released else "prompt last")
    context, pooled, drifts = prompt.context.clone(), prompt.options.get(POOLED), []
    pooled = pooled.clone() if pooled is not None and settings.pooled == ON else None
    for seat in prompt.seats:
        unwanted, unwanted_pooled = reader.read(seat, [phrase(prompt.clip, seat, concept) for concept in concepts])
        span, names = ops.Span.of(unwanted), []
        for number, (first, window) in enumerate(prompt.rows_of(seat)):
            inside, stop = contents(window), ends(seat, window)
            if not inside:
                continue
            vectors, vectors_pooled = reader.read(seat, [window, *(without(window, [position]) for position in inside)])
            own = ops.Span.of(vectors[1:])
            flags = ops.flagged(ops.distances(vectors[1:], span), settings.alpha, alone=released)
            if settings.gate:
                near = torch.nn.functional.cosine_similarity(vectors[:1].double(), unwanted.double(), dim=1)
                flags &= bool((near >= settings.gate).any())
            hit = [position for position, flag in zip(inside, flags.tolist(), strict=True) if flag]
            names += [word.text for word in prompt.words[seat.key] if word.window == number and set(word.at) & set(hit)]
            if seat.columns is not None:
                columns = slice(*seat.columns)
                rows = prompt.context[0, first : first + len(window), columns].cpu().double()
                clean = ops.cleaned(rows, span, own, order)
                # The released code compares the rows of the whole text, the paper the vectors that sum it up.
                pair = (rows[: stop + 1], clean[: stop + 1]) if released else (vectors[:1], ops.cleaned(vectors[:1], span, own, order))
                drifts.append(ops.drift(*pair))
                behind = {CONTENT: [], END: [stop], ALL_ROWS: list(range(stop, len(rows)))}[which] if hit else []
                for position in [*hit, *(row for row in behind if row < len(rows))]:
                    moved = rows[position] + settings.strength * (clean[position] - rows[position])
                    context[0, first + position, columns] = moved.to(context)
            if hit and pooled is not None and seat.pooled and number == 0:  # the host's pooled vector is that of the first window
                mine = pooled[:, slice(*seat.pooled)].cpu().double()
                clean = ops.cleaned(mine, ops.Span.of(unwanted_pooled), ops.Span.of(vectors_pooled[1:]), order)
                clean = clean * (mine.norm() / clean.norm().clamp_min(1e-12))
                pooled[:, slice(*seat.pooled)] = (mine + settings.strength * (clean - mine)).to(pooled)
        told = ", ".join(f"'{name}'" for name in dict.fromkeys(names))
        report.append(f"{seat.part}: {told or 'no word'} flagged, {span.rank} directions.")
    if not released and any(len(contents(window)) == 1 for windows in prompt.windows.values() for window in windows):
        report.append("A single token has no others to stand out among: the paper's test cannot flag it.")
    if not (len(prompt.seats) == 1 and prompt.seats[0].key == "l"):
        report.append("Published for Stable Diffusion 1.x alone: each encoder in its own space is our reading of it.")
    return context, pooled, sum(drifts) / max(len(drifts), 1)
