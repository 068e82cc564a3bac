"""How well the lab's models draw what captions ask, and how well the eyes see it. `python run.py bench lab`.

Every row draws new scenes' complete captions through the host's sampler at 128 pixels (other wordings: 64) in 20 steps, each model by
the settings that a study found best for it (`BEST`, docs/lab.md); its captions and noise were others than these. The first eye reads; the
second one says whether the verdicts hang on the first. `bind` is the exact set of shapes in their colours.

`--again PART ...` measures some of PARTS anew and keeps the others' committed figures.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch

from ..host import lab as host_lab
from ..lab import judge
from ..lab.captions import WAYS
from ..lab.eye import NETS, Eye
from ..lab.measure import BEST, FAULTS, ask, ask_in, draw, faults, hits
from . import _report
from ._report import Claim, Figure, share

log = logging.getLogger("concept_nodes.bench")
SIZE, WORDING_SIZE = 128, 64
N, SAMPLE, MANY = 512, 64, 128  # pictures a row; in a check; with four objects and more, for which nothing is claimed
EYES, WORDED = 1200, 510  # scenes an eye reads; pictures a way of wording
SEED = 7000
COUNTS = {"1": (1,), "2": (2,), "3": (3,), "more": (4, 5, 6)}
WORDINGS = "wordings"
PARTS = ("eyes", *(f"{model}-{what}" for model in host_lab.MODELS for what in (*COUNTS, WORDINGS)))
ONE = {"background": "background", "color": "colours", "shape": "shapes", "size": "size", "place": "place", "valid": "valid"}
CLAIMS = {
    "unet_background1": Claim(low=0.99),
    "unet_color1": Claim(low=0.96),
    "unet_shape1": Claim(low=0.94),
    "unet_size1": Claim(low=0.90),
    "unet_place1": Claim(low=0.80),
    "unet_valid1": Claim(low=0.96),
    "unet_bind2": Claim(low=0.70),
    "dit_background1": Claim(low=0.94),
    "dit_color1": Claim(low=0.91),
    "dit_shape1": Claim(low=0.89),
    "dit_size1": Claim(low=0.85),
    "dit_place1": Claim(low=0.75),
    "dit_valid1": Claim(low=0.91),
    "dit_bind2": Claim(low=0.65),
    **{f"{name}_{way}": Claim(low=0.80) for name in host_lab.MODELS for way in WAYS[1:]},
    **{f"{eye}_true": Claim(low=0.99) for eye in NETS},
    **{f"{eye}_recon": Claim(low=0.97) for eye in NETS},
    **{f"{eye}_character": Claim(low=0.99) for eye in NETS},
    "validity_auroc": Claim(low=0.99),
    "eyes_agree": Claim(low=0.97),
}


def lowest(figures: dict[str, Figure]) -> Figure:
    """The least of several figures."""
    return min(figures.values(), key=lambda figure: figure.value)


def measure_eyes(n: int) -> tuple[dict[str, Figure], list[dict]]:
    """What each eye reads of true scenes and of rebuilt ones: the worst attribute's share; and the first eye's validity score."""
    vae, kept = host_lab.load_vae(), {}

    def rebuild(pictures):
        told = hashlib.sha256(pictures.numpy().tobytes()).digest()  # the second eye is shown the same ones
        if told not in kept:
            kept[told] = vae.decode(vae.encode(pictures.movedim(1, -1))).movedim(-1, 1).cpu()
        return kept[told]

    figures, arms = {}, []
    for name in NETS:
        eye = Eye.load(name)
        for shown, told in judge.judge(eye, rebuild, n=n).items():
            shares = {attribute: share(right) for attribute, right in told.items()}
            figures[f"{name}_{shown}"] = lowest(shares)
            if shown == "true":
                figures[f"{name}_character"] = shares["character"]
            arms.append({"eye": name, "shown": shown} | {key: [round(figure.value, 4), figure.n] for key, figure in shares.items()})
        good, spoilt = judge.validity(eye, rebuild, n=n // 2)
        areas = {kind: _auroc(good, bad) for kind, bad in spoilt.items()}
        figures[{"eye": "validity_auroc"}.get(name, f"{name}_validity_auroc")] = lowest(areas)
        arms.append({"eye": name, "auroc": {kind: round(area.value, 4) for kind, area in areas.items()}})
        log.info("%s: %s", name, arms[-3:])
    return figures, arms


def _auroc(good: torch.Tensor, bad: torch.Tensor, resamples: int = 200) -> Figure:
    """Area under the curve with a bootstrap interval over pictures."""
    generator = torch.Generator().manual_seed(0)
    areas = []
    for _ in range(resamples):
        rows = [values[torch.randint(len(values), (len(values),), generator=generator)] for values in (good, bad)]
        areas.append(judge.auroc(*rows))
    low, high = torch.quantile(torch.tensor(areas), torch.tensor([0.025, 0.975])).tolist()
    return Figure(judge.auroc(good, bad), low, high, len(good) + len(bad))


def measure_model(name: str, eyes: dict[str, Eye], n: int, counts: Sequence[int]) -> tuple[dict[str, Figure], list[dict]]:
    """Figures and rows of one model for so many objects a picture; with one, also in how many pictures the two eyes say the same."""
    model = host_lab.load(name)
    figures, arms = {}, []
    for objects in counts:
        n = n if objects < 4 else min(n, MANY)
        asked = ask(n, objects=objects, size=SIZE, seed=SEED + objects)
        pictures = draw(model, list(asked), size=SIZE, seed=SEED, **BEST[name])
        seen = eyes["eye"].read(pictures)
        right, told = hits(asked, seen), faults(asked, seen)
        row = {key: share(values) for key, values in right.items()}
        arm = {"model": name, "objects": objects, "n": n} | {key: round(figure.value, 4) for key, figure in row.items()}
        if objects == 1:
            figures |= {f"{name}_{theirs}1": row[ours] for theirs, ours in ONE.items()}
            other = hits(asked, eyes["eye2"].read(pictures))
            arm["same"] = {key: sum(a == b for a, b in zip(right[key], other[key], strict=True)) for key in ONE.values()}
        else:
            figures[f"{name}_bind{objects}"] = row["bind"]
        arms.append(arm | {"faults": {fault: round(sum(told[fault]) / n, 4) for fault in FAULTS}})
        log.info("%s", arms[-1])
    return figures, arms


def agreement(rows: list[dict]) -> dict[str, Figure]:
    """In what share of all models' one-object pictures the two eyes say the same, for the attribute in which that is rarest."""
    told = [row for row in rows if "same" in row]
    if len(told) < len(host_lab.MODELS):
        return {}
    total = sum(row["n"] for row in told)
    same = {key: sum(row["same"][key] for row in told) for key in ONE.values()}
    return {"eyes_agree": lowest({key: share([True] * alike + [False] * (total - alike)) for key, alike in same.items()})}


def measure_wordings(name: str, eye: Eye, n: int) -> tuple[dict[str, Figure], list[dict]]:
    """How often an attribute said in each way is drawn, as a share of how often it is when said plainly (same scenes, same noise)."""
    model = host_lab.load(name)
    judged = {"shape": "shapes", "colour": "colours", "style": "style"}
    arms, drawn = [], {}
    for way in WAYS:
        drawn[way] = []
        for attribute, asked in ask_in(way, n, size=WORDING_SIZE, seed=SEED):
            pictures = draw(model, list(asked), size=WORDING_SIZE, seed=SEED, **BEST[name])
            right = hits(asked, eye.read(pictures))[judged[attribute]]
            drawn[way] += right
            arms.append({"model": name, "way": way, "attribute": attribute, "share": round(sum(right) / len(right), 4), "n": len(right)})
            log.info("%s", arms[-1])
    return {f"{name}_{way}": _report.ratio(drawn[way], drawn["plain"]) for way in WAYS[1:]}, arms


def _measure(sample: bool, parts: Sequence[str]) -> tuple[dict[str, Figure], list[dict]]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    n = SAMPLE if sample else N
    eyes = {name: Eye.load(name) for name in NETS}
    figures: dict[str, Figure] = {}
    rows: list[dict] = []
    with torch.inference_mode():
        for part in parts:
            name, _, what = part.partition("-")
            if part == "eyes":
                found, own = measure_eyes(EYES // 3 if sample else EYES)
            elif sample and what not in ("1", "2"):
                continue
            elif what == WORDINGS:
                found, own = measure_wordings(name, eyes["eye"], WORDED)
            else:
                found, own = measure_model(name, eyes, n, COUNTS[what])
            figures, rows = figures | found, rows + own
    return figures | agreement(rows), rows


def main(argv: list[str]) -> int:
    return _report.run_parts("lab", argv, PARTS, _measure, CLAIMS, joint=agreement)
