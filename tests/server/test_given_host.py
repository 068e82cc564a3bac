"""A ComfyUI of the user's own, named by COMFYUI_PATH, serves the pack and stays as it was, byte for byte."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from concept_nodes.setup.server import free_port

from host_process import answers
from pack import ROOT

SECONDS = 120


@pytest.fixture(scope="module")
def users_own(tmp_path_factory):
    """A copy of the host under test without any bytecode, in a path with a space."""
    copy = tmp_path_factory.mktemp("a user's") / "Comfy UI"
    shutil.copytree(os.environ["COMFYUI_PATH"], copy, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    return copy


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder` with its size and time of change."""
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def serve(host: Path, home: Path, port: int, cwd: Path):
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")}
    variables |= {"COMFYUI_PATH": str(host), "CONCEPT_NODES_HOME": str(home)}
    with (cwd / "serve.log").open("wb") as log:
        command = [sys.executable, str(ROOT / "run.py"), "serve", "--port", str(port)]
        return subprocess.Popen(command, cwd=cwd, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def wait_until(condition, process, log: Path):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_given_host_is_untouched_and_ends_with_run_py(users_own, home, tmp_path, ending):
    before, port = tree(users_own), free_port()
    process = serve(users_own, home, port, tmp_path)
    url, log = f"http://127.0.0.1:{port}", tmp_path / "serve.log"
    try:
        wait_until(lambda: answers(f"{url}/object_info/ConceptNodes_Slider"), process, log)
        assert answers(f"{url}/object_info/KSampler")
        process.send_signal(ending)  # to run.py alone: it is the one that must end the host
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
    assert not answers(f"{url}/system_stats")
    assert tree(users_own) == before
    assert f"Using the ComfyUI in {users_own} with {sys.executable}" in log.read_text()
    assert (home / "bases" / "serve" / "comfyui.db").is_file()
