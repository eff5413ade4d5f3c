from __future__ import annotations

import asyncio
import errno
import gc
import io
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import structlog

from service import logs, tracing
from service.canary import CanaryResult
from service.errors import BadParameter
from tests import local
from tests.e2e.process import Service

EVENT = {"stream_id": "pump-7", "values": {"value": 1.0}}


@pytest.fixture
def configured() -> Iterator[None]:
    """The process's logging is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("service")
    before = structlog.get_config(), root.handlers[:], root.level, ours.level
    yield
    structlog.configure(**before[0])
    root.handlers[:] = before[1]
    root.setLevel(before[2])
    ours.setLevel(before[3])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.usefixtures("configured")
def test_a_line_says_to_which_request_and_batch_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    tokens = tracing.REQUEST.set("r-1"), tracing.BATCH.set("b-2")
    structlog.get_logger().warning("something", stream_id="pump-7")
    logging.getLogger("some.library").warning("of a library")
    tracing.REQUEST.reset(tokens[0])
    tracing.BATCH.reset(tokens[1])
    structlog.get_logger().warning("something else")
    ours, library, other = lines(capsys.readouterr().err)
    assert (ours["event"], ours["request"], ours["batch"], ours["stream_id"]) == ("something", "r-1", "b-2", "pump-7")
    assert (library["event"], library["request"]) == ("of a library", "r-1")
    assert not {"request", "batch"} & set(other)


class Disk(io.StringIO):
    """Of a log; full while `full`."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


@pytest.mark.usefixtures("configured")
def test_a_log_whose_reader_stands_still_stops_nothing_and_says_so_when_it_reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    lost: list[int] = []

    def say(*numbers: int) -> None:
        for number in numbers:
            structlog.get_logger().warning("long", number=number, text="x" * 5000)

    with os.fdopen(writing, "w") as pipe, os.fdopen(reading) as reader:
        monkeypatch.setattr(sys, "stderr", pipe)
        logs.configure("info", as_json=True).lost = lambda: lost.append(1)
        saying = threading.Thread(target=say, args=range(40), daemon=True)
        saying.start()
        saying.join(30)
        assert not saying.is_alive(), "it waits for the reader"
        assert lost
        read = reader.read()
        structlog.get_logger().warning("again")
        read += reader.read()
    *whole, torn, again = read.splitlines()
    assert [json.loads(line)["number"] for line in whole] == list(range(40 - len(lost)))
    assert torn.startswith('{"number":')
    assert json.loads(again)["lines_lost"] == len(lost)


def test_a_terminal_that_stands_still_stops_nothing() -> None:
    """It says that there is room where there is less than a line needs."""
    reading, writing = os.openpty()
    lost: list[int] = []
    with os.fdopen(writing, "w") as terminal, os.fdopen(reading, "rb", buffering=0):
        stderr = logs.Stderr(terminal)
        stderr.lost = lambda: lost.append(1)
        saying = threading.Thread(target=lambda: [stderr.write("x" * 300 + "\n") for _ in range(2000)], daemon=True)
        saying.start()
        saying.join(30)
        assert not saying.is_alive(), "it waits for the terminal"
        assert os.get_blocking(writing), "who else has the terminal is not asked"
    assert lost


def test_a_file_that_is_closed_takes_no_lines_and_neither_does_who_has_its_number_then(tmp_path: Path) -> None:
    lost: list[int] = []
    with (tmp_path / "log").open("w") as file:
        stderr = logs.Stderr(file)
        stderr.lost = lambda: lost.append(1)
        stderr.write("taken\n")
        number = file.fileno()
    with (tmp_path / "other").open("w") as other:
        assert other.fileno() == number
        stderr.write("lost\n")
    assert ((tmp_path / "log").read_text(), (tmp_path / "other").read_text(), lost) == ("taken\n", "", [1])


class Garbage:
    """Tells of itself when it is found."""

    def __init__(self, stderr: logs.Stderr) -> None:
        self._stderr, self._self = stderr, self

    def __del__(self) -> None:
        self._stderr.write("found\n")


def test_what_the_garbage_collector_tells_in_the_middle_of_a_line_follows_it() -> None:
    class Collecting(io.StringIO):
        def write(self, text: str) -> int:
            gc.collect()
            return super().write(text)

    stderr = logs.Stderr(to := Collecting())
    Garbage(stderr)
    line = "x" * 5000 + "\n"
    saying = threading.Thread(target=stderr.write, args=[line], daemon=True)
    saying.start()
    saying.join(30)
    assert not saying.is_alive(), "the thread waits for itself"
    assert to.getvalue() == f"{line}found\n"


@pytest.mark.usefixtures("configured")
def test_a_log_whose_disk_is_full_ends_nothing_and_says_so_when_there_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, lost = Disk(), []
    monkeypatch.setattr(sys, "stderr", disk)
    logs.configure("info", as_json=True).lost = lambda: lost.append(1)
    for full in (False, True, True, False, False):
        disk.full = full
        structlog.get_logger().warning("ours")
        logging.getLogger("some.library").warning("theirs")
    assert [(line["event"], line.get("lines_lost")) for line in lines(disk.getvalue())] == [
        ("ours", None),
        ("theirs", None),
        ("ours", 4),
        ("theirs", None),
        ("ours", None),
        ("theirs", None),
    ]
    assert len(lost) == 4
    disk.close()
    structlog.get_logger().warning("to nobody")
    assert len(lost) == 5


@pytest.mark.usefixtures("configured")
def test_names_of_streams_are_hashed_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True, hash_streams=True)
    log = structlog.get_logger()
    log.warning("silent", stream_id="plant/pump-7", model="default")
    log.warning("accepted", stream_id="plant/pump-7")
    log.warning("other", stream_id="plant/pump-8")
    log.error("failed", path="/v1/streams/plant/pump-7/accept")
    text = capsys.readouterr().err
    first, again, other, failed = lines(text)
    assert "pump" not in text
    assert first["stream_id"] == again["stream_id"] == logs.hashed("plant/pump-7") != other["stream_id"]
    assert failed["path"] == f"/v1/streams/{logs.hashed('plant/pump-7')}/accept"
    assert first["model"] == "default"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "level is 'None'; it is one of debug, info, warning, error"),
        ({"level": "loud"}, "level is 'loud'"),
        ({"level": "debug", "seconds": 0}, "seconds is 0; it is a number above 0"),
        ({"level": "debug", "seconds": True}, "seconds is True"),
        ({"level": "debug", "seconds": 1e9}, "86400 at most"),
        ({"level": "debug", "for": 3}, "'for' can't be changed here"),
    ],
)
def test_a_level_that_cannot_be_taken_is_refused(body: dict[str, Any], says: str) -> None:
    with pytest.raises(BadParameter, match=says):
        logs.Level("info").change(body)


@pytest.mark.usefixtures("configured")
async def test_a_level_for_a_while_ends_by_itself_and_a_later_change_ends_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning", as_json=True)
    level, log = logs.Level("warning", lambda: 100.0), structlog.get_logger()
    log.info("unseen")
    level.change({"level": "debug", "seconds": 0.05})
    log.debug("seen")
    assert level.reply() == logs.LevelReply("debug", "warning", 100.05)
    await asyncio.sleep(0.1)
    assert level.reply() == logs.LevelReply("warning", "warning", None)
    log.debug("unseen")
    level.change({"level": "info", "seconds": 0.05})
    level.change({"level": "debug"})
    await asyncio.sleep(0.1)
    assert level.reply() == logs.LevelReply("debug", "warning", None)
    level.reset()
    told = [line["event"] for line in lines(capsys.readouterr().err)]
    assert told == ["log_level_changed", "seen", *["log_level_changed"] * 4]


def test_the_level_of_a_running_service_is_changed_and_its_batches_are_told_with_their_requests(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    def batches() -> list[dict[str, Any]]:
        return [line for line in lines(service.log.read_text()) if line["event"] == "batch"]

    with Service(tmp_path / "data", model=tiny_model_path, LOG_LEVEL="info") as service:
        local.post(f"{service.url}/v1/events", json=EVENT).raise_for_status()
        assert batches() == []
        assert local.get(f"{service.url}/v1/log-level").json() == {"level": "info", "environment": "info", "until": None}
        changed = local.put(f"{service.url}/v1/log-level", json={"level": "debug", "seconds": 60}).raise_for_status().json()
        assert changed["level"] == "debug"
        assert 50 < changed["until"] - time.time() < 61
        local.post(f"{service.url}/v1/events", json=EVENT, headers={"x-request-id": "mine"}).raise_for_status()
        [line] = batches()
        assert (line["requests"], line["model"]) == (["mine"], "tiny")
        assert line["batch"]
        assert local.put(f"{service.url}/v1/log-level", json={"level": "loud"}).status_code == 422
        assert local.delete(f"{service.url}/v1/log-level").json()["level"] == "info"
        local.post(f"{service.url}/v1/events", json=EVENT).raise_for_status()
        assert len(batches()) == 1


def test_a_start_and_an_orderly_end_are_lines_of_the_log(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, LOG_LEVEL="info", forked=False) as service:
        local.post(f"{service.url}/v1/events", json=EVENT).raise_for_status()
    told = lines(service.log.read_text())
    [serving] = [line for line in told if line["event"] == "serving"]
    assert (serving["url"], list(serving["models"]), serving["not_ready"]) == (service.url, ["tiny"], None)
    assert [line["event"] for line in told][-2:] == ["stopping", "stopped"]


def test_every_event_of_the_log_is_explained_and_none_that_there_is_not() -> None:
    root = Path(__file__).parents[1]
    sources = "\n".join(path.read_text() for path in sorted((root / "service").rglob("*.py")))
    calls = re.findall(r"\blog\.(?:debug|info|warning|error|exception)\(\s*([^,)]+)", sources)
    written = {event for call in calls for event in re.findall(r'"([a-z_]+)"', call)}
    written |= set(re.findall(r'\b_tell\(\s*"([a-z_]+)"', sources)) | {f"canary_{result}" for result in get_args(CanaryResult)}
    page = (root / "docs/log-events.md").read_text()
    explained = {event for row in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE) for event in re.findall(r"`([a-z_]+)`", row)}
    assert explained == written
    assert not re.findall(r"\blog\.\w+\([^)]*\b(?:timestamp|level|event)=", sources), "the line's own would take its place"
