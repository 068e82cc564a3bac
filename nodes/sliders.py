"""Sliders: a concept turned up or down by one number."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.families import ALL, family_of
from ._shared import (
    LORA_MODEL,
    NONE,
    SLIDER_LIMIT,
    Hanging,
    check_file,
    comparable_input,
    file_input,
    layers_input,
    mask_input,
    model_input,
    model_outputs,
    print_of_file,
    result,
    schedule_input,
    strength_input,
    window_inputs,
)


class Slider(io.ComfyNode):
    """A slider LoRA on a model, at a strength and within a window, without touching the model's weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Slider",
            display_name="Concept Slider",
            category="concept/sliders",
            description=(
                "Turns one concept up or down with a slider LoRA, in a window of the sampling steps. Weights are not changed, so moving "
                "the strength reloads nothing. Strength 0 is exactly the model without the node. Chain several for several concepts."
            ),
            search_aliases=["slider", "concept slider", "LECO", "LoRA", "strength", "attribute", "age", "LoRA schedule", "start step"],
            inputs=[
                model_input(),
                file_input(
                    "file", "The slider: a LoRA file for the model's family, from models/loras. 'none' (neutral) does nothing by itself."
                ),
                strength_input(
                    "strength",
                    SLIDER_LIMIT,
                    0.05,
                    "How far to turn, in units of its training: 1 as trained, negative the other way, 0 (neutral) not at all.",
                ),
                *window_inputs(" Later keeps the layout."),
                io.Custom(LORA_MODEL).Input(
                    "lora",
                    optional=True,
                    tooltip="A LoRA straight from a training node, in place of `file`, which must then be 'none'. Neutral: not connected.",
                ),
                schedule_input(),
                layers_input(),
                comparable_input(),
                mask_input(),
            ],
            outputs=model_outputs("The model with the slider on it."),
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, file=NONE):
        return check_file(file)

    @classmethod
    def fingerprint_inputs(cls, file=NONE, **_):
        return print_of_file(file)

    @classmethod
    def execute(
        cls, model, file, strength, start_percent, end_percent, lora=None, schedule="", layers=ALL, comparable=False, mask=None
    ) -> io.NodeOutput:
        hanging = Hanging(strength, start_percent, end_percent, schedule, layers, comparable, mask)
        slid, lines = hanging.put(model, "Slider", "file", file, lora)
        usual = family_of(model.model).slider_start if slid is not model and start_percent == 0.0 else 0.0
        if usual:
            lines.append(f"To keep more of the layout, start later: {usual:g} is usual for {family_of(model.model).name}.")
        return result(slid, "\n".join(lines))


NODES = [Slider]
