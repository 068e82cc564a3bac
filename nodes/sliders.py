"""Sliders: a concept turned up or down by one number."""

from __future__ import annotations

import math

from comfy_api.latest import io, ui

from ..host import adapters, files
from ..host.dispatcher import attach
from ..host.families import family_of

NONE = "none"
LIMIT = 10.0


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
                io.Model.Input("model", tooltip="The model to act on. It is not changed: the output is a copy that acts while it samples."),
                io.Combo.Input(
                    "file",
                    options=[NONE, *files.names("loras")],
                    default=NONE,
                    tooltip="The slider: a LoRA file for the model's family, from models/loras. 'none' (neutral) does nothing by itself.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-LIMIT,
                    max=LIMIT,
                    step=0.05,
                    tooltip="How far to turn, in units of its training: 1 as trained, negative the other way, 0 (neutral) not at all.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling it begins to act, as a share from 0 (neutral, the first step) to 1. Later keeps the layout.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling it stops acting, as a share from 0 to 1 (neutral, the last step).",
                ),
                io.Custom("LORA_MODEL").Input(
                    "lora",
                    optional=True,
                    tooltip="A LoRA straight from a training node, in place of `file`, which must then be 'none'. Neutral: not connected.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with the slider on it."),
                io.String.Output("report", display_name="report", tooltip="What was placed where, what was not and why, and the window."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, file=NONE):
        # Only the file: the host repeats a message for every input named here, and drops its own checks of them. It checks the ranges of
        # the numbers itself; what it lets through (NaN, a window that ends before it starts, linked values, which are None here) is
        # refused by execute.
        try:
            return file in (NONE, None) or bool(files.resolve("loras", file))
        except files.MissingFile as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file=NONE, **_):
        return NONE if file in (NONE, None) else files.fingerprint("loras", file)

    @classmethod
    def execute(cls, model, file, strength, start_percent, end_percent, lora=None) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        if lora is not None and file != NONE:
            raise ValueError(f"Both a file ('{file}') and `lora` are given. Set file to '{NONE}' to use `lora`, or disconnect `lora`.")
        idle = reason_to_do_nothing(file, strength, start_percent, end_percent, lora)
        if idle is not None:
            return result(model, f"Nothing done: {idle}. The model passes through unchanged.")

        label = file if lora is None else "the connected lora"
        state = adapters.read(files.resolve("loras", file)) if lora is None else adapters.checked(lora, label)
        placement = adapters.place(model, state, label)
        model = model.clone()
        name = f"Slider '{label}' at {strength:g}"
        attach(model, adapters.AdapterEffect(name, placement.parts, strength, start_percent, end_percent))
        lines = [f"'{label}' at strength {strength:g}, {describe_window(start_percent, end_percent)}.", placement.report]
        usual = family_of(model.model).slider_start
        if start_percent == 0.0:
            lines.append(f"To keep more of the layout, start later: {usual:g} is usual for {family_of(model.model).name}.")
        return result(model, "\n".join(lines))


def check_numbers(strength: float, start_percent: float, end_percent: float, strength_name: str = "strength") -> None:
    """Raises ValueError that names the number that cannot be worked with."""
    for name, value, neutral in ((strength_name, strength, 0), ("start_percent", start_percent, 0), ("end_percent", end_percent, 1)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, which is no number to work with. Set it to a finite number; {neutral} is neutral.")
    for name, value in (("start_percent", start_percent), ("end_percent", end_percent)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value:g}. Set it to a share of sampling from 0 to 1.")
    if start_percent > end_percent:
        raise ValueError(f"start_percent {start_percent:g} lies after end_percent {end_percent:g}: no step is in the window. Swap the two.")


def reason_to_do_nothing(file, strength, start_percent, end_percent, lora) -> str | None:
    """Why the node has no effect with these inputs, or None if it has one."""
    if file == NONE and lora is None:
        return "no file is chosen and no lora connected"
    if strength == 0.0:
        return "strength is 0"
    if start_percent == end_percent:
        return f"start_percent and end_percent are both {start_percent:g}, so no step lies between them"
    return None


def describe_window(start_percent: float, end_percent: float) -> str:
    return "in all steps" if (start_percent, end_percent) == (0.0, 1.0) else f"from {start_percent:g} to {end_percent:g} of sampling"


def result(model, report: str) -> io.NodeOutput:
    return io.NodeOutput(model, report, ui=ui.PreviewText(report))


NODES = [Slider]
