"""Logs: one line an event on stderr, JSON for machines or plain for people; the libraries' logs in the same form.

A line says to which request and which batch it belongs, and to which trace where there are traces. Streams' names are hashed where that
is asked for, always in the same way: the lines of one stream can still be found together.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TextIO, cast, get_args

import msgspec
import structlog
from structlog.processors import ExceptionRenderer
from structlog.tracebacks import ExceptionDictTransformer

from service import tracing
from service.errors import BadParameter

LogLevel = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
MAX_SECONDS = 24 * 3600
HASHED = ("stream_id", "stream")
"""Fields that hold a stream's name."""

PIECE = 1024
"""Characters that are written at once: no more bytes than a pipe takes whole where it takes any (PIPE_BUF, 4096)."""
PATIENCE_SECONDS = 0.02
"""Of a line with a reader that is behind; one that stands still is waited for once."""

log = structlog.get_logger(__name__)


class Stderr:
    """The standard error, as a file; each write is a line. One that it does not take ends nothing else and stops nothing: the disk that it
    goes to is full, its reader is gone, or stands still so that the pipe or terminal is full. `lost` is called of each, and the first one
    that is taken again says in `lines_lost` how many were not.
    """

    def __init__(self, to: TextIO | None) -> None:
        self.lost: Callable[[], None] = lambda: None
        self._encoding = (to and to.encoding) or "utf-8"
        self._put, self._room = _way(to)
        self._lock = threading.RLock()  # or another thread could take the room that was found
        self._next: deque[str] = deque()
        self._writing = False
        self._lines = 0
        """Lost since one was taken."""
        self._torn = False
        """There is the beginning of a line."""

    def write(self, text: str) -> int:
        self._next.append(text)
        with self._lock:
            if self._writing:  # the garbage collector has found something to tell in the middle of a line, which ends first
                return len(text)
            self._writing = True
            try:
                while self._next:
                    self._write(self._next.popleft())
            finally:
                self._writing = False
        return len(text)

    def flush(self) -> None:
        """Nothing is left to be."""

    def tell(self, logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A processor of structlog."""
        return {**line, "lines_lost": self._lines} if self._lines else line

    def _write(self, text: str) -> None:
        taken = self._take(f"\n{text}" if self._torn else text)
        self._lines = 0 if taken else self._lines + 1
        if not taken:
            self.lost()

    def _take(self, text: str) -> bool:
        until = 0.0 if self._lines else time.monotonic() + PATIENCE_SECONDS
        try:
            for at in range(0, len(text), PIECE):
                piece = text[at : at + PIECE].encode(self._encoding, "backslashreplace")
                while piece:
                    if not self._room(max(0.0, 1e3 * (until - time.monotonic()))):
                        return False
                    piece = piece[self._put(piece) :]
                    self._torn = True
        except (OSError, ValueError):  # ValueError: it is closed
            return False
        self._torn = False
        return True


def _way(to: TextIO | None) -> tuple[Callable[[bytes], int], Callable[[float], object]]:
    """What writes some of a piece, and what tells, after so many milliseconds at most, whether one can be written without waiting."""
    if to is None:  # the process was started without one
        return len, lambda patience: True
    try:
        own, poll = _own(to.fileno()), select.poll()
        poll.register(to.fileno() if own is None else own, select.POLLOUT)
    except (OSError, ValueError, AttributeError):  # no file of the system, or a system without poll
        return lambda piece: _put(to, piece), lambda patience: True
    # Not by its number alone, which is another file's once it is closed.
    return lambda piece: os.write(to.fileno() if own is None else own, piece), poll.poll


def _own(file: int) -> int | None:
    """A terminal says that there is room where it has some, and who writes more waits: unless it was opened anew, for us alone."""
    if not os.isatty(file):
        return None
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # no Linux, or another user's
        return None


def _put(to: TextIO, piece: bytes) -> int:
    to.write(piece.decode(to.encoding or "utf-8"))
    to.flush()
    return len(piece)


def configure(level: LogLevel, as_json: bool, *, hash_streams: bool = False) -> Stderr:
    """Set up structlog and the standard library's logging, for the whole process. Where the lines go."""
    stderr = Stderr(sys.stderr)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _place,
        stderr.tell,
        *([_hash_streams] if hash_streams else []),
        # Without local variables: they hold clients' data.
        ExceptionRenderer(ExceptionDictTransformer(show_locals=False)) if as_json else structlog.dev.set_exc_info,
    ]
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[*shared, renderer],
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", stderr)),
        cache_logger_on_first_use=False,  # so that the level can be changed
    )
    handler = logging.StreamHandler(stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    logging.basicConfig(handlers=[handler], force=True)
    set_level(level)
    return stderr


def set_level(level: LogLevel) -> None:
    """From here on, in the whole process; the libraries' lines begin at warning."""
    threshold = getattr(logging, level.upper())
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(threshold))
    logging.getLogger().setLevel(max(threshold, logging.WARNING))
    logging.getLogger("service").setLevel(threshold)


class LevelReply(msgspec.Struct):
    """The level in force in the answering replica, and until when (seconds since 1970) it is if it was changed for a while."""

    level: LogLevel
    environment: LogLevel
    until: float | None


class Level:
    """The one owner of the level: changed at run time for this process alone. `clock` gives seconds since 1970."""

    def __init__(self, environment: LogLevel, clock: Callable[[], float] = time.time) -> None:
        self._environment, self._level, self._clock = environment, environment, clock
        self._until: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def reply(self) -> LevelReply:
        return LevelReply(self._level, self._environment, self._until)

    def change(self, body: Mapping[str, Any]) -> None:
        """Take the level that `body` names, for its `seconds` if it has them. Raises BadParameter."""
        level, seconds = _checked(body)
        self._set(level, seconds)

    def reset(self) -> None:
        """Go back to the environment's."""
        self._set(self._environment, None)

    def _set(self, level: LogLevel, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self.reset)
        self._until = None if seconds is None else self._clock() + seconds
        before, self._level = self._level, level
        set_level(level)
        log.warning("log_level_changed", level_before=before, level_now=level, seconds=seconds)


def _checked(body: Mapping[str, Any]) -> tuple[LogLevel, float | None]:
    for name in body:
        if name not in ("level", "seconds"):
            raise BadParameter(f"'{name[:64]}' can't be changed here; there are level and seconds.", name[:64])
    level, seconds = body.get("level"), body.get("seconds")
    if level not in LEVELS:
        raise BadParameter(f"level is {str(level)[:64]!r}; it is one of {', '.join(LEVELS)}.", "level", str(level)[:64])
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS):
        raise BadParameter(f"seconds is {str(seconds)[:64]}; it is a number above 0, {MAX_SECONDS} at most.", "seconds", str(seconds)[:64])
    return level, seconds


def _place(logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """To which request, batch and trace the line belongs."""
    for name, value in (("request", tracing.REQUEST.get()), ("batch", tracing.BATCH.get()), *tracing.of_span().items()):
        if value:
            line.setdefault(name, tracing.shown(value))
    return line


def _hash_streams(logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name in HASHED:
        if isinstance(line.get(name), str):
            line[name] = hashed(line[name])
    if isinstance(line.get("path"), str) and (match := tracing.STREAM_PATH.fullmatch(line["path"])):
        line["path"] = f"{match[1]}{hashed(match[2])}{match[3] or ''}"
    return line


def hashed(stream_id: str) -> str:
    """What stands in the log for a stream."""
    return hashlib.blake2b(stream_id.encode(), digest_size=8).hexdigest()
