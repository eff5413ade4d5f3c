"""Pacing, identities and patience of the replay; against a real service see e2e/test_replay_service.py."""

from __future__ import annotations

import csv
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import NotWritten
from service.replay import (
    LISTED,
    Door,
    Encoder,
    Options,
    Output,
    Pace,
    Recording,
    ReplayFailed,
    Served,
    StreamReport,
    _closing,
    _summary,
    in_order,
    parse_speed,
    record,
    run,
)
from service.tables import ReadOptions, Source, Table
from tests.limits import files_of_at_most
from tests.times import Clock


def recording(stream: str, *seconds: float) -> Recording:
    values = np.arange(len(seconds), dtype=np.float64)[:, None]
    return Recording(stream, f"{stream}.csv", np.array(seconds, np.float64), values)


class Sleeping(Clock):
    """Time that passes only by sleeping."""

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_independent_streams_begin_together_and_keep_their_own_intervals() -> None:
    old, new = recording("a", 1000, 1002, 1004), recording("b", 5000, 5001)
    order = [(at, one.stream, row) for at, one, row in in_order([old, new], together=True)]
    assert order == [(0, "a", 0), (0, "b", 0), (1, "b", 1), (2, "a", 1), (4, "a", 2)]


def test_parts_of_one_stream_follow_each_other_at_their_recorded_times() -> None:
    later, earlier = recording("s", 2000, 2001), recording("s", 1000)
    assert [(at, row) for at, _, row in in_order([later, earlier], together=False)] == [(0, 0), (1000, 0), (1001, 1)]


def test_a_time_that_goes_back_keeps_its_place_in_the_file() -> None:
    one = recording("a", 10, 13, 11, 14)
    assert [(at, row) for at, _, row in in_order([one], together=True)] == [(0, 0), (3, 1), (3, 2), (4, 3)]


def test_events_are_handed_out_when_they_are_due_at_the_asked_speed() -> None:
    clock = Sleeping(100.0)
    pace = Pace(10.0, 1000, clock, clock.sleep)
    sent = [
        (round(clock.now - 100, 3), [row for _, row in portion])
        for portion in pace.portions(in_order([recording("a", 0, 0, 5, 20)], together=True))
    ]
    assert sent == [(0, [0, 1]), (0.5, [2]), (2.0, [3])]


def test_a_replay_that_fell_behind_catches_up_in_full_portions() -> None:
    clock = Sleeping(100.0)
    sizes = []
    for portion in Pace(1.0, 4, clock, clock.sleep).portions(in_order([recording("a", *range(10))], together=True)):
        sizes.append(len(portion))
        clock.sleep(100)
    assert sizes == [1, 4, 4, 1]


def test_at_full_speed_nothing_waits() -> None:
    clock = Sleeping(100.0)
    portions = list(Pace(math.inf, 3, clock, clock.sleep).portions(in_order([recording("a", *range(7))], together=True)))
    assert [len(portion) for portion in portions] == [3, 3, 1]
    assert clock.now == 100.0


def test_an_event_keeps_its_identity_and_time_when_it_is_replayed_again() -> None:
    one = recording("a", 7.25, 8.5)
    first, again = (Encoder(["value"], "original").lines([(one, 1)])[0] for _ in range(2))
    assert first == again
    assert json.loads(first) == {"stream_id": "a", "event_id": "a.csv:1", "timestamp": 8.5, "values": {"value": 1.0}}


def test_with_new_timestamps_every_replay_has_identities_of_its_own() -> None:
    one = recording("a", 7.25)
    first, again = (json.loads(Encoder(["value"], "now", lambda: 1e9).lines([(one, 0)])[0]) for _ in range(2))
    assert first["timestamp"] == 1e9
    assert first["event_id"] != again["event_id"]


def test_a_missing_number_is_sent_as_null() -> None:
    one = Recording("a", "a.csv", np.zeros(1), np.array([[np.nan, 2.0]]))
    assert json.loads(Encoder(["x", "y"], "original").lines([(one, 0)])[0])["values"] == {"x": None, "y": 2.0}


def test_streams_are_named_after_their_files_and_never_mixed_up() -> None:
    table = Table("x", np.zeros(1), {"value": np.zeros(1)}, ["0"])
    tables = [(table, np.zeros((1, 1)))] * 2
    sources = [Source(Path("d/valve1/1.csv"), "valve1/1.csv"), Source(Path("d/valve1/2.csv"), "valve1/2.csv")]
    assert [one.stream for one in record(sources, tables, None)] == ["valve1/1", "valve1/2"]
    assert [one.stream for one in record(sources, tables, "rig")] == ["rig", "rig"]
    assert len({one.source for one in record(sources, tables, "rig")}) == 2
    with pytest.raises(ReplayFailed, match="--stream"):
        record([sources[0], sources[0]], tables, None)


@pytest.mark.parametrize(("text", "speed"), [("100x", 100.0), ("2.5", 2.5), ("1X", 1.0), ("max", math.inf)])
def test_speed_is_a_factor_or_max(text: str, speed: float) -> None:
    assert parse_speed(text) == speed


@pytest.mark.parametrize("text", ["fast", "0x", "-1", "nan", ""])
def test_a_speed_that_is_no_factor_is_refused(text: str) -> None:
    with pytest.raises(ReplayFailed, match="--speed"):
        parse_speed(text)


def told(event: int) -> dict[str, Any]:
    return dict.fromkeys(Output.COLUMNS) | {"status": "ready", "event_id": f"a.csv:{event}", "expected": {}}


def test_replies_that_no_longer_fit_onto_the_disk_are_told_and_those_before_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "replies.csv"

    def write(output: Output) -> None:
        for first in range(0, 400, 20):
            output.write([told(event) for event in range(first, first + 20)])

    with files_of_at_most(5000), ExitStack() as files, pytest.raises(NotWritten, match=r"replies\.csv cannot be written: File too large"):
        write(Output(path, Served("pump", ["value"], log=False), files))
    with path.open(newline="") as file:
        kept = [row["event_id"] for row in csv.DictReader(file)]
    assert 0 < len(kept) < 400
    assert len(kept) % 20 == 0
    assert kept == [f"a.csv:{event}" for event in range(len(kept))]


# ── patience, against a real server that misbehaves as it is told ─────────────────────────────────────────────────────────────


class Server:
    """Answers POST /v1/events by what `script` says, one entry a request; after its end every event is scored."""

    def __init__(self, script: list[Callable[[Any, list[dict[str, Any]]], None]]) -> None:
        self.script = script
        self.requests: list[list[str]] = []
        self.url = ""


def scored(event: dict[str, Any]) -> dict[str, Any]:
    return {"event_id": event["event_id"], "status": "ready", "anomaly_score": 0.1}


def answer(handler: Any, events: list[dict[str, Any]]) -> None:
    reply(handler, 200, "\n".join(json.dumps(scored(event)) for event in events))


def reply(handler: Any, status: int, body: str, **headers: str) -> None:
    content = body.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def hang_up(handler: Any, events: list[dict[str, Any]]) -> None:
    handler.close_connection = True


@contextmanager
def serving(*script: Callable[[Any, list[dict[str, Any]]], None]) -> Iterator[Server]:
    server = Server(list(script))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            events = [json.loads(line) for line in body.splitlines()]
            server.requests.append([event["event_id"] for event in events])
            (server.script.pop(0) if server.script else answer)(self, events)

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


def lines(count: int) -> list[bytes]:
    one = recording("a", *range(count))
    return Encoder(["value"], "original").lines([(one, row) for row in range(count)])


def test_what_was_not_answered_is_sent_again_with_the_same_identities() -> None:
    def busy(handler: Any, events: list[dict[str, Any]]) -> None:
        reply(handler, 429, "{}", Retry_After="0")

    def down(handler: Any, events: list[dict[str, Any]]) -> None:
        reply(handler, 503, "{}")

    with serving(hang_up, busy, down) as server, httpx.Client(base_url=server.url) as client:
        said: list[str] = []
        door = Door(client, Options(server.url), said.append)
        replies = door.score(lines(3))
    assert [one["event_id"] for one in replies] == ["a.csv:0", "a.csv:1", "a.csv:2"]
    assert server.requests == [["a.csv:0", "a.csv:1", "a.csv:2"]] * 4
    assert door.retries == 3
    assert [word in line for word, line in zip(("RemoteProtocolError", "429", "503"), said, strict=True)] == [True] * 3


def test_retry_after_is_honoured() -> None:
    import time

    with serving(lambda handler, events: reply(handler, 429, "{}", Retry_After="1")) as server, httpx.Client(base_url=server.url) as client:
        began = time.monotonic()
        Door(client, Options(server.url), lambda line: None).score(lines(1))
    assert time.monotonic() - began >= 1.0


def test_only_the_events_that_were_not_committed_are_sent_again() -> None:
    def half(handler: Any, events: list[dict[str, Any]]) -> None:
        replies = [scored(events[0]), {"status": 422, "detail": "no number"}, {"status": 503, "detail": "store"}, {"status": 503}]
        reply(handler, 200, "\n".join(json.dumps(one) for one in replies))

    with serving(half) as server, httpx.Client(base_url=server.url) as client:
        replies = Door(client, Options(server.url), lambda line: None).score(lines(4))
    assert server.requests[1:] == [["a.csv:2", "a.csv:3"]]
    assert [one["status"] for one in replies] == ["ready", 422, "ready", "ready"]


def test_a_service_that_stays_away_ends_the_replay_with_advice() -> None:
    with httpx.Client(base_url="http://127.0.0.1:9") as client:
        door = Door(client, Options("http://127.0.0.1:9", patience=0.3), lambda line: None)
        with pytest.raises(ReplayFailed, match="goes on where it was"):
            door.score(lines(1))


def test_an_answer_that_is_a_refusal_is_not_tried_again() -> None:
    with serving(lambda handler, events: reply(handler, 413, "too large")) as server, httpx.Client(base_url=server.url) as client:
        with pytest.raises(ReplayFailed, match="413: too large"):
            Door(client, Options(server.url), lambda line: None).score(lines(2))
        assert len(server.requests) == 1


def test_contributions_add_up_over_anomalous_events_and_over_whole_runs() -> None:
    def event(score: float | None, is_anomaly: bool, started: float | None, part: float) -> dict[str, Any]:
        contributors = [{"feature": "x", "contribution": part}, {"feature": "y", "contribution": 1 - part}]
        flags = {"duplicate": False, "late": False, "alert_score": 2.0 if is_anomaly else 0.0, "threshold": 1.0}
        return {
            "status": "ready",
            "timestamp": 10.0,
            "anomaly_score": score,
            "is_anomaly": is_anomaly,
            "anomaly_started_at": started,
            "contributors": contributors,
        } | flags

    report = StreamReport()
    events = [event(None, False, None, 0.9), event(1.5, True, 10.0, 0.75), event(0.2, False, 10.0, 0.25), {"status": 422}]
    assert [report.add(one) for one in events] == [False, True, False, False]
    assert (report.events, report.scored, report.anomalous, report.onsets, report.refused) == (4, 2, 1, 1, 1)
    assert report.blame == {"x": 0.75, "y": 0.25}
    assert report.blame_running == {"x": 1.0, "y": 1.0}
    assert [report.add(one) for one in (event(2.0, True, 10.0, 0.5), event(1.5, True, 99.0, 0.5))] == [False, True]
    assert (report.runs, report.onsets) == (2, 3)


def test_of_many_streams_the_worst_are_listed_and_all_are_counted() -> None:
    reports = {f"s{i}": StreamReport(events=10, runs=i % 7 == 0) for i in range(500)}
    reports["worst"] = StreamReport(events=5, runs=3)
    to = io.StringIO()
    Console(file=to, width=200).print(_summary(reports))
    rows = [line.split() for line in to.getvalue().splitlines() if line.strip()]
    assert len(rows) == 3 + LISTED + 1
    assert rows[3][0] == "worst"
    assert rows[-1][:2] == ["all", "501,"]
    assert rows[-1][-8:] == ["5,005", "0", "75", "0", "0", "0", "0", "0"]


def test_a_replay_to_nowhere_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("timestamp,value\n1,2\n")
    with pytest.raises(ReplayFailed, match="Is the service running"):
        run([tmp_path / "a.csv"], Options("http://127.0.0.1:9", patience=0.2), ReadOptions())


@pytest.mark.parametrize(("option", "value"), [("--speed", "fast"), ("--timestamps", "soon")])
def test_the_command_refuses_an_option_with_its_value(option: str, value: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["replay", str(tmp_path), option, value])
    assert ran.exit_code == 2
    assert f"{option} is '{value}'" in ran.output


def test_a_replay_says_that_nobody_is_told_of_alerts_of_the_past() -> None:
    def said(opened: float | None) -> str:
        screen = io.StringIO()
        with httpx.Client() as client:
            door = Door(client, Options("http://127.0.0.1:1"), print)
            _closing({"s": StreamReport(events=9, opened=opened)}, door, Console(file=screen, width=400))
        return screen.getvalue()

    assert "no sink is told of them" in said(time.time() - 3700)
    assert said(time.time() - 3500) == said(None) == ""


def test_a_file_whose_newest_row_is_the_first_is_told_from_one_that_was_replayed_before() -> None:
    screen = io.StringIO()
    reports = {"newest": StreamReport(events=730, late=729), "again": StreamReport(events=730, late=700, duplicates=30)}
    with httpx.Client() as client:
        _closing(reports, Door(client, Options("http://127.0.0.1:1"), print), Console(file=screen, width=400))
    before, backwards = screen.getvalue().splitlines()
    assert before.startswith("All events of again were older than what the service has seen: this was replayed before.")
    assert backwards.startswith("Most events of newest were older than one before them: where the newest row of a file is the first")
