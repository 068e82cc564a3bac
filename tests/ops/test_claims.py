"""Claims that can be missed, and shares whose intervals keep a width."""

import json

import torch

from concept_nodes.benchmarks import _report
from concept_nodes.benchmarks._report import Claim, Figure, check, judge, share


def test_a_claim_that_is_not_met_is_told(capsys):
    assert judge({"span": Figure(0.4, 0.3, 0.5, 9)}, {"span": Claim(low=0.5)}) == 1
    assert "NOT MET: span" in capsys.readouterr().out


def test_share_keeps_a_width_at_the_ends():
    everything = share([True] * 40)
    assert everything.value == everything.high == 1.0
    assert 0.90 < everything.low < 0.93
    assert share([True, False]).low < 0.5 < share([True, False]).high


def test_checks_of_true_shares_seldom_fail(tmp_path, monkeypatch):
    """Eight figures, true share 0.99, samples of 40: a check of a right result fails in fewer than one case in ten."""
    monkeypatch.setattr(_report, "RESULTS", tmp_path)
    keys = [str(i) for i in range(8)]
    committed = share([True] * 198 + [False] * 2)._asdict()
    (tmp_path / "x.json").write_text(json.dumps({"figures": {key: committed for key in keys}}), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    fails = sum(check("x", {key: share(torch.rand(40, generator=generator) < 0.99) for key in keys}) for _ in range(200))
    assert fails < 20
