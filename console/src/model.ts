/** The models that score: what they are, whether they still answer as published, and whether their p-values keep their promise. */

import { Refused, ask, type Model } from "./api";
import { fill, h, scrolling, text } from "./dom";
import { chance, count, number } from "./format";
import type { View } from "./view";
import { loglog } from "./plots";

interface Calibration {
  events: number;
  judged: number;
  onsets: number;
  tail: { p: number; events: number }[];
  replica: string;
}

interface SelfTest {
  passed: boolean;
  detail?: string;
  steps?: number;
  rows?: number;
  milliseconds?: number;
  sha256: string;
  provider: string;
}

interface Measured {
  asked: number;
  events: number;
  onsets: number;
  measured: number;
  ratio: number;
}

const AGAIN_MS = 2000; // where it could not be loaded

export function modelView(main: HTMLElement, name: string | null): View {
  const page = h("div", { class: "page" }, h("p", { class: "notice" }, "Loading …"));
  main.append(page);
  let left = false;
  let again = 0;
  const chart = { leave: (): void => undefined };
  void show();
  return {
    title: "Model",
    leave: () => {
      left = true;
      clearTimeout(again);
      chart.leave();
    },
  };

  async function show(): Promise<void> {
    try {
      const { models } = await ask<{ models: Model[] }>("v1/models");
      const model = models.find((one) => one.name === name) ?? models.find((one) => one.default) ?? models[0];
      if (!model || left) return;
      const calibration = await ask<Calibration>(`v1/models/${encodeURIComponent(model.name)}/calibration`);
      if (!left) draw(models, model, calibration);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (left) return;
      fill(page, h("p", { class: "notice wrong" }, error.message));
      again = window.setTimeout(() => void show(), AGAIN_MS);
    }
  }

  function draw(models: Model[], model: Model, calibration: Calibration): void {
    const others = models.filter((one) => one !== model);
    const plot = seen(calibration);
    chart.leave = plot.leave;
    fill(
      page,
      h("div", { class: "head" }, h("div", { class: "title" }, h("h1", {}, `${model.name} ${model.version}`), h("p", { class: "quiet" }, model.description || "No description."))),
      others.length ? h("p", { class: "quiet prose" }, "Also loaded: ", ...others.flatMap((one, i) => [i ? ", " : "", h("a", { href: `#/model/${encodeURIComponent(one.name)}` }, `${one.name} ${one.version}`)])) : null,
      h("div", { class: "stack" }, selfTest(model), h("div", { class: "pair" }, plot.element, published(model)), h("div", { class: "pair" }, facts(model), trained(model)), features(model)),
    );
  }
}

function card(title: string, ...content: (Node | null)[]): HTMLElement {
  return h("section", { class: "card" }, h("header", {}, h("h2", {}, title)), ...content);
}

function selfTest(model: Model): HTMLElement {
  const said = h("p", { role: "status" }, "Passed when this service started: a file that answers otherwise than when it was published is refused.");
  const button = h("button", { class: "button", type: "button", onclick: () => void again() }, "Run it again");
  return h("section", { class: "card" }, h("header", {}, h("h2", {}, "Self-test"), h("div", { class: "spacer" }), button), said);

  async function again(): Promise<void> {
    button.disabled = true;
    text(said, "Running …");
    try {
      const result = await ask<SelfTest>(`v1/models/${encodeURIComponent(model.name)}/self-test`, { method: "POST" });
      text(
        said,
        result.passed
          ? `Passed just now: ${count(result.steps ?? 0)} steps of ${count(result.rows ?? 0)} streams answered as when the file was published, in every size of batch (${number(result.milliseconds)} ms, ${result.provider}).`
          : `NOT passed: ${result.detail ?? ""}`,
      );
      said.className = result.passed ? "" : "notice wrong";
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      text(said, error.message);
    }
    button.disabled = false;
  }
}

function seen(calibration: Calibration): { element: HTMLElement; leave: () => void } {
  const { judged, tail } = calibration;
  if (!judged) return { element: card("p-values seen lately", h("p", { class: "quiet" }, "No event has been judged by this replica yet.")), leave: () => undefined };
  const plot = loglog(
    tail.map(({ p, events }) => ({ x: p, y: events / judged })),
    1 / judged,
    "Share of events with a p-value below p",
  );
  const rows = tail.map(({ p, events }) => h("tr", {}, h("td", {}, chanceOf(p)), h("td", { class: "right" }, count(Math.round(p * judged))), h("td", { class: "right" }, count(events))));
  const element = card(
    "p-values seen lately",
    h("p", { class: "quiet" }, `Of ${count(judged)} events held by this replica (${count(calibration.onsets)} onsets), anomalies included. On the line: as often as a p-value means. Above it: more is unusual than chance explains.`),
    plot.element,
    h("details", {}, h("summary", {}, "As a table"), h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "p below"), h("th", { class: "right" }, "expected"), h("th", { class: "right" }, "seen"))), h("tbody", {}, ...rows))),
  );
  return { element, leave: plot.leave };
}

const chanceOf = (p: number): string => (p >= 0.1 ? `1 in ${Math.round(1 / p)}` : chance(p));

function published(model: Model): HTMLElement {
  const table = model.quality["false_onsets_on_unseen_rows"] as Record<string, Measured> | undefined;
  const rows = Object.values(table ?? {}).map((row) =>
    h("tr", {}, h("td", {}, chance(row.asked)), h("td", { class: "right" }, count(Math.round(row.asked * row.events))), h("td", { class: "right" }, count(row.onsets)), h("td", { class: "right" }, `${number(row.ratio)} ×`)),
  );
  const found = model.quality["injected_anomalies_found_in_20_events"] as Record<string, { found: number }> | undefined;
  const kinds = Object.entries(found ?? {}).map(([kind, row]) => h("tr", {}, h("td", {}, kind.replaceAll("_", " ")), h("td", { class: "right" }, `${Math.round(100 * row.found)} %`)));
  return card(
    "Measured before it was published",
    rows.length
      ? scrolling("False alarms", h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Asked, per event"), h("th", { class: "right" }, "asked for"), h("th", { class: "right" }, "false onsets"), h("th", { class: "right" }, "ratio"))), h("tbody", {}, ...rows)))
      : h("p", { class: "quiet" }, "The file holds no measurement of false alarms."),
    kinds.length ? scrolling("Injected faults", h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Injected"), h("th", { class: "right" }, "found within 20 events"))), h("tbody", {}, ...kinds))) : null,
  );
}

function list(entries: [string, string][]): HTMLElement {
  return h("dl", { class: "facts" }, ...entries.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

function facts(model: Model): HTMLElement {
  const { cell } = model;
  const promise = model.expected_false_alarms;
  return card(
    "In force",
    list([
      ["Asked rate α", `${model.alpha} (${chance(model.alpha)} events)`],
      ["That means", `${number(promise.per_stream_and_1000_events)} false alarms per stream and 1,000 events${model.strict ? ", from the first event on" : `; while a stream is new ${number(promise.extra_while_learning)} more, over its first 10,000`}`],
      ["Warm-up", `${count(model.warmup)} events without a score`],
      ["Network", cell.variant === "none" ? "none" : `${cell.variant} LSTM, ${cell.layers} × ${cell.hidden} → code ${cell.code} → ${cell.decoder_hidden}`],
      ["State of a stream", `${count(4 * model.state_size)} bytes`],
      ["Runs on", model.providers.join(", ")],
      ["File", `sha256 ${model.sha256}`],
    ]),
  );
}

function trained(model: Model): HTMLElement {
  const { training } = model;
  return card(
    "Trained on",
    list([
      ["Data", training.data],
      ["Size", training.streams ? `${count(training.streams)} streams, ${count(training.rows)} rows` : "made as it goes"],
      ["Command", training.command],
      ["Seed", String(training.seed)],
      ["Commit", training.commit],
      ["Torch", training.torch_version],
      ["Made", new Date(training.created).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })],
    ]),
  );
}

function features(model: Model): HTMLElement {
  const rows = model.features.map((feature) => h("tr", {}, h("th", { scope: "row" }, feature.name), h("td", {}, feature.unit ?? ""), h("td", {}, feature.role ?? "scored")));
  return card(`Features (${count(rows.length)})`, scrolling("Features", h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Name"), h("th", {}, "Unit"), h("th", {}, "Role"))), h("tbody", {}, ...rows))));
}
