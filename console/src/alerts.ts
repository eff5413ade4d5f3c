/** Alerts: open, acknowledged, resolved; one alone, whatever it is by now; or those of one stream, on its own page. */

import { Refused, ask, asking, loadedModels, streamPath, type Alert, type AlertsPage, type Evidence } from "./api";
import { fill, h, text } from "./dom";
import { ago, chance, clock, duration, number, score as points, share } from "./format";
import { keep, kept } from "./kept";
import { PARTS, partOf, slots, varying } from "./lines";
import type { Shell, View } from "./view";

const STATUSES = ["open", "acknowledged", "resolved"] as const;
type Status = (typeof STATUSES)[number];
const SEVERITIES = [
  ["", "All"],
  ["major,critical", "Major and critical"],
  ["critical", "Critical"],
] as const;
export const PAGE = 100; // alerts asked for at once
const MOST = 1000;
const WORDS: Record<string, string> = {
  recovered: "the stream is back to normal",
  accepted: "accepted as the new normal",
  accepted_by_age: "accepted as the new normal because of its age",
  spoke: "the stream speaks again",
  ended: "the stream has ended",
  forgotten: "the stream was forgotten",
};
const NAME_KEY = "onset-name";
const ASK_SECONDS = 3;
const EARLIER = 20; // of a stream, those that are not over included

/** One alert as it is shown, and what of it is renewed as time goes. */
interface Item {
  mark: string;
  element: HTMLElement;
  age: HTMLElement;
}

/** Where one alert is shown alone. */
export const alertAddress = (id: string): string => `#/alerts?id=${encodeURIComponent(id)}`;

/** Alerts as they are listed, whichever they are. */
class AlertList {
  readonly element = h("ul", { class: "alerts" });
  private readonly items = new Map<string, Item>();

  /** `named`: by their streams; else by what they are. `changed` is called when one was acknowledged or is no longer. */
  constructor(
    private readonly named: boolean,
    private readonly changed: () => void,
  ) {}

  /** Made again only where the alert has changed: a button that is being pressed stays the one it was. */
  renew(alerts: Alert[]): void {
    for (const alert of alerts) {
      const mark = `${alert.updated_at} ${alert.status} ${alert.acknowledgement?.at ?? ""} ${alert.last?.timestamp ?? ""}`;
      let item = this.items.get(alert.id);
      if (item?.mark !== mark) this.items.set(alert.id, (item = { mark, ...itemOf(alert, this.named, () => acknowledge(alert, this.changed)) }));
      text(item.age, ago(alert.started_at));
    }
  }

  /** In this order, and no others. What has the focus keeps it. */
  show(alerts: Alert[]): void {
    const wanted = alerts.map((alert) => this.items.get(alert.id)!.element);
    const held = new Set(alerts.map((alert) => alert.id));
    for (const id of this.items.keys()) if (!held.has(id)) this.items.delete(id);
    if (wanted.length === this.element.childElementCount && wanted.every((one, i) => one === this.element.children[i])) return;
    const focused = document.activeElement?.closest<HTMLElement>(".alert");
    const onButton = document.activeElement?.tagName === "BUTTON";
    const within = this.element.contains(document.activeElement);
    fill(this.element, ...wanted);
    const again = within && focused && this.items.get(focused.dataset["id"]!)?.element;
    if (again) (again.querySelector<HTMLElement>(onButton ? "button" : ".name a") ?? again.querySelector<HTMLElement>(".name a"))!.focus();
  }
}

/** The alerts of one stream: those that are not over, and those that were. */
export class StreamAlerts {
  readonly element = h("section", { "aria-label": "Alerts of this stream", hidden: true });
  readonly earlier = h("section", { class: "card", hidden: true }, h("header", {}, h("h2", {}, "Earlier alerts")));
  private readonly now = new AlertList(false, () => void this.load());
  private readonly past = new AlertList(false, () => void this.load());
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
      if (!(error instanceof Refused)) throw error;
      if (error.status === 404) this.leave(); // a service without alerts; all else the live feed tells
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
  private most = PAGE;
  private selected = -1;
  private readonly ended: () => void;
  private shown = ""; // whether there are any, as was said
  private readonly choice = h("div", { class: "choice", role: "group", "aria-label": "Which alerts" });
  private readonly severities = h("div", { class: "choice", role: "group", "aria-label": "How severe" });
  private readonly models = h("select", { class: "field", "aria-label": "Model", hidden: true, onchange: () => ((this.model = this.models.value), this.choose(this.status, this.severity)) });
  private readonly list = new AlertList(true, () => void this.load());
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
    main.append(h("div", { class: "page" }, h("div", { class: "head" }, h("div", { class: "title" }, h("h1", {}, "Alerts"), h("p", { class: "quiet" }, `Times of ${Intl.DateTimeFormat().resolvedOptions().timeZone}`)), this.models, this.severities, this.choice), this.said, this.list.element, this.more));
    this.model = shell.query.get("model") ?? "";
    this.show(this.status, this.severity, this.id);
    void this.showModels();
    this.ended = asking(ASK_SECONDS, () => this.load());
  }

  leave(): void {
    this.ended();
  }

  key(event: KeyboardEvent): boolean {
    const items = [...this.list.element.children] as HTMLElement[];
    const step = event.key === "j" || event.key === "ArrowDown" ? 1 : event.key === "k" || event.key === "ArrowUp" ? -1 : 0;
    if (step && items.length) {
      this.selected = Math.min(items.length - 1, Math.max(0, this.selected + step));
      items[this.selected]!.querySelector<HTMLElement>(".name a")!.focus();
      return true;
    }
    if (event.key === "a") {
      const item = document.activeElement?.closest(".alert");
      item?.querySelector<HTMLButtonElement>("button")?.click();
      return item !== null;
    }
    return false;
  }

  private show(status: Status, severity: string, id = ""): void {
    this.id = id;
    this.status = status;
    this.severity = severity;
    this.most = PAGE;
    this.selected = -1;
    this.shown = "";
    for (const button of this.choice.querySelectorAll("button")) button.setAttribute("aria-pressed", String(!id && button.dataset["status"] === status));
    for (const button of this.severities.querySelectorAll("button")) button.setAttribute("aria-pressed", String(!id && button.dataset["severity"] === severity));
    const query = new URLSearchParams();
    if (status !== "open") query.set("status", status);
    if (severity) query.set("severity", severity);
    if (this.model) query.set("model", this.model);
    history.replaceState(null, "", id ? alertAddress(id) : `#/alerts${query.size ? `?${query}` : ""}`);
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

  private choose(status: Status, severity: string): void {
    this.show(status, severity);
    void this.load();
  }

  private async load(): Promise<void> {
    const { id, status, severity, model, most } = this;
    try {
      if (id) {
        const alert = await ask<Alert>(`v1/alerts/${encodeURIComponent(id)}`);
        if (id === this.id) this.fill([alert]);
        return;
      }
      const page = await ask<AlertsPage>(`v1/alerts?status=${status}&limit=${most}${severity ? `&severity=${severity}` : ""}${model ? `&model=${encodeURIComponent(model)}` : ""}`);
      if (this.id || status !== this.status || severity !== this.severity || model !== this.model || most !== this.most) return;
      if (status === "open" && !severity && !model) this.shell.alerting(page);
      this.fill(page.alerts);
      this.sayMore(page);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (id !== this.id) return;
      this.shown = ""; // the next answer takes these words away, also where it is the same
      fill(this.said, h("p", { class: "notice wrong" }, id || error.status !== 404 ? error.message : "This service keeps no alerts."));
    }
  }

  private fill(alerts: Alert[]): void {
    this.list.renew(alerts);
    this.list.show(alerts);
    const shown = String(alerts.length > 0);
    if (shown === this.shown) return;
    this.shown = shown;
    this.said.replaceChildren();
    if (!alerts.length) {
      const words = { open: "Nothing has begun that is as rare as you asked to be told of.", acknowledged: "Nobody looks after an alert now.", resolved: "No alert has been resolved yet." }[this.status];
      const severe = SEVERITIES.find(([severity]) => severity === this.severity)![1].toLowerCase();
      const which = [this.severity ? ` that is ${severe.replace("and", "or")}` : "", this.model ? ` of ${this.model}` : ""].join("");
      fill(this.said, h("div", { class: "empty" }, h("h2", {}, `No ${this.status} alerts`), h("p", {}, which ? `None${which}.` : words)));
    }
  }

  /** What is not shown, so that nobody takes the page for all there is. */
  private sayMore(page: AlertsPage): void {
    const shown = page.alerts.length;
    if (this.more.dataset["shown"] === `${shown} ${page.next_cursor !== null}`) return;
    this.more.dataset["shown"] = `${shown} ${page.next_cursor !== null}`;
    if (page.next_cursor === null) return fill(this.more);
    const button = h("button", { class: "button", type: "button", onclick: () => ((this.most = Math.min(MOST, this.most + 2 * PAGE)), void this.load()) }, "Show more");
    fill(this.more, h("p", {}, `The latest ${shown}; there are more.`), this.most < MOST ? button : null);
  }
}

function itemOf(alert: Alert, named: boolean, act: () => void): { element: HTMLElement; age: HTMLElement } {
  const { onset, last, acknowledgement } = alert;
  const href = `#/stream/${streamPath(alert.stream_id)}?model=${encodeURIComponent(alert.model)}&at=${alert.started_at}`;
  const severity = h("span", { class: "severity" }, alert.severity);
  const link = h("a", { class: "link", href: alertAddress(alert.id), "aria-label": `Link to this alert of ${alert.stream_id}`, title: "This alert alone, at an address to send to someone" }, "Link");
  const line = onset?.line;
  const score = onset?.alert_score ? h("span", { title: "1 = as rare as you asked to be told of" }, `alert score ${points(onset.alert_score)}`) : null;
  const evidence = onset ? [" · ", line?.new ? "new pattern · " : "", line ? "" : found(onset), score, rare(onset.p_value)] : [];
  const what = alert.kind === "silence" ? ` · silent for longer than ${duration(Math.ceil(alert.patience ?? 0))} since ${clock(Math.min(alert.started_at, alert.opened_at))}` : ` · began ${clock(alert.started_at)}, `;
  const now = last && !line && alert.status !== "resolved" && last.timestamp !== onset?.timestamp ? h("p", {}, `At ${clock(last.timestamp)}: `, found(last), rare(last.p_value).replace(/^ · /, "")) : null;
  const state =
    alert.status === "resolved"
      ? `Resolved ${alert.resolved_at ? clock(alert.resolved_at) : ""}: ${WORDS[alert.resolution ?? ""] ?? alert.resolution ?? ""}${alert.resolved_at ? `, after ${duration(lasted(alert, alert.resolved_at))}` : ""}`
      : "";
  const looked = acknowledgement ? `Acknowledged ${clock(acknowledgement.at)} by ${acknowledgement.by || "someone"}${acknowledgement.note ? `: ${acknowledgement.note}` : ""}` : "";
  const button = alert.status === "resolved" ? null : h("button", { class: "button", type: "button", "aria-label": `${acknowledgement ? "Change the note on" : "Acknowledge"} ${alert.stream_id}`, onclick: act }, acknowledgement ? "Change" : "Acknowledge");
  const age = h("span");
  const more = alert.kind === "silence" ? [] : [age, ...evidence];
  const name = named ? alert.stream_id : alert.kind === "silence" ? "Silence" : "Anomaly";
  const element = h("li", { class: "alert", "data-status": alert.status, "data-id": alert.id }, h("div", { class: "name" }, h("a", { href }, name)), h("p", {}, severity, what, ...more, " · ", link), line && onset ? lineOf(line, onset) : null, now, looked ? h("p", {}, looked) : null, state ? h("p", {}, state) : null, button && h("div", { class: "actions" }, button));
  return { element, age };
}

/** What the feature that carries the most showed, beside what was expected. */
function found({ contributors: [top], direction }: Evidence): string {
  if (!top) return "";
  const way = within(top) ? ", within its range: its course is unusual" : direction !== "none" ? ` (${direction})` : "";
  return `${top.feature} ${top.actual === null ? "has no value" : number(top.actual)}, expected ${number(top.expected)}${way} · `;
}

/** Where the event by itself is ordinary, what began with it is not: the alert score says how rare that is. */
const rare = (p: number | null): string => (p !== null && p < 0.1 ? ` · chance if normal: ${chance(p)}` : "");

/** Asks who looks after it, and what there is to say. */
function acknowledge(alert: Alert, done: () => void): void {
  const before = alert.acknowledgement;
  const by = h("input", { class: "field", name: "by", maxlength: "128", value: before?.by ?? kept(NAME_KEY) ?? "", autocomplete: "name" });
  const note = h("input", { class: "field", name: "note", maxlength: "1000", value: before?.note ?? "" });
  const said = h("p", { role: "status" });
  const send = async (options: RequestInit): Promise<void> => {
    try {
      await ask(`v1/alerts/${alert.id}/acknowledge`, options);
      dialog.close();
      done();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      text(said, error.message);
    }
  };
  const save = (): void => {
    keep(NAME_KEY, by.value);
    void send({ method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ by: by.value.trim(), note: note.value.trim() }) });
  };
  const button = (name: string, act: () => void, kind = ""): HTMLElement => h("button", { class: `button ${kind}`, type: "button", onclick: act }, name);
  const dialog = h(
    "dialog",
    { "aria-labelledby": "ack-title", onclose: () => dialog.remove() },
    h("h2", { id: "ack-title" }, before ? "Acknowledged" : "Acknowledge"),
    h("p", {}, `${alert.stream_id}: ${before ? "someone looks" : "you look"} after it. It stays until the stream is normal again.`),
    h("div", { class: "form" }, h("label", {}, "Your name", by), h("label", {}, "Note", note)),
    said,
    h("div", { class: "actions" }, before ? button("Take back", () => void send({ method: "DELETE" })) : null, button("Cancel", () => dialog.close()), button(before ? "Save" : "Acknowledge", save, "primary")),
  );
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.target as HTMLElement).tagName === "INPUT") save();
  });
  document.body.append(dialog);
  dialog.showModal();
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
