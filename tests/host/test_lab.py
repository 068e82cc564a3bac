"""The lab's loading: the host's own classes, weights that come back equal, and failures that say what to do."""

import hashlib
import json
import random
import shutil
import time

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_nodes.host import lab
from concept_nodes.lab import captions, pools
from concept_nodes.lab.scenes import render, sample_scenes
from concept_nodes.nodes.lab import LabLoader

BASES = {"unet": comfy.model_base.BaseModel, "dit": comfy.model_base.Flux}
TOKENS = "text_model.embeddings.token_embedding."


PARTS = (*lab.MODELS, "clip", "vae")


@pytest.fixture(scope="module")
def loaded():
    """Every lab model, loaded as the host runs the node."""
    with torch.inference_mode():
        return {name: lab.LabModel(*LabLoader.execute(name).result) for name in lab.MODELS}


def patcher_of(loaded, part):
    return loaded[part].model if part in lab.MODELS else getattr(loaded["unet"], part).patcher


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with copies of the lab's weight files, in the place of the pack's."""
    for file in lab.WEIGHTS.glob("*.safetensors"):
        shutil.copy2(file, tmp_path)
    monkeypatch.setattr(lab, "WEIGHTS", tmp_path)
    return tmp_path


def same_weights(first, second) -> None:
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


class TestLoading:
    @pytest.mark.parametrize("name", lab.MODELS)
    def test_the_hosts_own_classes(self, loaded, name):
        model, clip, vae = loaded[name]
        assert isinstance(model, comfy.model_patcher.ModelPatcher)
        assert type(model.model) is BASES[name]
        assert type(clip) is comfy.sd.CLIP
        assert type(vae) is comfy.sd.VAE
        assert model.model.latent_format.latent_channels == 4
        assert vae.spacial_compression_decode() == vae.spacial_compression_encode() == lab.downscale(name)
        assert lab.downscale(name) == {"unet": 4, "dit": 8}[name]

    @pytest.mark.parametrize("name", lab.MODELS)
    def test_every_tensor_of_the_file_arrives(self, loaded, name):
        tensors, _ = lab.read_weights(lab.WEIGHTS / f"{name}.safetensors")
        arrived = loaded[name].model.model.diffusion_model.state_dict()
        assert arrived.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(arrived[key].cpu().float(), tensor.float()), key

    @pytest.mark.alone
    @pytest.mark.parametrize("name", lab.MODELS)
    def test_loading_is_quick(self, name):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            lab.load(name)
            seconds.append(time.perf_counter() - began)
        assert min(seconds) < 2

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("disable_dynamic", [False, True])
    def test_parts_reload_themselves(self, loaded, part, disable_dynamic):
        patcher = patcher_of(loaded, part)
        make, arguments = patcher.clone().cached_patcher_init
        again = make(*arguments, disable_dynamic=disable_dynamic)
        assert again.model is not patcher.model
        same_weights(patcher, again)

    @pytest.mark.parametrize("part", PARTS)
    def test_deep_copies_have_weights_of_their_own(self, loaded, part):
        patcher = patcher_of(loaded, part)
        copy = patcher.clone(force_deepcopy=True)
        assert copy.model is not patcher.model
        same_weights(patcher, copy)
        for first, second in zip(patcher.model.parameters(), copy.model.parameters(), strict=True):
            assert first.data_ptr() != second.data_ptr()


class TestTokens:
    def test_rows_of_unlearnt_words_are_the_same_everywhere(self):
        rows = lab.hashed_rows(np.arange(64), 128)
        assert rows.dtype == torch.float32
        assert hashlib.sha256(rows.numpy().tobytes()).hexdigest().startswith("35219c95e360f3af")
        assert torch.equal(lab.hashed_rows(np.array([63, 5]), 128), rows[[63, 5]])

    def test_rows_are_finite_distinct_and_spread(self):
        rows = lab.hashed_rows(np.arange(lab.VOCABULARY), 128)
        assert rows.isfinite().all()
        assert len(torch.unique(rows, dim=0)) == lab.VOCABULARY
        assert float(rows.std()) == pytest.approx(0.02, rel=0.01)
        assert abs(float(rows.mean())) < 1e-4
        near = torch.nn.functional.normalize(rows[:2000], dim=1)
        assert float((near @ near.T).fill_diagonal_(0).abs().max()) < 0.6

    def test_only_learnt_words_are_stored(self):
        tensors, _ = lab.read_weights(lab.WEIGHTS / "text.safetensors")
        ids, rows = tensors[TOKENS + "ids"].long(), tensors[TOKENS + "rows"]
        assert len(ids) == len(rows) == len(torch.unique(ids)) < 5000
        assert 0 <= ids.min() <= ids.max() < lab.VOCABULARY
        table = lab.full_embedding(tensors)[TOKENS + "weight"]
        others = torch.ones(lab.VOCABULARY, dtype=torch.bool)
        others[ids] = False
        assert torch.equal(table[ids], rows.float())
        assert torch.equal(table[others], lab.hashed_rows(np.arange(lab.VOCABULARY)[others.numpy()], table.shape[1]))

    def test_words_of_captions_are_learnt_and_reserved_ones_are_not(self):
        tensors, _ = lab.read_weights(lab.WEIGHTS / "text.safetensors")
        learnt, tokenizer = set(tensors[TOKENS + "ids"].tolist()), lab.tokenizer()
        scenes = sample_scenes(1500, counts={2: 1.0}, generator=torch.Generator().manual_seed(8))
        wording = captions.TEXT_TRAINING._replace(misspelt=0.0)
        words = {word for text in captions.write_captions(scenes, captions.Writer(wording, random.Random(8)))[0] for word in text.split()}
        assert len(words) > 300
        assert {word for word in words if not set(tokenizer(word)["input_ids"]) <= learnt} == set()
        assert all(tokenizer(word)["input_ids"][-2] not in learnt for word in captions.RESERVED_WORDS), "the token that ends the word"

    def test_fillers_are_no_words_of_the_lab(self):
        fillers = pools.filler_words(lab.tokenizer())
        assert len(fillers) == len(set(fillers)) == 1400
        assert not set(fillers) & pools._lab_words()


class TestParts:
    def test_autoencoder_keeps_scenes(self, loaded):
        scenes = sample_scenes(32, counts={1: 1.0, 2: 1.0}, generator=torch.Generator().manual_seed(1))
        pictures = render(scenes).movedim(1, -1)
        vae = loaded["unet"].vae
        with torch.inference_mode():
            latents = vae.encode(pictures)
            error = (vae.decode(latents).cpu() - pictures).square().mean((1, 2, 3))
        assert latents.shape == (32, 4, 16, 16)
        assert float((-10 * error.log10()).mean()) > 27, "mean PSNR in dB"

    @pytest.mark.parametrize("name", lab.MODELS)
    def test_stock_lora_loader_without_text_layers(self, loaded, name):
        model, clip, _ = loaded[name]
        with_lora, same = comfy.sd.load_lora_for_models(model, clip, models.lora(model, only="attn"), 1.0, 1.0)
        assert with_lora.patches
        assert not same.patcher.patches
        assert not model.patches


class TestFailures:
    @pytest.mark.parametrize("name", ["", "sdxl", "UNET", "../unet", "text"])
    def test_unknown_name_lists_the_names(self, name):
        with pytest.raises(lab.LabError, match="unet, dit"):
            lab.load(name)
        told = LabLoader.validate_inputs(model=name)
        assert isinstance(told, str)
        assert "unet, dit" in told

    def test_known_names_are_accepted(self):
        assert all(LabLoader.validate_inputs(model=name) is True for name in lab.MODELS)

    @pytest.mark.parametrize("part", ["unet", "text", "vae"])
    def test_missing_file(self, weights, part):
        (weights / f"{part}.safetensors").unlink()
        with pytest.raises(lab.LabError, match=rf"{part}\.safetensors.*missing.*reinstall the pack"):
            LabLoader.execute("unet")

    @pytest.mark.parametrize("part", ["unet", "text", "vae"])
    @pytest.mark.parametrize("keep", [0, 5, 4000, -1])
    def test_truncated_file(self, weights, part, keep):
        path = weights / f"{part}.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(lab.LabError, match=rf"{part}\.safetensors.*reinstall the pack"):
            LabLoader.execute("unet")

    @pytest.mark.parametrize("part, other", [("unet", "dit"), ("text", "vae"), ("vae", "eye")])
    def test_whole_file_of_something_else(self, weights, part, other):
        shutil.copy2(weights / f"{other}.safetensors", weights / f"{part}.safetensors")
        with pytest.raises(lab.LabError, match=part):
            LabLoader.execute("unet")

    @pytest.mark.parametrize("part", ["unet", "text", "vae"])
    def test_file_that_lacks_a_tensor(self, weights, part):
        path = weights / f"{part}.safetensors"
        tensors = load_file(path)
        tensors.pop(next(key for key in tensors if not key.startswith(TOKENS)))
        save_file(tensors, path, metadata={"config": json.dumps({})})
        with pytest.raises(lab.LabError, match=part):
            LabLoader.execute("unet")

    @pytest.mark.parametrize(
        "part, seen_by", [("unet", {"unet"}), ("dit", {"dit"}), ("text", set(lab.MODELS)), ("vae", {"unet"}), ("vae_dit", {"dit"})]
    )
    def test_fingerprint_follows_the_files(self, weights, part, seen_by):
        before = {name: LabLoader.fingerprint_inputs(model=name) for name in lab.MODELS}
        assert before == {name: LabLoader.fingerprint_inputs(model=name) for name in lab.MODELS}
        path = weights / f"{part}.safetensors"
        path.write_bytes(path.read_bytes() + b" ")
        assert {name for name in lab.MODELS if LabLoader.fingerprint_inputs(model=name) != before[name]} == seen_by
