// Where the nodes of an example stand: in columns, at the size that they have after a run in either renderer.

const TITLE = 30; // pixels of a node's title, above its position
const GAP = 50; // between the nodes of a column
const PADDING = 25; // of a group around its nodes
const HEADING = 50; // of a group above its nodes
const BETWEEN = 60; // columns, or the groups of one

/** @typedef {{id: string, x: number, y: number, width: number, height: number}} Box of a node, with its title */
/** @typedef {{title: string, x: number, y: number, width: number, height: number}} Group as it is drawn */

/** Each node's box, in the units of the canvas, once no size changes any more. @returns {Promise<Box[]>} */
export function measure(page) {
  return page.evaluate(async () => {
    const boxes = () => window.app.graph._nodes.map((node) => {
      const [x, y, width, height] = node.getBounding();
      return { id: String(node.id), x, y, width, height };
    });
    let [before, now] = [null, boxes()];
    for (let left = 20; left && JSON.stringify(before) !== JSON.stringify(now); left--) {
      await new Promise((resolve) => setTimeout(resolve, 400));
      [before, now] = [now, boxes()];
    }
    return now;
  });
}

/** Each group's box. @returns {Promise<Group[]>} */
export function measureGroups(page) {
  return page.evaluate(() =>
    window.app.graph._groups.map(({ title, pos, size }) => ({
      title, x: pos[0], y: pos[1], width: size[0], height: size[1],
    })),
  );
}

/** The larger of two boxes of each node. @param {Box[]} some @param {Box[]} others @returns {Box[]} */
export function larger(some, others) {
  return some.map((box) => {
    const other = others.find(({ id }) => id === box.id);
    return { ...box, width: Math.max(box.width, other.width), height: Math.max(box.height, other.height) };
  });
}

const holds = (group, box) =>
  box.x >= group.x && box.x < group.x + group.width && box.y >= group.y && box.y < group.y + group.height;

/**
 * Columns from left to right, and the nodes of each from top to bottom, in the order in which they stand already; the
 * nodes of a group stay together.
 *
 * @param {Box[]} boxes as they stand, @param {Group[]} groups around them, @param {Box[]} sizes to make room for
 * @returns {{nodes: Box[], groups: Group[]}} where they should stand
 */
export function arrange(boxes, groups, sizes) {
  const nodes = [];
  const placed = [];
  let x = 0;
  for (const column of [...new Set(boxes.map((box) => box.x))].sort((a, b) => a - b)) {
    const stack = boxes.filter((box) => box.x === column).sort((a, b) => a.y - b.y);
    const sized = stack.map((box) => sizes.find(({ id }) => id === box.id));
    const widest = Math.max(...sized.map(({ width }) => width));
    let y = 0;
    let current = null;
    stack.forEach((box, i) => {
      const group = groups.find((one) => holds(one, box)) ?? null;
      if (i && group !== current) y += BETWEEN + (current ? PADDING - GAP : 0);
      if (group !== current || !i) {
        y += HEADING; // an ungrouped node starts on the line of the others
        if (group) {
          placed.push({ title: group.title, x, y: y - HEADING, width: widest + 2 * PADDING, height: 0 });
        }
        current = group;
      }
      nodes.push({ ...sized[i], x: x + PADDING, y });
      y += sized[i].height + GAP;
      if (group) placed.at(-1).height = y - GAP + PADDING - placed.at(-1).y;
    });
    x += widest + 2 * PADDING + BETWEEN;
  }
  return { nodes, groups: placed };
}

/** Move the nodes and groups of the open workflow there. */
export async function move(page, { nodes, groups }) {
  await page.evaluate(
    ([nodes, groups, title]) => {
      const graph = window.app.graph;
      for (const { id, x, y } of nodes) {
        const node = graph._nodes.find((one) => String(one.id) === id);
        node.pos = [x, y + title];
      }
      for (const { title, x, y, width, height } of groups) {
        const group = graph._groups.find((one) => one.title === title);
        group.pos = [x, y];
        group.size = [width, height];
      }
      window.app.canvas.setDirty(true, true);
    },
    [nodes, groups, TITLE],
  );
}

/** Pairs of nodes that cover each other. @param {Box[]} boxes @returns {[string, string][]} */
export function covered(boxes) {
  const overlap = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => overlap(a, b)).map((b) => [a.id, b.id]));
}
