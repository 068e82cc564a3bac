"""The lab's sliders, trained by the pack's own nodes: `python run.py lab slider NAME|all`.

Each is a workflow in lab/workflows, in the form that a queue takes, which can be dragged into the browser as well. Here its nodes are run
without a server, and the file is put where the lab's sliders lie, in half precision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..host import lab as host_lab

WORKFLOWS = Path(__file__).resolve().parent / "workflows"
FOLDER = "concept_lab/sliders"
NAMES = ("size", "hue", "fill", "background", "neon")
TRAINERS = ("ConceptNodes_SliderTrainText", "ConceptNodes_SliderTrainImages")
log = logging.getLogger("concept_nodes.lab")


def shipped(model: str) -> list[str]:
    """Names of the sliders that ship for a lab model."""
    return [name for name in NAMES if (host_lab.LORAS / FOLDER / model / f"{name}.safetensors").exists()]


def file_of(model: str, name: str) -> str:
    """As the host lists it among its LoRA files."""
    return f"{FOLDER}/{model}/{name}.safetensors"


def workflow(model: str, name: str) -> dict:
    """Node by node, as a queue takes it."""
    return json.loads((WORKFLOWS / f"{model}_{name}.json").read_text(encoding="utf-8"))


def settings(graph: dict) -> dict:
    """What the training node of a workflow is set to."""
    return next(node["inputs"] for node in graph.values() if node["class_type"] in TRAINERS)


def execute(graph: dict, name: str):
    """The outputs of a workflow's node, by running it and all that it hangs on. Only this pack's nodes."""
    return outputs_of(graph)(next(number for number, node in graph.items() if node["class_type"] == name))


def outputs_of(graph: dict) -> Callable[[str], tuple]:
    """What gives the outputs of a workflow's node by its number, each node run once. Only this pack's nodes."""
    from ..nodes import NODES

    classes = {node.define_schema().node_id: node for node in NODES}
    made = {}

    def outputs(number: str) -> tuple:
        if number not in made:
            node = classes[graph[number]["class_type"]]
            listed = node.define_schema().is_input_list
            given = {}
            for key, value in graph[number]["inputs"].items():
                value = outputs(value[0])[value[1]] if isinstance(value, list) else value
                given[key] = [value] if listed else value
            with torch.inference_mode():
                made[number] = node.execute(**given).result
        return made[number]

    return outputs


@contextlib.contextmanager
def scratch_folders() -> Iterator[None]:
    """The host writes its outputs and its user's things to a folder that goes away."""
    import folder_paths

    before = folder_paths.get_output_directory(), folder_paths.get_user_directory()
    with tempfile.TemporaryDirectory() as scratch:
        folder_paths.set_output_directory(scratch)
        folder_paths.set_user_directory(scratch)
        try:
            yield
        finally:
            folder_paths.set_output_directory(before[0])
            folder_paths.set_user_directory(before[1])


def train(model: str, name: str, output: Path) -> None:
    """Train by the workflow and write the file."""
    graph, began = workflow(model, name), time.monotonic()
    with scratch_folders():
        trainer = next(node["class_type"] for node in graph.values() if node["class_type"] in TRAINERS)
        _, _, file, report = execute(graph, trainer)
        log.info("%s %s, %.0f s\n%s", model, name, time.monotonic() - began, report)
        with safe_open(file, framework="pt") as made:
            half = {key: made.get_tensor(key).half() for key in made.keys()}  # noqa: SIM118 (safe_open is no mapping)
            told = made.metadata()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, output, metadata=told)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py lab slider", description="Train the lab's sliders by their workflows.")
    parser.add_argument("name", choices=(*NAMES, "all"))
    parser.add_argument("--model", choices=host_lab.MODELS, action="append", help="default: both")
    parser.add_argument("--output", type=Path, default=host_lab.LORAS / FOLDER, help="folder to write to (default: the shipped files)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for model in options.model or host_lab.MODELS:
        for name in NAMES if options.name == "all" else [options.name]:
            train(model, name, options.output / model / f"{name}.safetensors")
    return 0
