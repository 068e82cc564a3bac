"""Sliders: a concept turned up or down by one number."""

from __future__ import annotations

import json
from collections.abc import Sequence

from comfy_api.latest import io, ui

from ..host import adapters, files
from ..host.dispatcher import attach
from ..host.families import ALL, family_of
from ..host.poles import GuideEffect, Pole, Poles, windowed
from ..host.sheet import lay_out
from ..ops.schedule import Schedule
from ._shared import (
    CONNECTED,
    LORA_MODEL,
    NONE,
    SLIDER_LIMIT,
    Hanging,
    OfFile,
    check_numbers,
    check_one_source,
    comparable_input,
    describe_window,
    file_input,
    layers_input,
    mask_input,
    model_input,
    model_outputs,
    reason_to_do_nothing,
    result,
    schedule_input,
    strength_input,
    window_inputs,
)


class Slider(OfFile):
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
        idle = reason_to_do_nothing("", strength, start_percent, end_percent, schedule=times)
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
        return shown(model, positive, f"{told} One model call is added to each step in which it acts (two where memory is short).")


def shown(model, positive, report: str) -> io.NodeOutput:
    return io.NodeOutput(model, positive, report, ui=ui.PreviewText(report))


MOST_STEPS = 64
FEW = 5


class SliderSweep(OfFile):
    """One slider at many strengths: lists of models and labels that the host's samplers go through."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SliderSweep",
            display_name="Slider Sweep",
            category="concept/sliders",
            description=(
                "One slider at many strengths. Everything behind it runs once for each, with the same seed: connect the sampler as usual "
                "and gather the pictures with Sheet."
            ),
            search_aliases=["XY plot", "slider grid", "strength sweep", "compare"],
            inputs=[
                model_input(),
                file_input("file", "The slider: a LoRA file for the model's family, from models/loras."),
                io.String.Input(
                    "strengths",
                    default="-2, -1, 0, 1, 2",
                    tooltip=f"The strengths, with commas between. Neutral: empty, {FEW} over the range that the file names for itself.",
                ),
                *window_inputs(" Later keeps the layout."),
                io.Custom(LORA_MODEL).Input("lora", optional=True, tooltip="A LoRA from a training node. file must then be 'none'."),
                schedule_input(),
                layers_input(),
                comparable_input(),
                mask_input(),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="A model for each strength.", is_output_list=True),
                io.String.Output("label", display_name="label", tooltip="A label for each, for Sheet.", is_output_list=True),
                io.Float.Output("strength", display_name="strength", tooltip="Each strength as a number.", is_output_list=True),
                io.String.Output("report", display_name="report", tooltip="What was placed where, and the strengths."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, file, strengths, start_percent, end_percent, lora=None, schedule="", layers=ALL, comparable=False, mask=None
    ) -> io.NodeOutput:
        check_one_source("file", file, lora)
        told, label = {}, CONNECTED
        if file != NONE:
            path = files.resolve("loras", file)
            told, label, lora = adapters.about(path), file, adapters.read(path)  # once for all strengths
        listed = listed_strengths(strengths, told.get("range"))
        poles = told.get("poles", [])
        swept, report = [], []
        for strength in listed:
            hanging = Hanging(strength, start_percent, end_percent, schedule, layers, comparable, mask)
            slid, lines = hanging.put(model, "Slider", "file", NONE, lora, label)
            swept.append(slid)
            report = lines if strength else report or lines
        labels = labelled(listed, poles)
        text = "\n".join([f"{len(listed)} strengths: {', '.join(f'{strength:g}' for strength in listed)}.", *report])
        return io.NodeOutput(swept, labels, listed, text, ui=ui.PreviewText(text))


def labelled(strengths: Sequence[float], poles: Sequence[str]) -> list[str]:
    """Strengths as text, the outermost with the pole that they turn to."""
    ends = {}
    if len(poles) == 2 and min(strengths) < 0:
        ends[min(strengths)] = poles[0]
    if len(poles) == 2 and max(strengths) > 0:
        ends[max(strengths)] = poles[1]
    return [f"{strength:+g} {ends.get(strength, '')}".strip() if strength else "0" for strength in strengths]


def listed_strengths(text: str, own: Sequence[float] | None) -> list[float]:
    """Strengths from a text, or a few over a file's own range. Raises ValueError that names what cannot be read."""
    if not text.strip():
        low, high = own or (-2.0, 2.0)
        return [low + (high - low) * step / (FEW - 1) for step in range(FEW)]
    listed = []
    for part in text.replace("\n", ",").replace(";", ",").split(","):
        if not part.strip():
            continue
        try:
            number = float(part)
        except ValueError:
            raise ValueError(f"strengths holds '{part.strip()}', which is no number. Write numbers with commas between.") from None
        if not abs(number) <= SLIDER_LIMIT:
            raise ValueError(f"strengths holds {number:g}. Write numbers from -{SLIDER_LIMIT:g} to {SLIDER_LIMIT:g}.")
        listed.append(number)
    if not listed:
        raise ValueError("strengths holds no number. Write numbers with commas between, or empty it.")
    if len(listed) > MOST_STEPS:
        raise ValueError(f"strengths holds {len(listed)} numbers, and {MOST_STEPS} is the most. Write fewer.")
    return listed


class Sheet(io.ComfyNode):
    """Pictures side by side under their labels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Sheet",
            display_name="Sheet",
            category="concept/sliders",
            description=(
                "Lays the pictures of a list on one page, a column for each under its label and a row for each picture of its batch. For "
                "Slider Sweep, and for any other list of pictures."
            ),
            search_aliases=["XY plot", "contact sheet", "image grid", "comparison", "labelled grid"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures: a list, or one batch, whose pictures are then a column each."),
                io.String.Input("labels", default="", force_input=True, optional=True, tooltip="A label for each. Neutral: 1, 2, 3, ..."),
                io.String.Input("title", default="", tooltip="A line above. Neutral: empty."),
                io.Int.Input("side", default=256, min=32, max=4096, step=8, tooltip="Pixels of each picture's longer side on the page."),
                io.Int.Input("columns", default=0, min=0, max=256, tooltip="Columns side by side before a new band. Neutral: 0, all."),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The page."),
                io.String.Output("json", display_name="json", tooltip="Where each label's pictures lie on the page, in pixels."),
            ],
        )

    @classmethod
    def execute(cls, images, title, side, columns, labels=None) -> io.NodeOutput:
        title, side, columns = title[0], side[0], columns[0]
        batches = [batch if batch.ndim == 4 else batch[None] for batch in images]
        labels = [str(label) for label in labels or ()]
        if len(batches) == 1 and len(labels) != 1:
            batches = list(batches[0].split(1))
        labels = labels or [str(number) for number in range(1, len(batches) + 1)]
        if not batches:
            raise ValueError("images holds no picture. Connect at least one.")
        if len(labels) != len(batches):
            raise ValueError(f"There are {len(labels)} labels for {len(batches)} columns. Connect both from the same list, or no labels.")
        made = lay_out(batches, labels, title, side, columns)
        placed = json.dumps({"title": title, "size": [made.page.shape[2], made.page.shape[1]], "columns": made.columns})
        return io.NodeOutput(made.page, placed, ui=ui.PreviewImage(made.page, cls=cls))


NODES = [Slider, SliderPrompts, SliderSweep, Sheet]
