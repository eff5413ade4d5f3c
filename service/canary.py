"""A stream of the service's own with a known anomaly, scored at an interval by the path of all streams: is the detector blind by now?

    a run    fresh stream ─► quiet readings, then a fault ─► scorer: load, step, decide, commit, in the store in use ─► forgotten
    result   ok         the fault opened an alert, and looks less ordinary than the quiet part
             blind      it opened none                       inverted   the quiet part looks more anomalous than the fault
             differs    scores are not those that the same scorer gives over a store in this process's memory, to the last bit
             failed     a run could not be finished (mostly: the store does not answer)

It has a scorer of its own over the same detector and store, so that it takes nobody's turn and is counted among nobody's events, and its
states lie under a name that no model can have: no listing, alert or count of streams shows it.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog

from service.detector import Detector
from service.errors import ItemError, OnsetError
from service.events import Event, Result
from service.metrics import Metrics
from service.policy import THRESHOLD, Policy
from service.scorer import Limits, Scorer
from service.stores import StateStore
from service.stores.memory import MemoryStore

ALPHA = 0.01
"""What the canary's own alert is asked for, whatever the policy in force: some 200 events of evidence are not enough for a rarer one."""
EVIDENCE, FAULT = 180, 20
"""Judged events before the fault, and events of the fault."""
PIECE = 25
"""Events of a batch: the state goes through the store between two of them."""
SHIFT = 10.0
"""The fault: every feature rises by this, which is 7 standard deviations of the quiet part (a sine of amplitude 1 and noise of 0.3)."""
SOON_SECONDS = 10.0
"""After a start, and after a run that failed."""
_CADENCE = 60.0

CanaryResult = Literal["ok", "blind", "inverted", "differs", "failed"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Finding:
    """What a run showed. Scores are against ALPHA, NaN where the run failed."""

    result: CanaryResult
    quiet_score: float = math.nan
    """Median anomaly score of the quiet part."""
    fault_score: float = math.nan
    """Highest one of the fault."""
    reason: str = ""


class Canary:
    """The canary of one detector."""

    def __init__(
        self, detector: Detector, store: StateStore, metrics: Metrics, every: float, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._detector, self._store, self._metrics, self._every, self._clock = detector, store, metrics, every, clock
        self._stream_id = uuid.uuid4().hex  # replicas must not meet in one stream
        self._events = _events(detector, self._stream_id)
        self._expected: list[Result | ItemError] | None = None
        self._last: CanaryResult = "ok"
        metrics.canary_ok.labels(detector.name).set(math.nan)
        metrics.canary_run.labels(detector.name).set(self._clock())

    async def run(self) -> None:
        """Look soon and then at every interval until cancelled."""
        await asyncio.sleep(min(self._every, SOON_SECONDS))
        while True:
            finding = await self._looked()
            self._note(finding)
            await asyncio.sleep(self._every if finding.result != "failed" else min(self._every, SOON_SECONDS))

    async def look(self) -> Finding:
        """One run. Raises StoreUnavailable."""
        if self._expected is None:
            self._expected = await self._scored(MemoryStore(state_ttl=3600, result_ttl=3600))
        return judge(await self._scored(self._store), self._expected)

    async def _looked(self) -> Finding:
        try:
            return await self.look()
        except OnsetError as error:
            return Finding("failed", reason=error.detail)
        except Exception as error:  # a bug must not end the watch; it is counted and logged
            self._metrics.bug(error, task="canary")
            return Finding("failed", reason=repr(error))

    async def _scored(self, store: StateStore) -> list[Result | ItemError]:
        detector = self._detector.under(f"@{self._detector.name}")  # a model's name begins with a letter or a digit
        policy = Policy(alpha=ALPHA, strict=True, silence=False, tau=detector.manifest.age_constant)
        # The metrics of this scorer are read by nobody: what is counted is what users sent.
        scorer = Scorer(detector, policy, store, Metrics(), Limits(copies_bytes=0, max_streams=None), alerting=False)
        scorer.start()
        try:
            await scorer.streams.forget(self._stream_id)
            answers: list[Result | ItemError] = []
            for start in range(0, len(self._events), PIECE):
                answers += await scorer.score(self._events[start : start + PIECE])
            await scorer.streams.forget(self._stream_id)
            return answers
        finally:
            await scorer.drain(0)

    def _note(self, finding: Finding) -> None:
        model, metrics = self._detector.name, self._metrics
        metrics.canary_runs.labels(model, finding.result).inc()
        metrics.canary_ok.labels(model).set(finding.result == "ok")
        metrics.canary_run.labels(model).set(self._clock())
        metrics.canary_score.labels(model, "quiet").set(finding.quiet_score)
        metrics.canary_score.labels(model, "fault").set(finding.fault_score)
        if finding.result != self._last:
            say = log.info if finding.result == "ok" else log.error
            say(
                f"canary_{finding.result}", model=model, quiet=finding.quiet_score, fault=finding.fault_score, reason=finding.reason or None
            )
        self._last = finding.result


def judge(answers: list[Result | ItemError], expected: list[Result | ItemError]) -> Finding:
    """What the answers to one run's events mean, `expected` being those of the same scorer over memory."""
    failed = next((answer for answer in answers if isinstance(answer, ItemError)), None)
    if failed is not None:
        return Finding("failed", reason=str(failed))
    results = [answer for answer in answers if isinstance(answer, Result)]
    scores = np.array([math.nan if result.anomaly_score is None else result.anomaly_score for result in results])
    quiet, fault = float(np.nanmedian(scores[:-FAULT])), scores[-FAULT:]
    found = quiet, float(np.nanmax(fault))
    if quiet > float(np.nanmedian(fault)):
        return Finding("inverted", *found)
    if not any((result.alert_score or 0) > THRESHOLD for result in results[-FAULT:]):
        return Finding("blind", *found)
    if answers != expected:
        first = next(i for i, (answer, wanted) in enumerate(zip(answers, expected, strict=True)) if answer != wanted)
        return Finding("differs", *found, reason=f"event {first} of {len(answers)}: {answers[first]} in place of {expected[first]}")
    return Finding("ok", *found)


def _events(detector: Detector, stream_id: str) -> list[Event]:
    """The same readings at every run, of the year 1970: a stream of that time is not waited for."""
    F, quiet = detector.features, detector.manifest.warmup + EVIDENCE
    rng = np.random.default_rng(1)
    t = np.arange(quiet + FAULT)[:, None]
    x = 10 + np.sin(2 * np.pi * (t / 40 + np.arange(F) / F)) + 0.3 * rng.normal(size=(quiet + FAULT, F))
    x[quiet:] += SHIFT
    names = detector.manifest.feature_names
    rows = [dict(zip(names, row, strict=True)) for row in x.tolist()]
    return [Event(stream_id=stream_id, values=dict(row), timestamp=_CADENCE * i) for i, row in enumerate(rows)]
