"use strict";
/* Tokens for people: what cannot be seen gets a sign or a name, and each token keeps its own direction. */

/** Character: what stands for it, and what a screen reader says. */
const SIGNS = {
  " ": ["␣", "space"],
  "\t": ["⇥", "tab"],
  "\n": ["⏎", "line feed"],
  "\r": ["␍", "carriage return"],
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
const UNSEEN = /[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}\u2800]/gu;

function signOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code); // a picture of the control character
  return code === 0x7f ? "␡" : `[U+${code.toString(16).toUpperCase().padStart(4, "0")}]`;
}

/** The text with a sign for each character that cannot be seen. A mark that belongs on a letter gets a circle. */
function visible(text) {
  const signs = text.replace(UNSEEN, (character) => (SIGNS[character] || [signOf(character)])[0]);
  return /^\p{M}/u.test(signs) ? `◌${signs}` : signs;
}

/** The same for a screen reader, which says no signs. */
function spoken(text) {
  return text.replace(UNSEEN, (character) => ` ${(SIGNS[character] || ["", signOf(character)])[1]} `).trim();
}

/** A token as people know it: {text, words, kind}, where kind is "control", "bytes" (a part of a character), "none" (a
    row of the model that no token has) or "text". */
function tokenNames(tokenizer, id) {
  const shown = tokenizer.shown(id);
  if (tokenizer.controls.has(id)) return { text: visible(shown), words: spoken(shown), kind: "control" };
  if (shown === "") return { text: "[no token]", words: "no token", kind: "none" };
  const isText = tokenizer.decode([id]) === shown;
  if (!isText) return { text: shown, words: `the bytes ${shown.replaceAll("\\x", " ").trim()}`, kind: "bytes" };
  return { text: visible(shown), words: spoken(shown), kind: "text" };
}

/** The token as an element. Its direction is its own: neighbours and numbers stay in their places. */
function piece(tokenizer, id) {
  const { text, kind } = tokenNames(tokenizer, id);
  return make("bdi", { class: kind }, text);
}

/** The token's words inside a sentence that is one string; its direction ends with it. */
function isolated(tokenizer, id) {
  return `\u2068${tokenNames(tokenizer, id).words}\u2069`;
}
