"""Measure a lab model: draw many captions through the real host, read the pictures with the eye, compare with what was asked."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ..host import lab as host_lab
from .captions import COMPLETE, ONE_WAY, OneWay, Wording, Writer, write_captions
from .eye import Eye, Reading, cell_of, size_word
from .scenes import BACKGROUNDS, CELLS, COLOURS, FILLS, KINDS, STYLES, Scenes, sample_scenes

log = logging.getLogger("concept_nodes.lab")
# How each model draws best in 20 steps at 128 pixels, of the settings that docs/lab.md lists; their captions and noise were others than
# those that anything is measured with. `draw` itself keeps the plain ones (Euler, CFG 4 to the end), which other measurements hang on.
BEST = {
    "unet": {"sampler": "euler_ancestral", "scheduler": "normal", "cfg": 3.0, "guided": 0.5},
    "dit": {"sampler": "euler", "scheduler": "normal", "cfg": 2.5},
}


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
    keep = torch.nonzero(placed_in_words(scenes) & (scenes.count == objects)).flatten()[:n]
    if len(keep) < n:
        raise ValueError(
            f"Only {len(keep)} of {n} scenes of {objects} objects fit on {size} pixels: ask for fewer objects or a larger canvas."
        )
    scenes = scenes[keep]
    captions, _ = write_captions(scenes, Writer(wording, random.Random(seed)))
    return Asked(scenes, captions)


def placed_in_words(scenes: Scenes) -> torch.Tensor:
    """(N,) bool: whether the place of every object has a word."""
    return (((scenes.column() >= 0) & (scenes.row() >= 0)) | ~scenes.present()).all(1)


def ask_in(way: str, n: int, *, size: int, seed: int) -> list[tuple[str, Asked]]:
    """[(attribute, Asked)] of n one-object scenes in all, a third each with only the shape, only the colour, or only the style said in
    another way (one of `captions.WAYS`), the rest plainly. The same seed gives the same scenes in every way.
    """
    asked = []
    for at, attribute in enumerate(ONE_WAY):
        whole = ask(2 * n, objects=1, size=size, seed=seed + at).scenes
        if attribute == "style":
            whole = whole[whole.style != STYLES.index("flat")]
        scenes = whole[: n // len(ONE_WAY)]
        captions, _ = write_captions(scenes, OneWay(way, attribute, random.Random(seed)))
        asked.append((attribute, Asked(scenes, captions)))
    return asked


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
    guided: float = 1.0,
) -> torch.Tensor:
    """Latents (N, 4, h, w) for captions through the host's sampler, h and w as the model's autoencoder has them: picture i starts from
    noise of seeds[i], or seed + i; what a sampler adds on its way comes from seed and a batch's place. guided: the share of the
    schedule, from its noisy end, that cfg is for; after it CFG is 1.
    """
    import comfy.sample
    from comfy_extras.nodes_custom_sampler import CFGOverride

    model = model or lab.model
    if guided < 1:
        model = CFGOverride.execute(model, 1.0, guided, 1.0).result[0]

    def encode(text):
        return lab.clip.encode_from_tokens(lab.clip.tokenize(text), return_pooled=True)

    empty, empty_pooled = encode("")
    seeds = seeds if seeds is not None else range(seed, seed + len(captions))
    side = size // lab.vae.spacial_compression_decode()
    noise_of_all = torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(number)) for number in seeds])
    latents = []
    for at in range(0, len(captions), batch):
        encoded = [encode(text) for text in captions[at : at + batch]]
        positive = [[torch.cat([cond for cond, _ in encoded]), {"pooled_output": torch.cat([pooled for _, pooled in encoded])}]]
        negative = [[empty, {"pooled_output": empty_pooled}]]
        noise = noise_of_all[at : at + batch]
        nothing = torch.zeros_like(noise)
        latents.append(
            comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, positive, negative, nothing, disable_pbar=True, seed=seed + at
            )
        )
    return torch.cat(latents)


@torch.inference_mode()
def draw(lab, captions: list[str], **settings) -> torch.Tensor:
    """Pictures (N, H, W, 3) in 0..1 for captions; settings as for `draw_latents`."""
    return torch.cat([lab.vae.decode(part).cpu() for part in draw_latents(lab, captions, **settings).split(64)])


def hits(asked: Asked, readings: list[Reading]) -> dict[str, list[bool]]:
    """Per picture, whether it holds what was asked. For one object, each attribute; for more, `bind` (the exact set of shape-colour pairs)
    and `place` (every one in its cell).
    """
    scenes, right = asked.scenes, {}

    def tally(key, ok):
        right.setdefault(key, []).append(bool(ok))

    columns, rows, sizes, backgrounds = scenes.column(), scenes.row(), scenes.size_word(), scenes.background_word()
    for i, reading in enumerate(readings):
        count, wanted = int(scenes.count[i]), pairs(scenes, i)
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
    return right


def score(asked: Asked, readings: list[Reading]) -> dict[str, float]:
    """Shares of pictures that hold what was asked: the means of `hits`."""
    return {key: sum(values) / len(values) for key, values in hits(asked, readings).items()}


def pairs(scenes: Scenes, i: int) -> list[tuple[str, str]]:
    """The (shape, colour) pairs of a scene's objects, in slot order."""
    return [(KINDS[int(scenes.kind[i, k])], COLOURS[int(scenes.colour[i, k])]) for k in range(int(scenes.count[i]))]


FAULTS = ("missing", "extra", "swapped", "colour leaked", "colour wrong", "shape leaked", "shape wrong", "misplaced")


def faults(asked: Asked, readings: list[Reading]) -> dict[str, list[bool]]:
    """Per picture, what went wrong: objects missing or extra; with the right number of them, shapes and colours right but `swapped`, a
    wrong colour or shape that another asked object has (`leaked`) or none has (`wrong`); bound rightly, but not every one in its cell.
    """
    told = {fault: [] for fault in FAULTS}
    placed = hits(asked, readings)["place"]
    for i, reading in enumerate(readings):
        wanted, seen = pairs(asked.scenes, i), [(o.kind, o.colour) for o in reading.objects]
        found = {"missing": len(seen) < len(wanted), "extra": len(seen) > len(wanted)}
        if len(seen) == len(wanted):
            wrong = []
            for part, name in ((0, "shape"), (1, "colour")):
                asked_for = [pair[part] for pair in wanted]
                surplus = Counter(pair[part] for pair in seen) - Counter(asked_for)
                found[f"{name} leaked"] = any(value in asked_for for value in surplus)
                found[f"{name} wrong"] = any(value not in asked_for for value in surplus)
                wrong.append(bool(surplus))
            bound = sorted(seen) == sorted(wanted)
            found["swapped"] = not any(wrong) and not bound
            found["misplaced"] = bound and not placed[i]
        for fault in FAULTS:
            told[fault].append(found.get(fault, False))
    return told


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
    eye = Eye.load(folder=folder)
    lab = host_lab.LabModel(
        host_lab.load_model(name, str(folder / f"{name}.safetensors")),
        host_lab.load_clip(str(folder / "text.safetensors")),
        host_lab.load_vae(host_lab.VAES[name], str(folder / f"{host_lab.VAES[name]}.safetensors")),
    )
    scores = {}
    for size, objects in rows:
        asked = ask(n, objects=objects, size=size, seed=900 + objects)
        pictures = draw(lab, list(asked), size=size, seed=5000, **BEST[name])
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
