"use strict";
/* A model that computes in this page: conversations in, pieces of text out. */

const DEFAULTS = { temperature: 0.7, topK: 0, topP: 0.9, minP: 0, repetitionPenalty: 1, maxTokens: 256, seed: "" };

class TooLong extends Error {}

class LocalModel {
  constructor(packed, canChat) {
    this.tokenizer = new Tokenizer(packed.tokenizer);
    this.transformer = new Transformer(packed.config, packed.tensors);
    this.config = packed.config;
    this.canChat = this.tokenizer.canChat && canChat; // else it continues text
    this.cache = this.transformer.newCache();
    this.mostLetters = Math.min(MOST_LETTERS, this.tokenizer.mostLetters(this.config.context));
    this.known = []; // the tokens whose keys and values the cache holds
    this.free = Promise.resolve(); // once the last answer is complete: they share the cache
  }

  /** Reads tokens, beginning behind those that are known already; returns the logits after the last. `notice` hears how
      far it is. */
  async read(ids, signal, notice = () => {}) {
    let common = 0;
    while (common < Math.min(this.known.length, ids.length - 1) && this.known[common] === ids[common]) common++;
    this.cache.length = common;
    this.known.length = common;
    let logits = null, drawn = performance.now(), said = "";
    for (let place = common; place < ids.length; place++) {
      logits = this.transformer.read(ids[place], this.cache, { wantsLogits: place === ids.length - 1 });
      this.known.push(ids[place]);
      if (performance.now() - drawn > 30) {
        if (place + 1 < ids.length) notice((said = `reading: ${place + 1} of ${ids.length} tokens`));
        await breathe();
        drawn = performance.now();
        if (signal.aborted) break;
      }
    }
    if (said) notice("");
    return signal.aborted ? null : logits;
  }

  /** The ids that follow, one at a time, until the model ends its answer, the limit, or the signal. */
  async *continued(prompt, settings, signal, notice) {
    const ids = [...prompt];
    const random = randomNumbers(settings.seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : +settings.seed);
    const end = Math.min(this.config.context, prompt.length + settings.maxTokens);
    let drawn = performance.now();
    while (ids.length < end) {
      const logits = await this.read(ids, signal, notice);
      if (signal.aborted) return;
      if (!isFiniteAll(logits)) throw new Error("the model computed something that is not a number");
      const id = draw(candidates(logits, settings, ids), random());
      if (this.tokenizer.stops.includes(id)) return;
      ids.push(id);
      yield id;
      if (performance.now() - drawn > 20) { // not for every token: a browser takes 4 ms for it
        await breathe();
        drawn = performance.now();
      }
    }
  }

  /** The answer to a conversation in pieces of text, once those before it are complete; `notice` hears what did not fit
      the context. */
  async *answer(messages, settings, signal, notice) {
    const before = this.free;
    let leave;
    this.free = new Promise((resolve) => (leave = resolve));
    try {
      await before;
      yield* this.answerNow(messages, settings, signal, notice);
    } finally {
      leave();
    }
  }

  async *answerNow(messages, settings, signal, notice) {
    const count = (fitting) => this.prompt(fitting).length;
    let left = "";
    const fitting = await fitted(messages, this.config.context, settings.maxTokens, count, (line) => notice((left = line)));
    const next = this.tokenizer.stream();
    const reading = (line) => notice(line || left);
    for await (const id of this.continued(this.prompt(fitting), settings, signal, reading)) yield next(id);
    yield next(null);
  }

  /** Token ids of the conversation; of its text, where the model continues text. */
  prompt(messages) {
    if (this.canChat) return this.tokenizer.chat(messages);
    return [...this.tokenizer.documentStart, ...this.tokenizer.encode(asText(messages))];
  }
}

function asText(messages) {
  return messages.map(({ content }) => content).join("\n");
}

/** The conversation without the oldest exchanges, so that an answer fits behind it; `count` tells how many tokens one
    has, and `notice` hears what was left out. */
async function fitted(messages, context, maxTokens, count, notice) {
  const budget = Math.max(context - maxTokens, Math.floor(context / 2));
  const system = messages.filter(({ role }) => role === "system");
  const all = messages.filter(({ role }) => role !== "system");
  let turns = all;
  for (;;) {
    const fitting = [...system, ...turns];
    if ((await count(fitting)) <= budget) {
      const dropped = all.length - turns.length;
      if (dropped) notice(`left out to fit the context: ${dropped} of the oldest messages`);
      return fitting;
    }
    const next = turns.findIndex(({ role }, place) => place > 0 && role === "user");
    if (next < 0) throw new TooLong(`this message is too long: the context leaves ${budget} tokens beside an answer; shorten the message`);
    turns = turns.slice(next);
  }
}
