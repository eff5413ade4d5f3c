"""What of short and slow series is found: business figures, sensors, counts of 200 to 5,000 readings, beside what one would write oneself.

    python -m bench.kpis [--streams 40] [--alpha 0.001] [--accept-after 86400] [--seed 0] [--quick] [--json FILE]

    ordinary readings ──shipped default, as served──► false alerts, p-values and bands by age
          └─ after 200, 300, 1,000, 5,000 of them ─► one fault, from the state there was ─► is an alert raised within its window?

A fault's size is in deviations of what season and trend leave over (of a walk, of its steps). "spike 12, later" comes APART readings after
one of FIRST, which has passed and was learned. Baselines are causal: a reading's distance from the median of the 100 before, over their MAD
(`median`), and the same of its difference from the reading a season earlier, whose length they are told (`season ago`). Their thresholds
are chosen afterwards, for each family and length, so that they raise as many alerts on the same ordinary readings as the detector did: no
user could do that, so it is the best that one could reach with them. Nothing is tuned to these families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from bench.fleet import default_model
from bench.report import JsonFile, Machine, report, table
from service.detector import Detector
from service.events import Readings
from service.policy import THRESHOLD, Policy, judge
from service.rounds import advance
from service.state import ALERT_OPEN, Rows

Float64 = NDArray[np.float64]

LENGTHS = (200, 300, 1000, 5000)
SIZES = (6.0, 12.0)
WINDOW = 20
"""Readings within which an alert has to come; of a missing season as long as that is."""
CALM = 10
"""Ordinary readings that end an alert: the service's own number, for the baselines as well."""
LOOKED_BACK = 100
FIRST, APART = 50.0, 1500
START = 1_735_689_600.0
"""2025-01-01, a Wednesday."""


@dataclass(frozen=True)
class Made:
    """B ordinary streams of T readings; all [T, B]."""

    x: Float64
    seconds: Float64
    deviation: Float64


@dataclass(frozen=True)
class Family:
    """What a kind of figure looks like."""

    cadence: float
    season: int
    """Readings, 0 = none."""
    make: Callable[[np.random.Generator, Float64], tuple[Float64, Float64]]
    """(generator, seconds [T, B]) → readings and their deviation."""
    flat: int = 0
    """Readings for which the season is missing, or it stands still; 0 = that is ordinary."""
    least: float = -np.inf
    most: float = np.inf
    whole: bool = False
    off: tuple[str, ...] = ("spike", "dip", "shift")
    """How readings can be off. Of a counter what is off stays off."""

    ago: int = 0
    """What is sent is the ratio to the reading so many before; 0 = the reading itself."""

    @property
    def rises(self) -> bool:
        return self.off == ("shift",)


def _day(seconds: Float64) -> Float64:
    return np.asarray(seconds / 86400 % 1)


def _weekend(seconds: Float64) -> NDArray[np.bool_]:
    return np.asarray((seconds / 86400 + 3) % 7 >= 5)


def _orders(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    size = np.exp(rng.uniform(4, 8, seconds.shape[1]))
    mean = size * np.where(_weekend(seconds), 0.6, 1.0) * (1 + 0.15 * np.sin(2 * np.pi * seconds / (365.25 * 86400)))
    mean = mean * np.exp(0.04 * rng.normal(size=seconds.shape))
    return rng.poisson(mean).astype(np.float64), np.sqrt(mean + (0.04 * mean) ** 2)


def _revenue(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    day = np.exp(-0.5 * ((_day(seconds) - 0.6) / 0.18) ** 2) + 0.08
    mean = np.exp(rng.uniform(5, 10, seconds.shape[1])) * day * np.where(_weekend(seconds), 0.7, 1.0)
    return np.round(mean * np.exp(0.08 * rng.normal(size=seconds.shape)), 2), 0.08 * mean


def _traffic(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    wave = 1 + 0.7 * np.sin(2 * np.pi * (_day(seconds) - 0.3)) + 0.15 * np.sin(4 * np.pi * _day(seconds))
    mean = np.exp(rng.uniform(4, 7, seconds.shape[1])) * wave * np.where(_weekend(seconds), 0.75, 1.0)
    mean = mean * np.exp(0.05 * rng.normal(size=seconds.shape))
    return rng.poisson(mean).astype(np.float64), np.sqrt(mean + (0.05 * mean) ** 2)


def _autoregression(rng: np.random.Generator, shape: tuple[int, ...], memory: float) -> Float64:
    """Deviation 1."""
    shocks = rng.normal(size=shape) * np.sqrt(1 - memory**2)
    x = np.empty(shape)
    x[0] = rng.normal(size=shape[1:])
    for i in range(1, len(x)):
        x[i] = memory * x[i - 1] + shocks[i]
    return x


def _sensor(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    return np.round(21 + 0.8 * _autoregression(rng, seconds.shape, 0.9), 1), np.full(seconds.shape, 0.8)


def _noise(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    return 50 + 2 * rng.normal(size=seconds.shape), np.full(seconds.shape, 2.0)


def _counter(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    return np.cumsum(rng.poisson(50, seconds.shape), axis=0).astype(np.float64), np.full(seconds.shape, np.sqrt(50))


def _percentage(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    dips = (rng.random(seconds.shape) < 0.03) * rng.exponential(0.3, seconds.shape)
    return np.round(100 - dips, 2), np.full(seconds.shape, 0.3)


def _errors(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    return rng.poisson(0.05, seconds.shape).astype(np.float64), np.full(seconds.shape, np.sqrt(0.05))


def _switch(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    T, B = seconds.shape
    runs = np.cumsum(rng.integers(12, 27, (T // 12 + 2, B)), axis=0)
    changes = np.zeros((T, B))
    for b in range(B):
        changes[runs[runs[:, b] < T, b], b] = 1
    return np.cumsum(changes, axis=0) % 2, np.full((T, B), 0.5)


def _price(rng: np.random.Generator, seconds: Float64) -> tuple[Float64, Float64]:
    steps = 0.004 * rng.normal(size=seconds.shape) + 2e-5
    steps += (rng.random(seconds.shape) < 5e-4) * rng.normal(size=seconds.shape) * 0.05
    x = np.exp(rng.uniform(2, 6, seconds.shape[1])) * np.exp(np.cumsum(steps, axis=0))
    return np.round(x, 2), 0.004 * x


FAMILIES: dict[str, Family] = {
    "daily orders": Family(86400, 7, _orders, flat=7, least=0, whole=True),
    "hourly revenue": Family(3600, 24, _revenue, flat=24, least=0),
    "web traffic, 5 min": Family(300, 288, _traffic, flat=288, least=0, whole=True),
    "irregular sensor": Family(60, 0, _sensor, flat=60),
    "noise": Family(60, 0, _noise, flat=60),
    "counter": Family(60, 0, _counter, flat=20, whole=True, off=("shift",)),
    "percentage at 100": Family(60, 0, _percentage, least=0, most=100, off=("dip",)),
    "errors a minute": Family(60, 0, _errors, least=0, whole=True, off=("spike", "shift")),
    "on and off": Family(60, 0, _switch, flat=150, off=()),
    "price": Family(3600, 0, _price, flat=60, least=0),
}
FAMILIES |= {
    f"{name} ÷ {word}": replace(FAMILIES[name], ago=ago)
    for name, word, ago in (("daily orders", "a week ago", 7), ("hourly revenue", "a week ago", 168), ("price", "the last", 1))
}
"""The last ones are those that a client sends as ratios; the baselines see the same."""


def made(family: Family, rng: np.random.Generator, T: int, B: int) -> Made:
    """Ordinary streams that begin within the same eight weeks. Of the irregular sensor the gaps are exponential."""
    gaps = rng.exponential(family.cadence, (T, B)) if family.make is _sensor else np.full((T, B), family.cadence)
    seconds = START + family.cadence * rng.integers(0, int(56 * 86400 / family.cadence), B) + np.cumsum(gaps, axis=0)
    x, deviation = family.make(rng, seconds)
    return Made(x, seconds, deviation)


def sent(family: Family, x: Float64) -> Float64:
    """What a client makes of readings [T, B]; NaN where there is nothing to divide by yet."""
    if family.ago == 0:
        return x
    ratio = np.full(x.shape, np.nan)
    ratio[family.ago :] = x[family.ago :] / np.maximum(x[: -family.ago], 1e-9)
    return ratio


@dataclass(frozen=True)
class Fault:
    """What happens to the readings from one on."""

    name: str
    size: float = 0.0
    later: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.size:g}{', later' if self.later else ''}" if self.size else self.name


def faults(family: Family) -> Iterator[Fault]:
    yield from (Fault(name, size) for name in family.off for size in SIZES)
    if "spike" in family.off:
        yield Fault("spike", SIZES[-1], later=True)
    if family.flat:
        yield Fault("season missing" if family.season else "stands still")


def with_fault(family: Family, fault: Fault, ordinary: Made, at: int, rng: np.random.Generator) -> Float64:
    """Readings [W, B] from the `at`-th on."""
    window = family.flat if fault.size == 0 else WINDOW
    x, off = ordinary.x[at : at + window].copy(), fault.size * ordinary.deviation[at : at + window]
    if fault.name == "season missing":
        day = ordinary.x[at - family.season : at]
        x = day.mean(axis=0) + np.median(ordinary.deviation[at - family.season : at], axis=0) * rng.normal(size=x.shape)
    elif fault.name == "stands still":
        x = np.broadcast_to(ordinary.x[at - 1], x.shape)
    elif fault.name == "shift":
        x = x + (off[0] if family.rises else off)
    else:
        x[0] += off[0] if fault.name == "spike" else -off[0]
    x = np.clip(x, family.least, family.most)
    return np.round(x) if family.whole else x


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def play(detector: Detector, policy: Policy, rows: Rows, x: Float64, seconds: Float64) -> Rows:
    """Step the states `rows` [B] by x [T, B], in place; the records [T, B]."""
    T, B = x.shape
    none = np.zeros(T * B, np.uint64)
    values = x.astype(np.float32).reshape(-1, 1)
    readings = Readings([""] * (T * B), values, seconds.ravel(), none == 0, none.astype(np.int64) - 1, none)
    return advance(detector, policy, rows, readings, np.tile(np.arange(B), T)).records.reshape(T, B)


@dataclass(frozen=True)
class Ordinary:
    """What the detector said of ordinary readings; all [T, B]."""

    open: NDArray[np.bool_]
    opens: NDArray[np.bool_]
    p_value: NDArray[np.float32]
    outside: NDArray[np.bool_]
    """Of the band."""
    half: Float64
    """Half the band's width, in deviations."""


def _ordinary(records: Rows, deviation: Float64) -> Ordinary:
    is_open = records["flags"] & ALERT_OPEN != 0
    lower, upper, x = records["lower"][..., 0], records["upper"][..., 0], records["x"][..., 0]
    opens = is_open & ~np.concatenate([np.zeros((1, is_open.shape[1]), np.bool_), is_open[:-1]])
    return Ordinary(is_open, opens, records["p_value"], (x < lower) | (x > upper), (upper - lower).astype(np.float64) / 2 / deviation)


def _found(records: Rows) -> NDArray[np.bool_]:
    """[B] whether an alert opens, or goes far beyond all before within an open one."""
    return np.asarray((judge(records.ravel()).alert_score.reshape(records.shape) > THRESHOLD).any(axis=0))


# ── baselines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def distances(x: Float64) -> Float64:
    """How far readings [T, B] lie from the median of the LOOKED_BACK before each, over their MAD; the first ones have none and are 0.

    Where the MAD is 0 the mean distance stands in for it (Iglewicz and Hoaglin); where nothing moved, any move is infinitely far.
    """
    far = np.zeros(x.shape)
    if len(x) <= LOOKED_BACK:
        return far
    before = np.lib.stride_tricks.sliding_window_view(x[:-1], LOOKED_BACK, axis=0)  # [T - LOOKED_BACK, B, LOOKED_BACK]
    for first in range(0, len(before), 500):
        window = before[first : first + 500]
        middle = np.median(window, axis=-1)
        apart = np.abs(window - middle[..., None])
        spread = np.median(apart, axis=-1)
        spread = np.where(spread > 0, spread, apart.mean(axis=-1) * 1.2533 / 1.4826)
        now = np.abs(x[LOOKED_BACK + first : LOOKED_BACK + first + len(window)] - middle)
        far[LOOKED_BACK + first : LOOKED_BACK + first + len(window)] = np.where(now > 0, now / np.maximum(spread, 1e-300), 0.0)
    return far


def season_ago(x: Float64, season: int) -> Float64:
    """The same of differences from the reading a season earlier; without season, from the one before."""
    season = min(season or 1, len(x))
    return np.concatenate([np.zeros((season, x.shape[1])), distances(x[season:] - x[:-season])])


def raised(far: Float64, threshold: float) -> int:
    """Alerts of [T, B]: an exceedance opens one, CALM others end it."""
    count = 0
    for column in (far > threshold).T:
        at = np.flatnonzero(column)
        count += int((np.diff(at, prepend=-np.inf) > CALM).sum())
    return count


def matched(far: Float64, alerts: int) -> float:
    """The least threshold at which there are no more than so many alerts."""
    levels = np.unique(far)
    low, high = 0, len(levels) - 1  # at the last none exceeds it
    while low < high:
        middle = (low + high) // 2
        if raised(far, float(levels[middle])) <= alerts:
            high = middle
        else:
            low = middle + 1
    return float(levels[low])


# ── one family ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

METHODS = ("detector", "median", "season ago")


@dataclass(frozen=True)
class Figures:
    """Of one family at one length."""

    family: str
    length: int
    alerts: float
    """Of an ordinary stream from its 101st reading to this length."""
    asked: float
    """The same as the policy has it, with the learning allowance."""
    rare: float
    """p-values below α ÷ α, from the length before to this one."""
    open: float
    """Share of readings there under an open alert."""
    outside: float
    """Share of them outside their band."""
    half_band: float
    """Median of half its width, in deviations."""
    found: dict[str, dict[str, float]]
    """Fault → method → share of streams."""


def measured(name: str, detector: Detector, policy: Policy, lengths: Sequence[int], B: int, seed: int) -> list[Figures]:
    family = FAMILIES[name]
    rng = np.random.default_rng([seed, list(FAMILIES).index(name)])
    ordinary = made(family, rng, max(lengths) + APART + max(WINDOW, family.flat), B)
    given = sent(family, ordinary.x)
    looked = [distances(given), season_ago(given, family.season)]
    rows, parts, done, figures, warmup = detector.codec().fresh(B), list[Ordinary](), family.ago, list[Figures](), detector.manifest.warmup
    for length in lengths:
        if length <= family.ago + warmup:
            continue
        records = play(detector, policy, rows, given[done:length], ordinary.seconds[done:length])
        off = ordinary.deviation[done:length]
        parts.append(_ordinary(records, off if family.ago == 0 else np.sqrt(2) * off / ordinary.x[done - family.ago : length - family.ago]))
        done, opened = length, sum(int(one.opens.sum()) for one in parts)
        thresholds = [matched(far[family.ago + warmup : length], opened) for far in looked]
        found = {}
        for fault in faults(family):
            at, state, past = length, rows.copy(), ordinary.x
            if fault.later:
                at, past = length + APART, ordinary.x.copy()
                past[length] = with_fault(family, Fault(fault.name, FIRST), ordinary, length, rng)[0]
                play(detector, policy, state, sent(family, past)[length:at], ordinary.seconds[length:at])
            elif fault.name == "season missing" and at < family.season:
                continue
            x = with_fault(family, fault, ordinary, at, rng)
            whole = sent(family, np.concatenate([past[max(0, at - family.season - family.ago - LOOKED_BACK - 1) : at], x]))
            shares = [float(_found(play(detector, policy, state, whole[-len(x) :], ordinary.seconds[at : at + len(x)])).mean())]
            for far, threshold in zip((distances(whole), season_ago(whole, family.season)), thresholds, strict=True):
                shares.append(float((far[-len(x) :] > threshold).any(axis=0).mean()))
            found[str(fault)] = dict(zip(METHODS, shares, strict=True))
        figures.append(_figures(name, length, policy, warmup, parts, opened, found))
    return figures


def _figures(
    name: str, length: int, policy: Policy, warmup: int, parts: list[Ordinary], opened: int, found: dict[str, dict[str, float]]
) -> Figures:
    here = parts[-1]
    judged = ~np.isnan(here.p_value)
    return Figures(
        name,
        length,
        opened / here.opens.shape[1],
        float(policy.onset_alpha(np.arange(warmup + 1, length - FAMILIES[name].ago + 1)).sum()),
        float((here.p_value[judged] < policy.alpha).mean() / policy.alpha),
        float(here.open[judged].mean()),
        float(here.outside[judged].mean()),
        float(np.median(here.half[judged])),
        found,
    )


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tables(figures: list[Figures], alpha: float) -> list[Any]:
    kinds = list(dict.fromkeys(str(fault) for family in FAMILIES.values() for fault in faults(family)))
    lengths = sorted({one.length for one in figures})
    found = table(
        f"Found at α = {alpha:g}: detector / median / season ago, with as many false alerts each", ("fault",), [f"{n:,}" for n in lengths]
    )
    for kind in kinds:
        cells = []
        for length in lengths:
            some = [one.found[kind] for one in figures if one.length == length and kind in one.found and not FAMILIES[one.family].ago]
            cells.append(" / ".join(f"{np.mean([each[method] for each in some]):.2f}" for method in METHODS) if some else "")
        found.add_row(kind, *cells)
    each = table("Each family: detector / the better of the two baselines", ("family", "readings"), kinds)
    names = ("alerts a stream", "asked", "p < α ÷ α", "alert open", "outside the band", "half the band")
    plain = table("Ordinary readings", ("family", "readings"), names)
    for one in figures:
        cells = [_beside(one.found[kind]) if kind in one.found else "" for kind in kinds]
        each.add_row(one.family, f"{one.length:,}", *cells)
        shares = (f"{one.rare:.2f}", f"{one.open:.1%}", f"{one.outside:.2%}", f"{one.half_band:,.1f}")
        plain.add_row(one.family, f"{one.length:,}", f"{one.alerts:.2f}", f"{one.asked:.2f}", *shares)
    return [found, each, plain]


def _beside(shares: dict[str, float]) -> str:
    mine, *others = (shares[method] for method in METHODS)
    return f"{mine:.2f} / {max(others):.2f}"


def main(
    streams: Annotated[int, typer.Option(min=1, help="Of each family.")] = 40,
    alpha: Annotated[float, typer.Option(help="The asked rate of false alarms.")] = 1e-3,
    accept_after: Annotated[float, typer.Option(help="ONSET_ACCEPT_AFTER: seconds after which what lasts is accepted; 0 = never.")] = 0,
    seed: Annotated[int, typer.Option(help="Of all readings and faults.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Four streams of 150 readings: does it run?")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure each family; print what is found, each family's part in it, and what ordinary readings are told."""
    machine = Machine.now()
    detector = Detector.load(default_model())
    policy = Policy(alpha=alpha, tau=detector.manifest.age_constant, accept_after=accept_after or np.inf)
    lengths, B = ((150,), 4) if quick else (LENGTHS, streams)
    figures = [one for name in FAMILIES for one in measured(name, detector, policy, lengths, B, seed)]
    report(_tables(figures, alpha), [], machine, {"alpha": alpha, "seed": seed, "families": [asdict(one) for one in figures]}, json_file)


if __name__ == "__main__":
    typer.run(main)
