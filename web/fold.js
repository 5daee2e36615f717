// Hides widgets of a node and shows them again, in both renderers; their values stay and are saved.

import { app } from "../../scripts/app.js";
import { linkOf } from "./linked.js";
import { isOurs } from "./node.js";

/**
 * Fold or unfold widgets. A linked one stays, since its link would end in nothing.
 * @param {ComfyNode} node
 * @param {(name: string) => boolean} chosen which widgets
 * @param {boolean} folded
 * @returns {boolean} whether anything changed
 */
export function fold(node, chosen, folded) {
  const widgets = node.widgets ?? [];
  let changed = false;
  for (const widget of widgets.filter(({ name }) => chosen(name))) {
    const hidden = folded && !linkOf(node, widget.name);
    if (Boolean(widget.hidden) === hidden) continue;
    widget.hidden = hidden; // the classic renderer's
    widget.options.hidden = hidden; // that of Nodes 2.0
    changed = true;
  }
  if (changed) widgets.unshift(...widgets.splice(0, 1)); // Nodes 2.0 looks again when the list changes
  return changed;
}

app.registerExtension({
  name: "klein-cns.fold",
  nodeCreated(node) {
    if (!isOurs(node.constructor.nodeData)) return;
    for (const widget of node.widgets ?? []) widget.advanced = Boolean(widget.options?.advanced);
    // The classic renderer does not draw advanced widgets, but leaves room for them.
    if (node.getLayoutWidgets && node.isWidgetVisible) {
      node.getLayoutWidgets = () => (node.widgets ?? []).filter((widget) => node.isWidgetVisible?.(widget));
    }
  },
});
