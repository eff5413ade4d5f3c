"""Loki's door: POST /loki/api/v1/push takes what Promtail, Alloy, Fluent Bit, Vector and others send to a Loki, as JSON or protobuf.

    body ─► snappy and protobuf, or JSON (lokipush.py) ─► stream ids ─► shipped.py ─► 204, or what was refused

    status   when                                                                                   the shipper
    204      everything was taken: scored, a duplicate, late, or blank                              goes on
    400      some lines can never be taken: in the future, of labels that cannot be                 drops the request; its good lines
             used, one stream too many; or the body cannot be read, and then nothing is scored      are scored
    413 415  over a limit; neither of the two formats                                               drops it
    422      it names no model that takes lines, and there is none to take                          drops it
    429      the queue is full                                                                      sends it again
    503      the store does not answer, or other replicas were faster                               sends all of it again

A late line is older than the last one of its stream. Loki takes such lines (up to an hour old), so shippers know no answer to a refusal:
they are taken, counted as late (onset_events_total), and not scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from starlette.responses import Response

from service.errors import BadEvent, UnsupportedMedia
from service.intake import Incoming
from service.lokipush import Entry, Label, Pushed, decode_json, decode_protobuf
from service.names import checked, stream_id_of
from service.problems import partly_refused, partly_written, respond
from service.prompb import unpack, unpacked_size
from service.shipped import JSON, Naming, Shipped, Shipping, Tally, beside
from service.wire import PROTOBUF

DOOR = "loki"
PATH = "/loki/api/v1/push"

Name = Callable[[Entry], str]
"""The stream that an entry is of. Raises BadEvent."""


class Streams:
    """Labels → stream ids: all labels as PromQL writes them, or a template of labels and structured metadata."""

    def __init__(self, template: str) -> None:
        """`template` is ONSET_LOKI_STREAM, "" = all labels. Raises BadSetting."""
        self._naming = Naming("ONSET_LOKI_STREAM", template) if template else None

    def of(self, sent: Sequence[Label]) -> Name:
        """How entries with these labels are named. Raises BadEvent."""
        labels, naming = checked(sent), self._naming
        whole = stream_id_of(labels)
        if naming is not None:
            owner = whole or "a stream without labels"
            return lambda entry: naming.name(lambda name: labels.get(name) or entry.metadata.get(name, ""), owner)
        if not labels:
            raise BadEvent("A stream has no labels.", "labels")
        return lambda entry: whole


class Loki:
    """The route's handler. At most `most` lines, and streams, a request."""

    def __init__(self, shipping: Shipping, streams: Streams, most: int) -> None:
        self._shipping, self._streams, self._most = shipping, streams, most

    async def push(self, request: Incoming) -> Response:
        """Score what a shipper sends."""
        started = time.perf_counter()
        packed = _is_protobuf(request)
        model = self._shipping.model.of(request)
        tally = Tally()
        async with self._shipping.door.sent(request, unpacked_size if packed else None, model) as sent:
            size = unpacked_size(sent.content) if packed else len(sent.content)
            shipped, lines = await beside(partial(self._read, sent.content, packed, tally), size)
            await self._shipping.score(sent, shipped, tally)
        self._shipping.answered(time.perf_counter() - started)
        return _answer(tally, lines)

    def _read(self, content: bytes, packed: bool, tally: Tally) -> tuple[Shipped, int]:
        """The lines of a body by stream, and how many it has. Raises BadBody, TooLarge."""
        decoded = decode_protobuf(unpack(content), most=self._most) if packed else decode_json(content, most=self._most)
        return self._named(decoded, tally), sum(len(pushed.entries) for pushed in decoded)

    def _named(self, decoded: Sequence[Pushed], tally: Tally) -> Shipped:
        shipped = Shipped()
        for pushed in decoded:
            try:
                if pushed.error is not None:
                    raise pushed.error
                name = self._streams.of(pushed.labels)
            except BadEvent as error:
                tally.refuse(error, len(pushed.entries))
                continue
            for entry in pushed.entries:
                try:
                    shipped.add(name(entry), entry.nanoseconds, entry.line)
                except BadEvent as error:
                    tally.refuse(error)
        return shipped


def _is_protobuf(request: Incoming) -> bool:
    """Whether the body is protobuf, or else JSON. Raises UnsupportedMedia."""
    if request.media == JSON:
        return False
    if request.media not in (PROTOBUF, ""):
        raise UnsupportedMedia(f"Content-Type '{request.media[:64]}' is not read here; send {JSON}, or {PROTOBUF} packed with snappy.")
    encoding = (request.header(b"content-encoding") or "snappy").lower()
    if encoding != "snappy":
        raise UnsupportedMedia(f"Content-Encoding '{encoding[:64]}' is not read here with {PROTOBUF}; it is always snappy.")
    return True


def _answer(tally: Tally, lines: int) -> Response:
    if tally.again:
        detail = f"{tally.again} of {lines} lines were not written, other replicas were faster: send the request again."
        return respond(partly_written("lines", detail))
    if tally.refused:
        refused = sum(tally.refused.values())
        detail = f"{refused} of {lines} lines were refused: {tally.reasons}." + (" The others were taken." if refused < lines else "")
        return respond(partly_refused("lines", detail))
    return Response(status_code=204)
