"use strict";
/* The models that a person can choose. Their cards are known at once; one is unpacked when it is asked for. */

const MOST_UNPACKED = 10; // of one model: itself, and as it was at steps of its training

/** What both kinds have in common; `packed(step)` gives their bytes. */
class PageModel {
  constructor(card) {
    this.about = { name: card.id, parameters: card.parameters, whyNoChats: card.why_no_chats };
    this.canChat = card.chats; // else it continues text
    this.context = card.max_model_len;
    this.prompts = card.prompts;
    this.snapshots = card.snapshots; // steps of its training
    this.unpacked = new Map();
  }

  /** Letters of the longest text that is worth reading. */
  get mostLetters() {
    return this.unpacked.get(null)?.mostLetters ?? MOST_LETTERS;
  }

  /** The model in this page, as it is (null), or as it was after a step of its training. */
  async inPage(step = null) {
    if (!this.unpacked.has(step)) {
      const model = new LocalModel(readModel(await this.packed(step)), this.canChat);
      if (this.unpacked.size === MOST_UNPACKED) this.unpacked.delete(this.unpacked.keys().next().value);
      this.unpacked.set(step, model);
    }
    return this.unpacked.get(step);
  }
}

/** A model whose bytes stand in this page, as text. */
class EnclosedModel extends PageModel {
  constructor(card, place) {
    super(card);
    this.place = place;
  }

  packed(step) {
    const element = document.getElementById(`model-${this.place}-${step ?? "finished"}`);
    let letters;
    try {
      letters = atob(element.textContent.trim());
    } catch {
      throw new BadModel("the model in this page is cut short or damaged; make the page again");
    }
    const data = new Uint8Array(letters.length);
    for (let i = 0; i < letters.length; i++) data[i] = letters.charCodeAt(i);
    return data.buffer;
  }

  async *answer(messages, settings, signal, notice) {
    yield* (await this.inPage()).answer(messages, settings, signal, notice);
  }
}

/** The models inside this page; none where a server has them. */
function enclosedModels() {
  try {
    return JSON.parse(document.getElementById("cards").textContent).map((card, place) => new EnclosedModel(card, place));
  } catch {
    throw new BadModel("this page is cut short or damaged; make the page again");
  }
}
