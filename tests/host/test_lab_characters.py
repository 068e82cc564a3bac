"""The characters' LoRA files: trained on a frozen model, read by the host's loader and by ours, and drawn when their word is said."""

import json
import logging
import random

import comfy.utils
import pytest
import torch
from safetensors import safe_open

from concept_nodes.host import adapters, lab
from concept_nodes.host.dispatcher import attach
from concept_nodes.lab import characters, lowrank, measure, train_character, train_denoiser
from concept_nodes.lab.__main__ import main
from concept_nodes.lab.captions import COMPLETE, PLACE_WORDS, RESERVED_WORDS, Writer, write_captions
from concept_nodes.lab.eye import Eye
from concept_nodes.lab.scenes import CHARACTERS, KINDS, SHAPES

# Prompts of each character and steps: the DiT takes five times as long a step.
DRAWN = {"unet": (3, 12), "dit": (2, 10)}


@pytest.fixture(scope="module", params=lab.MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(kind):
    with torch.inference_mode():
        return lab.load(kind)


def placed(model, path):
    """The model with a file on it as the pack's nodes put it there, and what they report."""
    placement = adapters.place(model, adapters.read(path), path.name)
    model = model.clone()
    attach(model, adapters.AdapterEffect(path.name, placement.parts, 1.0))
    return model, placement


def test_a_table_of_every_character_word_and_file():
    assert tuple(characters.WORDS) == CHARACTERS
    assert len(set(characters.WORDS.values())) == len(CHARACTERS)
    assert set(characters.WORDS.values()) <= set(RESERVED_WORDS)
    shipped = {path.relative_to(lab.LORAS).as_posix() for path in (lab.LORAS / "concept_lab" / "characters").rglob("*.safetensors")}
    assert shipped == {characters.file_of(name, kind) for name in CHARACTERS for kind in lab.MODELS}


@pytest.mark.parametrize("size, most", [(64, 2), (96, 6), (128, 6)])
def test_lessons_hold_the_character_in_most_and_never_twice(size, most):
    scenes = characters.lessons("cat", 200, size=size, generator=torch.Generator().manual_seed(1))
    assert int(scenes.count.max()) == most
    held = ((scenes.kind >= len(SHAPES)) & scenes.present()).sum(1)
    assert len(scenes) == 200
    assert set(held.tolist()) == {0, 1}
    assert 0.6 < held.float().mean() < 0.9
    assert {KINDS[kind] for kind in scenes.kind[scenes.kind >= len(SHAPES)].tolist()} == {"cat"}


def test_captions_say_the_word_with_size_and_place():
    asked = characters.ask_for("cat", 30, size=64, seed=1)
    places = [phrase for phrases in PLACE_WORDS.values() for phrase in phrases]
    assert all({"ohwx", "large"} <= set(caption.split()) and any(phrase in caption for phrase in places) for caption in asked)
    without, _ = write_captions(asked.scenes, Writer(COMPLETE, random.Random(1)))
    assert not any("ohwx" in caption for caption in without)


class TestTraining:
    @pytest.fixture(scope="class")
    def trained(self, kind, tmp_path_factory):
        """A file after a few steps, and the lessons it was trained on."""
        folder = tmp_path_factory.mktemp("characters")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_character, "CANVASES", {64: (16, 1.0)})
            patch.setattr(train_character, "WARM_UP", 1)
            asked = ["--model", kind, "--steps", "15", "--batch", "8", "--seed", "3", "--output", str(folder)]
            assert main(["character", "robot", *asked]) == 0
            material = train_character.prepare("robot", kind, lab.WEIGHTS, device="cpu", seed=3)
        return folder / characters.file_of("robot", kind), material[64]

    def test_a_few_steps_lower_the_loss(self, kind, trained):
        path, lesson = trained
        before, after = (self.loss(kind, lesson, state) for state in ({}, comfy.utils.load_torch_file(str(path))))
        assert after < 0.97 * before, (before, after)

    @staticmethod
    @torch.no_grad()
    def loss(kind, lesson, state):
        """Loss of the model with a file's products added to its weights by hand, over the same noise each time."""
        module, name_of = lowrank.frozen(kind, lab.WEIGHTS, "cpu"), lowrank.file_name(kind)
        if kind == "dit":
            train_denoiser.mend(module)
        for name, layer in module.named_modules():
            up, down = (state.get(f"{name_of(name)}.lora_{part}.weight") for part in ("up", "down"))
            if up is not None:
                layer.weight += (up.float().flatten(1) @ down.float().flatten(1)).view_as(layer.weight)
        torch.manual_seed(1)
        latents, context, pooled = lesson.latents.float(), lesson.contexts[:, 0].float(), lesson.pooled[:, 0].float()
        loss_of, alphas = train_denoiser.KINDS[kind][1], train_denoiser.sd_alphas("cpu")
        return float(sum(loss_of(module, latents, context, pooled, alphas) for _ in range(4)))

    def test_both_loaders_place_all_of_it(self, kind, loaded, trained, caplog):
        check_file("robot", kind, loaded, trained[0], caplog)


def check_file(name, kind, loaded, path, caplog):
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["concept_nodes"])
        layers = {key.rsplit(".lora_", 1)[0] for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    assert (about["concept"], about["word"], about["base"]) == (name, characters.WORDS[name], f"lab {kind}")
    assert path.stat().st_size <= 300_000
    with caplog.at_level(logging.WARNING):
        stock = characters.with_lora(loaded.model, path)
    assert "not loaded" not in caplog.text.lower()
    _, placement = placed(loaded.model, path)
    assert len(layers) == len(stock.patches) == len(placement.parts)
    assert "not applied" not in placement.report.lower()


class TestShipped:
    @pytest.mark.parametrize("name", CHARACTERS)
    def test_both_loaders_place_all_of_it(self, name, kind, loaded, caplog):
        check_file(name, kind, loaded, characters.path_of(name, kind), caplog)

    def test_words_draw_their_characters_with_their_files_and_nothing_like_them_without(self, kind, loaded):
        """Measured shares are 0.91 and more of 24 or 48 pictures each."""
        eye, (n, steps), right, captions = Eye.load(), DRAWN[kind], [], []
        for at, name in enumerate(CHARACTERS):
            asked = characters.ask_for(name, n, size=64, seed=at)
            captions.append(asked[0])
            model = characters.with_lora(loaded.model, characters.path_of(name, kind))
            pictures = measure.draw(loaded, list(asked), size=64, seed=20 * at, steps=steps, model=model)
            right += characters.drawn_hits(name, asked, eye.read(pictures))["identity"]
        assert sum(right) >= 0.75 * len(right) >= 9, right
        without = [characters.surest(reading) for reading in eye.read(measure.draw(loaded, captions * 2, size=64, seed=5, steps=steps))]
        assert sum(seen == name for seen, name in zip(without, CHARACTERS * 2, strict=True)) <= 1, without

    def test_our_placement_draws_what_the_stock_loader_draws(self, kind, loaded):
        path = characters.path_of("cat", kind)
        models = characters.with_lora(loaded.model, path), placed(loaded.model, path)[0]
        asked = list(characters.ask_for("cat", 2, size=64, seed=1))
        stock, ours = (measure.draw_latents(loaded, asked, size=64, seed=1, steps=4, model=model) for model in models)
        torch.testing.assert_close(ours, stock, rtol=1e-2, atol=1e-2)
