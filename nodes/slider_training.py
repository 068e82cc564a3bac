"""Sliders trained in the graph."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from safetensors import SafetensorError

from ..host.families import family_of
from ..host.slider_training import Entry, Text, TextObjective, Ways
from ..host.training import Loop, Trainee, TrainingError, identity_of, published_names
from ._shared import LORA_MODEL

log = logging.getLogger("concept_nodes")
PUBLISHED, BOTH, ERASE, ABLATE = "published", "both poles", "erase", "ablate"
STRENGTHS = {PUBLISHED: (1.0,), BOTH: (1.0, -1.0), ERASE: (1.0,), ABLATE: (1.0,)}
SUBFOLDER = "concept_nodes"
HOLE = "{}"


class SliderTrainText(io.ComfyNode):
    """A slider trained from prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SliderTrainText",
            display_name="Train Slider from Text",
            category="concept/sliders",
            description=(
                "Trains a slider from words alone: what it is to act on, what more and what less of the concept is. No pictures are "
                "needed. The file is a LoRA that any loader reads; Concept Slider takes it from the socket at once."
            ),
            search_aliases=["concept slider", "LECO", "train LoRA", "ESD", "erase concept", "ablate concept"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, from one of the host's loaders. It is not changed."),
                io.Clip.Input("clip", tooltip="Reads the prompts."),
                io.String.Input(
                    "target",
                    default="{}",
                    multiline=True,
                    tooltip="What the slider acts on. A pair of curly braces stands for each line of `preserve` in turn, in all three.",
                ),
                io.String.Input("more", default="", multiline=True, tooltip="The target with more of the concept: where strength 1 leads."),
                io.String.Input("less", default="", multiline=True, tooltip="The target with less of the concept."),
                io.String.Input(
                    "preserve",
                    default="",
                    multiline=True,
                    tooltip="What must stay as it is, one thing a line: 'a woman', 'a man'. Neutral: empty, the prompts as they are.",
                ),
                io.Combo.Input(
                    "objective",
                    options=list(STRENGTHS),
                    default=PUBLISHED,
                    tooltip=(
                        "'published': strength 1 is trained, the other way follows. 'both poles': 1 and -1 are trained, for a fifth more "
                        "time. 'erase' (ESD): strength 1 keeps the target out; more and less are not read. 'ablate': strength 1 makes the "
                        "target `more`; less is not read."
                    ),
                ),
                io.Float.Input("eta", default=2.0, min=0.0, max=20.0, step=0.1, tooltip="How far strength 1 goes. Not read by 'ablate'."),
                io.Int.Input("steps", default=500, min=1, max=100_000, tooltip="Steps of the optimiser."),
                io.Int.Input("batch", default=4, min=1, max=256, tooltip="Pictures in each step."),
                io.Float.Input("learning_rate", default=2e-4, min=1e-7, max=1.0, step=1e-5, round=1e-7, tooltip="Of AdamW."),
                io.Int.Input("rank", default=4, min=1, max=256, tooltip="Rank of the slider's matrices."),
                io.Float.Input("alpha", default=1.0, min=0.01, max=256.0, step=0.1, tooltip="The slider is scaled by alpha / rank."),
                io.Int.Input("width", default=512, min=16, max=4096, step=8, tooltip="Width of the pictures that it is trained on."),
                io.Int.Input("height", default=512, min=16, max=4096, step=8, tooltip="Their height."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip="The same seed, the same file."
                ),
                io.String.Input(
                    "name",
                    default="my slider",
                    tooltip="The file's name in output/loras/concept_nodes. A file that is there already is kept under a number.",
                ),
            ],
            outputs=[
                io.Custom(LORA_MODEL).Output("lora", display_name="lora", tooltip="The slider, for Concept Slider's `lora`."),
                io.Custom("LOSS_MAP").Output("losses", display_name="losses", tooltip="The loss of each step, for the host's loss plot."),
                io.String.Output("file", display_name="file", tooltip="Where the file lies."),
                io.String.Output("report", display_name="report", tooltip="What was trained, on what, for how long."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, target, more, less, preserve, objective, eta, steps, batch, learning_rate, rank, alpha, width, height, seed, name
    ) -> io.NodeOutput:
        settings = dict(
            target=target, more=more, less=less, preserve=preserve, objective=objective, eta=eta, steps=steps, batch=batch,
            learning_rate=learning_rate, rank=rank, alpha=alpha, width=width, height=height, seed=seed,
        )  # fmt: skip
        stem = checked_stem(name)
        lora, losses, told = train(model, clip, settings, stem)
        about = {
            "concept": stem,
            "poles": [less.replace(HOLE, "").strip(), more.replace(HOLE, "").strip()],
            "range": [-2, 2],
            "objective": f"{objective}, eta {eta:g}, {steps} steps of {batch}, learning rate {learning_rate:g}, seed {seed}",
            "base": family_of(model.model).name,
        }
        try:
            path, where = saved(lora, stem, about), "Saved as {}."
        except OSError as error:  # the training is not to be lost for that
            path, where = folder() / f"{stem}.safetensors", f"NOT saved as {{}} ({error}): save it from the lora output, or make room."
        report = "\n".join([*told, where.format(path)])
        return io.NodeOutput(lora, {"loss": losses}, str(path), report, ui=ui.PreviewText(report))


def prompts(settings: dict) -> list[tuple[str, str, str, str]]:
    """(target, neutral, more, less) as text for every line that is to be preserved. Raises TrainingError."""
    kind, lines = settings["objective"], [line.strip() for line in settings["preserve"].splitlines() if line.strip()] or [""]
    made = []
    for line in lines:
        target, more, less = (_filled(settings[key], line) for key in ("target", "more", "less"))
        for key, text in (("target", target), ("more", more)):
            if not text and not (key == "more" and kind == ERASE):
                raise TrainingError(
                    f"{key} is empty, so there is nothing to train. Write a prompt there, or lines in preserve where it is braces alone."
                )
        if kind in (PUBLISHED, BOTH) and more == less:
            raise TrainingError(
                f"more and less are the same ('{more}'), so there is no way between them. Write what less of the concept is."
            )
        if kind == ABLATE and more == target:
            raise TrainingError(f"more is the target ('{target}'), so there is nothing to turn it into. Write what it is to become.")
        made.append({ERASE: (target, "", target, ""), ABLATE: (target, more, more, more)}.get(kind, (target, target, more, less)))
    return made


def signed(kind: str, eta: float) -> float:
    """eta as the objective takes it: away from the target where it is to be erased, no way at all where it becomes another. Raises
    TrainingError where nothing would be learnt.
    """
    if eta == 0 and kind != ABLATE:
        raise TrainingError("eta is 0, so there is nothing to learn. Set it to 1 or more.")
    return {ERASE: -eta, ABLATE: 0.0}.get(kind, eta)


def _filled(text: str, line: str) -> str:
    """A prompt with a line of `preserve` in its hole, or before it."""
    text = text.strip()
    return (text.replace(HOLE, line) if HOLE in text else f"{line} {text}" if line and text else text).strip()


def train(model, clip, settings: dict, stem: str):
    """LORA_MODEL, losses and what to tell. Raises TrainingError and UnsupportedFamily."""
    texts = prompts(settings)
    family = family_of(model.model)
    kind = settings["objective"]
    eta = signed(kind, settings["eta"])
    read: dict[str, Text] = {}

    def encode(text: str) -> Text:
        if text not in read:
            read[text] = Text(*clip.encode_from_tokens(clip.tokenize(text), return_pooled=True))
        return read[text]

    entries = [Entry(*map(encode, row)) for row in texts]
    empty = encode("")
    if len({text.context.shape for text in read.values()}) > 1:
        raise TrainingError("The prompts take windows of unlike lengths. Make the longest ones shorter.")
    identity = identity_of(model, settings, [text.context for text in read.values()])
    bar = comfy.utils.ProgressBar(settings["steps"])
    with Trainee(model, family.slider_layers, rank=settings["rank"], alpha=settings["alpha"], seed=settings["seed"]) as trainee:
        down = model.model.latent_format.spacial_downscale_ratio
        size = settings["height"] // down, settings["width"] // down
        ways = Ways(trainee, len(entries), settings["batch"], size, settings["seed"])
        needs = trainee.memory((settings["batch"] * 3, *ways.x.shape[1:]))
        log.info("Training needs about %s.", ", ".join(f"{size:.0f} MB for {what}" for what, size in needs.items()))
        text = TextObjective(trainee, entries, empty, ways, eta=eta, strengths=STRENGTHS[kind])
        loop = Loop(
            trainee.parameters(),
            steps=settings["steps"],
            rate=settings["learning_rate"],
            identity=identity,
            file=checkpoint(stem, identity),
        )

        def each(step: int) -> None:
            text.done(step)
            bar.update_absolute(step + 1, settings["steps"])

        outcome = loop.run(text.losses, carried=ways.state, carry=ways.restore, each=each)
        lora = trainee.state(published_names(trainee.model))
        layers = len(trainee.adapters)
    first, last = (sum(part) / len(part) for part in (outcome.losses[:20], outcome.losses[-20:]))
    told = [
        f"Needed about {', '.join(f'{size:.0f} MB for {what}' for what, size in needs.items())}.",
        f"Trained {len(outcome.losses)} steps of {settings['batch']} on {layers} layers of {family.name}, {len(entries)} prompts; "
        f"loss {first:.3g} in the first steps, {last:.3g} in the last.",
        *outcome.told,
    ]
    return lora, outcome.losses, told


def checked_stem(name: str) -> str:
    """A file's name without folders. Raises TrainingError."""
    stem = name.strip().removesuffix(".safetensors")
    if not stem or any(sign in stem for sign in '/\\:*?"<>|') or stem.startswith("."):
        raise TrainingError(f"'{name}' cannot be a file's name. Use letters, digits, spaces, - and _.")
    return stem


def folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "loras" / SUBFOLDER


def checkpoint(stem: str, identity: str) -> Path:
    """Where a cancelled training waits: one for each, so that none takes another's place."""
    return Path(folder_paths.get_user_directory()) / SUBFOLDER / "training" / f"{stem} {identity[:12]}.safetensors"


def saved(lora: dict[str, torch.Tensor], stem: str, about: dict) -> Path:
    """Write the file; one of the same name is kept beside it under the next number. Raises OSError."""
    path = folder() / f"{stem}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        comfy.utils.save_torch_file(lora, str(part), metadata={"format": "pt", "concept_nodes": json.dumps(about)})
    except SafetensorError as error:  # which is what a full disk is to safetensors
        part.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    if path.exists():
        number = 1
        while (kept := path.with_name(f"{stem}_{number:05}.safetensors")).exists():
            number += 1
        path.rename(kept)
    part.rename(path)
    return path


NODES = [SliderTrainText]
