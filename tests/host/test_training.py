"""Training in the graph: gradients, resuming, going back, and that nothing of it stays on the model."""

from pathlib import Path

import comfy.model_management
import comfy.sd
import models
import pytest
import torch

from concept_nodes.host import lab
from concept_nodes.host.slider_training import Entry, Text, TextObjective, Ways
from concept_nodes.host.training import Loop, Trainee, TrainingError, identity_of, published_names
from concept_nodes.nodes import slider_training as node
from concept_nodes.nodes.sliders import Slider

CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def text(model, seed):
    context, options = models.conditioning(model, seed)[0]
    return Text(context, options.get("pooled_output"))


def begun(trainee, model, *, entries=2, batch=2, eta=1.0, strengths=(1.0,), steps=6, rate=1e-3, file=None):
    """A short training on random prompts."""
    made = [Entry(*(text(model, 10 * entry + part) for part in (1, 1, 2, 3))) for entry in range(entries)]
    ways = Ways(trainee, entries, batch, (8, 8), 5)
    objective = TextObjective(trainee, made, text(model, 99), ways, eta=eta, strengths=strengths)
    return objective, Loop(trainee.parameters(), steps=steps, rate=rate, identity="test", file=file)


def run(objective, loop, stop=None):
    def each(step):
        objective.done(step)
        if step == stop:
            raise comfy.model_management.InterruptProcessingException()

    return loop.run(objective.losses, carried=objective.ways.state, carry=objective.ways.restore, each=each)


def trainee(model, **options):
    from concept_nodes.host.families import family_of

    return Trainee(model, family_of(model.model).slider_layers, rank=2, alpha=1.0, seed=1, **options)


@pytest.mark.parametrize("kind", list(models.KINDS))
class TestOnEveryFamily:
    def test_gradients_are_those_of_the_loss(self, kind):
        """Against differences of the loss itself, along a direction through all adapters."""
        model = models.build(kind)
        with trainee(model) as learner:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            objective, _ = begun(learner, model)
            (loss,) = objective.losses(0)
            loss().backward()
            way = [torch.randn(parameter.shape, generator=generator) for parameter in learner.parameters()]
            slope = sum(float((parameter.grad * step).sum()) for parameter, step in zip(learner.parameters(), way, strict=True))

            def at(length):
                with torch.no_grad():
                    for parameter, step in zip(learner.parameters(), way, strict=True):
                        parameter.add_(length * step)
                    value = float(objective.losses(0)[0]())
                    for parameter, step in zip(learner.parameters(), way, strict=True):
                        parameter.sub_(length * step)
                return value

            small = 1e-3
            assert slope == pytest.approx((at(small) - at(-small)) / (2 * small), rel=2e-2)

    def test_nothing_stays_on_the_model(self, kind):
        model = models.build(kind)
        before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
        picture, switch = models.sample(model), comfy.model_management.in_training
        with trainee(model) as learner:
            run(*begun(learner, model, steps=2))
        assert all("forward" not in vars(module) for module in model.model.modules())
        assert not any(module._forward_pre_hooks for module in model.model.modules())
        assert all(torch.equal(before[name], parameter) for name, parameter in model.model.named_parameters())
        assert comfy.model_management.in_training == switch
        assert torch.equal(models.sample(model), picture)

    def test_the_file_is_what_was_trained(self, kind):
        """The Slider and the stock loader read the state, and do to the picture what the adapters did to the prediction."""
        model = models.build(kind)
        with trainee(model) as learner:
            objective, loop = begun(learner, model, steps=3, rate=0.05)
            run(objective, loop)
            with torch.no_grad():
                x, sigma = objective.ways.x[:1], objective.ways.sigma[:1]
                own = learner.predict(x, sigma, learner.condition(*text(model, 10), x), 0.7)
            state = learner.state(published_names(learner.model))
        ours, report = Slider.execute(model, "none", 0.7, 0.0, 1.0, lora=state).result
        assert "Not applied" not in report
        stock = comfy.sd.load_lora_for_models(model, None, state, 0.7, 0)[0]
        torch.testing.assert_close(models.sample(ours), models.sample(stock), **CLOSE)
        with torch.inference_mode(), trainee(stock) as merged:
            merged.adapters.clear()
            again = merged.predict(x.clone(), sigma, merged.condition(*text(model, 10), x), 0.0)
        torch.testing.assert_close(own, again, **CLOSE)


class TestLoop:
    @pytest.fixture(scope="class")
    def model(self):
        return models.build()

    def test_resumed_is_as_if_never_stopped(self, model, tmp_path):
        file, states = tmp_path / "a" / "state.pt", []
        with trainee(model) as learner:
            whole = run(*begun(learner, model))
            states.append(learner.state(published_names(learner.model)))
        with trainee(model) as learner, pytest.raises(comfy.model_management.InterruptProcessingException):
            run(*begun(learner, model, file=file), stop=2)
        assert file.exists()
        with trainee(model) as learner:
            resumed = run(*begun(learner, model, file=file))
            states.append(learner.state(published_names(learner.model)))
        assert resumed.told == ["Resumed at step 3."]
        assert resumed.losses == whole.losses
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not file.exists()

    def test_what_is_no_checkpoint_of_this_training_is_not_resumed(self, model, tmp_path):
        file = tmp_path / "state"
        file.write_bytes(b"nothing to read")
        with trainee(model) as learner:
            objective, loop = begun(learner, model, file=file)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                run(objective, loop, stop=1)
            assert loop.resumed == 0
        with trainee(model) as learner:
            objective, loop = begun(learner, model, steps=1, file=file)
            loop.identity = "another"
            assert run(objective, loop).told == []

    def test_identity_is_of_settings_texts_and_patches(self, model):
        settings, texts = {"eta": 1.0}, [torch.ones(1, 2, 3)]
        patched = comfy.sd.load_lora_for_models(model, None, models.lora(model), 0.5, 0)[0]
        other = comfy.sd.load_lora_for_models(model, None, models.lora(model, seed=6), 0.5, 0)[0]
        given = [
            (model, settings, texts),
            (model, {"eta": 2.0}, texts),
            (model, settings, [torch.zeros(1, 2, 3)]),
            (patched, settings, texts),
            (other, settings, texts),
        ]
        assert len({identity_of(*one) for one in given}) == len(given)
        assert identity_of(model.clone(), settings, texts) == identity_of(model, settings, texts)

    def test_a_blow_up_goes_back_to_before_it(self, model):
        with trainee(model) as learner:
            objective, loop = begun(learner, model, steps=200)
            ordinary, kept = objective.losses, {}

            def growing(step):
                kept[step] = learner.state(published_names(learner.model))
                return [lambda: ordinary(step)[0]() * (1e6 if step >= 45 else 1.0)]

            objective.losses = growing
            outcome = run(objective, loop)
            assert len(outcome.losses) < 100
            assert "state after step 25" in outcome.told[0]
            now = learner.state(published_names(learner.model))
            assert all(torch.equal(now[key], kept[25][key]) for key in now)

    def test_a_gradient_that_is_no_number_goes_back(self, model):
        with trainee(model) as learner:
            objective, loop = begun(learner, model, steps=30)
            loop.parameters[1].register_hook(lambda gradient: gradient * (float("inf") if len(loop.losses) == 27 else 1.0))
            outcome = run(objective, loop)
            assert "state after step 25" in outcome.told[0]
            assert all(parameter.isfinite().all() for parameter in learner.parameters())

    @pytest.mark.parametrize("strength", [1.0, -1.0])
    def test_objective_is_the_published_formula(self, model, strength):
        """e_s(target) against e_0(neutral) + s eta (e_0(more) - e_0(less)), each by a prediction of its own."""
        with trainee(model) as learner:
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            entry = Entry(*(text(model, seed) for seed in (1, 2, 3, 4)))
            ways = Ways(learner, 1, 2, (8, 8), 5)
            objective = TextObjective(learner, [entry], text(model, 99), ways, eta=1.7, strengths=(strength,))
            loss = float(objective.losses(0)[0]().detach())
            with torch.no_grad():

                def predicted(part, s=0.0):
                    condition = learner.condition(part.context.expand(2, -1, -1), None, ways.x)
                    return learner.predict(ways.x, ways.sigma, condition, s)

                wanted = predicted(entry.neutral) + strength * 1.7 * (predicted(entry.more) - predicted(entry.less))
                assert loss == pytest.approx(float((predicted(entry.target, strength) - wanted).square().mean()), rel=1e-4)

    def test_divergence_goes_back(self, model):
        with trainee(model) as learner:
            objective, loop = begun(learner, model, steps=200, rate=1e-3)
            ordinary = objective.losses

            def failing(step):
                return [lambda: ordinary(step)[0]() * (float("nan") if step == 30 else 1.0)]

            objective.losses = failing
            outcome = run(objective, loop)
            assert len(outcome.losses) == 31
            assert "state after step 25" in outcome.told[0]
            assert "lower learning rate" in outcome.told[0]
            assert all(parameter.isfinite().all() for parameter in learner.parameters())

    def test_same_seed_same_file(self, model):
        states = []
        for _ in range(2):
            with trainee(model) as learner:
                run(*begun(learner, model, steps=2))
                states.append(learner.state(published_names(learner.model)))
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def test_equal_poles_train_nothing(self, model):
        """At the start the slider is nothing, and with nothing between the poles it stays so."""
        with trainee(model) as learner:
            entry = Entry(*[text(model, 1)] * 4)
            ways = Ways(learner, 1, 2, (8, 8), 5)
            objective = TextObjective(learner, [entry], text(model, 99), ways, eta=3.0)
            assert float(objective.losses(0)[0]().detach()) == pytest.approx(0, abs=1e-10)

    def test_no_layer_to_train(self, model):
        with pytest.raises(TrainingError, match="None of this model's layers"), Trainee(model, "nowhere", rank=2, alpha=1.0, seed=1):
            pass


class TestPrompts:
    BASE = {"target": "{} on grey", "more": "{} on white", "less": "{} on black", "preserve": "a star\na circle", "objective": "published"}

    def test_lines_fill_the_hole(self):
        assert node.prompts(self.BASE) == [
            ("a star on grey", "a star on grey", "a star on white", "a star on black"),
            ("a circle on grey", "a circle on grey", "a circle on white", "a circle on black"),
        ]

    def test_lines_stand_before_prompts_without_a_hole(self):
        assert node.prompts({**self.BASE, "target": "person", "preserve": "male\nfemale"})[1][0] == "female person"

    def test_erase_and_ablate(self):
        single = {**self.BASE, "preserve": ""}
        assert node.prompts({**single, "target": "a cat", "objective": "erase", "more": "", "less": ""}) == [("a cat", "", "a cat", "")]
        row = node.prompts({**single, "target": "a cat", "more": "an animal", "objective": "ablate"})[0]
        assert row[:2] == ("a cat", "an animal")

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"target": " "}, "target is empty"),
            ({"more": "", "preserve": ""}, "more is empty"),
            ({"less": "{} on white"}, "more and less are the same"),
            ({"objective": "ablate", "more": "{} on grey"}, "more is the target"),
        ],
    )
    def test_what_cannot_be_trained_is_told(self, change, told):
        with pytest.raises(TrainingError, match=told):
            node.prompts({**self.BASE, **change} if "target" not in change else {**self.BASE, **change, "preserve": ""})

    def test_which_way_eta_goes(self):
        assert [node.signed(kind, 2.0) for kind in ("published", "both poles", "erase", "ablate")] == [2.0, 2.0, -2.0, 0.0]
        assert node.signed("ablate", 0.0) == 0.0
        with pytest.raises(TrainingError, match="eta is 0"):
            node.signed("published", 0.0)

    @pytest.mark.parametrize("name", ["", " ", "a/b", "..", "c:d"])
    def test_names_of_files(self, name):
        with pytest.raises(TrainingError, match="cannot be a file's name"):
            node.checked_stem(name)


class TestNode:
    @pytest.fixture
    def places(self, tmp_path, monkeypatch):
        import folder_paths

        monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
        monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
        return tmp_path

    def execute(self, **changes):
        with torch.inference_mode():
            model, clip = lab.load_model("unet"), lab.load_clip()
        given = dict(
            target="{} on a grey background", more="{} on a white background", less="{} on a black background",
            preserve="a large yellow star\na small blue circle", objective="published", eta=1.0, steps=3, batch=2, learning_rate=1e-3,
            rank=4, alpha=1.0, width=64, height=64, seed=3, name="light",
        )  # fmt: skip
        with torch.inference_mode():
            return model, node.SliderTrainText.execute(model, clip, **{**given, **changes})

    def test_trains_saves_and_tells(self, places):
        model, output = self.execute()
        lora, losses, file, report = output.result
        assert len(losses["loss"]) == 3
        assert file == str(places / "output" / "loras" / "concept_nodes" / "light.safetensors")
        for part in ("3 steps of 2 on 84 layers of Stable Diffusion 1.5", "2 prompts", "Saved as", "MB for weights"):
            assert part in report
        slid = Slider.execute(model, "none", 1.0, 0.0, 1.0, lora=lora).result[0]
        assert slid is not model

    def test_a_file_of_the_same_name_is_kept(self, places):
        first = self.execute()[1].result[2]
        before = Path(first).read_bytes()
        self.execute(seed=4)
        kept = places / "output" / "loras" / "concept_nodes" / "light_00001.safetensors"
        assert kept.read_bytes() == before
        assert Path(first).read_bytes() != before

    def test_a_place_that_cannot_be_written_loses_nothing(self, places):
        (places / "output").write_text("a file where the folder should be")
        lora, _, _, report = self.execute()[1].result
        assert len(lora) == 3 * 84
        assert "NOT saved as" in report
        assert "save it from the lora output" in report

    def test_a_full_disk_leaves_the_old_file(self, places):
        resource = pytest.importorskip("resource")
        file = Path(self.execute()[1].result[2])
        before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what is longer cannot be written
        try:
            report = self.execute(seed=4)[1].result[3]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "NOT saved as" in report
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        assert file.read_bytes() == before

    @pytest.mark.parametrize("objective", ["both poles", "erase", "ablate"])
    def test_objectives(self, places, objective):
        """The largest seed among them."""
        assert len(self.execute(objective=objective, seed=2**63 - 1)[1].result[1]["loss"]) == 3
