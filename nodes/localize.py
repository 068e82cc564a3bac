"""Regions that nobody draws: found by words, while the picture is sampled."""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..host import adapters, files
from ..host.regions import Hung, Regions
from ..ops.regions import COLOURS, MOST_GROWN, SCOPES, SMOOTHEST, THRESHOLDS, Live, Region
from ._shared import (
    CONNECTED,
    LORA_MODEL,
    NONE,
    OfLoraName,
    check_numbers,
    check_one_source,
    checked_mask,
    file_input,
    mask_input,
    share_input,
    strength_input,
)
from .regions import LIMIT, REGIONS, checked_name

# Not Live's own: regions documents leave out what is that, and a start of theirs stays what it was.
NEUTRAL = Live(start=0.0)


class Localize(OfLoraName):
    """One more region on a list, found by the model's attention to words while it samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Localize",
            display_name="Region from Words",
            category="concept/attention",
            description=(
                "Adds a region that nobody draws: it is where the model attends to a phrase of the prompt, read from the run itself and "
                "step by step. A LoRA on it acts there only. Chain one for each concept, and put the list on a model with Apply Regions."
            ),
            search_aliases=["localized LoRA", "attention mask", "LAG", "auto mask", "multi character", "FreeFuse", "regional LoRA", "DAAM"],
            inputs=[
                io.String.Input("name", default="concept 1", tooltip="The region's name. Every region of a list needs one of its own."),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip=(
                        "The words of the common prompt that it is found by, as they are written there, with its place if one is said: "
                        "'large sks on the left'. 'sks #2' is the second of several. Neutral: empty, its name."
                    ),
                ),
                file_input("lora_name", "A LoRA that acts in the region, from models/loras. Neutral: 'none'; others may be hung on it."),
                strength_input("strength_model", LIMIT, 0.01, "How strongly the LoRA acts there. Neutral: 0."),
                io.Combo.Input(
                    "threshold",
                    options=list(THRESHOLDS),
                    default=NEUTRAL.threshold,
                    tooltip=(
                        "What of the map is the region, where it is higher than those of all other phrases: 'argmax' (neutral) all of "
                        "that; 'otsu' what its histogram sets apart; 'median' its higher half; 'quantile' the highest 1 - level. 'soft': "
                        "by how high it is, shared with the others."
                    ),
                ),
                share_input("level", NEUTRAL.level, "For 'quantile', from 0 to 1: higher gives a smaller region. No effect otherwise."),
                io.Combo.Input(
                    "scope",
                    options=list(SCOPES),
                    default=NEUTRAL.scope,
                    tooltip=(
                        "'step' (neutral): all layers follow the maps of the steps before. 'block' (UNets): the layers behind each "
                        "attention to the words follow that attention's own map in the same call, the others the steps before."
                    ),
                ),
                io.Float.Input(
                    "smoothing",
                    default=NEUTRAL.smoothing,
                    min=0.0,
                    max=SMOOTHEST,
                    step=0.05,
                    tooltip="How much of the map before stays in each step, from 0 (neutral, the last step's alone) to 0.95.",
                ),
                share_input(
                    "start_percent",
                    NEUTRAL.start,
                    "Where in sampling the region begins to be there, from 0 (neutral, as soon as the first step has shown it) to 1.",
                ),
                share_input("end_percent", NEUTRAL.end, "Where in sampling it ceases to be there, from 0 to 1 (neutral, the last step)."),
                share_input(
                    "freeze_percent", NEUTRAL.until, "From where in sampling it stays where it is. 1 (neutral): it follows to the end."
                ),
                mask_input(),
                io.Custom(REGIONS).Input("regions", optional=True, tooltip="The regions so far; they lie above this one."),
                io.Custom(LORA_MODEL).Input("lora", optional=True, tooltip="A LoRA from a training node. lora_name must then be 'none'."),
                io.String.Input(
                    "background",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Phrases of the prompt, one in each line, that are not it: where one is higher, it is not. Neutral: empty.",
                ),
                io.Boolean.Input(
                    "largest",
                    default=NEUTRAL.largest,
                    optional=True,
                    advanced=True,
                    tooltip="Keep its largest connected part only. Neutral: off.",
                ),
                io.Int.Input(
                    "grow",
                    default=NEUTRAL.grown,
                    min=0,
                    max=MOST_GROWN,
                    optional=True,
                    advanced=True,
                    tooltip="By how many cells of the map it reaches further to every side. Neutral: 0.",
                ),
            ],
            outputs=[io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with this one, for Apply Regions.")],
        )

    @classmethod
    def execute(
        cls,
        name,
        phrase,
        lora_name,
        strength_model,
        threshold,
        level,
        scope,
        smoothing,
        start_percent,
        end_percent,
        freeze_percent,
        mask=None,
        regions=None,
        lora=None,
        background="",
        largest=False,
        grow=0,
    ) -> io.NodeOutput:
        check_numbers(strength_model, start_percent, end_percent, strength_name="strength_model")
        check_one_source("lora_name", lora_name, lora)
        for key, value, most in (("level", level, 1.0), ("smoothing", smoothing, SMOOTHEST), ("freeze_percent", freeze_percent, 1.0)):
            if not (math.isfinite(value) and 0.0 <= value <= most):
                raise ValueError(f"{key} is {value:g}. Set it to a number from 0 to {most:g}.")
        regions, mask = regions or Regions(), None if mask is None else checked_mask(mask)
        behind = "\n".join(line.strip() for line in background.splitlines() if line.strip())
        live = Live(
            phrase.strip(), behind, threshold, level, scope, smoothing, start_percent, end_percent, freeze_percent, bool(largest), int(grow)
        )
        region = Region(checked_name(name), COLOURS[len(regions.names()) % len(COLOURS)], live=live)
        regions = regions.with_region(region, mask)
        if lora is not None:
            regions = regions.with_lora(region.name, Hung(CONNECTED, adapters.checked(lora, CONNECTED), strength_model, 0.0))
        elif lora_name != NONE:
            state = adapters.read(files.resolve("loras", lora_name))
            regions = regions.with_lora(region.name, Hung(lora_name, state, strength_model, 0.0))
        return io.NodeOutput(regions)


NODES = [Localize]
