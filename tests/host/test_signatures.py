"""Node signatures are for life: saved workflows hold node ids and input names, and their widget values by position.

`signatures.json` holds what has been published. New nodes and new last inputs are added to it by running this file with
CONCEPT_NODES_RECORD=signatures; nothing in it is ever changed.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from concept_nodes.lab import captions
from concept_nodes.nodes import NODES

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("signatures.json")
LOADING_SECONDS = 0.3
# Prints the seconds that the pack takes to load and to give its nodes, in a process that has all of the host: argv is the pack's
# setup/inside.py, the host's folder and one for what the host writes.
TIMED_LOADING = """
import asyncio, runpy, sys, time
inside = runpy.run_path(sys.argv[1])
inside["use_host"](*sys.argv[2:])
import execution, nodes, server
start = time.perf_counter()
extension = asyncio.run(inside["load_pack"]().comfy_entrypoint())
seconds = time.perf_counter() - start
assert asyncio.run(extension.get_node_list())
print(seconds)
"""

SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for node in NODES)}
each_node = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)


def signature(schema) -> dict:
    """What a saved workflow depends on. The choices of a COMBO are left out: files come and go."""
    return {
        "inputs": [
            {
                "name": item.id,
                "type": item.get_io_type(),
                "optional": item.optional,
                "default": getattr(item, "default", None),
                "range": [getattr(item, "min", None), getattr(item, "max", None)],
            }
            for item in schema.inputs
        ],
        "outputs": [{"name": item.id, "type": item.get_io_type()} for item in schema.outputs],
    }


def breaks(recorded: dict, current: dict) -> list[str]:
    """Why a workflow saved under `recorded` would load differently under `current`; empty if it would not."""
    faults = []
    for kind in ("inputs", "outputs"):
        for position, old in enumerate(recorded[kind]):
            new = current[kind][position] if position < len(current[kind]) else None
            if new != old:
                faults.append(f"{kind} {position} was {old}, is {new}")
    faults += [
        f"the new input {added['name']!r} is neither optional nor has a default"
        for added in current["inputs"][len(recorded["inputs"]) :]
        if not added["optional"] and added["default"] is None
    ]
    return faults


def recorded() -> dict:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def record() -> None:
    """Add what is new to the snapshot, unless something published has changed."""
    published = recorded() if SNAPSHOT.exists() else {}
    current = {node_id: signature(schema) for node_id, schema in SCHEMAS.items()}
    if any(breaks(published[node_id], current[node_id]) for node_id in published):
        return
    SNAPSHOT.write_text(json.dumps(published | current, indent=1) + "\n", encoding="utf-8")


if os.environ.get("CONCEPT_NODES_RECORD") == "signatures":
    record()


def test_every_published_node_is_still_there():
    assert set(recorded()) <= set(SCHEMAS)


@each_node
def test_signature_is_as_published(schema):
    published = recorded().get(schema.node_id)
    assert published is not None, f"{schema.node_id} is new: add it with CONCEPT_NODES_RECORD=signatures"
    assert breaks(published, signature(schema)) == []
    assert published == signature(schema), "new inputs or outputs: add them with CONCEPT_NODES_RECORD=signatures"


def example() -> dict:
    inputs = [{"name": name, "type": "FLOAT", "optional": False, "default": 1.0, "range": [0, 1]} for name in ("first", "second")]
    return {"inputs": inputs, "outputs": [{"name": "model", "type": "MODEL"}]}


@pytest.mark.parametrize(
    "change",
    [
        lambda current: current["inputs"][0].update(name="renamed"),
        lambda current: current["inputs"].reverse(),
        lambda current: current["inputs"][1].update(default=0.5),
        lambda current: current["inputs"][1].update(range=[0, 0.5]),
        lambda current: current["inputs"].pop(),
        lambda current: current["outputs"].insert(0, {"name": "report", "type": "STRING"}),
        lambda current: current["inputs"].append({"name": "third", "type": "FLOAT", "optional": False, "default": None}),
    ],
    ids=["renamed", "reordered", "other default", "other range", "removed", "output in front", "new without default"],
)
def test_a_change_that_breaks_saved_workflows_is_seen(change):
    current = example()
    change(current)
    assert breaks(example(), current)


def test_a_new_last_input_with_a_default_is_no_break():
    current = example()
    current["inputs"].append({"name": "third", "type": "FLOAT", "optional": False, "default": 0.0})
    assert breaks(example(), current) == []


@each_node
def test_node_explains_itself(schema):
    assert schema.node_id.startswith("ConceptNodes_")
    assert schema.category == "concept" or schema.category.startswith("concept/")
    assert schema.display_name
    assert schema.description
    assert schema.search_aliases
    assert [item.id for item in schema.inputs if not item.tooltip] == []
    assert [item.id for item in schema.outputs if not item.tooltip] == []


@each_node
def test_node_has_a_help_page_that_covers_its_inputs(schema):
    page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    assert [item.id for item in [*schema.inputs, *schema.outputs] if f"`{item.id}`" not in page] == []


def test_help_lists_the_words_that_the_lab_knows():
    page = (ROOT / "web" / "docs" / "ConceptNodes_LabLoader.md").read_text(encoding="utf-8")
    tables = (
        captions.SHAPE_WORDS,
        captions.COLOUR_WORDS,
        captions.FILL_WORDS,
        captions.SIZE_WORDS,
        captions.BACKGROUND_WORDS,
        captions.STYLE_WORDS,
    )
    assert [words.plain for table in tables for words in table.values() if words.plain not in page] == []


def test_no_help_page_is_left_of_a_node_that_is_not():
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(SCHEMAS)


@pytest.mark.alone
def test_pack_loads_fast(tmp_path):
    command = [sys.executable, "-c", TIMED_LOADING, str(ROOT / "setup" / "inside.py"), os.environ["COMFYUI_PATH"], str(tmp_path)]
    # Files are compiled once, by the first of the runs; where Python is told to write none, by each.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    variables["PYTHONPYCACHEPREFIX"] = str(tmp_path / "compiled")
    # From another folder than the pack's, whose `nodes` would hide the host's.
    printed = [subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout for _ in range(5)]
    seconds = [float(text.splitlines()[-1]) for text in printed]
    assert statistics.median(seconds) <= LOADING_SECONDS, f"seconds: {seconds}"
