/** Lines that no pattern of a log model matches, gathered by what they have in common: what the next training should see. */

import { Refused, ask, loadedModels } from "./api";
import { fill, h, scrolling } from "./dom";
import { ago, count } from "./format";
import { slots } from "./lines";
import type { Shell, View } from "./view";

interface Pattern {
  pattern: string;
  count: number;
  first_seen: number;
  last_seen: number;
  example: string;
}

interface PatternsPage {
  model: string;
  patterns: Pattern[];
}

const RELOAD_SECONDS = 5;

export function patternsView(main: HTMLElement, shell: Shell): View {
  const list = h("div");
  const models = h("select", { class: "field", "aria-label": "Model", hidden: true, onchange: () => void load(models.value) });
  let model = shell.query.get("model") ?? "";
  let shown = "";
  main.append(
    h(
      "div",
      { class: "page" },
      h("div", { class: "head" }, h("div", { class: "title" }, h("h1", {}, "New patterns"), h("p", { class: "quiet" }, "Lines that the model has no pattern for, gathered by what they have in common, the most frequent first. Train again with them to have them known.")), models),
      list,
    ),
  );
  fill(list, h("p", { class: "notice" }, "Loading …"));
  void begin();
  const timer = window.setInterval(() => model && void load(model), 1000 * RELOAD_SECONDS);
  return { title: "New patterns", leave: () => clearInterval(timer) };

  async function begin(): Promise<void> {
    try {
      const known = (await loadedModels()).models.filter((one) => one.kind === "log");
      const first = known.find((one) => one.name === model) ?? known[0];
      if (!first) return fill(list, h("div", { class: "empty" }, h("h2", {}, "No log model"), h("p", {}, "None of the loaded models takes log lines.")));
      models.hidden = known.length < 2;
      fill(models, ...known.map((one) => h("option", { value: one.name, selected: one === first }, `${one.name} ${one.version}`)));
      await load(first.name);
    } catch (error) {
      said(error);
    }
  }

  async function load(name: string): Promise<void> {
    model = name;
    try {
      draw((await ask<PatternsPage>(`v1/patterns?limit=200&model=${encodeURIComponent(name)}`)).patterns);
    } catch (error) {
      said(error);
    }
  }

  function draw(patterns: Pattern[]): void {
    const now = JSON.stringify([model, patterns, patterns.map((one) => ago(one.last_seen))]);
    if (now === shown) return;
    shown = now;
    if (!patterns.length) return fill(list, h("div", { class: "empty" }, h("h2", {}, "No new patterns"), h("p", {}, "Every line so far is of a pattern that the model knows.")));
    const rows = patterns.map((one) => h("tr", {}, h("td", {}, h("div", { class: "pattern" }, ...slots(one.pattern)), h("small", { class: "message quiet" }, one.example)), h("td", { class: "right" }, count(one.count)), h("td", { class: "nowrap" }, ago(one.first_seen)), h("td", { class: "nowrap" }, ago(one.last_seen))));
    const head = h("tr", {}, h("th", {}, "Pattern, and an example"), h("th", { class: "right" }, "Lines"), h("th", {}, "First seen"), h("th", {}, "Last seen"));
    fill(list, h("section", { class: "card" }, scrolling("New patterns", h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows)))));
  }

  function said(error: unknown): void {
    if (!(error instanceof Refused)) throw error;
    shown = "";
    fill(list, h("p", { class: "notice wrong" }, error.message));
  }
}
