"""Runs in the Python that has the host: `python inside.py concept_nodes.lab.__main__ ARGS...` loads the pack and calls its `main(ARGS)`.

Any other module (`pytest`, `ruff`) runs as `python -m` would run it, but with neither the current folder nor the pack's root on the
import path: the pack's `nodes` would hide the host's.
"""

import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "concept_nodes"


def load_pack():
    """The pack as the host imports it, one package under its own name, so that `from concept_nodes.ops import ...` works from then on."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]


def use_host(path, base, device="cpu"):
    """Make the ComfyUI in `path` importable on `device` ("cpu" or "cuda"), with what it writes going to `base` instead of its own folders.

    Must run before anything of comfy is imported: the host reads these settings once.
    """
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.base_directory = str(base)
    args.disable_api_nodes = True


def main(module, *arguments):
    del sys.path[0]  # this file's folder, whose `server` would hide the host's
    tools = os.environ.get("CONCEPT_NODES_TOOLS")
    if tools:
        sys.path.append(tools)  # last, so that what the host's Python has of its own comes first
    sys.argv = [module, *arguments]
    if not module.startswith(NAME + "."):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    use_host(os.environ["COMFYUI_PATH"], os.environ["CONCEPT_NODES_BASE"], os.environ.get("CONCEPT_NODES_DEVICE", "cpu"))
    load_pack()
    return importlib.import_module(module).main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
