"""OTLP's log requests are read as OpenTelemetry's own library writes them, in protobuf and JSON alike."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse

from service.errors import BadBody, TooLarge
from service.otlplogs import decode_json, decode_protobuf, severity_name
from service.otlpwire import MAX_DEPTH, encode_response, text_of
from service.wire import varint
from tests.pushes import export, record

NOW = 1_790_000_000_123_456_789
TRACE, SPAN = bytes(range(16)), bytes(range(8))


def as_json(request: ExportLogsServiceRequest) -> bytes:
    """As OTLP has it: unlike protobuf's own JSON its ids are hexadecimal."""
    made = MessageToDict(request, use_integers_for_enums=True)
    for logs in made.get("resourceLogs", []):
        for scope in logs.get("scopeLogs", []):
            for sent, one in zip(_records(request), scope.get("logRecords", []), strict=False):
                one |= {name: value for name, value in (("traceId", sent.trace_id.hex()), ("spanId", sent.span_id.hex())) if value}
    return json.dumps(made).encode()


def _records(request: ExportLogsServiceRequest) -> list[Any]:
    return [one for logs in request.resource_logs for scope in logs.scope_logs for one in scope.log_records]


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(WORDS, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc", max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=200)
@given(VALUES, st.dictionaries(st.text("abc.", max_size=4), VALUES, max_size=3), st.integers(0, 2**63))
def test_both_forms_say_what_was_sent(body: Any, attributes: dict[str, Any], time: int) -> None:
    request = export(record(body, time, attributes=attributes, trace_id=TRACE, severity_number=9), resource=attributes, scope="s", k="v")
    [by_protobuf] = decode_protobuf(request.SerializeToString(), most=10)
    [by_json] = decode_json(as_json(request), most=10)
    assert by_protobuf == by_json
    assert (by_protobuf.body, by_protobuf.attributes, by_protobuf.origin.resource) == (body, attributes, attributes)
    assert (by_protobuf.nanoseconds, by_protobuf.trace_id, by_protobuf.severity) == (time, TRACE.hex(), "INFO")
    assert (by_protobuf.origin.scope, by_protobuf.origin.scope_attributes) == ("s", {"k": "v"})


def test_what_is_left_out_has_its_default_and_the_time_of_observation_stands_in() -> None:
    observed = record("a", observed_time_unix_nano=NOW)
    request = export(observed, record("b", 5, observed_time_unix_nano=NOW), record(severity_text="warn", event_name="e"))
    for records in (decode_protobuf(request.SerializeToString(), most=10), decode_json(as_json(request), most=10)):
        assert [one.nanoseconds for one in records] == [NOW, 5, 0]
        assert [(one.body, one.severity, one.event_name) for one in records] == [("a", "", ""), ("b", "", ""), (None, "warn", "e")]
    assert decode_protobuf(b"", most=10) == decode_json(b"{}", most=10) == []


def test_null_is_a_fields_default_as_protobufs_json_has_it() -> None:
    nothing = dict.fromkeys(("observedTimeUnixNano", "severityNumber", "severityText", "attributes", "traceId", "spanId", "eventName"))
    sent = nothing | {"timeUnixNano": "1764120000000000000", "body": {"stringValue": "a line"}}
    logs = [{"scope": None, "logRecords": [sent, nothing]}, {"scope": {"name": None, "attributes": None}, "logRecords": None}]
    request = {"resourceLogs": [{"resource": None, "scopeLogs": None}, {"resource": {"attributes": None}, "scopeLogs": logs}]}
    read = decode_json(json.dumps(request).encode(), most=10)
    assert read == decode_protobuf(ParseDict(request, ExportLogsServiceRequest()).SerializeToString(), most=10)
    assert [one.body for one in read] == ["a line", None]
    assert decode_json(b'{"resourceLogs": null}', most=10) == []
    within = [
        {"kvlistValue": {"values": [{"key": None, "value": {"intValue": "1"}}]}},
        {"kvlistValue": {"values": None}},
        {"arrayValue": {"values": None}},
    ]
    nested = {"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"arrayValue": {"values": within}}}]}]}]}
    [one] = decode_json(json.dumps(nested).encode(), most=10)
    assert (
        one.body == decode_protobuf(ParseDict(nested, ExportLogsServiceRequest()).SerializeToString(), most=10)[0].body == [{"": 1}, {}, []]
    )


def test_bytes_are_base64_and_structures_are_json_in_a_line() -> None:
    request = export(record(b"\x00\xff"), record({"user": "anna", "codes": [1, 2.5, True]}), record("plain"), record())
    for records in (decode_protobuf(request.SerializeToString(), most=10), decode_json(as_json(request), most=10)):
        assert [text_of(one.body) for one in records] == ["AP8=", '{"user":"anna","codes":[1,2.5,true]}', "plain", ""]


def test_severities_have_the_names_of_the_specification() -> None:
    names = {0: "", 1: "TRACE", 4: "TRACE4", 9: "INFO", 17: "ERROR", 18: "ERROR2", 24: "FATAL4", 25: ""}
    assert {number: severity_name(number) for number in names} == names


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Input data was truncated"),
        (b"[1]", "Expected `object`"),
        (b'{"resourceLogs": 3}', r"\$.resourceLogs"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"stringValue": 7}}]}]}]}', "7.*where a value is"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"timeUnixNano": "soon"}]}]}]}', "timeUnixNano is 'soon'"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"arrayValue": {"values": [1]}}}]}]}]}', "1.*where a value is"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"kvlistValue": {"values": [{"key": 1}]}}}]}]}]}', "where a value is"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"doubleValue": "x"}}]}]}]}', "where a value is"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"doubleValue": 1%s}}]}]}]}' % (b"0" * 400), "where a value is"),
        (b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"body": {"intValue": 1.5}}]}]}]}', "intValue is '1.5'"),
    ],
)
def test_json_that_is_no_request_is_refused_by_what_is_wrong(content: bytes, says: str) -> None:
    with pytest.raises(BadBody, match=says):
        decode_json(content, most=10)


def test_every_cut_of_a_request_is_refused_or_read_and_nothing_else_is_raised() -> None:
    whole = export(record("a line", NOW, attributes={"k": [1, {"b": 2.5}]}, trace_id=TRACE), record("b", NOW)).SerializeToString()
    for end in range(len(whole)):
        with contextlib.suppress(BadBody):
            assert len(decode_protobuf(whole[:end], most=10)) < 2
    with pytest.raises(BadBody, match="ExportLogsServiceRequest: what begins at byte"):
        decode_protobuf(whole[:-1], most=10)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for decode in (decode_protobuf, decode_json):
        with contextlib.suppress(BadBody):
            decode(content, most=10)


def test_values_one_in_the_other_are_read_to_a_stated_depth() -> None:
    nested: Any = "x"
    for _ in range(MAX_DEPTH):
        nested = [nested]
    deeper = export(record([nested]))
    assert decode_protobuf(export(record(nested)).SerializeToString(), most=1)[0].body == nested
    with pytest.raises(BadBody, match="one in the other"):
        decode_protobuf(deeper.SerializeToString(), most=1)
    with pytest.raises(BadBody, match="one in the other"):
        decode_json(as_json(deeper), most=1)


def test_more_records_than_allowed_are_refused_in_either_form() -> None:
    request = export(*[record("a", NOW)] * 4)
    for decode, content in ((decode_protobuf, request.SerializeToString()), (decode_json, as_json(request))):
        assert len(decode(content, most=4)) == 4
        with pytest.raises(TooLarge, match=r"More than 3 log records .* .ONSET_MAX_LINES."):
            decode(content, most=3)


@pytest.mark.parametrize(("rejected", "message"), [(0, ""), (3, ""), (0, "look out"), (300, "3 late, ü" * 30)])
def test_the_answer_is_what_opentelemetrys_library_reads(rejected: int, message: str) -> None:
    response = ExportLogsServiceResponse.FromString(encode_response(rejected, message))
    assert (response.partial_success.rejected_log_records, response.partial_success.error_message) == (rejected, message)
    assert response.HasField("partial_success") == bool(rejected or message)


def inside(content: bytes, *tags: int) -> bytes:
    for tag in reversed(tags):
        content = bytes([tag]) + varint(len(content)) + content
    return content


@pytest.mark.parametrize("tags", [(), (0x0A,), (0x0A, 0x0A), (0x0A, 0x12), (0x0A, 0x12, 0x12, 0x32)])
def test_half_a_megabyte_of_nothing_takes_little_more_to_read(tags: tuple[int, ...]) -> None:
    contents = [inside(bytes([tag, 0]) * 250_000, *tags) for tag in (0x0A, 0x12, 0x32)]
    tracemalloc.start()
    for content in contents:
        with contextlib.suppress(TooLarge):
            decode_protobuf(content, most=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6, f"{peak / 1e6:.0f} MB"
