"use strict";
/* Elements of the page. All that a model or a person writes goes in as text, never as HTML. */

/** An element: `make("button", {class: "small", onclick: f}, "Stop")`. Children are elements or texts. */
function make(kind, attributes = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** A field with its name above it. */
function labelled(name, field) {
  return make("label", {}, name, field);
}

let hints = 0;

/** A screen reader says the hint after the field. */
function describe(field, hint) {
  hint.id = `hint-${++hints}`;
  field.setAttribute("aria-describedby", hint.id);
}

/** A field in which one of several names is chosen. */
function choice(names, attributes = {}) {
  return make("select", attributes, ...names.map((name) => make("option", {}, name)));
}

/** Letters of a text that the page takes: a browser lays them out in about a second, but needs a minute for a million
    Hebrew ones. */
const MOST_LETTERS = 200000;

function tooLong(length, most) {
  return `this text has ${length.toLocaleString("en")} characters; at most ${most.toLocaleString("en")} fit: shorten it`;
}

/** The field refuses what is pasted, dropped or typed when it would hold more letters than `most()`. */
function limited(field, most) {
  field.addEventListener("beforeinput", (event) => {
    const { length } = event.data ?? event.dataTransfer?.getData("text") ?? "";
    const all = field.textLength - (field.selectionEnd - field.selectionStart) + length;
    if (!length || all <= most()) return;
    event.preventDefault();
    trouble(tooLong(all, most()));
  });
  return field;
}

/** One sentence about what went wrong, at the top of the page; "" takes it away. A character that turns the direction
    of a line, in a name that is quoted, would turn the sentence. */
function trouble(sentence) {
  const place = document.getElementById("trouble");
  place.textContent = sentence.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
  place.hidden = !sentence;
}

/** What a part shows: a sentence, its equations, and the files that compute it. */
function why(sentence, equations, files) {
  return make("div", { class: "why" }, make("p", {}, sentence), ...equations.map((equation) => make("code", {}, equation)),
    make("p", {}, `In ${files}`));
}

/** Scrolls the box, and not the page, until an element in it can be seen; so many pixels at the left are covered. */
function intoSight(box, element, covered = 0) {
  const [around, inside] = [box.getBoundingClientRect(), element.getBoundingClientRect()];
  const beyond = (least, most, from, to) => (from < least ? from - least : Math.max(0, to - most));
  box.scrollLeft += beyond(around.left + covered, around.right, inside.left, inside.right);
  box.scrollTop += beyond(around.top, around.bottom, inside.top, inside.bottom);
}

/** Lets the browser draw and take clicks before the work goes on. */
function breathe() {
  return new Promise((resolve) => setTimeout(resolve));
}

function percent(share) {
  if (share > 0 && share < 0.0001) return "<0.01%";
  return `${(100 * share).toFixed(share >= 0.0995 ? 0 : share >= 0.00095 ? 1 : 2)}%`;
}

function bytes(count) {
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}
