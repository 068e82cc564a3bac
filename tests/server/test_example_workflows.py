"""The shipped workflows: the form for the browser and the form for /prompt are one graph, made of nodes that exist."""

import json

import pytest

from graphs import WORKFLOWS, example

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
# Notes live in the browser only.
BROWSER_ONLY = {"Note", "MarkdownNote"}
NARROWEST = 225  # pixels: Nodes 2.0 widens a narrower node, and it grows over its neighbour
WIDEST = 1800  # pixels: a wider graph opens so small on a laptop's screen that the classic canvas leaves out all text
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def saved(name: str) -> dict:
    """The workflow as the browser saved it."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def widget_names(info: dict) -> list[str]:
    """The widgets of a node in the order of `widgets_values`; a seed is followed by its control widget."""
    names = []
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            socket = bool(options) and options[0].get("forceInput")
            if isinstance(kind, list) or (kind in WIDGET_TYPES and not socket):
                names.append(name)
                if options and options[0].get("control_after_generate"):
                    names.append(f"{name}.control")
    return names


def to_api(workflow: dict, object_info: dict) -> dict:
    """The graph that the browser would queue: {id: {class_type, inputs}}."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in BROWSER_ONLY:
            continue
        values = dict(zip(widget_names(object_info[node["type"]]), node.get("widgets_values", []), strict=True))
        inputs = {name: value for name, value in values.items() if not name.endswith(".control")}
        inputs |= {slot["name"]: links[slot["link"]] for slot in node.get("inputs", []) if slot.get("link") is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def test_there_are_examples():
    assert "slider" in NAMES


@pytest.mark.parametrize("name", NAMES)
class TestExample:
    def test_uses_only_nodes_that_the_host_has(self, client, name):
        types = {node["type"] for node in saved(name)["nodes"]} - BROWSER_ONLY
        assert types <= set(client.object_info())

    def test_both_forms_are_the_same_graph(self, client, name):
        api = {node_id: {"class_type": node["class_type"], "inputs": node["inputs"]} for node_id, node in example(name).items()}
        assert to_api(saved(name), client.object_info()) == api

    def test_runs(self, client, name):
        run = client.run(example(name))
        assert run.end == "execution_success", run.error
        assert client.pictures(run)

    def test_a_note_tells_a_newcomer_what_to_do(self, name):
        notes = [node for node in saved(name)["nodes"] if node["type"] in BROWSER_ONLY]
        assert any(len(note["widgets_values"][0]) > 80 for note in notes)

    def test_no_node_lies_on_another(self, name):
        boxes = [(*node["pos"], *node["size"]) for node in saved(name)["nodes"]]
        for i, (x, y, width, height) in enumerate(boxes):
            assert width >= NARROWEST
            for other_x, other_y, other_width, other_height in boxes[:i]:
                apart = x >= other_x + other_width or other_x >= x + width or y >= other_y + other_height or other_y >= y + height
                assert apart, f"a node at {(x, y)} lies on one at {(other_x, other_y)}"

    def test_it_can_be_read_on_a_laptop_without_zooming(self, name):
        nodes = saved(name)["nodes"]
        assert max(node["pos"][0] + node["size"][0] for node in nodes) - min(node["pos"][0] for node in nodes) <= WIDEST
