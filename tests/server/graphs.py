"""Graphs in API form: the shipped ones, small edits of them, and new ones on a lab model."""

import copy
import json
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
RED = "a large red circle in the centre on a white background"


def example(name: str) -> dict[str, dict[str, Any]]:
    """The shipped example `name` in API form."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def find(graph: dict[str, dict[str, Any]], class_type: str) -> str:
    """The id of the only node of a class."""
    ids = [node_id for node_id, node in graph.items() if node["class_type"] == class_type]
    if len(ids) != 1:
        raise KeyError(f"the graph has {len(ids)} nodes of class {class_type}, expected one")
    return ids[0]


def changed(graph: dict[str, dict[str, Any]], class_type: str, **inputs: Any) -> dict[str, dict[str, Any]]:
    """A copy with other inputs on the only node of a class."""
    graph = copy.deepcopy(graph)
    graph[find(graph, class_type)]["inputs"].update(inputs)
    return graph


def without(graph: dict[str, dict[str, Any]], class_type: str, passes: str) -> dict[str, dict[str, Any]]:
    """A copy without the only node of a class; what read its first output reads what its input `passes` read."""
    graph = copy.deepcopy(graph)
    node_id = find(graph, class_type)
    source = graph.pop(node_id)["inputs"][passes]
    for node in graph.values():
        node["inputs"] = {name: source if value == [node_id, 0] else value for name, value in node["inputs"].items()}
    return graph


class Graph(dict):
    """A graph in API form that names its nodes itself: `add` returns the first output, `[id, 1]` is the next."""

    def add(self, class_type: str, **inputs) -> list:
        node_id = str(len(self) + 1)
        self[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, 0]


class Lab(Graph):
    """A graph that has loaded a lab model, with what every picture needs."""

    def __init__(self, model: str):
        super().__init__()
        self.model = self.add("ConceptNodes_LabLoader", model=model)
        self.clip, self.vae = [self.model[0], 1], [self.model[0], 2]
        self.empty = self.text("")

    def text(self, text: str) -> list:
        return self.add("CLIPTextEncode", clip=self.clip, text=text)

    def latent(self, width=64, height=64, batch_size=1) -> list:
        return self.add("EmptyLatentImage", width=width, height=height, batch_size=batch_size)

    def sample(self, text=RED, *, latent=None, model=None, positive=None, negative=None, seed=5, denoise=1.0, cfg=4.0) -> list:
        return self.add(
            "KSampler",
            model=model or self.model,
            positive=positive or self.text(text),
            negative=negative or self.empty,
            latent_image=latent or self.latent(),
            seed=seed,
            steps=20,
            cfg=cfg,
            sampler_name="euler",
            scheduler="normal",
            denoise=denoise,
        )

    def save(self, latent: list) -> "Lab":
        self.add("SaveImage", images=self.add("VAEDecode", samples=latent, vae=self.vae), filename_prefix="stock")
        return self
