"""Looking into models as hosts run them (compiled, offloaded, quantised), stopping in the middle, and blocks that nothing reads."""

import comfy.model_management
import folder_paths
import models
import pytest
import sampling
import state
import text_encoders
import torch
from comfy.patcher_extension import WrappersMP
from text_encoders import Letters

from concept_nodes.host import sae_files
from concept_nodes.host.directions import WORDS, Runs, in_model
from concept_nodes.host.feature_sites import width_at
from concept_nodes.host.features import FeaturesError
from concept_nodes.host.regions import Regions, RegionsError
from concept_nodes.host.sae_browsing import browse_model, latent_of
from concept_nodes.host.sae_files import SAEFile
from concept_nodes.host.sae_finding import Wish, find_in_model
from concept_nodes.host.sae_sources import model_rows
from concept_nodes.nodes.feature_browsing import SAEBrowse
from concept_nodes.nodes.feature_training import SAETrain
from concept_nodes.nodes.features import SAEFind
from concept_nodes.nodes.regions import RegionsApply
from concept_nodes.nodes.steering import DirectionFind, RegionFeatures, SteerModel
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region
from concept_nodes.ops.sae import RELU, SAE

CLOSE = {"rtol": 2e-3, "atol": 2e-3}
RUNS = Runs(64, 64, 2, 1.0, 2, 1, 5)
MODELS = {
    "compiled": (sampling.compiled, "flux"),
    "half offloaded": (sampling.half_offloaded, "sd15"),
    "weights made in every forward": (models.build_packed, "sd15"),
    "half precision": (lambda: models.build("sd15", "float16"), "sd15"),
}


def autoencoder(model, site, n=48) -> SAEFile:
    d = width_at(model.model, site)
    sae = SAE(models.seeded((n, d), 3, d**-0.5), torch.zeros(n), models.seeded((n, d), 5), torch.zeros(d), RELU, center=False)
    return SAEFile(sae, {"site": site, "io": "out", "family": models.features(model).family}, {})


def looked_into(model, kind):
    """What each way to look into a model finds, as numbers."""
    site, texts = models.SITES[kind], Letters(model)
    file = autoencoder(model, site)
    direction = in_model(model, texts, site, "out", ("p", "r"), ("q",), RUNS, "x").features
    latents = find_in_model(model, texts, file, Wish(("p", "r"), ("q",), "x", top=4), RUNS).features
    browsed = browse_model(model, texts, file, ("p", "q"), RUNS, None)
    told = latent_of(browsed, 7, 2)
    source = model_rows(model, texts, "diffusion_model." + site, "out", "pq", RUNS, 10_000)
    return {
        "direction": direction.directions * direction.unit,
        "latents": latents.positive.sum(1),
        "browsed": torch.tensor([told.density, told.mean, *(mean for _, mean in told.by_level)]),
        "trained on": next(source).float().std(0),
    }


@pytest.mark.parametrize("way", MODELS)
def test_what_is_found_is_what_the_plain_model_has(way):
    build, kind = MODELS[way]
    model, plain = build(), models.build(kind)
    if "forward" in way:
        plain = model  # its weights are rounded: what is found must only be there, and again the same
    models.sample(model)  # so that what the host itself does at the first load is over
    before = state.of_model(model.model)
    found, expected = looked_into(model, kind), looked_into(plain, kind)
    close = {"rtol": 0.05, "atol": 0.05} if "precision" in way else CLOSE
    for name, numbers in found.items():
        assert bool(numbers.isfinite().all()) and bool(numbers.any()), name
        torch.testing.assert_close(numbers, expected[name], **close, msg=lambda told, name=name: f"{name}: {told}")
    if "offloaded" not in way:  # which the test itself does to it
        assert state.differences(before, state.of_model(model.model)) == []


@pytest.mark.parametrize("way", [way for way in MODELS if "precision" not in way])
@pytest.mark.parametrize("mode", ["add", "scale"])
def test_latents_steer_them(way, mode):
    build, kind = MODELS[way]
    model = build()
    found = models.features(model, latents=True)
    acting = SteerModel.execute(model, "none", 0.8, mode, 0.0, 1.0, "cond", features=found).result[0]
    steered, plain = models.sample(acting, steps=2), models.sample(model, steps=2)
    assert bool(steered.isfinite().all()) and not torch.allclose(steered, plain, atol=1e-3)
    if way == "compiled":
        other = SteerModel.execute(models.build(kind), "none", 0.8, mode, 0.0, 1.0, "cond", features=found).result[0]
        torch.testing.assert_close(steered, models.sample(other, steps=2), **CLOSE)


@pytest.mark.parametrize("look", ["direction", "latents", "browse", "train"])
def test_stopped_in_the_middle_the_model_is_as_it_was(look, tmp_path, monkeypatch):
    """The stop button during the second call of the network."""
    sae_files.show_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "sae", ([str(tmp_path / "sae")], set(sae_files.ENDINGS)))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    model = sampling.loaded()
    before, plain, texts = state.of_model(model.model), models.sample(model), Letters(model)
    stopping = sampling.wrapped(model, WrappersMP.APPLY_MODEL, sampling.at_call(2, comfy.model_management.interrupt_current_processing))
    file, sizes = autoencoder(model, models.SITES["sd15"]), {"model": stopping, "width": 64, "height": 64, "cfg": 1.0}
    ways = {
        "direction": lambda: DirectionFind.execute(texts, "p", "q", "model", "auto", "", steps=2, **sizes),
        "latents": lambda: SAEFind.execute(file, texts, "p", "q", "effect size", 2, "", steps=2, **sizes),
        "browse": lambda: SAEBrowse.execute(file, texts, "p\nq", "", "strongest", 2, 2, steps=2, **sizes),
        "train": lambda: SAETrain.execute(texts, "p\nq", "model", "auto", "topk", 1, 4, 10, 64, 0, "m", sampling_steps=2, rows=32, **sizes),
    }
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ways[look]()
    assert not comfy.model_management.processing_interrupted()
    assert state.differences(before, state.of_model(model.model)) == []
    assert torch.equal(models.sample(model), plain)


class TestBlocksThatClipSkipLeavesOut:
    """SDXL reads CLIP-L up to the last block but one: what lies behind it would be steered for nothing."""

    TOLD = r"clip_l\.2 lies behind clip_l\.1.*nothing would come of it"

    def file(self):
        sae = SAE(models.seeded((8, 24), 1), torch.zeros(8), models.seeded((8, 24), 2), torch.zeros(24), RELU)
        return SAEFile(sae, {"site": "clip_l.2", "io": "text", "family": "CLIP-L"}, {})

    @pytest.mark.parametrize("look", ["direction", "latents", "browse", "train"])
    def test_are_refused_wherever_one_looks(self, look):
        clip = text_encoders.build("sdxl")
        ways = {
            "direction": lambda: DirectionFind.execute(clip, "a cat", "a dog", "text encoder", "clip_l.2", ""),
            "latents": lambda: SAEFind.execute(self.file(), clip, "a cat", "a dog", "effect size", 2, ""),
            "browse": lambda: SAEBrowse.execute(self.file(), clip, "a cat", "", "strongest", 2, 2),
            "train": lambda: SAETrain.execute(clip, "a cat\na dog", "text encoder", "clip_l.2", "topk", 1, 4, 5, 16, 0, "m"),
        }
        with pytest.raises(FeaturesError, match=self.TOLD):
            ways[look]()

    def test_are_refused_on_a_region(self):
        from concept_nodes.host.directions import in_text

        plain, clip = text_encoders.build("sd15"), text_encoders.build("sdxl")
        found = in_text(plain, "clip_l.2", ("a red star",), ("a blue star",), WORDS, "x").features
        regions = Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),), prompt="a star"))
        regions = RegionFeatures.execute(regions, "left", "none", 1.0, "add", 0.0, 1.0, "cond", "", found).result[0]
        with pytest.raises(RegionsError, match=rf"The features of region 'left': {self.TOLD}"):
            RegionsApply.execute(models.build("sdxl"), [], [], regions, clip=clip)
