// Saves every example workflow again, as the frontend does, with its twin for the API and its picture.
//
// For when a node's inputs have changed. The server's `input` folder must hold ComfyUI's own example.png:
//     PLAYWRIGHT_CORE=... CHROMIUM=... node tests/browser/save_examples.mjs http://127.0.0.1:8188

import { readdirSync, readFileSync, writeFileSync } from "node:fs";

import { load, open } from "./page.mjs";

const FOLDER = new URL("../../example_workflows/", import.meta.url);
const PICTURE = 1200; // pixels, the width
const MARGIN = 20;
const SCREEN = { x: 80, y: 80, width: 1700, height: 880 }; // where a workflow is seen when it is opened, pixels
const READABLE = 0.6; // the least scale at which the classic renderer draws words

const { browser, page } = await open(process.argv[2], false, { width: 1600, height: 1600 });
await page.evaluate(async () => {
  const { setting, command } = window.app.extensionManager;
  await setting.set("LiteGraph.Canvas.MinFontSizeForLOD", 0); // draws the words, however small
  await command.execute("Workspace.ToggleFocusMode"); // nothing but the graph
});
for (const file of readdirSync(FOLDER).filter((name) => name.endsWith(".json"))) {
  await load(page, JSON.parse(readFileSync(new URL(file, FOLDER))), file.replace(".json", ""));
  const { workflow, output, left, top, right, bottom } = await page.evaluate(async ([width, margin]) => {
    const boxes = window.app.graph._nodes.map((node) => node.getBounding());
    const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])) - margin);
    const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])) + margin);
    Object.assign(window.app.canvas.ds, { scale: width / (right - left), offset: [-left, -top] });
    window.app.canvas.setDirty(true, true);
    const { workflow, output } = await window.app.graphToPrompt();
    return { workflow, output, left, top, right, bottom };
  }, [PICTURE, MARGIN]);
  await page.waitForTimeout(1500); // it is drawn
  const path = (name) => new URL(name, FOLDER).pathname;
  await page.screenshot({
    path: path(file.replace(".json", ".jpg")), type: "jpeg", quality: 80,
    clip: { x: 0, y: 0, width: PICTURE, height: Math.round((PICTURE * (bottom - top)) / (right - left)) },
  });
  const scale = Math.max(READABLE, Math.min(1, SCREEN.width / (right - left), SCREEN.height / (bottom - top)));
  workflow.extra.ds = { scale, offset: [SCREEN.x / scale - left, SCREEN.y / scale - top] };
  writeFileSync(path(file), `${JSON.stringify(workflow, null, 2)}\n`);
  writeFileSync(path(`api/${file}`), `${JSON.stringify(output, null, 2)}\n`);
  console.log(file);
}
await browser.close();
