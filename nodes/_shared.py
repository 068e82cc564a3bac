"""What nodes that put LoRA files on a model share: their inputs, checks and messages."""

from __future__ import annotations

import math

from comfy_api.latest import io, ui

from ..host import files

NONE = "none"
LORA_MODEL = "LORA_MODEL"


def model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="The model to act on. It is not changed: the output is a copy that acts while it samples.")


def file_input(name: str, tooltip: str) -> io.Combo.Input:
    """A choice of the host's LoRA files, or none."""
    return io.Combo.Input(name, options=[NONE, *files.names("loras")], default=NONE, tooltip=tooltip)


def strength_input(name: str, limit: float, step: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-limit, max=limit, step=step, tooltip=tooltip)


def share_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def window_inputs(start_hint: str = "") -> list[io.Float.Input]:
    """start_percent and end_percent."""
    start = "Where in sampling it begins to act, as a share from 0 (neutral, the first step) to 1." + start_hint
    return [
        share_input("start_percent", 0.0, start),
        share_input("end_percent", 1.0, "Where in sampling it stops acting, as a share from 0 to 1 (neutral, the last step)."),
    ]


def model_outputs(model_tooltip: str) -> list:
    return [
        io.Model.Output("model", display_name="model", tooltip=model_tooltip),
        io.String.Output("report", display_name="report", tooltip="What was placed where, what was not and why, and the window."),
    ]


def check_file(file: str | None) -> bool | str:
    """For validate_inputs: True, or why a chosen file cannot be used.

    Only the file: the host repeats a message for every input named there, and drops its own checks of them. It checks the ranges of numbers
    itself; what it lets through (NaN, a window that ends before it starts, linked values, which are None there) is refused by execute.
    """
    try:
        return file in (NONE, None) or bool(files.resolve("loras", file))
    except files.MissingFile as error:
        return str(error)


def print_of_file(file: str | None) -> str:
    """For fingerprint_inputs: changes with the file's contents."""
    return NONE if file in (NONE, None) else files.fingerprint("loras", file)


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


def check_one_source(file_name: str, file: str, lora) -> None:
    """Raises ValueError where both a file and a connected LoRA are given."""
    if lora is not None and file != NONE:
        raise ValueError(f"Both a file ('{file}') and `lora` are given. Set {file_name} to '{NONE}' to use `lora`, or disconnect `lora`.")


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
