"""locales/en: what translators start from. It holds the pack's own words; CONCEPT_NODES_RECORD=locales writes it anew."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from concept_nodes.nodes import NODES

from pack import node_js

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = ROOT / "locales" / "en"
STRINGS = ROOT / "web" / "canvas" / "strings.mjs"


PANEL = ("ConceptNodes_Canvas", "canvas")  # has no tooltip: Nodes 2.0 would show it for as long as the pointer is over the panel


def node_words() -> dict:
    """Names and tooltips of every node, in the form that the frontend reads."""
    words = {}
    for schema in (node.define_schema() for node in NODES):
        words[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {item.id: {"name": item.display_name or item.id, "tooltip": item.tooltip} for item in schema.inputs},
            "outputs": {str(index): {"name": item.display_name, "tooltip": item.tooltip} for index, item in enumerate(schema.outputs)},
        }
    del words[PANEL[0]]["inputs"][PANEL[1]]["tooltip"]
    return words


def panel_words() -> dict:
    program = f'import {{ ENGLISH }} from "{STRINGS.as_uri()}"; console.log(JSON.stringify(ENGLISH));'
    return {"conceptCanvas": json.loads(subprocess.check_output([node_js(), "--input-type=module", "-e", program]))}


@pytest.mark.parametrize(("file", "words"), [("nodeDefs.json", node_words), ("main.json", panel_words)])
def test_english_is_what_the_code_says(file, words):
    path, now = ENGLISH / file, words()
    if os.environ.get("CONCEPT_NODES_RECORD") == "locales":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == now, "write them anew with CONCEPT_NODES_RECORD=locales"


def test_no_word_is_a_command_to_the_frontend():
    """Its translations give `@`, `|` and braces a meaning of their own."""
    told = json.dumps(node_words())
    assert [sign for sign in "@|" if sign in told] == []
    nodes = node_words().values()
    texts = [text for node in nodes for text in (node["description"], *(i.get("tooltip", "") for i in node["inputs"].values()))]
    assert [text for text in texts if "{" in text] == []
