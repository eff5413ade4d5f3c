"""`python -m service serve` as an operator meets it: it starts, says what to try, refuses in one sentence, and stops cleanly."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from typer.testing import CliRunner

from bench.servers import free_port
from service.__main__ import app
from tests import local
from tests.e2e.process import Service
from tests.times import wait

NDJSON = {"content-type": "application/x-ndjson"}


def refused(*arguments: str, **environment: str) -> str:
    """What a `serve` that must not start says."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve", *arguments],
        env=os.environ | {"ONSET_PORT": "0"} | {f"ONSET_{name}": value for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done
    assert "Traceback" not in done.stdout + done.stderr
    sentence = done.stderr.strip()
    assert sentence.startswith("onset: "), sentence
    assert "\n" not in sentence, sentence
    return sentence


def test_port_0_is_any_free_one_and_the_line_it_prints_can_be_pasted(tmp_path: Path, tiny_model_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--model", str(tiny_model_path), "--data-dir", str(tmp_path / "d")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first, curl = process.stdout.readline(), process.stdout.readline()
        try:
            url = re.search(r"http://127\.0\.0\.1:(\d+)", first)
            assert url, first
            assert int(url.group(1)) > 0
            assert curl.split()[0] == "curl"
            body = curl[curl.index("'{") + 1 : curl.rindex("}'") + 1]
            reply = local.post(f"{url.group()}/v1/events", content=body, headers={"content-type": "application/json"})
            assert reply.status_code == 200
            assert reply.json()["state_version"] == 1
            assert local.get(f"{url.group()}/health/ready").status_code == 200  # said only when it is
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_it_serves_where_the_disk_of_its_output_is_full_and_ends_cleanly_with_its_terminal(tmp_path: Path, tiny_model_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--model", str(tiny_model_path), "--data-dir", str(tmp_path)]
    with (
        Path("/dev/full").open("wb") as full,
        subprocess.Popen(
            command,
            stdout=full,
            stderr=full,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - under nohup it is no stop
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.poll() is None, "it ended"
            try:
                return local.get(f"{url}/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait(answers, 60)
            event = {"stream_id": "a", "values": {"value": 1.0}}
            assert local.post(f"{url}/v1/events", json=event).status_code == 200
            wait(lambda: re.search(r"^onset_log_lines_lost_total [1-9]", local.get(f"{url}/metrics").text, re.MULTILINE) is not None)
        finally:
            process.send_signal(signal.SIGHUP)  # as a terminal does that is closed
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    assert process.returncode >= 0, "it was ended by the signal"


def test_where_alerts_go_to_the_standard_output_nothing_else_does(tmp_path: Path, tiny_model_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", "0", "--model", str(tiny_model_path), "--data-dir", str(tmp_path / "d")]
    environment = os.environ | {"ONSET_ALERTS_STDOUT": "true"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("  curl -s http://"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
    assert said == ""


def test_the_detector_that_ships_is_ready_within_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    with Service(tmp_path / "data", forked=False) as service:
        took = time.monotonic() - started
        [model] = local.get(f"{service.url}/v1/models").json()["models"]
        assert model["default"]
        values = dict.fromkeys((feature["name"] for feature in model["features"]), 1.0)
        assert local.post(f"{service.url}/v1/streams/a/events", json={"values": values}).status_code == 200
    assert took < 30  # 1.2 to 1.8 s alone on two processors; other tests run beside this one


def test_without_its_store_it_says_what_it_waits_for(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, wait=False, forked=False, REDIS_URL="redis://127.0.0.1:1") as service:
        wait(lambda: "curl" in service.log.read_text())
        assert "Not ready yet: The state store" in service.log.read_text()


def test_inspect_verifies_a_file_and_prints_its_manifest(tmp_path: Path, tiny_model_path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(tiny_model_path)])
    assert shown.exit_code == 0
    assert "passes its self-test" in shown.stdout
    assert '"name": "tiny"' in shown.stdout
    assert '"name": "tiny"' in CliRunner().invoke(app, ["inspect", str(tiny_model_path.parent)]).stdout
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny_model_path.read_bytes()[:-100])
    refusal = CliRunner().invoke(app, ["inspect", str(broken)])
    assert refusal.exit_code == 2
    assert refusal.stderr.startswith("onset: ")


def test_what_cannot_be_served_is_refused_in_one_sentence(tmp_path: Path, tiny_model_path: Path) -> None:
    assert "nowhere.onnx" in refused("--model", str(tmp_path / "nowhere.onnx"))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(tiny_model_path.read_bytes()[:-100])
    assert "broken.onnx" in refused("--model", str(broken))
    assert re.search("ONSET_PORT.*many", refused(PORT="many"))
    assert re.search("ONSET_PROVIDER.*tpu", refused(PROVIDER="tpu"))
    assert re.search("ONSET_REDIS_URL.*redis://", refused("--redis-url", "nonsense", "--model", str(tiny_model_path)))
    for url in (
        "redis://:s3cr/et@h",
        "redis://:s3cr#et@h",
        "redis://:1?s3cr@h",
        "redis://a:1?s3cr@h",
        "redis://a:1/s3cr@h",
        "redis://h/s3cr",
    ):
        said = refused("--redis-url", url, "--model", str(tiny_model_path))
        assert re.search("ONSET_REDIS_URL.*%2F", said)
        assert "s3cr" not in said, "no part of a password"
    said = refused("--redis-url", "redis://:s3cr/et@localhost", "--model", str(tiny_model_path), REDIS_CLUSTER="true")
    assert re.search("ONSET_REDIS_URL.*%2F", said)
    said = refused("--redis-url", "rediss://:s3cret@h?ssl_ca_certs=/no/ca.pem", "--model", str(tiny_model_path))
    assert re.search(r"ONSET_REDIS_URL.*ssl_ca_certs is /no/ca.pem, which cannot be read \(No such file", said)
    assert "s3cret" not in said
    assert str(broken) in refused("--data-dir", str(broken), "--model", str(tiny_model_path))  # a file where a folder must be
    assert "--host" in refused("--host", "not a host", "--model", str(tiny_model_path))


def test_a_port_in_use_is_named(tmp_path: Path, tiny_model_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = refused("--port", str(port), "--model", str(tiny_model_path), "--data-dir", str(tmp_path / "d"))
    assert f"127.0.0.1:{port}" in sentence
    assert "--port" in sentence


def test_bad_input_over_real_http_never_hurts_the_service(tmp_path: Path, tiny_model_path: Path) -> None:
    good = b'{"stream_id": "a", "values": {"value": 1}}'
    with Service(tmp_path / "data", model=tiny_model_path) as service, httpx.Client(base_url=service.url, timeout=20) as client:
        for content, status in (
            (b"x" * 10_000_000, 413),
            (b"\n".join([good] * 100_000), 413),
            (b"[" * 100_000, 400),
            (b"", 200),
            (b"{}", 200),
            (b'\xff\n{"stream_id": ""}\n{"stream_id": "%s"}\nNaN' % (b"x" * 2000), 200),
        ):
            lines = status == 200
            answer = client.post("/v1/events", content=content, headers=NDJSON if lines or content.startswith(b"{") else {})
            assert answer.status_code == status, (content[:40], answer.text[:200])
            if status != 200:
                assert answer.headers["content-type"] == "application/problem+json"
            for line in answer.text.splitlines() if lines else []:
                assert json.loads(line)["status"] == 422
        assert client.get("/v1/nothing").json()["status"] == 404
        assert client.put("/v1/events").json()["status"] == 405
        assert client.post("/v1/events", content=good).json()["state_version"] == 1


def test_a_client_that_hangs_up_in_the_middle_hurts_nobody(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, MAX_INFLIGHT_BYTES="2000000") as service:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", service.port)) as half:
                half.sendall(b"POST /v1/events HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n[")
        wait(lambda: local.post(f"{service.url}/v1/events", content=b" " * 1_500_000 + b"[]").status_code == 200)


def test_a_client_that_does_not_read_its_reply_is_let_go_and_others_are_answered(tmp_path: Path, tiny_model_path: Path) -> None:
    body = b"\n".join(b'{"stream_id": "s%d", "values": {"value": 1}}' % i for i in range(10_000))
    head = b"POST /v1/events HTTP/1.1\r\nhost: a\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n" % len(body)
    unread = 'onset_refused_total{reason="unread"} '
    with Service(tmp_path / "data", model=tiny_model_path, MAX_INFLIGHT_BYTES="1000000") as service, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(20)
        deaf.connect(("127.0.0.1", service.port))
        deaf.sendall(head + body)
        deadline = time.monotonic() + 60
        while f"{unread}1.0" not in local.get(f"{service.url}/metrics").text:
            assert time.monotonic() < deadline
            assert local.post(f"{service.url}/v1/events", content=b'{"stream_id": "a", "values": {"value": 1}}').status_code == 200
            time.sleep(0.1)
        reply = b""
        while piece := deaf.recv(65_536):  # what the kernel had
            reply += piece
        stated = re.search(rb"content-length: (\d+)", reply)
        assert stated, reply[:200]
        assert len(reply) < int(stated[1])
        assert '"event": "replies_unread"' in service.log.read_text()


def test_a_connection_that_rests_between_two_requests_of_a_sender_is_still_open(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as service:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
        for rest in (6, 0):  # Prometheus sends every five seconds
            connection.request("GET", "/health/live")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            assert connection.sock is not None
            time.sleep(rest)
        connection.close()


def test_a_store_that_hangs_is_named_with_how_long_it_was_waited_for(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as service:
        [store] = psutil.Process(service.pid).children()
        store.suspend()
        try:
            reply = local.get(f"{service.url}/health/ready")
        finally:
            store.resume()
        assert (reply.status_code, reply.json()["detail"]) == (503, "The state store does not answer a ping: no answer within a second.")


def test_a_stop_answers_at_once_what_is_held_for_earlier_events(tmp_path: Path, tiny_model_path: Path) -> None:
    event = {"stream_id": "a", "values": {"value": 1.0}, "timestamp": 1e9, "event_id": "1"}
    with Service(tmp_path / "data", model=tiny_model_path, REORDER_SECONDS="60") as service, ThreadPoolExecutor() as pool:
        asked = pool.submit(local.post, f"{service.url}/v1/events", json=event, timeout=50)
        wait(lambda: 'onset_held_events{model="tiny"} 1.0' in local.get(f"{service.url}/metrics").text)
        os.kill(service.pid, signal.SIGTERM)
        answer = asked.result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["state_version"] == 1
        wait(lambda: service.ended)


def test_a_stop_does_not_wait_for_bodies_that_do_not_come(tmp_path: Path, tiny_model_path: Path) -> None:
    half = b"POST /v1/events HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n"
    with Service(tmp_path / "data", model=tiny_model_path, DRAIN_SECONDS="300") as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as client:
            client.sendall(half)
            assert b" 100 Continue" in client.recv(1000)
            os.kill(service.pid, signal.SIGTERM)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        wait(lambda: service.ended)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 "), answer
        assert b"\r\nretry-after: 1" in head
        assert json.loads(body)["type"] == "urn:onset:not-committed"
        log = service.log.read_text()
        assert log.count('"event": "bodies_unfinished"') == 1
        assert "Traceback" not in log
        assert "Cancel" not in log


def test_what_is_not_done_when_the_time_to_stop_is_over_is_to_be_sent_again(tmp_path: Path, tiny_model_path: Path) -> None:
    event = b'{"stream_id": "a", "values": {"value": 1}}'
    with Service(tmp_path / "data", model=tiny_model_path, DRAIN_SECONDS="1") as service, ThreadPoolExecutor() as pool:
        [store] = service.children("valkey-server")
        store.suspend()
        try:
            asked = [pool.submit(local.post, f"{service.url}/v1/events", content=event, timeout=60)]
            asked += [pool.submit(local.get, f"{service.url}{path}", timeout=60) for path in ("/v1/streams/a", "/v1/alerts")]
            wait(lambda: sum(found.status == "ESTABLISHED" for found in psutil.Process(service.pid).net_connections("tcp")) == len(asked))
            os.kill(service.pid, signal.SIGTERM)
            answers = [one.result() for one in asked]
        finally:
            store.resume()
        assert [answer.status_code for answer in answers] == [503, 503, 503], [answer.text for answer in answers]
        wait(lambda: service.ended)
        assert "Traceback" not in service.log.read_text()
