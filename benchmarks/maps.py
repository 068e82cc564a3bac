"""How well the maps of words find what they name, and what capturing costs a step.

Pictures of two objects that the eye sees as they were asked for; the truth is the silhouettes that the drawing of the scene has where the
eye sees them. Each object's phrase, colour, noun and place ("red heart on the left"), is bound and drawn as Maps of Words does at its
defaults, with the decoded picture connected. Mean IoU over both objects, picture by picture.

    KIND_map_miou             at the defaults, 64 pixels
    KIND_map_miou_ceiling     of the truth itself, averaged over the cells of the attention's grid, enlarged as maps are, cut at the best
                              height: the most that the attention alone could give, and no bound where masks follow the picture's edges
    KIND_map_miou_of_ceiling  the one over the other
    KIND_map_grid_miou, KIND_map_grid_of_ceiling, KIND_map_grid_over_raw   the same without a picture, of the attention alone
    KIND_map_raw_miou         raw attention (DAAM): the noun, all steps and layers captured, enlarged and summed, cut half way up
    KIND_map_raw_best_miou    the same, cut at the height that is best for it on these very pictures
    KIND_map_over_raw, KIND_map_over_raw_best   ours less these, picture by picture
    KIND_map_miou_128 ...     the same on canvases of 128 pixels

Cost: seconds of the processor a step with Capture Attention over the plain graph's, on interleaved runs: capture_step_ratio on the UNet of
one level at Stable Diffusion 1.5's width that `bench regional` times, capture_step_ratio_lab_KIND on the lab's.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..host import capture, lab, maps
from ..host.capture import ATTENTION, Captured
from ..host.maps import Bound, Settings
from ..lab.captions import COMPLETE, Writer, write_captions
from ..lab.eye import Eye, Reading
from ..lab.measure import ask, draw_latents, pairs
from ..lab.scenes import KINDS, MAX_OBJECTS, Scenes, render
from ..nodes.maps import Capture
from ..ops.maps import heights, resized
from ._layouts import CFG, encode
from ._report import Claim, Figure, mean, run_parts
from .regional import Graph, _middle, random_context, ratios, wide_model

log = logging.getLogger("concept_nodes.bench")
SIZE, SEED, BATCH = 64, 61_000, 16
N, LARGE, SAMPLE = 64, 24, 16  # pictures: at 64 pixels, at 128, in a check
COST = "cost"
PARTS = (COST, *lab.MODELS)
LEVELS = tuple(level / 20 for level in range(4, 17))
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # of the processor, whoever else has it meanwhile
TIMED = {"repeats": 15, "steps": 8, "wide_repeats": 9, "wide_steps": 1}
CLAIMS = {
    f"{kind}_{key}": claim
    for kind in lab.MODELS
    for key, claim in {"map_miou_of_ceiling": Claim(low=0.90), "map_over_raw": Claim(low=0.10)}.items()
} | {"capture_step_ratio": Claim(high=1.05)}


class Listening(Writer):
    """A writer that remembers what it called each thing, by slot: from its colour or noun on, and its noun."""

    def __init__(self, *args):
        super().__init__(*args)
        self.said: dict[int, tuple[str, str]] = {}

    def thing(self, item: dict) -> str:
        phrase = super().thing(item)
        at = min(phrase.find(item["colour"]), phrase.find(item["shape"]))
        self.said[item["slot"]] = (phrase[at:], item["shape"])
        return phrase


class Found(NamedTuple):
    """A picture of two objects (1, height, width, 3): what was captured, its prompt, each object's phrase and noun, and where it is
    (2, height, width).
    """

    captured: Captured
    text: str
    phrases: tuple[str, ...]
    nouns: tuple[str, ...]
    truth: torch.Tensor
    picture: torch.Tensor


def collect(loaded, eye: Eye, size: int, n: int, seed: int) -> list[Found]:
    """n pictures of two objects that differ, in which the eye sees what was asked."""
    model = Capture.execute(loaded.model, capture.ALL, 0.0, 1.0).result[0]
    scenes, rng, found = ask(4 * n, objects=2, size=size, seed=seed).scenes, random.Random(seed), []
    for at in range(0, len(scenes), BATCH):
        part = scenes[at : at + BATCH]
        writers = [Listening(COMPLETE, rng) for _ in range(len(part))]
        texts = [write_captions(part[i : i + 1], writer)[0][0] for i, writer in enumerate(writers)]
        latents = draw_latents(loaded, texts, size=size, seed=seed + at, model=model)
        captured, pictures = maps.captured_with(latents), loaded.vae.decode(latents).cpu()
        readings = eye.read(pictures)
        for i, (text, writer, reading) in enumerate(zip(texts, writers, readings, strict=True)):
            truth = silhouettes(part, i, reading)
            if truth is None:
                continue
            phrases, nouns = zip(*(writer.said[slot] for slot in range(2)), strict=True)
            found.append(Found(only(captured, i), text, phrases, _numbered(text, phrases, nouns), truth, pictures[i : i + 1]))
            if len(found) == n:
                return found
    raise ValueError(f"Only {len(found)} of {n} pictures hold what was asked for.")


def only(captured: Captured, picture: int) -> Captured:
    """What was captured of one picture of a batch."""
    groups = (group._replace(kept=group.kept[:, picture : picture + 1].clone()) for group in captured.groups)
    return captured._replace(groups=tuple(groups))


def _numbered(text: str, phrases: Sequence[str], nouns: Sequence[str]) -> tuple[str, ...]:
    """Nouns that both objects have, told apart by which of them the prompt names first."""
    if nouns[0] != nouns[1]:
        return tuple(nouns)
    first = text.find(phrases[0]) < text.find(phrases[1])
    return f"{nouns[0]} #{1 if first else 2}", f"{nouns[1]} #{2 if first else 1}"


def silhouettes(scenes: Scenes, i: int, reading: Reading) -> torch.Tensor | None:
    """(2, height, width) bool: where the eye sees the objects of a scene; None where it does not see just these, or they are alike."""
    wanted, seen = pairs(scenes, i), [(one.kind, one.colour) for one in reading.objects]
    if sorted(wanted) != sorted(seen) or wanted[0] == wanted[1]:
        return None
    whole, number = torch.zeros(1, MAX_OBJECTS), torch.zeros(1, MAX_OBJECTS, dtype=torch.long)
    kind, diameter, x, y = number.clone(), whole.clone(), whole.clone(), whole.clone()
    for slot, pair in enumerate(wanted):
        one = reading.objects[seen.index(pair)]
        kind[0, slot], diameter[0, slot], x[0, slot], y[0, slot] = KINDS.index(one.kind), one.diameter, one.x, one.y
    drawn = Scenes(
        scenes.height, scenes.width, torch.tensor([2]), kind, number, number, diameter, x, y, torch.zeros(1), torch.zeros(1).long()
    )
    return render(drawn, masks=True)[1][0, :2] > 0.5


def iou(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(...,) of bool (..., 2, height, width): the mean over the two objects."""
    both, either = (masks & truth).sum((-2, -1)), (masks | truth).sum((-2, -1))
    return (both / either.clamp(min=1)).mean(-1)


def of_layers(captured: Captured, names: Sequence[str]) -> Captured:
    """What of it Capture Attention keeps that reads these layers. Layers of a UNet share a group where they share a grid."""
    kept = [group for group in captured.groups if " x " in group.layer or any(name.endswith(group.layer) for name in names)]
    return captured._replace(groups=tuple(kept))


def bound(loaded, found: Found, phrases: Sequence[str]) -> list[Bound]:
    return maps.bind(loaded.clip, found.captured.family, found.text, phrases)


def rows(loaded, found: Found) -> int:
    return maps.words.length_of(loaded.clip, found.captured.family, found.text)


def ours(loaded, found: Found, names: Sequence[str], settings: Settings = Settings()) -> torch.Tensor:  # noqa: B008
    """(2, height, width) bool: what Maps of Words draws behind a Capture Attention of these layers, with the picture connected."""
    words, length = bound(loaded, found, found.phrases), rows(loaded, found)
    drawn = maps.draw(of_layers(found.captured, names), words, settings, length=length, pictures=found.picture)
    return drawn.masks[:, 0].bool()


def raw(loaded, found: Found, names: Sequence[str]) -> torch.Tensor:
    """(2, height, width) from 0 to 1: attention to the nouns over all steps of these layers, between its lowest and its highest."""
    words, length = bound(loaded, found, found.nouns), rows(loaded, found)
    parts = [group for group in of_layers(found.captured, names).groups if group.source == ATTENTION]
    size = found.truth.shape[-2:]
    total = sum(resized(maps.of_group(part, range(capture.STAGES), words, length), *size) * sum(part.calls) for part in parts)
    low, high = total.amin((-2, -1), keepdim=True), total.amax((-2, -1), keepdim=True)
    return ((total - low) / (high - low).clamp(min=1e-12))[0]


def perfect(found: Found, names: Sequence[str]) -> torch.Tensor:
    """(2, height, width) from 0 to 1: the truth averaged over the cells of the finest grid of these layers, enlarged as maps are."""
    grid = max((group.grid for group in of_layers(found.captured, names).groups), key=lambda size: size[0] * size[1])
    pooled = F.adaptive_avg_pool2d(found.truth.float()[None], grid)
    return resized(pooled, *found.truth.shape[-2:])[0]


def at_best(graded: Sequence[torch.Tensor], truths: Sequence[torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(level, IoU of each): graded masks cut at the one level that is best for all of them."""
    maps_, truth = torch.stack(list(graded)), torch.stack(list(truths))
    return max(((level, iou(maps_ > level, truth)) for level in LEVELS), key=lambda one: float(one[1].mean()))


def quality(kind: str, loaded, eye: Eye, size: int, n: int) -> tuple[dict[str, Figure], list[dict]]:
    found = collect(loaded, eye, size, n, SEED + size)
    names, every = (capture.layers_of(loaded.model.model, choice) for choice in (capture.DEFAULT, capture.ALL))
    truths = [one.truth for one in found]
    truth = torch.stack(truths)
    mine, grid = (iou(torch.stack([ours(loaded, one, names, Settings(edges=edges)) for one in found]), truth) for edges in (True, False))
    # A late block is what published maps of Flux models are read at; of a UNet, DAAM takes all.
    raws = [raw(loaded, one, every if kind == "unet" else names) for one in found]
    plain = iou(torch.stack(raws) > 0.5, truth)
    best_level, best = at_best(raws, truths)
    flat = [perfect(one, names) for one in found]
    level, ceiling = max((at_best(graded, truths) for graded in (flat, [heights(one) for one in flat])), key=lambda one: one[1].mean())
    tail = "" if size == SIZE else f"_{size}"
    figures = {
        f"{kind}_map_miou{tail}": mean(mine),
        f"{kind}_map_miou_ceiling{tail}": mean(ceiling),
        f"{kind}_map_miou_of_ceiling{tail}": mean(mine / ceiling.mean()),
        f"{kind}_map_grid_miou{tail}": mean(grid),
        f"{kind}_map_grid_of_ceiling{tail}": mean(grid / ceiling.mean()),
        f"{kind}_map_grid_over_raw{tail}": mean(grid - plain),
        f"{kind}_map_raw_miou{tail}": mean(plain),
        f"{kind}_map_raw_best_miou{tail}": mean(best),
        f"{kind}_map_over_raw{tail}": mean(mine - plain),
        f"{kind}_map_over_raw_best{tail}": mean(mine - best),
    }
    arms = [{"model": kind, "size": size, "n": n, "ceiling cut at": level, "raw best cut at": best_level}]
    for key, figure in figures.items():
        log.info("%s %s", key, figure)
    return figures, arms


def cost(sample: bool) -> tuple[dict[str, Figure], list[dict]]:
    """What capturing by default costs a step, at CFG 1 on the wide model: there, all that is sampled is captured."""
    figures, arms = {}, []
    wide = ("wide", wide_model(), [[random_context(768, 77, 1), {}]], [[random_context(768, 77, 2), {}]], 64, 1.0)
    labs = []
    for kind in lab.MODELS:
        loaded = lab.load(kind)
        positive, negative = ([encode(loaded, text)] for text in ("a large red heart on the left", ""))
        labs.append((kind, loaded.model, positive, negative, SIZE // lab.downscale(kind), CFG))
    for name, model, *conditions, side, cfg in (wide, *labs):
        acting = Capture.execute(model, capture.DEFAULT, 0.0, 1.0).result[0]
        graphs = {key: Graph(one, *conditions, side, cfg, CLOCK) for key, one in (("plain", model), ("capture", acting))}
        head = "wide_" if name == "wide" else ""
        values = ratios(graphs, 5 if sample else TIMED[f"{head}repeats"], TIMED[f"{head}steps"])["capture"]
        key = "capture_step_ratio" + ("" if head else f"_lab_{name}")
        figures[key] = _middle(values)
        arms.append({"arm": key, "ratios": [round(value, 4) for value in values]})
        log.info("%s %s", key, figures[key])
    return figures, arms


def _measure(sample: bool, parts: Sequence[str]) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    eye, figures, arms = Eye.load(), {}, []
    with torch.inference_mode():
        if COST in parts:
            found, told = cost(sample)
            figures |= found
            arms += [{"part": COST} | row for row in told]
        for kind in (part for part in parts if part != COST):
            loaded = lab.load(kind)
            for size, n in ((SIZE, SAMPLE),) if sample else ((SIZE, N), (2 * SIZE, LARGE)):
                found, told = quality(kind, loaded, eye, size, n)
                figures |= found
                arms += [{"part": kind} | row for row in told]
    return figures, arms


def table(figures: dict[str, Figure]) -> str:
    """What maps reach, by model and size, as lines of Markdown."""
    titles = {
        "miou": "ours",
        "miou_of_ceiling": "of ceiling",
        "grid_miou": "without the picture",
        "grid_of_ceiling": "of ceiling",
        "miou_ceiling": "ceiling",
        "raw_miou": "raw",
        "raw_best_miou": "raw, best cut",
    }
    lines = [f"| | {' | '.join(titles.values())} |", "|---" * (len(titles) + 1) + "|"]
    for kind in lab.MODELS:
        for size, tail in ((SIZE, ""), (2 * SIZE, f"_{2 * SIZE}")):
            own = [figures[f"{kind}_map_{key}{tail}"] for key in titles]
            told = " | ".join(f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in own)
            lines.append(f"| {'UNet' if kind == 'unet' else 'DiT'}, {size} px (n={own[0].n}) | {told} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return run_parts("maps", argv, PARTS, _measure, CLAIMS)
