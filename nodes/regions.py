"""Regions: what acts on one part of the picture only."""

from __future__ import annotations

from comfy_api.latest import io

from ..host import adapters, files
from ..host.dispatcher import attach
from ..host.places import Place
from .sliders import NONE, check_numbers, describe_window, reason_to_do_nothing, result

LIMIT = 100.0
TEXTS = ("own", "none", "all")


class MaskedLoRA(io.ComfyNode):
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
                io.Model.Input("model", tooltip="The model to act on. It is not changed: the output is a copy that acts while it samples."),
                io.Combo.Input(
                    "lora_name",
                    options=[NONE, *files.names("loras")],
                    default=NONE,
                    tooltip="A LoRA file for the model's family, from models/loras. 'none' (neutral) does nothing.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-LIMIT,
                    max=LIMIT,
                    step=0.01,
                    tooltip="How strongly it acts: 1 as trained, negative the other way, 0 (neutral) not at all.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling it begins to act, as a share from 0 (neutral, the first step) to 1.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in sampling it stops acting, as a share from 0 to 1 (neutral, the last step).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where it acts, white for fully. Any size: it is fitted to the picture. Neutral: not connected, everywhere.",
                ),
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
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with the LoRA on it."),
                io.String.Output("report", display_name="report", tooltip="What was placed where, what was not and why, and the window."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name=NONE):
        try:
            return lora_name in (NONE, None) or bool(files.resolve("loras", lora_name))
        except files.MissingFile as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, lora_name=NONE, **_):
        return NONE if lora_name in (NONE, None) else files.fingerprint("loras", lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength_model, start_percent, end_percent, mask=None, text="own") -> io.NodeOutput:
        check_numbers(strength_model, start_percent, end_percent, strength_name="strength_model")
        mask = None if mask is None else checked_mask(mask)
        idle = reason_to_do_nothing(lora_name, strength_model, start_percent, end_percent, None)
        if idle is None and mask is not None and not mask.any():
            idle = "the mask is empty"
        if idle is not None:
            return result(model, f"Nothing done: {idle}. The model passes through unchanged.")
        placement = adapters.place(model, adapters.read(files.resolve("loras", lora_name)), lora_name)
        model = model.clone()
        where = "everywhere" if mask is None else f"on {float(mask.mean()):.0%} of the picture"
        effect = adapters.AdapterEffect(
            f"LoRA '{lora_name}' at {strength_model:g}", placement.parts, strength_model, start_percent, end_percent
        )
        if mask is not None:
            effect.place, effect.text = Place(mask), text
        attach(model, effect)
        told = f"'{lora_name}' at strength {strength_model:g}, {where}, {describe_window(start_percent, end_percent)}."
        return result(model, f"{told}\n{placement.report}")


def checked_mask(mask):
    """A mask (height, width) in 0..1 from a MASK. Raises ValueError that says what it holds instead."""
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise ValueError(f"mask has the shape {tuple(mask.shape)}. Connect one mask (1, height, width): pick it from a batch first.")
    if not mask.isfinite().all():
        raise ValueError("mask holds NaN or infinity. Connect another mask.")
    return mask.float().clamp(0, 1).cpu()


NODES = [MaskedLoRA]
