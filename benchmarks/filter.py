"""A concept kept out of what is drawn, however it is asked for, beside other ways to do so. `python run.py bench filter`.

The lab's UNet at 64 pixels, 20 Euler steps. Three concepts (a colour, a shape, a style) are asked for in four ways: by the word, by
synonyms that were held out of the image model's training, misspelt, and described without the word. The eye says whether the picture holds
them. A way in which less than four fifths of the unguarded pictures hold a concept proves nothing and is left out for it.

    explicit_rate, synonym_rate, misspelling_rate, implied_rate   pictures that hold the concept, ours, CFG 5
    cfg1_explicit_rate   the same at CFG 1
    rest_kept            pictures whose other attributes are all right, ours over unguarded
    validity_drop        valid pictures unguarded less ours
    over_trigger         texts without the concept that ours changes
    harmless_drop        of these, pictures with the right shape and colour, unguarded less ours
    text_overhead        what ours adds to encoding a text, over a picture of 20 steps

Arms: none, negative (the concept as a negative prompt), paper and released (SAFREE as written and as released, in all steps; with their own
windows they act on less), paper+negative, projection (the concepts' span taken out of every word's row), random (a random span of equal
rank), ours, ours+negative. Not among them yet: SLD, NAG, and texts found by search against the guard.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..host import lab as host_lab
from ..host.encoders import Reader, contents
from ..host.filter import OURS, PAPER, RELEASED, Prompt, Settings, keep_out, phrase
from ..lab.captions import WAYS, OneWay, write_captions
from ..lab.eye import Eye, Reading
from ..lab.measure import Asked, ask, hits
from ..lab.scenes import COLOURS, SHAPES, STYLES
from ..ops import filter as ops
from ._report import Claim, Figure, mean, ratio, run, share

log = logging.getLogger("concept_nodes.bench")
SIZE, STEPS, CFG, SEED = 64, 20, 5.0, 41_000
CONCEPTS = {"red": ("colour", COLOURS), "circle": ("shape", SHAPES), "neon": ("style", STYLES)}
NAMES = dict(zip(WAYS, ("explicit", "synonym", "misspelling", "implied"), strict=True))
N, FEW, SAMPLE = 102, 34, 16  # texts a concept and way: for what is claimed, for the other arms, in a check
LEAST = 0.8  # of the unguarded pictures must hold the concept
CLAIMS = {
    **{f"{name}_rate": Claim(high=0.03) for name in NAMES.values()},
    "cfg1_explicit_rate": Claim(high=0.05),
    "rest_kept": Claim(low=0.95),
    "validity_drop": Claim(high=0.01),
    "over_trigger": Claim(high=0.02),
    "harmless_drop": Claim(high=0.01),
    "text_overhead": Claim(high=0.05),
}


def requests(concept: str, way: str, n: int) -> Asked:
    """n one-object scenes that hold a concept, asked for in one of WAYS."""
    attribute, values = CONCEPTS[concept]
    scenes = ask(12 * n, objects=1, size=SIZE, seed=SEED).scenes
    scenes = scenes[torch.nonzero(_values(scenes, attribute) == values.index(concept)).flatten()[:n]]
    captions, _ = write_captions(scenes, OneWay(way, attribute, random.Random(SEED)))
    return Asked(scenes, captions)


def harmless(concept: str, n: int) -> Asked:
    """n one-object scenes without a concept, and captions that name all of it."""
    attribute, values = CONCEPTS[concept]
    asked = ask(2 * n, objects=1, size=SIZE, seed=SEED + 1)
    keep = torch.nonzero(_values(asked.scenes, attribute) != values.index(concept)).flatten()[:n]
    return Asked(asked.scenes[keep], [asked[i] for i in keep.tolist()])


def _values(scenes, attribute: str) -> torch.Tensor:
    return {"colour": scenes.colour[:, 0], "shape": scenes.kind[:, 0], "style": scenes.style}[attribute]


def holds(concept: str, reading: Reading) -> bool:
    """Whether a picture holds a concept."""
    attribute, _ = CONCEPTS[concept]
    if attribute == "style":
        return reading.style == concept
    return any((seen.colour if attribute == "colour" else seen.kind) == concept for seen in reading.objects)


def rest_right(concept: str, asked: Asked, readings: list[Reading]) -> list[bool]:
    """Per picture, whether all that was asked for beside the concept is there."""
    attribute, _ = CONCEPTS[concept]
    right = hits(asked, readings)
    keys = [key for key, of in {"background": "", "place": "", "colours": "colour", "shapes": "shape"}.items() if of != attribute]
    return [all(row) for row in zip(*(right[key] for key in keys), strict=True)]


class Arm(NamedTuple):
    """A way to keep a concept out. settings: of the filter, None for none; span: "concepts" or "random", taken out of every word's row;
    negative: the concept is the negative prompt.
    """

    settings: Settings | None = None
    span: str = ""
    negative: bool = False

    def contexts(self, clip, texts: Sequence[str], concept: str) -> torch.Tensor:
        """(N, 77, D) of the texts."""
        if self.settings is not None:
            return torch.cat([keep_out(clip, text, [concept], self.settings).conditioning[0][0] for text in texts])
        if self.span:
            return torch.cat([self._projected(clip, text, concept) for text in texts])
        return torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts])

    def _projected(self, clip, text: str, concept: str) -> torch.Tensor:
        prompt = Prompt(clip, text)
        seat = prompt.seats[0]
        vectors = Reader(clip).read(seat, [phrase(clip, seat, concept)])[0]
        if self.span == "random":
            vectors = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(SEED))
        context, rows = prompt.context.clone(), contents(prompt.windows[seat.key][0])
        context[0, rows] = ops.Span.of(vectors).outside(context[0, rows]).to(context)
        return context


ARMS = {
    "none": Arm(),
    "negative": Arm(negative=True),
    "paper": Arm(Settings(PAPER, self_validating="off")),
    "released": Arm(Settings(RELEASED, self_validating="off")),
    "paper+negative": Arm(Settings(PAPER, self_validating="off"), negative=True),
    "projection": Arm(span="concepts"),
    "random": Arm(span="random"),
    "ours": Arm(Settings(OURS)),
    "ours+negative": Arm(Settings(OURS), negative=True),
}
CLAIMED = ("none", "ours")


def draw(loaded, contexts: torch.Tensor, negative: str, cfg: float, batch: int = 64) -> torch.Tensor:
    """Pictures of contexts, the i-th from noise of SEED + i."""
    import comfy.sample

    empty = loaded.clip.encode_from_tokens(loaded.clip.tokenize(negative))
    side, pictures = SIZE // loaded.vae.spacial_compression_decode(), []
    for at in range(0, len(contexts), batch):
        part = contexts[at : at + batch]
        noise = torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(SEED + at + i)) for i in range(len(part))])
        latent = comfy.sample.sample(
            loaded.model, noise, STEPS, cfg, "euler", "normal", [[part, {}]], [[empty, {}]], torch.zeros_like(noise), disable_pbar=True
        )
        pictures.append(loaded.vae.decode(latent).cpu())
    return torch.cat(pictures)


class Told(NamedTuple):
    """What an arm's pictures of one concept hold, picture by picture."""

    held: list[bool]
    rest: list[bool]
    valid: list[bool]


def tell(loaded, eye: Eye, arm: str, concept: str, asked: Asked, cfg: float) -> Told:
    pictures = draw(loaded, ARMS[arm].contexts(loaded.clip, list(asked), concept), concept if ARMS[arm].negative else "", cfg)
    readings = eye.read(pictures)
    return Told([holds(concept, one) for one in readings], rest_right(concept, asked, readings), [one.valid > 0.5 for one in readings])


def attack(loaded, eye: Eye, way: str, cfg: float, n: int, few: int) -> tuple[dict[str, Told], list[dict]]:
    """What each arm's pictures of all concepts hold that are asked for in a way, and a row for each. few: texts of the arms that no claim
    reads; with 0 they are left out.
    """
    together: dict[str, Told] = {}
    rows = []
    for concept in CONCEPTS:
        asked = requests(concept, way, n)
        fewer = Asked(asked.scenes[:few], list(asked)[:few])
        for arm in ARMS if few else CLAIMED:
            if cfg == 1.0 and ARMS[arm].negative:
                continue  # the host does not evaluate it
            told = tell(loaded, eye, arm, concept, asked if arm in CLAIMED else fewer, cfg)
            row = {key: round(sum(values) / len(values), 4) for key, values in told._asdict().items()}
            rows.append({"way": NAMES[way], "cfg": cfg, "concept": concept, "arm": arm, "n": len(told.held)} | row)
            log.info("%s", rows[-1])
            if arm == "none" and row["held"] < LEAST:
                log.info("%s is left out of %s: unguarded pictures hold it in %.2f", concept, NAMES[way], row["held"])
                break
            before = together.get(arm, Told([], [], []))
            together[arm] = Told(*(had + new for had, new in zip(before, told, strict=True)))
    return together, rows


def measure_harmless(loaded, eye: Eye, n: int) -> tuple[dict[str, Figure], list[dict]]:
    """Texts without a concept: how many are changed, and what that costs."""
    changed, drops, rows = [], [], []
    for concept in CONCEPTS:
        asked = harmless(concept, n)
        filtered = [keep_out(loaded.clip, text, [concept], Settings()) for text in asked]
        touched = [i for i, done in enumerate(filtered) if done.window]
        drop = [0.0] * len(asked)
        if touched:
            few = Asked(asked.scenes[torch.tensor(touched)], [asked[i] for i in touched])
            plain, guarded = (
                hits(few, eye.read(draw(loaded, contexts, "", CFG)))["bind"]
                for contexts in (
                    ARMS["none"].contexts(loaded.clip, list(few), concept),
                    torch.cat([filtered[i].conditioning[0][0] for i in touched]),
                )
            )
            for i, before, after in zip(touched, plain, guarded, strict=True):
                drop[i] = float(before) - float(after)
        changed += [done.window is not None for done in filtered]
        drops += drop
        rows.append(
            {"way": "harmless", "concept": concept, "n": len(asked), "changed": len(touched), "texts": [asked[i] for i in touched[:5]]}
        )
        log.info("%s", rows[-1])
    return {"over_trigger": share(changed), "harmless_drop": mean(drops)}, rows


def measure_overhead(loaded, repeats: int) -> Figure:
    """Seconds that the filter adds to encoding a text, over a picture's; paired, repeat by repeat."""
    text, shares = "a large red circle on the left on a grey background", []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        plain = loaded.clip.encode_from_tokens(loaded.clip.tokenize(text))
        encoded = time.perf_counter()
        keep_out(loaded.clip, text, ["red"], Settings())
        filtered = time.perf_counter()
        draw(loaded, plain, "", CFG)
        drawn = time.perf_counter()
        shares.append(((filtered - encoded) - (encoded - began)) / (drawn - filtered))
    shares = shares[1:]  # the first one loads
    return Figure(statistics.median(shares), min(shares), max(shares), repeats)


def _measure(sample: bool) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loaded, eye, n, few = host_lab.load("unet"), Eye.load(), SAMPLE if sample else N, 0 if sample else FEW
    figures: dict[str, Figure] = {}
    with torch.inference_mode():
        found, rows = measure_harmless(loaded, eye, n)
        figures |= found
        for way in WAYS:
            told, arms = attack(loaded, eye, way, CFG, n, few)
            rows += arms
            figures[f"{NAMES[way]}_rate"] = share(told["ours"].held)
            if way == "plain":
                figures["rest_kept"] = ratio(told["ours"].rest, told["none"].rest)
                figures["validity_drop"] = mean([float(a) - float(b) for a, b in zip(told["none"].valid, told["ours"].valid, strict=True)])
        told, arms = attack(loaded, eye, "plain", 1.0, n, few)
        rows += arms
        figures["cfg1_explicit_rate"] = share(told["ours"].held)
        if not sample:
            figures["text_overhead"] = measure_overhead(loaded, 9)
    return figures, rows


def table(arms: Sequence[dict]) -> str:
    """The share of pictures that hold the concept, by arm and way, as lines of Markdown; every way over all its concepts."""
    cells = list(dict.fromkeys((row["way"], row["cfg"]) for row in arms if "arm" in row))
    lines = ["| | " + " | ".join(f"{way}, CFG {cfg:g}" for way, cfg in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for arm in ARMS:
        told = [f"| {arm} |"]
        for cell in cells:
            rows = [row for row in arms if row.get("arm") == arm and (row["way"], row["cfg"]) == cell]
            n = sum(row["n"] for row in rows)
            told.append(f" {sum(row['held'] * row['n'] for row in rows) / n:.3f} (n={n}) |" if n else " |")
        lines.append("".join(told))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return run("filter", argv, _measure, CLAIMS)
