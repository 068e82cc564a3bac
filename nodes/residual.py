"""A subject taught from a few pictures, and put on a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy_api.latest import io

from ..host import adapters, files
from ..host.dispatcher import attach
from ..host.families import ALL, Family, family_of
from ..host.filter import OFF
from ..host.lag import CUTS, localized, place
from ..host.localize import MEDIAN, OTSU
from ..host.maps import Bound, bind
from ..host.residual_training import LAYERS, OUTPUTS, Lesson, ResidualObjective, layers_of, least_rank, rank_of
from ..host.slider_training import Text
from ..host.training import Objective, Trainee, TrainingError
from ..host.words import find, length_of
from ..ops.masks import pool
from ._shared import (
    CONNECTED,
    LORA_MODEL,
    NONE,
    Hanging,
    OfFile,
    check_one_source,
    checked_mask,
    file_input,
    layers_input,
    mask_input,
    model_input,
    model_outputs,
    result,
    schedule_input,
    strength_input,
    window_inputs,
)
from .slider_training import Settings, Watched, check_vae, checked_stem, encoder, file_inputs, step_inputs, trained, training_outputs

LIMIT = 2.0
CUT_TOLD = {MEDIAN: "the half of all positions that attend most", OTSU: "what lies above Otsu's cut of the map"}


class ResidualTrain(io.ComfyNode):
    """A subject taught from a few pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_ResidualTrain",
            display_name="Train Personalized Residual",
            category="concept/attention",
            description=(
                "Teaches a model one subject from a few pictures of it, under a word of its own: your pet, a product, a character. A mask "
                "for each picture lets one photograph of several subjects serve. The file is a small LoRA that any loader reads; "
                "Personalized Residual takes it from the socket at once."
            ),
            search_aliases=[
                "personalized residuals",
                "DreamBooth",
                "train LoRA",
                "subject",
                "custom diffusion",
                "textual inversion",
                "LAG",
            ],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, from one of the host's loaders. It is not changed."),
                io.Clip.Input("clip", tooltip="Reads the captions. It is not trained."),
                io.Vae.Input("vae", tooltip="Reads the pictures, and draws the previews."),
                io.Image.Input("images", tooltip="Pictures of the subject, three to five or more. A batch, or a list of any sizes."),
                io.String.Input(
                    "prompt",
                    default="a photo of sks dog",
                    multiline=True,
                    tooltip=(
                        "What the pictures show, with the identifier in it. One line for all; as many lines as pictures: one for each, in "
                        "order; else each step draws a line."
                    ),
                ),
                io.String.Input(
                    "identifier",
                    default="sks",
                    tooltip="The word that is to mean the subject, one that the model has no meaning for. Every line of the prompt has it.",
                ),
                io.String.Input(
                    "class_word",
                    default="dog",
                    tooltip="What kind of thing it is, as the prompt says it. Neutral: empty, no such word is noted in the file.",
                ),
                *step_inputs(150, 1e-3),
                io.Float.Input(
                    "rank_share",
                    default=0.05,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Rank of each layer's matrices as a share of its width: .05 is 16, 32 and 64 in SD 1.5. At least 4 on the outputs, "
                        "1 on all layers."
                    ),
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default=OUTPUTS,
                    tooltip=(
                        "'attention outputs': what gives each block's attention to the picture, as published. 'attention and "
                        "feed-forward': every layer of those blocks, for a subject that the first does not get; slower, a larger file. "
                        "'... of the picture': of these all but what makes something of the prompt."
                    ),
                ),
                *file_inputs("my subject", "strengths 0 and 1"),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip=(
                        "Where the subject is in each picture, in the pictures' order and sizes, white for it: nothing else is learnt. "
                        "Neutral: not connected, everywhere."
                    ),
                ),
                io.String.Input(
                    "preserve",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=(
                        "Prompts without the identifier, one a line, that are to draw what they drew before: a few ordinary ones. The "
                        "empty prompt is kept with them. A step takes about twice as long. Neutral: empty, nothing is kept, as published."
                    ),
                ),
                io.Float.Input(
                    "preserve_weight",
                    default=0.1,
                    min=0.01,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip=(
                        "How much those prompts count beside the pictures: more keeps more of them and learns more slowly. No effect where "
                        "preserve is empty."
                    ),
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "Learns at the noise that sampling has from its first step, 0, up to this share of it. What a subject looks like "
                        "is settled in noise; of the last steps it learns little. Neutral: 1, all of it, as published."
                    ),
                ),
            ],
            outputs=training_outputs("The residual, for Personalized Residual's `lora`."),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model, clip, vae, images, prompt, identifier, class_word, steps, batch, learning_rate, rank_share, layers, seed, name,
        previews=(0,), masks=None, preserve=("",), preserve_weight=(0.1,), end_percent=(1.0,),
    ) -> io.NodeOutput:  # fmt: skip
        model, clip, vae, prompt, layers, name = (given[0] for given in (model, clip, vae, prompt, layers, name))
        identifier, class_word, seed, share, preserve = identifier[0].strip(), class_word[0].strip(), seed[0], rank_share[0], preserve[0]
        end, weight = end_percent[0], preserve_weight[0]
        settings = Settings(steps[0], batch[0], learning_rate[0], share, 1.0, seed)
        stem, encode, family = checked_stem(name), encoder(clip), family_of(model.model)
        check_vae(model, vae)
        down = model.model.latent_format.spacial_downscale_ratio
        given = subjects(images, masks, down)
        lines = captions(prompt, len(given), identifier, class_word, lambda text, word: find(clip, family, text, word))
        others = kept_lines(preserve, identifier, lambda text, word: find(clip, family, text, word))
        texts, kept = [tuple(encode(line) for line in each) for each in lines], [encode(line) for line in others]
        if len({text.context.shape for text in encode.read.values()}) > 1:
            raise TrainingError("The lines of prompt and preserve take windows of unlike lengths. Make the longest ones shorter.")
        latents = [vae.encode(picture[None])[0].clone() for picture, _ in given]
        lessons = [Lesson(latent, mask, text) for latent, (_, mask), text in zip(latents, given, texts, strict=True)]

        def begin(trainee: Trainee) -> Objective:
            return ResidualObjective(trainee, lessons, batch=settings.batch, seed=seed, preserve=kept, weight=weight, end=end)

        kind = {"identifier": identifier, "class_word": class_word}
        asked = {"prompt": prompt, "layers": layers, "of": "residual", "preserve": others, "weight": weight, "end_percent": end}
        asked |= kind
        inside = "" if masks is None else f", inside masks over {sum(float(mask.mean()) for _, mask in given) / len(given):.0%} of them"
        shown: Text = texts[0][0]
        return trained(
            model, settings, stem, asked, encode, begin,
            Watched(shown, tuple(latents[0].shape[-2:]), previews[0], vae, (0.0, 1.0)),
            told=f"{len(given)} pictures of '{' '.join(filter(None, kind.values()))}'{inside}",
            about={**kind, "range": [-LIMIT, LIMIT], "kind": "personalized residual"},
            how=f"personalized residual on {layers}"
            + (f", up to {end:g} of sampling" if end < 1 else "")
            + (f", other prompts preserved: {len(others) - 1}" if others else ""),
            seen=[*latents, *(mask for _, mask in given if mask is not None)],
            on={
                "layers": layers_of(family, layers), "rank": rank_of(share, least_rank(layers)), "alpha": None, "square": layers == OUTPUTS
            },
            kept=torch.float16,
        )  # fmt: skip


def subjects(images: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None, multiple: int) -> list[tuple]:
    """Pictures (h, w, 3) from a list of batches, each with its mask (h, w) or None, cut to multiples of so many pixels. Raises
    TrainingError that names the one which cannot be learnt from.
    """
    pictures = [picture[..., :3] for batch in images for picture in batch]
    if not pictures:
        raise TrainingError("images holds no picture. Connect at least one.")
    listed: list = [None] * len(pictures)
    if masks is not None:
        listed = [mask for batch in masks for mask in (batch if batch.ndim == 3 else batch[None])]
        if len(listed) != len(pictures):
            raise TrainingError(
                f"There are {len(pictures)} pictures and {len(listed)} masks. Give one mask for each, in one order, or none."
            )
    made = []
    for number, (picture, mask) in enumerate(zip(pictures, listed, strict=True), 1):
        told = f"{picture.shape[1]} x {picture.shape[0]} pixels"
        if not picture.isfinite().all():
            raise TrainingError(f"Picture {number} holds values that are no numbers (NaN or infinity). Load it again, or leave it out.")
        height, width = (length // multiple * multiple for length in picture.shape[:2])
        if not height or not width:
            raise TrainingError(f"Picture {number} is {told}, which is less than the model can draw.")
        if mask is not None:
            # Before its size: the host's Load Image gives an empty mask of 64 x 64 for a picture without transparency.
            if not (mask.isfinite().all() and bool((mask > 0).any())):
                raise TrainingError(
                    f"Mask {number} is {'empty' if mask.isfinite().all() else 'no mask (NaN or infinity)'}, so nothing of picture {number} "
                    "would be learnt. Paint the subject white, or disconnect masks to learn all of the pictures."
                )
            if mask.shape != picture.shape[:2]:
                raise TrainingError(
                    f"Mask {number} is {mask.shape[1]} x {mask.shape[0]} pixels and picture {number} {told}. Scale or crop one of them."
                )
            mask = mask.float().clamp(0, 1)[:height, :width].cpu()
            if not (pool(mask[None], height // multiple, width // multiple) > 0).any():
                raise TrainingError(f"Mask {number} is white in what is cut off picture {number} only. Crop the picture to the subject.")
        made.append((picture[:height, :width], mask))
    return made


def captions(prompt: str, pictures: int, identifier: str, class_word: str, find) -> list[tuple[str, ...]]:
    """The captions of each picture, from a prompt's lines: one each where there are as many, else all of them for each. find(text, words):
    whether the words stand in the text. Raises TrainingError.
    """
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    if not identifier:
        raise TrainingError("identifier is empty. Write the word that is to mean the subject, such as sks.")
    for line in lines or [""]:
        for key, word in (("identifier", identifier), ("class_word", class_word)):
            if word and not find(line, word):
                where = f"The line '{line}' of prompt" if line else "prompt is empty: it"
                raise TrainingError(f"{where} does not hold the {key} '{word}'. Write it there, or set {key} to a word that is there.")
    return [(line,) for line in lines] if len(lines) == pictures else [tuple(lines)] * pictures


def kept_lines(preserve: str, identifier: str, find) -> list[str]:
    """What is to stay as it is: the lines of `preserve` and the empty prompt, which guidance starts from; of no line nothing. find as in
    `captions`. Raises TrainingError.
    """
    lines = [line.strip() for line in preserve.splitlines() if line.strip()]
    for line in lines:
        if find(line, identifier):
            raise TrainingError(
                f"The line '{line}' of preserve holds the identifier '{identifier}', which could then learn nothing. Take the word out."
            )
    return [*lines, ""] if lines else []


class Residual(OfFile):
    """A subject that was taught, on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_Residual",
            display_name="Personalized Residual",
            category="concept/attention",
            description=(
                "Puts a subject that Train Personalized Residual taught on a model, in a window of the steps: everywhere, where a mask is, "
                "or where the model attends to its words. Weights are not changed and no model call is added. Any other LoRA works, too; "
                "the report says what the file is."
            ),
            search_aliases=["personalized residuals", "DreamBooth", "subject", "LoRA", "identity", "LAG", "localized"],
            inputs=[
                model_input(),
                file_input("file", "A residual for the model's family, from models/loras. 'none' (neutral) does nothing by itself."),
                strength_input(
                    "strength", LIMIT, 0.05, "How strongly it acts: 1 as trained, negative away from the subject, 0 (neutral) not at all."
                ),
                *window_inputs(),
                io.Custom(LORA_MODEL).Input(
                    "lora",
                    optional=True,
                    tooltip="A residual straight from its training, in place of `file`, which must then be 'none'. Neutral: not connected.",
                ),
                schedule_input(),
                layers_input(),
                mask_input(),
                io.Combo.Input(
                    "localize",
                    options=[OFF, *CUTS],
                    default=OFF,
                    optional=True,
                    tooltip=(
                        "Acts only where the model attends to the words: in UNets each block where it does so itself, in the same call. "
                        "'median': the half of the picture that attends most, as published; 'otsu': by the map's histogram. Needs clip "
                        "and prompt. Neutral: off."
                    ),
                ),
                io.Clip.Input("clip", optional=True, tooltip="For localize: it tells which tokens are whose. Neutral: not connected."),
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="For localize: the text of the positive prompt, with the words in it. Neutral: empty.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip="For localize: the phrase to find it by. Neutral: empty, the file's own identifier and class word.",
                ),
            ],
            outputs=model_outputs("The model with the residual on it."),
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, file, strength, start_percent, end_percent, lora=None, schedule="", layers=ALL, mask=None, localize=OFF, clip=None,
        prompt="", words="",
    ) -> io.NodeOutput:  # fmt: skip
        check_one_source("file", file, lora)
        hanging = Hanging(strength, start_percent, end_percent, schedule, layers, mask=mask)
        told = getattr(lora, "about", {}) if file == NONE else adapters.about(files.resolve("loras", file))
        effects: list = []

        def made(*how) -> adapters.AdapterEffect:
            effects.append(adapters.AdapterEffect(*how))
            return effects[0]

        put, lines = hanging.put(model, "Residual", "file", file, lora, make=made)
        if put is not model:
            lines.insert(1, said(told, CONNECTED if file == NONE else file))
        for effect in effects if localize != OFF and put is not model else ():
            bound, length = sought(clip, family_of(model.model), prompt, words, told)
            finder = localized(model.model, effect.parts, bound, length, localize, None if mask is None else checked_mask(mask))
            effect.place = place(finder)
            effect.text = "own" if any(name.endswith((".to_k", ".to_v")) for name in effect.parts) else "none"
            attach(put, finder)
            own = "its own block attends" if finder.behind else "the model attended, in the steps before,"
            lines.append(f"Each layer acts where {own} to {bound.told}: {CUT_TOLD[localize]}.")
        return result(put, "\n".join(lines))


def sought(clip, family: Family, prompt: str, phrase: str, told: dict) -> tuple[Bound, int]:
    """What localizes, and how many rows the prompt has: a phrase, or else a file's own words, as far as they stand in the prompt. Raises
    ValueError and MapsError.
    """
    if clip is None or not prompt.strip():
        raise ValueError("localize needs the prompt and its text encoder. Connect clip and prompt, or set localize to 'off'.")
    both = " ".join(told[key] for key in ("identifier", "class_word") if key in told)
    phrase = phrase.strip() or (both if find(clip, family, prompt, both) else told.get("identifier", ""))
    if not phrase:
        raise ValueError("localize does not know what to look for: the file names no words. Write some into words, as the prompt has them.")
    return bind(clip, family, prompt, [phrase])[0], length_of(clip, family, prompt)


def said(told: dict, label: str) -> str:
    """What a file says that its words are."""
    if "identifier" not in told:
        return (
            f"'{label}' names no identifier: it is no residual of this pack and acts as any LoRA does, for the words it was trained with."
        )
    return f"Its words are '{' '.join(told[key] for key in ('identifier', 'class_word') if key in told)}': write them in the prompt."


NODES = [ResidualTrain, Residual]
