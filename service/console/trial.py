"""`POST /v1/backtest`: an uploaded file, scored as the service would have scored it, and thinned for a picture.

    door ──file──► a process of its own: `python -m service.console.trial`, niced, killed when its time is up ──JSON──► reply

One at a time, and apart from the process that scores live events, which notices nothing of it but the processor time it leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from service.backtest import TAIL, read_series
from service.console.live import series as shortened
from service.detector import load_detectors
from service.errors import BadBody, OnsetError, Overloaded, TooLarge
from service.policy import Policy
from service.sketch import ONSETS, Sketch, allowed, axis, sketch
from service.tables import ReadOptions, Source

BUCKETS = 1200
REFUSED, TOO_MUCH = 3, 4
"""Exit status of a process that says why on standard output; of one that would have taken more memory than it may."""
MEMORY_FACTOR, LEAST_MEMORY = 16, 64 * 1024 * 1024
"""Bytes of memory for each byte of the largest upload: a cell of two bytes may be an object of 50; and what a short file may take, which is
read in one piece.
"""
NICE = 10


@dataclass(frozen=True)
class TrialLimits:
    """What one upload may bring and take."""

    max_bytes: int
    max_rows: int
    max_seconds: float

    @property
    def memory(self) -> int:
        """Bytes that the process may take for the file."""
        return max(MEMORY_FACTOR * self.max_bytes, LEAST_MEMORY)


@dataclass(frozen=True)
class Trial:
    """What is asked: the file's name, the model of a folder of models, the policy, the column of times (None = found by its name)."""

    name: str
    models: str
    model: str
    alpha: float
    strict: bool
    timestamp: str | None


class Trials:
    """Runs them, one at a time."""

    def __init__(self, limits: TrialLimits) -> None:
        self.limits = limits
        self._running = False

    async def run(self, trial: Trial, upload: Callable[[], Awaitable[bytes]]) -> bytes:
        """The JSON of the result; `upload` reads the file, once it is its turn: so there is one in memory. Raises what that does,
        TooLarge, Overloaded, and BadBody with what the file lacks.
        """
        if self._running:
            raise Overloaded("Another backtest is running; there is one at a time.", retry_after=5)
        self._running = True
        try:
            return await self._run(trial, self._limited(await upload()))
        finally:
            self._running = False

    def _limited(self, content: bytes) -> bytes:
        rows = content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n")  # any of the three ends one
        if rows > self.limits.max_rows + 1:
            raise TooLarge(
                f"The file has some {rows:,} rows, this page takes {self.limits.max_rows:,} (ONSET_BACKTEST_ROWS). "
                "`python -m service backtest FILE --out DIR --report out.html` has no such limit."
            )
        return content

    async def _run(self, trial: Trial, content: bytes) -> bytes:
        with contextlib.ExitStack() as stack:
            try:
                file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onset-backtest-"))) / "upload.csv"
                await asyncio.to_thread(file.write_bytes, content)
            except OSError as error:
                why = f"The file cannot be kept for the backtest: {error.strerror or error}."
                raise Overloaded(f"{why} Make room in the folder for temporary files (TMPDIR).", retry_after=60) from error
            command = [sys.executable, "-m", "service.console.trial", str(file), json.dumps(asdict(trial)), str(self.limits.memory)]
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
            try:
                async with asyncio.timeout(self.limits.max_seconds):
                    output, errors = await process.communicate()
            except TimeoutError as error:
                raise TooLarge(
                    f"The backtest took longer than {self.limits.max_seconds:g} s (ONSET_BACKTEST_SECONDS). "
                    "Send fewer rows, or run `python -m service backtest`, which has no such limit."
                ) from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == REFUSED:
            raise BadBody(output.decode())
        if process.returncode in (TOO_MUCH, -signal.SIGKILL):  # the latter is the kernel's way
            raise TooLarge(
                f"The backtest takes more than {self.limits.memory >> 20} MiB of memory (the larger of {LEAST_MEMORY >> 20} MiB and "
                f"{MEMORY_FACTOR} times ONSET_BACKTEST_BYTES). "
                "Send fewer rows or columns, or run `python -m service backtest`, which has no such limit."
            )
        if process.returncode != 0:
            raise RuntimeError(f"the backtest ended with {process.returncode}: {errors.decode(errors='replace')[-2000:]}")
        return output


# ── in the other process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def main(file: Path, trial: Trial, memory: int) -> int:
    """`memory` is what the file may take: where a container's is used up, the kernel may end the service with this process."""
    os.nice(NICE)
    try:
        return _run(file, trial, memory)
    except MemoryError:
        return TOO_MUCH


def _run(file: Path, trial: Trial, memory: int) -> int:
    began = time.perf_counter()
    notes: list[str] = []
    try:
        detector = load_detectors(Path(trial.models))[trial.model]
        if sys.platform == "linux":  # elsewhere the limit is of something else
            most, (_, hard) = psutil.Process().memory_info().data + memory, resource.getrlimit(resource.RLIMIT_DATA)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        options = ReadOptions(timestamp=trial.timestamp or None, unsorted=True)
        one = read_series(Source(file, trial.name), detector, options, notes.append)
        policy = Policy(alpha=trial.alpha, strict=trial.strict)
        policy = replace(policy, tau=detector.manifest.age_constant)
        [drawn] = sketch([one], detector, policy, BUCKETS)
    except OnsetError as error:
        sys.stdout.write(error.detail.replace(str(file), trial.name))
        return REFUSED
    body = reply(drawn, policy)
    manifest = detector.manifest
    body |= {
        "model": manifest.name,
        "version": manifest.version,
        "units": {feature.name: feature.unit for feature in manifest.features},
        "notes": [note.replace(str(file), trial.name) for note in notes],
        "seconds": round(time.perf_counter() - began, 2),
    }
    sys.stdout.buffer.write(msgspec.json.encode(body))
    return 0


def reply(drawn: Sketch, policy: Policy) -> dict[str, Any]:
    """A sketch as the page draws it."""
    tally, points, columns = drawn.tally, drawn.points(), drawn.drawn()
    x, is_time = axis(drawn.series.seconds[points], points)
    return {
        "name": tally.name,
        "alpha": policy.alpha,
        "strict": policy.strict,
        **{name: getattr(tally, name) for name in ("rows", "late", "warming_up", "judged", "anomalous", "alerts")},
        "allowed": allowed(policy, tally.rows, tally.judged),
        "thinned": drawn.thinned,
        "time": is_time,
        "x": x.tolist(),
        "score": shortened(columns["score"], 5),
        "anomalous_flags": columns["anomalous"].tolist(),
        "features": [
            {"name": drawn.names[j], **{name: shortened(columns[name][:, i]) for name in ("value", "expected", "lower", "upper")}}
            for i, j in enumerate(drawn.features)
        ],
        "all_features": len(drawn.names),
        "onsets": [{**asdict(onset), "x": float(x[_place(points, onset.row)])} for onset in drawn.onsets],
        "onsets_left_out": max(0, tally.onsets - ONSETS),
        "tail": [{"p": level, "rows": rows} for level, rows in zip(TAIL, tally.rarer, strict=True)],
    }


def _place(points: NDArray[np.intp], row: int) -> int:
    return max(0, int(np.searchsorted(points, row, "right")) - 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Trial(**json.loads(sys.argv[2])), int(sys.argv[3])))
