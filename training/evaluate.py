"""How good a detector is, without labels: false onsets on streams it never saw, and named anomalies injected into them.

Runs the step function exactly as it is served (ONNX Runtime, padded batches). Shapes: T steps, B streams, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.artifact import SEEN
from training.data import Float32, Stream, cut, pad, variance_of
from training.detector import WARMUP
from training.synthetic import ANOMALIES
from training.verify import StepFunction

ASKED = (1e-3, 1 / 2016, 1e-4)
REACTION = 20
"""Events after an injected anomaly within which its onset counts as found."""


@dataclass(frozen=True)
class Scores:
    """Answers of a whole run."""

    p_value: Float32  # [T, B]
    onset_p: Float32  # [T, B]
    expected: Float32  # [T, B, F]
    lower: Float32  # [T, B, F]
    upper: Float32  # [T, B, F]
    contribution: Float32  # [T, B, F]


def run_streams(step: StepFunction, state_size: int, x: Float32, t: Float32, alpha: float = 1e-3) -> Scores:
    """All of x [T, B, F], t [T, B, 3], from fresh states."""
    T, B, F = x.shape
    state, ones = np.zeros((B, state_size), np.float32), np.ones(B, np.float32)
    asked = np.full(B, alpha, np.float32)
    answers: dict[str, Float32] = {name: np.zeros((T, B), np.float32) for name in ("p_value", "onset_p")}
    answers |= {name: np.zeros((T, B, F), np.float32) for name in ("expected", "lower", "upper", "contribution")}
    for i in range(T):
        out = step(state, x[i], t[i], ones, asked)
        for name, values in answers.items():
            values[i] = getattr(out, name)
        state = out.state
    return Scores(**answers)


def onset_p_at(
    step: StepFunction, state_size: int, x: Float32, t: Float32, asked: Sequence[float] = ASKED, on_step: Callable[[], None] = lambda: None
) -> Float32:
    """onset_p [A, T, B] of all of x [T, B, F], t [T, B, 3] for each of the A rates asked for, from fresh states.

    Each has states of its own: what the audit gives a quiet stream depends on the rate that is asked for, up to a decade. So the onsets
    below 1e-4 of a run at 1e-3 are not those that a service would raise that is asked for 1e-4.
    """
    T, B, _ = x.shape
    A = len(asked)
    state, ones = np.zeros((A * B, state_size), np.float32), np.ones(A * B, np.float32)
    alpha = np.repeat(np.array(asked, np.float32), B)
    onset_p = np.zeros((A, T, B), np.float32)
    for i in range(T):
        out = step(state, np.tile(x[i], (A, 1)), np.tile(t[i], (A, 1)), ones, alpha)
        state, onset_p[:, i] = out.state, out.onset_p.reshape(A, B)
        on_step()
    return onset_p


def false_onsets(onset_p: Float32, counted: NDArray[np.bool_], asked: Sequence[float] = ASKED) -> dict[str, dict[str, float]]:
    """Onsets rarer than asked on normal rows, as a multiple of what was asked.

    `onset_p` [A, T, B] is of each of the A rates asked for, `counted` [T, B] marks the rows to look at.
    """
    measured = {}
    for rate, of_rate in zip(asked, onset_p, strict=True):
        judged = counted & np.isfinite(of_rate)
        events, found = int(judged.sum()), int((judged & (of_rate < rate)).sum())
        measured[f"{rate:.2g}"] = {"asked": rate, "events": events, "onsets": found, "measured": round(found / max(events, 1), 7)}
        measured[f"{rate:.2g}"]["ratio"] = round(found / max(events, 1) / rate, 3)
    return measured


def too_few(measured: dict[str, float]) -> str:
    """What a row of `false_onsets` cannot tell, in words; "" where as many onsets were asked for as tell a rate."""
    asked = measured["events"] * measured["asked"]
    if asked >= SEEN:
        return ""
    return (
        f"At α = {measured['asked']:g}, {asked:.1f} onsets were asked for in {measured['events']:,.0f} unseen rows: how many there were is "
        f"mostly chance. {SEEN / measured['asked']:,.0f} rows or more tell a rate, of later files too (`python -m service backtest`)."
    )


def false_onsets_by_age(onset_p: Float32) -> dict[str, float]:
    """Measured ÷ asked, which is 1e-3, by the age of the stream: young streams spend a learning allowance."""
    edges = (WARMUP, 300, 1000, 2000, 4000, len(onset_p))
    ages = {}
    for low, high in itertools.pairwise(edges):
        part = onset_p[low:high]
        judged = np.isfinite(part)
        if judged.any():
            ages[f"{low}-{high}"] = round(float((part[judged] < 1e-3).mean()) / 1e-3, 3)
    return ages


def detection(step: StepFunction, state_size: int, streams: Sequence[Stream], scored: Sequence[bool], at: int, seed: int) -> dict[str, Any]:
    """Each named anomaly injected at event `at` into every stream: share found within REACTION events, and the median delay.

    `at_random` is the share of the same streams, untouched, that raise an onset in as many events: the floor of the table.
    """
    rng = np.random.default_rng([seed, at])
    pieces = [cut(stream, 0, at + REACTION) for stream in streams]
    changed = list(pieces)
    for make in ANOMALIES.values():
        changed += [Stream(piece.name, _injected(rng, piece.x, np.array(scored), at, make), piece.t) for piece in pieces]
    [onset_p] = onset_p_at(step, state_size, *pad(changed, at + REACTION), asked=[1e-3])
    hits = (onset_p[at:] < 1e-3).reshape(REACTION, len(ANOMALIES) + 1, len(pieces))
    found = {}
    for i, name in enumerate(("at_random", *ANOMALIES)):
        hit = hits[:, i].any(axis=0)
        delay = float(np.median(hits[:, i].argmax(axis=0)[hit])) if hit.any() else None
        found[name] = {"found": round(float(hit.mean()), 3), "median_delay_events": delay}
    return found


def _injected(rng: np.random.Generator, x: Float32, scored: NDArray[np.bool_], at: int, make: Callable[..., Any]) -> Float32:
    """One scored feature changed, that has moved if there is one, the others as they were."""
    y = x.copy()
    moving = scored & (variance_of(x[:at]) > 0)
    able = np.flatnonzero(moving if moving.any() else scored)
    feature = int(able[rng.integers(len(able))])
    y[:, feature] = make(rng, x[:, feature].astype(np.float64), at)
    return y
