"""What benchmarks share: intervals that cover, results that are written whole, and a check that can fail."""

import json
import math

import pytest
import torch

from concept_nodes.benchmarks import _report
from concept_nodes.benchmarks._report import Figure, check, mean, run, write


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(_report, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def committed(results, **values):
    results.mkdir(exist_ok=True)
    figures = {key: Figure(value, value - 0.01, value + 0.01, 240)._asdict() for key, value in values.items()}
    (results / "made_up.json").write_text(json.dumps({"figures": figures}), encoding="utf-8")


class TestMean:
    def test_known_values(self):
        figure = mean([1.0, 2.0, 3.0, 6.0])
        assert figure.value == 3.0
        assert figure.n == 4
        assert 1.0 <= figure.low < 3.0 < figure.high <= 6.0

    def test_same_values_give_no_spread(self):
        assert mean([0.5] * 9) == Figure(0.5, 0.5, 0.5, 9)

    def test_interval_is_the_normal_one_for_many_cases(self):
        data = torch.randn(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        figure = mean(data)
        half = 1.96 * float(data.std()) / math.sqrt(2000)
        assert figure.high - figure.value == pytest.approx(half, rel=0.1)
        assert figure.value - figure.low == pytest.approx(half, rel=0.1)

    def test_interval_covers_the_truth(self):
        generator = torch.Generator().manual_seed(1)
        figures = [mean(torch.rand(60, generator=generator), resamples=500) for _ in range(300)]
        covered = sum(figure.low <= 0.5 <= figure.high for figure in figures) / 300
        assert 0.90 < covered < 0.99

    def test_same_values_same_interval(self):
        assert mean([0.1, 0.4, 0.9]) == mean(torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64))


class TestCheck:
    def test_committed_value_inside_the_new_interval_holds(self, results, capsys):
        committed(results, span=0.52, spearman=0.97)
        assert check("made_up", {"span": Figure(0.55, 0.50, 0.60, 40)}) == 0
        assert "holds" in capsys.readouterr().out

    @pytest.mark.parametrize("figure", [Figure(0.4, 0.3, 0.5, 40), Figure(0.7, 0.6, 0.8, 40), Figure(math.nan, math.nan, math.nan, 40)])
    def test_committed_value_outside_fails(self, results, capsys, figure):
        committed(results, span=0.52, spearman=0.97)
        assert check("made_up", {"spearman": Figure(0.96, 0.9, 1.0, 40), "span": figure}) == 1
        told = capsys.readouterr().out.splitlines()
        assert "DOES NOT HOLD" in next(line for line in told if "span" in line)
        assert "DOES NOT HOLD" not in next(line for line in told if "spearman" in line)


class TestResults:
    def test_what_is_written_is_what_was_measured(self, results):
        path = write("made_up", 12.34, {"span": Figure(0.5, 0.4, 0.6, 240)}, [{"arm": "ours"}])
        result = json.loads(path.read_text(encoding="utf-8"))
        assert path == results / "made_up.json"
        assert result["figures"] == {"span": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 240}}
        assert (result["name"], result["seconds"], result["arms"]) == ("made_up", 12.3, [{"arm": "ours"}])
        assert torch.__version__ in result["machine"]
        assert result["commit"]

    def test_command_line_writes_in_full_and_checks_a_sample(self, results):
        asked = []

        def measure(sample):
            asked.append(sample)
            return {"span": mean([0.4, 0.5, 0.6] * (5 if sample else 20))}, []

        assert run("made_up", [], measure) == 0
        assert run("made_up", ["--check"], measure) == 0
        assert asked == [False, True]

    def test_parts_of_files_that_have_changed_since_are_dropped(self, results):
        """Figures and rows; what is measured anew of the changed file stays, and so does what is of others."""
        files = {"size": "a", "hue": "b"}

        def measure(sample, parts):
            return {f"{part}_span": mean([0.4, 0.5, 0.6]) for part in parts}, [{"arm": part} for part in parts]

        def again(*parts):
            _report.run_parts("made_up", ["--again", *parts], list(files), measure, {}, about=lambda part: {"of": files[part]})
            return _report.committed("made_up")

        assert list(again("size", "hue")["figures"]) == ["size_span", "hue_span"]
        files["hue"] = "c"
        result = again("size")
        assert (list(result["figures"]), list(result["parts"])) == (["size_span"], ["size"])
        assert [row["arm"] for row in result["arms"]] == ["size"]
        assert list(again("hue")["figures"]) == ["size_span", "hue_span"]
        files["size"], asked = "d", []

        def noted(sample, parts):
            asked.append(parts)
            return measure(sample, parts)

        _report.run_parts("made_up", ["--check"], list(files), noted, {}, about=lambda part: {"of": files[part]})
        assert asked == [["hue"]]

    def test_check_fails_when_the_measure_moves(self, results):
        assert run("made_up", [], lambda sample: ({"span": mean([0.4, 0.5, 0.6])}, [])) == 0
        assert run("made_up", ["--check"], lambda sample: ({"span": mean([0.1, 0.2, 0.3])}, [])) == 1

    def test_check_knows_of_rare_cases_that_the_sample_missed(self, results):
        """Of 240 correlations six are far from 1. Most samples of 40 hold one or none of those."""
        assert run("made_up", [], lambda sample: ({"rank": mean([1.0] * 234 + [0.9] * 6)}, [])) == 0
        assert run("made_up", ["--check"], lambda sample: ({"rank": mean([1.0] * 40)}, [])) == 0
        assert run("made_up", ["--check"], lambda sample: ({"rank": mean([1.0] * 30 + [0.9] * 10)}, [])) == 1


class TestRatio:
    def test_known_values(self):
        figure = _report.ratio([True, False, True, False], [True, True, True, True])
        assert figure.value == 0.5
        assert figure.n == 4
        assert 0 <= figure.low < 0.5 < figure.high <= 1

    def test_pairs_that_agree_leave_no_doubt(self):
        hits = [True, False] * 50
        assert _report.ratio(hits, hits) == Figure(1.0, 1.0, 1.0, 100)
