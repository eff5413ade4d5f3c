"""The catalogue of metrics: each name once, with its kind, its meaning and what to do when it moves. Never a stream id as a label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_EVENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000)


class Metrics:
    """All metrics of one process, in a registry of its own: two services in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # Info: version and runtime of this build.
        self.build = Info("onset_build", "Version and runtime of this build.", registry=registry)
        # Info: which model file scores, and where ONNX Runtime really runs it. Differs between replicas during a rollout, never for long.
        self.model = Info("onset_model", "Version, hash and execution provider of a loaded model.", ["model"], registry=registry)
        # Counter: events by door and what became of them: scored, duplicate, late, rejected, failed.
        # late grows: a sender's clock or order is wrong. rejected grows: a client sends what no model takes. failed: the store.
        self.events = Counter("onset_events", "Events by door and outcome.", ["door", "outcome"], registry=registry)
        # Counter: events that were anomalous (p < alpha) and alerts that opened. Alerts above the asked rate: see the calibration page.
        self.anomalies = Counter("onset_anomalies", "Events rarer than the asked rate.", ["model"], registry=registry)
        self.onsets = Counter("onset_onsets", "Alerts opened.", ["model"], registry=registry)
        # Counter: false alarms that the asked rate allows for the events scored so far, learning allowance included. onset_onsets beyond
        # twice this, over days: something is really wrong, or alpha does not hold for these streams.
        self.expected = Counter("onset_expected_false_alarms", "False alarms the asked rate allows.", ["model"], registry=registry)
        # Counter: alerts accepted as the new normal, by call or by age (ONSET_ACCEPT_AFTER). Each is in the log with its stream.
        self.accepted = Counter("onset_accepted", "Alerts accepted as the new normal.", ["model", "by"], registry=registry)
        # Gauges: the asked rate in force on this replica, and whether new streams have no learning allowance (0 or 1). Differing between
        # replicas for more than a few seconds: one does not reach the store. Counter: changes at run time, by "call" (answered here) or
        # "refresh" (answered by another replica); each is in the log with the values before it.
        self.alpha = Gauge("onset_alpha", "The asked false-alarm rate in force.", registry=registry)
        self.strict = Gauge("onset_strict", "Whether new streams have no learning allowance.", registry=registry)
        self.policy_changes = Counter("onset_policy_changes", "Changes of the policy at run time.", ["by"], registry=registry)
        # Gauge: live streams that are silent for improbably long, as the store has them (the same on every replica). Many at once: a
        # sender or a network is down. Counter: silences that this replica raised; each is in the log with its stream.
        self.silent = Gauge("onset_streams_silent", "Streams silent for improbably long.", ["model"], registry=registry)
        self.silences = Counter("onset_silences", "Silences raised.", ["model"], registry=registry)
        # Histogram: where the time of a batch goes. load and commit grow: the store; step grows: the model or a busy processor.
        self.stage = Histogram("onset_stage_seconds", "Time of a batch by stage.", ["stage"], buckets=_SECONDS, registry=registry)
        # Histogram: from an accepted request to its answer.
        self.latency = Histogram(
            "onset_request_seconds", "Time from an accepted request to its answer.", ["door"], buckets=_SECONDS, registry=registry
        )
        # Histogram: events per batch. Grows with the load; at max_batch all the time means the processor is the limit.
        self.batch = Histogram("onset_batch_events", "Events per batch.", buckets=_EVENTS, registry=registry)
        # Gauge: events waiting. Near the queue's limit, requests are refused: add replicas.
        self.queued = Gauge("onset_queued_events", "Events waiting to be scored.", ["model"], registry=registry)
        # Gauge: events held until their turn (ONSET_REORDER_SECONDS). Grows with the rate; near the queue's limit, requests are refused.
        self.held = Gauge("onset_held_events", "Events held until their turn.", ["model"], registry=registry)
        # Counter: requests refused, by reason: queue, bytes, body, batch, slow.
        self.refused = Counter("onset_refused", "Requests refused at the door.", ["reason"], registry=registry)
        # Counter: requests that a bug of ours failed; each is in the log with its reference. Any is worth an issue.
        self.bugs = Counter("onset_unexpected_errors", "Requests failed by a bug.", registry=registry)
        # Counter: copies of states by what became of them: hit (a load was saved), miss, stale (another replica wrote the stream since; it
        # is stepped again). stale near hit: senders spread a stream over the replicas; route by stream id. miss while streams come
        # again and again: ONSET_COPIES_BYTES is too small for them.
        self.copies = Counter("onset_copies", "Copies of states by result.", ["result"], registry=registry)
        # Counter: compare-and-set lost against another replica. Constantly high: two senders share streams; route by stream id.
        self.conflicts = Counter("onset_state_conflicts", "Commits lost to another replica.", registry=registry)
        # Counter: streams that started afresh: new, other_model (a deploy), corrupt (investigate the store at once).
        self.fresh = Counter("onset_fresh_states", "Streams that started afresh, by reason.", ["reason"], registry=registry)
        # Counters: entries of a queue that were read or claimed (again, where a batch was abandoned), acknowledged, claimed from what a
        # former owner left, and events that became dead letters. received far beyond acknowledged: the store, or replicas that die.
        # claimed grows outside of deploys: replicas die or stall. dead_lettered grows: read onset_reason in the dead letters.
        self.source_received = Counter("onset_source_received", "Entries read from a queue.", ["source"], registry=registry)
        self.source_acknowledged = Counter("onset_source_acknowledged", "Entries acknowledged.", ["source"], registry=registry)
        self.source_claimed = Counter("onset_source_claimed", "Entries claimed from a former owner.", ["source"], registry=registry)
        self.source_dead_lettered = Counter("onset_source_dead_lettered", "Events that could not be used.", ["source"], registry=registry)
        # Counter: partitions that were lost to another replica while this one was still at work: it was taken for dead. Nothing is scored
        # twice by that. Growing: the process or its store stalls for longer than ONSET_STREAMS_LEASE_SECONDS.
        self.source_fenced = Counter("onset_source_fenced", "Partitions lost to another replica.", ["source"], registry=registry)
        # Gauge: partitions this replica owns. Their sum is the number of partitions; less for longer than a lease: nobody reads the others.
        self.source_partitions = Gauge("onset_source_partitions", "Partitions owned.", ["source"], registry=registry)
        # Gauge: entries of the owned partitions not yet acknowledged, NaN = the queue cannot tell. Grows for minutes: add partitions
        # and replicas.
        self.source_lag = Gauge("onset_source_lag", "Entries not acknowledged.", ["source"], registry=registry)
        # Gauge: partitions that wait because too many of their recent entries cannot be used (ONSET_STREAMS_FUSE): see docs/queues.md.
        self.source_paused = Gauge("onset_source_paused", "Partitions paused by the fuse.", ["source"], registry=registry)
        # Gauge: size of one stored value. Changes only with the model.
        self.state_bytes = Gauge("onset_state_bytes", "Bytes of one stream's value.", ["model"], registry=registry)
        # Gauge: keys in the store, about the number of live streams.
        self.streams = Gauge("onset_streams", "About how many streams the store holds.", registry=registry)
        # Gauge: 1 when events can be scored and committed.
        self.ready = Gauge("onset_ready", "Whether the service is ready.", registry=registry)
        # Counter: restarts of the embedded store. Any is worth a look at its log.
        self.store_restarts = Counter("onset_store_restarts", "Restarts of the embedded store.", registry=registry)
