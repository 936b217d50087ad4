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

/** The split patterns of tinylm/tokenizer/split_patterns.py. JavaScript has no (?i:...) everywhere, and its \s is not
    Unicode's. The long s, \u017f, is the one other character that the contractions match without regard to case. */
const DIGITS = { split: "\\p{N}", grouped: "\\p{N}{1,3}" };
const splitPattern = (digits) =>
  new RegExp(
    "'(?:[sS\u017ftTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])" +
      `|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${DIGITS[digits]}| ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*` +
      "|\\p{White_Space}*[\\r\\n]+|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
    "gu",
  );

const MOST_KEPT = 50000; // pieces whose ids are remembered
const POSITIONS = 2 ** 31; // a candidate of the heap is rank * POSITIONS + position

class Tokenizer {
  /** `definition`: tokens (names by id), merges ([left, right, joined], the earlier goes first), digits (how they are
      split), isNormalized (NFC), ignoresMerges (a piece that is a token is taken whole), controls (ids that no text
      holds), documentStart, stops, and for ChatML imStart and imEnd. */
  constructor(definition) {
    Object.assign(this, definition);
    this.controls = new Set(definition.controls);
    this.ids = new Map(this.tokens.map((name, id) => [name, id]).filter(([name, id]) => name !== null && !this.controls.has(id)));
    this.ranks = new Map(this.merges.map(([left, right], rank) => [this.pair(left, right), rank]));
    this.split = splitPattern(this.digits);
    this.encoder = new TextEncoder();
    this.bytes = new Map(BYTE_CHARACTERS.map((character, byte) => [character, byte]));
    this.byteIds = BYTE_CHARACTERS.map((character) => this.ids.get(character));
    this.kept = new Map();
    this.longest = this.tokens.reduce((most, name) => Math.max(most, name === null ? 0 : name.length), 1);
  }

  /** The most letters that so many tokens can hold: a letter has at least one byte, and a token at most `longest`.
      NFC at most halves a text. */
  mostLetters(count) {
    return count * this.longest * (this.isNormalized ? 2 : 1);
  }

  /** Text to ids. Control tokens that are spelt in it are letters like others. */
  encode(text) {
    const ids = [];
    for (const piece of (this.isNormalized ? text.normalize("NFC") : text).match(this.split) || []) {
      for (const id of this.idsOf(piece)) ids.push(id);
    }
    return ids;
  }

  /** The ids of a piece, remembered if it is a word that may come again. */
  idsOf(piece) {
    let ids = this.kept.get(piece);
    if (ids !== undefined) return ids;
    const bytes = this.encoder.encode(piece);
    const name = Array.from(this.ignoresMerges ? bytes : [], (byte) => BYTE_CHARACTERS[byte]).join("");
    ids = this.ids.has(name) ? [this.ids.get(name)] : this.merge(bytes);
    if (this.kept.size >= MOST_KEPT) this.kept.clear();
    if (piece.length < 30) this.kept.set(piece, ids);
    return ids;
  }

  pair(left, right) {
    return left * this.tokens.length + right;
  }

  /** Joins the two neighbours whose pair was learnt first, and of equal pairs the leftmost, until no pair is known.

      A heap of candidates over a list of neighbours takes O(n log n): a search after each merge would take O(n^2). */
  merge(bytes) {
    const end = bytes.length, gone = -1;
    const ids = Int32Array.from(bytes, (byte) => this.byteIds[byte]);
    const before = ids.map((_, place) => place - 1), after = ids.map((_, place) => place + 1);
    const heap = new Heap();
    const rankAt = (place) => (after[place] < end ? this.ranks.get(this.pair(ids[place], ids[after[place]])) : undefined);
    const propose = (place) => {
      const rank = place < 0 ? undefined : rankAt(place);
      if (rank !== undefined) heap.push(rank * POSITIONS + place);
    };
    for (let place = 0; place < end; place++) propose(place);
    while (heap.size) {
      const candidate = heap.pop(), rank = Math.floor(candidate / POSITIONS), place = candidate % POSITIONS;
      if (ids[place] === gone || rankAt(place) !== rank) continue; // an earlier merge used one of the two
      const right = after[place];
      ids[place] = this.merges[rank][2];
      ids[right] = gone;
      after[place] = after[right];
      if (after[right] < end) before[after[right]] = place;
      propose(before[place]);
      propose(place);
    }
    return ids.filter((id) => id !== gone);
  }

  /** The bytes of a token; none for a control token, or a row of the model without a token. */
  bytesOf(id) {
    const name = this.tokens[id];
    if (name === undefined || name === null || this.controls.has(id)) return new Uint8Array(0);
    const bytes = Array.from(name, (character) => this.bytes.get(character));
    return bytes.includes(undefined) ? this.encoder.encode(name) : Uint8Array.from(bytes);
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

/** A heap of numbers: the least comes out first (Williams 1964). Each number is at most those at 2i + 1 and 2i + 2. */
class Heap {
  constructor() {
    this.numbers = [];
  }

  get size() {
    return this.numbers.length;
  }

  push(number) {
    const { numbers } = this;
    let place = numbers.length;
    while (place > 0) {
      const parent = (place - 1) >> 1;
      if (numbers[parent] <= number) break;
      numbers[place] = numbers[parent];
      place = parent;
    }
    numbers[place] = number;
  }

  pop() {
    const { numbers } = this, least = numbers[0], last = numbers.pop(), { length } = numbers;
    if (length === 0) return least;
    let place = 0;
    for (let child = 1; child < length; child = 2 * place + 1) {
      if (child + 1 < length && numbers[child + 1] < numbers[child]) child++;
      if (numbers[child] >= last) break;
      numbers[place] = numbers[child];
      place = child;
    }
    numbers[place] = last;
    return least;
  }
}

/** Without blanks at both ends, by Python's idea of a blank. */
function pythonStrip(text) {
  const isBlank = (place) => /[\p{White_Space}\x1c-\x1f]/u.test(text[place]);
  let start = 0, end = text.length;
  while (start < end && isBlank(start)) start++;
  while (start < end && isBlank(end - 1)) end--;
  return text.slice(start, end);
}
