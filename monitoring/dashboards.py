"""The five dashboards, as code."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from monitoring import panels
from monitoring.panels import BAD, GOOD, NONE_IS_GOOD, SCORE, WARN, WORST, Query, bars, compare, gauges, heat, line, linked, number, rows
from monitoring.rules import MANY_NEW, latest
from service.metrics import P_VALUES

PAGE = "http://127.0.0.1:8080/"
"""Of the page, until someone says in a dashboard where it is."""
# Of all replicas of one installation; those of one model.
_ALL = 'job=~"$job"'
_MODEL = f'{_ALL},model=~"$model"'
# As it is, in PromQL's raw quotes: a stream that came from Prometheus has quotes in its name, which Grafana escapes in one version and not
# in the next.
_STREAM = f"{_MODEL},stream=`${{stream:raw}}`"
_LOGS = f"and on (job, model) (sum by (job, model) (onset_lines_total{{{_MODEL}}}) > 0)"
"""Of log models alone."""
_LIMIT = ((None, GOOD), (1.0, WORST))
_READY = ((None, WORST), (1.0, GOOD))


def all_dashboards() -> dict[str, str]:
    """Name → JSON of every dashboard."""
    made = {"overview": overview(), "stream": stream(), "service": service(), "calibration": calibration(), "logs": logs()}
    return {name: _encoded(board) for name, board in made.items()}


def overview() -> dashboard.Dashboard:
    """What do the streams do now, and where shall I look first?"""
    onsets = f"sum by (model) (increase(onset_onsets_total{{{_MODEL}}}[$__rate_interval]))"
    scores = latest(f"anomaly_score{{{_MODEL}}}", f"{{{_MODEL}}}")
    top = f"topk(20, max by (model, stream) {scores})"
    table = rows(
        "Top streams by score",
        "The streams that are shown one by one (ONSET_STREAM_METRICS), the most anomalous first. Above 1 a stream is rarer than asked for.",
        Query(top, instant=True, table=True),
        "none",
        SCORE,
        columns={"stream": "stream", "model": "model", "Value": "score"},
    )
    to_stream = (
        "/d/onset-stream?var-datasource=${datasource}&${job:queryparam}&var-model=${__data.fields.model}"
        "&var-stream=${__data.fields.stream:percentencode}"
    )
    to_page = "${page:raw}?stream=${__data.fields.stream:percentencode}&model=${__data.fields.model:percentencode}"
    sections = [
        (
            "Now",
            [
                number(
                    "Anomalous streams",
                    "Streams whose last event, within five minutes, was anomalous.",
                    Query(f"sum(onset_streams_anomalous{{{_MODEL}}})"),
                    "short",
                    ((None, GOOD), (1.0, WARN), (10.0, BAD)),
                ),
                number(
                    "Critical",
                    "Anomalous streams of severity critical: p-value below alpha squared. "
                    "One whose events are spread over replicas may count on each.",
                    Query(f'sum(onset_streams_anomalous{{{_MODEL},severity="critical"}})'),
                    "short",
                    ((None, GOOD), (1.0, WORST)),
                ),
                number(
                    "Silent",
                    "Streams that have been silent for improbably long.",
                    Query(f"sum(max by (job, model) (onset_streams_silent{{{_MODEL}}}))"),
                    "short",
                    ((None, GOOD), (1.0, WARN), (10.0, BAD)),
                ),
                number(
                    "Live",
                    "Streams that are waited for: their cadence is known.",
                    Query(f"sum(max by (job, model) (onset_streams_live{{{_MODEL}}}))"),
                    "short",
                ),
                number(
                    "Warming up",
                    "Streams of the last five minutes without p-values. One whose events are spread over replicas counts on each.",
                    Query(f"sum(onset_streams_warming{{{_MODEL}}})"),
                    "short",
                ),
                number(
                    "Onsets today",
                    "Onsets within 24 hours: an alert opens, or its anomaly goes far beyond all before.",
                    Query(f"sum(increase(onset_onsets_total{{{_MODEL}}}[1d]))"),
                    "short",
                ),
                number(
                    "Allowed today",
                    "False alarms that the asked rate allows within the same 24 hours.",
                    Query(f"sum(increase(onset_expected_false_alarms_total{{{_MODEL}}}[1d]))"),
                    "short",
                ),
                number(
                    "Detectors see",
                    "Whether the canary's last run was ok on every replica; 0 = do not trust the scores.",
                    Query(f"min(onset_canary_ok{{{_MODEL}}})"),
                    "bool_yes_no",
                    _READY,
                ),
            ],
        ),
        (
            "Anomalies",
            [
                bars(
                    "Anomalous streams by severity",
                    "How many streams are anomalous over time. Many that begin together have a common cause.",
                    [Query(f"sum by (severity) (onset_streams_anomalous{{{_MODEL}}})", "{{severity}}")],
                ),
                bars(
                    "Onsets and silences",
                    "Onsets, with which alerts open or go far beyond what they were, and silences raised in each interval.",
                    [
                        Query(onsets, "onsets {{model}}"),
                        Query(f"sum(increase(onset_silences_total{{{_MODEL}}}[$__rate_interval]))", "silences"),
                    ],
                ),
                heat(
                    "Scores of all streams",
                    "How many events a second have which anomaly score. Normal streams fill the rows below 1; a hot row above is an "
                    "anomaly that lasts, a hot column a common cause.",
                    Query(f"sum by (le) (rate(onset_anomaly_score_bucket{{{_MODEL}}}[$__rate_interval]))", "{{le}}"),
                    "none",
                ),
                linked(table, "stream", {"Look at this stream": to_stream, "Look at it on the page": to_page}),
                line(
                    "Scores of the top streams",
                    "The ten most anomalous streams of those shown one by one; the dashed lines are where minor, major and critical begin.",
                    [Query(f"topk(10, max by (stream) {scores})", "{{stream}}")],
                    "none",
                    SCORE,
                    height=9,
                ),
            ],
        ),
        (
            "Alerting",
            [
                number(
                    "Rules firing",
                    "Rules of Onset that fire now. What the service itself tells Alertmanager is not among them: see Open alerts.",
                    Query('count(ALERTS{alertname=~"Onset.+",alertstate="firing",job=~"$job|"}) or vector(0)'),
                    "short",
                    NONE_IS_GOOD,
                    width=4,
                ),
                number(
                    "Unattended",
                    "Open alerts that nobody has acknowledged, of a minute ago at most.",
                    Query(f"sum(onset_alerts_unattended{{{_ALL}}})"),
                    "short",
                    ((None, GOOD), (1.0, WARN), (10.0, BAD)),
                    width=4,
                ),
                bars(
                    "Open alerts",
                    "Alerts that are open, by the highest severity they reached.",
                    [Query(f"sum by (kind, severity) (onset_alerts_open{{{_ALL}}})", "{{kind}} {{severity}}")],
                    width=8,
                ),
                bars(
                    "What happened to alerts",
                    "Opened, escalated and resolved in each interval.",
                    [Query(f"sum by (event) (increase(onset_alert_transitions_total{{{_ALL}}}[$__rate_interval]))", "{{event}}")],
                    width=8,
                ),
                bars(
                    "Accepted as the new normal",
                    "Alerts closed because someone, or their age, said that this is normal now.",
                    [Query(f"sum by (by) (increase(onset_accepted_total{{{_MODEL}}}[$__rate_interval]))", "by {{by}}")],
                    width=10,
                ),
                line(
                    "Asked false-alarm rate",
                    "Alpha in force on each replica: false onsets per event. Two lines for long: a replica has not got a change.",
                    [Query(f"onset_alpha{{{_ALL}}}", "{{instance}}")],
                    "sci",
                    width=14,
                ),
            ],
        ),
    ]
    return _board("onset-overview", "Onset overview", "What the fleet of streams does now, and where to look first.", sections, model=True)


def stream() -> dashboard.Dashboard:
    """One stream: what it does, what was expected, and why it is anomalous."""
    feature = f'{_STREAM},feature=~"$feature"'
    of_one, of_stream = f'{_STREAM},feature="$feature"', f"{{{_STREAM}}}"
    grade = latest(f"anomaly_grade{{{_STREAM}}}", of_stream)
    score, carried = latest(f"anomaly_score{{{_STREAM}}}", of_stream), latest(f"contribution{{{feature}}}", of_stream)
    band = line(
        "$feature: value, expected and band",
        "The reading, what the model expected, and the band that holds it as often as asked for. The vertical lines are onsets.",
        [
            Query(f"max by (stream) {latest(f'y{{{of_one}}}', of_stream)}", "value"),
            Query(f"max by (stream) {latest(f'yhat{{{of_one}}}', of_stream)}", "expected"),
            Query(f"max by (stream) {latest(f'yhat_lower{{{of_one}}}', of_stream)}", "lower"),
            Query(f"max by (stream) {latest(f'yhat_upper{{{of_one}}}', of_stream)}", "upper"),
        ],
        "none",
        width=24,
        height=10,
    )
    to_page = (
        "${page:raw}?stream=${__field.labels.stream:percentencode}&model=${__field.labels.model:percentencode}"
        "&at=${__value.time:date:seconds}"
    )
    onset = f"max by (stream) (anomaly_onset_timestamp_seconds{{{_STREAM}}})"
    sections = [
        (
            "$stream",
            [
                number(
                    "Score",
                    "The anomaly score: above 1 the stream is rarer than asked for, above 2 its p-value is below alpha squared.",
                    Query(f"max by (stream) {score}"),
                    "none",
                    SCORE,
                    width=6,
                ),
                number(
                    "Last onset",
                    "When the last alert of this stream opened, by the time of its event. No value: none since the stream is shown.",
                    Query(f"{onset} * 1000"),
                    "dateTimeFromNow",
                    width=6,
                ),
                number(
                    "Highest score",
                    "The highest score in the time that is shown.",
                    Query(f"max(max_over_time(anomaly_score{{{_STREAM}}}[$__range]))", instant=True),
                    "none",
                    SCORE,
                    width=6,
                ),
                number(
                    "Anomalous time",
                    "The share of the shown time in which the service took the stream for anomalous.",
                    Query(
                        f"max(avg_over_time((max by (model, stream) {grade} > bool 0)[$__range:]))",
                        instant=True,
                    ),
                    "percentunit",
                    ((None, GOOD), (0.01, WARN), (0.1, BAD)),
                    width=6,
                ),
            ],
        ),
        ("Readings", [panels.banded(band).repeat("feature").repeat_direction("v")]),
        (
            "Why",
            [
                line(
                    "Anomaly score",
                    "1 = as rare as asked for. The dashed lines are where minor, major and critical begin. "
                    "A point leads to the stream on the page, at its time.",
                    [Query(f"max by (model, stream) {score}", "score {{model}}")],
                    "none",
                    SCORE,
                    width=24,
                    height=7,
                ).data_links([dashboard.DashboardLink("Look at it on the page").url(to_page)]),
                gauges(
                    "Contributors now",
                    "Which features carry the error of the last event; they sum to 1.",
                    Query(f"topk(10, max by (feature) {carried})", "{{feature}}", instant=True),
                    "percentunit",
                    ((None, GOOD), (0.5, WARN), (0.8, BAD)),
                ),
                line(
                    "Contributors over time",
                    "The share of each feature in the error. A sensor that fails takes it all.",
                    [Query(f"max by (feature) {carried}", "{{feature}}")],
                    "percentunit",
                    height=9,
                ),
            ],
        ),
    ]
    board = _board(
        "onset-stream", "Onset stream", "One stream (ONSET_STREAM_METRICS): value, band, score, contributors.", sections, model=True
    )
    board = board.with_variable(_variable("stream", f"label_values(y{{{_MODEL}}}, stream)", "Which stream."))
    board = board.with_variable(_variable("feature", f"label_values(y{{{_STREAM}}}, feature)", "Which features.", several=True))
    annotation = (
        dashboard.AnnotationQuery().name("Onsets").datasource(panels.DATASOURCE).enable(True).icon_color("red").expr(f"{onset} * 1000")
    )
    return board.annotation(annotation)


def service() -> dashboard.Dashboard:
    """Does it keep up, and where does the time go?"""
    requests = f"sum by (le) (rate(onset_request_seconds_bucket{{{_ALL}}}[$__rate_interval]))"
    stages = f"sum by (le, stage) (rate(onset_stage_seconds_bucket{{{_ALL}}}[$__rate_interval]))"
    batches = f"sum by (le) (rate(onset_batch_events_bucket{{{_ALL}}}[$__rate_interval]))"
    scored = f'clamp_min(sum(rate(onset_events_total{{{_ALL},outcome="scored"}}[$__rate_interval])), 1e-9)'
    sections = [
        (
            "Now",
            [
                number(
                    "Ready replicas",
                    "Replicas that can score and commit now.",
                    Query(f"sum(onset_ready{{{_ALL}}})"),
                    "short",
                    _READY,
                    width=4,
                ),
                number(
                    "Events a second",
                    "Events scored on all replicas together.",
                    Query(f'sum(rate(onset_events_total{{{_ALL},outcome="scored"}}[$__rate_interval]))'),
                    "short",
                    width=4,
                ),
                number(
                    "Latency, 99 of 100",
                    "Requests are answered within this time, 99 of 100.",
                    Query(f"histogram_quantile(0.99, {requests})"),
                    "s",
                    ((None, GOOD), (0.1, WARN), (0.5, BAD)),
                    width=4,
                ),
                number(
                    "Waiting events",
                    "Events that wait to be scored, on all replicas.",
                    Query(f"sum(onset_queued_events{{{_ALL}}})"),
                    "short",
                    ((None, GOOD), (5000.0, WARN), (10_000.0, BAD)),
                    width=4,
                ),
                number(
                    "Streams in the store",
                    "About how many streams the store holds.",
                    Query(f"sum(max by (job) (onset_streams{{{_ALL}}}))"),
                    "short",
                    width=4,
                ),
                number(
                    "Bugs met",
                    "Requests and tasks failed by a bug within a day; each is in the log.",
                    Query(f"sum(increase(onset_unexpected_errors_total{{{_ALL}}}[1d]))"),
                    "short",
                    NONE_IS_GOOD,
                    width=4,
                ),
            ],
        ),
        (
            "Traffic",
            [
                line(
                    "Events by outcome",
                    "What became of the events: late ones were older than their stream's last, failed ones must be sent again.",
                    [Query(f"sum by (outcome) (rate(onset_events_total{{{_ALL}}}[$__rate_interval]))", "{{outcome}}")],
                    "cps",
                ),
                line(
                    "Events by door",
                    "Over HTTP, or which queue they came.",
                    [Query(f"sum by (door) (rate(onset_events_total{{{_ALL}}}[$__rate_interval]))", "{{door}}")],
                    "cps",
                ),
                line(
                    "Refused requests",
                    "queue and bytes: more comes than is scored. body and batch: too large. slow: did not arrive.",
                    [Query(f"sum by (reason) (rate(onset_refused_total{{{_ALL}}}[$__rate_interval]))", "{{reason}}")],
                    "reqps",
                ),
                line(
                    "Remote write without a score",
                    "What Prometheus sent and no value of it was scored; rule: dropped here, so better dropped where it is sent from.",
                    [Query(f"sum by (what) (rate(onset_remote_write_unscored_total{{{_ALL}}}[$__rate_interval]))", "{{what}}")],
                    "cps",
                ),
                line(
                    "Ready",
                    "Whether each replica can score.",
                    [Query(f"onset_ready{{{_ALL}}}", "{{instance}}")],
                    "bool_yes_no",
                    width=24,
                    height=5,
                ),
            ],
        ),
        (
            "Latency",
            [
                line(
                    "Requests",
                    "From an accepted request to its answer: the median, 99 and 999 of 1000.",
                    [Query(f"histogram_quantile({q}, {requests})", f"p{name}") for q, name in ((0.5, "50"), (0.99, "99"), (0.999, "99.9"))],
                    "s",
                    ((None, GOOD), (0.5, BAD)),
                ),
                line(
                    "Where a batch's time goes, 99 of 100",
                    "queue: waiting for its turn. load, commit: the store. step: the model.",
                    [Query(f"histogram_quantile(0.99, {stages})", "{{stage}}")],
                    "s",
                ),
                bars(
                    "Time spent by stage",
                    "Seconds a second in each stage, all replicas: what is worth making faster.",
                    [Query(f"sum by (stage) (rate(onset_stage_seconds_sum{{{_ALL}}}[$__rate_interval]))", "{{stage}}")],
                ),
                line(
                    "Batch size",
                    "Events per batch. It grows with the load; near 1,024 all the time the processor is the limit.",
                    [Query(f"histogram_quantile({q}, {batches})", f"p{name}") for q, name in ((0.5, "50"), (0.99, "99"))],
                    "short",
                    ((None, GOOD), (1024.0, BAD)),
                ),
                line(
                    "Waiting and held events",
                    "Waiting for a batch; held until earlier events of their stream are there (ONSET_REORDER_SECONDS).",
                    [
                        Query(f"sum by (model) (onset_queued_events{{{_ALL}}})", "waiting {{model}}"),
                        Query(f"sum by (model) (onset_held_events{{{_ALL}}})", "held {{model}}"),
                    ],
                    "short",
                    ((None, GOOD), (10_000.0, BAD)),
                    width=24,
                ),
            ],
        ),
        (
            "Store",
            [
                line(
                    "Lost commits",
                    "Per scored event: commits lost to another replica, and copies that another replica had overtaken.",
                    [
                        Query(f"sum(rate(onset_state_conflicts_total{{{_ALL}}}[$__rate_interval])) / {scored}", "conflicts"),
                        Query(f'sum(rate(onset_copies_total{{{_ALL},result="stale"}}[$__rate_interval])) / {scored}', "stale copies"),
                    ],
                    "percentunit",
                    ((None, GOOD), (0.1, BAD)),
                ),
                line(
                    "Copies",
                    "Whether a state was at hand (hit) or had to be loaded (miss).",
                    [Query(f"sum by (result) (rate(onset_copies_total{{{_ALL}}}[$__rate_interval]))", "{{result}}")],
                    "cps",
                ),
                bars(
                    "Streams that started afresh",
                    "new ones, those that met another model, and those whose value was corrupt (look at the store at once).",
                    [Query(f"sum by (reason) (increase(onset_fresh_states_total{{{_ALL}}}[$__rate_interval]))", "{{reason}}")],
                ),
                line(
                    "Bytes of states",
                    "What the live streams' values take in the store.",
                    [
                        Query(
                            f"sum by (model) (max by (job, model) (onset_state_bytes{{{_ALL}}}) "
                            f"* max by (job, model) (onset_streams_live{{{_ALL}}}))",
                            "{{model}}",
                        )
                    ],
                    "bytes",
                ),
                number(
                    "Store memory",
                    "Part of its maxmemory that the store uses. Full, it refuses every write.",
                    Query(f"max(onset_store_memory_ratio{{{_ALL}}})"),
                    "percentunit",
                    width=6,
                ),
                number(
                    "Store restarts",
                    "Restarts of the embedded store within a day.",
                    Query(f"sum(increase(onset_store_restarts_total{{{_ALL}}}[1d]))"),
                    "short",
                    NONE_IS_GOOD,
                    width=6,
                ),
            ],
        ),
        (
            "Queues",
            [
                line(
                    "Lag",
                    "Entries not acknowledged yet. Growing for minutes: add replicas, or partitions.",
                    [Query(f"sum by (source) (onset_source_lag{{{_ALL}}})", "{{source}}")],
                    "short",
                ),
                line(
                    "Entries",
                    "Read and acknowledged. They part when batches are abandoned.",
                    [
                        Query(f"sum by (source) (rate(onset_source_received_total{{{_ALL}}}[$__rate_interval]))", "{{source}} received"),
                        Query(
                            f"sum by (source) (rate(onset_source_acknowledged_total{{{_ALL}}}[$__rate_interval]))",
                            "{{source}} acknowledged",
                        ),
                    ],
                    "cps",
                ),
                line(
                    "Trouble",
                    "Dead letters, entries claimed from replicas that are gone, partitions lost while at work: events a second.",
                    [
                        Query(f"sum by (source) (rate(onset_source_{name}_total{{{_ALL}}}[$__rate_interval]))", f"{{{{source}}}} {title}")
                        for name, title in (("dead_lettered", "dead letters"), ("claimed", "claimed"), ("fenced", "fenced"))
                    ],
                    "cps",
                ),
                line(
                    "Partitions",
                    "Owned by each replica, and paused because too many of their entries cannot be used.",
                    [
                        Query(f"onset_source_partitions{{{_ALL}}}", "{{instance}} {{source}}"),
                        Query(f"sum by (source) (onset_source_paused{{{_ALL}}})", "{{source}} paused"),
                    ],
                    "short",
                ),
            ],
        ),
        (
            "Alerts and scores on their way out",
            [
                line(
                    "Notices of alerts",
                    "What became of them, for each sink. retried: it is down or slow. withheld: beyond the flood limit.",
                    [
                        Query(
                            f"sum by (sink, outcome) (rate(onset_alert_deliveries_total{{{_ALL}}}[$__rate_interval]))",
                            "{{sink}} {{outcome}}",
                        )
                    ],
                    "cps",
                ),
                line(
                    "Age of the oldest untold change",
                    "Above a minute the sink does not answer.",
                    [Query(f"max by (sink) (onset_alert_lag_seconds{{{_ALL}}})", "{{sink}}")],
                    "s",
                    ((None, GOOD), (60.0, BAD)),
                ),
                line(
                    "Scores written back",
                    "Events by what became of their samples on the way to the remote-write receiver, and those that wait.",
                    [
                        Query(
                            f"sum by (outcome) (rate(onset_write_back_events_total{{{_ALL}}}[$__rate_interval]))", "{{outcome}} a second"
                        ),
                        Query(f"sum(onset_write_back_waiting_events{{{_ALL}}})", "waiting"),
                    ],
                    "short",
                ),
                line(
                    "Who keeps the book of alerts",
                    "One replica at a time.",
                    [Query(f"onset_alerts_keeper{{{_ALL}}}", "{{instance}}")],
                    "bool_yes_no",
                ),
            ],
        ),
        (
            "Versions and processes",
            [
                rows(
                    "Models",
                    "Which file is on which replica. Two files of one model for long: a rollout stopped half way.",
                    Query(f"onset_model_info{{{_ALL}}}", instant=True, table=True),
                    "none",
                    panels.PLAIN,
                    columns={name: name for name in ("instance", "model", "version", "sha256", "provider")},
                ),
                line(
                    "Model in force",
                    "Whether each replica's file of a model is the one that scores: the one started last.",
                    [Query(f"onset_model_in_force{{{_ALL}}}", "{{instance}} {{model}}")],
                    "bool_yes_no",
                ),
                rows(
                    "Builds",
                    "Which version of the service runs on which replica.",
                    Query(f"onset_build_info{{{_ALL}}}", instant=True, table=True),
                    "none",
                    panels.PLAIN,
                    columns={name: name for name in ("instance", "version")},
                ),
                line(
                    "Processor",
                    "Processors that each replica uses. Scoring takes one, the event loop another.",
                    [Query(f"rate(process_cpu_seconds_total{{{_ALL}}}[$__rate_interval])", "{{instance}}")],
                    "short",
                ),
                line(
                    "Memory",
                    "Resident memory of each replica.",
                    [Query(f"process_resident_memory_bytes{{{_ALL}}}", "{{instance}}")],
                    "bytes",
                ),
            ],
        ),
    ]
    return _board("onset-service", "Onset service", "Does the service keep up, and where does the time go?", sections)


def calibration() -> dashboard.Dashboard:
    """Does it keep the rate that was asked for, and does it still see?"""
    judged = f"sum(increase(onset_judged_events_total{{{_MODEL}}}[$__range]))"
    count = f"clamp_min(sum(increase(onset_p_value_count{{{_MODEL}}}[$__range])), 1e-9)"
    below = f'sum by (le) (increase(onset_p_value_bucket{{{_MODEL},le!="+Inf"}}[$__range])) / scalar({count})'
    uniform = " or ".join(f'label_replace(vector({p:g}), "le", "{p if p < 1 else 1.0}", "", "")' for p in P_VALUES)
    onsets, allowed = (
        f"sum by (model) (increase({name}{{{_MODEL}}}[1h]))" for name in ("onset_onsets_total", "onset_expected_false_alarms_total")
    )
    sections = [
        (
            "False alarms: asked and measured",
            [
                number(
                    "Onsets",
                    "Onsets in the time that is shown, true and false ones: an alert opens, or its anomaly goes far beyond all before.",
                    Query(f"sum(increase(onset_onsets_total{{{_MODEL}}}[$__range]))", instant=True),
                    "short",
                    width=6,
                ),
                number(
                    "Allowed",
                    "False alarms that the asked rate allows for the events judged in that time.",
                    Query(f"sum(increase(onset_expected_false_alarms_total{{{_MODEL}}}[$__range]))", instant=True),
                    "short",
                    width=6,
                ),
                number(
                    "Measured over asked",
                    "Onsets over what the asked rate allows. True anomalies are in it, so above 1 is no proof of a bad calibration; far "
                    "below 1 the detector is more careful than asked. With few events it is chance.",
                    Query(
                        f"sum(increase(onset_onsets_total{{{_MODEL}}}[$__range])) / "
                        f"clamp_min(sum(increase(onset_expected_false_alarms_total{{{_MODEL}}}[$__range])), 1e-9)",
                        instant=True,
                    ),
                    "none",
                    ((None, GOOD), (2.0, WARN), (5.0, BAD)),
                    width=6,
                ),
                number(
                    "Judged events",
                    "Events with a p-value in the time that is shown: the evidence.",
                    Query(judged, instant=True),
                    "short",
                    width=6,
                ),
                line(
                    "Onsets and allowance by hour",
                    "Onsets within the hour before, and how many false ones the asked rate allows for the events of that hour.",
                    [Query(onsets, "onsets {{model}}"), Query(allowed, "allowed {{model}}")],
                    "short",
                ),
                line(
                    "Rare events beside alpha",
                    "The share of judged events rarer than alpha, and alpha. Lasting anomalies count with each of their events.",
                    [
                        Query(
                            f"sum by (model) (increase(onset_anomalies_total{{{_MODEL}}}[1h])) / "
                            f"clamp_min(sum by (model) (increase(onset_judged_events_total{{{_MODEL}}}[1h])), 1)",
                            "measured {{model}}",
                        ),
                        Query(f"max(onset_alpha{{{_ALL}}})", "alpha"),
                    ],
                    "sci",
                ),
            ],
        ),
        (
            "p-values against uniform",
            [
                compare(
                    "Share of p-values below",
                    "While streams are normal a share x of the p-values is below x. Higher bars at small x: real anomalies, or a model "
                    "that promises too much. Lower bars: it is more careful than it must be.",
                    [Query(below, "measured", instant=True, table=True), Query(uniform, "uniform", instant=True, table=True)],
                    "percentunit",
                    by="le",
                    names={"Value #A": "measured", "Value #B": "uniform"},
                ),
                heat(
                    "p-values over time",
                    "Where the p-values lie. A change from one day to the next: streams or a model have changed.",
                    Query(f"sum by (le) (increase(onset_p_value_bucket{{{_MODEL}}}[$__rate_interval]))", "{{le}}"),
                    "none",
                ),
            ],
        ),
        (
            "Canary",
            [
                number(
                    "Canary",
                    "Whether the last run was ok on each replica: known readings with a fault, scored by the path of all streams.",
                    Query(f"onset_canary_ok{{{_MODEL}}}", "{{instance}} {{model}}"),
                    "bool_yes_no",
                    _READY,
                    width=6,
                    height=8,
                    names=True,
                ),
                bars(
                    "Runs by result",
                    "blind: the fault opened no alert. inverted: scores run backwards. differs: the store or processor gives other scores. "
                    "failed: the run could not be finished.",
                    [Query(f"sum by (result) (increase(onset_canary_runs_total{{{_MODEL}}}[$__rate_interval]))", "{{result}}")],
                    width=9,
                ),
                line(
                    "The canary's scores",
                    "Median of the quiet part, highest of the fault: the same in every run of one model. The fault must be above 1.",
                    [Query(f"max by (model, part) (onset_canary_score{{{_MODEL}}})", "{{model}} {{part}}")],
                    "none",
                    _LIMIT,
                    width=9,
                ),
                line(
                    "Time since the last run",
                    "Longer than a few times ONSET_CANARY_SECONDS: the replica hangs.",
                    [Query(f"time() - onset_canary_run_timestamp{{{_MODEL}}}", "{{instance}} {{model}}")],
                    "s",
                    ((None, GOOD), (1800.0, BAD)),
                    width=24,
                    height=6,
                ),
            ],
        ),
    ]
    return _board(
        "onset-calibration",
        "Onset calibration",
        "Is the asked false-alarm rate kept, and do the detectors still see?",
        sections,
        model=True,
    )


def logs() -> dashboard.Dashboard:
    """What do the logs say that is new or unusual?"""
    new = f'rate(onset_lines_total{{{_MODEL},match="new"}}[$__rate_interval])'
    every = f"rate(onset_lines_total{{{_MODEL}}}[$__rate_interval])"
    steps = ((None, GOOD), (MANY_NEW / 5, WARN), (MANY_NEW, BAD))
    sections = [
        (
            "Now",
            [
                number("Lines a second", "Log lines that are scored, of all replicas.", Query(f"sum({every})"), "cps", width=6),
                number(
                    "Share of new patterns",
                    "Lines that no pattern of the model matches. They are not told apart from each other: train again with them.",
                    Query(f"sum({new}) / clamp_min(sum({every}), 1e-9)"),
                    "percentunit",
                    steps,
                    width=6,
                ),
                number(
                    "Anomalous log streams",
                    "Log streams whose last line, within five minutes, was anomalous.",
                    Query(f"sum(onset_streams_anomalous{{{_MODEL}}} {_LOGS})"),
                    "short",
                    ((None, GOOD), (1.0, WARN), (10.0, BAD)),
                    width=6,
                ),
                number(
                    "Onsets in logs today",
                    "Lines within 24 hours with which an alert opened, or went far beyond what it was.",
                    Query(f"sum(increase(onset_onsets_total{{{_MODEL}}}[1d]) {_LOGS})"),
                    "short",
                    width=6,
                ),
            ],
        ),
        (
            "Lines",
            [
                line(
                    "Lines by model",
                    "A sudden fall: a shipper that stopped. A sudden rise: something that repeats itself.",
                    [Query(f"sum by (model) ({every} {_LOGS})", "{{model}}")],
                    "cps",
                ),
                line(
                    "New patterns by model",
                    "The share of lines that no pattern matches. It rises with a release of the software that logs, or with a fault that "
                    "says what was never said; the page of the service lists them.",
                    [Query(f"sum by (model) ({new} {_LOGS}) / clamp_min(sum by (model) ({every}), 1e-9)", "{{model}}")],
                    "percentunit",
                    steps,
                ),
                bars(
                    "Onsets in logs over time",
                    "Lines with which an alert opened, or went far beyond what it was, in each interval.",
                    [Query(f"sum by (model) (increase(onset_onsets_total{{{_MODEL}}}[$__rate_interval]) {_LOGS})", "{{model}}")],
                ),
                bars(
                    "Anomalous log streams by severity",
                    "How many log streams are anomalous over time.",
                    [Query(f"sum by (severity) (onset_streams_anomalous{{{_MODEL}}} {_LOGS})", "{{severity}}")],
                ),
                heat(
                    "Scores of all lines",
                    "How many lines a second have which anomaly score; above 1 they are rarer than asked for.",
                    Query(f"sum by (le) (rate(onset_anomaly_score_bucket{{{_MODEL}}}[$__rate_interval]) {_LOGS})", "{{le}}"),
                    "none",
                ),
            ],
        ),
    ]
    return _board("onset-logs", "Onset logs", "What do the logs say that is new or unusual?", sections, model=True)


def _board(uid: str, title: str, description: str, sections: list[tuple[str, list[Any]]], *, model: bool = False) -> dashboard.Dashboard:
    board = dashboard.Dashboard(title).uid(uid).description(description).tags(["onset"]).editable().timezone("browser")
    board = board.refresh("10s").time("now-1h", "now").tooltip(models.DashboardCursorSync.CROSSHAIR)
    link = dashboard.DashboardLink("Onset").type(models.DashboardLinkType.DASHBOARDS).tags(["onset"])
    board = board.link(link.as_dropdown(False).include_vars(True).keep_time(True))
    board = board.link(dashboard.DashboardLink("The page").type(models.DashboardLinkType.LINK).url("${page:raw}").target_blank(True))
    source = dashboard.DatasourceVariable("datasource").label("data source").description("Which Prometheus.").type("prometheus")
    board = board.with_variable(source).with_variable(
        _variable("job", "label_values(onset_ready, job)", "Which installation.", several=True)
    )
    if model:
        names = f"label_values(onset_state_bytes{{{_ALL}}}, model)"
        board = board.with_variable(_variable("model", names, "Which detectors.", several=True))
    where = "Where people open the page of the service, with the slash at its end (ONSET_PUBLIC_URL)."
    board = board.with_variable(dashboard.TextBoxVariable("page").label("page").description(where).default_value(PAGE))
    for part in panels.flow(sections):
        board = board.with_row(part) if isinstance(part, dashboard.Row) else board.with_panel(part)
    return board


def _variable(name: str, query: str, description: str, *, several: bool = False) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(name).description(description).datasource(panels.DATASOURCE).query(query)
    variable = variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).current(models.VariableOption(text="All", value="$__all")) if several else variable


def _encoded(board: dashboard.Dashboard) -> str:
    content: dict[str, Any] = json.loads(JSONEncoder().encode(board.build()))
    for annotation in content.get("annotations", {}).get("list", []):
        # What the SDK's model lacks: the series' value is the time of the annotation, in milliseconds.
        annotation |= {"useValueForTime": True, "titleFormat": "Onset", "textFormat": "{{stream}}"}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
