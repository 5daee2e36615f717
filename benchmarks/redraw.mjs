// How long the picture of the noise on CNS KSampler takes to follow a knob, in ComfyUI's frontend.
//
//     PLAYWRIGHT_CORE=... CHROMIUM=... node benchmarks/redraw.mjs http://127.0.0.1:8188
//
// The server needs this pack and no model. A redraw is timed from the knob's callback to the frame after the canvas has
// changed: the question to the server, the core's numbers, and the drawing.

import { open } from "../tests/browser/page.mjs";

const KNOBS = 40;

for (const nodes2 of [false, true]) {
  const { browser, page } = await open(process.argv[2], nodes2);
  const times = await page.evaluate(async (count) => {
    const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
    const node = window.LiteGraph.createNode("CNSKSampler");
    window.app.graph.add(node);
    const set = (name, value) => {
      const widget = node.widgets.find((one) => one.name === name);
      widget.value = value;
      widget.callback?.(value);
    };
    set("enable_cns", true);
    await wait(2000);
    const canvas = document.querySelector(".klein-noise canvas");
    const seen = () => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join();
    const found = [];
    for (let i = 0; i < count; i += 1) {
      const before = seen();
      const start = performance.now();
      let drawn = 0;
      // each drawing gives the canvas its width anew
      const width = Object.getOwnPropertyDescriptor(HTMLCanvasElement.prototype, "width");
      Object.defineProperty(canvas, "width", {
        configurable: true,
        get() { return width.get.call(this); },
        set(value) { drawn = performance.now(); width.set.call(this, value); },
      });
      set("cns_s_churn", 0.2 + i / 100);
      while (!drawn) await new Promise(requestAnimationFrame);
      await new Promise(requestAnimationFrame);
      found.push(performance.now() - start);
      delete canvas.width;
      if (seen() === before) throw new Error("nothing changed");
      await wait(450); // the next look is over
    }
    return found.sort((a, b) => a - b);
  }, KNOBS);
  await browser.close();
  const at = (share) => times[Math.round(share * (times.length - 1))].toFixed(0);
  console.log(`${nodes2 ? "Nodes 2.0" : "classic"}: median ${at(0.5)} ms, 90 % within ${at(0.9)} ms, most ${at(1)} ms`);
}
