"""What shippers send: Loki's push requests in JSON and in the protobuf library's own bytes, and OTLP's by OpenTelemetry's library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint

Line = tuple[int, str] | tuple[int, str, Mapping[str, str]]
Streams = Mapping[str, Sequence[Line]]
"""Labels as Loki writes them → nanoseconds, line, and perhaps its structured metadata."""

_STRING, _UINT64, _MESSAGE, _OPTIONAL, _REPEATED = 9, 4, 11, 1, 3
_SCHEMA = {
    "LabelPair": [("name", 1, _OPTIONAL, _STRING, ""), ("value", 2, _OPTIONAL, _STRING, "")],
    "Entry": [
        ("timestamp", 1, _OPTIONAL, _MESSAGE, ".google.protobuf.Timestamp"),
        ("line", 2, _OPTIONAL, _STRING, ""),
        ("structuredMetadata", 3, _REPEATED, _MESSAGE, ".logproto.LabelPair"),
        ("parsed", 4, _REPEATED, _MESSAGE, ".logproto.LabelPair"),
    ],
    "Stream": [
        ("labels", 1, _OPTIONAL, _STRING, ""),
        ("entries", 2, _REPEATED, _MESSAGE, ".logproto.Entry"),
        ("hash", 3, _OPTIONAL, _UINT64, ""),
    ],
    "PushRequest": [("streams", 1, _REPEATED, _MESSAGE, ".logproto.Stream"), ("format", 2, _OPTIONAL, _STRING, "")],
}
"""pkg/push/push.proto of Loki: (name, number, label, type, message) of each field."""


@cache
def _push_request() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="push.proto", package="logproto", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    for kind, fields in _SCHEMA.items():
        made = file.message_type.add(name=kind)
        for field, number, label, type_, of in fields:
            made.field.add(name=field, number=number, label=label, type=type_, type_name=of or None)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("logproto.PushRequest"))


def push_protobuf(streams: Streams) -> bytes:
    """A PushRequest, without snappy."""
    request = _push_request()()
    for labels, lines in streams.items():
        stream = request.streams.add(labels=labels, hash=2**63 + 1)
        for nanoseconds, line, *metadata in lines:
            entry = stream.entries.add(line=line)
            entry.timestamp.seconds, entry.timestamp.nanos = divmod(nanoseconds, 1_000_000_000)
            for name, value in (metadata[0] if metadata else {}).items():
                entry.structuredMetadata.add(name=name, value=value)
    return bytes(request.SerializeToString())


def push_object(streams: Mapping[str, Sequence[Line]], labels: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """The same as JSON; `labels` has each stream's apart."""
    return {
        "streams": [
            {"stream": dict(labels[name]), "values": [[str(nanoseconds), *rest] for nanoseconds, *rest in lines]}
            for name, lines in streams.items()
        ]
    }


_KINDS = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value", bytes: "bytes_value"}


def any_value(value: Any) -> AnyValue:
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[any_value(one) for one in value]))
    if isinstance(value, dict):
        return AnyValue(kvlist_value=KeyValueList(values=attributes(value)))
    return AnyValue(**{_KINDS[type(value)]: value})


def attributes(pairs: Mapping[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=any_value(value)) for key, value in pairs.items()]


def record(body: Any = None, nanoseconds: int = 0, **fields: Any) -> LogRecord:
    """`attributes` among the fields is a mapping."""
    fields["attributes"] = attributes(fields.get("attributes", {}))
    made = LogRecord(time_unix_nano=nanoseconds, **fields)
    if body is not None:
        made.body.CopyFrom(any_value(body))
    return made


def export(*records: LogRecord, resource: Mapping[str, Any] | None = None, scope: str = "", **about_scope: Any) -> ExportLogsServiceRequest:
    """A request with one resource and one scope."""
    request = ExportLogsServiceRequest()
    logs = request.resource_logs.add()
    logs.resource.attributes.extend(attributes(resource or {}))
    scoped = logs.scope_logs.add()
    scoped.scope.name = scope
    scoped.scope.attributes.extend(attributes(about_scope))
    scoped.log_records.extend(records)
    return request


def point(value: float, nanoseconds: int, flags: int = 0, about: Mapping[str, Any] | None = None) -> NumberDataPoint:
    """`about` are its attributes."""
    number = {"as_int": value} if isinstance(value, int) else {"as_double": value}
    return NumberDataPoint(time_unix_nano=nanoseconds, flags=flags, attributes=attributes(about or {}), **number)


def gauge(name: str, *points: NumberDataPoint) -> Metric:
    return Metric(name=name, gauge=Gauge(data_points=points))


def export_metrics(*metrics: Metric, resource: Mapping[str, Any]) -> ExportMetricsServiceRequest:
    """A request with one resource and one scope."""
    request = ExportMetricsServiceRequest()
    one = request.resource_metrics.add()
    one.resource.attributes.extend(attributes(resource))
    one.scope_metrics.add(metrics=metrics)
    return request
