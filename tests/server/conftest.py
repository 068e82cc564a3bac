"""One real ComfyUI for the whole tier; its log is added to the report of a test that fails."""

import pytest

from client import Client
from graphs import example
from host_process import host, pytest_runtest_makereport  # noqa: F401


@pytest.fixture
def client(host):  # noqa: F811
    with Client(host.url) as client:
        yield client


@pytest.fixture
def graph():
    """The shipped slider example, API form."""
    return example("slider")
