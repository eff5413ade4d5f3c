"""Log lines through the same door, the same state and the same score as readings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from service.artifact import Manifest
from service.detector import Detector
from service.errors import ArtifactError, BadEvent
from service.events import Event
from service.policy import Policy
from service.rounds import advance
from tests.doors import serving
from tests.readings import to_readings
from tests.tiny import build_tiny
from tests.tiny_log import BEFORE, LIKELY, TEMPLATES, build_tiny_log, tiny_log_manifest

ACCEPTED, TOOK, CLOSED = "Accepted connection from 10.0.0.7:4711", "Took 12.5 ms for /a?id=77", "Closed connection from 10.0.0.7:4711"
NOW = 1_795_420_800.0
SESSION = [ACCEPTED, TOOK, "Took 7 ms for /b", CLOSED]


@pytest.fixture
async def client(log_path: Path, empty_server: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(model=log_path, redis_url=empty_server) as running:
        yield running


async def post(client: httpx.AsyncClient, body: Any, **query: str) -> Any:
    response = await client.post("/v1/events", json=body, params=query)
    assert response.status_code == 200, response.text
    return response.json()


def line(message: str, stream: str = "web-1", **more: Any) -> dict[str, Any]:
    return {"stream_id": stream, "message": message, **more}


async def test_a_line_is_scored_and_its_reply_explains_it(client: httpx.AsyncClient) -> None:
    await post(client, line(ACCEPTED, timestamp=NOW))
    reply = await post(client, line(TOOK, timestamp=NOW + 2.5, event_id="7"))
    assert reply["status"] == "ready"
    assert 0.9 < reply["p_value"] < 1
    assert not reply["is_anomaly"]
    assert reply["line"] == {"message": TOOK, "template": TEMPLATES[1], "new": False, "before": [TEMPLATES[0]]}
    assert next(iter(reply["expected"])) == TEMPLATES[1]
    assert reply["expected"][TEMPLATES[1]] == pytest.approx(reply["p_value"])
    assert len(reply["expected"]) == LIKELY
    assert reply["lower"] == {"gap": 1.0, "number_1": None, "number_2": None}
    assert [(part["feature"], part["actual"]) for part in reply["contributors"]] == [("template", 2.0), ("gap", 2.5), ("number_1", 12.5)]
    assert reply["imputed"] == []


async def test_an_unseen_pattern_is_scored_as_new_and_its_alert_shows_the_line(client: httpx.AsyncClient) -> None:
    new = "Segfault at 0xdeadbeef\n  in libfoo.so"
    *_, reply = await post(client, [line(message, timestamp=NOW + i) for i, message in enumerate([ACCEPTED, TOOK, new])])
    assert reply["line"] == {"message": new, "template": None, "new": True, "before": [TEMPLATES[1], TEMPLATES[0]]}
    assert reply["contributors"][0]["actual"] == 0  # its kind is the graph's alone
    assert reply["is_anomaly"]
    assert reply["alert_score"] > 1
    assert (await post(client, line(ACCEPTED, timestamp=NOW + 3)))["line"]["before"][0] == "(new pattern)"


async def test_lines_before_are_a_ring_that_every_replica_knows(log_path: Path, empty_server: str) -> None:
    for i, message in enumerate([ACCEPTED, *[TOOK] * 6]):
        async with serving(model=log_path, redis_url=empty_server) as replica:
            reply = await post(replica, line(message, timestamp=NOW + i))
    assert reply["line"]["before"] == [TEMPLATES[1]] * BEFORE
    assert reply["state_version"] == 7


async def test_a_duplicate_gets_the_same_reply_with_its_line(client: httpx.AsyncClient) -> None:
    said = [line(message, timestamp=NOW + i, event_id=str(i)) for i, message in enumerate(SESSION)]
    first = await post(client, said)
    again = await post(client, said[-1])
    assert again == first[-1] | {"duplicate": True}
    assert await post(client, said) == [reply | {"duplicate": True} for reply in first]  # older ones, too, from the trail


async def test_the_end_of_a_session_is_an_event_and_the_next_line_begins_afresh(client: httpx.AsyncClient) -> None:
    end = {"stream_id": "web-1", "end": True}
    whole = await post(client, [*(line(message, timestamp=NOW + i) for i, message in enumerate(SESSION)), end | {"timestamp": NOW + 4}])
    assert whole[-1]["line"] == {
        "message": None,
        "template": "(end of session)",
        "new": False,
        "before": [TEMPLATES[i] for i in (2, 1, 1, 0)],
    }
    assert whole[-1]["p_value"] > 0.9
    assert next(iter(whole[-1]["expected"])) == "(end of session)"
    again, short = await post(client, [line(ACCEPTED, timestamp=NOW + 9), end | {"timestamp": NOW + 10}])
    assert again["line"]["before"] == []
    assert again["p_value"] == whole[0]["p_value"]
    assert [part["feature"] for part in again["contributors"]] == ["template"]  # there is no gap between two sessions
    assert short["is_anomaly"]  # it ended after its first line


async def test_an_alert_explains_itself_by_the_line_what_was_likely_and_what_came_before(client: httpx.AsyncClient) -> None:
    said = [line(message, timestamp=NOW + i) for i, message in enumerate([ACCEPTED, TOOK, "Disk sda is 99 percent full " + "x" * 3000])]
    await post(client, said)
    for _ in range(100):
        alerts = (await client.get("/v1/alerts")).json()["alerts"]
        if alerts:
            break
        await asyncio.sleep(0.05)
    [alert] = alerts
    onset = alert["onset"]
    assert onset["line"]["new"]
    assert len(onset["line"]["message"]) == 2000
    assert onset["line"]["before"] == [TEMPLATES[1], TEMPLATES[0]]
    assert list(onset["expected"])[:2] == [TEMPLATES[1], TEMPLATES[2]]
    assert alert["summary"].startswith("web-1 logs unusual lines since ")
    assert "Disk sda is 99 percent full" in alert["summary"]
    assert f"likelier was '{TEMPLATES[1]}' (67%) or '{TEMPLATES[2]}' (33%)" in alert["description"]
    assert f"before it came '{TEMPLATES[1]}'" in alert["description"]


async def test_a_stream_that_is_looked_up_shows_its_last_line_without_the_message(client: httpx.AsyncClient) -> None:
    await post(client, line(TOOK))
    shown = (await client.get("/v1/streams/web-1")).json()
    assert shown["line"] == {"message": None, "template": TEMPLATES[1], "new": False, "before": []}


@pytest.mark.parametrize(
    ("event", "field", "says"),
    [
        ({"stream_id": "a", "values": {"template": 1}}, "values", "takes log lines in 'message'"),
        ({"stream_id": "a", "message": "x", "values": {}}, "values", "not numbers"),
        ({"stream_id": "a"}, "message", "is missing"),
        ({"stream_id": "a", "message": ""}, "message", "no text"),
        ({"stream_id": "a", "message": " \n\t"}, "message", "no text"),
        ({"stream_id": "a", "message": "x" * 65_537}, "message", "length <= 65536"),
        ({"stream_id": "a", "message": "x\ud800"}, "message", "half a character at 1"),
        ({"stream_id": "a", "message": 7}, "message", "Expected `str | null`"),
        ({"stream_id": "a", "message": "bye", "end": True}, "end", "an event of its own"),
        ({"stream_id": "a", "end": "yes"}, "end", "Expected `bool`"),
        ({"message": "x"}, "stream_id", "missing"),
    ],
)
async def test_what_is_no_line_is_refused_by_field(client: httpx.AsyncClient, event: dict[str, Any], field: str, says: str) -> None:
    response = await client.post("/v1/events", content=json.dumps(event), headers={"content-type": "application/json"})
    problem = response.json()
    assert response.status_code == 422
    assert problem["field"] == field
    assert says in problem["detail"]


async def test_a_line_or_an_end_to_a_sensor_model_is_refused(tiny_model_path: Path, empty_server: str) -> None:
    async with serving(model=tiny_model_path, redis_url=empty_server) as client:
        for event, field in ((line("x"), "message"), ({"stream_id": "a", "values": {"value": 1.0}, "end": True}, "end")):
            response = await client.post("/v1/events", json=event)
            assert (response.status_code, response.json()["field"]) == (422, field)
        assert "line" not in await post(client, {"stream_id": "a", "values": {"value": 1.0}})


async def test_every_format_takes_lines_and_gives_the_same_replies(client: httpx.AsyncClient) -> None:
    said = [*(line("\x1b[31m" + m + "\n\tat x\0", timestamp=NOW + i, event_id=str(i)) for i, m in enumerate(SESSION)), line("")]
    replies = {}
    for form in ("application/json", "application/x-ndjson", "application/msgpack"):
        content = msgspec.json.encode(said)
        if form.endswith("ndjson"):
            content = b"\n".join(map(msgspec.json.encode, said))
        elif form.endswith("msgpack"):
            content = msgspec.msgpack.encode(said)
        response = await client.post("/v1/events", content=content, headers={"content-type": form, "accept": "application/json"})
        replies[form] = response.json()
    first = replies.pop("application/json")
    assert first[0]["line"]["message"] == said[0]["message"]
    assert first[-1]["field"] == "message"
    assert all(again == [reply | {"duplicate": True} for reply in first[:-1]] + first[-1:] for again in replies.values())


async def test_arrow_takes_lines_and_ends_as_columns_and_answers_in_columns(client: httpx.AsyncClient) -> None:
    table = pa.table(
        {"stream_id": ["a"] * 3, "message": [ACCEPTED, "x" * 65_537, None], "end": [None, False, True], "timestamp": [NOW] * 3}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    arrow = "application/vnd.apache.arrow.stream"
    response = await client.post("/v1/events", content=sink.getvalue().to_pybytes(), headers={"content-type": arrow})
    accepted, long, end = pa.ipc.open_stream(response.content).read_all().to_pylist()
    assert accepted["line"] == {"message": ACCEPTED, "template": TEMPLATES[0], "new": False, "before": []}
    assert dict(accepted["expected"])[TEMPLATES[0]] == pytest.approx(accepted["p_value"])
    assert list(accepted["lower"]) == ["gap", "number_1", "number_2"]
    assert long["problem"]["field"] == "message"
    assert end["line"]["template"] == "(end of session)"


async def test_a_log_and_a_sensor_model_serve_side_by_side(tmp_path: Path, empty_server: str) -> None:
    build_tiny(tmp_path)
    build_tiny_log(tmp_path)
    async with serving(model=tmp_path, redis_url=empty_server, default_model="tiny") as client:
        assert (await post(client, line(ACCEPTED), model="tiny-log"))["line"]["template"] == TEMPLATES[0]
        assert (await post(client, {"stream_id": "web-1", "values": {"value": 1.0}}))["state_version"] == 1
        document = (await client.get("/openapi.json")).json()["components"]["schemas"]
        kinds = [document[kind["$ref"].rpartition("/")[2]] for kind in document["Event"]["anyOf"]]
        assert [sorted(kind["required"]) for kind in kinds] == [
            ["stream_id", "values"],
            ["message", "stream_id"],
            ["end", "stream_id"],
        ]


def test_the_gap_is_the_services_and_missing_where_a_session_begins(log_detector: Detector) -> None:
    events = [Event(stream_id="a", message=TOOK, timestamp=10.0), Event(stream_id="a", message=TOOK, timestamp=12.0)]
    events += [Event(stream_id="a", end=True, timestamp=13.0), Event(stream_id="a", message=TOOK, timestamp=20.0)]
    events += [Event(stream_id="b", message=TOOK, timestamp=20.0), Event(stream_id="b", end=True, timestamp=21.0)]
    whole = _gaps(log_detector, events, cuts=[6])
    assert np.array_equal(whole, [np.nan, 2, 1, np.nan, np.nan, 1], equal_nan=True)
    assert np.array_equal(_gaps(log_detector, events, cuts=[1, 3, 4, 6]), whole, equal_nan=True)


def _gaps(detector: Detector, events: list[Event], cuts: list[int]) -> list[float]:
    """What the detector was given, the events in pieces up to each cut."""
    rows, gaps = detector.codec().fresh(2), []
    for start, stop in zip([0, *cuts], cuts, strict=False):
        readings, errors = to_readings(events[start:stop], detector.manifest, now=0.0, matcher=detector.matcher)
        assert not errors
        slots = np.array([ord(event.stream_id or "") - ord("a") for event in events[start:stop]], np.intp)
        gaps += advance(detector, Policy(), rows, readings, slots).records["x"][:, 1].tolist()
    return gaps


def test_a_stored_state_keeps_what_a_duplicate_is_answered_with(log_detector: Detector) -> None:
    codec = log_detector.codec()
    readings, _ = to_readings([Event(stream_id="a", message=ACCEPTED)], log_detector.manifest, now=0.0, matcher=log_detector.matcher)
    rows = codec.fresh(1)
    outcomes = advance(log_detector, Policy(), rows, readings, np.zeros(1, np.intp))
    again = codec.decode([bytes(value) for value in codec.encode(rows)])
    for name in ("likely", "before", "expected", "x"):
        assert np.array_equal(again.rows["last"][name], outcomes.records[name], equal_nan=True)


def test_a_manifest_has_lines_exactly_where_its_kind_is_log() -> None:
    good = tiny_log_manifest().model_dump()
    assert Manifest.model_validate(good).lines is not None
    for bad, says in (
        ({"kind": "sensor"}, "belong to the kind 'log'"),
        ({"lines": None}, "belong to the kind 'log'"),
        ({"features": [{"name": "template"}]}, "features of a log model are"),
        ({"features": [{"name": "gap"}, {"name": "template"}]}, "features of a log model are"),
    ):
        with pytest.raises(ValidationError, match=says):
            Manifest.model_validate(good | bad)


def test_a_graph_that_names_other_numbers_of_lines_than_its_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the graph gives 'likely' of 6 and 'before' of 4 columns, the manifest says 10 and 4"):
        Detector.load(build_tiny_log(tmp_path, likely=5))


def test_columns_of_numbers_are_refused_row_by_row(log_detector: Detector) -> None:
    events = [Event(stream_id="a", values={"value": 1.0}), Event(stream_id="a", message=TOOK)]
    readings, errors = to_readings(events, log_detector.manifest, now=0.0, matcher=log_detector.matcher)
    assert len(readings) == 1
    assert isinstance(errors[0], BadEvent)


async def test_lines_are_counted_by_whether_a_pattern_matched_them_and_ends_are_none(client: httpx.AsyncClient) -> None:
    async def counted() -> dict[str, float]:
        text = (await client.get("/metrics")).text
        return {
            match: float(line.rpartition(" ")[2])
            for match in ("template", "new")
            for line in text.splitlines()
            if line.startswith("onset_lines_total{") and f'match="{match}"' in line
        }

    before = await counted()
    lines = [{"stream_id": "counted", "message": message} for message in (ACCEPTED, TOOK, "Unheard of")]
    await client.post("/v1/events", json=[*lines, {"stream_id": "counted", "end": True}])
    after = await counted()
    assert {match: after[match] - before[match] for match in after} == {"template": 2, "new": 1}
