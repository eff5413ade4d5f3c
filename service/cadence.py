"""How often a stream speaks, learned from its gaps; and how long a silence must be to be improbable. Pure, O(1), vectorised.

A stream's log gaps have a running mean and spread, and a longest that fades:

    patience = exp(max(mean + z(α)·max(spread, SMALLEST), longest + log 2))

The first is the gap rarer than α if gaps are lognormal, and some three cadences where they are exact; the second keeps streams with
regular pauses (nights, batches) quiet. A gap counts for no more than four times the patience it met, so one outage does not hide the
next, while pauses of every night are known after a few.
Events of the same time are one. Nothing is said before GAPS gaps.

Who sends the readings of a minute once a minute is silent for a minute in between: the longest is of the events' own gaps and of the times
between arrivals. One that was longer than the patience it met counts for no more than what is usual: it may have been us whom nothing
reached.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from service.state import Rows

Float64 = NDArray[np.float64]

GAPS = 50
MEMORY, LONG_MEMORY = 200.0, 5000.0
"""Gaps that mean and spread, and the longest, remember."""
SMALLEST = 0.35
HEADROOM = math.log(2)
OUTLIER = math.log(4)
LONGEST = math.log(1e9)
"""Of a patience: a lifetime. A burst of milliseconds once a day is improbable only after more; times of watches must stay below SILENT."""


def learn(rows: Rows, gap: Float64) -> None:
    """Learn the gaps [B] (s; NaN = none) that ended with an event of `rows`, in place."""
    known = gap > 0
    here = slice(None) if known.all() else np.flatnonzero(known)
    pace = np.log(gap[here])
    count, mean, spread, longest = (rows[name][here].astype(np.float64) for name in ("gaps", "pace", "pace_spread", "pace_longest"))
    pace = np.where(count >= GAPS, np.minimum(pace, _log_patience(mean, spread, longest, 1e-3) + OUTLIER), pace)
    rate = np.maximum(1 / (count + 1), 1 / MEMORY)
    difference = pace - mean
    rows["pace_spread"][here] = np.sqrt((1 - rate) * (spread**2 + rate * difference**2))
    rows["pace"][here] = mean + rate * difference
    faded = longest - (longest - mean) / LONG_MEMORY
    rows["pace_longest"][here] = np.where(count == 0, pace, np.maximum(faded, pace))
    rows["gaps"][here] = np.minimum(count + 1, 2**32 - 1)


def learn_arrivals(rows: Rows, gap: Float64, patience: Float64) -> NDArray[np.intp]:
    """Learn the seconds [B] between the last two arrivals (NaN = not known), in place; which of `rows` may have learned something.

    `patience` [B] is how long the later one was waited for, inf where nobody waited.
    """
    longer = np.flatnonzero(gap > np.exp(rows["pace_longest"].astype(np.float64)))
    if len(longer):
        mean, spread, longest = (rows[name][longer].astype(np.float64) for name in ("pace", "pace_spread", "pace_longest"))
        usual = np.where(gap[longer] > patience[longer], mean + _z(1e-3) * np.maximum(spread, SMALLEST), np.inf)
        rows["pace_longest"][longer] = np.maximum(longest, np.minimum(np.log(gap[longer]), usual))
    return longer


def patience(rows: Rows, alpha: float) -> Float64:
    """Seconds [B] after which a silence of each stream is improbable at `alpha`; inf where too little is known."""
    mean, spread, longest = (rows[name].astype(np.float64) for name in ("pace", "pace_spread", "pace_longest"))
    return np.where(rows["gaps"] >= GAPS, np.exp(np.minimum(_log_patience(mean, spread, longest, alpha), LONGEST)), np.inf)


def rate(rows: Rows) -> Float64:
    """Events a second [B] of each stream, the mean of lognormal gaps; NaN where too little is known."""
    mean, spread = rows["pace"].astype(np.float64), rows["pace_spread"].astype(np.float64)
    return np.where(rows["gaps"] >= GAPS, np.exp(np.clip(-(mean + spread**2 / 2), -700.0, 700.0)), np.nan)


def _log_patience(mean: Float64, spread: Float64, longest: Float64, alpha: float) -> Float64:
    return np.maximum(mean + _z(alpha) * np.maximum(spread, SMALLEST), longest + HEADROOM)


@lru_cache(maxsize=64)
def _z(alpha: float) -> float:
    return NormalDist().inv_cdf(1 - alpha)
