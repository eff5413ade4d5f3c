/** One stream: its value with what was expected, its score, what carries it, and what to do about it. */

import uPlot from "uplot";
import { StreamAlerts } from "./alerts";
import { BITS, Live, Refused, ask, streamPath, type Contributor, type EventsMessage, type Link, type StreamMessage, type StreamState } from "./api";
import { Chart, legend, scoreChart, valueChart, type Column, type Options } from "./charts";
import { ICONS, fill, h, icon, scrolling, text } from "./dom";
import { fleetAddress } from "./fleet";
import { ago, chance, clock, count, number, score } from "./format";
import { LineList, PARTS, partOf } from "./lines";
import { alertOf } from "./rows";
import type { Shell, View } from "./view";

const KEPT = 6000;
/** Events that the page holds; a stream at 10 Hz for ten minutes. */
const WINDOWS = [
  ["1 min", 60],
  ["5 min", 300],
  ["All", 0],
] as const;
const ONSETS_LISTED = 8;

interface Columns {
  t: number[];
  score: Column;
  alert: Column;
  p: Column;
  bits: number[];
  x: Column[];
  expected: Column[];
  lower: Column[];
  upper: Column[];
  contribution: Column[];
}

export function streamView(main: HTMLElement, shell: Shell, id: string): View {
  const page = new StreamPage(main, shell, id);
  return { title: id, leave: () => page.leave(), key: (event) => page.key(event) };
}

class StreamPage {
  private live: Live;
  private about: StreamMessage | null = null;
  private data: Columns = nothing();
  private last: EventsMessage["last"] | null = null;
  private charts: Chart[] = [];
  private lines: LineList | null = null;
  private onsetPositions: number[] = [];
  private window = 0;
  private zoom: [number, number] | null = null;
  private paused = false;
  private pointed: number | null = null;
  private skipped = 0;
  private frame = 0;
  private timer: number;
  private readonly model: string;
  private at: number | null;
  /** The time that was asked for, until it is shown. */
  private readonly sync = uPlot.sync(`stream-${Math.random()}`);

  private readonly title = h("h1");
  private readonly state = h("span", { class: "state" });
  private readonly figures = h("dl", { class: "figures" });
  private readonly plots = h("div");
  private readonly contributors = h("ul", { class: "bars" });
  private readonly when = h("span", { class: "readout" });
  private readonly onsets = scrolling("Onsets");
  private readonly said = h("div");
  private readonly accept = h("button", { class: "button", type: "button", disabled: true, onclick: () => this.confirm.showModal() }, icon(ICONS.check), "Accept as normal");
  private readonly pause = h("button", { class: "button", type: "button", onclick: () => this.setPaused(!this.paused) });
  private readonly windows = h("div", { class: "choice", role: "group", "aria-label": "How much of it" });
  private readonly picker = h("select", { class: "field", "aria-label": "Features shown", hidden: true, onchange: () => this.pick(this.picker.value) });
  private readonly confirm: HTMLDialogElement;
  private readonly content = h("div");
  private readonly alerts: StreamAlerts;

  constructor(
    main: HTMLElement,
    private readonly shell: Shell,
    private readonly id: string,
  ) {
    this.model = shell.query.get("model") ?? "";
    this.at = Number(shell.query.get("at")) || null;
    this.confirm = this.confirmation();
    this.alerts = new StreamAlerts(id);
    text(this.title, id);
    for (const [name, seconds] of WINDOWS) this.windows.append(h("button", { type: "button", "data-seconds": seconds, onclick: () => this.look(seconds) }, name));
    fill(
      this.content,
      this.figures,
      this.plots,
      h(
        "div",
        { class: "split" },
        h("section", { class: "card" }, h("header", {}, h("h2", {}, "What carries the score"), h("div", { class: "spacer" }), this.when), this.contributors),
        h("section", { class: "card" }, h("header", {}, h("h2", {}, "Onsets")), this.onsets),
      ),
    );
    main.append(
      h(
        "div",
        { class: "page broad" },
        h(
          "div",
          { class: "head" },
          h("a", { class: "button bare", href: fleetAddress(), "aria-label": "Back to the fleet" }, icon(ICONS.back)),
          h("div", { class: "title" }, this.title, this.state),
          h("div", { class: "actions" }, this.picker, this.windows, this.pause, this.accept),
        ),
        this.alerts.element,
        this.said,
        this.content,
        this.alerts.earlier,
        this.confirm,
      ),
    );
    this.setPaused(false);
    this.showWindow();
    this.content.hidden = true;
    this.timer = window.setInterval(() => this.showState(), 1000);
    this.live = this.connect([]);
  }

  leave(): void {
    this.live.close();
    this.alerts.leave();
    clearInterval(this.timer);
    cancelAnimationFrame(this.frame);
    this.charts.forEach((chart) => chart.leave());
    this.confirm.remove();
  }

  key(event: KeyboardEvent): boolean {
    if (event.key === " " && !(event.target as HTMLElement).closest("button, a, select")) this.setPaused(!this.paused);
    else if (event.key === "Escape") location.hash = fleetAddress();
    else if (event.key === "0") this.look(0);
    else if (event.key === "a") return this.alerts.acknowledge();
    else return false;
    return true;
  }

  // ── what comes ──

  private connect(features: string[]): Live {
    const query = new URLSearchParams(features.map((name) => ["feature", name]));
    if (this.model) query.set("model", this.model);
    return new Live(
      `v1/live/${streamPath(this.id)}?${query}`,
      (event, data) => (event === "stream" ? this.begin(data as StreamMessage) : event === "events" ? this.add(data as EventsMessage) : undefined),
      (link) => this.linked(link),
    );
  }

  private linked(link: Link): void {
    this.shell.link(link);
    if (link.state === "away") fill(this.said, h("p", { class: "notice wrong" }, link.detail));
    else if (!this.about) fill(this.said, h("p", { class: "notice" }, "Connecting to the live feed …"));
    else this.said.replaceChildren();
  }

  private begin(about: StreamMessage): void {
    this.about = about;
    this.alerts.of(about.model);
    this.data = nothing(about.chosen.length);
    this.last = null;
    this.zoom = null;
    this.skipped = 0;
    this.charts.forEach((chart) => chart.leave());
    this.charts = [];
    this.lines = about.kind === "log" ? new LineList() : null;
    text(this.state, ""); // it was of events that are not known any more, where the service was started again
    this.figures.replaceChildren();
    this.plots.replaceChildren();
    this.content.hidden = true;
    this.accept.disabled = false; // an alert may be open though: of one that opened before the service was started again
    if (!about.chosen.length) void this.sayKnown(about);
    this.showPicker(about);
  }

  /** Of a stream whose events are not held here: what the service knows of it all the same. */
  private async sayKnown(about: StreamMessage): Promise<void> {
    let words: string;
    try {
      const { state_version, timestamp, anomaly_score, contributors } = await ask<StreamState>(`v1/streams/${streamPath(this.id)}?model=${encodeURIComponent(about.model)}`);
      const [top] = contributors;
      const found = [top && about.kind === "sensor" ? `${top.feature} ${number(top.actual)}, expected ${number(top.expected)}` : "", anomaly_score === null ? "" : `score ${score(anomaly_score)}`].filter(Boolean).join(", ");
      const last = timestamp === null ? "" : `, the last one ${clock(timestamp)} (${ago(timestamp)})${found ? `: ${found}` : ""}`;
      words = `${count(state_version)} events of this stream have been scored${last}. They are not held by this replica (${about.replica}): it was started since, or had no room for them (ONSET_CONSOLE_BYTES). The next one is shown here.`;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      words = error.status === 404 ? `The service has scored nothing of a stream of this name with model ${about.model}, or has forgotten it. Its next event is shown here.` : error.message;
    }
    if (this.about === about && !this.charts.length) fill(this.said, h("p", { class: "notice" }, words));
  }

  private add(message: EventsMessage): void {
    const { data } = this;
    this.last = message.last;
    this.lines?.add(message);
    this.skipped += message.skipped;
    data.t.push(...message.t);
    data.score.push(...message.score);
    data.alert.push(...message.alert);
    data.p.push(...message.p);
    data.bits.push(...message.bits);
    for (const name of ["x", "expected", "lower", "upper", "contribution"] as const) message[name].forEach((column, j) => data[name][j]?.push(...column));
    const extra = data.t.length - KEPT;
    if (extra > 0) for (const column of [data.t, data.score, data.alert, data.p, data.bits, ...data.x, ...data.expected, ...data.lower, ...data.upper, ...data.contribution]) column.splice(0, extra);
    this.onsetPositions = [];
    data.bits.forEach((bits, i) => bits & BITS.onset && this.onsetPositions.push(i));
    if (!this.charts.length) this.makeCharts();
    this.schedule();
    if (this.at !== null) this.lookAt(this.at);
  }

  private makeCharts(): void {
    const about = this.about!;
    this.said.replaceChildren();
    this.content.hidden = false;
    const options = (label: string, height: number): Options => ({
      marks: { anomalous: (i) => ((this.data.bits[i] ?? 0) & BITS.anomaly) !== 0, onsets: () => this.onsetPositions },
      time: true,
      height,
      label,
      sync: this.sync,
      moved: (i) => this.point(i),
      zoomed: (min, max) => this.zoomTo([min, max]),
      reset: () => this.look(this.window),
    });
    const many = about.chosen.length > 1;
    (this.lines ? [] : about.chosen).forEach((j, place) => {
      const feature = about.features[j]!;
      const chart = valueChart(options(`${feature.name}, what was expected and its band`, many ? 150 : 250));
      this.charts.push(chart);
      const key = place === 0 ? legend([["value", "value"], ["expected", "expected"], ["band", "band at the asked rate"], ["onset", "onset"]]) : null;
      this.plots.append(h("section", { class: "card" }, h("header", {}, h("h2", {}, feature.unit ? `${feature.name} (${feature.unit})` : feature.name), key, h("div", { class: "spacer" }), h("span", { class: "readout", "data-place": place })), chart.element));
    });
    const chart = scoreChart(options("Anomaly score with the threshold at 1", 130));
    this.charts.push(chart);
    const key = legend([["value", "score"], ["threshold", "threshold"]]);
    this.plots.append(h("section", { class: "card" }, h("header", {}, h("h2", {}, "Anomaly score"), key, h("div", { class: "spacer" }), h("span", { class: "readout", "data-place": "score" })), chart.element));
    if (this.lines) this.plots.append(this.lines.element);
  }

  // ── what is seen ──

  private schedule(): void {
    if (!this.frame && !this.paused) this.frame = requestAnimationFrame(() => this.show());
  }

  private range(): [number, number] {
    const { t } = this.data;
    const end = t[t.length - 1] ?? 0;
    if (this.zoom) return this.zoom;
    const begin = this.window ? Math.max(end - this.window, t[0] ?? 0) : (t[0] ?? 0);
    return [begin === end ? end - 1 : begin, end];
  }

  private show(): void {
    this.frame = 0;
    const { data } = this;
    if (!data.t.length) return;
    const [min, max] = this.range();
    this.charts.forEach((chart, place) => {
      if (place < this.charts.length - 1) chart.show([data.t, data.lower[place]!, data.upper[place]!, data.expected[place]!, data.x[place]!] as uPlot.AlignedData, min, max);
      else chart.show([data.t, data.score] as uPlot.AlignedData, min, max);
    });
    if (this.lines) this.lines.show();
    this.showFigures();
    this.showContributors();
    this.showOnsets();
    this.showReadouts();
    this.showState();
  }

  private showState(): void {
    const i = this.data.t.length - 1;
    if (i < 0) return;
    const bits = this.data.bits[i]!;
    const { severity = "none", direction = "none" } = this.last ?? {};
    const [kind, words] =
      bits & BITS.open ? ["alert", `${alertOf(bits)} open${bits & BITS.frozen ? ", nothing of it is learned" : ""}`] : bits & BITS.anomaly ? ["anomalous", "Anomalous"] : bits & BITS.cold ? ["cold", "Warming up"] : ["normal", "Normal"];
    this.state.dataset["kind"] = kind;
    const more = bits & BITS.anomaly ? [bits & BITS.open ? "" : severity, direction === "none" ? "" : direction] : []; // an open alert says how severe it is
    text(this.state, [words, ...more.filter(Boolean), `last event ${ago(this.data.t[i]!)}`].join(" · "));
    this.accept.disabled = !(bits & BITS.open);
    this.accept.title = this.accept.disabled ? "There is no open alert to accept." : "";
  }

  private showFigures(): void {
    const { data, about, last } = this;
    const i = data.t.length - 1;
    const points = data.score[i] ?? null;
    const cold = (data.bits[i]! & BITS.cold) !== 0;
    const version = last?.state_version ?? 0;
    const own: [string, string, string, boolean][] = this.lines ? this.figuresOfLines(this.lines) : this.figuresOfValues(i);
    const boxes: [string, string, string, boolean][] = [
      ...own,
      ["Score", score(points), cold ? "none while warming up" : "1 = as rare as asked", points !== null && points > 1],
      ["Chance if normal", chance(data.p[i]), data.p[i] === null ? "" : `p = ${data.p[i]!.toPrecision(2)}`, false],
      [this.lines ? "Lines seen" : "Events seen", count(version), cold ? `${count(Math.max(0, about!.warmup - version))} more until scored` : "", false],
    ];
    if (!this.figures.childElementCount) for (const [name] of boxes) this.figures.append(h("div", {}, h("dt", {}, name), h("dd", {}), h("dd", { class: "about" })));
    boxes.forEach(([name, value, more, hot], place) => {
      const box = this.figures.children[place]!;
      text(box.children[0]!, name);
      text(box.children[1]!, value);
      text(box.children[2]!, more || "\u00a0");
      box.children[1]!.classList.toggle("hot", hot);
    });
  }

  private figuresOfLines(lines: LineList): [string, string, string, boolean][] {
    const [held, odd, fresh] = lines.counts;
    return [
      ["Anomalous lines", count(odd), `of ${count(held)} held here`, odd > 0],
      ["Of new patterns", count(fresh), fresh ? "unknown to the model" : "", false],
    ];
  }

  private figuresOfValues(i: number): [string, string, string, boolean][] {
    const { data, about, last } = this;
    const single = data.x.length === 1;
    const j = single ? 0 : Math.max(0, about!.chosen.findIndex((one) => about!.features[one]!.name === last?.contributors[0]?.feature));
    const feature = about!.features[about!.chosen[j]!]!;
    const band = `${number(data.lower[j]![i])} to ${number(data.upper[j]![i])}`;
    return [
      [single ? "Value" : feature.name, number(data.x[j]![i], feature.unit), single ? "" : "carries the most now", false],
      ["Expected", number(data.expected[j]![i], feature.unit), band, false],
    ];
  }

  private showContributors(): void {
    const { data, about, last } = this;
    const i = this.pointed;
    const atPoint = i !== null && i < data.t.length;
    text(this.when, atPoint ? `at ${clock(data.t[i!]!)}` : "now");
    const shares: Contributor[] = atPoint
      ? about!.chosen.map((j, place) => ({ feature: about!.features[j]!.name, contribution: data.contribution[place]![i!] ?? null, actual: data.x[place]![i!] ?? null, expected: data.expected[place]![i!] ?? null }))
      : (last?.contributors ?? []);
    const sorted = [...shares].sort((a, b) => (b.contribution ?? 0) - (a.contribution ?? 0)).slice(0, 8);
    while (this.contributors.childElementCount > sorted.length) this.contributors.lastElementChild!.remove();
    while (this.contributors.childElementCount < sorted.length)
      this.contributors.append(h("li", {}, h("span", { class: "what" }), h("span", { class: "share" }), h("span", { class: "track", "aria-hidden": "true" }, h("i")), h("small")));
    sorted.forEach((one, place) => {
      const [what, share, track, more] = this.contributors.children[place]!.children;
      text(what!, this.lines ? (PARTS[one.feature] ?? one.feature) : one.feature);
      text(share!, `${Math.round(100 * (one.contribution ?? 0))} %`);
      (track!.firstElementChild as HTMLElement).style.transform = `scaleX(${Math.min(1, Math.max(0, one.contribution ?? 0))})`;
      text(more!, this.lines ? partOf(one) : `${number(one.actual)}, expected ${number(one.expected)}`);
    });
  }

  private showOnsets(): void {
    const positions = this.onsetPositions.slice(-ONSETS_LISTED).reverse();
    const mark = positions.map((i) => this.data.t[i]).join();
    if (this.onsets.dataset["shown"] === mark) return;
    this.onsets.dataset["shown"] = mark;
    if (!positions.length) return fill(this.onsets, h("p", { class: "quiet" }, "None in what is held of this stream."));
    const rows = positions.map((i) =>
      h("tr", {}, h("td", {}, clock(this.data.t[i]!)), h("td", {}, score(this.data.alert[i])), h("td", {}, chance(this.data.p[i])), h("td", { class: "right" }, h("button", { class: "button bare", type: "button", "aria-label": `Show ${clock(this.data.t[i]!)}`, onclick: () => this.around(this.data.t[i] ?? 0) }, icon(ICONS.zoom)))),
    );
    fill(this.onsets, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Time"), h("th", {}, "Alert score"), h("th", {}, "Chance"), h("th", {}, h("span", { class: "hidden-label" }, "Show")))), h("tbody", {}, ...rows)));
  }

  private showReadouts(): void {
    const { data } = this;
    const i = this.pointed !== null && this.pointed < data.t.length ? this.pointed : null;
    for (const readout of this.plots.querySelectorAll<HTMLElement>(".readout")) {
      const place = readout.dataset["place"];
      if (i === null) fill(readout, this.zoom ? "Zoomed in; double-click or 0 for everything" : "");
      else if (place === "score") fill(readout, `${clock(data.t[i]!)} `, h("b", {}, score(data.score[i])), ` · ${chance(data.p[i])}`);
      else {
        const j = Number(place);
        fill(readout, `${clock(data.t[i]!)} `, h("b", {}, number(data.x[j]![i])), ` · expected ${number(data.expected[j]![i])} (${number(data.lower[j]![i])} to ${number(data.upper[j]![i])})`);
      }
    }
  }

  private point(i: number | null): void {
    if (i === this.pointed || !this.charts.length) return;
    this.pointed = i;
    this.showReadouts();
    this.showContributors();
  }

  // ── what is done ──

  private setPaused(paused: boolean): void {
    this.paused = paused;
    fill(this.pause, icon(paused ? ICONS.play : ICONS.pause), paused ? "Go on" : "Pause");
    this.pause.setAttribute("aria-pressed", String(paused));
    this.schedule();
  }

  private look(seconds: number): void {
    this.window = seconds;
    this.zoom = null;
    this.showWindow();
    this.refresh();
  }

  private zoomTo(range: [number, number]): void {
    this.zoom = range;
    this.showWindow();
    this.refresh();
  }

  private around(time: number): void {
    const half = this.half(time);
    this.zoomTo([time - half, time + half]);
  }

  /** How much is shown on either side of a time, in seconds. */
  private half(time: number): number {
    const { t } = this.data;
    const near = t.filter((one) => Math.abs(one - time) < 15).length;
    return near > 40 ? 15 : Math.max(15, ((t[t.length - 1]! - t[0]!) / Math.max(1, t.length)) * 40);
  }

  /** What has just begun goes on: it is seen without zooming in, which would stand still. */
  private lookAt(time: number): void {
    this.at = null;
    const { t } = this.data;
    if (time < t[0]!) fill(this.said, h("p", { class: "notice" }, `What is held of this stream begins at ${clock(t[0]!)}, after ${clock(time)}.`));
    else if (time + this.half(time) < t[t.length - 1]!) this.around(time);
  }

  private refresh(): void {
    if (this.data.t.length) this.show();
  }

  private showWindow(): void {
    for (const button of this.windows.querySelectorAll("button")) button.setAttribute("aria-pressed", String(!this.zoom && Number(button.dataset["seconds"]) === this.window));
  }

  private showPicker(about: StreamMessage): void {
    this.picker.hidden = about.kind === "log" || about.features.length < 2;
    fill(this.picker, h("option", { value: "" }, "Features that carry the most"), ...about.features.map((feature) => h("option", { value: feature.name, selected: about.chosen.length === 1 && about.features.length > 1 && about.features[about.chosen[0]!]?.name === feature.name }, feature.name)));
  }

  private pick(name: string): void {
    this.live.close();
    this.live = this.connect(name ? [name] : []);
  }

  private confirmation(): HTMLDialogElement {
    const said = h("p", { role: "status" });
    const dialog = h(
      "dialog",
      { "aria-labelledby": "accept-title" },
      h("h2", { id: "accept-title" }, "Accept as normal?"),
      h("p", {}, "The alert is closed, and what the stream does now is learned as its new normal. Do this for a change that is meant: a new set point, another product, a repaired sensor."),
      h("p", {}, "It cannot be taken back, and the log keeps that it was done."),
      said,
    );
    const go = async (): Promise<void> => {
      try {
        await ask(`v1/streams/${streamPath(this.id)}/accept${this.model ? `?model=${encodeURIComponent(this.model)}` : ""}`, { method: "POST" });
        dialog.close();
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        text(said, error.message);
      }
    };
    dialog.append(
      h("div", { class: "actions" }, h("button", { class: "button", type: "button", onclick: () => dialog.close() }, "Cancel"), h("button", { class: "button primary", type: "button", onclick: () => void go() }, "Accept as normal")),
    );
    return dialog;
  }
}

function nothing(features = 0): Columns {
  const columns = (): Column[] => Array.from({ length: features }, () => []);
  return { t: [], score: [], alert: [], p: [], bits: [], x: columns(), expected: columns(), lower: columns(), upper: columns(), contribution: columns() };
}
