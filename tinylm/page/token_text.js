"use strict";
/* Tokens for people: what cannot be seen gets a sign or a name, and each token keeps its own direction. */

/** Character: what stands for it, and what a screen reader says. */
const SIGNS = {
  " ": ["␣", "space"],
  "\t": ["⇥", "tab"],
  "\n": ["⏎", "line feed"],
  "\r": ["[CR]", "carriage return"],
  "\u00a0": ["[NBSP]", "no-break space"],
  "\u00ad": ["[SHY]", "soft hyphen"],
  "\u061c": ["[ALM]", "Arabic letter mark"],
  "\u200b": ["[ZWSP]", "zero-width space"],
  "\u200c": ["[ZWNJ]", "zero-width non-joiner"],
  "\u200d": ["[ZWJ]", "zero-width joiner"],
  "\u200e": ["[LRM]", "left-to-right mark"],
  "\u200f": ["[RLM]", "right-to-left mark"],
  "\u2028": ["[LS]", "line separator"],
  "\u2029": ["[PS]", "paragraph separator"],
  "\u202f": ["[NNBSP]", "narrow no-break space"],
  "\u2060": ["[WJ]", "word joiner"],
  "\u3000": ["[IDSP]", "ideographic space"],
  "\ufe0e": ["[VS15]", "text variation selector"],
  "\ufe0f": ["[VS16]", "emoji variation selector"],
  "\ufeff": ["[BOM]", "byte order mark"],
};
/** Controls, formats, blanks, private and unassigned characters, fillers, and the blank of braille. */
const UNSEEN = /([\p{C}\p{Z}\p{Default_Ignorable_Code_Point}\u2800])/u;

function signOf(character) {
  const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return SIGNS[character] || [`[U+${code}]`, `U+${code}`];
}

/** Text in parts that can be seen. A sign has no say in the direction of the text; a mark without its letter gets a
    circle. */
function visible(text) {
  return text.split(UNSEEN).map((part, place) => {
    if (place % 2) return make("bdi", { class: "sign" }, signOf(part)[0]);
    return /^\p{M}/u.test(part) ? `◌${part}` : part;
  });
}

/** The same for a screen reader. */
function spoken(text) {
  return text.split(UNSEEN).map((part, place) => (place % 2 ? ` ${signOf(part)[1]} ` : part)).join("").trim();
}

/** A token as people know it: its text, words for a screen reader, and its kind: null for plain text, else "control",
    "bytes" (a part of a character), or "none" (the model has such a row, and the tokenizer no such token). */
function tokenNames(tokenizer, id) {
  const text = tokenizer.shown(id);
  if (tokenizer.controls.has(id)) return { text, words: spoken(text), kind: "control" };
  if (text === "") return { text: "[no token]", words: "no token", kind: "none" };
  if (tokenizer.decode([id]) === text) return { text, words: spoken(text), kind: null };
  return { text, words: `the bytes ${text.replaceAll("\\x", " ").trim()}`, kind: "bytes" };
}

/** The token as an element. Its direction is its own: neighbours and numbers stay in their places. */
function piece(tokenizer, id) {
  const { text, kind } = tokenNames(tokenizer, id);
  return make("bdi", { class: kind }, ...visible(text));
}

/** The token's words inside a sentence that is one string; its direction ends with it. */
function isolated(tokenizer, id) {
  return `\u2068${tokenNames(tokenizer, id).words}\u2069`;
}

/** The text around a token that is a part of a character: the fewest tokens that make whole characters; "" without. */
function wholeText(tokenizer, ids, place) {
  if (tokenNames(tokenizer, ids[place]).kind !== "bytes") return "";
  for (let count = 2; count <= 4; count++) {
    for (let start = Math.max(0, place - count + 1); start <= place; start++) {
      const text = tokenizer.decode(ids.slice(start, start + count));
      if (start + count <= ids.length && !text.includes("\ufffd")) return text;
    }
  }
  return "";
}
