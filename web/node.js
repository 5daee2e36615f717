// What the browser's modules do to a node.

import { app } from "../../scripts/app.js";
import { widgetOf } from "./linked.js";

const CATEGORY = "klein";

/**
 * @param {any} definition of a node, as the server sends it
 * @returns {boolean} whether the node is this pack's
 */
export function isOurs(definition) {
  return definition?.category === CATEGORY;
}

/**
 * Run a function after a method.
 * @param {any} target the node, or the prototype of its class
 * @param {string} name of the method
 * @param {(this: any, ...given: any[]) => void} after
 */
export function chain(target, name, after) {
  const before = target[name];
  target[name] = function (/** @type {any[]} */ ...given) {
    const value = before?.apply(this, given);
    after.apply(this, given);
    return value;
  };
}

/**
 * Set widgets, as one step for undo. A name that the node lacks is left out.
 * @param {ComfyNode} node
 * @param {Record<string, unknown>} values by the widgets' names
 */
export function setWidgets(node, values) {
  node.graph?.beforeChange?.();
  for (const [name, value] of Object.entries(values)) {
    const widget = widgetOf(node, name);
    if (!widget || widget.value === value) continue;
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  node.graph?.afterChange?.();
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
  node.setDirtyCanvas(true, true);
}
