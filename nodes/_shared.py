"""What nodes that put LoRA files on a model share: their inputs, checks and messages."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from comfy_api.latest import io, ui

from ..host import adapters, files
from ..host.dispatcher import attach
from ..host.families import ALL, layer_choices
from ..host.places import Place
from ..ops.schedule import Schedule

NONE = "none"
CONNECTED = "the connected lora"
LORA_MODEL = "LORA_MODEL"
SLIDER_LIMIT = 10.0


class OfFile(io.ComfyNode):
    """A node whose `file` is one of the host's LoRA files: checked before a run, and seen when it changes."""

    @classmethod
    def validate_inputs(cls, file=NONE):
        return check_file(file)

    @classmethod
    def fingerprint_inputs(cls, file=NONE, **_):
        return print_of_file(file)


class OfLoraName(io.ComfyNode):
    """The same, where the host's loaders call it `lora_name`."""

    @classmethod
    def validate_inputs(cls, lora_name=NONE):
        return check_file(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name=NONE, **_):
        return print_of_file(lora_name)


def model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="The model to act on. It is not changed: the output is a copy that acts while it samples.")


def file_input(name: str, tooltip: str) -> io.Combo.Input:
    """A choice of the host's LoRA files, or none."""
    return io.Combo.Input(name, options=[NONE, *files.names("loras")], default=NONE, tooltip=tooltip)


def strength_input(name: str, limit: float, step: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-limit, max=limit, step=step, tooltip=tooltip)


def share_input(name: str, default: float, tooltip: str, **options) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **options)


def window_inputs(start_hint: str = "", **options) -> list[io.Float.Input]:
    """start_percent and end_percent."""
    start = "Where in sampling it begins to act, as a share from 0 (neutral, the first step) to 1." + start_hint
    end = "Where in sampling it stops acting, as a share from 0 to 1 (neutral, the last step)."
    return [share_input("start_percent", 0.0, start, **options), share_input("end_percent", 1.0, end, **options)]


def schedule_input() -> io.String.Input:
    return io.String.Input(
        "schedule",
        default="",
        optional=True,
        tooltip=(
            "How the strength changes in the course of sampling, as share:factor, ... with straight lines between: 0:0, .3:1, 1:.5 grows "
            "from nothing to the strength at 0.3 and falls to half of it. Neutral: empty, the strength as it is."
        ),
    )


def layers_input() -> io.Combo.Input:
    return io.Combo.Input(
        "layers",
        options=layer_choices(),
        default=ALL,
        optional=True,
        tooltip="Which of the file's layers act. Cross-attention reads the words, self-attention and residual layers draw. Neutral: all.",
    )


def mask_input() -> io.Mask.Input:
    return io.Mask.Input(
        "mask",
        optional=True,
        tooltip="Where it acts, white for fully. Any size: it is fitted to the picture. Neutral: not connected, everywhere.",
    )


def comparable_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "comparable",
        default=False,
        optional=True,
        tooltip=(
            "Sliders of different makers at the same strength change the model by the same amount; the report gives the factor. "
            "Neutral: off, the strength is in units of the slider's own training."
        ),
    )


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


def checked_mask(mask):
    """A mask (height, width) in 0..1 from a MASK. Raises ValueError that says what it holds instead."""
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise ValueError(f"mask has the shape {tuple(mask.shape)}. Connect one mask (1, height, width): pick it from a batch first.")
    if not mask.isfinite().all():
        raise ValueError("mask holds NaN or infinity. Connect another mask.")
    return mask.float().clamp(0, 1).cpu()


def check_one_source(file_name: str, file: str, lora) -> None:
    """Raises ValueError where both a file and a connected LoRA are given."""
    if lora is not None and file != NONE:
        raise ValueError(f"Both a file ('{file}') and `lora` are given. Set {file_name} to '{NONE}' to use `lora`, or disconnect `lora`.")


def reason_to_do_nothing(file, strength, start_percent, end_percent, lora=None, mask=None, schedule=None) -> str | None:
    """Why the node has no effect with these inputs, or None if it has one."""
    if file == NONE and lora is None:
        return "no file is chosen and no lora connected"
    if strength == 0.0:
        return "strength is 0"
    if start_percent == end_percent:
        return f"start_percent and end_percent are both {start_percent:g}, so no step lies between them"
    if mask is not None and not mask.any():
        return "the mask is empty"
    if schedule is not None and schedule.silent():
        return f"the schedule {schedule} is 0 throughout"
    return None


class Hanging(NamedTuple):
    """How a LoRA is to act, as the nodes' inputs say it. strength_name: what the node calls the strength."""

    strength: float
    start_percent: float
    end_percent: float
    schedule: str = ""
    layers: str = ALL
    comparable: bool = False
    mask: torch.Tensor | None = None
    text: str = "own"
    strength_name: str = "strength"

    def put(
        self, model, kind: str, file_name: str, file: str, lora=None, label: str = CONNECTED, make=adapters.AdapterEffect
    ) -> tuple[Any, list[str]]:
        """A clone of MODEL with the file, or the LoRA given as tensors, on it, and report lines; the model itself where nothing is to be
        done. `kind` is what reports call it, `file_name` what the node calls its file, `label` what a LoRA given as tensors is called;
        `make` makes the effect.
        Raises ValueError, AdapterError, MissingFile and UnsupportedFamily.
        """
        check_numbers(self.strength, self.start_percent, self.end_percent, self.strength_name)
        check_one_source(file_name, file, lora)
        schedule, mask = Schedule.parse(self.schedule), None if self.mask is None else checked_mask(self.mask)
        idle = reason_to_do_nothing(file, self.strength, self.start_percent, self.end_percent, lora, mask, schedule)
        if idle is not None:
            return model, [f"Nothing done: {idle}. The model passes through unchanged."]

        label = file if lora is None else label
        state = adapters.read(files.resolve("loras", file)) if lora is None else adapters.checked(lora, label)
        placement = adapters.place(model, state, label, self.layers)
        strength, factor = self.strength, f"at strength {self.strength:g}"
        if self.comparable:
            strength *= placement.to_comparable()
            factor += f" in comparable units ({strength:.3g} in its own)"
        model = model.clone()
        effect = make(f"{kind} '{label}' at {self.strength:g}", placement.parts, strength, self.start_percent, self.end_percent, schedule)
        if mask is not None:
            effect.place, effect.text = Place(mask), self.text
        attach(model, effect)
        where = "everywhere" if mask is None else f"on {float(mask.mean()):.0%} of the picture"
        when = describe_window(self.start_percent, self.end_percent) + (f", times {schedule} over sampling" if schedule else "")
        return model, [f"'{label}' {factor}, {where}, {when}.", placement.report]


def describe_window(start_percent: float, end_percent: float) -> str:
    return "in all steps" if (start_percent, end_percent) == (0.0, 1.0) else f"from {start_percent:g} to {end_percent:g} of sampling"


def result(model, report: str) -> io.NodeOutput:
    return io.NodeOutput(model, report, ui=ui.PreviewText(report))
