"""The lab's sparse autoencoders, and the latents and directions of its concepts: `python run.py lab features [train|find] [--model NAME]`.

Each is what this pack's own nodes make of a workflow: Train Sparse Autoencoder on captions of the lab's world, Find Latents and Find
Direction on captions that differ in the concept. The text encoder is that of both models. Files lie where the host lists them under
`concept_lab/`, the autoencoders in half precision.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..host import lab as host_lab
from ..host import sae_files
from .captions import IMAGE_TRAINING, Writer, write_captions
from .concepts import CONCEPTS, prompts
from .scenes import sample_scenes
from .sliders import outputs_of, scratch_folders

FOLDER = "concept_lab"
TEXT = "text"
KINDS = (TEXT, *host_lab.MODELS)
LATENTS, DENSE = "latents", "dense"
WAYS = (LATENTS, DENSE)
TRAIN_SEED, FIND_SEED = 77, 100
log = logging.getLogger("concept_nodes.lab")


class Recipe(NamedTuple):
    """How an autoencoder is trained and its concepts are found. captions: how many it is trained on; asked: prompts with a concept and as
    many without; train, find, dense: inputs of the three nodes.
    """

    captions: int
    asked: int
    train: dict
    find: dict
    dense: dict


PICTURES = {"width": 64, "height": 64, "cfg": 4.0, "levels": 4}
RECIPES = {
    TEXT: Recipe(600, 24, {"expansion": 2, "k": 16, "steps": 1500, "batch": 512}, {"top": 8}, {}),
    "unet": Recipe(256, 12, {"expansion": 4, "k": 16, "steps": 2000, "batch": 512} | PICTURES, {"top": 8}, {}),
    "dit": Recipe(256, 12, {"expansion": 4, "k": 16, "steps": 2000, "batch": 512} | PICTURES, {"top": 8}, {}),
}


def sae_name(kind: str) -> str:
    """An autoencoder's file as the host lists it."""
    return f"{FOLDER}/{kind}.safetensors"


def features_name(kind: str, concept: str, way: str) -> str:
    """A concept's file as the host lists it."""
    return f"{FOLDER}/{kind}/{concept}{'' if way == LATENTS else '_dense'}.safetensors"


def sae_path(kind: str) -> Path:
    return host_lab.SAES / sae_name(kind)


def features_path(kind: str, concept: str, way: str) -> Path:
    return host_lab.FEATURES / features_name(kind, concept, way)


def captions(n: int) -> list[str]:
    """What autoencoders are trained on: n captions of the lab's world, as the image models' training had them."""
    scenes = sample_scenes(n, counts={1: 0.6, 2: 0.4}, generator=torch.Generator().manual_seed(TRAIN_SEED))
    return write_captions(scenes, Writer(IMAGE_TRAINING, random.Random(TRAIN_SEED)))[0]


def model_of(kind: str) -> str:
    """The lab model whose CLIP and MODEL a kind's workflows take."""
    return host_lab.MODELS[0] if kind == TEXT else kind


def training(kind: str) -> dict:
    """The workflow that trains, node by node, as a queue takes it."""
    recipe = RECIPES[kind]
    inputs = {
        "clip": ["1", 1], "prompts": "\n".join(captions(recipe.captions)), "where": "text encoder" if kind == TEXT else "model",
        "site": "auto", "kind": "topk", "seed": 0, "name": kind,
    }  # fmt: skip
    inputs |= recipe.train | ({} if kind == TEXT else {"model": ["1", 0]})
    return {"1": _node("LabLoader", {"model": model_of(kind)}), "2": _node("SAETrain", inputs)}


def finding(kind: str, concepts: Sequence[str]) -> dict[str, dict]:
    """The workflow that finds; nodes of a concept are called by it and the way, "red latents"."""
    recipe = RECIPES[kind]
    graph = {"1": _node("LabLoader", {"model": model_of(kind)}), "2": _node("SAELoader", {"file": sae_name(kind)})}
    where = {} if kind == TEXT else {"model": ["1", 0], **PICTURES}
    for concept in concepts:
        with_it, without = ("\n".join(side) for side in prompts(concept, recipe.asked, FIND_SEED))
        both = {"clip": ["1", 1], "positive": with_it, "negative": without, "file_name": "", **where}
        latents = {"sae": ["2", 0], "score": "share difference", **both, **recipe.find}
        dense = {"where": "text encoder" if kind == TEXT else "model", "site": "auto", **both, **recipe.dense}
        graph[f"{concept} {LATENTS}"], graph[f"{concept} {DENSE}"] = _node("SAEFind", latents), _node("DirectionFind", dense)
    return graph


def _node(name: str, inputs: dict) -> dict:
    return {"class_type": f"ConceptNodes_{name}", "inputs": inputs}


@contextlib.contextmanager
def trained_into(folder: Path) -> Iterator[None]:
    """Autoencoders that are trained go to a folder, and not to the host's."""
    import folder_paths

    sae_files.show_folder()
    kept = folder_paths.folder_names_and_paths[sae_files.FOLDER]
    folder_paths.folder_names_and_paths[sae_files.FOLDER] = ([str(folder), *kept[0]], kept[1])
    try:
        yield
    finally:
        folder_paths.folder_names_and_paths[sae_files.FOLDER] = kept


def train(kind: str, output: Path) -> None:
    """Train by the workflow and write the file, with the seconds that it took."""
    began = time.monotonic()
    with scratch_folders(), tempfile.TemporaryDirectory() as scratch, trained_into(Path(scratch)):
        file, _, _, report = outputs_of(training(kind))("2")
    seconds = time.monotonic() - began
    log.info("%s\n%s", kind, report)
    config = {key: value for key, value in file.config.items() if key != "identity"} | {"seconds": round(seconds, 1)}
    output.parent.mkdir(parents=True, exist_ok=True)
    sae_files.write(output, file._replace(sae=file.sae.to(dtype=torch.float16), config=config))


def find(kind: str, concepts: Sequence[str], output: Path) -> None:
    """Find by the workflow and write the files below a folder."""
    from ..host import features

    host_lab.show_files()
    outputs = outputs_of(finding(kind, concepts))
    for concept in concepts:
        for way in WAYS:
            found, report = outputs(f"{concept} {way}")
            log.info("%s %s, %s\n%s", kind, concept, way, report)
            features.write(found._replace(name=f"{concept} ({way})"), output / features_name(kind, concept, way))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py lab features", description="Train the lab's autoencoders and find its concepts in them.")
    parser.add_argument("what", choices=("train", "find", "all"))
    parser.add_argument("--model", choices=KINDS, action="append", help=f"default: {', '.join(KINDS)}")
    parser.add_argument("--concept", choices=CONCEPTS, action="append", help="find: default: all")
    parser.add_argument("--output", type=Path, default=host_lab.FEATURES, help="find: folder to write to (default: the shipped files)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for kind in options.model or KINDS:
        if options.what in ("train", "all"):
            train(kind, sae_path(kind))
        if options.what in ("find", "all"):
            find(kind, options.concept or tuple(CONCEPTS), options.output)
    return 0
