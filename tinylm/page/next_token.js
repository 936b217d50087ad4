"use strict";
/* The distribution of the next token, and what each sampling filter takes away from it. */

const SHOWN_CANDIDATES = 20;
const FILTERS = ["repetitionPenalty", "temperature", "topK", "topP", "minP"];

class NextToken {
  constructor(glass) {
    this.glass = glass;
    this.sampling = samplingFields(() => glass.read && this.draw(), FILTERS);
    this.said = make("p", { class: "hint", role: "status" });
    this.follows = make("p");
    this.list = make("ol", { class: "bars" });
    const toolbar = make("div", { role: "toolbar", "aria-orientation": "vertical", "aria-label": "Next tokens" }, this.list);
    roving(toolbar);
    this.element = make("div", {}, make("details", {}, make("summary", {}, "Sampling filters, in the order in which they act"),
      this.sampling), this.said, this.follows, toolbar);
  }

  draw() {
    const { read: { ids, logits }, at } = this.glass;
    const settings = this.sampling.values(), before = ids.slice(0, at + 1), actual = ids[at + 1];
    const found = candidates(logits[at], settings, before);
    const shown = found.slice(0, SHOWN_CANDIDATES);
    if (actual !== undefined && !shown.some(({ id }) => id === actual)) shown.push(found.find(({ id }) => id === actual));
    this.said.textContent = removals(found, settings, new Set(before).size);
    this.tellWhatFollows(actual);
    const seen = settings.repetitionPenalty === 1 ? new Set() : new Set(before);
    const left = found.reduce((sum, each) => sum + (each.removedBy ? 0 : each.probability), 0);
    const notes = ({ id, probability, removedBy }) => [
      removedBy ? `removed by ${removedBy}` : `drawn with ${percent(probability / left)}`,
      ...(seen.has(id) ? ["penalised"] : []),
      ...(id === actual ? ["follows in the text"] : []),
    ].join(", ");
    this.list.replaceChildren(...shown.map((each) => this.row(each, notes(each), found[0].probability, each.id === actual)));
    tabStop(this.list, this.list.querySelector("button"));
  }

  row({ id, probability, removedBy }, note, largest, isActual) {
    const { model: { tokenizer }, read: { ids }, at } = this.glass;
    const bar = make("span", { class: "bar" });
    bar.style.width = `${(100 * probability) / largest}%`;
    const classes = [removedBy ? "gone" : "", isActual ? "chosen" : ""].join(" ").trim();
    return make("li", {}, make("button", { class: classes, "aria-label": `${isolated(tokenizer, id)}, ${percent(probability)}, ${note}`,
      onclick: () => this.branch([...ids.slice(0, at + 1), id]) },
    make("code", {}, piece(tokenizer, id)), make("span", {}, percent(probability)), bar, make("span", { class: "note" }, note)));
  }

  /** Reads the text with another token; the keyboard stays in the list, so that a person can walk along. */
  async branch(ids) {
    if (await this.glass.readAll(ids)) this.list.querySelector("button").focus();
  }

  tellWhatFollows(actual) {
    const { model: { tokenizer }, read: { bits }, at } = this.glass;
    const surprise = bits[at + 1];
    this.follows.replaceChildren(...(actual === undefined
      ? ["Nothing follows here. Choose a token to read the text with it."]
      : ["“", piece(tokenizer, actual), `” follows in the text. Before all filters the model gives it ` +
        `${percent(2 ** -surprise)}: ${surprise.toFixed(2)} bits of surprise. Choose another token to read the text with it.`]));
  }
}

/** One sentence or two: how many tokens each filter took away. */
function removals(found, { temperature, repetitionPenalty }, seen) {
  const number = (count) => count.toLocaleString("en");
  const penalty = repetitionPenalty === 1 ? "" : ` The repetition penalty changed ${number(seen)} tokens that occurred.`;
  if (temperature === 0) return `Temperature 0 is greedy: the likeliest of ${number(found.length)} tokens is taken.${penalty}`;
  const count = (name) => found.filter(({ removedBy }) => removedBy === name).length;
  const gone = ["top-k", "top-p", "min-p"].filter(count).map((name, place) => `${name}${place ? "" : " removed"} ${number(count(name))}`);
  return `${number(count(null))} of ${number(found.length)} tokens are left to draw from` +
    `${gone.length ? `: ${gone.join(", ")}.` : "; no filter removed any."}${penalty}`;
}
