"""The Slider node: its inputs, its reasons for doing nothing, its report, and its place among the host's checks."""

import asyncio
import inspect
import math

import cases
import comfy.sd
import models
import pytest
import safetensors.torch
import sampling
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux

from concept_nodes.host import adapters, files
from concept_nodes.host.adapters import AdapterError
from concept_nodes.host.dispatcher import attached
from concept_nodes.host.regions import Regions, RegionsError
from concept_nodes.host.window import Window
from concept_nodes.nodes.regions import MaskedLoRA, RegionLoRA, RegionsApply, RegionSlider
from concept_nodes.nodes.sliders import Slider
from concept_nodes.ops.lora import delta_weight
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region
from concept_nodes.ops.schedule import ScheduleError


@pytest.fixture(scope="module")
def plain():
    return models.build()


@pytest.fixture
def file(plain, tmp_path, monkeypatch):
    """A slider file that the host's folders hold as "people/age.safetensors"."""
    import folder_paths

    (tmp_path / "people").mkdir()
    safetensors.torch.save_file(models.lora(plain), tmp_path / "people" / "age.safetensors")
    extensions = folder_paths.folder_names_and_paths["loras"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return "people/age.safetensors"


class Source:
    """Another pack's node that hands out a model and a file's name."""

    RETURN_TYPES = ("MODEL", "COMBO")
    FUNCTION = "run"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}


class Sink:
    """An output node, without which the host refuses a graph."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"forceInput": True})}}


def run(model, file="none", strength=1.0, start=0.0, end=1.0, **options):
    return Slider.execute(model, file, strength, start, end, **options)


class TestInputs:
    def test_file_equals_the_stock_loader(self, plain, file):
        path = files.resolve("loras", file)
        stock = comfy.sd.load_lora_for_models(plain, None, safetensors.torch.load_file(path), -0.7, 0)[0]
        ours = run(plain, file, -0.7).result[0]
        torch.testing.assert_close(models.sample(ours), models.sample(stock), rtol=1e-4, atol=1e-3)

    def test_connected_lora_equals_the_file(self, plain, file):
        connected = run(plain, lora=models.lora(plain)).result[0]
        assert torch.equal(models.sample(run(plain, file).result[0]), models.sample(connected))

    def test_both_are_refused(self, plain, file):
        with pytest.raises(ValueError, match=r"people/age\.safetensors.*lora"):
            run(plain, file, lora=models.lora(plain))

    @pytest.mark.parametrize("lora", [[1], {"a": 1}, {}])
    def test_connected_thing_that_is_no_lora(self, plain, lora):
        with pytest.raises(AdapterError, match="connected lora"):
            run(plain, lora=lora)

    def test_input_model_is_not_touched(self, plain, file):
        run(plain, file)
        assert plain.attachments == {}
        assert plain.callbacks == {}

    def test_fingerprint_follows_the_file(self, file):
        first = Slider.fingerprint_inputs(file=file, strength=1.0)
        path = files.resolve("loras", file)
        path.write_bytes(path.read_bytes() + b" ")
        assert Slider.fingerprint_inputs(file=file, strength=1.0) != first
        assert Slider.fingerprint_inputs(file="none", strength=1.0) == Slider.fingerprint_inputs(strength=2.0)


class TestValidation:
    def test_files_are_checked_before_the_run(self, file):
        assert Slider.validate_inputs(file=file) is True
        assert Slider.validate_inputs(file=file.replace("/", "\\")) is True
        assert Slider.validate_inputs(file="none") is True
        assert Slider.validate_inputs() is True
        assert "people/age.safetensors" in Slider.validate_inputs(file="people/aeg.safetensors")

    def test_a_linked_file_is_left_to_the_run(self, monkeypatch):
        """The host validates before anything has run, and gives None for what is linked."""
        import execution

        import nodes

        for name, node in {"Source": Source, "Sink": Sink, "ConceptNodes_Slider": Slider}.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
        settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        prompt = {
            "1": {"class_type": "Source", "inputs": {}},
            "2": {"class_type": "ConceptNodes_Slider", "inputs": {"model": ["1", 0], "file": ["1", 1]} | settings},
            "3": {"class_type": "Sink", "inputs": {"text": ["2", 1]}},
        }
        valid, error, _, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
        assert (valid, error, node_errors) == (True, None, {})

    def test_ranges_are_left_to_the_host(self):
        """Naming an input in validate_inputs would switch its own range check off."""
        assert inspect.getfullargspec(Slider.validate_inputs).args == ["cls", "file"]
        ranges = {item.id: (item.min, item.max) for item in Slider.define_schema().inputs if hasattr(item, "min")}
        assert ranges == {"strength": (-10.0, 10.0), "start_percent": (0.0, 1.0), "end_percent": (0.0, 1.0)}

    @pytest.mark.parametrize(
        "settings, told",
        [
            ({"strength": float("nan")}, "strength is nan"),
            ({"strength": float("-inf")}, "strength is -inf"),
            ({"start": float("nan")}, "start_percent is nan"),
            ({"end": 2.0}, "end_percent is 2"),
            ({"start": 0.8, "end": 0.2}, "start_percent 0.8 lies after end_percent 0.2"),
        ],
    )
    def test_numbers_are_checked_when_run(self, plain, file, settings, told):
        """The host lets NaN and linked values pass."""
        with pytest.raises(ValueError, match=told):
            run(plain, file, **settings)

    def test_file_that_went_away_after_the_check(self, plain, file):
        files.resolve("loras", file).unlink()
        with pytest.raises(files.MissingFile, match="age"):
            run(plain, file)


class TestWhatElseItTakes:
    def test_layers_of_a_choice_alone(self, plain, file):
        """Two choices that make up the whole act together as the whole does."""
        whole = run(plain, file).result[0]
        part, report = run(plain, file, layers="cross-attention").result
        assert "left out by the choice 'cross-attention'" in report
        both = run(part, file, layers="all but cross-attention").result[0]
        torch.testing.assert_close(models.sample(both), models.sample(whole), rtol=1e-4, atol=1e-3)
        assert not torch.equal(models.sample(part), models.sample(whole))
        assert not torch.equal(models.sample(part), models.sample(plain))

    def test_middle_block(self, plain, file):
        model, report = run(plain, file, layers="middle block").result
        assert all("middle_block" in name for effect in attached(model) for name in effect.parts)
        assert "residual" in report

    def test_layers_that_the_file_is_not_on(self, plain, file):
        with pytest.raises(AdapterError, match=r"nothing for the layers 'double blocks': it is on .*residual"):
            run(plain, file, layers="double blocks")

    def test_mask_is_that_of_the_masked_lora(self, plain, file):
        mask = cases.LEFT
        ours = models.sample(run(plain, file, 0.7, mask=mask).result[0])
        masked = models.sample(MaskedLoRA.execute(plain, file, 0.7, 0.0, 1.0, mask).result[0])
        assert torch.equal(ours, masked)
        assert not torch.equal(ours, models.sample(run(plain, file, 0.7).result[0]))

    def test_empty_mask_does_nothing(self, plain, file):
        model, report = run(plain, file, mask=torch.zeros(1, 8, 8)).result
        assert model is plain
        assert "the mask is empty" in report

    def test_comparable_strengths_do_not_hang_on_the_files_own_size(self, plain):
        """Two files of one direction, the second three times as large, give one picture."""
        small = models.lora(plain)
        large = {key: 3 * tensor if "up" in key or "lora_B" in key else tensor for key, tensor in small.items()}
        pictures = [models.sample(run(plain, lora=lora, comparable=True).result[0]) for lora in (small, large)]
        torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-3)
        effects = [attached(run(plain, lora=lora, comparable=True).result[0])[0] for lora in (small, large)]
        assert effects[0].strength == pytest.approx(3 * effects[1].strength)

    def test_response_is_what_unit_inputs_make(self, plain):
        """The root of the mean square of all outputs, by the weights' differences themselves."""
        placement = adapters.place(plain, models.lora(plain), "test")
        weights = [delta_weight(one) for part in placement.parts.values() for one in part.factors]
        squares = sum(float(weight.double().square().sum()) for weight in weights)
        assert placement.response() == pytest.approx((squares / sum(len(weight) for weight in weights)) ** 0.5, rel=1e-5)

    def test_comparable_factor_is_told(self, plain, file):
        assert "in comparable units (" in run(plain, file, comparable=True).result[1]

    def test_schedule_is_told_and_multiplies(self, plain, file):
        model, report = run(plain, file, 2.0, schedule="0:.5").result
        assert "times 0:0.5 over sampling" in report
        assert torch.equal(models.sample(model), models.sample(run(plain, file, 1.0).result[0]))

    def test_schedule_that_is_nought_does_nothing(self, plain, file):
        model, report = run(plain, file, schedule="0:0, 1:0").result
        assert model is plain
        assert "the schedule 0:0, 1:0 is 0 throughout" in report

    def test_schedule_that_cannot_be_read(self, plain, file):
        with pytest.raises(ScheduleError, match="Write share:factor"):
            run(plain, file, schedule="fast")

    def test_fifty_in_a_row(self, plain):
        """As many as are wanted, in one pass, each within float error of one of fifty times the strength."""
        model = plain
        for _ in range(50):
            model = run(model, lora=models.lora(plain), strength=0.02).result[0]
        together = run(plain, lora=models.lora(plain), strength=1.0).result[0]
        torch.testing.assert_close(models.sample(model), models.sample(together), rtol=1e-3, atol=5e-3)
        assert sampling.count_calls(model) == sampling.count_calls(plain)


class TestRegionSlider:
    def listed(self):
        return Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),)))

    def test_acts_as_the_regions_lora_does(self, plain, file):
        slid = RegionSlider.execute(self.listed(), "left", file, 0.7, 0.0, 1.0).result[0]
        lora = RegionLoRA.execute(self.listed(), "left", file, 0.7, 0.0, 0.0, 1.0).result[0]
        pictures = [models.sample(RegionsApply.execute(plain, [], [], regions).result[0]) for regions in (slid, lora)]
        assert torch.equal(*pictures)
        assert not torch.equal(pictures[0], models.sample(plain))

    def test_schedule_layers_and_units_are_told(self, plain, file):
        regions = RegionSlider.execute(
            self.listed(), "left", file, 0.7, 0.0, 1.0, schedule="0:0, 1:1", layers="self-attention", comparable=True
        ).result[0]
        report = RegionsApply.execute(plain, [], [], regions).result[3]
        for part in ("in comparable units", "times 0:0, 1:1 over sampling", "left out by the choice 'self-attention'"):
            assert part in report

    def test_a_schedule_of_noughts_does_nothing(self, plain, file):
        regions = RegionSlider.execute(self.listed(), "left", file, 0.7, 0.0, 1.0, schedule="0:0").result[0]
        model, _, _, report = RegionsApply.execute(plain, [], [], regions).result
        assert model is plain
        assert "its strength or schedule is 0" in report

    def test_no_file_hangs_nothing(self):
        listed = self.listed()
        assert RegionSlider.execute(listed, "left", "none", 1.0, 0.0, 1.0).result[0] == listed

    def test_region_that_is_not_there(self, file):
        with pytest.raises(RegionsError, match="no region named 'right'. Regions: 'left'"):
            RegionSlider.execute(self.listed(), "right", file, 1.0, 0.0, 1.0)


class TestReport:
    @pytest.mark.parametrize(
        "settings, reason",
        [
            ({"strength": 0.0}, "strength is 0"),
            ({"start": 0.5, "end": 0.5}, "no step lies between"),
        ],
    )
    def test_reasons_for_doing_nothing(self, plain, file, settings, reason):
        model, report = run(plain, file, **settings).result
        assert model is plain
        assert reason in report

    def test_no_file(self, plain):
        model, report = run(plain).result
        assert model is plain
        assert "no file is chosen" in report

    def test_what_was_placed(self, plain, file):
        report = run(plain, file, 1.5).result[1]
        for part in (file, "strength 1.5", "119 layers", "Stable Diffusion 1.5", "self-attention", "rank 2", "all steps", "0.2 is usual"):
            assert part in report

    def test_window_in_shares_of_sampling(self, plain, file):
        assert "0.2 to 0.8 of sampling" in run(plain, file, start=0.2, end=0.8).result[1]
        assert "in all steps" in run(plain, file).result[1]

    def test_report_is_shown_on_the_node(self, plain, file):
        output = run(plain, file)
        assert output.ui.as_dict() == {"text": (output.result[1],)}


@pytest.mark.parametrize("percent", [0.1, 0.5, 0.9])
class TestBordersOfTheWindow:
    """They are the noise levels at those shares of the schedule, by formulas of our own."""

    def test_discrete(self, plain, percent):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = (1 - betas).cumprod(0)
        levels = ((1 - kept) / kept).sqrt().log()
        step = 999 * (1 - percent)
        expected = torch.lerp(levels[int(step)], levels[int(step) + 1], step % 1).exp()
        assert Window.of(plain.get_model_object("model_sampling"), percent, 1.0).start == pytest.approx(float(expected), rel=1e-5)

    def test_flow_with_a_shift(self, percent):
        shifted = ModelSamplingFlux().patch(models.build("flux"), 3.0, 3.0, 1024, 1024)[0]
        expected = math.exp(3) / (math.exp(3) + percent / (1 - percent))
        assert Window.of(shifted.get_model_object("model_sampling"), 0.0, percent).end == pytest.approx(expected)


def test_strength_sweeps_both_ways(plain, file):
    base = models.sample(plain)
    forward, back = (models.sample(run(plain, file, strength).result[0]) - base for strength in (0.02, -0.02))
    cosine = torch.nn.functional.cosine_similarity(forward.flatten(), back.flatten(), dim=0)
    assert cosine < -0.95
