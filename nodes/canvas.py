"""The concept canvas: named regions drawn on the node itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from comfy_api.latest import io, ui

from ..host import files, preview
from ..host.regions import Regions
from ..ops.regions import COLOURS, Document, DocumentError, Region, parse
from ._shared import checked_mask, print_of_file
from .regions import REGIONS

SIDE = 512
LARGEST = 16384
MOST_MASKS = 64
OVERLAPS = {"normalize": "each has its share", "priority": "the first in the list has it", "max": "the strongest has it"}
BACKGROUND = "concept_background"  # what the panel asks for in the node's output


class Canvas(io.ComfyNode):
    """Named regions drawn in a panel on the node, kept as JSON in the workflow."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def side(name: str) -> io.Int.Input:
            return io.Int.Input(
                name,
                default=0,
                min=0,
                max=LARGEST,
                step=8,
                tooltip=f"{name.capitalize()} of masks and preview in pixels; the panel takes its shape. "
                f"0 (neutral): the background's, {SIDE} without one.",
            )

        return io.Schema(
            node_id="ConceptNodes_Canvas",
            display_name="Concept Canvas",
            category="concept/regions",
            description=(
                "Draw named regions on the node itself: boxes, ellipses, polygons, brush strokes. Give each a prompt and LoRA files, and "
                "connect it to Apply Regions. All of it lies in the workflow as JSON."
            ),
            search_aliases=[
                "regional prompt",
                "region painter",
                "mask painter",
                "mask editor",
                "area prompt",
                "layout",
                "attention couple",
            ],
            inputs=[
                io.String.Input(
                    "canvas",
                    default="",
                    multiline=True,
                    socketless=True,
                    extra_dict={"widgetType": "CONCEPT_CANVAS"},
                    tooltip="The regions as JSON (docs/regions.md); the panel writes it, a script may. Neutral: empty, no regions.",
                ),
                side("width"),
                side("height"),
                io.Image.Input("background", optional=True, tooltip="A picture to draw over. Neutral: not connected."),
                io.Custom(REGIONS).Input("regions", optional=True, tooltip="Regions to add to; they lie above the drawn ones."),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplatePrefix(
                        io.Mask.Input("mask", tooltip="Takes the place of what is drawn for the region of this number."),
                        prefix="mask",
                        min=0,
                        max=MOST_MASKS,
                    ),
                    optional=True,
                    tooltip="Masks for the drawn regions in order, the rest left out; one more than there are makes a new region.",
                ),
            ],
            outputs=[
                io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions, for Apply Regions."),
                io.Mask.Output(
                    "masks", display_name="masks", tooltip="One mask for each region in order; an empty one where there is none."
                ),
                io.Image.Output("preview", display_name="preview", tooltip="The regions in their colours, over the background."),
                io.String.Output("report", display_name="report", tooltip="What each region covers, reads and loads."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, canvas="", masks=None):
        # The host hands growing inputs over in any case.
        try:
            document = parse(canvas or "")
        except DocumentError as error:
            return str(error)
        known = set(files.names("loras"))
        lacking = [lora.file for region in document.regions for lora in region.loras if lora.file not in known]
        return files.missing("loras", lacking[0]) if lacking else True

    @classmethod
    def fingerprint_inputs(cls, canvas="", **_):
        try:
            document = parse(canvas or "")
        except DocumentError:
            return canvas
        return "; ".join(print_of_file(lora.file) for region in document.regions for lora in region.loras)

    @classmethod
    def execute(cls, canvas="", width=0, height=0, background=None, regions=None, masks=None) -> io.NodeOutput:
        made = filled(parse(canvas), given_masks(masks))
        joined = regions or Regions()
        for region in made.document.regions:
            joined = joined.with_region(region, made.masks.get(region.name))
        if made.document.regions:
            joined = replace(joined, document=replace(joined.document, overlap=made.document.overlap))
        natural = (SIDE, SIDE) if background is None else (background.shape[2], background.shape[1])
        width, height = width or natural[0], height or natural[1]
        shares = joined.drawn(height, width)
        picture = preview.draw(joined, shares, None if background is None else background[0, ..., :3])
        report = "\n".join(lines(joined, shares))
        shown = {} if background is None else {BACKGROUND: ui.PreviewImage(background[:1], cls=cls).values}
        out = shares if len(shares) else torch.zeros(1, height, width)
        return io.NodeOutput(joined, out, picture, report, ui={**ui.PreviewText(report).as_dict(), **shown})


def given_masks(masks: Mapping[str, torch.Tensor] | None) -> list[torch.Tensor]:
    """Connected masks in the order of their sockets, batches taken apart."""
    given = []
    for name in sorted(masks or {}, key=lambda name: int(name.removeprefix("mask"))):
        if masks[name] is not None:
            batch = masks[name] if masks[name].ndim == 3 else masks[name][None]
            given += [checked_mask(mask) for mask in batch]
    return given


def filled(document: Document, masks: list[torch.Tensor]) -> Regions:
    """The drawn regions, masks in the place of their shapes; new regions for masks that are more than there are."""
    drawn = [region for region in document.regions if not region.rest]
    names = {region.name for region in document.regions}
    extra = []
    for number in range(len(drawn) + 1, len(masks) + 1):
        name = f"region {number}"
        while name in names:
            name += "'"
        names.add(name)
        extra.append(Region(name, colour=COLOURS[(number - 1) % len(COLOURS)]))
    rests = [region for region in document.regions if region.rest]
    listed = (*drawn, *extra, *rests) if extra else document.regions
    by_name = {region.name: mask for region, mask in zip([*drawn, *extra], masks, strict=False)}
    return Regions(replace(document, regions=listed), masks=by_name)


def lines(regions: Regions, shares: torch.Tensor) -> list[str]:
    """What to tell of the regions, a line each."""
    if not len(shares):
        return ["No regions yet: draw some, and Apply Regions will act."]
    rule = OVERLAPS[regions.document.overlap]
    told = [f"{len(shares)} regions on {shares.shape[2]} x {shares.shape[1]} pixels; where they overlap, {rule}."]
    for region, share in zip(regions.document.regions, shares, strict=True):
        part = float(share.mean())
        reads = "a prompt of its own" if region.prompt.strip() else "the common prompt"
        loras = [f"'{lora.file}' at {lora.model:g}" for lora in region.loras]
        hidden = "" if region.visible else " (hidden)"
        covers = f"{part:.0%} of the picture" if part else "nothing"
        if region.live is not None:
            covers = "found by words while sampling" + (f", within {covers}" if region.shapes or region.name in regions.masks else "")
        told.append(f"'{region.name}'{hidden}: {covers}; reads {reads}" + (f"; LoRA {', '.join(loras)}." if loras else "."))
    return told


NODES = [Canvas]
