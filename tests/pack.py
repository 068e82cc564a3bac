"""The pack as the host imports it: its folder is never on `sys.path`. `setup/inside.py` does the same for run.py's commands."""

import os
import runpy
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_inside = runpy.run_path(str(ROOT / "setup" / "inside.py"))
load_pack = _inside["load_pack"]
use_host = _inside["use_host"]


def node_js() -> str:
    """Node.js, which runs the canvas's modules without a page. A machine without it can run all else: the test is skipped by name there,
    and fails where the browser tier is required.
    """
    import pytest

    path = shutil.which("node")
    if path is None:
        stop = pytest.fail if "browser" in os.environ.get("CONCEPT_NODES_REQUIRE", "") else pytest.skip
        stop("no Node.js was found to run the canvas's modules")
    return path
