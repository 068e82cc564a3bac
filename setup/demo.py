"""The demo's pictures: the bundled slider workflow, queued over HTTP once per strength. `lab/demo.py` measures them and draws the sheet."""

import contextlib
import copy
import json
import tempfile
from pathlib import Path

from . import SetupError
from .hosts import ROOT, Host
from .install import progress
from .server import Server, remove_base

WORKFLOW = ROOT / "example_workflows" / "api" / "slider.json"
SLIDER = "ConceptNodes_Slider"
STRENGTHS = (-2, -1, 0, 1, 2)
ROWS = 3  # pictures per strength


def check_output(folder: Path):
    """Make the folder for the pictures, empty of an earlier demo's; SetupError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("demo_*.png"), *folder.glob("demo.json"), *folder.glob("contact_sheet.png")):
            old.unlink()
    except OSError as error:
        raise SetupError(f"Cannot write to {folder} ({error.strerror}): name another folder with --output.") from error


def make_pictures(host: Host, home: Path, variables: dict[str, str], folder: Path, device: str):
    """Write demo_<label>_<row>.png for the plain graph and every strength, and demo.json, which lists them with the slider's file."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in workflow.values():
        if "batch_size" in node["inputs"]:
            node["inputs"]["batch_size"] = ROWS
    slider = next(node for node, content in workflow.items() if content["class_type"] == SLIDER)
    graphs = {"base": without(workflow, slider)} | {f"{strength:+d}": with_strength(workflow, slider, strength) for strength in STRENGTHS}
    (home / "bases").mkdir(exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="demo-", dir=home / "bases"))
    try:
        with contextlib.ExitStack() as running:
            with progress("Starting ComfyUI"):
                server = running.enter_context(Server(host, base, variables, device, log=home / "demo.log"))
            with progress(f"Making {len(graphs) * ROWS} pictures over HTTP"):
                queued = {label: server.queue(graph) for label, graph in graphs.items()}
                columns = {label: save(server, server.result(prompt), folder, label) for label, prompt in queued.items()}
    finally:
        remove_base(base)
    listed = {"slider": workflow[slider]["inputs"]["file"], "columns": columns}
    (folder / "demo.json").write_text(json.dumps(listed, indent=1), encoding="utf-8")


def save(server: Server, outputs: dict, folder: Path, label: str) -> list[str]:
    """Fetch a run's pictures; their file names in `folder`."""
    images = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
    if not images:
        raise SetupError(f"The workflow {WORKFLOW.name} ran and saved no picture: it needs a Save Image node.")
    names = [f"demo_{label}_{row}.png" for row in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).write_bytes(server.picture(image))
    return names


def with_strength(workflow: dict, slider: str, strength: float) -> dict:
    graph = copy.deepcopy(workflow)
    graph[slider]["inputs"]["strength"] = strength
    return graph


def without(workflow: dict, node: str) -> dict:
    """The workflow with `node` taken out: its model goes straight through, and what hangs on its other outputs goes too."""
    graph = copy.deepcopy(workflow)
    source = graph.pop(node)["inputs"]["model"]
    for name, content in list(graph.items()):
        for key, value in content["inputs"].items():
            if value == [node, 0]:
                content["inputs"][key] = source
            elif isinstance(value, list) and value[:1] == [node]:
                graph.pop(name, None)
    return graph
