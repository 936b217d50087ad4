"use strict";
/* The page comes to life: the model is unpacked, and the tabs get their parts. */

/** Tabs by mouse, and by the arrow keys as people with a screen reader expect them. */
function connectTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", `${isChosen}`);
      tab.tabIndex = isChosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
    chosen.focus();
  };
  tabs.forEach((tab, place) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) choose(tabs[(place + step + tabs.length) % tabs.length]);
    });
  });
}

function unpacked() {
  const text = document.getElementById("model").textContent.trim();
  let letters;
  try {
    letters = atob(text);
  } catch {
    throw new BadModel("the model in this page is cut short or damaged; make the page again");
  }
  const data = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) data[i] = letters.charCodeAt(i);
  return readModel(data.buffer);
}

function start() {
  connectTabs();
  window.addEventListener("unhandledrejection", (event) => trouble(event.reason?.message || `${event.reason}`));
  window.addEventListener("error", (event) => trouble(event.message));
  const model = new LocalModel(unpacked());
  const { about, config } = model;
  document.getElementById("facts").textContent =
    `${about.parameters.toLocaleString("en")} parameters, a context of ${config.context} tokens; ` +
    "everything is computed in this page, and nothing leaves it.";
  if (!model.canChat) {
    const reason = about.isBase ? "It is a base model" : "Its chats are not in ChatML";
    document.getElementById("facts").textContent += ` ${reason}: here it continues text.`;
  }
  window.parts = { model, chat: new Chat(document.getElementById("chat"), model),
    glass: new Glass(document.getElementById("glass"), model) };
  document.getElementById("chat").querySelector("textarea").focus();
}

try {
  start();
} catch (error) {
  trouble(error instanceof BadModel ? error.message : `this browser cannot show the page: ${error.message}`);
}
