"""Starts replicas for soaks by forking a process that has imported the service already.

    python -m bench.nursery     obeys lines of JSON, {"environment": {…}, "log": PATH}, and answers each with a process id

Importing takes a replica two seconds of a processor, and that is what limits how many a soak can kill a minute. All that comes after it is
the same: a process of its own that reads its settings, loads and proves the model, opens its sockets, and dies of `kill -9`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

IMPORTED = ("service.app", "service.__main__", "uvicorn", "uvloop", "service.openapi", "service.writing")
QUEUES = ("service.sources.kafka", "service.sources.nats", "service.sources.mqtt", "service.sources.amqp")
"""As far as their extras are installed."""
STOP_SECONDS = 30.0


class Born:
    """A replica's process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._process = None

    @property
    def ended(self) -> bool:
        return self.wait(0)

    def kill(self) -> None:
        """Kill -9."""
        self._tell(signal.SIGKILL)
        self.wait(STOP_SECONDS)

    def terminate(self) -> None:
        """SIGTERM; returns at once."""
        self._tell(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, and what it asks for."""
        self.terminate()
        if not self.wait(STOP_SECONDS):
            self.kill()

    def _tell(self, what: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, what)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, within so long."""
        if self._process is not None and select.select([self._process], [], [], seconds)[0]:
            os.close(self._process)
            self._process = None
        return self._process is None


class Nursery:
    """The process, started on entering, ended on leaving with all that it has started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=inherited,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.communicate()

    def serve(self, environment: Mapping[str, str], log: Path) -> Born:
        """`python -m service serve` with these variables, its output in a log."""
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("The nursery has not been entered: this is a bug.")
        self._process.stdin.write(json.dumps({"environment": dict(environment), "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return Born(int(self._process.stdout.readline()))


def main() -> None:
    """Until the input ends."""
    for module in IMPORTED:
        __import__(module)
    for module in QUEUES:
        with contextlib.suppress(ImportError):
            __import__(module)
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    for line in sys.stdin:
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
        pid = os.fork()
        if pid == 0:
            _serve(json.loads(line))
        children.add(pid)
        print(pid, flush=True)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _serve(order: dict[str, Any]) -> NoReturn:
    from service.__main__ import app  # noqa: PLC0415

    status = 1
    try:
        with Path(order["log"]).open("ab") as output, Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ.update(order["environment"])
        app(["serve"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
