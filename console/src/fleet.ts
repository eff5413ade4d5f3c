/** All streams, the most anomalous first: what the live feed says of them, in which order they are, and which of them are shown. */

import { BITS, Live, address, loadedModels, streamPath, type ChangesMessage, type Counts, type Feature, type FleetMessage, type Kind, type Link } from "./api";
import { ICONS, append, fill, h, icon, text } from "./dom";
import { count } from "./format";
import type { Shell, View } from "./view";
import { Rows, WORDS_MS, type Stream } from "./rows";
import { Trace } from "./spark";

const SORT_SECONDS = 1;
const HALF_LIFE = 15;
const SHOWN = matchMedia("(max-width: 640px)").matches ? 100 : 300; // a phone is often on a slow link

const FILTERS = [
  ["", "All"],
  ["anomalous", "Anomalous"],
  ["alerting", "Alert open"],
  ["warming_up", "Warming up"],
] as const;

/** Where the fleet was left: its search, filter and model, and how far down. */
let left = { address: "#/fleet", top: 0 };
export const fleetAddress = (): string => left.address;

export function fleetView(main: HTMLElement, shell: Shell): View {
  const fleet = new Fleet(main, shell);
  return { title: "Fleet", leave: () => fleet.leave(), key: (event) => fleet.key(event) };
}

class Fleet {
  private live: Live | null = null;
  private readonly streams = new Map<number, Stream>();
  private features: Feature[] = [];
  private kind: Kind = "sensor";
  private counts: Counts | null = null;
  private link: Link = { state: "connecting", detail: "" };
  private began = false;
  private sorted = 0; // performance.now() in seconds, 0 = other streams are shown now
  private spoken = 0; // performance.now() of the words above the list
  private pointed = 0;
  private stateFilter: string;
  private model: string;
  private readonly timer: number;
  private typing = 0; // timer of a search that has not been asked yet
  private opening = false; // the first that fits is opened when it is known
  private returned = location.hash === left.address ? left.top : 0; // to be scrolled to

  private readonly search = h("input", { class: "field", type: "search", placeholder: "Search streams", "aria-label": "Search streams", oninput: () => this.searched() });
  private readonly choice = h("div", { class: "choice", role: "group", "aria-label": "Which streams" });
  private readonly models = h("select", { class: "field", "aria-label": "Model", hidden: true, onchange: () => this.chose(this.models.value) });
  private readonly summary = h("p", { class: "summary", "aria-live": "off" });
  private readonly rows = new Rows((stream) => this.href(stream), () => this.frame());
  private readonly words = h("div");
  private readonly fleet = h("div", { class: "fleet" });
  private readonly what = h("span", {}, "Value");
  private readonly drawn = h("span", {}, "Recent values; score of each event");
  private readonly columns = h(
    "div",
    { class: "columns", "aria-hidden": "true" },
    h("span", {}, "Stream"),
    this.what,
    this.drawn,
    h("span", { class: "right" }, "Score"),
    h("span", { class: "right" }, "Last"),
  );

  constructor(
    main: HTMLElement,
    private readonly shell: Shell,
  ) {
    left = { address: location.hash.startsWith("#/fleet") ? location.hash : "#/fleet", top: 0 };
    this.search.value = shell.query.get("q") ?? "";
    this.stateFilter = shell.query.get("state") ?? "";
    this.model = shell.query.get("model") ?? "";
    const tools = h(
      "div",
      { class: "tools" },
      h("h1", { class: "hidden-label" }, "Fleet"),
      h("div", { class: "search" }, icon(ICONS.search), this.search, h("kbd", { "aria-hidden": "true" }, "/")),
      this.choice,
      this.models,
      h("div", { class: "spacer" }),
      this.summary,
    );
    append(this.fleet, [tools, this.columns, h("div", { class: "rows-holder" }, this.rows.element, this.words)]);
    main.append(this.fleet);
    this.rows.element.addEventListener("pointermove", () => (this.pointed = performance.now()));
    this.rows.element.addEventListener("pointerleave", () => (this.pointed = 0));
    this.timer = window.setInterval(() => this.rows.age(), 1000);
    this.showChoice();
    void this.loadModels();
    this.connect();
  }

  leave(): void {
    left.top = this.rows.element.scrollTop;
    this.live?.close();
    this.rows.leave();
    clearInterval(this.timer);
    clearTimeout(this.typing);
  }

  key(event: KeyboardEvent): boolean {
    const inSearch = event.target === this.search;
    if (event.key === "/" && !inSearch) {
      this.search.focus();
      this.search.select();
    } else if (event.key === "Escape" && (inSearch || this.search.value)) {
      this.search.value = "";
      this.search.blur();
      this.searched();
    } else if ((event.key === "j" && !inSearch) || event.key === "ArrowDown") this.rows.move(1);
    else if ((event.key === "k" && !inSearch) || (event.key === "ArrowUp" && !inSearch)) this.rows.move(-1);
    else if (event.key === "Enter" && inSearch) this.open();
    else return false;
    return true;
  }

  // ── what comes ──

  private connect(): void {
    this.live?.close();
    this.streams.clear();
    this.rows.clear();
    this.counts = null;
    this.began = false;
    const query = new URLSearchParams({ limit: String(SHOWN) });
    if (this.search.value.trim()) query.set("q", this.search.value.trim());
    if (this.stateFilter) query.set("state", this.stateFilter);
    if (this.model) query.set("model", this.model);
    this.live = new Live(
      `v1/live?${query}`,
      (event, data) => (event === "fleet" ? this.members(data as FleetMessage) : event === "changes" ? this.changes(data as ChangesMessage) : undefined),
      (link) => {
        this.link = link;
        this.shell.link(link);
        this.say();
      },
    );
  }

  private members(message: FleetMessage): void {
    this.features = message.features;
    this.kind = this.fleet.dataset["kind"] = message.kind;
    this.rows.of(message.features, message.kind);
    text(this.what, message.kind === "log" ? "Last line" : "Value");
    const single = message.features.length === 1 ? "Recent values; score of each event" : "Score of each event";
    text(this.drawn, message.kind === "log" ? "Score of each line" : single);
    for (const one of message.new) {
      const trace = new Trace();
      let onset = 0;
      one.t.forEach((t, i) => {
        trace.push(one.value ? (one.value[i] ?? null) : null, one.score[i] ?? null, one.bits[i] ?? 0);
        if ((one.bits[i] ?? 0) & BITS.onset) onset = t;
      });
      const last = one.t.length - 1;
      const known = this.streams.get(one.key);
      const stream: Stream = {
        id: one.id,
        trace,
        t: one.t[last] ?? 0,
        value: one.value?.[last] ?? null,
        expected: null,
        score: one.score[last] ?? null,
        bits: one.bits[last] ?? 0,
        rank: 0,
        at: performance.now() / 1000,
        feature: 0,
        said: one.said,
        onset,
        version: 0,
      };
      this.streams.set(one.key, stream);
      if (known?.id === stream.id) this.rows.replace(known, stream);
      else this.sorted = 0;
    }
    const wanted = new Set(message.keys);
    for (const key of this.streams.keys()) if (!wanted.has(key) && this.streams.delete(key)) this.sorted = 0;
    this.began = true;
    this.rows.schedule();
    this.say();
    if (this.opening) this.open();
    else if (this.returned) this.rows.show(this.returned);
    this.returned = 0;
  }

  private changes(message: ChangesMessage): void {
    this.counts = message.counts;
    const now = performance.now() / 1000;
    for (const [i, [key, t, value, expected, points, bits, rank, feature]] of message.rows.entries()) {
      const stream = this.streams.get(key);
      if (!stream) continue;
      stream.said = message.said?.[i] ?? null;
      if (t !== stream.t) stream.trace.push(this.features.length === 1 ? value : null, points, bits);
      if (bits & BITS.onset) stream.onset = t;
      Object.assign(stream, { t, value, expected, score: points, bits, rank, feature, at: now, version: stream.version + 1 });
    }
    this.rows.schedule();
  }

  // ── in which order ──

  private frame(): void {
    this.sort();
    if (performance.now() - this.spoken >= WORDS_MS) this.say();
  }

  private rank(stream: Stream, now: number): number {
    const open = 1000 * Math.floor(stream.rank / 1000); // by severity
    return open + (stream.rank - open) * 0.5 ** ((now - stream.at) / HALF_LIFE);
  }

  /** Anomalous ones by rank, calm ones by name: what says nothing stands still. Held while someone points at a row. */
  private sort(): void {
    const now = performance.now() / 1000;
    const held = this.pointed > 0 && performance.now() - this.pointed < 4000;
    if (this.sorted && (held || now - this.sorted < SORT_SECONDS)) return;
    this.sorted = now;
    const ranks = new Map([...this.streams.values()].map((stream) => [stream, Math.floor(10 * this.rank(stream, now)) / 10]));
    const calm = (stream: Stream): boolean => ranks.get(stream)! < 1;
    this.rows.order = [...this.streams.values()].sort((a, b) => {
      if (calm(a) !== calm(b)) return calm(a) ? 1 : -1;
      return (calm(a) ? 0 : ranks.get(b)! - ranks.get(a)!) || (a.id < b.id ? -1 : 1);
    });
  }

  private href(stream: Stream): string {
    return this.hrefOf(stream.id);
  }

  private hrefOf(id: string): string {
    return `#/stream/${streamPath(id)}${this.model ? `?model=${encodeURIComponent(this.model)}` : ""}`;
  }

  // ── which of them ──

  private searched(): void {
    clearTimeout(this.typing);
    this.opening = false;
    this.typing = window.setTimeout(() => this.remember(), 200);
  }

  /** The first of what is searched for, not of what is shown until that is there. */
  private open(): void {
    if (this.typing) this.remember();
    this.opening = !this.began;
    if (this.opening) return;
    this.sort();
    if (this.rows.order[0]) location.hash = this.href(this.rows.order[0]);
  }

  private remember(): void {
    clearTimeout(this.typing);
    this.typing = 0;
    const query = new URLSearchParams();
    if (this.search.value.trim()) query.set("q", this.search.value.trim());
    if (this.stateFilter) query.set("state", this.stateFilter);
    if (this.model) query.set("model", this.model);
    history.replaceState(null, "", `#/fleet${query.size ? `?${query}` : ""}`);
    left = { address: location.hash, top: 0 };
    this.connect();
  }

  private chose(model: string): void {
    this.model = model;
    this.remember();
  }

  private showChoice(): void {
    const numbers: Record<string, number | undefined> = {
      "": this.counts?.streams,
      anomalous: this.counts?.anomalous,
      alerting: this.counts?.alerting,
      warming_up: this.counts?.warming_up,
    };
    if (!this.choice.childElementCount)
      for (const [state, name] of FILTERS) append(this.choice, [h("button", { type: "button", "data-state": state, title: state === "alerting" ? "Of an anomaly; silences are among Alerts" : "", onclick: () => this.filter(state) }, name, " ", h("b"))]);
    for (const button of this.choice.querySelectorAll("button")) {
      const state = button.dataset["state"] ?? "";
      const n = numbers[state];
      button.setAttribute("aria-pressed", String(state === this.stateFilter));
      text(button.querySelector("b")!, n === undefined ? "" : count(n));
    }
  }

  private filter(state: string): void {
    this.stateFilter = state;
    this.remember();
    this.showChoice();
  }

  private async loadModels(): Promise<void> {
    try {
      const { models } = await loadedModels();
      this.models.hidden = models.length < 2;
      fill(this.models, ...models.map((model) => h("option", { value: model.name, selected: this.model ? model.name === this.model : model.default }, `${model.name} ${model.version}`)));
    } catch {
      this.models.hidden = true; // the live feed says what is wrong
    }
  }

  private say(): void {
    this.spoken = performance.now();
    this.showChoice();
    const shown = this.streams.size;
    const matching = this.search.value.trim() || this.stateFilter;
    const more = this.counts && !matching && this.counts.streams > shown ? `The ${count(shown)} most anomalous of ${count(this.counts.streams)}. Search finds the others.` : "";
    const said = matching ? `${count(shown)} shown` : more;
    const without = this.counts?.left_out ? "More streams are scored than find room here (ONSET_CONSOLE_BYTES)." : "";
    text(this.summary, [said, without, this.counts && this.counts.replicas > 1 ? `${this.counts.replicas} replicas` : ""].filter(Boolean).join(" · "));
    this.summary.title = this.counts?.thinned ? "Other replicas score more than they tell: of calm streams not every event is seen here." : "";
    this.columns.hidden = this.rows.element.hidden = shown === 0;
    if (shown) return void (this.words.childElementCount && this.words.replaceChildren());
    if (this.link.state === "away") fill(this.words, empty("Not connected", this.link.detail));
    else if (!this.began) fill(this.words, empty("", "Connecting to the live feed …"));
    else if (matching) this.sayNone(this.search.value.trim());
    else if (!this.words.querySelector("pre")) fill(this.words, first(this.features, this.kind));
  }

  /** What is not held here may be known all the same, by its name. */
  private sayNone(name: string): void {
    const words = `None of the streams held here ${name ? `has “${name}” in its name` : ""}${name && this.stateFilter ? " and " : ""}${this.stateFilter ? `is among “${FILTERS.find(([state]) => state === this.stateFilter)?.[1]}”` : ""}.`;
    if (this.words.querySelector("p")?.textContent === words) return; // a link that has the focus keeps it
    fill(this.words, empty("No stream fits", words));
    if (name) this.words.firstElementChild!.append(h("p", {}, "Those that were silent since this replica was started, or found no room, are not: ", h("a", { class: "link", href: this.hrefOf(name) }, "open the stream of exactly this name"), "."));
  }
}

function empty(title: string, words: string): HTMLElement {
  return h("div", { class: "empty" }, title && h("h2", {}, title), h("p", {}, words));
}

function first(features: Feature[], kind: Kind): HTMLElement {
  const values = Object.fromEntries(features.slice(0, 8).map((feature) => [feature.name, 1]));
  const body = JSON.stringify(kind === "log" ? { stream_id: "web-1", message: "Took 12 ms for /index.html" } : { stream_id: "pump-7", values });
  const command = `curl -s ${address("v1/events")} \\\n  -H 'content-type: application/json' \\\n  -d '${body}'`;
  return h("div", { class: "empty" }, h("h2", {}, "No events since this replica was started"), h("p", {}, "This page shows each stream the moment it is scored; one that was before is found by its whole name. Send an event:"), h("pre", { tabindex: "0", "aria-label": "Command that sends an event" }, command));
}
