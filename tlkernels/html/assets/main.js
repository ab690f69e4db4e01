"use strict";
// Draw every section, again whenever the state or the colours change.

{
  const sections = [...document.querySelectorAll("section")];

  report.render = () => {
    const focus = document.activeElement?.id;
    const boxes = [...document.querySelectorAll(".scroll")];
    const scrolled = boxes.map((box) => [box.getAttribute("aria-label"), box.scrollTop, box.scrollLeft]);
    const view = report.filters?.draw(document.getElementById("filters")) ?? {};
    report.later = [];
    for (const section of sections) {
      const draw = report.sections[section.dataset.script];
      if (draw) section.querySelector(".body").replaceChildren(...draw(view).filter((node) => node !== null));
    }
    for (const draw of report.later) draw();
    for (const [label, top, left] of scrolled) {
      document.querySelector(`.scroll[aria-label=${JSON.stringify(label)}]`)?.scrollTo(left, top);
    }
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
  };

  // The fragment holds the state, so links to sections go through it.
  const go = () => document.getElementById(report.state.get("at") ?? "")?.scrollIntoView();
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      report.state.set("at", link.hash.slice(1));
      go();
    });
  }

  for (const query of [matchMedia("(prefers-color-scheme: dark)"), report.plot.narrow]) {
    query.addEventListener("change", () => report.render());
  }
  report.render();
  go();
}
