"""Loads the pack for every tier and, for the tiers beyond `ops`, makes the real host importable (COMFYUI_PATH says where it lies)."""

import os
import shutil
import tempfile

import pytest

from pack import load_pack, use_host

BASE = pytest.StashKey[str]()
load_pack()  # now, for the tiers' own conftest files: pytest imports those before it calls anything here


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the host runs its models")


def pytest_configure(config):
    host = os.environ.get("COMFYUI_PATH")
    if host:
        config.stash[BASE] = tempfile.mkdtemp(prefix="concept-nodes-test-")
        use_host(host, config.stash[BASE], config.getoption("--device"))


def pytest_unconfigure(config):
    if BASE in config.stash:
        shutil.rmtree(config.stash[BASE], ignore_errors=True)


def pytest_report_header(config):
    return f"ComfyUI: {os.environ.get('COMFYUI_PATH') or 'none (COMFYUI_PATH is not set): only tests/ops can run'}"


@pytest.fixture(scope="session")
def device(request):
    """The device named with --device: "cpu" or "cuda"."""
    return request.config.getoption("--device")
