"use strict";
// The phases of a step under the profiler: one bar, and a table.

{
  const { el, format, plot, profile, data } = report;
  const { phases, traced_step: traced, overhead } = data;
  const LEGIBLE = 0.06; // of the bar

  const bar = () =>
    plot.figure(
      "phase-bar",
      "The step as a bar of its phases",
      phases.map((row) => ({
        type: "bar",
        orientation: "h",
        name: plot.plain(row.name),
        y: [""],
        x: [row.seconds],
        marker: profile.marker(row.name),
        text: [row.share < LEGIBLE ? "" : format.share(row.share)],
        textposition: "inside",
        insidetextanchor: "middle",
        textangle: 0,
        textfont: { color: plot.style("--ground"), size: 13 },
        hovertemplate: `${plot.plain(row.name)}: ${format.time(row.seconds)}, ${format.share(row.share)}<extra></extra>`,
        showlegend: false, // the table beside it is one
      })),
      {
        barmode: "stack",
        xaxis: { title: "time of a step under the profiler", tickformat: "~s", ticksuffix: "s" },
        yaxis: { type: "category", showticklabels: false, showgrid: false },
        height: 170,
      },
    );

  const columns = [
    report.words("name", "Phase", (row) => row.name, {
    head: true,
    wrap: true,
    cell: (row) => [profile.swatch(row.name), row.name],
  }),
    profile.figure("seconds", "Time", "Sort by time", (row) => row.seconds, format.time),
    profile.figure("share", "Share", "Sort by share of the step", (row) => row.share, format.share),
    profile.figure("peak", "Peak memory", "Sort by peak memory", (row) => row.peak_bytes, format.bytes, "not measured"),
  ];

  report.sections.profile_phases = () => [
    el(
      "div",
      { class: "halves" },
      el("div", {}, bar()),
      report.table("phase-table", "Phases of the step", columns, phases),
    ),
    report.note(
      `Means of ${traced.steps} steps under the profiler, which take ${format.time(traced.seconds)}: ` +
        `${format.number(overhead)} times as long as steps without it.`,
    ),
  ];
}
