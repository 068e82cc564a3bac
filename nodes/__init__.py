"""The pack's nodes: every file of this folder ends with its list `NODES`."""

import importlib
import pkgutil

NODES = [node for found in pkgutil.iter_modules(__path__) for node in importlib.import_module(f".{found.name}", __name__).NODES]
