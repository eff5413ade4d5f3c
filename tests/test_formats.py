"""Msgpack and Arrow at the door: the same events in every format give the same answers, and no bytes do harm."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any
from unittest.mock import ANY

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import arrow
from service.api import Application
from service.bodies import Format, decode, decode_plain
from service.detector import Detector
from service.errors import BadBody, BadEvent, ItemError, OnsetError, TooLarge
from service.events import Event
from service.intake import DoorLimits
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from service.stores.memory import MemoryStore
from tests.doors import door_over
from tests.test_api import assert_problem
from tests.tiny import build_tiny

NOW = 1.7e9
MAX_EVENTS, MAX_BYTES = 1000, 1_000_000
FEATURES = ("flow", "pressure")
JSON, NDJSON, MSGPACK, ARROW = (form.value for form in Format)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector.load(build_tiny(tmp_path_factory.mktemp("two"), FEATURES))


@asynccontextmanager
async def door(detector: Detector) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a door over an empty memory store, whose clock stands still."""
    metrics, store = Metrics(), MemoryStore(state_ttl=60, result_ttl=60, clock=lambda: NOW)
    scorer = Scorer(detector, Policy(), store, metrics, Limits(max_streams=500), clock=lambda: NOW)
    app = Application()
    door_over({"tiny": scorer}, store, metrics, DoorLimits(MAX_BYTES, MAX_EVENTS, 10 * MAX_BYTES)).add_to(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://onset") as client:
        yield client
    await scorer.drain(2)


@pytest.fixture
async def client(two: Detector) -> AsyncIterator[httpx.AsyncClient]:
    async with door(two) as running:
        yield running


async def post(client: httpx.AsyncClient, content: bytes, form: str, accept: str = "*/*", path: str = "/v1/events") -> httpx.Response:
    return await client.post(path, content=content, headers={"content-type": form, "accept": accept})


def stream(table: Any, **options: Any) -> bytes:
    """A table as Arrow IPC."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def table(events: list[dict[str, Any]]) -> Any:
    columns = {name: pa.array([event["values"].get(name) for event in events], pa.float64()) for name in FEATURES}
    return pa.table(
        {
            "stream_id": pa.array([event["stream_id"] for event in events], pa.utf8()).dictionary_encode(),
            "timestamp": pa.array([event.get("timestamp") for event in events], pa.float64()),
            "event_id": pa.array([event.get("event_id") for event in events], pa.utf8()),
            "sequence": pa.array([event.get("sequence") for event in events], pa.int64()),
            **columns,
        }
    )


def written(events: list[dict[str, Any]], form: str) -> bytes:
    if form == ARROW:
        return stream(table(events))
    if form == NDJSON:
        return b"\n".join(msgspec.json.encode(event) for event in events)
    return msgspec.msgpack.encode(events) if form == MSGPACK else msgspec.json.encode(events)


def answers(response: httpx.Response) -> list[dict[str, Any]]:
    """A bulk's answers, whatever they are written in, in one shape."""
    form, content = response.headers["content-type"], response.content
    assert response.status_code == 200, content
    if form == ARROW:
        rows = pa.ipc.open_stream(content).read_all()
        rows.validate(full=True)
        return [_plain(row) for row in rows.to_pylist()]
    if form == NDJSON:
        return [_problem(json.loads(line)) for line in content.splitlines()]
    return [_problem(row) for row in (msgspec.msgpack.decode(content) if form == MSGPACK else json.loads(content))]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    problem = row.pop("problem")
    if problem is not None:
        assert not any(row.values())
        return {name: value for name, value in problem.items() if value not in ("", None)}
    return {name: {} if name in ("expected", "lower", "upper") and value is None else value for name, value in row.items()}


def _problem(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "index"}


numbers = st.none() | st.floats(-100, 100) | st.integers(-9, 9) | st.just(1e300)
events = st.fixed_dictionaries(
    {
        "stream_id": st.sampled_from(["a", "b", "ö" * 256, "x\n", "", "y" * 257]),
        "values": st.fixed_dictionaries(dict.fromkeys(FEATURES, numbers)),
    },
    optional={
        "timestamp": st.floats(NOW - 50, NOW) | st.sampled_from([1e300, NOW + 1e6]),
        "event_id": st.sampled_from(["e1", "e2", "bad\t"]),
        "sequence": st.integers(0, 5) | st.just(-1),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(events, max_size=30), st.lists(events, max_size=30))
def test_the_same_events_in_every_format_give_the_same_answers(
    two: Detector, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    # Columns have one order, and of two bad fields the first is named.
    first, second = (
        [
            {name: event[name] for name in ("stream_id", "event_id", "sequence", "timestamp") if name in event}
            | {"values": {name: event["values"][name] for name in FEATURES}}
            for event in events
        ]
        for events in (first, second)
    )

    async def scored(sent: str, accepted: str) -> list[list[dict[str, Any]]]:
        async with door(two) as client:
            return [answers(await post(client, written(events, sent), sent, accepted)) for events in (first, second)]

    expected = asyncio.run(scored(JSON, "*/*"))
    for sent, accepted in ((NDJSON, "*/*"), (MSGPACK, "*/*"), (ARROW, "*/*"), (ARROW, JSON), (MSGPACK, ARROW), (JSON, NDJSON)):
        assert asyncio.run(scored(sent, accepted)) == expected, (sent, accepted)


async def test_streams_that_are_ready_alert_and_repeat_alike_in_every_format(two: Detector) -> None:
    rng = np.random.default_rng(0)
    many: list[dict[str, Any]] = [
        {
            "stream_id": f"s{i % 7}",
            "values": {"flow": float(rng.normal()), "pressure": None if i % 5 == 0 else float(rng.normal())},
            "timestamp": NOW - 900 + i // 7,
            "event_id": f"e{i}",
        }
        for i in range(700)
    ]
    many[650]["values"]["flow"] = 1e6
    found = []
    for form in (JSON, ARROW):
        async with door(two) as client:
            found.append([answers(await post(client, written(many, form), form)) for _ in range(2)])
    assert found[0] == found[1]
    once, again = found[1]
    assert once[650]["is_anomaly"]
    assert once[650]["contributors"][0]["feature"] == "flow"
    assert once[695]["imputed"] == ["pressure"]
    assert all(row["duplicate"] for row in again)
    assert again[650]["p_value"] == once[650]["p_value"] > 0


async def test_one_bare_event_in_msgpack_is_answered_by_one_map(client: httpx.AsyncClient) -> None:
    content = msgspec.msgpack.encode({"stream_id": "a", "values": {"flow": 1}})
    for form in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack"):
        response = await post(client, content, form)
        assert response.headers["content-type"] == MSGPACK
        assert msgspec.msgpack.decode(response.content)["stream_id"] == "a"
    bad = msgspec.msgpack.encode({"stream_id": "a", "values": {"flow": "x"}})
    assert_problem(await post(client, bad, MSGPACK), 422, "not a number", "values.flow")


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("*/*", MSGPACK),
        ("text/html", MSGPACK),
        ("application/json", JSON),
        ("text/html, application/x-ndjson;q=0.9, */*;q=0.1", NDJSON),
        ("application/json;q=0.2, application/vnd.apache.arrow.stream;q=0.8", ARROW),
        ("application/json;q=nan, application/*", MSGPACK),
        ("application/json;q=0", MSGPACK),
    ],
)
async def test_the_reply_is_in_the_format_that_accept_wants_most(client: httpx.AsyncClient, accept: str, form: str) -> None:
    response = await post(client, msgspec.msgpack.encode([{"stream_id": "a", "values": {"flow": 1}}]), MSGPACK, accept)
    assert response.headers["content-type"] == form
    assert [row["stream_id"] for row in answers(response)] == ["a"]


async def test_the_path_and_the_idempotency_key_hold_for_columns(client: httpx.AsyncClient) -> None:
    rows = pa.table({"flow": [1.0, 2.0], "stream_id": pa.array(["p/1", "other"])})
    response = await client.post("/v1/streams/p/1/events", content=stream(rows), headers={"content-type": ARROW, "idempotency-key": "k"})
    good, bad = answers(response)
    assert (good["stream_id"], good["event_id"]) == ("p/1", "k#0")
    assert (bad["status"], bad["field"], bad["value"]) == (422, "stream_id", '"other"')
    bare = stream(pa.table({"values.pressure": pa.array([3], pa.int8())}))
    assert answers(await post(client, bare, ARROW, path="/v1/streams/p/1/events"))[0]["state_version"] == 2
    assert answers(await post(client, bare, ARROW))[0]["field"] == "stream_id"


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
async def test_a_timestamp_column_of_any_unit_and_zone_is_the_written_time(client: httpx.AsyncClient, unit: str) -> None:
    ticks = [1_600_000_000, None] if unit == "s" else [1_600_000_000_123 * 1000 ** (["ms", "us", "ns"].index(unit)), None]
    rows = pa.table({"stream_id": ["a", "a"], "flow": [1.0, 1.0], "timestamp": pa.array(ticks, pa.timestamp(unit, "Europe/Berlin"))})
    first, arrival = answers(await post(client, stream(rows), ARROW))
    assert first["timestamp"] == (1_600_000_000 if unit == "s" else 1_600_000_000.123)
    assert arrival["timestamp"] == NOW


TEXTS = [pa.utf8(), pa.large_utf8(), pa.string_view(), pa.dictionary(pa.int32(), pa.utf8()), pa.dictionary(pa.uint32(), pa.large_utf8())]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("codec", [None, "lz4", "zstd"])
async def test_ids_of_any_text_type_in_several_compressed_batches_are_read(client: httpx.AsyncClient, kind: Any, codec: str | None) -> None:
    parts = [pa.array([f"s{i}", f"s{i + 1}"], kind) for i in range(3)]
    rows = pa.table({"stream_id": pa.chunked_array(parts), "flow": pa.array([1.0] * 6, pa.float32())})
    found = answers(await post(client, stream(rows, compression=codec), ARROW))
    assert [row["stream_id"] for row in found] == ["s0", "s1", "s1", "s2", "s2", "s3"]


@pytest.mark.parametrize(
    ("columns", "field", "says"),
    [
        ({"flow": pa.array(["x"])}, "flow", "holds string"),
        ({"flow": pa.array([True])}, "flow", "holds bool"),
        ({"flow": [1.0], "stream_id": pa.array([7])}, "stream_id", "holds int64"),
        ({"flow": [1.0], "sequence": pa.array([1.5])}, "sequence", "integers"),
        ({"flow": [1.0], "timestamp": pa.array(["2026"])}, "timestamp", "seconds since 1970"),
        ({"flow": [1.0], "values.flow": [1.0]}, "values.flow", "twice"),
        ({"flow": [1.0], "__index_level_0__": [4]}, "__index_level_0__", "preserve_index=False"),
    ],
)
async def test_a_column_that_cannot_be_used_is_named(client: httpx.AsyncClient, columns: dict[str, Any], field: str, says: str) -> None:
    rows = pa.table({"stream_id": pa.array(["a"])} | columns)
    assert_problem(await post(client, stream(rows), ARROW), 422, says, field)


def test_a_decimal_beyond_all_floats_is_a_bad_row_however_far_beyond() -> None:
    for scale in (-400, -2_000_000_000):
        seven = pa.Array.from_buffers(pa.decimal128(10, scale), 1, [None, pa.py_buffer((7).to_bytes(16, "little"))])
        columns = columns_of(stream(pa.table({"stream_id": ["a"], "flow": seven})))
        assert (columns.bad[0].field, columns.bad[0].value) == ("values.flow", "Infinity")


async def test_decimals_of_a_database_are_numbers(client: httpx.AsyncClient) -> None:
    rows = pa.table({"stream_id": ["a", "a"], "flow": pa.array([Decimal("20.25"), None], pa.decimal128(10, 2))})
    first, missing = answers(await post(client, stream(rows), ARROW))
    assert first["contributors"][0]["actual"] == 20.25
    assert "flow" in missing["imputed"]


@pytest.mark.parametrize(("write", "what"), [(pa.feather.write_feather, "an Arrow file"), (pa.parquet.write_table, "a Parquet file")])
async def test_a_file_in_place_of_a_stream_is_told(client: httpx.AsyncClient, write: Callable[[Any, Any], None], what: str) -> None:
    sink = io.BytesIO()
    write(pa.table({"stream_id": ["a"], "flow": [1.0]}), sink)
    assert_problem(await post(client, sink.getvalue(), ARROW), 400, f"The body is {what}")


async def test_a_bad_row_names_its_field_and_value_and_its_neighbours_are_scored(client: httpx.AsyncClient) -> None:
    rows = pa.table(
        {
            "stream_id": ["a"] * 6,
            "flow": pa.array([1.0, float("nan"), float("inf"), None, 1.0, 1.0]),
            "sequence": pa.array([1, 2, 3, 4, 2**64 - 1, 6], pa.uint64()),
        }
    )
    found = answers(await post(client, stream(rows), ARROW))
    assert [row.get("field") for row in found] == [None, "values.flow", "values.flow", None, "sequence", None]
    assert [row.get("value") for row in found] == [None, "NaN", "Infinity", None, str(2**64 - 1), None]
    timeless = pa.table({"stream_id": ["a"] * 3, "flow": [1.0] * 3, "timestamp": pa.array([None, float("nan"), float("-inf")])})
    found = answers(await post(client, stream(timeless), ARROW))
    assert [(row.get("field"), row.get("value")) for row in found] == [(None, None), ("timestamp", "NaN"), ("timestamp", "-Infinity")]
    unknown = pa.table({"stream_id": ["a"], "flow": [1.0], "level": [2.0]})
    assert answers(await post(client, stream(unknown), ARROW))[0]["field"] == "values.level"


async def test_without_pyarrow_the_reply_says_what_to_install(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    content = stream(pa.table({"stream_id": ["a"], "flow": [1.0]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as on a machine where it is not installed
    assert_problem(await post(client, content, ARROW), 415, "pip install 'onset[arrow]'")
    event = msgspec.json.encode({"stream_id": "a", "values": {"flow": 1}})
    assert_problem(await post(client, event, JSON, ARROW), 415, "pip install 'onset[arrow]'")
    monkeypatch.undo()
    assert answers(await post(client, content, ARROW))[0]["state_version"] == 1  # nothing was scored before


def columns_of(content: bytes) -> Any:
    return arrow.decode(content, max_events=MAX_EVENTS, max_bytes=MAX_BYTES)


def test_what_unpacks_to_more_than_allowed_is_refused_before_it_is_unpacked() -> None:
    zeros = pa.table({"stream_id": pa.array(["a"] * 900), **{f"f{i}": np.zeros(900) for i in range(200)}})
    content = stream(zeros, compression="zstd")
    assert len(content) < MAX_BYTES / 5
    with pytest.raises(TooLarge, match="when unpacked"):
        columns_of(content)
    with pytest.raises(TooLarge, match="More than 1000 events"):
        columns_of(stream(pa.table({"flow": pa.nulls(2**16)})))
    with pytest.raises(TooLarge, match="batches"):
        columns_of(stream(pa.table({"flow": pa.chunked_array([[1.0]] * 400)})))
    with pytest.raises(TooLarge, match="columns"):
        columns_of(stream(pa.table({f"f{i}": pa.nulls(0) for i in range(1001)})))
    word = pa.array(["x" * 500_000])
    shared = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), word)
    for name in ("stream_id", "message"):  # one string, a thousand times: of lines each would be scored and sent back
        with pytest.raises(TooLarge, match=f"Column '{name}' is over"):
            columns_of(stream(pa.table({name: shared})))
    view = np.array([500_000, int.from_bytes(b"xxxx", "little"), 0, 0], "<i4")
    views = pa.Array.from_buffers(pa.string_view(), 1000, [None, pa.py_buffer(np.tile(view, 1000)), pa.py_buffer(b"x" * 500_000)])
    with pytest.raises(TooLarge):
        columns_of(stream(pa.table({"stream_id": views})))


def test_views_in_a_buffer_of_any_length_are_read() -> None:
    names = [f"s{i}" for i in range(23)]
    whole = stream(pa.table({"stream_id": pa.array(names, pa.string_view()), "flow": pa.array([1.0] * 23)}))
    length, longer = (number.to_bytes(8, "little") for number in (23 * 16, 23 * 16 + 1))
    assert columns_of(whole.replace(length, longer, 1)).stream_ids == names


def test_bytes_after_the_end_and_a_cut_off_stream_are_refused() -> None:
    content = stream(table([{"stream_id": "a", "values": {"flow": 1.0}}] * 5))
    with pytest.raises(BadBody, match="follow the end"):
        columns_of(content + b"x")
    for cut in (1, 7, 100, len(content) // 2, len(content) - 20):
        with pytest.raises(BadBody):
            columns_of(content[:cut])


def _mutants(rng: random.Random) -> list[bytes]:
    kinds: list[dict[str, Any]] = [{"compression": None}, {"compression": "lz4"}, {"compression": "zstd"}]
    rows = table([{"stream_id": f"s{i}", "values": {"flow": i, "pressure": None}, "event_id": "e", "sequence": i} for i in range(9)])
    rows = rows.append_column("timestamp2", pa.array(range(9), pa.timestamp("us")))
    seeds = [stream(rows, **kind) for kind in kinds]
    mutants = []
    for _ in range(1500):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content) - 8)
            content[at : at + rng.choice([1, 4, 8])] = rng.choice([b"\xff", b"\x00\x00\x00\x80", bytes([rng.randrange(256)]), b"\x7f" * 8])
        mutants.append(bytes(content))
    return mutants


@pytest.mark.parametrize("seed", range(3))
def test_damaged_arrow_bodies_are_items_or_errors_of_ours(seed: int) -> None:
    outcomes = set()
    for content in _mutants(random.Random(seed)):
        try:
            assert len(columns_of(content).items()) <= MAX_EVENTS
            outcomes.add("read")
        except OnsetError as error:
            outcomes.add(type(error).__name__)
    assert {"BadBody", "BadEvent"} <= outcomes


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_items_or_a_bad_body(content: bytes) -> None:
    for read in (columns_of, lambda body: decode(body, Format.MSGPACK, max_events=MAX_EVENTS)):
        with contextlib.suppress(BadBody, BadEvent, TooLarge):
            read(content)


GOOD = {"stream_id": "n", "values": {"value": 1.5}}


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"values": {"value": True}}, "values.value"),
        ({"values": {"value": float("nan")}}, None),
        ({"values": {7: 1.0}}, "values"),
        ({7: 1.0}, ""),
        ({(1, 2): 1.0}, ""),
        ({"vaules": {b"x": 1}}, "vaules"),
        ({"stream_id": b"bytes"}, "stream_id"),
        ({"timestamp": msgspec.msgpack.Ext(5, b"x")}, "timestamp"),
        ({"sequence": 2**64 - 1}, "sequence"),
        ({"values": [[[[1]]]]}, "values"),
        (msgspec.Raw(b"\x81\xa1\xff\xc0"), ""),  # a string that is not UTF-8
        (msgspec.Raw(b"\x81\x80\xc0"), ""),  # a map for a key
        (None, ""),
        ([], ""),
    ],
)
def test_a_bad_item_of_msgpack_is_named_and_its_neighbours_survive(item: Any, field: str | None) -> None:
    body = msgspec.msgpack.encode([GOOD, item, GOOD])
    (before, bad, after), bare = decode(body, Format.MSGPACK, max_events=MAX_EVENTS)
    assert not bare
    assert before == after == Event(stream_id="n", values={"value": 1.5})
    if field is None:
        assert isinstance(bad, Event)  # which features.py refuses by its field
    else:
        assert isinstance(bad, ItemError)
        assert bad.field == field


def test_an_array_of_more_items_than_allowed_is_refused_by_its_head() -> None:
    for head in (b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff"):
        with pytest.raises(TooLarge):
            decode(head, Format.MSGPACK, max_events=MAX_EVENTS)
    for body in (b"\x91" * 1_000_000, b"\x81\xa1x" * 300_000, b"", b"\x93\x01", b"\xc1"):
        with pytest.raises((BadBody, BadEvent)):
            decode(body, Format.MSGPACK, max_events=MAX_EVENTS)


def test_a_long_event_that_is_none_is_refused_before_objects_of_any_kind_are_made_of_it() -> None:
    keys = dict.fromkeys(range(3000))  # of numbers that are chosen for it, 100,000 stood still for eight seconds
    for item in (keys, {"values": keys}, {"stream_id": "n", "values": {"value": [[]] * 10_000}}):
        good, bad = decode(msgspec.msgpack.encode([GOOD, item]), Format.MSGPACK, max_events=MAX_EVENTS)[0]
        assert good == Event(stream_id="n", values={"value": 1.5})
        assert isinstance(bad, BadEvent)
        assert "Expected `" in bad.detail
        with pytest.raises(BadEvent, match="Expected `"):
            decode(msgspec.msgpack.encode(item), Format.MSGPACK, max_events=MAX_EVENTS)


ANY_PART = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.builds(lambda length: "x" * length, st.sampled_from([0, 31, 32, 255, 256, 65_535, 65_536]))
    | st.builds(lambda length: b"x" * length, st.sampled_from([0, 255, 256, 65_536]))
    | st.builds(lambda length: msgspec.msgpack.Ext(5, b"x" * length), st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 256, 65_536])),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.integers(0, 99) | st.text(), inner, max_size=20),
    max_leaves=40,
)


@settings(max_examples=100, deadline=None)
@given(ANY_PART)
def test_a_wide_map_with_a_key_that_is_no_text_is_found_behind_whatever_stands_before_it(before: Any) -> None:
    texts, numbers = {f"key {i}": i for i in range(1001)}, dict.fromkeys(range(1000), "a text")
    fits = [before, {"a": [before, texts]}, numbers, before]
    assert decode_plain(msgspec.msgpack.encode(fits), Format.MSGPACK, max_events=MAX_EVENTS) == (ANY, False)
    for wide in (texts | {1: 1}, numbers | {1000: ""}):
        with pytest.raises(BadBody, match="more than 1000 entries with a key that is no text"):
            decode_plain(msgspec.msgpack.encode([before, {"a": [before, wide]}, before]), Format.MSGPACK, max_events=MAX_EVENTS)


def test_a_payload_of_very_many_parts_for_its_size_is_refused_before_they_are_made() -> None:
    for part in (b"\x80", b"\x90", b"\xc0"):
        with pytest.raises(TooLarge, match="more than 125001 parts in 500006 bytes"):
            decode_plain(b"\x91\xdd" + (500_000).to_bytes(4, "big") + part * 500_000, Format.MSGPACK, max_events=MAX_EVENTS)
    numbers = [{"a": float(i)} for i in range(3000)]
    assert decode_plain(msgspec.msgpack.encode([numbers]), Format.MSGPACK, max_events=MAX_EVENTS) == ([numbers], False)


def test_as_many_short_readings_as_a_message_may_have_are_read() -> None:
    short = [{"s": f"p{i}", "t": 1_764_288_000 + i, "v": i % 100} for i in range(10_000)]  # the default of ONSET_MAX_BATCH_EVENTS
    assert decode_plain(msgspec.msgpack.encode(short), Format.MSGPACK, max_events=10_000) == (short, False)
    most = [0] * 99_999  # with their array as many parts as there may be
    assert decode_plain(msgspec.msgpack.encode([most[:-1]]), Format.MSGPACK, max_events=1) == ([most[:-1]], False)
    with pytest.raises(TooLarge, match="more than 100000 parts"):
        decode_plain(msgspec.msgpack.encode([most]), Format.MSGPACK, max_events=1)


async def test_gzip_goes_with_every_format(client: httpx.AsyncClient) -> None:
    for form in (MSGPACK, ARROW):
        content = gzip.compress(written([{"stream_id": form, "values": {"flow": 1.0}}], form))
        response = await client.post("/v1/events", content=content, headers={"content-type": form, "content-encoding": "gzip"})
        assert answers(response)[0]["state_version"] == 1
