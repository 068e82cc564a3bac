"""What the documentation says of the pack is what the committed benchmarks found."""

import json
import math
import re

import pytest

from concept_nodes.benchmarks import _report
from concept_nodes.benchmarks import binding as of_binding
from concept_nodes.benchmarks import filter as of_filter
from concept_nodes.benchmarks import localize as of_localize
from concept_nodes.benchmarks import maps as of_maps
from concept_nodes.benchmarks import reattention as of_reattention
from concept_nodes.benchmarks import regional as of_regional
from concept_nodes.benchmarks import residual as of_residual
from concept_nodes.benchmarks import sliders as bench
from concept_nodes.benchmarks import steer as of_steering
from concept_nodes.benchmarks._report import RESULTS, Figure
from concept_nodes.host import lab
from concept_nodes.lab import sliders

README = RESULTS.parents[1] / "README.md"
SHOWN = ("spearman", "span", "valid_zero", "validity_loss", "position_shift", "stock_difference")
OVER_SEEDS = ("spearman", "span", "valid_zero", "validity_loss")


def figures() -> dict[str, Figure]:
    result = json.loads((RESULTS / "sliders.json").read_text(encoding="utf-8"))
    return {key: Figure(**figure) for key, figure in result["figures"].items()}


def measured() -> list[str]:
    return [name for name in sliders.shipped("unet") if f"unet-{name}" in _report.committed("sliders")["parts"]]


def shown(key: str, figure: Figure) -> str:
    if key == "stock_difference":
        return f"{figure.value:.0e}".replace("e-0", "e-")
    value, low, high = (re.sub(r"^(-?)0\.", r"\1.", f"{number:.2f}") for number in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def test_readme_tells_of_every_shipped_slider_what_was_measured():
    """Every figure, and in bold those that miss what the benchmark claims of them; or that it has not been measured."""
    found, told = figures(), README.read_text(encoding="utf-8")
    for name in sliders.shipped("unet"):
        cells = [name]
        if name not in measured():
            assert f"| {name} | not measured since it was trained anew |" in told
            continue
        for key in SHOWN:
            figure = found[f"unet_{name}_{key}"]
            claim = bench.CLAIMS.get(key)
            cells.append(shown(key, figure) if claim is None or claim.met(figure) else f"**{shown(key, figure)}**")
        assert f"| {' | '.join(cells)} |" in told


def test_figures_of_the_sliders_are_of_the_files_that_ship():
    lab.show_files()
    assert _report.current("sliders", bench.about)["parts"] == _report.committed("sliders")["parts"]


def test_figures_of_the_sliders_are_over_many_seeds():
    found = figures()
    assert all(found[f"unet_{name}_{key}"].n >= 180 for name in measured() for key in OVER_SEEDS)


def test_moving_a_strength_costs_nothing():
    assert figures()["unet_repatch_count"].value == 0


@pytest.mark.parametrize("kind", lab.MODELS)
def test_readme_tells_of_six_characters_what_was_measured(kind):
    result, told = json.loads((RESULTS / "regional.json").read_text(encoding="utf-8")), README.read_text(encoding="utf-8")
    for key in ("identity", "leakage", "seam"):
        figure = Figure(**result["figures"][f"{kind}_{key}_k6"])
        line = shown(key, figure)
        assert (line if of_regional.CLAIMS[f"{kind}_{key}_k6"].met(figure) else f"**{line}**") in told
        assert figure.n >= 24


def test_the_page_of_characters_tells_what_was_measured():
    result = json.loads((RESULTS / "regional.json").read_text(encoding="utf-8"))
    told = (README.parent / "docs" / "characters.md").read_text(encoding="utf-8")
    assert of_regional.table(result["arms"]) in told
    for key, claim in of_regional.CLAIMS.items():
        figure = Figure(**result["figures"][key])
        line = f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
        assert f"| `{key}` | {line if claim.met(figure) else f'**{line}**'} |" in told


def test_the_filters_page_tells_what_was_measured():
    result = json.loads((RESULTS / "filter.json").read_text(encoding="utf-8"))
    told = (README.parent / "docs" / "filter.md").read_text(encoding="utf-8")
    assert of_filter.table(result["arms"]) in told
    for key, claim in of_filter.CLAIMS.items():
        figure = Figure(**result["figures"][key])
        line = f"{figure.value:.3f} [{figure.low + 0.0:.3f}, {figure.high:.3f}]"  # no minus before nought
        assert f"| `{key}` | {line if claim.met(figure) else f'**{line}**'} |" in told
        assert figure.n >= 300 or key in ("text_overhead", "adaptive_lead")  # the published arms have fewer texts


def test_and_of_latent_re_attention():
    """No change that leaves out nought is what the page says."""
    result = json.loads((RESULTS / "reattention.json").read_text(encoding="utf-8"))
    found = {key: Figure(**figure) for key, figure in result["figures"].items()}
    assert of_reattention.table(found) in (README.parent / "docs" / "filter.md").read_text(encoding="utf-8")
    for way in of_reattention.WAYS:
        change = found[f"{way}_held_change"]
        assert change.low <= 0 <= change.high and change.n >= 144
        assert found[f"{way}_moved"].low > 0.01


def test_the_binding_page_tells_what_was_measured():
    """What is claimed and missed stands there in bold."""
    result = json.loads((RESULTS / "binding.json").read_text(encoding="utf-8"))
    found = {key: Figure(**figure) for key, figure in result["figures"].items()}
    told = (README.parent / "docs" / "binding.md").read_text(encoding="utf-8")
    assert of_binding.table(found) in told
    for key, claim in of_binding.CLAIMS.items():
        line = f"{found[key].value:.3f} [{found[key].low + 0.0:.3f}, {found[key].high:.3f}]"
        assert f"| `{key}` | {line if claim.met(found[key]) else f'**{line}**'} |" in told
        assert found[key].n >= 192


def test_the_page_of_localized_sampling_tells_what_was_measured():
    """Figures are those that the committed cases make; a claim that is missed stands in bold."""
    told = (README.parent / "docs" / "localize.md").read_text(encoding="utf-8")
    of_places, maps = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("localize", "maps"))
    found = {key: Figure(**figure) for key, figure in (of_places["figures"] | maps["figures"]).items()}
    made = of_localize.figures_of(of_places["arms"])
    assert set(made) == set(of_places["figures"])
    assert all(math.isclose(made[key].value, found[key].value, abs_tol=1e-6) for key in made)
    assert of_localize.table(of_places["arms"]) in told and of_localize.rest_table(of_places["arms"]) in told
    assert of_maps.table(found) in told
    for key, claim in (of_localize.CLAIMS | of_maps.CLAIMS).items():
        figure = found[key]
        line = f"{figure.value:.3f} [{figure.low + 0.0:.3f}, {figure.high + 0.0:.3f}]"  # no minus before nought
        assert f"| `{key}` | {line if claim.met(figure) else f'**{line}**'} |" in told
        assert figure.n >= 48 or key == "capture_step_ratio"


def test_the_steering_page_tells_what_was_measured():
    result = json.loads((RESULTS / "steer.json").read_text(encoding="utf-8"))
    told = (README.parent / "docs" / "steering.md").read_text(encoding="utf-8")
    assert of_steering.table(result["arms"]) in told
    assert of_steering.doses(result["arms"]) in told
    for key, claim in of_steering.CLAIMS.items():
        figure = Figure(**result["figures"][key])
        line = f"{figure.value:.3f} [{figure.low + 0.0:.3f}, {figure.high:.3f}]"
        assert f"| `{key}` | {line if claim.met(figure) else f'**{line}**'} |" in told


def test_the_page_of_residuals_tells_what_was_measured():
    """What is claimed and missed stands there in bold."""
    result = json.loads((RESULTS / "residual.json").read_text(encoding="utf-8"))
    found = {key: Figure(**figure) for key, figure in result["figures"].items()}
    told = (README.parent / "docs" / "residual.md").read_text(encoding="utf-8")
    assert of_residual.table(found) in told
    for key, claim in of_residual.CLAIMS.items():
        figure, digits = found[key], 0 if found[key].value > 10 else 3
        line = f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
        assert f"| `{key}` | {line if claim.met(figure) else f'**{line}**'} |" in told
