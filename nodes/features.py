"""Features: sparse autoencoders from files, and the latents of theirs that stand for a concept."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io, ui

from ..host import files, sae_files
from ..host.directions import ROWS, WORDS, Runs, prompts_of
from ..host.families import FAMILIES
from ..host.features import TEXT, FeaturesError
from ..host.sae_finding import MEAN, SCORES, SHARE, UNITS, Wish, find_in_model, find_in_text, io_of
from ._shared import NONE
from .steering import CONCEPT_FEATURES, checked_stem, name_of, picture_inputs, saved

SAE = "CONCEPT_SAE"
AS_TOLD = "as the file says"
DTYPES = {"auto": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 2**24  # numbers in a matrix up to which auto leaves it as it is saved: 64 MB in float32


class SAELoader(io.ComfyNode):
    """A sparse autoencoder from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sae_files.show_folder()
        return io.Schema(
            node_id="ConceptNodes_SAELoader",
            display_name="Load Sparse Autoencoder",
            category="concept/features",
            description=(
                "Loads a sparse autoencoder, a dictionary of a layer's features, from models/sae: this pack's own files and those of "
                "sparsify (SAeUron), SAELens, OpenAI's layout (Concept Steerers, sdxl-unbox), dictionary_learning and SAEdit. Settings "
                "of published files lie beside them in cfg.json or config.json."
            ),
            search_aliases=["SAE", "sparse autoencoder", "feature", "latent", "SAeUron", "concept steerers", "SAEdit", "interpretability"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[NONE, *sae_files.names()],
                    default=NONE,
                    tooltip="The autoencoder: a file from models/sae, with the JSON file that was published with it in the same folder.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip=(
                        "The type of its two matrices; biases and thresholds stay as they are. 'auto' (neutral): small ones as saved, "
                        "large ones in bf16."
                    ),
                ),
                io.Combo.Input(
                    "family",
                    options=[AS_TOLD, *(family.name for family in FAMILIES)],
                    default=AS_TOLD,
                    tooltip="The family of models that it was trained on. Neutral: 'as the file says', for files that do.",
                ),
                io.String.Input(
                    "site",
                    default="",
                    tooltip="The place in the model whose vectors it was trained on. Neutral: empty, as the file says.",
                ),
            ],
            outputs=[
                io.Custom(SAE).Output("sae", display_name="sae", tooltip="The autoencoder."),
                io.String.Output("report", display_name="report", tooltip="Its kind, its size, where it belongs, how well it does."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, file=NONE):
        try:
            return file in (NONE, None) or bool(files.resolve(sae_files.FOLDER, file))
        except files.MissingFile as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file=NONE, **_):
        return NONE if file in (NONE, None) else sae_files.fingerprint(file)

    @classmethod
    def execute(cls, file, dtype="auto", family=AS_TOLD, site="") -> io.NodeOutput:
        if file == NONE:
            raise ValueError("No file is chosen. Put a sparse autoencoder into models/sae, refresh, and choose it.")
        read = sae_files.read(files.resolve(sae_files.FOLDER, file))
        config = {"name": file, **read.config}
        config |= {"family": family} if family != AS_TOLD else {}
        config |= {"site": site.strip()} if site.strip() else {}
        kept = dtype == "auto" and read.sae.W_enc.numel() <= SMALL
        loaded = read._replace(sae=read.sae if kept else read.sae.to(dtype=DTYPES[dtype]), config=config)
        report = "\n".join(told(loaded, file))
        return io.NodeOutput(loaded, report, ui=ui.PreviewText(report))


def told(file: sae_files.SAEFile, name: str) -> list[str]:
    """What a report says of an autoencoder."""
    sae, config = file.sae, file.config
    kind = f"{sae.k} latents a vector" if sae.counts else "latents beyond a threshold" if sae.threshold is not None else "positive latents"
    lines = [f"'{name}' ({config['layout']}): {sae.n} latents for vectors of {sae.d} numbers, {sae.activation}, {kind}."]
    size = 2 * sae.W_enc.numel() * sae.W_enc.element_size()
    lines.append(f"Takes {size / 1e6:.0f} MB as {str(sae.W_enc.dtype).removeprefix('torch.')}.")
    where = {"family": config.get("family"), "site": config.get("site"), "of": config.get("io")}
    known = ", ".join(f"{what} {value}" for what, value in where.items() if value)
    missing = " and ".join(what for what in ("family", "site") if not where[what])
    lines.append(f"Trained on: {known or 'not said'}." + (f" The file does not name {missing}: set it here." if missing else ""))
    quality = {"of the variance left over": config.get("fvu"), "of the latents dead": config.get("dead")}
    figures = [f"{value:.1%} {what}" for what, value in quality.items() if isinstance(value, int | float)]
    figures += [f"{config['l0']:.1f} active a vector"] if isinstance(config.get("l0"), int | float) else []
    if figures:
        lines.append(f"In its training: {', '.join(figures)}.")
    lines.append(f"Statistics: {', '.join(file.stats) or 'none, so that strengths are in units of the code'}.")
    return lines


class SAEFind(io.ComfyNode):
    """Latents between prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SAEFind",
            display_name="Find Latents",
            category="concept/features",
            description=(
                "Finds the latents of a sparse autoencoder that stand for a concept, from prompts with it and without it, at the site that "
                "the autoencoder was trained on. Steer Text and Steer Model steer with them."
            ),
            search_aliases=["SAE", "feature", "latent", "SAeUron", "concept steerers", "ItD", "sparse autoencoder", "feature finder"],
            inputs=[
                io.Custom(SAE).Input("sae", tooltip="The autoencoder. Its site says where the prompts' activations are read."),
                io.Clip.Input("clip", tooltip="Reads the prompts; for an autoencoder of a text encoder, the encoder that is looked into."),
                io.String.Input(
                    "positive", multiline=True, tooltip="Prompts with the concept, one in each line. A dozen is better than two."
                ),
                io.String.Input(
                    "negative", multiline=True, tooltip="The same prompts without it, line by line, or with something else instead."
                ),
                io.Combo.Input(
                    "score",
                    options=list(SCORES),
                    default=SHARE,
                    tooltip=(
                        "What makes a latent the concept's. share difference: of all that is active, how much more is its own with the "
                        "concept than without. effect size: how far the two lie apart in units of their spread. set difference: among the "
                        "greatest of a prompt with it, and of none without."
                    ),
                ),
                io.Int.Input("top", default=8, min=1, max=512, tooltip="How many latents are kept, the best first."),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Writes them to output/concept_features under this name; one that is there is kept. Neutral: empty, no file.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="For an autoencoder of a model: where pictures are sampled. It is not changed."
                ),
                io.Combo.Input(
                    "unit",
                    options=list(UNITS),
                    default=MEAN,
                    optional=True,
                    tooltip="What counts as strength 1: the mean activation with the concept, rows without any counted, or the greatest.",
                ),
                io.Combo.Input(
                    "pooling",
                    options=[WORDS, ROWS],
                    default=WORDS,
                    optional=True,
                    tooltip=(
                        "Text encoders: latents of the words (things, colours), or of all rows but the first (styles and moods, which the "
                        "rows behind the words carry)."
                    ),
                ),
                *picture_inputs("autoencoders of a model"),
            ],
            outputs=[
                io.Custom(CONCEPT_FEATURES).Output("features", display_name="features", tooltip="For Steer Text or Steer Model."),
                io.String.Output(
                    "report", display_name="report", tooltip="Which latents, how well each tells the prompts apart, the file."
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, sae, clip, positive, negative, score, top, file_name, model=None, unit=MEAN, pooling=WORDS, width=512, height=512, steps=12,
        cfg=4.0, levels=4, pictures=2, seed=0,
    ) -> io.NodeOutput:  # fmt: skip
        if clip is None:
            raise FeaturesError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
        sides, stem = (prompts_of(positive, "positive"), prompts_of(negative, "negative")), checked_stem(file_name)
        wish = Wish(*sides, stem or name_of(*sides), score, top, unit, pooling)
        if io_of(sae) == TEXT:
            found = find_in_text(clip, sae, wish)
        else:
            if model is None:
                raise FeaturesError(
                    f"Nothing is connected to model, and the autoencoder is of a model's {sae.config.get('site') or 'site'}. Connect it."
                )
            if not math.isfinite(cfg):
                raise ValueError(f"cfg is {cfg}, which is no number to work with. Set it to a finite number.")
            found = find_in_model(model, clip, sae, wish, Runs(width, height, steps, cfg, levels, pictures, seed))
        told = f"{len(sides[0])} prompts with the concept, {len(sides[1])} without."
        report = "\n".join([found.features.describe(), told, *found.report, *saved(found.features, stem)])
        return io.NodeOutput(found.features, report, ui=ui.PreviewText(report))


NODES = [SAELoader, SAEFind]
