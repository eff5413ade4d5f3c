"""Alerts as JSON lines on the standard output of the replica that keeps the book."""

from __future__ import annotations

import asyncio
import sys
from typing import TextIO

import msgspec

from service.sinks.teller import Notice


class Stdout:
    """Implements Sink. `to` = where the lines go."""

    name = "stdout"

    def __init__(self, to: TextIO | None = None) -> None:
        self._to = to or sys.stdout

    async def tell(self, notice: Notice) -> None:
        await asyncio.to_thread(self._write, msgspec.json.encode(notice).decode())  # a full pipe must not stop the service

    async def close(self) -> None:
        return None

    def _write(self, line: str) -> None:
        self._to.write(line + "\n")
        self._to.flush()
