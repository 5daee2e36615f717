// What the frontend knows of a node's inputs before a run: a widget's value, or that of the link's source.

const SUBGRAPH_INPUT = -10; // ComfyUI's id of the node that stands for a subgraph's inputs
const PASSES = new Set(["Reroute"]); // hands on its only input
const SOCKET = "images.image_"; // of a picture, with its number from 0
const HOLDS = /^Primitive/; // its first widget is its output

/**
 * @param {ComfyGraph | null} graph
 * @param {number | null | undefined} id
 * @returns {ComfyLink | null}
 */
function linkById(graph, id) {
  if (id === null || id === undefined) return null;
  return graph?.links?.get?.(id) ?? graph?.links?.[id] ?? null;
}

/**
 * @param {ComfyNode} node
 * @param {string} name of an input
 * @returns {ComfyLink | null} the link into it
 */
export function linkOf(node, name) {
  return linkById(node.graph, node.inputs?.find((input) => input.name === name)?.link);
}

/**
 * @param {ComfyNode} node
 * @returns {ComfyNode | null} the first node that takes the first output
 */
export function consumerOf(node) {
  const link = linkById(node.graph, node.outputs?.[0]?.links?.[0]);
  return (link && node.graph?.getNodeById(link.target_id)) ?? null;
}

/**
 * The node that a graph's subgraph is used as, where only one is.
 * @param {ComfyGraph | null} graph
 * @returns {ComfyNode | null}
 */
function hostOf(graph) {
  const root = graph?.rootGraph;
  if (!root || root === graph) return null;
  const graphs = [root, ...(root.subgraphs?.values?.() ?? [])];
  const found = graphs.flatMap((one) => one.nodes ?? []).filter((node) => node.subgraph === graph);
  return found.length === 1 ? found[0] : null;
}

/**
 * Where an input's link begins, through reroutes and out of subgraphs.
 * @param {ComfyNode} node
 * @param {string} name of an input
 * @returns {{node: ComfyNode | null, output: string, widget?: string} | null} null without a link; a node of null where the
 *   frontend cannot know it; `widget` where the source is a widget of that node
 */
export function source(node, name) {
  const link = linkOf(node, name);
  if (!link) return null;
  if (Number(link.origin_id) === SUBGRAPH_INPUT) { // a string in some frontends
    const host = hostOf(node.graph);
    const input = host?.inputs?.[link.origin_slot];
    if (!input) return { node: null, output: "" };
    const beyond = source(host, input.name);
    return beyond || !input.widget ? beyond : { node: host, output: "", widget: input.widget.name };
  }
  const origin = node.graph?.getNodeById(link.origin_id);
  if (origin?.inputs && PASSES.has(origin.type)) {
    return source(origin, origin.inputs[0].name) ?? { node: null, output: "" };
  }
  if (origin && HOLDS.test(origin.type)) return { node: origin, output: "", widget: origin.widgets?.[0]?.name };
  return { node: origin ?? null, output: origin?.outputs?.[link.origin_slot]?.name ?? "" };
}

/**
 * @param {ComfyNode | null | undefined} node
 * @param {string} name
 * @returns {ComfyWidget | undefined}
 */
export function widgetOf(node, name) {
  return node?.widgets?.find((widget) => widget.name === name);
}

/**
 * @param {ComfyNode} node
 * @param {string} name of an input that is a widget
 * @returns {unknown} its value, or its source's; undefined where the frontend cannot know it
 */
export function valueOf(node, name) {
  const from = source(node, name);
  if (!from) return widgetOf(node, name)?.value;
  return from.widget === undefined ? undefined : widgetOf(from.node, from.widget)?.value;
}

/**
 * @param {ComfyNode} node
 * @returns {string[]} the names of the connected picture sockets, in their order
 */
export function pictureSockets(node) {
  const names = (node.inputs ?? []).map(({ name }) => name).filter((name) => name.startsWith(SOCKET));
  return names.filter((name) => source(node, name));
}

/**
 * @param {string} name of a picture socket
 * @returns {number} as it is labelled, from 1
 */
export function pictureNumber(name) {
  return Number(name.slice(SOCKET.length)) + 1;
}

/**
 * @param {ComfyNode} node
 * @param {string} name of an IMAGE input
 * @returns {[number, number] | undefined | null} width and height; null without a link, undefined where they are not
 *   known before a run
 */
export function pictureSize(node, name) {
  const from = source(node, name);
  if (!from) return null;
  const shown = from.node?.imgs?.[0];
  return from.node?.type === "LoadImage" && shown?.naturalWidth ? [shown.naturalWidth, shown.naturalHeight] : undefined;
}
