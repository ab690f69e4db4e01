"use strict";
// Fitted exponents, and the most that each should be. Growth that is too fast stands out.

{
  const { bench, plot } = report;
  const TOO_FAST = "too fast";
  const classes = { [TOO_FAST]: "slower", unclear: "absent" };
  const span = ({ points }) => `${points[0][0]} – ${points.at(-1)[0]}`;

  const columns = [
    report.words("loss", "Loss", (one) => one.loss, { head: true }),
    report.words("dtype", "Dtype", (one) => one.dtype),
    report.words("contestant", "Contestant", (one) => bench.label(one.contestant)),
    report.words("quantity", "Quantity", (one) => one.quantity),
    report.words("dim", "Size", (one) => one.dim),
    report.words("range", "From – to", span),
    {
      key: "exponent",
      label: "Exponent",
      title: "Fitted exponent; below it the 95 % interval",
      value: (one) => one.exponent[1],
      cell: ({ exponent: [low, middle, high] }) => [
        middle.toFixed(2),
        report.small(`${low.toFixed(2)} to ${high.toFixed(2)}`),
      ],
    },
    {
      key: "expected",
      label: "At most",
      title: "The most that the exponent should be",
      value: (one) => one.expected,
      cell: (one) => String(one.expected),
    },
    report.words("verdict", "Verdict", (one) => one.verdict, {
      cell: (one) => ({ class: classes[one.verdict] ?? null, content: one.verdict }),
    }),
  ];

  const name = (one) => plot.plain(`${one.loss} ${one.dtype} ${one.contestant}: ${one.quantity} in ${one.dim} ${span(one)}`);

  const picture = (scales) => {
    const label = scales.map(name);
    const shown = scales.flatMap((one) => [one.exponent[1], one.expected]); // an interval may be too wide to be seen whole
    const fitted = (text, colour, some) => ({
      mode: "markers",
      name: text,
      x: some.map((one) => one.exponent[1]),
      y: some.map(name),
      error_x: plot.bars(some.map((one) => one.exponent), plot.style("--faint")),
      marker: { color: plot.style(colour), size: 9 },
      hovertemplate: "%{y}: %{x:.2f}<extra></extra>",
    });
    const most = {
      mode: "markers",
      name: "at most",
      x: scales.map((one) => one.expected),
      y: label,
      marker: { symbol: "line-ns-open", size: 16, color: plot.style("--ink"), line: { width: 2 } },
      hovertemplate: "at most %{x}<extra></extra>",
    };
    const traces = [
      fitted("fitted, too fast", "--slower", scales.filter((one) => one.verdict === TOO_FAST)),
      fitted("fitted", "--c0", scales.filter((one) => one.verdict !== TOO_FAST)),
      most,
    ];
    return plot.figure("exponents", "Fitted exponents, and the most that they should be", traces.filter((trace) => trace.x.length), {
      xaxis: { title: "exponent", range: [Math.min(0, ...shown) - 0.5, Math.max(...shown) + 0.5] },
      yaxis: { ...plot.categories(label), autorange: "reversed" },
      height: 110 + 24 * scales.length,
    });
  };

  report.sections.bench_scales = ({ passes }) => {
    const scales = report.data.scales.filter(passes);
    if (!scales.length) return [report.note("Nothing was fitted for what the filters show.")];
    const wrong = scales.filter((one) => one.verdict === TOO_FAST);
    const rows = [...wrong, ...scales.filter((one) => !wrong.includes(one))];
    return [
      report.el("p", {}, `${wrong.length} of ${scales.length} grow too fast.`),
      report.table("exponents-table", "Exponents", columns, rows),
      picture(rows),
    ];
  };
}
