// Draws a run's noise (the answer of the route "noise") on a canvas: cells of step and band, and the amount per step.

/**
 * @typedef {object} Noise as sampler/noise_view.py makes it
 * @property {number[]} sigmas [steps + 1]
 * @property {number[]} steps those shown, from 0
 * @property {number[][]} power [shown][bands], 1 where the noise is white
 * @property {number[][]} gamma [shown][bands]
 * @property {number[]} std [shown]
 * @property {(number | null)[]} wavelengths [bands], pixels; null for what is flat
 * @property {number[]} modes [bands]
 * @property {[number, number]} size of the picture
 * @property {number[]} [spectrum] [bands], of a finished run's result
 * @property {number[]} [first] [bands], of the first reference
 * @property {number[]} [reference] [bands], of all references
 * @property {string[]} [advice]
 */

/** @typedef {{x: number, y: number, width: number, height: number}} Box in CSS pixels */

/** @typedef {(key: any, values?: Record<string, unknown>) => string} Say of words.js */

const FONT = "10px sans-serif";
const LEFT = 38; // pixels, for the wavelengths
const TITLE = 14;
const GAP = 8;
const CELLS = 112; // height of the cells
const AMOUNT = 30; // height of the bars of the amount
const MOST = 0.4; // standard deviation of a full bar; the largest one is also written
const AXIS = 13;
const SPECTRUM = 64; // height of the result's curve
const SHARE = 0.62; // of the width, for the noise; the rest shows γ
const TICKS = [16, 32, 64, 128, 512]; // pixels
const TICK = 36; // width of a label

const BLUE = [33, 102, 172];
const WHITE = [247, 247, 247];
const RED = [178, 24, 43];
const PURPLE = [68, 1, 84];
const GREEN = [33, 145, 140];
const YELLOW = [253, 231, 37];

/**
 * @param {number[]} from
 * @param {number[]} to
 * @param {number} share of `to`
 * @returns {number[]} red, green and blue from 0 to 255
 */
function mix(from, to, share) {
  return from.map((value, channel) => Math.round(value + (to[channel] - value) * share));
}

/**
 * Red above 1, blue below; full at 2 and 1/2. The root makes small differences visible.
 * @param {number} power
 */
export function powerColor(power) {
  const octaves = Math.max(-1, Math.min(1, Math.log2(Math.max(power, 1e-9))));
  return mix(WHITE, octaves > 0 ? RED : BLUE, Math.sqrt(Math.abs(octaves)));
}

/** @param {number} gamma from 0 to 1 */
export function gammaColor(gamma) {
  return gamma < 0.5 ? mix(PURPLE, GREEN, 2 * gamma) : mix(GREEN, YELLOW, 2 * gamma - 1);
}

/**
 * Where everything is.
 * @param {number} width of the canvas
 * @param {Noise} noise
 * @returns {{power: Box, gamma: Box, amount: Box, legend: Box, spectrum: Box | null, height: number}}
 */
export function layout(width, noise) {
  const wide = Math.round((width - LEFT - GAP) * SHARE);
  const power = { x: LEFT, y: TITLE, width: wide, height: CELLS };
  const gamma = { x: LEFT + wide + GAP, y: TITLE, width: width - LEFT - wide - GAP, height: CELLS };
  const below = TITLE + CELLS + 3;
  const end = below + AMOUNT + AXIS;
  const spectrum = noise.spectrum ? { x: LEFT, y: end + TITLE, width: width - LEFT, height: SPECTRUM } : null;
  return {
    power, gamma, spectrum,
    amount: { x: LEFT, y: below, width: wide, height: AMOUNT },
    legend: { x: gamma.x, y: below + 6, width: gamma.width, height: 7 },
    height: spectrum ? spectrum.y + SPECTRUM + AXIS : end,
  };
}

/**
 * The cell of a step and a band; low frequencies are at the bottom.
 * @param {Box} box
 * @param {Noise} noise
 * @param {number} column among the shown steps
 * @param {number} band
 * @returns {Box}
 */
export function cell(box, noise, column, band) {
  const [columns, bands] = [noise.power.length, noise.wavelengths.length];
  const [left, right] = [column, column + 1].map((edge) => Math.round((edge * box.width) / columns));
  const [top, bottom] = [bands - 1 - band, bands - band].map((edge) => Math.round((edge * box.height) / bands));
  return { x: box.x + left, y: box.y + top, width: right - left, height: bottom - top };
}

/**
 * @param {{power: Box, gamma: Box}} boxes of `layout`
 * @param {Noise} noise
 * @param {number} x
 * @param {number} y
 * @returns {{column: number, band: number} | null} the cell at a place of the canvas
 */
export function cellAt(boxes, noise, x, y) {
  for (const box of [boxes.power, boxes.gamma]) {
    const [right, down] = [(x - box.x) / box.width, (y - box.y) / box.height];
    if (right < 0 || right >= 1 || down < 0 || down >= 1) continue;
    const bands = noise.wavelengths.length;
    return { column: Math.floor(right * noise.power.length), band: bands - 1 - Math.floor(down * bands) };
  }
  return null;
}

/**
 * @param {number} value
 * @returns {string} with three digits
 */
export function short(value) {
  return String(Number(value.toPrecision(3)));
}

/**
 * The sentence about a cell.
 * @param {Noise} noise
 * @param {{column: number, band: number}} at
 * @param {Say} say
 */
export function reading(noise, { column, band }, say) {
  const step = noise.steps[column];
  const wavelength = noise.wavelengths[band];
  const values = {
    step: step + 1, steps: noise.sigmas.length - 1, sigma: short(noise.sigmas[step]),
    power: short(noise.power[column][band]), gamma: short(noise.gamma[column][band]),
    wavelength: wavelength === null ? "" : short(wavelength),
  };
  const sentence = say(wavelength === null ? "flat" : "cell", values);
  return noise.std[column] === 0 ? `${sentence}; ${say("noNoise")}` : sentence;
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {Noise} noise
 * @param {Say} say
 * @param {{text: string, line: string}} theme CSS colours
 * @param {{column: number, band: number} | null} at the cell under the mouse
 */
export function draw(canvas, noise, say, theme, at = null) {
  const width = canvas.clientWidth;
  if (!width) return; // not shown
  const boxes = layout(width, noise);
  const scale = 2 * Math.max(1, window.devicePixelRatio); // nodes are often zoomed in
  canvas.width = width * scale;
  canvas.height = boxes.height * scale;
  canvas.style.height = `${boxes.height}px`;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(scale, scale);
  context.font = FONT;

  drawCells(context, boxes.power, noise, noise.power, powerColor);
  drawCells(context, boxes.gamma, noise, noise.gamma, gammaColor);
  drawAmount(context, boxes.amount, noise, theme);
  drawLegend(context, boxes.legend, theme);
  drawWavelengths(context, boxes.power, noise, say, theme);
  const write = writer(context, theme);
  write(say("colour"), boxes.power.x, 0, "left", boxes.power.width);
  write(say("progress"), boxes.gamma.x, 0, "left", boxes.gamma.width);
  write(say("amount"), LEFT - 4, boxes.amount.y + 4, "right", LEFT - 4);
  write(`≤ ${Number(Math.max(...noise.std).toPrecision(2))}`, LEFT - 4, boxes.amount.y + 16, "right", LEFT - 4);
  const under = boxes.amount.y + AMOUNT + 2;
  write(`${say("step")} 1`, boxes.amount.x, under, "left", 60);
  write(String(noise.sigmas.length - 1), boxes.amount.x + boxes.amount.width, under, "right", 60);
  if (boxes.spectrum) {
    write(say(noise.first ? "result" : "resultAlone"), LEFT, boxes.spectrum.y - TITLE, "left", boxes.spectrum.width);
    drawSpectrum(context, boxes.spectrum, noise, theme);
  }
  if (at) {
    context.strokeStyle = "black";
    for (const box of [boxes.power, boxes.gamma]) {
      const { x, y, width, height } = cell(box, noise, at.column, at.band);
      context.strokeRect(x - 0.5, y - 0.5, width + 1, height + 1);
    }
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {{text: string}} theme
 * @returns {(text: string, x: number, y: number, align: CanvasTextAlign, most: number) => void} `y` is the text's top,
 *   `most` its greatest width
 */
function writer(context, theme) {
  return (text, x, y, align, most) => {
    Object.assign(context, { fillStyle: theme.text, textAlign: align, textBaseline: "top" });
    context.fillText(text, x, y + 1, most);
  };
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Box} box
 * @param {Noise} noise
 * @param {number[][]} table
 * @param {(value: number) => number[]} color
 */
function drawCells(context, box, noise, table, color) {
  table.forEach((row, column) => {
    row.forEach((value, band) => {
      if (noise.modes[band] === 0) return; // the picture is too small to have it
      const { x, y, width, height } = cell(box, noise, column, band);
      context.fillStyle = `rgb(${color(value).join(" ")})`;
      context.fillRect(x, y, width, height);
    });
  });
}

/**
 * The amount of noise: a bar for each step, in a scale that stays while knobs move.
 * @param {CanvasRenderingContext2D} context
 * @param {Box} box
 * @param {Noise} noise
 * @param {{text: string, line: string}} theme
 */
function drawAmount(context, box, noise, theme) {
  context.fillStyle = theme.text;
  context.globalAlpha = 0.75;
  noise.std.forEach((std, column) => {
    const { x, width } = cell(box, noise, column, 0);
    const height = Math.min(1, std / MOST) * box.height;
    context.fillRect(x, box.y + box.height - height, Math.max(1, width - 1), height);
  });
  context.globalAlpha = 1;
  context.fillStyle = theme.line;
  context.fillRect(box.x, box.y + box.height, box.width, 1);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Box} box
 * @param {{text: string, line: string}} theme
 */
function drawLegend(context, box, theme) {
  for (let x = 0; x < box.width; x += 1) {
    context.fillStyle = `rgb(${powerColor(2 ** ((2 * x) / (box.width - 1) - 1)).join(" ")})`;
    context.fillRect(box.x + x, box.y, 1, box.height);
  }
  const write = writer(context, theme);
  write("× ½", box.x, box.y + box.height, "left", 30);
  write("× 1", box.x + box.width / 2, box.y + box.height, "center", 30);
  write("× 2", box.x + box.width, box.y + box.height, "right", 30);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Box} box
 * @param {Noise} noise
 * @param {Say} say
 * @param {{text: string, line: string}} theme
 */
function drawWavelengths(context, box, noise, say, theme) {
  const write = writer(context, theme);
  const edge = box.x - 4;
  write(say("fine"), edge, box.y - 4, "right", edge);
  write(say("coarse"), edge, box.y + box.height - 8, "right", edge);
  let last = box.y + box.height - 8;
  for (const wavelength of TICKS.slice().reverse()) {
    const bands = noise.wavelengths.map((value) => Math.abs(Math.log((value ?? Infinity) / wavelength)));
    const near = bands.indexOf(Math.min(...bands));
    if (bands[near] > 0.35) continue;
    const { y, height } = cell(box, noise, 0, near);
    const top = y + height / 2 - 5;
    if (last - top < 11 || top - box.y < 7) continue; // over another label
    write(`${wavelength} px`, edge, top, "right", edge);
    last = top;
  }
}

/**
 * Power per band in decades, coarse at the left.
 * @param {CanvasRenderingContext2D} context
 * @param {Box} box
 * @param {Noise} noise
 * @param {{text: string, line: string}} theme
 */
function drawSpectrum(context, box, noise, theme) {
  const curves = [noise.first, noise.spectrum].map((curve) => curve?.map((power) => Math.log10(Math.max(power, 1e-12))));
  const all = curves.flatMap((curve) => curve ?? []);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  context.strokeStyle = theme.line;
  context.strokeRect(box.x + 0.5, box.y + 0.5, box.width - 1, box.height - 1);
  curves.forEach((curve, which) => {
    if (!curve) return;
    context.beginPath();
    curve.forEach((power, band) => {
      const x = box.x + ((band + 0.5) / curve.length) * box.width;
      const y = box.y + box.height - 4 - ((power - low) / Math.max(high - low, 1e-9)) * (box.height - 8);
      if (band) context.lineTo(x, y);
      else context.moveTo(x, y);
    });
    context.setLineDash(which ? [] : [4, 3]);
    context.strokeStyle = which ? `rgb(${RED.join(" ")})` : theme.text;
    context.lineWidth = 1.5;
    context.stroke();
  });
  context.setLineDash([]);
  context.lineWidth = 1;
  const write = writer(context, theme);
  const bands = noise.wavelengths.length;
  let last = Infinity;
  for (const wavelength of TICKS) {
    const near = noise.wavelengths.findIndex((value) => value !== null && value <= wavelength);
    const x = box.x + ((near + 0.5) / bands) * box.width;
    if (near < 1 || last - x < TICK) continue; // over another label
    write(`${wavelength} px`, x, box.y + box.height, "center", TICK);
    last = x;
  }
}
