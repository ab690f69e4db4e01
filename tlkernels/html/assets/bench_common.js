"use strict";
// What the sections of a benchmark share: names, and the colours of contestants.

{
  const { data, plot } = report;
  const own = ["auto", "native", "triton", "reference"];
  const names = { compile: "torch.compile", floor: "the floor" };
  const first = ["auto", "eager", "compile", "native", "triton", "reference"];

  const used = new Set(data.cases.flatMap((one) => [...Object.keys(one.seconds), ...Object.keys(one.absent)]));
  const contestants = [
    ...first.filter((name) => used.has(name)),
    ...[...used].filter((name) => !first.includes(name) && name !== "floor").sort(),
    ...(used.has("floor") ? ["floor"] : []),
  ];

  const name = (contestant) => names[contestant] ?? contestant;

  /** Seven colours that the colour-blind can tell apart, then the same again in other dashes. The floor is grey. */
  const look = (contestant) => {
    if (contestant === "floor") return { colour: plot.style("--faint"), dash: "dot" };
    const place = contestants.indexOf(contestant);
    return { colour: plot.style(`--c${place % 7}`), dash: ["solid", "dash", "longdashdot"][Math.floor(place / 7) % 3] };
  };

  const devices = new Set(data.cases.map((one) => one.device)).size;

  const shape = (one) => one.shape.join("×");

  report.bench = {
    contestants,
    name,
    look,
    shape,
    label: (contestant) => (own.includes(contestant) ? `${contestant} (ours)` : name(contestant)),
    describe: (one) => `${one.name} ${shape(one)} ${one.dtype}${devices > 1 ? ` ${one.device}` : ""}`,
    median: (one, contestant) => one.seconds[contestant]?.[1] ?? null,
    ours: (one) => one.seconds[one.ours],
    /** Ours first, then the others in their fixed order. */
    inOrder: (set) => contestants.filter((contestant) => set.has(contestant)),
    nothing: () => [report.note("No case passes the filters.")],
  };
}
