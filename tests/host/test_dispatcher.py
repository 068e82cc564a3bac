"""The engine under every order of events that the host, or another pack, can produce."""

import contextlib
import gc
import itertools
import threading
import time
import uuid
import weakref
from functools import partial
from types import SimpleNamespace

import cases
import comfy.hooks
import comfy.sd
import models
import pytest
import sampling
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux
from comfy_extras.nodes_train import TrainLoraNode
from torch._dynamo.utils import counters

from concept_nodes.host import adapters, dispatcher
from concept_nodes.host.regions import Hung, Regions
from concept_nodes.host.run_record import find
from concept_nodes.host.window import Window, course
from concept_nodes.nodes.regions import RegionsApply
from concept_nodes.nodes.sliders import Slider
from concept_nodes.ops.lora import Factors, Stack, _Apart
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region
from concept_nodes.ops.schedule import Schedule
from concept_nodes.ops.shares import Bucket

SETUP_SECONDS = 0.1
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def plain():
    return models.build()


def stock(model, strength, **lora):
    """The host's own LoRA on weights of its own, so that it cannot touch the model given."""
    return cases.stock_lora(model.clone(force_deepcopy=True), strength, **lora)


def forwards(model) -> list[str]:
    """What stands in the place of a class's own method, anywhere in a model."""
    return [name for name, module in model.model.named_modules() if {"forward", "apply_model"} & vars(module).keys()]


class TestTwoModelsInOneSampling:
    """DualModelGuider evaluates two patchers; clones share one model, and the host remembers only the patcher begun last."""

    @staticmethod
    def sample(positive, negative):
        return sampling.by_guider(partial(sampling.dual_model, lambda _: negative), positive)

    @pytest.mark.parametrize("strengths", [(0.8, 0.0), (0.0, 0.8), (0.8, -0.5), (0.8, 0.8)])
    def test_each_acts_in_its_own_calls(self, plain, strengths):
        positive, negative = strengths
        ours = self.sample(*(cases.slide(plain, strength) for strength in strengths))
        close(ours, self.sample(stock(plain, positive), stock(plain, negative)))
        assert forwards(plain) == []
        assert len(dispatcher._claims) == 0

    def test_one_patcher_in_both_roles_is_plain_cfg(self, plain):
        acting = cases.slide(plain)
        close(self.sample(acting, acting), sampling.by_guider(sampling.cfg, acting))

    def test_models_of_their_own(self, plain):
        other = sampling.other_model(plain)
        ours = self.sample(cases.slide(plain, 0.8), cases.slide(other, -0.6))
        close(ours, self.sample(stock(plain, 0.8), stock(other, -0.6)))

    def test_cfg_one_skips_the_second(self, plain):
        def guider(model):
            made = sampling.dual_model(lambda _: cases.slide(plain, -3.0), model)
            made.set_cfg(1.0)
            return made

        close(sampling.by_guider(guider, cases.slide(plain)), sampling.by_guider(sampling.basic, cases.slide(plain)))


class TestOtherCodeOnTheSameMethods:
    """Another pack replaces what we replaced, and leaves in any order."""

    @staticmethod
    def louder(inner):
        return lambda *args, **kwargs: inner(*args, **kwargs) * 1.5

    def test_forward_replaced_during_a_call_and_restored_after_the_run(self, plain):
        module = plain.model.diffusion_model.middle_block[0].in_layers[2]
        acting = cases.slide(plain)
        held = []

        def wrap():
            held.append(sampling.replaced_forward(module, self.louder))
            held[0].__enter__()

        model = sampling.wrapped(acting, WrappersMP.APPLY_MODEL, sampling.at_call(2, wrap))
        changed = models.sample(model)
        assert not torch.equal(changed, models.sample(acting))
        # Ours is below theirs and passes through: what is left is the plain model with their change.
        with sampling.replaced_forward(module, lambda inner: type(module).forward.__get__(module)):
            unchanged = models.sample(plain)
        held[0].__exit__(None, None, None)
        assert torch.equal(models.sample(plain), unchanged)
        assert forwards(plain) == []

    @pytest.mark.parametrize("over", [lambda inner: inner, lambda inner: lambda *args: inner(*args)], ids=["as it is", "in theirs"])
    def test_forward_of_ours_that_another_puts_back_later_passes_through(self, plain, over):
        """They took it for the module's own while a call lasted; in later calls and after the run it does nothing twice."""
        module = plain.model.diffusion_model.middle_block[0].in_layers[2]
        acting, taken = cases.slide(plain), []
        expected, without = models.sample(acting), models.sample(plain)

        def take(executor, *args, **kwargs):
            taken.append(module.forward)
            return executor(*args, **kwargs)

        def put_back(executor, *args, **kwargs):  # between calls
            if taken:
                module.forward = over(taken[0])
            return executor(*args, **kwargs)

        model = sampling.wrapped(sampling.wrapped(acting, WrappersMP.DIFFUSION_MODEL, take), WrappersMP.PREDICT_NOISE, put_back)
        assert torch.equal(models.sample(model), expected)
        assert len(taken) == 4
        try:
            assert torch.equal(models.sample(acting), expected)
            assert torch.equal(models.sample(plain), without)
        finally:
            vars(module).pop("forward", None)

    def test_output_that_another_keeps_is_not_written_to(self, plain):
        """A forward below ours hands out a tensor of its own, as caching packs do."""
        module = plain.model.diffusion_model.middle_block[0].in_layers[2]
        kept = []

        def keeping(inner):
            def forward(x):
                kept.append(inner(x))
                kept.append(kept[-1].clone())
                return kept[-2]

            return forward

        with sampling.replaced_forward(module, keeping):
            models.sample(cases.slide(plain))
        assert len(kept) == 8
        assert all(torch.equal(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))
        assert forwards(plain) == []

    def test_apply_model_replaced_between_our_begin_and_end(self, plain):
        acting = cases.slide(plain)
        expected = models.sample(acting)
        model = acting.clone()
        calls = []

        def before(patcher):
            inner = patcher.model.apply_model

            def apply_model(*args, **kwargs):
                calls.append(1)
                return inner(*args, **kwargs)

            patcher.model.apply_model = apply_model

        def after(patcher):
            del patcher.model.apply_model

        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", before)
        model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "test", after)
        assert torch.equal(models.sample(model), expected)
        assert len(calls) == 4
        assert forwards(plain) == []

    @pytest.mark.parametrize(
        "take_back",
        [lambda held, inner: held.pop("apply_model"), lambda held, inner: held.update(apply_model=inner[0])],
    )
    def test_older_override_that_goes_while_ours_is_on_top(self, take_back):
        """Theirs was there first. They take the method back without a look at who is there now, and ours with it."""
        plain = models.build()
        acting = cases.slide(plain)
        expected = models.sample(acting)
        inner = [plain.model.apply_model]
        plain.model.apply_model = lambda *args, **kwargs: inner[0](*args, **kwargs)
        model = acting.clone()
        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", lambda patcher: take_back(vars(patcher.model), inner))
        out = models.sample(model)
        assert torch.equal(out, expected)
        assert "acted in 4 of 4 steps" in find(out).describe()
        plain.model.apply_model = inner[0]
        del plain.model.apply_model
        assert forwards(plain) == []

    def test_older_override_that_takes_the_method_again(self):
        """The value that was there before ours is put back on top."""
        plain = models.build()
        inner = plain.model.apply_model
        plain.model.apply_model = before = lambda *args, **kwargs: inner(*args, **kwargs)
        model = cases.slide(plain)
        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", lambda patcher: vars(patcher.model).update(apply_model=before))
        assert "acted in 4 of 4 steps" in find(models.sample(model)).describe()
        assert vars(plain.model)["apply_model"] is before

    def test_override_that_leads_past_ours_is_told(self, caplog):
        """Theirs is on top and calls the class's own method: nothing of ours can act, and the report must not say otherwise."""
        plain = models.build()
        model = cases.slide(plain)

        def lead_past(patcher):
            own = type(patcher.model).apply_model.__get__(patcher.model)
            patcher.model.apply_model = lambda *args, **kwargs: own(*args, **kwargs)

        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", lead_past)
        told = find(models.sample(model)).describe()
        assert "another extension replaced the model's apply_model during this run" in told
        assert "window" not in told
        assert "another extension replaced the model's apply_model" in caplog.text

    def test_leftover_gate_goes_at_the_next_call(self, plain):
        """They put ours back after we have gone: it passes through and removes itself."""
        acting = cases.slide(plain)
        plainly = models.sample(plain)
        model = acting.clone()
        ours = []

        def before(patcher):
            ours.append(patcher.model.apply_model)
            patcher.model.apply_model = lambda *args, **kwargs: ours[0](*args, **kwargs)

        def after(patcher):
            patcher.model.apply_model = ours[0]

        model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", before)
        model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "test", after)
        models.sample(model)
        assert forwards(plain) == [""]
        assert torch.equal(models.sample(plain), plainly)
        assert forwards(plain) == []

    def test_the_hosts_bypass_lora_composes(self):
        # A model of its own: the host leaves forwards behind when it takes its bypass away.
        plain = models.build()
        other = models.lora(plain, seed=900, only="input_blocks")
        bypassed, _ = comfy.sd.load_bypass_lora_for_models(plain, None, other, 0.5, 0)
        baked, _ = comfy.sd.load_lora_for_models(stock(plain, 0.8), None, other, 0.5, 0)
        close(models.sample(cases.slide(bypassed)), models.sample(baked))
        bypassed.detach(unpatch_all=False)

    def test_hooks_on_conditions_compose(self):
        """A hook LoRA on one prompt: the host swaps weights between calls, ours acts in all of them."""
        plain = models.build()
        other = models.lora(plain, seed=900)

        def sample(model):
            positive, negative = sampling.prompts(model, 2)
            hooks = comfy.hooks.create_hook_lora(other, 0.5, 0.0)
            positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
            import nodes

            with torch.inference_mode():
                return nodes.common_ksampler(model, 3, 4, 3.0, "euler", "normal", positive, negative, models.latent(model))[0]["samples"]

        close(sample(cases.slide(plain)), sample(stock(plain, 0.8)))


@pytest.mark.parametrize("theirs", [False, True])
def test_a_call_from_within_a_call_sees_the_effect_once(plain, theirs):
    """Some wrappers evaluate the model twice; the second time through the model itself, perhaps with a forward of theirs above ours."""
    module = plain.model.diffusion_model.middle_block[0].in_layers[2]

    def again(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        def call(more):
            return executor.class_obj.apply_model(x, t, c_concat, c_crossattn, control, transformer_options | more, **kwargs)

        if transformer_options.get("depth", 0) == 0:
            above = sampling.replaced_forward(module, lambda inner: lambda *args: inner(*args)) if theirs else contextlib.nullcontext()
            with above:
                inner = call({"depth": 1})
            outer = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
            assert torch.equal(inner, outer)
            return outer
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    acting = cases.slide(plain)
    assert torch.equal(models.sample(sampling.wrapped(acting, WrappersMP.APPLY_MODEL, again)), models.sample(acting))
    assert forwards(plain) == []


def test_a_sampling_from_within_a_sampling_of_the_same_patcher(plain):
    """The outer one goes on with its effect, and its record is whole."""
    inner = []

    def nest(executor, *args, **kwargs):
        if not inner:
            inner.append(None)
            patcher = executor.class_obj.current_patcher
            inner[0] = models.sample(patcher, steps=2)
            executor.class_obj.current_patcher = patcher
        return executor(*args, **kwargs)

    acting = cases.slide(plain)
    outer = models.sample(sampling.wrapped(acting, WrappersMP.APPLY_MODEL, nest))
    assert torch.equal(outer, models.sample(acting))
    assert torch.equal(inner[0], models.sample(acting, steps=2))
    assert "acted in 4 of 4 steps" in find(outer).describe()
    assert "acted in 2 of 2 steps" in find(inner[0]).describe()
    assert forwards(plain) == []


class TestClaims:
    """What is known about conditions goes with the sampling that they are for."""

    @pytest.mark.parametrize("guider", [sampling.cfg, partial(sampling.dual_model, lambda model: model.clone())])
    def test_gone_when_loading_fails(self, plain, guider):
        model = sampling.wrapped(cases.slide(plain), WrappersMP.PREPARE_SAMPLING, lambda *args, **kwargs: sampling.fail(None))
        made = guider(model)
        with pytest.raises(sampling.Failure):
            sampling.by_guider(lambda _: made, model)
        assert len(dispatcher._claims) == 0

    def test_conditions_that_a_guider_built_itself(self, plain):
        """Without a uuid until the host asks for it."""

        def strip(executor, *args, **kwargs):
            for cond in itertools.chain(*executor.class_obj.conds.values()):
                del cond["uuid"]
            return executor(*args, **kwargs)

        def number(executor, guider, *args, **kwargs):
            for cond in itertools.chain(*guider.conds.values()):
                cond["uuid"] = uuid.uuid4()
            return executor(guider, *args, **kwargs)

        acting = cases.slide(plain)
        stripped = sampling.wrapped(acting, WrappersMP.SAMPLER_SAMPLE, number)
        stripped.wrappers[WrappersMP.OUTER_SAMPLE] = {"test": [strip]} | stripped.wrappers[WrappersMP.OUTER_SAMPLE]
        assert torch.equal(models.sample(stripped), models.sample(acting))


def test_model_of_another_device_is_driven_from_its_own_thread():
    """The host's multi-GPU way, with a second model on a second CPU "device": each worker thread samples its share of the conditions."""

    def spread(model):
        model = model.clone()
        copy = model.deepclone_multigpu(torch.device("cpu", 0))
        copy.is_multigpu_base_clone = True
        model.set_additional_models("multigpu", [copy])
        return model

    model = models.build()
    threads = set()

    def note(executor, *args, **kwargs):
        threads.add(threading.get_ident())
        return executor(*args, **kwargs)

    acting = sampling.wrapped(cases.slide(model), WrappersMP.APPLY_MODEL, note)
    spread_out = spread(acting)
    copies = spread_out.get_additional_models_with_key("multigpu")
    out = models.sample(spread_out)
    assert len(threads) == 2
    close(out, models.sample(acting))
    assert [forwards(patcher) for patcher in (model, *copies)] == [[], []]


class TestComposition:
    def test_order_does_not_matter(self, plain):
        strengths = {5: 0.7, 400: -0.4, 800: 0.5}
        one = other = plain
        for seed in strengths:
            one = cases.slide(one, strengths[seed], seed=seed)
        for seed in reversed(strengths):
            other = cases.slide(other, strengths[seed], seed=seed)
        close(models.sample(one), models.sample(other))
        baked = plain
        for seed, strength in strengths.items():
            baked = cases.stock_lora(baked, strength, seed=seed)
        close(models.sample(one), models.sample(baked))

    def test_a_slider_and_its_negation_cancel(self, plain):
        close(models.sample(cases.slide(cases.slide(plain, 0.8), -0.8)), models.sample(plain))

    def test_a_branch_does_not_change_its_sibling(self, plain):
        trunk = cases.slide(plain, 0.8)
        expected = models.sample(trunk)
        branch = cases.slide(trunk, 0.5, seed=400)
        models.sample(branch)
        assert torch.equal(models.sample(trunk), expected)
        assert [len(dispatcher.attached(model)) for model in (plain, trunk, branch)] == [0, 1, 2]
        assert len(branch.get_callbacks(CallbacksMP.ON_PRE_RUN, dispatcher.KEY)) == 1


class TestWindow:
    STEPS = 8

    def trajectory(self, model):
        """Sigma and denoised latent of every step, from the sampler's own callback."""
        seen = []

        def note(executor, *args, **kwargs):
            out = executor(*args, **kwargs)
            seen.append((float(args[1].flatten()[0]), out.clone()))
            return out

        models.sample(sampling.wrapped(model, WrappersMP.APPLY_MODEL, note), steps=self.STEPS)
        return seen

    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_bit_equal_before_the_window_and_different_in_it(self, kind):
        model = models.build(kind)
        acting = cases.slide(model, start=0.4)
        window = Window.of(model.get_model_object("model_sampling"), 0.4, 1.0)
        pairs = list(zip(self.trajectory(model), self.trajectory(acting), strict=True))
        first = next(index for index, ((sigma, _), _) in enumerate(pairs) if window.holds(sigma))
        assert 0 < first < self.STEPS
        assert all(torch.equal(base, ours) for (_, base), (_, ours) in pairs[:first])
        assert not torch.equal(pairs[first][0][1], pairs[first][1][1])

    @pytest.mark.parametrize(
        "kind, reschedule",
        [
            ("flux", lambda model: ModelSamplingFlux().patch(model, 3.0, 3.0, 1024, 1024)[0]),
            ("sd15", lambda model: ModelSamplingDiscrete().patch(model, "eps", True)[0]),
        ],
    )
    def test_schedule_that_another_node_changes_afterwards(self, kind, reschedule):
        """Shares of sampling are those of the schedule that the run has, wherever in the graph it was changed."""
        model = models.build(kind)
        before, after = cases.slide(reschedule(model), start=0.5), reschedule(cases.slide(model, start=0.5))
        windows = [Window.of(patcher.get_model_object("model_sampling"), 0.5, 1.0) for patcher in (model, after)]
        one, other = (models.sample(patcher, steps=self.STEPS) for patcher in (before, after))
        assert windows[0] != windows[1]
        assert torch.equal(one, other)
        assert not torch.equal(one, models.sample(reschedule(model), steps=self.STEPS))

    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_schedule_with_a_step_is_two_windows(self, kind):
        plain = models.build(kind)
        scheduled = cases.slide(plain, 1.0, schedule="0:.9, .35:.9, .35:-.4")
        pieces = cases.slide(cases.slide(plain, 0.9, end=0.35), -0.4, start=0.35)
        assert torch.equal(models.sample(scheduled, steps=self.STEPS), models.sample(pieces, steps=self.STEPS))

    @pytest.mark.parametrize("kind", list(models.KINDS))
    def test_schedule_at_the_noise_levels_of_its_shares(self, kind):
        sampling_ = models.build(kind).get_model_object("model_sampling")
        schedule = Schedule.parse("0:0, .3:1, 1:.5")
        factor = course(sampling_, 0.0, 1.0, schedule)
        for share in (0.001, 0.1, 0.3, 0.301, 0.5, 0.77, 0.999):
            level = SimpleNamespace(sigma=float(sampling_.percent_to_sigma(share)))
            assert factor(level) == pytest.approx(schedule.at(share), abs=1e-4)

    def test_schedule_acts_in_its_window_only(self, plain):
        sampling_ = plain.get_model_object("model_sampling")
        factor = course(sampling_, 0.2, 0.6, Schedule.parse("0:2"))
        factors = [factor(SimpleNamespace(sigma=float(sampling_.percent_to_sigma(share)))) for share in (0.1, 0.3, 0.5, 0.7)]
        assert factors == [0, 2, 2, 0]

    def test_step_on_the_border_belongs_to_the_window_that_starts_there(self, plain):
        sampling_ = plain.get_model_object("model_sampling")
        border = sampling_.percent_to_sigma(0.5)
        sigma = torch.tensor(border, dtype=torch.float32).item()
        assert Window.of(sampling_, 0.5, 1.0).holds(sigma)
        assert not Window.of(sampling_, 0.0, 0.5).holds(sigma)

    def test_windows_that_meet_add_up_to_one_without(self, plain):
        halves = cases.slide(cases.slide(plain, start=0.0, end=0.35), start=0.35, end=1.0)
        assert torch.equal(models.sample(halves, steps=self.STEPS), models.sample(cases.slide(plain), steps=self.STEPS))

    @pytest.mark.parametrize("sigmas", [[14.6, 7.0, 7.0, 3.0, 0.0], [0.1, 2.0, 9.0], [3.0, 0.0]])
    def test_schedules_of_any_order(self, plain, sigmas):
        """Repeated, rising and short schedules: what acts is decided by the sigma of each call alone."""
        import nodes  # noqa: F401

        seen = []

        def note(executor, x, t, *args, **kwargs):
            module = executor.class_obj.diffusion_model.input_blocks[1][0].in_layers[2]
            seen.append((float(t.flatten()[0]), "forward" in vars(module)))
            return executor(x, t, *args, **kwargs)

        model = sampling.wrapped(cases.slide(plain, start=0.3, end=0.8), WrappersMP.APPLY_MODEL, note)
        window = Window.of(plain.get_model_object("model_sampling"), 0.3, 0.8)
        x = models.seeded((1, 4, 8, 8), 1)
        guider = sampling.cfg(model)
        with torch.inference_mode():
            guider.sample(x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), torch.tensor(sigmas), seed=0)
        assert seen
        assert all(acted == window.holds(sigma) for sigma, acted in seen)


class TestCompile:
    """The way of the host's TorchCompileModel node, on a model that has run plain before."""

    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()

    @staticmethod
    def sample(model):
        return models.sample(model, steps=3, cfg=1.0)

    def test_strength_sigma_and_new_runs_compile_once(self):
        plain = models.build("flux").clone()
        set_torch_compile_wrapper(plain, backend="eager")
        eager = models.build("flux")
        assert torch.equal(self.sample(plain), self.sample(eager))
        compiled = [counters["stats"]["unique_graphs"]]
        for strength in (0.8, -0.3, 2.0, 0.1):
            close(self.sample(cases.slide(plain, strength)), self.sample(cases.slide(eager, strength)))
            compiled.append(counters["stats"]["unique_graphs"])
        assert compiled[0] < compiled[1] <= 2 * compiled[0], "the model with the effect is more than one variant of the plain one"
        assert len(set(compiled[1:])) == 1, f"compiled again at another strength: {compiled}"
        assert torch.equal(self.sample(plain), self.sample(eager))
        assert counters["stats"]["unique_graphs"] == compiled[1]

    def test_windows_compile_no_more_than_their_combinations(self):
        plain = models.build("flux").clone()
        set_torch_compile_wrapper(plain, backend="eager")
        acting = cases.slide(plain, start=0.5)
        close(self.sample(acting), self.sample(cases.slide(models.build("flux"), start=0.5)))
        compiled = counters["stats"]["unique_graphs"]
        self.sample(acting)
        assert counters["stats"]["unique_graphs"] == compiled


class TestPrecision:
    @pytest.mark.parametrize(
        "dtype, compute, tolerance",
        [
            ("float32", None, 1e-5),
            ("bfloat16", None, 0.1),
            ("float16", None, 0.01),
            ("float16", "float32", 1e-3),
            ("float8_e4m3fn", "bfloat16", 0.1),
        ],
    )
    def test_same_as_in_float32(self, dtype, compute, tolerance):
        """What the slider adds differs from what it adds in float32, on the same stored weights, by no more than the format's rounding."""
        model = models.build("sd15", dtype, compute)
        exact = models.build("sd15", dtype, "float32")
        added = models.sample(cases.slide(model), steps=2) - models.sample(model, steps=2)
        expected = models.sample(cases.slide(exact), steps=2) - models.sample(exact, steps=2)
        assert (added - expected).norm() <= tolerance * max(expected.norm(), models.sample(exact, steps=2).norm() * 0.05)

    def test_small_strength_survives_coarse_weights(self):
        """Baked into fp8 weights a small change is rounded away; beside them it is not."""
        model = models.build("sd15", "float8_e4m3fn", "float32")
        one, ten = (models.sample(cases.slide(model, strength), steps=1) - models.sample(model, steps=1) for strength in (1e-3, 1e-2))
        torch.testing.assert_close(10 * one, ten, rtol=0.2, atol=float(ten.abs().max()) * 0.05)

    def test_quantised_layers(self):
        """The host's scaled fp8 layers keep their weights in a class of their own; the slider adds to them what it adds to plain ones."""
        model, exact = models.build_quantised(), models.build()
        before = models.sample(model, steps=2)
        added = models.sample(cases.slide(model), steps=2) - before
        expected = models.sample(cases.slide(exact), steps=2) - models.sample(exact, steps=2)
        assert (added - expected).norm() <= 0.15 * expected.norm()
        assert torch.equal(models.sample(model, steps=2), before)


class TestTraining:
    """The host's Train LoRA node differentiates through a model that has a slider on it."""

    @staticmethod
    def train(model, checkpointing):
        """What it has trained after two steps, by key. It takes every input as a list."""
        inputs = {
            "model": model,
            "latents": {"samples": models.seeded((1, 4, 8, 8), 1)},
            "positive": models.conditioning(model, 10),
            "batch_size": 1,
            "grad_accumulation_steps": 1,
            "steps": 2,
            "learning_rate": 1e-2,
            "rank": 1,
            "optimizer": "SGD",
            "loss_function": "MSE",
            "seed": 0,
            "training_dtype": "fp32",
            "lora_dtype": "fp32",
            "quantized_backward": False,
            "algorithm": "LoRA",
            "gradient_checkpointing": checkpointing,
            "checkpoint_depth": 1,
            "offloading": False,
            "existing_lora": "[None]",
            "bucket_mode": False,
            "bypass_mode": True,
        }
        torch.manual_seed(0)
        with torch.inference_mode():
            return TrainLoraNode.execute(**{name: [value] for name, value in inputs.items()}).result[0]

    def test_checkpointing_changes_nothing(self):
        """The backward pass evaluates parts of the call again, after the call: it must find the slider there."""
        model = models.build()
        expected, checkpointed = (self.train(cases.slide(model), checkpointing) for checkpointing in (False, True))
        assert expected.keys() == checkpointed.keys()
        assert any(value.any() for key, value in expected.items() if "lora_up" in key)
        for key, value in expected.items():
            torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-6)

    def test_slider_is_trained_through(self):
        model = models.build()
        with_slider, without = self.train(cases.slide(model), False), self.train(model, False)
        assert any(not torch.equal(with_slider[key], without[key]) for key in without if "lora_up" in key)

    def test_layers_kept_for_the_backward_pass_go_with_the_run(self):
        model = models.build()
        between = []

        def record_gradients(executor, *args, **kwargs):
            with torch.enable_grad():
                out = executor(*args, **kwargs)
            between.append(forwards(model))
            return out.detach()

        models.sample(sampling.wrapped(cases.slide(model), WrappersMP.PREDICT_NOISE, record_gradients))
        assert [len(names) for names in between] == [120] * 4
        assert forwards(model) == []


def test_equals_the_stock_lora_loader_after_twenty_steps(plain):
    close(models.sample(cases.slide(plain, 1.3), steps=20), models.sample(cases.stock_lora(plain, 1.3), steps=20), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("put", [cases.slide, cases.put_regions])
def test_nothing_of_a_run_outlives_it(plain, put):
    """Tensors on the device, modules and patchers are given free without waiting for the garbage collector."""
    acting = put(plain)
    kept = []

    def note(executor, *args, **kwargs):
        gate = executor.class_obj.apply_model.__self__
        kept.extend([weakref.ref(gate), weakref.ref(gate.runs[0])])
        passes = [layer.acts[0]._plain or layer.acts[0]._placed for layer in gate.layers if layer.acts]
        kept.extend(weakref.ref(one.down) for one in passes)
        kept.extend(weakref.ref(spread) for spread in gate.runs[0]._spreads.values())
        return executor(*args, **kwargs)

    gc.disable()
    try:
        models.sample(sampling.wrapped(acting, WrappersMP.APPLY_MODEL, note), steps=1, cfg=1.0)
        assert len(kept) > 100
        assert [reference() for reference in kept if reference() is not None] == []
    finally:
        gc.enable()


def test_q_k_and_v_pick_their_rows_once(plain, monkeypatch):
    """Of four boxes; with sharing and without it the picture is the same."""
    listed = Regions()
    for at in range(4):
        listed = listed.with_region(Region(str(at), shapes=(Box(at / 4, 0, 0.25, 1),)))
        listed = listed.with_lora(str(at), Hung("random", models.lora(plain, seed=at)))
    picked = []
    monkeypatch.setattr(Bucket, "pick", lambda bucket, x, pick=Bucket.pick: picked.append(x.shape) or pick(bucket, x))

    def sample():
        picked.clear()
        return models.sample(RegionsApply.execute(plain, [], [], listed).result[0], steps=1, cfg=1.0)

    shared = []
    monkeypatch.setattr(Stack, "share", lambda stacks, share=Stack.share: shared.append(stacks) or share(stacks))
    together, times = sample(), len(picked)
    assert shared and all(len(stacks) == 3 for stacks in shared)
    attentions = sum(type(stacks[0]._placed) is _Apart for stacks in shared)
    monkeypatch.setattr(Stack, "share", lambda stacks: None)
    torch.testing.assert_close(sample(), together)
    assert attentions and len(picked) == times + 2 * attentions


def test_calls_of_a_run_have_the_same_layers(plain):
    """No object is made for each module in each call: they would set off the garbage collector."""
    seen = []

    def note(executor, *args, **kwargs):
        seen.append(list(executor.class_obj.apply_model.__self__.layers))
        return executor(*args, **kwargs)

    models.sample(sampling.wrapped(cases.slide(plain), WrappersMP.APPLY_MODEL, note), steps=3)
    assert len(seen) >= 3 and all(one is other for call in seen[1:] for one, other in zip(call, seen[0], strict=True))
    assert not any(layer.acts for layer in seen[0])  # after the run


@pytest.mark.alone
def test_setting_up_a_whole_unet_takes_a_tenth_of_a_second():
    """A rank 4 adapter on all layers of the full-size SD1.5 UNet, whose weights need not exist for that."""
    patcher = models.full_size("sd15")
    model = patcher.model
    parts = {}
    for name, module in model.named_modules():
        shape = adapters._weight_shape(module) if name else None
        if shape:
            parts[name] = adapters.LowRank((Factors(torch.zeros(4, *shape[1:]), torch.zeros(shape[0], 4)),))
    assert len(parts) > 250
    dispatcher.attach(patcher, adapters.AdapterEffect("test", parts, 1.0))
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        run = dispatcher.Run(patcher)
        call = dispatcher.Call(model, torch.zeros(1, 4, 8, 8), torch.ones(1), {})
        layers = run.layers(call)
        for layer in layers:
            layer.place()
        for layer in layers:
            layer.remove()
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) <= SETUP_SECONDS, f"seconds: {[round(s, 3) for s in seconds]}"


def test_slider_execute_is_cheap_to_repeat(plain):
    """Moving the strength reads no weight: the same clone, the same patches."""
    first, second = (Slider.execute(plain, "none", strength, 0.0, 1.0, lora=models.lora(plain)).result[0] for strength in (0.5, 0.6))
    assert first.patches == second.patches == {}
    assert first.patches_uuid == second.patches_uuid == plain.patches_uuid
