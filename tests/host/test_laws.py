"""The laws of the pack, one named test each, for every node that puts something on a model."""

import ast
import importlib
import json
import pickle
from pathlib import Path

import cases
import models
import pytest
import sampling
import state
import torch

import concept_nodes
from concept_nodes.host.families import UnsupportedFamily
from concept_nodes.host.run_record import find
from concept_nodes.nodes import NODES

ROOT = Path(concept_nodes.__file__).parent
BY_ID = {node.define_schema().node_id: node for node in NODES}
each_effect = pytest.mark.parametrize("node_id", cases.EFFECT_IDS)
each_kind = pytest.mark.parametrize("kind", list(models.KINDS))


@pytest.fixture(scope="module")
def plain():
    """One plain model for the module, so that whatever a test leaves on it shows in the next."""
    return models.build()


@pytest.mark.parametrize("node_id", cases.IDS)
def test_every_node_has_a_case_or_a_reason(node_id):
    assert (node_id in cases.EFFECTS) != (node_id in cases.PLUMBING)


@each_kind
@each_effect
def test_law_1_zero_is_nothing(node_id, kind):
    model = models.build(kind)
    expected = models.sample(model)
    for setting, apply in cases.EFFECTS[node_id].neutral.items():
        assert torch.equal(models.sample(apply(model)), expected), setting


@pytest.mark.parametrize("dtype, compute", [("float16", "float32"), ("bfloat16", None), ("float16", None), ("float8_e4m3fn", "bfloat16")])
@each_effect
def test_law_1_zero_is_nothing_in_any_precision(node_id, dtype, compute):
    model = models.build("sd15", dtype, compute)
    expected = models.sample(model, steps=2)
    for setting, apply in cases.EFFECTS[node_id].neutral.items():
        assert torch.equal(models.sample(apply(model), steps=2), expected), setting
    case = cases.EFFECTS[node_id]
    assert torch.equal(models.sample(case.acts(model), steps=2), expected) == case.unseen


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@each_effect
def test_law_2_one_pass(node_id, sampler, plain):
    case = cases.EFFECTS[node_id]
    without, with_effect = (sampling.count_calls(model, sampler=sampler) for model in (plain, case.acts(plain)))
    told = find(models.sample(case.acts(plain), sampler=sampler))
    assert told.calls == with_effect == without + told.added


@pytest.mark.parametrize("way", sampling.WAYS)
@each_effect
def test_law_3_every_stock_sampler_and_guider(node_id, way, plain):
    case = cases.EFFECTS[node_id]
    acting = sampling.WAYS[way](case.acts(plain))
    assert torch.equal(acting, sampling.WAYS[way](plain)) == case.unseen
    if case.reference is not None:
        torch.testing.assert_close(acting, sampling.WAYS[way](case.reference(plain)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("situation", sampling.SITUATIONS)
@each_effect
def test_law_4_nothing_is_mutated(node_id, situation):
    situation = sampling.situation(situation, cases.EFFECTS[node_id].refuses)
    model = situation.model()
    expected = situation.plain(model)
    model_before, patcher_before = state.of_model(model.model), state.of_patcher(model)
    acting = model
    for _ in range(situation.nodes):
        taken, taken_before = acting, state.of_patcher(acting)
        acting = cases.EFFECTS[node_id].acts(taken)
        assert state.differences(taken_before, state.of_patcher(taken)) == [], "the node changed its input"
    acting_before = state.of_patcher(acting)
    situation.run(acting, model)
    assert state.differences(acting_before, state.of_patcher(acting)) == [], "the run changed the node's output"
    assert state.differences(model_before, state.of_model(model.model)) == []
    assert torch.equal(situation.plain(model), expected), "a plain graph on the same model samples something else now"
    assert state.differences(model_before, state.of_model(model.model)) == []
    assert state.differences(patcher_before, state.of_patcher(model)) == []


@each_effect
def test_law_5_says_what_was_done(node_id, plain):
    case = cases.EFFECTS[node_id]
    output = case.execute(plain)
    report = output.result[[output.id for output in BY_ID[node_id].define_schema().outputs].index("report")]
    assert [part for part in case.tells if part not in report] == []
    assert output.ui.as_dict()["text"] == (report,)
    told = BY_ID["ConceptNodes_RunReport"].execute({"samples": models.sample(output.result[0], steps=3)})
    assert "3 of 3 steps" in told.result[1]
    assert told.ui.as_dict()["text"] == (told.result[1],)


@each_effect
def test_law_5_unsupported_family_is_refused_by_name(node_id):
    model = models.build("sd20")
    with pytest.raises(UnsupportedFamily, match=r"SD20.*Stable Diffusion 1\.5, SDXL, Flux\.1"):
        cases.EFFECTS[node_id].acts(model)


@pytest.mark.parametrize("node_id", cases.IDS)
def test_law_6_the_workflow_is_the_document(node_id):
    for item in BY_ID[node_id].define_schema().inputs:
        default = getattr(item, "default", None)
        assert json.loads(json.dumps(default)) == default, f"{item.id} cannot be kept in a workflow"
        for option in getattr(item, "options", None) or []:
            assert "\\" not in option, f"{item.id} offers a name that other systems cannot find"


@each_effect
def test_law_7_others_stay_whole(node_id, plain):
    """Another pack's attention override, wrapper and forward replacement keep working beside the node, in either order."""
    case = cases.EFFECTS[node_id]
    results = []
    for order in ("others first", "ours first"):
        model = plain.clone()
        seen = sampling.Others()
        if order == "others first":
            seen.patch(model)
            model = case.acts(model)
        else:
            model = case.acts(model).clone()
            seen.patch(model)
        results.append(models.sample(model))
        assert seen.complete()
        seen.unpatch(model)
    assert torch.equal(*results)
    assert torch.equal(models.sample(plain), models.sample(plain.clone()))


def test_law_7_nothing_is_patched_at_module_level(plain):
    watched = ["comfy.samplers", "comfy.model_base", "comfy.model_patcher", "comfy.ops", "comfy.sample", "comfy.lora", "comfy.sd", "nodes"]
    before = {name: state.frozen(_surface(importlib.import_module(name))) for name in watched}
    for case in cases.EFFECTS.values():
        models.sample(case.acts(plain))
    after = {name: state.frozen(_surface(importlib.import_module(name))) for name in watched}
    assert state.differences(before, after) == []


def _surface(module) -> dict:
    """A module's names, and those of its classes."""
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    return {name: dict(vars(value)) if isinstance(value, type) else value for name, value in names.items()}


def test_law_7_the_hosts_modules_are_still_the_hosts():
    import nodes

    assert Path(nodes.__file__).parent != ROOT
    assert hasattr(nodes, "KSampler")


def test_law_8_no_file_can_run_code(tmp_path, plain):
    from concept_nodes.host.adapters import AdapterError, read

    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "slider.pt"
    for write in (lambda: torch.save({"a": Payload()}, path), lambda: path.write_bytes(pickle.dumps({"a": Payload()}, protocol=2))):
        write()
        with pytest.raises(AdapterError, match=r"slider\.pt"):
            read(path)
        assert not marker.exists()


def test_law_8_no_source_opens_pickles_or_the_network():
    banned_imports = {"pickle5", "socket", "urllib", "requests", "http", "httpx", "aiohttp", "subprocess", "marshal", "shelve"}
    banned_calls = {"eval", "exec", "pickle.load", "pickle.loads", "os.system"}
    for path in [ROOT / "__init__.py", *(path for folder in ("nodes", "host", "ops") for path in (ROOT / folder).rglob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in ast.walk(tree):
            names = [alias.name for alias in item.names] if isinstance(item, ast.Import) else []
            names += [item.module or ""] if isinstance(item, ast.ImportFrom) and not item.level else []
            assert not {name.split(".")[0] for name in names} & banned_imports, f"{path}:{item.lineno}"
            if isinstance(item, ast.Call):
                assert ast.unparse(item.func) not in banned_calls, f"{path}:{item.lineno}"
                if ast.unparse(item.func) == "torch.load":
                    assert "weights_only=True" in [ast.unparse(keyword) for keyword in item.keywords], f"{path}:{item.lineno}"
