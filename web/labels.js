// Workflows saved before the picture sockets had labels carry the ends of their ids, "image_0", as labels.

import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "klein-cns.labels",
  loadedGraphNode(node) {
    for (const input of node.inputs ?? []) {
      if (input.name !== `images.${input.label}`) continue;
      const label = node.constructor.nodeData?.inputs?.[input.name]?.display_name;
      if (label) input.label = label;
    }
  },
});
