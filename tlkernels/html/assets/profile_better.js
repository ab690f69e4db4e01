"use strict";
// The same steps with each implementation of the loss, on Amdahl's curve.

{
  const { el, format, plot, profile, data } = report;
  const { step_speedups: steps, baseline, amdahl, sentences } = data;
  const { ways } = profile;
  const POINTS = 60;
  const over = ways.length === 0 ? "" : ` over ${profile.step(baseline)}`;

  const columns = [
    report.words("way", "Same loop with", (way) => profile.step(way), { head: true }),
    {
      key: "seconds",
      label: "Step",
      title: "Median time of a step; below it the quartiles",
      value: (way) => steps[way].seconds[1],
      cell: (way) => profile.spread(format.time, steps[way].seconds),
    },
    profile.figure("kernel", "Speed-up of the loss", "Of the loss alone", (way) => amdahl?.kernels[way], format.times),
    {
      key: "speedup",
      label: "Speed-up of the step",
      title: "Within rounds of steps in turns; below it the quartiles",
      value: (way) => steps[way].speedup[1],
      cell: (way) => {
        if (way === baseline) return { class: "absent", content: "compared with" };
        const three = steps[way].speedup;
        return { class: three[2] < 1 ? "slower" : null, content: profile.spread(format.times, three) };
      },
    },
    profile.figure("expected", "Expected", "From the time of the loss alone", (way) => steps[way].expected, format.times),
  ];

  /** The step's speed-up if only the loss becomes faster. */
  const law = (kernel) => 1 / (1 / amdahl.bound + (1 - 1 / amdahl.bound) / kernel);

  const curve = (least, most) => {
    const x = Array.from({ length: POINTS + 1 }, (_, place) => least * (most / least) ** (place / POINTS));
    const line = { mode: "lines", hoverinfo: "skip" };
    const ink = plot.style("--ink");
    return [
      { ...line, name: "Amdahl’s law", x, y: x.map(law), line: { color: ink, width: 1.5 } },
      {
        ...line,
        name: plot.plain(`a loss that costs nothing: ${format.times(amdahl.bound)}${over}`),
        x: [least, most],
        y: [amdahl.bound, amdahl.bound],
        line: { color: ink, width: 1.5, dash: "dash" },
      },
    ];
  };

  const point = (way, place) => {
    const three = steps[way].speedup;
    const kernel = amdahl.kernels[way];
    const spread = format.range(format.times, three);
    const about = `${profile.step(way)}: loss ${format.times(kernel)}, step ${format.times(three[1])} (${spread})`;
    return {
      mode: "markers",
      name: plot.plain(profile.step(way)),
      x: [kernel],
      y: [three[1]],
      error_y: plot.bars([three], plot.style(`--c${place % 7}`)),
      marker: { color: plot.style(`--c${place % 7}`), size: 10 },
      hovertemplate: `${plot.plain(about)}<extra></extra>`,
    };
  };

  const picture = () => {
    const placed = ways.filter((way) => way in amdahl.kernels);
    const kernels = placed.map((way) => amdahl.kernels[way]);
    const [least, most] = [Math.min(0.5, ...kernels), Math.max(20, ...kernels)];
    const traces = [...curve(least / 1.5, 1.5 * most), ...placed.map(point)];
    return plot.figure("amdahl", "Speed-up of the step against that of the loss", traces, {
      xaxis: plot.log([least, most], format.times, "speed-up of the loss alone"),
      yaxis: { title: "speed-up of the step", ticksuffix: "×" },
      height: 330,
    });
  };

  const unknown = () => {
    if (data.loss_seconds === null) return "no loss was measured alone in the way that the loop takes";
    return data.bound === null ? "the loss alone takes as long as the step" : `the loss was not measured alone${over}`;
  };

  const turns = () => {
    if (!ways.length) return [report.note("No steps were run with another implementation of the loss.")];
    const rounds = steps[ways[0]].rounds;
    return [
      report.table("steps-table", "Steps with each implementation", columns, ways),
      report.note(
        `${rounds} rounds of steps in turns, and speed-ups${over}. ` +
          "What is expected follows from the time of the losses alone.",
      ),
    ];
  };

  report.sections.profile_better = () => {
    const answer = sentences.length ? sentences : ["No loss was seen, so this is unknown."];
    return [
      profile.list("answer", answer),
      ...turns(),
      amdahl ? picture() : report.note(`Amdahl’s bound is not known: ${unknown()}.`),
    ];
  };
}
