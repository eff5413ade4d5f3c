/**
 * The list of streams. Only the rows in view exist, and they are used again for what comes into view: a frame writes what has changed in them
 * and reads nothing of the layout. Pictures follow each message, words a few times a second: nobody reads faster. What comes into view is filled
 * at once; of what is written or drawn again a frame takes so much, and the rest comes a little later, so that many messages make no long ones.
 */

import { BITS, LEVEL_SHIFT, type Feature, type Kind } from "./api";
import { h, text } from "./dom";
import { ago, number, score } from "./format";
import { Sheets, type Frame, type Trace } from "./spark";
import { onTheme } from "./theme";

const OVERSCAN = 3;
export const WORDS_MS = 240;
const WORDS_A_FRAME = 6; // rows whose words are written again
const PICTURES_WHILE_MOVING = 6; // rows drawn again in a frame that scrolls
const LEFT_MS = 100;
const SETTLED_MS = 120;

export interface Stream {
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
  said: string | null; // the last line of a log stream, of an open alert the one it is about
  onset: number; // time of the last onset seen, 0 = none
  version: number; // grows with each change of what is drawn
}

/** One element of the list, and what it shows. */
interface Row {
  stream: Stream;
  place: number; // in the order, -1 = nowhere yet
  top: number; // as written, as is `size`, the number of rows
  size: number;
  t: number; // of the event that its words are of
  written: number; // performance.now() of its words, 0 = they are another stream's
  item: HTMLLIElement;
  link: HTMLAnchorElement;
  name: HTMLElement;
  state: HTMLElement;
  reading: HTMLElement;
  expected: HTMLElement;
  plot: HTMLElement; // its picture lies over it
  score: HTMLElement;
  age: HTMLElement;
}

export class Rows {
  order: Stream[] = [];
  private features: Feature[] = [];
  private kind: Kind | null = null;
  private readonly rows = new Map<Stream, Row>();
  private readonly spare: Row[] = []; // to be used again
  private frame = 0;
  private settling = 0;
  private left = 0;
  private moving = false; // since the last frame
  private top = 0; // what is scrolled away
  private seen = 0; // height of what is in view
  private tall = 0; // of a row, 0 = not known
  private readonly unwatch: () => void;
  private readonly resized: ResizeObserver;
  private readonly list = h("ul", { "aria-label": "Streams, the most anomalous first" });
  private readonly whole = h("div", {}, this.list);
  readonly element = h("div", { class: "rows", onscroll: () => this.scrolled() }, this.whole);
  private readonly sheets = new Sheets(this.whole);

  /** `href` is where a stream's own page is; `begin` is called at the beginning of each frame, and may set `order`. */
  constructor(
    private readonly href: (stream: Stream) => string,
    private readonly begin: () => void,
  ) {
    this.unwatch = onTheme(() => this.redraw());
    this.resized = new ResizeObserver(() => this.redraw());
    this.resized.observe(this.element);
  }

  leave(): void {
    this.unwatch();
    this.resized.disconnect();
    clearTimeout(this.settling);
    clearTimeout(this.left);
    cancelAnimationFrame(this.frame);
  }

  schedule(): void {
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  /** What the streams have. */
  of(features: Feature[], kind: Kind): void {
    const other = kind !== this.kind;
    this.features = features;
    this.kind = kind;
    if (other) this.redraw(); // its rows are of another height
  }

  /** Everything again: sizes or colours are others. */
  redraw(): void {
    this.tall = 0;
    this.seen = this.element.clientHeight;
    this.top = this.element.scrollTop;
    this.sheets.lie(null);
    this.schedule();
  }

  /** Scrolls so far down, as far as there are streams. */
  show(top: number): void {
    this.draw();
    this.element.scrollTop = top;
  }

  clear(): void {
    this.order = [];
    this.element.scrollTop = this.top = 0; // other streams begin at the top
    for (const row of this.rows.values()) this.release(row);
    this.tidy();
  }

  /** `to` takes the place of `from`, in its row too, so that neither focus nor pointer lose it. */
  replace(from: Stream, to: Stream): void {
    const place = this.order.indexOf(from);
    if (place >= 0) this.order[place] = to;
    const row = this.rows.get(from);
    if (!row) return;
    this.rows.delete(from);
    this.assign(row, to);
  }

  /** Ages grow also where nothing comes. */
  age(): void {
    for (const row of this.rows.values()) row.t = NaN;
    this.schedule();
  }

  /** One row down or up from the one that has the focus, or the first or last. */
  move(step: number): void {
    if (!this.order.length) return;
    const focused = [...this.rows.values()].find((row) => row.link === document.activeElement);
    const from = focused ? this.order.indexOf(focused.stream) : -1;
    const to = from < 0 ? (step > 0 ? 0 : this.order.length - 1) : Math.min(this.order.length - 1, Math.max(0, from + step));
    const box = this.element;
    if (to * this.tall < box.scrollTop) box.scrollTop = to * this.tall;
    else if ((to + 1) * this.tall > box.scrollTop + box.clientHeight) box.scrollTop = (to + 1) * this.tall - box.clientHeight;
    this.top = box.scrollTop;
    const wanted = this.order[to]!;
    this.draw();
    this.arrange();
    this.rows.get(wanted)?.link.focus({ preventScroll: true });
  }

  // ── a frame ──

  /** Told before the frame in which it is seen, so that what comes into view is filled in that one. */
  private scrolled(): void {
    this.top = this.element.scrollTop;
    this.moving = true;
    this.schedule();
  }

  private draw(): void {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.begin();
    const { order } = this;
    if (!this.tall) this.tall = parseFloat(getComputedStyle(this.list).getPropertyValue("--row"));
    const first = Math.max(0, Math.floor(this.top / this.tall) - OVERSCAN);
    const last = Math.min(order.length, Math.ceil((this.top + this.seen) / this.tall) + OVERSCAN);
    const total = `${order.length * this.tall}px`;
    if (this.whole.style.height !== total) this.whole.style.height = total;
    const wanted = order.slice(first, last);
    this.leaveView(new Set(wanted));
    wanted.forEach((stream, i) => this.place(this.rows.get(stream) ?? this.enter(stream), first + i));
    this.tidy();
    let left = this.renew(performance.now());
    if (wanted.length) left = this.drawPictures(first, last) || left;
    if (left && !this.left) this.left = window.setTimeout(() => ((this.left = 0), this.schedule()), LEFT_MS);
  }

  private drawPictures(first: number, last: number): boolean {
    if (!this.sheets.ready) this.sheets.lie(this.frameOf(this.rows.get(this.order[first]!)!));
    const room = this.moving ? PICTURES_WHILE_MOVING : Infinity;
    this.moving = false;
    return this.sheets.draw(this.order, first, last, room, this.features.length !== 1);
  }

  /** Asked once for all: each time the browser lays out the page. */
  private frameOf(row: Row): Frame {
    const { offsetLeft: left, offsetTop: top, clientWidth: width, clientHeight: height } = row.plot;
    return { left, top, width, height, tall: this.tall };
  }

  /** Rows out of view may be used again, except the one that has the focus: it would lose it. */
  private leaveView(wanted: Set<Stream>): void {
    for (const row of this.rows.values()) {
      if (wanted.has(row.stream)) continue;
      const place = row.link === document.activeElement ? this.order.indexOf(row.stream) : -1;
      if (place < 0) this.release(row);
      else this.place(row, place);
    }
  }

  private release(row: Row): void {
    row.link.blur(); // else another stream's row would have the focus of this one
    this.rows.delete(row.stream);
    row.place = -1;
    this.spare.push(row);
  }

  private enter(stream: Stream): Row {
    const row = this.spare.pop() ?? made(stream);
    if (!row.item.isConnected) this.list.append(row.item);
    this.assign(row, stream);
    return row;
  }

  private assign(row: Row, stream: Stream): void {
    this.rows.set(stream, row);
    row.stream = stream;
    row.written = 0;
    row.link.href = this.href(stream);
    row.link.title = stream.id;
    text(row.name, stream.id);
  }

  /** What was not used again leaves the document. */
  private tidy(): void {
    for (const row of this.spare) if (row.item.isConnected) row.item.remove();
  }

  private place(row: Row, place: number): void {
    if (row.place !== place) {
      row.item.setAttribute("aria-posinset", String(place + 1));
      row.place = place;
      clearTimeout(this.settling);
      this.settling = window.setTimeout(() => this.arrange(), SETTLED_MS);
    }
    const top = place * this.tall;
    if (row.top !== top) row.item.style.top = `${(row.top = top)}px`;
    const size = this.order.length;
    if (row.size !== size) row.item.setAttribute("aria-setsize", String((row.size = size)));
  }

  /** The document's order as the screen's, so that Tab goes down the list; without losing the focus. */
  private arrange(): void {
    const rows = [...this.rows.values()].sort((a, b) => a.place - b.place);
    const focused = rows.find((row) => row.link === document.activeElement);
    rows.forEach(({ item }, i) => {
      const next: Element | null = i ? rows[i - 1]!.item.nextElementSibling : this.list.firstElementChild;
      if (next !== item) this.list.insertBefore(item, next);
    });
    if (focused && focused.link !== document.activeElement) focused.link.focus({ preventScroll: true });
  }

  /** Rows that have come into view are filled; of the others as many as there is room for, those first that waited longest. Whether some are left. */
  private renew(now: number): boolean {
    let room = WORDS_A_FRAME;
    let left = false;
    for (const row of [...this.rows.values()].sort((a, b) => a.written - b.written)) {
      const due = row.t !== row.stream.t && now - row.written >= WORDS_MS;
      if (!row.written || row.link.dataset["kind"] !== kindOf(row.stream) || (due && room-- > 0)) this.write(row, now);
      else left ||= due;
    }
    return left;
  }

  private write(row: Row, now: number): void {
    const { stream } = row;
    const kind = kindOf(stream);
    row.written = now;
    row.t = stream.t;
    if (row.link.dataset["kind"] !== kind) row.link.dataset["kind"] = row.state.dataset["kind"] = kind;
    text(row.state, stateOf(stream));
    this.reading(row, stream);
    text(row.score, score(stream.score));
    row.score.classList.toggle("hot", (stream.bits & BITS.anomaly) !== 0);
    text(row.age, stream.t ? ago(stream.t) : "");
  }

  private reading(row: Row, stream: Stream): void {
    const { features } = this;
    const log = this.kind === "log";
    row.reading.title = (log && stream.said) || "";
    if (log) return text(row.reading, stream.said ?? "(end of session)");
    const feature = features[stream.feature];
    const value = number(stream.value, feature?.unit);
    text(row.reading, features.length === 1 ? value : `${value} ${feature?.name ?? ""}`);
    text(row.expected, stream.expected === null ? "nothing expected yet" : `expected ${number(stream.expected)}`);
  }
}

function made(stream: Stream): Row {
  const name = h("bdi");
  const state = h("span", { class: "state" });
  const reading = h("span");
  const expected = h("small");
  const plot = h("span", { class: "plot" });
  const points = h("span", { class: "score right" });
  const age = h("span", { class: "age right" });
  const who = h("span", { class: "who" }, h("span", { class: "name" }, name), state);
  const link = h("a", { class: "row" }, who, h("span", { class: "reading" }, reading, expected), plot, points, age);
  return { stream, place: -1, top: -1, size: -1, t: NaN, written: 0, item: h("li", {}, link), link, name, state, reading, expected, plot, score: points, age };
}

type Shown = "alert" | "attended" | "anomalous" | "cold" | "normal";

const kindOf = ({ bits }: Stream): Shown => (bits & BITS.open ? (bits & (BITS.attended | BITS.muted) ? "attended" : "alert") : bits & BITS.anomaly ? "anomalous" : bits & BITS.cold ? "cold" : "normal");

/** The open alert of a stream in words: how severe it has been. */
export const alertOf = (bits: number): string => ["Alert", "Minor alert", "Major alert", "Critical alert"][(bits >> LEVEL_SHIFT) & 3] ?? "Alert";

function stateOf(stream: Stream): string {
  const onset = stream.onset ? `, onset ${ago(stream.onset)}` : "";
  return { alert: `${alertOf(stream.bits)}${onset}`, attended: `${alertOf(stream.bits)}, ${stream.bits & BITS.muted ? "muted" : "acknowledged"}`, anomalous: "Anomalous", cold: "Warming up", normal: `Normal${onset}` }[kindOf(stream)];
}
