"""The alert rules, as data: one source of the Prometheus rule groups, Grafana's own, their tests and the runbooks.

A rule compares one number with one limit (`value` > `above`, or < `below`), so that its query returns data while all is well, and a test
can tell a quiet rule from one that asks for a metric that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["info", "warning", "critical"]
Group = Literal["onset-health", "onset-issues", "onset-anomalies"]


@dataclass(frozen=True)
class Case:
    """Series by `promtool test rules` (a value a minute), and the labels of the alert that fires at its end; None = none does."""

    series: Mapping[str, str]
    labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Rule:
    name: str
    group: Group
    value: str
    hold: str
    severity: Severity
    summary: str
    description: str
    means: str
    look: Sequence[str]
    act: Sequence[str]
    cases: Sequence[Case]
    above: float | None = None
    below: float | None = None
    range: str = field(default="10m", kw_only=True)
    """How far back the query looks."""

    @property
    def expr(self) -> str:
        return f"{self.value} > {self.above:g}" if self.above is not None else f"{self.value} < {self.below:g}"


def _events(outcome: str) -> str:
    """Share of events that became this."""
    return (
        f'sum by (job) (rate(onset_events_total{{outcome="{outcome}"}}[5m])) / clamp_min(sum by (job) (rate(onset_events_total[5m])), 1e-9)'
    )


def _share_cases(outcome: str, bad: int) -> list[Case]:
    others = 'onset_events_total{job="onset",door="http",outcome="scored"}'
    these = f'onset_events_total{{job="onset",door="http",outcome="{outcome}"}}'
    return [
        Case({others: "0+600x40", these: f"0+{bad}x40"}, {"job": "onset"}),
        Case({others: "0+600x40", these: "0+1x40"}),
    ]


def _grows(series: str, labels: Mapping[str, str]) -> list[Case]:
    """A counter that moves once, and one that does not."""
    return [Case({series: "0x30 1x10"}, labels), Case({series: "3x40"})]


_REPLICA = {"job": "onset", "instance": "a:8080"}
_A = 'job="onset",instance="a:8080"'

_M = 'job="onset",model="m"'
_WAITED = "max by (job, model) (onset_streams_live) + max by (job, model) (onset_streams_silent)"
"""Streams whose next event is waited for, or overdue."""
_SAID_TO_END = 'sum by (job) (increase(onset_remote_write_unscored_total{what="ended"}[1h]))'
_ROLLED_OUT = "count by (job, model) (count by (job, model, sha256) (last_over_time(onset_model_info[1h]))) > 1"
_OF_SESSIONS = "sum by (job, model) (increase(onset_sessions_ended_total[1h])) > 0"


def _waited(live: str, silent: str, ended: str = "0x40") -> dict[str, str]:
    return {
        f"onset_streams_live{{{_M}}}": live,
        f"onset_streams_silent{{{_M}}}": silent,
        'onset_remote_write_unscored_total{job="onset",what="ended"}': ended,
    }


def _shown(grade: str, at: str = "0+60x40", instance: str = "a:8080") -> dict[str, str]:
    of = f'job="onset",instance="{instance}",model="m",stream="pump-7"'
    return {f"anomaly_grade{{{of}}}": grade, f"anomaly_event_timestamp_seconds{{{of}}}": at}


def _judged(live: str, silent: str, warming: str) -> dict[str, str]:
    return {f"onset_streams_{name}{{{_M}}}": values for name, values in (("live", live), ("silent", silent), ("warming", warming))}


def latest(series: str, of_stream: str = "") -> str:
    """Of each stream what the replica shows that scored its last event: the others show for five minutes what they saw last.

    Those are taken away, rather than the newest picked: that takes Prometheus two thirds of the time, and leaves what an older build shows.
    """
    at = f"anomaly_event_timestamp_seconds{of_stream}"
    older = f"{at} < on (job, model, stream) group_left () max by (job, model, stream) ({at})"
    return f"({series} unless on (job, instance, model, stream) ({older}))"


MANY_NEW = 0.05
"""Share of lines of new patterns from which on a log model is out of date."""
_LINES = 'onset_lines_total{job="onset",instance="a:8080",model="m",match="%s"}'

RULES: tuple[Rule, ...] = (
    # ── onset-health: can events be scored, and are the scores true? ──────────────────────────────────────────────────────────────────
    Rule(
        "OnsetUnavailable",
        "onset-health",
        # Of an installation that is not scraped any more, and of one that never was.
        "(max by (job) (onset_ready) or 0 * max by (job) (max_over_time(onset_ready[1h])) or absent(max_over_time(onset_ready[1h])) - 1)",
        "2m",
        "critical",
        "No replica of Onset can score.",
        "For two minutes no replica has been ready; senders get 503 or no answer, and queues grow.",
        "Nothing is scored anywhere. Nothing is lost by that on our side: senders are told to send again, and queues keep their entries.",
        (
            "`/health/ready` of any replica says why it is not ready; no answer at all: the process is down.",
            "The *Service* dashboard: readiness by replica, and when it went.",
            "The store: does it answer a PING, does it load its file (`LOADING`)? Is its disk full (`MISCONF`; with `appendfsync always` "
            "it ends, and its log says `Can't recover from AOF write error`)?",
            "*No answer within a second*: it is there and slow. Its disk (`appendfsync always` waits for it), its processor, the network "
            "(`valkey-cli --latency`), or a long command (`SLOWLOG GET`).",
        ),
        (
            "Bring the store back; replicas become ready by themselves within a second.",
            "A full disk: what a rewriting that was killed has left (`temp-rewriteaof-*.aof`) may be deleted; then give it more "
            "(docs/deploy.md).",
            "If replicas do not start, their log's last line is one sentence that says why (a setting, a model that does not verify).",
            "Removed on purpose, or scraped under another job name: it is quiet after an hour. Of the last one take the rules out, too.",
        ),
        (
            Case({f"onset_ready{{{_A}}}": "1x10 0x30"}, {"job": "onset"}),
            Case({f"onset_ready{{{_A}}}": "0x40", 'onset_ready{job="onset",instance="b:8080"}': "1x40"}),
            Case({f"onset_ready{{{_A}}}": "0x40", 'onset_ready{job="onset-b",instance="b:8080"}': "1x40"}, {"job": "onset"}),
            Case({f"onset_ready{{{_A}}}": "1x10 _x30", 'onset_ready{job="onset-b",instance="b:8080"}': "1x40"}, {"job": "onset"}),
            Case({f"onset_ready{{{_A}}}": "1x10 _x90", 'onset_ready{job="onset-b",instance="b:8080"}': "1x100"}),
            Case({f"onset_ready{{{_A}}}": "1x10 _x90"}, {}),
            Case({"other": "1x40"}, {}),
        ),
        below=1,
        range="1h",
    ),
    Rule(
        "OnsetDown",
        "onset-health",
        'up{job=~"onset.*"}',
        "5m",
        "warning",
        "Prometheus cannot scrape {{ $labels.instance }}.",
        "{{ $labels.instance }} has not answered a scrape for five minutes. The other replicas score its streams.",
        "A replica is gone or cannot be reached. Any other one scores any stream, from the state in the store.",
        ("Is the process there? What does its log end with?", "Is it a network policy or an address that changed?"),
        ("Start it again; it needs no warm-up.", "If it was scaled down on purpose, take it out of the scrape configuration."),
        (Case({f"up{{{_A}}}": "1x10 0x30"}, _REPLICA), Case({f"up{{{_A}}}": "1x10 0x2 1x28"})),
        below=1,
    ),
    Rule(
        "OnsetNotReady",
        "onset-health",
        "onset_ready",
        "5m",
        "warning",
        "{{ $labels.instance }} is not ready.",
        "{{ $labels.instance }} answers, but has not been able to score for five minutes.",
        "The replica runs without its store, its batch loop hangs, or another file of its model was started after it.",
        ("`/health/ready` of that replica says which.", "Can that replica reach the store while the others do? Then it is its network."),
        (
            "Restart the replica if `/health/live` fails, too: its batch loop does not turn.",
            "Of a superseded model: finish the rollout, or see OnsetModelsDiffer.",
            "Otherwise bring back its way to the store.",
        ),
        (Case({f"onset_ready{{{_A}}}": "1x10 0x30"}, _REPLICA), Case({f"onset_ready{{{_A}}}": "1x10 0x3 1x27"})),
        below=1,
    ),
    Rule(
        "OnsetCanaryWrong",
        "onset-health",
        'sum by (job, model, result) (increase(onset_canary_runs_total{result=~"blind|inverted|differs"}[20m]))',
        "0m",
        "critical",
        "The detector {{ $labels.model }} is {{ $labels.result }}.",
        "The canary scored known readings with a fault, and the result was: {{ $labels.result }}. Do not trust the model's scores.",
        "A stream with a known fault goes through the path of all streams every few minutes. *blind*: the fault opened no alert. "
        "*inverted*: ordinary readings look more anomalous than the fault. *differs*: the scores are not those of an undisturbed run, so "
        "the store gave back something else than it was given, or this processor computes differently.",
        (
            "The *Calibration* dashboard: the canary's scores by replica. One replica or all? Since which model version?",
            "The log line `canary_blind`, `canary_inverted` or `canary_differs`, which has the scores (and the first event that differs).",
        ),
        (
            "blind, inverted: go back to the model version before; its streams warm up again.",
            "differs on one replica: stop that replica. On all: look at the store for evictions (`maxmemory-policy` must be `noeviction`) "
            "and for a replica promoted without the last writes.",
        ),
        _grows('onset_canary_runs_total{job="onset",model="m",result="blind"}', {"job": "onset", "model": "m", "result": "blind"}),
        above=0,
        range="20m",
    ),
    Rule(
        "OnsetCanaryStopped",
        "onset-health",
        "time() - onset_canary_run_timestamp",
        "5m",
        "warning",
        "The canary of {{ $labels.model }} on {{ $labels.instance }} has stopped.",
        "The last run of the canary ended {{ $value | humanizeDuration }} ago.",
        "Nobody watches whether this replica's detector still sees. The limit fits `ONSET_CANARY_SECONDS` up to 600.",
        ("Does the replica score at all (*Service* dashboard)? A hanging process stops its canary, too.",),
        ("Restart the replica.", "With a longer `ONSET_CANARY_SECONDS`, raise the limit of this rule."),
        (
            Case({f'onset_canary_run_timestamp{{{_A},model="m"}}': "0x60"}, _REPLICA | {"model": "m"}),
            Case({f'onset_canary_run_timestamp{{{_A},model="m"}}': "0+60x60"}),
        ),
        above=1800,
    ),
    Rule(
        "OnsetStatesCorrupt",
        "onset-health",
        'sum by (job) (increase(onset_fresh_states_total{reason="corrupt"}[1h]))',
        "0m",
        "critical",
        "Stored states do not read back.",
        "{{ $value | humanize }} states failed their checksum within the hour; their streams started afresh.",
        "A state whose checksum is wrong is never stepped: the stream warms up again, and until then has no scores.",
        (
            "The log lines `stream_started_afresh` with `reason: corrupt` name the streams.",
            "Who else writes to that server's keys `onset:*`?",
        ),
        ("Look for a failing disk or memory of the store's machine at once, and for another program on the same server.",),
        _grows('onset_fresh_states_total{job="onset",reason="corrupt"}', {"job": "onset"}),
        above=0,
        range="1h",
    ),
    Rule(
        "OnsetStatesSetBack",
        "onset-health",
        "sum by (job) (increase(onset_states_set_back_total[1h]))",
        "0m",
        "warning",
        "The store has lost commits that were acknowledged.",
        "{{ $value | humanize }} states within the hour were older than what a replica had committed; there may be more.",
        "Their streams go on from the state before, so what they were scored between the two counts for nothing, and an event of that time "
        "that is sent again is scored again, or late. An alert that opened then may be gone.",
        (
            "Was there a failover, to a replica that lagged? Was the store restored from a backup?",
            "The log line `states_set_back` names a stream, and both versions of its state.",
        ),
        (
            "`min-replicas-to-write` and `min-replicas-max-lag` bound what a failover can lose "
            "([deploy.md](../deploy.md#a-primary-and-its-replicas)).",
        ),
        _grows('onset_states_set_back_total{job="onset"}', {"job": "onset"}),
        above=0,
        range="1h",
    ),
    Rule(
        "OnsetStreamsLost",
        "onset-health",
        # The last of the denominator: of a Prometheus that has just begun.
        f"(({_WAITED} + on (job) group_left () {_SAID_TO_END} + 10) / ((max_over_time(({_WAITED})[1h:1m]) or {_WAITED}) + 10) "
        f"unless on (job, model) ({_ROLLED_OUT}) unless on (job, model) ({_OF_SESSIONS}))",
        "1m",
        "warning",
        "More than half of the streams of {{ $labels.model }} are gone.",
        "Within an hour the streams that are waited for have become fewer than half: {{ $value | humanizePercentage }} are left.",
        "What the store has forgotten starts afresh with its next event, and is not judged before it has had as many as a new stream "
        "needs. The same is seen where streams were deleted. Not counted are those that a Prometheus says have ended, models whose "
        "sessions end, and a model of which another file was rolled out within the hour.",
        (
            "`onset_fresh_states_total`: *new* grows by as many as were lost where the store forgot them.",
            "The store: was it emptied, restored or replaced, does it evict (`INFO stats`: `evicted_keys`; the log line `store_evicts`)? "
            "Does `ONSET_REDIS_URL` name the database that it named?",
        ),
        (
            "Forgotten: stop what empties the store (`maxmemory-policy noeviction`). A backup brings back the states as they were then "
            "(docs/deploy.md, *Backup and restore*).",
            "Deleted, or not heard of for `ONSET_STATE_TTL_SECONDS`, and meant to be: nothing.",
        ),
        (
            Case(_waited("100x35 0x5", "0x40"), {"job": "onset", "model": "m"}),
            Case(_waited("100x35 0x5", "0x35 100x5")),
            Case(_waited("8x35 0x5", "0x40")),
            Case(_waited("100x35 0x5", "0x40", ended="0x34 100x6")),
            Case(
                _waited("100x35 0x5", "0x40")
                | {f'onset_model_info{{{_M},sha256="{i}"}}': one for i, one in enumerate(("1x35", "_x34 1x6"))}
            ),
            Case(_waited("100x35 0x5", "0x40") | {f"onset_sessions_ended_total{{{_M}}}": "0x10 0+20x30"}),
        ),
        below=0.5,
        range="1h",
    ),
    Rule(
        "OnsetStoreFilling",
        "onset-health",
        "max by (job) (onset_store_memory_ratio)",
        "10m",
        "warning",
        "The store's memory is {{ $value | humanizePercentage }} full.",
        "The store uses {{ $value | humanizePercentage }} of its maxmemory; when that is all, it refuses every write.",
        "Beyond 90 % new streams are refused (429, `too-many-streams`; from a queue they are dead letters) and known ones go on. In a full "
        "store nothing is scored: requests get 503 (`store-refused`), queues wait; nothing is lost.",
        (
            "`onset_streams`: does it grow for ever? Then a sender makes up names: `GET /v1/streams` shows them.",
            "Results of Redis Streams, some 700 bytes each (`ONSET_STREAMS_MAX_RESULTS`); queues that nobody reads; other programs' keys.",
        ),
        (
            "More streams than were planned for: raise the store's maxmemory, and the memory of its container to twice that.",
            "Names made up: mend the sender, "
            "delete what it made (`DELETE /v1/streams/{stream_id}`), or let it be forgotten (`ONSET_STATE_TTL_SECONDS`).",
        ),
        (
            Case({f"onset_store_memory_ratio{{{_A}}}": "0.5x10 0.9x30"}, {"job": "onset"}),
            Case({f"onset_store_memory_ratio{{{_A}}}": "0.8x40"}),
        ),
        above=0.85,
    ),
    Rule(
        "OnsetStoreEvicts",
        "onset-health",
        "max by (job) (onset_store_evicts)",
        "5m",
        "warning",
        "The store throws states away when its memory is full.",
        "The store's maxmemory-policy is one that evicts keys: once its memory is full, streams start afresh instead of being refused.",
        "A state thrown away is a stream that has forgotten what is normal for it, and its open alert is lost. It may have been "
        "set while the service runs, by a failover to a server that is set up otherwise, or by who shares the server.",
        (
            "The log line `store_evicts` names the policy, of a cluster also the node.",
            "Has it begun? `INFO stats` of the store: `evicted_keys`; *OnsetStreamsLost*.",
        ),
        (
            "`CONFIG SET maxmemory-policy noeviction`, and the same where the server reads its settings at the start. A full store then "
            "refuses writes, which loses nothing.",
            "A server that others use as a cache: give the service one of its own.",
        ),
        (
            Case({f"onset_store_evicts{{{_A}}}": "0x10 1x30"}, {"job": "onset"}),
            Case({f"onset_store_evicts{{{_A}}}": "0x40"}),
        ),
        above=0,
    ),
    Rule(
        "OnsetStoreRewriteFailed",
        "onset-health",
        "max by (job) (onset_store_rewrite_failed)",
        "10m",
        "warning",
        "The store cannot write its append-only file anew.",
        "All that it has written since the last time is in the file, which grows until the disk is full.",
        "What is scored is kept meanwhile. With a full disk nothing is scored: with `appendfsync always` the server ends.",
        (
            "The store's log (of the embedded one `store.log` in its folder): `fork: Cannot allocate memory`, `No space left on device`, "
            "or the rewriting was killed (`terminated by signal 9`).",
            "Of a cluster which node: `INFO persistence`, `aof_last_bgrewrite_status`.",
        ),
        (
            "No memory to fork: `vm.overcommit_memory=1` on the store's machine; killed: more memory for its container.",
            "No room: a larger disk (docs/deploy.md says how large). Then `BGREWRITEAOF`, or wait: it tries again by itself.",
        ),
        (
            Case({f"onset_store_rewrite_failed{{{_A}}}": "0x10 1x30"}, {"job": "onset"}),
            Case({f"onset_store_rewrite_failed{{{_A}}}": "0x10 1x8 0x30"}),
        ),
        above=0,
    ),
    Rule(
        "OnsetStoreRestarted",
        "onset-health",
        "increase(onset_store_restarts_total[15m])",
        "0m",
        "warning",
        "The embedded store of {{ $labels.instance }} was restarted.",
        "It ended {{ $value | humanize }} times within 15 minutes and was started again; no acknowledged event is lost.",
        "The embedded valkey-server ended by itself: its disk is full, out of memory, or killed.",
        ("`embedded_store_died` in the service's log has the `reason`; for the out-of-memory killer the kernel's (`dmesg`).",),
        ("Give the machine more disk or memory, or move to a server of its own (`ONSET_REDIS_URL`).",),
        _grows(f"onset_store_restarts_total{{{_A}}}", _REPLICA),
        above=0,
        range="15m",
    ),
    Rule(
        "OnsetAlertsNotTold",
        "onset-health",
        "max by (job, sink) (onset_alert_lag_seconds)",
        "2m",
        "critical",
        "{{ $labels.sink }} is not told of alerts.",
        "The oldest alert that it has not been told of is {{ $value | humanizeDuration }} old.",
        "Alerts are opened and kept, and this sink does not take them. They are told when it does again.",
        (
            "The log lines of the replica that keeps the book (`onset_alerts_keeper`) have the sink's answer.",
            "Is the sink up, and its address right?",
        ),
        ("Bring the sink back. Meanwhile `GET /v1/alerts` and the console page have all of them.",),
        (
            Case({'onset_alert_lag_seconds{job="onset",sink="webhook"}': "0x5 60+60x30"}, {"job": "onset", "sink": "webhook"}),
            Case({'onset_alert_lag_seconds{job="onset",sink="webhook"}': "0x5 90 0x30"}),
        ),
        above=60,
    ),
    Rule(
        "OnsetAlertsNotKept",
        "onset-health",
        "sum by (job) (onset_alerts_keeper)",
        "2m",
        "critical",
        "No replica keeps the book of alerts.",
        "For two minutes no replica has folded what happened to alerts, so nobody is told of new ones.",
        "One replica at a time keeps the book, under a lease in the store that another one takes over within seconds.",
        ("The log lines `alerts_not_kept` say why.", "Does the store answer?"),
        ("Bring the store back. What happened meanwhile is in the store's log of it and is told then.",),
        (
            Case({f"onset_alerts_keeper{{{_A}}}": "1x5 0x30"}, {"job": "onset"}),
            Case({f"onset_alerts_keeper{{{_A}}}": "1x5 0x30", 'onset_alerts_keeper{job="onset",instance="b:8080"}': "0x5 1x30"}),
        ),
        below=1,
    ),
    # ── onset-issues: it scores, but not well ─────────────────────────────────────────────────────────────────────────────────────────
    Rule(
        "OnsetSlow",
        "onset-issues",
        "histogram_quantile(0.99, sum by (job, le) (rate(onset_request_seconds_bucket[5m])))",
        "10m",
        "warning",
        "One request in a hundred takes longer than half a second.",
        "The 99th percentile of the request latency is {{ $value | humanizeDuration }}.",
        "Requests wait: for their turn, for the store, or for the processor.",
        (
            "The *Service* dashboard, *Where a batch's time goes*: queue, load, step or commit?",
            "Batch size: near 1,024 the processor is full.",
        ),
        (
            "queue: add replicas. load, commit: the store or its network; with `appendfsync always` the disk.",
            "step: fewer neighbours on the processor, or more replicas.",
        ),
        (
            Case(
                {
                    'onset_request_seconds_bucket{job="onset",le="0.5"}': "0+1x40",
                    'onset_request_seconds_bucket{job="onset",le="1.0"}': "0+60x40",
                    'onset_request_seconds_bucket{job="onset",le="+Inf"}': "0+60x40",
                },
                {"job": "onset"},
            ),
            Case(
                {
                    'onset_request_seconds_bucket{job="onset",le="0.5"}': "0+60x40",
                    'onset_request_seconds_bucket{job="onset",le="+Inf"}': "0+60x40",
                }
            ),
        ),
        above=0.5,
    ),
    Rule(
        "OnsetRefusing",
        "onset-issues",
        "sum by (job, reason) (rate(onset_refused_total[5m]))",
        "10m",
        "warning",
        "Requests are refused: {{ $labels.reason }}.",
        "{{ $value | humanize }} requests a second are refused for the reason {{ $labels.reason }}.",
        "*queue*, *bytes*: more arrives than is scored (429 with `Retry-After`). *body*, *batch*: a request is larger than is taken (413). "
        "*slow*: a body did not arrive in time (408). *malformed*: a body, content type, parameter or model that is none (400, 404, 415, "
        "422): no event of it was scored, and few senders send it again. *unread*: a client did not read its reply, and its connection "
        "was closed. *connections*: there are as many as there are file descriptors for (503; probes and scrapes are answered).",
        ("The *Service* dashboard: events a second, queue, and the senders' own logs.",),
        (
            "queue, bytes: add replicas, or let senders send larger batches less often; a Prometheus by few shards (docs/prometheus.md).",
            "body, batch: tell the sender the limits (docs/api.md).",
            "malformed: the answer, in the sender's log, says what cannot be read; mostly a format, or a model that is not there any more.",
            "unread: the log's `replies_unread` has the client's address; it is stuck, or on a line slower than 2 kB a second.",
            "connections: which client has so many (`ss -tn`)? Have it use them again. Or raise the limit of open files "
            "(`ulimit -n`, systemd's `LimitNOFILE`, `docker run --ulimit`).",
        ),
        (
            Case({'onset_refused_total{job="onset",reason="queue"}': "0+30x40"}, {"job": "onset", "reason": "queue"}),
            Case({'onset_refused_total{job="onset",reason="queue"}': "30x40"}),
            Case({'onset_refused_total{job="onset",reason="queue"}': "0x33 30 60 90x4"}),
        ),
        above=0,
    ),
    Rule(
        "OnsetEventsFailing",
        "onset-issues",
        _events("failed"),
        "10m",  # longer than the rate looks back: a failover of seconds is over when it would fire
        "critical",
        "{{ $value | humanizePercentage }} of the events fail.",
        "They are not scored and must be sent again; senders that do are not hurt, others have gaps.",
        "Events could not be committed: the store did not answer, or replicas fought for the same streams.",
        (
            "Does the store answer, and how long do commits take (*Service* dashboard)?",
            "`onset_state_conflicts_total`: do replicas share streams?",
        ),
        ("Bring the store back.", "Route a stream's events to one replica (by stream id), or through a queue."),
        [
            *_share_cases("failed", 30),
            Case(
                {
                    'onset_events_total{job="onset",door="http",outcome="scored"}': "0+600x40",
                    'onset_events_total{job="onset",door="http",outcome="failed"}': "0x33 300 600 900x4",
                }
            ),
        ],
        above=0.01,
    ),
    Rule(
        "OnsetEventsRejected",
        "onset-issues",
        _events("rejected"),
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of the events are rejected.",
        "They are not events that the model takes; the reply to each names the field and the value.",
        "A sender's format is wrong, or changed: an unknown feature, text in place of a number, a time in the future.",
        (
            "The replies that the sender gets, or `onset_reason` in the dead letters of a queue.",
            "The log line `events_rejected`: what a source of type http refuses, and why (docs/http-sources.md).",
        ),
        ("Correct the sender. Rejected events are never scored, so nothing has to be undone.",),
        _share_cases("rejected", 60),
        above=0.05,
        range="15m",
    ),
    Rule(
        "OnsetEventsLate",
        "onset-issues",
        _events("late"),
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of the events come too late.",
        "They are older than the last event of their stream, and so are not scored.",
        "A sender's clock jumps, or events overtake each other on their way, or two senders send the same streams.",
        (
            "Which streams: `late: true` in the replies; the log of a Prometheus has ours, which says by how much its samples were late.",
            "Is the time of the events the time of measuring, and in UTC?",
        ),
        (
            "Send in order, with `timestamp` or `sequence`; or let events wait for earlier ones (`ONSET_REORDER_SECONDS`).",
            "Two Prometheis of a pair: let one send (docs/prometheus.md).",
            "A clock was ahead: its streams take nothing until it is reached; `DELETE /v1/streams/{stream_id}` begins one anew.",
        ),
        _share_cases("late", 60),
        above=0.05,
        range="15m",
    ),
    Rule(
        "OnsetUnexpectedErrors",
        "onset-issues",
        "sum by (job) (increase(onset_unexpected_errors_total[15m]))",
        "0m",
        "warning",
        "A bug of Onset's was met.",
        "{{ $value | humanize }} requests or tasks failed by a bug within 15 minutes.",
        "Something happened that the service has no sentence for. The request got a 500 with a reference.",
        ("The log lines `unexpected_error`, which have the reference and the traceback.",),
        ("File an issue with the traceback (it holds no values of clients).",),
        _grows('onset_unexpected_errors_total{job="onset"}', {"job": "onset"}),
        above=0,
        range="15m",
    ),
    Rule(
        "OnsetConflicts",
        "onset-issues",
        "sum by (job) (rate(onset_state_conflicts_total[5m])) / "
        'clamp_min(sum by (job) (rate(onset_events_total{outcome="scored"}[5m])), 1)',
        "15m",
        "warning",
        "Replicas fight for the same streams.",
        "For each scored event {{ $value | humanize }} commits are lost to another replica and stepped again.",
        "Two senders, or a load balancer, spread the events of one stream over several replicas. Scores stay right, at the price of work.",
        ('`onset_copies_total{result="stale"}` beside `hit`: how many streams are concerned?',),
        ("Route by stream id (a hash of it), or put a queue before the service.",),
        (
            Case(
                {
                    'onset_state_conflicts_total{job="onset"}': "0+120x40",
                    'onset_events_total{job="onset",outcome="scored"}': "0+600x40",
                },
                {"job": "onset"},
            ),
            Case({'onset_state_conflicts_total{job="onset"}': "0+1x40", 'onset_events_total{job="onset",outcome="scored"}': "0+600x40"}),
        ),
        above=0.1,
        range="15m",
    ),
    Rule(
        "OnsetQueueFilling",
        "onset-issues",
        "onset_queued_events",
        "5m",
        "warning",
        "{{ $labels.instance }} has {{ $value | humanize }} events waiting.",
        "The queue of {{ $labels.model }} has been over half of its default size for five minutes; when it is full, requests are refused.",
        "More arrives than this replica scores.",
        ("The *Service* dashboard: events a second, batch size, and where a batch's time goes.",),
        ("Add replicas; spread the senders evenly.", "With another `ONSET_MAX_QUEUE_EVENTS` than 20,000, change the limit of this rule."),
        (
            Case({f'onset_queued_events{{{_A},model="m"}}': "0x5 15000x35"}, _REPLICA | {"model": "m"}),
            Case({f'onset_queued_events{{{_A},model="m"}}': "0x5 15000x2 100x33"}),
        ),
        above=10_000,
    ),
    Rule(
        "OnsetSourceLagging",
        "onset-issues",
        "sum by (job, source) (onset_source_lag) * (sum by (job, source) (deriv(onset_source_lag[10m])) > bool 0)",
        "10m",
        "warning",
        "{{ $labels.source }} is {{ $value | humanize }} entries behind, and falling back.",
        "The lag has grown for ten minutes.",
        "More comes into the queue than is scored out of it. Nothing is lost while the queue keeps its entries.",
        (
            "Is a partition paused (`onset_source_paused`)? Does every partition have an owner (`onset_source_partitions`)?",
            "Is the store slow?",
        ),
        ("Add replicas, up to the number of partitions; beyond that more partitions (docs/queues.md).",),
        (
            Case({'onset_source_lag{job="onset",source="redis_streams"}': "0+500x40"}, {"job": "onset", "source": "redis_streams"}),
            Case({'onset_source_lag{job="onset",source="redis_streams"}': "20000-500x40"}),
        ),
        above=1000,
    ),
    Rule(
        "OnsetSourceUnread",
        "onset-issues",
        "(count by (job, source) (onset_source_lag != onset_source_lag) or sum by (job, source) (onset_source_partitions) == bool 0)",
        "5m",
        "critical",
        "{{ $labels.source }} is not read.",
        "For five minutes its queue has not answered, or no replica has had a partition of it: nothing of it is scored.",
        "The broker is away or cut off, the login is refused or has expired, or the topic, stream or queue is not there. The service stays "
        "ready: its other doors work. Nothing is lost while the queue keeps its entries.",
        (
            "The log: `kafka_unavailable`, `kafka_error`, `nats_unavailable`, `source_refused`, `mqtt_unavailable`, `amqp_unavailable`, "
            "`streams_unavailable` say what the broker answers, or that it does not.",
            "`onset_source_partitions` of every replica: 0 everywhere, it is never reached or refuses us; otherwise it was reached before.",
        ),
        (
            "Bring the broker back, or correct the source (docs/queues.md) and restart the service; a connection is tried again by itself.",
            "How long does the queue keep its entries? What it deletes meanwhile is lost (Kafka alone tells: `onset_source_lost_total`).",
        ),
        (
            Case({'onset_source_partitions{job="onset",source="mqtt"}': "0x40"}, {"job": "onset", "source": "mqtt"}),
            Case({'onset_source_partitions{job="onset",source="mqtt"}': "1x40"}),
            Case(
                {
                    f'onset_source_partitions{{{_A},source="mqtt"}}': "0x40",
                    'onset_source_partitions{job="onset",instance="b:8080",source="mqtt"}': "1x40",
                }
            ),
            Case(
                {
                    'onset_source_partitions{job="onset",source="kafka"}': "3x40",
                    'onset_source_lag{job="onset",source="kafka"}': "0x5" + " NaN" * 35,
                },
                {"job": "onset", "source": "kafka"},
            ),
            Case(
                {
                    'onset_source_partitions{job="onset",source="kafka"}': "3x40",
                    'onset_source_lag{job="onset",source="kafka"}': "0x5 NaN NaN 0x33",
                }
            ),
        ),
        above=0,
    ),
    Rule(
        "OnsetSourceLosing",
        "onset-issues",
        "sum by (job, source) (increase(onset_source_lost_total[15m]))",
        "0m",
        "critical",
        "{{ $labels.source }}: entries were deleted before they were read.",
        "{{ $value | humanize }} entries of {{ $labels.source }} were gone within 15 minutes before anybody had read them.",
        "The queue keeps its entries for a shorter time, or in less space, than they waited here. Those are never scored; what is still "
        "there is.",
        (
            "The log line `kafka_offset_gone` names partition and offsets, `streams_trimmed` the partition and how many.",
            "Was the service away for long (`OnsetSourceUnread`, `OnsetSourceLagging`)?",
        ),
        (
            "Let the queue keep them longer (Kafka: `retention.ms`, `retention.bytes`; Redis Streams: what runs `XTRIM`, or adds with "
            "`MAXLEN`); add replicas where they fall behind.",
        ),
        _grows('onset_source_lost_total{job="onset",source="kafka"}', {"job": "onset", "source": "kafka"}),
        above=0,
        range="15m",
    ),
    Rule(
        "OnsetSourcePaused",
        "onset-issues",
        "sum by (job, source) (onset_source_paused)",
        "2m",
        "critical",
        "{{ $labels.source }} has paused {{ $value | humanize }} partitions.",
        "Too many of their recent entries cannot be used, so they wait instead of going to the dead letters one and all.",
        "The fuse has blown: mostly a sender changed its format. Nothing is lost; the entries are still in the queue.",
        ("The log line `source_paused` names the first such entry and what is wrong with it.",),
        (
            "Correct the sender or the mapping (docs/queues.md); the partition tries again by itself.",
            "To go on regardless: `fuse: 1` of the source, or `ONSET_STREAMS_FUSE=1`.",
        ),
        (
            Case({'onset_source_paused{job="onset",source="redis_streams"}': "0x5 1x35"}, {"job": "onset", "source": "redis_streams"}),
            Case({'onset_source_paused{job="onset",source="redis_streams"}': "0x40"}),
        ),
        above=0,
    ),
    Rule(
        "OnsetDeadLetters",
        "onset-issues",
        "sum by (job, source) (increase(onset_source_dead_lettered_total[15m]))",
        "0m",
        "warning",
        "{{ $labels.source }}: events go to the dead letters.",
        "{{ $value | humanize }} events of {{ $labels.source }} could not be used within 15 minutes.",
        "Single events are not what the model takes; they are kept apart with the reason, and the others go on.",
        ("`onset_reason` in the dead letters (docs/queues.md).",),
        ("Correct the sender, then put the letters back into the queue.",),
        _grows('onset_source_dead_lettered_total{job="onset",source="redis_streams"}', {"job": "onset", "source": "redis_streams"}),
        above=0,
        range="15m",
    ),
    Rule(
        "OnsetPolicyDiffers",
        "onset-issues",
        "max by (job) (onset_alpha) - min by (job) (onset_alpha)",
        "5m",
        "warning",
        "Replicas judge by different false-alarm rates.",
        "The asked rates of the replicas differ by {{ $value | humanize }}.",
        "A change of the policy reaches every replica within a second; one has not got it.",
        ("`GET /v1/policy` of each replica; the log line `policy_not_refreshed`.",),
        ("Restart the replica that has the old one; look at its way to the store.",),
        (
            Case({f"onset_alpha{{{_A}}}": "0.001x40", 'onset_alpha{job="onset",instance="b:8080"}': "0.002x40"}, {"job": "onset"}),
            Case({f"onset_alpha{{{_A}}}": "0.001x40", 'onset_alpha{job="onset",instance="b:8080"}': "0.001x40"}),
        ),
        above=0,
    ),
    Rule(
        "OnsetClocksDiffer",
        "onset-issues",
        "max by (job) (abs(onset_store_clock_ahead_seconds))",
        "5m",
        "warning",
        "The clocks of a replica and of the store are {{ $value | humanizeDuration }} apart.",
        "If the replica's is wrong, the times in its log are. If the store's is, so are those of alerts and of events without one.",
        "All replicas judge by the store's clock: one whose own is wrong scores, waits for streams and raises them like the others. Where "
        "the store's is wrong, more than five minutes ahead, live streams look like history, and no silence is raised.",
        (
            "Which one: `onset_store_clock_ahead_seconds`, by `instance`. Where one replica differs, it is its node's; where all say the "
            "same, the store's.",
            "That node's clock: `chronyc tracking`, `timedatectl`; of node_exporter's metrics `node_timex_offset_seconds`.",
        ),
        (
            "Set the node's clock right. When the store's steps, replicas say `store_clock_stepped`, and every stream gets its patience "
            "anew; if it was set back, streams that do not speak any more are raised so much later: let chrony or NTP slew it instead.",
        ),
        (
            Case(
                {
                    f"onset_store_clock_ahead_seconds{{{_A}}}": "0x40",
                    'onset_store_clock_ahead_seconds{job="onset",instance="b:8080"}': "-20x40",
                },
                {"job": "onset"},
            ),
            Case({f"onset_store_clock_ahead_seconds{{{_A}}}": "4x40"}),
        ),
        above=5,
    ),
    Rule(
        "OnsetModelsDiffer",
        "onset-issues",
        "count by (job, model) (count by (job, model, sha256) (onset_model_info))",
        "30m",
        "warning",
        "Replicas serve different files of {{ $labels.model }}.",
        "{{ $value | humanize }} files of the model have been on replicas for half an hour: only those of the one started last score.",
        "A rollout stopped half way. The file that was started last is in force (`onset_model_in_force`); replicas with another one answer "
        "503 and are not ready. A pod of the old file that began meanwhile (the autoscaler's, or in place of an evicted one) counts, too.",
        ("The *Service* dashboard: models by replica, and which are in force.",),
        (
            "Finish the rollout, or undo it.",
            "Where the wrong file is in force, start a replica of the right one anew (`kubectl delete pod`): the rollout goes on. "
            "Let the autoscaler add nothing meanwhile (docs/deploy.md, *Another model file*).",
        ),
        (
            Case(
                {
                    'onset_model_info{job="onset",model="m",sha256="1"}': "1x60",
                    'onset_model_info{job="onset",model="m",sha256="2"}': "1x60",
                },
                {"job": "onset", "model": "m"},
            ),
            Case(
                {
                    'onset_model_info{job="onset",model="m",sha256="1",instance="a"}': "1x60",
                    'onset_model_info{job="onset",model="m",sha256="1",instance="b"}': "1x60",
                }
            ),
        ),
        above=1,
    ),
    Rule(
        "OnsetAlertsLost",
        "onset-issues",
        "sum by (job) (increase(onset_alerts_dropped_total[1h])) + "
        'sum by (job) (increase(onset_alert_deliveries_total{outcome="dead_lettered"}[1h]))',
        "0m",
        "warning",
        "Alerts were not told, or not opened.",
        "{{ $value | humanize }} alerts within the hour were refused by a sink, or not opened because too many are open.",
        "A sink answered that it will never take them (dead letters), or as many are open as `ONSET_ALERTS_MAX_OPEN` allows.",
        (
            "The log lines `alert_dropped`; the dead letters with their reasons (docs/alerts.md).",
            "`GET /v1/alerts?status=open`: is it all true?",
        ),
        ("Correct the sink's address, secret or limits.", "Raise `ONSET_ALERTS_MAX_OPEN` if they are all true."),
        (
            Case(
                {
                    'onset_alerts_dropped_total{job="onset"}': "0x40",
                    'onset_alert_deliveries_total{job="onset",sink="webhook",outcome="dead_lettered"}': "0x30 1x9",
                },
                {"job": "onset"},
            ),
            Case(
                {
                    'onset_alerts_dropped_total{job="onset"}': "4x40",
                    'onset_alert_deliveries_total{job="onset",sink="webhook",outcome="dead_lettered"}': "2x40",
                }
            ),
        ),
        above=0,
        range="1h",
    ),
    Rule(
        "OnsetWriteBackLosing",
        "onset-issues",
        'sum by (job, outcome) (rate(onset_write_back_events_total{outcome=~"refused|overflow"}[10m]))',
        "10m",
        "warning",
        "Scores are not written back: {{ $labels.outcome }}.",
        "{{ $value | humanize }} events a second are scored and their samples lost on the way back.",
        "*refused*: the receiver will never take them. *overflow*: it is slower than the events come, or down. The scores themselves are "
        "in the store; what is missing is their series.",
        ("The log has the receiver's answer.", "`onset_write_back_waiting_events`: is the queue full?"),
        (
            "refused: with several replicas the receiver must take samples out of order.",
            "overflow: give it more, or write fewer streams back.",
        ),
        (
            Case({'onset_write_back_events_total{job="onset",outcome="overflow"}': "0+60x40"}, {"job": "onset", "outcome": "overflow"}),
            Case({'onset_write_back_events_total{job="onset",outcome="overflow"}': "60x40"}),
        ),
        above=0,
    ),
    Rule(
        "OnsetManyNewPatterns",
        "onset-issues",
        'sum by (job, model) (rate(onset_lines_total{match="new"}[15m])) / '
        "clamp_min(sum by (job, model) (rate(onset_lines_total[15m])), 1e-9)",
        "30m",
        "warning",
        "{{ $value | humanizePercentage }} of the lines that {{ $labels.model }} scores are of patterns that it does not know.",
        "For half an hour more than a twentieth of the log lines matched no pattern of {{ $labels.model }}.",
        "Such a line is scored as a new pattern, one like the other: what goes wrong among them is seen late or not at all, and where they "
        "are usual by now they alarm for nothing. Mostly the software that logs was updated, or other logs are sent to this model.",
        (
            "*Patterns* on the service's page, or `GET /v1/patterns?model=…`: which ones, how many lines of each, since when, an example.",
            "The *Onset logs* dashboard: since when the share rises, and for which model.",
            "Did the format of the lines change (another header, another language), so that nothing matches any more?",
        ),
        (
            "Train again with the new lines: `python -m training fit --logs FILE...`, and serve the new model.",
            "If these lines are not meant for this model, send them elsewhere (`?model=…`).",
        ),
        (
            Case({_LINES % "template": "0+80x70", _LINES % "new": "0+20x70"}, {"job": "onset", "model": "m"}),
            Case({_LINES % "template": "0+99x70", _LINES % "new": "0+1x70"}),
        ),
        above=MANY_NEW,
        range="20m",
    ),
    # ── onset-anomalies: what the streams do ──────────────────────────────────────────────────────────────────────────────────────────
    Rule(
        "OnsetStreamAnomalous",
        "onset-anomalies",
        f"max by (job, model, stream) {latest('anomaly_grade')}",
        "1m",
        "warning",
        "{{ $labels.stream }} is anomalous.",
        '{{ $labels.model }} has taken it for anomalous for a minute; the grade is {{ $value | printf "%.2f" }} (0 = normal, 1 at most).',
        "A stream of those that are shown one by one (`ONSET_STREAM_METRICS`) behaves as it hardly ever does. The alert that the service "
        "itself sends to Alertmanager is OnsetAnomaly: it comes at the onset, for every stream, and silences this one.",
        ("The *Stream* dashboard: the value beside its band, and which feature carries the error.",),
        ("As for [OnsetAnomaly](OnsetAnomaly.md).",),
        (
            Case(_shown("0x20 0.4x20"), {"job": "onset", "model": "m", "stream": "pump-7"}),
            Case(_shown("0x20 0.4x20", "_x40"), {"job": "onset", "model": "m", "stream": "pump-7"}),  # of a build without that series
            Case(_shown("0x20 0.4 0x19")),
            Case(_shown("0x20 0.4x20", "0+60x20 1200x20") | _shown("0x40", instance="b:8080")),
        ),
        above=0,
    ),
    Rule(
        "OnsetManyStreamsAnomalous",
        "onset-anomalies",
        "sum by (job, model) (onset_streams_anomalous) * (sum by (job, model) (onset_streams_anomalous) / "
        # Without ONSET_SILENCE nobody knows which are live: of all that there are.
        "clamp_min(max by (job, model) (onset_streams_live) or "
        "0 * sum by (job, model) (onset_streams_anomalous) + on (job) group_left () max by (job) (onset_streams), 1) > bool 0.1)",
        "2m",
        "critical",
        "{{ $value | humanize }} streams of {{ $labels.model }} are anomalous at once.",
        "More than a tenth of the live streams, and more than ten, are anomalous: look for a common cause.",
        "Single anomalies are single causes; many at once mostly are one: a power cut, a deploy, a network, a change of season or shift.",
        ("The *Onset overview* dashboard: since when, the heat map, and the top streams.", "What was deployed or switched at that time?"),
        (
            "Follow the common cause.",
            "If it is the new normal, accept it: `POST /v1/streams/{stream_id}/accept`, or by age (`ONSET_ACCEPT_AFTER`).",
        ),
        (
            Case(
                {
                    'onset_streams_anomalous{job="onset",model="m",severity="major"}': "0x10 30x30",
                    'onset_streams_live{job="onset",model="m"}': "100x40",
                },
                {"job": "onset", "model": "m"},
            ),
            Case(
                {
                    'onset_streams_anomalous{job="onset",model="m",severity="major"}': "0x10 30x30",
                    'onset_streams_live{job="onset",model="m"}': "5000x40",
                }
            ),
            Case(
                {
                    'onset_streams_anomalous{job="onset",model="m",severity="major"}': "0x10 30x30",
                    'onset_streams{job="onset"}': "100x40",
                },
                {"job": "onset", "model": "m"},
            ),
            Case(
                {
                    'onset_streams_anomalous{job="onset",model="m",severity="major"}': "0x10 30x30",
                    'onset_streams{job="onset"}': "5000x40",
                }
            ),
        ),
        above=10,
    ),
    Rule(
        "OnsetManyStreamsSilent",
        "onset-anomalies",
        # Streams that warm up are waited for one after the other, the fastest first: among few of them a single silence is many.
        f"max by (job, model) (onset_streams_silent) / clamp_min({_WAITED} + max by (job, model) (onset_streams_warming), 10)",
        "2m",
        "critical",
        "{{ $value | humanizePercentage }} of the streams of {{ $labels.model }} are silent.",
        "More than a tenth of the streams that are waited for have been silent for improbably long.",
        "Single silences are single sensors; many at once are a sender, a gateway or a network.",
        (
            "`GET /v1/streams?silent=true`: what have they in common?",
            "Are the events refused at the door (OnsetRefusing, OnsetEventsRejected)?",
        ),
        ("Bring the sender back. The next event of a stream ends its silence.",),
        (
            Case(
                _judged(live="100x10 50x30", silent="0x10 50x30", warming="0x40"),
                {"job": "onset", "model": "m"},
            ),
            Case(_judged(live="100x40", silent="1x40", warming="0x40")),
            Case(_judged(live="10x40", silent="2x40", warming="200x40")),
            Case(_judged(live="10x40", silent="2x40", warming="200x10 0x30"), {"job": "onset", "model": "m"}),
        ),
        above=0.1,
    ),
    Rule(
        "OnsetFalseAlarmsAboveAsked",
        "onset-anomalies",
        "sum by (job, model) (increase(onset_onsets_total[1d])) / "
        "clamp_min(sum by (job, model) (increase(onset_expected_false_alarms_total[1d])), 5)",
        "1h",
        "warning",
        "{{ $labels.model }} alerts {{ $value | humanize }} times as often as asked for.",
        "Within a day it opened more than twice the alerts that the asked rate allows for normal streams (with fewer than five allowed: "
        "more than ten).",
        "Either much is really wrong, or the model's calibration does not hold for these streams.",
        (
            "The *Calibration* dashboard: the p-values against uniform. A pile-up near 0 in many streams is calibration, in a few real.",
            "Which streams: the alerts of the day.",
        ),
        (
            "Train a detector on the history of these streams (`python -m training fit`), or ask for a smaller rate (`PUT /v1/policy`).",
            "A stream that alerts all the time may be accepted (`POST /v1/streams/{stream_id}/accept`).",
        ),
        (
            Case(
                {
                    'onset_onsets_total{job="onset",model="m"}': "0+1x200",
                    'onset_expected_false_alarms_total{job="onset",model="m"}': "0+0.1x200",
                },
                {"job": "onset", "model": "m"},
            ),
            Case(
                {
                    'onset_onsets_total{job="onset",model="m"}': "0x195 3x5",
                    'onset_expected_false_alarms_total{job="onset",model="m"}': "0+0.001x200",
                }
            ),
        ),
        above=2,
        range="1d",
    ),
)
