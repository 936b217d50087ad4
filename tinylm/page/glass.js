"use strict";
/* The glass box: what the model computes when it reads a text. */

const SHOWN_CANDIDATES = 20;
const WRITTEN = 32; // tokens of the continuation
const MOST_WATCHED = 256; // attention of this many tokens is kept: layers * heads * T^2 / 2 numbers

class Glass {
  constructor(place, models) {
    this.models = models;
    this.model = null; // the chosen one, once it is in this page
    this.read = null; // {ids, logits: [T][V], watch: [T]}
    this.at = 0;
    this.turn = 0; // of the choices that a person makes: what was begun before the last one is dropped
    [this.layer, this.head] = [0, 0];
    this.input = limited(make("textarea", { rows: 3, "aria-label": "Text to read" }), () => this.source.mostLetters);
    this.input.value = "Once upon a time there was a";
    this.chosen = choice(models.map(({ about }) => about.name), { "aria-label": "Model" });
    this.chosen.addEventListener("change", () => this.forget());
    this.step = make("input", { type: "range", min: 0, "aria-label": "Step of the training",
      oninput: () => this.nameStep(), onchange: () => this.read && this.again() });
    this.stepName = make("output");
    this.steps = make("div", { class: "row" }, labelled("watch it learn: ", this.step), this.stepName);
    this.kind = choice(["as a text", "as a question in a chat"], { "aria-label": "How the text is read" });
    this.look = make("button", { onclick: () => this.start() }, "Read it");
    this.status = make("p", { class: "hint", role: "status" });
    this.sampling = samplingFields(() => this.read && this.showNext());
    this.tokens = make("div", { class: "tokens", role: "group", "aria-label": "Tokens" });
    this.next = make("div");
    this.lens = make("div", { class: "scroll" });
    this.attention = make("div");
    this.size = make("p");
    this.writes = make("p", { class: "text" });
    this.result = make("div", { hidden: true },
      make("h2", {}, "Tokens"),
      why("The text as the model reads it: pieces and their numbers. Choose one to see what happens there.", "",
        "tinylm/tokenizer/bpe.py"),
      this.tokens,
      make("h2", {}, "What comes next"),
      why("How likely the model finds each token after this place; what the sampling filters rule out is crossed out.",
        "P = softmax(z / temperature)", "tinylm/generation/sampling.py"),
      this.next,
      make("details", {}, make("summary", {}, "Sampling filters"), this.sampling),
      make("h2", {}, "What it would write"),
      why("The likeliest token, again and again.", "", "tinylm/generation/decoding.py"),
      this.writes,
      make("h2", {}, "Attention"),
      why("How much each token looks at the tokens before it, for each layer and head; choose one to enlarge it.",
        "softmax(q k / √D)", "tinylm/model/attention.py"),
      this.attention,
      make("h2", {}, "Logit lens"),
      why("What the model would say if it ended after this layer.", "head(norm(x))", "tinylm/model/model_tinylm.py"),
      this.lens,
      make("h2", {}, "Cache"),
      why("Keys and values of all tokens so far are kept, so that each is computed once.", "",
        "tinylm/model/kv_cache.py"),
      this.size);
    place.append(this.input, make("div", { class: "row" }, models.length > 1 ? this.chosen : null, this.kind, this.look),
      this.steps, this.status, this.result);
    this.showSteps();
  }

  get source() {
    return this.models.find(({ about }) => about.name === this.chosen.value);
  }

  /** What is shown is of another model than the chosen one. */
  forget() {
    this.turn++;
    this.read = null;
    this.result.hidden = true;
    this.status.textContent = "";
    this.showSteps();
  }

  /** The slider has a place for each snapshot of the model, and the last one for the model itself. */
  showSteps() {
    const count = this.source.snapshots.length;
    this.steps.hidden = count === 0;
    this.step.max = count;
    this.step.value = count;
    this.nameStep();
  }

  nameStep() {
    const step = this.source.snapshots[+this.step.value];
    this.stepName.textContent = step === undefined ? "the finished model" : `after step ${step.toLocaleString("en")}`;
  }

  /** The model that the choice and the slider mean; null if that fails, which the page says, or if another choice was
      made meanwhile. */
  async fetched() {
    const turn = ++this.turn;
    trouble("");
    this.status.textContent = "the model is fetched…";
    try {
      const model = await this.source.inPage(this.source.snapshots[+this.step.value] ?? null);
      return turn === this.turn ? model : null;
    } catch (error) {
      if (turn === this.turn) trouble(error.message);
      return null;
    } finally {
      if (turn === this.turn) this.status.textContent = "";
    }
  }

  /** Reads the same tokens once more: by the model at another step of its training. */
  async again() {
    const place = this.at, model = await this.fetched();
    if (model && (await this.readAll(this.read.ids, model))) this.choose(place);
  }

  async start() {
    const model = await this.fetched();
    if (!model) return;
    const { tokenizer } = model, text = this.input.value;
    if (text.length > model.mostLetters) {
      trouble(tooLong(text.length, model.mostLetters));
      return;
    }
    const isChat = this.kind.selectedIndex === 1;
    if (isChat && !tokenizer.canChat) {
      trouble("this model's chats are not in ChatML; read it as a text");
      return;
    }
    await this.readAll(isChat ? tokenizer.chat([{ role: "user", content: text }])
      : [...tokenizer.documentStart, ...tokenizer.encode(text)], model);
  }

  /** Reads tokens and shows what was computed; false if they cannot be read, or if another choice was made meanwhile. */
  async readAll(ids, model = this.model) {
    trouble("");
    const turn = ++this.turn;
    const { transformer, config } = model;
    const most = Math.min(config.context, MOST_WATCHED);
    if (!ids.length || ids.length > most) {
      trouble(`the text has ${ids.length} tokens; the glass box takes 1 to ${most}: ${ids.length ? "shorten it" : "type some"}`);
      return false;
    }
    const cache = transformer.newCache(), read = { ids, logits: [], watch: [] };
    let drawn = performance.now();
    for (const [place, id] of ids.entries()) {
      const watch = {};
      read.logits.push(transformer.read(id, cache, { watch }));
      read.watch.push(watch);
      if (performance.now() - drawn > 30) {
        this.status.textContent = `reading: ${place + 1} of ${ids.length} tokens`;
        await breathe();
        if (turn !== this.turn) return false;
        drawn = performance.now();
      }
    }
    this.model = model;
    this.status.textContent = `${ids.length} tokens`;
    this.read = read;
    this.at = ids.length - 1;
    this.size.textContent = `${ids.length} tokens × ${bytes(cache.bytesPerToken)} = ${bytes(ids.length * cache.bytesPerToken)}`;
    this.result.hidden = false;
    this.showTokens();
    this.choose(this.at);
    this.write(read);
    return true;
  }

  /** Continues what was read. */
  async write(read) {
    const { model, turn } = this, next = model.tokenizer.stream();
    this.writes.textContent = "";
    const settings = { ...DEFAULTS, temperature: 0, maxTokens: WRITTEN };
    for await (const id of model.continued(read.ids, settings, new AbortController().signal)) {
      if (turn !== this.turn) return;
      this.writes.textContent += next(id);
    }
    this.writes.textContent += next(null);
  }

  choose(place) {
    this.at = place;
    this.colourTokens();
    this.showNext();
    this.showAttention();
    this.showLens();
  }

  showTokens() {
    const { tokenizer } = this.model;
    this.tokens.replaceChildren(...this.read.ids.map((id, place) =>
      make("button", { class: "token", onclick: () => this.choose(place) },
        visible(tokenizer.shown(id)), make("small", {}, `${id}`))));
  }

  /** How much the chosen token looks at each, in the chosen head. */
  colourTokens() {
    const weights = this.read.watch[this.at].attention[this.layer][this.head];
    for (const [place, button] of [...this.tokens.children].entries()) {
      const share = place <= this.at ? weights[place] : 0;
      button.style.setProperty("background-color", `rgb(var(--heat) / ${(0.6 * share).toFixed(3)})`);
      button.setAttribute("aria-pressed", place === this.at);
      button.title = place <= this.at ? `seen with ${percent(share)}` : "comes later";
    }
  }

  showNext() {
    const { tokenizer } = this.model;
    const { ids, logits } = this.read;
    const found = candidates(logits[this.at], this.sampling.values(), ids.slice(0, this.at + 1));
    const actual = ids[this.at + 1];
    const shown = found.slice(0, SHOWN_CANDIDATES);
    if (actual !== undefined && !shown.some(({ id }) => id === actual)) shown.push(found.find(({ id }) => id === actual));
    const largest = found[0].probability;
    this.next.replaceChildren(
      make("p", { class: "hint" }, `${found.filter(({ removedBy }) => !removedBy).length} of ${found.length} tokens are `,
        "left to draw from. Choose one to read the text with it here."),
      make("ol", { class: "bars" }, ...shown.map(({ id, probability, removedBy }) => {
        const bar = make("span", { class: "bar" });
        bar.style.width = `${(100 * probability) / largest}%`;
        const classes = [removedBy ? "gone" : "", id === actual ? "chosen" : ""].join(" ").trim();
        const label = `${visible(tokenizer.shown(id))}, ${percent(probability)}${removedBy ? `, removed by ${removedBy}` : ""}`;
        return make("li", {}, make("button", { class: classes, title: removedBy ? `removed by ${removedBy}` : "",
          "aria-label": label, onclick: () => this.readAll([...ids.slice(0, this.at + 1), id]) },
          make("code", {}, visible(tokenizer.shown(id))), percent(probability), bar));
      })));
  }

  showLens() {
    const { transformer, tokenizer } = this.model;
    const rows = this.read.watch[this.at].stream.map((x, layer) => {
      const best = candidates(transformer.logits(x), { ...DEFAULTS, temperature: 1, topP: 1 }, []).slice(0, 3);
      return make("tr", {}, make("th", { scope: "row" }, layer ? `after layer ${layer}` : "embedding"),
        ...best.map(({ id, probability }) =>
          make("td", {}, make("code", {}, visible(tokenizer.shown(id))), ` ${percent(probability)}`)));
    });
    this.lens.replaceChildren(make("table", {}, ...rows));
  }

  showAttention() {
    const { config } = this.model;
    const buttons = [];
    for (let layer = 0; layer < config.layers; layer++) {
      for (let head = 0; head < config.heads; head++) {
        const isChosen = layer === this.layer && head === this.head;
        const name = `layer ${layer + 1}, head ${head + 1}`;
        buttons.push(make("button", { "aria-pressed": `${isChosen}`, "aria-label": name, title: name,
          onclick: () => { [this.layer, this.head] = [layer, head]; this.choose(this.at); } }, this.heatmap(layer, head)));
      }
    }
    const large = this.heatmap(this.layer, this.head);
    large.style.width = "min(100%, 24rem)";
    large.setAttribute("role", "img");
    large.setAttribute("aria-label", `attention of layer ${this.layer + 1}, head ${this.head + 1}: a row for each token`);
    const heads = make("div", { class: "heads" }, ...buttons);
    heads.style.gridTemplateColumns = `repeat(${config.heads}, minmax(2rem, 4.5rem))`; // a row for each layer
    this.attention.replaceChildren(heads,
      make("p", { class: "hint" }, `Layer ${this.layer + 1}, head ${this.head + 1}: each row is a token, each column one `,
        "that it may look at. The tokens above are coloured by the row of the chosen one."), large);
  }

  heatmap(layer, head) {
    const size = this.read.ids.length;
    const canvas = make("canvas", { width: size, height: size });
    const context = canvas.getContext("2d");
    const image = context.createImageData(size, size);
    const [red, green, blue] = getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(" ");
    for (let row = 0; row < size; row++) {
      const weights = this.read.watch[row].attention[layer][head];
      for (let column = 0; column <= row; column++) {
        image.data.set([+red, +green, +blue, Math.round(255 * weights[column])], 4 * (row * size + column));
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }
}

/** Blanks that can be seen. */
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}
