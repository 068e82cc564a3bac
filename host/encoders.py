"""Text encoders inside a CLIP: whose rows and columns of a context are whose, the words they read, and many readings at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import comfy.model_management
import torch

FILLER = 0  # what stands in the place of a word that is left out: "!" for CLIP (as the released code has it), padding for T5
BEGINS, ENDS = "\u2581", "</w>"  # how T5's and CLIP's pieces mark where words begin and end
AT_ONCE = 64  # readings in one batch


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


def words(clip, seat: Seat, windows: Sequence[Sequence[tuple]]) -> list[Word]:
    """The words in an encoder's windows of (token, weight, segment), as the tokenizer marks their ends. A learned embedding is one word."""
    known = getattr(clip.tokenizer, seat.part).inv_vocab
    found: list[Word] = []
    for number, window in enumerate(windows):
        text, at, before = "", [], None  # before: the segment of the last piece, whether it was learnt, whether it ended a word
        for position, (token, _, segment) in enumerate(window):
            if not segment:
                continue
            learnt = not isinstance(token, int)
            piece = "" if learnt else known.get(token, "")
            goes_on = at and position == at[-1] + 1 and before[:2] == (segment, learnt)
            if at and not (goes_on and (learnt or not (before[2] or piece.startswith(BEGINS)))):
                found.append(Word(text, number, tuple(at)))
                text, at = "", []
            text = "embedding" if learnt else text + piece.removeprefix(BEGINS).removesuffix(ENDS)
            at.append(position)
            before = segment, learnt, piece.endswith(ENDS)
        if at:
            found.append(Word(text, number, tuple(at)))
    return found


def ends(seat: Seat, window: Sequence[tuple]) -> int:
    """The position of the row that ends a window's words: it sums them up in a CLIP."""
    return max((position for position, (_, _, belongs) in enumerate(window) if belongs), default=0 if seat.causal else -1) + 1


def without(window: Sequence[tuple], positions) -> list[tuple]:
    """A window with a filler in the place of some tokens; weights stay."""
    left_out = set(positions)
    return [(FILLER, *item[1:]) if position in left_out else item for position, item in enumerate(window)]


class Reader:
    """Reads many windows of one CLIP at once, each by itself and without weights."""

    def __init__(self, clip):
        self.clip, self.calls = clip, 0

    def read(self, seat: Seat, windows: Sequence[Sequence[tuple]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What an encoder makes of windows: (vectors (N, D), rows (N, T, D), pooled (N, P) or None). A vector is the row that ends the
        words of a CLIP, and the mean of a T5's words. The host's CLIP takes whole windows only, however short the text.
        """
        clip, model = self.clip, self.clip.cond_stage_model
        stops = [ends(seat, window) for window in windows]
        tokens = [[item[0] for item in window] for window in windows]
        longest = max(map(len, tokens))
        tokens = [row + [row[-1]] * (longest - len(row)) for row in tokens]
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        clip.load_model({seat.key: windows})
        device = clip.patcher.load_device
        model.set_clip_options({"execution_device": device})
        rows, pooled = [], []
        with torch.inference_mode(), comfy.model_management.cuda_device_context(device):
            for at in range(0, len(tokens), AT_ONCE):
                read = getattr(model, seat.part).encode(tokens[at : at + AT_ONCE])
                rows.append(read[0].cpu())
                pooled.append(read[1])
                self.calls += 1
        rows = torch.cat(rows)
        if seat.causal:
            vectors = rows[torch.arange(len(rows)), torch.tensor(stops)]
        else:
            counts = torch.tensor(stops)[:, None]
            inside = torch.arange(rows.shape[1]) < counts
            vectors = (rows * inside[..., None]).sum(1) / counts.clamp_min(1)
        return vectors, rows, None if pooled[0] is None else torch.cat(pooled).cpu()
