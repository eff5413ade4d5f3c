/** The lines of a log stream, the newest first: what varies in them, how unusual each is, and why. */

import { BITS, type EventsMessage } from "./api";
import { append, fill, h, text } from "./dom";
import { chance, clock, count, number, score, share } from "./format";

const KEPT = 2000;
const SHOWN = 200;
/** Codes of a line that matches no pattern; what stands for it. */
const NEW = 0;

interface Line {
  t: number;
  score: number | null;
  p: number | null;
  bits: number;
  severity: string;
  message: string | null;
  code: number;
  likely: [number, number][];
  before: number[];
}

export class LineList {
  readonly element: HTMLElement;
  private readonly patterns = new Map<number, string>();
  private kept: Line[] = [];
  private fresh = 0; // of the kept ones, how many are not shown yet
  private only = false;
  private readonly list = h("ol", { class: "lines" });
  private readonly holder = h("div", { class: "scroll lines-holder", tabindex: "0", role: "region", "aria-label": "Lines, the newest first" }, this.list);
  private readonly choice = h("div", { class: "choice", role: "group", "aria-label": "Which lines" });
  private readonly words = h("p", { class: "quiet" });

  constructor() {
    for (const [only, name] of [
      [false, "All"],
      [true, "Anomalous"],
    ] as const)
      this.choice.append(h("button", { type: "button", "aria-pressed": String(only === this.only), onclick: () => this.choose(only) }, name, " ", h("b")));
    this.element = h("section", { class: "card" }, h("header", {}, h("h2", {}, "Lines"), h("span", { class: "quiet" }, "newest first"), h("div", { class: "spacer" }), this.choice), this.words, this.holder);
  }

  /** Lines that are held, anomalous ones among them, and those of new patterns. */
  get counts(): [number, number, number] {
    return [this.kept.length, this.kept.filter(anomalous).length, this.kept.filter((line) => line.code === NEW && line.message !== null).length];
  }

  add(events: EventsMessage): void {
    const { lines } = events;
    if (!lines) return;
    for (const [code, pattern] of Object.entries(lines.templates)) this.patterns.set(Number(code), pattern);
    events.t.forEach((t, i) =>
      this.kept.push({
        t,
        score: events.score[i] ?? null,
        p: events.p[i] ?? null,
        bits: events.bits[i] ?? 0,
        severity: lines.severity[i] ?? "none",
        message: lines.message[i] ?? null,
        code: lines.code[i] ?? NEW,
        likely: lines.likely[i] ?? [],
        before: lines.before[i] ?? [],
      }),
    );
    this.fresh += events.t.length;
    if (this.kept.length > KEPT) this.kept.splice(0, this.kept.length - KEPT);
    this.fresh = Math.min(this.fresh, this.kept.length);
  }

  /** Draws what came since, and leaves what is there alone: an explanation that somebody reads stays open. */
  show(): void {
    const fits = (line: Line): boolean => !this.only || anomalous(line);
    const fresh = this.kept.slice(this.kept.length - this.fresh).filter(fits).slice(-SHOWN);
    this.fresh = 0;
    if (fresh.length) this.list.prepend(...fresh.reverse().map((line) => this.item(line)));
    while (this.list.childElementCount > SHOWN) this.list.lastElementChild!.remove();
    const [all, odd] = this.counts;
    this.choice.querySelectorAll("b").forEach((where, i) => text(where, count(i ? odd : all)));
    text(this.words, this.list.childElementCount ? "" : "None of the lines held here is anomalous.");
    this.words.hidden = this.list.childElementCount > 0;
  }

  private choose(only: boolean): void {
    this.only = only;
    this.choice.querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(only === (i === 1))));
    this.list.replaceChildren();
    this.fresh = this.kept.length;
    this.show();
  }

  private item(line: Line): HTMLLIElement {
    const odd = anomalous(line);
    const kind = line.bits & BITS.onset ? "onset" : odd ? "anomalous" : "normal";
    const marks = [line.bits & BITS.onset ? "onset" : "", odd && line.severity !== "none" ? line.severity : "", line.code === NEW && line.message !== null ? "new pattern" : ""].filter(Boolean);
    const said = h("span", { class: "message" });
    append(said, line.message === null ? [h("i", {}, this.pattern(line.code))] : varying(line.message, line.code === NEW ? "" : this.pattern(line.code)));
    const why = h("div", { class: "why" });
    const details = h(
      "details",
      { ontoggle: () => details.open && !why.childElementCount && this.explain(why, line) },
      h("summary", {}, h("time", { datetime: new Date(1000 * line.t).toISOString() }, clock(line.t)), h("span", { class: "points" }, score(line.score)), h("span", { class: "marks" }, marks.join(" · ")), said),
      why,
    );
    return h("li", { "data-kind": kind }, details);
  }

  private explain(why: HTMLElement, line: Line): void {
    const pattern = line.code === NEW && line.message !== null ? h("dd", {}, "none: a pattern that the model does not know") : h("dd", { class: "pattern" }, ...slots(this.pattern(line.code)));
    const likely = line.likely.map(([code, p]) => h("li", {}, h("span", { class: "num" }, share(p)), h("span", { class: "pattern" }, ...slots(this.pattern(code)))));
    const before = line.before.map((code) => h("li", { class: "pattern" }, ...slots(this.pattern(code))));
    fill(
      why,
      h(
        "dl",
        { class: "facts" },
        h("dt", {}, "Pattern"),
        pattern,
        h("dt", {}, "Chance if normal"),
        h("dd", {}, chance(line.p)),
        h("dt", {}, "Likeliest here"),
        h("dd", {}, likely.length ? h("ul", { class: "shares" }, ...likely) : "nothing known yet"),
        h("dt", {}, "Lines before it"),
        h("dd", {}, before.length ? h("ol", { class: "before" }, ...before) : "none in this session"),
      ),
    );
  }

  private pattern(code: number): string {
    return this.patterns.get(code) ?? "?";
  }
}

function anomalous(line: Line): boolean {
  return (line.bits & BITS.anomaly) !== 0;
}

/** A pattern, what stands for anything marked. */
export function slots(pattern: string): (Node | string)[] {
  return pattern.split(/(<[^<>\s]+>)/).map((part, i) => (i % 2 ? h("var", {}, part) : part));
}

/** A line, what its pattern does not have marked. Pieces are compared, not places: a word that is both is taken for the pattern's. */
export function varying(message: string, pattern: string): (Node | string)[] {
  if (!pattern) return [message];
  const fixed = new Set(pattern.replace(/<[^<>\s]+>/g, " ").match(/[\p{L}\p{N}]+/gu) ?? []);
  return message.split(/([\p{L}\p{N}]+(?:[.:][\p{N}]+)*)/u).map((part, i) => (i % 2 && !part.split(/[.:]/).every((piece) => fixed.has(piece)) ? h("var", {}, part) : part));
}

/** What a log model's features are to people. */
export const PARTS: Record<string, string> = { template: "Which line came", gap: "How long after the line before", number_1: "Its first number", number_2: "Its second number", number_3: "Its third number", number_4: "Its fourth number" };

export function partOf({ feature, actual, expected }: { feature: string; actual: number | null; expected: number | null }): string {
  if (feature === "template") return "see what was likelier beside the line";
  const unit = feature === "gap" ? "s" : null;
  return actual === null ? (feature === "gap" ? "the first of its session" : "it has none") : `${number(actual, unit)}${expected === null ? "" : `, expected ${number(expected, unit)}`}`;
}
