"use strict";
// How long the step's matrix products would take at the measured rate, as a share of the step.

{
  const { el, format, profile, data } = report;
  const flop = format.rate("FLOP");
  const rate = format.rate("FLOP/s");

  const rows = () =>
    Object.entries(data.flops_by_dtype).map(([dtype, flops]) => {
      const rate = data.ceiling[dtype] ?? null;
      return { dtype, flops, rate, least: rate && flops / rate };
    });

  const columns = [
    report.words("dtype", "Dtype", (row) => row.dtype, { head: true }),
    profile.figure("flops", "In a step", "Operations of matrix products", (row) => row.flops, flop),
    profile.figure("rate", "Ceiling", "The rate of large matrix products, measured on this machine", (row) => row.rate, rate, "not measured"),
    profile.figure("least", "Time at the ceiling", "The operations divided by the ceiling", (row) => row.least, format.time),
    profile.figure("part", "Of the step", "That time divided by the step’s", (row) => row.least && row.least / data.step.seconds[1], format.share),
  ];

  report.sections.profile_hardware = () => {
    if (data.flops === null) {
      return [el("p", { id: "mfu" }, "Unknown: no operation of a matrix product was counted in the step.")];
    }
    const speed = rate(data.flops / data.step.seconds[1]);
    const time = format.time(data.step.seconds[1]);
    const share = profile.known(format.share, data.mfu, "An unknown share");
    return [
      el("p", { id: "mfu" }, el("b", {}, share), ` of the ceiling: ${flop(data.flops)} in ${time} are ${speed}.`),
      report.table("hardware-table", "Operations and ceilings", columns, rows()),
    ];
  };
}
