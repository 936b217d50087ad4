"use strict";
/* The logit lens: what the model would say if it ended after a layer, for each layer and token (nostalgebraist 2020). */

class LensView {
  constructor(glass) {
    this.glass = glass;
    this.grid = make("table", { class: "lens", role: "grid", "aria-label": "Likeliest token after each layer, at each token" });
    this.readout = make("p", { class: "readout" });
    this.chosen = make("div", { class: "scroll" });
    roving(this.grid, () => glass.read.ids.length);
    this.element = make("div", {}, (this.scroller = make("div", { class: "scroll" }, this.grid)), this.readout, this.chosen);
  }

  /** Shows another text or model; the cells are filled while a person looks at the rest. */
  async draw() {
    const { read, model: { tokenizer, config } } = this.glass, { ids } = read;
    const name = (id) => (id === undefined ? "" : piece(tokenizer, id));
    this.best = ids.map(() => []);
    this.rows = Array.from({ length: config.layers + 1 }, (_, layer) => ids.map((_, place) => {
      const tell = () => this.tell(layer, place);
      return make("button", { class: "heat", onclick: () => this.glass.choose(place), onpointerenter: tell, onfocus: tell }, "…");
    }));
    this.grid.replaceChildren(
      make("tr", {}, make("th", { scope: "row" }, "at the token"), ...ids.map((id) => make("th", { scope: "col" }, name(id)))),
      ...this.rows.map((cells, layer) => make("tr", {}, make("th", { scope: "row" }, afterLayer(layer)),
        ...cells.map((cell) => make("td", {}, cell)))),
      make("tr", {}, make("th", { scope: "row" }, "really follows"), ...ids.map((_, place) => make("td", {}, name(ids[place + 1])))));
    this.mark();
    let drawn = performance.now();
    for (const place of ids.keys()) {
      for (const layer of this.rows.keys()) {
        this.fill(layer, place);
        if (performance.now() - drawn < 30) continue;
        await breathe();
        if (read !== this.glass.read) return;
        drawn = performance.now();
      }
    }
  }

  /** The three likeliest tokens after a layer, as [{id, probability}]. */
  likeliest(layer, place) {
    const { model: { transformer }, read } = this.glass, { stream } = read.watch[place];
    const logits = layer === stream.length - 1 ? read.logits[place] : transformer.logits(stream[layer]);
    return (this.best[place][layer] ??= likeliestOf(softmax(logits), 3));
  }

  fill(layer, place) {
    const { tokenizer } = this.glass.model, cell = this.rows[layer][place];
    const [{ id, probability }] = this.likeliest(layer, place);
    cell.replaceChildren(piece(tokenizer, id));
    cell.style.setProperty("--share", probability.toFixed(3));
    cell.setAttribute("aria-label", this.words(layer, place, (each) => isolated(tokenizer, each)).join(""));
  }

  /** A sentence in parts, with the tokens as `name` gives them. */
  words(layer, place, name) {
    const said = this.likeliest(layer, place).flatMap(({ id, probability }) => ["“", name(id), `” ${percent(probability)}, `]);
    return [...said, `${afterLayer(layer)}, at “`, name(this.glass.read.ids[place]), `” (place ${place + 1})`];
  }

  tell(layer, place) {
    this.readout.replaceChildren(...this.words(layer, place, (id) => piece(this.glass.model.tokenizer, id)), ".");
  }

  /** Shows the chosen place: its column, and the numbers of its three likeliest tokens. */
  mark() {
    const { model: { tokenizer }, at } = this.glass;
    for (const cells of this.rows) cells.forEach((cell, place) => cell.setAttribute("aria-pressed", `${place === at}`));
    tabStop(this.grid, this.rows.at(-1)[at]);
    intoSight(this.scroller, this.rows[0][at].parentElement, this.grid.querySelector("th").offsetWidth);
    const heading = ["at the chosen token", "likeliest", "second", "third"].map((name) => make("th", { scope: "col" }, name));
    this.chosen.replaceChildren(make("table", {}, make("tr", {}, ...heading), ...this.rows.map((_, layer) =>
      make("tr", {}, make("th", { scope: "row" }, afterLayer(layer)), ...this.likeliest(layer, at).map(({ id, probability }) =>
        make("td", {}, make("code", {}, piece(tokenizer, id)), ` ${percent(probability)}`))))));
    this.tell(this.rows.length - 1, at);
  }
}

function afterLayer(layer) {
  return layer ? `after layer ${layer}` : "embedding";
}

/** The likeliest few, by one walk through all: sorting them would take longer. */
function likeliestOf(probabilities, count) {
  const found = [];
  probabilities.forEach((probability, id) => {
    if (found.length === count && probability <= found[count - 1].probability) return;
    const place = found.findIndex((each) => each.probability < probability);
    found.splice(place < 0 ? found.length : place, 0, { id, probability });
    found.length = Math.min(found.length, count);
  });
  return found;
}
