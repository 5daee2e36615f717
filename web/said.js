// What a node said once it had run (a LoRA's report, a warning): complete, selectable, and saved with the workflow.

import { app } from "../../scripts/app.js";
import { remove, showText } from "./box.js";
import { chain, isOurs } from "./node.js";

const SAID = "klein_said"; // the widget, and the property of the node that is saved
const LIVE = "$$node-text-preview"; // ComfyUI's own box for a line while a node runs

/**
 * The values that a text was said about.
 * @param {ComfyNode} node
 */
function values(node) {
  return JSON.stringify((node.widgets ?? []).filter((widget) => widget.serialize !== false).map(({ value }) => value));
}

/**
 * Show a text on a node; an empty one takes the box away.
 * @param {ComfyNode & {saidAbout?: string}} node
 * @param {string} text
 */
function show(node, text) {
  node.properties[SAID] = text;
  node.saidAbout = values(node);
  showText(node, SAID, text);
}

app.registerExtension({
  name: "klein-cns.said",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!isOurs(nodeData)) return;
    chain(nodeType.prototype, "onExecuted", function (output) {
      if (!Array.isArray(output?.text)) return;
      remove(this, LIVE);
      show(this, output.text.join("\n"));
    });
    chain(nodeType.prototype, "onConfigure", function () {
      if (this.properties[SAID]) show(this, this.properties[SAID]);
    });
    chain(nodeType.prototype, "onSerialize", function (saved) {
      if (!saved.properties?.[SAID] || this.saidAbout !== values(this)) delete saved.properties?.[SAID];
    });
  },
});
