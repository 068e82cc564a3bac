"""What the documentation says of the pack is what the committed benchmarks found."""

import json

from concept_nodes.benchmarks import slider
from concept_nodes.benchmarks._report import RESULTS, Figure, judge

OVER_SEEDS = ("spearman", "span", "validity_zero", "validity_loss_worst")


def test_the_sliders_do_what_is_claimed():
    result = json.loads((RESULTS / "slider.json").read_text(encoding="utf-8"))
    figures = {key: Figure(**figure) for key, figure in result["figures"].items()}
    claims = slider.claims()
    assert len(claims) == len(slider.CLAIMS) * len(slider.shipped()) > 0
    assert judge(figures, claims) == 0
    assert all(figures[f"{name}_{key}"].n >= 200 for name in slider.shipped() for key in OVER_SEEDS)
