"""The example from queue to picture, and what its strength does to the picture."""

import statistics
import time

import numpy as np
import pytest

from graphs import changed, find, without
from pictures import pixels

SECONDS_PER_PICTURE = 1.5
SLIDER, REPORT = "ConceptNodes_Slider", "ConceptNodes_RunReport"


def picture(client, graph) -> np.ndarray:
    run = client.run(graph)
    assert run.end == "execution_success", run.error
    return pixels(client.pictures(run)[0])


def test_example_runs_from_queue_to_picture(client, graph):
    drawn = picture(client, graph)
    assert drawn.shape == (64, 64, 3)
    assert drawn.std() > 5, "the picture is a single tone"


def test_reports_are_in_history(client, graph):
    run = client.run(graph)
    report = run.text(find(graph, SLIDER))
    assert "'concept_lab/sliders/unet/background.safetensors' at strength 2, everywhere, in all steps." in report
    told = run.text(find(graph, REPORT))
    assert told.startswith("20 steps, ")
    assert "Slider 'concept_lab/sliders/unet/background.safetensors' at 2: acted in 20 of 20 steps" in told


def test_reports_are_in_the_history_of_a_cached_run_too(client, graph):
    first, again = client.run(graph), client.run(graph)
    assert again.history["outputs"].keys() >= {find(graph, SLIDER), find(graph, REPORT)}
    assert again.text(find(graph, SLIDER)) == first.text(find(graph, SLIDER))


@pytest.mark.parametrize("class_type, name", [(SLIDER, "file"), ("ConceptNodes_LabLoader", "model")])
def test_a_choice_may_come_from_another_node(client, graph, class_type, name):
    """The host lets no STRING into a COMBO, but a switch, whose output is of any type, may hand on one."""
    chosen = graph[find(graph, class_type)]["inputs"][name]
    linked = changed(graph, class_type, **{name: ["switch", 0]}) | {
        "text": {"class_type": "PrimitiveString", "inputs": {"value": chosen}},
        "switch": {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_false": ["text", 0], "on_true": ["text", 0]}},
    }
    assert np.array_equal(picture(client, linked), picture(client, graph))


def test_strength_moves_the_background_both_ways(client, graph):
    brightness = [picture(client, changed(graph, SLIDER, strength=strength)).mean() for strength in (-2.0, 0.0, 2.0)]
    assert brightness == sorted(brightness)
    assert brightness[2] - brightness[0] > 25, "of 255 grey levels"


def test_strength_zero_is_the_graph_without_the_node(client, graph):
    with_node = picture(client, changed(graph, SLIDER, strength=0.0))
    assert np.array_equal(with_node, picture(client, without(graph, SLIDER, passes="model")))


def test_moving_the_strength_leaves_nothing_behind(client, graph):
    plain = without(graph, SLIDER, passes="model")
    before = picture(client, changed(plain, "KSampler", seed=11))
    moved = picture(client, changed(graph, "KSampler", seed=11))
    # Another prompt between them, so that the last picture is drawn and not read from the host's cache.
    picture(client, changed(plain, "KSampler", seed=12))
    after = picture(client, changed(plain, "KSampler", seed=11))
    assert not np.array_equal(before, moved)
    assert np.array_equal(before, after)


def test_sampling_progress_is_sent(client, graph):
    graph = changed(graph, "KSampler", seed=21)
    steps = [event.data for event in client.run(graph).events if event.type == "progress"]
    assert [step["value"] for step in steps if step["node"] == find(graph, "KSampler")][-1] == 20


def test_two_prompts_queued_at_once_both_end_with_their_own_picture(client, graph):
    dark, light = (client.queue(changed(changed(graph, SLIDER, strength=strength), "KSampler", seed=31)) for strength in (-2.0, 2.0))
    dark, light = (pixels(client.pictures(client.wait(prompt_id))[0]) for prompt_id in (dark, light))
    assert dark.mean() < light.mean()


@pytest.mark.alone
def test_a_picture_takes_no_longer_than_promised(client, graph):
    client.run(graph)
    seconds = []
    for seed in range(100, 107):
        start = time.monotonic()
        assert client.run(changed(graph, "KSampler", seed=seed)).end == "execution_success"
        seconds.append(time.monotonic() - start)
    assert statistics.median(seconds) <= SECONDS_PER_PICTURE, f"seconds per picture: {[round(s, 2) for s in seconds]}"
