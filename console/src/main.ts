/** The shell: bar, addresses behind #, keys. Each view is mounted into <main> and says how it is left. */

import "uplot/dist/uPlot.min.css";
import { Refused, ask, asking, loadedModels, streamPath, type AlertCount } from "./api";
import { alertAddress, alertsView } from "./alerts";
import { backtestView } from "./backtest";
import { ICONS, fill, h, icon, text } from "./dom";
import { count } from "./format";
import { fleetView } from "./fleet";
import { modelView } from "./model";
import { patternsView } from "./patterns";
import { streamView } from "./stream";
import { dark, onTheme, toggle } from "./theme";
import type { Shell, View } from "./view";

const TABS = [
  ["fleet", "Fleet", "g f"],
  ["alerts", "Alerts", "g a"],
  ["patterns", "Patterns", "g p"],
  ["backtest", "Backtest", "g b"],
  ["model", "Model", "g m"],
] as const;

const KEYS: [string, string][] = [
  ["/", "Search streams, or alerts by their stream"],
  ["j  k", "Next, previous (arrows too)"],
  ["Enter", "Open what is selected"],
  ["Esc", "Back"],
  ["Space", "Pause and go on, in a stream"],
  ["0", "Whole history, in a stream"],
  ["a", "Acknowledge the alert, those selected, or that of the stream"],
  ["x", "Select the alert (X: all that are listed)"],
  ["g f", "Fleet (g a: alerts, g p: patterns, g b: backtest, g m: model)"],
  ["t", "Dark or light"],
  ["?", "These keys"],
];

const main = h("main", { id: "main", tabindex: "-1" });
const status = h("div", { class: "status", role: "status", hidden: true }, h("span"));
const trouble = h("p", { class: "trouble", role: "alert", hidden: true });
const badge = h("span", { class: "badge" });
const themeButton = h("button", { class: "button bare", type: "button", onclick: toggle });
const help = keysDialog();
const tabs = TABS.map(([view, name]) => h("a", { href: `#/${view}`, "data-view": view, hidden: view === "patterns" }, name, view === "alerts" && badge));
let current: View | null = null;
let gone = false;

fill(
  document.getElementById("app")!,
  h(
    "header",
    { class: "bar" },
    h("a", { class: "skip", href: "#main", onclick: skip }, "Skip to content"),
    h("a", { class: "brand", href: "#/fleet", "aria-label": "Onset, fleet" }, mark(), h("span", {}, "Onset")),
    h("nav", { "aria-label": "Views" }, ...tabs),
    h("div", { class: "spacer" }),
    status,
    themeButton,
    h("button", { class: "button bare wide", type: "button", onclick: () => help.showModal(), "aria-label": "Keys", title: "Keys (?)" }, "?"),
  ),
  trouble,
  main,
);
document.body.append(help);

function mark(): SVGSVGElement {
  const svg = icon("M1.5 13h3.6l2-9 2.8 13 2-7h6.6");
  svg.setAttribute("class", "icon mark");
  return svg;
}

function skip(event: Event): void {
  event.preventDefault();
  main.focus();
}

const shell: Shell = {
  query: new URLSearchParams(),
  link(link) {
    status.hidden = link === null;
    if (!link) return;
    status.dataset["state"] = link.state;
    text(status.firstElementChild!, { live: "Live", connecting: "Connecting", away: "Not connected", paused: "Resting" }[link.state]);
    status.title = link.detail;
  },
  alerting({ count: open, by_severity, complete }) {
    trouble.hidden = true;
    const words = `${count(open)}${complete ? "" : "+"}`;
    text(badge, open ? words : "");
    badge.title = `${words} open, ${count(by_severity["critical"] ?? 0)} critical`;
    badge.setAttribute("aria-label", badge.title);
  },
};

function route(): void {
  const [path = "", query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [view = "", ...rest] = path.split("/");
  shell.query = new URLSearchParams(query);
  current?.leave();
  for (const dialog of document.querySelectorAll<HTMLDialogElement>("dialog[open]")) dialog.close(); // it asked about what is left
  shell.link(null);
  const inside = main.contains(document.activeElement);
  main.replaceChildren();
  main.scrollTop = 0;
  const id = rest.map(decoded).join("/");
  const views: Record<string, () => View> = {
    stream: () => streamView(main, shell, id),
    alerts: () => alertsView(main, shell),
    patterns: () => patternsView(main, shell),
    backtest: () => backtestView(main),
    model: () => modelView(main, rest[0] ? decoded(rest[0]) : null),
  };
  current = (views[view] ?? (() => fleetView(main, shell)))();
  document.title = `${current.title} · Onset`;
  if (inside && document.activeElement === document.body) main.focus({ preventScroll: true }); // what had the focus is gone: Tab goes on here, not at the top
  for (const tab of tabs) {
    const on = tab.dataset["view"] === view || (tab.dataset["view"] === "fleet" && (view === "stream" || !views[view]));
    if (on) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

/** A name that someone wrote into the address by hand may hold a bare %. */
function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function showTheme(): void {
  const next = dark() ? "Light" : "Dark";
  fill(themeButton, icon(dark() ? ICONS.sun : ICONS.moon));
  themeButton.setAttribute("aria-label", `${next} colours`);
  themeButton.title = `${next} colours (t)`;
}

function keysDialog(): HTMLDialogElement {
  const list = h("dl", { class: "keys" });
  for (const [keys, what] of KEYS) {
    const term = h("dt");
    keys.split(/ +/).forEach((key, i) => term.append(i ? " " : "", h("kbd", {}, key)));
    list.append(term, h("dd", {}, what));
  }
  const dialog = h("dialog", { "aria-labelledby": "keys-title" }, h("h2", { id: "keys-title" }, "Keys"), list);
  dialog.append(h("div", { class: "actions" }, h("button", { class: "button", type: "button", onclick: () => dialog.close() }, "Close")));
  return dialog;
}

document.addEventListener("keydown", (event) => {
  const target = event.target as HTMLElement;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = target.matches("input:not([type='checkbox']), select, textarea");
  if (typing && event.key !== "Escape" && event.key !== "ArrowDown" && event.key !== "Enter") return;
  if (gone) {
    gone = false;
    const tab = TABS.find(([, , keys]) => keys === `g ${event.key}`);
    if (tab) {
      location.hash = `#/${tab[0]}`;
      return;
    }
  }
  if (current?.key?.(event)) {
    event.preventDefault();
    return;
  }
  if (typing) return;
  if (event.key === "?") help.showModal();
  else if (event.key === "t") toggle();
  else if (event.key === "g") {
    gone = true;
    setTimeout(() => (gone = false), 1200);
  } else return;
  event.preventDefault();
});

async function countAlerts(): Promise<void> {
  try {
    shell.alerting(await ask<AlertCount>("v1/alerts/count?status=open&muted=false"));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    trouble.hidden = error.status < 500; // what else there is the views say
    text(trouble, error.status < 500 ? "" : `Nothing can be scored or acknowledged now: ${error.message}`);
  }
}

/** New patterns are of log models alone. */
async function showPatterns(): Promise<void> {
  try {
    const { models } = await loadedModels();
    tabs.find((tab) => tab.dataset["view"] === "patterns")!.hidden = !models.some((model) => model.kind === "log");
  } catch (error) {
    if (!(error instanceof Refused)) throw error; // said where there is something to see
  }
}

onTheme(showTheme);
showTheme();
window.addEventListener("hashchange", route);
linked();
route();
asking(10, countAlerts);
void showPatterns();

/** Alerts link to `/?alert=ID`, others to `/?stream=ID`: what comes before # is kept by mail and chat programs. */
function linked(): void {
  const query = new URLSearchParams(location.search);
  const [alert, id] = [query.get("alert"), query.get("stream")];
  if (!alert && !id) return;
  for (const name of ["alert", "stream"]) query.delete(name);
  const view = alert ? alertAddress(alert) : `#/stream/${streamPath(id!)}${query.size ? `?${query}` : ""}`;
  history.replaceState(null, "", `${location.pathname}${view}`);
}
