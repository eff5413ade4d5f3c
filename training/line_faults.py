"""Faults injected into sessions that are normal: what does a log detector find, and does its network earn its place?

    missing · doubled · inserted (a line of another template) · replaced · moved · cut short (sessions that end)

One fault a session, at a random place: but for the cut the smallest that there are. Nothing is known of the real ones. Counting sees
all but the moved lines, which only a model of the order finds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.data import Float32
from training.sessions import Ints, Session

SHORTEST, LONGEST = 3, 1000
"""Lines of a session that is given faults; a longer one is cut, and then has not ended."""
NONE = -1
"""In an order of lines: one that the session does not have."""

Order = Callable[[np.random.Generator, int], Ints]
"""(rng, lines T) → which of the lines are said, in order."""


def _missing(rng: np.random.Generator, T: int) -> Ints:
    return np.delete(np.arange(T), rng.integers(T))


def _doubled(rng: np.random.Generator, T: int) -> Ints:
    i = int(rng.integers(T))
    return np.insert(np.arange(T), i, i)


def _inserted(rng: np.random.Generator, T: int) -> Ints:
    return np.insert(np.arange(T), rng.integers(T + 1), NONE)


def _replaced(rng: np.random.Generator, T: int) -> Ints:
    order = np.arange(T)
    order[rng.integers(T)] = NONE
    return order


def _moved(rng: np.random.Generator, T: int) -> Ints:
    i, j = rng.choice(T, 2, replace=False)
    return np.insert(np.delete(np.arange(T), i), j, i)


def _cut_short(rng: np.random.Generator, T: int) -> Ints:
    return np.arange(int(rng.integers(1, T)))


FAULTS: dict[str, Order] = {
    "missing": _missing,
    "doubled": _doubled,
    "inserted": _inserted,
    "replaced": _replaced,
    "moved": _moved,
    "cut short": _cut_short,
}


def with_fault(kind: str, rng: np.random.Generator, session: Session, templates: int) -> Session | None:
    """The session with this fault; None where it would be none. A line that does not belong has no number."""
    if len(session) > LONGEST:
        session = session.cut(0, LONGEST)
    T = len(session)
    if T < SHORTEST or (kind == "cut short" and not session.ended):
        return None
    order = FAULTS[kind](rng, T)
    own = order != NONE
    codes = np.where(own, session.codes[order], rng.integers(1, templates + 1))
    if np.array_equal(codes, session.codes):
        return None
    numbers = np.where(own[:, None], session.numbers[order], np.float32(np.nan))
    return Session(session.stream, codes, _gaps(session, order), numbers, session.ended, session.first)


def _gaps(session: Session, order: Ints) -> Float32:
    """Lines keep their times, but for those that are moved, doubled or do not belong: of these nothing is known."""
    gaps = np.full(len(order), np.nan, np.float32)
    if not np.isfinite(session.gaps[1:]).all():
        return gaps
    times = np.cumsum(np.nan_to_num(session.gaps.astype(np.float64)))
    step = order[1:] - order[:-1]
    onward = (step > 0) & (step <= 2) & (order[:-1] != NONE)  # 2 is behind a line that is missing
    gaps[1:] = np.where(onward, times[order[1:]] - times[order[:-1]], np.nan)
    gaps[0] = session.gaps[0] if order[0] == 0 else np.nan
    return gaps
