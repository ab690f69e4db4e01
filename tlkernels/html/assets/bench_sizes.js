"use strict";
// Time and memory of one series (a loss with its options, a dtype, a device) against a size, a line per contestant.

{
  const { format, bench, plot } = report;
  const ELEMENTS = "elements";
  const symbols = ["circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x"];

  const size = (one, x) => (x === ELEMENTS ? one.elements : one.dims[x]);
  const sizes = (cases, x) => new Set(cases.map((one) => size(one, x))).size;
  const title = (x) => (x === ELEMENTS ? "elements (product of the shape)" : x);

  const seriesOf = (cases) => {
    const devices = new Set(cases.map((one) => one.device)).size > 1;
    return Map.groupBy(cases, (one) => [one.name, one.dtype, ...(devices ? [one.device] : [])].join(" · "));
  };

  /** Dimensions that every case of the series has, and the product of the shape. */
  const dimensions = (cases) => [
    ...Object.keys(cases[0].dims).filter((dim) => cases.every((one) => dim in one.dims)),
    ELEMENTS,
  ];

  /** The dimension that varies; the product of the shape where several do, or none is named. */
  const usual = (cases) => {
    const varying = dimensions(cases).filter((dim) => dim !== ELEMENTS && sizes(cases, dim) > 1);
    return varying.length === 1 ? varying[0] : ELEMENTS;
  };

  /** What is the same along a line: the other dimensions, unless x is the whole size. */
  const others = (one, x) =>
    x === ELEMENTS ? "" : Object.keys(one.dims).filter((dim) => dim !== x).map((dim) => `${dim}=${one.dims[dim]}`).join(", ");

  const time = {
    name: "time",
    title: "time of a forward and a backward",
    unit: "s",
    of: (one, who) => one.seconds[who],
    format: format.time,
  };
  const memory = {
    name: "memory",
    title: "peak memory above the inputs",
    unit: "B",
    of: (one, who) => (who in one.memory ? Array(3).fill(Math.max(0, one.memory[who])) : undefined),
    format: format.bytes,
  };

  const called = (cases, who) =>
    plot.plain(bench.label(who) + (cases.some((one) => who in one.wrong) ? " (wrong)" : ""));

  const about = (one, who, quantity) => {
    const three = quantity.of(one, who);
    const spread = three[0] < three[2] ? ` (${format.range(quantity.format, three)})` : "";
    return `${called([one], who)}, ${plot.plain(`${bench.shape(one)}: ${quantity.format(three[1])}${spread}`)}`;
  };

  const line = (who, cases, quantity, x, symbol, legend) => {
    const { colour, dash } = bench.look(who);
    const points = cases.filter((one) => quantity.of(one, who)?.[1] > 0).sort((left, right) => size(left, x) - size(right, x));
    const three = points.map((one) => quantity.of(one, who));
    return {
      x: points.map((one) => size(one, x)),
      y: three.map((values) => values[1]),
      error_y: quantity === time ? plot.bars(three, colour) : undefined,
      text: points.map((one) => about(one, who, quantity)),
      hoverinfo: "text",
      mode: "lines+markers",
      name: called(cases, who),
      uid: `${who} ${others(cases[0], x)}`,
      legendgroup: who,
      showlegend: legend,
      line: { color: colour, dash, width: who === "auto" ? 2.5 : 1.5 },
      marker: { color: colour, symbol, size: 8 },
    };
  };

  /** Grey entries in the legend that say what the symbols mean. */
  const key = (text, symbol) => ({
    x: [null],
    y: [null],
    mode: "markers",
    name: plot.plain(text),
    marker: { color: plot.style("--faint"), symbol, size: 8 },
    hoverinfo: "skip",
  });

  const contestants = (cases, quantity) =>
    bench.inOrder(new Set(cases.flatMap((one) => bench.contestants.filter((who) => quantity.of(one, who)))));

  const against = (cases, quantity, x) => {
    const lines = [...Map.groupBy(cases, (one) => others(one, x))];
    const traces = contestants(cases, quantity).flatMap((who) =>
      lines.map(([, some], place) => line(who, some, quantity, x, symbols[place % symbols.length], place === 0)),
    );
    if (lines.length > 1) traces.push(...lines.map(([text], place) => key(text, symbols[place % symbols.length])));
    const measured = traces.filter((trace) => trace.x.length && trace.y[0] !== null);
    const [across, up] = ["x", "y"].map((side) => measured.flatMap((trace) => trace[side]));
    return plot.figure(quantity.name, `${quantity.title} against ${title(x)}, both on log axes`, traces, {
      xaxis: plot.log(across, x === ELEMENTS ? format.count : String, title(x), true),
      yaxis: plot.log(up, quantity.format, quantity.title),
      height: contestants(cases, quantity).length > 8 ? 480 : 380,
    });
  };

  /** One size: a bar for each contestant, the quickest at the top. */
  const bars = (one, quantity) => {
    const middle = (who) => quantity.of(one, who)[1];
    const names = contestants([one], quantity).sort((left, right) => middle(right) - middle(left));
    const three = names.map((who) => quantity.of(one, who));
    const trace = {
      type: "bar",
      orientation: "h",
      y: names.map((who) => `${called([one], who)}: ${quantity.format(middle(who))}`),
      x: three.map((values) => values[1]),
      error_x: quantity === time ? plot.bars(three, plot.style("--ink")) : undefined,
      marker: { color: names.map((who) => bench.look(who).colour) },
      text: names.map((who) => about(one, who, quantity)),
      textposition: "none",
      hoverinfo: "text",
    };
    return plot.figure(quantity.name, `${quantity.title} of each contestant`, [trace], {
      xaxis: { title: quantity.title, tickformat: "~s", ticksuffix: quantity.unit, rangemode: "tozero" },
      yaxis: { type: "category" },
      height: 120 + 34 * names.length,
    });
  };

  const picture = (cases, quantity, x) => {
    if (contestants(cases, quantity).length === 0) return report.note(`No ${quantity.title} was measured.`);
    return cases.length === 1 ? bars(cases[0], quantity) : against(cases, quantity, x);
  };

  /** A log axis has no place for nothing, so the text says it. */
  const zeros = (cases) => {
    const none = cases.flatMap((one) =>
      contestants([one], memory)
        .filter((who) => memory.of(one, who)[1] === 0)
        .map((who) => `${bench.label(who)} at ${bench.shape(one)}`),
    );
    if (cases.length === 1 || !none.length) return null;
    return report.note(`Nothing above the inputs, so not on the log axis: ${none.join("; ")}.`);
  };

  report.sections.bench_sizes = ({ cases }) => {
    if (!cases.length) return bench.nothing();
    const all = seriesOf(cases);
    const most = [...all].reduce((best, one) => (sizes(one[1], ELEMENTS) > sizes(best[1], ELEMENTS) ? one : best))[0];
    const series = all.has(report.state.get("series")) ? report.state.get("series") : most;
    const members = all.get(series);
    const choices = dimensions(members);
    const x = choices.includes(report.state.get("x")) ? report.state.get("x") : usual(members);
    const count = (some) => (some.length === 1 ? "1 size" : `${some.length} sizes`);
    return [
      report.el(
        "p",
        { class: "choices" },
        report.choice("series", "Loss", [...all].map(([name, some]) => [name, `${name} (${count(some)})`]), series),
        members.length > 1 ? report.choice("x", "Size", choices.map((dim) => [dim, title(dim)]), x) : null,
      ),
      report.el("div", { class: "halves" }, picture(members, time, x), picture(members, memory, x)),
      zeros(members),
    ];
  };
}
