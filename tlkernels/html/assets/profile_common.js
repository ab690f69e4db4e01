"use strict";
// What the sections of a profile share: words for what is missing, the colours of phases, a column of a figure.

{
  const { data, format, plot } = report;

  /** The figure in its format, or words where there is none. */
  const known = (format, value, words = "unknown") => (value === null || value === undefined ? words : format(value));

  const strange = { nan: "not a number", inf: "infinite", "-inf": "infinite" };
  const error = (value) => strange[value] ?? format.error(value);

  const looks = {
    data: ["--c4"],
    "host to device": ["--c5"],
    "forward without gradient": ["--c6"],
    "forward of the trunk": ["--c0"],
    "forward, not told apart": ["--c0"],
    "head and loss forward": ["--c1"],
    "head and loss backward": ["--c1", "/"],
    "backward of the trunk": ["--c0", "/"],
    "backward, not told apart": ["--c0", "/"],
    optimiser: ["--c2"],
    communication: ["--c3"],
    "idle: the GPU waits for the host": ["--line"],
  };

  /** The marker of a phase's bar. */
  const marker = (phase) => {
    const [colour, shape = ""] = looks[phase] ?? ["--faint"];
    const hatch = { fillmode: "overlay", fgcolor: plot.style("--ground"), fgopacity: 0.45, size: 8, solidity: 0.25 };
    return { color: plot.style(colour), pattern: { shape, ...hatch } };
  };

  /** The same as a square before the name of a phase. */
  const swatch = (phase) => {
    const [colour, hatched] = looks[phase] ?? ["--faint"];
    return report.el("i", { class: hatched ? "swatch hatched" : "swatch", style: `background-color: var(${colour})` });
  };

  /** A column of a figure; a missing one is given in words. */
  const figure = (key, label, title, read, format, words = "unknown") => ({
    key,
    label,
    title,
    value: read,
    cell: (row) => known(format, read(row), words),
  });

  /** A median with its quartiles below. */
  const spread = (format, three) => [format(three[1]), report.small(report.format.range(format, three))];

  const ways = Object.keys(data.step_speedups);

  report.profile = {
    known,
    error,
    marker,
    swatch,
    figure,
    spread,
    ways,
    /** How a way to compute the loss is called in a sentence or a table of steps. */
    step: (way) => (way === "as it is" ? "the loss as it is" : way),
    list: (id, lines) => report.el("ul", { id }, ...lines.map((line) => report.el("li", {}, line))),
  };
}
