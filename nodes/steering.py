"""Steering by features: directions found from prompts, and concepts turned up, down or out along them."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from comfy_api.latest import io, ui

from ..host import features as host_features
from ..host import files
from ..host.directions import POOLINGS, WORDS, Runs, in_model, in_text, prompts_of
from ..host.dispatcher import attach
from ..host.feature_sites import AUTO, family_for, fitting_text, on_other_weights, skipped
from ..host.features import FOLDER, KINDS, OUT, TEXT, Features, FeaturesError, output_folder
from ..host.regions import Leaning
from ..host.steering import COND, SIDES, steer_model
from ..host.text_steering import BUT_FIRST, SCOPES, TextSteer, steered
from ..ops.schedule import Schedule
from ..ops.steering import ADD, CLAMP, MODES, Steer
from ._shared import (
    NONE,
    check_numbers,
    checked_mask,
    describe_window,
    mask_input,
    model_input,
    model_outputs,
    result,
    schedule_input,
    window_inputs,
)
from .regions import REGIONS

log = logging.getLogger("concept_nodes")

CONCEPT_FEATURES = "CONCEPT_FEATURES"
IN_TEXT, IN_MODEL = "text encoder", "model"
OWN, ON, OFF = "as the mode does", "on", "off"
OPPOSITE, SAME, PLAIN = "opposite", "same", "none"
LIMIT = 20.0
NAME_WORDS = 6
LIKE = 0.5  # likeness below which the dense direction is recommended


class OfFeatures(io.ComfyNode):
    """A node whose `file` is one of the features in the host's folders: checked before a run, and seen when it changes."""

    @classmethod
    def validate_inputs(cls, file=NONE):
        try:
            return file in (NONE, None) or bool(host_features.path_of(file))
        except files.MissingFile as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file=NONE, **_):
        return NONE if file in (NONE, None) else files.fingerprint(FOLDER, file)


def features_inputs() -> tuple[list, list]:
    """The file, among what a node must have; the socket, among what it may have."""
    file = io.Combo.Input(
        "file",
        options=[NONE, *host_features.names()],
        default=NONE,
        tooltip="Features from models/concept_features, or saved by Find Direction. 'none' (neutral) does nothing by itself.",
    )
    socket = io.Custom(CONCEPT_FEATURES).Input(
        "features", optional=True, tooltip="Features straight from the node that found them, instead of a file. Neutral: not connected."
    )
    return [file], [socket]


def strength_input() -> io.Float.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-LIMIT,
        max=LIMIT,
        step=0.05,
        tooltip=(
            "How strongly. add: 1 adds as much as the concept's own prompts bring, -1 takes as much away. scale: what there is of it times "
            "1 + strength. clamp: how far it is brought to `level`. ablate: 1 takes it out, 2 turns it around. 0 (neutral): nothing."
        ),
    )


def mode_input() -> io.Combo.Input:
    return io.Combo.Input(
        "mode",
        options=list(MODES),
        default=ADD,
        tooltip=(
            "add: everywhere, whatever is there (costs least). scale: where it is, more or less of it. clamp: the same amount everywhere. "
            "ablate: it is taken out where there is more of it than without the concept."
        ),
    )


def tuning_inputs() -> list:
    """How rows may change."""
    return [
        io.Float.Input(
            "level",
            default=0.0,
            min=-LIMIT,
            max=LIMIT,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="clamp: what the concept is held at. 0 is without it, 1 as its own prompts have it. Other modes do not read it.",
        ),
        io.Combo.Input(
            "keep_norm",
            options=[OWN, ON, OFF],
            default=OWN,
            optional=True,
            advanced=True,
            tooltip="Whether rows keep their lengths, so that they turn and do not grow. As the mode does: on for add, off for the others.",
        ),
        io.Float.Input(
            "most",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            advanced=True,
            tooltip="By what share of its length a row may change at most, as a guard against pictures that fall apart. 0 (neutral): any.",
        ),
    ]


def picture_inputs(where: str) -> list:
    """Of pictures that are sampled to look into the model."""
    return [
        io.Int.Input("width", default=512, min=16, max=4096, step=8, optional=True, tooltip=f"{where}: width of the pictures sampled."),
        io.Int.Input("height", default=512, min=16, max=4096, step=8, optional=True, tooltip=f"{where}: their height."),
        io.Int.Input("steps", default=12, min=1, max=200, optional=True, tooltip=f"{where}: steps of sampling, by Euler."),
        io.Float.Input(
            "cfg", default=4.0, min=0.0, max=30.0, step=0.5, optional=True, tooltip=f"{where}: CFG of the sampling. 1 for Flux."
        ),
        io.Int.Input("levels", default=4, min=1, max=50, optional=True, tooltip=f"{where}: at how many noise levels activations are kept."),
        io.Int.Input("pictures", default=2, min=1, max=64, optional=True, tooltip=f"{where}: pictures of each prompt."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            optional=True,
            tooltip="The same seed, the same file.",
        ),
    ]


class Asked(NamedTuple):
    """How to steer, as the nodes' inputs say it."""

    strength: float
    mode: str
    level: float
    keep_norm: str
    most: float

    def check(self) -> None:
        """Raises ValueError that names a number that cannot be worked with."""
        for name in ("strength", "level", "most"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, which is no number to work with. Set it to a finite number.")

    def steer(self, features: Features) -> Steer:
        keep = self.keep_norm == ON or (self.keep_norm == OWN and self.mode == ADD)
        return Steer(features.operand(), self.mode, self.level, keep, self.most)

    def describe(self) -> str:
        held = f" to {self.level:g}" if self.mode == CLAMP else ""
        return f"{self.mode}{held} at strength {self.strength:g}"


def check_gate(gate: float) -> None:
    """Raises ValueError."""
    if not math.isfinite(gate):
        raise ValueError(f"gate is {gate}, which is no number to work with. Set it to a finite number; 0 is neutral.")


def features_of(file: str, features: Features | None) -> Features | None:
    """From the socket, or else from the file. Raises ValueError where both are given, FeaturesError and MissingFile."""
    if features is not None and file != NONE:
        raise ValueError(
            f"Both a file ('{file}') and `features` are given. Set file to '{NONE}' to use `features`, or disconnect `features`."
        )
    if features is not None:
        return features.checked()
    return None if file == NONE else host_features.read(host_features.path_of(file))


class DirectionFind(io.ComfyNode):
    """A direction between prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptNodes_DirectionFind",
            display_name="Find Direction",
            category="concept/features",
            description=(
                "Finds the direction of a concept inside a text encoder or inside the model, from prompts with it and without it, by the "
                "mean of what they bring there. No training. Steer Text and Steer Model go along it."
            ),
            search_aliases=["steering vector", "concept vector", "mean difference", "CASteer", "activation", "representation engineering"],
            inputs=[
                io.Clip.Input("clip", tooltip="Reads the prompts; for 'text encoder', where the direction is looked for."),
                io.String.Input(
                    "positive", multiline=True, tooltip="Prompts with the concept, one in each line. A dozen is better than two."
                ),
                io.String.Input(
                    "negative", multiline=True, tooltip="The same prompts without it, line by line, or with something else instead."
                ),
                io.Combo.Input(
                    "where",
                    options=[IN_TEXT, IN_MODEL],
                    default=IN_TEXT,
                    tooltip="Inside the text encoder (a moment), or inside the model, for which pictures are sampled.",
                ),
                io.String.Input(
                    "site",
                    default=AUTO,
                    tooltip=(
                        "Where inside: clip_l.9 in a text encoder; cross-attention, all layers, output_blocks.4.1, double_blocks.18 in a "
                        "model. 'auto' takes the family's own; a name that is not there lists those that are."
                    ),
                ),
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip="Writes it to output/concept_features under this name; a file that is there is kept. Neutral: empty, no file.",
                ),
                io.Model.Input("model", optional=True, tooltip="For 'model': where the direction is looked for. It is not changed."),
                io.Combo.Input(
                    "pooling",
                    options=list(POOLINGS),
                    default=WORDS,
                    optional=True,
                    tooltip=(
                        "'text encoder': one direction from the mean of the words (things, colours), one from the mean of all rows but the "
                        "first (styles and moods, which the rows behind the words carry), or one for each position."
                    ),
                ),
                io.Combo.Input(
                    "activations",
                    options=[kind for kind in KINDS if kind != TEXT],
                    default=OUT,
                    optional=True,
                    advanced=True,
                    tooltip="'model': what the block gives (out), or what it adds to what it was given (diff, UNets' blocks).",
                ),
                *picture_inputs("'model'"),
            ],
            outputs=[
                io.Custom(CONCEPT_FEATURES).Output("features", display_name="features", tooltip="For Steer Text or Steer Model."),
                io.String.Output(
                    "report", display_name="report", tooltip="Where it was found, how well it tells the prompts apart, the file."
                ),
            ],
            has_intermediate_output=True,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, clip, positive, negative, where, site, file_name, model=None, pooling=WORDS, activations=OUT, width=512, height=512, steps=12,
        cfg=4.0, levels=4, pictures=2, seed=0,
    ) -> io.NodeOutput:  # fmt: skip
        if clip is None:
            raise FeaturesError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
        sides = prompts_of(positive, "positive"), prompts_of(negative, "negative")
        stem, site = checked_stem(file_name), site.strip() or AUTO
        name = stem or name_of(*sides)
        if where == IN_TEXT:
            found = in_text(clip, site, *sides, pooling, name)
        else:
            if model is None:
                raise FeaturesError("Nothing is connected to model. Connect it, or look for the direction in the text encoder.")
            if not math.isfinite(cfg):
                raise ValueError(f"cfg is {cfg}, which is no number to work with. Set it to a finite number.")
            found = in_model(model, clip, site, activations, *sides, Runs(width, height, steps, cfg, levels, pictures, seed), name)
        told = f"{len(sides[0])} prompts with the concept, {len(sides[1])} without."
        report = "\n".join([found.features.describe(), told, *found.report, *saved(found.features, stem)])
        return io.NodeOutput(found.features, report, ui=ui.PreviewText(report))


def name_of(positive: tuple[str, ...], negative: tuple[str, ...]) -> str:
    """The words that all prompts with the concept have and none without it; else the first prompt."""

    def words(text: str) -> list[str]:
        return [word.strip(".,;:()").lower() for word in text.split()]

    without = {word for text in negative for word in words(text)}
    own = [word for word in dict.fromkeys(words(positive[0])) if word not in without and all(word in words(text) for text in positive)]
    return " ".join((own or positive[0].split())[:NAME_WORDS])


def checked_stem(name: str) -> str:
    """A file's name without folders, or nothing. Raises FeaturesError."""
    stem = name.strip().removesuffix(".safetensors")
    if any(sign in stem for sign in '/\\:*?"<>|') or stem.startswith("."):
        raise FeaturesError(f"'{name}' cannot be a file's name. Use letters, digits, spaces, - and _.")
    return stem


def saved(features: Features, stem: str) -> list[str]:
    """Write the file, if it has a name; one of the same name that says something else is kept beside it under the next number."""
    if not stem:
        return []
    path = output_folder() / f"{stem}.safetensors"
    try:
        host_features.write(features, path, keep=True)
    except OSError as error:  # what was found is not to be lost for that
        return [f"NOT saved as {path} ({error}): make room, or choose another folder."]
    return [f"Saved as {path}."]


class SteerText(OfFeatures):
    """A CLIP that steers what it encodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        required, optional = features_inputs()
        return io.Schema(
            node_id="ConceptNodes_SteerText",
            display_name="Steer Text",
            category="concept/features",
            description=(
                "Turns a concept up, down or out while prompts are encoded, along a direction inside the text encoder. The model runs as "
                "ever: nothing is added to a step. It works at CFG 1."
            ),
            search_aliases=["steering vector", "concept steerer", "SAE", "text encoder", "erase concept", "ItD", "activation addition"],
            inputs=[
                io.Clip.Input(
                    "clip", tooltip="The text encoder to steer. It is not changed: the outputs are copies that act while they encode."
                ),
                *required,
                strength_input(),
                mode_input(),
                io.Combo.Input(
                    "tokens",
                    options=list(SCOPES),
                    default=BUT_FIRST,
                    tooltip="Which rows of a prompt are steered: all, all but the first (it only marks the beginning), or the words.",
                ),
                io.Float.Input(
                    "gate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip=(
                        "A prompt that brings less of the concept than this stays as it is, bit for bit: 1 is half way between the prompts "
                        "with and without it that the direction was found on. To take something out. 0 (neutral): every prompt is steered."
                    ),
                ),
                io.Combo.Input(
                    "negative",
                    options=[OPPOSITE, SAME, PLAIN],
                    default=PLAIN,
                    tooltip="How the second CLIP steers, for the negative prompt: the other way, the same way, or not at all (neutral).",
                ),
                *optional,
                *tuning_inputs(),
            ],
            outputs=[
                io.Clip.Output("positive", display_name="positive", tooltip="For the prompt."),
                io.Clip.Output("negative", display_name="negative", tooltip="For the negative prompt."),
                io.String.Output("report", display_name="report", tooltip="What is steered where, and what was left undone and why."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, clip, file, strength, mode, tokens, gate, negative, features=None, level=0.0, keep_norm=OWN, most=0.0
    ) -> io.NodeOutput:
        asked = Asked(strength, mode, level, keep_norm, most)
        asked.check()
        check_gate(gate)
        if clip is None:
            raise FeaturesError("clip is empty: this checkpoint has no text encoder. Connect a CLIP loader.")
        features = features_of(file, features)
        if strength == 0.0 or features is None:
            idle = "strength is 0" if features is not None else "no file is chosen and no features connected"
            return _clips(clip, clip, f"Nothing done: {idle}. The CLIP passes through unchanged.")
        sites, steer = fitting_text(clip, features), asked.steer(features)
        one = TextSteer(features, steer, strength, tokens, gate)
        other = {OPPOSITE: one._replace(strength=-strength), SAME: one}.get(negative)
        lines = [features.describe(), f"{asked.describe()}, {tokens}."]
        lines[1] = lines[1][0].upper() + lines[1][1:]
        lines += [f"Note: {note}" for note in filter(None, (skipped(clip, site) for site in sites))]
        if gate > 0 and features.gate is not None:
            lines.append(f"Prompts that score less than {gate * features.gate:.2f} stay as they are, which costs one more reading of each.")
        lines += on_other_weights(features, clip=clip) + _unlike(features)
        positive = steered(clip, one)
        return _clips(positive, clip if other is None else steered(clip, other), "\n".join(lines))


def _clips(positive, negative, report: str) -> io.NodeOutput:
    return io.NodeOutput(positive, negative, report, ui=ui.PreviewText(report))


class SteerModel(OfFeatures):
    """A model that is steered while it samples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        required, optional = features_inputs()
        return io.Schema(
            node_id="ConceptNodes_SteerModel",
            display_name="Steer Model",
            category="concept/features",
            description=(
                "Turns a concept up, down or out inside the model while it samples, along a direction at one of its blocks: everywhere or "
                "on a mask, in a window of the steps or by a schedule. No model call is added. Chain several: they add up."
            ),
            search_aliases=["steering vector", "SAE", "feature steering", "CASteer", "activation addition", "erase concept", "SAeUron"],
            inputs=[
                model_input(),
                *required,
                strength_input(),
                mode_input(),
                *window_inputs(),
                io.Combo.Input(
                    "cfg_mode",
                    options=list(SIDES),
                    default=COND,
                    tooltip="Which predictions are steered: the prompt's, both alike, or the prompt's and the negative's the other way.",
                ),
                schedule_input(),
                mask_input(),
                *optional,
                *tuning_inputs(),
            ],
            outputs=model_outputs("The model with the steer on it, for any sampler."),
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, file, strength, mode, start_percent, end_percent, cfg_mode, schedule="", mask=None, features=None, level=0.0,
        keep_norm=OWN, most=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        check_numbers(strength, start_percent, end_percent)
        asked = Asked(strength, mode, level, keep_norm, most)
        asked.check()
        family_for(model.model)
        course, mask = Schedule.parse(schedule), None if mask is None else checked_mask(mask)
        features = features_of(file, features)
        idle = None
        if features is None:
            idle = "no file is chosen and no features connected"
        elif strength == 0.0:
            idle = "strength is 0"
        elif start_percent == end_percent:
            idle = f"start_percent and end_percent are both {start_percent:g}, so no step lies between them"
        elif mask is not None and not mask.any():
            idle = "the mask is empty"
        elif course is not None and course.silent():
            idle = f"the schedule {course} is 0 throughout"
        if idle is not None:
            return result(model, f"Nothing done: {idle}. The model passes through unchanged.")
        effect = steer_model(model, features, asked.steer, strength, start_percent, end_percent, course, mask=mask, side=cfg_mode)
        where = "everywhere" if mask is None else f"on {float(mask.mean()):.0%} of the picture"
        when = describe_window(start_percent, end_percent) + (f", times {course} over sampling" if course else "")
        told = f"{asked.describe()} ({cfg_mode}), {where}, {when}."
        lines = [features.describe(), told[0].upper() + told[1:], "No model call is added."]
        lines += on_other_weights(features, model.model) + _unlike(features)
        model = model.clone()
        attach(model, effect)
        return result(model, "\n".join(lines))


def _unlike(features: Features) -> list[str]:
    """A note where latents add something else than what tells prompts with the concept from those without."""
    if features.likeness is None or features.likeness >= LIKE:
        return []
    return [
        f"Note: what these latents add has a cosine of {features.likeness:.2f} with what prompts with the concept bring. Below {LIKE:g}, a "
        "direction from Find Direction is likely to do better."
    ]


class RegionFeatures(OfFeatures):
    """Features hung on a region."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        required, optional = features_inputs()
        return io.Schema(
            node_id="ConceptNodes_RegionFeatures",
            display_name="Region Features",
            category="concept/regions",
            description=(
                "Turns a concept up, down or out in one named region: features of a model act on its part of the picture, features "
                "of a text encoder on what it reads. No model call is added. Several may hang on one region."
            ),
            search_aliases=["regional steering", "SAE", "steering vector", "feature steering", "regional concept", "SAeUron"],
            inputs=[
                io.Custom(REGIONS).Input("regions", tooltip="The regions, from Region or a canvas."),
                io.String.Input("region", default="region 1", tooltip="The name of the region that gets the features."),
                *required,
                strength_input(),
                mode_input(),
                *window_inputs(),
                io.Combo.Input(
                    "cfg_mode",
                    options=list(SIDES),
                    default=COND,
                    tooltip="What is steered: the prompt's side, both alike, or the prompt's and the negative's the other way.",
                ),
                schedule_input(),
                *optional,
                *tuning_inputs(),
                io.Combo.Input(
                    "tokens",
                    options=list(SCOPES),
                    default=BUT_FIRST,
                    optional=True,
                    advanced=True,
                    tooltip="Text encoders: which rows of what the region reads: all, all but the first (neutral), or the words.",
                ),
                io.Float.Input(
                    "gate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Text encoders: a text that brings less of the concept than this stays as it is. 0 (neutral): all are steered.",
                ),
            ],
            outputs=[io.Custom(REGIONS).Output("regions", display_name="regions", tooltip="The regions with the features on one of them.")],
        )

    @classmethod
    def execute(
        cls, regions, region, file, strength, mode, start_percent, end_percent, cfg_mode, schedule="", features=None, level=0.0,
        keep_norm=OWN, most=0.0, tokens=BUT_FIRST, gate=0.0,
    ) -> io.NodeOutput:  # fmt: skip
        check_numbers(strength, start_percent, end_percent)
        asked = Asked(strength, mode, level, keep_norm, most)
        asked.check()
        check_gate(gate)
        regions.check_name(region)
        course, features = Schedule.parse(schedule), features_of(file, features)
        if features is None:
            return io.NodeOutput(regions)
        if features.io == TEXT and course is not None:
            raise FeaturesError(
                f"'{features.name}' is for a text encoder, which reads a text once and not step by step: a schedule has no meaning "
                "there. Empty it and set start_percent and end_percent."
            )
        leaning = Leaning(features, asked.steer, asked.describe(), strength, start_percent, end_percent, course, cfg_mode, tokens, gate)
        return io.NodeOutput(regions.with_features(region, leaning))


NODES = [DirectionFind, SteerText, SteerModel, RegionFeatures]
