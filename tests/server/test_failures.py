"""A wrong graph is answered with what to do, and the next prompt runs."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from client import PromptRefused
from graphs import changed, find
from pack import ROOT
from pictures import pixels

SHIPPED = "concept_lab/sliders/unet/background.safetensors"
SLIDER = "ConceptNodes_Slider"


@pytest.fixture(scope="module")
def files(host):
    """LoRA files that a user may have: of another family, broken, and one in a folder of its own."""
    flux = {
        f"lora_unet_double_blocks_0_img_attn_proj.lora_{side}.weight": np.zeros(shape, np.float32)
        for side, shape in (("down", (4, 3072)), ("up", (3072, 4)))
    }
    save_file(flux, host.loras / "other_family.safetensors")
    (host.loras / "broken.safetensors").write_bytes(b"this was a web page, not a model")
    header = json.dumps({"a.lora_up.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}}).encode()
    (host.loras / "cut_short.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 100)
    return host.loras


@pytest.fixture
def runs_afterwards(client, graph):
    """After the test, the untouched example must still run to a picture."""
    yield
    run = client.run(changed(graph, "KSampler", seed=41))
    assert run.end == "execution_success", run.error
    assert len(client.pictures(run)) == 1


def failure(client, graph) -> str:
    """What the user is told about a graph that cannot run."""
    try:
        run = client.run(graph)
    except PromptRefused as refused:
        return str(refused)
    assert run.end == "execution_error", f"the graph ran to {run.end}"
    return run.error


@pytest.mark.usefixtures("runs_afterwards", "files")
class TestEachFailureSaysWhatToDo:
    @pytest.mark.parametrize("name", ["concept_lab/backgruond.safetensors", "background.safetensors", "other/background.safetensors"])
    def test_wrong_file_name_offers_the_near_match(self, client, graph, name):
        told = failure(client, changed(graph, SLIDER, file=name))
        assert name in told
        assert SHIPPED in told
        assert "broken" not in told, "a name that is not alike is offered"
        assert told.count(f"'{name}'") == 1, "the message is repeated"
        assert "strength" not in told, "the message is also given for an input that is right"

    @pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "C:\\secret.safetensors"])
    def test_path_outside_the_loras_folders_is_refused(self, client, graph, name):
        told = failure(client, changed(graph, SLIDER, file=name))
        assert "root:" not in told
        assert name in told

    def test_file_of_another_family_is_refused_by_name(self, client, graph):
        told = failure(client, changed(graph, SLIDER, file="other_family.safetensors"))
        assert "other_family.safetensors" in told
        assert "Flux" in told, "the message does not say what the file is for"

    @pytest.mark.parametrize("name", ["broken.safetensors", "cut_short.safetensors"])
    def test_broken_file_is_named(self, client, graph, name):
        told = failure(client, changed(graph, SLIDER, file=name))
        assert name in told
        assert "again" in told, "the message does not say to download or save the file again"

    @pytest.mark.parametrize(
        "strength, advice",
        [
            (float("nan"), "strength is nan, which is no number to work with. Set it to a finite number; 0 is neutral."),
            (float("inf"), "Value inf bigger than max of 10.0: strength"),
            (11.0, "Value 11.0 bigger than max of 10.0: strength"),
            ("strong", "Failed to convert an input value to a FLOAT value: strength, strong"),
        ],
    )
    def test_strength_that_is_no_usable_number(self, client, graph, strength, advice):
        assert advice in failure(client, changed(graph, SLIDER, strength=strength))

    @pytest.mark.parametrize(
        "window, advice",
        [
            ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent 0.8 lies after end_percent 0.2: no step is in the window. Swap"),
            ({"start_percent": float("nan")}, "start_percent is nan, which is no number to work with. Set it to a finite number"),
            ({"end_percent": float("nan")}, "end_percent is nan, which is no number to work with. Set it to a finite number"),
        ],
    )
    def test_window_that_holds_no_step(self, client, graph, window, advice):
        assert advice in failure(client, changed(graph, SLIDER, **window))

    def test_missing_input(self, client, graph):
        unconnected = changed(graph, SLIDER)
        del unconnected[find(graph, SLIDER)]["inputs"]["model"]
        assert "Required input is missing: model" in failure(client, unconnected)

    def test_unknown_lab_model(self, client, graph):
        told = failure(client, changed(graph, "ConceptNodes_LabLoader", model="unett"))
        assert "'unett'" in told
        assert "one of: unet" in told, "the message does not list the models there are"

    def test_interrupt_in_mid_run(self, client, graph):
        prompt_id = client.queue(changed(graph, "KSampler", steps=5000))
        client.follow(prompt_id, until=("progress",))
        client.interrupt()
        assert client.wait(prompt_id).end == "execution_interrupted"


def test_backslash_in_a_file_name_is_the_same_file(client, graph):
    slash, backslash = (client.run(changed(graph, SLIDER, file=name)) for name in (SHIPPED, SHIPPED.replace("/", "\\")))
    assert backslash.end == "execution_success", backslash.error
    assert np.array_equal(*(pixels(client.pictures(run)[0]) for run in (slash, backslash)))


def test_file_placed_while_the_host_runs_is_found(client, graph, host):
    own = changed(graph, SLIDER, file="own/bright.safetensors")
    assert "own/bright.safetensors" in failure(client, own)
    (host.loras / "own").mkdir()
    shutil.copy(ROOT / "lab" / "loras" / SHIPPED, host.loras / "own" / "bright.safetensors")
    assert client.run(own).end == "execution_success"
