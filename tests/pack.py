"""The pack as the host imports it: one package with its own name, its folder never on `sys.path` (its `nodes` would hide the host's)."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "concept_nodes"


def load_pack():
    """The pack's module, registered as `concept_nodes`, so that `from concept_nodes.ops import lora` works from then on."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]


def use_host(path, base, device="cpu"):
    """Make the ComfyUI in `path` importable, on `device`, with every file it writes going to `base` instead of its own folders.

    Must run before anything of comfy is imported: the host reads these settings once, at import.
    """
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.base_directory = str(base)
    args.disable_api_nodes = True
