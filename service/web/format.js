/** Figures as text. What is not known is a dash. */

const UNKNOWN = "–";
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits, and all of those before the point. */
export function number(value) {
  if (!isKnown(value)) return UNKNOWN;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return digits > 6 ? value.toExponential(2) : value.toFixed(digits);
}

/** 11534336 is `11.0 MiB`. */
export function bytes(value) {
  if (!isKnown(value)) return UNKNOWN;
  const power = value < 1024 ? 0 : Math.min(UNITS.length - 1, Math.floor(Math.log2(value) / 10));
  return `${power === 0 ? value : number(value / 1024 ** power + 1e-12)} ${UNITS[power]}`;
}

/** 0.0123 is `12.3 ms`. */
export function seconds(value) {
  if (!isKnown(value)) return UNKNOWN;
  return value < 1 ? `${number(value * 1000)} ms` : `${number(value)} s`;
}

/** 0.493 is `49.3 %`. */
export function percent(value) {
  return isKnown(value) ? `${(value * 100).toFixed(1)} %` : UNKNOWN;
}

/** Tokens per second. */
export function rate(value) {
  return isKnown(value) ? `${number(value)} tokens/s` : UNKNOWN;
}
