"""The HTTP door: bad input gets a problem that names the field, and its neighbours are scored."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import cramjam
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.api import Application
from service.detector import Detector
from service.errors import StoreUnavailable
from service.intake import DoorLimits
from service.metrics import Metrics
from service.policy import Policy
from service.scorer import Limits, Scorer
from tests.doors import Store, door_over
from tests.tiny import build_tiny

JSON = {"content-type": "application/json"}
NDJSON = {"content-type": "application/x-ndjson"}
LIMITS = DoorLimits(max_body_bytes=100_000, max_batch_events=1000, max_inflight_bytes=1_000_000)


class Gated(Store):
    """Whose loads can fail, too."""

    down = buggy = full = False
    lack: Exception = MemoryError()
    """What it raises where it is `full`."""

    async def load(self, model: str, stream_ids: Sequence[str]) -> list[bytes | None]:
        if self.full:
            raise self.lack
        if self.buggy:
            raise KeyError("secret of the inside")
        if self.down:
            raise StoreUnavailable("The state store does not answer.")
        return await super().load(model, stream_ids)


class Client(httpx.AsyncClient):
    """Posts to a door over a memory store, in this process."""

    store: Gated
    metrics: Metrics
    app: Application

    async def raw(self, content: bytes | str, headers: dict[str, str] = JSON, path: str = "/v1/events") -> httpx.Response:
        return await self.post(path, content=content, headers=headers)

    async def score(self, body: Any, path: str = "/v1/events", **headers: str) -> Any:
        response = await self.post(path, content=json.dumps(body), headers=JSON | headers)
        assert response.status_code == 200, response.text
        return response.json()


@asynccontextmanager
async def door(
    detector: Detector, limits: DoorLimits = LIMITS, queue: int = 5000, public_url: str = "", allowed_hosts: str = ""
) -> AsyncIterator[Client]:
    metrics, store = Metrics(), Gated()
    scorer = Scorer(detector, Policy(), store, metrics, Limits(max_queue_events=queue, max_streams=500))
    app = Application()
    door_over({"tiny": scorer}, store, metrics, limits, public_url, allowed_hosts).add_to(app)
    async with Client(transport=httpx.ASGITransport(app), base_url="http://onset") as client:
        client.store, client.metrics, client.app = store, metrics, app
        yield client
    store.gate.set()
    await scorer.drain(2)


@pytest.fixture
async def client(tiny_detector: Detector) -> AsyncIterator[Client]:
    async with door(tiny_detector) as running:
        yield running


def event(stream: str = "a", value: Any = 1.0, **more: Any) -> dict[str, Any]:
    return {"stream_id": stream, "values": {"value": value}, **more}


def assert_problem(response: httpx.Response, status: int, says: str, field: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert says in problem["detail"], problem["detail"]
    assert {"type", "title"} <= problem.keys()
    if field is not None:
        assert problem.get("field", "") == field
    return problem


HOME = {"host": "onset.example.org"}


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        {"origin": "https://wiki.example.org", "sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://evil.example"},  # browsers say no more to http that is not loopback
        {"origin": "http://onset.example.org:8081"},
        {"origin": "null"},  # a sandbox, a file
        {"origin": "http://\xe9"},
    ],
)
async def test_a_page_of_another_site_changes_nothing(client: Client, headers: dict[str, str]) -> None:
    sent = [(name.encode(), value.encode("latin-1")) for name, value in {**HOME, **headers}.items()]
    for method, path in [
        ("POST", "/v1/events"),  # fetch sends a Blob without type without asking first, and what has no type is JSON
        ("POST", "/v1/streams/a/events"),
        ("POST", "/v1/streams/a/accept"),
        ("DELETE", "/v1/streams/a"),
        ("PUT", "/v1/policy"),
        ("POST", "/v1/alerts/x/acknowledge"),
        ("POST", "/v1/alerts/acknowledge"),
        ("POST", "/v1/alerts/accept"),
        ("POST", "/nowhere"),
    ]:
        refused = await client.request(method, path, content=json.dumps(event()), headers=sent)
        assert_problem(refused, 403, "let it pass it on as it came, or set ONSET_PUBLIC_URL")
    assert (await client.get("/v1/streams", headers=sent)).json()["streams"] == []


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("evil.example", False),
        ("evil.example:8080", False),
        ("evil.example@onset", True),  # what is before @ is no name
        ("onset@evil.example", False),
        ("[::1", False),
        ("onset", True),
        ("ONSET.monitoring.svc.:8080", True),
        ("onset.example.org", True),
        ("localhost:8080", True),
        ("10.0.0.7:8080", True),
        ("[::1]:8080", True),
        ("", True),  # HTTP/1.0
    ],
)
async def test_where_the_services_names_are_known_a_page_whose_own_name_leads_here_reads_and_changes_nothing(
    tiny_detector: Detector, host: str, answered: bool
) -> None:
    allowed = "onset, onset.monitoring.svc"
    async with door(tiny_detector, public_url="https://onset.example.org/x/", allowed_hosts=allowed) as client:
        for request in (("GET", "/v1/streams"), ("POST", "/v1/events"), ("GET", "/metrics")):
            reply = await client.request(*request, content=json.dumps(event()), headers={"host": host})
            if answered:
                assert reply.status_code == 200
            else:
                assert_problem(reply, 403, "ONSET_ALLOWED_HOSTS")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "https://onset.example.org", "sec-fetch-site": "same-origin", "host": "10.0.0.7:8080"},  # behind a proxy with https
        {"sec-fetch-site": "none"},  # an address that someone typed
        {"origin": "http://onset.example.org"},
        {"origin": "http://onset.example.org:8080", "host": "onset.example.org:8080"},
        {"origin": "http://people.example.org", "x-forwarded-host": "people.example.org"},
    ],
)
async def test_our_own_page_and_what_is_no_browser_may_change_things(client: Client, headers: dict[str, str]) -> None:
    await client.score(event(), **{**HOME, **headers})


async def test_the_page_may_be_where_people_are_told_that_it_is(tiny_detector: Detector) -> None:
    async with door(tiny_detector, public_url="https://People.example.org/onset/") as client:
        await client.score(event(), origin="https://people.example.org", host="10.0.0.7")
        refused = await client.raw(json.dumps(event()), JSON | {"origin": "http://people.example.org", "host": "10.0.0.7"})
        assert_problem(refused, 403, "of 'http://people.example.org', which is not this service's")


async def test_the_reply_has_the_shape_of_the_request(client: Client) -> None:
    assert (await client.score(event()))["stream_id"] == "a"
    assert [reply["stream_id"] for reply in await client.score([event("a"), event("b")])] == ["a", "b"]
    assert await client.score([]) == []
    lines = await client.raw("\n".join(json.dumps(event(s)) for s in "xyz") + "\n\n", NDJSON)
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["stream_id"] for line in lines.content.splitlines()] == ["x", "y", "z"]
    assert (await client.raw("", NDJSON)).text == ""


async def test_every_reply_field_is_there_and_echoes_the_event(client: Client) -> None:
    for i in range(30):
        reply = await client.score(event(value=i % 3, timestamp=f"2026-01-01T00:00:{i:02}Z", event_id=f"e{i}"))
    assert reply["timestamp"] == "2026-01-01T00:00:29Z"
    assert reply["event_id"] == "e29"
    assert reply["status"] == "ready"
    assert 0 < reply["p_value"] <= 1
    assert reply["lower"]["value"] < reply["expected"]["value"] < reply["upper"]["value"]
    assert sum(part["contribution"] for part in reply["contributors"]) == pytest.approx(1)
    assert reply["alpha"] == 0.001
    assert reply["state_version"] == 30


@pytest.mark.parametrize(
    ("body", "status", "says", "field"),
    [
        ("", 400, "empty", None),
        ("{", 400, "not JSON", None),
        ("nonsense", 400, "not JSON", None),
        (b"\xff\xfe", 400, "not UTF-8", None),
        ("[" * 50_000, 400, "nested too deeply", None),
        ("null", 422, "An event is an object, not null", ""),
        ("3", 422, "An event is an object, not 3", ""),
        ('"text"', 422, "An event is an object", ""),
        ("{}", 422, "stream_id is missing", "stream_id"),
        ('{"stream_id": "a"}', 422, "'values' is missing", "values"),
        ('{"stream_id": "", "values": {"value": 1}}', 422, "stream_id", "stream_id"),
        (json.dumps(event("x" * 2000)), 422, "256", "stream_id"),
        (json.dumps(event("a\nb")), 422, "control characters", "stream_id"),
        ('{"stream_id": "\\ud800", "values": {"value": 1}}', 422, "control characters", "stream_id"),
        ('{"stream_id": 5, "values": {"value": 1}}', 422, "5", "stream_id"),
        ('{"stream_id": "a", "values": {"value": NaN}}', 422, "values.value is NaN", "values.value"),
        ('{"stream_id": "a", "values": {"value": -Infinity}}', 422, "values.value is -Infinity", "values.value"),
        ('{"stream_id": "a", "values": {"value": 1e999}}', 422, "values.value is Infinity", "values.value"),
        ('{"stream_id": "a", "values": {"value": 1e300}}', 422, "range of float32", "values.value"),
        (json.dumps(event(value=10**400)), 422, "value", None),
        (json.dumps(event(value="warm")), 422, 'values.value is "warm"', "values.value"),
        (json.dumps(event(value=True)), 422, "values.value is true", "values.value"),
        (json.dumps(event(value={"deep": 1})), 422, "values.value is", "values.value"),
        ('{"stream_id": "a", "values": {"flow": 1}}', 422, "knows 'value': each sensor is a stream of its own", "values.flow"),
        ('{"stream_id": "a", "values": {"value": 1, "": 2}}', 422, "1 to 256 characters", "values."),
        ('{"stream_id": "a", "values": []}', 422, "[]", "values"),
        ('{"stream_id": "a", "values": {}}', 422, "values is empty", "values"),
        (json.dumps(event(speed="1")), 422, "'speed' is no field of an event; it has stream_id", "speed"),
        (json.dumps(event(speed=1)), 422, 'readings go into values: {"values": {"speed": 1}}', "speed"),
        (json.dumps({"events": [event()]}), 422, "several events are an array by themselves", "events"),
        (json.dumps(event(timestamp="soon")), 422, "'soon' is neither", "timestamp"),
        (json.dumps(event(timestamp=1.7e12)), 422, "milliseconds", "timestamp"),
        (json.dumps(event(timestamp=-1e11)), 422, "since 1970", "timestamp"),
        (json.dumps(event(timestamp=[])), 422, "[]", "timestamp"),
        (json.dumps(event(sequence=-1)), 422, "-1", "sequence"),
        (json.dumps(event(sequence=1.5)), 422, "1.5", "sequence"),
        (json.dumps(event(event_id="")), 422, "event_id", "event_id"),
        (json.dumps({"stream_id": "a", "message": "GET /"}), 422, "not a log line", "message"),
    ],
)
async def test_a_bad_event_is_a_problem_that_names_field_and_value(
    client: Client, body: str | bytes, status: int, says: str, field: str | None
) -> None:
    assert_problem(await client.raw(body), status, says, field)
    if status == 422:  # the same within a bulk, between two good ones
        good = json.dumps(event("neighbour")).encode()
        content = body.encode() if isinstance(body, str) else body
        for bulk, headers in ((b"[" + good + b"," + content + b"," + good + b"]", JSON), (b"\n".join([good, content, good]), NDJSON)):
            response = await client.raw(bulk, headers)
            assert response.status_code == 200, response.text
            first, bad, last = response.json() if headers is JSON else [json.loads(line) for line in response.content.splitlines()]
            assert first["stream_id"] == last["stream_id"] == "neighbour"
            assert bad["status"] == 422
            assert bad["index"] == 1
            assert says in bad["detail"]


async def test_a_line_that_is_not_json_fails_alone(client: Client) -> None:
    response = await client.raw(
        b'{"stream_id": "a", "values": {"value": 1}}\n{oops\n\xff\n{"stream_id": "b", "values": {"value": 1}}', NDJSON
    )
    first, bad, worse, last = [json.loads(line) for line in response.content.splitlines()]
    assert (first["stream_id"], last["stream_id"]) == ("a", "b")
    assert bad["detail"].startswith("The line is not JSON")
    assert worse["detail"].startswith("The line is not UTF-8")


async def test_what_can_never_be_taken_is_counted_an_event_as_rejected_and_what_is_none_as_malformed(client: Client) -> None:
    client.metrics.begin(model=["tiny"], door=["http"])

    def counted() -> tuple[float | None, float | None]:
        value = client.metrics.registry.get_sample_value
        return value("onset_refused_total", {"reason": "malformed"}), value("onset_events_total", {"door": "http", "outcome": "rejected"})

    bad = {"stream_id": 5, "values": {}}
    assert (await client.raw(json.dumps(bad))).status_code == 422
    assert (await client.raw(json.dumps([bad]))).status_code == 200
    assert counted() == (0, 2)
    assert (await client.raw("[")).status_code == 400
    assert (await client.raw("[]", headers={"content-type": "text/plain"})).status_code == 415
    assert (await client.raw(json.dumps(event()), path="/v1/events?model=none")).status_code == 404
    assert (await client.raw(json.dumps(event()), path="/v1/events?top_contributors=x")).status_code == 422
    assert counted() == (4, 2)
    assert (await client.get("/v1/streams?limit=x")).status_code == 422
    assert counted() == (4, 2), "nobody's events"


async def test_a_body_over_the_limit_is_refused_before_it_is_read(client: Client) -> None:
    assert_problem(await client.raw(b" " * 100_001), 413, "over 100000 bytes")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    assert_problem(await client.post("/v1/events", content=chunks(), headers=JSON), 413, "over 100000 bytes")
    assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "body"}) == 2
    await client.score(event())


async def test_a_body_that_does_not_arrive_is_given_up(tiny_detector: Detector) -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"[".ljust(60_000)
        await asyncio.sleep(60)

    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=100_000, max_body_seconds=0.1)) as client:
        response = await client.post("/v1/events", content=stuck(), headers=JSON | {"content-length": "90000"})
        assert_problem(response, 408, "within 0.1 s (ONSET_MAX_BODY_SECONDS)")
        assert response.headers["connection"] == "close"
        assert (await client.raw(json.dumps(event()).ljust(99_000))).status_code == 200  # nothing of it counts any more
        assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "slow"}) == 1


async def test_what_came_of_a_body_that_does_not_arrive_counts(tiny_detector: Detector) -> None:
    came = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield b"[".ljust(60_000)
        came.set()
        await asyncio.sleep(60)

    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=100_000)) as client:
        hanging = asyncio.create_task(client.post("/v1/events", content=stuck(), headers=JSON | {"content-length": "90000"}))
        await came.wait()
        assert_problem(
            await client.raw(json.dumps(event()).ljust(40_001)),
            429,
            "60000 bytes of requests and wide replies are being scored, 60000 of them from this sender (ONSET_MAX_INFLIGHT",
        )
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)


async def test_who_states_a_long_body_and_sends_none_of_it_keeps_nobody_out(tiny_detector: Detector) -> None:
    came: asyncio.Queue[None] = asyncio.Queue()

    async def silent() -> AsyncIterator[bytes]:
        yield b"["
        came.put_nowait(None)
        await asyncio.sleep(60)

    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=200_000)) as client:
        headers = JSON | {"content-length": "100000"}
        hanging = [asyncio.create_task(client.post("/v1/events", content=silent(), headers=headers)) for _ in range(20)]
        for _ in hanging:
            await came.get()
        assert (await client.raw(json.dumps(event()).ljust(90_000))).status_code == 200
        for one in hanging:
            one.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)


async def test_one_senders_slow_bodies_leave_room_for_a_sender_that_has_nothing_under_way(tiny_detector: Detector) -> None:
    came: asyncio.Queue[None] = asyncio.Queue()

    async def stuck(size: int) -> AsyncIterator[bytes]:
        yield b"[".ljust(size)
        came.put_nowait(None)
        await asyncio.sleep(60)

    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=80_000)) as client:
        noisy, quiet = JSON | {"x-scope-orgid": "noisy"}, JSON | {"x-scope-orgid": "quiet"}
        hanging = [asyncio.create_task(client.post("/v1/events", content=stuck(35_000), headers=noisy)) for _ in range(2)]
        for _ in hanging:
            await came.get()
        body = json.dumps(event()).ljust(9_000)
        assert_problem(
            await client.raw(body, noisy), 429, "70000 bytes of requests and wide replies are being scored, 70000 of them from this"
        )
        assert (await client.raw(body, quiet)).status_code == 200
        assert_problem(await client.raw(json.dumps(event()).ljust(11_000), quiet), 429, "70000 bytes of requests and wide replies are")
        for one in hanging:
            one.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        assert (await client.raw(json.dumps(event()).ljust(79_000), noisy)).status_code == 200  # all is given back


async def test_a_body_that_comes_slowly_but_in_time_is_read_whole(client: Client) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in json.dumps(event()).encode():
            yield bytes([byte])
            await asyncio.sleep(0)

    assert (await client.post("/v1/events", content=pieces(), headers=JSON)).json()["stream_id"] == "a"


async def test_a_client_that_leaves_before_its_body_came_holds_nothing(tiny_detector: Detector) -> None:
    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=3000)) as client:
        came = asyncio.Event()

        async def stuck() -> AsyncIterator[bytes]:
            yield b"[".ljust(2999)
            came.set()
            await asyncio.sleep(60)

        headers = JSON | {"content-length": "3000"}
        leaving = asyncio.create_task(client.post("/v1/events", content=stuck(), headers=headers))
        await came.wait()
        assert_problem(await client.raw(json.dumps(event())), 429, "ONSET_MAX_INFLIGHT_BYTES")
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert (await client.raw(json.dumps([event()]).ljust(3000))).status_code == 200


async def test_below_a_root_path_the_router_answers_the_same(client: Client) -> None:
    one, other = event("r/1", event_id="e1"), {"values": {"value": 1}, "event_id": "e1"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app, root_path="/below"), base_url="http://onset") as below:
        for path, body in (("/v1/events", one), ("/v1/streams/r/1/events", other), ("/v1/events", "nonsense")):
            here, there = [await some.post(at + path, json=body) for some, at in ((client, ""), (below, "/below"))]
            assert (here.status_code, here.headers["content-type"]) == (there.status_code, there.headers["content-type"])
            assert here.json() | {"duplicate": True} == there.json() | {"duplicate": True}


async def test_more_events_than_allowed_are_refused_whole(client: Client) -> None:
    lines = "\n".join(['{"stream_id":"a","values":{"value":1}}'] * 1001)
    assert_problem(await client.raw(lines, NDJSON), 413, "More than 1000 events in one request")
    assert (await client.get("/v1/streams/a")).status_code == 404
    assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "batch"}) == 1


async def test_gzip_is_read_within_the_limit(client: Client) -> None:
    zipped = JSON | {"content-encoding": "gzip"}
    assert (await client.raw(gzip.compress(json.dumps(event()).encode()), zipped)).status_code == 200
    assert_problem(await client.raw(gzip.compress(b" " * 1_000_000), zipped), 413, "when unpacked")
    assert_problem(await client.raw(b"plain", zipped), 400, "not gzip")
    assert_problem(await client.raw(gzip.compress(b"{}")[:-3], zipped), 400, "cut off")
    assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "body"}) == 1
    assert_problem(await client.raw(b"x", JSON | {"content-encoding": "br"}), 415, "send gzip, deflate, zstd or none")


async def test_deflate_and_zstd_have_the_limits_of_gzip(client: Client) -> None:
    for encoding, pack in (("deflate", zlib.compress), ("zstd", lambda content: bytes(cramjam.zstd.compress(content)))):
        packed = JSON | {"content-encoding": encoding}
        assert (await client.raw(pack(json.dumps(event()).encode()), packed)).status_code == 200
        assert_problem(await client.raw(pack(b" " * 1_000_000), packed), 413, "when unpacked")
        assert_problem(await client.raw(b"plain", packed), 400, f"not {encoding}")
    assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "body"}) == 2


async def test_another_content_type_is_refused(client: Client) -> None:
    assert_problem(await client.raw(b"a,b", {"content-type": "text/csv"}), 415, "'text/csv'")


async def test_the_stream_of_the_path_is_the_events_stream(client: Client) -> None:
    path = "/v1/streams/plant 7/line:3/pump/events"
    assert (await client.score({"values": {"value": 1}}, path))["stream_id"] == "plant 7/line:3/pump"
    assert (await client.get("/v1/streams/plant 7/line:3/pump")).json()["state_version"] == 1
    same, other = await client.score([event("plant 7/line:3/pump"), event("b")], path)
    assert same["state_version"] == 2
    assert other["field"] == "stream_id"
    assert "'b' in the body" in other["detail"]
    assert_problem(await client.raw(json.dumps({"values": {"value": 1}}), path="/v1/streams/" + "x" * 300 + "/events"), 422, "256")


async def test_a_late_event_is_a_conflict_alone_and_marked_in_a_bulk(client: Client) -> None:
    await client.score(event(timestamp=1000))
    problem = assert_problem(await client.raw(json.dumps(event(timestamp=999))), 409, "counted as late", "timestamp")
    assert problem["late"] is True
    assert problem["value"] == "999.0"
    await client.score(event("b", sequence=7))
    problem = assert_problem(await client.raw(json.dumps(event("b", sequence=7, event_id="x"))), 409, "past sequence 7", "sequence")
    assert problem["value"] == "7"
    late, fine = await client.score([event(timestamp=999), event(timestamp=1001)])
    assert late["late"]
    assert late["p_value"] is None
    assert not fine["late"]


async def test_an_event_ahead_of_the_clock_is_a_conflict(client: Client) -> None:
    assert_problem(await client.raw(json.dumps(event(timestamp="2100-01-01"))), 409, "too far in the future", "timestamp")
    ahead, fine = await client.score([event(timestamp="2100-01-01"), event()])
    assert ahead["status"] == 409
    assert fine["state_version"] == 1


async def test_an_idempotency_key_makes_a_request_repeatable(client: Client) -> None:
    body = [event(value=i) for i in range(20)]
    first = await client.score(body, **{"Idempotency-Key": "k1"})
    again = await client.score(body, **{"Idempotency-Key": "k1"})
    assert [(r["p_value"], r["state_version"]) for r in again] == [(r["p_value"], r["state_version"]) for r in first]
    assert all(reply["duplicate"] for reply in again)
    assert not any(reply["duplicate"] for reply in await client.score(body, **{"Idempotency-Key": "k2"}))
    assert_problem(await client.post("/v1/events", content="[]", headers=JSON | {"Idempotency-Key": "x" * 300}), 422, "256 visible")


async def test_unknown_models_and_bad_parameters_are_named(client: Client) -> None:
    assert_problem(await client.raw("{}", path="/v1/events?model=nope"), 404, "No model 'nope' is loaded; there is tiny")
    assert_problem(await client.raw("{}", path="/v1/events?top_contributors=many"), 422, "whole number from 0 to 300", "top_contributors")
    for method, path in (
        ("POST", "/v1/events"),
        ("POST", "/v1/streams/a/events"),
        ("POST", "/v1/streams/a/accept"),
        ("DELETE", "/v1/streams/a"),
    ):
        misspelt = await client.request(method, f"{path}?modle=tiny", content=json.dumps(event()), headers=JSON)
        assert_problem(misspelt, 422, "'modle' is no parameter here; there are model", "modle")
    for path, name, value, says in (
        ("streams", "limit", "0", "from 1 to 1000"),
        ("streams", "cursor", "x", "none of ours"),
        ("streams", "silent", "perhaps", "true or false"),
        ("alerts", "cursor", "x", "none of ours"),
        ("alerts", "status", "opened", "open, acknowledged, resolved"),
        ("alerts", "muted", "yes", "true, false"),
        ("alerts", "severty", "critical", "there are status, severity, kind, model, stream_id, q, muted, limit, cursor"),
        ("alerts/count", "limit", "5001", "from 1 to 5000"),
        ("alerts/count", "cursor", "x", "there are status, severity, kind, model, stream_id, q, muted, limit"),
        ("streams", "state", "anomalous", "there are model, silent, limit, cursor"),
    ):
        problem = assert_problem(await client.get(f"/v1/{path}?{name}={value}"), 422, says, name)
        assert problem["value"] == json.dumps(value)
    assert_problem(await client.get(f"/v1/alerts?q={'x' * 257}"), 422, "q has 257 characters", "q")


@pytest.mark.parametrize("what", ["acknowledge", "accept"])
@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"by": "anna"}, "ids", "a list of 1 to 1000 ids of alerts"),
        ({"by": "anna", "ids": []}, "ids", "a list of 1 to 1000 ids of alerts"),
        ({"by": "anna", "ids": ["a" * 28] * 1001}, "ids", "a list of 1 to 1000 ids of alerts"),
        ({"by": "anna", "ids": ["a" * 28, "pump-7"]}, "ids[1]", 'ids[1] is "pump-7"'),
        ({"ids": ["a" * 28]}, "by", "it names who looks after it"),
        ({"by": "anna", "ids": ["a" * 28], "status": "open"}, "status", "it has by, note and ids"),
    ],
)
async def test_several_alerts_are_named_by_their_ids_and_by_whom(
    client: Client, what: str, body: dict[str, Any], field: str, says: str
) -> None:
    assert_problem(await client.post(f"/v1/alerts/{what}", content=json.dumps(body), headers=JSON), 422, says, field)


async def test_streams_are_listed_shown_and_forgotten(client: Client) -> None:
    await client.score([event(s) for s in "abc"])
    listed = (await client.get("/v1/streams")).json()
    assert {stream["stream_id"] for stream in listed["streams"]} == set("abc")
    assert listed["next_cursor"] is None
    with capture_logs() as logs:
        assert (await client.delete("/v1/streams/a")).status_code == 204
        assert_problem(await client.delete("/v1/streams/a"), 404, "stream 'a'")
    assert logs == [{"event": "stream_forgotten", "log_level": "info", "stream_id": "a", "model": "tiny"}]
    assert_problem(await client.get("/v1/streams/a"), 404, "stream 'a'")


async def test_models_are_listed_with_their_manifest(client: Client, tiny_detector: Detector) -> None:
    [model] = (await client.get("/v1/models")).json()["models"]
    assert model["name"] == "tiny"
    assert model["default"]
    assert model["sha256"] == tiny_detector.sha256
    assert model["providers"] == ["CPUExecutionProvider"]
    assert [feature["name"] for feature in model["features"]] == ["value"]


async def test_a_full_queue_is_429_with_retry_after_and_recovers(tiny_detector: Detector) -> None:
    async with door(tiny_detector, queue=59) as client:
        client.store.gate.clear()
        first = asyncio.create_task(client.score([event("a", i) for i in range(30)]))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(client.score([event("a", i) for i in range(30, 60)]))  # waits for the stream
        await asyncio.sleep(0.05)
        refused = await client.raw(json.dumps([event("c", i) for i in range(30)]))
        assert_problem(refused, 429, "the queue holds 59")
        assert int(refused.headers["retry-after"]) >= 1
        client.store.gate.set()
        assert len(await first) == len(await second) == 30
        assert len(await client.score([event("c", i) for i in range(30)])) == 30
        assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "queue"}) == 1


async def test_the_bytes_of_all_requests_together_are_bounded(tiny_detector: Detector) -> None:
    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=3000)) as client:
        client.store.gate.clear()
        body = json.dumps([event()]).ljust(2000)
        first = asyncio.create_task(client.raw(body))
        await asyncio.sleep(0.05)
        assert_problem(await client.raw(body), 429, "ONSET_MAX_INFLIGHT_BYTES")
        client.store.gate.set()
        assert (await first).status_code == 200
        assert (await client.raw(body)).status_code == 200


async def test_the_replies_of_a_wide_model_count_too(tmp_path: Path) -> None:
    wide = Detector.load(build_tiny(tmp_path, tuple(f"f{i}" for i in range(31))))
    async with door(wide, DoorLimits(100_000, 1000, max_inflight_bytes=40_000)) as client:
        client.store.gate.clear()
        ten = json.dumps([{"stream_id": f"s{i}", "values": {"f0": 1.0}} for i in range(10)])
        first = asyncio.create_task(client.raw(ten))
        await asyncio.sleep(0.05)
        assert_problem(await client.raw(ten), 429, "wide replies")
        client.store.gate.set()
        assert (await first).status_code == 200
        assert (await client.raw(ten)).status_code == 200


async def test_a_stream_in_the_path_that_is_not_utf8_is_refused(client: Client) -> None:
    for name in ("Pumpe-%E4", "Pumpe-%F6", "%ED%A0%80"):
        answer = await client.post(f"/v1/streams/{name}/events", json={"values": {"value": 1.0}})
        assert_problem(answer, 422, "not UTF-8")
        assert name in answer.json()["value"]
        assert_problem(await client.get(f"/v1/streams/{name}"), 422, "not UTF-8")
    meant = await client.post("/v1/streams/%EF%BF%BD%C3%A4/events", json={"values": {"value": 1.0}})
    assert meant.json()["stream_id"] == "\ufffdä"


async def test_small_bodies_of_unstated_size_count_as_what_they_are(tiny_detector: Detector) -> None:
    async def chunked(body: bytes) -> AsyncIterator[bytes]:
        yield body[:10]
        yield body[10:]

    async with door(tiny_detector, DoorLimits(100_000, 1000, max_inflight_bytes=3000)) as client:
        client.store.gate.clear()
        body = json.dumps(event()).encode()
        zipped = JSON | {"content-encoding": "gzip"}
        requests = [client.post("/v1/events", content=chunked(body), headers=JSON) for _ in range(20)]
        requests += [client.raw(gzip.compress(body), zipped) for _ in range(20)]
        tasks = [asyncio.create_task(request) for request in requests]
        await asyncio.sleep(0.1)
        assert_problem(await client.post("/v1/events", content=chunked(b" " * 3000), headers=JSON), 429, "ONSET_MAX_INFLIGHT_BYTES")
        assert_problem(await client.raw(gzip.compress(b" " * 3000), zipped), 429, "ONSET_MAX_INFLIGHT_BYTES")
        client.store.gate.set()
        assert {response.status_code for response in await asyncio.gather(*tasks)} == {200}
        assert (await client.raw(json.dumps([event()]).ljust(3000))).status_code == 200  # all is given back


async def test_a_store_that_is_down_is_503_and_the_door_recovers_with_it(client: Client) -> None:
    client.store.down = True
    for body in (event(), [event(), event("b")]):
        response = await client.raw(json.dumps(body))
        assert_problem(response, 503, "does not answer")
        assert int(response.headers["retry-after"]) >= 1
    assert client.metrics.registry.get_sample_value("onset_events_total", {"door": "http", "outcome": "failed"}) == 3
    client.store.down = False
    assert (await client.score(event()))["state_version"] == 1


async def test_a_bug_is_a_500_with_a_reference_that_tells_nothing_else(client: Client) -> None:
    client.store.buggy = True
    with capture_logs() as logs:
        answers = [await client.raw(json.dumps(event())), await client.raw(json.dumps([event()])), await client.get("/v1/streams/a")]
    references = {entry["reference"] for entry in logs if entry["event"] == "unexpected_error"}
    for answer in answers:
        problem = assert_problem(answer, 500, "its reference in the service's log is")
        assert "secret" not in answer.text
        assert problem["detail"].rstrip(".").split()[-1] in references
    assert client.metrics.registry.get_sample_value("onset_unexpected_errors_total") == 3
    client.store.buggy = False
    assert (await client.score(event()))["state_version"] == 1


@pytest.mark.parametrize(("lack", "of"), [(MemoryError(), "memory"), (RuntimeError("can't start new thread"), "threads")])
async def test_what_there_is_no_memory_for_is_to_be_sent_again_and_no_bug(client: Client, lack: Exception, of: str) -> None:
    client.store.full, client.store.lack = True, lack
    with capture_logs() as logs:
        for body in (event(), [event()]):
            answer = await client.raw(json.dumps(body))
            assert assert_problem(answer, 503, f"no more {of} now: send it again")["type"] == "urn:onset:no-memory"
            assert int(answer.headers["retry-after"]) >= 1
    assert not [entry for entry in logs if entry["log_level"] == "error"]
    assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "memory"}) == 2
    assert client.metrics.registry.get_sample_value("onset_unexpected_errors_total") == 0
    client.store.full = False
    assert (await client.score(event()))["state_version"] == 1


async def test_unknown_addresses_and_methods_are_problems_too(client: Client) -> None:
    assert_problem(await client.get("/v1/nothing"), 404, "GET /v1/nothing")
    wrong = await client.put("/v1/events")
    assert_problem(wrong, 405, "PUT /v1/events")
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("leaves", range(4))
async def test_a_client_that_leaves_does_not_hurt_the_others(tiny_detector: Detector, leaves: int) -> None:
    async with door(tiny_detector) as client:
        client.store.gate.clear()
        head = asyncio.create_task(client.score(event("head")))
        await asyncio.sleep(0.02)
        tasks = [asyncio.create_task(client.score(event(f"s{i}"))) for i in range(4)]
        await asyncio.sleep(0.02)
        tasks[leaves].cancel()
        await asyncio.sleep(0)
        client.store.gate.set()
        answers = await asyncio.gather(*(task for i, task in enumerate(tasks) if i != leaves))
        assert {answer["stream_id"] for answer in answers} == {f"s{i}" for i in range(4) if i != leaves}
        await head


async def test_many_scrapes_at_once_are_one_exposition(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made, expose = 0, client.metrics.exposition

    async def counting() -> bytes:
        nonlocal made
        made += 1
        return await expose()

    monkeypatch.setattr(client.metrics, "exposition", counting)
    responses = await asyncio.gather(*(client.get("/metrics") for _ in range(50)))
    assert {response.status_code for response in responses} == {200}
    assert made <= 3


async def test_what_came_of_the_events_is_counted(client: Client) -> None:
    await client.score([event(timestamp=5, event_id="a"), event(timestamp=4), event(timestamp=5, event_id="a"), event(value="x")])
    sample = client.metrics.registry.get_sample_value
    for outcome in ("scored", "late", "duplicate", "rejected"):
        assert sample("onset_events_total", {"door": "http", "outcome": outcome}) == 1, outcome
    assert "onset_request_seconds" in (await client.get("/metrics")).text


async def test_a_problem_carries_the_value_that_is_to_blame(client: Client) -> None:
    for blamed, value in (
        (event(timestamp="soon"), '"soon"'),
        (event(timestamp=1.7e12), "1700000000000.0"),
        (event(value=1e300), "1e+300"),
        (event(value="warm"), '"warm"'),
        (event("a\nb"), '"a\\nb"'),
        ({"stream_id": "a", "values": {"flow": 1}}, "1.0"),
    ):
        problem = (await client.raw(json.dumps(blamed))).json()
        assert problem["value"] == value, problem


simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
nested = simple | st.lists(simple, max_size=3) | st.dictionaries(st.text(max_size=5), simple, max_size=3)
anything = nested | st.lists(nested, max_size=3) | st.dictionaries(st.text(max_size=5), nested, max_size=3)
almost_events = st.fixed_dictionaries(
    {},
    optional={
        "stream_id": anything,
        "values": anything | st.dictionaries(st.just("value") | st.text(max_size=3), anything, max_size=2),
        "timestamp": anything,
        "event_id": anything,
        "sequence": anything,
        "message": anything,
        "other": anything,
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(almost_events | anything, max_size=4), st.booleans())
def test_whatever_comes_the_neighbours_are_scored(tiny_detector: Detector, items: list[Any], lines: bool) -> None:
    async def post() -> None:
        async with door(tiny_detector) as client:
            everything = [event("first"), *items, event("last")]
            texts = [json.dumps(item) for item in everything]
            content = "\n".join(texts) if lines else "[" + ",".join(texts) + "]"
            response = await client.raw(content.encode("utf-8", "surrogatepass"), NDJSON if lines else JSON)
            assert response.status_code == 200, response.text
            answers = [json.loads(line) for line in response.content.splitlines()] if lines else response.json()
            assert len(answers) == len(everything)
            assert answers[0]["stream_id"] == "first"
            assert answers[-1]["stream_id"] == "last"
            assert all("p_value" in answer or answer["status"] in (409, 422, 429) for answer in answers)

    asyncio.run(post())


async def test_a_lasting_fault_is_accepted_over_http_as_often_as_one_likes(client: Client) -> None:
    await client.score([event("a/b", i % 3, timestamp=1e9 + i) for i in range(600)])
    [*_, last] = await client.score([event("a/b", 60.0, timestamp=1.1e9 + i) for i in range(5)])
    assert last["status"] == "frozen"
    for _ in range(2):
        response = await client.post("/v1/streams/a/b/accept")
        assert response.status_code == 200
        assert (response.json()["status"], response.json()["stream_id"]) == ("ready", "a/b")
    assert_problem(await client.post("/v1/streams/none/accept"), 404, "stream 'none'")


async def test_silent_streams_can_be_listed(client: Client) -> None:
    assert (await client.get("/v1/streams?silent=true")).json() == {"streams": [], "next_cursor": None}
    await client.score(event())
    assert len((await client.get("/v1/streams?silent=false")).json()["streams"]) == 1


async def test_the_policy_is_shown_changed_and_put_back(tiny_detector: Detector) -> None:
    async with door(tiny_detector) as client:
        shown = (await client.get("/v1/policy")).json()
        assert (shown["alpha"], shown["strict"], shown["origin"]["alpha"]) == (0.001, False, {"source": "environment", "changed_at": None})
        assert shown["expected_false_alarms"]["tiny"]["per_stream_and_day"] is None
        changed = await client.put("/v1/policy", json={"alpha": 0.02, "strict": True})
        assert changed.status_code == 200
        assert (changed.json()["alpha"], changed.json()["strict"]) == (0.02, True)
        assert changed.json()["origin"]["alpha"]["source"] == "run time"
        assert (await client.score({"stream_id": "a", "values": {"value": 1}}))["alpha"] == 0.02
        [model] = (await client.get("/v1/models")).json()["models"]
        assert (model["alpha"], model["strict"]) == (0.02, True)
        back = await client.delete("/v1/policy")
        assert (back.status_code, back.json()["alpha"], back.json()["strict"]) == (200, 0.001, False)


@pytest.mark.parametrize(
    ("content", "media", "status", "field", "value"),
    [
        ('{"alpha": 0.7}', "application/json", 422, "alpha", "0.7"),
        ('{"alpha": NaN}', "application/json", 422, "alpha", "NaN"),
        ('{"strict": "yes"}', "application/json", 422, "strict", '"yes"'),
        ('{"beta": {"a": [1]}}', "application/json", 422, "beta", '{"a": [1]}'),
        ('{"\\ud800": 1}', "application/json", 422, "\\ud800", "1"),
        ("[0.001]", "application/json", 400, None, None),
        ("0.001", "application/json", 400, None, None),
        ("", "application/json", 400, None, None),
        ("{", "application/json", 400, None, None),
        ("[" * 5000, "application/json", 400, None, None),
        ('{"alpha": 0.01}', "application/x-ndjson", 415, None, None),
        ('{"alpha": 0.01}', "application/x-www-form-urlencoded", 415, None, None),
        (" " * 100_001, "application/json", 413, None, None),
    ],
)
async def test_a_policy_that_cannot_be_asked_for_is_a_problem_and_changes_nothing(
    tiny_detector: Detector, content: str, media: str, status: int, field: str | None, value: str | None
) -> None:
    async with door(tiny_detector) as client:
        answer = await client.put("/v1/policy", content=content, headers={"content-type": media})
        problem = answer.json()
        assert (answer.status_code, problem["status"]) == (status, status)
        assert answer.headers["content-type"] == "application/problem+json"
        assert (problem.get("field"), problem.get("value")) == (field, value)
        assert await client.store.policy() == {}
        assert (await client.score({"stream_id": "a", "values": {"value": 1}}))["alpha"] == 0.001


async def test_other_methods_on_the_policy_are_no_methods_of_it(tiny_detector: Detector) -> None:
    async with door(tiny_detector) as client:
        assert (await client.post("/v1/policy", json={"alpha": 0.01})).status_code == 405


async def test_a_tenant_name_that_no_header_should_hold_is_refused(tiny_detector: Detector) -> None:
    async with door(tiny_detector) as client:
        assert_problem(await client.raw(json.dumps(event()), JSON | {"X-Scope-OrgID": "a b"}), 422, "X-Scope-OrgID")
        assert (await client.raw(json.dumps(event()), JSON | {"X-Scope-OrgID": "team-a"})).status_code == 200
