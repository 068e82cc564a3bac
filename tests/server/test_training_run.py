"""Training on the running host: previews, the host's own loss plot, a cancel and a resumption."""

import io

import pytest
from PIL import Image

from graphs import example

EXAMPLES = {"slider_train": "12", "slider_train_images": "12"}


def short(name: str, **changes) -> dict:
    """The example's training alone, in a few steps."""
    graph = example(name)
    graph["12"]["inputs"].update(**{"batch": 2, "previews": 3, "steps": 6, "name": "of a test"} | changes)
    graph["20"] = {"class_type": "LossGraphNode", "inputs": {"loss": ["12", 1], "filename_prefix": "loss"}}
    return {node_id: node for node_id, node in graph.items() if node_id in ("1", "12", "13", "20")}


@pytest.mark.parametrize("name", EXAMPLES)
class TestTraining:
    def test_previews_show_three_strengths(self, client, name):
        before = len(client.previews)
        run = client.run(short(name, seed=11))
        assert run.end == "execution_success", run.error
        pages = [Image.open(io.BytesIO(page)) for page in client.previews[before:]]
        assert len(pages) == 3
        assert all(page.width > 3 * 192 for page in pages)

    def test_losses_are_what_the_hosts_plot_draws(self, client, name):
        run = client.run(short(name, seed=12))
        assert run.end == "execution_success", run.error
        assert run.history["outputs"]["20"]["images"]

    def test_a_cancelled_training_goes_on_where_it_stopped(self, client, name):
        graph = short(name, seed=13, steps=400)

        def begun_at(reach: int) -> int:
            """Queue it and stop it once it has reached so many steps; the first step that was told."""
            prompt_id, told = client.queue(graph), []
            while not told or told[-1] < reach:
                (event,) = client.follow(prompt_id, ("progress",))[-1:]
                told += [event.data["value"]] if event.data["node"] == "12" else []
            client.interrupt()
            assert client.wait(prompt_id).end == "execution_interrupted"
            return told[0]

        assert begun_at(12) <= 2
        assert begun_at(0) >= 12
