"""From strengths to probabilities: what makes the score a p-value. Method and figures: LOG.md, "Calibration".

    strength ─► evidence     e_k = log1p(strength_k / c_k)     c_k the stream's own scale, shrunk to the pooled one
             ─► surprisal    h_k = -log10 pooled tail of e_k   (events older than 500)
             ─► event p      pooled tail of Σ e_k, corrected for the stream's age
             ─► onset        T = Σ max(h_k - floor, 0) above the last emission of the past 125 events
             ─► onset p      this stream's rate of onsets as large: gamma-Poisson for the first level, a beta chain above;
                        then the audit: up to a decade more sensitive where onsets rarer than α are rarer than α

False alarms come in bursts, so onsets are calibrated, not events; and novelty gets rarer with age, g(n) = 1 + τ/n, so both are
corrected for age. How fast novelty fades differs between streams (an ECG repeats itself within a thousand events), and no count of
the past says how the tail will go on: so the audit follows the realised rate, a bounded, one-sided adaptive conformal step: `audit` is
in [-1, 0] decades, falls by 0.2·α with every event and rises by 0.2 with every onset rarer than α. α above what the floor resolves
(about 2e-3 for an old stream) is monotone and safe: fewer onsets than asked. All constants are pooled from unlabelled history or from
the synthetic generator: no label is ever used.
Shapes: B streams, K signals, N knots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.layout import Keeps, Parts, Slot, hinges

LOG10 = math.log(10.0)
HOLD = 125.0
"""Events for which an emission keeps smaller ones from being onsets."""
SMALLEST_DECADES = 30.0
LEVELS, LEVEL_STEP = 8, 0.25
"""The beta chain: levels of the onset tail, in decades. Eight, a multiple of four: see `training.layout.hinges`."""


@dataclass(frozen=True)
class Curve:
    """-log10 of a pooled tail: piecewise linear through the knots, beyond the last one with `slope` decades per unit."""

    x: Sequence[float]
    y: Sequence[float]
    slope: float


@dataclass(frozen=True)
class Support:
    """What a calibration rests on. Not `enough`: its promise holds for these streams as they were, and is a guess for others."""

    streams: int
    events: int
    onsets: int
    enough: bool


@dataclass(frozen=True)
class Calibration:
    """Everything the tail knows before a stream begins. `training.calibrate` fits it."""

    quantile: Sequence[float]  # [K] pooled 99 % quantile of the strengths
    mean: Sequence[float]  # [K] pooled mean of min(strength, 3·quantile)
    signals: Sequence[Curve]  # [K] tail of each evidence
    events: Curve  # tail of Σ evidence, at infinite age
    onsets: Curve  # tail of onsets, at infinite age
    band: Curve  # tail of |residual| ÷ spread
    tau: float  # age: rates are (1 + tau/n) times those of an old stream
    shape: float  # gamma prior of a stream's onset rate
    weight: float  # beta prior of a stream's chain
    floor: float = 2.5  # decades of a signal's surprisal that do not count towards an onset
    prior_events: float = 1000.0  # events the pooled scale weighs
    support: Support | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: plain lists and numbers, as JSON gives them back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**plain, "age_correction": "1 + tau/n", "hold_events": HOLD}


class Tail(nn.Module):
    """Strengths → (p_value, onset_p), both in [1e-30, 1]. `burn`: events before strengths are judged."""

    memory_rate, memory_chain = 6000.0, 20000.0
    audit_step, audit_limit = 0.2, 1.0
    """Decades an onset rarer than α gives back, and the most that quiet can earn. One-sided: alerts never raise p-values through it."""

    def __init__(self, signals: int, burn: int, calibration: Calibration) -> None:
        super().__init__()
        self.signals, self.burn, self.calibration = signals, burn, calibration
        c = calibration
        self._table("quantile", c.quantile)
        self._table("mean", c.mean)
        rows = _same_width([hinges(curve.x, curve.y, curve.slope) for curve in c.signals])
        self._table("signal_knots", [row[0] for row in rows])
        self._table("signal_bends", [row[1] for row in rows])
        self._table("signal_start", [row[2] for row in rows])
        self._curve("event", c.events)
        self._curve("onset", c.onsets)
        self.first_level = float(c.onsets.y[0])
        self._table("levels", [self.first_level + LEVEL_STEP * k for k in range(LEVELS)])
        self._table("positions", [float(k) for k in range(LEVELS)])
        self.register_buffer("cumulate", torch.triu(torch.ones(LEVELS, LEVELS)), persistent=False)

    def _table(self, name: str, values: object) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def _curve(self, name: str, curve: Curve) -> None:
        knots, bends, start = hinges(curve.x, curve.y, curve.slope)
        self._table(f"{name}_knots", knots)
        self._table(f"{name}_bends", bends)
        setattr(self, f"{name}_start", start)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (
            Slot("onset_height", 1),
            Slot("onset_age", 1),
            Slot("strength_sum", self.signals, Keeps.STREAM),
            Slot("exposure", 1, Keeps.STREAM),
            Slot("onsets", 1, Keeps.STREAM),
            Slot("audit", 1, Keeps.STREAM),
            Slot("level_tried", LEVELS - 1, Keeps.STREAM),
            Slot("level_passed", LEVELS - 1, Keeps.STREAM),
        )

    def forward(self, strengths: Tensor, judge: Tensor, age: Tensor, alpha: Tensor, parts: Parts) -> tuple[Tensor, Tensor, Parts]:
        """Strengths [B, K]; judge [B, 1] bool: the event has a value; age [B, 1] events learned before; alpha [B, 1] asked."""
        live = (age >= self.burn).to(strengths.dtype)
        evidence, surprisal, learned_scale = self._surprisal(strengths, age, live, parts)
        growth = torch.log(1 + self.calibration.tau / (age + 1)) / LOG10
        total = evidence.sum(dim=1, keepdim=True)
        event_decades = torch.where(total > 0, self._on_curve("event", total) - growth, 0.0)

        height = (surprisal - self.calibration.floor).clamp(min=0.0).sum(dim=1, keepdim=True)
        onset_age = parts["onset_age"] + 1
        bar = torch.where(onset_age <= HOLD, parts["onset_height"], 0.0)
        onset = (height > bar) & judge
        decades = self._on_curve("onset", height)
        rate = self._stream_rate(decades, parts)
        onset_p = _probability(torch.where(onset, -rate - growth - parts["audit"], 0.0))
        surprise = (onset_p < alpha).to(onset_p.dtype) - alpha
        after = {
            "strength_sum": learned_scale,
            "onset_height": torch.where(onset, height, parts["onset_height"]),
            "onset_age": torch.where(onset, 0.0, onset_age),
            "audit": (parts["audit"] + self.audit_step * live * surprise).clamp(-self.audit_limit, 0.0),
            **self._counted(onset, decades, growth, live, parts),
        }
        return _probability(event_decades), onset_p, after

    def _surprisal(self, strengths: Tensor, age: Tensor, live: Tensor, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """Evidence [B, K], its decades [B, K] (0 where the strength is 0), and the learned sums."""
        prior = self.calibration.prior_events
        total = parts["strength_sum"]
        scale = self.quantile / self.mean * (prior * self.mean + total) / (prior + (age - self.burn).clamp(min=0.0))
        evidence = torch.log1p(strengths / scale)
        decades = self.signal_start + ((evidence.unsqueeze(2) - self.signal_knots).clamp(min=0.0) * self.signal_bends).sum(dim=2)
        learned = total + live * torch.minimum(strengths, 3 * self.quantile)
        return evidence, torch.where(strengths > 0, decades, 0.0), learned

    def _on_curve(self, name: str, value: Tensor) -> Tensor:
        knots, bends, start = (getattr(self, f"{name}_{part}") for part in ("knots", "bends", "start"))
        decades: Tensor = start + (value - knots).clamp(min=0.0) @ bends.unsqueeze(1)
        return decades

    def _stream_rate(self, decades: Tensor, parts: Parts) -> Tensor:
        """log10 rate, per event of an old stream, of onsets of THIS stream as large as `decades` says the pool's are."""
        c = self.calibration
        base, rho = 10**-self.first_level, 10**-LEVEL_STEP
        first = torch.log((c.shape + parts["onsets"]) / (c.shape + base * parts["exposure"])) / LOG10 - self.first_level
        steps = torch.log((c.weight * rho + parts["level_passed"]) / (c.weight + parts["level_tried"])) / LOG10
        at_levels = torch.cat([first, steps], dim=1) @ self.cumulate
        place = ((decades - self.first_level) / LEVEL_STEP).clamp(0.0, LEVELS - 1.0)
        weights = (1 - (place - self.positions).abs()).clamp(min=0.0)
        beyond = (decades - self.levels[-1]).clamp(min=0.0)
        return (weights * at_levels).sum(dim=1, keepdim=True) - beyond

    def _counted(self, onset: Tensor, decades: Tensor, growth: Tensor, live: Tensor, parts: Parts) -> Parts:
        """Judged first, then counted, with slow forgetting."""
        one = onset.to(decades.dtype) * live
        chain = 1 - 1 / self.memory_chain
        reached = one * (decades >= self.levels).to(decades.dtype)
        return {
            "exposure": parts["exposure"] * (1 - 1 / self.memory_rate) + live * torch.exp(growth * LOG10),
            "onsets": parts["onsets"] * (1 - 1 / self.memory_rate) + one,
            "level_tried": parts["level_tried"] * chain + reached[:, :-1],
            "level_passed": parts["level_passed"] * chain + reached[:, 1:],
        }

    quantile: Tensor
    mean: Tensor
    signal_knots: Tensor
    signal_bends: Tensor
    signal_start: Tensor
    levels: Tensor
    positions: Tensor
    cumulate: Tensor


class Band(nn.Module):
    """lower, upper = expected ∓ k(α)·spread: spread is the stream's own rms residual, k the pooled quantile of their ratio."""

    memory = 2000.0
    knots: Tensor
    bends: Tensor

    def __init__(self, features: int, curve: Curve) -> None:
        super().__init__()
        self.features = features
        # The curve gives decades for a ratio; here the ratio for the asked decades, -log10 α.
        knots, bends, self.start = hinges(curve.y, curve.x, 1 / max(curve.slope, 1e-3))
        self.register_buffer("knots", torch.tensor(knots), persistent=False)
        self.register_buffer("bends", torch.tensor(bends), persistent=False)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot("spread", self.features, Keeps.FEATURE),)

    def forward(self, residual: Tensor, seen: Tensor, alpha: Tensor, parts: Parts) -> tuple[Tensor, Tensor, Parts]:
        """Residual [B, F] raw, seen [B, F] before, alpha [B, 1] → half width of the band [B, F], |residual| ÷ spread [B, F], parts."""
        spread = parts["spread"]
        decades = torch.log(alpha.clamp(1e-12, 1.0)) * (-1 / LOG10)
        factor = self.start + (decades - self.knots).clamp(min=0.0) @ self.bends.unsqueeze(1)
        size = residual.abs()
        clipped = torch.where(seen > 30, torch.minimum(size, 6 * spread), size)
        # The first event has no forecast, so the second one is the first to be learned.
        rate = (1 / seen.clamp(min=1.0)).clamp(min=1 / self.memory)
        learned = torch.sqrt(spread * spread * (1 - rate) + rate * clipped * clipped)
        return factor * spread, size / spread.clamp(min=1e-18), {"spread": learned}


def _same_width(rows: list[tuple[list[float], list[float], float]]) -> list[tuple[list[float], list[float], float]]:
    width = max(len(knots) for knots, _, _ in rows)
    return [(knots + [0.0] * (width - len(knots)), bends + [0.0] * (width - len(knots)), start) for knots, bends, start in rows]


def _probability(decades: Tensor) -> Tensor:
    return torch.exp(-LOG10 * decades.clamp(0.0, SMALLEST_DECADES)).clamp(1e-30, 1.0)
