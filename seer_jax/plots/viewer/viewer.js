// Browses the block maps that the page holds: JSON in #data, and for each phase and layer gzipped bytes in base64, which are
// decoded when they are first shown. The parts of the address behind # choose what is shown.
"use strict";

const MAGMA = ["#000004", "#180f3d", "#440f76", "#721f81", "#9e2f7f", "#cd4071", "#f1605d", "#fd9668", "#feca8d", "#fcfdbf"];
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const KINDS = ["true", "scores", "kept"];

const data = JSON.parse(document.getElementById("data").textContent);
const shown = { phase: 0, layer: 0, head: 0, row: null, column: null };
const cache = new Map();
const id = (name) => document.getElementById(name);

function failed(error) {
  const place = id("problem");
  place.hidden = false;
  place.textContent = `The maps can't be shown: ${error.message || error}. Open the page in a current browser.`;
  document.documentElement.dataset.state = "failed";
}
addEventListener("error", (event) => failed(event.error || event.message));
addEventListener("unhandledrejection", (event) => failed(event.reason));

/** [r, g, b] of 256 steps through the colours. */
function palette(colours) {
  const stops = colours.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, step) => {
    const place = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return stops[low].map((from, channel) => Math.round(from + (stops[low + 1][channel] - from) * (place - low)));
  });
}
const WEIGHTS = palette(MAGMA);
const SHARES = palette(CIVIDIS);

/** A colour of the style sheet as [r, g, b]. */
function themed(name) {
  const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

const phaseNow = () => data.phases[shown.phase];

/** How many blocks a row sees. */
const visible = (phase, row) => Math.floor(phase.last[row] / phase.blockSize) + 1;

/** Where the cells of each row start, and behind them the number of all cells. */
function starts(phase) {
  phase.starts ??= phase.last.reduce((sums, _, row) => [...sums, sums[row] + visible(phase, row)], [0]);
  return phase.starts;
}

/** The maps of a layer: one byte per cell of true and scores, one bit per cell of kept, heads one after the other. */
function layerMaps(phase, layer) {
  const name = `${phase.name}-${layer}`;
  if (!cache.has(name)) cache.set(name, decode(name, phase));
  return cache.get(name);
}

async function decode(name, phase) {
  const packed = Uint8Array.from(atob(id(name).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const cells = phase.heads * starts(phase).at(-1);
  return { true: bytes.subarray(0, cells), scores: bytes.subarray(cells, 2 * cells), kept: bytes.subarray(2 * cells) };
}

/** The byte of a cell; of kept, 0 or 1. */
function code(maps, kind, phase, head, row, column) {
  const at = head * starts(phase).at(-1) + starts(phase)[row] + column;
  return kind === "kept" ? (maps.kept[at >> 3] >> (at & 7)) & 1 : maps[kind][at];
}

/** The share of the row that a byte stands for: logarithmic from data.floor to 1; 0 is below. */
const share = (byte) => (byte === 0 ? 0 : data.floor ** (1 - (byte - 1) / data.steps));
const percent = (value) => `${+(100 * value).toPrecision(2)}%`;
const written = (byte) => (byte === 0 ? `below ${percent(data.floor)}` : percent(share(byte)));

/** Whether a scorer gives the block no score: while decoding the token's own block is always kept. */
const isOwn = (phase, row, column) => phase.name === "decode" && column === visible(phase, row) - 1;

function paint(canvas, columns, rows, colour) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const found = colour(row, column);
      if (found) image.data.set([...found, 255], 4 * (row * columns + column));
    }
  }
  context.putImageData(image, 0, 0);
}

/** Makes the three maps' plots, all alike. */
function makeMaps() {
  for (const figure of document.querySelectorAll("#maps figure")) {
    figure.insertAdjacentHTML(
      "beforeend",
      `<div class="plot"><p class="y"><span></span><b></b><span></span></p><div class="frame"><canvas tabindex="0" role="img"></canvas><i></i></div></div>
       <p class="x"><span></span><b></b><span></span></p>`,
    );
    const canvas = figure.querySelector("canvas");
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      point(
        Math.floor(((event.clientY - box.top) / box.height) * canvas.height),
        Math.floor(((event.clientX - box.left) / box.width) * canvas.width),
      );
    });
    canvas.addEventListener("focus", () => shown.row === null && point(phaseNow().last.length - 1, 0));
  }
}

/** What a row is called: the position of a token, or the number of a block of queries. */
const rowName = (phase, row) => (phase.name === "decode" ? phase.last[row] : row);

/** Writes the first value, the name and the last value of an axis. */
function label(axis, ...words) {
  [...axis.children].forEach((part, n) => (part.textContent = words[n]));
}

function drawMaps(maps) {
  const phase = phaseNow();
  const [kept, dropped] = [themed("--kept"), themed("--dropped")];
  for (const figure of document.querySelectorAll("#maps figure")) {
    const kind = figure.dataset.map;
    const canvas = figure.querySelector("canvas");
    paint(canvas, phase.columns, phase.last.length, (row, column) => {
      if (column >= visible(phase, row) || (kind === "scores" && isOwn(phase, row, column))) return null;
      const byte = code(maps, kind, phase, shown.head, row, column);
      return kind === "kept" ? (byte ? kept : dropped) : WEIGHTS[Math.round((255 * byte) / (data.steps + 1))];
    });
    const title = kind === "scores" ? `Map of the ${phase.scorer}` : figure.querySelector("figcaption").textContent;
    figure.querySelector("figcaption").textContent = title;
    label(figure.querySelector(".y"), rowName(phase, 0), phase.rowWord, rowName(phase, phase.last.length - 1));
    label(figure.querySelector(".x"), 0, "key block", phase.columns - 1);
    canvas.setAttribute("aria-label", `${title} of layer ${shown.layer}, ${phase.headWord} ${shown.head}. Arrows move the cell.`);
  }
}

function drawOverview() {
  const phase = phaseNow();
  const canvas = document.querySelector("#overview canvas");
  paint(canvas, phase.heads, phase.density.length, (layer, head) => SHARES[Math.round(255 * phase.density[layer][head])]);
  canvas.style.height = `${Math.min(30 * phase.density.length, 420)}px`;
  canvas.setAttribute("aria-label", "Share of the blocks that each layer and head keeps; the pickers above choose one.");
  label(document.querySelector("#overview .x"), 0, phase.headWord, phase.heads - 1);
  label(document.querySelector("#overview .y"), 0, "layer", phase.density.length - 1);
  mark(document.querySelector("#overview .chosen"), canvas, shown.layer, shown.head);
}

/** Puts a frame around a cell. */
function mark(frame, canvas, row, column) {
  const place = { left: (column + 0.5) / canvas.width, top: (row + 0.5) / canvas.height, width: 1 / canvas.width, height: 1 / canvas.height };
  for (const [side, part] of Object.entries(place)) frame.style[side] = `${100 * part}%`;
  frame.style.display = "block";
}

function summarize(maps) {
  const phase = phaseNow();
  let [all, held] = [0, 0];
  for (let row = 0; row < phase.last.length; row++) {
    for (let column = 0; column < visible(phase, row); column++) {
      const weight = share(code(maps, "true", phase, shown.head, row, column));
      all += weight;
      held += weight * code(maps, "kept", phase, shown.head, row, column);
    }
  }
  const own = phase.values ? ` Its ${phase.valueWord} is ${phase.values[shown.layer][shown.head].toPrecision(3)}.` : "";
  const mean = phase.density.flat().reduce((a, b) => a + b) / phase.density.flat().length;
  id("summary").textContent =
    `Layer ${shown.layer}, ${phase.headWord} ${shown.head} keeps ${percent(phase.density[shown.layer][shown.head])} of the blocks under ` +
    `${phase.policy} (all heads: ${percent(mean)}); they hold ${percent(held / all)} of its true map.${own}`;
}

/** Shows the values of a cell of all three maps. */
async function point(row, column) {
  const phase = phaseNow();
  shown.row = Math.max(0, Math.min(row, phase.last.length - 1));
  shown.column = Math.max(0, Math.min(column, phase.columns - 1));
  const [layer, head] = [shown.layer, shown.head];
  const maps = await layerMaps(phase, layer);
  if (phase !== phaseNow() || layer !== shown.layer || head !== shown.head || shown.row === null) return;
  for (const canvas of document.querySelectorAll("#maps canvas")) mark(canvas.nextElementSibling, canvas, shown.row, shown.column);
  const where = `${phase.rowWord} ${rowName(phase, shown.row)}, key block ${shown.column}`;
  if (shown.column >= visible(phase, shown.row)) {
    id("readout").textContent = `${where}: not visible, as it comes later`;
  } else {
    const [true_, scores, kept] = KINDS.map((kind) => code(maps, kind, phase, head, shown.row, shown.column));
    const outcome = isOwn(phase, shown.row, shown.column)
      ? "kept as the token's own block"
      : `${phase.scorer} ${written(scores)}, ${kept ? "kept" : "dropped"}`;
    id("readout").textContent = `${where}: true ${written(true_)}, ${outcome}`;
  }
}

/** Fills the pickers for the phase and sets them to what is shown. */
function setPickers() {
  const phase = phaseNow();
  const numbers = (count) => Array.from({ length: count }, (_, n) => new Option(n, n));
  id("phase").replaceChildren(...data.phases.map((one, n) => new Option(one.name, n)));
  id("layer").replaceChildren(...phase.layers.map((n) => new Option(n, n)));
  id("head").replaceChildren(...numbers(phase.heads));
  id("head-word").textContent = phase.headWord[0].toUpperCase() + phase.headWord.slice(1);
  for (const name of ["phase", "layer", "head"]) id(name).value = shown[name];
}

/** Shows other maps; a number beyond the last one stops there. */
async function show(changes) {
  Object.assign(shown, changes);
  shown.phase = Math.max(0, Math.min(shown.phase, data.phases.length - 1));
  const phase = phaseNow();
  shown.layer = Math.max(0, Math.min(shown.layer, phase.layers.length - 1));
  shown.head = Math.max(0, Math.min(shown.head, phase.heads - 1));
  const { layer, head } = shown;
  setPickers();
  history.replaceState(null, "", `#phase=${phase.name}&layer=${layer}&head=${head}`);
  const maps = await layerMaps(phase, layer);
  if (phase !== phaseNow() || layer !== shown.layer || head !== shown.head) return; // others were asked for meanwhile
  drawMaps(maps);
  drawOverview();
  summarize(maps);
  if (shown.row !== null) await point(shown.row, shown.column);
  document.documentElement.dataset.state = "ready";
}

/** What the address asks for. */
function asked() {
  const words = new URLSearchParams(location.hash.slice(1));
  const number = (name, otherwise) => (/^\d+$/.test(words.get(name)) ? Number(words.get(name)) : otherwise);
  const phase = data.phases.findIndex((one) => one.name === words.get("phase"));
  const cell = words.has("row") ? { row: number("row", 0), column: number("column", 0) } : {};
  return { phase: Math.max(0, phase), layer: number("layer", 0), head: number("head", 0), ...cell };
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
  const step = STEPS[event.key];
  if (step && event.target.closest?.("#maps")) point((shown.row ?? 0) + step[0], (shown.column ?? 0) + step[1]);
  else if (step) show({ layer: shown.layer + step[0], head: shown.head + step[1] });
  else if (event.key.toLowerCase() === "p") show({ phase: (shown.phase + 1) % data.phases.length });
  else return;
  event.preventDefault();
}

function start() {
  id("about").textContent = data.about;
  makeMaps();
  document.querySelectorAll("#scale canvas").forEach((canvas, n) => paint(canvas, 256, 1, (_, step) => [SHARES, WEIGHTS][n][step]));
  const decades = Math.round(-Math.log10(data.floor));
  document.querySelector("#scale div:nth-child(2) p").replaceChildren(
    ...Array.from({ length: decades + 1 }, (_, n) => Object.assign(document.createElement("span"), { textContent: percent(data.floor * 10 ** n) })),
  );
  for (const name of ["phase", "layer", "head"]) id(name).addEventListener("change", () => show({ [name]: Number(id(name).value) }));
  const overview = document.querySelector("#overview canvas");
  const cell = (event) => {
    const box = overview.getBoundingClientRect();
    return {
      layer: Math.floor(((event.clientY - box.top) / box.height) * overview.height),
      head: Math.floor(((event.clientX - box.left) / box.width) * overview.width),
    };
  };
  overview.addEventListener("click", (event) => show(cell(event)));
  overview.addEventListener("pointermove", (event) => {
    const { layer, head } = cell(event);
    const kept = phaseNow().density[layer]?.[head];
    if (kept !== undefined) overview.title = `layer ${layer}, ${phaseNow().headWord} ${head}: ${percent(kept)} kept`;
  });
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => show(asked()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show({}));
  return show(asked());
}

start();
