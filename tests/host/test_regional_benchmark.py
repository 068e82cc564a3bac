"""The regional benchmark's timing of models of published size: the sizes are the host's, and the whole of it runs on a small one."""

import comfy.model_detection
import comfy.supported_models
import pytest
import torch

from concept_nodes.benchmarks import regional as bench

SMALL = {
    "sdxl": {
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 64,
        "num_heads": 4,
        "num_head_channels": -1,
    },
    "flux": {
        "vec_in_dim": 32,
        "context_in_dim": 64,
        "hidden_size": 64,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
    },
}


@pytest.mark.parametrize("name", bench.SIZES)
def test_the_host_would_read_these_sizes_from_a_checkpoint(name):
    size = bench.SIZES[name]
    assert type(comfy.model_detection.model_config_from_unet_config(size.config)) is getattr(comfy.supported_models, size.kind)


@pytest.mark.parametrize("name", bench.SIZES)
def test_all_of_it_runs_on_a_small_model(name, monkeypatch):
    monkeypatch.setattr(bench, "SIZED", {"repeats": 2, "steps": 1})
    size = bench.SIZES[name]
    pooled = 32 if name == "flux" else size.pooled
    small = size._replace(config=size.config | SMALL[name], width=64, tokens=8, pooled=pooled, side=8)
    with torch.inference_mode():
        figures, rows = bench.measure_size(small, False, (1, 8))
    on_gpu = ["memory_k8"] if torch.cuda.is_available() else []
    keys = ["step_ratio_k1", "step_ratio_k8", "step_ratio_own_k8", "flat", *on_gpu]
    assert list(figures) == [f"{precision}_{key}" for precision in bench.PRECISIONS for key in keys]
    assert all(figure.value > 0 for key, figure in figures.items() if "ratio" in key)
    assert {row["arm"].split(":")[0] for row in rows} == set(bench.PRECISIONS)


def test_every_claim_is_about_a_figure_of_the_full_run():
    keys = {f"{precision}_{key}" for precision in bench.PRECISIONS for key in ("step_ratio_k8", "flat", "memory_k8")}
    assert set(bench.claims_of_size()) == keys


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert bench.main(["--size", "flux"]) == 1
    assert "needs a GPU, and torch finds none here" in capsys.readouterr().out
