"""The lab's command line: `python run.py lab STAGE ...`. Stages in order: pools, vae, text, eye, eye2, unet, dit, unet_edges;
then slider NAME, character NAME, features, measure, and export. `decoder` goes on with the autoencoder's decoder alone, which leaves
latents as they are.

A stage reads what earlier ones left in its folder and writes there; the weights that ship are replaced only by copying them over.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from ..host.lab import MODELS, WEIGHTS
from .eye import NETS

RUNS = Path(__file__).resolve().parent / "runs"
TRAININGS = ("vae", "decoder", "text", *NETS, *MODELS, "unet_edges")
READS_SHIPPED = ("measure", "export")


def main(argv: list[str]) -> int:
    if argv[:1] == ["slider"]:
        from .sliders import main as slider

        return slider(argv[1:])
    if argv[:1] == ["character"]:
        from .train_character import main as character

        return character(argv[1:])
    if argv[:1] == ["features"]:
        from .features import main as features

        return features(argv[1:])
    parser = argparse.ArgumentParser(prog="run.py lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("pools", *TRAININGS, "slider", "character", "features", *READS_SHIPPED)
    parser.add_argument("stage", choices=stages, help="what to do; slider, character, features have options of their own")
    parser.add_argument(
        "--folder", type=Path, help="where pools, states and weights are kept (default: lab/runs; measure and export: the shipped weights)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=60, help="length of this leg; run again to go on")
    parser.add_argument("--finish", action="store_true", help="anneal to the end of this leg's minutes")
    parser.add_argument("--batch", type=int, default=64, help="pictures of 64 px a step; larger canvases take fewer")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--average", type=float, help="share of the averaged weights kept at each step (denoisers; shorter legs want less)")
    parser.add_argument("--start", type=Path, help="folder of earlier weights to begin from, wherever names and shapes fit")
    parser.add_argument("--total", type=int, default=200_000, help="scenes in the pools")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RUNS, help="where measure puts its sheets and export its folders")
    options = parser.parse_args(argv)
    folder = options.folder or (WEIGHTS if options.stage in READS_SHIPPED else RUNS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.stage == "pools":
        from .pools import make_pools

        make_pools(options.total, folder, workers=options.workers)
    elif options.stage == "measure":
        from .measure import main as measure

        return measure(folder, options.output)
    elif options.stage == "export":
        from .export import export

        export(options.output / "diffusers", folder)
    else:
        settings = {key: getattr(options, key) for key in ("device", "steps", "minutes", "finish", "batch")}
        settings |= {key: getattr(options, key) for key in ("lr", "start", "seed", "average") if getattr(options, key)}
        if options.start and options.stage in ("decoder", "text", "unet_edges"):
            parser.error(f"--start is not for {options.stage}: it begins from the other weights in --folder anyway.")
        _training(options.stage)(folder, **settings)
    return 0


def _training(stage: str):
    if stage == "vae":
        from .train_vae import train
    elif stage == "decoder":
        from .train_vae import train as of_vae

        train = partial(of_vae, decoder_only=True)
    elif stage == "text":
        from .train_text import train
    elif stage in NETS:
        from .train_eye import train as of_eye

        train = partial(of_eye, stage)
    elif stage in MODELS:
        from .train_denoiser import train as of_denoiser

        train = partial(of_denoiser, stage)
    else:
        from .train_control import train
    return train
