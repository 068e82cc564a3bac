"""Regions: what acts on one part of the picture only."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import adapters, files
from ..host.families import ALL
from ..host.filter import OFF, OWN, Settings
from ..host.regions import Hung, Regions, Unwanted, apply
from ..ops.masks import Box, Ellipse
from ..ops.regions import COLOURS, Region
from ..ops.schedule import Schedule
from ._shared import (
    LORA_MODEL,
    NONE,
    SLIDER_LIMIT,
    Hanging,
    OfFile,
    OfLoraName,
    check_numbers,
    check_one_source,
    checked_mask,
    comparable_input,
    file_input,
    layers_input,
    mask_input,
    model_input,
    model_outputs,
    result,
    schedule_input,
    share_input,
    strength_input,
    window_inputs,
)
from .filter import fine_inputs, validating_input, wanted_out, wish_inputs

LIMIT = 100.0
LIMIT_ISOLATION = 10.0
TEXTS = ("own", "none", "all")
SPAN = "span"


class MaskedLoRA(OfLoraName):
    """A LoRA on a part of the picture, within a window of the steps, without touching the model's weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_MaskedLoRA",
            display_name="Load LoRA, Masked",
            category="concept/regions",
            description=(
                "Loads a LoRA that acts only where the mask is, in a window of the sampling steps; without a mask it acts everywhere, as "
                "the host's Load LoRA does. Weights are not changed and no model call is added, however many are chained."
            ),
            search_aliases=[
                "regional LoRA",
                "LoRA mask",
                "masked LoRA",
                "attention couple",
                "LoRA block",
                "hook LoRA",
                "LoraLoaderModelOnly",
            ],
            inputs=[
                model_input(),
                file_input("lora_name", "A LoRA file for the model's family, from models/loras. 'none' (neutral) does nothing."),
                strength_input(
                    "strength_model", LIMIT, 0.01, "How strongly it acts: 1 as trained, negative the other way, 0 (neutral) not at all."
                ),
                *window_inputs(),
                mask_input(),
                io.Combo.Input(
                    "text",
                    options=list(TEXTS),
                    default="own",
                    optional=True,
                    tooltip=(
                        "Models that read prompt and picture as one sequence (Flux): which of the prompt's rows get the LoRA. 'own' "
                        "(neutral): a copy of the prompt that the masked part alone reads; 'none': no row; 'all': every row, which leaks."
                    ),
                ),
                schedule_input(),
                layers_input(),
            ],
            outputs=model_outputs("The model with the LoRA on it."),
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, lora_name, strength_model, start_percent, end_percent, mask=None, text="own", schedule="", layers=ALL
    ) -> io.NodeOutput:
        hanging = Hanging(
            strength_model, start_percent, end_percent, schedule, layers, mask=mask, text=text, strength_name="strength_model"
        )
        model, lines = hanging.put(model, "LoRA", "lora_name", lora_name)
        return result(model, "\n".join(lines))


REGIONS = "CONCEPT_REGIONS"
SHAPES = {"box": Box, "ellipse": Ellipse}


class RegionNode(io.ComfyNode):
    """One more region on a list of regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Region",
            display_name="Region",
            category="concept/regions",
            description=(
                "Adds a named part of the picture, with a prompt of its own, to a list of regions: a box, an ellipse, a mask, or the rest. "
                "Chain one for each concept, hang LoRA files on them, and put the list on a model with Apply Regions."
            ),
            search_aliases=["regional prompt", "area prompt", "attention couple", "mask prompt", "composition"],
            inputs=[
                io.String.Input("name", default="region 1", tooltip="The region's name. Every region of a list needs one of its own."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="What is wanted here. Neutral: empty, the common prompt is read here, too.",
                ),
                io.String.Input("negative", default="", multiline=True, tooltip="What is not wanted here. Neutral: empty."),
                io.Combo.Input(
                    "shape", options=[*SHAPES, "rest"], default="box", tooltip="A box, an ellipse in it, or all that other regions leave."
                ),
                share_input("x", 0.0, "Left edge, as a share of the picture's width. No effect with a mask or the rest."),
                share_input("y", 0.0, "Upper edge, as a share of the picture's height."),
                share_input("width", 1.0, "Width, as a share of the picture's."),
                share_input("height", 1.0, "Height, as a share of the picture's."),
                share_input("feather", 0.0, "Width of the soft edge, as a share of the picture's shorter side. Neutral: 0."),
                share_input("weight", 1.0, "How much of its place it has, 1 (neutral) for all. What it leaves keeps the common prompt."),
                io.Mask.Input("mask", optional=True, tooltip="The region's mask, in the place of the shape. Neutral: not connected."),
                io.Custom(REGIONS).Input("regions", optional=True, tooltip="The regions so far; they lie above this one."),
            ],
            outputs=[io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with this one.")],
        )

    @classmethod
    def execute(cls, name, prompt, negative, shape, x, y, width, height, feather, weight, mask=None, regions=None) -> io.NodeOutput:
        regions = regions or Regions()
        mask = None if mask is None else checked_mask(mask)
        rest = shape == "rest"
        if not rest and mask is None and (width <= 0 or height <= 0):
            raise ValueError(f"Region '{name}' has a width or height of 0, so it covers nothing. Make it larger, or connect a mask.")
        drawn = () if rest or mask is not None else (SHAPES[shape](x, y, width, height),)
        colour = COLOURS[len(regions.names()) % len(COLOURS)]
        region = Region(
            name=checked_name(name),
            colour=colour,
            shapes=drawn,
            rest=rest,
            prompt=prompt,
            negative=negative,
            weight=weight,
            feather=feather,
        )
        return io.NodeOutput(regions.with_region(region, None if rest else mask))


class RegionLoRA(OfLoraName):
    """A LoRA hung on a region."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RegionLoRA",
            display_name="Region LoRA",
            category="concept/regions",
            description="Hangs a LoRA on a named region: it acts there only. Takes a file, a LoRA from a training node, or a LORA_STACK.",
            search_aliases=["regional LoRA", "LoRA mask", "character LoRA", "LORA_STACK"],
            inputs=[
                io.Custom(REGIONS).Input("regions", tooltip="The regions, from Region or a canvas."),
                io.String.Input("region", default="region 1", tooltip="The name of the region that gets the LoRA."),
                file_input("lora_name", "A file from models/loras. Neutral: 'none'."),
                strength_input("strength_model", LIMIT, 0.01, "How strongly it acts on the model. Neutral: 0."),
                strength_input("strength_clip", LIMIT, 0.01, "How strongly its text part acts on the region's own prompt. Neutral: 0."),
                *window_inputs(),
                io.Custom(LORA_MODEL).Input("lora", optional=True, tooltip="A LoRA from a training node. lora_name must then be 'none'."),
                io.Custom("LORA_STACK").Input(
                    "lora_stack", optional=True, tooltip="A list of LoRA files with strengths, as many packs make."
                ),
                schedule_input(),
            ],
            outputs=[io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with the LoRA on one of them.")],
        )

    @classmethod
    def execute(
        cls, regions, region, lora_name, strength_model, strength_clip, start_percent, end_percent, lora=None, lora_stack=None, schedule=""
    ) -> io.NodeOutput:
        check_numbers(strength_model, start_percent, end_percent, strength_name="strength_model")
        check_numbers(strength_clip, start_percent, end_percent, strength_name="strength_clip")
        check_one_source("lora_name", lora_name, lora)
        regions.check_name(region)
        times, loras = Schedule.parse(schedule), []
        if lora_name != NONE:
            loras.append((lora_name, adapters.read(files.resolve("loras", lora_name)), strength_model, strength_clip))
        if lora is not None:
            loras.append(("the connected lora", adapters.checked(lora, "the connected lora"), strength_model, strength_clip))
        for name, model, clip in lora_stack or ():
            loras.append((name, adapters.read(files.resolve("loras", name)), model, clip))
        for label, state, model, clip in loras:
            regions = regions.with_lora(region, Hung(label, state, model, clip, start_percent, end_percent, times))
        return io.NodeOutput(regions)


class RegionSlider(OfFile):
    """A slider hung on a region."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RegionSlider",
            display_name="Region Slider",
            category="concept/regions",
            description="Hangs a slider on a named region: it turns its concept up or down there only. Several may hang on one region.",
            search_aliases=["regional slider", "slider mask", "concept slider"],
            inputs=[
                io.Custom(REGIONS).Input("regions", tooltip="The regions, from Region or a canvas."),
                io.String.Input("region", default="region 1", tooltip="The name of the region that gets the slider."),
                file_input("file", "The slider: a LoRA file for the model's family, from models/loras. Neutral: 'none'."),
                strength_input("strength", SLIDER_LIMIT, 0.05, "How far to turn, in units of its training. Neutral: 0."),
                *window_inputs(" Later keeps the layout."),
                io.Custom(LORA_MODEL).Input("lora", optional=True, tooltip="A LoRA from a training node. file must then be 'none'."),
                schedule_input(),
                layers_input(),
                comparable_input(),
            ],
            outputs=[io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with the slider on one of them.")],
        )

    @classmethod
    def execute(
        cls, regions, region, file, strength, start_percent, end_percent, lora=None, schedule="", layers=ALL, comparable=False
    ) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        check_one_source("file", file, lora)
        regions.check_name(region)
        times = Schedule.parse(schedule)
        if file == NONE and lora is None:
            return io.NodeOutput(regions)
        label = file if lora is None else "the connected lora"
        state = adapters.read(files.resolve("loras", file)) if lora is None else adapters.checked(lora, label)
        hung = Hung(label, state, strength, 0.0, start_percent, end_percent, times, layers, comparable, "slider")
        return io.NodeOutput(regions.with_lora(region, hung))


class RegionFilter(io.ComfyNode):
    """Concepts kept out of one region."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RegionFilter",
            display_name="Region Filter",
            category="concept/regions",
            description=(
                "Keeps concepts out of one named region: what its prompt brings of them is taken out, and all other regions read theirs as "
                "ever. No training, no weights touched, no model call added. Apply Regions says which words were flagged."
            ),
            search_aliases=["regional negative prompt", "SAFREE", "concept erasure", "region censor", "remove concept", "safety filter"],
            inputs=[
                io.Custom(REGIONS).Input("regions", tooltip="The regions, from Region or a canvas."),
                io.String.Input("region", default="region 1", tooltip="The name of the region that the concepts are kept out of."),
                *wish_inputs(),
                *fine_inputs(),
                validating_input(),
                *window_inputs(optional=True, advanced=True),
            ],
            outputs=[io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with the filter on one of them.")],
        )

    @classmethod
    def execute(
        cls,
        regions,
        region,
        concepts,
        preset,
        method,
        strength,
        push=0.5,
        gate=0.0,
        alpha=0.01,
        order=OWN,
        rows=OWN,
        self_validating=OWN,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        # A pooled vector is one for all of the picture.
        settings = Settings(method, strength, push, gate, alpha, order, rows, OFF, self_validating, start_percent, end_percent)
        settings.check()
        return io.NodeOutput(regions.with_filter(region, Unwanted(tuple(wanted_out(concepts, preset)), settings)))


class RegionsToMasks(io.ComfyNode):
    """The masks of regions as the host's MASK."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RegionsToMasks",
            display_name="Regions to Masks",
            category="concept/regions",
            description="Draws each region's share of a picture as a mask, in the order of the regions, after their overlap rule.",
            search_aliases=["region mask", "mask batch", "area mask"],
            inputs=[
                io.Custom(REGIONS).Input("regions", tooltip="The regions."),
                io.Int.Input("width", default=512, min=8, max=16384, tooltip="Width of the masks in pixels."),
                io.Int.Input("height", default=512, min=8, max=16384, tooltip="Height of the masks in pixels."),
            ],
            outputs=[io.Mask.Output("masks", display_name="masks", tooltip="One mask for each region, in their order.")],
        )

    @classmethod
    def execute(cls, regions, width, height) -> io.NodeOutput:
        if not regions.names():
            raise ValueError("There are no regions, so there are no masks. Add a region first.")
        if regions.live():
            listed = ", ".join(f"'{regions.names()[index]}'" for index in regions.live())
            raise ValueError(
                f"{listed}: found by words while a picture is sampled, so there is no mask before. Maps of Words, behind the sampler, "
                "draws where the model put them."
            )
        return io.NodeOutput(regions.drawn(height, width))


class RegionsApply(io.ComfyNode):
    """Regions on a model: each reads its own prompt through its own LoRAs, in one pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_RegionsApply",
            display_name="Apply Regions",
            category="concept/regions",
            description=(
                "Lets every region read its own prompt, through its own LoRA files, in one pass of the model however many regions there "
                "are. What no region covers keeps the prompt. Weights are not changed."
            ),
            search_aliases=[
                "regional prompt",
                "regional LoRA",
                "attention couple",
                "multi character",
                "latent couple",
                "regional prompter",
            ],
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="The common prompt: read wherever no region has one of its own."),
                io.Conditioning.Input("negative", tooltip="The common negative prompt."),
                io.Custom(REGIONS).Input("regions", tooltip="The regions, from Region or a canvas."),
                io.Combo.Input(
                    "text",
                    options=[*TEXTS, SPAN],
                    default="own",
                    tooltip=(
                        "Models that read prompt and picture as one sequence (Flux): which of the prompt's rows get a region's LoRA. 'own' "
                        "(neutral): those that the region reads; 'none': no row; 'all': every row, which leaks; 'span': its words in the "
                        "common prompt alone, which all of the picture reads. Its words are its prompt, or its name; if they are not in "
                        "prompt, the node stops."
                    ),
                ),
                io.Float.Input(
                    "isolation",
                    default=0.0,
                    min=0.0,
                    max=LIMIT_ISOLATION,
                    step=0.1,
                    tooltip=(
                        "How much less the regions see of one another while the picture forms: taken from the logits of attention between "
                        "them. 0 (neutral): they see all of it, which keeps the picture in one piece; 10: hardly anything. It does not "
                        "bring back a figure that the model left out."
                    ),
                ),
                share_input("isolation_end", 0.5, "Until when isolation holds, as a share of sampling. No effect at isolation 0."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "Reads the regions' prompts. Neutral: not connected, if no region has a prompt, a filter, features of a text "
                        "encoder or a reference with a prompt, and none is found by words."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "The text that positive was made from: for text 'span', which finds the regions' words in it, for regions that are "
                        "found by words, and for filters and features of a text encoder on regions that have no prompt of their own. "
                        "Neutral: empty."
                    ),
                ),
                share_input(
                    "own_scale",
                    0.0,
                    "UNets (SD 1.5, SDXL): how far each region is brought to a scale of its own in the layers that bring all of the "
                    "picture to one (group normalisation). Details come out, and figures stay, where many share a canvas; flat regions "
                    "may get noise. 0 (neutral): one scale; 1: each its own.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with the regions on it."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="The common prompt, as it came."),
                io.Conditioning.Output("negative", display_name="negative", tooltip="The common negative prompt, as it came."),
                io.String.Output("report", display_name="report", tooltip="What each region does and where; what was not placed and why."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, positive, negative, regions, text="own", isolation=0.0, isolation_end=0.5, clip=None, prompt="", own_scale=0.0
    ) -> io.NodeOutput:
        check_numbers(isolation, 0.0, 1.0, strength_name="isolation")
        if not 0.0 <= isolation_end <= 1.0:
            raise ValueError(f"isolation_end is {isolation_end}. Set it to a share of sampling from 0 to 1.")
        if not 0.0 <= own_scale <= 1.0:
            raise ValueError(f"own_scale is {own_scale}. Set it to a number from 0 to 1.")
        applied, lines = apply(model, regions, clip, text, isolation, isolation_end, prompt, positive, own_scale)
        report = "\n".join(lines)
        return io.NodeOutput(applied, positive, negative, report, ui=ui.PreviewText(report))


def checked_name(name: str) -> str:
    """Raises ValueError where a region's name is empty."""
    if not name.strip():
        raise ValueError("The region has no name. Give it one, by which LoRA files and reports can refer to it.")
    return name.strip()


NODES = [MaskedLoRA, RegionNode, RegionLoRA, RegionSlider, RegionFilter, RegionsToMasks, RegionsApply]
