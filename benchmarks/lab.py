"""What the lab models draw of what they are asked for, as the eye reads it: 20 Euler steps, CFG 4, captions that name everything.

Figures are shares of pictures, by model and canvas: `color1`, `shape1`, `size1`, `place1`, `background1` and `valid1` for one object,
`bind2` and `bind3` for exactly the right shapes in the right colours among two and three.
"""

from __future__ import annotations

import torch

from ..host import lab
from ..lab.measure import ROWS, measure_model
from . import _report
from ._report import Claim, Figure, share

N, SAMPLE = 128, 32
ONE = {"color1": "colours", "shape1": "shapes", "size1": "size", "place1": "place", "background1": "background", "valid1": "valid"}
CLAIMS = {f"{name}_{key}_64": Claim(low=0.85) for name in lab.MODELS for key in ("color1", "shape1")}


def _measure(sample: bool):
    n = SAMPLE if sample else N
    figures: dict[str, Figure] = {}
    arms = []
    for name in lab.MODELS:
        scores = measure_model(name, lab.WEIGHTS, n=n, rows=ROWS[:2] if sample else ROWS)
        for (size, objects), found in scores.items():
            arms.append({"arm": name, "size": size, "objects": objects, "n": n} | {key: round(value, 4) for key, value in found.items()})
            wanted = ONE if objects == 1 else {f"bind{objects}": "bind"}
            figures |= {f"{name}_{key}_{size}": share(torch.arange(n) < round(found[score] * n)) for key, score in wanted.items()}
    return figures, arms


def main(argv: list[str]) -> int:
    return _report.run("lab", argv, _measure, CLAIMS)
