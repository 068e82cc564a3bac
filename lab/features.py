"""The lab's sparse autoencoders, and the latents and directions of concepts: `python run.py lab features train|find|all [--model NAME]`.

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

from ..host import features, sae_files
from ..host import lab as host_lab
from ..host.directions import ROWS, WORDS
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
POOLED = {"style": ROWS}  # of texts: styles are carried by the rows behind the words as well
log = logging.getLogger("concept_nodes.lab")


class Recipe(NamedTuple):
    """How autoencoders are trained and concepts found in them. sites: one autoencoder each, the first the most telling; captions: how many
    they are trained on; asked: prompts with a concept and as many without; train, find: inputs of the nodes.
    """

    sites: tuple[str, ...]
    captions: int
    asked: int
    train: dict
    find: dict


PICTURES = {"width": 64, "height": 64, "cfg": 4.0}
EVERY_STEP = {"sampling_steps": 12, "levels": 12}
RECIPES = {
    TEXT: Recipe(("clip_l.3",), 600, 24, {"expansion": 4, "k": 16, "steps": 1500, "batch": 512}, {"top": 8}),
    "unet": Recipe(
        ("output_blocks.4.1.transformer_blocks.0.attn2",), 256, 8,
        {"expansion": 4, "k": 32, "steps": 1000, "batch": 512} | PICTURES | EVERY_STEP, {"top": 8, "levels": 4} | PICTURES,
    ),
    "dit": Recipe(
        ("single_blocks.1",), 256, 6,
        {"expansion": 4, "k": 32, "steps": 600, "batch": 256} | PICTURES | EVERY_STEP, {"top": 8, "levels": 4} | PICTURES,
    ),
}  # fmt: skip


def sae_name(kind: str, at: int = 0) -> str:
    """An autoencoder's file as the host lists it; `at`: the number of its site."""
    return f"{FOLDER}/{kind}{f'_{at + 1}' if at else ''}.safetensors"


def features_name(kind: str, concept: str, way: str) -> str:
    """A concept's file as the host lists it."""
    return f"{FOLDER}/{kind}/{concept}{'' if way == LATENTS else '_dense'}.safetensors"


def sae_path(kind: str, at: int = 0) -> Path:
    return host_lab.SAES / sae_name(kind, at)


def features_path(kind: str, concept: str, way: str) -> Path:
    return host_lab.FEATURES / features_name(kind, concept, way)


def captions(n: int) -> list[str]:
    """What autoencoders are trained on: n captions of the lab's world, as the image models' training had them."""
    scenes = sample_scenes(n, counts={1: 0.6, 2: 0.4}, generator=torch.Generator().manual_seed(TRAIN_SEED))
    return write_captions(scenes, Writer(IMAGE_TRAINING, random.Random(TRAIN_SEED)))[0]


def model_of(kind: str) -> str:
    """The lab model whose CLIP and MODEL a kind's workflows take."""
    return host_lab.MODELS[0] if kind == TEXT else kind


def training(kind: str, at: int = 0) -> dict:
    """The workflow that trains, node by node, as a queue takes it."""
    recipe = RECIPES[kind]
    inputs = {
        "clip": ["1", 1], "prompts": "\n".join(captions(recipe.captions)), "where": "text encoder" if kind == TEXT else "model",
        "site": recipe.sites[at], "kind": "topk", "seed": at, "name": kind,
    }  # fmt: skip
    inputs |= recipe.train | ({} if kind == TEXT else {"model": ["1", 0]})
    return {"1": _node("LabLoader", {"model": model_of(kind)}), "2": _node("SAETrain", inputs)}


def finding(kind: str, concepts: Sequence[str]) -> dict[str, dict]:
    """The workflow that finds; nodes of a concept are called by it and the way, "red dense", or the number of the site, "red 0"."""
    recipe = RECIPES[kind]
    graph = {"1": _node("LabLoader", {"model": model_of(kind)})}
    for at in range(len(recipe.sites)):
        graph[f"sae {at}"] = _node("SAELoader", {"file": sae_name(kind, at)})
    for concept in concepts:
        where = {"pooling": POOLED.get(CONCEPTS[concept], WORDS)} if kind == TEXT else {"model": ["1", 0]}
        with_it, without = ("\n".join(side) for side in prompts(concept, recipe.asked, FIND_SEED))
        both = {"clip": ["1", 1], "positive": with_it, "negative": without, "file_name": "", **where}
        for at in range(len(recipe.sites)):
            graph[f"{concept} {at}"] = _node("SAEFind", {"sae": [f"sae {at}", 0], "score": "share difference", **both, **recipe.find})
        dense = both | {key: value for key, value in recipe.find.items() if key != "top"}
        graph[f"{concept} {DENSE}"] = _node(
            "DirectionFind", {"where": "text encoder" if kind == TEXT else "model", "site": "auto", **dense}
        )
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
        folder_paths.filename_list_cache.pop(sae_files.FOLDER, None)  # it knows of the folder that goes away


def train(kind: str, at: int, output: Path) -> None:
    """Train by the workflow and write the file, with the seconds that it took a processor: of one core, whatever else the machine did."""
    began = time.process_time()
    with scratch_folders(), tempfile.TemporaryDirectory() as scratch, trained_into(Path(scratch)):
        file, _, _, report = outputs_of(training(kind, at))("2")
    seconds = time.process_time() - began
    log.info("%s\n%s", kind, report)
    config = {key: value for key, value in file.config.items() if key != "identity"} | {"seconds": round(seconds, 1)}
    output.parent.mkdir(parents=True, exist_ok=True)
    sae_files.write(output, file._replace(sae=file.sae.to(dtype=torch.float16), config=config))


def find(kind: str, concepts: Sequence[str], output: Path) -> None:
    """Find by the workflow and write the files below a folder: latents of several sites in one, as directions of several layers are."""
    host_lab.show_files()
    outputs = outputs_of(finding(kind, concepts))
    for concept in concepts:
        for way in WAYS:
            nodes = [f"{concept} {DENSE}"] if way == DENSE else [f"{concept} {at}" for at in range(len(RECIPES[kind].sites))]
            found, reports = zip(*map(outputs, nodes), strict=True)
            log.info("%s %s, %s\n%s", kind, concept, way, "\n".join(reports))
            whole = found[0]._replace(name=f"{concept} ({way})", more=found[0].more + found[1:])
            features.write(whole, output / features_name(kind, concept, way))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py lab features", description="Train the lab's autoencoders and find its concepts in them.")
    parser.add_argument("what", choices=("train", "find", "all"))
    parser.add_argument("--model", choices=KINDS, action="append", help=f"default: {', '.join(KINDS)}")
    parser.add_argument("--concept", choices=CONCEPTS, action="append", help="find: default: all")
    parser.add_argument("--output", type=Path, default=host_lab.FEATURES, help="find: folder to write to (default: the shipped files)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for kind in options.model or KINDS:
        for at in range(len(RECIPES[kind].sites)) if options.what in ("train", "all") else ():
            train(kind, at, sae_path(kind, at))
        if options.what in ("find", "all"):
            find(kind, options.concept or tuple(CONCEPTS), options.output)
    return 0
