"""Sparse autoencoders trained in the graph: on the lab's text encoder and on small models' blocks."""

import comfy.model_management
import folder_paths
import models
import pytest
import text_encoders
import torch
from comfy.model_management import InterruptProcessingException

from concept_nodes.host import lab, sae_files
from concept_nodes.host.directions import ROWS, WORDS, Runs
from concept_nodes.host.feature_sites import text_sites
from concept_nodes.host.features import FeaturesError
from concept_nodes.host.sae_sources import model_rows, text_bound, text_rows
from concept_nodes.host.text_steering import captured
from concept_nodes.host.training import TrainingError
from concept_nodes.nodes import feature_training
from concept_nodes.nodes.feature_training import SAETrain
from concept_nodes.nodes.features import SAEFind, SAELoader
from concept_nodes.ops.sae_training import KINDS

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "triangle")
PROMPTS = "\n".join(f"a {size} {colour} {shape}" for size in ("small", "large") for colour in COLOURS for shape in SHAPES)


@pytest.fixture(scope="module")
def clip():
    return lab.load_clip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    sae_files.show_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "sae", ([str(tmp_path / "sae")], set(sae_files.ENDINGS)))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "sae"


def train(clip, kind="topk", name="x", steps=60, seed=1, **options):
    with torch.inference_mode():  # as the host runs nodes
        return SAETrain.execute(clip, PROMPTS, "text encoder", "clip_l.2", kind, 2, 8, steps, 128, seed, name, **options).result


@pytest.mark.parametrize("kind", KINDS)
def test_learns_and_its_file_is_found_and_used(clip, folder, kind):
    count = 150 if kind == "topk" else 600  # thresholds and groups take their time
    sae, losses, path, report = train(clip, kind, steps=count, pooling=WORDS)
    assert len(losses["loss"]) == count and sae.config["fvu"] < 0.4
    assert sum(losses["loss"][-10:]) < 0.6 * sum(losses["loss"][:10])
    for part in ("256 latents for vectors of 128 numbers", "GB for weights", "site clip_l.2", "32 prompts", path):
        assert part in report, report
    loaded = SAELoader.execute("x.safetensors").result[0]
    assert torch.equal(loaded.sae.W_dec, sae.sae.W_dec) and sae.config.items() <= loaded.config.items()
    lines = PROMPTS.splitlines()
    red, other = ("\n".join(line for line in lines if ("red" in line) == wanted) for wanted in (True, False))
    found, _ = SAEFind.execute(loaded, clip, red, other, "share difference", 4, "").result
    assert float(found.positive[0, 0]) > 2 * float(found.negative[0, 0])


def test_the_same_seed_the_same_file(clip, folder):
    paths = [train(clip, name="x", seed=seed)[2] for seed in (1, 1, 2)]
    one, two, other = ((folder / name).read_bytes() for name in ("x_00001.safetensors", "x_00002.safetensors", "x.safetensors"))
    assert one == two != other and set(paths) == {str(folder / "x.safetensors")}


def interrupt_after(monkeypatch, steps):
    """The user's interrupt, which the host looks for at each step."""
    count = iter(range(10**9))
    was = feature_training.comfy.utils.ProgressBar.update_absolute

    def update(self, *args):
        was(self, *args)
        if next(count) + 1 == steps:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(feature_training.comfy.utils.ProgressBar, "update_absolute", update)


def test_cancelled_it_keeps_what_there_is_and_goes_on(clip, folder, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 40)
        with pytest.raises(InterruptProcessingException):
            train(clip)
    half = SAELoader.execute("x.safetensors").result[0]
    assert half.config["unfinished"] == 40 and half.sae.n == 256
    assert [path.name for path in folder.iterdir()] == ["x.safetensors"]
    sae, losses, _, report = train(clip)
    assert "Resumed at step 40" in report and len(losses["loss"]) == 60 and "unfinished" not in sae.config
    assert [path.name for path in folder.iterdir()] == ["x.safetensors"]  # what was broken off has become this
    assert sae.config.items() <= SAELoader.execute("x.safetensors").result[0].config.items()
    assert not torch.equal(half.sae.W_dec, sae.sae.W_dec)
    assert not list((folder.parent / "user").rglob("*.safetensors"))


def test_cancelled_before_its_first_step_it_writes_nothing(clip, folder):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        train(clip)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("pooling", [ROWS, WORDS])
def test_rows_of_texts(clip, pooling):
    sites, prompts = text_sites(clip, "clip_l.2"), ["a red circle", "a star"]
    read = [captured(clip, sites, clip.tokenize(text)) for text in prompts]
    expected = torch.cat([rows[0, 1:] if pooling == ROWS else rows[content] for rows, content in read])
    found = list(text_rows(clip, sites, prompts, pooling, 0, endless=False))
    assert len(found) == 2 and sum(map(len, found)) <= text_bound(clip, sites, prompts)
    found = torch.cat(found)
    assert sorted(found.sum(1).tolist()) == pytest.approx(sorted(expected.sum(1).tolist()), rel=1e-5)
    again = text_rows(clip, sites, prompts, pooling, 0, endless=True)
    assert sum(len(next(again)) for _ in range(6)) == 3 * len(expected)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_rows_of_pictures_are_the_blocks_own(kind):
    """Every row that comes is one that the block gave, at one of the noise levels, and none is torn off its neighbours' numbers."""
    model, site = models.build(kind), models.SITES[kind]
    source = model_rows(model, text_encoders.Letters(model), "diffusion_model." + site, "out", "pqr", Runs(64, 64, 2, 1.0, 1, 1, 3), 5)
    seen = []
    handle = model.model.diffusion_model.get_submodule(site).register_forward_hook(lambda _, given, output: seen.append(output))
    found = next(source)
    handle.remove()
    first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    given = (first.flatten(2).mT if first.ndim == 4 else first).flatten(0, 1)
    assert found.shape == (15, given.shape[1])
    assert bool(((found[:, None] - given[None]).abs().amax(-1).amin(1) < 1e-6).all())
    assert not torch.equal(found, next(source))


def test_on_a_model(clip, folder):
    model = models.build("sd15")
    with torch.inference_mode():
        sae, _, _, report = SAETrain.execute(
            text_encoders.Letters(model), "p\nq", "model", "auto", "topk", 1, 4, 10, 64, 0, "m", model=model, width=64, height=64,
            sampling_steps=2, cfg=1.0, levels=2, rows=32,
        ).result  # fmt: skip
    assert sae.config["io"] == "out" and sae.config["family"] == models.features(model).family and "Saved as" in report
    found, _ = SAEFind.execute(
        sae, text_encoders.Letters(model), "p", "q", "effect size", 2, "", model=model, width=64, height=64, steps=2, cfg=1.0
    ).result
    assert found.site == sae.config["site"] and found.width == sae.sae.d


def test_refusals(clip, folder):
    def with_(**options):
        base = dict(
            prompts=PROMPTS, where="text encoder", site="clip_l.2", kind="topk", expansion=2, k=8, steps=5, batch=64, seed=0, name="x"
        )
        return SAETrain.execute(clip, **base | options)

    for error, told, options in (
        (FeaturesError, "prompts is empty", {"prompts": " \n"}),
        (FeaturesError, "has no site 'clip_l.99'", {"site": "clip_l.99"}),
        (TrainingError, "cannot be a file's name", {"name": "../x"}),
        (ValueError, "k is 400 with 256 latents", {"k": 400}),
        (FeaturesError, "Nothing is connected to model", {"where": "model"}),
        (
            FeaturesError,
            "stands for .* sites, and an autoencoder is of one",
            {"where": "model", "site": "all layers", "model": models.build("sd15")},
        ),
        (TrainingError, "too few", {"prompts": "red", "pooling": WORDS}),
    ):
        with pytest.raises(error, match=told):
            with_(**options)
    assert not folder.exists()
