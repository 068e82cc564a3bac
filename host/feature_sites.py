"""Where features live: blocks of a diffusion model, and blocks of a CLIP's text encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .encoders import Seat, seats
from .families import CROSS_ATTENTION, FEATURES, PICTURE_SECOND, Family, family_of
from .features import DIFF, TEXT, Features, FeaturesError, fingerprint

AUTO, ALL_LAYERS = "auto", "all layers"
NETWORK = "diffusion_model."
ENCODERS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5xxl": "T5-XXL"}
DEFAULT_TEXT = 0.75  # of an encoder's depth: Concept Steerers (arXiv 2501.19066) steers at layers 9 to 11 of 12, and 23 of 24


class TextSite(NamedTuple):
    """The residual stream after one block of a text encoder."""

    seat: Seat
    block: int
    module: torch.nn.Module
    width: int


def family_for(model) -> Family:
    """The family of a host model on which features are found and steered with. Raises UnsupportedFamily."""
    return family_of(model, FEATURES)


# --- the model --------------------------------------------------------------------------------------------------------------------


def blocks(model) -> list[str]:
    """Names of a host model's blocks that features may lie at, in the order in which the network runs. Raises UnsupportedFamily."""
    kinds = family_for(model).site_blocks
    return [name for name, module in model.diffusion_model.named_modules() if type(module).__name__ in kinds]


def layers(model) -> list[str]:
    """Names of its layers that features may lie at. Raises UnsupportedFamily."""
    return _matching(model, family_for(model).site_layers)


def word_layers(model) -> list[str]:
    """Names of further ones, whose rows are the prompt's. Raises UnsupportedFamily."""
    pattern = family_for(model).site_words
    return _matching(model, pattern) if pattern else []


def _matching(model, pattern: str) -> list[str]:
    return [name for name, _ in model.diffusion_model.named_modules() if re.search(pattern, name)]


def which_words(model, sites: Iterable[str]) -> str:
    """Which of the prompt's rows an effect on sites is to have (`Effect.text`): all, where sites are of these."""
    return "none" if {site.removeprefix(NETWORK) for site in sites}.isdisjoint(word_layers(model)) else "all"


def picture_at(module: torch.nn.Module) -> int:
    """Which of a site's outputs, and of its inputs, are its rows."""
    return int(type(module).__name__ in PICTURE_SECOND)


def model_sites(model, text: str) -> list[str]:
    """The sites that a text names: AUTO, the family's own; ALL_LAYERS or "cross-attention", all layers that there are; names, joined by
    "+". Raises UnsupportedFamily.
    """
    own = family_for(model).site
    if text == AUTO:
        # A model that is too small to have its family's own site has one in the middle.
        text = own if own in (CROSS_ATTENTION, *blocks(model)) else blocks(model)[len(blocks(model)) // 2]
    return layers(model) if text in (ALL_LAYERS, CROSS_ATTENTION) else [one.strip() for one in text.split("+")]


def width_at(model, site: str) -> int:
    """Numbers in a row at a site."""
    module = model.diffusion_model.get_submodule(site)
    if hasattr(module, "to_out"):
        module = module.to_out[0]
    if hasattr(module, "x_block"):
        module = module.x_block.attn.proj
    return next(getattr(module, name) for name in ("out_features", "hidden_size", "in_channels") if hasattr(module, name))


def checked_site(model, site: str, io: str) -> str:
    """The name of the module from the host's BaseModel whose output are a site's rows. Raises FeaturesError that lists the sites."""
    family, there = family_for(model), blocks(model) + layers(model) + word_layers(model)
    if site not in there:
        several = f"'{ALL_LAYERS}'" if family.site != CROSS_ATTENTION else f"'{CROSS_ATTENTION}'"
        known = f"{', '.join(blocks(model))}; {several} stands for {len(layers(model))} layers, the first of which is {layers(model)[0]}"
        if word_layers(model):
            known += f"; the prompt's rows are at {', '.join(word_layers(model))}"
        raise FeaturesError(f"This model ({family.name}) has no site '{site}'. Its sites are {known}.")
    if io == DIFF and site not in blocks(model):
        raise FeaturesError(f"{site} is a layer whose output is what it adds: take 'out'.")
    if io == DIFF and not writes_apart(family):
        raise FeaturesError(
            f"The blocks of {family.name} write their output over their input, so that what they add ('{DIFF}') cannot be told. Take 'out'."
        )
    # Where another extension computes cross-attention, the host asks its projections alone. The last gives what the whole would.
    return NETWORK + site + (".to_out" if site.endswith(".attn2") else "")


def writes_apart(family: Family) -> bool:
    """Whether a site's input is still there when its output is."""
    return "DoubleStreamBlock" not in family.site_blocks


def transforms_alone(family: Family) -> bool:
    """Whether it is a transformer throughout, and no UNet."""
    return "SpatialTransformer" not in family.site_blocks


def fitting(model, features: Features) -> str:
    """The name of the module that features of one site steer. Raises FeaturesError where they are not for it, and UnsupportedFamily."""
    family = family_for(model)
    if features.io == TEXT:
        raise FeaturesError(f"'{features.name}' is for a text encoder ({features.site}): connect it to Steer Text.")
    if features.family != family.name:
        raise FeaturesError(f"'{features.name}' was found on {features.family}, and this model is of {family.name}. Find it on this one.")
    name, width = checked_site(model, features.site, features.io), width_at(model, features.site)
    if features.width != width:
        raise FeaturesError(
            f"'{features.name}' has {features.width} numbers in a row, and {features.site} of this model has {width}: it was found on a "
            "model of another size. Find it on this one."
        )
    return name


def on_other_weights(features: Features, model=None, clip=None) -> list[str]:
    """A note where features were found on other weights than these: of a host model, or of a CLIP where they are of text."""
    if features.io == TEXT:
        site, now = features.site, "+".join(fingerprint(one.module) for one in text_sites(clip, features.site))
    else:
        features = features.each()[-1]
        site, now = features.site, fingerprint(model.diffusion_model.get_submodule(features.site))
    if not features.fingerprint or now == features.fingerprint:
        return []
    return [f"Note: the weights at {site} are not those that this was found on (another checkpoint, or the same in another type)."]


# --- text encoders ----------------------------------------------------------------------------------------------------------------


def text_sites(clip, site: str) -> list[TextSite]:
    """The blocks that a site names, "clip_l.9", or several encoders' side by side, "clip_l.10+clip_g.28". Raises FeaturesError that says
    what there is, and EncoderError for a kind of CLIP that is not known.
    """
    there, found = {seat.part: seat for seat in seats(clip)}, []
    for one in site.split("+"):
        part, _, number = one.strip().rpartition(".")
        blocks = _blocks(clip, part) if part in there else ()
        if not number.isdigit() or int(number) >= len(blocks):
            known = ", ".join(f"{part}.0 to {part}.{len(_blocks(clip, part)) - 1}" for part in there)
            raise FeaturesError(f"This CLIP has no site '{one.strip()}'. Its sites are {known}.")
        embeddings = getattr(clip.cond_stage_model, part).transformer.get_input_embeddings()
        found.append(TextSite(there[part], int(number), blocks[int(number)], embeddings.weight.shape[1]))
    if len({one.seat.part for one in found}) < len(found):
        raise FeaturesError(f"The site '{site}' names one encoder twice. Name one block of each.")
    return found


def default_text_site(clip) -> str:
    """The block at three quarters of the depth of the encoder that has the most rows of the context to itself."""
    seat = next(seat for seat in seats(clip) if seat.columns is not None)
    last = read_last(clip, seat)
    return f"{seat.part}.{min(last, int(DEFAULT_TEXT * len(_blocks(clip, seat.part))))}"


def read_last(clip, seat: Seat) -> int:
    """The number of the block whose output a CLIP's context has, with the clip skip that is set on it."""
    encoder = getattr(clip.cond_stage_model, seat.part)
    layer, index, _ = encoder.options_default
    if clip.layer_idx is not None:
        layer, index = ("last", None) if abs(clip.layer_idx) > encoder.num_layers else ("hidden", clip.layer_idx)
    if layer != "hidden":
        return encoder.num_layers - 1
    return index if index >= 0 else encoder.num_layers + index


def skipped(clip, site: TextSite) -> str | None:
    """What to tell where clip skip leaves a site out of the context, or None. Raises FeaturesError where nothing would come of it."""
    last, seat = read_last(clip, site.seat), site.seat
    if site.block <= last:
        return None
    told = f"{seat.part}.{site.block} lies behind {seat.part}.{last}, which is the last block that this CLIP reads (clip skip)"
    if seat.pooled is None:
        raise FeaturesError(f"{told}: nothing would come of it. Take a block up to {last}, or less clip skip.")
    return f"{told}: only the pooled vector changes."


def fitting_text(clip, features: Features) -> list[TextSite]:
    """The blocks that features steer. Raises FeaturesError where they are not for this CLIP."""
    if features.more:
        raise FeaturesError(f"'{features.name}' lie at {len(features.more) + 1} sites. In text encoders, join sites by '+'.")
    if features.io != TEXT:
        raise FeaturesError(f"'{features.name}' is for the model ({features.site}): connect it to Steer Model.")
    found = text_sites(clip, features.site)
    widths = [site.width for site in found]
    if sum(widths) != features.width:
        raise FeaturesError(
            f"'{features.name}' has {features.width} numbers in a row, and {features.site} of this CLIP has {sum(widths)}: it was found on "
            "another encoder. Find it on this one."
        )
    return found


def encoders_called(site: str) -> str:
    """What features of a text site say their family is."""
    parts = [one.strip().rpartition(".")[0] for one in site.split("+")]
    return "+".join(ENCODERS.get(part, part) for part in parts)


def _blocks(clip, part: str):
    transformer = getattr(clip.cond_stage_model, part).transformer
    return transformer.encoder.block if hasattr(transformer, "shared") else transformer.text_model.encoder.layers
