"""The lab's trainings run, stop, resume where they stopped, and write what they promise: files that the rest of the pack loads."""

import json
import shutil

import comfy.controlnet
import comfy.utils
import pytest
import torch
from PIL import Image

from concept_nodes.host import lab
from concept_nodes.lab import train_control, train_denoiser, train_eye, train_vae, training
from concept_nodes.lab.__main__ import main
from concept_nodes.lab.eye import NETS, Eye
from concept_nodes.lab.pools import Bank, read_pools
from concept_nodes.lab.scenes import sample_scenes

QUICK = {"device": "cpu", "minutes": 5, "batch": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A training folder with small pools and the shipped weights."""
    folder = tmp_path_factory.mktemp("runs")
    for file in lab.WEIGHTS.glob("*.safetensors"):
        shutil.copy2(file, folder)
    assert main(["pools", "--folder", str(folder), "--total", "200", "--workers", "1"]) == 0
    return folder


@pytest.fixture(autouse=True)
def small_banks(monkeypatch):
    whole = Bank.__init__
    monkeypatch.setattr(Bank, "__init__", lambda self, *args, **options: whole(self, *args, **options | {"size": 100}))


def log_of(folder, name) -> list:
    return json.loads((folder / f"{name}.log.json").read_text(encoding="utf-8"))["history"]


@pytest.mark.parametrize("name", lab.MODELS)
def test_denoisers_resume_and_draw_their_sheet(folder, name):
    train_denoiser.train(name, folder, steps=2, finish=False, **QUICK)
    first = {key: tensor.clone() for key, tensor in lab.read_weights(folder / f"{name}.safetensors")[0].items()}
    assert log_of(folder, name)[0][0] == 1
    train_denoiser.train(name, folder, steps=4, finish=False, **QUICK)
    state = torch.load(folder / f"{name}.state.pt", weights_only=True)
    assert state["step"] == 4
    again, config = lab.read_weights(folder / f"{name}.safetensors")
    assert again.keys() == first.keys()
    assert any(not torch.equal(again[key], first[key]) for key in first)
    assert config == {"unet": lab.UNET_CONFIG, "dit": lab.DIT_CONFIG}[name]
    assert lab.load_model(name, str(folder / f"{name}.safetensors")).model is not None
    for picture in ("sheet", "loss"):
        with Image.open(folder / f"{name}.{picture}.png") as image:
            assert image.width > 100


def test_latents_are_kept_until_the_encoder_changes(folder, monkeypatch):
    pool = read_pools(folder)[64, 64]
    calls = []
    whole = train_denoiser.encode_scenes
    monkeypatch.setattr(train_denoiser, "encode_scenes", lambda *args: calls.append(1) or whole(*args))
    vae = train_denoiser.load_vae(folder, "cpu")
    first = train_denoiser.cached_latents(pool, "unet", vae, "cpu", folder)
    count = len(calls)
    assert torch.equal(train_denoiser.cached_latents(pool, "unet", vae, "cpu", folder), first)
    assert len(calls) == count
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    train_denoiser.cached_latents(pool, "unet", vae, "cpu", folder)
    assert len(calls) == count
    with torch.no_grad():
        vae.quant_conv.bias.add_(1)
    changed = train_denoiser.cached_latents(pool, "unet", vae, "cpu", folder)
    assert len(calls) == count + 1
    assert not torch.equal(changed, first)


def test_a_start_takes_over_what_fits(folder):
    module = train_denoiser.new_unet()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    training.take_over(module, folder, "dit")
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    training.take_over(module, lab.WEIGHTS, "unet")
    shipped, _ = lab.read_weights(lab.WEIGHTS / "unet.safetensors")
    assert all(torch.equal(shipped[key].float(), tensor) for key, tensor in module.state_dict().items())


def test_decoder_alone_leaves_latents_as_they_are(folder, tmp_path):
    shutil.copy2(lab.WEIGHTS / "vae.safetensors", tmp_path)
    train_vae.train(tmp_path, steps=2, finish=True, decoder_only=True, **QUICK)
    shipped, _ = lab.read_weights(lab.WEIGHTS / "vae.safetensors")
    trained, _ = lab.read_weights(tmp_path / "vae.safetensors")
    changed = {key for key in shipped if not torch.equal(shipped[key], trained[key])}
    assert changed
    assert not any(key.startswith(("encoder.", "quant_conv.")) for key in changed)


def test_a_new_autoencoder_has_latents_of_unit_spread(tmp_path):
    train_vae.train(tmp_path, steps=2, finish=True, **QUICK)
    module = train_denoiser.load_vae(tmp_path, "cpu")
    pictures = train_vae._pictures("cpu", torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = module.quant_conv(module.encoder(pictures)).chunk(2, 1)[0] * train_vae.LATENT_SCALE
    assert float((latents.std((0, 2, 3)) - 1).abs().max()) < 0.2
    assert float(latents.mean((0, 2, 3)).abs().max()) < 0.2


@pytest.mark.parametrize("name", NETS)
def test_eyes(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(train_eye, "_report", lambda *args: None)
    for file in ("vae.safetensors", f"{name}.safetensors"):
        shutil.copy2(lab.WEIGHTS / file, tmp_path)
    train_eye.train(name, tmp_path, steps=3, finish=True, **QUICK)
    assert [step for step, *_ in log_of(tmp_path, name)] == [1]
    Eye.load(name, tmp_path).read(torch.rand(1, 64, 64, 3))


class TestControl:
    def test_edges_are_the_objects_outlines(self):
        scenes = sample_scenes(20, plain=True, generator=torch.Generator().manual_seed(1))
        hint = train_control.edges(scenes)
        assert hint.shape == (20, 3, 64, 64)
        assert set(hint.unique().tolist()) == {0.0, 1.0}
        rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
        for i in range(20):
            far = torch.hypot(rows - scenes.y[i, 0], columns - scenes.x[i, 0]) > scenes.diameter[i, 0] * 0.6 + 1
            assert hint[i, 0][far].sum() == 0
            assert hint[i, 0].sum() > scenes.diameter[i, 0]

    def test_the_stock_loader_reads_the_file(self, folder):
        train_control.train(folder, steps=3, finish=True, **QUICK)
        loaded = comfy.controlnet.load_controlnet(str(folder / "unet_edges.safetensors"))
        assert type(loaded) is comfy.controlnet.ControlLora
        tensors = comfy.utils.load_torch_file(str(folder / "unet_edges.safetensors"))
        assert any(tensor.any() for key, tensor in tensors.items() if key.endswith(".up")), "something was learnt"


def test_loss_curves_of_one_point_and_of_many(tmp_path):
    for history in ([[1, 0.5, 0.0]], [[1, 0.5, 0.0], [100, 0.1, 0.1], [200, 0.1, 0.2]]):
        training.draw_curve(history, tmp_path / "unet.loss.png")
        with Image.open(tmp_path / "unet.loss.png") as image:
            assert len(image.convert("L").getcolors()) > 2


def test_the_hosts_switch_for_training_is_on_in_the_dits_forward_alone():
    import comfy.model_management

    module, seen = train_denoiser.new_dit(), []
    module.double_blocks[0].register_forward_pre_hook(lambda *_: seen.append(comfy.model_management.in_training))
    before = comfy.model_management.in_training
    module(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1, 77, 128), torch.zeros(1, 128)).sum().backward()
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1, 77, 5), torch.zeros(1, 128))
    assert seen[0] and comfy.model_management.in_training == before
