// The words that the browser's modules show: English here, other languages in locales/<language>/main.json under KEY.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const KEY = "kleinCns";

const ENGLISH = {
  resultSize: "Result {width} x {height}: {tokens} tokens",
  resultUnknown: "Result: its size is not known before a run",
  pictureTokens: "picture {number}: {tokens}",
  pictureUnknown: "picture {number}: not known before a run",
  together: "together {tokens}",
  togetherAtLeast: "together at least {tokens}",
  eachResult: "for each of {count} results",
  charges: "fal charges {price}",
  chargesAtMost: "fal charges at most {price}",
  chargesUnknown: "fal's price is not known before a run",
  collects: "Collects {id} from fal: nothing is submitted or charged",
  keyFound: "key: found",
  keyMissing: "no key",
  openAtFal: "Paid and not collected: {count} at fal, the newest {age} old. Right-click this node to collect:",
  openRequest: "{id}, {age} old, {price}",
  noId: "no id",
  noPrice: "price unknown",
  minutes: "{count} min",
  hours: "{count} h",
  days: "{count} days",
  journalFault: "The journal of requests to fal cannot be read; Klein fal Requests says why",
  collectMenu: "Collect a request from fal",
  off: "CNS is off: the initial noise is white, and none is added",
  noChurn: "cns_s_churn is 0: no noise is added",
  colour: "Noise added",
  progress: "Resolved (γ)",
  amount: "how much",
  coarse: "coarse",
  fine: "fine",
  step: "step",
  result: "Power of the result (line) and of the first picture (dashed)",
  resultAlone: "Power of the result",
  before: "Before a run: {steps} steps at {width} x {height}",
  run: "This run: {steps} steps at {width} x {height}",
  legend: "red: more than white noise, blue: less",
  pictures: "γ will be that of the connected pictures; the noise is shown after a run",
  assumed: "assumed: {what}",
  size: "the size",
  schedule: "the schedule",
  linked: "{names} (linked)",
  cell: "step {step} of {steps}, σ {sigma}: waves of {wavelength} px have {power} times white noise's power, γ {gamma}",
  flat: "what is flat has {power} times white noise's power, γ {gamma} (step {step} of {steps}, σ {sigma})",
  noNoise: "the last step adds no noise",
  presets: "Presets",
  isPreset: "These are the values of: {name}",
  changed: "Changed from {name}: {names}",
  own: "Own values",
};

/** @type {Record<string, string>} */
let translated = {};

/** Read the translations of the user's language; before that, and without any, the words are English. */
export async function loadWords() {
  try {
    const languages = await (await api.fetchApi("/i18n")).json();
    translated = languages[app.extensionManager.setting.get("Comfy.Locale")]?.[KEY] ?? {};
  } catch {
    translated = {}; // an older ComfyUI has no such route
  }
}

/**
 * @param {keyof typeof ENGLISH} key
 * @param {Record<string, unknown>} values for the {names} in the text
 * @returns {string}
 */
export function say(key, values = {}) {
  const text = translated[key] ?? ENGLISH[key];
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}
