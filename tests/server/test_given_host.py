"""A ComfyUI of the user's own, named by COMFYUI_PATH, runs the demo, serves the pack and stays as it was, byte for byte."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest

from concept_nodes.setup.server import PACK, free_port

from pack import ROOT
from pictures import pixels

pytestmark = pytest.mark.alone
SECONDS = 120
SECONDS_OF_A_WARM_DEMO = 60
# What a user keeps in a ComfyUI beside its code; it may be hundreds of gigabytes.
USERS_FILES = {"models", "output", "input", "temp", "user", "custom_nodes", "venv", ".venv"}


@pytest.fixture(scope="module")
def users_own(tmp_path_factory):
    """A copy of the code of the host under test, without any bytecode, in a path with a space."""
    given, copy = os.environ["COMFYUI_PATH"], tmp_path_factory.mktemp("a user's") / "Comfy UI"

    def left_out(folder, names):
        return {"__pycache__", ".git", *(USERS_FILES if folder == given else ())} & set(names)

    shutil.copytree(given, copy, ignore=left_out)
    for name in ("models", "custom_nodes"):
        (copy / name).mkdir()
    return copy


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below `folder` with its size and time of change."""
    return {path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def start(host: Path, home: Path, cwd: Path, *arguments):
    """`python run.py ARGUMENTS` on that host, what it says going to said.log in `cwd`."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")}
    variables |= {"COMFYUI_PATH": str(host), "CONCEPT_NODES_HOME": str(home)}
    with (cwd / "said.log").open("wb") as log:
        command = [sys.executable, str(ROOT / "run.py"), *arguments]
        return subprocess.Popen(
            command, cwd=cwd, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed_ctrl_c
        )


def heed_ctrl_c():
    """What a shell starts in its background ignores Ctrl-C, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition, process, log: Path):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_given_host_is_untouched_and_ends_with_run_py(users_own, home, tmp_path, ending):
    before, port = tree(users_own), free_port()
    process = start(users_own, home, tmp_path, "serve", "--port", str(port))
    url, log = f"http://127.0.0.1:{port}", tmp_path / "said.log"
    try:
        wait_until(lambda: f"Open {url}/?template=slider&source={PACK} in a browser" in log.read_text(), process, log)
        assert answers(f"{url}/object_info/ConceptNodes_Slider")
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


def test_the_demo_leaves_its_pictures_and_nothing_else_within_a_minute(users_own, home, tmp_path):
    before, began = tree(users_own), time.monotonic()
    process, log = start(users_own, home, tmp_path, "demo"), tmp_path / "said.log"
    assert process.wait(SECONDS) == 0, log.read_text()
    assert time.monotonic() - began <= SECONDS_OF_A_WARM_DEMO, log.read_text()
    made = tmp_path / "demo_output"
    labels = ("base", "-2", "-1", "+0", "+1", "+2")
    assert {path.name for path in made.iterdir()} == {
        *(f"demo_{label}_{row}.png" for label in labels for row in range(3)),
        "contact_sheet.png",
        "demo.json",
    }
    drawn = {label: pixels((made / f"demo_{label}_0.png").read_bytes()) for label in labels}
    assert np.array_equal(drawn["base"], drawn["+0"])
    assert len({picture.tobytes() for picture in drawn.values()}) == 5
    assert tree(users_own) == before
    assert not [running for running in psutil.process_iter(["cmdline"]) if str(home) in " ".join(running.info["cmdline"] or [])]
    assert not list((home / "bases").glob("demo-*"))
