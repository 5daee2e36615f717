// Drives one page for the tests of this folder: a command a line on stdin, {"value"} or {"error"} a line on stdout.

import { createInterface } from "node:readline";

import { covered, measure } from "./layout.mjs";
import { load, open, openApp, openTemplate, ready, run } from "./page.mjs";

const [address, renderer] = process.argv.slice(2);
const { browser, page, elsewhere } = await open(address, renderer === "nodes2");

const errors = []; // without the addresses elsewhere, which it cannot reach
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => {
  const { url } = message.location();
  if (message.type() === "error" && (!url || url.startsWith(address))) errors.push(message.text());
});

const commands = {
  evaluate: ({ code, args }) => page.evaluate(`(${code})(...${JSON.stringify(args)})`),
  load: ({ workflow, name }) => load(page, workflow, name),
  template: ({ pack, name }) => openTemplate(page, pack, name),
  covered: async () => covered(await measure(page)),
  errors: () => errors.splice(0),
  run: ({ app }) => run(page, app),
  app: () => openApp(page),
  fill: ({ selector, text }) => page.locator(selector).fill(text, { timeout: 10_000 }),
  click: ({ text }) => page.getByText(text, { exact: true }).first().click({ timeout: 10_000 }),
  choose: async ({ menu, entry }) => {
    const [parent, child] = [menu, entry].map((text) => page.getByText(text, { exact: true }).last()); // menus come last
    await parent.hover({ timeout: 10_000 }); // opens it in Nodes 2.0; classic needs a click
    await page.waitForTimeout(500);
    if (!(await child.isVisible())) await parent.click();
    await child.click({ timeout: 10_000 });
  },
  point: ({ x, y, button }) => page.mouse.click(x, y, { button }),
  scroll: async ({ selector, pixels }) => {
    await page.locator(selector).click({ timeout: 10_000 });
    await page.mouse.wheel(0, pixels);
  },
  reload: () => page.reload().then(() => ready(page)),
  screenshot: ({ path }) => page.screenshot({ path }),
  elsewhere: () => elsewhere,
};

console.log(JSON.stringify({ value: "ready" }));
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...given } = JSON.parse(line);
  try {
    console.log(JSON.stringify({ value: (await commands[command](given)) ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ error: String(error) }));
  }
}
await browser.close();
