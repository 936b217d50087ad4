"use strict";
/* The glass box: what the model computes when it reads a text. */

const WRITTEN = 32; // tokens of the continuation
const MOST_WATCHED = 256; // attention of this many tokens is kept: layers * heads * T^2 / 2 numbers

class Glass {
  constructor(place, models) {
    this.models = models;
    this.model = null; // the chosen one, once it is in this page
    this.read = null; // {ids, logits: [T][V], watch: [T], bits: [T], cache}
    this.at = 0;
    this.turn = 0; // of the choices that a person makes: what was begun before the last one is dropped
    this.input = limited(make("textarea", { rows: 3, dir: "auto", "aria-label": "Text to read" }), () => this.source.mostLetters);
    this.chosen = choice(models.map(({ about }) => about.name), { "aria-label": "Model" });
    this.chosen.addEventListener("change", () => this.forget());
    this.step = make("input", { type: "range", min: 0, "aria-label": "Step of the training",
      oninput: () => this.nameStep(), onchange: () => this.read && this.again() });
    this.stepName = make("output");
    this.steps = make("div", { class: "row" }, labelled("watch it learn: ", this.step), this.stepName);
    this.kind = choice(["as a text", "as a question in a chat"], { "aria-label": "How the text is read" });
    this.look = make("button", { onclick: () => this.start() }, "Read it");
    for (const field of [this.input, this.kind]) field.addEventListener("input", () => this.markStale());
    this.status = make("p", { class: "hint", role: "status" });
    this.strip = new TokenStrip(this);
    this.next = new NextToken(this);
    this.attention = new AttentionView(this);
    this.lens = new LensView(this);
    this.size = make("p");
    this.writes = make("p", { class: "text", dir: "auto" });
    this.result = make("div", { hidden: true }, ...this.parts());
    place.append(this.input, make("div", { class: "row" }, models.length > 1 ? this.chosen : null, this.kind, this.look),
      this.steps, this.status, this.result);
    const question = models[0].prompts.at(-1);
    this.input.value = question ?? "Once upon a time, ";
    this.kind.selectedIndex = question === undefined ? 0 : 1;
    this.showSteps();
  }

  parts() {
    return [
      make("h2", {}, "Tokens"),
      why("The text as the model reads it: pieces and their numbers. ␣ is a blank, ⏎ a new line. Choose one to see what " +
        "happens there. A token that " +
        "the model found unlikely surprises it; a perplexity of 8 is as if it guessed among 8 tokens each time.",
      ["surprise = −log₂ P(token | tokens before it)", "perplexity = 2^(bits per token)"],
      "tinylm/tokenizer/bpe.py and tinylm/evaluation/bits_per_byte.py"),
      this.strip.element,
      make("h2", {}, "What comes next"),
      why("How likely each token is drawn after this place, at the temperature that is set; what the sampling filters rule out is " +
        "crossed out.",
        ["z = W_head · RMSNorm(x)", "P(i) = exp(z_i / temperature) / Σ_j exp(z_j / temperature)"],
        "tinylm/generation/sampling.py"),
      this.next.element,
      make("h2", {}, "What it would write"),
      why("The likeliest token, again and again.", ["token = argmax z"], "tinylm/generation/decoding.py"),
      this.writes,
      make("h2", {}, "Attention"),
      why("How much each token looks at the tokens before it, for each layer and head; choose one to enlarge it. Query heads " +
        "share the keys and values of a group.",
      ["w(t,s) = softmax over s of ( q_t · k_s / √D + m(t,s) )", "m(t,s) = 0 where s ≤ t, −∞ where s > t: no token sees a later one",
        "o_t = W_o [ Σ_s w(t,s) v_s ], the H heads side by side", "query head h uses key/value head ⌈h · K / H⌉"],
      "tinylm/model/attention.py and tinylm/model/model_tinylm.py"),
      this.attention.element,
      make("h2", {}, "Logit lens"),
      why("What the model would say if it ended after this layer, at temperature 1: the stronger the colour, the more likely. Choose one to look at its token.",
        ["P = softmax( W_head · RMSNorm(x) )", "RMSNorm(x) = x / √(mean(x²) + ε) · weight"], "tinylm/model/model_tinylm.py"),
      this.lens.element,
      make("h2", {}, "Cache"),
      why("Keys and values of all tokens so far are kept, so that each is computed once.",
        ["bytes of a token = 2 · layers · K · D · 4"], "tinylm/model/kv_cache.py"),
      this.size,
    ];
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

  /** Says that the results below belong to an earlier text. */
  markStale() {
    if (this.read) this.status.textContent = "The text is another one now: “Read it” shows it.";
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
    this.step.setAttribute("aria-valuetext", this.stepName.textContent);
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
    const cache = transformer.newCache(), read = { ids, logits: [], watch: [], cache };
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
    if (!read.logits.every((logits) => logits.every(Number.isFinite))) {
      trouble("the model computed something that is not a number; it cannot be shown");
      return false;
    }
    this.model = model;
    this.status.textContent = `${ids.length} tokens`;
    this.read = Object.assign(read, { bits: surprises(ids, read.logits) });
    this.at = ids.length - 1;
    this.size.textContent = `${ids.length} tokens × ${bytes(cache.bytesPerToken)} = ${bytes(ids.length * cache.bytesPerToken)}`;
    this.result.hidden = false;
    this.attention.draw();
    this.strip.draw();
    this.next.draw();
    this.lens.draw();
    this.write();
    return true;
  }

  /** Continues what was read, with its cache. */
  async write() {
    const { model: { transformer, tokenizer }, read } = this, next = tokenizer.stream();
    let logits = read.logits.at(-1);
    this.writes.textContent = "";
    for (let count = 0; count < WRITTEN && read.cache.length < transformer.config.context; count++) {
      const [{ id }] = likeliestOf(logits, 1);
      if (tokenizer.stops.includes(id)) break;
      this.writes.textContent += next(id);
      logits = transformer.read(id, read.cache);
      await breathe();
      if (read !== this.read) return;
    }
    this.writes.textContent += next(null);
  }

  choose(place) {
    this.at = place;
    this.attention.mark();
    this.strip.paint();
    this.next.draw();
    this.lens.mark();
  }

  chooseHead(layer, head) {
    Object.assign(this.attention, { layer, head });
    this.attention.mark();
    this.strip.paint();
  }
}
