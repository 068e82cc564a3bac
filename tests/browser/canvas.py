"""The ComfyUI frontend as its user sees it: open a template, press Run, read what the nodes show."""

import json
from typing import Any

from concept_nodes.setup.server import PACK

READY = "() => window.app?.vueAppReady && window.app.isGraphReady && window.app.canvas"
LOADED = "() => window.app.rootGraph.nodes.length > 0"
# The view is fitted to a new graph a moment after it is shown; until then nodes move under the mouse.
VIEW_AT_REST = """() => {
    const before = window.viewBefore;
    window.viewBefore = JSON.stringify(window.app.canvas.ds.state);
    return before === window.viewBefore;
}"""
START_TIMEOUT_MS = 90_000
RUN_TIMEOUT_MS = 60_000
SHOW_TIMEOUT_MS = 10_000
# Dialogs (missing nodes or models, errors) and red messages; the frontend shows each fault in one of these.
FAULTS = "[role=dialog]:visible, .p-toast-message-error:visible, [data-testid=error-overlay]:visible"


class Canvas:
    """One page of the frontend. `problems` collects uncaught errors, and console errors that name this pack."""

    def __init__(self, page, url: str, nodes2: bool):
        self.page = page
        self.url = url
        self.nodes2 = nodes2
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("console", self._note_console)

    def open(self, query: str = "") -> None:
        self.page.goto(f"{self.url}/{query}")
        self.page.wait_for_function(READY, timeout=START_TIMEOUT_MS)
        # The first workflow comes after that, and would take the place of what a test puts on the graph before it.
        self.page.wait_for_function(LOADED, timeout=START_TIMEOUT_MS)

    def open_template(self, name: str) -> None:
        """Open a template of this pack by the address that the gallery's links have."""
        self.open(f"?template={name}&source={PACK}")
        # The frontend first shows the last workflow, then the template; it cleans the address when that is done.
        self.page.wait_for_function("() => !window.location.search.includes('template')", timeout=START_TIMEOUT_MS)
        self.page.wait_for_function(VIEW_AT_REST, polling=250)

    def settle(self) -> None:
        """Let the page draw what it has been told."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self) -> None:
        """Press the Run button and wait until the run has ended well or badly."""
        self.page.evaluate("""() => {
            window.runEnded = null;
            for (const end of ["execution_success", "execution_error", "execution_interrupted"])
                window.app.api.addEventListener(end, () => { window.runEnded = end; }, { once: true });
        }""")
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function("() => window.runEnded", timeout=RUN_TIMEOUT_MS)
        self.settle()

    @property
    def run_ended(self) -> str:
        return self.page.evaluate("() => window.runEnded")

    def faults_shown(self) -> list[str]:
        return self.page.locator(FAULTS).all_inner_texts()

    def workflow(self) -> dict[str, Any]:
        """What saving would write."""
        return json.loads(self.page.evaluate("() => JSON.stringify(window.app.rootGraph.serialize())"))

    def graph(self) -> dict[str, Any]:
        """What Run would queue, API form without titles."""
        output = self.page.evaluate("async () => (await window.app.graphToPrompt()).output")
        return {node_id: {"class_type": node["class_type"], "inputs": node["inputs"]} for node_id, node in output.items()}

    def report(self, node_type: str) -> str:
        """The report that the only node of a type shows, once it is on the page."""
        return self.report_element(node_type).inner_text()

    def report_element(self, node_type: str):
        element = self.page.evaluate_handle(
            """type => {
            const node = window.app.rootGraph.nodes.find(node => node.type === type);
            return node.widgets.find(widget => widget.name === "last_report").element;
        }""",
            node_type,
        ).as_element()
        element.wait_for_element_state("visible", timeout=SHOW_TIMEOUT_MS)
        return element

    def wheel_over_report(self, node_type: str, focus: bool) -> tuple[float, float]:
        """Turn the mouse wheel over a report, clicked before if `focus`; how far it scrolled (px), and the zoom that this made."""
        element = self.report_element(node_type)
        zoom = self.page.evaluate("() => window.app.canvas.ds.scale")
        element.click() if focus else element.hover()
        self.page.mouse.wheel(0, 120)
        self.page.wait_for_timeout(300)
        return element.evaluate("element => element.scrollTop"), self.page.evaluate("() => window.app.canvas.ds.scale") / zoom

    def picture_width(self, node_type: str) -> int:
        """The width in pixels of the picture on the only node of a type, once it is there."""
        width = """type => {
            const node = window.app.rootGraph.nodes.find(node => node.type === type);
            const image = NODES2 ? document.querySelector(`[data-node-id="${node.id}"] img`) : node.imgs?.[0];
            return image?.naturalWidth;
        }""".replace("NODES2", str(self.nodes2).lower())
        return self.page.wait_for_function(width, arg=node_type, timeout=SHOW_TIMEOUT_MS).json_value()

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        self.page.evaluate(
            """([type, name, value]) => {
            const node = window.app.rootGraph.nodes.find(node => node.type === type);
            node.widgets.find(widget => widget.name === name).value = value;
        }""",
            [node_type, name, value],
        )

    def click_title(self, node_type: str) -> None:
        """Select the only node of a type as a user does, by a click on its title."""
        x, y = self.page.evaluate(
            """type => {
            const { canvas, rootGraph } = window.app;
            const node = rootGraph.nodes.find(node => node.type === type);
            const [x, y] = canvas.convertOffsetToCanvas([node.pos[0] + 80, node.pos[1] - 12]);
            const { left, top } = canvas.canvas.getBoundingClientRect();
            return [left + x, top + y];
        }""",
            node_type,
        )
        self.page.mouse.click(x, y)

    def _note_console(self, message) -> None:
        where = message.location.get("url", "")
        if where.endswith("/en.md"):  # the frontend asks for a translated help page before the plain one
            return
        if message.type == "error" and (PACK in message.text + where or "ConceptNodes" in message.text):
            self.problems.append(f"console: {message.text} ({where})")
