"""One real ComfyUI for the whole tier; its log is added to the report of a test that fails."""

import pytest

from client import Client
from graphs import example
from host_process import HostProcess

LOG_TAIL_CHARACTERS = 6000


@pytest.fixture(scope="session")
def host(tmp_path_factory, request):
    process = HostProcess(tmp_path_factory.mktemp("host"), request.config.getoption("--device", default="cpu")).start()
    request.config.stash[HOST] = process
    yield process
    process.stop()


HOST = pytest.StashKey[HostProcess]()


@pytest.fixture
def client(host):
    with Client(host.url) as client:
        yield client


@pytest.fixture
def graph():
    """The shipped slider example, API form."""
    return example("slider")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    process = item.config.stash.get(HOST, None)
    if report.failed and process is not None:
        report.sections.append((f"end of {process.log_path}", process.log[-LOG_TAIL_CHARACTERS:]))
