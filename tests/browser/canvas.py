"""The ComfyUI frontend as its user sees it: open a template, press Run, read what the nodes show."""

from typing import Any

from host_process import PACK_NAME

READY = "() => window.app?.vueAppReady && window.app.isGraphReady && window.app.canvas"
START_TIMEOUT_MS = 90_000
RUN_TIMEOUT_MS = 60_000
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

    def open_template(self, name: str) -> None:
        """Open a template of this pack by the address that the gallery's links have."""
        self.open(f"?template={name}&source={PACK_NAME}")
        self.page.wait_for_function("() => window.app.rootGraph.nodes.some(node => node.type === 'ConceptNodes_LabLoader')",
                                    timeout=START_TIMEOUT_MS)
        self.settle()

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
        return self.page.evaluate("() => window.app.rootGraph.serialize()")

    def graph(self) -> dict[str, Any]:
        """What Run would queue, API form without titles."""
        output = self.page.evaluate("async () => (await window.app.graphToPrompt()).output")
        return {node_id: {"class_type": node["class_type"], "inputs": node["inputs"]} for node_id, node in output.items()}

    def report(self, node_type: str):
        """The element that shows the report of the only node of a type."""
        handle = self.page.evaluate_handle(
            "type => window.app.rootGraph.nodes.find(node => node.type === type).widgets.find(w => w.name === 'last_report').element",
            node_type)
        return handle.as_element()

    def picture_width(self, node_type: str) -> int:
        """The width in pixels of the picture shown on the only node of a type, 0 while there is none."""
        if self.nodes2:
            node_id = self.node_id(node_type)
            return self.page.evaluate("id => document.querySelector(`[data-node-id='${id}'] img`)?.naturalWidth ?? 0", node_id)
        return self.page.evaluate("type => window.app.rootGraph.nodes.find(n => n.type === type).imgs?.[0]?.naturalWidth ?? 0", node_type)

    def node_id(self, node_type: str) -> str:
        return str(self.page.evaluate("type => window.app.rootGraph.nodes.find(node => node.type === type).id", node_type))

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        self.page.evaluate("""([type, name, value]) => {
            const node = window.app.rootGraph.nodes.find(node => node.type === type);
            node.widgets.find(widget => widget.name === name).value = value;
        }""", [node_type, name, value])

    def select(self, node_type: str) -> None:
        self.page.evaluate("type => window.app.canvas.selectNode(window.app.rootGraph.nodes.find(node => node.type === type))", node_type)
        self.settle()

    def _note_console(self, message) -> None:
        where = message.location.get("url", "")
        if message.type == "error" and (PACK_NAME in message.text + where or "ConceptNodes" in message.text):
            self.problems.append(f"console: {message.text} ({where})")
