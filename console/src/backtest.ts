/** A file of one's own, scored as the service would have scored it live. */

import uPlot from "uplot";
import { Refused, ask, loadedModels, type Contributor } from "./api";
import { Chart, legend, scoreChart, valueChart, type Column, type Options } from "./charts";
import { ICONS, fill, h, icon, scrolling, text } from "./dom";
import { chance, clock, count, number, score } from "./format";
import type { View } from "./view";
import { loglog } from "./plots";

interface Result {
  name: string;
  model: string;
  version: string;
  alpha: number;
  strict: boolean;
  rows: number;
  late: number;
  warming_up: number;
  judged: number;
  anomalous: number;
  alerts: number;
  allowed: number;
  thinned: boolean;
  time: boolean;
  seconds: number;
  notes: string[];
  units: Record<string, string | null>;
  x: number[];
  score: Column;
  anomalous_flags: boolean[];
  features: { name: string; value: Column; expected: Column; lower: Column; upper: Column }[];
  all_features: number;
  onsets: { row: number; timestamp: string; x: number; alert_score: number; p_value: number; contributors: Contributor[] }[];
  onsets_left_out: number;
  tail: { p: number; rows: number }[];
}

export function backtestView(main: HTMLElement): View {
  const page = new BacktestPage(main);
  return { title: "Backtest", leave: () => page.leave() };
}

class BacktestPage {
  private file: File | null = null;
  private charts: { leave: () => void }[] = [];
  private zoomables: Chart[] = [];
  private data: uPlot.AlignedData[] = [];
  private whole: [number, number] = [0, 1];
  private running: AbortController | null = null;
  private readonly sync = uPlot.sync(`backtest-${Math.random()}`);

  private readonly input = h("input", { type: "file", accept: ".csv,.tsv,text/csv", class: "hidden-label", id: "file", onchange: () => this.take(this.input.files?.[0] ?? null) });
  private readonly model = h("select", { class: "field", name: "model" });
  private readonly alpha = h("input", { class: "field", name: "alpha", inputmode: "decimal", size: "8" });
  private readonly timestamp = h("input", { class: "field", name: "timestamp", placeholder: "found by its name", size: "16" });
  private readonly go = h("button", { class: "button primary", type: "button", disabled: true, onclick: () => void this.run() }, "Run the backtest");
  private readonly chosen = h("p", { class: "quiet" }, "A CSV with a header: a column of times, and one of numbers for each feature.");
  private readonly said = h("div", { role: "status" });
  private readonly result = h("div", {});
  private readonly drop = h(
    "div",
    { class: "drop", ondragover: (event: DragEvent) => this.over(event, true), ondragleave: (event: DragEvent) => this.over(event, false), ondrop: (event: DragEvent) => this.dropped(event) },
    icon(ICONS.upload),
    h("div", {}, h("label", { for: "file", class: "link" }, "Choose a file"), " or drop one here"),
    this.input,
    this.chosen,
  );

  constructor(main: HTMLElement) {
    main.append(
      h(
        "div",
        { class: "page broad" },
        h("div", { class: "head" }, h("div", { class: "title" }, h("h1", {}, "Backtest"), h("p", { class: "quiet" }, "What the service would have said, had it seen this file live. Nothing of it is kept, and no stream is touched."))),
        this.drop,
        h("div", { class: "form" }, h("label", {}, "Model", this.model), h("label", {}, "False onsets per event (α)", this.alpha), h("label", {}, "Column of times", this.timestamp), this.go),
        this.said,
        this.result,
      ),
    );
    void this.loadModels();
  }

  leave(): void {
    this.running?.abort();
    this.clear();
  }

  private clear(): void {
    this.charts.forEach((chart) => chart.leave());
    this.charts = [];
    this.zoomables = [];
    this.data = [];
    this.result.replaceChildren();
  }

  private async loadModels(): Promise<void> {
    try {
      const models = (await loadedModels()).models.filter((one) => one.kind === "sensor");
      fill(this.model, ...models.map((one) => h("option", { value: one.name, selected: one.default }, `${one.name} ${one.version}`)));
      this.alpha.value = String(models.find((one) => one.default)?.alpha ?? 0.001);
    } catch (error) {
      this.refuse(error);
    }
  }

  private over(event: DragEvent, over: boolean): void {
    event.preventDefault();
    this.drop.classList.toggle("over", over);
  }

  private dropped(event: DragEvent): void {
    this.over(event, false);
    this.take(event.dataTransfer?.files[0] ?? null);
  }

  private take(file: File | null): void {
    this.file = file;
    this.go.disabled = !file;
    if (file) text(this.chosen, `${file.name}, ${number(file.size / 1024)} kB`);
  }

  private async run(): Promise<void> {
    const file = this.file;
    if (!file || this.running) return;
    const query = new URLSearchParams({ name: file.name.slice(0, 200), model: this.model.value, alpha: this.alpha.value.trim() });
    if (this.timestamp.value.trim()) query.set("timestamp", this.timestamp.value.trim());
    this.running = new AbortController();
    this.go.disabled = true;
    this.clear();
    const began = performance.now();
    const waiting = h("p", { class: "notice" }, "Scoring …");
    const clockwork = window.setInterval(() => text(waiting, `Scoring … ${Math.round((performance.now() - began) / 1000)} s`), 1000);
    fill(this.said, waiting);
    try {
      const result = await ask<Result>(`v1/backtest?${query}`, { method: "POST", headers: { "content-type": "text/csv" }, body: file, signal: this.running.signal });
      this.said.replaceChildren();
      this.show(result);
    } catch (error) {
      if (!this.running.signal.aborted) this.refuse(error);
    }
    clearInterval(clockwork);
    this.running = null;
    this.go.disabled = false;
  }

  private refuse(error: unknown): void {
    if (!(error instanceof Refused)) throw error;
    fill(this.said, h("p", { class: "notice wrong" }, error.message));
  }

  // ── the result ──

  private show(result: Result): void {
    const flags = result.anomalous_flags;
    const places = result.onsets.map((onset) => lowerBound(result.x, onset.x));
    this.whole = [result.x[0] ?? 0, result.x[result.x.length - 1] ?? 1];
    const options = (label: string, height: number): Options => ({
      marks: { anomalous: (i) => flags[i] ?? false, onsets: () => places },
      time: result.time,
      height,
      label,
      sync: this.sync,
      moved: () => undefined,
      zoomed: (min, max) => this.zoom(min, max),
      reset: () => this.zoom(...this.whole),
    });
    const cards = result.features.map((feature, i) => {
      const unit = result.units[feature.name];
      const key = i === 0 ? legend([["value", result.thinned ? "value, least to greatest" : "value"], ["expected", "expected"], ["band", "band"], ["onset", "onset"]]) : null;
      const chart = valueChart(options(`${feature.name}, what was expected and its band`, result.features.length > 1 ? 140 : 240));
      return this.card(chart, unit ? `${feature.name} (${unit})` : feature.name, key, [result.x, feature.lower, feature.upper, feature.expected, feature.value]);
    });
    const scores = this.card(scoreChart(options("Anomaly score with the threshold at 1", 130)), "Anomaly score", legend([["value", "score"], ["threshold", "threshold"]]), [result.x, result.score]);
    const plot = loglog(result.tail.map(({ p, rows }) => ({ x: p, y: rows / Math.max(1, result.judged) })), 1 / Math.max(1, result.judged), "Share of rows with a p-value below p");
    this.charts.push(plot);
    fill(
      this.result,
      this.summary(result),
      ...[...result.notes, ...(result.all_features > result.features.length ? [`Of ${result.all_features} features the ${result.features.length} are drawn that carry the anomalies most.`] : [])].map((note) => h("p", { class: "notice" }, note)),
      ...cards,
      scores,
      h("div", { class: "split" }, this.onsets(result), h("section", { class: "card" }, h("header", {}, h("h2", {}, "Calibration")), h("p", { class: "quiet" }, "How often a p-value below p came in this file, anomalies included. On the line: as often as it means."), plot.element)),
    );
    this.zoom(...this.whole);
    this.result.scrollIntoView({ block: "start" });
  }

  private card(chart: Chart, title: string, key: HTMLElement | null, data: unknown[]): HTMLElement {
    this.charts.push(chart);
    this.zoomables.push(chart);
    this.data[this.zoomables.length - 1] = data as uPlot.AlignedData;
    return h("section", { class: "card" }, h("header", {}, h("h2", {}, title), key), chart.element);
  }

  private zoom(min: number, max: number): void {
    this.zoomables.forEach((chart, i) => chart.show(this.data[i]!, min, max));
  }

  private summary(result: Result): HTMLElement {
    const boxes: [string, string, string][] = [
      ["Alerts", count(result.alerts), `${count(onsetsOf(result))} onsets, ${number(result.allowed)} false ones allowed by α`],
      ["Anomalous rows", count(result.anomalous), `${number((100 * result.anomalous) / Math.max(1, result.rows))} %`],
      ["Rows", count(result.rows), result.late ? `${count(result.late)} late, not scored` : `${count(result.warming_up)} without a score`],
      ["Asked rate α", String(result.alpha), `${chance(result.alpha)} events${result.strict ? ", strict" : ""}`],
      ["Model", result.model, `${result.version}, took ${number(result.seconds)} s`],
    ];
    return h("dl", { class: "figures" }, ...boxes.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "about" }, more))));
  }

  private onsets(result: Result): HTMLElement {
    const rows = result.onsets.map((onset) => {
      const top = onset.contributors[0];
      const when = result.time ? clock(onset.x) : `row ${count(onset.row + 1)}`;
      const around = (): void => {
        const width = (this.whole[1] - this.whole[0]) * 0.03;
        this.zoom(onset.x - width, onset.x + width);
      };
      return h("tr", {}, h("td", {}, when), h("td", {}, score(onset.alert_score)), h("td", {}, top ? `${top.feature} ${top.actual === null ? "has no value" : number(top.actual)}, expected ${number(top.expected)}` : ""), h("td", { class: "right" }, h("button", { class: "button bare", type: "button", "aria-label": `Show ${when}`, onclick: around }, icon(ICONS.zoom))));
    });
    const head = h("tr", {}, h("th", {}, result.time ? "Time" : "Row"), h("th", {}, "Alert score"), h("th", {}, "Carried by"), h("th", {}, h("span", { class: "hidden-label" }, "Show")));
    return h(
      "section",
      { class: "card" },
      h("header", {}, h("h2", {}, `Onsets (${count(onsetsOf(result))})`)),
      rows.length ? scrolling("Onsets", h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows))) : h("p", { class: "quiet" }, "No alert would have opened."),
      result.onsets_left_out ? h("p", { class: "quiet" }, `${count(result.onsets_left_out)} more are not listed.`) : null,
    );
  }
}

/** All of them: one that goes far beyond all before within an open alert opens none. */
function onsetsOf(result: Result): number {
  return result.onsets.length + result.onsets_left_out;
}

function lowerBound(sorted: number[], value: number): number {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! < value) low = middle + 1;
    else high = middle;
  }
  return Math.min(low, sorted.length - 1);
}
