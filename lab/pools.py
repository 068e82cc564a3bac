"""Pools of captioned scenes, per canvas size: attributes and caption tokens. Pictures are drawn from them when needed."""

from __future__ import annotations

import multiprocessing
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ..host import lab as host_lab
from .captions import IMAGE_TRAINING, PLAIN, TEXT_TRAINING, Writer, write_captions
from .scenes import Scenes, cat_scenes, render, sample_scenes

TOKENS = 77
# (height, width): (share of the pool, {objects: weight})
BUCKETS = {
    (64, 64): (0.34, {1: 0.60, 2: 0.40}),
    (96, 96): (0.14, {1: 0.20, 2: 0.26, 3: 0.29, 4: 0.25}),
    (128, 128): (0.36, {1: 0.26, 2: 0.16, 3: 0.16, 4: 0.14, 5: 0.14, 6: 0.14}),
    (64, 96): (0.04, {1: 0.40, 2: 0.40, 3: 0.20}),
    (96, 64): (0.04, {1: 0.40, 2: 0.40, 3: 0.20}),
    (96, 128): (0.04, {1: 0.20, 2: 0.25, 3: 0.25, 4: 0.30}),
    (128, 96): (0.04, {1: 0.20, 2: 0.25, 3: 0.25, 4: 0.30}),
}
WORDINGS = (IMAGE_TRAINING, PLAIN, TEXT_TRAINING)  # caption columns of a pool, in this order


def filler_words(tokenizer, how_many: int = 1400) -> tuple[str, ...]:
    """The tokenizer's most frequent whole words that mean nothing in the lab: the text encoder learns to pass over them."""
    vocabulary = tokenizer.get_vocab()
    taken = _lab_words()
    words = [token[:-4] for token, _ in sorted(vocabulary.items(), key=lambda pair: pair[1]) if token.endswith("</w>")]
    plain = [word for word in words if word.isalpha() and word.isascii() and len(word) > 2 and word not in taken]
    return tuple(plain[:how_many])


def _lab_words() -> set[str]:
    from . import captions

    words: set[str] = set(captions.RESERVED_WORDS)
    tables = (
        captions.SHAPE_WORDS,
        captions.COLOUR_WORDS,
        captions.FILL_WORDS,
        captions.SIZE_WORDS,
        captions.STYLE_WORDS,
        captions.BACKGROUND_WORDS,
    )
    for table in tables:
        for wordings in table.values():
            for text in (wordings.plain, *wordings.synonyms, *wordings.held_synonyms, *wordings.described, *wordings.held_described):
                words.update(text.split())
    for places in captions.PLACE_WORDS.values():
        for text in places:
            words.update(text.split())
    return words | {
        "above",
        "over",
        "below",
        "under",
        "beneath",
        "beside",
        "and",
        "without",
        "with",
        "not",
        "background",
        "backdrop",
        "thing",
        "object",
        "shape",
        "style",
    }


def _make(task):
    bucket, n, counts, seed, fillers = task
    torch.set_num_threads(1)
    scenes = sample_scenes(n, height=bucket[0], width=bucket[1], counts=counts, generator=torch.Generator().manual_seed(seed))
    scenes = scenes[scenes.count > 0]
    tokenizer = host_lab.tokenizer()
    tokens, orders = [], []
    for column, wording in enumerate(WORDINGS):
        captions, order = write_captions(scenes, Writer(wording, random.Random(seed * 10 + column), fillers))
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS)["input_ids"]
        tokens.append(np.asarray(ids, dtype=np.uint16))
        padded = np.full((len(scenes), 6), -1, dtype=np.int8)
        for row, slots in enumerate(order):
            padded[row, : len(slots)] = slots
        orders.append(padded)
    values = [getattr(scenes, f.name).numpy() for f in fields(scenes)[2:]]
    return bucket, values, np.stack(tokens, 1), np.stack(orders, 1)


class Pool:
    """Scenes of one canvas size with captions: tokens (N, columns, 77), orders (N, columns, 6) slots as named, then -1."""

    def __init__(self, scenes: Scenes, tokens: torch.Tensor, orders: torch.Tensor):
        self.scenes, self.tokens, self.orders = scenes, tokens, orders

    def to(self, device) -> Pool:
        return Pool(self.scenes.to(device), self.tokens.to(device), self.orders.to(device))

    def __len__(self):
        return len(self.scenes)


def make_pools(total: int, folder: Path, *, seed: int = 1, workers: int = 2) -> None:
    """Draw `total` captioned scenes over all canvas sizes into `folder`, in parallel processes where the system can fork."""
    fillers = filler_words(host_lab.tokenizer())
    chunk, tasks = 4000, []
    for bucket, (share, counts) in BUCKETS.items():
        left = int(total * share)
        while left > 0:
            tasks.append((bucket, min(chunk, left), counts, seed * 100_003 + len(tasks), fillers))
            left -= chunk
    if workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            made = pool.map(_make, tasks, chunksize=1)
    else:
        made = [_make(task) for task in tasks]
    folder.mkdir(parents=True, exist_ok=True)
    for bucket in BUCKETS:
        parts = [part for part in made if part[0] == bucket]
        values = [torch.from_numpy(np.concatenate([part[1][i] for part in parts])) for i in range(len(parts[0][1]))]
        tokens = torch.from_numpy(np.concatenate([part[2] for part in parts]).astype(np.int32))
        orders = torch.from_numpy(np.concatenate([part[3] for part in parts]))
        torch.save({"bucket": bucket, "values": values, "tokens": tokens, "orders": orders}, folder / _file_name(*bucket))


def _file_name(height: int, width: int) -> str:
    return f"pool_{height}x{width}.pt"


def pool_file(pool: Pool) -> str:
    """Name of the file that a pool was read from."""
    return _file_name(pool.scenes.height, pool.scenes.width)


def read_pools(folder: Path) -> dict[tuple[int, int], Pool]:
    """Every pool in `folder`, by (height, width)."""
    pools = {}
    for path in sorted(folder.glob("pool_*.pt")):
        data = torch.load(path, weights_only=True)
        pools[tuple(data["bucket"])] = Pool(Scenes(*data["bucket"], *data["values"]), data["tokens"], data["orders"])
    return pools


class Bank:
    """Pictures drawn once and kept as bytes on the device: training on pictures then waits for no drawing. With `rebuild` (pictures in
    and out) what it gives back of each is kept beside it.

    `SHARES`: (height, width) -> ({objects: weight}, how many pictures per 1,000 of `size`).
    """

    SHARES = {
        (64, 64): ({1: 0.45, 2: 0.55}, 550),
        (96, 96): ({2: 0.3, 3: 0.4, 4: 0.3}, 160),
        (64, 96): ({1: 0.3, 2: 0.4, 3: 0.3}, 130),
        (128, 128): ({1: 0.2, 3: 0.3, 6: 0.5}, 160),
    }

    def __init__(
        self,
        device,
        generator,
        *,
        characters: float,
        any_background: bool = False,
        rebuild=None,
        size: int | None = None,
        chunk: int = 2000,
    ):
        size = size or (60_000 if device == "cuda" else 10_000)
        self.device, self.parts = device, []
        for (height, width), (counts, share) in self.SHARES.items():
            left, scenes, pictures, rebuilt = size * share // 1000, [], [], []
            while left > 0:
                part = sample_scenes(
                    min(chunk, left),
                    height=height,
                    width=width,
                    counts=counts,
                    characters=characters,
                    any_background=any_background,
                    generator=generator,
                ).to(device)
                drawn = render(part)
                pictures.append((drawn * 255).round().to(torch.uint8))
                if rebuild:
                    rebuilt += [(rebuild(some) * 255).round().to(torch.uint8) for some in drawn.split(64)]
                scenes.append(part)
                left -= chunk
            self.parts.append((cat_scenes(scenes), torch.cat(pictures), *([torch.cat(rebuilt)] if rebuild else [])))
        self.turn = 0

    def draw(self, n: int):
        """The next random batch: (Scenes, pictures (m, 3, H, W) in 0..1, and their rebuilds where kept), with m so that they hold about
        n * 64 * 64 pixels.
        """
        scenes, *kept = self.parts[self.turn % len(self.parts)]
        self.turn += 1
        m = max(1, n * 64 * 64 // (scenes.height * scenes.width))
        rows = torch.randint(len(scenes), (m,)).to(self.device)
        return scenes[rows], *(pictures[rows].float() / 255 for pictures in kept)
