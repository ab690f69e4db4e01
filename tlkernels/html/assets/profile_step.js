"use strict";
// The step's time and rates, the wait for data, and what a reader has to know of the figures.

{
  const { el, format, profile, data } = report;
  const { step, rate, starvation, notes } = data;

  const quartiles = format.range(format.time, step.seconds);

  const figures = () => [
    ["Time", [format.time(step.seconds[1]), ` (${quartiles} in half of ${step.rounds} steps)`]],
    ["Tokens per second", rated(rate.tokens, "unknown: the input has no token ids", " (padding counts)")],
    ["Samples per second", rated(rate.samples, "unknown: the input has no rows", "")],
    ["Waits for data", waits()],
  ];

  const rated = (value, unknown, more) =>
    value === null ? [unknown] : [format.count(Number(value.toPrecision(3))), more];

  const waits = () =>
    starvation.seconds === null
      ? ["unknown: the model’s forward was not seen"]
      : [`${format.time(starvation.seconds)}, ${format.share(starvation.share)} of the step`, ` (${starvation.by})`];

  const row = ([name, [figure, ...more]]) => [el("dt", {}, name), el("dd", {}, el("b", {}, figure), ...more)];

  report.sections.profile_step = () => [
    el("dl", { id: "figures" }, ...figures().flatMap(row)),
    notes.length ? el("h3", {}, "What to know") : null,
    notes.length ? profile.list("notes", notes) : null,
  ];
}
