"""Programs that tests start and pip cannot install: without one its tests skip and say why, but in CI they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench import brokers


def program(name: str, package: str) -> str:
    """Path of a program of Debian's `package`."""
    with needed():
        return brokers.program(name, package)


@contextmanager
def needed() -> Iterator[None]:
    """Around what raises SystemExit where a program is missing."""
    try:
        yield
    except SystemExit as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
