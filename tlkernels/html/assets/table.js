"use strict";
// A table that a click on a heading sorts. Enter and space do the same: the headings are buttons.

{
  const arrows = { ascending: "▲", descending: "▼" };

  const compare = (left, right) =>
    typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;

  /** What cannot be compared comes last in both directions. */
  const sorted = (rows, column, sign) => {
    const missing = (value) => value === null || value === undefined || Number.isNaN(value);
    const keyed = rows.map((row) => [column.value(row), row]);
    const known = keyed.filter(([value]) => !missing(value));
    known.sort(([left], [right]) => sign * compare(left, right));
    return [...known, ...keyed.filter(([value]) => missing(value))].map(([, row]) => row);
  };

  /** A column of text. */
  report.words = (key, label, read, more = {}) => ({
    key,
    label,
    title: `Sort by ${label.toLowerCase()}`,
    text: true,
    value: read,
    cell: read,
    ...more,
  });

  /**
   * A table of rows. A column has key, label, title, value(row) to sort by, and cell(row): a text or nodes, or an
   * object {class, title, content}; `text` aligns it to the left, `wrap` lets it break, `head` makes it the row's name.
   * `key` names the table in the URL.
   */
  report.table = (key, caption, columns, rows) => {
    const [chosen, direction] = (report.state.get(key) ?? "").split("!");
    const by = columns.find((column) => column.key === chosen);
    const up = direction !== "descending";
    const heading = (column) => {
      const order = column === by ? (up ? "ascending" : "descending") : null;
      const turn = () => report.state.set(key, `${column.key}!${order === "ascending" ? "descending" : "ascending"}`);
      const button = report.el("button", { type: "button", id: `${key}-${column.key}`, title: column.title, click: turn });
      button.append(...[column.label].flat(), report.el("span", { "aria-hidden": "true" }, arrows[order] ?? ""));
      return report.el("th", { scope: "col", "aria-sort": order, class: column.text ? "text" : null }, button);
    };
    const cell = (column, row) => {
      const made = column.cell(row);
      const { content, ...attributes } = made?.content !== undefined ? made : { content: made };
      const tag = column.head ? "th" : "td";
      const classes = [attributes.class, column.text ? "text" : null, column.wrap ? "wrap" : null].filter(Boolean).join(" ") || null;
      return report.el(tag, { ...attributes, class: classes, scope: column.head ? "row" : null }, ...[content].flat());
    };
    const body = (by ? sorted(rows, by, up ? 1 : -1) : rows).map((row) =>
      report.el("tr", {}, ...columns.map((column) => cell(column, row))),
    );
    return report.el(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      report.el(
        "table",
        { id: key },
        report.el("thead", {}, report.el("tr", {}, ...columns.map(heading))),
        report.el("tbody", {}, ...body),
      ),
    );
  };
}
