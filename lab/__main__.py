"""The lab's command line: `python run.py lab STAGE ...`. Stages in order: pools, vae, text, eye, unet, dit; then slider NAME, and measure.

A stage reads what earlier ones left in its folder and writes there; the weights that ship are replaced only by copying them over.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..host.lab import WEIGHTS

RUNS = Path(__file__).resolve().parent / "runs"
STAGES = ("pools", "vae", "text", "eye", "unet", "dit", "measure")


def main(argv: list[str]) -> int:
    if argv[:1] == ["slider"]:
        from .train_slider import main as slider

        return slider(argv[1:])
    parser = argparse.ArgumentParser(prog="run.py lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "slider"), help="what to do; `slider --help` has options of its own")
    parser.add_argument(
        "--folder", type=Path, help="where pools, states and weights are kept (default: lab/runs; measure: the shipped weights)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=60, help="length of this leg; run again to go on")
    parser.add_argument("--finish", action="store_true", help="anneal to the end of this leg's minutes")
    parser.add_argument("--batch", type=int, default=64, help="pictures of 64 px a step; larger canvases take fewer")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--total", type=int, default=200_000, help="scenes in the pools")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(argv)
    options.folder = options.folder or (WEIGHTS if options.stage == "measure" else RUNS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.stage == "pools":
        from .pools import make_pools

        make_pools(options.total, options.folder, workers=options.workers)
        return 0
    if options.stage == "measure":
        from .measure import main as measure

        return measure(options.folder, RUNS)
    settings = {key: getattr(options, key) for key in ("device", "steps", "minutes", "finish", "batch")}
    if options.lr:
        settings["lr"] = options.lr
    if options.stage == "vae":
        from .train_vae import train
    elif options.stage == "text":
        from .train_text import train
    elif options.stage == "eye":
        from .train_eye import train
    else:
        from .train_denoiser import train as denoiser

        denoiser(options.stage, options.folder, **settings)
        return 0
    train(options.folder, **settings)
    return 0
