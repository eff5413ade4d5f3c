"""Periodic lines of streams that never end, and which of them are overdue: no line says that another one did not come.

    clock     of up to CLOCKS templates that come periodically: the seconds since the last such line
    overdue   beyond the longest that is usual, judged when any line comes: what says nothing at all is for the service to notice

A template is waited for once the stream has said it, and no more once it is long overdue while learning goes on (no alert, or an accepted
one). After a silence of the whole stream all clocks begin anew. They count whole seconds: exact in float32, and a thousand lines a second
do not stop them.
Shapes: T lines, B streams, P clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.artifact import NEW
from training.data import Float32, Float64
from training.layout import Keeps, Parts, Slot
from training.sessions import Ints, Session

CLOCKS = 24
REGULAR, MIDDLE = 2.0, 0.9
"""A template is periodic where so much of its time lies in intervals that differ by less than this factor."""
ENOUGH_INTERVALS, RARER = 5, 1000
"""Intervals of a periodic template at least; one in RARER may be longer than its longest."""
LEAST_PERIOD, LEAST_MARGIN = 10.0, 1.1
"""Seconds; factor beyond the longest interval up to which a line is not overdue: how much its intervals differ, this at least."""
ROUNDED = 2.0
"""Seconds by which a clock may be ahead."""
LATE, MISSING, MARGINS = 20.0, 30.0, 3
"""Nats of a line beyond its margin, and beyond so many of them, when it is given up: two onsets, not one with every line meanwhile."""
QUIET = 2.0
"""Of the longest gaps of a stream's time: a longer one is a silence."""
FOREVER = 1e7
"""Seconds: up to here sums of whole ones are exact."""


@dataclass(frozen=True)
class Rhythm:
    """Fitted by `rhythm_of`. Without a periodic template it has one clock, which nothing starts."""

    codes: Ints  # [P]
    longest: Float64  # [P] seconds
    margin: Float64  # [P]
    silence: float  # seconds

    @property
    def overdue(self) -> tuple[Float64, Float64]:
        """Whole seconds [P] after which a line is late, and missing."""
        late, missing = (np.ceil((self.longest + ROUNDED) * self.margin**power).clip(max=FOREVER) for power in (1, MARGINS))
        return late, missing


class Clocks(nn.Module):
    """Follows the clocks of each stream."""

    codes: Tensor
    late: Tensor
    missing: Tensor

    def __init__(self, rhythm: Rhythm) -> None:
        super().__init__()
        self.rhythm = rhythm
        self.register_buffer("codes", torch.from_numpy(rhythm.codes)[None], persistent=False)
        for name, seconds in zip(("late", "missing"), rhythm.overdue, strict=True):
            self.register_buffer(name, torch.from_numpy(seconds).float()[None], persistent=False)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Clocks: 1 + seconds, 0 where the line has not come; and the part of a second that they do not show yet."""
        return (Slot("clocks", len(self.rhythm.codes), Keeps.ROWS), Slot("second", 1, Keeps.ROWS))

    def overdue(self, gap: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """A line `gap` [B, 1] seconds after the one before, NaN = not known: nats [B, P] of each clock, and the clocks then."""
        gap = torch.where(torch.isfinite(gap), gap.clamp(0.0, FOREVER), 0.0)
        pending = parts["second"] + gap
        whole = torch.floor(pending)
        clocks = torch.where(gap > self.rhythm.silence, 1.0, (parts["clocks"] + whole).clamp(max=FOREVER))
        clocks = torch.where(parts["clocks"] > 0, clocks, 0.0)
        nats = (clocks > self.late).to(gap.dtype) * LATE + (clocks > self.missing).to(gap.dtype) * (MISSING - LATE)
        return nats, {"clocks": clocks, "second": pending - whole}

    def after(self, clocks: Parts, nats: Tensor, code: Tensor, learns: Tensor) -> Parts:
        """What `overdue` gave, after a line of code [B]; learns [B, 1] bool."""
        waited = torch.where((nats >= MISSING) & learns, 0.0, clocks["clocks"])
        return {**clocks, "clocks": torch.where(code.unsqueeze(1) == self.codes, 1.0, waited)}


def overdue_of(rhythm: Rhythm, codes: Ints, gaps: Float32) -> Float64:
    """Nats [T] of what is overdue at the lines of a stream, as `Clocks` gives them while it learns."""
    T, gaps = len(codes), np.nan_to_num(gaps.astype(np.float64))
    line, second = np.arange(T), np.floor(np.cumsum(gaps))
    silent = np.maximum.accumulate(np.where(gaps > rhythm.silence, line, -1))
    nats = np.zeros(T)
    for code, late, missing in zip(rhythm.codes, *rhythm.overdue, strict=True):
        said = np.maximum.accumulate(np.where(codes == code, line, -1))
        last = np.concatenate([[-1], said[:-1]])
        clock = np.where(last >= 0, second - second[np.maximum(last, silent)] + 1, 0)
        gone = np.cumsum(clock > missing)
        given_up = gone - (clock > missing) > gone[np.maximum(last, 0)]
        nats = np.maximum(nats, (LATE * (clock > late) + (MISSING - LATE) * (clock > missing)) * ~given_up)
    return nats


def rhythm_of(sessions: Sequence[Session]) -> Rhythm:
    """Of sessions, or pieces of them, those of a stream in order."""
    runs = [(codes, seconds) for codes, seconds in _runs(sessions) if len(codes) > 1]
    gaps = np.concatenate([np.diff(seconds) for _, seconds in runs]) if runs else np.zeros(0)
    silence = QUIET * _of_time(np.sort(gaps), 1 - (1 - MIDDLE) / 2) if len(gaps) else math.inf
    found: dict[int, list[Float64]] = {}
    for codes, seconds in runs:
        for code, intervals in _intervals(codes, seconds, silence):
            found.setdefault(code, []).append(intervals)
    periodic = sorted(one for code, parts in found.items() if code != NEW and (one := _periodic(code, np.sort(np.concatenate(parts)))))
    margin, codes_, longest = zip(*(periodic[:CLOCKS] or [(REGULAR, -1, FOREVER)]), strict=True)
    return Rhythm(np.array(codes_, np.int64), np.array(longest), np.array(margin), float(min(silence, FOREVER)))


def _runs(sessions: Sequence[Session]) -> Iterator[tuple[Ints, Float64]]:
    """Codes and seconds of lines that follow each other without a break, of streams whose times are known."""
    joined: list[Session] = []
    for session in sorted(sessions, key=lambda one: (one.stream, one.start)):
        if joined and (joined[-1].stream != session.stream or joined[-1].start + len(joined[-1]) != session.start):
            yield _run(joined)
            joined = []
        joined.append(session)
    if joined:
        yield _run(joined)


def _run(pieces: Sequence[Session]) -> tuple[Ints, Float64]:
    codes, gaps = np.concatenate([one.codes for one in pieces]), np.concatenate([one.gaps for one in pieces]).astype(np.float64)
    if not np.isfinite(gaps[1:]).all():
        return codes[:0], gaps[:0]
    gaps[0] = 0
    return codes, np.cumsum(np.maximum(gaps, 0))


def _intervals(codes: Ints, seconds: Float64, silence: float) -> Iterator[tuple[int, Float64]]:
    """Of each template those between its lines, unless the stream was silent in between."""
    silent = np.cumsum(np.diff(seconds, prepend=seconds[0]) > silence)
    order = np.argsort(codes, kind="stable")
    same = (np.diff(codes[order]) == 0) & (np.diff(silent[order]) == 0)
    of, between = codes[order][1:][same], np.diff(seconds[order])[same]
    which, starts = np.unique(of, return_index=True)
    yield from zip(which.tolist(), np.split(between, starts[1:])[: len(which)], strict=True)


def _periodic(code: int, intervals: Float64) -> tuple[float, int, float] | None:
    """Margin, code, and the longest of sorted intervals; None where they differ too much."""
    least, most = (_of_time(intervals, share) for share in ((1 - MIDDLE) / 2, (1 + MIDDLE) / 2))
    regular = LEAST_PERIOD <= most <= REGULAR * least and (intervals >= least).sum() >= ENOUGH_INTERVALS
    return (max(most / least, LEAST_MARGIN), code, float(intervals[-1 - len(intervals) // RARER])) if regular else None


def _of_time(intervals: Float64, share: float) -> float:
    """The interval that this share of the time lies within, of sorted ones."""
    until: NDArray[np.float64] = np.cumsum(intervals)
    return float(intervals[min(int(np.searchsorted(until, share * until[-1])), len(intervals) - 1)])
