/** All streams, the most anomalous first: a list of which only the rows in view exist, each drawn when it has something new. */

import { BITS, Live, address, ask, streamPath, type ChangesMessage, type Counts, type Feature, type FleetMessage, type Kind, type Link, type Model } from "./api";
import { ICONS, append, fill, h, icon, text } from "./dom";
import { ago, count, number, score } from "./format";
import type { Shell, View } from "./main";
import { Trace, draw } from "./spark";
import { onTheme } from "./theme";

const SORT_SECONDS = 1;
const HALF_LIFE = 15;
const OVERSCAN = 3;
const SHOWN = 300;

interface Stream {
  key: number;
  id: string;
  trace: Trace;
  t: number;
  value: number | null;
  expected: number | null;
  score: number | null;
  bits: number;
  rank: number;
  at: number; // performance.now() of the rank, in seconds
  feature: number;
  said: string | null; // the last line of a log stream
  severity: string;
  onset: number; // time of the last onset seen, 0 = none
  dirty: boolean;
}

/** One element of the list and what it shows. */
interface Row {
  item: HTMLLIElement;
  link: HTMLAnchorElement;
  name: HTMLElement;
  state: HTMLElement;
  reading: HTMLElement;
  expected: HTMLElement;
  canvas: HTMLCanvasElement;
  score: HTMLElement;
  age: HTMLElement;
}

const FILTERS = [
  ["", "All"],
  ["anomalous", "Anomalous"],
  ["alerting", "Alert open"],
  ["warming_up", "Warming up"],
] as const;

export function fleetView(main: HTMLElement, shell: Shell): View {
  const fleet = new Fleet(main, shell);
  return { title: "Fleet", leave: () => fleet.leave(), key: (event) => fleet.key(event) };
}

class Fleet {
  private live: Live | null = null;
  private readonly streams = new Map<number, Stream>();
  private order: Stream[] = [];
  private readonly rows = new Map<number, Row>();
  private features: Feature[] = [];
  private kind: Kind = "sensor";
  private counts: Counts | null = null;
  private link: Link = { state: "connecting", detail: "" };
  private began = false;
  private sorted = 0;
  private frame = 0;
  private selected: number | null = null;
  private pointed = 0;
  private stateFilter: string;
  private model: string;
  private width = 0; // of a row's picture, 0 = not known
  private height = 0;
  private tall = 0; // of a row, the same
  private readonly timers: number[] = [];
  private typing = 0;
  private readonly unwatch: () => void;
  private readonly resized: ResizeObserver;

  private readonly search = h("input", { class: "field", type: "search", placeholder: "Search streams", "aria-label": "Search streams", oninput: () => this.searched() });
  private readonly choice = h("div", { class: "choice", role: "group", "aria-label": "Which streams" });
  private readonly models = h("select", { class: "field", "aria-label": "Model", hidden: true, onchange: () => this.chose(this.models.value) });
  private readonly summary = h("p", { class: "summary", "aria-live": "off" });
  private readonly list = h("ul", { "aria-label": "Streams, the most anomalous first" });
  private readonly scroller = h("div", { class: "rows", onscroll: () => this.draw(), onpointermove: () => (this.pointed = performance.now()), onpointerleave: () => (this.pointed = 0) }, this.list);
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
    append(this.fleet, [tools, this.columns, h("div", { class: "rows-holder" }, this.scroller, this.words)]);
    main.append(this.fleet);
    this.unwatch = onTheme(() => this.redraw());
    this.resized = new ResizeObserver(() => this.redraw());
    this.resized.observe(this.scroller);
    this.timers.push(window.setInterval(() => this.tick(), 1000));
    this.showChoice();
    void this.loadModels();
    this.connect();
  }

  leave(): void {
    this.live?.close();
    this.unwatch();
    this.resized.disconnect();
    this.timers.forEach(clearInterval);
    clearTimeout(this.typing);
    cancelAnimationFrame(this.frame);
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
    } else if ((event.key === "j" && !inSearch) || event.key === "ArrowDown") this.move(1);
    else if ((event.key === "k" && !inSearch) || (event.key === "ArrowUp" && !inSearch)) this.move(-1);
    else if (event.key === "Enter" && inSearch && this.order[0]) location.hash = this.href(this.order[0]);
    else return false;
    return true;
  }

  // ── what comes ──

  private connect(): void {
    this.live?.close();
    this.streams.clear();
    this.order = [];
    this.counts = null;
    this.began = false;
    for (const row of this.rows.values()) row.item.remove();
    this.rows.clear();
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
        if (link.state === "live") this.streams.clear(); // the whole history comes again
        this.say();
      },
    );
  }

  private members(message: FleetMessage): void {
    this.features = message.features;
    if (message.kind !== this.kind || !this.fleet.dataset["kind"]) this.redraw(); // its rows are of another height
    this.kind = this.fleet.dataset["kind"] = message.kind;
    text(this.what, message.kind === "log" ? "Last line" : "Value");
    text(this.drawn, message.kind === "log" ? "Score of each line" : "Recent values; score of each event");
    for (const one of message.new) {
      const trace = new Trace();
      let onset = 0;
      one.t.forEach((t, i) => {
        trace.push(one.value ? (one.value[i] ?? null) : null, one.score[i] ?? null, one.bits[i] ?? 0);
        if ((one.bits[i] ?? 0) & BITS.onset) onset = t;
      });
      const last = one.t.length - 1;
      this.streams.set(one.key, {
        key: one.key,
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
        severity: "none",
        onset,
        dirty: true,
      });
    }
    const wanted = new Set(message.keys);
    for (const key of this.streams.keys()) if (!wanted.has(key)) this.streams.delete(key);
    this.began = true;
    this.sorted = 0;
    this.schedule();
    this.say();
  }

  private changes(message: ChangesMessage): void {
    this.counts = message.counts;
    const now = performance.now() / 1000;
    for (const [i, [key, t, value, expected, points, bits, rank, feature, severity]] of message.rows.entries()) {
      const stream = this.streams.get(key);
      if (!stream) continue;
      stream.said = message.said?.[i] ?? null;
      if (t !== stream.t) stream.trace.push(this.features.length === 1 ? value : null, points, bits);
      if (bits & BITS.onset) stream.onset = t;
      Object.assign(stream, { t, value, expected, score: points, bits, rank, feature, severity, at: now, dirty: true });
    }
    this.schedule();
    this.say();
  }

  private schedule(): void {
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  // ── what is seen ──

  private rank(stream: Stream, now: number): number {
    const open = stream.rank >= 1000;
    const peak = (open ? stream.rank - 1000 : stream.rank) * 0.5 ** ((now - stream.at) / HALF_LIFE);
    return open ? 1000 + peak : peak;
  }

  /** Anomalous ones by rank, calm ones by name: what says nothing stands still. Held while someone points at a row. */
  private sort(): void {
    const now = performance.now() / 1000;
    const held = this.pointed > 0 && performance.now() - this.pointed < 4000 && this.order.length === this.streams.size;
    if (held || now - this.sorted < SORT_SECONDS) return;
    this.sorted = now;
    const ranks = new Map([...this.streams.values()].map((stream) => [stream, Math.floor(10 * this.rank(stream, now)) / 10]));
    const calm = (stream: Stream): boolean => ranks.get(stream)! < 1;
    this.order = [...this.streams.values()].sort((a, b) => {
      if (calm(a) !== calm(b)) return calm(a) ? 1 : -1;
      return (calm(a) ? 0 : ranks.get(b)! - ranks.get(a)!) || (a.id < b.id ? -1 : 1);
    });
  }

  private redraw(): void {
    this.width = this.tall = 0;
    for (const stream of this.streams.values()) stream.dirty = true;
    this.schedule();
  }

  private draw(): void {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.sort();
    if (!this.tall) this.tall = parseFloat(getComputedStyle(this.list).getPropertyValue("--row")) || 52;
    const height = this.tall;
    const top = this.scroller.scrollTop;
    const first = Math.max(0, Math.floor(top / height) - OVERSCAN);
    const last = Math.min(this.order.length, Math.ceil((top + this.scroller.clientHeight) / height) + OVERSCAN);
    const total = `${this.order.length * height}px`;
    if (this.list.style.height !== total) this.list.style.height = total;
    const visible = new Map(this.order.slice(first, last).map((stream, i) => [stream.key, first + i]));
    for (const [key, row] of this.rows) {
      if (visible.has(key) || row.link === document.activeElement) continue;
      row.item.remove();
      this.rows.delete(key);
    }
    let before: Element | null = null;
    for (const [key, place] of visible) {
      const stream = this.streams.get(key)!;
      const row = this.rows.get(key) ?? this.row(key);
      this.place(row, place, height, before);
      before = row.item;
      if (stream.dirty) this.show(row, stream);
      stream.dirty = false;
    }
  }

  /** In the document's order as on the screen, so that Tab goes down the list; without touching what has the focus. */
  private place(row: Row, place: number, height: number, before: Element | null): void {
    const transform = `translateY(${place * height}px)`;
    if (row.item.style.transform !== transform) row.item.style.transform = transform;
    row.item.setAttribute("aria-posinset", String(place + 1));
    row.item.setAttribute("aria-setsize", String(this.order.length));
    const next = before ? before.nextElementSibling : this.list.firstElementChild;
    if (next === row.item) return;
    const focused = row.link === document.activeElement;
    this.list.insertBefore(row.item, next);
    if (focused) row.link.focus({ preventScroll: true });
  }

  private row(key: number): Row {
    const name = h("bdi");
    const state = h("span", { class: "state" });
    const reading = h("span");
    const expected = h("small");
    const canvas = h("canvas", { "aria-hidden": "true" });
    const points = h("span", { class: "score right" });
    const age = h("span", { class: "age right" });
    const who = h("span", { class: "who" }, h("span", { class: "name" }, name), state);
    const link = h("a", { class: "row", onfocus: () => (this.selected = key) }, who, h("span", { class: "reading" }, reading, expected), h("span", { class: "plot" }, canvas), points, age);
    const row: Row = { item: h("li", {}, link), link, name, state, reading, expected, canvas, score: points, age };
    this.rows.set(key, row);
    this.streams.get(key)!.dirty = true;
    return row;
  }

  private show(row: Row, stream: Stream): void {
    const single = this.features.length === 1;
    const feature = this.features[stream.feature];
    const [words, kind] = state(stream);
    row.link.dataset["kind"] = row.state.dataset["kind"] = kind;
    row.link.href = this.href(stream);
    text(row.name, stream.id);
    row.link.title = stream.id;
    text(row.state, words);
    if (this.kind === "log") {
      text(row.reading, stream.said ?? "(end of session)");
      row.reading.title = stream.said ?? "";
    } else text(row.reading, single ? number(stream.value, feature?.unit) : `${feature?.name ?? ""} ${number(stream.value, feature?.unit)}`);
    if (this.kind === "sensor") text(row.expected, stream.expected === null ? "nothing expected yet" : `expected ${number(stream.expected)}`);
    text(row.score, score(stream.score));
    text(row.age, stream.t ? ago(stream.t) : "");
    if (!this.width) [this.width, this.height] = [row.canvas.clientWidth, row.canvas.clientHeight]; // asked once: each time it lays out the page
    if (this.width) draw(row.canvas, stream.trace, this.width, this.height, !single);
  }

  private tick(): void {
    for (const [key, row] of this.rows) {
      const stream = this.streams.get(key);
      if (!stream) continue;
      text(row.age, stream.t ? ago(stream.t) : "");
      text(row.state, state(stream)[0]);
    }
    this.schedule();
  }

  private href(stream: Stream): string {
    return `#/stream/${streamPath(stream.id)}${this.model ? `?model=${encodeURIComponent(this.model)}` : ""}`;
  }

  private move(step: number): void {
    if (!this.order.length) return;
    const focused = [...this.rows].find(([, row]) => row.link === document.activeElement)?.[0] ?? null;
    const from = focused === null ? -1 : this.order.findIndex((stream) => stream.key === focused);
    const to = from < 0 ? (step > 0 ? 0 : this.order.length - 1) : Math.min(this.order.length - 1, Math.max(0, from + step));
    const height = this.tall || 52;
    const box = this.scroller;
    if (to * height < box.scrollTop) box.scrollTop = to * height;
    else if ((to + 1) * height > box.scrollTop + box.clientHeight) box.scrollTop = (to + 1) * height - box.clientHeight;
    this.draw();
    this.selected = this.order[to]!.key;
    this.rows.get(this.selected)?.link.focus({ preventScroll: true });
  }

  // ── which of them ──

  private searched(): void {
    clearTimeout(this.typing);
    this.typing = window.setTimeout(() => this.remember(), 200);
  }

  private remember(): void {
    const query = new URLSearchParams();
    if (this.search.value.trim()) query.set("q", this.search.value.trim());
    if (this.stateFilter) query.set("state", this.stateFilter);
    if (this.model) query.set("model", this.model);
    history.replaceState(null, "", `#/fleet${query.size ? `?${query}` : ""}`);
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
      for (const [state, name] of FILTERS) append(this.choice, [h("button", { type: "button", "data-state": state, onclick: () => this.filter(state) }, name, " ", h("b"))]);
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
      const { models } = await ask<{ models: Model[] }>("v1/models");
      this.models.hidden = models.length < 2;
      fill(this.models, ...models.map((model) => h("option", { value: model.name, selected: this.model ? model.name === this.model : model.default }, `${model.name} ${model.version}`)));
    } catch {
      this.models.hidden = true; // the live feed says what is wrong
    }
  }

  private say(): void {
    this.showChoice();
    const shown = this.streams.size;
    const matching = this.search.value.trim() || this.stateFilter;
    const more = this.counts && !matching && this.counts.streams > shown ? `The ${count(shown)} most anomalous of ${count(this.counts.streams)}. Search finds the others.` : "";
    const said = matching ? `${count(shown)} shown` : more || (this.counts?.left_out ? "Some streams found no room here (ONSET_CONSOLE_BYTES)." : "");
    text(this.summary, [said, this.counts && this.counts.replicas > 1 ? `${this.counts.replicas} replicas` : ""].filter(Boolean).join(" · "));
    this.summary.title = this.counts?.thinned ? "Other replicas score more than they tell: of calm streams not every event is seen here." : "";
    this.columns.hidden = this.scroller.hidden = shown === 0;
    if (shown) return void (this.words.childElementCount && this.words.replaceChildren());
    if (this.link.state === "away") fill(this.words, empty("Not connected", this.link.detail));
    else if (!this.began) fill(this.words, empty("", "Connecting to the live feed …"));
    else if (matching) fill(this.words, empty("No stream fits", `None of the streams scored here ${this.search.value.trim() ? `has “${this.search.value.trim()}” in its name` : ""}${this.search.value.trim() && this.stateFilter ? " and " : ""}${this.stateFilter ? `is ${FILTERS.find(([state]) => state === this.stateFilter)?.[1].toLowerCase()}` : ""}.`));
    else if (!this.words.querySelector("pre")) fill(this.words, first(this.features, this.kind));
  }
}

function state(stream: Stream): [string, string] {
  if (stream.bits & BITS.open) return [`Alert open${stream.onset ? `, onset ${ago(stream.onset)}` : ""}`, "alert"];
  if (stream.bits & BITS.anomaly) return ["Anomalous", "anomalous"];
  if (stream.bits & BITS.cold) return ["Warming up", "cold"];
  return [stream.onset ? `Normal, onset ${ago(stream.onset)}` : "Normal", "normal"];
}

function empty(title: string, words: string): HTMLElement {
  return h("div", { class: "empty" }, title && h("h2", {}, title), h("p", {}, words));
}

function first(features: Feature[], kind: Kind): HTMLElement {
  const values = Object.fromEntries(features.slice(0, 8).map((feature) => [feature.name, 1]));
  const body = JSON.stringify(kind === "log" ? { stream_id: "web-1", message: "Took 12 ms for /index.html" } : { stream_id: "pump-7", values });
  const command = `curl -s ${address("v1/events")} \\\n  -H 'content-type: application/json' \\\n  -d '${body}'`;
  return h("div", { class: "empty" }, h("h2", {}, "No events yet"), h("p", {}, "This page shows each stream the moment it is scored. Send the first event:"), h("pre", { tabindex: "0", "aria-label": "Command that sends an event" }, command));
}
