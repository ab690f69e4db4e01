"use strict";
// Figures in the colours of the page, which follow the light or dark setting.

{
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Text for a figure: Plotly reads tags in labels, so those of the data are escaped. */
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");

  /** The text with other characters than those of a word spelt as numbers: Plotly makes a CSS class of an uid. */
  const word = (text) => text.replace(/[^a-zA-Z0-9-]/gu, (sign) => `_${sign.codePointAt(0)}`);

  const axis = (own) => ({
    gridcolor: style("--line"),
    linecolor: style("--line"),
    zerolinecolor: style("--line"),
    automargin: true,
    ...own,
    title: { text: plain(own.title ?? ""), standoff: 8 },
  });

  const powers = Array.from({ length: 40 }, (_, place) => 10 ** (place - 15));
  const round = (least, most) => {
    const digits = most / least < 2e3 ? [1, 2, 5] : [1];
    const all = powers.flatMap((power) => digits.map((digit) => digit * power));
    return all.filter((tick) => tick >= least && tick <= most);
  };

  const trim = (text) => text.replace(/\.0+(?!\d)|(?<=\.\d*[1-9])0+(?!\d)/, "");

  /** A log axis around the values. `own`: the values are themselves the ticks, if they are few and lie apart. */
  const log = (values, format, title, own = false) => {
    const sorted = [...new Set(values)].sort((left, right) => left - right);
    const [least, most] = [sorted[0] / 1.5, sorted.at(-1) * 1.5];
    const gap = (most / least) ** 0.14;
    const apart = sorted.every((value, place) => place === 0 || value >= gap * sorted[place - 1]);
    const ticks = own && apart ? sorted : round(least, most);
    const ticktext = ticks.map((tick) => trim(format(tick)));
    return { type: "log", title, tickvals: ticks, ticktext, range: [Math.log10(least), Math.log10(most)] };
  };

  /** An axis with a label for every row, the first at its beginning. */
  const categories = (labels) => ({
    type: "category",
    categoryorder: "array",
    categoryarray: labels,
    tickfont: { size: 11 },
    dtick: 1,
  });

  const narrow = matchMedia("(max-width: 40rem)");

  /** The height of a legend, whose columns are as wide as its longest name. */
  const legendHeight = (traces, width) => {
    const names = traces.filter((trace) => trace.showlegend !== false).map((trace) => trace.name ?? "");
    const columns = Math.max(1, Math.floor(width / (50 + 7.5 * Math.max(0, ...names.map((name) => name.length)))));
    return names.length > 1 ? 20 * Math.ceil(names.length / columns) : 0;
  };

  const elements = new Map(); // a figure keeps its element, and with it what the reader switched off in the legend

  /**
   * A figure; its axes take a plain title. `name` is also the name of the downloaded PNG. The zoom lasts while the
   * axes show the same data, the choice in the legend as long as the page.
   */
  const figure = (name, description, traces, layout) => {
    if (!elements.has(name)) elements.set(name, report.el("div", { class: "plot", id: name, role: "figure" }));
    const element = elements.get(name);
    element.setAttribute("aria-label", description);
    const uirevision = JSON.stringify([layout.xaxis.title, traces.map((trace) => trace.x)]);
    const colours = { paper_bgcolor: style("--ground"), plot_bgcolor: style("--ground") };
    const shown = {
      ...colours,
      font: { family: style("--font"), size: 13, color: style("--ink") },
      hoverlabel: { bgcolor: style("--raised"), bordercolor: style("--line"), font: { color: style("--ink") }, align: "left" },
      legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom", itemwidth: 30 },
      margin: { l: 8, r: 16, t: 36, b: 8 },
      uirevision: "page",
      hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--faint"), activecolor: style("--ink") },
      ...layout,
      xaxis: axis({ uirevision, ...layout.xaxis }),
      yaxis: axis({ uirevision, ...layout.yaxis }),
    };
    const options = {
      responsive: true,
      displaylogo: false,
      displayModeBar: true,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { format: "png", filename: `tlkernels-${name}`, scale: 2 },
    };
    report.later.push(() => {
      const height = layout.height + legendHeight(traces, element.clientWidth);
      element.style.height = `${height}px`;
      Plotly.react(element, traces.map((trace) => ({ ...trace, uid: word(trace.uid ?? trace.name ?? "") })), { ...shown, height }, options);
    });
    return element;
  };

  /** Quartiles as the error bars of their medians. */
  const bars = (quartiles, colour) => ({
    type: "data",
    symmetric: false,
    array: quartiles.map((three) => three && three[2] - three[1]),
    arrayminus: quartiles.map((three) => three && three[1] - three[0]),
    color: colour,
    thickness: 1.2,
    width: 3,
  });

  report.later = []; // figures are drawn once their elements are on the page and have a width
  report.plot = { figure, log, categories, bars, plain, style, narrow };
}
