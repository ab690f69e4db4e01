"use strict";
// What changed since an earlier profile: figures with quartiles, the worse first; then phases, which have none.

{
  const { el, format, profile, data } = report;
  const { before } = data;
  const formats = { time: format.time, times: format.times, bytes: format.bytes };

  const shown = (row, three) => (row.form === "bytes" ? format.bytes(three[1]) : profile.spread(formats[row.form], three));
  const ratio = (row) => row.now[1] / row.then[1];

  const side = (key, label) => ({
    key,
    label,
    title: `Sort by ${label.toLowerCase()}`,
    value: (row) => row[key][1],
    cell: (row) => shown(row, row[key]),
  });

  const columns = [
    report.words("what", "What", (row) => row.what, { head: true, wrap: true }),
    side("then", "Then"),
    side("now", "Now"),
    profile.figure("ratio", "Now / then", "Sort by change", ratio, format.number),
    report.words("word", "Change", (row) => row.word || "none", {
      cell: (row) => ({ class: row.worse ? "slower" : row.word ? null : "absent", content: row.word || "none" }),
    }),
  ];

  const phase = (key, label) =>
    profile.figure(key, label, `Sort by ${label.toLowerCase()}`, (row) => row[key], format.time, "no such phase");
  const share = (row) => (row.then && row.now !== null ? row.now / row.then : null);
  const phases = [
    report.words("name", "Phase", (row) => row.name, { head: true, wrap: true }),
    phase("then", "Then"),
    phase("now", "Now"),
    profile.figure("ratio", "Now / then", "Sort by change", share, format.number),
  ];

  report.sections.profile_before = () => {
    const { changes, differences } = before;
    const order = (row) => (row.worse ? 0 : row.word ? 1 : 2);
    const rows = [...changes].sort((left, right) => order(left) - order(right));
    const worse = changes.filter((row) => row.worse).length;
    const better = changes.filter((row) => row.word).length - worse;
    const count = changes.length === 1 ? "1 figure" : `${changes.length} figures`;
    return [
      el("p", { id: "sum" }, `Of ${count} in both profiles ${worse} became worse and ${better} better.`),
      report.table("changes", "Changes", columns, rows),
      el("h3", {}, "Phases"),
      report.note("Means of few steps without quartiles, so whether they changed is not judged."),
      report.table("changes-phases", "Phases then and now", phases, before.phases),
      el("h3", {}, "What else differs between the profiles"),
      differences.length ? profile.list("differences", differences) : report.note("Machine and versions are the same."),
    ];
  };
}
