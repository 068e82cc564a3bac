"""A reference picture for one region."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..host.reference import ALL, LAYERS, Picture, Reference
from ..host.regions import Regions
from ..ops.schedule import Schedule
from ._shared import check_numbers, checked_mask, schedule_input, window_inputs
from .regions import REGIONS

LIMIT = 1000.0


class RegionReference(io.ComfyNode):
    """A picture that one region takes its looks from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RegionReference",
            display_name="Region Reference",
            category="concept/regions",
            description=(
                "Hangs a reference picture on a named region: its positions attend to the concept in that picture as they attend to their "
                "own picture. No training. Costs one more model call a step, of as many pictures as there are references."
            ),
            search_aliases=[
                "reference only",
                "FreeCustom",
                "IPAdapter mask",
                "image prompt",
                "regional reference",
                "style reference",
                "multi-reference self-attention",
            ],
            inputs=[
                io.Custom(REGIONS).Input("regions", tooltip="The regions, from Region or a canvas."),
                io.String.Input("region", default="region 1", tooltip="The name of the region that gets the reference."),
                io.Image.Input(
                    "image", tooltip="The reference picture. It is cut to the format of the sampled one, about the mask's middle."
                ),
                io.Vae.Input("vae", tooltip="The model's VAE. It encodes the reference once the size of the sampled picture is known."),
                io.Float.Input(
                    "strength",
                    default=2.0,
                    min=0.0,
                    max=LIMIT,
                    step=0.1,
                    tooltip=(
                        "How often each of the reference's positions counts beside one of the picture's own. Neutral: 0; 1 counts both "
                        "alike, 20 is as FreeCustom was published. Too much blurs the region."
                    ),
                ),
                *window_inputs(),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The concept in the reference picture, white for all of it. Neutral: not connected, all."
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=ALL,
                    optional=True,
                    tooltip=(
                        "In which of the layers, in the model's order, the reference is read. Later ones take less of the layout. "
                        "Neutral: all."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the reference shows; Apply Regions needs the CLIP. Neutral: empty, read with what the region reads.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    optional=True,
                    tooltip="Of the noise on the reference, the same in all steps. No value is neutral; 0 is as good as any.",
                ),
                schedule_input(),
            ],
            outputs=[
                io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with the reference on one of them.")
            ],
        )

    @classmethod
    def execute(
        cls,
        regions: Regions,
        region,
        image,
        vae,
        strength,
        start_percent=0.0,
        end_percent=1.0,
        mask=None,
        layers=ALL,
        prompt="",
        seed=0,
        schedule="",
    ) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        if strength < 0:
            raise ValueError(f"strength is {strength:g}, and a position cannot count less than not at all. Set it to 0 or more.")
        course = Schedule.parse(schedule)
        if course is not None and min(factor for _, factor in course.points) < 0:
            raise ValueError(f"schedule is {course}, and a position cannot count less than not at all. Set its factors to 0 or more.")
        regions.check_name(region)
        if len(image) != 1:
            raise ValueError(f"image holds {len(image)} pictures. Connect one; several references are several Region References.")
        if not torch.isfinite(image).all():
            raise ValueError("image holds NaN or infinity. Connect another picture.")
        picture = Picture(image[0, :, :, :3], None if mask is None else checked_mask(mask), vae)
        reference = Reference(region, picture, strength, start_percent, end_percent, layers, prompt, seed, course)
        return io.NodeOutput(regions.with_reference(region, reference))


NODES = [RegionReference]
