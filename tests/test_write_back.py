"""The way back: a real receiver over HTTP gets every score once, in order, under the labels that Prometheus sent."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from bench.prompb import message
from service.asking import WRITTEN_BACK
from service.detector import Detector
from service.events import Event, Result
from service.feed import Feed
from service.metrics import Metrics
from service.names import Names
from service.policy import Policy
from service.prompb import STALE, unpack
from service.scorer import Limits, Scorer
from service.sinks.remote_write import Target, WriteBack
from service.stores.memory import MemoryStore
from tests import local
from tests.times import until

NOW = 1_790_000_000.0
Labels = tuple[tuple[str, str], ...]


class Receiver:
    """Takes remote-write as the protobuf library reads it; answers with `answers`, then with 204."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.requests: list[tuple[float, Mapping[str, str], Any]] = []
        self.url = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        content = b""
        while (part := await receive())["type"] == "http.request":
            content += part["body"]
            if not part.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append((time.monotonic(), headers, message("prometheus", "WriteRequest").FromString(unpack(content))))
        status, more = self.answers.pop(0) if self.answers else (204, {})
        await send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in more.items()]})
        await send({"type": "http.response.body", "body": b"" if status == 204 else b"out of order sample"})

    def samples(self) -> dict[Labels, list[tuple[int, float]]]:
        """Of each series, in the order they came."""
        found: dict[Labels, list[tuple[int, float]]] = {}
        for _, _, request in self.requests:
            for series in request.timeseries:
                labels = tuple((label.name, label.value) for label in series.labels)
                assert [name for name, _ in labels] == sorted(name for name, _ in labels)
                found.setdefault(labels, []).extend((sample.timestamp, sample.value) for sample in series.samples)
        return found


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    app = Receiver()
    with local.served(app, lifespan="off") as port:
        app.url = f"http://user:secret@127.0.0.1:{port}/api/v1/write"
        yield app


class Source:
    """A scorer whose feed is written back."""

    def __init__(self, detector: Detector, target: Target) -> None:
        self.metrics = Metrics()
        feed = Feed(self.metrics)
        self.scorer = Scorer(detector, Policy(), MemoryStore(state_ttl=60, result_ttl=60), self.metrics, Limits(), lambda: NOW, feed=feed)
        self.names = Names((), 100)
        features = {detector.name: detector.manifest.feature_names}
        self.back = WriteBack(target, self.names, features, self.metrics, clock=lambda: NOW)
        feed.watch(self.back.see)

    async def score(self, stream_id: str, *values: float, start: float = NOW, step: float = 1.0) -> list[Result]:
        events = [Event(stream_id, {"value": value}, timestamp=start + i * step) for i, value in enumerate(values)]
        answers = await self.scorer.score(events)
        return [answer for answer in answers if isinstance(answer, Result)]

    def count(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("onset_write_back_events_total", {"outcome": outcome}) or 0

    @property
    def waiting(self) -> float:
        return self.metrics.registry.get_sample_value("onset_write_back_waiting_events") or 0

    async def sent(self, events: int) -> None:
        """Returns when all has been dealt with."""
        await until(lambda: not self.waiting and self.count("sent") >= events)


@asynccontextmanager
async def source(detector: Detector, url: str, seconds: float = 60, **options: Any) -> AsyncIterator[Source]:
    made = Source(detector, Target(url, **options))
    made.scorer.start()
    running = asyncio.create_task(made.back.run())
    yield made
    await made.scorer.drain(30)
    await made.back.stop(running, seconds)
    assert running.done()


def labelled(name: str, **labels: str) -> Labels:
    return tuple(sorted({"__name__": name, "model": "tiny", **labels}.items()))


def of(results: Sequence[Result], name: str) -> list[tuple[int, float]]:
    """What is to be written of these results."""
    numbers: dict[str, Any] = {
        "anomaly_score": lambda result: result.anomaly_score,
        "alert_score": lambda result: result.alert_score,
        "onset_anomaly": lambda result: float(result.is_anomaly),
        "y": lambda result: result.contributors[0].actual,
        "yhat": lambda result: result.expected["value"],
        "yhat_lower": lambda result: result.lower["value"],
        "yhat_upper": lambda result: result.upper["value"],
    }
    found = [(round(1000 * float(result.timestamp)), numbers[name](result)) for result in results]
    return [(time, number) for time, number in found if number is not None]


async def test_scores_are_written_under_the_labels_of_their_series_exactly_as_they_were_answered(
    tiny_detector: Detector, receiver: Receiver
) -> None:
    async with source(tiny_detector, receiver.url) as back:
        results = await back.score('node_load1{instance="a",job="node"}', *[1.0, 1.1] * 20, 9.0)
        await back.sent(41)
    samples = receiver.samples()
    for name in WRITTEN_BACK:
        written = samples.pop(labelled(name, **{"for": "node_load1", "instance": "a", "job": "node"}))
        assert written == of(results, name), name
    assert samples == {}
    assert len(of(results, "anomaly_score")) < 41  # warming up: no score, never a made-up 0
    assert len(of(results, "onset_anomaly")) == 41


async def test_a_stream_that_is_no_series_has_the_labels_of_metrics_and_labels_of_ours_make_room(
    tiny_detector: Detector, receiver: Receiver
) -> None:
    async with source(tiny_detector, receiver.url, metrics=("yhat", "onset_anomaly")) as back:
        await back.score("pump-7/temperature", *[1.0, 1.1] * 5)
        await back.score("temperature", *[1.0, 1.1] * 5)
        await back.score('x{Zone="1",for="b",model="c"}', *[1.0, 1.1] * 5)
        await back.score('{"http.requests","http.route"="/"}', *[1.0, 1.1] * 5)
        await back.score('y{exported_model="d",model="c"}', *[1.0, 1.1] * 5)
        await back.sent(50)
    assert set(receiver.samples()) == {
        labelled("onset_anomaly", stream="pump-7/temperature"),
        labelled("yhat", stream="pump-7/temperature", feature="value"),
        labelled("onset_anomaly", stream="temperature"),
        labelled("yhat", stream="temperature", feature="value"),
        labelled("onset_anomaly", exported_for="b", exported_model="c", **{"for": "x", "Zone": "1"}),
        labelled("yhat", exported_for="b", exported_model="c", **{"for": "x", "Zone": "1"}),
        labelled("onset_anomaly", **{"for": "http.requests", "http.route": "/"}),
        labelled("yhat", **{"for": "http.requests", "http.route": "/"}),
        labelled("onset_anomaly", exported_model="d", exported_exported_model="c", **{"for": "y"}),
        labelled("yhat", exported_model="d", exported_exported_model="c", **{"for": "y"}),
    }


async def test_the_labels_of_a_hashed_name_are_written_whole(tiny_detector: Detector, receiver: Receiver) -> None:
    async with source(tiny_detector, receiver.url, metrics=("onset_anomaly",)) as back:
        series = back.names.name(b"key", [(b"__name__", b"up"), (b"path", b"x" * 400)], "")
        await back.score(series.stream_id, 1.0)
        await back.sent(1)
    assert set(receiver.samples()) == {labelled("onset_anomaly", **{"for": "up", "path": "x" * 400})}


async def test_many_events_go_in_few_requests_of_bounded_size_and_each_stream_in_its_order(
    tiny_detector: Detector, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.sinks.remote_write.REQUEST_SAMPLES", 20)
    streams = [f'up{{instance="{i}"}}' for i in range(30)]
    async with source(tiny_detector, receiver.url, metrics=("y",)) as back:
        for n in range(100):
            await back.score(streams[n % 30], n, n + 0.5, start=NOW + n)
        await back.sent(200)
    samples = receiver.samples()
    assert sum(map(len, samples.values())) == 200
    assert all(times == sorted(set(times)) for times in ([time for time, _ in series] for series in samples.values()))
    assert max(len(request.timeseries) for _, _, request in receiver.requests) <= 20
    assert len(receiver.requests) < 50  # of 100 batches; a busy machine has more pauses between them
    assert all(headers["content-encoding"] == "snappy" for _, headers, _ in receiver.requests)
    assert all(headers["x-prometheus-remote-write-version"] == "0.1.0" for _, headers, _ in receiver.requests)


async def test_headers_and_the_login_of_the_address_are_sent_and_never_logged(tiny_detector: Detector, receiver: Receiver) -> None:
    receiver.answers = [(500, {"retry-after": "0"})]
    with capture_logs() as logs:
        async with source(tiny_detector, receiver.url, headers={"X-Scope-OrgID": "a"}) as back:
            await back.score("a", 1.0)
            await back.sent(1)
    assert receiver.requests[-1][1]["x-scope-orgid"] == "a"
    assert receiver.requests[-1][1]["authorization"].startswith("Basic ")
    [told] = [line for line in logs if line["event"] == "write_back_waits"]
    assert "secret" not in str(logs)
    assert told["answer"] == "500: out of order sample"


async def test_what_is_refused_for_now_is_sent_again_after_a_growing_pause(
    tiny_detector: Detector, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.sinks.remote_write.FIRST_PAUSE", 0.02)
    receiver.answers = [(503, {})] * 5
    async with source(tiny_detector, receiver.url, metrics=("y",)) as back:
        await back.score("a", 1.0)
        await back.sent(1)
    assert receiver.requests[-1][0] - receiver.requests[0][0] >= 0.5 * 0.02 * (1 + 2 + 4 + 8 + 16)


async def test_what_fails_for_now_is_sent_again_when_the_receiver_asks_for_it(tiny_detector: Detector, receiver: Receiver) -> None:
    receiver.answers = [(503, {}), (429, {"retry-after": "1"}), (500, {})]
    async with source(tiny_detector, receiver.url, metrics=("y",)) as back:
        await back.score("a", 1.0)
        await back.sent(1)
    times = [at for at, _, _ in receiver.requests]
    assert len(times) == 4
    assert times[2] - times[1] >= 1.0
    assert back.metrics.registry.get_sample_value("onset_write_back_retries_total") == 3
    assert len({request.SerializeToString() for _, _, request in receiver.requests}) == 1


@pytest.mark.parametrize(
    ("error", "sent", "lost"),
    [(RuntimeError("unable to perform operation on <TCPTransport closed=True>"), 2, 0), (KeyError("a bug"), 1, 1)],
)
async def test_the_writing_goes_on_after_a_socket_that_failed_and_after_a_bug(
    tiny_detector: Detector, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, error: Exception, sent: int, lost: int
) -> None:
    errors, post = [error], httpx.AsyncClient.post

    async def failing(*arguments: Any, **options: Any) -> httpx.Response:
        if errors:
            raise errors.pop()
        return await post(*arguments, **options)

    monkeypatch.setattr(httpx.AsyncClient, "post", failing)
    async with source(tiny_detector, receiver.url, metrics=("y",)) as back:
        await back.score("a", 1.0)
        await back.sent(sent - 1)
        await back.score("a", 2.0, start=NOW + 5)
        await back.sent(sent)
    assert (back.count("sent"), back.count("lost")) == (sent, lost)


async def test_what_a_receiver_will_never_take_is_dropped_counted_and_told_of(tiny_detector: Detector, receiver: Receiver) -> None:
    receiver.answers = [(400, {})]
    with capture_logs() as logs:
        async with source(tiny_detector, receiver.url, metrics=("y",)) as back:
            await back.score("a", 1.0, 2.0)
            await back.sent(0)
            await back.score("a", 3.0, start=NOW + 5)
            await back.sent(1)
    assert (back.count("refused"), back.count("sent")) == (2, 1)
    assert [line["answer"] for line in logs if line["event"] == "write_back_refused"] == ["400: out of order sample"]


async def test_while_nobody_answers_the_newest_scores_are_kept(tiny_detector: Detector, receiver: Receiver) -> None:
    async with source(tiny_detector, "http://127.0.0.1:1/", 0.2, max_events=10, metrics=("y",)) as back:
        for n in range(25):
            await back.score("a", 1.0, start=NOW + n)
            assert back.waiting <= 11
    assert 10 <= back.count("lost") <= 11
    assert back.count("lost") + back.count("overflow") == 25
    assert (back.count("sent"), back.count("refused")) == (0, 0)


async def test_a_stop_sends_what_waits(tiny_detector: Detector, receiver: Receiver) -> None:
    async with source(tiny_detector, receiver.url, metrics=("y",)) as back:
        await back.score("a", *range(50))
    assert (back.count("sent"), back.count("lost")) == (50, 0)


async def test_nothing_is_sent_that_would_cost_its_request(tiny_detector: Detector, receiver: Receiver) -> None:
    async with source(tiny_detector, receiver.url, metrics=("y",), max_age=100) as back:
        await back.score("old", 1.0, start=NOW - 101)
        await back.score("before 1970", 1.0, start=-5.0)
        await back.score("a", 1.0, 2.0, 3.0, step=0.0002)  # all within a millisecond
        await back.score("a", 1.0, start=NOW - 10)  # late: not scored, and does not wait for good
        await back.sent(1)
    assert (back.count("old"), back.count("repeated"), back.count("sent")) == (2, 2, 1)
    assert list(receiver.samples().values()) == [[(int(NOW * 1000), 1.0)]]


async def test_what_was_written_of_a_stream_ends_with_it(tiny_detector: Detector, receiver: Receiver) -> None:
    name = 'up{instance="a"}'
    async with source(tiny_detector, receiver.url, metrics=("y", "yhat")) as back:
        await back.score(name, *[1.0, 1.1] * 4, start=NOW - 10)
        back.back.ended("tiny", {name: NOW + 5, "never seen": NOW + 5})
        back.back.ended("tiny", {name: NOW + 5})  # told again: written once
        await back.sent(9)
    assert len(receiver.samples()) == 2
    for series in receiver.samples().values():
        *_, (time, value) = series
        assert [at for at, _ in series].count(time) == 1
        assert (time, struct.pack("<d", value)) == (int(NOW * 1000) + 5000, STALE.to_bytes(8, "little"))
