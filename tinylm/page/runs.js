"use strict";
/* The runs of a folder: how they descend from each other, their curves, what they wrote, also while they train. */

const FIGURES = {
  loss: "loss (nats)",
  bits_per_byte: "held-out bits per byte",
  reward_margin: "reward margin (nats)",
  preference_accuracy: "preference accuracy (share of pairs)",
  log_prob_chosen: "log-probability of chosen answers (nats)",
  log_prob_rejected: "log-probability of rejected answers (nats)",
  learning_rate: "learning rate",
  grad_norm: "gradient norm",
  tokens_per_second: "speed (tokens per second)",
  matmul_share: "speed (share of the measured matrix-product speed)",
};
const HELD_OUT = /^validation_/;
const SAMPLE = /^sample_(\d+)$/;
const ARROW = " -> "; // in a sample, between a prompt and its answer
const LOOK_AGAIN = 3000; // milliseconds
const SILENT = 600; // seconds without a line, after which a run may have stopped
const MOST_SAMPLES = 12; // of a prompt and a run, from the first to the last

/** The figures in rows, in the order of `FIGURES`, held-out ones after their own; others at the end. */
function figuresIn(rows) {
  const found = new Set(rows.flatMap((row) => Object.keys(row).filter((key) => Number.isFinite(row[key]))));
  const known = Object.keys(FIGURES);
  const rank = (key) => (known.indexOf(key.replace(HELD_OUT, "")) + 1 || 99) + (HELD_OUT.test(key) ? 0.5 : 0);
  found.delete("step");
  return [...found].sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
}

function figureName(key) {
  if (HELD_OUT.test(key)) return `held-out ${figureName(key.replace(HELD_OUT, ""))}`;
  return Object.hasOwn(FIGURES, key) ? FIGURES[key] : key.replaceAll("_", " ");
}

class Runs {
  constructor(place, tab) {
    [this.place, this.tab] = [place, tab];
    this.seen = []; // names in the order in which they came: a run keeps its line and its place in the tree
    this.items = new Map(); // of each run: {box, facts}
    this.read = new Map(); // of the runs that were chosen: {changed, rows, not_numbers, notes}
    this.wish = "loss"; // the figure that was chosen last; a run may not have it
    this.figure = make("select", { "aria-label": "Figure", onchange: () => this.draw(this.figure.value) });
    this.log = make("input", { type: "checkbox", onchange: () => this.draw() });
    this.smooth = make("input", { type: "checkbox", onchange: () => this.draw() });
    [this.tree, this.more] = [make("div", { class: "tree" }), make("p", { class: "hint" })];
    this.chart = new Chart();
    this.notes = make("ul", { class: "hint", role: "list", "aria-label": "Notes on the chart" });
    [this.samples, this.different] = [make("div"), make("div", { class: "scroll" })];
    place.append(this.tree, this.more,
      make("div", { class: "row" }, labelled("figure", this.figure), labelled("log scale", this.log),
        labelled(`smooth (the median of ${WINDOW} values)`, this.smooth)),
      this.chart.element, this.notes, make("h2", {}, "What it wrote"), this.samples,
      make("h2", {}, "Settings that differ"), this.different);
  }

  /** Shows the tab as soon as there are runs, and looks for new steps and runs while it is open. */
  async start() {
    this.tab.addEventListener("focus", () => this.look());
    while (this.runs !== null) {
      if (!document.hidden && (this.tab.hidden || !this.place.hidden)) await this.look();
      await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN));
    }
  }

  /** Asks for the runs, and for the rows of those that are chosen and have new ones. */
  async look() {
    try {
      const { runs, left_out } = await (await ask("page/runs")).json();
      if (!runs) return void (this.runs = null); // the server watches no folder
      this.update(runs);
      this.more.textContent = left_out ? `These are the newest; ${left_out} more are in the folder.` : "";
      await Promise.all(this.shown.map((run) => this.readRows(run)));
      this.draw();
      if (this.hasFailed) trouble("");
      this.hasFailed = false;
    } catch (error) {
      this.hasFailed = !this.tab.hidden || !this.runs; // nobody asked for runs while there are none
      if (this.hasFailed) trouble(error.message);
    }
  }

  async readRows({ name, changed }) {
    if (this.read.get(name)?.changed === changed) return;
    const path = name.split("/").map(encodeURIComponent).join("/");
    try {
      this.read.set(name, { changed, ...(await (await ask(`page/runs/${path}`)).json()) });
    } catch (error) {
      if (!error.code) throw error; // the server went away
      this.read.set(name, { changed, rows: [], not_numbers: {}, notes: [error.message] });
    }
  }

  /** The chosen runs in the order of the tree, with what was read of them. */
  get shown() {
    return [...this.tree.querySelectorAll("input:checked")].map(({ value }) => ({ place: this.seen.indexOf(value),
      ...this.read.get(value), ...this.runs.find(({ name }) => name === value) }));
  }

  /** The tree of runs as they are now. It is built again only if a run came, went or got a parent. */
  update(runs) {
    const isFirst = !this.seen.length, was = this.shape;
    this.shape = JSON.stringify(runs.map(({ name, parent }) => [name, parent]).sort());
    this.runs = runs;
    if (runs.length) this.tab.hidden = false;
    for (const { name, changed } of [...runs].reverse()) { // they come newest first
      if (!this.seen.includes(name)) this.seen.push(name);
      if (!this.items.has(name)) this.items.set(name, this.item(name, changed !== undefined));
    }
    if (isFirst && runs.length) this.items.get(runs[0].name).box.checked = true;
    for (const run of runs) this.items.get(run.name).facts.textContent = factsOf(run);
    if (this.shape === was) return;
    for (const name of this.items.keys()) if (!runs.some((run) => run.name === name)) this.items.delete(name);
    const focused = document.activeElement;
    this.tree.replaceChildren(this.branch(null) || "");
    focused?.focus();
  }

  item(name, hasMetrics) {
    const id = `run-${this.seen.indexOf(name)}`, facts = make("span", { class: "hint", id });
    const box = make("input", { type: "checkbox", "aria-describedby": id, onchange: () => this.look() });
    box.value = name;
    return { box: hasMetrics ? box : null, facts };
  }

  /** What was trained from a run, or from nothing that is here; null if that is nothing. */
  branch(parent) {
    const children = this.runs.filter((run) => run.parent === parent);
    children.sort((a, b) => this.seen.indexOf(b.name) - this.seen.indexOf(a.name));
    if (!children.length) return null;
    const title = parent === null ? "Runs" : `trained from ${parent}`;
    return make("ul", { role: "list", class: "runs", "aria-label": title }, ...children.map(({ name }) => {
      const { box, facts } = this.items.get(name);
      const label = box ? make("label", {}, box, sample(this.seen.indexOf(name)), name) : make("span", {}, name);
      return make("li", {}, label, " ", facts, this.branch(name));
    }));
  }

  draw(figure = this.wish) {
    this.wish = figure;
    const runs = this.shown.filter(({ rows }) => rows), keys = figuresIn(runs.flatMap(({ rows }) => rows));
    const key = keys.includes(this.wish) ? this.wish : keys[0];
    if (keys.join() !== [...this.figure.options].map(({ value }) => value).join()) {
      this.figure.replaceChildren(...keys.map((each) => make("option", { value: each }, figureName(each))));
    }
    if (key) this.figure.value = key;
    const lines = runs.map(({ name, place, rows }) => ({ name, place,
      points: rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.step, row[key]]) }));
    const isPositive = lines.every(({ points }) => points.every(([, value]) => value > 0));
    this.log.disabled = !isPositive;
    this.log.parentElement.title = isPositive ? "" : "needs values above 0 only";
    this.chart.element.hidden = !key;
    if (key) {
      this.chart.show(lines.filter(({ points }) => points.length), figureName(key), isPositive && this.log.checked,
        this.smooth.checked);
    }
    this.showNotes(runs, key);
    redraw(this.samples, samplesOf(runs), sampleTables);
    redraw(this.different, settingsOf(runs), settingsTable);
  }

  /** What the chart does not show. */
  showNotes(runs, key) {
    const notes = runs.flatMap(({ name, rows, not_numbers, notes }) => {
      const bad = not_numbers[key] ?? 0, isMissing = key && !bad && !rows.some((row) => Number.isFinite(row[key]));
      const own = [bad ? `${bad} ${bad > 1 ? "values are not numbers" : "value is not a number"}` : null,
        isMissing ? `no ${figureName(key)} recorded` : null];
      return [...notes, ...own.filter(Boolean)].map((note) => `${name}: ${note}`);
    });
    if (!key) notes.push(runs.length ? "The chosen runs have recorded no numbers yet." : "Choose a run.");
    redraw(this.notes, notes, () => notes.map((note) => make("li", {}, note)));
  }
}

/** Shows something again only if it is different, so that a person can read and select it while a run trains. */
function redraw(place, what, show) {
  const state = JSON.stringify(what);
  if (place.state !== state) place.replaceChildren(...show(what));
  place.state = state;
}

/** A run in a few words: how far it is, its last held-out loss, and when it wrote last. */
function factsOf({ changed, stage, step, num_steps, validation_loss, is_finished, seconds_ago, note }) {
  if (changed === undefined) return [`${stage ?? "a model"}, without metrics`, note].filter(Boolean).join(" · ");
  const of = !is_finished && Number.isFinite(num_steps) ? ` of ${whole(num_steps)}` : "";
  const last = new Date(Date.now() - 1000 * seconds_ago);
  const when = last.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  const held = validation_loss === null ? "is not a number" : short(validation_loss ?? 0);
  return [
    step === undefined ? "no step yet" : `step ${whole(step)}${of}`,
    validation_loss === undefined ? "" : `held-out loss ${held}`,
    is_finished ? `finished ${when}`
      : seconds_ago < SILENT ? `training, last line ${Math.round(seconds_ago)} s ago` : `not finished, last line ${when}`,
    note,
  ].filter(Boolean).join(" · ");
}

/** What runs wrote when they validated: [prompt, [{name, texts: [[step, text], ...]}, ...]] of each prompt. */
function samplesOf(runs) {
  const groups = new Map();
  for (const { name, rows } of runs) {
    const keys = rows.flatMap((row) => Object.keys(row).filter((key) => SAMPLE.test(key) && typeof row[key] === "string"));
    for (const key of new Set(keys)) {
      const written = rows.filter((row) => typeof row[key] === "string");
      const prompt = promptOf(written.map((row) => row[key])), start = prompt === null ? 0 : prompt.length + ARROW.length;
      const texts = spread(written, MOST_SAMPLES).map((row) => [row.step, row[key].slice(start)]);
      const title = prompt ?? `Text ${+SAMPLE.exec(key)[1] + 1}`;
      groups.set(title, [...(groups.get(title) || []), { name, texts, count: written.length }]);
    }
  }
  return [...groups];
}

/** The prompt that all these texts answer; null if they are not answers. */
function promptOf(texts) {
  const prompt = texts[0]?.split(ARROW)[0];
  return texts.length && texts.every((text) => text.startsWith(prompt + ARROW)) ? prompt : null;
}

/** Some of many, the first and the last among them. */
function spread(items, most) {
  if (items.length <= most) return items;
  return Array.from({ length: most }, (_, place) => items[Math.round((place * (items.length - 1)) / (most - 1))]);
}

function sampleTables(groups) {
  if (!groups.length) return [make("p", { class: "hint" }, "Nothing yet: a run writes samples when it validates.")];
  const title = ({ name, texts, count }) => name + (count > texts.length ? `, ${texts.length} of ${count}` : "");
  return groups.map(([prompt, written]) => make("table", {}, make("caption", { dir: "auto" }, prompt),
    ...written.map((run) => make("tbody", {}, make("tr", {}, make("th", { colspan: 2, scope: "rowgroup" }, title(run))),
      ...run.texts.map(([step, text]) => make("tr", {}, make("td", { class: "when" }, `step ${whole(step)}`),
        make("td", { class: "text", dir: "auto" }, text)))))));
}

/** The settings in which runs differ, as {names, rows: [[setting, [value, ...]], ...]}. */
function settingsOf(runs) {
  const known = runs.filter(({ settings }) => Object.keys(settings).length);
  const settings = [...new Set(known.flatMap((run) => Object.keys(run.settings)))];
  const value = (run, key) => (Object.hasOwn(run.settings, key) ? JSON.stringify(run.settings[key]) : "–");
  const rows = settings.map((key) => [key, known.map((run) => value(run, key))]);
  return { names: known.map(({ name }) => name), rows: rows.filter(([, values]) => new Set(values).size > 1) };
}

function settingsTable({ names, rows }) {
  const none = names.length > 1 ? "None." : "Choose two runs or more that have saved a state or a model.";
  if (!rows.length) return [make("p", { class: "hint" }, none)];
  const cells = (kind, texts, attributes = {}) => texts.map((text) => make(kind, attributes, text));
  return [make("table", {}, make("tr", {}, make("td"), ...cells("th", names, { scope: "col" })),
    ...rows.map(([key, values]) => make("tr", {}, make("th", { scope: "row" }, key), ...cells("td", values))))];
}
