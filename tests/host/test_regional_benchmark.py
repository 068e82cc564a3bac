"""The regional benchmark: its parts and what is made of them, and its timing of models of published size, whole on a small one."""

from functools import partial

import comfy.model_detection
import comfy.supported_models
import pytest
import torch

from concept_nodes.benchmarks import _report
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


class TestParts:
    def test_every_claim_is_about_a_figure_of_a_part(self):
        told = {arm: {"identity": [True], "second": [True], "stray": [1.0], "seam": [1.0]} for arm in bench.CLAIMED}
        found = {key for cell in bench.CELLS.values() if "alone" in cell.arms for key in bench._figures(cell.kind, cell.k, told)}
        timed = {"step_ratio_k8", "step_ratio_lab_k8", "calls_ratio_k8"}
        beside = {key for key in found if "_eyes_agree_" in key}
        assert set(bench.CLAIMS) == found - beside | timed

    def test_an_arm_of_k_regions_is_in_one_part(self):
        drawn = [(cell.kind, cell.k, arm) for cell in bench.CELLS.values() for arm in cell.arms]
        assert len(drawn) == len(set(drawn)) == 2 * (4 * len(bench.ARMS) + 4 + 1)

    def test_what_is_claimed_keeps_its_pictures_and_the_rest_has_enough_regions(self):
        for cell in bench.CELLS.values():
            assert cell.seeds == 24 if "alone" in cell.arms else 24 <= cell.seeds * cell.k <= 48

    def test_figures_are_over_the_arms_of_reference(self):
        told = {
            "ours": {"identity": [True, False], "second": [True, True], "stray": [0.0, 0.5], "seam": [0.3]},
            "alone": {"identity": [True, True, False, True], "second": [True, False, True, False], "stray": [], "seam": []},
            "global": {"identity": [], "stray": [1.0, 1.0], "seam": []},
            "base": {"identity": [], "stray": [], "seam": [0.2]},
        }
        figures = bench._figures("unet", 6, told)
        assert {key: round(figure.value, 6) for key, figure in figures.items()} == {
            "unet_identity_k6": round(0.5 / 0.75, 6),
            "unet_identity_second_k6": 2.0,
            "unet_eyes_agree_k6": 0.5,
            "unet_leakage_k6": 0.25,
            "unet_seam_k6": 1.5,
        }

    def test_a_part_measured_again_takes_the_place_of_the_committed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_report, "RESULTS", tmp_path)

        def measured(value):
            def measure(sample, parts):
                (part,) = parts
                return {part: _report.Figure(value, value, value, 1)}, [{"part": part, "value": value}]

            return measure

        claims = {"cost": _report.Claim(high=1.5), "unet6": _report.Claim(low=2.0), "dit6": _report.Claim()}
        assert _report.run_parts("regional", ["--again", "cost", "unet6"], bench.PARTS, measured(1.0), claims) == 1
        begun = _report.committed("regional")
        assert list(begun["parts"]) == ["cost", "unet6"]
        assert _report.run_parts("regional", ["--again", "unet6", "dit6"], bench.PARTS, measured(2.0), claims) == 0
        result = _report.committed("regional")
        assert {key: figure["value"] for key, figure in result["figures"].items()} == {"cost": 1.0, "unet6": 2.0, "dit6": 2.0}
        assert [(row["part"], row["value"]) for row in result["arms"]] == [("cost", 1.0), ("unet6", 2.0), ("dit6", 2.0)]
        assert result["parts"]["cost"] == begun["parts"]["cost"] and all("commit" in part for part in result["parts"].values())

    def test_a_check_is_of_what_is_committed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_report, "RESULTS", tmp_path)
        asked = []

        def measure(sample, parts):
            asked.append((sample, list(parts)))
            return {part: _report.Figure(1.0, 1.0, 1.0, 1) for part in parts}, []

        _report.run_parts("regional", ["--again", "dit6"], bench.PARTS, measure, {})
        assert _report.run_parts("regional", ["--check"], bench.PARTS, measure, {}) == 0
        assert asked == [(False, ["dit6"]), (True, ["dit6"])]


def test_two_regions_are_drawn_and_read(monkeypatch):
    monkeypatch.setattr(bench, "sample", partial(bench.sample, steps=2))
    with torch.inference_mode():
        figures, rows = bench.measure_quality("dit", 2, bench.CLAIMED, [31_000])
    assert [(row["arm"], row["pictures"]) for row in rows] == [("base", 1), ("global", 1), ("ours", 1), ("alone", 2)]
    assert all(0 <= row["identity"] <= 1 and row["seconds"] > 0 for row in rows)
    assert "seam" in rows[0] and "seam" not in rows[-1]
    assert set(figures) == {f"dit_{key}_k2" for key in ("identity", "identity_second", "eyes_agree", "leakage", "seam")}
