"""Each thing of a prompt with its own colour: words bound to one another while the model samples."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..host import binding
from ..host.binding import DENSE, GROUPS, MODES, SIMILARITY, WORDS, BindingError, Settings
from ._shared import check_numbers, describe_window, model_input, share_input


class Bind(io.ComfyNode):
    """Groups of words that stay together: what is said of one thing goes to no other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Bind",
            display_name="Bind Words",
            category="concept/attention",
            description=(
                "Keeps the words of a prompt's things apart, so that what is said of one goes to no other: at every place of the picture "
                "the words of one thing are read. No training, no gradient, no model call added."
            ),
            search_aliases=[
                "attribute binding",
                "color bleeding",
                "concept bleeding",
                "attend and excite",
                "DenseDiffusion",
                "cutoff",
                "attention couple",
                "token suppression",
            ],
            inputs=[
                model_input(),
                io.Conditioning.Input("positive", tooltip="The prompt in `text`, encoded by this CLIP. Only similarity changes it."),
                io.Clip.Input("clip", tooltip="The text encoder of the prompt: it tells which tokens are whose."),
                io.String.Input("text", multiline=True, default="", tooltip="The positive prompt, as it is sampled."),
                io.String.Input(
                    "groups",
                    multiline=True,
                    default="",
                    tooltip=(
                        "Words that belong together, one group in each line or with bars between, as they stand in the prompt. A group "
                        "that stands there twice: 'red circle #2' is its second place. Neutral: empty, phrases that begin with an article "
                        "are taken."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=GROUPS,
                    tooltip=(
                        f"'{GROUPS}': each place reads the words of the group that is strongest there. '{WORDS}': of their words only the "
                        f"strongest, as published (T2I-Zero). '{DENSE}': words are drawn to regions or masks (DenseDiffusion). "
                        f"'{SIMILARITY}': embeddings move towards like words near them, before sampling (T2I-Zero)."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip=(
                        f"'{GROUPS}', '{WORDS}': the share of attention that losing words lose, all from 1 on; with '{GROUPS}' it "
                        f"fades. '{DENSE}': the bias's weight. '{SIMILARITY}': how far embeddings move. Neutral: 0, nothing."
                    ),
                ),
                share_input("start_percent", 0.0, "Where in sampling it begins to act, from 0 (neutral, the first step) to 1."),
                share_input(
                    "end_percent",
                    Settings().end_percent,
                    "Where in sampling it stops, from 0 to 1 (the last step). What is where is settled in the first half; later, words "
                    "that are held back are missed in the details. No effect on similarity. Neutral: 0, nothing.",
                ),
                io.Custom("CONCEPT_REGIONS").Input(
                    "regions",
                    optional=True,
                    tooltip=f"'{DENSE}': one region for each group, in the same order. Neutral: not connected.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip=f"'{DENSE}': a batch with one mask for each group, in the same order. Neutral: not connected.",
                ),
                io.Int.Input(
                    "reach",
                    default=8,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip=f"'{SIMILARITY}': how many tokens away words are looked at. No effect in other modes.",
                ),
                io.Float.Input(
                    "likeness",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=f"'{SIMILARITY}': the least cosine of two embeddings that counts. 1 moves nothing. No effect in other modes.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model that keeps the groups apart while it samples."),
                io.Conditioning.Output("positive", display_name="positive", tooltip="The prompt, for the sampler."),
                io.String.Output("report", display_name="report", tooltip="Which words were bound to one another, how, and when."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        clip,
        text,
        groups,
        mode,
        strength,
        start_percent,
        end_percent,
        regions=None,
        masks=None,
        reach=8,
        likeness=0.3,
    ) -> io.NodeOutput:
        check_numbers(strength, start_percent, end_percent)
        if masks is not None:
            masks = _checked(masks)
        settings = Settings(mode, strength, start_percent, end_percent, reach, likeness)
        bound, positive, lines = binding.bind(model, positive, clip, text, groups, settings, regions, masks)
        if bound is not model:
            lines.append(f"It acts {describe_window(start_percent, end_percent)}. No model call is added.")
        report = "\n".join(lines)
        return io.NodeOutput(bound, positive, report, ui=ui.PreviewText(report))


def _checked(masks):
    """(G, height, width) in 0..1 from a MASK. Raises BindingError that says what it holds instead."""
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or not masks.isfinite().all():
        raise BindingError(f"masks has the shape {tuple(masks.shape)} or holds NaN. Connect a batch of masks (groups, height, width).")
    return masks.float().clamp(0, 1).cpu()


NODES = [Bind]
