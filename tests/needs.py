"""Programs that tests start and pip cannot install: without one its tests skip and say why, but in CI they fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Path of a program of Debian's `package`."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is not None:
        return str(Path(found))
    reason = f"{name} is not on this machine: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
