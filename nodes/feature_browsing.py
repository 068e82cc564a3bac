"""Latents of a sparse autoencoder, to be looked at."""

from __future__ import annotations

import json
import math

from comfy_api.latest import io, ui

from ..host.directions import ROWS, WORDS, Runs, prompts_of
from ..host.features import FeaturesError
from ..host.sae_browsing import browse_model, browse_text, features_of, latent_of, latents_of, numbers_in, of_rows, told_site
from ..host.sae_sheet import sheets
from ..ops.sae_browse import ORDERS, SPECIFIC
from .features import SAE
from .steering import CONCEPT_FEATURES, checked_stem, picture_inputs, saved

MOST = 64  # latents looked at at once


class SAEBrowse(io.ComfyNode):
    """A page for each of some latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SAEBrowse",
            display_name="Browse Latents",
            category="concept/features",
            description=(
                "Shows what latents of a sparse autoencoder stand for: a page for each, with the prompts or pictures in which it fires "
                "most and where in them, how often and how strongly it fires, and the latents whose directions lie nearest."
            ),
            search_aliases=["SAE", "feature browser", "latent", "dashboard", "heatmap", "interpretability", "sparse autoencoder"],
            inputs=[
                io.Custom(SAE).Input("sae", tooltip="The autoencoder. Its site says where the prompts' activations are read."),
                io.Clip.Input("clip", tooltip="Reads the prompts; for an autoencoder of a text encoder, the encoder that is looked into."),
                io.String.Input("prompts", multiline=True, tooltip="Prompts, one in each line: the more and the more varied the better."),
                io.String.Input(
                    "latents",
                    default="",
                    tooltip="Which latents, by number: 3, 17, 40-44. Neutral: empty, those of `features`, or else the first by `order`.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=SPECIFIC,
                    tooltip=(
                        "Which come first where none are named: those that fire on most rows, those that fire in the fewest prompts or "
                        "pictures (in three at least, and not faintly), or those that fire most strongly."
                    ),
                ),
                io.Int.Input("count", default=8, min=1, max=MOST, tooltip="How many, where none are named."),
                io.Int.Input("examples", default=8, min=1, max=64, tooltip="Prompts or pictures on each page."),
                io.Custom(CONCEPT_FEATURES).Input(
                    "features", optional=True, tooltip="Looks at the latents that these are of, or lie nearest to. Neutral: not connected."
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="For an autoencoder of a model: where pictures are sampled. It is not changed."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Decodes these pictures. Without it the pages show where latents fire alone."),
                io.Combo.Input(
                    "pooling",
                    options=[WORDS, ROWS],
                    default=WORDS,
                    optional=True,
                    tooltip="Text encoders: rows of the words, or all rows but the first (those behind the words carry styles and moods).",
                ),
                *picture_inputs("autoencoders of a model"),
                io.String.Input(
                    "file_name",
                    default="",
                    optional=True,
                    tooltip="Writes the latents as features to output/concept_features under this name. Neutral: empty, no file.",
                ),
            ],
            outputs=[
                io.Image.Output("sheets", display_name="sheets", tooltip="A page for each latent."),
                io.Custom(CONCEPT_FEATURES).Output(
                    "features", display_name="features", tooltip="The latents on the pages, for Steer Text, Steer Model or Region Features."
                ),
                io.String.Output("json", display_name="json", tooltip="What the pages say, as numbers."),
                io.String.Output("report", display_name="report", tooltip="What was gone through, and a line for each latent."),
            ],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, sae, clip, prompts, latents, order, count, examples, features=None, model=None, vae=None, pooling=WORDS, width=512, height=512,
        steps=12, cfg=4.0, levels=4, pictures=2, seed=0, file_name="",
    ) -> io.NodeOutput:  # fmt: skip
        if clip is None:
            raise FeaturesError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
        texts = tuple(dict.fromkeys(prompts_of(prompts, "prompts")))
        numbers, stem = numbers_in(latents, sae.sae.n), checked_stem(file_name)
        if len(numbers) > MOST:
            raise FeaturesError(f"{len(numbers)} latents are named, and {MOST} is the most at once. Name fewer.")
        if of_rows(sae):
            browsed = browse_text(clip, sae, texts, pooling)
        else:
            if model is None:
                raise FeaturesError(
                    f"Nothing is connected to model, and the autoencoder is of a model's {sae.config.get('site') or 'site'}. Connect it."
                )
            if not math.isfinite(cfg):
                raise ValueError(f"cfg is {cfg}, which is no number to work with. Set it to a finite number.")
            decode = None if vae is None else vae.decode
            browsed = browse_model(model, clip, sae, texts, Runs(width, height, steps, cfg, levels, pictures, seed), decode)
        told = [*told_site(sae), *browsed.report]
        if not numbers and features is not None:
            numbers, nearest = latents_of(features.checked(), browsed)
            numbers, told = numbers[:MOST], told + nearest
        numbers = numbers or browsed.survey.ranked(order, count)
        if not numbers:
            raise FeaturesError(f"No latent comes first by '{order}' in these prompts. Give more of them, or take another order.")
        shown = [latent_of(browsed, number, examples) for number in numbers]
        found = features_of(browsed, numbers, stem or f"latents {', '.join(map(str, numbers[:6]))}")
        alive = int((browsed.survey.fired > 0).sum())
        lines = [
            f"{len(texts)} prompts, {browsed.survey.rows} rows; {alive} of {sae.sae.n} latents fire in them.",
            *told,
            *(_line(one) for one in shown),
            f"As features: 1 is the mean activation of a latent where it fires. {found.describe()}",
            *saved(found, stem),
        ]
        report = "\n".join(lines)
        pages = sheets(browsed, shown)
        numbers_told = json.dumps({"site": browsed.config["site"], "rows": browsed.survey.rows, "latents": [one.told() for one in shown]})
        shown_pages = ui.PreviewImage(pages, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(pages, found, numbers_told, report, ui=shown_pages)


def _line(latent) -> str:
    words = ", ".join(f"{word} {value:.2g}" for word, value in (latent.words or latent.said)[:4])
    return (
        f"  {latent.number}: on {latent.density:.2%} of the rows, in {latent.items} items, {latent.mean:.3g} on average there, "
        f"{latent.most:.3g} at most{'; ' + words if words else ''}."
    )


NODES = [SAEBrowse]
