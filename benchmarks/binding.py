"""What binding a prompt's words adds to pictures of two things. `python run.py bench binding`.

Complete captions of scenes, as `bench lab` asks them, on both lab models: Euler steps at CFG 4, the same noise in every arm, and the eye
says whether the exact set of shapes is there in their colours (`bind`). The groups are those that Bind Words reads out of a caption itself.

    plain       the prompt
    weighted    the groups' words at weight 1.2, as users have it
    words       token suppression as published (T2I-Zero), on cross-attention
    dense       DenseDiffusion's bias with the scene's own boxes: what places are worth that nobody told the other arms
    excite      Attend-and-Excite, with gradients (UNet)
    free        Bind Words as it comes: groups compete, less and less, in the first half of sampling

20 steps, as many as `bench lab` has. In parts, of each MODEL: two and single at 64 pixels, large at 128
(`binding128`; the UNet there with three things, too),

    MODEL_binding_ARM          share of pictures that are bound
    MODEL_binding_ARM_gain     its difference from plain, picture by picture
    MODEL_binding_single_drop  what pictures of one thing lose, of which the groups are told with the background's
    MODEL_binding_faults       share of plain pictures in which an attribute of one thing went to another: what binding could mend

`dense` has the scene's own boxes. Where it does not help either, the lab's pictures of so many things go wrong in other ways than binding
mends, and figures of `free` say that it does no harm, not that it has no effect: there is no power to tell that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import comfy.sample
import comfy.samplers
import torch

from ..host import lab as host_lab
from ..host.binding import DENSE, FORMS, GROUPS, WORDS, BindEffect, Members, Settings
from ..host.dispatcher import attach
from ..host.families import family_of
from ..host.words import places as word_places
from ..lab.eye import Eye
from ..lab.measure import Asked, ask, faults, hits
from ..lab.scenes import COLOURS, KINDS
from ..ops.masks import pool
from ..ops.phrases import things
from ._excite import Excite
from ._report import Claim, Figure, mean, run_parts, share

log = logging.getLogger("concept_nodes.bench")
STEPS, CFG, SEED, BATCH = 20, 4.0, 7100, 64
PARTS = tuple(f"{name}_{kind}" for name in host_lab.MODELS for kind in ("two", "single", "large"))
N, FEW, SAMPLE = 192, 32, 32  # pictures in the claimed rows; in the others; in a check
MANY = 512  # of two things on the UNet, whose figure lies near what is wanted: as many as a row of bench lab
WEIGHT, MARGIN = 1.2, 2.0
CLAIMS = {
    "unet_binding_free": Claim(low=0.95),
    "dit_binding_free_gain": Claim(low=0.15),
    **{f"{name}_binding_single_drop": Claim(high=0.01) for name in host_lab.MODELS},
}


class Task(NamedTuple):
    """Captions with what the arms need of them: contexts (n, rows, width), pooled (n, width), each caption's groups as rows of its context,
    and boxes (n, G, size, size) of its scene's objects, in the order in which the caption names them.
    """

    loaded: host_lab.LabModel
    asked: Asked
    size: int
    contexts: torch.Tensor
    pooled: torch.Tensor
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    boxes: torch.Tensor

    def part(self, rows: slice) -> Task:
        own = Asked(self.asked.scenes[rows], self.asked[rows])
        return self._replace(
            asked=own, contexts=self.contexts[rows], pooled=self.pooled[rows], groups=self.groups[rows], boxes=self.boxes[rows]
        )


def encode(loaded, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    contexts, pooled = zip(*(loaded.clip.encode_from_tokens(loaded.clip.tokenize(text), return_pooled=True) for text in texts), strict=True)
    return torch.cat(contexts), torch.cat(pooled)


def task(loaded, objects: int, size: int, n: int) -> Task:
    asked = ask(n, objects=objects, size=size, seed=SEED + objects)
    family = family_of(loaded.model.model)
    groups, boxes = [], torch.zeros(n, objects, size, size)
    for number, caption in enumerate(asked):
        phrases = things(caption)
        if objects == 1:
            phrases += [word for word in ("background", "backdrop") if word in caption]
        rows = []
        for phrase in phrases:
            words, _, place = phrase.partition(" #")
            there = word_places(loaded.clip, family, caption, words)
            rows.append(there[int(place or 1) - 1])
        groups.append(tuple(rows))
        boxes[number] = boxes_of(asked, number, phrases[:objects])
    return Task(loaded, asked, size, *encode(loaded, asked), tuple(groups), boxes)


def boxes_of(asked: Asked, number: int, phrases: Sequence[str]) -> torch.Tensor:
    """(objects, size, size): each phrase's object, told by its colour and shape."""
    scenes, found = asked.scenes, torch.zeros(int(asked.scenes.count[number]), asked.scenes.height, asked.scenes.width)
    left = list(range(len(found)))
    for at, phrase in enumerate(phrases[: len(found)]):
        said = phrase.split()
        slot = next(
            (one for one in left if {KINDS[int(scenes.kind[number, one])], COLOURS[int(scenes.colour[number, one])]} <= set(said)), left[0]
        )
        left.remove(slot)
        reach = float(scenes.diameter[number, slot]) / 2 + MARGIN
        (top, bottom), (first, last) = (
            (max(0, int(middle - reach)), int(middle + reach) + 1)
            for middle in (float(scenes.y[number, slot]), float(scenes.x[number, slot]))
        )
        found[at, top:bottom, first:last] = 1
    return found


def plain(task: Task):
    return task.loaded.model, task.contexts, None


def weighted(task: Task):
    """As the host weights words: away from the empty prompt's rows."""
    nothing, _ = encode(task.loaded, [""])
    contexts = task.contexts.clone()
    for number, groups in enumerate(task.groups):
        rows = [row for group in groups for row in group]
        contexts[number, rows] = nothing[0, rows] + WEIGHT * (contexts[number, rows] - nothing[0, rows])
    return task.loaded.model, contexts, None


def formed(mode: str, end: float = 1.0) -> Callable:
    """Bind Words' forms, with each caption's own groups, up to a share of sampling."""

    def prepare(task: Task):
        model, groups = task.loaded.model.clone(), task.groups
        if mode == WORDS:
            groups = tuple(tuple((row,) for row in sorted({row for group in own for row in group})) for own in groups)
        members = Members(groups, task.contexts.shape[1])
        places = (lambda height, width: torch.stack([pool(one, height, width) for one in task.boxes])) if mode == DENSE else None
        attach(model, BindEffect(model.model, mode, FORMS[mode](), members, 1.0, 0.0, end, places))
        return model, task.contexts, None

    return prepare


def excite(task: Task):
    """On the words' last tokens, the shapes."""
    exciting = Excite([[group[-1:] for group in groups] for groups in task.groups], task.size // 8)
    return exciting.watching(task.loaded.model), task.contexts, exciting.sampler()


FULL = ("plain", "free")  # the arms that claims are about
LEAKS = ("swapped", "colour leaked", "shape leaked")
ARMS = {
    "plain": plain,
    "weighted": weighted,
    "words": formed(WORDS),
    "dense": formed(DENSE),
    "free": formed(GROUPS, Settings().end_percent),
    "excite": excite,
}


def draw(task: Task, arm: str) -> torch.Tensor:
    """Pictures (n, size, size, 3)."""
    loaded, pictures = task.loaded, []
    empty, empty_pooled = encode(loaded, [""])
    side = task.size // loaded.vae.spacial_compression_decode()
    for at in range(0, len(task.asked), BATCH):
        part = task.part(slice(at, at + BATCH))
        seeds = range(SEED + at, SEED + at + len(part.asked))
        noise = torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        model, contexts, sampler = ARMS[arm](part)
        positive, negative = [[contexts, {"pooled_output": part.pooled}]], [[empty, {"pooled_output": empty_pooled}]]
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        latents = comfy.sample.sample_custom(
            model,
            noise,
            CFG,
            sampler or comfy.samplers.ksampler("euler"),
            sigmas,
            positive,
            negative,
            torch.zeros_like(noise),
            disable_pbar=True,
        )
        pictures.append(loaded.vae.decode(latents).cpu())
    return torch.cat(pictures)


def measure(loaded, eye: Eye, objects: int, size: int, n: int, arms: Sequence[str]) -> tuple[Task, dict[str, list], list[dict]]:
    """Per arm, picture by picture, whether it is bound; and the rows of the result."""
    asked, bound, rows = task(loaded, objects, size, n), {}, []
    for arm in arms:
        of = asked if arm in FULL else asked.part(slice(0, min(n, FEW)))
        readings = eye.read(draw(of, arm))
        right = hits(of.asked, readings)
        bound[arm] = [
            float(one) for one in (right["bind"] if objects > 1 else map(all, zip(right["colours"], right["shapes"], strict=True)))
        ]
        told = faults(of.asked, readings)
        rows.append(
            {"objects": objects, "size": size, "arm": arm, "n": len(of.asked), "bind": round(sum(bound[arm]) / len(of.asked), 4)}
            | {"valid": round(sum(right["valid"]) / len(of.asked), 4)}
            | {"faults": {fault: round(sum(found) / len(of.asked), 4) for fault, found in told.items()}}
        )
        log.info("%s", rows[-1])
        if arm == "plain":
            bound["leaked"] = [any(told[fault][number] for fault in LEAKS) for number in range(len(of.asked))]
    return asked, bound, rows


def figures_of(prefix: str, bound: dict[str, list]) -> dict[str, Figure]:
    found = {}
    for arm in (arm for arm in ARMS if arm in bound):
        found[f"{prefix}_{arm}"] = share(bound[arm])
        if arm != "plain":
            found[f"{prefix}_{arm}_gain"] = mean([after - before for before, after in zip(bound["plain"], bound[arm], strict=False)])
    return found | {f"{prefix}_faults": share(bound["leaked"])}


def _measure(sample: bool, parts: Sequence[str]) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    eye, figures, arms = Eye.load(), {}, []
    n, few = (SAMPLE, SAMPLE) if sample else (N, FEW)
    for part in parts:
        name, _, kind = part.partition("_")
        loaded = host_lab.load(name)
        tasks: dict[str, tuple] = {}  # prefix of the figures -> objects, size, pictures, arms
        if kind == "two":
            others = [arm for arm in ARMS if arm not in FULL and not (name == "dit" and arm == "excite")]
            tasks[f"{name}_binding"] = 2, 64, MANY if name == "unet" and not sample else n, [*FULL, *([] if sample else others)]
        elif kind == "large":
            tasks[f"{name}_binding128"] = 2, 128, few, FULL
            if name == "unet":
                tasks["unet_binding128_three"] = 3, 128, few, [*FULL, *([] if sample else ["dense"])]
        for key, (objects, size, count, which) in tasks.items():
            _, bound, rows = measure(loaded, eye, objects, size, count, which)
            figures |= figures_of(key, bound)
            arms += [{"part": part, "model": name} | row for row in rows]
        if kind == "single":
            _, bound, rows = measure(loaded, eye, 1, 64, n, FULL)
            lost = [before - after for before, after in zip(bound["plain"], bound["free"], strict=True)]
            figures[f"{name}_binding_single_drop"] = mean(lost)
            arms += [{"part": part, "model": name} | row for row in rows]
    return figures, arms


def table(figures: dict[str, Figure]) -> str:
    """The figures as lines of Markdown, an arm in each."""
    keys = [f"{name}_{kind}" for name in host_lab.MODELS for kind in ("binding", "binding128")]
    lines = ["| | UNet, 64 px | UNet, 128 px | DiT, 64 px | DiT, 128 px |", "|---|---|---|---|---|"]
    for arm in ARMS:
        found = [figures.get(f"{key}_{arm}") for key in keys]
        cells = ["–" if one is None else f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in found]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return run_parts("binding", argv, PARTS, _measure, CLAIMS)
