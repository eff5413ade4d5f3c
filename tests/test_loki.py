"""Loki's door over HTTP: every line is scored once in its stream's order, and a shipper is answered as Loki answers it."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service import loki
from service.api import Door
from service.detector import Detector
from service.errors import BadSetting
from service.events import MAX_MESSAGE_LENGTH, Event, Result
from service.feed import Batch
from service.prompb import pack
from service.rounds import Kind
from service.shipped import Shipping, log_model
from tests.log_doors import LINES, MAX_LINES, MAX_STREAMS, NOW, Shipper, shipper
from tests.pushes import Line, push_protobuf
from tests.tiny_log import build_tiny_log

NS = NOW * 10**9
PROTOBUF = {"content-type": "application/x-protobuf"}
STREAM = '{app="shop",host="web-1"}'


def at_loki(template: str = "") -> Any:
    def add(app: FastAPI, shipping: Shipping, door: Door) -> None:
        door.add_post(app, loki.PATH, loki.Loki(shipping, loki.Streams(template), MAX_LINES).push, "loki_push")

    return add


@pytest.fixture
async def promtail(log_detector: Detector) -> AsyncIterator[Shipper]:
    async with shipper(at_loki(), loki.DOOR, log_detector) as client:
        yield client


def some(*lines: str, start: int = NS, step: int = 10**9) -> list[Line]:
    return [(start + i * step, line) for i, line in enumerate(lines)]


async def push(client: Shipper, streams: Mapping[str, Sequence[Line]], *, path: str = loki.PATH, **headers: str) -> httpx.Response:
    return await client.post(path, content=pack(push_protobuf(streams)), headers=PROTOBUF | headers)


async def push_json(client: Shipper, lines: Sequence[Line], *, packed: bool) -> httpx.Response:
    values = [[str(time), *rest] for time, *rest in lines]
    body = json.dumps({"streams": [{"stream": {"host": "web-1", "app": "shop"}, "values": values}]}).encode()
    headers = {"content-type": "application/json"} | ({"content-encoding": "gzip"} if packed else {})
    return await client.post(loki.PATH, content=gzip.compress(body) if packed else body, headers=headers)


def assert_refused(response: httpx.Response, status: int, *says: str) -> None:
    assert response.status_code == status, response.text
    for part in says:
        assert part in response.json()["detail"], response.text


@pytest.mark.parametrize("form", ["protobuf", "json", "json in gzip"])
async def test_every_line_is_an_event_of_the_stream_that_its_labels_name(promtail: Shipper, form: str) -> None:
    if form == "protobuf":
        reply = await push(promtail, {'{host="web-1", app="shop"}': some(*LINES), '{app="other"}': some(LINES[0])})
    else:
        reply = await push_json(promtail, some(*LINES), packed="gzip" in form)
    assert (reply.status_code, reply.content) == (204, b"")
    last = await promtail.last(STREAM)
    assert (last.state_version, last.timestamp) == (4, NOW + 3)
    assert last.line
    assert last.line.template == "Disk <*> is <NUM> percent full"
    assert len(last.line.before) == 3
    assert promtail.count("scored") == (5 if form == "protobuf" else 4)


async def test_the_scores_are_those_of_the_same_lines_over_rest(log_detector: Detector) -> None:
    async with shipper(at_loki(), loki.DOOR, log_detector) as one, shipper(at_loki(), loki.DOOR, log_detector) as other:
        await push(one, {STREAM: some(*LINES * 3)})
        events = [Event(STREAM, None, line, NOW + i) for i, line in enumerate(LINES * 3)]
        expected, got = (await other.scorer.score(events))[-1], await one.last(STREAM)
    assert isinstance(expected, Result)
    assert (got.p_value, got.expected, got.anomaly_score) == (expected.p_value, expected.expected, expected.anomaly_score)


@pytest.mark.parametrize("written", ["1494893425.182", "1494893380.366", "1789999999.000002"])
async def test_the_time_of_a_line_is_the_one_that_a_file_or_rest_would_give(promtail: Shipper, written: str) -> None:
    seconds, _, fraction = written.partition(".")
    await push(promtail, {STREAM: [(int(seconds) * 10**9 + int(fraction.ljust(9, "0")), LINES[0])]})
    assert (await promtail.last(STREAM)).timestamp == float(written)


@pytest.mark.parametrize(("per_second", "unit"), [(1, "seconds"), (1_000, "milliseconds"), (1_000_000, "microseconds")])
async def test_a_time_in_a_larger_unit_is_refused_with_the_unit_that_it_looks_like(promtail: Shipper, per_second: int, unit: str) -> None:
    reply = await push(promtail, {STREAM: [(NOW * per_second, LINES[0]), *some(LINES[1])]})
    says = f"time {NOW * per_second} is no time in nanoseconds since 1970: it looks like {unit}"
    assert_refused(reply, 400, "1 of 2 lines were refused: 1 cannot be used", says)
    assert (promtail.count("scored"), promtail.count("rejected")) == (1, 1)


async def test_a_push_sent_again_whole_or_in_other_parts_is_scored_once(promtail: Shipper) -> None:
    lines = some(*LINES * 5)
    for part in (lines, lines, lines[:7], lines[3:], lines[-1:]):
        assert (await push(promtail, {STREAM: part})).status_code == 204
    assert (promtail.count("scored"), (await promtail.last(STREAM)).state_version) == (20, 20)
    assert promtail.count("duplicate") == 20 + 7 + 17 + 1


async def test_many_lines_of_one_instant_sent_again_are_scored_once(promtail: Shipper) -> None:
    lines = [(NS, f"Took {i} ms for /cart") for i in range(40)]
    for part in (lines, lines, lines[20:], lines[:30]):
        assert (await push(promtail, {STREAM: part})).status_code == 204
    assert (promtail.count("scored"), promtail.count("duplicate")) == (40, 90)


async def test_the_same_push_twice_at_once_is_scored_once(promtail: Shipper) -> None:
    promtail.store.gate.clear()
    lines = [(NS, f"Took {i} ms for /cart") for i in range(40)]
    first = asyncio.create_task(push(promtail, {'{a="b"}': some(LINES[0])}))
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(push(promtail, {STREAM: lines})) for _ in range(3)]
    await asyncio.sleep(0.05)
    promtail.store.gate.set()
    assert {reply.status_code for reply in await asyncio.gather(first, *others)} == {204}
    assert (promtail.count("scored"), promtail.count("duplicate")) == (41, 80)


async def test_equal_lines_of_one_nanosecond_are_two_in_one_push_and_the_same_in_the_next(promtail: Shipper) -> None:
    twice = [(NS, LINES[0]), (NS, LINES[0])]
    for part, scored in ((twice, 2), (twice, 2), (twice[:1], 2), ([*twice, *twice[:1]], 3)):
        await push(promtail, {STREAM: part})
        assert promtail.count("scored") == scored


async def test_lines_of_one_push_are_scored_in_the_order_of_their_times(log_detector: Detector) -> None:
    seen: list[tuple[str, float]] = []

    def watch(batch: Batch) -> None:
        records = batch.answers.batch.outcomes.records
        seen.extend(zip(batch.stream_ids, records["timestamp"].tolist(), strict=True))

    async with shipper(at_loki(), loki.DOOR, log_detector, watch=watch) as client:
        await push(client, {STREAM: list(reversed(some(*LINES)))})
        assert client.count("late") == 0
    assert seen == [(STREAM, NOW + i) for i in range(4)]


async def test_a_late_line_is_taken_counted_and_not_scored(promtail: Shipper) -> None:
    await push(promtail, {STREAM: some(LINES[0])})
    assert (await push(promtail, {STREAM: [(NS - 10**6, LINES[1]), (NS + 10**6, LINES[1])]})).status_code == 204
    assert (promtail.count("late"), promtail.count("scored"), (await promtail.last(STREAM)).state_version) == (1, 2, 2)


async def test_blank_lines_are_taken_counted_and_not_scored(promtail: Shipper) -> None:
    assert (await push(promtail, {STREAM: some("", LINES[0], " \t")})).status_code == 204
    assert (promtail.blank, promtail.count("scored")) == (2, 1)


@pytest.mark.parametrize(
    ("streams", "says"),
    [
        ({'{a="b"}': [(NS + 10_001 * 10**9, "x")]}, "too far in the future"),
        ({"{a=b}": [(NS, "x")]}, "The labels '{a=b}' cannot be read"),
        ({"{}": [(NS, "x")]}, "A stream has no labels"),
        ({'{a="1", a="2"}': [(NS, "x")]}, "the label 'a' twice"),
        ({f'{{a="{"y" * 5000}"}}': [(NS, "x")]}, "4096"),
    ],
)
async def test_a_line_that_can_never_be_taken_is_a_400_and_its_neighbours_are_scored(
    promtail: Shipper, streams: Mapping[str, Sequence[Line]], says: str
) -> None:
    reply = await push(promtail, {STREAM: some(*LINES), **streams})
    assert_refused(reply, 400, "1 of 5 lines were refused", says, "The others were taken.")
    assert "retry-after" not in reply.headers
    assert (promtail.count("rejected"), promtail.count("scored")) == (1, 4)


async def test_where_no_line_was_taken_none_is_said_to_be(promtail: Shipper) -> None:
    reply = await push(promtail, {"{}": [(NS, "x")]})
    assert reply.json()["detail"] == "1 of 1 lines were refused: 1 cannot be used (the first: A stream has no labels)."


async def test_of_a_line_that_is_too_long_the_beginning_is_scored_as_of_one_in_a_file(log_detector: Detector) -> None:
    seen: list[Batch] = []
    async with shipper(at_loki(), loki.DOOR, log_detector, watch=seen.append) as client:
        long, other = LINES[0] + " " + "x" * MAX_MESSAGE_LENGTH, LINES[0] + " " + "x" * MAX_MESSAGE_LENGTH + "y"
        for _ in range(2):
            assert (await push(client, {STREAM: [(NS, long), (NS, other), (NS + 1, LINES[1])]})).status_code == 204
        assert (client.count("scored"), client.count("duplicate"), client.cut) == (3, 3, 4)
    assert [message for batch in seen for message in batch.messages or []][:3] == [long[:MAX_MESSAGE_LENGTH]] * 2 + [LINES[1]]


async def test_new_streams_beyond_the_limit_do_not_hold_up_the_others(promtail: Shipper) -> None:
    await push(promtail, {f'{{n="{i}"}}': some(LINES[0]) for i in range(MAX_STREAMS)})
    reply = await push(promtail, {'{n="1"}': some(LINES[1], start=NS + 1), '{n="new"}': some(LINES[0])})
    assert_refused(reply, 400, "1 of 2 lines were refused", "ONSET_MAX_STREAMS")
    assert (await promtail.last('{n="1"}')).state_version == 2


async def test_while_the_store_does_not_answer_the_shipper_is_to_send_again_and_each_line_is_scored_once(promtail: Shipper) -> None:
    streams = {STREAM: some(*LINES * 600)}  # more than are scored at once
    for commits in (0, 1, 1):
        promtail.store.commits = commits
        reply = await push(promtail, streams)
        assert_refused(reply, 503, "The state store does not answer")
        assert reply.headers["retry-after"] == "1"
    promtail.store.commits = 1e9
    assert (await push(promtail, streams)).status_code == 204
    assert (await promtail.last(STREAM)).state_version == 2400


async def test_a_full_queue_is_a_429_and_the_push_sent_again_is_taken(log_detector: Detector) -> None:
    async with shipper(at_loki(), loki.DOOR, log_detector, queue=40) as client:
        client.store.gate.clear()
        pushes = []
        for i in range(3):  # one is under way, two wait
            pushes.append(asyncio.create_task(push(client, {'{a="b"}': some(*LINES * 2, start=NS + i * 10**10)})))
            await asyncio.sleep(0.05)
        reply = await push(client, {'{a="b"}': some(*LINES * 5, start=NS + 10**12)})
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert client.metrics.registry.get_sample_value("onset_refused_total", {"reason": "queue"}) == 1
        client.store.gate.set()
        assert {reply.status_code for reply in await asyncio.gather(*pushes)} == {204}
        assert (await push(client, {'{a="b"}': some(*LINES * 5, start=NS + 10**12)})).status_code == 204
        assert client.count("scored") == 44


async def test_a_push_larger_than_the_queue_is_scored_in_parts(log_detector: Detector) -> None:
    async with shipper(at_loki(), loki.DOOR, log_detector, queue=40) as client:
        client.store.commits = 5
        assert (await push(client, {STREAM: some(*LINES * 100)})).status_code == 503
        client.store.commits = math.inf
        assert (client.count("scored"), client.count("failed")) == (50, 350), "the parts that were written count"
        assert (await push(client, {STREAM: some(*LINES * 100)})).status_code == 204
        assert (await client.last(STREAM)).state_version == client.count("scored") == 400


async def test_what_is_no_push_is_refused_and_nothing_is_scored(promtail: Shipper) -> None:
    good = pack(push_protobuf({STREAM: some(*LINES)}))
    for content, headers, status in (
        (b"nonsense", PROTOBUF, 400),
        (good[:-3], PROTOBUF, 400),
        (pack(b"\xff\xff"), PROTOBUF, 400),
        (good, {"content-type": "application/json"}, 400),
        (b"{}", {"content-type": "application/json"}, 400),
        (good, {"content-type": "text/plain"}, 415),
        (good, PROTOBUF | {"content-encoding": "gzip"}, 415),
        (b"{}", {"content-type": "application/json", "content-encoding": "br"}, 415),
    ):
        reply = await promtail.post(loki.PATH, content=content, headers=headers)
        assert reply.status_code == status, reply.text
    assert promtail.count("scored") == 0
    assert (await promtail.post(loki.PATH, content=good)).status_code == 204, "without a type it is protobuf, as for Loki"


@pytest.mark.parametrize("form", ["protobuf", "json"])
async def test_while_a_long_push_is_read_others_get_their_turn(log_detector: Detector, form: str) -> None:
    blank: list[Line] = [(NS + i, "") for i in range(20_000)]
    turns, reads, ended = 0, False, asyncio.Event()

    async def others() -> None:
        nonlocal turns
        while not ended.is_set():
            await asyncio.sleep(0)
            turns += reads

    class Watched(loki.Loki):
        def _read(self, *given: Any) -> Any:
            nonlocal reads
            reads = True
            try:
                return super()._read(*given)
            finally:
                reads = False

    def many(app: FastAPI, shipping: Shipping, door: Door) -> None:
        door.add_post(app, loki.PATH, Watched(shipping, loki.Streams(""), len(blank)).push, "loki_push")

    async with shipper(many, loki.DOOR, log_detector) as client:
        counting = asyncio.create_task(others())
        reply = await (push(client, {STREAM: blank}) if form == "protobuf" else push_json(client, blank, packed=False))
        ended.set()
        await counting
        assert (reply.status_code, client.blank) == (204, len(blank))
    assert turns > 0


async def test_lines_and_bytes_of_a_push_are_limited(promtail: Shipper) -> None:
    assert_refused(await push(promtail, {STREAM: some(*["x"] * (MAX_LINES + 1), step=1)}), 413, "More than 6000 lines", "ONSET_MAX_LINES")
    assert_refused(await push(promtail, {STREAM: some(*["x" * 60_000] * 20)}), 413, "ONSET_MAX_BODY_BYTES")
    assert promtail.count("scored") == 0


async def test_a_template_names_streams_by_labels_and_structured_metadata(log_detector: Detector) -> None:
    async with shipper(at_loki("{app}/{request}"), loki.DOOR, log_detector) as client:
        lines: list[Line] = [(NS + i, line, {"request": f"r{i % 2}"}) for i, line in enumerate(LINES)]
        assert (await push(client, {'{app="shop", pod="p"}': lines})).status_code == 204
        assert [(await client.last(f"shop/r{i}")).state_version for i in (0, 1)] == [2, 2]
        reply = await push(client, {'{app="shop"}': [(NS + 9, LINES[0])]})
        assert_refused(reply, 400, "ONSET_LOKI_STREAM names 'request', which {app=\"shop\"} does not have")


async def test_a_name_of_many_labels_is_cut_and_told_apart_by_its_hash(promtail: Shipper) -> None:
    labels = ", ".join(f'label_{i}="a value of some length {i}"' for i in range(12))
    await push(promtail, {f'{{{labels}, n="{n}"}}': some(LINES[0]) for n in (1, 2)})
    page, _ = await promtail.scorer.streams.page("", 10)
    assert len({result.stream_id for result in page}) == 2
    assert {len(result.stream_id) for result in page} == {256}


async def test_the_model_is_the_only_one_that_takes_lines_or_the_one_that_is_said(
    log_detector: Detector, tiny_detector: Detector, tmp_path: Path
) -> None:
    second = Detector.load(build_tiny_log(tmp_path, "second"))
    lines = {STREAM: some(*LINES)}
    async with shipper(at_loki(), loki.DOOR, tiny_detector, log_detector) as client:
        assert (await push(client, lines)).status_code == 204
        assert_refused(await push(client, lines, path=f"{loki.PATH}?model=tiny"), 422, "'tiny' takes numbers, not log lines")
        assert (await push(client, lines, path=f"{loki.PATH}?model=none")).status_code == 404
    async with shipper(at_loki(), loki.DOOR, tiny_detector) as client:
        assert_refused(await push(client, lines), 422, "No model that takes log lines is loaded")
    async with shipper(at_loki(), loki.DOOR, log_detector, second) as client:
        assert_refused(await push(client, lines), 422, "Several models take log lines, second, tiny-log: set ONSET_LOGS_MODEL")
        assert (await push(client, lines, path=f"{loki.PATH}?model=second")).status_code == 204
    async with shipper(at_loki(), loki.DOOR, log_detector, second, models="second") as client:
        assert (await push(client, lines)).status_code == 204
    with pytest.raises(BadSetting, match="ONSET_LOGS_MODEL is 'tiny'; of the loaded models tiny-log take log lines"):
        log_model([log_detector.manifest, tiny_detector.manifest], "tiny")
    with pytest.raises(BadSetting, match="ONSET_LOKI_STREAM cannot be used"):
        loki.Streams("{app")


async def test_a_tenant_name_that_no_header_should_hold_is_refused(promtail: Shipper) -> None:
    assert (await push(promtail, {STREAM: some(LINES[0])}, **{"x-scope-orgid": "a"})).status_code == 204
    assert (await push(promtail, {STREAM: some(LINES[0])}, **{"x-scope-orgid": "a b"})).status_code == 422


def test_kinds_are_known() -> None:
    """What the door makes of each outcome of a line rests on these."""
    assert {kind.name for kind in Kind} == {"SCORED", "DUPLICATE", "REPEATED", "LATE", "CONFLICT", "REFUSED", "FENCED"}
