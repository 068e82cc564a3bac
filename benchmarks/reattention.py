"""What latent re-attention adds to a filter, as SAFREE publishes it. `python run.py bench reattention`.

The requests of `bench filter` by the word (a colour, a shape, a style; the lab's UNet, 64 pixels, 20 Euler steps, CFG 5), filtered in three
ways (the paper's, the released code's, ours), each drawn without and with Latent Re-attention from the same noise. For each way,

    WAY_held, WAY_held_with    pictures that hold the concept, without and with it
    WAY_held_change            their difference, picture by picture
    WAY_rest_change            the same of pictures whose other attributes are all right
    WAY_valid_change           the same of valid pictures
    WAY_moved                  mean difference of a pixel's value, 0 to 1, between the two

No claim is made: the node is there because the method has it.
"""

from __future__ import annotations

import logging

import torch

from ..host import lab as host_lab
from ..lab.eye import Eye
from ..nodes.filter import FilterReattention
from ._report import Figure, mean, run, share
from .filter import ARMS, CFG, CONCEPTS, draw, holds, requests, rest_right

log = logging.getLogger("concept_nodes.bench")
WAYS = ("paper", "released", "ours")
N, SAMPLE = 48, 12  # texts a concept: in full, in a check


def measure_one(loaded, eye: Eye, way: str, concept: str, n: int) -> dict[str, list[float]]:
    """What pictures of one concept hold, picture by picture: without, with."""
    asked = requests(concept, "plain", n)
    filtered, original = (ARMS[arm].prompts(loaded.clip, list(asked), concept) for arm in (way, "none"))
    model = FilterReattention.execute(loaded.model, [[original.contexts, {}]], 1.0, 0.0, 1.0).result[0]
    found: dict[str, list[float]] = {}
    both = [draw(of, filtered, ARMS[way], concept, CFG, batch=n) for of in (loaded, loaded._replace(model=model))]
    for name, pictures in zip(("", "_with"), both, strict=True):
        readings = eye.read(pictures)
        found |= {
            f"held{name}": [float(holds(concept, one)) for one in readings],
            f"rest{name}": [float(right) for right in rest_right(concept, asked, readings)],
            f"valid{name}": [float(one.valid > 0.5) for one in readings],
        }
    return found | {"moved": (both[0] - both[1]).abs().flatten(1).mean(1).tolist()}


def _measure(sample: bool) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    loaded, eye, n = host_lab.load("unet"), Eye.load(), SAMPLE if sample else N
    figures: dict[str, Figure] = {}
    rows = []
    with torch.inference_mode():
        for way in WAYS:
            together: dict[str, list[float]] = {}
            for concept in CONCEPTS:
                found = measure_one(loaded, eye, way, concept, n)
                rows.append({"arm": way, "concept": concept, "n": n} | {key: round(sum(all_) / n, 4) for key, all_ in found.items()})
                log.info("%s", rows[-1])
                together = {key: together.get(key, []) + values for key, values in found.items()}
            figures |= {f"{way}_{key}": share(together[key]) for key in ("held", "held_with")}
            for key in ("held", "rest", "valid"):
                pairs = zip(together[key], together[f"{key}_with"], strict=True)
                figures[f"{way}_{key}_change"] = mean([after - before for before, after in pairs])
            figures[f"{way}_moved"] = mean(together["moved"])
    return figures, rows


def table(figures: dict[str, Figure]) -> str:
    """The figures as lines of Markdown, a way to filter in each."""
    keys = {"held": "holds it", "held_with": "with", "held_change": "change", "rest_change": "rest right", "valid_change": "valid"}
    lines = [f"| | {' | '.join(keys.values())} |", "|---" * (len(keys) + 1) + "|"]
    for way in WAYS:
        found = [figures[f"{way}_{key}"] for key in keys]
        lines.append(f"| {way} | {' | '.join(f'{one.value:.3f} [{one.low + 0.0:.3f}, {one.high + 0.0:.3f}]' for one in found)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    return run("reattention", argv, _measure)
