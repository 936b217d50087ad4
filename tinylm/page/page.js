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
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) choose(near(place, step));
    });
  });
}

/** The model inside this page; null where a server has them. */
function modelInside() {
  const text = document.getElementById("model").textContent.trim();
  if (!text) return null;
  let letters;
  try {
    letters = atob(text);
  } catch {
    throw new BadModel("the model in this page is cut short or damaged; make the page again");
  }
  const data = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) data[i] = letters.charCodeAt(i);
  return new LocalModel(readModel(data.buffer));
}

function facts(model, isInside) {
  const { parameters, isBase } = model.about;
  const size = parameters.toLocaleString("en");
  const base = isBase ? " It is a base model: here it continues text." : " Its chats are not in ChatML: here it continues text.";
  return `${size} parameters, a context of ${isInside ? model.config.context : model.context} tokens` +
    `${isInside ? "; everything is computed in this page, and nothing leaves it." : "."}${model.canChat ? "" : base}`;
}

async function start() {
  begun = true;
  connectTabs();
  window.addEventListener("unhandledrejection", (event) => trouble(event.reason?.message || `${event.reason}`));
  window.addEventListener("error", (event) => trouble(event.message));
  for (const part of document.querySelectorAll("[role=tabpanel]")) part.replaceChildren(); // of a page that was saved
  trouble("");
  const inside = modelInside();
  if (!inside && location.protocol === "file:") {
    throw new Error("there is no model in this file: make one with tinylm export --output model.html");
  }
  const models = inside ? [inside] : (await (await ask("v1/models")).json()).data.map((card) => new ServerModel(card));
  const chat = new Chat(document.getElementById("chat"), models);
  const show = () => (document.getElementById("facts").textContent = facts(chat.chosen[0], inside !== null));
  chat.first.addEventListener("change", show);
  show();
  window.parts = { model: inside, chat, glass: new Glass(document.getElementById("glass"), models) };
  if (!inside) new Runs(document.getElementById("runs"), document.getElementById("tab-runs")).start();
  chat.input.focus();
}

start().catch((error) => trouble(error.message));
