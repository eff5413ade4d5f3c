"""Another file of a model's name beside the old one, under load: who answers when, what is refused, and that each event is answered once.

    python -m bench.rollout     an old replica alone ─► a replica of the new file is started ─► that one is killed (-9)

Senders have an event of each stream under way, through whichever replica answers, and send some that were answered once more. Every
answer is held against what a stream may do: go on with the file it has, or start afresh with the other one.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import typer

from bench.report import Goal, JsonFile, Machine, report, table
from bench.servers import service
from bench.victims import Child
from service.artifact import SHA256_KEY, UNSEALED, find_artifacts, seal
from service.asking import SHIPPED_MODELS
from service.claims import BEAT_SECONDS, EXPIRY_SECONDS
from service.embedded import find_server, server_options

SENDERS = 3
AGAIN = 0.3
"""Of the requests hold the events of the one before once more."""
PATIENCE_SECONDS = 30.0
REFUSED = (429, 503)
QUIET = {"ONSET_LOG_LEVEL": "error"}
EACH = 20
"""Events of each stream before the rollout, and after each change."""


class Request(NamedTuple):
    began: float
    """When it was sent first."""
    seconds: float
    """Until all of it was answered."""
    refused: int
    """Times."""


class Sender(threading.Thread):
    """Sends its streams' events in order, each again until it is answered, to any of the replicas."""

    def __init__(self, number: int, urls: Sequence[str], streams: int) -> None:
        super().__init__(daemon=True)
        self.streams = [f"s{i}" for i in range(streams) if i % SENDERS == number]
        self.sent = 0
        """Events of each stream that are answered."""
        self.answers: list[tuple[str, dict[str, Any]]] = []
        """Event and answer, of everything that was sent."""
        self.requests: list[Request] = []
        self.refusals: list[httpx.Response] = []
        self._urls, self._random, self._stopping = urls, random.Random(number), threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            with httpx.Client(timeout=10) as client:
                last: list[dict[str, Any]] = []
                while not self._stopping.is_set():
                    events = [self._event(stream) for stream in self.streams]
                    self._insist(client, last + events if self._random.random() < AGAIN else events)
                    self.sent += 1
                    last = events
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        """Returns when all that was sent is answered; raises what ended it before."""
        self._stopping.set()
        self.join(PATIENCE_SECONDS)
        if self._error is not None:
            raise self._error
        if self.is_alive():
            raise TimeoutError(f"A request was not answered within {PATIENCE_SECONDS:.0f} s.")

    def lives(self) -> list[list[str]]:
        """The versions that each stream was stepped by, one after the other. Raises ValueError for an answer that cannot be.

        Every event is answered, and each step is the next one of its stream, or the first one with another file.
        """
        missing = {f"{name}-{i}" for name in self.streams for i in range(self.sent)} - {event for event, _ in self.answers}
        if missing:
            raise ValueError(f"{len(missing)} events are not answered, {min(missing)} among them.")
        files: dict[str, list[str]] = {name: [] for name in self.streams}
        steps: dict[str, list[str]] = {name: [] for name in self.streams}
        for event, answer in self.answers:
            stream, file, version = answer["stream_id"], answer["model_version"], answer["state_version"]
            if answer["late"] or not answer["expected"]:
                continue
            if files[stream][-1:] != [file]:
                files[stream].append(file)
                steps[stream] = []
            if version == len(steps[stream]) + 1 and event not in steps[stream]:
                steps[stream].append(event)
            elif not 1 <= version <= len(steps[stream]) or steps[stream][version - 1] != event:
                raise ValueError(f"{event} is step {version} of a stream that has seen {len(steps[stream])} with that file: {answer}")
        return list(files.values())

    def _event(self, stream: str) -> dict[str, Any]:
        value = round(self._random.gauss(0, 1), 3)
        return {"stream_id": stream, "values": {"value": value}, "timestamp": 1.7e9 + self.sent, "event_id": f"{stream}-{self.sent}"}

    def _insist(self, client: httpx.Client, events: list[dict[str, Any]]) -> None:
        began, refused = time.monotonic(), 0
        while events:
            url = self._random.choice(self._urls)
            try:
                response = client.post(f"{url}/v1/events", content=json.dumps(events), headers={"content-type": "application/json"})
            except httpx.TransportError:
                time.sleep(0.01)
                continue
            if response.status_code in REFUSED:
                self.refusals.append(response)
                refused += 1
                time.sleep(0.01)
                continue
            answers = response.raise_for_status().json()
            failed = [isinstance(answer["status"], int) for answer in answers]
            self.answers += [(event["event_id"], answer) for event, answer, bad in zip(events, answers, failed, strict=True) if not bad]
            events = [event for event, bad in zip(events, failed, strict=True) if bad]
        self.requests.append(Request(began, time.monotonic() - began, refused))


@contextmanager
def sending(urls: Sequence[str], streams: int) -> Iterator[list[Sender]]:
    """Senders at work; at the end they have answers to all that they sent."""
    senders = [Sender(number, urls, streams) for number in range(SENDERS)]
    for sender in senders:
        sender.start()
    try:
        yield senders
    finally:
        for sender in senders:
            sender.stop()


def until(true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
    """Seconds until it is. Raises TimeoutError."""
    began = time.monotonic()
    while not true():
        if time.monotonic() > began + seconds:
            raise TimeoutError(f"It did not happen within {seconds:g} s.")
        time.sleep(0.02)
    return time.monotonic() - began


def more(senders: Sequence[Sender], events: int) -> None:
    """Returns when so many more of each stream are answered."""
    goals = [sender.sent + events for sender in senders]
    until(lambda: all(sender.sent >= goal for sender, goal in zip(senders, goals, strict=True)))


@dataclass(frozen=True)
class Phase:
    """What the senders saw while who answers changed."""

    what: str
    seconds: float
    """Until it had changed."""
    afresh: int
    """Streams that the one that answers now has started afresh; the other started none meanwhile."""
    longest: float
    """Seconds that a request waited for its answer."""
    requests: int
    refused: int
    """Of them, at least once."""


def main(
    streams: Annotated[int, typer.Option(min=SENDERS, max=10_000)] = 300,
    model: Annotated[Path, typer.Option(help="A detector of one feature, `value`. Default: the one that ships.")] = SHIPPED_MODELS,
    json_file: JsonFile = None,
) -> None:
    """Roll out, kill, and print a table."""
    machine = Machine.now()
    with tempfile.TemporaryDirectory(prefix="onset-") as folder:
        phases, events = roll(Path(folder), find_artifacts(model)[0], streams)
    made = table(
        f"{streams} streams, {events:,} events, each answered; no step was lost or taken twice",
        ("what",),
        ("seconds", "streams afresh", "longest wait", "requests", "refused at first"),
    )
    for phase in phases:
        cells = (f"{phase.seconds:.2f}", f"{phase.afresh}", f"{phase.longest:.2f} s", f"{phase.requests:,}", f"{phase.refused:,}")
        made.add_row(phase.what, *cells)
    bounds = (2 * BEAT_SECONDS, EXPIRY_SECONDS + 2 * BEAT_SECONDS)
    goals = [Goal(f"{phase.what}: seconds", phase.seconds, bound, at_least=False) for phase, bound in zip(phases, bounds, strict=True)]
    goals += [Goal(f"{phase.what}: streams afresh", phase.afresh, streams, at_least=False) for phase in phases]
    report([made], goals, machine, {"streams": streams, "events": events, "phases": [asdict(phase) for phase in phases]}, json_file)


def roll(folder: Path, old_file: Path, streams: int) -> tuple[list[Phase], int]:
    """What a rollout and the kill of the new replica come to, and the events that were answered. Raises ValueError where one was wrong."""
    new_file, socket, urls = another(old_file, folder), folder / "store.sock", list[str]()
    options = [part for name, value in server_options(folder, socket).items() for part in (f"--{name}", value)]
    store = Child([find_server(), *options], {}, folder / "store.log")
    try:
        with service(folder / "old", redis_url=f"unix://{socket}", model=str(old_file), settings=QUIET) as old:
            urls.append(f"http://127.0.0.1:{old.port}")
            with sending(urls, streams) as senders:
                more(senders, EACH)
                with service(folder / "new", redis_url=f"unix://{socket}", model=str(new_file), settings=QUIET) as new:
                    urls.append(f"http://127.0.0.1:{new.port}")
                    rolled = _phase("new file started", senders, urls[1], lambda: not is_ready(urls[0]))
                    if afresh(urls[0]):
                        raise ValueError(f"The old replica has started {afresh(urls[0])} streams afresh.")
                    new.process.kill()
                    back = _phase("new replica killed", senders, urls[0], lambda: is_ready(urls[0]))
    finally:
        store.stop()
    for sender in senders:
        sender.lives()
    return [rolled, back], sum(sender.sent * len(sender.streams) for sender in senders)


def is_ready(url: str) -> bool:
    return httpx.get(f"{url}/health/ready", timeout=10).status_code == httpx.codes.OK


def afresh(url: str) -> int:
    """Streams that this replica has started afresh because their state was of another file."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return sum(round(float(line.split()[-1])) for line in lines if line.startswith('onset_fresh_states_total{reason="other_model"}'))


def _phase(what: str, senders: Sequence[Sender], url: str, over: Callable[[], bool]) -> Phase:
    """From now until it is over and some more events of each stream are answered; `url` is of who answers then."""
    began = time.monotonic()
    seconds = until(over)
    more(senders, EACH)
    requests = [request for sender in senders for request in sender.requests if request.began + request.seconds >= began]
    refused = sum(request.refused > 0 for request in requests)
    return Phase(what, seconds, afresh(url), max(request.seconds for request in requests), len(requests), refused)


def another(file: Path, folder: Path) -> Path:
    """The same model as a file of another version, hence of another hash."""
    content = re.sub(
        rb'("version":"[^"]*)([^"])"', lambda found: found[1] + (b"y" if found[2] == b"z" else b"z") + b'"', file.read_bytes(), count=1
    )
    digest = re.search(SHA256_KEY.encode() + rb"..([0-9a-f]{64})", content, re.DOTALL)
    if digest is None:
        raise ValueError(f"{file} has no seal: this is a bug.")
    made = folder / "another.onnx"
    made.write_bytes(seal(content.replace(digest[1], UNSEALED.encode())))
    return made


if __name__ == "__main__":
    typer.run(main)
