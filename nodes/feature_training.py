"""Sparse autoencoders trained in the graph."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..host import sae_files
from ..host.directions import ROWS, WORDS, Runs, notes_of, prompts_of
from ..host.feature_sites import (
    AUTO,
    blocks,
    checked_site,
    default_text_site,
    encoders_called,
    family_for,
    model_sites,
    text_sites,
    transforms_alone,
    width_at,
)
from ..host.features import KINDS as ROW_KINDS
from ..host.features import OUT, TEXT, FeaturesError, fingerprint
from ..host.sae_files import OURS, SAEError, SAEFile
from ..host.sae_sources import model_rows, text_bound, text_rows
from ..host.sae_training import memory, train
from ..host.training import TrainingError, identity_of
from ..ops.sae import SAE as Autoencoder
from ..ops.sae_training import KINDS, MEAN, NORMALISATIONS, STANDARDISE, TOPK, Settings
from .features import SAE, told
from .slider_training import checked_stem, checkpoint
from .steering import IN_MODEL, IN_TEXT, picture_inputs

log = logging.getLogger("concept_nodes")
RING = 262_144  # vectors in memory, at most
LEAST = 1024  # and at least
PICTURES = ("width", "height", "cfg", "levels")


class SAETrain(io.ComfyNode):
    """A sparse autoencoder trained on the rows of a site."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SAETrain",
            display_name="Train Sparse Autoencoder",
            category="concept/features",
            description=(
                "Trains a sparse autoencoder, a dictionary of a layer's features, on what prompts bring to a block of a text encoder, or "
                "pictures of them to a block of the model. The file lies in models/sae. Find Latents takes it from the socket at once."
            ),
            search_aliases=["SAE", "sparse autoencoder", "dictionary learning", "train SAE", "topk", "matryoshka", "jumprelu"],
            inputs=[
                io.Clip.Input("clip", tooltip="Reads the prompts; for 'text encoder', what is looked into. It is not changed."),
                io.String.Input("prompts", multiline=True, tooltip="Prompts, one in each line: the more and the more varied the better."),
                io.Combo.Input(
                    "where",
                    options=[IN_TEXT, IN_MODEL],
                    default=IN_TEXT,
                    tooltip="Inside the text encoder, or inside the model, for which pictures are sampled.",
                ),
                io.String.Input(
                    "site",
                    default=AUTO,
                    tooltip=(
                        "The block: clip_l.9 in a text encoder, output_blocks.4.1 or double_blocks.18 in a model. 'auto' takes one of its "
                        "own; a name that is not there lists those that are."
                    ),
                ),
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=TOPK,
                    tooltip=(
                        "topk: the k greatest of each vector. batch_topk: k of each on average, by one threshold. matryoshka: the same, "
                        "from general latents to particular ones. jumprelu: a threshold for each."
                    ),
                ),
                io.Int.Input("expansion", default=8, min=1, max=64, tooltip="Latents for each number of a vector."),
                io.Int.Input("k", default=32, min=1, max=512, tooltip="How many latents a vector is made of."),
                io.Int.Input("steps", default=5000, min=1, max=1_000_000, tooltip="Steps of the optimiser."),
                io.Int.Input("batch", default=4096, min=16, max=65_536, tooltip="Vectors in each step."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip="The same seed, the same file."
                ),
                io.String.Input(
                    "name",
                    default="my features",
                    tooltip="The file's name in models/sae. A file that is there already is kept under a number.",
                ),
                io.Model.Input("model", optional=True, tooltip="For 'model': what is looked into. It is not changed."),
                io.Combo.Input(
                    "pooling",
                    options=[ROWS, WORDS],
                    default=ROWS,
                    optional=True,
                    tooltip="'text encoder': trained on all rows of a prompt but the first, or on its words alone.",
                ),
                io.Combo.Input(
                    "activations",
                    options=[kind for kind in ROW_KINDS if kind != TEXT],
                    default=OUT,
                    optional=True,
                    advanced=True,
                    tooltip="'model': what the block gives (out), or what it adds to what it was given (diff, UNets' blocks).",
                ),
                *(one for one in picture_inputs("'model'") if one.id in PICTURES),
                io.Int.Input(
                    "sampling_steps", default=12, min=1, max=200, optional=True, tooltip="'model': steps of each picture, by Euler."
                ),
                io.Int.Input(
                    "rows",
                    default=256,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="'model': rows of a picture at each level, drawn at random.",
                ),
                io.Combo.Input(
                    "normalise",
                    options=[AUTO, *NORMALISATIONS],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What is done to vectors before they are learnt. mean: their mean taken off, all scaled alike. standardise: each "
                        "number by itself. whiten: along their principal axes. none: scaled only. auto: mean in text encoders and "
                        "UNets, standardise in transformers, whose variance lies in few numbers."
                    ),
                ),
            ],
            outputs=[
                io.Custom(SAE).Output("sae", display_name="sae", tooltip="The autoencoder, for Find Latents."),
                io.Custom("LOSS_MAP").Output("losses", display_name="losses", tooltip="The loss of each step, for the host's loss plot."),
                io.String.Output("file", display_name="file", tooltip="Where the file lies."),
                io.String.Output("report", display_name="report", tooltip="What was trained, on what, how well it does."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, clip, prompts, where, site, kind, expansion, k, steps, batch, seed, name, model=None, pooling=ROWS, activations=OUT, width=512,
        height=512, cfg=4.0, levels=4, sampling_steps=12, rows=256, normalise=AUTO,
    ) -> io.NodeOutput:  # fmt: skip
        if clip is None:
            raise FeaturesError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
        stem, texts, site = checked_stem(name), prompts_of(prompts, "prompts"), site.strip() or AUTO
        settings = Settings(0, k, kind, steps, batch, seed=seed)
        about: dict[str, Any] = {"prompts": texts}
        if where == IN_TEXT:
            site = default_text_site(clip) if site == AUTO else site
            sites = text_sites(clip, site)
            notes_of(clip, sites)  # which refuses a block that nothing is read from
            d, bound = sum(one.width for one in sites), text_bound(clip, sites, texts)
            ring = max(LEAST, min(RING, bound, steps * batch))
            source = text_rows(clip, sites, texts, pooling, seed, endless=bound > ring)
            family, rows_of, patcher = encoders_called(site), TEXT, clip.patcher
            about |= {"pooling": pooling, "weights": [fingerprint(one.module) for one in sites]}
        else:
            if model is None:
                raise FeaturesError("Nothing is connected to model. Connect it, or train on the text encoder.")
            if not math.isfinite(cfg):
                raise ValueError(f"cfg is {cfg}, which is no number to work with. Set it to a finite number.")
            site, rows_of, patcher = one_site(model.model, site), activations, model
            module, d, family = checked_site(model.model, site, activations), width_at(model.model, site), family_for(model.model).name
            runs = Runs(width, height, sampling_steps, cfg, levels, 1, seed)
            ring = max(LEAST, min(RING, steps * batch))
            source = model_rows(model, clip, module, activations, texts, runs, rows)
            about |= {"runs": runs._asdict(), "rows": rows, "weights": [fingerprint(model.model.diffusion_model.get_submodule(site))]}
        if normalise == AUTO:
            # A transformer's variance lies in few of its numbers.
            normalise = STANDARDISE if where != IN_TEXT and transforms_alone(family_for(model.model)) else MEAN
        settings = settings._replace(n=expansion * d, normalise=normalise)
        settings.check()
        config = {"family": family, "site": site, "io": rows_of, "kind": kind, "steps": steps, "batch": batch, "seed": seed}
        config |= {"data": hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()}
        identity = identity_of(patcher, {**about, **config, **settings._asdict(), "ring": ring}, [])
        return trained(source, settings, d, ring, stem, {"name": stem, **config, "identity": identity}, f"{len(texts)} prompts")


def one_site(model, site: str) -> str:
    """The site that a text names. Raises FeaturesError where it names several, UnsupportedFamily."""
    if site == AUTO:
        own = model_sites(model, AUTO)
        return own[0] if len(own) == 1 else blocks(model)[len(blocks(model)) // 2]
    sites = model_sites(model, site)
    if len(sites) > 1:
        raise FeaturesError(f"'{site}' stands for {len(sites)} sites, and an autoencoder is of one. Name one, {sites[0]} for instance.")
    return sites[0]


def trained(source, settings: Settings, d: int, ring: int, stem: str, config: dict, of: str) -> io.NodeOutput:
    """Train, save and tell. Raises TrainingError."""
    needs = takes(settings, d, ring)
    log.info(needs)
    bar = comfy.utils.ProgressBar(settings.steps)

    def broken_off(sae: Autoencoder, steps: list) -> None:
        try:
            saved(SAEFile(sae, config | {"unfinished": len(steps)}, {}), stem)
        except OSError as error:  # must not hide why the training stopped; there is the checkpoint
            log.warning("What there is of '%s' was not saved (%s).", stem, error)

    begun = time.perf_counter()
    outcome = train(
        source,
        settings,
        ring=ring,
        identity=config["identity"],
        file=checkpoint(f"sae {stem}", config["identity"]),
        each=lambda step, _: bar.update_absolute(step + 1, settings.steps),
        broken_off=broken_off,
    )
    if not outcome.steps:
        raise TrainingError(f"Nothing was learnt. {' '.join(outcome.told)}")
    metrics, dead = outcome.measured.metrics, outcome.steps[-1].dead / settings.n
    done = {"fvu": metrics.fvu, "l0": metrics.l0, "dead": dead}
    file = SAEFile(outcome.sae, config | {key: value for key, value in done.items() if math.isfinite(value)}, outcome.measured.stats)
    try:
        path, where = saved(file, stem), "Saved as {}."
    except OSError as error:  # the training is not to be lost for that
        path, where = path_of(stem), f"NOT saved as {{}} ({error}): make room, and train again with another seed."
    file = file._replace(config=file.config | {"layout": OURS})
    seconds = time.perf_counter() - begun
    report = "\n".join(
        [
            needs,
            *told(file, path.name),
            f"Trained {len(outcome.steps)} steps of {settings.batch} on rows of {of} in {seconds:.0f} s; of the variance "
            f"{outcome.steps[0].fvu:.1%} was left over in the first step and {outcome.steps[-1].fvu:.1%} in the last.",
            *outcome.told,
            where.format(path),
        ]
    )
    return io.NodeOutput(file, {"loss": [step.loss for step in outcome.steps]}, str(path), report, ui=ui.PreviewText(report))


def takes(settings: Settings, d: int, ring: int) -> str:
    """What a training takes, and whether that is there."""
    needs, free = memory(settings, d, ring), comfy.model_management.get_free_memory(comfy.model_management.get_torch_device())
    gb = [f"{part / 1e9:.2f} GB" for part in needs]
    line = (
        f"{settings.n} latents for vectors of {d} numbers: takes about {gb[0]} for weights and optimiser, {gb[1]} for a step and {gb[2]} "
    )
    line += "of main memory for vectors"
    if needs.weights + needs.step > free:
        line += f". That may not suffice, {free / 1e9:.2f} GB are free: if it runs out, make batch or expansion smaller"
    return line + "."


def path_of(stem: str) -> Path:
    sae_files.show_folder()
    return Path(folder_paths.get_folder_paths(sae_files.FOLDER)[0]) / f"{stem}.safetensors"


def saved(file: SAEFile, stem: str) -> Path:
    """Write the file. One of the same name is kept beside it under the next number, unless it is this very training broken off. Raises
    OSError.
    """
    path = path_of(stem)
    if path.exists() and not _begun(path, file.config["identity"]):
        number = 1
        while (kept := path.with_name(f"{stem}_{number:05}.safetensors")).exists():
            number += 1
        path.rename(kept)
    sae_files.write(path, file)
    return path


def _begun(path: Path, identity: str) -> bool:
    try:
        config = sae_files.read(path).config
    except SAEError:
        return False
    return "unfinished" in config and config.get("identity") == identity


NODES = [SAETrain]
