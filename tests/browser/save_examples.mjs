// Saves every example workflow again, as the frontend does, with its twin for the API. `save_examples.py` starts it.
//
// Each is run first, in both renderers and shortened, to see how large its nodes become; it is then loaded afresh, laid
// out for those sizes, and saved without results. The columns and groups stay as the file has them.

import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";

import { arrange, larger, measure, measureGroups, move } from "./layout.mjs";
import { load, open, run, shortened } from "./page.mjs";

const FOLDER = new URL("../../example_workflows/", import.meta.url);
const SCREEN = { x: 80, y: 80, width: 1700, height: 880 }; // where a workflow is seen when it is opened, pixels
const READABLE = 0.6; // the least scale at which the classic renderer draws words

const [address, pictures] = process.argv.slice(2);
const files = readdirSync(FOLDER).filter((name) => name.endsWith(".json"));
const workflows = new Map(files.map((file) => [file, JSON.parse(readFileSync(new URL(file, FOLDER), "utf8"))]));

/** What a run in one renderer makes of every workflow: the boxes by file. */
async function sizesAfterRun(nodes2) {
  const { browser, page } = await open(address, nodes2);
  const sizes = new Map();
  for (const [file, workflow] of workflows) {
    await load(page, shortened(workflow, nodes2 ? 2 : 1), file);
    const end = await run(page);
    if (end.kind !== "execution_success") throw new Error(`${file}: ${JSON.stringify(end)}`);
    sizes.set(file, await measure(page));
  }
  await browser.close();
  return sizes;
}

/** Save the laid out workflow and its twin. */
async function save(page, file, sizes) {
  await load(page, workflows.get(file), file);
  await move(page, arrange(await measure(page), await measureGroups(page), sizes));
  const { workflow, output } = await page.evaluate(() => window.app.graphToPrompt());
  const boxes = await measureGroups(page);
  const [right, bottom] = [
    Math.max(...boxes.map(({ x, width }) => x + width)), Math.max(...boxes.map(({ y, height }) => y + height)),
  ];
  const scale = Math.max(READABLE, Math.min(1, SCREEN.width / right, SCREEN.height / bottom));
  workflow.extra.ds = { scale, offset: [SCREEN.x / scale, SCREEN.y / scale] };
  writeFileSync(new URL(encodeURIComponent(file), FOLDER), `${JSON.stringify(workflow, null, 2)}\n`);
  writeFileSync(new URL(`api/${encodeURIComponent(file)}`, FOLDER), `${JSON.stringify(output, null, 2)}\n`);
  workflows.set(file, JSON.parse(JSON.stringify(workflow)));
}

/** A picture of each workflow after a run, whole. */
async function photograph(nodes2, folder) {
  const { browser, page } = await open(address, nodes2, { width: 2000, height: 1200 });
  await page.evaluate(async () => {
    const { setting, command } = window.app.extensionManager;
    await setting.set("LiteGraph.Canvas.MinFontSizeForLOD", 0); // draws the words, however small
    await command.execute("Workspace.ToggleFocusMode"); // nothing but the graph
  });
  for (const [file, workflow] of workflows) {
    await load(page, shortened(workflow, nodes2 ? 4 : 3), file);
    await run(page);
    await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.Canvas.FitView"));
    await page.waitForTimeout(1500); // it is drawn
    await page.screenshot({ path: `${folder}/${file.replace(".json", "")} ${nodes2 ? "nodes2" : "classic"}.png` });
  }
  await browser.close();
}

const [classic, nodes2] = [await sizesAfterRun(false), await sizesAfterRun(true)];
const { browser, page } = await open(address, false);
for (const file of files) {
  await save(page, file, larger(classic.get(file), nodes2.get(file)));
  console.log(file);
}
await browser.close();
if (pictures) {
  mkdirSync(pictures, { recursive: true });
  for (const renderer of [false, true]) await photograph(renderer, pictures);
}
