"""Regions from queue to picture: beside stock loaders and patches, and every way to get them wrong."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_nodes.host import lab
from concept_nodes.lab.eye import Eye
from concept_nodes.lab.train_control import UNetControl

from client import PromptRefused
from graphs import Lab, find
from pack import ROOT
from pictures import pixels

ROBOT = "concept_lab/characters/unet/robot.safetensors"
BACKGROUND, SIZE = "concept_lab/sliders/unet/background.safetensors", "concept_lab/sliders/unet/size.safetensors"
LEFT, RIGHT = "a medium red star on the left on a grey background", "a medium blue square on the right on a grey background"
CONTROL = "small_control_lora.safetensors"
SEEDS = itertools.count(1000)


class Regional(Lab):
    """A graph on the lab's UNet with nodes for regions."""

    def __init__(self):
        super().__init__("unet")
        self.common = self.text("a grey background")

    def region(self, name, prompt="", x=0.0, width=0.5, **optional) -> list:
        given = {"negative": "", "shape": "box", "y": 0.0, "height": 1.0, "feather": 0.0, "weight": 1.0}
        return self.add("ConceptNodes_Region", name=name, prompt=prompt, x=x, width=width, **given, **optional)

    def hang(self, regions, region, lora_name=ROBOT) -> list:
        strengths = {"strength_model": 1.0, "strength_clip": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        return self.add("ConceptNodes_RegionLoRA", regions=regions, region=region, lora_name=lora_name, **strengths)

    def halves(self) -> list:
        """Two regions with a prompt each."""
        return self.region("right", RIGHT, x=0.5, regions=self.region("left", LEFT))

    def put(self, model, regions) -> list:
        given = {"text": "own", "isolation": 0.0, "isolation_end": 0.5}
        return self.add(
            "ConceptNodes_RegionsApply", model=model, positive=self.common, negative=self.empty, regions=regions, clip=self.clip, **given
        )

    def drawn(self, model, positive=None, negative=None) -> "Regional":
        """Complete, with a picture of `model`."""
        return self.save(self.sample(model=model, positive=positive or self.common, negative=negative, seed=4))

    def controlled(self, strength: float) -> tuple[list, list]:
        """The common prompts under the ControlNet on a white picture."""
        net = self.add("ControlNetLoader", control_net_name=CONTROL)
        image = self.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFFFFFF)
        conditions = {"positive": self.common, "negative": self.empty, "control_net": net, "image": image}
        positive = self.add("ControlNetApplyAdvanced", **conditions, strength=strength, start_percent=0.0, end_percent=1.0)
        return positive, [positive[0], 1]


def picture(client, graph) -> np.ndarray:
    run = client.run(graph)
    assert run.end == "execution_success", run.error
    return pixels(client.pictures(run)[0])


@pytest.fixture(scope="module")
def control(host):
    """A Control-LoRA for the lab's UNet with small random weights: the host's loader reads one of any width."""
    generator = torch.Generator().manual_seed(0)
    tensors = UNetControl(lab.build_unet_module()).tensors()
    state = {
        key: torch.randn(tensor.shape, generator=generator) * 0.3 * tensor[0].numel() ** -0.5
        if tensor.ndim > 1
        else torch.zeros(len(tensor))
        for key, tensor in tensors.items()
    }
    folder = host.base / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / CONTROL)


@pytest.mark.usefixtures("control")
class TestBesideOthers:
    """Two lists in a row, a stock loader before and one after, PAG and FreeU behind them, and a ControlNet on the prompts."""

    def stacked(self, before: str, after: str, strength: float = 1.0) -> Regional:
        graph = Regional()
        model = self.loaded(graph, graph.model, before)
        model = graph.put(model, graph.halves())
        model = graph.put(model, graph.hang(graph.region("slid"), "slid", SIZE))
        model = self.loaded(graph, model, after)
        model = graph.add("PerturbedAttentionGuidance", model=model, scale=1.0)
        model = graph.add("FreeU_V2", model=model, b1=1.05, b2=1.05, s1=0.95, s2=0.9)
        return graph.drawn(model, *graph.controlled(strength))

    def loaded(self, graph, model, name) -> list:
        return graph.add("LoraLoader", model=model, clip=graph.clip, lora_name=name, strength_model=1.0, strength_clip=1.0)

    def test_each_half_holds_what_its_prompt_says(self, client):
        drawn = picture(client, self.stacked(BACKGROUND, SIZE))
        (reading,) = Eye.load().read(torch.tensor(drawn)[None].float() / 255)
        seen = {"left" if one.x < 32 else "right": (one.kind, one.colour) for one in reading.objects}
        assert seen == {"left": ("star", "red"), "right": ("square", "blue")}

    def test_the_order_of_the_stock_loaders_is_the_same_picture(self, client):
        one, other = (picture(client, self.stacked(*names)).astype(int) for names in ((BACKGROUND, SIZE), (SIZE, BACKGROUND)))
        assert np.abs(one - other).max() <= 2

    def test_both_lists_act_and_say_so(self, client):
        run = client.run(self.stacked(BACKGROUND, SIZE))
        first, second = (
            run.text(node_id) for node_id, node in self.stacked(BACKGROUND, SIZE).items() if "RegionsApply" in node["class_type"]
        )
        assert "'left': 50% of the picture; reads a prompt of its own." in first and "'right'" in first
        assert f"'{SIZE}' at 1." in second

    def test_the_controlnet_acts_beside_them(self, client):
        with_it, without = (picture(client, self.stacked(BACKGROUND, SIZE, strength)).astype(int) for strength in (1.0, 0.0))
        assert np.abs(with_it - without).max() > 10


@pytest.fixture
def runs_afterwards(client):
    """After the test, two regions must still be drawn, and not from the host's cache."""
    yield
    graph = Regional()
    graph.drawn(graph.put(graph.model, graph.halves()))
    graph[find(graph, "KSampler")]["inputs"]["seed"] = next(SEEDS)
    assert picture(client, graph).std() > 5


def failure(client, graph) -> tuple[str, str]:
    """The class of the node that a graph fails at, and what the user is told."""
    try:
        run = client.run(graph)
    except PromptRefused as refused:
        (node_id,) = refused.answer["node_errors"]
        return graph[node_id]["class_type"], str(refused)
    assert run.end == "execution_error", f"the graph ran to {run.end}"
    return run.events[-1].data["node_type"], run.error


@pytest.mark.usefixtures("runs_afterwards")
class TestEachFailureSaysWhatAndWhere:
    def fail(self, client, make) -> tuple[str, str]:
        """What comes of a graph with the regions that `make` makes."""
        graph = Regional()
        return failure(client, graph.drawn(graph.put(graph.model, make(graph))))

    def test_a_missing_file_with_backslashes(self, client):
        wrong = ROBOT.replace("/", "\\").replace("robot", "robbot")
        where, told = self.fail(client, lambda graph: graph.hang(graph.halves(), "left", wrong))
        assert where == "ConceptNodes_RegionLoRA"
        assert wrong in told and ROBOT in told

    def test_two_regions_of_one_name(self, client):
        where, told = self.fail(client, lambda graph: graph.region("left", RIGHT, x=0.5, regions=graph.region("left", LEFT)))
        assert where == "ConceptNodes_Region"
        assert "already a region named 'left'" in told

    def test_a_lora_for_a_region_that_is_not_there(self, client):
        where, told = self.fail(client, lambda graph: graph.hang(graph.halves(), "middle"))
        assert where == "ConceptNodes_RegionLoRA"
        assert "no region named 'middle'. Regions: 'left', 'right'." in told

    def test_a_file_cut_short(self, client, host):
        shipped = (ROOT / "lab" / "loras" / ROBOT).read_bytes()
        (host.loras / "half_a_robot.safetensors").write_bytes(shipped[: len(shipped) // 2])
        where, told = self.fail(client, lambda graph: graph.hang(graph.halves(), "left", "half_a_robot.safetensors"))
        assert where == "ConceptNodes_RegionLoRA"
        assert "half_a_robot.safetensors" in told and "again" in told

    def test_a_file_that_holds_nan(self, client, host):
        state = load_file(ROOT / "lab" / "loras" / ROBOT)
        next(tensor for tensor in state.values() if tensor.ndim == 2)[0] = float("nan")
        save_file(state, host.loras / "no_number.safetensors")
        _, told = self.fail(client, lambda graph: graph.hang(graph.halves(), "left", "no_number.safetensors"))
        assert "no_number.safetensors" in told and "NaN" in told

    def test_a_batch_of_masks(self, client):
        def regions(graph):
            masks = graph.add("ConceptNodes_RegionsToMasks", regions=graph.halves(), width=64, height=64)
            return graph.region("both", LEFT, mask=masks)

        where, told = self.fail(client, regions)
        assert where == "ConceptNodes_Region"
        assert "mask has the shape (2, 64, 64). Connect one mask" in told

    def test_a_region_without_a_width(self, client):
        where, told = self.fail(client, lambda graph: graph.region("thin", LEFT, width=0.0))
        assert where == "ConceptNodes_Region"
        assert "'thin' has a width or height of 0" in told

    def test_a_region_beside_the_picture_is_the_plain_picture_and_a_line(self, client):
        plain, graph = Regional(), Regional()
        applied = graph.put(graph.model, graph.region("away", LEFT, x=1.0))
        run = client.run(graph.drawn(applied))
        assert "'away': nothing done, it covers no part of the picture." in run.text(applied[0])
        assert np.array_equal(pixels(client.pictures(run)[0]), picture(client, plain.drawn(plain.model)))
