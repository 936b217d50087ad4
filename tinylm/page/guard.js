/* Says why the page is empty, if its script cannot run here. It comes first, and any browser can read it: no new syntax. */
var begun = false; // set by the page's script

function missingFeature() {
  var needed = {
    TextDecoder: window.TextDecoder,
    TextEncoder: window.TextEncoder,
    ReadableStream: window.ReadableStream,
    AbortController: window.AbortController,
    "crypto.getRandomValues": window.crypto && window.crypto.getRandomValues,
    "Symbol.asyncIterator": window.Symbol && Symbol.asyncIterator,
    "Promise.allSettled": window.Promise && Promise.allSettled,
    "Object.fromEntries": Object.fromEntries,
    "Array.prototype.at": Array.prototype.at,
    "String.prototype.replaceAll": String.prototype.replaceAll,
    "Element.prototype.replaceChildren": Element.prototype.replaceChildren
  };
  for (var name in needed) if (!needed[name]) return name;
  try {
    new RegExp("\\p{L}", "u");
  } catch (error) {
    return "\\p in regular expressions";
  }
  return "";
}

document.addEventListener("DOMContentLoaded", function () {
  var place = document.getElementById("trouble") || document.body.appendChild(document.createElement("p"));
  var missing = missingFeature();
  var said = "";
  if (missing || !begun) {
    said = "This browser is too old for this page" + (missing ? " (it has no " + missing + ")" : "") +
      ": use Chrome or Edge 92, Firefox 90, Safari 15.4, or a newer one.";
  }
  if (!document.getElementById("end")) said = "This file is cut short: fetch it again, or make it again with tinylm export.";
  if (!said) return;
  place.id = "trouble";
  place.textContent = said;
  place.hidden = false;
  place.removeAttribute("hidden");
});
