"""A real ComfyUI, started for tests in a folder of its own with this pack linked in as a user would have it."""

import os
import sys
from pathlib import Path

import pytest

from concept_nodes.setup.hosts import Host
from concept_nodes.setup.server import Server

LOG_TAIL_CHARACTERS = 6000


class HostProcess(Server):
    """run.py's own server, on the ComfyUI and the Python under test, with its log in its folder."""

    def __init__(self, base: Path, device: str = "cpu"):
        super().__init__(host_under_test(), base, dict(os.environ), device, log=base / "host.log")
        self.loras.mkdir(parents=True, exist_ok=True)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    @property
    def loras(self) -> Path:
        return self.base / "models" / "loras"


HOST = pytest.StashKey[HostProcess]()


def host_under_test() -> Host:
    """The ComfyUI named by COMFYUI_PATH. As if it were private: no models of the user's own, should it be theirs, reach a test."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        raise RuntimeError("COMFYUI_PATH must name a ComfyUI folder; `python run.py test` sets it")
    return Host(Path(path), Path(sys.executable), private=True)


@pytest.fixture(scope="session")
def host(tmp_path_factory, request, device):
    """One real ComfyUI for a whole tier."""
    process = HostProcess(tmp_path_factory.mktemp("host"), device)
    request.config.stash[HOST] = process
    with process:
        yield process


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Add the end of the host's log to the report of a test that fails."""
    report = (yield).get_result()
    process = item.config.stash.get(HOST, None)
    if report.failed and process is not None:
        report.sections.append((f"end of {process.log}", process.said[-LOG_TAIL_CHARACTERS:]))
