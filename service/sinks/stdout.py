"""Alerts as JSON lines on the standard output of the replica that keeps the book."""

from __future__ import annotations

import asyncio
import sys
from typing import BinaryIO

import msgspec

from service.sinks.teller import Notice, Unreachable


class Stdout:
    """Implements Sink. `to` = where the lines go."""

    name = "stdout"

    def __init__(self, to: BinaryIO | None = None) -> None:
        self._to = to or sys.stdout.buffer

    async def tell(self, notice: Notice) -> None:
        try:
            await asyncio.to_thread(self._write, msgspec.json.encode(notice))  # a full pipe must not stop the service
        except OSError as error:
            raise Unreachable(f"The standard output takes nothing ({type(error).__name__}: {error}).") from error

    async def close(self) -> None:
        return None

    def _write(self, line: bytes) -> None:
        self._to.write(line + b"\n")
        self._to.flush()
