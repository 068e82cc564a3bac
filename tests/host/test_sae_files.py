"""Sparse autoencoders in files: every layout gives the codes and vectors that its own equations give, and what cannot be read is told."""

import json
import math
import pickle
import struct

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_nodes.host import sae_files
from concept_nodes.host.sae_files import SAEError, SAEFile, export_sparsify, read, write
from concept_nodes.nodes.features import SAELoader
from concept_nodes.ops.sae import BATCH_TOPK, JUMPRELU, RELU, SAE, TOPK

N, D, K = 40, 12, 4
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Parts:
    """Random weights, and vectors; d as published where a layout's own width matters."""

    def __init__(self, n=N, d=D):
        self.n, self.d = n, d
        self.encoder, self.decoder = random(n, d), random(n, d, seed=1)
        self.b_enc, self.b_dec, self.x = random(n, seed=2), random(d, seed=3), random(9, d, seed=4)
        self.threshold = random(n, seed=5).abs() * math.sqrt(d)

    def pre(self, center=True):
        return (self.x - (self.b_dec if center else 0)) @ self.encoder.T + self.b_enc

    def topk(self, pre):
        values, chosen = pre.topk(K)
        return torch.zeros_like(pre).scatter(1, chosen, values.clamp_min(0))

    def rebuilt(self, z):
        return z @ self.decoder + self.b_dec


def saved(folder, tensors, config, name, side=None):
    """A folder with the file, its settings and what lies beside it."""
    tensors = {key: value.contiguous() if isinstance(value, torch.Tensor) else value for key, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (save_file if name.endswith("safetensors") else torch.save)(tensors, folder / name)
    if config is not None:
        (folder / ("cfg.json" if name.endswith("safetensors") else "config.json")).write_text(json.dumps(config))
    for other, tensor in (side or {}).items():
        torch.save(tensor, folder / other)
    return folder


def sparsify(folder, p, **config):
    tensors = {"encoder.weight": p.encoder, "encoder.bias": p.b_enc, "W_dec": p.decoder, "b_dec": p.b_dec}
    told = {"d_in": p.d, "k": K, "num_latents": 0, "expansion_factor": 16, "normalize_decoder": True, "batch_topk": True}
    return saved(folder, tensors, told | config, "sae.safetensors"), p.topk(p.pre(not config.get("transcode")))


def openai(folder, p, **config):
    tensors = {"encoder.weight": p.encoder, "latent_bias": p.b_enc, "decoder.weight": p.decoder.T, "pre_bias": p.b_dec}
    tensors["stats_last_nonzero"] = torch.zeros(p.n, dtype=torch.int64)
    told = {"n_dirs_local": p.n, "d_model": p.d, "k": K, "auxk": 256, "dead_steps_threshold": 2441}
    side = {"mean.pt": random(p.n, seed=7).abs(), "std.pt": random(p.n, seed=8).abs()}
    return saved(folder, {"state_dict": tensors}, told | config, "state_dict.pth", side), p.topk(p.pre())


def saelens(folder, p, **config):
    tensors = {"W_enc": p.encoder.T, "b_enc": p.b_enc, "W_dec": p.decoder, "b_dec": p.b_dec}
    told = {"architecture": "topk", "d_in": p.d, "d_sae": p.n, "k": K, "apply_b_dec_to_input": True, "normalize_activations": "none"}
    told |= config
    pre = p.pre(told["apply_b_dec_to_input"])
    if told["architecture"] == "jumprelu":
        tensors["threshold"] = p.threshold
        del told["k"]
        return saved(folder, tensors, told, "sae_weights.safetensors"), torch.where(pre > p.threshold, pre.clamp_min(0), 0)
    if told["architecture"] == "standard":
        del told["k"]
        return saved(folder, tensors, told, "sae_weights.safetensors"), pre.clamp_min(0)
    lengths = p.decoder.norm(dim=1) if told.get("rescale_acts_by_decoder_norm") else torch.ones(p.n)
    folder, z = saved(folder, tensors, told, "sae_weights.safetensors"), p.topk(pre * lengths)
    p.decoder = p.decoder / lengths[:, None]
    return folder, z


def learning(folder, p, threshold=-1.0, **config):
    tensors = {"encoder.weight": p.encoder, "encoder.bias": p.b_enc, "decoder.weight": p.decoder.T, "b_dec": p.b_dec}
    tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(threshold)}
    told = {"trainer": {"dict_class": "BatchTopKSAE", "activation_dim": p.d, "dict_size": p.n, "k": K} | config, "buffer": {}}
    pre = p.pre()
    z = p.topk(pre) if threshold < 0 else torch.where(pre > threshold, pre.clamp_min(0), 0)
    return saved(folder, tensors, told, "ae.pt"), z


def learning_plain(folder, p):
    tensors = {"encoder.weight": p.encoder, "encoder.bias": p.b_enc, "decoder.weight": p.decoder.T, "bias": p.b_dec}
    return saved(folder, tensors, {"trainer": {"dict_class": "AutoEncoder"}}, "ae.pt"), p.pre().clamp_min(0)


def learning_jumprelu(folder, p):
    """Its codes are in lengths of their directions."""
    tensors = {"W_enc": p.encoder.T, "b_enc": p.b_enc, "W_dec": p.decoder, "b_dec": p.b_dec, "threshold": p.threshold}
    pre, lengths = p.pre(center=False), p.decoder.norm(dim=1)
    saved(folder, tensors, {"trainer": {"dict_class": "JumpReluAutoEncoder"}}, "ae.pt")
    p.decoder = p.decoder / lengths[:, None]
    return folder, torch.where(pre > p.threshold, pre.clamp_min(0), 0) * lengths


def learning_matryoshka(folder, p):
    tensors = {"W_enc": p.encoder.T, "b_enc": p.b_enc, "W_dec": p.decoder, "b_dec": p.b_dec}
    tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(6.0), "group_sizes": torch.tensor([10, 30])}
    pre = p.pre()
    return saved(folder, tensors, {"trainer": {"dict_class": "MatryoshkaBatchTopKSAE", "k": K}}, "ae.pt"), torch.where(pre > 6, pre, 0)


def saedit(folder, p, **config):
    """b_enc is in the file and is not to be read."""
    tensors = {"W_enc": p.encoder.T, "W_dec": p.decoder, "b_enc": 100 * p.b_enc, "b_dec": p.b_dec, "threshold": torch.tensor(1.5)}
    told = {"act_size": p.d, "dict_size": p.n, "top_k": K, "group_sizes": [10, p.n - 10], "input_unit_norm": False} | config
    pre = (p.x - p.b_dec) @ p.encoder.T
    return saved(folder, tensors, told, "pytorch_model.bin"), torch.where(pre > 1.5, pre, 0)


def with_options(layout, **options):
    return lambda folder, p: layout(folder, p, **options)


LAYOUTS = {
    "sparsify": (sparsify, TOPK),
    "sparsify, a transcoder's way": (with_options(sparsify, transcode=True), TOPK),
    "OpenAI": (openai, TOPK),
    "SAELens topk": (saelens, TOPK),
    "SAELens topk, rescaled": (with_options(saelens, rescale_acts_by_decoder_norm=True), TOPK),
    "SAELens jumprelu": (with_options(saelens, architecture="jumprelu", apply_b_dec_to_input=False), JUMPRELU),
    "SAELens standard": (with_options(saelens, architecture="standard"), RELU),
    "dictionary_learning, no threshold yet": (learning, BATCH_TOPK),
    "dictionary_learning": (with_options(learning, threshold=5.0), BATCH_TOPK),
    "dictionary_learning plain": (learning_plain, RELU),
    "dictionary_learning jumprelu": (learning_jumprelu, JUMPRELU),
    "dictionary_learning matryoshka": (learning_matryoshka, BATCH_TOPK),
    "SAEdit": (saedit, BATCH_TOPK),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
# The width of the vectors in what each has been published with.
PUBLISHED = {"sparsify": 1280, "OpenAI": 768, "SAELens topk": 2304, "dictionary_learning": 2048, "SAEdit": 4096, "SAELens jumprelu": 3584}


def check(file, p, z):
    torch.testing.assert_close(file.sae.encode(p.x), z, **CLOSE)
    torch.testing.assert_close(file.sae.decode(z), p.rebuilt(z), **CLOSE)


@each_layout
def test_each_layout_means_what_its_own_equations_say(tmp_path, layout):
    p = Parts()
    folder, z = LAYOUTS[layout][0](tmp_path / "x", p)
    assert bool((z > 0).any()) and bool((z == 0).any())
    file = read(folder)
    check(file, p, z)
    assert file.sae.activation == LAYOUTS[layout][1] and file.config["layout"] == layout.split(",")[0].split(" ")[0]
    assert file.sae.W_dec.is_contiguous() and file.sae.W_enc.is_contiguous()


@pytest.mark.parametrize("layout", PUBLISHED)
def test_each_layout_at_its_published_width(tmp_path, layout):
    p = Parts(64, PUBLISHED[layout])
    folder, z = LAYOUTS[layout][0](tmp_path / "x", p)
    file = read(next(path for path in folder.iterdir() if path.name in sae_files.TENSOR_FILES))
    torch.testing.assert_close(file.sae.encode(p.x), z, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(file.sae.decode(z), p.rebuilt(z), rtol=1e-4, atol=1e-2)


@each_layout
def test_written_as_ours_it_is_the_same(tmp_path, layout):
    p = Parts()
    folder, z = LAYOUTS[layout][0](tmp_path / "x", p)
    first = read(folder)
    write(tmp_path / "ours" / "sae.safetensors", first._replace(config=first.config | {"family": "SDXL", "fvu": 0.2}))
    again = read(tmp_path / "ours" / "sae.safetensors")
    check(again, p, z)
    for name, value in first.sae._asdict().items():
        own = getattr(again.sae, name)
        assert torch.equal(own, value) if isinstance(value, torch.Tensor) else own == value, name
    assert (again.config["family"], again.config["fvu"], again.config["layout"]) == ("SDXL", 0.2, "concept nodes")
    assert again.stats.keys() == first.stats.keys() and all(torch.equal(again.stats[name], first.stats[name]) for name in first.stats)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("norms", [(), ("mean", "std"), ("mean",), ("std",)])
def test_exported_it_is_the_same_pair(tmp_path, center, norms):
    p = Parts()
    given = {name: random(D, seed=20 + len(name)).abs() + 0.5 for name in norms}
    sae = SAE(p.encoder, p.b_enc, p.decoder, p.b_dec, TOPK, K, None, center, **given)
    stats = {"mean": random(N).abs(), "freq": random(N).abs()}
    export_sparsify(tmp_path, SAEFile(sae, {"family": "SDXL"}, stats))
    assert set(load_file(tmp_path / "sae.safetensors")) == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    read_again = read(tmp_path)
    torch.testing.assert_close(read_again.sae.encode(p.x), sae.encode(p.x), **CLOSE)
    torch.testing.assert_close(read_again.sae.decode(sae.encode(p.x)), sae.decode(sae.encode(p.x)), **CLOSE)
    assert all(torch.equal(read_again.stats[name], stats[name]) for name in stats)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors", "stats.safetensors"]


def test_what_the_pair_cannot_say_is_not_exported(tmp_path):
    p = Parts()
    with pytest.raises(SAEError, match="jumprelu.*cannot be exported"):
        export_sparsify(tmp_path, SAEFile(SAE(p.encoder, p.b_enc, p.decoder, p.b_dec, JUMPRELU, 0, p.threshold), {}, {}))
    assert list(tmp_path.iterdir()) == []


def test_published_statistics_are_read(tmp_path):
    p = Parts()
    assert torch.equal(read(openai(tmp_path, p)[0]).stats["mean"], random(N, seed=7).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay_as_saved(tmp_path, dtype):
    p = Parts()
    p.encoder, p.decoder = p.encoder.to(dtype), p.decoder.to(dtype)
    tensors = {"encoder.weight": p.encoder, "encoder.bias": p.b_enc, "W_dec": p.decoder, "b_dec": p.b_dec}
    assert read(saved(tmp_path, tensors, {"k": K}, "sae.safetensors")).sae.W_enc.dtype == dtype


def test_a_file_that_was_not_written_whole_takes_nothing_away(tmp_path, monkeypatch):
    p, path = Parts(), tmp_path / "mine.safetensors"
    file = SAEFile(SAE(p.encoder, p.b_enc, p.decoder, p.b_dec, TOPK, K), {}, {})
    write(path, file)
    before = path.read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(sae_files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write(path, file)
    assert path.read_bytes() == before and [other.name for other in tmp_path.iterdir()] == [path.name]


class Ran:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def spoilt(change):
    """An OpenAI file with one tensor changed."""

    def make(folder):
        openai(folder, Parts())
        held = torch.load(folder / "state_dict.pth", weights_only=True)
        change(held["state_dict"])
        torch.save(held, folder / "state_dict.pth")

    return make


def cut(folder):
    sparsify(folder, Parts())
    file = folder / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_pickle(folder):
    openai(folder, Parts())
    file = folder / "state_dict.pth"
    file.write_bytes(file.read_bytes()[:900])


def in_place(name, value):
    return spoilt(lambda state: state.update({name: value(state[name])}))


def nan(tensor):
    tensor = tensor.clone()
    tensor[0, 5] = math.nan
    return tensor


WRONG = {
    "cut short": (cut, r"'sae.safetensors' cannot be read .*Download or save it again"),
    "a pickle cut short": (cut_pickle, r"'state_dict.pth' cannot be read .*Download or save it again"),
    "NaN": (in_place("decoder.weight", nan), "holds NaN or infinity in W_dec.*Use another copy"),
    "other width": (in_place("pre_bias", lambda tensor: tensor[1:]), r"b_dec of the shape \(11,\).*asks for \(12,\)"),
    "other number": (in_place("decoder.weight", lambda tensor: tensor[:, :-3]), r"W_dec of the shape \(37, 12\)"),
    "whole numbers": (in_place("encoder.weight", lambda tensor: tensor.long()), "int64"),
    "one missing": (spoilt(lambda state: state.pop("pre_bias")), "of no layout that is known here.*decoder.weight.*Known are"),
    "of something else": (lambda folder: saved(folder, {"lora.up": random(3)}, None, "sae.safetensors"), "no layout.*lora.up"),
    "k too large": (lambda folder: sparsify(folder, Parts(), k=999), "keeps 999 of 40 latents"),
    "no settings": (lambda folder: (sparsify(folder, Parts()), (folder / "cfg.json").unlink()), "does not say how many.*cfg.json"),
    "settings spoilt": (lambda folder: (sparsify(folder, Parts()), (folder / "cfg.json").write_text("{")), "'cfg.json' has settings that"),
    "settings no object": (lambda folder: (sparsify(folder, Parts()), (folder / "cfg.json").write_text("[]")), "no JSON object"),
    "normalised one by one": (lambda folder: saedit(folder, Parts(), input_unit_norm=True), "each vector by its own mean"),
    "gated": (lambda folder: saelens(folder, Parts(), architecture="gated"), "architecture 'gated'"),
    "layer norm": (lambda folder: saelens(folder, Parts(), normalize_activations="layer_norm"), "normalised by 'layer_norm'"),
    "group max": (lambda folder: sparsify(folder, Parts(), activation="groupmax"), "activation 'groupmax'"),
    "statistics of another": (
        lambda folder: (openai(folder, Parts()), torch.save(random(7), folder / "mean.pt")),
        "statistic 'mean' of 40",
    ),
    "a bare tensor": (lambda folder: (folder.mkdir(), torch.save(random(3), folder / "ae.pt")), "'ae.pt' is no dictionary"),
    "empty folder": (lambda folder: folder.mkdir(), "is a folder without sae.safetensors.*pytorch_model.bin"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_told(tmp_path, case):
    make, told = WRONG[case]
    make(tmp_path / "x")
    with pytest.raises(SAEError, match=f"(?s){told}") as error:
        read(tmp_path / "x")
    assert "It lies at" in str(error.value)


@pytest.mark.parametrize("write_it", ["torch", "pickle", "beside"])
def test_no_file_can_run_code(tmp_path, write_it):
    folder, marker = tmp_path / "x", tmp_path / "ran"
    openai(folder, Parts())
    if write_it == "torch":
        torch.save({"state_dict": {"encoder.weight": Ran(marker)}}, folder / "state_dict.pth")
    elif write_it == "pickle":
        (folder / "state_dict.pth").write_bytes(pickle.dumps({"a": Ran(marker)}, protocol=2))
    else:
        torch.save(Ran(marker), folder / "mean.pt")
    with pytest.raises(SAEError, match=r"mean\.pt" if write_it == "beside" else "holds more than tensors"):
        read(folder)
    assert not marker.exists()


def test_a_header_that_lies_about_its_length_is_told(tmp_path):
    (tmp_path / "sae.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(SAEError, match="cannot be read"):
        read(tmp_path / "sae.safetensors")
    with pytest.raises(SAEError, match="cannot be opened|cannot be read"):
        read(tmp_path / "gone.safetensors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    sae_files.show_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "sae", ([str(tmp_path)], set(sae_files.ENDINGS)))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


class TestLoader:
    def test_lists_what_may_be_one_and_finds_near_names(self, folder):
        openai(folder / "mid_block", Parts())
        sparsify(folder / "up", Parts())
        (folder / "up" / "notes.txt").write_text("")
        assert sorted(sae_files.names()) == ["mid_block/state_dict.pth", "up/sae.safetensors"]
        assert SAELoader.validate_inputs("up/sae.safetensors") is True
        assert SAELoader.validate_inputs("up\\sae.safetensors") is True
        assert "'up/sae.safetensors'" in SAELoader.validate_inputs("down/sae.safetensors")
        assert "models/sae" in SAELoader.validate_inputs("../secret.safetensors")

    def test_loads_and_says_what(self, folder):
        p = Parts()
        write(folder / "a.safetensors", SAEFile(SAE(p.encoder, p.b_enc, p.decoder, p.b_dec, TOPK, K), {"family": "SDXL", "fvu": 0.25}, {}))
        sae, report = SAELoader.execute("a.safetensors").result
        assert torch.equal(sae.sae.W_enc, p.encoder) and sae.config["family"] == "SDXL"
        for part in (
            "'a.safetensors'",
            "40 latents",
            "12 numbers",
            "4 latents a vector",
            "family SDXL",
            "does not name site",
            "25.0% of the var",
        ):
            assert part in report, report
        assert SAELoader.execute("a.safetensors").ui.as_dict()["text"] == (report,)

    def test_family_and_site_can_be_said(self, folder):
        p = Parts()
        sparsify(folder / "up", p)
        sae, report = SAELoader.execute("up/sae.safetensors", "fp16", "Stable Diffusion 1.5", " output_blocks.4.1 ").result
        assert (sae.config["family"], sae.config["site"]) == ("Stable Diffusion 1.5", "output_blocks.4.1")
        assert sae.sae.W_dec.dtype == torch.float16 and sae.sae.b_dec.dtype == torch.float32
        assert "family Stable Diffusion 1.5, site output_blocks.4.1." in report and "float16" in report

    def test_none_is_told(self):
        with pytest.raises(ValueError, match="No file is chosen"):
            SAELoader.execute("none")

    def test_is_seen_when_the_file_or_its_settings_change(self, folder):
        sparsify(folder / "up", Parts())
        prints = [SAELoader.fingerprint_inputs("up/sae.safetensors")]
        (folder / "up" / "cfg.json").write_text(json.dumps({"k": 2}))
        prints.append(SAELoader.fingerprint_inputs("up/sae.safetensors"))
        sparsify(folder / "up", Parts(41))
        prints.append(SAELoader.fingerprint_inputs("up/sae.safetensors"))
        assert len(set(prints)) == 3 and SAELoader.fingerprint_inputs("none") == "none"
        assert "missing" in SAELoader.fingerprint_inputs("gone.safetensors")

    def test_an_extra_paths_file_is_kept(self, monkeypatch, tmp_path):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "sae", ([str(tmp_path)], set()))
        sae_files.show_folder()
        paths, endings = folder_paths.folder_names_and_paths["sae"]
        assert paths[0] == str(tmp_path) and paths[1].endswith("sae") and ".pth" in endings
