"""See where the model put each word."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..host import capture, maps, words
from ..host.dispatcher import attach
from ..host.maps import ARGMAX, FINEST, PEAK, THRESHOLDS, MapsError, Settings
from ..ops.overlay import overlay
from ._shared import check_numbers, describe_window, model_input, result, share_input, window_inputs


def _lines(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


class Capture(io.ComfyNode):
    """Reads the model's attention to words while a picture is sampled, and changes nothing in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Capture",
            display_name="Capture Attention",
            category="concept/attention",
            description=(
                "Keeps what each place of the picture attends to in the prompt while any sampler samples it. The picture stays the same "
                "bit for bit, and no model call is added. Maps of Words, behind the sampler, draws where each word is."
            ),
            search_aliases=["attention map", "DAAM", "heatmap", "cross attention", "ConceptAttention", "token map", "segmentation"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "layers",
                    options=[capture.DEFAULT, capture.ALL],
                    default=capture.DEFAULT,
                    tooltip=(
                        "Which attentions are read. 'default': of UNets all but those on the coarsest grid, of Flux the last fifth of the "
                        "double blocks. 'all': every one, which takes more time and memory. Neutral: default."
                    ),
                ),
                *window_inputs(),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Flux only: concepts, one in each line, that travel beside the prompt and are found in the picture whether the "
                        "prompt names them or not (ConceptAttention). Needs clip. Neutral: empty, the prompt's own words alone."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder that reads `concepts`. Neutral: not connected.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model, captured while it samples."),
                io.String.Output("report", display_name="report", tooltip="Which layers are read, and when."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, layers, start_percent, end_percent, concepts="", clip=None) -> io.NodeOutput:
        check_numbers(1.0, start_percent, end_percent)
        names = capture.layers_of(model.model, layers)
        if start_percent == end_percent:
            return result(model, f"Nothing done: start_percent and end_percent are both {start_percent:g}. The model passes through.")
        listed = _lines(concepts)
        encoded = maps.encode_concepts(model.model, clip, listed) if listed else None
        model = model.clone()
        attach(model, capture.CaptureEffect(model.model, names, start_percent, end_percent, listed, encoded))
        lines = [f"{len(names)} attentions to words are read {describe_window(start_percent, end_percent)}. The picture stays the same."]
        if listed:
            lines.append(f"Beside the prompt: {', '.join(listed)}.")
        return result(model, "\n".join(lines))


class Maps(io.ComfyNode):
    """Where words of the prompt are in a sampled picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Maps",
            display_name="Maps of Words",
            category="concept/attention",
            description=(
                "Draws where the model put each phrase of the prompt, as masks and as colours over the picture, from what Capture "
                "Attention kept. Its settings can be changed without sampling again."
            ),
            search_aliases=["attention map", "DAAM", "heatmap", "word mask", "text to mask", "segment", "saliency", "ConceptAttention"],
            inputs=[
                io.Latent.Input("latent", tooltip="The latent as it leaves the sampler (either output), with Capture Attention before it."),
                io.Clip.Input("clip", tooltip="The text encoder of the prompt: it tells which tokens are whose."),
                io.String.Input("text", multiline=True, default="", tooltip="The positive prompt, as it was sampled."),
                io.String.Input(
                    "phrases",
                    multiline=True,
                    default="",
                    tooltip=(
                        "What to find, one phrase in each line, as it is written in the prompt. Longer ones are found better: 'red heart "
                        "on the left'. A word that occurs more than once: 'heart #2' is its second place. Empty draws nothing."
                    ),
                ),
                io.Image.Input("image", optional=True, tooltip="The decoded picture, below the colours. Neutral: not connected, black."),
                io.String.Input(
                    "background",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "Phrases of the prompt that stand for the background, one in each line: where one of them is stronger, nothing "
                        "else is. Neutral: empty."
                    ),
                ),
                io.Combo.Input(
                    "source",
                    options=[capture.ATTENTION, capture.CONCEPTS],
                    default=capture.ATTENTION,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "'attention': to the prompt's words. 'concepts': those that travelled beside the prompt (Flux, `concepts` of "
                        "Capture Attention); phrases are then their names. Neutral: attention."
                    ),
                ),
                io.Combo.Input(
                    "grids",
                    options=[FINEST, maps.ALL],
                    default=FINEST,
                    optional=True,
                    advanced=True,
                    tooltip="Of a UNet's captured layers, those on the finest grid, or all (softer). No difference for Flux.",
                ),
                share_input(
                    "start_percent",
                    0.5,
                    "From where in sampling maps are taken, in tenths of it. Early steps are blurred. Neutral: 0, from the first step.",
                    optional=True,
                ),
                share_input("end_percent", 1.0, "Up to where in sampling, in tenths of it. Neutral: 1, to the last step.", optional=True),
                io.Combo.Input(
                    "threshold",
                    options=list(THRESHOLDS),
                    default=PEAK,
                    optional=True,
                    tooltip=(
                        "How a map becomes a mask. 'peak': above `level` of the way from its median to its peak; 'quantile': the highest "
                        "1 - level of it; 'otsu': by its own histogram; 'argmax': where it is the highest of all phrases and of the "
                        "background (words, or `level`); 'soft' (neutral): no cut, 0 at the median and 1 at the peak."
                    ),
                ),
                share_input("level", 0.6, "For 'peak', 'quantile' and 'argmax', from 0 to 1. Higher gives smaller masks.", optional=True),
                io.Boolean.Input(
                    "largest",
                    default=False,
                    optional=True,
                    tooltip="Keep of each mask its largest connected part only. Neutral: off, all of it.",
                ),
                io.Int.Input(
                    "dilation",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="By how many pixels each mask grows to every side. Neutral: 0.",
                ),
                io.Int.Input(
                    "entry",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Which of several combined positive prompts `text` is, counted from 1 (neutral) in the order of the guider.",
                ),
                io.Boolean.Input(
                    "edges",
                    default=True,
                    optional=True,
                    tooltip=(
                        "Where image is connected, maps and masks follow its edges: a position counts by how far its colour is from the "
                        "background's. Neutral: off, or no image; they are then as fine as the attention's grid."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output("masks", display_name="masks", tooltip="One mask for each phrase and picture, phrase by phrase."),
                io.Image.Output("overlay", display_name="overlay", tooltip="The maps in colour over the picture, in the same order."),
                io.String.Output("report", display_name="report", tooltip="Which tokens each phrase is bound to, and what was used."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        latent,
        clip,
        text,
        phrases,
        image=None,
        background="",
        source=capture.ATTENTION,
        grids=FINEST,
        start_percent=0.5,
        end_percent=1.0,
        threshold=PEAK,
        level=0.6,
        largest=False,
        dilation=0,
        entry=1,
        edges=False,
    ) -> io.NodeOutput:
        check_numbers(1.0, start_percent, end_percent)
        captured = maps.captured_with(latent["samples"])
        listed, behind = _lines(phrases), _lines(background)
        if not listed:
            over = torch.zeros(captured.pictures, *captured.size, 3) if image is None else image
            report = "Nothing done: `phrases` is empty. The masks are black."
            return io.NodeOutput(torch.zeros(over.shape[:3]), over, report, ui=ui.PreviewText(report))
        if image is not None and len(image) not in (1, captured.pictures):
            raise MapsError(
                f"image holds {len(image)} pictures and the latent {captured.pictures}: they would not lie under their own maps. Connect "
                "the pictures that this latent was decoded to, or a single one."
            )
        settings = Settings(source, grids, start_percent, end_percent, threshold, level, largest, dilation, entry, bool(edges))
        if source == capture.CONCEPTS:
            bound, others, length = maps.concept_rows(captured, listed), maps.concept_rows(captured, behind), None
        else:
            if clip is None:
                raise MapsError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
            bound = maps.bind(clip, captured.family, text, listed)
            others = maps.bind(clip, captured.family, text, behind)
            length = words.length_of(clip, captured.family, text)
        if threshold == ARGMAX and len(listed) + len(behind) < 2:
            raise MapsError("argmax compares maps: write at least two phrases, or one for the background, or choose another threshold.")
        drawn = maps.draw(captured, bound, settings, others, length, pictures=image)
        report = "\n".join(drawn.report)
        colours = overlay(drawn.heights.flatten(0, 1), image, len(listed))
        return io.NodeOutput(drawn.masks.flatten(0, 1), colours, report, ui=ui.PreviewText(report))


NODES = [Capture, Maps]
