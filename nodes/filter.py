"""Keep concepts out of a prompt, at any CFG."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import filter as host_filter
from ..host.dispatcher import attach
from ..host.filter import METHODS, ORDERS, OURS, OWN, ROWS, SWITCH, FilterError, Settings, keep_out, listed
from ..host.reattention import Taken, reattention
from ._shared import NONE, check_numbers, describe_window, model_input, model_outputs, result, share_input, window_inputs

# Lists to begin with. Copy one into `concepts` to change it: the report shows what was used.
PRESETS = {
    "nudity": ("nudity", "naked body", "bare breasts", "genitals", "sexual act", "pornography", "erotic pose"),
    "violence": ("blood", "gore", "open wound", "corpse", "fight", "weapon", "torture"),
    "lettering": ("text", "letters", "watermark", "signature", "logo", "caption"),
}


def wish_inputs() -> list:
    """What to keep out, by which method and how much of it."""
    return [
        io.String.Input(
            "concepts",
            multiline=True,
            default="",
            tooltip="What to keep out, one concept in each line, as short as it can be said. Neutral: empty, nothing is kept out.",
        ),
        io.Combo.Input(
            "preset",
            options=[NONE, *PRESETS],
            default=NONE,
            tooltip="Concepts to add to yours; the report lists them. To change a list, copy it into `concepts`. Neutral: none.",
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default=OURS,
            tooltip=(
                "'ours': the words that bring a concept are left out, and what they brought is taken out of every row. 'paper': "
                "their rows are projected as SAFREE is published. 'released_code': as its released code does."
            ),
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How much of it is done. 1 as the method means it, 0 (neutral) nothing.",
        ),
    ]


def fine_inputs() -> list:
    """How the methods go about it."""
    return [
        io.Float.Input(
            "push",
            default=0.5,
            min=0.0,
            max=2.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip=(
                "ours: how far beyond leaving the words out it goes, so that the model does not choose the concept by itself. "
                "0: the prompt without them."
            ),
        ),
        io.Float.Input(
            "gate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            advanced=True,
            tooltip=(
                f"How much of a concept a word must bring to be flagged (ours, usually {host_filter.GATE:g}), or how near to "
                "one the prompt must be (published methods, which have none). With ours, what several words must bring together grows with "
                "it. 0: as the method does. Higher leaves more alone."
            ),
        ),
        io.Float.Input(
            "alpha",
            default=0.01,
            min=0.0,
            max=0.2,
            step=0.005,
            optional=True,
            advanced=True,
            tooltip="paper, released_code: by what share a word must stand out among the others to be flagged. Published: 0.01.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDERS),
            default=OWN,
            optional=True,
            advanced=True,
            tooltip=(
                "paper, released_code: which projection comes last. 'concepts last' leaves nothing of them, 'prompt last' stays "
                "among what the prompt can say, 'concepts only' changes least."
            ),
        ),
        io.Combo.Input(
            "rows",
            options=list(ROWS),
            default=OWN,
            optional=True,
            advanced=True,
            tooltip="Which rows may change. The end and the padding sum the words up. Ours: all; published: the words'.",
        ),
    ]


def validating_input() -> io.Combo.Input:
    return io.Combo.Input(
        "self_validating",
        options=list(SWITCH),
        default=OWN,
        optional=True,
        advanced=True,
        tooltip=(
            "Whether the end of the window follows from how much the filter changes, in steps of 50 as published. Ours: off; published: on."
        ),
    )


def wanted_out(concepts: str, preset: str) -> list[str]:
    """The concepts of both inputs. Raises FilterError where there are too many."""
    return listed("\n".join([concepts, *PRESETS.get(preset, ())]))


class Filter(io.ComfyNode):
    """A prompt's conditioning without what its words bring of unwanted concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Filter",
            display_name="Keep Concept Out",
            category="concept/filter",
            description=(
                "Encodes a prompt without what its words bring of unwanted concepts. No training, no weights touched, no model call added, "
                "and it works at CFG 1, where negative prompts do nothing. By our method, what brings none of them stays as it is."
            ),
            search_aliases=[
                "negative prompt",
                "SAFREE",
                "concept erasure",
                "safety filter",
                "remove concept",
                "CFG 1",
                "censor",
                "block words",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that the model reads."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
                *wish_inputs(),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "The same text, encoded by the same CLIP, with areas, masks or ControlNets: they are kept. Neutral: not "
                        "connected, the text is encoded here."
                    ),
                ),
                *fine_inputs(),
                io.Combo.Input(
                    "pooled",
                    options=list(SWITCH),
                    default=OWN,
                    optional=True,
                    advanced=True,
                    tooltip="Whether the pooled vector is filtered, too (SDXL, SD 3 and Flux read it). Ours: on; published: off.",
                ),
                validating_input(),
                *window_inputs(optional=True, advanced=True),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="The prompt without the concepts, for the sampler."),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="The concepts as a negative prompt, to be used as well or not: what it does is no part of the filter.",
                ),
                io.String.Output("report", display_name="report", tooltip="Which words were flagged and why, what was changed, and when."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        clip,
        text,
        concepts,
        preset,
        method,
        strength,
        conditioning=None,
        push=0.5,
        gate=0.0,
        alpha=0.01,
        order=OWN,
        rows=OWN,
        pooled=OWN,
        self_validating=OWN,
        start_percent=0.0,
        end_percent=1.0,
    ) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        if clip is None:
            raise FilterError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
        wanted = wanted_out(concepts, preset)
        settings = Settings(method, strength, push, gate, alpha, order, rows, pooled, self_validating, start_percent, end_percent)
        done = keep_out(clip, text, wanted, settings, conditioning)
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(", ".join(wanted)))
        lines = [f"Kept out: {', '.join(wanted)}."] if wanted else []
        lines += done.report
        if done.window:
            lines.append(f"It acts {describe_window(*done.window)}.")
        report = "\n".join(lines)
        return io.NodeOutput(done.conditioning, negative, report, ui=ui.PreviewText(report))


class FilterReattention(io.ComfyNode):
    """Features that the filtered prompt brings more of than the original one, held down."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_FilterReattention",
            display_name="Latent Re-attention",
            category="concept/filter",
            description=(
                "SAFREE's second branch, for UNets: coarse features that the filtered prompt brings more of than the prompt did before the "
                "filter are held down in the skip connections. It costs one more model call for each one of the positive prompt. Try Keep "
                "Concept Out alone first: on the lab's model this added nothing to it that could be told from chance."
            ),
            search_aliases=["SAFREE", "latent re-attention", "FreeU", "skip connections", "concept erasure", "Fourier"],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "original",
                    tooltip="The prompt before the filter, encoded as ever. Where the sampler's positive is the same, nothing is done.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much is taken, times `deep` and `middle`. 1 as published, 0 (neutral) nothing.",
                ),
                *window_inputs(),
                share_input(
                    "deep",
                    0.1,
                    "What is taken of a frequency that exceeds, where features are widest (1280 in SD 1.5). Published: 0.1. Neutral: 0.",
                    optional=True,
                    advanced=True,
                ),
                share_input(
                    "middle",
                    0.8,
                    "The same where features are half as wide (640 in SD 1.5). Published: 0.8. Neutral: 0.",
                    optional=True,
                    advanced=True,
                ),
                io.Int.Input(
                    "radius",
                    default=1,
                    min=0,
                    max=8,
                    optional=True,
                    advanced=True,
                    tooltip="How many periods across the picture still count as coarse. Published: 1, not all of them. 0: the mean alone.",
                ),
            ],
            outputs=model_outputs("The model that holds these features down while it samples."),
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, original, strength, start_percent, end_percent, deep=0.1, middle=0.8, radius=1) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        idle = Settings(strength=strength, start_percent=start_percent, end_percent=end_percent).idle(["anything"])
        taken = Taken(deep, middle, radius)
        effect, told = (None, idle) if idle else reattention(model.model, original, strength, taken, start_percent, end_percent)
        if effect is None:
            return result(model, f"Nothing done: {told}. The model passes through unchanged.")
        model = model.clone()
        attach(model, effect)
        return result(model, f"{told} It acts {describe_window(start_percent, end_percent)}.")


NODES = [Filter, FilterReattention]
