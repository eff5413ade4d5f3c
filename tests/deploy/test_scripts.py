"""The two small programs inside the image, run as it runs them."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.deploy.files import ROOT

SCRIPTS = ROOT / "scripts"


@contextmanager
def service_that_answers(status: int) -> Iterator[tuple[int, list[str]]]:
    """An HTTP server on a free port; yields the port and the paths it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def healthcheck(port: int, *arguments: str) -> int:
    command = [sys.executable, "-I", str(SCRIPTS / "healthcheck.py"), *arguments]
    return subprocess.run(command, env={"ONSET_PORT": str(port)}, check=False, timeout=30).returncode


def requirements(runtime: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "image_requirements.py"), runtime, str(ROOT / "pyproject.toml")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1), (404, 1)])
def test_the_healthcheck_is_what_readiness_says(status: int, exit_code: int) -> None:
    with service_that_answers(status) as (port, asked):
        assert healthcheck(port) == exit_code
    assert asked == ["/health/ready"]


def test_the_healthcheck_can_ask_for_liveness_instead() -> None:
    with service_that_answers(200) as (port, asked):
        assert healthcheck(port, "/health/live") == 0
    assert asked == ["/health/live"]


def test_a_service_that_is_not_there_is_unhealthy() -> None:
    with service_that_answers(200) as (port, _):
        pass
    assert healthcheck(port) == 1


@pytest.mark.parametrize(("runtime", "package"), [("cpu", "onnxruntime>="), ("gpu", "onnxruntime-gpu[cuda,cudnn]>=")])
def test_an_image_gets_exactly_one_onnx_runtime_and_no_torch(runtime: str, package: str) -> None:
    lines = requirements(runtime).stdout.splitlines()
    runtimes = [line for line in lines if line.startswith("onnxruntime")]
    assert len(runtimes) == 1
    assert runtimes[0].startswith(package)
    assert ";" not in runtimes[0]
    assert not [line for line in lines if line.startswith("torch")]
    assert [line for line in lines if line.startswith("fastapi")]


def test_an_unknown_runtime_stops_the_build_with_a_sentence() -> None:
    done = requirements("tpu")
    assert done.returncode != 0
    assert done.stderr.strip() == "RUNTIME is 'tpu'; it is cpu or gpu"


def test_the_image_test_is_a_valid_shell_script() -> None:
    assert subprocess.run(["bash", "-n", SCRIPTS / "image_test.sh"], check=False, timeout=10).returncode == 0
