"""Numbers that devices and historians write where they have no reading: what is far from all else in its column."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.events import some

SENTINELS = np.array(
    [-1e20, -2147483648, -99999, -32768, -9999, -999, -99, 999, 9999, 32767, 65534, 65535, 99999, 2147483647, 4294967295, 1e20], np.float64
)
"""Taken for that where a column has nothing near it, as is `BEYOND`."""
BEYOND = 1e30
"""No unit has readings of this size; 3.4e38 is the largest float32."""
RARE = 0.02
"""Share of a column's numbers up to which zeros are such, too: more of them are a machine that stands."""
UNUSUAL = 0.1
"""Share of a column's numbers up to which `fit` takes them for missing: more of one number are usual, whatever it means."""
DISTINCT = 8
"""Such numbers that are told apart in a column."""
SHOWN = 8


class Place(NamedTuple):
    """Where one number was found."""

    column: str
    times: int
    share: float  # of the column's numbers
    moves: bool  # whether the column has two different numbers beside: else it is a switch, 0 or 65535

    def __str__(self) -> str:
        return f"{self.column} ({self.times:,}, {100 * self.share:.2g} %)"

    def none(self, number: float) -> bool:
        """Whether `number` is no reading here in all likelihood: never 0, which machines that stand have."""
        return abs(number) >= BEYOND or (number != 0 and self.moves and self.share <= UNUSUAL)


Found = Mapping[float, Sequence[Place]]


@dataclass
class Sentinels:
    """What columns have of them. Their values are looked at piece by piece."""

    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)  # column → least and greatest of all other numbers
    counts: dict[str, Counter[float]] = field(default_factory=dict)  # column → those that may be such, and 0
    numbers: Counter[str] = field(default_factory=Counter)  # column → its numbers

    def look(self, names: Sequence[str], values: NDArray[np.float64]) -> None:
        """Take down what these columns [T, F] have; NaN = missing."""
        suspect = np.isin(values, SENTINELS) | (np.abs(values) >= BEYOND) | (values == 0)
        rest = np.where(suspect, np.nan, values)
        low, high = np.fmin.reduce(rest, initial=np.inf), np.fmax.reduce(rest, initial=-np.inf)
        for name, least, most, count in zip(names, low.tolist(), high.tolist(), (~np.isnan(values)).sum(axis=0).tolist(), strict=True):
            before = self.ranges.get(name, (math.inf, -math.inf))
            self.ranges[name] = min(before[0], least), max(before[1], most)
            self.numbers[name] += count
        for i in np.flatnonzero(suspect.any(axis=0)).tolist():
            counts = self.counts.setdefault(names[i], Counter())
            for number, count in zip(*(part.tolist() for part in np.unique(values[suspect[:, i], i], return_counts=True)), strict=True):
                if number in counts or len(counts) < DISTINCT:
                    counts[number] += count

    def found(self) -> dict[float, list[Place]]:
        """Those that are far from all other numbers of a column → the columns, in the order of the numbers."""
        found: dict[float, list[Place]] = {}
        for name, counts in self.counts.items():
            low, high = self.ranges[name]
            if counts[0] and not (zero := high > low and _far(0, low, high) and counts[0] <= RARE * self.numbers[name]):
                low, high = min(low, 0), max(high, 0)
            for number, count in counts.items():
                if count and (zero if number == 0 else _far(number, low, high)):
                    found.setdefault(number, []).append(Place(name, count, count / self.numbers[name], high > low))
        return dict(sorted(found.items()))


def _far(number: float, low: float, high: float) -> bool:
    """By more than the width of the range, which has low > high where it is empty."""
    return low > high or not low - (high - low) <= number <= high + (high - low)


def columns_of(stream: str, features: Sequence[str]) -> Sequence[str]:
    """What columns of a stream are looked at together: those of one name, but where there is only one: sensors of all kinds have it."""
    return features if len(features) > 1 else [stream]


def of(found: Found, *, none: bool) -> Found:
    """Those that are no readings in all likelihood, or those that may be some."""
    chosen = {number: [place for place in where if place.none(number) == none] for number, where in found.items()}
    return {number: where for number, where in chosen.items() if where}


def blank(values: NDArray[np.float32], numbers: Iterable[float]) -> None:
    """Make those of a column's numbers missing, in place."""
    numbers = np.array(list(numbers))
    none = np.isin(values, numbers.astype(np.float32))
    if (np.abs(numbers) >= BEYOND).any():  # of these not all are told apart
        none |= np.abs(values) >= BEYOND
    values[none] = np.nan


def advice(found: Found, meaning: str) -> str:
    """What was found, what it means, and what to do; "" = nothing was."""
    if not found:
        return ""
    return (
        f"Far from all other values of their column, as devices write them that have no reading: {places(found)}. {meaning} If they are "
        f"no readings, leave their cells empty (`python -m service split FILES {missing_of(found)}` makes such files), and send null in "
        "their place."
    )


def places(found: Found) -> str:
    return "; ".join(f"{written(number)} in {some(list(map(str, where)), SHOWN)}" for number, where in found.items())


def missing_of(found: Iterable[float]) -> str:
    """The options of `split` that take them for missing."""
    return " ".join(f"--missing {written(number)}" for number in found)


def written(number: float) -> str:
    """So that it is read back as the same number."""
    return f"{number:.0f}" if abs(number) < BEYOND / 1e10 and number == int(number) else repr(number)
