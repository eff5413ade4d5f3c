"""Messages of next to nothing: as many as a body holds of two bytes each are refused, at every door that reads protobuf."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO, LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics

from service import lokipush, otlplogs, otlpmetrics, prompb
from service.errors import TooLarge
from service.wire import FEW_FIELDS, varint

Decode = Callable[..., Any]


def _nobody(key: bytes) -> Any:
    return None


def _name(*labels: Any) -> Any:
    return labels


LOGS = partial(otlplogs.decode_protobuf, most=100_000)
METRICS = partial(otlpmetrics.decode_protobuf, most=10_000)
LOKI = partial(lokipush.decode_protobuf, most=100_000)
WRITE_1 = partial(prompb.decode_1, find=_nobody, name=_name, most=10_000)
WRITE_2 = partial(prompb.decode_2, find=_nobody, name=_name, most=10_000)


def within(tags: bytes, inner: bytes) -> bytes:
    """A message in a message …, by the tags of their fields."""
    for tag in reversed(tags):
        inner = bytes((tag,)) + varint(len(inner)) + inner
    return inner


@pytest.mark.parametrize(
    ("decode", "around", "tag"),
    [
        (LOGS, b"", 0x0A),  # resource_logs
        (LOGS, b"\x0a", 0x12),  # scope_logs
        (LOGS, b"\x0a\x12\x0a", 0x1A),  # attributes of a scope
        (LOGS, b"\x0a\x12\x12", 0x32),  # attributes of a record
        (LOGS, b"\x0a\x12\x12\x2a\x2a", 0x0A),  # values of an array, the body of a record
        (LOGS, b"\x0a\x12\x12", 0x10),  # severities of a record
        (METRICS, b"", 0x0A),
        (METRICS, b"\x0a\x12", 0x12),  # metrics
        (METRICS, b"\x0a\x12\x12\x4a", 0x0A),  # points of a histogram
        (METRICS, b"\x0a\x12\x12\x2a\x0a", 0x3A),  # attributes of a point
        (LOKI, b"", 0x7A),  # of no meaning
        (LOKI, b"\x0a\x12", 0x1A),  # metadata of a line
        (WRITE_1, b"", 0x1A),  # metadata
        (WRITE_1, b"\x0a", 0x1A),  # exemplars of a series
        (WRITE_1, b"\x0a\x0a", 0x0A),  # names of a label
        (WRITE_1, b"\x0a\x12", 0x10),  # times of a sample
        (WRITE_2, b"", 0x7A),
        (WRITE_2, b"\x2a", 0x2A),  # metadata of a series
    ],
)
def test_a_body_of_fields_of_two_bytes_is_refused_at_every_depth(decode: Decode, around: bytes, tag: int) -> None:
    fields = FEW_FIELDS + 1
    with pytest.raises(TooLarge, match=f"more than {FEW_FIELDS} fields in"):
        decode(within(around, bytes((tag, 0)) * fields))
    decode(within(around, bytes((tag, 0)) * (5000 if decode in (METRICS, WRITE_1, WRITE_2) else 50_000)))


@pytest.mark.parametrize("name", ["k", "line"])
def test_records_and_points_with_short_attributes_are_read(name: str) -> None:
    """As many as a Collector sends at once (8,192), and more; refused, they were lost: what a 413 is said of is not sent again."""
    values = [AnyValue(bool_value=True), AnyValue(int_value=200), AnyValue(string_value="a")]
    attributes = [KeyValue(key=f"{name}{i}", value=values[i % 3]) for i in range(12)]
    record = LogRecord(time_unix_nano=1_790_000_000_123_456_789, severity_number=SEVERITY_NUMBER_INFO, attributes=attributes)
    logs = ExportLogsServiceRequest(resource_logs=[ResourceLogs(scope_logs=[ScopeLogs(log_records=[record] * 10_000)])])
    assert len(LOGS(logs.SerializeToString())) == 10_000
    point = NumberDataPoint(time_unix_nano=1_790_000_000_123_456_789, as_double=1.5, attributes=attributes)
    gauge = Metric(name="m", gauge=Gauge(data_points=[point] * 10_000))
    metrics = ExportMetricsServiceRequest(resource_metrics=[ResourceMetrics(scope_metrics=[ScopeMetrics(metrics=[gauge])])])
    assert len(METRICS(metrics.SerializeToString()).points) == 10_000


def test_six_megabytes_of_records_with_many_short_attributes_are_read() -> None:
    attributes = [KeyValue(key=f"http.key.{i}", value=AnyValue(string_value=f"GET {i}")) for i in range(20)]
    record = LogRecord(time_unix_nano=1_790_000_000_123_456_789, body=AnyValue(string_value="Took 12 ms"), attributes=attributes)
    scope = ScopeLogs(log_records=[record] * 13_000)
    content = ExportLogsServiceRequest(resource_logs=[ResourceLogs(scope_logs=[scope])]).SerializeToString()
    assert len(content) > 6e6
    assert len(LOGS(content)) == 13_000
