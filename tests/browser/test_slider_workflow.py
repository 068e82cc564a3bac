"""The slider example in the browser, in the classic canvas and in Nodes 2.0."""

import json

import pytest

from graphs import WORKFLOWS, example

SLIDER, REPORT, PICTURE = "ConceptNodes_Slider", "ConceptNodes_RunReport", "SaveImage"


@pytest.fixture
def slider(canvas):
    """The example, opened as a template."""
    canvas.open_template("slider")
    yield canvas
    assert canvas.problems == []


def saved_workflow() -> dict:
    return json.loads((WORKFLOWS / "slider.json").read_text(encoding="utf-8"))


def values_by_type(workflow: dict) -> dict:
    return {node["type"]: node.get("widgets_values") for node in workflow["nodes"]}


def test_frontend_starts_with_the_pack(canvas):
    canvas.open()
    assert "ConceptNodes.Report" in canvas.page.evaluate("() => window.app.extensions.map(extension => extension.name)")
    assert canvas.problems == []


def test_opens_without_a_complaint(slider):
    slider.page.wait_for_timeout(1000)  # missing models are looked for after the graph is shown
    assert slider.faults_shown() == []
    assert sorted(node["type"] for node in slider.workflow()["nodes"]) == sorted(node["type"] for node in saved_workflow()["nodes"])
    assert slider.page.evaluate("() => window.app.rootGraph.nodes.filter(node => node.has_errors).map(node => node.type)") == []


def test_run_button_queues_the_shipped_graph(slider):
    shipped = {node_id: {"class_type": node["class_type"], "inputs": node["inputs"]} for node_id, node in example("slider").items()}
    assert slider.graph() == shipped


def test_run_shows_the_picture_and_the_reports(slider):
    assert "after a run" in slider.report(SLIDER)
    slider.run()
    assert slider.run_ended == "execution_success"
    assert slider.faults_shown() == []
    assert slider.picture_width(PICTURE) == 64
    assert "'concept_lab/sliders/unet/background.safetensors' at strength 2, everywhere, in all steps." in slider.report(SLIDER)
    assert "acted in 20 of 20 steps" in slider.report(REPORT)


def test_report_follows_the_strength(slider):
    slider.run()
    first = slider.report(SLIDER)
    slider.set_widget(SLIDER, "strength", -1.5)
    slider.run()
    assert slider.run_ended == "execution_success"
    assert "at strength 2," in first
    assert "at strength -1.5," in slider.report(SLIDER)


def test_report_is_neither_saved_nor_queued(slider):
    slider.run()
    report = slider.report(SLIDER)
    assert values_by_type(slider.workflow()) == values_by_type(saved_workflow())
    assert report not in json.dumps(slider.workflow())
    assert report not in json.dumps(slider.graph())


def test_report_returns_after_a_reload(slider):
    slider.run()
    before = slider.report(SLIDER)
    slider.open_template("slider")
    assert "after a run" in slider.report(SLIDER)
    slider.run()  # the host has it all cached and runs nothing
    assert slider.report(SLIDER) == before
    assert slider.picture_width(PICTURE) == 64


def test_report_returns_with_its_workflow_tab(slider):
    slider.run()
    before = slider.report(SLIDER)
    slider.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    slider.page.wait_for_function("() => window.app.rootGraph.nodes.length === 0")
    slider.page.evaluate("() => window.app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    slider.page.wait_for_function("() => window.app.rootGraph.nodes.length > 0")
    slider.settle()
    assert slider.report(SLIDER) == before


def test_report_reaches_a_node_in_a_subgraph(slider):
    slider.click_title(SLIDER)
    slider.page.get_by_test_id("info-button").wait_for()
    slider.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph')")
    slider.page.wait_for_function("() => window.app.rootGraph.subgraphs.size === 1")
    slider.run()
    assert slider.run_ended == "execution_success"
    reports = slider.page.evaluate("""() => [...window.app.rootGraph.subgraphs.values()][0].nodes
        .map(node => node.widgets.find(widget => widget.name === "last_report").value)""")
    assert len(reports) == 1
    assert "concept_lab/sliders/unet/background.safetensors" in reports[0]


def test_long_report_does_not_stretch_the_node(slider):
    sizes = [slider.page.evaluate("type => [...window.app.rootGraph.nodes.find(n => n.type === type).size]", REPORT)]
    slider.set_widget(REPORT, "last_report", "\n".join(f"line {i}" for i in range(200)))
    slider.page.wait_for_timeout(500)
    sizes.append(slider.page.evaluate("type => [...window.app.rootGraph.nodes.find(n => n.type === type).size]", REPORT))
    assert sizes[0] == sizes[1]


def test_wheel_scrolls_a_long_report_and_zooms_over_a_short_one(slider):
    slider.set_widget(REPORT, "last_report", "\n".join(f"line {i}" for i in range(200)))
    scrolled, zoomed = slider.wheel_over_report(REPORT, focus=True)
    assert scrolled > 0
    assert zoomed == 1
    scrolled, zoomed = slider.wheel_over_report(SLIDER, focus=False)
    assert scrolled == 0
    assert zoomed < 1


def test_help_page_opens_beside_the_node(slider):
    slider.click_title(SLIDER)
    slider.page.get_by_test_id("info-button").click()
    page = slider.page.get_by_test_id("properties-panel").locator(".markdown-content")
    page.wait_for()
    assert "Turns one concept up or down" in page.inner_text()
    assert page.locator("table").count() >= 2
