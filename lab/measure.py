"""Measure a lab model: draw many captions through the real host, read the pictures with the eye, compare with what was asked."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from ..host import lab as host_lab
from .captions import COMPLETE, Wording, Writer, write_captions
from .eye import Eye, Reading
from .scenes import BACKGROUNDS, CELLS, COLOURS, FILLS, KINDS, SIZE_RANGES, STYLES, Scenes, sample_scenes

log = logging.getLogger("concept_nodes.lab")


class Asked(list):
    """Scenes asked for, with their captions: `scenes` and the caption list."""

    def __init__(self, scenes: Scenes, captions: list[str]):
        super().__init__(captions)
        self.scenes = scenes


def ask(n: int, *, objects: int, size: int, seed: int, wording: Wording = COMPLETE, plain: bool = False) -> Asked:
    """n scenes of so many objects whose places have words, and captions that name all of it. Raises ValueError where they do not fit."""
    scenes = sample_scenes(
        n * 12, height=size, width=size, counts={objects: 1.0}, plain=plain, generator=torch.Generator().manual_seed(seed)
    )
    worded = ((scenes.column() >= 0) & (scenes.row() >= 0)) | ~scenes.present()
    keep = torch.nonzero(worded.all(1) & (scenes.count == objects)).flatten()[:n]
    if len(keep) < n:
        raise ValueError(
            f"Only {len(keep)} of {n} scenes of {objects} objects fit on {size} pixels: ask for fewer objects or a larger canvas."
        )
    scenes = scenes[keep]
    captions, _ = write_captions(scenes, Writer(wording, random.Random(seed)))
    return Asked(scenes, captions)


@torch.inference_mode()
def draw_latents(
    lab,
    captions: list[str],
    *,
    size: int,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    model=None,
    steps: int = 20,
    cfg: float = 4.0,
    batch: int = 64,
    sampler: str = "euler",
    scheduler: str = "normal",
) -> torch.Tensor:
    """Latents (N, 4, size / 8, size / 8) for captions through the host's sampler: picture i starts from noise of seeds[i], or seed + i."""
    import comfy.sample

    def encode(text):
        return lab.clip.encode_from_tokens(lab.clip.tokenize(text), return_pooled=True)

    empty, empty_pooled = encode("")
    seeds = seeds if seeds is not None else range(seed, seed + len(captions))
    noise_of_all = torch.cat([torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(number)) for number in seeds])
    latents = []
    for at in range(0, len(captions), batch):
        encoded = [encode(text) for text in captions[at : at + batch]]
        positive = [[torch.cat([cond for cond, _ in encoded]), {"pooled_output": torch.cat([pooled for _, pooled in encoded])}]]
        negative = [[empty, {"pooled_output": empty_pooled}]]
        noise = noise_of_all[at : at + batch]
        nothing = torch.zeros_like(noise)
        latents.append(
            comfy.sample.sample(
                model or lab.model, noise, steps, cfg, sampler, scheduler, positive, negative, nothing, disable_pbar=True, seed=seed
            )
        )
    return torch.cat(latents)


@torch.inference_mode()
def draw(lab, captions: list[str], **settings) -> torch.Tensor:
    """Pictures (N, H, W, 3) in 0..1 for captions; settings as for `draw_latents`."""
    return torch.cat([lab.vae.decode(part).cpu() for part in draw_latents(lab, captions, **settings).split(64)])


def score(asked: Asked, readings: list[Reading]) -> dict[str, float]:
    """Shares of pictures that hold what was asked. For one object, each attribute; for more, `bind` (the exact set of shape-colour pairs)
    and `place` (every one in its cell).
    """
    scenes, right = asked.scenes, {}

    def tally(key, ok):
        right.setdefault(key, []).append(float(ok))

    columns, rows, sizes, backgrounds = scenes.column(), scenes.row(), scenes.size_word(), scenes.background_word()
    for i, reading in enumerate(readings):
        count = int(scenes.count[i])
        wanted = [(KINDS[int(scenes.kind[i, k])], COLOURS[int(scenes.colour[i, k])]) for k in range(count)]
        tally("valid", reading.valid > 0.5)
        tally("background", reading.background_word() == BACKGROUNDS[int(backgrounds[i])])
        tally("style", reading.style == STYLES[int(scenes.style[i])])
        tally("count", len(reading.objects) == count)
        seen = [(o.kind, o.colour) for o in reading.objects]
        tally("bind", sorted(seen) == sorted(wanted))
        tally("colours", sorted(c for _, c in seen) == sorted(c for _, c in wanted))
        tally("shapes", sorted(s for s, _ in seen) == sorted(s for s, _ in wanted))
        placed, size_right, fill_right = 0, 0, 0
        for k in range(count):
            match = [o for o in reading.objects if (o.kind, o.colour) == wanted[k]]
            if count == 1:
                match = reading.objects[:1]
            if not match:
                continue
            cell = (CELLS[0][int(columns[i, k])], CELLS[1][int(rows[i, k])])
            placed += any(cell_of(o.x / scenes.width, o.y / scenes.height) == cell for o in match)
            size_right += any(size_word(o.diameter) == int(sizes[i, k]) for o in match)
            fill_right += any(o.fill == FILLS[int(scenes.fill[i, k])] for o in match)
        tally("place", placed == count)
        tally("size", size_right == count)
        tally("fill", fill_right == count)
    return {key: sum(values) / len(values) for key, values in right.items()}


def cell_of(x: float, y: float) -> tuple[str, str]:
    """The named cell of a point given in shares of the canvas."""
    return CELLS[0][(x >= 0.4) + (x > 0.6)], CELLS[1][(y >= 0.4) + (y > 0.6)]


def size_word(diameter: float) -> int:
    """Index into SIZES of a diameter in pixels."""
    return min(range(len(SIZE_RANGES)), key=lambda i: abs(sum(SIZE_RANGES[i]) / 2 - diameter))


def sheet(pictures: torch.Tensor, path: Path, columns: int = 12) -> None:
    """Write pictures (N, H, W, 3) as one grid."""
    import numpy as np
    from PIL import Image

    n, h, w, _ = pictures.shape
    rows = (n + columns - 1) // columns
    canvas = np.full((rows * (h + 2), columns * (w + 2), 3), 255, np.uint8)
    for i, picture in enumerate((pictures.clamp(0, 1) * 255).round().to(torch.uint8).numpy()):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        canvas[y : y + h, x : x + w] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas).save(path)


ROWS = ((64, 1), (64, 2), (128, 1), (128, 2), (128, 3))  # (canvas, objects)


def measure_model(name: str, folder: Path, output: Path | None = None, n: int = 256, rows=ROWS) -> dict[tuple[int, int], dict[str, float]]:
    """Scores of one lab model by (canvas, objects), n captions each, with the weights in `folder`; sheets of pictures go to `output`."""
    eye = Eye.load(folder / "eye.safetensors")
    lab = host_lab.LabModel(
        host_lab.load_model(name, str(folder / f"{name}.safetensors")),
        host_lab.load_clip(str(folder / "text.safetensors")),
        host_lab.load_vae(str(folder / "vae.safetensors")),
    )
    scores = {}
    for size, objects in rows:
        asked = ask(n, objects=objects, size=size, seed=900 + objects)
        pictures = draw(lab, list(asked), size=size, seed=5000)
        scores[size, objects] = score(asked, eye.read(pictures))
        log.info("%s %d px, %d objects: %s", name, size, objects, {key: round(value, 3) for key, value in scores[size, objects].items()})
        if output:
            sheet(pictures[:48], output / f"{name}_{size}_{objects}.png")
    return scores


def main(folder: Path, output: Path) -> int:
    """Scores and sheets of every model whose weights lie in `folder`."""
    for name in host_lab.MODELS:
        if (folder / f"{name}.safetensors").exists():
            measure_model(name, folder, output)
    return 0
