"use strict";
/* The page comes to life: the model is unpacked, and the tabs get their parts. */

/** Tabs by mouse, and by the arrow keys as people with a screen reader expect them. */
function connectTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const near = (place, step) => {
    do place = (place + step + tabs.length) % tabs.length;
    while (tabs[place].hidden);
    return tabs[place];
  };
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
      const next = { ArrowRight: [place, 1], ArrowLeft: [place, -1], Home: [-1, 1], End: [0, -1] }[event.key];
      if (!next) return;
      event.preventDefault();
      choose(near(...next));
    });
  });
}

function facts(model, isInside) {
  const size = model.about.parameters.toLocaleString("en"), why = model.about.whyNoChats;
  return `${size} parameters, a context of ${model.context} tokens` +
    `${isInside ? "; everything is computed in this page, and nothing leaves it." : "."}` +
    `${model.canChat ? "" : ` It continues text: ${why}.`}`;
}

async function start() {
  begun = true;
  connectTabs();
  window.addEventListener("unhandledrejection", (event) => trouble(event.reason?.message || `${event.reason}`));
  window.addEventListener("error", (event) => trouble(event.message));
  for (const part of document.querySelectorAll("[role=tabpanel]")) part.replaceChildren(); // of a page that was saved
  trouble("");
  const inside = enclosedModels();
  if (!inside.length && location.protocol === "file:") {
    throw new Error("this file holds no model; make one that does with tinylm export --output model.html");
  }
  const models = inside.length ? inside : await serverModels();
  const model = inside.length ? await inside[0].inPage() : null; // damage is found now
  const chat = new Chat(document.getElementById("chat"), models);
  const show = () => (document.getElementById("facts").textContent = facts(chat.chosen[0], inside.length > 0));
  chat.first.addEventListener("change", show);
  show();
  window.parts = { models, model, chat, glass: new Glass(document.getElementById("glass"), models) };
  if (!inside.length) new Runs(document.getElementById("runs"), document.getElementById("tab-runs")).start();
  chat.input.focus();
}

start().catch((error) => trouble(error.message));
