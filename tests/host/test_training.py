"""Training in the graph: gradients, resuming, going back, and that nothing of it stays on the model."""

import contextlib
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import models
import pytest
import safetensors.torch
import torch

from concept_nodes.host import lab
from concept_nodes.host.slider_training import Entry, ImageObjective, Preview, RangeObjective, Text, TextObjective, Ways, decoder
from concept_nodes.host.training import Loop, Memory, Trainee, TrainingError, _Counted, identity_of, published_names
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
        if step == stop:
            raise comfy.model_management.InterruptProcessingException()

    return loop.run(objective, each)


def free(size):
    """Stands in for the host's measure of free memory."""
    return lambda device=None, torch_free_too=False: (size, size) if torch_free_too else size


def trainee(model, **options):
    return Trainee(model, rank=2, alpha=1.0, seed=1, **options)


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

    @pytest.mark.parametrize(("rank", "strengths"), [(2, (1.0,)), (64, (1.0, -1.0))])
    def test_memory_is_what_a_step_takes(self, kind, rank, strengths):
        """The step on shapes alone, against the same step with numbers, counted the same way. Large adapters show whether their gradients
        are counted.
        """
        model = models.build(kind)
        with Trainee(model, rank=rank, alpha=1.0, seed=1) as learner:
            objective, _ = begun(learner, model, strengths=strengths)
            given = [*learner.model.parameters(), *learner.parameters()]
            for learner.thrifty in (False, True):
                with _Counted(given) as counted:
                    for loss in objective.losses(0):
                        loss().backward()
                for parameter in learner.parameters():
                    parameter.grad = None
                assert objective.memory().step == pytest.approx(counted.peak, rel=0.1)
            assert all(parameter.grad is None for parameter in learner.parameters())

    def test_thrifty_gradients_are_the_same(self, kind):
        model, found = models.build(kind), []
        with trainee(model) as learner:
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            objective, _ = begun(learner, model, strengths=(1.0, -1.0))
            for learner.thrifty in (False, True):
                for loss in objective.losses(0):
                    loss().backward()
                found.append([parameter.grad for parameter in learner.parameters()])
                for parameter in learner.parameters():
                    parameter.grad = None
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)

    def test_image_objective_is_the_published_formula(self, kind):
        """Each pole's own noise prediction, at opposite strengths, with the same noise and level."""
        model = models.build(kind)
        with trainee(model) as learner:
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            channels, prompt, drawn = learner.model.latent_format.latent_channels, text(model, 1), []
            pairs = [(torch.randn(channels, 8, 8), torch.randn(channels, 8, 8))]
            objective = ImageObjective(learner, pairs, prompt, batch=2, seed=3, eta=None)
            plain = learner.predict
            learner.predict = lambda *given: drawn.append(given) or plain(*given)
            losses = [float(loss().detach()) for loss in objective.losses(5)]
            assert [given[3] for given in drawn] == [1.0, -1.0]
            assert torch.equal(drawn[0][1], drawn[1][1])
            noises = []
            for (x, sigma, given, strength), side, loss in zip(drawn, (1, 0), losses, strict=True):
                wide = sigma[:, None, None, None]
                clean = learner.model.process_latent_in(pairs[0][side]).expand(2, -1, -1, -1)
                flow = kind == "flux"
                noise = (x - (1 - wide) * clean) / wide if flow else (x - clean) / wide
                noises.append(noise)
                with torch.no_grad():
                    wanted = noise - clean if flow else noise
                    assert loss == pytest.approx(float((plain(x, sigma, given, strength) - wanted).square().mean()), rel=1e-3)
            torch.testing.assert_close(*noises, rtol=1e-3, atol=1e-3)

    def test_difference_objective_is_its_formula(self, kind):
        """Each pole from the other's noisy picture: the plain prediction, moved by a part of the way."""
        model = models.build(kind)
        with trainee(model) as learner:
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            channels, drawn = learner.model.latent_format.latent_channels, []
            pairs = [(torch.randn(channels, 8, 8), torch.randn(channels, 8, 8))]
            objective = ImageObjective(learner, pairs, text(model, 1), batch=2, seed=3, eta=0.7)
            plain = learner.predict
            learner.predict = lambda *given: drawn.append(given) or plain(*given)
            losses = [float(loss().detach()) for loss in objective.losses(5)]
            assert [given[3] for given in drawn] == [0.0, 1.0, 0.0, -1.0]
            before, after = (learner.model.process_latent_in(side) for side in pairs[0])
            for (x, sigma, given, strength), way, loss in zip(drawn[1::2], (before - after, after - before), losses, strict=True):
                wide = sigma[:, None, None, None]
                with torch.no_grad():
                    wrong = plain(x, sigma, given, strength) - plain(x, sigma, given, 0.0) - 0.7 * way / wide
                    expected = float((wrong * wide / (1 + wide**2).sqrt()).square().mean())
                assert loss == pytest.approx(expected, rel=1e-3)

    def test_previews_are_the_slider_at_three_strengths(self, kind):
        """They come from the slider as it is, and take nothing from the training's random numbers."""
        model = models.build(kind)
        with trainee(model) as learner:
            seen, size = [], (8, 8)

            def decode(latent):
                seen.append(latent)
                return latent[:, :3].movedim(1, -1).sigmoid()

            preview = Preview(learner, text(model, 1), text(model, 2), size, decode, 7)
            state = torch.get_rng_state()
            preview.page("as it begins")
            assert torch.equal(seen[0], seen[1])
            assert torch.equal(seen[1], seen[2])
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.1)
            page = preview.page("moved")
            assert torch.equal(torch.get_rng_state(), state)
            assert torch.equal(seen[4], seen[1])
            assert not torch.equal(seen[3], seen[4])
            assert not torch.equal(seen[4], seen[5])
            assert page.shape[2] > 3 * 192
            assert all(parameter.grad is None for parameter in learner.parameters())


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

    def test_range_trains_every_way_at_its_own_strength(self, model):
        """Its formula, way by way; signs take turns, and a way keeps its strength until it begins anew."""
        with trainee(model) as learner:
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            entry, empty = Entry(*(text(model, seed) for seed in (1, 2, 3, 4))), text(model, 99)
            ways = Ways(learner, 1, 4, (8, 8), 5)
            objective = RangeObjective(learner, [entry], empty, ways, eta=0.7)
            strengths = objective.strength.tolist()
            assert [s > 0 for s in strengths] == [True, False, True, False]
            assert all(0 < abs(s) < 2 for s in strengths)
            loss, wanted = float(objective.losses(0)[0]().detach()), 0.0
            with torch.no_grad():
                for way, s in enumerate(strengths):

                    def predicted(part, s=0.0, way=way):
                        condition = learner.condition(part.context, None, ways.x[way : way + 1])
                        return learner.predict(ways.x[way : way + 1], ways.sigma[way : way + 1], condition, s)

                    def guided(part, s=0.0, predicted=predicted):
                        return predicted(empty, s) + 3 * (predicted(part, s) - predicted(empty, s))

                    neutral, pole = guided(entry.neutral), guided(entry.more if s > 0 else entry.less)
                    goal = neutral + abs(s) * 0.7 * (pole - neutral)
                    wanted += float((guided(entry.target, s) - goal).square().mean() / 4)
            assert loss == pytest.approx(wanted, rel=1e-3)
            for step in range(20):
                before, at = objective.strength.clone(), ways.at.clone()
                objective.losses(step)[0]()
                objective.done(step)
                new = ways.at <= at
                assert torch.equal(objective.strength[~new], before[~new])
                assert (objective.strength[new].sign() == -before[new].sign()).all()

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

    @pytest.mark.parametrize(
        ("available", "thrifty", "told"),
        [
            (10**9, False, "for a step."),
            (10**8, True, "because only 100 MB are free."),
            (10**7, True, "make the batch or the pictures smaller."),
        ],
    )
    def test_too_little_memory_computes_blocks_twice(self, model, monkeypatch, available, thrifty, told):
        with trainee(model) as learner:
            monkeypatch.setattr(comfy.model_management, "get_free_memory", free(available))
            report = learner.fit(lambda: Memory(10**6, 10**6, 5 * 10**7 if learner.thrifty else 5 * 10**8))
            assert learner.thrifty == thrifty
            assert report.endswith(told)

    def test_memory_so_short_that_it_cannot_be_worked_out(self, model, monkeypatch):
        """The host then attends piece by piece, which shapes alone do not tell."""
        with trainee(model) as learner:
            objective, _ = begun(learner, model)
            monkeypatch.setattr(comfy.model_management, "get_free_memory", free(1))
            assert "as much as is free for a step" in learner.fit(objective.memory)

    def test_memory_that_runs_out_in_the_first_step_leaves_nothing_to_resume(self, model, tmp_path, monkeypatch):
        """What is not whole is not kept, and what is not whole is not read."""
        file = tmp_path / "state"
        with trainee(model) as learner:
            objective, loop = begun(learner, model, file=file)

            def full(*_):
                raise MemoryError

            monkeypatch.setattr(loop.optimizer, "step", full)
            with pytest.raises(MemoryError):
                run(objective, loop)
            assert loop.losses == []
            assert not file.exists()
        safetensors.torch.save_file({"parameter.0": torch.ones(1)}, file, metadata={"identity": "test", "losses": "[1.0]"})
        with trainee(model) as learner:
            assert run(*begun(learner, model, steps=1, file=file)).told == []

    def test_forwards_of_others_come_back(self, model):
        layer = next(module for name, module in model.model.named_modules() if name.endswith("attn1.to_q"))
        theirs = lambda x: x  # noqa: E731
        layer.forward = theirs
        try:
            with trainee(model):
                assert layer.forward is not theirs
            assert layer.forward is theirs
        finally:
            del layer.forward

    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_rough_previews_keep_within_the_latents_colours(self, kind):
        """Latents of the model's own scale fill the range of colours, and do not run over it."""
        model = models.build(kind)
        with trainee(model) as learner:
            decode = decoder(learner, None)
            channels = learner.model.latent_format.latent_channels
            picture = decode(torch.randn(1, channels, 8, 10, generator=torch.Generator().manual_seed(0)))
        assert picture.shape == (1, 8, 10, 3)
        assert float(((picture == 0) | (picture == 1)).float().mean()) < 0.3
        assert float(picture.std()) > 0.05

    def test_no_layer_to_train(self, model):
        with pytest.raises(TrainingError, match="None of this model's layers"), Trainee(model, "nowhere", rank=2, alpha=1.0, seed=1):
            pass


@pytest.mark.parametrize("config", ["Anima", "CosmosT2IPredict2", "CosmosI2VPredict2"])
def test_models_without_gradients_are_refused_by_reason(config):
    import comfy.supported_models

    model = models.build()
    model.model.model_config = getattr(comfy.supported_models, config)({})
    with pytest.raises(TrainingError, match=f"{config}.*has no gradient"):
        Trainee(model, rank=2, alpha=1.0, seed=1)


@pytest.fixture
def stopped():
    """A context in which a training is cancelled after so many steps, as the host's own hook for progress sees them."""

    @contextlib.contextmanager
    def at(steps):
        def hook(value, total, preview, **_):
            if value >= steps:
                raise comfy.model_management.InterruptProcessingException()

        before = comfy.utils.PROGRESS_BAR_HOOK
        comfy.utils.set_progress_bar_global_hook(hook)
        try:
            yield
        finally:
            comfy.utils.set_progress_bar_global_hook(before)

    return at


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
        for part in ("3 steps of 2 on 98 layers of Stable Diffusion 1.5", "2 prompts", "Saved as", "MB for the weights"):
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
        assert len(lora) == 3 * 98
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

    def test_previews_change_nothing(self, places):
        """With an autoencoder, without one, and none at all: the same slider."""
        with torch.inference_mode():
            vae = lab.load_vae("vae")
        first, *others = (self.execute(previews=times, vae=given)[1].result[0] for times, given in ((0, None), (3, None), (2, vae)))
        assert all(torch.equal(first[key], other[key]) for other in others for key in first)

    def test_an_autoencoder_of_another_kind_is_refused_before_it_begins(self, places):
        with torch.inference_mode():
            vae = lab.load_vae("vae")
        vae.latent_channels = 16
        with pytest.raises(TrainingError, match="The vae's latents have 16 channels and the model's 4"):
            self.execute(vae=vae)

    @pytest.mark.parametrize("objective", ["both poles", "range", "erase", "ablate"])
    def test_objectives(self, places, objective):
        """The largest seed among them."""
        assert len(self.execute(objective=objective, seed=2**63 - 1)[1].result[1]["loss"]) == 3


class TestImageNode(TestNode):
    """The same laws, from pairs of pictures."""

    test_objectives = None
    PICTURES = (
        torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1)),
        torch.rand(1, 67, 96, 3, generator=torch.Generator().manual_seed(2)),
    )

    def execute(self, **changes):
        with torch.inference_mode():
            model, clip, vae = lab.load_model("unet"), lab.load_clip(), lab.load_vae("vae")
        given = dict(
            before=list(self.PICTURES), after=[picture.flip(0, 1) for picture in self.PICTURES],
            prompt="", objective="difference", eta=0.5,
            steps=3, batch=2, learning_rate=1e-3, rank=4, alpha=1.0, seed=3, name="light", previews=0,
        )  # fmt: skip
        vae = changes.pop("vae", None) or vae
        given |= changes
        with torch.inference_mode():
            listed = {key: value if key in ("before", "after") else [value] for key, value in given.items()}
            return model, node.SliderTrainImages.execute([model], [clip], [vae], **listed)

    def test_trains_saves_and_tells(self, places):
        model, output = self.execute()
        lora, losses, _, report = output.result
        assert len(losses["loss"]) == 3
        for part in ("3 steps of 2 on 98 layers of Stable Diffusion 1.5", "3 pairs of pictures", "Saved as"):
            assert part in report
        assert Slider.execute(model, "none", 1.0, 0.0, 1.0, lora=lora).result[0] is not model

    def test_another_picture_is_another_training(self, places, stopped):
        """A checkpoint of other pictures is not taken up; one of the same is."""
        with stopped(2), pytest.raises(comfy.model_management.InterruptProcessingException):
            self.execute()
        assert "Resumed" not in self.execute(after=[1 - picture for picture in self.PICTURES])[1].result[3]
        assert "Resumed at step" in self.execute()[1].result[3]

    def test_other_pictures_give_another_slider(self, places):
        given = {"before": [torch.zeros(1, 64, 64, 3)], "after": [torch.ones(1, 64, 64, 3)]}
        assert not torch.equal(
            self.lora(**given)["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"],
            self.lora()["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"],
        )

    def lora(self, **changes):
        return self.execute(**changes)[1].result[0]

    def test_nothing_to_go_is_refused(self, places):
        with pytest.raises(TrainingError, match="eta is 0"):
            self.execute(eta=0.0)
        assert self.execute(eta=0.0, objective="published")[1].result[0]


class TestPairs:
    ONE = torch.rand(2, 32, 40, 3, generator=torch.Generator().manual_seed(0))

    def pairs(self, before, after):
        return node.picture_pairs([before], [after], 8)

    def test_pairs_keep_their_order_and_are_cut_to_whole_latents(self):
        pairs = self.pairs(torch.rand(2, 35, 40, 4), torch.rand(2, 35, 40, 4))
        assert [tuple(picture.shape) for pair in pairs for picture in pair] == [(32, 40, 3)] * 4

    @pytest.mark.parametrize(
        ("before", "after", "told"),
        [
            (ONE, ONE[:1] + 0.1, "2 pictures before and 1 after"),
            (ONE, torch.rand(2, 40, 32, 3), "Pair 1 is of unlike sizes: 40 x 32 pixels before, 32 x 40 after"),
            (ONE, torch.cat([1 - ONE[:1], ONE[1:] / 0]), "Pair 2 holds values that are no numbers"),
            (ONE, torch.cat([1 - ONE[:1], ONE[1:]]), "Both pictures of pair 2 are the same"),
            (ONE[:, :6], 1 - ONE[:, :6], "Pair 1 is 40 x 6 pixels"),
        ],
    )
    def test_what_cannot_be_learnt_from_is_told(self, before, after, told):
        with pytest.raises(TrainingError, match=told):
            self.pairs(before, after)
