"use strict";
/* Attention: a picture for each layer and head, and one of them large, with the tokens beside it. */

const LARGEST_CELL = 34, SMALLEST_NAMED_CELL = 13; // pixels: below that, names would lie over each other

class AttentionView {
  constructor(glass) {
    this.glass = glass;
    this.cell = { row: 0, column: 0 }; // under the pointer or the keyboard
    this.withoutFirst = make("input", { type: "checkbox", onchange: () => this.repaint() });
    this.facts = make("p", { class: "hint" });
    this.heads = make("div", { class: "heads", role: "toolbar", "aria-label": "Heads of attention" });
    roving(this.heads, () => glass.model.config.heads);
    this.about = make("p", { class: "hint" });
    this.canvas = make("canvas", { onpointermove: (event) => this.tell(this.under(event)),
      onclick: (event) => { this.tell(this.under(event)); glass.choose(this.cell.row); } });
    this.frame = make("div", { class: "cell" });
    this.large = make("div", { class: "large", role: "application", tabindex: 0, onkeydown: (event) => this.key(event) });
    this.readout = make("p", { class: "readout", role: "status" });
    this.side = make("div", { class: "side" }, this.about, this.readout, this.large);
    this.element = make("div", {}, this.facts,
      make("div", { class: "row" }, make("label", {}, this.withoutFirst, "without the first token")),
      make("div", { class: "beside" }, make("div", { class: "scroll" }, this.heads), this.side));
    new ResizeObserver(() => requestAnimationFrame(() => glass.read && this.fit())).observe(this.side);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => glass.read && this.paint());
  }

  /** Shows another text or model. */
  draw() {
    const { layers, heads, keyHeads, headWidth, speeds } = this.glass.model.config;
    [this.layer, this.head] = [Math.min(this.layer ?? Math.floor(layers / 2), layers - 1), Math.min(this.head ?? 0, heads - 1)];
    this.facts.textContent = `This model: H = ${heads} query heads, K = ${keyHeads} key/value heads (KV), ` +
      `D = ${headWidth}. ${speeds ? "Queries and keys are turned by their positions (RoPE)." : "Positions are added to the embedding."}`;
    const corner = make("span"), each = heads / keyHeads;
    const groups = Array.from({ length: keyHeads }, (_, group) => make("small", {}, `KV ${group + 1}`));
    for (const group of groups) group.style.gridColumn = `span ${each}`;
    const rows = Array.from({ length: layers }, (_, layer) => [make("small", {}, `layer ${layer + 1}`),
      ...Array.from({ length: heads }, (_, head) => make("button", { "aria-label": `layer ${layer + 1}, head ${head + 1}`,
        onclick: () => this.glass.chooseHead(layer, head) }, make("canvas")))]);
    this.heads.style.gridTemplateColumns = `max-content repeat(${heads}, minmax(1.7rem, 4rem))`;
    this.heads.replaceChildren(corner, ...groups, ...rows.flat());
    const last = this.glass.read.ids.length - 1;
    this.cell = { row: last, column: last };
    this.paint();
  }

  /** The colours, of all heads and of what shows one of them. */
  repaint() {
    this.paint();
    this.glass.strip.paint();
  }

  paint() {
    const { heads } = this.glass.model.config;
    for (const [place, button] of [...this.heads.querySelectorAll("button")].entries()) {
      this.heatmap(button.firstChild, Math.floor(place / heads), place % heads);
    }
    this.mark();
  }

  /** Shows what is chosen: a head, and a token. */
  mark() {
    const { model: { config }, read: { ids } } = this.glass;
    const chosen = this.layer * config.heads + this.head, buttons = [...this.heads.querySelectorAll("button")];
    buttons.forEach((button, place) => button.setAttribute("aria-pressed", `${place === chosen}`));
    tabStop(this.heads, buttons[chosen]);
    this.heatmap(this.canvas, this.layer, this.head);
    this.about.textContent = this.describe();
    this.large.setAttribute("aria-label", `attention of layer ${this.layer + 1}, head ${this.head + 1}, ${ids.length} rows; ` +
      "the arrow keys go from cell to cell, Enter chooses the token of the row");
    this.fit();
    this.tell({ row: this.glass.at, column: Math.min(this.cell.column, this.glass.at) });
  }

  describe() {
    const { model: { config: { heads, keyHeads } }, read: { ids, watch } } = this.glass;
    const each = heads / keyHeads, group = Math.floor(this.head / each);
    const others = each === 1 ? "" : `, as heads ${group * each + 1} to ${group * each + each} do`;
    const first = watch.slice(1).reduce((sum, { attention }) => sum + attention[this.layer][this.head][0], 0) / (ids.length - 1);
    const sink = ids.length === 1 ? "" : ` The first token gets ${percent(first)} of its attention on average` +
      (first > 0.3 ? ": a head that finds nothing must put its weight somewhere, and often puts it there." : ".");
    const rest = this.withoutFirst.checked ? " The first token is left out: colours are shares of what it leaves." : "";
    return `Layer ${this.layer + 1}, head ${this.head + 1} uses key/value head ${group + 1}${others}. Each row is a token, ` +
      `each column one that it may look at; a click chooses the token of the row.${sink}${rest}`;
  }

  /** How much the token in `row` looks at each so far: shares of 1, or of what the first token leaves. */
  weights(row, layer = this.layer, head = this.head) {
    const weights = this.glass.read.watch[row].attention[layer][head];
    if (!this.withoutFirst.checked) return weights;
    const left = weights.subarray(1).reduce((sum, weight) => sum + weight, 0);
    return weights.map((weight, column) => (column && left ? weight / left : 0));
  }

  heatmap(canvas, layer, head) {
    const size = this.glass.read.ids.length;
    [canvas.width, canvas.height] = [size, size];
    const context = canvas.getContext("2d"), image = context.createImageData(size, size);
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ").map(Number);
    for (let row = 0; row < size; row++) {
      this.weights(row, layer, head).forEach((weight, column) =>
        image.data.set([...colour, Math.round(255 * weight)], 4 * (row * size + column)));
    }
    context.putImageData(image, 0, 0);
    this.smooth(canvas);
  }

  /** A picture with less than a pixel for each row is smoothed, else some rows would not be seen at all. */
  smooth(canvas) {
    canvas.classList.toggle("shrunk", canvas.clientWidth < canvas.width);
  }

  /** Makes the picture as large as there is room for, and names as many tokens as fit. */
  fit() {
    const { model: { tokenizer }, read: { ids } } = this.glass;
    const room = this.side.clientWidth - 4, names = Math.min(112, Math.round(0.3 * room));
    const size = Math.max(1, Math.min(LARGEST_CELL, (Math.min(room, 800) - names) / ids.length));
    this.hasAllNames = size >= SMALLEST_NAMED_CELL;
    const tracks = `${names}px repeat(${ids.length}, ${size}px)`;
    Object.assign(this.large.style, { gridTemplateColumns: tracks, gridTemplateRows: tracks });
    this.canvas.style.gridArea = this.frame.style.gridArea = "2 / 2 / -1 / -1";
    this.named = ids.map((id, place) => {
      const [row, column] = [make("span", { class: "row-name" }, piece(tokenizer, id)),
        make("span", { class: "column-name" }, piece(tokenizer, id))];
      row.style.gridRow = column.style.gridColumn = `${place + 2}`;
      return { row, column };
    });
    this.large.replaceChildren(this.canvas, this.frame, ...this.named.flatMap(({ row, column }) => [row, column]));
    this.smooth(this.canvas);
    this.tell(this.cell);
  }

  under({ offsetX, offsetY }) {
    const most = this.glass.read.ids.length, { clientWidth, clientHeight } = this.canvas;
    const place = (offset, length) => Math.max(0, Math.min(most - 1, Math.floor((offset / length) * most)));
    return { row: place(offsetY, clientHeight), column: place(offsetX, clientWidth) };
  }

  key(event) {
    const { row, column } = this.cell, last = this.glass.read.ids.length - 1;
    const to = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, row] }[event.key];
    if (event.key === "Enter" || event.key === " ") this.glass.choose(row);
    else if (!to || event.altKey || event.ctrlKey || event.metaKey) return;
    else if (Math.min(...to) >= 0 && Math.max(...to) <= last) this.tell({ row: to[0], column: to[1] });
    event.preventDefault();
  }

  /** Says in a sentence what a cell shows, and marks its place. */
  tell(cell) {
    const { model: { tokenizer }, read: { ids, watch }, at } = this.glass;
    const { row, column } = (this.cell = cell);
    this.frame.style.gridArea = `${row + 2} / ${column + 2}`;
    this.named.forEach((names, place) => {
      for (const [side, here] of [["row", row], ["column", column]]) {
        names[side].hidden = !this.hasAllNames && place !== here;
        names[side].classList.toggle("here", place === here);
      }
      names.row.classList.toggle("chosen", place === at);
    });
    const name = (place) => ["“", piece(tokenizer, ids[place]), `” (place ${place + 1})`];
    if (column > row) {
      this.readout.replaceChildren(...name(row), " cannot look at ", ...name(column), ", which comes later.");
      return;
    }
    const weight = watch[row].attention[this.layer][this.head][column];
    const rest = !this.withoutFirst.checked ? "" : column ? `: ${percent(this.weights(row)[column])} of what the first token leaves`
      : ", which is left out of the picture";
    this.readout.replaceChildren(...name(row), " looks at ", ...(row === column ? ["itself"] : name(column)), ` with ${percent(weight)}${rest}.`);
  }
}
