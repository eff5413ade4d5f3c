"""From what is declared (ONSET_SOURCES; ONSET_STREAMS_… for one Redis Streams source) to taps. Part of the composition root.

A queue's client is imported only where such a source is declared: each is an optional dependency.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

from service.artifact import Manifest
from service.claims import StoredClaim
from service.consumer import Consumer, Tap
from service.errors import BadSetting
from service.events import listed
from service.mapping import Mapper
from service.metrics import Metrics
from service.scorer import Scorer
from service.settings import Settings
from service.silence import RETURN_SECONDS
from service.sources import Source, options
from service.sources.redis_streams import RedisStreams
from service.stores import StateStore

KAFKA_SESSION_MS = 45_000
"""librdkafka's default of session.timeout.ms."""
AMQP_UNHEARD_SECONDS = 20.0
"""A broker gives a client up after two heartbeats (sources/amqp.py)."""


def declared(settings: Settings, doors: Collection[str] = ()) -> Sequence[options.AnySource]:
    """All sources of these settings; `doors` are what metrics call the others. Raises BadSetting."""
    sources = list(options.read(settings.sources))
    if settings.streams_input:
        sources.insert(0, _short(settings))
    names = [source.called for source in sources]
    if len(set(names)) < len(names):
        raise BadSetting(
            "ONSET_STREAMS_INPUT is a source called 'redis_streams', and so is one of ONSET_SOURCES: give that one another name."
        )
    for source in sources:
        if source.called in doors:
            raise BadSetting(f"A source of ONSET_SOURCES is called '{source.called}', as a door of the service in its metrics: rename it.")
    if settings.redis_cluster:
        for source in sources:
            if isinstance(source, options.RedisStreamsSource):
                detail = f"Source '{source.called}' reads '{source.key}' and ONSET_REDIS_CLUSTER is set"
                raise BadSetting(f"{detail}: Redis Streams need a single server for now.")
    for source in sources:
        if isinstance(source, options.RedisStreamsSource):
            read = {source.key} if source.partitions == 1 else {f"{source.key}:{{{i}}}" for i in range(source.partitions)}
            for what, key in (("dead letters", source.dead_letters), ("results", settings.streams_output)):
                if key in read:
                    raise BadSetting(f"Source '{source.called}' reads '{key}', which its {what} go to: they would be its events.")
    return sources


def taps(
    sources: Sequence[options.AnyQueue],
    store_url: str,
    store: StateStore,
    scorer_of: Callable[[str], tuple[Scorer, StoredClaim]],
    metrics: Metrics,
    *,
    max_events: int,
    drain_seconds: float,
    clock: Callable[[], float],
) -> list[Tap]:
    """One for each queue, not started. `scorer_of` gives scorer and claim of a model by name ("" = the default). Raises BadSetting."""
    made = []
    for source in sources:
        scorer, claim = scorer_of(source.model)
        mapper = Mapper(source.payload, max_events=max_events)
        made.append(Tap(partial(_consumer, source, store_url, store, scorer, metrics, mapper, clock), claim, metrics, drain_seconds))
    return made


def check(sources: Sequence[options.AnySource], manifest_of: Callable[[str], Manifest]) -> None:
    """Raises BadSetting where no message could ever be an event of its model. `manifest_of` one by name, or KeyError; "" = the default."""
    for source in sources:
        try:
            manifest = manifest_of(source.model)
        except KeyError as error:
            raise BadSetting(f"Source '{source.called}' names the model '{source.model}', which is not loaded.") from error
        _fits(source, manifest)


def _fits(source: options.AnySource, manifest: Manifest) -> None:
    payload, model = source.payload, f"Source '{source.called}': model '{manifest.name}'"
    if manifest.kind == "log":
        if payload.values or payload.format == "number":
            raise BadSetting(f"{model} takes log lines, and payload declares numbers: declare message, or format: text.")
    elif payload.message or payload.format == "text":
        raise BadSetting(f"{model} takes numbers, and payload declares a log line: declare values.")
    else:
        named = payload.values if isinstance(payload.values, dict) else [payload.feature] if payload.format == "number" else []
        for feature in named:
            if feature not in manifest.feature_names:
                known = listed(manifest.feature_names)
                raise BadSetting(f"{model} has no feature '{feature}', which payload declares; it knows {known}.")


def _consumer(
    source: options.AnyQueue,
    store_url: str,
    store: StateStore,
    scorer: Scorer,
    metrics: Metrics,
    mapper: Mapper,
    clock: Callable[[], float],
) -> Consumer:
    return Consumer(queue(source, store_url, store, metrics, clock), scorer, metrics, mapper, fuse=source.fuse)


def queue(source: options.AnyQueue, store_url: str, store: StateStore, metrics: Metrics, clock: Callable[[], float] = time.time) -> Source:
    """`clock` gives seconds since 1970. Raises BadSetting where its client is not installed."""
    try:
        match source:
            case options.RedisStreamsSource():
                return RedisStreams(store_url, source, metrics, clock)
            case options.KafkaSource():
                from service.sources.kafka import Kafka  # noqa: PLC0415

                return Kafka(source, metrics, clock)
            case options.NatsSource():
                from service.sources.nats import Nats  # noqa: PLC0415

                return Nats(source, metrics)
            case options.MqttSource():
                from service.sources.mqtt import Mqtt  # noqa: PLC0415

                return Mqtt(source, store, metrics, clock)
            case options.AmqpSource():
                from service.sources.amqp import Amqp  # noqa: PLC0415

                return Amqp(source, metrics, clock)
    except ImportError as error:
        raise BadSetting(
            f"Source '{source.called}' needs the extra '{source.type}': pip install 'onset[{source.type}]' ({error})."
        ) from error


def unread_seconds(sources: Sequence[options.AnyQueue]) -> float:
    """For how long what one replica reads of these is not heard, at most, where it is killed: until others read it, and have caught up."""
    return max(map(_unread_seconds, sources)) + RETURN_SECONDS if sources else 0.0


def _unread_seconds(source: options.AnyQueue) -> float:
    match source:
        case options.KafkaSource():
            return float(source.options.get("session.timeout.ms", KAFKA_SESSION_MS)) / 1000
        case options.AmqpSource():
            return AMQP_UNHEARD_SECONDS
        case _:
            return source.lease_seconds


def _short(settings: Settings) -> options.RedisStreamsSource:
    return options.RedisStreamsSource(
        key=settings.streams_input,
        partitions=settings.streams_partitions,
        group=settings.streams_group,
        dead_letters=settings.streams_dead_letters,
        max_dead_letters=settings.streams_max_dead_letters,
        keep=settings.streams_keep,
        batch=settings.streams_batch,
        lease_seconds=settings.streams_lease_seconds,
        fuse=settings.streams_fuse,
        model=settings.streams_model,
    )
