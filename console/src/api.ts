/** The service's own API, at addresses relative to the page, so that it works under any path. */

import { told } from "./format";

export interface Problem {
  title: string;
  status: number;
  detail: string;
}

/** What the service says is wrong, in its own words. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    detail: string,
  ) {
    super(detail);
  }
}

export const address = (path: string): string => new URL(path, document.baseURI.split("#")[0]).toString();

/** Stream ids may hold slashes; each part is escaped. */
export const streamPath = (id: string): string => id.split("/").map(encodeURIComponent).join("/");

const LONGEST_MS = 30_000; // between two questions: what has come back is seen by then

/** Asks so long after each answer, until ended. Of a slow link it takes about a fifth, and nothing while nobody sees the page. */
export function asking(seconds: number, turn: () => Promise<void>): () => void {
  let timer = 0;
  let ended = false;
  const next = async (): Promise<void> => {
    const began = performance.now();
    try {
      if (!document.hidden) await turn();
    } finally {
      if (!ended) timer = window.setTimeout(() => void next(), Math.max(1000 * seconds, Math.min(LONGEST_MS, 4 * (performance.now() - began))));
    }
  };
  void next();
  return () => {
    ended = true;
    clearTimeout(timer);
  };
}

export async function ask<T>(path: string, options: RequestInit = {}): Promise<T> {
  let response: Response;
  try {
    response = await fetch(address(path), options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Refused(0, "The service does not answer. Is it running?");
  }
  told(response.headers.get("date"));
  if (!response.ok) throw await refused(response);
  if (response.status === 204) return undefined as T;
  if (!answers(response, "json")) throw new Refused(response.status, ANOTHER);
  return (await response.json()) as T;
}

const ANOTHER = "Something else answered in the service's place: a proxy that asks to sign in? Load this page again.";
const answers = (response: Response, kind: string): boolean => (response.headers.get("content-type") ?? "").includes(kind);

let models: Promise<{ models: Model[] }> | null = null;

/** The loaded models, as they were within the last minute: of many they are much to load. */
export function loadedModels(): Promise<{ models: Model[] }> {
  models ??= ask<{ models: Model[] }>("v1/models");
  const asked = models;
  const forget = (): void => void (models === asked && (models = null));
  asked.then(() => setTimeout(forget, 60_000), forget);
  return asked;
}

async function refused(response: Response): Promise<Refused> {
  try {
    const problem = (await response.json()) as Problem;
    return new Refused(response.status, problem.detail || problem.title);
  } catch {
    return new Refused(response.status, `The service answered ${response.status} ${response.statusText}.`);
  }
}

export type Link = { state: "connecting" | "live" | "away" | "paused"; detail: string };

/**
 * Server-sent events, by fetch: unlike EventSource it tells why it was refused. Connects again by itself, rests while the page is hidden.
 * Each connection begins with the whole history, so nothing has to be remembered between two.
 */
export class Live {
  private abort: AbortController | null = null;
  private timer = 0;
  private closed = false;
  private heard = 0;
  private readonly hidden = (): void => (document.hidden ? this.rest() : this.connect());
  private readonly watchdog: number;

  constructor(
    private readonly path: string,
    private readonly take: (event: string, data: unknown) => void,
    private readonly said: (link: Link) => void,
  ) {
    document.addEventListener("visibilitychange", this.hidden);
    this.watchdog = window.setInterval(() => this.abort && performance.now() - this.heard > 40_000 && this.again("Nothing was heard for 40 seconds."), 5_000);
    this.connect();
  }

  close(): void {
    this.closed = true;
    document.removeEventListener("visibilitychange", this.hidden);
    clearInterval(this.watchdog);
    clearTimeout(this.timer);
    this.abort?.abort();
  }

  private rest(): void {
    clearTimeout(this.timer);
    this.abort?.abort();
    this.abort = null;
    this.said({ state: "paused", detail: "Resting while this page is hidden." });
  }

  private again(detail: string, seconds = 2): void {
    this.abort?.abort();
    this.abort = null;
    if (this.closed || document.hidden) return;
    this.said({ state: "away", detail });
    clearTimeout(this.timer);
    this.timer = window.setTimeout(() => this.connect(), 1000 * seconds);
  }

  private connect(): void {
    if (this.closed || this.abort || document.hidden) return;
    const abort = new AbortController();
    this.abort = abort;
    this.heard = performance.now();
    this.said({ state: "connecting", detail: "Connecting to the live feed …" });
    this.read(abort.signal).then(
      () => this.abort === abort && this.again("The service ended the live feed; connecting again."),
      (error: unknown) => {
        if (this.abort !== abort) return;
        this.again(error instanceof Refused ? error.message : "The service does not answer; connecting again.", error instanceof Refused ? 5 : 2);
      },
    );
  }

  private async read(signal: AbortSignal): Promise<void> {
    const response = await fetch(address(this.path), { signal, headers: { accept: "text/event-stream" }, cache: "no-store" });
    told(response.headers.get("date"));
    if (!response.ok) throw await refused(response);
    if (!answers(response, "event-stream")) throw new Refused(response.status, ANOTHER);
    if (!response.body) return;
    this.said({ state: "live", detail: "" });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      this.heard = performance.now();
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop() ?? "";
      for (const block of blocks) this.deliver(block);
    }
  }

  private deliver(block: string): void {
    let event = "message";
    let data = "";
    for (const line of block.split("\n")) {
      if (line.startsWith("event: ")) event = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (data && !this.closed) this.take(event, JSON.parse(data));
  }
}

// ── what is answered ─────────────────────────────────────────────────────────────────────────────────────────────────

export const BITS = { anomaly: 1, open: 2, frozen: 4, onset: 8, cold: 16, attended: 128, muted: 256 } as const; // attended, muted: somebody looks after the open alert, or nobody is told of it; of a stream, in no event
export const LEVEL_SHIFT = 5; // of two bits more: the severity of the open alert, 1 = minor to 3 = critical

export interface Feature {
  name: string;
  unit: string | null;
  role?: "scored" | "context";
}

export interface Counts {
  streams: number;
  anomalous: number;
  alerting: number;
  warming_up: number;
  capacity: number;
  left_out: number;
  replicas: number;
  thinned: number;
}

/** What a model takes: numbers, or the lines of a log. */
export type Kind = "sensor" | "log";

export interface FleetMessage {
  model: string;
  kind: Kind;
  version: string;
  replica: string;
  features: Feature[];
  keys: number[];
  new: { key: number; id: string; t: number[]; value: (number | null)[] | null; score: (number | null)[]; bits: number[]; said: string | null }[];
}

/** key, t, value, expected, score, bits, rank, feature, severity */
export type FleetRow = [number, number, number | null, number | null, number | null, number, number, number, string];

export interface ChangesMessage {
  counts: Counts;
  rows: FleetRow[];
  said: (string | null)[] | null;
}

export interface StreamMessage {
  stream_id: string;
  model: string;
  kind: Kind;
  version: string;
  replica: string;
  depth: number;
  warmup: number;
  features: Feature[];
  chosen: number[];
}

export interface Contributor {
  feature: string;
  contribution: number | null;
  actual: number | null;
  expected: number | null;
}

/** What is known of a stream without its events: its last one. */
export interface StreamState {
  timestamp: number | null;
  anomaly_score: number | null;
  state_version: number;
  contributors: Contributor[];
}

type Column = (number | null)[];

/** Columns of a log stream beside the others. Codes are of patterns, whose text comes once, in `templates`. */
export interface LinesMessage {
  message: (string | null)[];
  severity: string[];
  code: number[];
  likely: [number, number][][];
  before: number[][];
  templates: Record<string, string>;
}

export interface EventsMessage {
  skipped: number;
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
  lines: LinesMessage | null;
  last: { severity: string; direction: string; state_version: number; contributors: Contributor[] };
}

export interface Model {
  name: string;
  version: string;
  kind: Kind;
  description: string;
  features: Feature[];
  state_size: number;
  warmup: number;
  cell: { variant: string; layers: number; hidden: number; code: number; decoder_hidden: number };
  training: { command: string; seed: number; data: string; streams: number; rows: number; commit: string; torch_version: string; created: string };
  quality: Record<string, unknown>;
  sha256: string;
  providers: string[];
  alpha: number;
  strict: boolean;
  expected_false_alarms: { per_stream_and_1000_events: number; extra_while_learning: number };
  default: boolean;
}

export interface Evidence {
  timestamp: number;
  p_value: number | null;
  anomaly_score: number | null;
  alert_score: number | null;
  direction: string;
  contributors: { feature: string; contribution: number; actual: number | null; expected: number | null; lower: number | null; upper: number | null }[];
  line?: { message: string | null; template: string | null; new: boolean; before: string[] };
  expected?: Record<string, number | null>;
}

export interface Alert {
  id: string;
  kind: "anomaly" | "silence";
  status: "open" | "acknowledged" | "resolved";
  model: string;
  stream_id: string;
  severity: string;
  started_at: number;
  opened_at: number;
  updated_at: number;
  resolved_at: number | null;
  resolution: string | null;
  onset: Evidence | null;
  last: Evidence | null;
  patience: number | null;
  acknowledgement: { by: string; note: string; at: number } | null;
  muted: { mute: string; until: number; told: string | null } | null;
}

/** Whose alerts nobody is told of for a while. */
export interface Mute {
  name: string;
  streams: string[];
  model: string | null;
  starts_at: number;
  ends_at: number;
  by: string;
  note: string;
  state: "coming" | "in_force" | "over";
}

export interface AlertCount {
  count: number;
  by_severity: Record<string, number>;
  complete: boolean;
}

/** What a call about several alerts did. */
export interface Done {
  outcomes: Record<string, number>;
}

export interface AlertsPage {
  alerts: Alert[];
  next_cursor: string | null;
}
