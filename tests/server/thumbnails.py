"""Draws the thumbnails of the example workflows by running them: `COMFYUI_PATH=... PYTHONPATH=tests python tests/server/thumbnails.py`."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from client import Client
from graphs import WORKFLOWS, example
from pack import load_pack
from pictures import pixels

SIDE = 256
QUALITY = 92
LEFT = "a medium {} on the left on a grey background"
# Workflow: the id of the node and the input that its four pictures vary, and the values, in reading order.
VARIED = {
    "slider": ("2", "strength", (-2.0, -1.0, 1.0, 2.0)),
    "slider_prompts": ("2", "strength", (-1.5, -0.5, 0.5, 1.5)),
    "filter": ("2", "strength", (0.0, 0.5, 0.8, 1.0)),
    "residual": ("2", "strength", (0.0, 0.5, 1.0, 1.5)),
    "features": ("5", "strength", (0.0, 1.0, 2.0, 3.0)),
    "steer": ("3", "strength", (0.0, 0.75, 1.5, 2.0)),
    "maps": ("6", "seed", (7, 8, 9, 10)),
    "bind": ("2", "strength", (0.0, 0.5, 0.8, 1.0)),
    "canvas_characters": ("12", "seed", (1, 2, 3, 4)),
    "masked_lora": ("7", "strength_model", (-2.0, -1.0, 1.0, 2.0)),
    "regions_characters": ("12", "seed", (1, 2, 3, 4)),
    "localize": ("10", "seed", (1, 2, 3, 4)),
    "regions_slider": ("6", "strength", (-2.0, -1.0, 1.0, 2.0)),
    "regions_filter": ("13", "strength", (0.0, 0.5, 0.8, 1.0)),
    "conductor": ("7", "seed", (6, 1, 2, 3)),
    "regions_reference": ("10", "strength", (0.0, 1.0, 2.0, 4.0)),
    "regions_hires": ("8", "seed", (1, 2, 3, 4)),
    "regions_prompts": ("5", "prompt", tuple(LEFT.format(what) for what in ("red star", "yellow heart", "pink circle", "orange diamond"))),
}


PAGES = ("slider_sweep", "slider_train", "slider_train_images")  # examples that make one page of many pictures


def thumbnail(client: Client, name: str) -> Image.Image:
    """Two by two pictures of the example, each with another value of the input that it is about; or its page."""
    if name in PAGES:
        return page(client, example(name))
    node_id, name_of_input, values = VARIED[name]
    drawn = []
    for value in values:
        graph = example(name)
        graph[node_id]["inputs"][name_of_input] = value
        drawn.append(picture(client, graph))
    return Image.fromarray(np.vstack([np.hstack(drawn[:2]), np.hstack(drawn[2:])]))


def page(client: Client, graph: dict) -> Image.Image:
    run = client.run(graph)
    drawn = Image.fromarray(pixels(client.pictures(run)[0]))
    drawn.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    square.paste(drawn, (0, (2 * SIDE - drawn.height) // 2))
    return square


def picture(client: Client, graph: dict) -> np.ndarray:
    run = client.run(graph)
    if run.end != "execution_success":
        raise RuntimeError(run.error)
    drawn = Image.fromarray(pixels(client.pictures(run)[-1]))  # of several, what the example is about comes last
    return np.asarray(drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(names: list[str]) -> None:
    load_pack()
    from host_process import HostProcess

    with tempfile.TemporaryDirectory() as base, HostProcess(Path(base)) as host, Client(host.url) as client:
        for name in names or (*VARIED, *PAGES):
            thumbnail(client, name).save(WORKFLOWS / f"{name}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main(sys.argv[1:])
