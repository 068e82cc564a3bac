"""Small edits of graphs in API form."""

import copy
import json
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"


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
