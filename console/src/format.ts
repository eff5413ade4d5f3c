/** Numbers and times as people read them. */

const INTEGER = new Intl.NumberFormat("en");
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" }); // not hour12: false, by which English midnight is 24:00
const DAY = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

const OFF_MS = 10_000;
let ahead = 0; // of the service's clock, in milliseconds

/** What the service's clock shows: where this browser's is off, ages are by that one. A little of it is the way here. */
export function told(date: string | null): void {
  const off = Date.now() - Date.parse(date ?? "");
  ahead = Math.abs(off) > OFF_MS ? off : 0;
}

/** By the service's clock, in seconds since 1970. */
export const now = (): number => (Date.now() - ahead) / 1000;

export const count = (n: number): string => INTEGER.format(n);

/** Five significant digits, without the noise of a float. */
export function number(value: number | null | undefined, unit?: string | null): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const shown = size !== 0 && (size >= 1e7 || size < 1e-4) ? value.toExponential(3) : decimal(value, size);
  return unit ? `${shown} ${unit}` : shown;
}

/** Made once: making one takes longer than using it a hundred times. */
const digits = (least: number, most: number): Intl.NumberFormat => new Intl.NumberFormat("en", { minimumFractionDigits: least, maximumFractionDigits: most });
const FIXED = [0, 1, 2, 3, 4, 5].map((decimals) => digits(decimals, decimals));
const [WHOLE, TENTHS, HUNDREDTHS] = FIXED as [Intl.NumberFormat, Intl.NumberFormat, Intl.NumberFormat];
const SMALL = digits(0, 4);

const decimal = (value: number, size: number): string => (size >= 1000 ? WHOLE : size >= 100 ? TENTHS : size >= 1 ? HUNDREDTHS : SMALL).format(value);

/** A number beside an axis whose marks are `step` apart: with as many decimals as tell them apart. */
export function marked(value: number, step: number): string {
  const size = Math.abs(value);
  if (size >= 1e7 || (size !== 0 && step < 0.99e-5)) return value.toExponential(Math.min(9, Math.max(0, Math.floor(Math.log10(size) + 1e-9) - Math.floor(Math.log10(step) + 1e-9)))).replace("e+", "e");
  return FIXED[Math.max(0, -Math.floor(Math.log10(step) + 1e-9))]!.format(value);
}

export const score = (value: number | null | undefined): string => (value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(2));

/** A p-value as a chance: "1 in 12,000". */
export function chance(p: number | null | undefined): string {
  if (p === null || p === undefined) return "–";
  if (p >= 0.1) return "ordinary";
  const one = 1 / p;
  return one >= 1e9 ? `1 in ${one.toExponential(0).replace(/e\+(\d+)/, (_, power: string) => `·10${[...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)]).join("")}`)}` : `1 in ${count(Number(one.toPrecision(2)))}`;
}

/** A chance as a share. */
export function share(p: number): string {
  const percent = 100 * p;
  return percent < 0.1 ? "< 0.1 %" : `${percent.toFixed(percent < 9.95 ? 1 : 0)} %`;
}

export function clock(seconds: number): string {
  const date = new Date(1000 * seconds);
  return Math.abs(now() - seconds) < 20 * 3600 ? CLOCK.format(date) : DAY.format(date);
}

export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 172_800) return `${Math.floor(whole / 3600)} h`;
  return `${Math.floor(whole / 86_400)} d`;
}

/** How long ago; times ahead of the clock are now. */
export function ago(seconds: number): string {
  const age = now() - seconds;
  return age < 2 ? "now" : `${duration(age)} ago`;
}
