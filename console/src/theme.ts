/** Dark or light: as the system has it, until one of them is chosen. */

import { keep, kept } from "./kept";

const KEY = "onset-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const paper = matchMedia("print"); // which is white
const listeners = new Set<() => void>();

let chosen = kept(KEY);
export const dark = (): boolean => !paper.matches && (chosen ?? (system.matches ? "dark" : "light")) === "dark";

function apply(): void {
  document.documentElement.dataset["theme"] = dark() ? "dark" : "light";
  for (const listener of listeners) listener();
}

export function toggle(): void {
  const next = dark() ? "light" : "dark";
  chosen = (next === "dark") === system.matches ? null : next;
  keep(KEY, chosen);
  apply();
}

/** Called when the colours change; returns what ends that. */
export function onTheme(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** The page's colours as canvases need them. */
export interface Colours {
  ink: string;
  quiet: string;
  line: string;
  edge: string;
  blue: string;
  blueSoft: string;
  alarm: string;
  alarmSoft: string;
  alarmEdge: string;
  paper: string;
  font: string;
}

/** The same as pixels, without their alpha: blue, green, red from the highest byte down. */
export type Pixels = Record<"ink" | "line" | "blue" | "alarmEdge", number>;

let cached: Colours | null = null;
let packed: Pixels | null = null;
onTheme(() => (cached = packed = null));

export function colours(): Colours {
  if (cached) return cached;
  const style = getComputedStyle(document.documentElement);
  const get = (name: string): string => style.getPropertyValue(name).trim();
  cached = {
    ink: get("--ink"),
    quiet: get("--quiet"),
    line: get("--line"),
    edge: get("--edge"),
    blue: get("--blue"),
    blueSoft: get("--blue-soft"),
    alarm: get("--alarm"),
    alarmSoft: get("--alarm-soft"),
    alarmEdge: get("--alarm-edge"),
    paper: get("--paper"),
    font: `11px ${get("--font")}`,
  };
  return cached;
}

export function pixels(): Pixels {
  const { ink, line, blue, alarmEdge } = colours();
  return (packed ??= { ink: pixelOf(ink), line: pixelOf(line), blue: pixelOf(blue), alarmEdge: pixelOf(alarmEdge) });
}

/** Whatever way it is written: the browser says what it is. */
function pixelOf(colour: string): number {
  const pen = new OffscreenCanvas(1, 1).getContext("2d")!;
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  const [red = 0, green = 0, blue = 0] = pen.getImageData(0, 0, 1, 1).data;
  return (blue << 16) | (green << 8) | red;
}

system.addEventListener("change", apply);
paper.addEventListener("change", apply);
apply();
