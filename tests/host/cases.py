"""How each node of the pack is exercised by the law tests. A node without a case fails them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import comfy.sd
import folder_paths
import models
import torch
from safetensors.torch import save_file

from concept_nodes.host.regions import Hung, Regions
from concept_nodes.nodes import NODES
from concept_nodes.nodes.filter import FilterReattention
from concept_nodes.nodes.maps import Capture
from concept_nodes.nodes.regions import MaskedLoRA, RegionsApply
from concept_nodes.nodes.sliders import Slider, SliderPrompts
from concept_nodes.nodes.steering import SteerModel
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region


class Case(NamedTuple):
    """An effect node on a MODEL.

    execute   -> the node's whole output for settings with a clear effect
    tells     what its report must hold with these settings
    neutral   settings that must do nothing -> the model with them
    reference the host's own way to the same model, where there is one
    refuses   kinds of models that it says it cannot act on
    unseen    it watches: the picture stays what it is, bit for bit
    """

    execute: Callable
    tells: tuple[str, ...]
    neutral: dict[str, Callable]
    reference: Callable | None = None
    refuses: tuple[str, ...] = ()
    unseen: bool = False

    def acts(self, model):
        """The model with a clear effect."""
        return self.execute(model).result[0]


def slider(model, strength=0.8, start=0.0, end=1.0, schedule="", **lora):
    return Slider.execute(model, "none", strength, start, end, lora=models.lora(model, **lora), schedule=schedule)


def slide(*args, **options):
    return slider(*args, **options).result[0]


def masked(model, strength=0.8, start=0.0, end=1.0, mask=None, text="own", **lora):
    """The node on a LoRA file of its own, made for the model."""
    file, folder = "masked_case.safetensors", Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(models.lora(model, **lora), folder / file)
    mask = LEFT if mask is None else mask
    return MaskedLoRA.execute(model, file, strength, start, end, mask, text)


def put_masked(*args, **options):
    return masked(*args, **options).result[0]


def regions(model, strength=0.8, start=0.0, end=1.0, visible=True, **lora):
    """Apply Regions with a LoRA on the left half and another on the rest."""
    listed = Regions()
    for name, part in (("left", {"shapes": (Box(0, 0, 0.5, 1),)}), ("others", {"rest": True})):
        listed = listed.with_region(Region(name, visible=visible, **part))
        listed = listed.with_lora(name, Hung("random", models.lora(model, seed=len(name), **lora), strength, 1.0, start, end))
    return RegionsApply.execute(model, [], [], listed)


def put_regions(*args, **options):
    return regions(*args, **options).result[0]


def prompts(model, strength=0.8, start=0.0, end=1.0, form="guidance", schedule="", other=40):
    """Slider from Prompts between two random prompts."""
    positive, more, less = (models.conditioning(model, seed) for seed in (10, 30, other))
    return SliderPrompts.execute(model, positive, more, less, form, strength, start, end, schedule)


def put_prompts(*args, **options):
    return prompts(*args, **options).result[0]


def reattention(model, strength=1.0, start=0.0, end=1.0, original=30, **options):
    """Latent re-attention, sampled with another prompt than its original."""
    return FilterReattention.execute(model, models.conditioning(model, original), strength, start, end, **options)


def put_reattention(*args, **options):
    return reattention(*args, **options).result[0]


def steer(model, strength=0.8, start=0.0, end=1.0, mask=None, schedule="", mode="add", side="cond", found=None, **options):
    """Steer Model along random directions."""
    found = models.features(model) if found is None else found
    return SteerModel.execute(model, "none", strength, mode, start, end, side, schedule, mask, found, **options)


def put_steer(*args, **options):
    return steer(*args, **options).result[0]


def stock_lora(model, strength=0.8, **lora):
    return comfy.sd.load_lora_for_models(model, None, models.lora(model, **lora), strength, 0)[0]


def capture(model, start=0.0, end=1.0):
    return Capture.execute(model, "all", start, end)


LEFT = torch.zeros(1, 64, 64)
LEFT[:, :, :32] = 1

EFFECTS = {
    "ConceptNodes_Capture": Case(
        execute=capture,
        tells=("attentions to words are read in all steps", "stays the same"),
        neutral={"empty window": lambda model: capture(model, 0.5, 0.5).result[0]},
        unseen=True,
    ),
    "ConceptNodes_MaskedLoRA": Case(
        execute=masked,
        tells=("strength 0.8", "50% of the picture", "in all steps", "119 layers", "rank 2"),
        neutral={
            "strength 0": lambda model: put_masked(model, 0.0),
            "empty window": lambda model: put_masked(model, start=0.5, end=0.5),
            "empty mask": lambda model: put_masked(model, mask=torch.zeros(1, 64, 64)),
            "no file": lambda model: MaskedLoRA.execute(model, "none", 1.0, 0.0, 1.0, LEFT).result[0],
        },
    ),
    "ConceptNodes_RegionsApply": Case(
        execute=regions,
        tells=("'left': 50% of the picture", "'others': 50% of the picture", "'random' at 0.8", "119 layers"),
        neutral={
            "strength 0": lambda model: put_regions(model, 0.0),
            "empty window": lambda model: put_regions(model, start=0.5, end=0.5),
            "invisible": lambda model: put_regions(model, visible=False),
            "no regions": lambda model: RegionsApply.execute(model, [], [], Regions()).result[0],
        },
    ),
    "ConceptNodes_SliderPrompts": Case(
        execute=prompts,
        tells=("0.8 times the way", "in all steps", "One model call is added"),
        neutral={
            "strength 0": lambda model: put_prompts(model, 0.0),
            "empty window": lambda model: put_prompts(model, start=0.5, end=0.5),
            "equal poles": lambda model: put_prompts(model, other=30),
            "embedding": lambda model: put_prompts(model, form="embedding"),
        },
    ),
    "ConceptNodes_FilterReattention": Case(
        execute=reattention,
        tells=("Of 4 skip connections, 3 with features of 64 (to 0.2 of itself)", "One model call is added", "in all steps"),
        neutral={
            "strength 0": lambda model: put_reattention(model, 0.0),
            "empty window": lambda model: put_reattention(model, start=0.5, end=0.5),
        },
        refuses=("flux",),
    ),
    "ConceptNodes_SteerModel": Case(
        execute=steer,
        tells=("'random'", "Add at strength 0.8 (cond)", "everywhere", "in all steps", "output_blocks.1.1", "No model call"),
        neutral={
            "strength 0": lambda model: put_steer(model, 0.0),
            "empty window": lambda model: put_steer(model, start=0.5, end=0.5),
            "empty mask": lambda model: put_steer(model, mask=torch.zeros(1, 64, 64)),
            "silent schedule": lambda model: put_steer(model, schedule="0:0"),
            "no features": lambda model: SteerModel.execute(model, "none", 1.0, "add", 0.0, 1.0, "cond").result[0],
        },
    ),
    "ConceptNodes_Slider": Case(
        execute=slider,
        tells=("strength 0.8", "in all steps", "119 layers", "rank 2"),
        neutral={
            "strength 0": lambda model: slide(model, 0.0),
            "empty window": lambda model: slide(model, start=0.5, end=0.5),
            "window past the end": lambda model: slide(model, start=1.0, end=1.0),
            "no file": lambda model: Slider.execute(model, "none", 1.0, 0.0, 1.0).result[0],
        },
        reference=stock_lora,
    ),
}

# Nodes that put nothing on a model, and why the laws about sampling have nothing to hold for them.
PLUMBING = {
    "ConceptNodes_Canvas": "makes a list; what the list does on a model is Apply Regions' case",
    "ConceptNodes_Region": "adds to a list; what the list does on a model is Apply Regions' case",
    "ConceptNodes_RegionLoRA": "adds to a list; what the list does on a model is Apply Regions' case",
    "ConceptNodes_RegionSlider": "adds to a list; test_slider.py holds that it acts as a region's LoRA does",
    "ConceptNodes_RegionFilter": "adds to a list; test_region_filter.py holds what is read where, and that nothing to do is nothing",
    "ConceptNodes_Localize": "adds to a list; test_localize.py holds the laws for what such a list does on a model",
    "ConceptNodes_RegionsToMasks": "draws masks; test_regions.py holds what they are",
    "ConceptNodes_SliderTrainText": "trains a file; test_training.py holds what it is",
    "ConceptNodes_SliderTrainImages": "trains a file; test_training.py holds what it is",
    "ConceptNodes_LabPairs": "draws pictures; test_lab_scenes.py holds what they are",
    "ConceptNodes_SliderSweep": "a list of what Slider makes; test_sweep.py holds that each is",
    "ConceptNodes_Filter": "encodes a text; test_filter.py holds that nothing to do is the host's own encoding, bit for bit",
    "ConceptNodes_DirectionFind": "finds numbers; test_steering.py holds what they are",
    "ConceptNodes_SteerText": "encodes a text; test_steering.py holds that nothing to do is the host's own encoding, bit for bit",
    "ConceptNodes_SAEFind": "finds numbers; test_sae_finding.py holds what they are, and that steering by them is the autoencoder's own",
    "ConceptNodes_SAETrain": "trains a file; test_sae_train.py holds what it is",
    "ConceptNodes_SAELoader": "loads a file; test_sae_files.py holds what it loads",
    "ConceptNodes_Sheet": "draws a page; test_sweep.py holds what is on it",
    "ConceptNodes_LabLoader": "loads a model with the host's own classes; what it loads is tested in test_lab*.py",
    "ConceptNodes_Maps": "draws masks; test_maps.py holds what they are",
    "ConceptNodes_RunReport": "passes a latent on; test_run_report.py holds that it is the same object",
}

IDS = [node.define_schema().node_id for node in NODES]
EFFECT_IDS = [node_id for node_id in IDS if node_id in EFFECTS]
