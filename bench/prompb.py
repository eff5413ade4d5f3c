"""Remote-write's messages in the protobuf library, made from their schema at run time: the independent side of tests and bench.remote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DOUBLE, INT64, STRING, UINT32, MESSAGE = 1, 3, 9, 13, 11
OPTIONAL, REPEATED = 1, 3

Schema = Mapping[str, Sequence[tuple[str, int, int, int, str]]]

# (name, number, label, type, message) of each field; histograms have the few fields that make one.
WRITE_1: Schema = {
    "Label": [("name", 1, OPTIONAL, STRING, ""), ("value", 2, OPTIONAL, STRING, "")],
    "Sample": [("value", 1, OPTIONAL, DOUBLE, ""), ("timestamp", 2, OPTIONAL, INT64, "")],
    "Exemplar": [("labels", 1, REPEATED, MESSAGE, "Label"), ("value", 2, OPTIONAL, DOUBLE, ""), ("timestamp", 3, OPTIONAL, INT64, "")],
    "Histogram": [("sum", 3, OPTIONAL, DOUBLE, ""), ("timestamp", 15, OPTIONAL, INT64, "")],
    "TimeSeries": [
        ("labels", 1, REPEATED, MESSAGE, "Label"),
        ("samples", 2, REPEATED, MESSAGE, "Sample"),
        ("exemplars", 3, REPEATED, MESSAGE, "Exemplar"),
        ("histograms", 4, REPEATED, MESSAGE, "Histogram"),
    ],
    "MetricMetadata": [("type", 1, OPTIONAL, UINT32, ""), ("metric_family_name", 2, OPTIONAL, STRING, "")],
    "WriteRequest": [("timeseries", 1, REPEATED, MESSAGE, "TimeSeries"), ("metadata", 3, REPEATED, MESSAGE, "MetricMetadata")],
}
WRITE_2: Schema = {
    "Sample": [*WRITE_1["Sample"], ("start_timestamp", 3, OPTIONAL, INT64, "")],
    "Exemplar": [
        ("labels_refs", 1, REPEATED, UINT32, ""),
        ("value", 2, OPTIONAL, DOUBLE, ""),
        ("timestamp", 3, OPTIONAL, INT64, ""),
    ],
    "Histogram": WRITE_1["Histogram"],
    "Metadata": [("type", 1, OPTIONAL, UINT32, ""), ("help_ref", 3, OPTIONAL, UINT32, ""), ("unit_ref", 4, OPTIONAL, UINT32, "")],
    "TimeSeries": [
        ("labels_refs", 1, REPEATED, UINT32, ""),
        ("samples", 2, REPEATED, MESSAGE, "Sample"),
        ("histograms", 3, REPEATED, MESSAGE, "Histogram"),
        ("exemplars", 4, REPEATED, MESSAGE, "Exemplar"),
        ("metadata", 5, OPTIONAL, MESSAGE, "Metadata"),
        ("created_timestamp", 6, OPTIONAL, INT64, ""),
    ],
    "Request": [("symbols", 4, REPEATED, STRING, ""), ("timeseries", 5, REPEATED, MESSAGE, "TimeSeries")],
}


@dataclass(frozen=True)
class Sent:
    """A series as a sender has it."""

    labels: Mapping[str, str]
    samples: Sequence[tuple[int, float]]  # ms since 1970, value
    type: int = 0
    """Of Metadata.MetricType, in 2.0."""
    exemplars: int = 0
    histograms: int = 0


@cache
def message(package: str, name: str) -> Any:
    """The class of one of the messages: ("prometheus", "WriteRequest"), ("io.prometheus.write.v2", "Request")."""
    schema = WRITE_1 if package == "prometheus" else WRITE_2
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    for kind, fields in schema.items():
        made = file.message_type.add(name=kind)
        for field, number, label, type_, of in fields:
            made.field.add(name=field, number=number, label=label, type=type_, type_name=f".{package}.{of}" if of else None)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))


def body_1(series: Iterable[Sent], metadata: int = 0) -> bytes:
    """A WriteRequest, without snappy."""
    request = message("prometheus", "WriteRequest")()
    for sent in series:
        made = request.timeseries.add()
        for name in sorted(sent.labels):
            made.labels.add(name=name, value=sent.labels[name])
        for milliseconds, value in sent.samples:
            made.samples.add(value=value, timestamp=milliseconds)
        for i in range(sent.exemplars):
            made.exemplars.add(value=1.0, timestamp=i + 1)
        for i in range(sent.histograms):
            made.histograms.add(sum=1.0, timestamp=i + 1)
    for i in range(metadata):
        request.metadata.add(type=1, metric_family_name=f"family_{i}")
    return bytes(request.SerializeToString())


def body_2(series: Iterable[Sent]) -> bytes:
    """A Request of 2.0, without snappy; symbols are in the order in which they are first needed, as Prometheus writes them."""
    request = message("io.prometheus.write.v2", "Request")()
    symbols: dict[str, int] = {"": 0}
    for sent in series:
        made = request.timeseries.add()
        for name in sorted(sent.labels):
            made.labels_refs.extend(symbols.setdefault(text, len(symbols)) for text in (name, sent.labels[name]))
        for milliseconds, value in sent.samples:
            made.samples.add(value=value, timestamp=milliseconds)
        for i in range(sent.exemplars):
            made.exemplars.add(value=1.0, timestamp=i + 1)
        for i in range(sent.histograms):
            made.histograms.add(sum=1.0, timestamp=i + 1)
        made.metadata.type = sent.type
        made.metadata.help_ref = symbols.setdefault(f"Help of {sent.labels.get('__name__')}.", len(symbols))
    request.symbols.extend(symbols)
    return bytes(request.SerializeToString())
