"use strict";
/* Byte-level byte-pair encoding, as tinylm/tokenizer has it: text to token ids and back, and the chat template. */

/** Byte-level BPE writes each byte as one visible character; this is byte -> character. */
const BYTE_CHARACTERS = (() => {
  const characters = new Array(256);
  let spare = 256; // bytes without a character of their own get the next ones from here on
  for (let byte = 0; byte < 256; byte++) {
    const isVisible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    characters[byte] = String.fromCharCode(isVisible ? byte : spare++);
  }
  return characters;
})();

class Tokenizer {
  /** `definition`: tokens (names by id), merges (pairs of names, the earlier goes first), pattern (how text is split),
      isNormalized (NFC), ignoresMerges (a piece that is a token is taken whole), controls (ids that no text holds),
      documentStart, stops, and for ChatML imStart and imEnd. */
  constructor(definition) {
    Object.assign(this, definition);
    this.controls = new Set(definition.controls);
    this.ids = new Map(this.tokens.map((name, id) => [name, id]).filter(([, id]) => !this.controls.has(id)));
    this.ranks = new Map(this.merges.map(([left, right], rank) => [`${left} ${right}`, rank]));
    this.split = new RegExp(this.pattern, "gu");
    this.encoder = new TextEncoder();
    this.bytes = new Map(BYTE_CHARACTERS.map((character, byte) => [character, byte]));
  }

  /** Text to ids. Control tokens that are spelt in it are letters like others. */
  encode(text) {
    const ids = [];
    for (const piece of (this.isNormalized ? text.normalize("NFC") : text).match(this.split) || []) {
      const characters = Array.from(this.encoder.encode(piece), (byte) => BYTE_CHARACTERS[byte]);
      const whole = this.ignoresMerges ? this.ids.get(characters.join("")) : undefined;
      if (whole !== undefined) ids.push(whole);
      else for (const name of this.merge(characters)) ids.push(this.ids.get(name));
    }
    return ids;
  }

  /** Joins the two neighbours whose pair was learnt first, again and again, until no pair is known. */
  merge(names) {
    while (names.length > 1) {
      let best = -1, bestRank = Infinity;
      for (let i = 0; i + 1 < names.length; i++) {
        const rank = this.ranks.get(`${names[i]} ${names[i + 1]}`);
        if (rank < bestRank) [best, bestRank] = [i, rank];
      }
      if (best < 0) break;
      names.splice(best, 2, names[best] + names[best + 1]);
    }
    return names;
  }

  /** The bytes of a token; none for a control token, or a row of the model without a token. */
  bytesOf(id) {
    const name = this.tokens[id];
    if (name === undefined || name === null || this.controls.has(id)) return new Uint8Array(0);
    return Uint8Array.from(name, (character) => this.bytes.get(character));
  }

  /** A token for people: its text, the name of a control token, or the bytes of half a character. */
  shown(id) {
    if (this.controls.has(id)) return this.tokens[id];
    const bytes = this.bytesOf(id);
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    } catch {
      return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
    }
  }

  /** A function from the next id to the text that is certain now; it never breaks a character. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return (id) => (id === null ? decoder.decode() : decoder.decode(this.bytesOf(id), { stream: true }));
  }

  decode(ids) {
    const next = this.stream();
    return ids.map((id) => next(id)).join("") + next(null);
  }

  /** A conversation and the header of the answer, in ChatML. The control tokens are placed by id: no message can forge
      one. */
  chat(messages) {
    const newline = this.encode("\n");
    const turns = messages.map(({ role, content }) => [
      this.imStart, ...this.encode(`${role}\n`), ...this.encode(pythonStrip(content)), this.imEnd, ...newline,
    ]);
    return [...turns.flat(), this.imStart, ...this.encode("assistant\n")];
  }
}

/** Without blanks at both ends, by Python's idea of a blank. */
function pythonStrip(text) {
  return text.replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "");
}
