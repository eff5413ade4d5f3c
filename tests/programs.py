"""Real programs that tests start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.needs import needed

START_SECONDS = 180


class Program:
    """A server with its data in `folder`, which `stop`, `kill` and `start` again keep; started on entering, ended by its pid on leaving."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it answers."""
        with needed():
            command = self._command()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=os.environ | self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        deadline = time.monotonic() + START_SECONDS
        try:
            while not self._answers():
                assert self._process.poll() is None, self.log[-4000:]
                assert time.monotonic() < deadline, self.log[-4000:]
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """SIGTERM: it keeps what it holds."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(START_SECONDS)
            self._process = None

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {}

    def _answers(self) -> bool:
        return True
