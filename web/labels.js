// A picture socket is called "picture 1", or by its name in the user's language. ComfyUI saves such a label with the
// workflow, and shows it before any translation.

import { app } from "../../scripts/app.js";
import { isOurs } from "./node.js";

/**
 * Name the sockets that nobody has renamed: in the user's language where locales/ has it, else as the schema does.
 * Workflows saved before the sockets had labels carry the ends of their ids, "image_0".
 * @param {ComfyNode} node
 */
function nameSockets(node) {
  const definition = node.constructor.nodeData;
  if (!isOurs(definition)) return;
  for (const input of node.inputs ?? []) {
    const english = definition.inputs?.[input.name]?.display_name;
    if (!english || input.widget) continue;
    const renamed = input.label && input.label !== english && input.name !== `images.${input.label}`;
    if (renamed) continue;
    const translated = input.localized_name && input.localized_name !== input.name;
    input.label = translated ? undefined : english;
  }
}

app.registerExtension({ name: "klein-cns.labels", nodeCreated: nameSockets, loadedGraphNode: nameSockets });
