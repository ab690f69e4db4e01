"use strict";
// Filters by loss, dtype, device and group: what is ticked is shown; nothing ticked means everything.

{
  const cases = report.data.cases;
  const kinds = { loss: "Loss", dtype: "Dtype", device: "Device", group: "Group" };
  const values = (kind) => [...new Set(cases.map((one) => one[kind]))].sort();

  const ticked = (kind) => report.state.list(kind).filter((value) => values(kind).includes(value));

  const toggle = (kind, value, on) => {
    const rest = ticked(kind).filter((other) => other !== value);
    report.state.setAll({ [kind]: on ? [...rest, value] : rest });
  };

  const box = (kind, value) => {
    const change = (event) => toggle(kind, value, event.target.checked);
    const input = report.el("input", { type: "checkbox", id: `filter-${kind}-${value}`, change });
    input.checked = ticked(kind).includes(value);
    return report.el("label", { class: "chip" }, input, value);
  };

  const boxes = (kind) =>
    values(kind).length < 2
      ? null
      : report.el(
          "fieldset",
          {},
          report.el("legend", {}, kinds[kind]),
          ...values(kind).map((value) => box(kind, value)),
        );

  const clear = () => report.state.setAll(Object.fromEntries(Object.keys(kinds).map((kind) => [kind, []])));

  /** Draw the filters; return what passes: cases, and `passes` for things that have a loss, a dtype and a device. */
  const draw = (form) => {
    const passes = (one) =>
      Object.keys(kinds).every((kind) => !(kind in one) || ticked(kind).length === 0 || ticked(kind).includes(one[kind]));
    const shown = cases.filter(passes);
    const all = shown.length === cases.length;
    const fields = Object.keys(kinds).map(boxes).filter((fieldset) => fieldset !== null);
    if (!fields.length) return { cases, passes };
    form.replaceChildren(
      ...fields,
      report.el(
        "p",
        { role: "status" },
        `${shown.length} of ${cases.length} cases`,
        all ? "" : report.el("button", { type: "button", id: "clear", click: clear }, "Show all"),
      ),
    );
    return { cases: shown, passes };
  };

  report.filters = { draw };
}
