// A page of ComfyUI's frontend in a headless Chromium, which reaches nothing but that server.
//
// playwright-core is no dependency of this project: PLAYWRIGHT_CORE is its folder, CHROMIUM the browser's program.

import { pathToFileURL } from "node:url";

const { chromium } = await import(pathToFileURL(`${process.env.PLAYWRIGHT_CORE}/index.mjs`));

/**
 * @param {string} address of the server
 * @param {boolean} nodes2 Nodes 2.0 in place of the classic renderer
 * @returns the page, its browser and the addresses elsewhere that it asked for in vain
 */
export async function open(address, nodes2, viewport = { width: 1700, height: 1000 }) {
  const settings = {
    "Comfy.TutorialCompleted": true, "Comfy.VueNodes.Enabled": nodes2, "Comfy.Minimap.Visible": false,
    "Comfy.Workflow.Persist": false, "Comfy.OnboardingCoachmarks.Seen": ["appMode"],
  };
  const headers = { "Content-Type": "application/json" };
  await fetch(`${address}/api/settings`, { method: "POST", headers, body: JSON.stringify(settings) });
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM, args: ["--no-sandbox", "--disable-gpu"],
  });
  const page = await browser.newPage({ viewport });
  const elsewhere = [];
  await page.route("**/*", (route) => {
    const url = new URL(route.request().url());
    if (url.origin === new URL(address).origin || ["data:", "blob:"].includes(url.protocol)) return route.continue();
    elsewhere.push(url.href);
    return route.abort();
  });
  await page.goto(address);
  await ready(page);
  return { browser, page, elsewhere };
}

/** Wait until the frontend has its nodes and a graph. */
export async function ready(page) {
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types.KleinBaseLoader, null, {
    timeout: 90_000,
  });
  await page.waitForTimeout(2000); // the last extensions, and the workflow of the start
}

/** Open a workflow, as the template browser does. */
export async function load(page, workflow, name) {
  await page.evaluate(([workflow, name]) => window.app.loadGraphData(workflow, true, true, name), [workflow, name]);
  await page.waitForTimeout(1000);
}

/** Open a template as a user does: the template browser, the pack's folder, the card. */
export async function openTemplate(page, pack, name) {
  await page.evaluate(() => {
    window.app.graph.clear();
    return window.app.extensionManager.command.execute("Comfy.BrowseTemplates");
  });
  const card = page.getByTestId(`template-workflow-${name}`);
  await page.getByRole("button", { name: pack, exact: true }).click({ timeout: 20_000 });
  await card.click({ timeout: 20_000 });
  await page.waitForFunction(() => window.app.graph._nodes.length > 0, null, { timeout: 20_000 });
  await card.waitFor({ state: "hidden", timeout: 20_000 });
}

/** Show the graph as an app; what its inputs say, a line each. */
export async function openApp(page) {
  await page.waitForTimeout(1500); // a template that has just opened would turn it back into a graph
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.ToggleLinear"));
  const inputs = page.getByTestId("linear-widgets");
  await inputs.waitFor({ timeout: 20_000 });
  return (await inputs.innerText()).split("\n").filter((line) => line);
}

/** Press Run, that of the app where `app` says so, and wait: `{kind, type, message}` of how it ended. */
export async function run(page, app = false, timeout = 240_000) {
  const end = await page.evaluate(async ([app, timeout]) => {
    const { api } = await import("/scripts/api.js");
    const ended = new Promise((resolve) => {
      setTimeout(() => resolve({ kind: "timeout" }), timeout);
      for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) {
        const end = ({ detail }) => resolve({ kind, type: detail.exception_type, message: detail.exception_message });
        api.addEventListener(kind, end, { once: true });
      }
    });
    if (app) [...window.document.querySelectorAll("[data-testid=linear-run-button] button")].at(-1).click();
    else await window.app.queuePrompt(0, 1);
    return Object.keys(window.app.lastNodeErrors ?? {}).length ? { kind: "refused" } : ended;
  }, [app, timeout]);
  await page.waitForTimeout(1000); // what the page shows then
  return end;
}

/**
 * A workflow as it stands, with one step for each sampler and seeds of its own, so that nothing comes from a cache.
 *
 * @param {object} workflow as a file holds it
 * @param {number} seed of every sampler
 */
export function shortened(workflow, seed) {
  const short = structuredClone(workflow);
  const set = { CNSKSampler: { 0: seed, 2: 1 }, Flux2Scheduler: { 0: 1 }, RandomNoise: { 0: seed } };
  for (const node of short.nodes) {
    for (const [position, value] of Object.entries(set[node.type] ?? {})) node.widgets_values[position] = value;
    if (node.type === "PrimitiveInt") node.widgets_values[0] = seed; // the examples have it for the seed alone
  }
  return short;
}
