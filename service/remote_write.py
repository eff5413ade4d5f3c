"""Prometheus' door: POST /api/v1/write takes remote-write 1.0 and 2.0; every series is a stream, scored by a one-feature model.

    body ─► snappy, protobuf (prompb.py) ─► series by name and rule (names.py) ─► samples.py ─► 204, or what was refused

A sample's identity is its time in ms: sent again it is a duplicate, and counts as written. So a request may be repeated as a whole.

    status   when                                                                          the sender
    204      everything was taken: scored, a duplicate, or ignored on purpose (counted)    goes on
    400      some samples can never be taken: late, in the future, of a bad series, one    drops the request; its good samples are scored
             stream too many; or the body cannot be read, and then nothing is scored
    413 415  over a limit; not snappy, or not one of the two messages                      drops it, or tries the other message
    429      the queue is full                                                             waits if retry_on_http_429 is set
    503      the store does not answer, for all samples or some                            sends all of it again
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from starlette.responses import Response

from service.api import Door, Sent
from service.errors import UnsupportedMedia
from service.intake import Incoming
from service.metrics import Metrics
from service.names import Names, Series
from service.problems import Problem, partly_refused, partly_written, respond
from service.prompb import Written, decode_1, decode_2, unpack, unpacked_size
from service.samples import Ended, Samples, Tally, feature_of
from service.shipped import beside
from service.wire import PROTOBUF

DOOR = "remote_write"
PATH = "/api/v1/write"
MESSAGE_1, MESSAGE_2 = "prometheus.WriteRequest", "io.prometheus.write.v2.Request"
LARGE = 2 * 1024 * 1024
"""Bytes of a body, unpacked, from which it is read beside the event loop. A sender's usual one is smaller, and read in a few ms; one of
millions of fields that mean nothing here takes seconds.
"""
_Decode = Callable[..., Written[Series]]
_DECODERS: Mapping[str, _Decode] = {MESSAGE_1: decode_1, MESSAGE_2: decode_2}


class RemoteWrite:
    """The route's handler over a door. `ended` are told of the streams that stale markers have ended."""

    def __init__(self, door: Door, names: Names, max_events: int, metrics: Metrics, ended: Sequence[Ended], end_seconds: float) -> None:
        """At most `max_events` samples, and series, a request. An open alert outlives its stream's stale marker by `end_seconds`."""
        self._door, self._names, self._max_events = door, names, max_events
        self._samples = Samples(DOOR, metrics, ended, end_seconds)
        self._latency = metrics.latency.labels(DOOR)

    async def post(self, request: Incoming) -> Response:
        """Score what a Prometheus sends."""
        started = time.perf_counter()
        message = _message(request)
        async with self._door.sent(request, unpacked_size) as sent:
            tally, written = await self._take(sent, message)
        self._latency.observe(time.perf_counter() - started)
        return _answer(tally, written)

    async def _take(self, sent: Sent, message: str) -> tuple[Tally, Written[Series]]:
        feature = feature_of(sent.scorer)
        written = await beside(partial(self._read, sent.content, message), unpacked_size(sent.content), LARGE)
        return await self._samples.take(sent, written, feature), written

    def _read(self, content: bytes, message: str) -> Written[Series]:
        return _DECODERS[message](unpack(content), self._names.find, self._names.name, most=self._max_events)


def _message(request: Incoming) -> str:
    """Which message the body is. Raises UnsupportedMedia."""
    encoding = (request.header(b"content-encoding") or "snappy").lower()
    if encoding != "snappy":
        raise UnsupportedMedia(f"Content-Encoding '{encoding[:64]}' is not read here; send snappy.")
    sent = request.header(b"content-type") or ""
    media, *parameters = (part.strip() for part in sent.split(";"))
    names = [parameter[6:].strip('"') for parameter in parameters if parameter.lower().startswith("proto=")]
    message = names[0] if names else MESSAGE_1
    if media.lower() != PROTOBUF or message not in _DECODERS:
        shown = (request.header(b"content-type") or "")[:128]
        raise UnsupportedMedia(f"Content-Type '{shown}' is not read here; send {PROTOBUF}, alone or with proto={MESSAGE_1} or {MESSAGE_2}.")
    return message


def _answer(tally: Tally, written: Written[Series]) -> Response:
    refused = sum(tally.refused.values())
    headers = {
        "x-prometheus-remote-write-samples-written": str(len(written) - refused),
        "x-prometheus-remote-write-histograms-written": str(written.histograms),
        "x-prometheus-remote-write-exemplars-written": str(written.exemplars),
    }
    if not refused:
        return Response(status_code=204, headers=headers)
    response = respond(_problem(tally, refused, len(written)))
    response.headers.update(headers)
    return response


def _problem(tally: Tally, refused: int, sent: int) -> Problem:
    detail = f"{refused} of {sent} samples were refused: {tally.reasons}. The others were taken."
    if tally.again:
        return partly_written("samples", detail)
    return partly_refused("samples", detail)
