"""The canvas over /prompt, with no browser anywhere: the same JSON gives the same masks."""

import json
import re
import urllib.request

import numpy as np
import pytest

from concept_nodes.ops.regions import parse

from client import PromptRefused
from graphs import Graph, example, find
from pack import ROOT
from pictures import pixels

SHAPES = {
    "version": 1,
    "overlap": "priority",
    "regions": [
        {"name": "a", "shapes": [{"box": [500, 1000, 4000, 8000]}, {"stroke": [1000, 1000, 3000, 5000], "radius": 700, "erase": True}]},
        {"name": "b", "feather": 0.1, "shapes": [{"ellipse": [3000, 2000, 6000, 6000]}]},
        {"name": "c", "shapes": [{"polygon": [1000, 9500, 8000, 0, -2000, -4000, -3000, 3000]}], "weight": 0.5},
        {"name": "d", "rest": True},
    ],
}


def masks_over_http(client, text: str, width: int, height: int) -> np.ndarray:
    graph = Graph()
    canvas = graph.add("ConceptNodes_Canvas", canvas=text, width=width, height=height)
    graph.add("SaveImage", images=graph.add("MaskToImage", mask=[canvas[0], 1]), filename_prefix="masks")
    run = client.run(graph)
    assert run.end == "execution_success", run.error
    return np.stack([pixels(picture)[..., 0] for picture in client.pictures(run)])


@pytest.mark.parametrize("size", [(96, 64), (128, 200)])
def test_masks_are_those_of_the_document(client, size):
    text = json.dumps(SHAPES)
    width, height = size
    wanted = (parse(text).masks(height, width).numpy() * 255).clip(0, 255).astype(np.uint8)
    assert np.array_equal(masks_over_http(client, text, width, height), wanted)


def test_the_documented_script_queues_three_regions(client, host, monkeypatch):
    """The ten lines of docs/regions.md, as they stand there."""
    page = (ROOT / "docs" / "regions.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(script.strip().splitlines()) <= 12
    monkeypatch.chdir(ROOT)
    queued = []
    opened = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda request: queued.append(opened(request)) or queued[-1])
    exec(script.replace("http://127.0.0.1:8188", host.url), {"print": lambda *_: None})  # noqa: S102
    assert [answer.status for answer in queued] == [200]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"regions": [{"name": "a"}, {"name": "a"}]}', "both named 'a'"),
        (json.dumps({"regions": [{"name": str(i)} for i in range(65)]}), "at most 64"),
        ('{"regions": [{"shapes": [{"stroke": [0, 0], "radius": 1e999}]}]}', r"regions\[0\].shapes\[0\].radius"),
        (
            '{"regions": [{"loras": [{"file": "concept_lab\\\\bakground.safetensors"}]}]}',
            "Did you mean 'concept_lab/sliders/unet/background.safetensors'",
        ),
        (" " * 2_000_001, "at most 2,000,000"),
    ],
)
def test_faults_name_the_field_and_the_next_prompt_runs(client, text, told):
    graph = example("canvas_characters")
    node_id = find(graph, "ConceptNodes_Canvas")
    graph[node_id]["inputs"]["canvas"] = text
    with pytest.raises(PromptRefused, match=told):
        client.run(graph)
    assert client.run(example("canvas_characters")).end == "execution_success"
