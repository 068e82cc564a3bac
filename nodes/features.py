"""Features: sparse autoencoders from files."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..host import files, sae_files
from ..host.families import FAMILIES
from ._shared import NONE

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


NODES = [SAELoader]
