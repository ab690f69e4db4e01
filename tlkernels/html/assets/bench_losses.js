"use strict";
// Where we lose: slower, more memory, wrong, did not run. Where we win has the same form.

{
  const { el, format, bench } = report;

  const comparisons = (cases) =>
    cases.flatMap((one) =>
      Object.entries(one.speedup)
        .filter(([contestant]) => contestant !== "floor")
        .map(([contestant, quartiles]) => ({ one, contestant, quartiles, middle: quartiles[1] })),
    );

  const memories = (cases) =>
    cases.flatMap((one) =>
      Object.keys(one.memory)
        .filter((contestant) => contestant !== one.ours && contestant !== "floor" && one.memory[contestant] > 0)
        .map((contestant) => ({ one, contestant, middle: Math.max(0, one.memory[one.ours]) / one.memory[contestant] })),
    );

  const what = [
    report.words("contestant", "Contestant", (row) => bench.label(row.contestant)),
    report.words("case", "Case", (row) => bench.describe(row.one), { wrap: true }),
  ];
  const speed = {
    key: "speedup",
    label: "Speed-up",
    title: "Sort by speed-up",
    value: (row) => row.middle,
    cell: (row) => ({
      class: row.middle < 1 ? "slower" : null,
      content: [format.times(row.middle), report.small(format.range(format.number, row.quartiles))],
    }),
  };
  const more = {
    key: "share",
    label: "Ours / theirs",
    title: "Sort by share of the memory",
    value: (row) => row.middle,
    cell: ({ one, contestant, middle }) => ({
      class: "slower",
      content: [
        format.times(middle),
        report.small(`${format.bytes(one.memory[one.ours])} of ${format.bytes(one.memory[contestant])}`),
      ],
    }),
  };

  const list = (key, title, column, rows) =>
    el(
      "div",
      {},
      el("h3", {}, `${title}: ${rows.length}`),
      rows.length ? report.table(key, title, [column, ...what], rows) : report.note("None in the cases shown."),
    );

  /** One entry for each contestant and reason, with the cases that they concern; `kind` is "wrong" or "absent". */
  const reasons = (cases, kind) => {
    const groups = Map.groupBy(
      cases.flatMap((one) => Object.entries(one[kind]).map(([contestant, why]) => ({ one, contestant, why }))),
      ({ contestant, why }) => JSON.stringify([contestant, why]),
    );
    return [...groups.values()].sort((left, right) => right.length - left.length);
  };

  const reason = (rows) =>
    el(
      "li",
      {},
      el("b", {}, bench.label(rows[0].contestant)),
      `: ${rows[0].why} `,
      el(
        "details",
        { class: "inline" },
        el("summary", {}, rows.length === 1 ? "1 case" : `${rows.length} cases`),
        el("ul", {}, ...rows.map(({ one }) => el("li", {}, bench.describe(one)))),
      ),
    );

  const descending = (left, right) => right.middle - left.middle;

  report.sections.bench_losses = ({ cases }) => {
    if (!cases.length) return bench.nothing();
    const all = comparisons(cases);
    const slower = all.filter((row) => row.middle < 1).sort((left, right) => left.middle - right.middle);
    const faster = all.filter((row) => row.middle > 1).sort(descending);
    const greedy = memories(cases).filter((row) => row.middle > 1).sort(descending);
    const wrong = reasons(cases, "wrong");
    const absent = reasons(cases, "absent");
    const surely = [
      slower.filter((row) => row.quartiles[2] < 1).length,
      faster.filter((row) => row.quartiles[0] > 1).length,
    ];
    const sum =
      `${all.length === 1 ? "In the one comparison" : `Of ${all.length} comparisons`} ours is slower in ${slower.length} (upper quartile below 1 in ${surely[0]}) ` +
      `and faster in ${faster.length} (lower quartile above 1 in ${surely[1]}).`;
    return [
      el("p", {}, sum),
      el(
        "div",
        { class: "halves" },
        list("lose", "Slower than a contestant", speed, slower),
        list("win", "Faster than a contestant", speed, faster),
      ),
      list("greedy", "More memory than a contestant", more, greedy),
      el("h3", {}, "Wrong results"),
      report.note(wrong.length ? "Their times count for nothing, so they have no speed-up." : "None in the cases shown."),
      wrong.length ? el("ul", { id: "wrong" }, ...wrong.map(reason)) : null,
      el("h3", {}, "Did not run"),
      absent.length ? el("ul", { id: "absent" }, ...absent.map(reason)) : report.note("Every contestant ran."),
    ];
  };
}
