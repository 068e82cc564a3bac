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
        reached = []
        for _ in range(2):
            prompt_id = client.queue(graph)
            at = -1
            while at < (reached[0] + 1 if reached else 3):
                (event,) = client.follow(prompt_id, ("progress",))[-1:]
                at = event.data["value"] if event.data["node"] == "12" else -1
            reached.append(at)
            client.interrupt()
            assert client.wait(prompt_id).end == "execution_interrupted"
        assert reached[1] > reached[0]
        steps = [event.data["value"] for event in client.follow(client.queue(graph), ("progress",))[-1:]]
        client.interrupt()
        assert steps[0] > reached[1]
