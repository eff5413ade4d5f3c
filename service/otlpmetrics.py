"""OTLP's requests of metrics on the wire: protobuf or JSON → points. Knows neither streams nor scores.

    ExportMetricsServiceRequest 1 resource_metrics  1 resource {1 attributes}
                                                    2 scope_metrics  2 metrics  1 name · 5 gauge · 7 sum
                                                                                9 histogram · 10 exponential_histogram · 11 summary
    each of these {1 data_points}, a sum also {2 aggregation_temporality, 3 is_monotonic}
    NumberDataPoint  3 time_unix_nano fixed64 · 4 as_double · 6 as_int sfixed64 · 7 attributes · 8 flags

Attributes and values are in otlpwire.py. Points of histograms and summaries are only counted.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from service.errors import BadBody, TooLarge
from service.otlpwire import NONE, Attributes, Json, KeyValue, Origin, Reader, Resource, Value, Whole, attributes_of, whole
from service.wire import FIXED64, LENGTH, VARINT, read_varint, reading

MESSAGE = "opentelemetry.proto.collector.metrics.v1.ExportMetricsServiceRequest"
CUMULATIVE = 2
"""AggregationTemporality: a sum since the process began, and not since the last export."""
NO_VALUE = 1
"""DataPointFlags: the series has ended."""

_GAUGE, _SUM, _DISTRIBUTIONS = 5, 7, (9, 10, 11)
_DOUBLE = struct.Struct("<d")


class Point(NamedTuple):
    """A number of a gauge or a sum."""

    origin: Origin
    metric: str
    counter: bool
    """Whether it only rises, but for restarts."""
    attributes: Attributes
    nanoseconds: int
    """Since 1970; 0 = not said."""
    value: float
    ended: bool
    """It has no value, and none will come."""


@dataclass
class Exported:
    """What one request brought."""

    points: list[Point] = field(default_factory=list)
    distributions: int = 0
    """Points of histograms and summaries."""


def decode_protobuf(content: bytes, *, most: int) -> Exported:
    """Raises BadBody, and TooLarge for more than `most` points."""
    with reading(MESSAGE):
        return _Reader(content, most).read()


def _too_many(most: int) -> TooLarge:
    return TooLarge(f"More than {most} points in one request (ONSET_MAX_BATCH_EVENTS): send smaller batches.")


# ── protobuf ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Reader(Reader):
    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self._most = most
        self._exported = Exported()

    def read(self) -> Exported:
        for start, end in self.parts(0, len(self.content), 1):
            resource = NONE
            for here, there in self.parts(start, end, 1):
                resource = self.attributes(here, there, 1)
            origin = Origin(resource)
            for here, there in self.parts(start, end, 2):
                for a, b in self.parts(here, there, 2):
                    self._metric(origin, a, b)
        return self._exported

    def _metric(self, origin: Origin, start: int, end: int) -> None:
        found = {number: (here, there) for number, kind, here, there in self.fields(start, end) if kind == LENGTH}
        name = self.text(*found[1]) if 1 in found else ""
        for number in (_GAUGE, _SUM):
            if number in found:
                here, there = found[number]
                counter = number == _SUM and self._is_counter(here, there)
                for a, b in self.parts(here, there, 1):
                    if len(self._exported.points) >= self._most:
                        raise _too_many(self._most)
                    self._exported.points.append(self._point(origin, name, counter, a, b))
        for number in _DISTRIBUTIONS:
            if number in found:
                self._exported.distributions += sum(1 for _ in self.parts(*found[number], 1))

    def _is_counter(self, start: int, end: int) -> bool:
        said = {number: read_varint(self.content, here)[0] for number, kind, here, _ in self.fields(start, end) if kind == VARINT}
        return said.get(2) == CUMULATIVE and bool(said.get(3))

    def _point(self, origin: Origin, name: str, counter: bool, start: int, end: int) -> Point:
        nanoseconds, value, flags = 0, math.nan, 0
        attributes: dict[str, Value] = {}
        for number, kind, here, there in self.fields(start, end):
            if kind == FIXED64 and number == 3:
                nanoseconds = int.from_bytes(self.content[here:there], "little")
            elif kind == FIXED64 and number == 4:
                [value] = _DOUBLE.unpack(self.content[here:there])
            elif kind == FIXED64 and number == 6:
                value = float(int.from_bytes(self.content[here:there], "little", signed=True))
            elif kind == VARINT and number == 8:
                flags, _ = read_varint(self.content, here)
            elif kind == LENGTH and number == 7:
                key, said = self.pair(here, there, 0)
                attributes[key] = said
        return Point(origin, name, counter, attributes or NONE, nanoseconds, value, bool(flags & NO_VALUE))


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _DataPoint(Json):
    time_unix_nano: Whole | None = None
    as_double: float | str | None = None
    as_int: Whole | None = None
    attributes: list[KeyValue] | None = None
    flags: int | None = None


class _Numbers(Json):
    data_points: list[_DataPoint] | None = None
    aggregation_temporality: Whole | None = None
    is_monotonic: bool | None = None


class _Distribution(Json):
    data_points: list[msgspec.Raw] | None = None


class _Metric(Json):
    name: str | None = None
    gauge: _Numbers | None = None
    sum: _Numbers | None = None
    histogram: _Distribution | None = None
    exponential_histogram: _Distribution | None = None
    summary: _Distribution | None = None


class _ScopeMetrics(Json):
    metrics: list[_Metric] | None = None


class _ResourceMetrics(Json):
    resource: Resource | None = None
    scope_metrics: list[_ScopeMetrics] | None = None


class _Request(Json):
    resource_metrics: list[_ResourceMetrics] | None = None


_request = msgspec.json.Decoder(_Request)


def decode_json(content: bytes, *, most: int) -> Exported:
    """Raises BadBody, and TooLarge for more than `most` points."""
    with reading(f"{MESSAGE} in JSON"):
        request = _request.decode(content)
    exported = Exported()
    for part in request.resource_metrics or ():
        origin = Origin(attributes_of(part.resource.attributes) if part.resource else NONE)
        for metric in [metric for scope in part.scope_metrics or () for metric in scope.metrics or ()]:
            _add(exported, origin, metric, most)
    return exported


def _add(exported: Exported, origin: Origin, metric: _Metric, most: int) -> None:
    for numbers in (metric.gauge, metric.sum):
        if numbers is None or numbers.data_points is None:
            continue
        if len(exported.points) + len(numbers.data_points) > most:
            raise _too_many(most)
        cumulative = numbers.aggregation_temporality in (CUMULATIVE, "AGGREGATION_TEMPORALITY_CUMULATIVE")
        counter = numbers is metric.sum and cumulative and bool(numbers.is_monotonic)
        exported.points += [_point(origin, metric.name or "", counter, point) for point in numbers.data_points]
    for distribution in (metric.histogram, metric.exponential_histogram, metric.summary):
        exported.distributions += len(distribution.data_points or ()) if distribution else 0


def _point(origin: Origin, name: str, counter: bool, point: _DataPoint) -> Point:
    value = math.nan
    if point.as_double is not None:
        try:
            value = float(point.as_double)
        except ValueError as error:
            raise BadBody(f"asDouble is {str(point.as_double)[:64]!r}, not a number.") from error
    elif point.as_int is not None:
        value = float(whole(point.as_int, "asInt", signed=True))
    nanoseconds = whole(point.time_unix_nano or 0, "timeUnixNano")
    return Point(origin, name, counter, attributes_of(point.attributes), nanoseconds, value, bool((point.flags or 0) & NO_VALUE))
