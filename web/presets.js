// The pack's presets on a node: which mean something on it, and which one its values are.

import { ask } from "./server.js";
import { valueOf, widgetOf } from "./linked.js";

const SWITCH = "enable_cns";
const MOST_NAMED = 3; // changed widgets that are named

/** @typedef {Record<string, {values: Record<string, unknown>, source: string}>} Presets by name */

/** @type {Promise<Presets> | undefined} */
let asked;

/**
 * @returns {Promise<Presets>} the server's list; empty where it has no such route
 */
export function presets() {
  asked ??= ask("presets").then((found) => found ?? {});
  return asked;
}

/**
 * @param {ComfyNode} node
 * @param {Presets} all
 * @returns {Presets} those that mean something on the node: without a switch, none that turns CNS off
 */
export function presetsFor(node, all) {
  const off = (/** @type {Record<string, unknown>} */ values) => values[SWITCH] === false && !widgetOf(node, SWITCH);
  return Object.fromEntries(Object.entries(all).filter(([, { values }]) => !off(values)));
}

/**
 * The names of the widgets whose values are not those of a preset.
 * @param {ComfyNode} node
 * @param {Record<string, unknown>} values
 */
function differing(node, values) {
  return Object.keys(values).filter((name) => widgetOf(node, name) && valueOf(node, name) !== values[name]);
}

/**
 * @param {ComfyNode} node
 * @param {Presets} all
 * @returns {{name: string, changed: string[]} | null} the nearest preset, and the widgets that differ from it; null
 *   where more differ than a sentence can name
 */
export function nearest(node, all) {
  const found = Object.entries(all).map(([name, { values }]) => ({ name, changed: differing(node, values) }));
  found.sort((one, other) => one.changed.length - other.changed.length);
  return found.length && found[0].changed.length <= MOST_NAMED ? found[0] : null;
}
