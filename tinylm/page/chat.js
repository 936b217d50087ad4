"use strict";
/* The chat: messages, an answer that streams in, and the ways to change one's mind. */

/** Name, least, most, step, what it does, and its equation; the filters in the order in which they act. */
const SETTINGS = {
  repetitionPenalty: ["repetition penalty", 0.01, 100, 0.05, "Makes tokens that occurred less likely; 1 is off.",
    "z → z / penalty if z > 0, else z · penalty"],
  temperature: ["temperature", 0, 5, 0.05, "Below 1 is more careful, above 1 bolder; 0 always takes the likeliest token (greedy).",
    "P = softmax(z / temperature)"],
  topK: ["top-k", 0, 1000, 1, "Draw only from the k likeliest tokens; 0 is off.", "keep z ≥ the k-th largest z"],
  topP: ["top-p", 0, 1, 0.01, "Draw only from the fewest tokens whose probabilities reach this sum; 1 is off.",
    "keep while the sum of larger P < p"],
  minP: ["min-p", 0, 1, 0.01, "Draw only from tokens at least this fraction as likely as the likeliest; 0 is off.",
    "keep P ≥ fraction · largest P"],
  maxTokens: ["most tokens", 1, 65536, 1, "Of an answer."],
  seed: ["seed", 0, 4294967295, 1, "The same seed, the same answer; empty: another one every time."],
};

/** The fields of these sampling settings; `.values()` reads them. A field that holds something else than it accepts says
    so, and its default is used. */
function samplingFields(changed = () => {}, keys = Object.keys(SETTINGS)) {
  const fields = keys.map((key) => {
    const [name, min, max, step, sentence, equation] = SETTINGS[key];
    const read = () => {
      const isEmpty = field.value === "" && !field.validity.badInput, number = +field.value;
      const isUsable = isEmpty ? DEFAULTS[key] === ""
        : field.value !== "" && number >= min && number <= max && (step !== 1 || Number.isInteger(number));
      wrong.textContent = isUsable ? "" : ` Accepted is ${min} to ${max}; ${DEFAULTS[key] === "" ? "none" : DEFAULTS[key]} is used.`;
      field.setAttribute("aria-invalid", `${!isUsable}`);
      return isUsable && !isEmpty ? number : DEFAULTS[key];
    };
    const field = make("input", { type: "number", min, max, step, value: DEFAULTS[key], name: key,
      oninput: () => { read(); changed(); } });
    const wrong = make("strong", { class: "wrong" });
    const hint = make("p", { class: "hint" }, sentence, equation ? make("code", {}, equation) : null, wrong);
    describe(field, hint);
    return { key, read, element: make("div", {}, labelled(name, field), hint) };
  });
  const box = make("div", { class: "settings" }, ...fields.map(({ element }) => element));
  box.values = () => Object.fromEntries(fields.map(({ key, read }) => [key, read()]));
  return box;
}

class Chat {
  /** `models` to choose from: one to talk with, and a second one beside it, which gets the same messages. */
  constructor(place, models) {
    this.models = models;
    this.messages = []; // {role: "user", content} or {role: "assistant", answers: [{name, content}]}
    this.stopping = null;
    this.list = make("ol", { class: "messages" });
    this.log = make("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: 0 }, this.list);
    this.examples = make("div", { class: "row", role: "group", "aria-label": "Questions to begin with" });
    this.notice = make("p", { class: "hint", role: "status", "aria-live": "polite" });
    const most = () => this.mostLetters;
    this.system = limited(make("textarea", { rows: 2, placeholder: "none" }), most);
    this.sampling = samplingFields();
    this.input = limited(make("textarea", { rows: 2, "aria-label": "Your message", placeholder: "Ask something…",
      onkeydown: (event) => this.key(event) }), most);
    this.send = make("button", { onclick: () => this.ask() }, "Send");
    this.stop = make("button", { onclick: () => this.stopping?.abort(), disabled: true }, "Stop");
    this.clear = make("button", { onclick: () => this.restart() }, "Start over");
    this.first = choice(models.map(({ about }) => about.name), { "aria-label": "model" });
    this.second = choice(["none", ...models.map(({ about }) => about.name)], { "aria-label": "model beside it" });
    place.append(
      models.length > 1 ? make("div", { class: "row" }, labelled("model", this.first), labelled("beside it", this.second))
        : "",
      this.log,
      make("div", { class: "below" }, // stays where it is while an answer grows
        this.examples,
        this.notice,
        this.input,
        make("div", { class: "row" }, this.send, this.stop, this.clear,
          make("span", { class: "hint" }, "Enter sends, Shift+Enter begins a line.")),
        make("details", {}, make("summary", {}, "Settings"), labelled("system prompt", this.system), this.sampling)),
    );
    this.first.addEventListener("change", () => this.show());
    this.show();
  }

  get chosen() {
    return [this.first.value, this.second.value]
      .map((name) => this.models.find(({ about }) => about.name === name))
      .filter((model) => model !== undefined);
  }

  get mostLetters() {
    return Math.min(...this.chosen.map(({ mostLetters }) => mostLetters));
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.stopping) this.ask();
  }

  ask(content = this.input.value) {
    if (!content.trim()) return;
    if (content.length > this.mostLetters) {
      trouble(tooLong(content.length, this.mostLetters));
      return;
    }
    this.input.value = "";
    this.messages.push({ role: "user", content });
    this.answer();
  }

  restart() {
    this.stopping?.abort();
    this.messages = [];
    this.notice.textContent = "";
    this.show();
    this.input.focus();
  }

  /** Answers what was said last, by each chosen model. What an answer has when it is stopped stays. */
  async answer() {
    trouble("");
    this.notice.textContent = "";
    const models = this.chosen;
    const message = { role: "assistant", answers: models.map(({ about }) => ({ name: about.name, content: "" })) };
    const histories = models.map(({ about }, column) => this.history(about.name, column));
    this.messages.push(message);
    const stopping = (this.stopping = new AbortController());
    this.show();
    const texts = this.list.lastChild.querySelectorAll(".text");
    const settings = this.sampling.values(), started = performance.now();
    let pieces = 0;
    const write = async (model, column) => {
      const answer = message.answers[column];
      const say = (line) => (this.notice.textContent = line);
      for await (const piece of model.answer(histories[column], settings, stopping.signal, say)) {
        answer.content += piece;
        texts[column].textContent = answer.content;
        this.toEnd();
        pieces++;
      }
    };
    const ends = await Promise.allSettled(models.map(write));
    for (const { reason } of ends) if (reason) trouble(reason.message);
    const silent = message.answers.filter(({ content }, column) => !content && ends[column].status === "fulfilled");
    if (silent.length && !stopping.signal.aborted) {
      this.notice.textContent = `${silent.map(({ name }) => name).join(" and ")} ended the answer at once`;
    }
    if (!message.answers.some(({ content }) => content)) this.messages = this.messages.filter((each) => each !== message);
    const speed = (1000 * pieces) / (performance.now() - started);
    if (!this.notice.textContent && pieces) {
      this.notice.textContent = stopping.signal.aborted ? "stopped" : `${speed.toFixed(0)} tokens/s`;
    }
    if (this.stopping === stopping) this.stopping = null;
    this.show();
    if (document.activeElement === document.body) this.input.focus(); // the button that had it is gone
    const isTooLong = ends.some(({ reason }) => reason instanceof TooLong) && !this.messages.includes(message);
    if (isTooLong && !this.input.value) this.edit(this.messages.length - 1); // back to the field, to be shortened
  }

  /** The conversation as the model of this name has had it; what it has not answered, the first one did. */
  history(name, column) {
    const system = this.system.value.trim() ? [{ role: "system", content: this.system.value }] : [];
    const own = (answers) => [answers[column], ...answers].find((answer) => answer?.name === name) || answers[0];
    const said = ({ role, content, answers }) => ({ role, content: content ?? own(answers).content });
    return [...system, ...this.messages.map(said)];
  }

  /** Answers a message of the person once more; what came after it is forgotten. */
  again(place) {
    this.messages = this.messages.slice(0, place + 1);
    this.answer();
  }

  edit(place) {
    this.input.value = this.messages[place].content;
    this.messages = this.messages.slice(0, place);
    this.show();
    this.input.focus();
  }

  show() {
    const isBusy = this.stopping !== null;
    this.send.disabled = isBusy;
    this.stop.disabled = !isBusy;
    const small = (name, does) => make("button", { class: "small", disabled: isBusy, onclick: does }, name);
    const part = (speaker, content, ...buttons) => make("div", { class: "part" },
      make("div", { class: "row" }, make("strong", {}, speaker), ...buttons.filter(Boolean)), make("div", { class: "text", dir: "auto" }, content));
    this.list.replaceChildren(
      ...this.messages.map(({ role, content, answers }, place) => {
        if (role === "user") {
          const isUnanswered = place === this.messages.length - 1;
          return make("li", { class: role }, part("You", content, small("Edit", () => this.edit(place)),
            isUnanswered ? small("Again", () => this.again(place)) : null));
        }
        const again = small("Again", () => this.again(place - 1));
        return make("li", { class: role },
          ...answers.map(({ name, content }, column) => part(name, content, column ? null : again)));
      }),
    );
    this.examples.replaceChildren(...(this.messages.length ? [] : this.chosen[0].prompts).map((prompt) =>
      make("button", { class: "example", dir: "auto", onclick: () => this.ask(prompt) }, prompt)));
    this.log.setAttribute("aria-busy", `${isBusy}`); // a screen reader waits for the whole answer
    this.toEnd();
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}
