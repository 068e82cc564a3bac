// Shows the last report of a Concept Nodes node on the node itself, in the classic canvas and in Nodes 2.0.
// The text is what the node sent with its run (`ui.text`); it is kept out of the saved workflow and of the queued graph.
import { app } from "../../scripts/app.js";

const ID_PREFIX = "ConceptNodes_";
const REPORT_OUTPUT = "report";
const WIDGET_NAME = "last_report";
const MIN_HEIGHT_PX = 72;
const BEFORE_FIRST_RUN = "The report appears here after a run.";

const isReporter = (node) =>
  node.comfyClass?.startsWith(ID_PREFIX) && node.outputs?.some((output) => output.name === REPORT_OUTPUT);

/** A widget of the node that shows reports in itself; a second one beside it would share the node's height with it. */
const showsReports = (widget) => typeof widget.showReport === "function";

/** @param {{text?: string | string[]} | null | undefined} output what a node sent with its run */
const reportOf = (output) => [output?.text ?? []].flat().join("\n");

function reportElement() {
  const element = document.createElement("div");
  element.className = "concept-nodes-report";
  element.setAttribute("role", "status");
  element.tabIndex = 0;
  Object.assign(element.style, {
    // Its own size must not count: in Nodes 2.0 a long report would stretch the node.
    contain: "size",
    minHeight: `${MIN_HEIGHT_PX}px`,
    boxSizing: "border-box",
    padding: "6px 8px",
    overflow: "auto",
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    userSelect: "text",
    cursor: "text",
    font: "12px/1.4 sans-serif",
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    borderRadius: "6px",
  });
  // Nodes 2.0 leaves the wheel to an element that has the focus; in the classic canvas it is ours to hand on.
  element.dataset.captureWheel = "true";
  element.addEventListener("wheel", (event) => {
    if (!element.closest(".dom-widget")) return;
    const scrolls = element.scrollHeight > element.clientHeight;
    if (scrolls && !event.ctrlKey) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  return element;
}

function addReportWidget(node) {
  const element = reportElement();
  let report = "";
  const widget = node.addDOMWidget(WIDGET_NAME, "concept_report", element, {
    serialize: false, // not in the queued graph
    getMinHeight: () => MIN_HEIGHT_PX,
    getValue: () => report,
    setValue: (value) => {
      report = String(value ?? "");
      element.textContent = report || BEFORE_FIRST_RUN;
      element.style.opacity = report ? "1" : "0.6";
    },
  });
  widget.serialize = false; // not in the saved workflow
  widget.value = "";
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
}

function showReport(node, output) {
  const report = reportOf(output);
  if (!report) return;
  const panel = node?.widgets?.find(showsReports);
  const widget = node?.widgets?.find((candidate) => candidate.name === WIDGET_NAME);
  if (panel) panel.showReport(report);
  else if (widget) widget.value = report;
}

/** The node of a locator: "<id>" in the root graph, "<subgraph uuid>:<id>" in a subgraph. */
function nodeAt(locator) {
  const [id, subgraph] = String(locator).split(":").reverse();
  const graph = subgraph ? app.rootGraph.subgraphs.get(subgraph) : app.rootGraph;
  return graph?.getNodeById(id);
}

app.registerExtension({
  name: "ConceptNodes.Report",
  nodeCreated(node) {
    if (!isReporter(node)) return;
    if (!node.widgets?.some(showsReports)) addReportWidget(node);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showReport(this, output);
    };
  },
  // A workflow tab was opened again: its outputs come back without a run.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const node = nodeAt(locator);
      if (node && isReporter(node)) showReport(node, output);
    }
  },
});
