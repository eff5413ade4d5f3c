/** Dark or light: as the system has it, until one of them is chosen. */

const KEY = "onset-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set<() => void>();

const chosen = (): string | null => localStorage.getItem(KEY);
export const dark = (): boolean => (chosen() ?? (system.matches ? "dark" : "light")) === "dark";

function apply(): void {
  document.documentElement.dataset["theme"] = dark() ? "dark" : "light";
  for (const listener of listeners) listener();
}

export function toggle(): void {
  const next = dark() ? "light" : "dark";
  if ((next === "dark") === system.matches) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, next);
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

let cached: Colours | null = null;
onTheme(() => (cached = null));

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

system.addEventListener("change", apply);
apply();
