"""Text encoders inside a CLIP: whose rows and columns of a context are whose, the words they read, and many readings at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import comfy.clip_model
import comfy.model_management
import torch

FILLER = 0  # what stands in the place of a word that is left out: "!" for CLIP (as the released code has it), padding for T5
BEGINS, ENDS = "\u2581", "</w>"  # how T5's and CLIP's pieces mark where words begin and end
AT_ONCE = 5000  # tokens in one batch of readings


class EncoderError(ValueError):
    """A CLIP whose rows cannot be told apart, and which can."""


class Seat(NamedTuple):
    """One text encoder of a CLIP.

    key      its tokens' name in what `clip.tokenize` gives
    part     its name in the CLIP's model and tokenizer
    columns  (first, past the last) of the context that are its own; None where none of its rows are there
    after    its rows lie behind those of the other encoders
    pooled   columns of the pooled vector that are its own, or None
    causal   each row knows of the rows before it only
    """

    key: str
    part: str
    columns: tuple[int, int] | None
    after: bool
    pooled: tuple[int, int] | None
    causal: bool


class Word(NamedTuple):
    """A word as an encoder reads it: its text, the window of tokens it lies in, and its positions there."""

    text: str
    window: int
    at: tuple[int, ...]


def seats(clip) -> list[Seat]:
    """The encoders of a CLIP. Raises EncoderError for kinds whose rows nobody has told apart yet."""
    model = clip.cond_stage_model
    names = {kind.__name__ for kind in type(model).__mro__}

    def width(part: str) -> int:
        return getattr(model, part).transformer.get_input_embeddings().weight.shape[1]

    def whole(key: str, part: str, *, after: bool = False, pooled: bool = False, rows: bool = True, causal: bool = True) -> Seat:
        columns = (0, width(part))
        return Seat(key, part, columns if rows else None, after, columns if pooled else None, causal)

    if "FluxClipModel" in names:
        return [whole("t5xxl", "t5xxl", causal=False), whole("l", "clip_l", pooled=True, rows=False)]
    if "SD3ClipModel" in names:
        there = [part for part in ("clip_l", "clip_g", "t5xxl") if getattr(model, part) is not None]
        found = []
        # The host keeps room for an encoder that is missing, at its published width.
        left = width("clip_l") if "clip_l" in there else 768
        if "clip_l" in there:
            found.append(whole("l", "clip_l", pooled=True))
        if "clip_g" in there:
            columns = (left, left + width("clip_g"))
            found.append(Seat("g", "clip_g", columns, False, columns, True))
        if "t5xxl" in there:
            found.append(whole("t5xxl", "t5xxl", after=bool(found), causal=False))
        return found
    if "SDXLClipModel" in names:
        left = width("clip_l")
        return [
            whole("l", "clip_l"),
            Seat("g", "clip_g", (left, left + width("clip_g")), False, (0, width("clip_g")), True),
        ]
    if "SD1ClipModel" in names and getattr(model, "clip_name", "") == "l":
        return [whole("l", "clip_l", pooled=True)]
    raise EncoderError(
        f"This CLIP is a {type(model).__name__}, in whose context no word's rows are known yet. The filter reads the encoders of Stable "
        "Diffusion 1.5, SDXL, Stable Diffusion 3 and Flux.1."
    )


def windows_of(clip, seat: Seat, tokens) -> list[list[tuple]]:
    """An encoder's windows of (token, weight, segment) as it reads them: the host passes over learned embeddings of another width."""
    width = getattr(clip.cond_stage_model, seat.part).transformer.get_input_embeddings().weight.shape[1]
    padding = getattr(clip.tokenizer, seat.part).pad_token
    read = []
    for window in tokens[seat.key]:
        kept = [item for item in window if isinstance(item[0], int) or not torch.is_tensor(item[0]) or item[0].shape[-1] == width]
        read.append(kept + [(padding, 1.0, 0)] * (len(window) - len(kept)))
    return read


def words(clip, seat: Seat, windows: Sequence[Sequence[tuple]]) -> list[Word]:
    """The words in an encoder's windows of (token, weight, segment), as the tokenizer marks their ends. A learned embedding is one word."""
    tokenizer = getattr(clip.tokenizer, seat.part)
    found: list[Word] = []

    def close(number: int, window, at: list[int], learnt: bool) -> None:
        if at:
            text = "embedding" if learnt else tokenizer.decode([window[position][0] for position in at]).strip()
            found.append(Word(text, number, tuple(at)))

    for number, window in enumerate(windows):
        at, before = [], (0, False, False)  # of the last piece: its segment, whether it was learnt, whether it ended a word
        for position, (token, _, segment) in enumerate(window):
            if not segment:
                continue
            learnt = not isinstance(token, int)
            piece = "" if learnt else tokenizer.inv_vocab.get(token, "")
            goes_on = at and position == at[-1] + 1 and before[:2] == (segment, learnt)
            if not (goes_on and (learnt or not (before[2] or piece.startswith(BEGINS)))):
                close(number, window, at, before[1])
                at = []
            at.append(position)
            before = segment, learnt, piece.endswith(ENDS)
        close(number, window, at, before[1])
    return found


def contents(window: Sequence[tuple]) -> list[int]:
    """Positions of a window's words."""
    return [position for position, (_, _, segment) in enumerate(window) if segment]


def ends(seat: Seat, window: Sequence[tuple]) -> int:
    """The position of the row that ends a window's words: it sums them up in a CLIP."""
    return max(contents(window), default=0 if seat.causal else -1) + 1


def without(window: Sequence[tuple], positions) -> list[tuple]:
    """A window with a filler in the place of some tokens; weights stay."""
    left_out = set(positions)
    return [(FILLER, *item[1:]) if position in left_out else item for position, item in enumerate(window)]


def alone(window: Sequence[tuple], positions: Iterable[int]) -> list[tuple]:
    """A window of the same length that holds some tokens of a window as its only words."""
    frame, kept = [item for item in window if not item[2]], [window[position] for position in positions]
    before = contents(window)[0]
    made = [*frame[:before], *kept, *frame[before:]]
    return made + [frame[-1] if frame else (FILLER, 1.0, 0)] * (len(window) - len(made))


class Reader:
    """Reads many windows of one CLIP at once, each by itself and without weights."""

    def __init__(self, clip):
        self.clip, self.batches = clip, 0

    def read(self, seat: Seat, windows: Sequence[Sequence[tuple]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What sums up each of N windows: (vectors (N, D), pooled (N, P) or None). A vector is the row that ends the words of a CLIP, and
        the sum of the words' rows of a T5: as a mean, each word of a long text would weigh next to nothing.
        """
        rows, pooled = self.rows(seat, windows)
        return torch.stack([one[-1] if seat.causal else one[:-1].sum(0) for one in rows]), pooled

    def rows(self, seat: Seat, windows: Sequence[Sequence[tuple]]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What an encoder makes of each of N windows: rows (L, D) up to the end of the words, and pooled (N, P) or None. Nothing behind
        that end is read: in a CLIP no row knows of it, and a T5 sees padding alike in all that is compared.
        """
        clip, model = self.clip, self.clip.cond_stage_model
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        clip.load_model({seat.key: windows})
        device = clip.patcher.load_device
        model.set_clip_options({"execution_device": device})
        encoder = getattr(model, seat.part)
        stops = [ends(seat, window) for window in windows]
        tokens = [[item[0] for item in window] for window in windows]
        if not seat.causal:
            tokens = [row[: stop + 1] for row, stop in zip(tokens, stops, strict=True)]
        elif _reads_any_length(encoder):
            tokens = [row[: max(stops) + 1] for row in tokens]
        read: dict[int, tuple] = {}
        with torch.inference_mode(), comfy.model_management.cuda_device_context(device):
            for length in sorted({len(row) for row in tokens}):
                alike = [number for number, row in enumerate(tokens) if len(row) == length]
                most = max(1, AT_ONCE // length)
                for batch in (alike[at : at + most] for at in range(0, len(alike), most)):
                    rows, pooled = _encode(encoder, [tokens[number] for number in batch])
                    rows, pooled = rows.cpu(), None if pooled is None else pooled.cpu()
                    for at, number in enumerate(batch):
                        read[number] = rows[at, : stops[number] + 1], None if pooled is None else pooled[at]
                    self.batches += 1
        told, pooled = zip(*(read[number] for number in range(len(windows))), strict=True)
        return list(told), None if pooled[0] is None else torch.stack(pooled)


def brought(seat: Seat, rows: torch.Tensor, without: torch.Tensor, left_out: Iterable[int]) -> torch.Tensor:
    """(D,) what some positions of a window bring to its rows (L, D), given the rows without them: in a CLIP the mean over the rows behind
    but their own, which say little but which word it is; in a T5 the sum over all, whose words' own rows hold most of what they mean.
    """
    change = rows.float() - without.float()
    if not seat.causal:
        return change[:-1].sum(0)
    left_out = set(left_out)
    return change[[row for row in range(min(left_out), len(rows)) if row not in left_out]].mean(0)


POSITIONS = "transformer.text_model.embeddings.position_embedding.weight"


def _reads_any_length(encoder) -> bool:
    """Whether it is the host's CLIP with plain position rows: `_encode` can give it fewer of them."""
    if not isinstance(encoder.transformer, comfy.clip_model.CLIPTextModel):
        return False
    return type(encoder.transformer.text_model.embeddings.position_embedding.weight) in (torch.Tensor, torch.nn.Parameter)


def _encode(encoder, tokens: list[list]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (N, L, D) and pooled (N, P) or None of N windows of one length. The host's CLIP adds all of its position rows, and so takes
    whole windows only: for shorter ones it gets as many as there are tokens, for the time of the call.
    """
    if not _reads_any_length(encoder):
        return encoder.encode(tokens)[:2]
    positions = encoder.get_parameter(POSITIONS)[: len(tokens[0])]
    return torch.func.functional_call(encoder, {POSITIONS: positions}, (tokens,), tie_weights=False)[:2]
