"""Concept Nodes: put each concept in its place, turn it up or down, keep it out, and see where the model put it.

ComfyUI imports this file at start-up. It stays light: everything that needs torch or the host is imported by the entry
point, so that `ops` can be used with torch alone.
"""

import contextlib
import logging
import os

WEB_DIRECTORY = "./web"

log = logging.getLogger("concept_nodes")
log.setLevel(logging.INFO)
with contextlib.suppress(ValueError):  # no level of that name: a wish for more or fewer lines must not cost the nodes
    log.setLevel(os.environ.get("CONCEPT_NODES_LOG", "INFO").upper())


async def comfy_entrypoint():
    """Give the host the pack's nodes, and the lab's LoRA files, autoencoders and features under `concept_lab/`."""
    from comfy_api.latest import ComfyExtension

    from .host import lab
    from .nodes import NODES

    lab.show_files()

    class ConceptNodes(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    return ConceptNodes()
