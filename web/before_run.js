// What Klein Multi-Image Edit and Klein on fal say before a run: sizes and tokens; the price, the key and open requests.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { showText } from "./box.js";
import { pictureNumber, pictureSize, pictureSockets, valueOf } from "./linked.js";
import { chain, setWidgets } from "./node.js";
import { ask } from "./server.js";
import { loadWords, say } from "./words.js";

const EDIT = "KleinEditConditioner";
const FAL = "KleinFalEdit";
const NAME = "klein_before"; // of the widget
const RECOVER = "recover_request_id";
const LOOK = 400; // milliseconds between two looks at what no widget tells: links, undo, a picture that was chosen
const LISTED = 3; // open requests on the node; the menu has more

/** @typedef {{request_id: string | null, age_s: number, cost_usd: number | null}} OpenRequest */
/** @typedef {{key: boolean, open: OpenRequest[], count: number, fault: boolean}} AtFal */

/**
 * What the routes said about a node.
 * @typedef {object} State
 * @property {string} type of the node
 * @property {string} asked the values of the last question
 * @property {boolean} busy an answer is awaited
 * @property {string} text about the values
 */

/** @type {Map<ComfyNode, State>} */
const states = new Map();
/** @type {AtFal | null} */
let atFal = null;

/**
 * The connected pictures in the order of the sockets: their numbers, and what is known of their sizes.
 * @param {ComfyNode} node
 * @returns {{numbers: number[], sizes: ([number, number] | null)[]}}
 */
function pictures(node) {
  const connected = pictureSockets(node);
  return {
    numbers: connected.map(pictureNumber),
    sizes: connected.map((name) => pictureSize(node, name) ?? null),
  };
}

/**
 * What to ask about a node. A value that the frontend cannot know is left out.
 * @param {ComfyNode} node
 * @returns {Record<string, unknown>}
 */
function question(node) {
  const names = ["image_size", "width", "height", "num_images", "reference_megapixels"];
  const values = Object.fromEntries(names.map((name) => [name, valueOf(node, name)]));
  const addresses = String(valueOf(node, "image_urls") ?? "").split("\n").filter((line) => line.trim()).length;
  return { ...values, addresses, pictures: pictures(node).sizes };
}

/**
 * @param {number} usd
 * @returns {string}
 */
function dollars(usd) {
  return usd.toLocaleString("en-US", { style: "currency", currency: "USD", maximumFractionDigits: 4 });
}

/**
 * @param {number} seconds
 * @returns {string} in one unit
 */
function age(seconds) {
  if (seconds >= 2 * 86400) return say("days", { count: Math.round(seconds / 86400) });
  if (seconds >= 2 * 3600) return say("hours", { count: Math.round(seconds / 3600) });
  return say("minutes", { count: Math.round(seconds / 60) });
}

/**
 * @param {OpenRequest} request
 * @returns {string}
 */
function describe({ request_id, age_s, cost_usd }) {
  const price = cost_usd === null ? say("noPrice") : dollars(cost_usd);
  return say("openRequest", { id: request_id ?? say("noId"), age: age(age_s), price });
}

/**
 * @param {ComfyNode} node
 * @returns {Promise<string>} what Multi-Image Edit will make; empty where it cannot be asked
 */
async function aboutEdit(node) {
  const { numbers } = pictures(node);
  const values = question(node);
  const found = await ask("edit", values);
  if (found === null || found.error) return found?.error ?? "";
  const [width, height] = found.size ?? [];
  const parts = [found.size ? say("resultSize", { width, height, tokens: found.tokens }) : say("resultUnknown")];
  for (const [i, tokens] of found.references.entries()) {
    parts.push(say(tokens === null ? "pictureUnknown" : "pictureTokens", { number: numbers[i], tokens }));
  }
  if (numbers.length && found.together) {
    parts.push(say(found.complete ? "together" : "togetherAtLeast", { tokens: found.together }));
  }
  const count = Number(values.num_images);
  if (count > 1) parts.push(say("eachResult", { count }));
  return parts.join("; ");
}

/**
 * @param {ComfyNode} node
 * @returns {Promise<string>} what fal will charge; empty where it cannot be asked
 */
async function aboutFal(node) {
  const recovered = String(valueOf(node, RECOVER) ?? "").trim();
  if (recovered) return say("collects", { id: recovered });
  const found = await ask("price", question(node));
  if (found === null || found.error) return found?.error ?? "";
  if (found.usd === null) return say("chargesUnknown");
  return say(found.at_most ? "chargesAtMost" : "charges", { price: dollars(found.usd) });
}

/**
 * @returns {string[]} lines about the key and what is open
 */
function aboutAccount() {
  if (!atFal) return [];
  const key = say(atFal.key ? "keyFound" : "keyMissing");
  if (atFal.fault) return [key, say("journalFault")];
  if (!atFal.count) return [key];
  const listed = atFal.open.slice(0, LISTED).map(describe);
  if (atFal.count > LISTED) listed.push("...");
  return [key, say("openAtFal", { count: atFal.count, age: age(atFal.open[0].age_s) }), ...listed];
}

/**
 * @param {ComfyNode} node
 * @param {State} state
 */
function show(node, state) {
  if (state.type === EDIT || !state.text) return showText(node, NAME, state.text);
  const [key, ...lines] = aboutAccount();
  showText(node, NAME, [[state.text, key].filter(Boolean).join("; "), ...lines].join("\n"));
}

/**
 * Look at a node's values, and say what they make, if they changed.
 * @param {ComfyNode} node
 */
async function refresh(node) {
  const state = states.get(node);
  if (!state || state.busy || !node.graph) return;
  const asked = JSON.stringify([question(node), valueOf(node, RECOVER), pictures(node).numbers]);
  if (asked === state.asked) return;
  Object.assign(state, { asked, busy: true });
  try {
    state.text = await (state.type === EDIT ? aboutEdit(node) : aboutFal(node));
  } finally {
    state.busy = false;
  }
  if (states.get(node) === state) show(node, state);
}

/** Ask what is open at fal, and show it on every Klein on fal. */
async function askFal() {
  if (![...states.values()].some(({ type }) => type === FAL)) return;
  atFal = await ask("fal");
  for (const [node, state] of states) if (state.type === FAL && state.text) show(node, state);
}

/**
 * @param {ComfyNode} node
 * @param {string} id
 */
function recover(node, id) {
  setWidgets(node, { [RECOVER]: id });
  refresh(node);
}

app.registerExtension({
  name: "klein-cns.before-run",
  async setup() {
    await loadWords();
    for (const end of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(end, askFal);
    setInterval(() => states.forEach((_, node) => refresh(node)), LOOK);
  },
  nodeCreated(node) {
    const type = node.comfyClass ?? node.constructor.comfyClass;
    if (type !== EDIT && type !== FAL) return;
    states.set(node, { type, asked: "", busy: false, text: "" });
    chain(node, "onRemoved", () => states.delete(node));
    if (type === FAL) askFal();
  },
  getNodeMenuItems(node) {
    const open = states.get(node)?.type === FAL ? (atFal?.open.filter((one) => one.request_id) ?? []) : [];
    if (!open.length) return [];
    const options = open.map((one) => ({
      content: describe(one), callback: () => recover(node, /** @type {string} */ (one.request_id)),
    }));
    return [{ content: say("collectMenu"), has_submenu: true, submenu: { options } }]; // which Nodes 2.0 asks for
  },
});
