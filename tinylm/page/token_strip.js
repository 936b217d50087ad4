"use strict";
/* The tokens of a text in a row, coloured by the attention of the chosen one, or by how much each surprises. */

class TokenStrip {
  constructor(glass) {
    this.glass = glass;
    this.colour = choice(["attention", "surprise"], { onchange: () => this.paint() });
    this.box = make("div", { class: "tokens", role: "toolbar", "aria-label": "Tokens" });
    this.meaning = make("p", { class: "hint" });
    this.readout = make("p", { class: "readout" });
    this.whole = make("p");
    roving(this.box);
    this.element = make("div", {}, make("div", { class: "row" }, labelled("colour by", this.colour)), this.meaning,
      this.box, this.readout, this.whole);
  }

  draw() {
    const { model: { tokenizer }, read: { ids } } = this.glass;
    this.box.replaceChildren(...ids.map((id, place) => {
      const tell = () => this.tell(place);
      return make("button", { class: "token heat", onclick: () => this.glass.choose(place), onpointerenter: tell,
        onfocus: tell }, piece(tokenizer, id), make("small", {}, `${id}`));
    }));
    this.sum();
    this.paint();
  }

  /** How much the chosen token looks at each in the chosen head; or the surprise, of which a guess among all tokens
      alike has the most. */
  paint() {
    const { model, read, at } = this.glass;
    const isAttention = this.colour.selectedIndex === 0, most = Math.log2(model.config.vocabulary);
    this.meaning.textContent = isAttention
      ? "The stronger the colour, the more the chosen token looks at it, in the layer and head that are chosen below."
      : `The stronger the colour, the less likely it was; the strongest is for ${most.toFixed(1)} bits or more, as a blind guess has.`;
    const weights = this.glass.attention.weights(at);
    for (const [place, button] of [...this.box.children].entries()) {
      const share = isAttention ? weights[place] ?? 0 : Math.min(1, (read.bits[place] ?? 0) / most);
      button.style.setProperty("--share", share.toFixed(3));
      button.setAttribute("aria-pressed", `${place === at}`);
      button.setAttribute("aria-label", [`${isolated(model.tokenizer, read.ids[place])}, place ${place + 1}`,
        `id ${read.ids[place]}`, this.surprise(place), this.seen(place)].join(", "));
    }
    tabStop(this.box, this.box.children[at]);
    intoSight(this.box, this.box.children[at]);
    this.tell(at);
  }

  surprise(place) {
    const bits = this.glass.read.bits[place];
    return bits === null ? "nothing comes before it" : `${percent(2 ** -bits)} likely here: ${bits.toFixed(2)} bits of surprise`;
  }

  seen(place) {
    const { read, at, attention: { layer, head } } = this.glass, share = read.watch[at].attention[layer][head][place];
    return share === undefined ? "comes after the chosen token" : `seen with ${percent(share)} by the chosen token`;
  }

  /** Below the row, what is known of the token under the pointer or the keyboard. */
  tell(place) {
    const { model: { tokenizer }, read: { ids } } = this.glass, whole = wholeText(tokenizer, ids, place);
    this.readout.replaceChildren("“", piece(tokenizer, ids[place]),
      `” is token ${ids[place]}, at place ${place + 1} of ${ids.length}`,
      ...(whole ? [", a part of “", make("bdi", {}, ...visible(whole)), "”"] : []),
      `; ${this.surprise(place)}; ${this.seen(place)}.`);
  }

  /** The text as a whole; its first token is given, so it counts for nothing. */
  sum() {
    const bits = this.glass.read.bits.slice(1), sum = bits.reduce((total, each) => total + each, 0);
    const mean = sum / bits.length, isChat = this.glass.read.ids.includes(this.glass.model.tokenizer.imStart);
    this.whole.textContent = bits.length ? `All ${bits.length} tokens after the first: ${sum.toFixed(1)} bits, ` +
      `${mean.toFixed(2)} bits per token, perplexity ${short(2 ** mean)}.` +
      `${isChat ? " A chat model learns answers only, so questions and the marks around them surprise it." : ""}` : "";
  }
}

/** The surprise of each token in bits, -log2 P(token | those before it), by what the model said one place earlier; null
    for the first. */
function surprises(ids, logits) {
  return ids.map((id, place) => {
    if (!place) return null;
    const said = logits[place - 1], largest = said.reduce((a, b) => Math.max(a, b));
    const sum = said.reduce((total, value) => total + Math.exp(value - largest), 0);
    return (Math.log(sum) + largest - said[id]) / Math.LN2;
  });
}
