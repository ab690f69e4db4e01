"use strict";
// The peak of each phase, and the logits beside them.

{
  const { el, format, plot, profile, data } = report;
  const { phases, peak_bytes: peak, logits } = data;
  const kind = data.device === "cpu" ? "resident memory of the process" : "memory of tensors on the GPU";

  const size = () => `${logits.rows}×${logits.classes} in ${logits.dtype.replace("torch.", "")}`;

  const about = () => {
    if (!logits) return "The losses that were seen have no logits.";
    if (!logits.stored) return `The logits (${size()}) are not stored; they would take ${format.bytes(logits.bytes)}.`;
    const share = profile.known(format.share, logits.share_of_peak, "an unknown share");
    const more = "Their gradient takes as much again where it is stored.";
    return `The logits (${size()}) take ${format.bytes(logits.bytes)}, ${share} of the peak. ${more}`;
  };

  const bars = (name, rows, marker) => ({
    type: "bar",
    orientation: "h",
    name,
    y: rows.map((row) => plot.plain(`${row.name}: ${format.bytes(row.bytes)}`)),
    x: rows.map((row) => row.bytes),
    marker,
    hovertemplate: "%{y}<extra></extra>",
    showlegend: false,
  });

  const picture = () => {
    const known = phases.filter((row) => row.peak_bytes !== null).map((row) => ({ name: row.name, bytes: row.peak_bytes }));
    const all = known.map((row) => bars(row.name, [row], profile.marker(row.name)));
    if (logits) {
      const name = logits.stored ? "the logits" : "the logits, if they were stored";
      const outline = { color: "rgba(0,0,0,0)", line: { color: plot.style("--ink"), width: 1.5 } };
      const marker = logits.stored ? { color: plot.style("--ink") } : outline;
      all.push(bars(name, [{ name, bytes: logits.bytes }], marker));
    }
    const labels = all.flatMap((trace) => trace.y);
    return plot.figure("memory-bars", "Peak of memory by phase", all, {
      barmode: "overlay",
      xaxis: { tickformat: "~s", ticksuffix: "B", rangemode: "tozero" },
      yaxis: { ...plot.categories(labels), autorange: "reversed" },
      height: 100 + 30 * labels.length,
    });
  };

  const highest = () => {
    const first = phases.find((row) => row.peak_bytes === peak);
    const where = first ? `, first reached in the phase “${first.name}”` : "";
    return `The peak of the ${kind} is ${format.bytes(peak)}${where}.`;
  };

  report.sections.profile_memory = () => [
    el("p", { id: "peak" }, peak === null ? "Peak memory cannot be measured on this machine." : highest()),
    data.losses.length ? el("p", { id: "logits" }, about()) : null,
    peak === null ? null : picture(),
  ];
}
