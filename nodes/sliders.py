"""Sliders: a concept turned up or down by one number."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.dispatcher import attach
from ..host.families import ALL, family_of
from ..host.poles import GuideEffect, Pole, Poles, windowed
from ..ops.schedule import Schedule
from ._shared import (
    LORA_MODEL,
    NONE,
    SLIDER_LIMIT,
    Hanging,
    check_file,
    check_numbers,
    comparable_input,
    describe_window,
    file_input,
    layers_input,
    mask_input,
    model_input,
    model_outputs,
    print_of_file,
    reason_to_do_nothing,
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


EMBEDDING, GUIDANCE = "embedding", "guidance"


class SliderPrompts(io.ComfyNode):
    """A slider between two prompts, with no training and no file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SliderPrompts",
            display_name="Slider from Prompts",
            category="concept/sliders",
            description=(
                "Turns a concept up or down along the way between two prompts, with no training and no file. On the prompt's embedding it "
                "costs nothing and works at CFG 1; as guidance it adds one model call to each step."
            ),
            search_aliases=["training-free slider", "FreeSliders", "concept slider", "embedding interpolation", "edit direction"],
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="The prompt whose picture is slid."),
                io.Conditioning.Input("more", tooltip="The same prompt with words for more of the concept, from the same encoder."),
                io.Conditioning.Input("less", tooltip="The same prompt with as many words for less of the concept."),
                io.Combo.Input(
                    "form",
                    options=[EMBEDDING, GUIDANCE],
                    default=EMBEDDING,
                    tooltip=(
                        "'embedding': the prompt goes the way between the two, row by row; no cost. 'guidance': the model's prediction "
                        "goes the way between its predictions for the two; one more model call in each step."
                    ),
                ),
                strength_input(
                    "strength",
                    SLIDER_LIMIT,
                    0.05,
                    "How far to turn. embedding: 1 is `more` and -1 is `less` for a prompt half way between; guidance: times the whole "
                    "difference. 0 (neutral): not at all.",
                ),
                *window_inputs(" Later keeps the layout."),
                schedule_input(),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with the guidance on it; with 'embedding' as it came."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="The prompt, slid; with 'guidance' as it came."),
                io.String.Output("report", display_name="report", tooltip="What was done, when, and what it costs."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, positive, more, less, form, strength, start_percent, end_percent, schedule="") -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        family_of(model.model)
        times, poles = Schedule.parse(schedule), Poles(Pole.of("more", more), Pole.of("less", less))
        if times is not None and form == EMBEDDING:
            raise ValueError(f"A schedule needs the form '{GUIDANCE}': a prompt is read once. Choose that form, or empty the schedule.")
        idle = reason_to_do_nothing("", strength, start_percent, end_percent)
        if poles.same():
            idle = idle or "more and less are the same"
        if idle is not None:
            return shown(model, positive, f"Nothing done: {idle}. Model and prompt pass through unchanged.")
        when = describe_window(start_percent, end_percent)
        if form == EMBEDDING:
            slid = poles.slid(positive, strength)
            if (start_percent, end_percent) != (0.0, 1.0):
                slid = windowed(positive, slid, start_percent, end_percent)
            return shown(model, slid, f"The prompt slid {strength:g} along the way from less to more, {when}. No model call is added.")
        effect = GuideEffect(f"Guidance from less to more at {strength:g}", poles, strength, start_percent, end_percent, times)
        model = model.clone()
        attach(model, effect)
        effect.hang(model)
        along = f", times {times} over sampling" if times else ""
        told = f"Predictions go {strength:g} times the way from less to more, {when}{along}."
        return shown(model, positive, f"{told} One model call is added to each step (two where memory is short).")


def shown(model, positive, report: str) -> io.NodeOutput:
    return io.NodeOutput(model, positive, report, ui=ui.PreviewText(report))


NODES = [Slider, SliderPrompts]
