"""What every benchmark shares: intervals, the machine's description, and results that can be checked later."""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch

RESULTS = Path(__file__).resolve().parent / "results"


class Figure(NamedTuple):
    """A measured mean with its 95 % interval over n independent cases."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"


class Claim(NamedTuple):
    """What a figure must be: its value at least `low` and at most `high`."""

    low: float = -math.inf
    high: float = math.inf

    def met(self, figure: Figure) -> bool:
        return self.low <= figure.value <= self.high


def mean(values: Sequence[float] | torch.Tensor, *, resamples: int = 2000) -> Figure:
    """The mean with a bootstrap interval (2.5 % to 97.5 %), from a fixed random stream."""
    data = torch.as_tensor(values, dtype=torch.float64)
    draws = torch.randint(len(data), (resamples, len(data)), generator=torch.Generator().manual_seed(0))
    means = data[draws].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(data.mean()), low, high, len(data))


def share(hits: Sequence[bool] | torch.Tensor) -> Figure:
    """The share of cases that hold, with Wilson's interval, which keeps a width where all of them or none do."""
    n = len(hits)
    p, z = float(torch.as_tensor(hits, dtype=torch.float64).mean()), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Figure(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)), n)


def ratio(hits: Sequence[bool], base: Sequence[bool], *, resamples: int = 2000) -> Figure:
    """A share of cases over that of the same cases under another treatment, with a bootstrap interval over the pairs."""
    pairs = torch.tensor([hits, base], dtype=torch.float64)
    draws = torch.randint(pairs.shape[1], (resamples, pairs.shape[1]), generator=torch.Generator().manual_seed(0))
    ratios = pairs[0][draws].mean(1) / pairs[1][draws].mean(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(pairs[0].mean() / pairs[1].mean()), low, high, pairs.shape[1])


def machine() -> str:
    """The machine in words: processor, cores, GPU if one is used, torch."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} threads{gpu}, torch {torch.__version__}, {platform.system()}"


def commit() -> str:
    """The commit that was measured, marked where files differ from it."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(name: str, seconds: float, figures: dict[str, Figure], arms: list[dict], more: dict | None = None) -> Path:
    """Write results/NAME.json and print the figures. more: what else is to be told, or told otherwise."""
    result = {
        "name": name,
        "machine": machine(),
        "commit": commit(),
        "seconds": round(seconds, 1),
        "figures": {key: {k: round(v, 6) for k, v in figure._asdict().items()} for key, figure in figures.items()},
        "arms": arms,
    } | (more or {})
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for key, figure in figures.items():
        print(f"{key:>32}  {figure}")
    print(f"Wrote {path}")
    return path


def check(name: str, measured: dict[str, Figure]) -> int:
    """Compare a smaller re-run with the committed result: a committed value outside the new interval fails.

    The new interval is the wider of two: the re-run's own, and the committed one for as few cases as the re-run has. A few cases that are
    all alike (rank correlations of 1) know nothing of the rare one that is not. The intervals are widened, as if they were normal, until
    all of them together hold true figures 95 times in 100.
    """
    committed = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["figures"]
    wider = NormalDist().inv_cdf(1 - 0.025 / len(measured)) / NormalDist().inv_cdf(0.975)
    failed = 0
    for key, figure in measured.items():
        before = Figure(**committed[key])
        fewer = math.sqrt(before.n / figure.n)
        low = figure.value - wider * max(figure.value - figure.low, fewer * (before.high - before.value))
        high = figure.value + wider * max(figure.high - figure.value, fewer * (before.value - before.low))
        value, inside = before.value, low <= before.value <= high
        failed += not inside
        print(f"{key:>32}  committed {value:.4g}, now {figure}: {'holds' if inside else 'DOES NOT HOLD'}")
    return 1 if failed else 0


def judge(figures: dict[str, Figure], claims: dict[str, Claim]) -> int:
    """Print which claims the figures meet; 1 if any is not met."""
    missed = [key for key, claim in claims.items() if key not in figures or not claim.met(figures[key])]
    told = "".join(f"\nNOT MET: {key} {figures.get(key, 'not measured')}" for key in missed)
    print(f"{len(claims) - len(missed)} of {len(claims)} claims met.{told}")
    return 1 if missed else 0


def run(
    name: str, argv: list[str], measure: Callable[[bool], tuple[dict[str, Figure], list[dict]]], claims: dict[str, Claim] | None = None
) -> int:
    """A benchmark's command line: measure in full, write, and judge the claims; or with --check measure a sample and compare."""
    parser = argparse.ArgumentParser(prog=f"run.py bench {name}")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    began = time.monotonic()
    figures, arms = measure(options.check)
    if options.check:
        return check(name, figures)
    write(name, time.monotonic() - began, figures, arms)
    return judge(figures, claims or {})


def run_parts(
    name: str,
    argv: list[str],
    parts: Sequence[str],
    measure: Callable[[bool, Sequence[str]], tuple[dict[str, Figure], list[dict]]],
    claims: dict[str, Claim],
    part_of: Callable[[dict], str] = itemgetter("part"),
    joint: Callable[[list[dict]], dict[str, Figure]] = lambda rows: {},
    place_of: Callable[[dict], Hashable] | None = None,
    about: Callable[[str], dict] | None = None,
) -> int:
    """The command line of a benchmark in parts: `--again` measures some of them anew and leaves the others' committed figures, `--check` a
    sample of those that are committed. Rows are marked with their part unless they say one themselves. part_of: the part that a row is
    of. joint: figures that are of several parts' rows. place_of: as for `merge`. about: what a part is measured of (a digest of files);
    committed parts of anything else are dropped, figures and rows.
    """
    parser = argparse.ArgumentParser(prog=f"run.py bench {name}")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--again", nargs="+", choices=parts, default=parts)
    options = parser.parse_args(argv)
    if options.check:
        known = [part for part in parts if part in (current(name, about) if about else committed(name)).get("parts", {})]
        figures = measure(True, known)[0] if known else {}
        if not figures:
            print(f"Nothing of bench {name} is committed that a sample could check.")
            return 1
        return check(name, figures)
    before, figures = commit(), {}
    for part in options.again:  # each is written when it is done: a run that is broken off keeps what it has
        began = time.monotonic()
        found, rows = measure(False, [part])
        told = {"commit": before, "seconds": round(time.monotonic() - began, 1)}
        if about:
            told |= about(part) | {"figures": list(found)}
        figures = merge(name, part, told, found, rows, part_of, joint, place_of, current(name, about) if about else None)
    return judge(figures, claims)


def committed(name: str) -> dict:
    """The results of a benchmark in parts; of none where there are none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}, "arms": [], "parts": {}}


def current(name: str, about: Callable[[str], dict]) -> dict:
    """As `committed`, without the parts that were measured of something else than there is now."""
    results = committed(name)
    parts = {part: run for part, run in results.get("parts", {}).items() if about(part).items() <= run.items()}
    known = {key for run in parts.values() for key in run["figures"]}
    return results | {
        "parts": parts,
        "figures": {key: figure for key, figure in results["figures"].items() if key in known},
        "arms": [row for row in results["arms"] if row.get("part") in parts],
    }


def merge(
    name: str,
    part: str,
    run: dict,
    figures: dict[str, Figure],
    rows: list[dict],
    part_of: Callable[[dict], str] = itemgetter("part"),
    joint: Callable[[list[dict]], dict[str, Figure]] = lambda rows: {},
    place_of: Callable[[dict], Hashable] | None = None,
    others: dict | None = None,
) -> dict[str, Figure]:
    """Put a part measured anew among the others' results (None: all that are committed); gives all figures. run: of which commit, in how
    many seconds. place_of: what tells a row from all others, where a part may be measured in some of its rows: each takes its old place and
    the others stay.
    """
    others, rows = others or committed(name), [{"part": part} | row for row in rows]
    # What it has no figure of any more, where it said which it had, is not kept.
    stale = set(others.get("parts", {}).get(part, {}).get("figures", ())) - figures.keys()
    if place_of is None:
        rows = [row for row in others["arms"] if part_of(row) != part] + rows
    else:
        rows = list({place_of(row): row for row in (*others["arms"], *rows)}.values())
    figures = {key: Figure(**figure) for key, figure in others["figures"].items() if key not in stale} | figures | joint(rows)
    parts = others["parts"] | {part: run}
    write(name, sum(one["seconds"] for one in parts.values()), figures, rows, {"commit": run["commit"], "parts": parts})
    return figures
