"""CONCEPT_FEATURES: what is steered with, in memory and as a file of some kilobytes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ops.steering import Directions, Scale, course
from . import files

FOLDER = "concept_features"
ENDING = ".safetensors"
OUT, DIFF, TEXT = "out", "diff", "text"
KINDS = (OUT, DIFF, TEXT)
HEADER = "concept_features"
VERSION = 1
NUMBERS = ("directions", "weights", "unit", "mean", "sigmas", "positive", "negative")
WORDS = ("name", "family", "site", "io", "gate", "whole", "fingerprint", "prompts", "likeness", "telling")
BEST = 2  # latents that the gate of older files counts
SAMPLE = 64  # numbers of each weight that a fingerprint reads
DAMAGED = (SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError)


class FeaturesError(ValueError):
    """Features that cannot be read or used, and what to do about it."""


class Readers(NamedTuple):
    """How latents of a sparse autoencoder are read, of rows as they are: z = <x, rows> + bias where that is above the threshold, else 0.
    rows (m, d), bias (m,), thresholds (m,)
    """

    rows: torch.Tensor
    bias: torch.Tensor
    thresholds: torch.Tensor


class Features(NamedTuple):
    """m directions at one site of one family, all in float32.

    name         what it is of
    family       of the model (host.families), or what the text encoder is called
    site         a module's name from the network ("output_blocks.4.1"), or block of a text encoder ("clip_l.9"); several encoders' that lie
                 side by side in one context are joined by "+"
    io           of what rows: "out" what the module gives, "diff" that less what it was given, "text" a text encoder's
    directions   (m, d) what an activation of 1 adds
    weights      (m,) of each in a steer
    unit         (m,) the activation that strength 1 means
    mean         (d,) of rows without the concept; a dense direction's activation is <x - mean, direction> / |direction|^2
    readers      of latents; None for dense directions
    sigmas       (S,) falling noise levels of the tables; one of 0 for text
    positive, negative  (S, m) mean activations with the concept and without it
    positions    (m,) rows that directions act on, -1 for all; None: all
    gate         score that separates the texts it was found on; None where there is none
    whole        whether a text's score is that of all its rows together, and not of the word that brings most
    fingerprint  of the model's weights at the site
    prompts      (with, without) the concept
    more         features of the same concept at further sites, which have none of their own
    likeness     of latents: cosine of what strength 1 adds and of the difference between rows with and without; None where it is not known
    telling      of latents: how many, from the first, a text's score counts; 0 for all
    """

    name: str
    family: str
    site: str
    io: str
    directions: torch.Tensor
    weights: torch.Tensor
    unit: torch.Tensor
    mean: torch.Tensor
    sigmas: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    readers: Readers | None = None
    positions: torch.Tensor | None = None
    gate: float | None = None
    whole: bool = False
    fingerprint: str = ""
    prompts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    more: tuple[Features, ...] = ()
    likeness: float | None = None
    telling: int = 0

    @property
    def width(self) -> int:
        return self.directions.shape[1]

    def checked(self) -> Features:
        """Itself. Raises FeaturesError that names what does not fit."""
        m, d = self.directions.shape if self.directions.ndim == 2 else (0, 0)
        if not m or not d:
            raise FeaturesError(f"{self._called} hold no directions. {MAKE}")
        levels = len(self.sigmas)
        shapes = {"weights": (m,), "unit": (m,), "mean": (d,), "sigmas": (levels,), "positive": (levels, m), "negative": (levels, m)}
        parts = {name: (getattr(self, name), shape) for name, shape in ({"directions": (m, d)} | shapes).items()}
        if self.readers is not None:
            wanted = zip(Readers._fields, self.readers, ((m, d), (m,), (m,)), strict=True)
            parts |= {f"readers.{name}": (tensor, shape) for name, tensor, shape in wanted}
        if self.positions is not None:
            parts["positions"] = (self.positions, (m,))
        for name, (tensor, shape) in parts.items():
            if tuple(tensor.shape) != shape:
                raise FeaturesError(f"{self._called} are no whole: {name} is {tuple(tensor.shape)} and should be {shape}. {MAKE}")
            if not bool(tensor.isfinite().all()):
                raise FeaturesError(f"{self._called} hold NaN or infinity in {name}. {MAKE}")
        if not levels or self.io not in KINDS or not self.site:
            raise FeaturesError(f"{self._called} do not say where they belong (site '{self.site}', io '{self.io}'). {MAKE}")
        for one in self.more:
            one.checked()
        return self

    def each(self) -> list[Features]:
        """One for each site."""
        return [self._replace(more=()), *self.more]

    @property
    def _called(self) -> str:
        return f"The features '{self.name}'"

    def operand(self) -> Directions:
        """For `ops.steering`."""
        if self.readers is None:
            read = self.directions / self.directions.square().sum(1, keepdim=True).clamp_min(1e-24)
            return Directions(self.directions, self.weights, read, -(read @ self.mean), None, self.positions)
        return Directions(self.directions, self.weights, *self.readers, self.positions)

    def scale(self, sigma: float) -> Scale:
        """What counts as 1 and as 0 at a noise level: the unit follows the course of what the concept makes of the activations there, and
        a dense direction's 0 is where it is without the concept.
        """
        if len(self.sigmas) == 1:
            zero = self.negative[0]
            unit = self.unit
        else:
            way = self.positive - self.negative
            whole = way.mean(0)
            ratio = course(self.sigmas, way, sigma) / torch.where(whole > 0, whole, 1.0)
            unit = self.unit * torch.where(whole > 0, ratio.clamp(min=0.0), 1.0)
            zero = course(self.sigmas, self.negative, sigma)
        return Scale(unit, zero if self.readers is None else torch.zeros_like(zero))

    def describe(self) -> str:
        """One line for reports."""
        kind = "directions" if self.readers is None else "latents"
        count = f"{len(self.directions)} {kind if len(self.directions) > 1 else kind[:-1]}"
        levels = f", {len(self.sigmas)} noise levels" if len(self.sigmas) > 1 else ""
        more = f" and at {len(self.more)} more sites" if self.more else ""
        return f"'{self.name}': {count} of {self.width} numbers at {self.site} ({self.io}) of {self.family}{more}{levels}."


MAKE = "Make them anew with Find Direction."


def show_folder() -> None:
    """Let the host know of models/concept_features, whatever an extra-paths file has added to it, and of what this pack writes beside its
    pictures.
    """
    for place in (Path(folder_paths.models_dir) / FOLDER, output_folder()):
        folder_paths.add_model_folder_path(FOLDER, str(place))
    paths, known = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*known, ENDING})


def names() -> list[str]:
    """Files of features, as a workflow stores them."""
    show_folder()
    return files.names(FOLDER)


def path_of(name: str) -> Path:
    """Raises MissingFile with near matches."""
    show_folder()
    return files.resolve(FOLDER, name)


def output_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def fingerprint(module: torch.nn.Module) -> str:
    """Of the weights of a module: shapes, and some numbers of each as they lie in memory. In another type it has another."""
    told = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(module.state_dict().items()):
        told.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.device.type != "meta":
            told.update(weight.detach().flatten()[:SAMPLE].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def _tensors(features: Features) -> dict[str, torch.Tensor]:
    """Of one site, by the names that they have in a file."""
    tensors = {key: getattr(features, key) for key in NUMBERS}
    if features.readers is not None:
        tensors |= {f"readers.{name}": tensor for name, tensor in features.readers._asdict().items()}
    if features.positions is not None:
        tensors["positions"] = features.positions
    return tensors


def _of(told: dict, tensors: dict[str, torch.Tensor]) -> Features:
    """The reverse, with what a file says in words."""
    readers = None
    if "readers.rows" in tensors:
        readers = Readers(*(tensors.pop(f"readers.{name}").float() for name in Readers._fields))
    tensors = {key: tensor.long() if key == "positions" else tensor.float() for key, tensor in tensors.items()}
    prompts = tuple(tuple(map(str, side)) for side in told["prompts"])
    if readers is not None:
        told = {"telling": min(BEST, len(readers.bias))} | told
    return Features(**(told | {"prompts": prompts}), **tensors, readers=readers)


def write(features: Features, path: Path, keep: bool = False) -> None:
    """As safetensors; a file that is there is only replaced by a whole one, and where it is to be kept and says something else, moved
    aside under the next number before. Raises OSError.
    """
    tensors = {f"{at}.{key}": tensor for at, one in enumerate(features.each()) for key, tensor in _tensors(one).items()}
    told = {"version": VERSION, "sites": [{key: getattr(one, key) for key in WORDS} for one in features.each()]}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, part, {HEADER: json.dumps(told)})
        if keep and path.exists():
            if part.read_bytes() == path.read_bytes():
                return  # untouched, or what was made with it would be made anew
            _replace_aside(part, path)
        else:
            os.replace(part, path)
    except SafetensorError as error:  # which is what a full disk is to safetensors
        raise OSError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def _replace_aside(part: Path, path: Path) -> None:
    number = 1
    while (kept := path.with_name(f"{path.stem}_{number:05}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    try:
        os.replace(part, path)
    except OSError:
        kept.rename(path)
        raise


def read(path: Path) -> Features:
    """Features from a file. Raises FeaturesError that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(HEADER, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        if not isinstance(told, dict):
            raise FeaturesError(f"'{path.name}' holds tensors, but no concept features. Choose a file that Find Direction wrote.")
        if told.get("version", 0) > VERSION:
            raise FeaturesError(f"'{path.name}' was written by a newer Concept Nodes. Update this one.")
        by_site: list[dict[str, torch.Tensor]] = [{} for _ in told["sites"]]
        for key, tensor in tensors.items():
            site, _, name = key.partition(".")
            by_site[int(site)][name] = tensor
        first, *more = (_of(*one) for one in zip(told["sites"], by_site, strict=True))
        return first._replace(more=tuple(more)).checked()
    except FeaturesError:
        raise
    except OSError as error:
        raise FeaturesError(
            f"'{path.name}' cannot be opened ({error}). Check that it is there and may be read. It lies at {path}."
        ) from error
    except DAMAGED as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FeaturesError(
            f"'{path.name}' cannot be read as concept features ({reason}). It is damaged, cut short or something else: download it again, "
            f"or {MAKE[0].lower() + MAKE[1:]} It lies at {path}."
        ) from error
