"""Events that the benchmarks send: bodies of 1,000 events with one or several events a stream, and single events.

Templates are made once; each sending puts its time into them by `bytes.replace`, so that a load generator costs little.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence

import numpy as np

from bench.load import Request, post

BODY_EVENTS = 1000
VALUES = 32
"""New values a stream has before they come again. One that comes over and over is a sensor that is stuck: all streams have an alert
open after a while, of two that take turns half of them, of eight a fifth, and what is measured is the cost of alerts. Of 32 as many as
of new ones."""
NDJSON, JSON = "application/x-ndjson", "application/json"
SPACING_SECONDS = 0.001
"""Between a stream's events in one body; the last is of the time of sending."""


def stream_id(stream: int) -> str:
    return f"bench-{stream:06d}"


def event_line(stream: int, values: Iterable[float], names: Sequence[str] = ("value",), place: int = 0) -> bytes:
    """One event as a line; `place` counts a stream's events within the body."""
    numbers = ",".join(f'"{name}":{value}' for name, value in zip(names, values, strict=True))
    return b'{"stream_id":"%s","values":{%s},"timestamp":%s}\n' % (stream_id(stream).encode(), numbers.encode(), _stamp(place))


def bodies(streams: Sequence[int], each: int = 1, names: Sequence[str] = ("value",), passes: int = 0, seed: int = 0) -> list[bytes]:
    """NDJSON templates that pass over `streams` with new values each time; in a body `each` events of a stream, in turn as sensors tick.

    Without `passes` as many as give each stream VALUES of them.
    """
    width = BODY_EVENTS // each
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(passes or -(-VALUES // each)):
        for first in range(0, len(streams), width):
            some = streams[first : first + width]
            values = rng.normal(20.0, 1.0, (each, len(some), len(names))).round(3).tolist()
            made.append(b"".join(event_line(i, values[k][j], names, k) for k in range(each) for j, i in enumerate(some)))
    return made


def singles(streams: Sequence[int]) -> list[bytes]:
    """One event a template, stream after stream, VALUES times with new values."""
    values = np.random.default_rng(1).normal(20.0, 1.0, (VALUES, len(streams), 1)).round(3).tolist()
    return [event_line(i, row) for some in values for i, row in zip(streams, some, strict=True)]


def sent(template: bytes, each: int = 1) -> bytes:
    """A template with the time of sending; a stream's `each` events end with it."""
    now = time.time()
    for place in range(each):
        template = template.replace(_stamp(place), b"%.3f" % (now - SPACING_SECONDS * (each - 1 - place)))
    return template


def requests(templates: Sequence[bytes], content_type: str = NDJSON, each: int = 1, tenants: Sequence[str] = ("",)) -> Request:
    """Requests from the templates, again and again, each with its time of sending; the tenants take turns as the templates do."""
    posts = [post("/v1/events", template, content_type, tenants[i % len(tenants)]) for i, template in enumerate(templates)]
    turns = itertools.cycle(posts)
    return lambda: sent(next(turns), each)


def _stamp(place: int) -> bytes:
    """Stands for the time of sending; of the same length, so that Content-Length holds."""
    return b"17%08d.000" % place
