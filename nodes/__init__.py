"""The pack's nodes: every file of this folder whose name begins with a letter ends with its list `NODES`."""

import importlib
import pkgutil

_files = [found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_")]
NODES = [node for name in _files for node in importlib.import_module(f".{name}", __name__).NODES]
