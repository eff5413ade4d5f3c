/** Alerts: open, acknowledged, resolved; one alone, whatever it is by now; or those of one stream, on its own page. */

import { Refused, ask, asking, loadedModels, streamPath, type Alert, type AlertCount, type AlertsPage, type Done, type Evidence, type Mute } from "./api";
import { ICONS, fill, h, icon, text } from "./dom";
import { ago, chance, clock, count, duration, now, number, score as points, share } from "./format";
import { keep, kept } from "./kept";
import { PARTS, partOf, slots, varying } from "./lines";
import type { Shell, View } from "./view";

const STATUSES = ["open", "acknowledged", "resolved", "muted"] as const; // what is muted is neither open nor acknowledged here
type Status = (typeof STATUSES)[number];
const SEVERITIES = [
  ["", "All"],
  ["major,critical", "Major and critical"],
  ["critical", "Critical"],
] as const;
const PAGE = 100; // alerts asked for at once
const MOST = 1000;
const WORDS: Record<string, string> = {
  recovered: "the stream is back to normal",
  accepted: "accepted as the new normal",
  accepted_by_age: "accepted as the new normal because of its age",
  spoke: "the stream speaks again",
  ended: "the stream has ended",
  forgotten: "the stream was forgotten",
};
/** What became of alerts in a call about several, after how many. */
const BECAME: Record<string, string> = {
  acknowledged: "acknowledged",
  taken_back: "taken back",
  accepted: "accepted as normal",
  already_acknowledged: "acknowledged before, and left as they are",
  resolved: "over by now",
  nothing: "with nothing to be learned",
  silence: "silent, with nothing to be learned",
  model_not_loaded: "of a model that is not loaded",
  conflict: "of streams that changed meanwhile: try again",
  unknown: "no longer known",
};
/** How they are asked for. */
const FILTERS: Record<Status, string> = {
  open: "status=open&muted=false",
  acknowledged: "status=acknowledged&muted=false",
  resolved: "status=resolved",
  muted: "status=open,acknowledged&muted=true",
};
const MUTED_HOURS = 8; // for so long, unless someone says how long
const NAME_KEY = "onset-name";
const ASK_SECONDS = 3;
const TYPING_MS = 250; // after the last key, before what is searched for is asked
const EARLIER = 20; // of a stream, those that are not over included

/** One alert as it is shown, and what of it is renewed as time goes. */
interface Item {
  mark: string;
  element: HTMLElement;
  age: HTMLElement;
}

/** Whether it is of log lines, over, and not accepted: the rare ones that it shows can still be, as they come again. */
const teaches = (alert: Alert): boolean => alert.status === "resolved" && Boolean(alert.onset?.line) && !(alert.resolution ?? "").startsWith("accepted");

/** Where one alert is shown alone. */
export const alertAddress = (id: string): string => `#/alerts?id=${encodeURIComponent(id)}`;

/** Alerts as they are listed, whichever they are. */
class AlertList {
  readonly element = h("ul", { class: "alerts" });
  private readonly items = new Map<string, Item>();

  /**
   * `chosen`: ids of those that are selected; null = none can be, and they are named by what they are, not by their streams. `changed` is called when one was
   * acknowledged, is no longer, or was selected; `accepted` when one that is over was, with what became of it.
   */
  constructor(
    private readonly changed: () => void,
    private readonly chosen: Chosen | null = null,
    private readonly accepted: (outcomes: Record<string, number>) => void = changed,
  ) {}

  /** Made again only where the alert has changed: a button that is being pressed stays the one it was. */
  renew(alerts: Alert[]): void {
    for (const alert of alerts) {
      const mark = `${alert.updated_at} ${alert.status} ${alert.acknowledgement?.at ?? ""} ${alert.last?.timestamp ?? ""} ${alert.muted?.until ?? ""}`;
      let item = this.items.get(alert.id);
      if (item?.mark !== mark) this.items.set(alert.id, (item = { mark, ...itemOf(alert, this.chosen, () => acknowledge(alert, this.changed), this.accepted) }));
      text(item.age, ago(alert.started_at));
    }
  }

  /** In this order, and no others. What has the focus keeps it; where that is gone, what follows has it. */
  show(alerts: Alert[]): void {
    const wanted = alerts.map((alert) => this.items.get(alert.id)!.element);
    const held = new Set(alerts.map((alert) => alert.id));
    for (const id of this.items.keys()) if (!held.has(id)) this.items.delete(id);
    if (wanted.length === this.element.childElementCount && wanted.every((one, i) => one === this.element.children[i])) return;
    const focused = document.activeElement?.closest<HTMLElement>(".alert");
    const kind = document.activeElement?.matches("button, input") ? document.activeElement.tagName : ".name a";
    const within = this.element.contains(document.activeElement);
    const after = focused ? [...this.element.children].slice([...this.element.children].indexOf(focused)) : [];
    fill(this.element, ...wanted);
    if (!within) return;
    const again = focused && this.items.get(focused.dataset["id"]!)?.element;
    const next = again ?? wanted.find((one) => after.includes(one)) ?? wanted.at(-1);
    const place = next?.querySelector<HTMLElement>(again ? kind : ".name a") ?? next?.querySelector<HTMLElement>(".name a") ?? document.getElementById("main");
    place?.focus({ preventScroll: !next });
  }
}

/** Alerts that are selected, by id. Of those that are no longer listed none stays so. */
class Chosen {
  private readonly ids = new Set<string>();
  private listed: Alert[] = [];

  /** `changed` is called when someone has selected one, or no longer does. */
  constructor(private readonly changed: () => void) {}

  /** Which can be selected now. */
  of(alerts: Alert[]): void {
    this.listed = alerts.filter((alert) => alert.status !== "resolved" || teaches(alert));
    const there = new Set(this.listed.map((alert) => alert.id));
    for (const id of this.ids) if (!there.has(id)) this.ids.delete(id);
  }

  get size(): number {
    return this.listed.length;
  }

  get alerts(): Alert[] {
    return this.listed.filter((alert) => this.ids.has(alert.id));
  }

  has(alert: Alert): boolean {
    return this.ids.has(alert.id);
  }

  set(alert: Alert, on: boolean): void {
    if (on) this.ids.add(alert.id);
    else this.ids.delete(alert.id);
    this.changed();
  }

  all(on: boolean): void {
    this.ids.clear();
    if (on) for (const alert of this.listed) this.ids.add(alert.id);
    this.changed();
  }
}

/** The alerts of one stream: those that are not over, and those that were. */
export class StreamAlerts {
  readonly element = h("section", { "aria-label": "Alerts of this stream", hidden: true });
  readonly earlier = h("section", { class: "card", hidden: true }, h("header", {}, h("h2", {}, "Earlier alerts")));
  private readonly now = new AlertList(() => void this.load());
  private readonly past = new AlertList(() => void this.load());
  private model = "";
  private ended: (() => void) | null = null;

  constructor(private readonly id: string) {
    this.element.append(this.now.element);
    this.earlier.append(this.past.element);
  }

  /** Begins to ask for them, again and again. */
  of(model: string): void {
    if (this.model) return;
    this.model = model;
    this.ended = asking(ASK_SECONDS, () => this.load());
  }

  leave(): void {
    this.ended?.();
  }

  /** Whether there was one to acknowledge. */
  acknowledge(): boolean {
    const button = this.now.element.querySelector<HTMLButtonElement>(".alert[data-status='open'] button");
    button?.click();
    return button !== null;
  }

  private async load(): Promise<void> {
    try {
      const { alerts } = await ask<AlertsPage>(`v1/alerts?${new URLSearchParams({ stream_id: this.id, model: this.model, limit: String(EARLIER) })}`);
      for (const [list, over] of [
        [this.now, false],
        [this.past, true],
      ] as const) {
        const some = alerts.filter((alert) => (alert.status === "resolved") === over);
        list.renew(some);
        list.show(some);
        (over ? this.earlier : this.element).hidden = !some.length;
      }
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // the live feed tells
    }
  }
}

export function alertsView(main: HTMLElement, shell: Shell): View {
  const page = new AlertsView(main, shell);
  return { title: "Alerts", leave: () => page.leave(), key: (event) => page.key(event) };
}

class AlertsView {
  private id: string;
  private status: Status;
  private severity: string;
  private model: string;
  private holds: string; // by the stream's name
  private most = PAGE;
  private whole = ""; // how many there are, where not all of them are listed
  private at = -1; // of the list, by keys
  private typing = 0; // timer of a search that has not been asked yet
  private readonly ended: () => void;
  private shown = ""; // whether there are any, as was said
  private readonly choice = h("div", { class: "choice", role: "group", "aria-label": "Which alerts" });
  private readonly severities = h("div", { class: "choice", role: "group", "aria-label": "How severe" });
  private readonly models = h("select", { class: "field", "aria-label": "Model", hidden: true, onchange: () => ((this.model = this.models.value), this.choose(this.status, this.severity)) });
  private readonly search = h("input", { class: "field", type: "search", placeholder: "Search by stream", "aria-label": "Search alerts by stream", oninput: () => this.searched() });
  private readonly chosen = new Chosen(() => this.showChosen());
  private readonly list = new AlertList(() => void this.load(), this.chosen, (outcomes) => this.say(outcomes));
  private readonly every = h("input", { type: "checkbox", onchange: () => this.chosen.all(this.every.checked) });
  private readonly everyName = h("span");
  private readonly look = h("button", { class: "button", type: "button", onclick: () => (this.status === "acknowledged" ? this.takeBack(this.chosen.alerts) : this.acknowledge(this.chosen.alerts)) });
  private readonly take = h("button", { class: "button", type: "button", onclick: () => this.accept(this.chosen.alerts) });
  private readonly acts = h("div", { class: "actions" }, this.look, this.take);
  private readonly bulk = h("div", { class: "bulk", role: "group", "aria-label": "Several alerts", hidden: true }, h("label", {}, this.every, this.everyName), this.acts);
  private readonly became = h("p", { class: "notice", role: "status", hidden: true });
  private readonly mutes = h("ul", { class: "mutes", "aria-label": "Mutes", hidden: true });
  private readonly more = h("div", { class: "more" });
  private readonly said = h("div", { role: "status" });

  constructor(
    main: HTMLElement,
    private readonly shell: Shell,
  ) {
    this.id = shell.query.get("id") ?? "";
    const asked = shell.query.get("status");
    this.status = STATUSES.find((status) => status === asked) ?? "open";
    this.severity = SEVERITIES.find(([severity]) => severity === shell.query.get("severity"))?.[0] ?? "";
    for (const status of STATUSES) this.choice.append(h("button", { type: "button", "data-status": status, onclick: () => this.choose(status, this.severity) }, status[0]!.toUpperCase() + status.slice(1)));
    for (const [severity, name] of SEVERITIES) this.severities.append(h("button", { type: "button", "data-severity": severity, onclick: () => this.choose(this.status, severity) }, name));
    const search = h("div", { class: "search" }, icon(ICONS.search), this.search, h("kbd", { "aria-hidden": "true" }, "/"));
    main.append(h("div", { class: "page" }, h("div", { class: "head" }, h("div", { class: "title" }, h("h1", {}, "Alerts"), h("p", { class: "quiet" }, `Times of ${Intl.DateTimeFormat().resolvedOptions().timeZone}`)), search, h("button", { class: "button", type: "button", onclick: () => this.mute() }, "Mute …"), h("div", { class: "filters" }, this.choice, this.severities, this.models)), this.became, this.mutes, this.said, this.bulk, this.list.element, this.more));
    this.model = shell.query.get("model") ?? "";
    this.holds = this.search.value = shell.query.get("q") ?? "";
    this.show(this.status, this.severity, this.id);
    void this.showModels();
    this.ended = asking(ASK_SECONDS, () => this.load());
  }

  leave(): void {
    clearTimeout(this.typing);
    this.ended();
  }

  key(event: KeyboardEvent): boolean {
    const inSearch = event.target === this.search;
    if (event.key === "/" && !inSearch) {
      this.search.focus();
      this.search.select();
      return true;
    }
    if (event.key === "Escape" && (inSearch || this.search.value)) {
      this.search.value = "";
      this.search.blur();
      this.searched();
      return true;
    }
    if (inSearch && event.key !== "ArrowDown") return false;
    const items = [...this.list.element.children] as HTMLElement[];
    const step = event.key === "j" || event.key === "ArrowDown" ? 1 : event.key === "k" || event.key === "ArrowUp" ? -1 : 0;
    if (step && items.length) {
      const here = items.findIndex((one) => one.contains(document.activeElement));
      this.at = Math.min(items.length - 1, Math.max(0, (here < 0 ? this.at : here) + step));
      items[this.at]!.querySelector<HTMLElement>(".name a")!.focus();
      return true;
    }
    const item = document.activeElement?.closest(".alert") ?? (this.id ? this.list.element.firstElementChild : null); // one alone needs no focus
    if (event.key === "X") this.chosen.all(this.chosen.alerts.length < this.chosen.size);
    else if (event.key === "x") item?.querySelector<HTMLInputElement>("input")?.click();
    else if (event.key === "a") (this.acts.hidden ? item?.querySelector("button") : this.look.hidden ? this.take : this.look)?.click();
    else return false;
    return true;
  }

  private show(status: Status, severity: string, id = ""): void {
    this.id = id;
    this.status = status;
    this.severity = severity;
    this.most = PAGE;
    this.at = -1;
    this.shown = "";
    for (const button of this.choice.querySelectorAll("button")) button.setAttribute("aria-pressed", String(!id && button.dataset["status"] === status));
    for (const button of this.severities.querySelectorAll("button")) button.setAttribute("aria-pressed", String(!id && button.dataset["severity"] === severity));
    const query = new URLSearchParams();
    if (status !== "open") query.set("status", status);
    if (severity) query.set("severity", severity);
    if (this.model) query.set("model", this.model);
    if (this.holds) query.set("q", this.holds);
    if (id) this.search.value = this.holds = "";
    history.replaceState(null, "", id ? alertAddress(id) : `#/alerts${query.size ? `?${query}` : ""}`);
    this.chosen.of([]);
    this.showChosen();
    this.became.hidden = true;
    this.mutes.hidden = true;
    this.list.show([]);
    fill(this.more);
    delete this.more.dataset["shown"];
    fill(this.said, h("p", { class: "notice" }, "Loading …"));
  }

  private async showModels(): Promise<void> {
    try {
      const names = (await loadedModels()).models.map((model) => model.name);
      if (this.model && !names.includes(this.model)) names.push(this.model); // it may have had alerts
      this.models.hidden = names.length < 2;
      fill(this.models, h("option", { value: "" }, "All models"), ...names.map((name) => h("option", { value: name, selected: name === this.model }, name)));
    } catch (error) {
      if (!(error instanceof Refused)) throw error; // said where the alerts would be
    }
  }

  /** Those that are not over. */
  private async showMutes(): Promise<void> {
    const { mutes } = await ask<{ mutes: Mute[] }>("v1/mutes");
    if (this.status !== "muted" || this.id) return;
    const held = mutes.filter((mute) => mute.state !== "over");
    const shown = JSON.stringify(held);
    this.mutes.hidden = !held.length;
    if (this.mutes.dataset["shown"] === shown) return;
    this.mutes.dataset["shown"] = shown;
    fill(this.mutes, ...held.map((mute) => h("li", {}, h("p", {}, h("b", {}, mute.streams.join(" · ")), mute.model ? ` of ${mute.model}` : "", ` ${mute.state === "in_force" ? "" : `from ${clock(mute.starts_at)} `}until ${clock(mute.ends_at)}, by ${mute.by}${mute.note ? `: ${mute.note}` : ""}`), h("button", { class: "button", type: "button", "aria-label": `End … the mute of ${mute.streams.join(", ")}`, onclick: () => this.endMute(mute) }, "End …"))));
  }

  private endMute(mute: Mute): void {
    confirmed("End a mute", [`${mute.streams.join(" · ")}: alerts that are still open are told within a minute.`], "End it", async () => {
      try {
        await ask(`v1/mutes/${mute.name}`, { method: "DELETE" });
      } catch (error) {
        if (!(error instanceof Refused) || error.status !== 404) throw error; // someone was faster
      }
      void this.load();
    });
  }

  /** Asks whose alerts nobody is to be told of, and until when. */
  private mute(): void {
    const streams = h("textarea", { class: "field", name: "streams", rows: 3 });
    streams.value = this.holds ? `*${this.holds}*` : "";
    const from = h("input", { class: "field", type: "datetime-local", name: "from" });
    const until = h("input", { class: "field", type: "datetime-local", name: "until", value: picked(1000 * now() + MUTED_HOURS * 3.6e6) });
    const parts = [h("label", {}, "Streams, one a line; * is any characters", streams), h("label", {}, "From (now, if empty)", from), h("label", {}, "Until", until)];
    const save = async (by: Signature): Promise<void> => {
      const names = streams.value.split("\n").map((name) => name.trim()).filter(Boolean);
      if (!names.length) {
        streams.focus();
        throw new Refused(0, "Which streams is missing.");
      }
      if (!until.value) {
        until.focus();
        throw new Refused(0, "Until when is missing.");
      }
      const body = JSON.stringify({ ...by, streams: names, model: this.model || null, starts_at: from.value ? new Date(from.value).toISOString() : null, ends_at: new Date(until.value).toISOString() });
      await ask(`v1/mutes/${name}`, { method: "PUT", headers: { "content-type": "application/json" }, body });
      this.choose("muted", "");
    };
    const name = `page-${Date.now().toString(36)}`; // the same where it is sent again
    signed("Mute", [`Nobody is told of alerts that begin meanwhile${this.model ? ` in ${this.model}` : ""}. They are scored and listed, and those that are still open afterwards are told then.`], "Mute", save, null, null, parts);
  }

  private choose(status: Status, severity: string): void {
    this.show(status, severity);
    void this.load();
  }

  private searched(): void {
    clearTimeout(this.typing);
    this.typing = window.setTimeout(() => {
      const holds = this.search.value.trim();
      if (holds === this.holds) return;
      this.holds = holds;
      this.choose(this.status, this.severity);
    }, TYPING_MS);
  }

  /** What is selected, and what can be done with it. */
  private showChosen(): void {
    const alerts = this.chosen.alerts;
    this.bulk.hidden = this.chosen.size < 2;
    this.list.element.toggleAttribute("data-several", !this.bulk.hidden);
    this.every.checked = alerts.length > 0 && alerts.length === this.chosen.size;
    this.every.indeterminate = alerts.length > 0 && alerts.length < this.chosen.size;
    text(this.everyName, alerts.length ? `${count(alerts.length)} of ${this.whole || count(this.chosen.size)} selected` : `Select the ${count(this.chosen.size)} listed`);
    for (const box of this.list.element.querySelectorAll<HTMLInputElement>(".name input")) box.checked = alerts.some((alert) => alert.id === box.value);
    this.acts.hidden = !alerts.length;
    this.look.hidden = this.status === "resolved";
    text(this.look, `${this.status === "acknowledged" ? "Take back" : "Acknowledge"} ${count(alerts.length)}`);
    text(this.take, `Accept ${count(alerts.length)} as normal`);
  }

  private acknowledge(alerts: Alert[]): void {
    const words = `${listed(alerts)}: you look after them. They stay until their streams are normal again; what someone looks after already is left as it is.`;
    signed(`Acknowledge ${count(alerts.length)}`, [words], "Acknowledge", (by) => this.told("acknowledge", alerts, by));
  }

  private accept(alerts: Alert[]): void {
    if (this.status === "resolved") return acceptLines(alerts, (outcomes) => this.say(outcomes));
    const anomalies = alerts.filter((alert) => alert.kind === "anomaly");
    const silent = alerts.length - anomalies.length;
    const streams = `${count(anomalies.length)} ${anomalies.length === 1 ? "stream takes" : "streams take"}`;
    const words = [
      anomalies.length ? `${listed(anomalies)}: ${streams} what they show now for their normal, and learn it at once. Their alerts close. This cannot be undone.` : "Nothing can be accepted: a silence has nothing to be learned.",
      silent && anomalies.length ? `${count(silent)} silent: left as they are.` : "",
      anomalies.length ? "What is passing, as after a power dip, is better left to end by itself." : "",
    ];
    signed(`Accept ${count(anomalies.length)} as normal`, words.filter(Boolean), anomalies.length ? "Accept as normal" : "", (by) => this.told("accept", anomalies, by));
  }

  private async told(what: string, alerts: Alert[], by: Signature): Promise<void> {
    this.say(await did(what, alerts, by));
  }

  private takeBack(alerts: Alert[]): void {
    const words = `${listed(alerts)}: nobody looks after them any more, and they are open again.`;
    confirmed(`Take back ${count(alerts.length)}`, [words], "Take back", async (said) => {
      const outcomes: Record<string, number> = {};
      for (const [i, alert] of alerts.entries()) {
        text(said, `${count(i)} of ${count(alerts.length)} …`);
        const outcome = await takenBack(alert);
        outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
      }
      this.say(outcomes);
    });
  }

  /** What became of several. */
  private say(outcomes: Record<string, number>): void {
    this.chosen.all(false);
    text(this.became, `${Object.entries(outcomes).map(([outcome, many]) => `${count(many)} ${BECAME[outcome] ?? outcome}`).join(", ")}.`);
    this.became.hidden = false;
    void this.load();
  }

  private async load(): Promise<void> {
    const { id, status, severity, model, holds, most } = this;
    try {
      if (id) {
        const alert = await ask<Alert>(`v1/alerts/${encodeURIComponent(id)}`);
        if (id === this.id) this.fill([alert]);
        return;
      }
      if (status === "muted") await this.showMutes();
      const filter = `${FILTERS[status]}${severity ? `&severity=${severity}` : ""}${model ? `&model=${encodeURIComponent(model)}` : ""}${holds ? `&q=${encodeURIComponent(holds)}` : ""}`;
      let page = await ask<AlertsPage>(`v1/alerts?${filter}&limit=${most}`);
      // Behind thousands of others there may be some: a page looks at so many alone.
      while (!page.alerts.length && page.next_cursor !== null) page = await ask<AlertsPage>(`v1/alerts?${filter}&limit=${most}&cursor=${page.next_cursor}`);
      const all = page.next_cursor === null ? null : await ask<AlertCount>(`v1/alerts/count?${filter}`);
      if (this.id || status !== this.status || severity !== this.severity || model !== this.model || holds !== this.holds || most !== this.most) return;
      if (status === "open" && !severity && !model && !holds) this.shell.alerting(all ?? counted(page.alerts));
      this.whole = all ? `${count(all.count)}${all.complete ? "" : "+"}` : "";
      this.fill(page.alerts);
      this.sayMore(page.alerts.length);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (id !== this.id) return;
      this.shown = ""; // the next answer takes these words away, also where it is the same
      fill(this.said, h("p", { class: "notice wrong" }, error.message));
    }
  }

  private fill(alerts: Alert[]): void {
    this.chosen.of(alerts);
    this.list.renew(alerts);
    this.list.show(alerts);
    this.showChosen();
    const shown = String(alerts.length > 0);
    if (shown === this.shown) return;
    this.shown = shown;
    this.said.replaceChildren();
    if (!alerts.length) {
      const words = { open: "Nothing has begun that is as rare as you asked to be told of.", acknowledged: "Nobody looks after an alert now.", resolved: "No alert has been resolved yet.", muted: "No alert is open that nobody is told of." }[this.status];
      const severe = SEVERITIES.find(([severity]) => severity === this.severity)![1].toLowerCase();
      const which = [this.severity ? ` that is ${severe.replace("and", "or")}` : "", this.model ? ` of ${this.model}` : "", this.holds ? ` of a stream whose name holds “${this.holds}”` : ""].join("");
      fill(this.said, h("div", { class: "empty" }, h("h2", {}, `No ${this.status} alerts`), h("p", {}, which ? `None${which}.` : words)));
    }
  }

  /** What is not shown, so that nobody takes the page for all there is. */
  private sayMore(shown: number): void {
    const words = this.whole && `The latest ${count(shown)} of ${this.whole}.`;
    if (this.more.dataset["shown"] === words) return;
    this.more.dataset["shown"] = words;
    if (!words) return fill(this.more);
    const button = h("button", { class: "button", type: "button", onclick: () => ((this.most = Math.min(MOST, this.most + 2 * PAGE)), void this.load()) }, "Show more");
    fill(this.more, h("p", {}, words), this.most < MOST ? button : null);
  }
}

function itemOf(alert: Alert, chosen: Chosen | null, act: () => void, accepted: (outcomes: Record<string, number>) => void): { element: HTMLElement; age: HTMLElement } {
  const { onset, last, acknowledgement } = alert;
  const href = `#/stream/${streamPath(alert.stream_id)}?model=${encodeURIComponent(alert.model)}&at=${alert.started_at}`;
  const severity = h("span", { class: "severity" }, alert.severity);
  const link = h("a", { class: "link", href: alertAddress(alert.id), "aria-label": `Link to this alert of ${alert.stream_id}`, title: "This alert alone, at an address to send to someone" }, "Link");
  const line = onset?.line;
  const score = onset?.alert_score ? h("span", { title: "1 = as rare as you asked to be told of" }, `alert score ${points(onset.alert_score)}`) : null;
  const evidence = onset ? [line?.new ? " · new pattern" : "", line || !onset.contributors.length ? "" : ` · ${found(onset)}`, score && " · ", score, unusual(onset) ? ` · ${chanceOf(onset)}` : ""] : [];
  const what = alert.kind === "silence" ? ` · silent for longer than ${duration(Math.ceil(alert.patience ?? 0))} since ${clock(Math.min(alert.started_at, alert.opened_at))}` : ` · began ${clock(alert.started_at)}, `;
  const now = last && !line && alert.status !== "resolved" && last.timestamp !== onset?.timestamp ? h("p", {}, `At ${clock(last.timestamp)}: ${[found(last), chanceOf(last)].filter(Boolean).join(" · ")}`) : null;
  const state =
    alert.status === "resolved"
      ? `Resolved ${alert.resolved_at ? clock(alert.resolved_at) : ""}: ${WORDS[alert.resolution ?? ""] ?? alert.resolution ?? ""}${alert.resolved_at ? `, after ${duration(lasted(alert, alert.resolved_at))}` : ""}`
      : "";
  const looked = acknowledgement ? `Acknowledged ${clock(acknowledgement.at)} by ${acknowledgement.by || "someone"}${acknowledgement.note ? `: ${acknowledgement.note}` : ""}` : "";
  const muted = alert.muted && alert.status !== "resolved" ? `Muted until ${clock(alert.muted.until)} (${alert.muted.mute}): nobody is told${alert.muted.told ? ` that it is more than ${alert.muted.told}` : ""}` : "";
  const button = teaches(alert) ? h("button", { class: "button", type: "button", "aria-label": `Accept the lines of ${alert.stream_id} as normal`, onclick: () => acceptLines([alert], accepted) }, "Accept as normal") : alert.status === "resolved" ? null : h("button", { class: "button", type: "button", "aria-label": `${acknowledgement ? "Change the note on" : "Acknowledge"} ${alert.stream_id}`, onclick: act }, acknowledgement ? "Change" : "Acknowledge");
  const age = h("span");
  const more = alert.kind === "silence" ? [] : [age, ...evidence];
  const name = chosen ? alert.stream_id : alert.kind === "silence" ? "Silence" : "Anomaly";
  const box = chosen && (alert.status !== "resolved" || teaches(alert)) ? h("input", { type: "checkbox", value: alert.id, checked: chosen.has(alert), "aria-label": `Select ${alert.stream_id}`, onchange: (event: Event) => chosen.set(alert, (event.target as HTMLInputElement).checked) }) : null;
  const element = h("li", { class: "alert", "data-status": alert.status, "data-id": alert.id }, h("div", { class: "name" }, box, h("a", { href }, name)), h("p", {}, severity, what, ...more, " · ", link), line && onset ? lineOf(line, onset) : null, now, muted ? h("p", {}, muted) : null, looked ? h("p", {}, looked) : null, state ? h("p", {}, state) : null, button && h("div", { class: "actions" }, button));
  return { element, age };
}

/** What the feature that carries the most showed, beside what was expected. */
function found(evidence: Evidence): string {
  const { contributors: [top], direction, alert_score } = evidence;
  if (!top) return "";
  const course = within(top) ? (unusual(evidence) || alert_score ? ", within its range: its course is unusual" : "") : direction !== "none" ? ` (${direction})` : "";
  return `${top.feature} ${top.actual === null ? "has no value" : number(top.actual)}, expected ${number(top.expected)}${course}`;
}

/** Where the event by itself is ordinary, what began with it is not: the alert score says how rare that is. */
const unusual = ({ p_value }: Evidence): boolean => p_value !== null && p_value < 0.1;

const chanceOf = (evidence: Evidence): string => (unusual(evidence) ? `chance if normal: ${chance(evidence.p_value)}` : evidence.p_value === null ? "" : "ordinary by itself");

/** Asks who looks after it, and what there is to say. */
function acknowledge(alert: Alert, done: () => void): void {
  const before = alert.acknowledgement;
  const send = async (options: RequestInit): Promise<void> => {
    await ask(`v1/alerts/${alert.id}/acknowledge`, options);
    done();
  };
  const save = (by: Signature): Promise<void> => send({ method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(by) });
  const words = `${alert.stream_id}: ${before ? "someone looks" : "you look"} after it. It stays until the stream is normal again.`;
  signed(before ? "Acknowledged" : "Acknowledge", [words], before ? "Save" : "Acknowledge", save, before, before ? ["Take back", () => send({ method: "DELETE" })] : null);
}

/** A call about several; how many became what. */
async function did(what: string, alerts: Alert[], by: Signature): Promise<Record<string, number>> {
  const body = JSON.stringify({ ...by, ids: alerts.map((alert) => alert.id) });
  return (await ask<Done>(`v1/alerts/${what}`, { method: "POST", headers: { "content-type": "application/json" }, body })).outcomes;
}

/** Asks who takes the lines of alerts that are over for usual. What is not `accepted` of a single one stays said. */
function acceptLines(alerts: Alert[], done: (outcomes: Record<string, number>) => void): void {
  const streams = new Set(alerts.map((alert) => alert.stream_id));
  const words = [
    `${listed(alerts)} of ${streams.size === 1 ? [...streams][0]! : `${count(streams.size)} streams`}: the rare lines that ${alerts.length === 1 ? "it shows" : "they show"} are usual there from now on, and open no alert when they come again. This cannot be undone.`,
    "An attack's lines are better left as they are: they would be usual, too.",
  ];
  signed(alerts.length === 1 ? "Accept as normal" : `Accept ${count(alerts.length)} as normal`, words, "Accept as normal", async (by) => {
    const { resolved: nothing, ...outcomes } = await did("accept", alerts, by);
    if (alerts.length === 1 && !outcomes["accepted"]) throw new Refused(0, nothing ? "It teaches nothing: it was about a pause, a number or a line that did not come, or its stream is gone." : `Not accepted: ${BECAME[Object.keys(outcomes)[0]!] ?? ""}.`);
    done(nothing ? { ...outcomes, nothing } : outcomes);
  });
}

/** Nobody looks after it any more; what became of it. */
async function takenBack(alert: Alert): Promise<string> {
  try {
    await ask(`v1/alerts/${alert.id}/acknowledge`, { method: "DELETE" });
    return "taken_back";
  } catch (error) {
    if (!(error instanceof Refused) || (error.status !== 404 && error.status !== 409)) throw error;
    return error.status === 404 ? "unknown" : "resolved";
  }
}

/** A time as a field of type datetime-local has it: the browser's. */
function picked(ms: number): string {
  const at = new Date(ms);
  return new Date(ms - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

/** Who says so, and what else. */
interface Signature {
  by: string;
  note: string;
}

/** Asks for a name and a note before it is done. */
function signed(title: string, words: string[], name: string, send: (by: Signature) => Promise<void>, before: Signature | null = null, other: [string, () => Promise<void>] | null = null, first: HTMLElement[] = []): void {
  const by = h("input", { class: "field", name: "by", maxlength: "128", value: before?.by ?? kept(NAME_KEY) ?? "", autocomplete: "name" });
  const note = h("input", { class: "field", name: "note", maxlength: "1000", value: before?.note ?? "" });
  const act = async (): Promise<void> => {
    if (!by.value.trim()) {
      by.focus();
      throw new Refused(0, "Your name is missing.");
    }
    keep(NAME_KEY, by.value);
    return send({ by: by.value.trim(), note: note.value.trim() });
  };
  confirmed(title, words, name, act, h("div", { class: "form" }, ...first, h("label", {}, "Your name", by), h("label", {}, "Note", note)), other);
}

/** Asks whether it is to be done, and closes once it is: `act` may say how far it is. What is refused is said. Without a `name` nothing can be. */
function confirmed(title: string, words: string[], name: string, act: (said: HTMLElement) => Promise<void>, form: HTMLElement | null = null, other: [string, () => Promise<void>] | null = null): void {
  const said = h("p", { role: "status" });
  const run = async (what: () => Promise<void>): Promise<void> => {
    const buttons = [...dialog.querySelectorAll("button")];
    if (buttons.some((one) => one.disabled)) return; // once is enough, however long Enter is held
    buttons.forEach((one) => (one.disabled = true));
    try {
      await what();
      dialog.close();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      text(said, error.message);
    } finally {
      buttons.forEach((one) => (one.disabled = false));
    }
  };
  const closed = (): void => {
    dialog.remove();
    if (document.activeElement === document.body) document.getElementById("main")?.focus({ preventScroll: true }); // the button that opened it is gone
  };
  const save = (): void => void run(() => act(said));
  const button = (words: string, what: () => void, kind = ""): HTMLElement => h("button", { class: `button ${kind}`, type: "button", onclick: what }, words);
  const dialog = h(
    "dialog",
    { "aria-labelledby": "ask-title", onclose: closed },
    h("h2", { id: "ask-title" }, title),
    ...words.map((one) => h("p", {}, one)),
    name ? form : null,
    said,
    h("div", { class: "actions" }, other && button(other[0], () => void run(other[1])), button(name ? "Cancel" : "Close", () => dialog.close()), name ? button(name, save, "primary") : null),
  );
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.target as HTMLElement).tagName === "INPUT") save();
  });
  document.body.append(dialog);
  dialog.showModal();
}

/** How many alerts of which severity: "3 critical, 12 minor alerts". */
function listed(alerts: Alert[]): string {
  const of = counted(alerts).by_severity;
  const parts = ["critical", "major", "minor"].filter((severity) => of[severity]).map((severity) => `${count(of[severity]!)} ${severity}`);
  return `${parts.join(", ")} ${alerts.length === 1 ? "alert" : "alerts"}`;
}

function counted(alerts: Alert[]): AlertCount {
  const by_severity: Record<string, number> = {};
  for (const { severity } of alerts) by_severity[severity] = (by_severity[severity] ?? 0) + 1;
  return { count: alerts.length, by_severity, complete: true };
}

/** In seconds: of an anomaly by the events' own time, since a sender may bring all of it at once. */
function lasted(alert: Alert, resolved: number): number {
  return alert.kind === "anomaly" && alert.last ? alert.last.timestamp - alert.started_at : resolved - alert.opened_at;
}

/** Whether a value lies where it was expected: what is unusual is then how it got there, or that it does not move. */
function within(finding: Evidence["contributors"][number]): boolean {
  const { actual, lower, upper } = finding;
  return [actual, lower, upper].every((value) => typeof value === "number") && actual! >= lower! && actual! <= upper!;
}

/** The line that opened an alert, what else about it was unusual, what would have been likelier, and what came before. */
function lineOf(line: NonNullable<Evidence["line"]>, onset: Evidence): HTMLElement {
  const said = line.message ?? line.template ?? "";
  const expected = Object.entries(onset.expected ?? {});
  const own = expected.find(([pattern]) => pattern === (line.new ? "(new pattern)" : line.template))?.[1] ?? 0;
  const carried = onset.contributors.filter((one) => one.feature !== "template" && one.contribution >= 0.1);
  const likely = expected.filter(([, p]) => (p ?? 0) > own).map(([pattern, p]) => h("li", {}, h("span", { class: "num" }, share(p ?? 0)), h("span", { class: "pattern" }, ...slots(pattern))));
  return h(
    "div",
    { class: "evidence" },
    h("p", { class: "message" }, ...varying(said, line.template ?? "")),
    ...carried.map((one) => h("p", { class: "quiet" }, `${PARTS[one.feature] ?? one.feature}: ${partOf(one)} · ${share(one.contribution)} of the error`)),
    likely.length ? h("p", { class: "quiet" }, "Likelier was") : null,
    likely.length ? h("ul", { class: "shares" }, ...likely) : null,
    line.before.length ? h("p", { class: "quiet" }, "Before it came") : null,
    line.before.length ? h("ol", { class: "before" }, ...line.before.map((pattern) => h("li", { class: "pattern" }, ...slots(pattern)))) : null,
  );
}
