"""The catalogue of metrics, as data: each name once, with kind, unit, labels, meaning, and what to do when it moves.

    Metrics.events    the entry             CATALOGUE, docs/metrics.md (python -m monitoring.generate)
    metrics.events    the metric itself     counted by the parts of the service, read at /metrics

A label's values are given where they are known beforehand: `begin` makes a series of each at zero, so that a rate exists before the
first event, and an alert on what never happened yet is no gap. Never a stream id as a label (the opt-in series of series.py aside).
The client library's own process_… (memory, processor, open files) are beside them. One process serves: each replica has its own
registry and its own /metrics, and queries sum over them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, overload

import numpy as np
import structlog
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily

Kind = Literal["counter", "gauge", "histogram", "info"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_EVENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)
P_VALUES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bounds of onset_p_value: of calibrated p-values each one's own share is below it."""
SCORES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
"""Bounds of onset_anomaly_score: 1 is the threshold, 1.5 and 2 the severities above it."""
STAGES = ("queue", "load", "step", "commit")
OUTCOMES = ("scored", "duplicate", "late", "rejected", "failed")
RUNNING: tuple[str, ...] = ()
"""Values that only the running service knows: models, doors, sources."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Metric:
    """An entry of the catalogue; `name` as Prometheus shows it, without a histogram's endings."""

    name: str
    kind: Kind
    unit: str
    labels: Mapping[str, Sequence[str]]
    meaning: str
    action: str
    """What it means when it moves, and what to do then."""


class Distribution:
    """A histogram that is told of many values at once: observing them one by one would take as long as scoring them."""

    def __init__(self, metric: Metric, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._metric = metric
        self._bounds = np.array(bounds)
        self._found: dict[tuple[str, ...], tuple[NDArray[np.int64], float]] = {}
        registry.register(self)

    def labels(self, *values: str) -> None:
        """Begin a series at zero."""
        self._found.setdefault(values, (np.zeros(len(self._bounds) + 1, np.int64), 0.0))

    def observe(self, values: NDArray[np.float64], *labels: str) -> None:
        """Count these; NaN is no value."""
        values = values[~np.isnan(values)]
        self.labels(*labels)
        counts, total = self._found[labels]
        places = np.searchsorted(self._bounds, values, side="left")
        self._found[labels] = counts + np.bincount(places, minlength=len(counts)), total + float(values.sum())

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield self._family()

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = self._family()
        bounds = [f"{bound:g}" if bound != int(bound) else f"{bound:.1f}" for bound in self._bounds.tolist()] + ["+Inf"]
        for labels, (counts, total) in list(self._found.items()):
            family.add_metric(list(labels), list(zip(bounds, counts.cumsum().tolist(), strict=True)), total)
        yield family

    def _family(self) -> HistogramMetricFamily:
        return HistogramMetricFamily(self._metric.name, self._metric.meaning, labels=list(self._metric.labels))


M = TypeVar("M")


class Entry(Generic[M]):
    """An attribute of `Metrics`: of the class it is the entry, of an instance its metric."""

    def __init__(self, metric: Metric, build: Callable[[Metric, CollectorRegistry], M]) -> None:
        self.metric = metric
        self.build = build
        self.attribute = ""

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.attribute = attribute

    @overload
    def __get__(self, instance: None, owner: type) -> Entry[M]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> M: ...
    def __get__(self, instance: object | None, owner: type) -> Entry[M] | M:
        if instance is None:
            return self
        found: M = instance.__dict__[self.attribute]
        return found


def _counter(name: str, unit: str, meaning: str, action: str, **labels: Sequence[str]) -> Entry[Counter]:
    metric = Metric(name, "counter", unit, labels, meaning, action)
    return Entry(metric, lambda m, registry: Counter(m.name, m.meaning, list(m.labels), registry=registry))


def _gauge(name: str, unit: str, meaning: str, action: str, **labels: Sequence[str]) -> Entry[Gauge]:
    metric = Metric(name, "gauge", unit, labels, meaning, action)
    return Entry(metric, lambda m, registry: Gauge(m.name, m.meaning, list(m.labels), registry=registry))


def _info(name: str, meaning: str, action: str, **labels: Sequence[str]) -> Entry[Info]:
    metric = Metric(name, "info", "1", labels, meaning, action)
    return Entry(metric, lambda m, registry: Info(m.name.removesuffix("_info"), m.meaning, list(m.labels), registry=registry))


def _histogram(name: str, unit: str, meaning: str, action: str, buckets: Sequence[float], **labels: Sequence[str]) -> Entry[Histogram]:
    metric = Metric(name, "histogram", unit, labels, meaning, action)
    return Entry(metric, lambda m, registry: Histogram(m.name, m.meaning, list(m.labels), buckets=buckets, registry=registry))


def _distribution(
    name: str, unit: str, meaning: str, action: str, buckets: Sequence[float], **labels: Sequence[str]
) -> Entry[Distribution]:
    metric = Metric(name, "histogram", unit, labels, meaning, action)
    return Entry(metric, lambda m, registry: Distribution(m, buckets, registry))


class Metrics:
    """All metrics of one process, in a registry of its own: two services in one process do not mix."""

    build = _info(
        "onset_build_info",
        "Version of this build.",
        "Differs between replicas during a rollout, never for long.",
    )
    ready = _gauge(
        "onset_ready",
        "0 or 1",
        "Whether events can be scored and committed now.",
        "0 for longer than a start takes: /health/ready says why; mostly the store does not answer.",
    )
    store_clock_ahead = _gauge(
        "onset_store_clock_ahead_seconds",
        "seconds",
        "The store's clock, which all replicas judge by, minus this machine's; NaN until it was read.",
        "More than a few seconds either way: one of both clocks is wrong; the store's, where all replicas say the same.",
    )
    model = _info(
        "onset_model_info",
        "Version, hash and execution provider of a loaded model.",
        "Differs between replicas during a rollout, never for long.",
        model=RUNNING,
    )
    in_force = _gauge(
        "onset_model_in_force",
        "0 or 1",
        "Whether this replica's file of the model is the one in force; if not, it scores nothing with it and is not ready.",
        "0 for longer than a rollout takes: a replica with another file was started after this one, see docs/deploy.md. 0 on all: the ones "
        "in force are gone; the others follow within ten seconds.",
        model=RUNNING,
    )

    # events, at the door
    events = _counter(
        "onset_events_total",
        "events",
        "Events by door and what became of them.",
        "late grows: a sender's clock or order is wrong. rejected grows: a client sends what no model takes. failed grows: the store, or "
        "replicas that share streams.",
        door=RUNNING,
        outcome=OUTCOMES,
    )
    refused = _counter(
        "onset_refused_total",
        "requests",
        "Requests refused at the door, by reason.",
        "queue, bytes: more comes than is scored, add replicas. body, batch: a client sends too much at once. slow: bodies do not arrive. "
        "malformed: bodies, content types, parameters or models that are none, so what they were to bring is lost: see the sender's log. "
        "unread: clients do not read their replies; the log's replies_unread names one. "
        "connections: more than there are file descriptors for. "
        "memory: the machine, or a limit of the process, gives no more memory, or threads.",
        reason=("queue", "bytes", "body", "batch", "slow", "malformed", "unread", "connections", "memory"),
    )
    latency = _histogram(
        "onset_request_seconds",
        "seconds",
        "Time from an accepted request to its answer.",
        "Grows: onset_stage_seconds says which part of it.",
        _SECONDS,
        door=("http", "remote_write", "loki", "otlp", "otlp_metrics"),
    )
    blank = _counter(
        "onset_blank_lines_total",
        "lines",
        "Log lines without text that Loki's and OTLP's doors were sent; they are taken and not scored.",
        "A share of all lines that is usual for their files.",
        door=("loki", "otlp"),
    )
    cut = _counter(
        "onset_cut_lines_total",
        "lines",
        "Log lines longer than 65,536 characters that Loki's and OTLP's doors were sent; their beginning is scored.",
        "Something writes whole files into its log, or a shipper joins lines that do not belong together.",
        door=("loki", "otlp"),
    )
    unscored = _counter(
        "onset_remote_write_unscored_total",
        "samples and others",
        "What remote-write, or OTLP's metrics, brought and no value of it was scored: own (our own series), rule (dropped by a relabel "
        "rule), ended (stale markers), missing (NaN), infinite, histogram, exemplar, metadata.",
        "own grows: drop our series where they are sent from. rule grows by most of what comes: drop it there, too.",
        what=("own", "rule", "ended", "missing", "infinite", "histogram", "exemplar", "metadata"),
    )
    written_back = _counter(
        "onset_write_back_events_total",
        "events",
        "Scored events, and ends of streams, for the remote-write back (ONSET_REMOTE_WRITE_URL), by what became of their samples: sent, "
        "refused (the receiver will never take them), overflow (the queue was full), old, repeated (not later than the stream's last), "
        "lost (left when the service stopped).",
        "refused: the log has the receiver's answer; with several replicas it must take samples out of order. overflow: it is too slow, or "
        "down. repeated: a stream has several events within a millisecond.",
        outcome=("sent", "refused", "overflow", "old", "repeated", "lost"),
    )
    write_back_retries = _counter(
        "onset_write_back_retries_total",
        "requests",
        "Requests of the remote-write back that are sent again: no answer, 429 or 5xx.",
        "Grows: the receiver is down or overloaded; the log has its answer.",
    )
    write_back_waiting = _gauge(
        "onset_write_back_waiting_events",
        "events",
        "Events whose scores wait to be written back.",
        "Near ONSET_REMOTE_WRITE_QUEUE_EVENTS the oldest are dropped: the receiver is too slow, or down.",
    )
    log_lost = _counter(
        "onset_log_lines_lost_total",
        "lines",
        "Lines of the service's own log that its standard error did not take.",
        "Grows: the disk that the log goes to is full, or what reads it is gone or stands still. Scoring goes on without.",
    )
    bugs = _counter(
        "onset_unexpected_errors_total",
        "errors",
        "Requests and tasks failed by a bug of ours; each is in the log with its reference.",
        "Any is worth an issue.",
    )

    # a batch
    stage = _histogram(
        "onset_stage_seconds",
        "seconds",
        "Where the time of a batch goes: queue is what its longest waiting request waited, the others are counted for each attempt.",
        "queue grows: the processor is the limit, add replicas. load and commit grow: the store. step grows: the model, or a busy "
        "processor.",
        _SECONDS,
        stage=STAGES,
    )
    batch = _histogram(
        "onset_batch_events",
        "events",
        "Events per batch.",
        "Grows with the load; near 1,024 all the time means the processor is the limit.",
        _EVENTS,
    )
    queued = _gauge(
        "onset_queued_events",
        "events",
        "Events waiting to be scored.",
        "Near ONSET_MAX_QUEUE_EVENTS requests are refused: add replicas.",
        model=RUNNING,
    )
    held = _gauge(
        "onset_held_events",
        "events",
        "Events held until their turn (ONSET_REORDER_SECONDS).",
        "Grows with the rate; near ONSET_MAX_QUEUE_EVENTS requests are refused: hold them for less long.",
        model=RUNNING,
    )

    # the verdicts
    judged = _counter(
        "onset_judged_events_total",
        "events",
        "Events that got a p-value: scored ones of streams that are no longer warming up.",
        "Far below the scored events: streams start afresh all the time, or their values are missing.",
        model=RUNNING,
    )
    anomalies = _counter(
        "onset_anomalies_total",
        "events",
        "Events rarer than the asked rate (p < alpha); every event of a lasting anomaly counts.",
        "Above alpha times the judged events, for days: see onset_p_value.",
        model=RUNNING,
    )
    onsets = _counter(
        "onset_onsets_total",
        "onsets",
        "Onsets: an anomaly begins and its alert opens, or it goes far beyond all before within an open one; true or false.",
        "Over onset_expected_false_alarms_total it is the measured rate beside the asked one: beyond twice, over days, something is really "
        "wrong, or alpha does not hold for these streams.",
        model=RUNNING,
    )
    expected = _counter(
        "onset_expected_false_alarms_total",
        "alerts",
        "False alarms that the asked rate allows for the events judged so far, learning allowance included.",
        "Grows with the judged events and alpha; compare onset_onsets_total with it.",
        model=RUNNING,
    )
    lines = _counter(
        "onset_lines_total",
        "lines",
        "Log lines scored, by whether a pattern of the model matched them (template) or none did (new); ends of sessions are none.",
        "A growing share of new: the software that logs has changed: look at GET /v1/patterns, and train again with them.",
        model=RUNNING,
        match=("template", "new"),
    )
    p_value = _distribution(
        "onset_p_value",
        "probability",
        "The p-values of judged events.",
        "While streams are normal it is uniform: a share x is below x. More below 0.01: real anomalies, or a model that promises too much "
        "(compare the onsets asked and measured). Far fewer: it is blind to something, or its streams are too young.",
        P_VALUES,
        model=RUNNING,
    )
    score = _distribution(
        "onset_anomaly_score",
        "score",
        "The anomaly scores of judged events; above 1 an event is rarer than asked for, above 2 its p-value is below alpha squared.",
        "The fleet's heat map: a hot row that lasts is a lasting anomaly of many streams, a hot column a common cause.",
        SCORES,
        model=RUNNING,
    )
    accepted = _counter(
        "onset_accepted_total",
        "alerts",
        "Alerts accepted as the new normal, by call or by age (ONSET_ACCEPT_AFTER); each is in the log with its stream.",
        "Grows without anyone's call: the age is shorter than your faults last.",
        model=RUNNING,
        by=("call", "age"),
    )

    # the streams
    streams = _gauge(
        "onset_streams",
        "streams",
        "About how many streams the store holds, as of the last ten seconds; the same on every replica.",
        "Near ONSET_MAX_STREAMS new ones are refused. Grows for ever: a sender makes up stream ids.",
    )
    live = _gauge(
        "onset_streams_live",
        "streams",
        "Streams that are waited for, as the store has them (the same on every replica): their cadence is known, and they are not silent.",
        "Drops: senders are gone, or forgotten by their time to live. NaN or absent: ONSET_SILENCE is off.",
        model=RUNNING,
    )
    silent = _gauge(
        "onset_streams_silent",
        "streams",
        "Streams silent for improbably long, as the store has them (the same on every replica).",
        "Many at once: a sender or a network is down.",
        model=RUNNING,
    )
    silences = _counter(
        "onset_silences_total",
        "streams",
        "Silences that this replica raised; each is in the log with its stream.",
        "Grows steadily: senders come and go, or their cadence is none.",
        model=RUNNING,
    )
    ended = _counter(
        "onset_sessions_ended_total",
        "sessions",
        "Sessions of a log model that this replica ended because no line came for as long as the model says.",
        "Stops while lines come: their sessions end by an event of their own, or onset_streams_live grows and the store fails.",
        model=RUNNING,
    )
    patterns_dropped = _counter(
        "onset_patterns_dropped_total",
        "lines",
        "Lines of new patterns that are not among those of GET /v1/patterns: too many at once, or the store was away for long.",
        "Grows: what varies in the lines is not masked, so that each is a pattern of its own.",
        model=RUNNING,
    )
    warming = _gauge(
        "onset_streams_warming",
        "streams",
        "Streams scored here within five minutes that have no p-values yet; with the anomalous ones 20,000 at most. One whose events are "
        "spread over replicas counts on each.",
        "High long after a deploy: streams start afresh (onset_fresh_states_total says why) or come once only.",
        model=RUNNING,
    )
    anomalous = _gauge(
        "onset_streams_anomalous",
        "streams",
        "Streams scored here within five minutes whose last event here was anomalous, by its severity; with the warming ones 20,000 at "
        "most. One whose events are spread over replicas may count on each.",
        "Many at once: a common cause, or a change of regime that wants to be accepted.",
        model=RUNNING,
        severity=("minor", "major", "critical"),
    )
    fresh = _counter(
        "onset_fresh_states_total",
        "streams",
        "Streams that started afresh, by reason.",
        "other_model grows once a stream after a deploy of another model file (docs/deploy.md). corrupt: investigate the store at once. "
        "new grows by as many streams as there were: the store was emptied, or evicts.",
        reason=("new", "other_model", "corrupt"),
    )
    set_back = _counter(
        "onset_states_set_back_total",
        "states",
        "States in the store that are older than what this replica had committed and answered, as far as it has copies of them.",
        "Any: the store has lost acknowledged commits, by a failover to a replica that lagged or by an older backup (docs/deploy.md). "
        "These streams go on from the state before.",
    )
    state_bytes = _gauge(
        "onset_state_bytes",
        "bytes",
        "Size of one stream's value in the store.",
        "Changes only with the model; times the streams it is the store's memory.",
        model=RUNNING,
    )
    shown = _gauge(
        "onset_streams_shown",
        "streams",
        "Streams with series of their own (ONSET_STREAM_METRICS), on this replica.",
        "At the setting: later streams are not shown, see onset_streams_not_shown_total.",
        model=RUNNING,
    )
    not_shown = _counter(
        "onset_streams_not_shown_total",
        "events",
        "Scored events of streams that got no series of their own because ONSET_STREAM_METRICS was reached.",
        "Grows: raise the setting if Prometheus can take it, 5 series a stream and 5 a feature.",
        model=RUNNING,
    )

    # alerts
    alerts_keeper = _gauge(
        "onset_alerts_keeper",
        "0 or 1",
        "Whether this replica keeps the book of alerts and tells the sinks.",
        "Their sum is 1; 0 for longer than a few seconds: no replica reaches the store.",
    )
    alerts_open = _gauge(
        "onset_alerts_open",
        "alerts",
        "Open alerts by the highest severity they reached, on the replica that keeps the book (0 on the others).",
        "Many at once: a common cause, or a change of regime that wants to be accepted.",
        kind=("anomaly", "silence"),
        severity=("minor", "major", "critical"),
    )
    alerts_unattended = _gauge(
        "onset_alerts_unattended",
        "alerts",
        "Open alerts that nobody has acknowledged, as of the last look at them (ONSET_ALERTS_RESEND_SECONDS), on the replica that keeps "
        "the book (0 on the others).",
        "Critical ones for half an hour: nobody is there, or they do not hear of it.",
        kind=("anomaly", "silence"),
        severity=("minor", "major", "critical"),
    )
    alerts_muted = _gauge(
        "onset_alerts_muted",
        "alerts",
        "Open alerts that no sink is told of, since a mute (/v1/mutes) is in force, as of the last look at them, on the replica that keeps "
        "the book (0 on the others).",
        "More than the maintenance explains, or for longer: GET /v1/mutes says who muted what until when.",
    )
    alert_transitions = _counter(
        "onset_alert_transitions_total",
        "alerts",
        "What happened to alerts, each counted by the replica that kept the book then.",
        "opened grows far faster than onset_expected_false_alarms_total: something is wrong out there.",
        kind=("anomaly", "silence"),
        event=("opened", "escalated", "resolved"),
    )
    alerts_dropped = _counter(
        "onset_alerts_dropped_total",
        "alerts",
        "Alerts that were not opened because as many are open as there may be (ONSET_ALERTS_MAX_OPEN); each is in the log.",
        "Any: look at what is open; raise the setting if it is all true.",
    )

    alert_deliveries = _counter(
        "onset_alert_deliveries_total",
        "notices",
        "What became of notices to a sink: delivered, retried (an attempt after the first), withheld (beyond the flood limit, or of an "
        "alert that it was not told of), below (its alert is less than ONSET_ALERTS_LEAST_SEVERITY), past (its alert was of the past), "
        "muted (a mute held it), dead_lettered.",
        "retried grows: the sink is down or slow. dead_lettered: read why in the log; withheld: many streams went wrong at once.",
        sink=RUNNING,
        outcome=("delivered", "retried", "withheld", "below", "past", "muted", "dead_lettered"),
    )
    alert_delivery = _histogram(
        "onset_alert_delivery_seconds",
        "seconds",
        "Time from the change of an alert to its delivery to a sink.",
        "Grows: the sink is down or slow.",
        (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600),
        sink=RUNNING,
    )
    alert_lag = _gauge(
        "onset_alert_lag_seconds",
        "seconds",
        "Age of the oldest change that a sink has not been told of, on the replica that keeps the book; 0 = none waits.",
        "Above a minute: the sink does not answer, see the log.",
        sink=RUNNING,
    )

    # the policy
    alpha = _gauge(
        "onset_alpha",
        "probability",
        "The asked false-alarm rate in force on this replica, per event.",
        "Differs between replicas for more than a few seconds: one does not reach the store.",
    )
    strict = _gauge(
        "onset_strict",
        "0 or 1",
        "Whether new streams have no learning allowance.",
        "Differs between replicas for more than a few seconds: one does not reach the store.",
    )
    policy_changes = _counter(
        "onset_policy_changes_total",
        "changes",
        "Changes of the policy at run time, by call (answered here) or refresh (answered by another replica); each is in the log.",
        "Moves without anyone's call: who has access?",
        by=("call", "refresh"),
    )

    # the canary
    canary_ok = _gauge(
        "onset_canary_ok",
        "0 or 1",
        "Whether the canary's last run was ok; NaN before the first. Absent: ONSET_CANARY_SECONDS is 0.",
        "0: onset_canary_runs_total says how; the log says more.",
        model=RUNNING,
    )
    canary_runs = _counter(
        "onset_canary_runs_total",
        "runs",
        "Runs of the canary, a stream of the service's own with a known fault, by result.",
        "blind, inverted, differs: do not trust this model's scores; go back to the last version that was ok. failed: mostly the store.",
        model=RUNNING,
        result=("ok", "blind", "inverted", "differs", "failed"),
    )
    canary_score = _gauge(
        "onset_canary_score",
        "score",
        "Anomaly scores of the canary's last run, against an alpha of 0.01: the median of its quiet part, the highest of its fault.",
        "They move with the model only: every run scores the same readings.",
        model=RUNNING,
        part=("quiet", "fault"),
    )
    canary_run = _gauge(
        "onset_canary_run_timestamp",
        "seconds since 1970",
        "When the canary's last run ended (before the first: when it began to watch).",
        "Older than a few intervals: the batch loop or the process hangs.",
        model=RUNNING,
    )

    # the store
    copies = _counter(
        "onset_copies_total",
        "states",
        "Copies of states by result: hit (a load was saved), miss, stale (another replica wrote the stream since; it is stepped again).",
        "stale near hit: senders spread a stream over the replicas, route by stream id. miss while streams come again and again: "
        "ONSET_COPIES_BYTES is too small for them.",
        result=("hit", "miss", "stale"),
    )
    conflicts = _counter(
        "onset_state_conflicts_total",
        "states",
        "Commits lost to another replica; the event is stepped again.",
        "Constantly high: two senders share streams, route by stream id.",
    )
    store_memory = _gauge(
        "onset_store_memory_ratio",
        "ratio",
        "Part of its maxmemory that the store uses, of a cluster its fullest node, as of the last ten seconds; NaN where it has no limit.",
        "At 1 every write is refused and nothing is scored: give it more, or keep less (docs/deploy.md, How much store).",
    )
    store_evicts = _gauge(
        "onset_store_evicts",
        "0 or 1",
        "Whether the store throws states away once its memory is full (maxmemory-policy), of a cluster any node, within ten seconds.",
        "Set maxmemory-policy to noeviction: a refused write loses nothing, a state thrown away is a stream that starts afresh.",
    )
    store_rewrite_failed = _gauge(
        "onset_store_rewrite_failed",
        "0 or 1",
        "Whether the store could not write its append-only file anew the last time, of a cluster any node, within ten seconds.",
        "The file grows until the disk is full, and then nothing is scored: its log says why, mostly no memory to fork, or no room.",
    )
    store_restarts = _counter(
        "onset_store_restarts_total",
        "restarts",
        "Restarts of the embedded store.",
        "Any is worth a look at its log.",
    )

    # queues
    source_received = _counter(
        "onset_source_received_total",
        "entries",
        "Entries read from a queue, or claimed; again, where a batch was abandoned.",
        "Far beyond acknowledged: the store, or replicas that die.",
        source=RUNNING,
    )
    source_acknowledged = _counter(
        "onset_source_acknowledged_total",
        "entries",
        "Entries acknowledged.",
        "Stands still while the lag grows: the store, or a paused partition.",
        source=RUNNING,
    )
    source_claimed = _counter(
        "onset_source_claimed_total",
        "entries",
        "Entries claimed from what a former owner left.",
        "Grows outside of deploys: replicas die or stall.",
        source=RUNNING,
    )
    source_dead_lettered = _counter(
        "onset_source_dead_lettered_total",
        "events",
        "Events that could not be used and went to the dead letters.",
        "Grows: read onset_reason in the dead letters.",
        source=RUNNING,
    )
    source_no_reading = _counter(
        "onset_source_no_reading_total",
        "events",
        "Events without a reading, by what payload.missing and payload.good declare; passed over.",
        "Grows: sensors are bad, or a gateway has lost them; those that say nothing else for long are silences.",
        source=RUNNING,
    )
    source_lost = _counter(
        "onset_source_lost_total",
        "entries",
        "Entries that the queue had deleted before they were read. Kafka tells, by offsets: of a compacted topic at most so "
        "many; Redis Streams do where they are trimmed and the server knows how many the group has read. Other queues do not.",
        "Grows: it keeps entries for a shorter time than they waited here. Let it keep them longer; see onset_source_lag.",
        source=RUNNING,
    )
    source_fenced = _counter(
        "onset_source_fenced_total",
        "partitions",
        "Partitions that were lost to another replica while this one was still at work: it was taken for dead. Nothing is scored twice.",
        "Grows: the process or its store stalls for longer than ONSET_STREAMS_LEASE_SECONDS.",
        source=RUNNING,
    )
    source_partitions = _gauge(
        "onset_source_partitions",
        "partitions",
        "Partitions this replica owns.",
        "Their sum is the number of partitions; less for longer than a lease: nobody reads the others.",
        source=RUNNING,
    )
    source_lag = _gauge(
        "onset_source_lag",
        "entries",
        "Entries of the owned partitions not yet acknowledged; NaN = the queue does not answer. None where it cannot tell (MQTT).",
        "Grows for minutes: add partitions and replicas.",
        source=RUNNING,
    )
    source_paused = _gauge(
        "onset_source_paused",
        "partitions",
        "Partitions that wait because too many of their recent entries cannot be used (ONSET_STREAMS_FUSE).",
        "Not 0: a sender changed its format, see docs/queues.md.",
        source=RUNNING,
    )

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._before: list[Callable[[], None]] = []
        self._others: list[Callable[[], Callable[[], bytes]]] = []
        for entry in ENTRIES:
            self.__dict__[entry.attribute] = entry.build(entry.metric, self.registry)

    def before(self, flush: Callable[[], None]) -> None:
        """Call this before anyone looks: what was put aside is to be counted by then."""
        self._before.append(flush)

    def also(self, now: Callable[[], Callable[[], bytes]]) -> None:
        """Show metrics of other names, too: `now` takes down what they are; what it returns writes that as text, in a thread."""
        self._others.append(now)

    def flush(self) -> None:
        """Count what was put aside."""
        for flush in self._before:
            flush()

    def bug(self, error: Exception, **where: str) -> None:
        """Count and log an error of ours that must not end what met it."""
        self.bugs.inc()
        log.error("unexpected_error", **where, exc_info=error)

    async def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        self.flush()
        ours, others = generate_latest(self.registry), [now() for now in self._others]
        return b"".join([ours, *[await asyncio.to_thread(write) for write in others]])

    def begin(self, **known: Sequence[str]) -> None:
        """Begin all counters and histograms at zero whose labels' values are in the catalogue or `known`, such as model=("default",)."""
        for entry in ENTRIES:
            labels = [values or known.get(label, ()) for label, values in entry.metric.labels.items()]
            if labels and entry.metric.kind in ("counter", "histogram"):
                for values in itertools.product(*labels):
                    self.__dict__[entry.attribute].labels(*values)


ENTRIES = tuple(entry for entry in vars(Metrics).values() if isinstance(entry, Entry))
CATALOGUE = tuple(entry.metric for entry in ENTRIES)
