"""What the speed benchmarks make of what they measure, and what they send."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from bench import engine, gpu, http, memory, overload, peers
from bench.fleet import default_model
from bench.load import Tally, drive, offer, post
from bench.report import Goal, Latency, Machine, report, table
from bench.servers import started
from bench.traffic import BODY_EVENTS, bodies, requests, sent, singles
from bench.warm import fill, policy_of, warm_rows
from service.detector import Detector
from service.events import Readings
from service.policy import Policy
from service.rounds import advance
from service.state import ALERT_OPEN, Origin, StateCodec
from service.stores.redis import RedisStore
from tests.servers import Valkey

GPU = Path("/dev/nvidia0").exists()


def test_latencies_are_milliseconds_by_percentile() -> None:
    latency = Latency.of([i / 1000 for i in range(1001)])
    assert (latency.samples, latency.p50_ms, latency.p99_ms, latency.p999_ms) == (1001, 500, 990, 999)
    assert math.isnan(Latency.of([]).p99_ms)


def test_a_report_says_which_goals_were_missed_on_paper_and_in_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goals = [Goal("rate", 9.0, 10.0), Goal("seconds", 1.0, 2.0, at_least=False)]
    report([table("A", ("a",), ("b",))], goals, Machine.now(), {"rows": [1]}, tmp_path / "file.json")
    printed = capsys.readouterr().out
    assert "MISSED  rate: 9 (goal at least 10)" in printed
    assert "met     seconds: 1 (goal at most 2)" in printed
    content = json.loads((tmp_path / "file.json").read_text())
    assert [goal["met"] for goal in content["goals"]] == [False, True]
    assert content["rows"] == [1]
    assert content["machine"]["processors"] >= 1


@pytest.mark.parametrize("each", [1, 10])
def test_bodies_pass_over_all_streams_and_no_stream_goes_back_in_time(each: int) -> None:
    made = bodies(range(2000), each, ("a", "b"), passes=2)
    assert len(made) == 2 * 2000 * each // BODY_EVENTS
    last: dict[str, float] = {}
    before = time.time() - 0.02
    for body in made:
        events = [json.loads(line) for line in sent(body, each).splitlines()]
        assert len(sent(body, each)) == len(body)  # Content-Length was stated
        assert len(events) == BODY_EVENTS
        assert len({event["stream_id"] for event in events}) == BODY_EVENTS // each
        for event in events:
            assert set(event["values"]) == {"a", "b"}
            assert before <= event["timestamp"] <= time.time() + 0.001
            assert event["timestamp"] > last.get(event["stream_id"], 0) - (0.02 if each > 1 else 0.001)
            last[event["stream_id"]] = event["timestamp"]
    assert len(last) == 2000


def test_requests_take_the_templates_in_turn() -> None:
    make = requests(singles(range(3)), "application/json")
    streams = [json.loads(make().partition(b"\r\n\r\n")[2])["stream_id"] for _ in range(4)]
    assert streams == ["bench-000000", "bench-000001", "bench-000002", "bench-000000"]


@asynccontextmanager
async def serving(parts: Callable[[], Sequence[bytes]], wait: float) -> AsyncIterator[int]:
    """Port of a server that answers each request with some parts, `wait` seconds before each; its handlers end before it does."""
    handlers: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            while await reader.read(4096):
                for part in parts():
                    await asyncio.sleep(wait)
                    writer.write(part)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*(handler for handler in handlers if handler))


def request() -> bytes:
    return post("/", b"{}", "application/json")


async def test_an_open_loop_counts_what_was_refused_and_what_could_not_be_sent() -> None:
    answers = itertools.cycle(
        [
            [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"],
            [b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\ncontent-length: 0\r\n\r\n"],
            [b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"],
            [b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"],
        ]
    )
    async with serving(lambda: next(answers), 0) as port:
        tally = await offer(port, request, rate=100, seconds=0.4, connections=40)
    assert (len(tally.accepted), tally.refused, tally.hintless, tally.failed, tally.unsent) == (10, 20, 10, 10, 0)
    assert tally.offered == 40
    async with serving(lambda: next(answers), 0.5) as port:
        tally = await offer(port, request, rate=100, seconds=0.2, connections=2)
    assert (tally.offered, tally.unsent) == (20, 18)


async def test_a_closed_loop_counts_whole_answers_however_they_are_cut() -> None:
    parts = (b"HTTP/1.1 200 OK\r\ncont", b"ent-length: 4\r\n\r\na", b"bcd")
    async with serving(lambda: parts, 0.005) as port:
        tally = await drive(port, request, connections=2, seconds=0.3, warmup=0.05)
    assert tally.failures == 0
    assert 4 <= len(tally.latencies) <= 60
    assert min(tally.latencies) >= 0.01


def test_the_baselines_of_http_say_what_they_are() -> None:
    command = [sys.executable, "-m", "bench.empty"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, check=True)
    assert "constant   the scorer answers every event with the same result" in shown.stdout
    wrong = subprocess.run([*command, "full"], capture_output=True, text=True, timeout=120, check=False)
    assert wrong.returncode == 2
    assert "choose from" in wrong.stderr


def test_loads_of_two_rounds_count_as_one() -> None:
    tally = Tally()
    tally.add(Tally(2.0, [0.1, 0.2], 1))
    tally.add(Tally(2.0, [0.3, 0.4], 0))
    assert (tally.rate, tally.failures, tally.latency.samples) == (1.0, 1, 4)


async def test_a_filled_store_holds_warm_streams_that_are_waited_for(tmp_path: Path) -> None:
    detector = Detector.load(default_model())
    with Valkey(tmp_path / "store") as server:
        await fill(server.url, detector, range(10, 610))
        store = RedisStore(server.url, state_ttl=60, result_ttl=60)
        loaded = StateCodec(1, detector.state_size, detector.fingerprint).decode(
            await store.load(detector.name, ["bench-000009", "bench-000010", "bench-000609"])
        )
        watched, _ = await store.waited(detector.name, 0)
        await store.close()
    assert loaded.origins.tolist() == [Origin.NEW, Origin.STORED, Origin.STORED]
    assert (loaded.rows["version"][1:] > detector.manifest.warmup).all()
    assert watched == 600


def test_the_engine_reaches_some_share_of_a_floor_that_is_the_sum_of_its_parts() -> None:
    row = engine.measure(default_model(), 10, 0.5)
    assert row.floor_events_per_second == pytest.approx(1000 * BODY_EVENTS / sum(row.floor_ms.values()), rel=0.01)
    assert row.ratio_to_floor == pytest.approx(row.events_per_second / row.floor_events_per_second, abs=0.01)
    assert all(part > 0 for part in row.floor_ms.values())
    assert row.events_per_second > 0
    assert row.latency.p50_ms <= row.latency.p99_ms <= row.latency.p999_ms


def test_http_goals_compare_with_what_empty_handler_and_floor_allow() -> None:
    def row(server: str, load: str, rate: float, p99: float) -> http.Row:
        return http.Row(server, load, rate, Latency(100, 1.0, p99, p99), 1.0, 0.0, 0)

    rows = [row(http.SERVICE, "bulk 1", 40, 1), row(http.EMPTY, "bulk 1", 100, 1)]
    rows += [row(http.SERVICE, "single", 60, 9), row(http.EMPTY, "single", 100, 2)]
    bulk, single, p99 = http.goals(rows, {"bulk 1": 100.0})
    assert (bulk.reached, bulk.met) == (0.8, True)
    assert (single.reached, single.met) == (0.6, True)
    assert (p99.reached, p99.met) == (4.5, False)


def test_memory_goals_are_of_the_largest_number_of_streams_and_draws_are_of_all() -> None:
    def row(streams: int, size: float, rate: float) -> memory.Row:
        return memory.Row("default", 1, streams, size, size, 1, 1, 1.0, rate, 2 * rate, Latency.of([1.0]))

    size, load, score = memory.goals([row(1000, 1000.0, 100.0), row(5000, 9000.0, 1.0), row(9000, 1500.0, 79.0)])
    assert (size.met, load.met, score.met) == (True, False, False)
    draws = memory.drawn(5000)
    assert all(len(set(some)) == BODY_EVENTS for some in draws)
    assert len({i for some in draws for i in some}) == 5000


def test_recovery_is_the_first_probe_from_which_nine_of_ten_are_as_before() -> None:
    usual = [(0.0, 0.002)] * 20
    slow = [(10 + i / 50, 1.0) for i in range(20)]
    good = [(10.4 + i / 50, 0.5 if i == 3 else 0.003) for i in range(20)]
    early = [(9.0 + i / 50, 0.002) for i in range(20)]
    assert overload.recovery_seconds(early + slow + good, usual, ended=10.0) == pytest.approx(0.4)
    assert overload.recovery_seconds(early + slow, usual, ended=10.0) == math.inf


def test_the_bound_of_accepted_requests_is_a_full_queue_at_half_the_capacity() -> None:
    assert overload.bound_ms(20_000) == 3000


def test_memory_that_settles_in_the_first_quarter_has_not_grown() -> None:
    flat = overload.Overload(1, 3, 1, 1, Latency.of([1.0]), 1, 0, 0, 0, 0, [100, 150, 150, 140, 150, 151, 150, 150], 0)
    assert flat.growth == pytest.approx(151 / 150)


def test_the_window_network_is_the_same_in_both_runtimes() -> None:
    torch.manual_seed(0)
    network = peers.WindowAutoencoder().eval()
    torch.manual_seed(0)
    session = ort.InferenceSession(peers.window_graph(), providers=["CPUExecutionProvider"])
    windows = np.random.default_rng(0).normal(size=(BODY_EVENTS, peers.WINDOW, 1)).astype(np.float32)
    with torch.inference_mode():
        want = network(torch.from_numpy(windows)).numpy()
    (got,) = session.run(None, {"window": windows})
    assert got.shape == (BODY_EVENTS,)
    assert np.allclose(got, want, rtol=1e-4)


def test_a_difference_from_the_cpu_is_relative_and_a_missing_answer_is_one() -> None:
    one = np.array([1.0, np.nan, 100.0], np.float32)
    assert gpu.difference("expected", one, one) == 0
    assert gpu.difference("expected", one + np.float32(1), one) == pytest.approx(1.0)
    assert gpu.difference("p_value", np.array([1e-9], np.float32), np.array([1e-8], np.float32)) == pytest.approx(
        math.log(10) / 18.42, rel=1e-3
    )
    assert gpu.difference("expected", np.array([1.0, 2.0, 100.0], np.float32), one) == math.inf


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out.startswith("bench.gpu did not run: ONSET_PROVIDER is 'cuda'")


def test_warm_rows_are_beyond_the_learning_allowance_and_calm() -> None:
    detector = Detector.load(default_model())
    rows = warm_rows(detector, 50)
    assert (policy_of(detector).onset_alpha(rows["version"]) < 1.5 * Policy.alpha).all()
    assert (rows["flags"] != 0).mean() < 0.1, "at a thousandth an event some alerts are open at any time"


@pytest.mark.parametrize(("make", "each"), [(singles, 1), (bodies, 1), (partial(bodies, each=10), 10)], ids=["single", "bulk 1", "bulk 10"])
def test_what_is_sent_again_and_again_is_no_anomaly_as_a_stuck_sensor_would_be(make: Callable[[range], list[bytes]], each: int) -> None:
    of: defaultdict[str, list[float]] = defaultdict(list)
    for template in make(range(100)):
        for event in map(json.loads, sent(template, each).splitlines()):
            of[event["stream_id"]].append(event["values"]["value"])
    values = np.array(list(of.values()), np.float32).T  # [events, streams]
    detector = Detector.load(default_model())
    rows, policy, slots = warm_rows(detector), policy_of(detector), np.arange(100)
    began, opened = time.time(), []
    for i in range(150):
        x, times = values[i % len(values), :, None], np.full(100, began + i)
        readings = Readings([""] * 100, x, times, np.ones(100, np.bool_), np.full(100, -1, np.int64), np.zeros(100, np.uint64))
        advance(detector, policy, rows, readings, slots)
        opened.append((rows["flags"] & ALERT_OPEN != 0).mean())
    assert np.mean(opened) < 0.06, "new values have 2 to 5 streams of a hundred alerted at any time"


@pytest.mark.parametrize("kind", ["constant", "empty", "bare"])
def test_a_baseline_answers_and_lets_its_clients_go_without_a_word(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with started([sys.executable, "-m", "bench.empty", kind], {}, ready="/health/live") as server:
        make = requests(singles(range(10)), "application/json")
        tally = asyncio.run(drive(server.port, make, connections=4, seconds=0.3))
    assert tally.failures == 0
    assert tally.rate > 0
    assert capfd.readouterr().err == ""
