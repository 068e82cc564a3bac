"""One real ComfyUI and one real Chromium for the tier. Without Chromium it is skipped by name, or fails where it is required."""

import os
import shutil
from pathlib import Path

import pytest

from canvas import Canvas
from client import post_json
from host_process import host, pytest_runtest_makereport  # noqa: F401

REQUIRE = "CONCEPT_NODES_REQUIRE"
SCREENSHOTS = "CONCEPT_NODES_SCREENSHOTS"
CHROMIUM = "CONCEPT_NODES_CHROMIUM"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing(what: str):
    """Skip the tier, or fail it where the environment requires it."""
    if "browser" in os.environ.get(REQUIRE, ""):
        pytest.fail(f"the browser tier is required ({REQUIRE}): {what}")
    pytest.skip(f"the browser tier cannot run: {what}")


@pytest.fixture(scope="session")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the Python package playwright is not installed")
    path = os.environ.get(CHROMIUM) or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        missing(f"no Chromium found; install one or name it with {CHROMIUM}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def profile(chromium, host):  # noqa: F811 - after chromium, so that no host is started where there is none
    """A browser profile whose cache keeps the frontend's files from test to test; `canvas` empties the rest of it."""
    context = chromium.new_context(viewport={"width": 1900, "height": 1000})
    yield context
    context.close()


@pytest.fixture(params=["classic", "nodes2"])
def canvas(request, profile, host):  # noqa: F811
    """The frontend as on a first visit, in the classic canvas and in Nodes 2.0."""
    post_json(
        f"{host.url}/settings",
        {
            "Comfy.TutorialCompleted": True,  # else a first visit opens the template gallery over the canvas
            "Comfy.VueNodes.Enabled": request.param == "nodes2",
        },
    )
    page = profile.new_page()
    kept = {"origin": host.url, "storageTypes": "local_storage,indexeddb,cookies"}  # what a page leaves for the next; its own goes with it
    profile.new_cdp_session(page).send("Storage.clearDataForOrigin", kept)
    canvas = Canvas(page, host.url, nodes2=request.param == "nodes2")
    yield canvas
    if folder := os.environ.get(SCREENSHOTS):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{request.node.name.replace('[', '-').rstrip(']')}.png")
    page.close()
