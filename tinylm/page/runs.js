"use strict";
/* The runs of a folder: their curves over the steps, several in one chart, also while they are being trained. */

const FIGURES = {
  loss: "loss",
  validation_loss: "loss on held-out data",
  bits_per_byte: "bits per byte on held-out data",
  learning_rate: "learning rate",
  grad_norm: "gradient norm",
  tokens_per_second: "tokens per second",
};
const STROKES = ["#1d70d6", "#c2410c", "#15803d", "#a21caf", "#b45309", "#0e7490"]; // seen on light and on dark
const DASHES = ["", "7 3", "2 3", "9 3 2 3"]; // so that nobody needs the colours to tell lines apart
const [WIDTH, HEIGHT, LEFT, BOTTOM] = [900, 340, 60, 28];
const LOOK_AGAIN = 3000; // milliseconds

class Runs {
  constructor(place, tab) {
    [this.place, this.tab] = [place, tab];
    this.rows = new Map(); // of the runs that are shown
    this.figure = choice(Object.values(FIGURES), { "aria-label": "Figure", onchange: () => this.draw() });
    this.list = make("ul", { class: "runs", "aria-label": "Runs" });
    this.chart = make("div");
    this.samples = make("div");
    this.different = make("div", { class: "scroll" });
    place.append(this.list, make("div", { class: "row" }, labelled("figure", this.figure)), this.chart,
      make("h2", {}, "What it wrote"), this.samples, make("h2", {}, "Settings that differ"), this.different);
  }

  /** Shows the tab if there are runs; from then on looks for new steps while the tab is open. */
  async start() {
    this.runs = (await (await ask("page/runs")).json()).runs;
    if (!this.runs.length) return;
    this.tab.hidden = false;
    this.list.replaceChildren(...this.runs.map(({ name }, place) => {
      const box = make("input", { type: "checkbox", checked: place === 0, onchange: () => this.look() });
      box.value = name;
      return make("li", {}, make("label", {}, box, sample(place), name));
    }));
    await this.look();
    setInterval(() => this.place.hidden || document.hidden || this.look(), LOOK_AGAIN);
  }

  get shown() {
    const names = [...this.list.querySelectorAll("input:checked")].map((box) => box.value);
    return this.runs.map((run, place) => ({ ...run, place })).filter(({ name }) => names.includes(name));
  }

  async look() {
    try {
      await Promise.all(this.shown.map(async ({ name }) => {
        const path = name.split("/").map(encodeURIComponent).join("/");
        this.rows.set(name, (await (await ask(`page/runs/${path}`)).json()).rows);
      }));
      this.draw();
    } catch (error) {
      trouble(error.message);
    }
  }

  draw() {
    const key = Object.keys(FIGURES)[this.figure.selectedIndex];
    const lines = this.shown.map(({ name, place }) => ({ name, place,
      points: (this.rows.get(name) || []).filter((row) => Number.isFinite(row[key])).map((row) => [row.step, row[key]]) }));
    this.chart.replaceChildren(chart(lines.filter(({ points }) => points.length), FIGURES[key]));
    this.showSamples();
    this.showSettings();
  }

  showSamples() {
    const written = this.shown.flatMap(({ name }) => (this.rows.get(name) || [])
      .filter((row) => typeof row.sample_0 === "string").map((row) => ({ name, ...row })));
    this.samples.replaceChildren(written.length
      ? make("table", {}, ...written.slice(-30).map(({ name, step, sample_0 }) =>
        make("tr", {}, make("th", { scope: "row" }, `${name}, step ${step}`), make("td", { class: "text" }, sample_0))))
      : make("p", { class: "hint" }, "Nothing yet: a run writes samples when it validates."));
  }

  showSettings() {
    const shown = this.shown.filter(({ settings }) => Object.keys(settings).length);
    const names = [...new Set(shown.flatMap(({ settings }) => Object.keys(settings)))];
    const differ = names.filter((name) => new Set(shown.map(({ settings }) => JSON.stringify(settings[name]))).size > 1);
    this.different.replaceChildren(differ.length
      ? make("table", {}, make("tr", {}, make("td"), ...shown.map(({ name }) => make("th", { scope: "col" }, name))),
        ...differ.map((name) => make("tr", {}, make("th", { scope: "row" }, name),
          ...shown.map(({ settings }) => make("td", {}, name in settings ? JSON.stringify(settings[name]) : "–")))))
      : make("p", { class: "hint" }, shown.length > 1 ? "None." : "Choose two runs or more that have left a model."));
  }
}

function svg(kind, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function stroke(place) {
  return { stroke: STROKES[place % STROKES.length], "stroke-dasharray": DASHES[Math.floor(place / STROKES.length) % DASHES.length] };
}

/** A piece of the line that a run has. */
function sample(place) {
  return svg("svg", { viewBox: "0 0 36 12", "aria-hidden": "true" }, svg("path", { d: "M0 6H36", ...stroke(place) }));
}

/** Round numbers between two others: about five of them. */
function ticks(least, most) {
  const rough = (most - least) / 5, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((times) => times * unit >= rough) * unit;
  const first = Math.ceil(least / step);
  return Array.from({ length: Math.floor(most / step + 1e-9) - first + 1 }, (_, place) => (first + place) * step);
}

function short(value) {
  return Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : `${+value.toPrecision(4)}`;
}

/** The lines in one chart, with words for those who do not see it. */
function chart(lines, name) {
  if (!lines.length) return make("p", { class: "hint" }, `No run that is chosen has recorded the ${name}.`);
  const all = lines.flatMap(({ points }) => points);
  const extent = (axis) => {
    const values = all.map((point) => point[axis]);
    const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    return least < most ? [least, most] : [least - (Math.abs(least) || 1) / 2, most + (Math.abs(most) || 1) / 2];
  };
  const [x0, x1] = extent(0), [y0, y1] = extent(1);
  const x = (value) => LEFT + ((value - x0) / (x1 - x0)) * (WIDTH - LEFT - 10);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - BOTTOM - 14);
  const label = (text, at) => svg("text", at, text);
  const parts = [
    ...ticks(y0, y1).flatMap((value) => [
      svg("line", { x1: LEFT, x2: WIDTH - 10, y1: y(value), y2: y(value) }),
      label(short(value), { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }),
    ]),
    ...ticks(x0, x1).map((value) => label(short(value), { x: x(value), y: HEIGHT - 8, "text-anchor": "middle" })),
    ...lines.map(({ points, place }) =>
      svg("path", { d: points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join(""), ...stroke(place) })),
  ];
  const words = lines.map(({ name: run, points }) => `${run}: ${short(points.at(-1)[1])} at step ${points.at(-1)[0]}`).join("; ");
  const picture = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${name} by step; ${words}` }, ...parts);
  return make("figure", {}, picture, make("figcaption", { class: "hint" }, `${name} by step. Last: ${words}.`));
}
