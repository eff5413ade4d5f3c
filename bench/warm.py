"""A store full of streams that have long been warm, so that what is measured is what a running service does.

States come from the real step over normal readings, one event every GAP seconds, and are written by the service's own commit. With that
cadence every stream is waited for (the commit keeps its watch), and none falls silent while a benchmark runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from bench.traffic import stream_id
from service.detector import Detector
from service.events import Readings
from service.policy import Policy
from service.rounds import advance
from service.silence import waits
from service.state import Rows, StateCodec
from service.stores import Write
from service.stores.redis import RedisStore

GAP = 300.0
KINDS = 100
"""Streams that are really stepped; the others are copies of them."""
EVENTS_BEYOND_WARMUP = 2000
"""Half an hour at one a second. Young streams, with the learning allowance, have onsets in more than one event of a hundred, and a stream
with an open alert takes two steps an event: what is measured of them is the cost of alerts."""
TTL_SECONDS = 30 * 24 * 3600


def warm_rows(detector: Detector, kinds: int = KINDS) -> Rows:
    """States of `kinds` streams well beyond their warm-up, the last event GAP seconds ago. Made once for each detector."""
    made = _made.get((detector.sha256, kinds))
    if made is None:
        made = _made[detector.sha256, kinds] = _stepped(detector, kinds)
    return made.copy()


_made: dict[tuple[str, int], Rows] = {}


def _stepped(detector: Detector, kinds: int) -> Rows:
    codec = StateCodec(detector.features, detector.state_size, detector.fingerprint)
    rows = codec.fresh(kinds)
    events = detector.manifest.warmup + EVENTS_BEYOND_WARMUP
    rng, slots = np.random.default_rng(7), np.arange(kinds)
    policy, began = policy_of(detector), time.time() - GAP * events
    for i in range(events):
        readings = Readings(
            [""] * kinds,
            rng.normal(20.0, 1.0, (kinds, detector.features)).astype(np.float32),
            np.full(kinds, began + GAP * i),
            np.ones(kinds, np.bool_),
            np.full(kinds, -1, np.int64),
            np.zeros(kinds, np.uint64),
        )
        advance(detector, policy, rows, readings, slots)
    return rows


def policy_of(detector: Detector) -> Policy:
    """As the service makes it from its defaults."""
    return Policy(tau=detector.manifest.age_constant)


async def fill(url: str, detector: Detector, streams: Sequence[int]) -> float:
    """Write the states of these streams to an empty store; returns the streams written a second."""
    codec = StateCodec(detector.features, detector.state_size, detector.fingerprint)
    kinds = warm_rows(detector)
    store = RedisStore(url, state_ttl=TTL_SECONDS, result_ttl=600)
    await store.open()
    began = time.perf_counter()
    try:
        for first in range(0, len(streams), len(kinds)):
            some = streams[first : first + len(kinds)]
            rows = kinds[: len(some)].copy()
            rows["deadline"] = -(time.time() - GAP)  # they came before: who has come once is not waited for yet
            watches = waits(rows, Policy.alpha, time.time())
            values = codec.encode(rows)
            writes = [Write(stream_id(i), b"", value, watch=watch) for i, value, watch in zip(some, values, watches, strict=True)]
            if not all(await store.commit(detector.name, writes)):
                raise SystemExit("The store to be filled was not empty.")
    finally:
        await store.close()
    return len(streams) / (time.perf_counter() - began)
