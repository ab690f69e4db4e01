"use strict";
// A row for each case: ours, its distance from the roof, every contestant, memory and error.

{
  const { format, bench, small } = report;

  const served = report.words("served", "Served by", (one) => one.served ?? "–");
  const loss = report.words("loss", "Loss", (one) => one.name, { head: true, wrap: true });
  const shape = report.words("shape", "Shape", bench.shape, { value: (one) => one.elements });

  const time = {
    key: "time",
    label: "Time",
    title: "Our median time of a forward and a backward; below it the quartiles",
    value: (one) => bench.median(one, one.ours),
    cell: (one) => [format.time(bench.ours(one)[1]), small(format.range(format.time, bench.ours(one)))],
  };

  const roof = {
    key: "roof",
    label: "Of roof",
    title: "The least time that the machine allows, divided by ours; below it what limits",
    value: (one) => one.roof && one.roof / bench.median(one, one.ours),
    cell: (one) => (one.roof ? [format.share(one.roof / bench.median(one, one.ours)), small(one.limit)] : "–"),
  };

  /** Why a contestant has no speed-up, or its speed-up. */
  const versus = (one, contestant) => {
    const three = one.speedup[contestant];
    if (three) {
      const slower = three[1] < 1 && contestant !== "floor";
      return {
        class: slower ? "slower" : null,
        title: `${bench.name(contestant)}: ${format.time(bench.median(one, contestant))}`,
        content: [format.number(three[1]), small(format.range(format.number, three))],
      };
    }
    if (contestant in one.wrong) return { class: "wrong", title: one.wrong[contestant], content: "wrong" };
    if (contestant in one.absent) return { class: "absent", title: one.absent[contestant], content: "did not run" };
    return "–";
  };

  const over = (contestant) => ({
    key: `over ${contestant}`,
    label: [report.small("over "), bench.name(contestant)],
    title:
      contestant === "floor"
        ? "The floor's time divided by ours. The floor is work that no implementation can avoid"
        : "Its time divided by ours: below 1 we are slower. Below it the quartiles",
    value: (one) => one.speedup[contestant]?.[1],
    cell: (one) => versus(one, contestant),
  });

  const memory = {
    key: "memory",
    label: "Memory",
    title: "Our peak above the inputs",
    value: (one) => one.memory[one.ours],
    cell: (one) => (one.ours in one.memory ? format.bytes(Math.max(0, one.memory[one.ours])) : "–"),
  };

  const part = (one) =>
    one.memory.eager > 0 && one.ours in one.memory ? Math.max(0, one.memory[one.ours]) / one.memory.eager : null;
  const share = {
    key: "share",
    label: "Of eager’s",
    title: "Our peak above the inputs, divided by eager’s",
    value: part,
    cell: (one) =>
      part(one) === null ? "–" : { class: part(one) > 1 ? "slower" : null, content: format.share(part(one)) },
  };

  const error = (label, who) => ({
    key: label.toLowerCase(),
    label,
    title: "Relative error against float64 of the gradient; below it of the loss",
    value: (one) => Number(one.error[who(one)]?.gradient ?? NaN),
    cell: (one) => {
      const found = one.error[who(one)];
      return found ? [format.error(found.gradient), small(format.error(found.value))] : "–";
    },
  });

  const compiled = (one) => (one.first.compile ? small(format.time(one.first.compile)) : null);
  const first = {
    key: "first",
    label: "First call",
    title: "Our first call: compilation and warm-up; below it that of torch.compile",
    value: (one) => one.first[one.ours],
    cell: (one) => (one.ours in one.first ? [format.time(one.first[one.ours]), compiled(one)] : "–"),
  };

  report.sections.bench_table = ({ cases }) => {
    if (!cases.length) return bench.nothing();
    const devices = new Set(cases.map((one) => one.device)).size;
    const present = new Set(cases.flatMap((one) => [one.speedup, one.wrong, one.absent].flatMap(Object.keys)));
    const columns = [
      loss,
      shape,
      report.words("dtype", "Dtype", (one) => one.dtype),
      ...(devices > 1 ? [report.words("device", "Device", (one) => one.device)] : []),
      ...(cases.some((one) => one.served) ? [served] : []),
      time,
      ...(cases.some((one) => one.roof) ? [roof] : []),
      ...(present.delete("floor") ? [over("floor")] : []),
      ...bench.inOrder(present).map(over),
      memory,
      share,
      error("Our error", (one) => one.ours),
      error("Eager’s error", () => "eager"),
      ...(cases.some((one) => one.ours in one.first) ? [first] : []),
    ];
    return [report.table("table", "Every case", columns, cases)];
  };
}
