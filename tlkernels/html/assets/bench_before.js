"use strict";
// What changed since an earlier run by more than its spread: speed-ups and memory, the worse first.

{
  const { el, format, bench } = report;
  const { before, cases } = report.data;
  const byId = new Map(cases.map((one) => [one.id, one]));

  const middle = (figure) => (Array.isArray(figure) ? figure[1] : figure);
  const what = (row) => (row.what === "memory" ? "memory" : `speed-up over ${bench.name(row.what)}`);
  const shown = (figure) => {
    if (!Array.isArray(figure)) return format.bytes(figure);
    return [format.number(figure[1]), report.small(format.range(format.number, figure))];
  };
  const ratio = (row) => middle(row.now) / middle(row.then);
  const change = (row) => Math.abs(Math.log(ratio(row)));

  const figure = (key, label) => ({
    key,
    label,
    title: `Sort by ${label.toLowerCase()}`,
    value: (row) => middle(row[key]),
    cell: (row) => shown(row[key]),
  });

  const columns = [
    report.words("case", "Case", (row) => bench.describe(byId.get(row.id)), { head: true, wrap: true }),
    report.words("what", "What", what),
    figure("then", "Then"),
    figure("now", "Now"),
    {
      key: "ratio",
      label: "Now / then",
      title: "Sort by change",
      value: ratio,
      cell: (row) => format.number(ratio(row)),
    },
    report.words("word", "Change", (row) => row.word, {
      cell: (row) => ({ class: row.worse ? "slower" : null, content: row.word }),
    }),
  ];

  /** The worse first, and of these the largest change. */
  const order = (left, right) => right.worse - left.worse || change(right) - change(left);

  report.sections.bench_before = ({ cases }) => {
    const ids = new Set(cases.map((one) => one.id));
    const rows = before.changes.filter((row) => ids.has(row.id));
    const changed = rows.filter((row) => row.word).sort(order);
    const worse = changed.filter((row) => row.worse).length;
    const { differences } = before;
    const better = changed.length - worse;
    const sum = `Of ${rows.length} figures in both runs ${worse} became worse and ${better} better; the others did not change.`;
    return [
      el("p", {}, rows.length ? sum : "The earlier run has none of the cases shown."),
      changed.length ? report.table("changes", "Changes", columns, changed) : null,
      el("h3", {}, "What else differs between the runs"),
      differences.length
        ? el("ul", { id: "differences" }, ...differences.map((line) => el("li", {}, line)))
        : report.note("Machine and versions are the same."),
    ];
  };
}
