// The noise of CNS KSampler and CNS Sampler on the node: before a run by its widgets, after it by the run itself.

import { app } from "../../scripts/app.js";
import { cellAt, draw, layout, reading } from "./noise_draw.js";
import { fold } from "./fold.js";
import { consumerOf, pictureSize, pictureSockets, source, valueOf, widgetOf } from "./linked.js";
import { chain, setWidgets } from "./node.js";
import { nearest, presets, presetsFor } from "./presets.js";
import { ask } from "./server.js";
import { loadWords, say } from "./words.js";

/** @typedef {import("./noise_draw.js").Noise} Noise */

const NODES = new Set(["CNSKSampler", "CNSSampler"]);
const NAME = "klein_noise"; // of the widget, and of a run's numbers in what the node sends
const SETTING = "klein-cns.noise";
const SWITCH = "enable_cns";
const OWN = ["steps", "denoise", "cfg", "solver", "scheduler"]; // the widgets that decide, besides cns_
const LOOK = 400; // milliseconds between two looks at what no widget of the node tells: links, undo
const SPACE = 6; // pixels around and between the parts
const LINE = 15;
const MARGIN = 4;
const WIDTH = 320; // of a node fresh from the menu

/**
 * What the picture of a node needs; one for each node.
 * @typedef {object} State
 * @property {HTMLElement} box
 * @property {HTMLElement} content of the box
 * @property {HTMLElement} row of the presets
 * @property {HTMLElement} status which preset it is
 * @property {HTMLCanvasElement} canvas
 * @property {HTMLElement} line the reading, or what is shown
 * @property {ComfyWidget} widget
 * @property {string} key of the values that are shown
 * @property {Noise | null} noise what is drawn
 * @property {string} caption
 * @property {{key: string, noise: Noise} | null} run the last one, and the values it was seen with
 * @property {number} height of the box, pixels
 * @property {boolean} busy an answer is awaited
 * @property {import("./presets.js").Presets} presets
 */

/** @type {Map<ComfyNode, State>} */
const states = new Map();

/**
 * @param {string} name of a widget
 */
function isCns(name) {
  return name.startsWith("cns_") && name !== "cns_seed";
}

/**
 * @param {ComfyNode} node
 * @returns {boolean} false where CNS is off for sure
 */
function isOn(node) {
  return !widgetOf(node, SWITCH) || valueOf(node, SWITCH) !== false;
}

/**
 * The size that the latent will have, in the route's words.
 * @param {ComfyNode} node
 * @param {string} name of the LATENT input
 * @returns {Record<string, unknown> | undefined} undefined where it is not known
 */
function sizeFrom(node, name) {
  const from = source(node, name)?.node;
  if (!from) return undefined;
  const [image_size, width, height] = ["image_size", "width", "height"].map((side) => valueOf(from, side));
  if (widgetOf(from, "image_size") && image_size !== "custom") {
    if (image_size === undefined) return undefined;
    const [socket] = pictureSockets(from);
    if (image_size !== "auto" || !socket) return { image_size };
    const first = pictureSize(from, socket);
    return first ? { image_size, first } : undefined;
  }
  return typeof width === "number" && typeof height === "number" ? { width, height } : undefined;
}

/**
 * The schedule and the size of a SAMPLER's run, from the node that uses it.
 * @param {ComfyNode} node
 * @returns {{size: Record<string, unknown> | undefined, schedule: Record<string, unknown> | undefined}}
 */
function ofConsumer(node) {
  const consumer = consumerOf(node);
  if (!consumer) return { size: undefined, schedule: undefined };
  const sigmas = source(consumer, "sigmas")?.node;
  const [steps, scheduler, denoise] = ["steps", "scheduler", "denoise"].map((name) => sigmas && valueOf(sigmas, name));
  let schedule;
  if (typeof steps === "number" && (typeof scheduler === "string" || sigmas?.type === "Flux2Scheduler")) {
    schedule = { steps, scheduler: scheduler ?? "flux2", denoise: denoise ?? 1 };
  }
  return { size: sizeFrom(consumer, "latent_image"), schedule };
}

/**
 * What to ask the route, and what is not known and so assumed.
 * @param {ComfyNode} node
 * @param {Noise | undefined} run the last one, whose size and pictures are the best guess
 * @returns {{values: Record<string, unknown>, assumed: string[]}}
 */
function question(node, run) {
  /** @type {Record<string, unknown>} */
  const values = {};
  const unknown = [];
  for (const { name } of node.widgets ?? []) {
    if (!isCns(name) && !OWN.includes(name)) continue;
    const value = valueOf(node, name);
    if (value === undefined) unknown.push(name);
    else values[name] = value;
  }
  const assumed = unknown.length ? [say("linked", { names: unknown.join(", ") })] : [];
  let size = sizeFrom(node, "latent_image");
  if (node.type === "CNSSampler") {
    const consumer = ofConsumer(node);
    size = consumer.size;
    if (consumer.schedule) Object.assign(values, consumer.schedule);
    else assumed.push(say("schedule"));
    values.cfg = 1; // of a guider that is not known: no advice
  }
  if (!size) {
    size = run ? { width: run.size[0], height: run.size[1] } : {};
    assumed.push(say("size"));
  }
  if (run?.reference && values.cns_gamma_source === "reference") values.reference = run.reference;
  return { values: { ...values, ...size }, assumed };
}

/**
 * Give the node the height that it needs now. Nodes 2.0 grows by itself.
 * @param {ComfyNode} node
 * @param {boolean} shrink take back what is not needed
 */
function resize(node, shrink) {
  const [width, height] = node.size;
  const needed = node.computeSize()[1];
  if (shrink || (height < needed && !window.LiteGraph.vueNodesMode)) node.setSize([width, needed]);
  node.setDirtyCanvas(true, true);
}

/**
 * Follow what is shown: its height is known once it is.
 * @param {ComfyNode} node
 * @param {State} state
 */
function measure(node, state) {
  const height = state.content.offsetHeight + 2 * SPACE;
  if (!state.content.offsetHeight || height === state.height) return;
  state.height = height;
  state.box.style.minHeight = `${height}px`;
  resize(node, !isOn(node));
}

/**
 * @param {State} state
 * @param {{column: number, band: number} | null} at the cell under the mouse
 */
function paint(state, at = null) {
  if (!state.noise) return;
  const style = getComputedStyle(state.box);
  const theme = { text: style.color, line: style.borderColor };
  draw(state.canvas, state.noise, say, theme, at);
  state.line.textContent = at ? reading(state.noise, at, say) : state.caption;
}

/**
 * @param {ComfyNode} node
 * @param {State} state
 * @param {Noise | null} noise nothing is drawn without
 * @param {string} caption
 */
function show(node, state, noise, caption) {
  Object.assign(state, { noise, caption });
  state.canvas.style.display = noise ? "block" : "none";
  state.line.textContent = caption;
  paint(state);
  measure(node, state);
}

/**
 * @param {Noise} noise
 * @param {"before" | "run"} which
 * @param {string[]} assumed
 */
function captionOf(noise, which, assumed) {
  const [width, height] = noise.size;
  const parts = [say(which, { steps: noise.sigmas.length - 1, width, height })];
  if (assumed.length) parts.push(say("assumed", { what: assumed.join(", ") }));
  return [say("legend"), parts.join("; "), ...(noise.advice ?? [])].join(". ");
}

/**
 * @param {ComfyNode} node
 * @param {State} state
 */
function showPreset(node, state) {
  const near = nearest(node, state.presets);
  for (const button of state.row.querySelectorAll("button")) {
    const active = near?.changed.length === 0 && near.name === button.textContent;
    button.style.borderColor = active ? "var(--input-text)" : "var(--border-color)";
    button.setAttribute("aria-pressed", String(active));
  }
  const names = near?.changed.map((name) => name.replace(/^cns_/, "")).join(", ");
  if (!near) state.status.textContent = say("own");
  else state.status.textContent = say(near.changed.length ? "changed" : "isPreset", { name: near.name, names });
}

/**
 * Look at a node's values, and draw what they make, if they changed.
 * @param {ComfyNode} node
 */
async function refresh(node) {
  const state = states.get(node);
  if (!state || state.busy) return;
  const on = isOn(node);
  const { values, assumed } = question(node, state.run?.noise);
  const key = JSON.stringify([on, values]);
  if (key === state.key) return;
  state.key = key;
  state.row.style.display = on && Object.keys(state.presets).length ? "" : "none";
  showPreset(node, state);
  if (fold(node, isCns, !on)) resize(node, !on);
  if (!on) return show(node, state, null, say("off"));
  if (state.run?.key === key) return show(node, state, state.run.noise, captionOf(state.run.noise, "run", []));
  if (values.cns_gamma_source === "reference" && !values.reference) return show(node, state, null, say("pictures"));
  state.busy = true;
  const answer = await ask("noise", values);
  state.busy = false;
  if (states.get(node) !== state) return; // removed meanwhile
  if (answer === null) remove(node, state); // no such route
  else if (answer.error) show(node, state, null, answer.error);
  else {
    const caption = values.cns_s_churn === 0 ? say("noChurn") : captionOf(answer, "before", assumed);
    show(node, state, answer, caption);
  }
  refresh(node); // a knob that moved meanwhile
}

/**
 * Leave the node as it is without this module.
 * @param {ComfyNode} node
 * @param {State} state
 */
function remove(node, state) {
  states.delete(node);
  fold(node, isCns, false);
  node.removeWidget(state.widget);
}

/**
 * @param {ComfyNode} node
 * @param {State} state
 */
async function addPresets(node, state) {
  state.presets = presetsFor(node, await presets());
  for (const [name, { values, source }] of Object.entries(state.presets)) {
    const button = document.createElement("button");
    Object.assign(button, { textContent: name, title: source, type: "button" });
    Object.assign(button.style, {
      font: "inherit", color: "inherit", background: "transparent", border: "1px solid var(--border-color)",
      borderRadius: "4px", padding: "0 5px", margin: "0 4px 4px 0", cursor: "pointer",
    });
    button.addEventListener("click", () => setWidgets(node, values));
    state.row.insertBefore(button, state.status);
  }
  state.key = "";
  refresh(node);
}

/**
 * @param {ComfyNode} node
 */
function add(node) {
  const [box, content, row, status, line] = ["div", "div", "div", "div", "div"].map((kind) => document.createElement(kind));
  const canvas = document.createElement("canvas");
  box.className = "klein-noise";
  Object.assign(box.style, {
    boxSizing: "border-box", padding: `${SPACE}px`, borderRadius: "6px", overflow: "hidden",
    background: "var(--comfy-input-bg)", color: "var(--input-text)", borderColor: "var(--border-color)",
    font: `11px/${LINE}px sans-serif`,
  });
  Object.assign(canvas.style, { display: "none", width: "100%", marginBottom: `${SPACE}px` });
  Object.assign(status.style, { opacity: "0.8" });
  row.append(status);
  content.append(row, canvas, line);
  box.append(content);
  const widget = node.addDOMWidget(NAME, NAME, box, {
    serialize: false,
    margin: MARGIN,
    getMinHeight: () => state.height + 2 * MARGIN,
    getMaxHeight: () => state.height + 2 * MARGIN,
  });
  widget.serialize = false;
  /** @type {State} */
  const state = {
    box, content, row, status, canvas, line, widget, key: "", noise: null, caption: "", run: null, busy: false,
    presets: {}, height: 2 * LINE,
  };
  states.set(node, state);
  canvas.addEventListener("mousemove", ({ offsetX, offsetY }) => {
    if (state.noise) paint(state, cellAt(layout(canvas.clientWidth, state.noise), state.noise, offsetX, offsetY));
  });
  canvas.addEventListener("mouseleave", () => paint(state));
  new ResizeObserver(() => paint(state)).observe(canvas);
  new ResizeObserver(() => measure(node, state)).observe(content);
  for (const knob of node.widgets ?? []) {
    const before = knob.callback;
    knob.callback = function (...given) {
      const value = before?.apply(this, given);
      refresh(node);
      return value;
    };
  }
  addPresets(node, state);
}

app.registerExtension({
  name: SETTING,
  settings: [
    {
      id: SETTING,
      category: ["Klein", "CNS", "noise"],
      name: "Show the noise on CNS KSampler and CNS Sampler",
      type: "boolean",
      defaultValue: true,
      tooltip: "Nodes that are made or loaded after a change follow it.",
    },
  ],
  async setup() {
    await loadWords();
    setInterval(() => states.forEach((_, node) => node.graph && refresh(node)), LOOK);
  },
  nodeCreated(node) {
    const type = node.comfyClass ?? node.constructor.comfyClass;
    if (!NODES.has(type) || !app.extensionManager.setting.get(SETTING)) return;
    add(node);
    node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]); // a saved node gets its own size after this
    chain(node, "onRemoved", () => states.delete(node));
    chain(node, "onExecuted", (output) => {
      const state = states.get(node);
      const noise = output?.[NAME]?.[0];
      if (!state || !noise) return;
      const { values } = question(node, noise);
      state.run = { key: JSON.stringify([isOn(node), values]), noise };
      state.key = "";
      refresh(node);
    });
  },
  getNodeMenuItems(node) {
    const state = states.get(node);
    const found = Object.entries(state?.presets ?? {});
    if (!found.length) return [];
    const options = found.map(([name, { values, source }]) => ({
      content: name, title: source, callback: () => setWidgets(node, values),
    }));
    return [{ content: say("presets"), has_submenu: true, submenu: { options } }]; // which Nodes 2.0 asks for
  },
});
