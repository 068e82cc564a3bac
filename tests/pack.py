"""The pack as the host imports it: its folder is never on `sys.path`. `setup/inside.py` does the same for run.py's commands."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_inside = runpy.run_path(str(ROOT / "setup" / "inside.py"))
load_pack = _inside["load_pack"]
use_host = _inside["use_host"]
