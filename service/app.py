"""The composition root: builds the parts from Settings, opens them in order, closes them in reverse.

open    embedded store (or the URL's) ─► batch loops ─► commit function loaded, policy read ─► models claimed ─► queues ─► ready
close   not ready ─► queues finish what is under way and let others have their partitions ─► loops finish what they accepted, within
        the drain time ─► store
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import math
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.responses import Response

from service import http_sources, loki, openapi, otlp, patterns, queues, remote_write, samples, series, shipped, tasks, tellers, tracing
from service.api import DOOR, Application, Door
from service.canary import Canary
from service.claims import StoredClaim
from service.console.pages import Console, ConsoleLimits
from service.console.trial import TrialLimits
from service.control import Alpha, Asked, Control, Strict
from service.desk import Desk, Keeping
from service.detector import Detector, load_detectors
from service.embedded import EmbeddedStore
from service.errors import ArtifactError, BadSetting, OnsetError, StoreUnavailable
from service.feed import Feed
from service.fleet import Fleet
from service.intake import DoorLimits
from service.logs import Level
from service.metrics import Metrics
from service.names import Names
from service.policy import Policy
from service.relabel import read_rules
from service.scorer import Limits, Scorer
from service.series import Series
from service.settings import Settings
from service.silence import Sweep
from service.sinks.posting import address
from service.sinks.remote_write import Target, WriteBack
from service.sources import options
from service.sources.options import HttpSource
from service.stores import PING_SECONDS, Memory, Output, StateStore, usable
from service.stores.book import Book
from service.stores.clock import READ_SECONDS, StoreClock
from service.stores.cluster import ClusterStore
from service.stores.redis import RedisStore

REOPEN_SECONDS = 0.5
COUNT_SECONDS = 10.0
DOORS = (DOOR, remote_write.DOOR, loki.DOOR, otlp.DOOR, otlp.METRICS_DOOR)
VERSION = importlib.metadata.version("onset")

log = structlog.get_logger(__name__)


class Service:
    """All parts of one process. Use as an async context; its door answers while it is open."""

    def __init__(self, settings: Settings, embedded: EmbeddedStore | None = None) -> None:
        """Load and verify the models and rules. Raises ArtifactError, BadSetting; opens nothing yet.

        `embedded` is the store that the settings ask for, where it was launched before.
        """
        self.settings = settings
        self._embedded = embedded
        self.sources = queues.declared(settings, DOORS)
        self.metrics = Metrics()
        self.clock = StoreClock()
        """What all parts of all replicas judge by: never this machine's."""
        self.feed = Feed(self.metrics)
        self.detectors: Mapping[str, Detector] = load_detectors(settings.model, settings.inference_threads, settings.provider)
        self.default_model = _default(self.detectors, settings)
        queues.check(self.sources, lambda name: self.detectors[name or self.default_model].manifest)
        self.names = Names(read_rules(settings.prometheus_relabel) if settings.prometheus_relabel else (), settings.prometheus_series)
        self.scorers: dict[str, Scorer] = {}
        self.claims: dict[str, StoredClaim] = {}
        with _affordable("ONSET_CONSOLE_BYTES", settings.console_bytes):
            self.console = self._console() if settings.console else None
        self.book = Book()
        self.sinks = tellers.declared(settings, self.book, self.metrics, self.clock)
        self.control = Control(_asked(settings), settings.cadence_seconds, self.scorers, self.metrics, self.clock)
        self.store: StateStore | None = None
        self._store_open = False
        self._not_open_for = ""
        """Why the store could not be opened last."""
        self.failure: str | None = None
        """Why the service could not be opened."""
        self._closing = False
        self._was_ready: bool | None = None
        """As far as it was told; None = not yet: `serving` tells it."""
        self._counted_at = -math.inf
        self._evicting, self._rewrite_failed = "", False
        """As they were told of."""
        self.metrics.build.info({"version": VERSION})
        self.metrics.store_clock_ahead.set_function(lambda: self.clock.ahead)
        self.metrics.store_memory.set(math.nan)
        self.metrics.begin(model=list(self.detectors), door=DOORS)
        self.patterns = patterns.Patterns(self.detectors, self.metrics)
        self._watch_streams()
        self.write_back = self._write_back() if settings.remote_write_url else None
        for name, detector in self.detectors.items():
            about = {"version": detector.manifest.version, "sha256": detector.sha256[:16], "provider": detector.providers[0]}
            self.metrics.model.labels(name).info(about)

    def _watch_streams(self) -> None:
        """What /metrics tells of the streams, together and, where asked for, one by one."""
        self.feed.watch(self.patterns.see)
        most, shown = self.settings.stream_metrics, []
        for name, detector in self.detectors.items():
            self.feed.watch(Fleet(name, detector.manifest.warmup, self.metrics).gathered.see)
            if most:
                shown.append(Series(name, detector.manifest.feature_names, most, self.metrics))
                self.feed.watch(shown[-1].gathered.see)
        if shown:
            self.metrics.also(lambda: partial(series.exposition, [one.now() for one in shown]))

    def _write_back(self) -> WriteBack:
        settings = self.settings
        target = Target(
            address("ONSET_REMOTE_WRITE_URL", settings.remote_write_url),
            {name: secret.get_secret_value() for name, secret in settings.remote_write_headers.items()},
            settings.remote_write_metrics.split(","),
            settings.remote_write_queue_events,
            settings.prometheus_series,
            settings.remote_write_max_age_seconds,
        )
        features = {name: detector.manifest.feature_names for name, detector in self.detectors.items()}
        write_back = WriteBack(target, self.names, features, self.metrics, self.clock)
        self.feed.watch(write_back.see)
        return write_back

    async def live(self) -> str | None:
        stuck = [name for name, scorer in self.scorers.items() if not scorer.healthy]
        return f"The batch loop of {', '.join(stuck)} does not turn." if stuck and not self._closing else None

    async def ready(self) -> str | None:
        wrong = await self._unusable()
        usable = wrong is None
        wrong = wrong or next((claim.wrong for claim in self.claims.values() if claim.wrong), None)
        self.metrics.ready.set(wrong is None)
        self._tell(wrong)
        if usable and self.store is not None and time.monotonic() - self._counted_at > COUNT_SECONDS:
            self._counted_at = time.monotonic()
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(PING_SECONDS):
                    self.metrics.streams.set(await self.store.count())
                    self._see(await self.store.memory())
        return wrong

    def _see(self, memory: Memory) -> None:
        """In the metrics; in the log, when the store begins to throw states away, or does so by another policy, or its disk to fill."""
        self.metrics.store_memory.set(memory.fullness)
        self.metrics.store_evicts.set(bool(memory.evicting))
        if memory.evicting and memory.evicting != self._evicting:
            detail = "States are lost once the memory is full: set it to noeviction."
            log.warning("store_evicts", maxmemory_policy=memory.evicting, detail=detail)
        self._evicting = memory.evicting
        self.metrics.store_rewrite_failed.set(memory.rewrite_failed)
        if memory.rewrite_failed and not self._rewrite_failed:
            detail = "Its append-only file could not be written anew, and grows until the disk is full; its own log says why."
            log.error("store_rewrite_failed", detail=detail)
        self._rewrite_failed = memory.rewrite_failed

    def _tell(self, wrong: str | None) -> None:
        """In the log, when readiness turns: an outage is two lines, whatever else complains meanwhile."""
        before, self._was_ready = self._was_ready, wrong is None
        if before is None or before == self._was_ready or self._closing:
            return
        if wrong is None:
            log.info("ready")
        else:
            log.warning("not_ready", reason=wrong)

    def stopping(self) -> None:
        """Called when the server begins to stop, before it waits for answers under way: endless ones end here."""
        if self.console:
            self.console.live.close()
        for scorer in self.scorers.values():
            scorer.stopping()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """Open everything; close it in reverse."""
        async with contextlib.AsyncExitStack() as stack:

            def beside(run: Coroutine[Any, Any, None], name: str) -> None:
                """Runs until its turn to be closed."""
                stack.push_async_callback(tasks.end, asyncio.create_task(run, name=name))

            await stack.enter_async_context(tracing.exporting(VERSION))
            _check_cluster(self.settings)
            url = self.settings.redis_url
            if not url:
                embedded = self._embedded or EmbeddedStore(self.settings.data_dir)
                embedded.on_restart = self.metrics.store_restarts.inc
                url = await embedded.start()
                stack.push_async_callback(embedded.stop)
            store = _store(self.settings, url, self.clock)
            stack.push_async_callback(store.close)
            self.store = store
            self.control.connect(store)
            self.book.connect(store)
            self.patterns.connect(store)
            stack.push_async_callback(self.patterns.stop)
            if self.write_back:
                stack.push_async_callback(self.write_back.stop, asyncio.create_task(self.write_back.run()), self.settings.drain_seconds)
            with _affordable("ONSET_COPIES_BYTES", self.settings.copies_bytes):
                self._start_scorers(store)
            stack.push_async_callback(self._drain)
            most, drain = self.settings.max_batch_events, self.settings.drain_seconds
            read = [source for source in self.sources if not isinstance(source, HttpSource)]
            taps = queues.taps(read, url, store, self._claimed, self.metrics, max_events=most, drain_seconds=drain, clock=self.clock)
            await self._open(store, stack)
            beside(tasks.repeat(store.ping, READ_SECONDS, lambda error: None, partial(self.metrics.bug, task="clock")), "clock")
            for name, claim in self.claims.items():
                beside(claim.run(), f"claim-{name}")
            beside(self.control.run(), "policy")
            for name, sweeper in self._sweepers(read):
                self.clock.when_stepped(sweeper.anew)
                beside(sweeper.run(), f"sweep-{name}")
            for canary in self._canaries(store):
                beside(canary.run(), "canary")
            if self.console and self.settings.redis_url:  # an embedded store is of one replica
                self.console.log.connect(store)
                beside(self.console.shared.run(), "live")
            beside(self.patterns.run(), "patterns")
            streams = {name: scorer.streams for name, scorer in self.scorers.items()}
            if self.console:
                beside(self.console.over.run(streams), "over")
                beside(self.console.attended.run(self.book), "attended")
            desk = Desk(self.book, streams, self.metrics, _keeping(self.settings), self.sinks, self.clock)
            beside(desk.run(), "alerts")
            for tap in taps:
                tap.start()
                stack.push_async_callback(tap.stop)
            yield self
            self._closing = True
            await self.ready()

    def _console(self) -> Console:
        settings = self.settings
        trial = TrialLimits(settings.backtest_bytes, settings.backtest_rows, settings.backtest_seconds)
        limits = ConsoleLimits(settings.console_bytes, settings.console_events, settings.console_watchers, trial)
        console = Console(self.detectors, self.default_model, settings.model, lambda name: self.scorers[name].policy, limits, self.metrics)
        console.watch(self.feed)
        return console

    def _canaries(self, store: StateStore) -> list[Canary]:
        every = self.settings.canary_seconds
        sensors = [detector for detector in self.detectors.values() if detector.manifest.kind == "sensor"]  # its anomaly is one of numbers
        return [Canary(detector, store, self.metrics, every, self.clock) for detector in sensors] if every else []

    def _sweepers(self, read: Sequence[options.AnyQueue]) -> Iterator[tuple[str, Sweep]]:
        """Of each model, if it has one. `read` are the queues."""
        for name, scorer in self.scorers.items():
            fed = [source for source in read if (source.model or self.default_model) == name]
            unread = queues.unread_seconds(fed) if self.settings.redis_url else 0.0  # an embedded store is of one replica
            silent = scorer.sweeper(self.settings.state_ttl_seconds, unread) if self.settings.silence else None
            if sweeper := scorer.session_sweeper(unread) or silent:
                yield name, sweeper

    def _start_scorers(self, store: StateStore) -> None:
        settings = self.settings
        limits = Limits(
            settings.max_queue_events,
            settings.max_streams,
            settings.max_future_seconds,
            settings.result_ttl_seconds,
            settings.copies_bytes,
            settings.reorder_seconds,
            settings.reorder_events,
            min(settings.session_ttl_seconds, settings.state_ttl_seconds),
        )
        policy = Policy(
            alpha=settings.asked_alpha, strict=settings.strict, silence=settings.silence, accept_after=settings.accept_after or math.inf
        )
        for name, detector in self.detectors.items():
            policy_of = replace(policy, tau=detector.manifest.age_constant)
            claim = self.claims[name] = StoredClaim(detector, store, self.metrics, instance=settings.instance)
            self.scorers[name] = Scorer(
                detector, policy_of, store, self.metrics, limits, self.clock, held=True, feed=self.feed, claim=claim
            )
            self.scorers[name].start()

    def _claimed(self, model: str) -> tuple[Scorer, StoredClaim]:
        name = model or self.default_model
        return self.scorers[name], self.claims[name]

    async def _open(self, store: RedisStore | ClusterStore, stack: contextlib.AsyncExitStack) -> None:
        """Open the store now, or keep trying beside the running service, which is not ready until then."""
        try:
            await self._try_open(store)
        except StoreUnavailable as error:
            self._not_open_for = error.detail
            log.warning("store_not_open_yet", error=error.detail)
            task = asyncio.create_task(self._reopen(store), name="open-store")
            stack.push_async_callback(tasks.end, task)

    async def _reopen(self, store: RedisStore | ClusterStore) -> None:
        while not self._store_open:
            await asyncio.sleep(REOPEN_SECONDS)
            try:
                await self._try_open(store)
            except StoreUnavailable as error:
                self._not_open_for = error.detail
            else:
                log.info("store_open")

    async def _try_open(self, store: RedisStore | ClusterStore) -> None:
        await store.open()
        await self.control.refresh()
        # Last of all that may fail: a start that comes to nothing takes no model from those that serve it.
        await asyncio.gather(*(claim.take() for claim in self.claims.values()))
        self._store_open = True

    async def _drain(self) -> None:
        await asyncio.gather(*(scorer.drain(self.settings.drain_seconds) for scorer in self.scorers.values()))

    async def _unusable(self) -> str | None:
        """What keeps any of the models from being scored."""
        if self._closing:
            return "The service is stopping."
        if self.store is None or not self._store_open:
            return f"The state store has not been opened yet. {self._not_open_for}".rstrip()
        stuck = await self.live()
        if stuck:
            return stuck
        try:
            await usable(self.store)
        except StoreUnavailable as error:
            return error.detail
        return None


def create_app(settings: Settings, embedded: EmbeddedStore | None = None) -> FastAPI:
    """The whole service as an ASGI app; `embedded` as Service takes it. Raises ArtifactError when a model is refused."""
    service = Service(settings, embedded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with service.running():
                yield
        except OnsetError as error:
            service.failure = error.detail
            raise

    app = Application(title="Onset", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    limits = DoorLimits(settings.max_body_bytes, settings.max_batch_events, settings.max_inflight_bytes, settings.max_body_seconds)
    door = Door(
        service.scorers,
        service.default_model,
        limits,
        service.metrics,
        service,
        service.control,
        service.book,
        settings.public_url,
        Level(settings.log_level),
        settings.allowed_hosts,
        service.clock,
    )
    door.add_to(app)
    ended = [service.write_back.ended] if service.write_back else []
    prometheus = remote_write.RemoteWrite(
        door, service.names, settings.max_batch_events, service.metrics, ended, settings.prometheus_end_seconds
    )
    door.add_post(app, remote_write.PATH, prometheus.post, "remote_write")
    points = samples.Samples(otlp.METRICS_DOOR, service.metrics, ended, settings.prometheus_end_seconds)
    as_otlp = otlp.OtlpMetrics(door, service.names, points, settings.max_batch_events, service.metrics, service.clock)
    door.add_post(app, otlp.METRICS_PATH, as_otlp.export, "otlp_metrics")
    _add_log_doors(app, door, service)
    _add_sources(app, door, service)
    openapi.add_docs(app)
    if service.console:
        app.router.routes += service.console.routes()
    else:
        app.get("/", include_in_schema=False)(_home)
    manifests = [detector.manifest for detector in service.detectors.values()]
    app.openapi = lambda: openapi.document(app, manifests, live=service.console is not None)  # type: ignore[method-assign]
    return app


def _add_log_doors(app: Application, door: Door, service: Service) -> None:
    """Raises BadSetting."""
    settings, metrics = service.settings, service.metrics
    model = shipped.log_model([detector.manifest for detector in service.detectors.values()], settings.logs_model)
    to_loki, to_otlp = (
        shipped.Shipping(door, name, model, metrics, settings.max_queue_events, service.clock) for name in (loki.DOOR, otlp.DOOR)
    )
    as_loki = loki.Loki(to_loki, loki.Streams(settings.loki_stream), settings.max_lines)
    as_otlp = otlp.Otlp(to_otlp, otlp.Streams(settings.otlp_stream), settings.max_lines)
    door.add_post(app, loki.PATH, as_loki.push, "loki_push")
    door.add_post(app, otlp.PATH, as_otlp.export, "otlp_logs")
    door.add_get(app, patterns.PATH, service.patterns.page, "patterns")


def _add_sources(app: Application, door: Door, service: Service) -> None:
    declared = [source for source in service.sources if isinstance(source, HttpSource)]
    sources = http_sources.HttpSources(door, declared, service.settings.max_batch_events, service.metrics, service.clock)
    for path, name in ((http_sources.PATH, "source_events"), (http_sources.TOPIC_PATH, "source_topic_events")):
        door.add_post(app, path, sources.post, name)
    for path, name in ((http_sources.INFLUX_PATH, "influx_write"), (http_sources.INFLUX_1_PATH, "influx_1_write")):
        door.add_post(app, path, sources.write, name)


async def _home() -> Response:
    return RedirectResponse("docs")


@contextlib.contextmanager
def _affordable(setting: str, size: int) -> Iterator[None]:
    """What is made within takes so many bytes. Raises BadSetting where they cannot be had."""
    try:
        yield
    except MemoryError as error:
        raise BadSetting(f"{setting} is {size}: this machine does not give so much memory.") from error


def _asked(settings: Settings) -> Asked:
    """What the environment asks for."""
    cadence = settings.cadence_seconds if settings.false_alarms else None
    return Asked(Alpha(settings.asked_alpha, None, settings.false_alarms, cadence), Strict(settings.strict))


def _keeping(settings: Settings) -> Keeping:
    return Keeping(
        settings.alerts_max_age_seconds,
        settings.alerts_resend_seconds,
        settings.alerts_max_open,
        settings.alerts_max_resolved,
        settings.alerts_retention_seconds,
    )


def _check_cluster(settings: Settings) -> None:
    if settings.redis_cluster and not settings.redis_url:
        raise BadSetting("ONSET_REDIS_CLUSTER needs ONSET_REDIS_URL: the embedded store is one server.")


def _store(settings: Settings, url: str, clock: StoreClock) -> RedisStore | ClusterStore:
    state_ttl, result_ttl = settings.state_ttl_seconds, settings.result_ttl_seconds
    try:
        if settings.redis_cluster:
            return ClusterStore(url, state_ttl=state_ttl, result_ttl=result_ttl, clock=clock)
        output = Output(settings.streams_output, settings.streams_max_results)
        return RedisStore(url, state_ttl=state_ttl, result_ttl=result_ttl, output=output, clock=clock)
    except ValueError as error:
        raise BadSetting(f"ONSET_REDIS_URL cannot be used: {error}.") from error


def _default(detectors: Mapping[str, Detector], settings: Settings) -> str:
    """The model that scores when a request names none."""
    if len(detectors) == 1:
        return next(iter(detectors))
    if settings.default_model in detectors:
        return settings.default_model
    raise ArtifactError(
        f"{settings.model} holds the models {', '.join(sorted(detectors))}: name the default one by ONSET_DEFAULT_MODEL "
        f"(it is '{settings.default_model}')."
    )
