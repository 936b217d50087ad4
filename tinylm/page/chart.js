"use strict";
/* Lines over steps in one chart, and their values at a step that a pointer or the keyboard chooses. */

const STROKES = ["#1d70d6", "#c2410c", "#15803d", "#c026d3", "#b45309", "#0e7490"]; // seen on light and on dark
const DASHES = ["", "7 3", "2 3", "9 3 2 3"]; // so that nobody needs the colours to tell lines apart
const [LEFT, RIGHT, TOP, BOTTOM] = [56, 12, 14, 26]; // pixels around the lines
const FEW = 30; // values of a line that is drawn with dots
const WINDOW = 7; // values of the running median, as in the report of a run

class Chart {
  constructor() {
    this.lines = []; // {name, place, points: [[step, value], ...]} with rising steps
    this.at = null; // the chosen step; null shows the last values
    this.axes = svg("g", {});
    this.cursor = svg("g", { class: "cursor" });
    this.picture = svg("svg", { class: "chart", role: "slider", tabindex: 0 }, this.axes, this.cursor);
    this.heading = make("p", { class: "hint" });
    this.values = make("ul", { role: "list", class: "values" });
    this.element = make("figure", {}, this.picture, make("figcaption", {}, this.heading, this.values));
    this.picture.onpointermove = this.picture.onpointerdown = (event) => this.point(event);
    this.picture.onpointerleave = (event) => event.pointerType === "mouse" && this.choose(null);
    this.picture.onkeydown = (event) => this.key(event);
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(this.picture);
  }

  /** Draws other lines, or the same ones with new points. The chosen step stays. */
  show(lines, name, isLog, isSmooth) {
    Object.assign(this, { lines, name, isLog, isSmooth });
    this.steps = [...new Set(lines.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    this.picture.setAttribute("aria-label", `${name} by step`);
    this.draw();
  }

  draw() {
    const { width, height } = this.picture.getBoundingClientRect();
    if (!width || !this.lines.length) return;
    const values = this.lines.flatMap(({ points }) => points.map(([, value]) => value));
    const up = (value) => (this.isLog ? Math.log10(value) : value);
    const [x0, x1] = extent(this.steps), [low, high] = extent(values.map(up));
    this.stepAt = (x) => x0 + ((x - LEFT) / (width - LEFT - RIGHT)) * (x1 - x0);
    this.x = (step) => LEFT + ((step - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
    this.y = (value) => TOP + ((high - up(value)) / (high - low)) * (height - TOP - BOTTOM);
    this.picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const across = ticks(x0, x1, width / 80).filter((step) => Number.isInteger(step));
    this.axes.replaceChildren(
      ...(this.isLog ? logTicks(10 ** low, 10 ** high) : ticks(low, high, height / 60)).flatMap((value) => [
        svg("line", { x1: LEFT, x2: width - RIGHT, y1: this.y(value), y2: this.y(value) }),
        svg("text", { x: LEFT - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value)),
      ]),
      svg("text", { x: LEFT - 6, y: height - 7, "text-anchor": "end" }, "step"),
      ...across.map((step) => svg("text", { x: this.x(step), y: height - 7, "text-anchor": "middle" }, whole(step))),
      ...this.lines.flatMap((line) => this.drawn(line)),
    );
    this.mark();
  }

  /** A line; with dots if it has few points; the running median over a faint line if it is to be smooth. */
  drawn({ points, place }) {
    const at = ([step, value]) => `${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`;
    const path = (some, attributes) => svg("path", { ...stroke(place), ...attributes, d: `M${some.map(at).join("L")}` });
    const dots = points.length <= FEW ? points.map((point) => this.dot(point, place, 2.5)) : [];
    return this.isSmooth ? [path(points, { class: "faint" }), path(smoothed(points), {})] : [path(points, {}), ...dots];
  }

  dot([step, value], place, r) {
    return svg("circle", { cx: this.x(step), cy: this.y(value), r, fill: stroke(place).stroke });
  }

  point(event) {
    if (!this.stepAt) return;
    this.choose(this.stepAt(event.clientX - this.picture.getBoundingClientRect().left));
  }

  key(event) {
    const last = this.steps.length - 1;
    const place = this.at === null ? last : this.steps.indexOf(nearest(this.steps, this.at));
    const moves = { ArrowRight: place + 1, ArrowLeft: place - 1, PageUp: place + 10, PageDown: place - 10 };
    const next = { ...moves, Home: 0, End: last };
    if (event.key === "Escape") this.choose(null);
    else if (event.key in next) this.choose(this.steps[Math.min(last, Math.max(0, next[event.key]))]);
    else return;
    event.preventDefault();
  }

  /** Shows the values at the recorded step that is nearest to this one. */
  choose(step) {
    this.at = step === null ? null : nearest(this.steps, step);
    this.mark();
  }

  /** The line at the chosen step, and the value of each run there: at its recorded step that is nearest. */
  mark() {
    const at = this.at === null ? null : nearest(this.steps, this.at);
    const found = this.lines.map((line) => ({ ...line, point: at === null ? line.points.at(-1)
      : nearest(line.points, at, ([step]) => step) }));
    const words = found.map(({ name, place, point: [step, value] }) =>
      ({ name, place, said: short(value) + (step === at ? "" : ` at step ${whole(step)}`) }));
    this.cursor.replaceChildren(...(at === null ? [] : [
      svg("line", { x1: this.x(at), x2: this.x(at), y1: TOP, y2: this.picture.viewBox.baseVal.height - BOTTOM }),
      ...found.map(({ point, place }) => this.dot(point, place, 4.5))]));
    this.heading.textContent = `${this.name}: ${at === null ? "the last values" : `step ${whole(at)}`}`;
    this.values.replaceChildren(...words.map(({ name, place, said }) =>
      make("li", {}, sample(place), `${name}: `, make("strong", {}, said))));
    const text = words.map(({ name, said }) => `${name}: ${said}`).join("; ");
    const range = { valuemin: this.steps[0], valuemax: this.steps.at(-1), valuenow: at ?? this.steps.at(-1),
      valuetext: `${at === null ? "last values" : `step ${whole(at)}`}; ${text}` };
    for (const [name, value] of Object.entries(range)) this.picture.setAttribute(`aria-${name}`, value);
  }
}

function svg(kind, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function stroke(place) {
  return { stroke: STROKES[place % STROKES.length], "stroke-dasharray": DASHES[place % DASHES.length] };
}

/** A piece of the line that a run has. */
function sample(place) {
  return svg("svg", { viewBox: "0 0 36 12", "aria-hidden": "true" }, svg("path", { d: "M0 6H36", ...stroke(place) }));
}

/** The one that is nearest to a wanted number. */
function nearest(items, wanted, of = (item) => item) {
  return items.reduce((best, item) => (Math.abs(of(item) - wanted) < Math.abs(of(best) - wanted) ? item : best));
}

/** The least and the most of some numbers; around one number there is some room. */
function extent(values) {
  const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  return least < most ? [least, most] : [least - (Math.abs(least) || 1) / 2, most + (Math.abs(most) || 1) / 2];
}

/** Round numbers between two others: at most about `count` of them. */
function ticks(least, most, count) {
  const rough = (most - least) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((times) => times * unit >= rough) * unit;
  const first = Math.ceil(least / step - 1e-9);
  return Array.from({ length: Math.floor(most / step + 1e-9) - first + 1 }, (_, place) => (first + place) * step);
}

/** 1, 2 or 5 times a power of ten; if there are too few of these, round numbers. */
function logTicks(least, most) {
  const powers = ticks(Math.floor(Math.log10(least)), Math.ceil(Math.log10(most)), 1000).filter(Number.isInteger);
  const marks = powers.flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power))
    .filter((value) => value >= least && value <= most);
  return marks.length < 3 ? ticks(least, most, 5).filter((value) => value > 0)
    : marks.filter((_, place) => place % Math.ceil(marks.length / 7) === 0);
}

/** The median of the values around each one. Towards the ends the window shrinks and stays centred. */
function smoothed(points) {
  return points.map(([step], i) => {
    const reach = Math.min((WINDOW - 1) / 2, i, points.length - 1 - i);
    const values = points.slice(i - reach, i + reach + 1).map(([, value]) => value).sort((a, b) => a - b);
    return [step, values[reach]];
  });
}

function whole(step) {
  return step.toLocaleString("en");
}

function short(value) {
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e7) ? value.toExponential(2).replace(/\.?0+e\+?/, "e")
    : value.toLocaleString("en", { maximumSignificantDigits: 4 });
}
