"use strict";
/* Many buttons, one stop of the Tab key: the arrow keys go from button to button. */

/** `columns()` tells how many buttons stand in a row. */
function roving(box, columns = () => 1) {
  box.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const buttons = [...box.querySelectorAll("button")], at = buttons.indexOf(event.target);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns(), Home: -at,
      End: buttons.length - 1 - at };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    buttons[at + steps[event.key]]?.focus();
  });
  box.addEventListener("focusin", (event) => event.target.matches("button") && tabStop(box, event.target));
}

/** The Tab key stops at this button of the box, and at no other one. */
function tabStop(box, chosen) {
  for (const button of box.querySelectorAll("button")) button.tabIndex = button === chosen ? 0 : -1;
}
