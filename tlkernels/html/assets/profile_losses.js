"use strict";
// Each loss alone, and with its head: time, speed-up, memory and errors by each implementation.

{
  const { el, format, small, profile, data } = report;

  const shape = (loss) => loss.shape.map((dims) => dims.join("×")).join(" and ");
  const calls = (loss) => (loss.calls === 1 ? "1 call a step" : `${loss.calls} calls a step, the largest`);

  const rows = (loss) => Object.entries(loss.ways).map(([name, way]) => ({ name, way, present: name === loss.own }));

  /** Time of `base` divided by the way's; null where a result is wrong or `base` did not run. */
  const gain = (loss, base, { way }) => {
    const other = loss.ways[base];
    return other && !other.wrong && !way.wrong ? other.seconds / way.seconds : null;
  };

  const why = (loss, base, { way }) => {
    if (way.wrong) return { class: "wrong", title: way.wrong, content: way.error ? "wrong" : "not compared" };
    return { class: "absent", content: loss.ways[base] ? `${base} is wrong` : `${base} did not run` };
  };

  const over = (loss, base) => ({
    key: `over-${base}`,
    label: [small("over "), base === loss.own ? `${base} (now)` : base],
    title: `The time of ${base} divided by its own: below 1 it is slower`,
    value: (row) => gain(loss, base, row),
    cell: (row) => {
      const times = gain(loss, base, row);
      if (times === null) return why(loss, base, row);
      return { class: times < 1 ? "slower" : null, content: format.times(times) };
    },
  });

  const error = (loss, part, label, of = "") => {
    const base = loss.ways[loss.baseline]?.error;
    const read = ({ way }) => way.error?.[part];
    return {
      key: part,
      label: [small(of || "error of the "), label],
      title: `Relative error of the ${of}${label} against float64; below it that of ${loss.baseline}`,
      value: (row) => Number(read(row) ?? NaN),
      cell: (row) => {
        const wrong = row.way.wrong && row.way.error ? "wrong" : null;
        const theirs = base && row.name !== loss.baseline ? [small(`${loss.baseline}: ${profile.error(base[part])}`)] : [];
        return { class: wrong, content: [profile.known(profile.error, read(row), "not compared"), ...theirs] };
      },
    };
  };

  /** The gradients whose errors are told apart; otherwise the worst of them. */
  const gradients = (loss) => {
    const known = Object.values(loss.ways).find((way) => way.error)?.error ?? {};
    const parts = Object.keys(known).filter((part) => part !== "value" && part !== "gradient");
    if (parts.length === 0) return [error(loss, "gradient", "gradient")];
    return parts.map((part) => error(loss, part, part, "gradient of "));
  };

  const read = ({ way }) => way.expected;
  const expected = profile.figure("expected", "Step, expected", "Speed-up of the step, from these times", read, format.times);

  const columns = (loss, isUnit) => [
    report.words("name", "Implementation", (row) => row.name, {
      head: true,
      cell: (row) => [row.name, row.present ? small("in the loop now") : ""],
    }),
    profile.figure("seconds", "Time alone", "Forward and backward of one call", ({ way }) => way.seconds, format.time),
    ...(loss.calls > 1
      ? [profile.figure("step", "In a step", "All calls of a step, by their sizes", ({ way }) => way.step_seconds, format.time)]
      : []),
    ...[...new Set([loss.own, loss.baseline])].map((base) => over(loss, base)),
    ...(isUnit ? [expected] : []),
    profile.figure("memory", "Memory", "Peak above the inputs", ({ way }) => way.peak_bytes, format.bytes, "not measured"),
    error(loss, "value", "loss"),
    ...gradients(loss),
  ];

  const reasons = (loss) => [
    ...Object.entries(loss.ways).filter(([, way]) => way.wrong).map(([name, way]) => `${name}: ${way.wrong}`),
    ...[...Map.groupBy(Object.entries(loss.refused), ([, reason]) => reason)].map(
      ([reason, some]) => `no ${some.map(([name]) => name).join(", ")}: ${reason}`,
    ),
  ];

  const one = (loss, place, isUnit = false) => {
    const lines = reasons(loss);
    return el(
      "div",
      {},
      el("h3", {}, `${loss.name} (${loss.own})`),
      el("p", {}, `${calls(loss)}: ${shape(loss)}, ${loss.dtype}.`),
      isUnit
        ? report.note(
            "The head and the loss as one, alone. native, triton and reference are those of linear_cross_entropy, which " +
              "takes the place of both. What is expected of the step follows from these times; no step was run with it.",
          )
        : null,
      rows(loss).length
        ? report.table(`loss-${place}`, `Implementations of loss ${place + 1}`, columns(loss, isUnit), rows(loss))
        : report.note("No implementation could be measured alone."),
      lines.length ? profile.list(`reasons-${place}`, lines) : null,
    );
  };

  const withHead = (said, place) =>
    said.unit
      ? one(said.unit, data.losses.length + place, true)
      : report.note(`linear_cross_entropy in place of the head and ${said.loss} was not tried: ${said.why_not}.`);

  report.sections.profile_losses = () =>
    data.losses.length
      ? [...data.losses.map((loss, place) => one(loss, place)), ...data.head_and_loss.map(withHead)]
      : [report.note("No loss was seen in the steps, so none was measured alone.")];
}
