"""Sliders trained in the graph: from prompts, and from pairs of pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image
from safetensors import SafetensorError

from ..host.adapters import Told
from ..host.slider_training import Entry, ImageObjective, Preview, RangeObjective, Text, TextObjective, Ways, decoder
from ..host.training import Loop, Objective, Trainee, TrainingError, identity_of, published_names
from ._shared import LORA_MODEL

log = logging.getLogger("concept_nodes")
DIFFERENCE = "difference"
PUBLISHED, BOTH, WHOLE, ERASE, ABLATE = "published", "both poles", "range", "erase", "ablate"
STRENGTHS = {PUBLISHED: (1.0,), BOTH: (1.0, -1.0), WHOLE: (), ERASE: (1.0,), ABLATE: (1.0,)}  # WHOLE draws its own
SUBFOLDER = "concept_nodes"
HOLE = "{}"
RANGE = [-2, 2]  # of strengths that are worth a slider's while


def optimiser_inputs(steps: int, rate: float) -> list:
    """What sliders are trained by, with their own defaults."""
    return [
        *step_inputs(steps, rate),
        io.Int.Input("rank", default=4, min=1, max=256, tooltip="Rank of the slider's matrices."),
        io.Float.Input("alpha", default=1.0, min=0.01, max=256.0, step=0.1, tooltip="The slider is scaled by alpha / rank."),
    ]


def step_inputs(steps: int, rate: float) -> list:
    """What every training is set by."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=100_000, tooltip="Steps of the optimiser."),
        io.Int.Input("batch", default=4, min=1, max=256, tooltip="Pictures in each step."),
        io.Float.Input("learning_rate", default=rate, min=1e-7, max=1.0, step=1e-5, round=1e-7, tooltip="Of AdamW."),
    ]


def file_inputs(name: str = "my slider", shown: str = "strengths -1, 0 and 1") -> list:
    """Seed, name and previews."""
    return [
        io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False, tooltip="The same seed, the same file."),
        io.String.Input(
            "name",
            default=name,
            tooltip="The file's name in output/loras/concept_nodes. A file that is there already is kept under a number.",
        ),
        io.Int.Input(
            "previews",
            default=8,
            min=0,
            max=1000,
            optional=True,
            tooltip=f"How often, while it trains, the node shows one picture at {shown}. Each takes about as long as two "
            "steps of 4. Neutral: 0, none.",
        ),
    ]


def training_outputs(lora: str = "The slider, for Concept Slider's `lora`.") -> list:
    return [
        io.Custom(LORA_MODEL).Output("lora", display_name="lora", tooltip=lora),
        io.Custom("LOSS_MAP").Output("losses", display_name="losses", tooltip="The loss of each step, for the host's loss plot."),
        io.String.Output("file", display_name="file", tooltip="Where the file lies."),
        io.String.Output("report", display_name="report", tooltip="What was trained, on what, for how long."),
    ]


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
                        "time. 'range': all from -2 to 2 are, and at eta 0.5 the two ends draw what `more` and `less` ask for. "
                        "'erase' (ESD): strength 1 keeps the target out; more and less are not read. 'ablate': strength 1 makes the "
                        "target `more`; less is not read."
                    ),
                ),
                io.Float.Input(
                    "eta",
                    default=2.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How far strength 1 goes. With 'range', 0.5 lets strength 2 draw what `more` asks for. Not read by 'ablate'.",
                ),
                *optimiser_inputs(500, 2e-4),
                io.Int.Input("width", default=512, min=16, max=4096, step=8, tooltip="Width of the pictures that it is trained on."),
                io.Int.Input("height", default=512, min=16, max=4096, step=8, tooltip="Their height."),
                *file_inputs(),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Draws the previews. Neutral: not connected, they are rough, in the latent's colours."
                ),
            ],
            outputs=training_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, target, more, less, preserve, objective, eta, steps, batch, learning_rate, rank, alpha, width, height, seed, name,
        previews=0, vae=None,
    ) -> io.NodeOutput:  # fmt: skip
        stem = checked_stem(name)
        asked = dict(target=target, more=more, less=less, preserve=preserve, objective=objective)
        settings = Settings(steps, batch, learning_rate, rank, alpha, seed)
        rows, way, encode = prompts(asked), signed(objective, eta), encoder(clip)
        entries, empty = [Entry(*map(encode, row)) for row in rows], encode("")
        if len({text.context.shape for text in encode.read.values()}) > 1:
            raise TrainingError("The prompts take windows of unlike lengths. Make the longest ones shorter.")
        check_vae(model, vae)
        down = model.model.latent_format.spacial_downscale_ratio
        size = height // down, width // down

        def begin(trainee: Trainee) -> Objective:
            ways = Ways(trainee, len(entries), batch, size, seed)
            if objective == WHOLE:
                return RangeObjective(trainee, entries, empty, ways, eta=way)
            return TextObjective(trainee, entries, empty, ways, eta=way, strengths=STRENGTHS[objective])

        return trained(
            model, settings, stem, {**asked, "eta": eta, "width": width, "height": height}, encode, begin,
            Watched(entries[0].target, size, previews, vae),
            told=f"{len(entries)} prompts",
            about={"poles": [less.replace(HOLE, "").strip(), more.replace(HOLE, "").strip()], "range": RANGE},
            how=f"{objective}, eta {eta:g}",
        )  # fmt: skip


class SliderTrainImages(io.ComfyNode):
    """A slider trained from pairs of pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_SliderTrainImages",
            display_name="Train Slider from Images",
            category="concept/sliders",
            description=(
                "Trains a slider from pairs of pictures, before and after: for what words do not name. Four to six pairs that differ in "
                "the one thing will do. The file is a LoRA that any loader reads; Concept Slider takes it from the socket at once."
            ),
            search_aliases=["concept slider", "image pairs", "before after", "visual slider", "train LoRA"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, from one of the host's loaders. It is not changed."),
                io.Clip.Input("clip", tooltip="Reads the prompt."),
                io.Vae.Input("vae", tooltip="Reads the pictures, and draws the previews."),
                io.Image.Input("before", tooltip="Pictures with less of it: where strength -1 leads. A batch, or a list of any sizes."),
                io.Image.Input("after", tooltip="The same pictures with more of it, in the same order: where strength 1 leads."),
                io.String.Input(
                    "prompt", default="", multiline=True, tooltip="What all of the pictures show. Neutral: empty, the slider acts on all."
                ),
                io.Combo.Input(
                    "objective",
                    options=[DIFFERENCE, PUBLISHED],
                    default=DIFFERENCE,
                    tooltip=(
                        "'difference': the slider learns the way from one picture of a pair to the other. "
                        "'published': it learns to draw the pictures, and with them what is between them."
                    ),
                ),
                io.Float.Input(
                    "eta",
                    default=0.5,
                    min=0.0,
                    max=20.0,
                    step=0.05,
                    tooltip="How far strength 1 goes; 1 is the whole way from before to after. Not read by 'published'.",
                ),
                *optimiser_inputs(300, 2e-4),
                *file_inputs(),
            ],
            outputs=training_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, before, after, prompt, objective, eta, steps, batch, learning_rate, rank, alpha, seed, name, previews=(0,)
    ) -> io.NodeOutput:
        model, clip, vae, prompt, objective, eta = (given[0] for given in (model, clip, vae, prompt, objective, eta))
        seed, name, previews = (given[0] for given in (seed, name, previews))
        settings = Settings(*(given[0] for given in (steps, batch, learning_rate, rank, alpha)), seed)
        stem, encode = checked_stem(name), encoder(clip)
        if objective == DIFFERENCE and eta == 0:
            raise TrainingError("eta is 0, so there is nothing to learn. Set it to 0.5 or more.")
        check_vae(model, vae)
        down = model.model.latent_format.spacial_downscale_ratio
        pairs = [tuple(vae.encode(picture[None]) for picture in pair) for pair in picture_pairs(before, after, down)]
        pairs = [(less[0].clone(), more[0].clone()) for less, more in pairs]
        text = encode(prompt)

        def begin(trainee: Trainee) -> Objective:
            return ImageObjective(trainee, pairs, text, batch=settings.batch, seed=seed, eta=eta if objective == DIFFERENCE else None)

        return trained(
            model, settings, stem, {"prompt": prompt, "objective": objective, "eta": eta, "of": "pairs"}, encode, begin,
            Watched(text, tuple(pairs[0][0].shape[-2:]), previews, vae),
            told=f"{len(pairs)} pairs of pictures",
            about={"poles": ["before", "after"], "range": RANGE},
            how=f"image pairs, {objective}" + (f", eta {eta:g}" if objective == DIFFERENCE else ""),
            seen=[latent for pair in pairs for latent in pair],
        )  # fmt: skip


class Settings(NamedTuple):
    """Of the optimiser and the file."""

    steps: int
    batch: int
    learning_rate: float
    rank: int
    alpha: float
    seed: int


class Watched(NamedTuple):
    """What previews show: a prompt, at a size of latents (height, width), so many times; by an autoencoder if there is one; at which
    strengths.
    """

    text: Text
    size: tuple[int, int]
    times: int
    vae: Any
    strengths: tuple[float, ...] = (-1.0, 0.0, 1.0)


def check_vae(model, vae) -> None:
    """Raises TrainingError where an autoencoder is not of the model's kind."""
    channels = model.model.latent_format.latent_channels
    if vae is not None and vae.latent_channels != channels:
        raise TrainingError(
            f"The vae's latents have {vae.latent_channels} channels and the model's {channels}. Connect the model's own vae."
        )


def picture_pairs(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], multiple: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of pictures (h, w, 3) from two lists of batches, cut to multiples of so many pixels. Raises TrainingError that names the pair
    which cannot be learnt from.
    """
    less, more = ([picture[..., :3] for batch in given for picture in batch] for given in (before, after))
    if len(less) != len(more):
        raise TrainingError(
            f"There are {len(less)} pictures before and {len(more)} after, so they make no pairs. Give both sockets as many, in one order."
        )
    pairs = []
    for number, (one, other) in enumerate(zip(less, more, strict=True), 1):
        if one.shape != other.shape:
            raise TrainingError(
                f"Pair {number} is of unlike sizes: {one.shape[1]} x {one.shape[0]} pixels before, {other.shape[1]} x {other.shape[0]} "
                "after. Scale or crop one of them."
            )
        if not (one.isfinite().all() and other.isfinite().all()):
            raise TrainingError(f"Pair {number} holds values that are no numbers (NaN or infinity). Load it again, or leave it out.")
        if torch.equal(one, other):
            raise TrainingError(f"Both pictures of pair {number} are the same, so there is nothing between them to learn. Leave it out.")
        height, width = (length // multiple * multiple for length in one.shape[:2])
        if not height or not width:
            raise TrainingError(f"Pair {number} is {one.shape[1]} x {one.shape[0]} pixels, which is less than the model can draw.")
        pairs.append((one[:height, :width], other[:height, :width]))
    return pairs


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
        if kind in (PUBLISHED, BOTH, WHOLE) and more == less:
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
        raise TrainingError("eta is 0, so there is nothing to learn. Set it to 1 or more, or to 0.5 with 'range'.")
    return {ERASE: -eta, ABLATE: 0.0}.get(kind, eta)


def _filled(text: str, line: str) -> str:
    """A prompt with a line of `preserve` in its hole, or before it."""
    text = text.strip()
    return (text.replace(HOLE, line) if HOLE in text else f"{line} {text}" if line and text else text).strip()


def encoder(clip) -> Callable[[str], Text]:
    """Reads each prompt once; `read` has all of them."""

    def encode(text: str) -> Text:
        if text not in encode.read:
            encode.read[text] = Text(*clip.encode_from_tokens(clip.tokenize(text), return_pooled=True))
        return encode.read[text]

    encode.read = {}
    return encode


def trained(
    model, settings: Settings, stem: str, asked: dict, encode, begin: Callable[[Trainee], Objective], watched: Watched,
    *, told: str, about: dict, how: str, seen: Sequence[torch.Tensor] = (), on: dict | None = None, kept: torch.dtype = torch.float32,
) -> io.NodeOutput:  # fmt: skip
    """Train, save and tell. `asked` and `seen`: what else a checkpoint must be of, as settings and as tensors; `about`: what else the file
    says of itself; `on`: how a Trainee is made, where the settings' rank and alpha on a slider's layers will not do; `kept`: the numbers
    of the file. Raises TrainingError and UnsupportedFamily.
    """
    empty = encode("")
    identity = identity_of(
        model, {**asked, **settings._asdict()}, [part for text in encode.read.values() for part in text if part is not None] + [*seen]
    )
    bar = comfy.utils.ProgressBar(settings.steps)
    with Trainee(model, seed=settings.seed, **(on or {"rank": settings.rank, "alpha": settings.alpha})) as trainee:
        objective = begin(trainee)
        needs = trainee.fit(objective.memory)
        log.info(needs)
        file = checkpoint(stem, identity)
        loop = Loop(trainee.parameters(), steps=settings.steps, rate=settings.learning_rate, identity=identity, file=file)
        decode = decoder(trainee, watched.vae) if watched.times else None
        preview = Preview(trainee, watched.text, empty, watched.size, decode, settings.seed, watched.strengths) if decode else None

        def each(step: int) -> None:
            shown = None
            if preview is not None and (step + 1) * watched.times // settings.steps > step * watched.times // settings.steps:
                page = preview.page(f"step {step + 1} of {settings.steps}")[0]
                picture = Image.fromarray((page * 255).round().to(torch.uint8).numpy())
                shown = "JPEG", picture, max(picture.size)
            bar.update_absolute(step + 1, settings.steps, shown)

        outcome = loop.run(objective, each)
        lora = {key: tensor.to(kept) for key, tensor in trainee.state(published_names(trainee.model)).items()}
        layers, family = len(trainee.adapters), trainee.family.name
    first, last = (sum(part) / len(part) for part in (outcome.losses[:20], outcome.losses[-20:]))
    about = {
        "concept": stem,
        **about,
        "objective": f"{how}, {settings.steps} steps of {settings.batch}, learning rate {settings.learning_rate:g}, seed {settings.seed}",
        "base": family,
    }
    try:
        path, where = saved(lora, stem, about), "Saved as {}."
    except OSError as error:  # the training is not to be lost for that
        path, where = folder() / f"{stem}.safetensors", f"NOT saved as {{}} ({error}): save it from the lora output, or make room."
    report = "\n".join(
        [
            needs,
            f"Trained {len(outcome.losses)} steps of {settings.batch} on {layers} layers of {family}, {told}; "
            f"loss {first:.3g} in the first steps, {last:.3g} in the last.",
            *outcome.told,
            where.format(path),
        ]
    )
    return io.NodeOutput(Told(lora, about), {"loss": outcome.losses}, str(path), report, ui=ui.PreviewText(report))


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


NODES = [SliderTrainText, SliderTrainImages]
