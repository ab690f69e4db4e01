"use strict";
// The share of its roof that each case reaches, and the roofline of those with matrix products.

{
  const { format, bench, plot } = report;
  const { ceilings } = report.data;
  const MOST = 40;
  const limits = { memory: "--c0", compute: "--c6", call: "--faint" };
  const symbols = { float32: "circle", bfloat16: "square", float16: "diamond", float64: "triangle-up" };

  const symbol = (dtype) => symbols[dtype] ?? "cross";

  const share = (one, who) => one.roof / bench.median(one, who);

  const about = (one, who) => {
    const seconds = bench.median(one, who);
    const rate = (amount, unit, most) => `${format.rate(unit)(amount / seconds)}, ${format.share(amount / seconds / most)}`;
    const parts = [
      bench.describe(one),
      `${bench.label(who)}: ${format.time(seconds)}, ${format.share(share(one, who))} of the roof (${one.limit})`,
      `${rate(one.bytes, "B/s", ceilings.copy)} of a copy`,
      ...(one.flops > 0 ? [`${rate(one.flops, "FLOP/s", ceilings.matmul[one.dtype])} of a matrix product`] : []),
    ];
    return parts.map(plot.plain).join("<br>");
  };

  const shares = (cases) => {
    const shown = [...cases].sort((left, right) => share(right, right.ours) - share(left, left.ours)).slice(-MOST);
    const lines = (one) =>
      plot.narrow.matches ? [...one.name.split(", "), `${bench.shape(one)} ${one.dtype}`] : [bench.describe(one)];
    const label = (one) => lines(one).map(plot.plain).join("<br>");
    const ours = Object.keys(limits).map((limit) => {
      const some = shown.filter((one) => one.limit === limit);
      return {
        type: "bar",
        orientation: "h",
        name: `ours, limit: ${limit}`,
        y: some.map(label),
        x: some.map((one) => 100 * share(one, one.ours)),
        text: some.map((one) => about(one, one.ours)),
        textposition: "none",
        hoverinfo: "text",
        marker: { color: plot.style(limits[limit]) },
      };
    });
    const others = [...new Set(shown.flatMap((one) => Object.keys(one.speedup)))].filter((who) => who !== "floor");
    const dots = bench.inOrder(new Set(others)).map((who) => {
      const some = shown.filter((one) => who in one.speedup);
      return {
        mode: "markers",
        name: plot.plain(bench.label(who)),
        visible: who === "eager" ? true : "legendonly",
        y: some.map(label),
        x: some.map((one) => 100 * share(one, who)),
        text: some.map((one) => about(one, who)),
        hoverinfo: "text",
        marker: { color: bench.look(who).colour, line: { color: plot.style("--ground"), width: 1.5 }, size: 10 },
      };
    });
    const roof = { type: "line", yref: "paper", x0: 100, x1: 100, y0: 0, y1: 1, line: { color: plot.style("--ink"), width: 1 } };
    const traces = [...ours.filter((trace) => trace.x.length), ...dots];
    return plot.figure("share", "Share of the roof that each case reaches", traces, {
      xaxis: { title: "share of the roof", ticksuffix: " %", rangemode: "tozero" },
      yaxis: plot.categories(shown.map(label)),
      shapes: [roof],
      height: 110 + shown.length * (6 + 14 * Math.max(...shown.map((one) => lines(one).length))),
      bargap: 0.3,
    });
  };

  const roofs = (cases) => {
    const reach = cases.map((one) => one.flops / one.bytes);
    const dtypes = [...new Set(cases.map((one) => one.dtype))].filter((dtype) => dtype in ceilings.matmul);
    const ridges = dtypes.map((dtype) => ceilings.matmul[dtype] / ceilings.copy);
    const [least, most] = [Math.min(...reach, ...ridges) / 3, Math.max(...reach, ...ridges) * 3];
    return dtypes.map((dtype, place) => {
      const x = [least, ridges[place], most];
      return {
        x,
        y: x.map((intensity) => Math.min(intensity * ceilings.copy, ceilings.matmul[dtype])),
        mode: "lines",
        name: plot.plain(`roof ${dtype}`),
        hoverinfo: "skip",
        line: { color: plot.style("--ink"), width: 1.5, dash: ["solid", "dash", "dot", "dashdot"][place % 4] },
      };
    });
  };

  const roofline = (cases) => {
    const points = bench.inOrder(new Set(cases.flatMap((one) => [one.ours, ...Object.keys(one.speedup)]))).map((who) => {
      const some = cases.filter((one) => who === one.ours || who in one.speedup);
      const mine = some.some((one) => one.ours === who);
      return {
        x: some.map((one) => one.flops / one.bytes),
        y: some.map((one) => one.flops / bench.median(one, who)),
        mode: "markers",
        name: plot.plain(bench.label(who)),
        visible: mine || who === "eager" ? true : "legendonly",
        text: some.map((one) => about(one, who)),
        hoverinfo: "text",
        marker: {
          color: bench.look(who).colour,
          symbol: some.map((one) => `${symbol(one.dtype)}${mine ? "" : "-open"}`),
          size: 9,
          line: { color: bench.look(who).colour, width: 2 },
        },
      };
    });
    const traces = [...roofs(cases), ...points];
    const [across, up] = ["x", "y"].map((side) => traces.flatMap((trace) => trace[side]));
    return plot.figure("rates", "Attained FLOP/s against FLOP per byte, with the roofs", traces, {
      xaxis: plot.log(across, format.number, "FLOP per byte that must move"),
      yaxis: plot.log(up, format.rate("FLOP/s"), "attained rate of the products"),
      height: 420,
    });
  };

  report.sections.bench_roofline = ({ cases }) => {
    const known = cases.filter((one) => one.roof);
    if (!cases.length) return bench.nothing();
    if (!known.length) return [report.note("The ceilings of the machine were not measured in this run, so no roof is known.")];
    const products = known.filter((one) => one.flops > 0);
    const dtypes = [...new Set(products.map((one) => one.dtype))];
    return [
      report.el("h3", {}, "Share of the roof"),
      report.note(
        known.length > MOST
          ? `The ${MOST} of ${known.length} cases that are furthest from their roof, the worst at the top; the filters show others.`
          : "The furthest from its roof at the top.",
      ),
      shares(known),
      report.el("h3", {}, "Roofline of the cases with matrix products"),
      products.length
        ? roofline(products)
        : report.note("The losses shown have no matrix products: memory or the call limits them, as above."),
      products.length ? report.note(`Filled: ours. ${dtypes.map((dtype) => `${dtype}: ${symbol(dtype)}`).join(", ")}.`) : null,
    ];
  };
}
