"use strict";
// Numbers with units, in three significant digits. NaN and infinities arrive as strings and stay as they are.

{
  const digits = (value) => (value !== 0 && Math.abs(value) < 0.01 ? value.toExponential(1) : plainDigits(value));

  const plainDigits = (value) => {
    const text = value.toPrecision(3);
    return text.includes("e") ? String(Math.round(value)) : text;
  };

  const scaled = (units) => (value) => {
    if (typeof value === "string") return value;
    const [size, unit] = units.find(([size]) => Math.abs(value) >= 0.9995 * size) ?? units.at(-1);
    return `${plainDigits(value / size)}\u00a0${unit}`;
  };

  report.format = {
    time: scaled([[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]]),
    bytes: (value) =>
      value === 0 ? "0\u00a0B" : scaled([[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]])(value),
    rate: (unit) => scaled([[1e12, `T${unit}`], [1e9, `G${unit}`], [1e6, `M${unit}`], [1e3, `k${unit}`], [1, unit]]),
    count: (value) => (value < 1e4 ? String(value) : scaled([[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])(value)),
    number: (value) => (typeof value === "string" ? value : digits(value)),
    share: (value) => (value < 0.01 ? `${digits(100 * value)}\u00a0%` : `${Math.round(100 * value)}\u00a0%`),
    error: (value) => (typeof value === "string" ? value : value === 0 ? "0" : value.toExponential(1)),
    /** "2.1 – 2.3 ms" of [low, middle, high]: both ends. */
    range: (format, [low, , high]) => `${format(low)} – ${format(high)}`,
    times: (value) => `${digits(value)}×`,
  };
}
