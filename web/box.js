// A box of words on a node, in both renderers: complete, selectable, and as tall as its text.

const LINE = 16; // pixels
const CHARACTER = 6; // pixels, about
const MOST_LINES = 18; // a longer text scrolls
const MARGIN = 4; // pixels around the box, which the classic renderer takes from its height

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
export function remove(node, name) {
  const widget = node.widgets?.find((one) => one.name === name);
  if (widget) node.removeWidget(widget);
}

/**
 * Show a text on a node; an empty one takes the box away.
 * @param {ComfyNode} node
 * @param {string} name of the widget
 * @param {string} text
 */
export function showText(node, name, text) {
  let widget = node.widgets?.find((one) => one.name === name);
  if (!text) {
    if (widget) remove(node, name);
    return;
  }
  if (!widget) {
    const box = document.createElement("div");
    box.className = name.replace("_", "-");
    box.tabIndex = 0;
    box.dataset.captureWheel = "true"; // Nodes 2.0 scrolls the box, once it has the focus, and not the canvas
    Object.assign(box.style, {
      boxSizing: "border-box", overflow: "auto", padding: "6px 8px", borderRadius: "6px", outline: "none",
      background: "var(--comfy-input-bg)", color: "var(--input-text)", font: `11px/${LINE}px sans-serif`,
      whiteSpace: "pre-wrap", overflowWrap: "anywhere", userSelect: "text",
      contain: "size", // Nodes 2.0 makes a node as tall as what is in it; a long text scrolls
    });
    widget = node.addDOMWidget(name, name, box, {
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
