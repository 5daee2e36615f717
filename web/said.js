// What a node said once it had run (a LoRA's report, a warning): complete, selectable, and saved with the workflow.

import { app } from "../../scripts/app.js";

const CATEGORY = "klein"; // of this pack's nodes
const SAID = "klein_said"; // the widget, and the property of the node that is saved
const LIVE = "$$node-text-preview"; // ComfyUI's own box for a line while a node runs
const LINE = 16; // pixels
const CHARACTER = 6; // pixels, about
const MOST_LINES = 18; // a longer text scrolls
const MARGIN = 4; // pixels around the box, which the classic renderer takes from its height

/**
 * The values that a text was said about.
 * @param {ComfyNode} node
 */
function values(node) {
  return JSON.stringify((node.widgets ?? []).filter((widget) => widget.serialize !== false).map(({ value }) => value));
}

/**
 * Pixels that a text takes on a node, at most MOST_LINES lines.
 * @param {string} text
 * @param {number} width of the node
 */
function height(text, width) {
  const columns = Math.max(20, (width - 40) / CHARACTER);
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
  return Math.min(lines, MOST_LINES) * LINE + 12;
}

/**
 * @param {ComfyNode} node
 * @param {string} name of the widget to take away
 */
function remove(node, name) {
  const widget = node.widgets?.find((one) => one.name === name);
  if (widget) node.removeWidget(widget);
}

/**
 * Show a text on a node; an empty one takes the box away.
 * @param {ComfyNode & {saidAbout?: string}} node
 * @param {string} text
 */
function show(node, text) {
  node.properties[SAID] = text;
  node.saidAbout = values(node);
  let widget = node.widgets?.find(({ name }) => name === SAID);
  if (!text) {
    if (widget) remove(node, SAID);
    return;
  }
  if (!widget) {
    const box = document.createElement("div");
    box.className = "klein-said";
    box.tabIndex = 0;
    box.dataset.captureWheel = "true"; // Nodes 2.0 scrolls the box, once it has the focus, and not the canvas
    Object.assign(box.style, {
      boxSizing: "border-box", overflow: "auto", padding: "6px 8px", borderRadius: "6px", outline: "none",
      background: "var(--comfy-input-bg)", color: "var(--input-text)", font: `11px/${LINE}px sans-serif`,
      whiteSpace: "pre-wrap", overflowWrap: "anywhere", userSelect: "text",
      contain: "size", // Nodes 2.0 makes a node as tall as what is in it; a long text scrolls
    });
    widget = node.addDOMWidget(SAID, "klein_said", box, {
      serialize: false,
      margin: MARGIN,
      getMinHeight: () => height(box.textContent, node.size[0]) + 2 * MARGIN,
    });
    widget.serialize = false;
  }
  const shown = /** @type {HTMLElement} */ (widget.element);
  shown.textContent = text;
  shown.style.minHeight = `${height(text, node.size[0])}px`;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas(true, true);
}

/**
 * Run a function after a method of a node's class.
 * @param {any} type
 * @param {string} name of the method
 * @param {(this: any, ...given: any[]) => void} after
 */
function chain(type, name, after) {
  const before = type.prototype[name];
  type.prototype[name] = function (/** @type {any[]} */ ...given) {
    const value = before?.apply(this, given);
    after.apply(this, given);
    return value;
  };
}

app.registerExtension({
  name: "klein-cns.said",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.category !== CATEGORY) return;
    chain(nodeType, "onExecuted", function (output) {
      if (!Array.isArray(output?.text)) return;
      remove(this, LIVE);
      show(this, output.text.join("\n"));
    });
    chain(nodeType, "onConfigure", function () {
      if (this.properties[SAID]) show(this, this.properties[SAID]);
    });
    chain(nodeType, "onSerialize", function (saved) {
      if (!saved.properties?.[SAID] || this.saidAbout !== values(this)) delete saved.properties?.[SAID];
    });
  },
});
