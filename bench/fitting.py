"""`training fit`, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class FitFailed(SystemExit):
    """It made no model; the message says where its words are."""


def fit(data: Path, out: Path, *options: str, log: Path) -> None:
    """A model of the files in `data`, into `out`. Raises FitFailed."""
    command = [sys.executable, "-m", "training", "fit", "--data", str(data), "--out", str(out), *options]
    with log.open("w") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise FitFailed(f"`training fit` ended with {code}; {log} ends with: {log.read_text().strip().splitlines()[-1]}")
