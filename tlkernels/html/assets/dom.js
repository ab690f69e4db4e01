"use strict";
// Elements from data. Text becomes text nodes, never HTML, so nothing in a result can run.

const report = { sections: {}, data: JSON.parse(document.getElementById("data").textContent) };

/** An element; attributes that are functions listen to the event of their name, and null ones are left out. */
report.el = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
};

report.small = (text) => report.el("small", {}, text);
report.note = (text) => report.el("p", { class: "note" }, text);

/** A labelled choice of [value, text] pairs; the id is also the key of the state. */
report.choice = (id, label, pairs, chosen) =>
  report.el(
    "label",
    { class: "choice" },
    `${label} `,
    report.el(
      "select",
      { id, change: (event) => report.state.set(id, event.target.value) },
      ...pairs.map(([value, text]) => {
        const option = report.el("option", { value }, text);
        option.selected = value === chosen;
        return option;
      }),
    ),
  );
