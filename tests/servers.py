"""A real valkey-server for tests: started on entering, ended by its pid on leaving."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from types import TracebackType

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.embedded import find_server

START_SECONDS = 20


class Valkey:
    """A server with its data in `folder`. `kill` and `start` again keep address and data."""

    def __init__(self, folder: Path, **options: str) -> None:
        """`options` of the server, `_` for `-`; it listens on a unix socket in the folder unless they name a port."""
        self.folder = folder
        self.socket = Path(options.get("unixsocket", folder / "v.sock"))
        self._options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(folder),
            "save": "",
            "logfile": str(folder / "log"),
        } | options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        port = self._options["port"]
        return f"unix://{self.socket}" if port == "0" else f"redis://127.0.0.1:{port}"

    def __enter__(self) -> Valkey:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self, *, loaded: bool = True) -> None:
        """Returns when it answers; `loaded` = and has its data in memory."""
        arguments = [part for name, value in self._options.items() for part in (f"--{name.replace('_', '-')}", *value.split(" "))]
        self._process = subprocess.Popen([find_server(), *arguments], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        try:
            while not self._answers(loaded):
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self) -> redis.Redis:
        """To be closed by the caller. It does not retry: what the server says is what the test sees."""
        return redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0))

    def _answers(self, loaded: bool) -> bool:
        with self.client() as client:
            try:
                client.ping()
            except redis.BusyLoadingError:
                return not loaded
            except redis.ConnectionError:
                return False
        return True
