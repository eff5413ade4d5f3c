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
Shapes: B streams, K signals, N knots; the batch is the last axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from training.layout import Keeps, Parts, Slot, hinges

LOG10 = math.log(10.0)
HOLD = 125.0
"""Events for which an emission keeps smaller ones from being onsets."""
SMALLEST = -69.0775
"""Natural logarithm of the smallest probability, 1e-30, with a margin for how exp rounds."""
LEVELS, LEVEL_STEP = 8, 0.25
"""The beta chain: levels of the onset tail, in decades."""


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
    """Strengths → p_value, onset_p, both in [1e-30, 1], and the band's width. `burn`: events before strengths are judged.

    All pooled curves are sums of hinges, Σ bend·relu(x - knot), so that a curve of a curve is a chain of products with constants:

        evidence, log α ──pick──► relu ──surprise──► relu ──pick──► relu ──decades──► event, onset, chain, band
    """

    memory_rate, memory_chain = 6000.0, 20000.0
    audit_step, audit_limit = 0.2, 1.0
    """Decades an onset rarer than α gives back, and the most that quiet can earn. One-sided: alerts never raise p-values through it."""

    def __init__(self, signals: int, burn: int, calibration: Calibration) -> None:
        super().__init__()
        self.signals, self.burn, self.calibration = signals, burn, calibration
        c = calibration
        quantile, mean = torch.tensor(c.quantile).unsqueeze(1), torch.tensor(c.mean).unsqueeze(1)
        self.first_level = float(c.onsets.y[0])
        self._keep("most", 3 * quantile)
        self._keep("pooled_sums", c.prior_events * quantile)
        self._curves_of_signals()
        self._curves_of_sums()
        self._counting(quantile / mean)
        last = torch.tensor([[0.0] * LEVELS + [0.0, -LOG10, 1.0, 0.0], [1.0] * LEVELS + [-LOG10, 0.0, 1.0, LOG10]])
        self._keep("exponents", last)
        self._keep("exponents_start", torch.tensor([[0.0], [-LOG10 * self.first_level]]))

    def _keep(self, name: str, table: Tensor) -> None:
        self.register_buffer(name, table.float(), persistent=False)

    def _curves_of_signals(self) -> None:
        """[evidence of K signals, log α] → [K surprisals above the floor, Σ evidence, factor of the band]."""
        c, K = self.calibration, self.signals
        # The band's curve gives decades for a ratio; here the ratio for the asked decades, -log10 α.
        band = Curve(c.band.y, c.band.x, 1 / max(c.band.slope, 1e-3))
        curves = [hinges(curve.x, curve.y, curve.slope) for curve in (*c.signals, band)]
        picks = [torch.eye(K + 1)[k] * (-1 / LOG10 if k == K else 1.0) for k in range(K + 1)]
        own_picks = [picks[k] for k, (knots, _, _) in enumerate(curves) for _ in knots]
        self._keep("signal_pick", torch.stack([*own_picks, *picks[:K]]))  # the last K: evidence as it is, which is never negative
        self._keep("signal_knots", -torch.tensor([*(knot for knots, _, _ in curves for knot in knots), *[0.0] * K]).unsqueeze(1))
        bends = torch.zeros(K + 1, sum(len(knots) for knots, _, _ in curves))
        at = 0
        for k, (_, own, _) in enumerate(curves):
            bends[k, at : at + len(own)] = torch.tensor(own)
            at += len(own)
        starts = torch.diag(torch.tensor([start for _, _, start in curves[:K]]))  # met by 1 where there is a strength at all
        table = torch.cat([bends, torch.zeros(K + 1, K), torch.cat([starts, torch.zeros(1, K)])], dim=1)
        total = torch.cat([torch.zeros(bends.shape[1]), torch.ones(K), torch.zeros(K)]).unsqueeze(0)
        self._keep("surprise", torch.cat([table[:K], total, table[K:]]))
        self._keep("surprise_start", torch.tensor([-c.floor] * K + [0.0, curves[K][2]]).unsqueeze(1))

    def _curves_of_sums(self) -> None:
        """What `_curves_of_signals` gives → [place on each level, decades beyond the last, decades of the event, height, Σ, factor]."""
        K = self.signals
        (event_knots, event_bends, event_start), (knots, bends, start) = (
            hinges(curve.x, curve.y, curve.slope) for curve in (self.calibration.events, self.calibration.onsets)
        )
        height, total, factor = torch.tensor([[1.0] * K + [0, 0], [0.0] * K + [1, 0], [0.0] * K + [0, 1]])
        self._keep("sum_pick", torch.stack([total] * len(event_knots) + [height] * len(knots) + [height, total, factor]))
        self._keep("sum_knots", -torch.tensor([*event_knots, *knots, 0.0, 0.0, 0.0]).unsqueeze(1))
        E, N = len(event_knots), len(event_knots) + len(knots)
        table, offset = torch.zeros(LEVELS + 5, N + 3), torch.zeros(LEVELS + 5, 1)
        table[1:LEVELS, E:N] = torch.tensor(bends) / LEVEL_STEP
        table[LEVELS, E:N], table[LEVELS + 1, :E], table[LEVELS + 2 :, N:] = torch.tensor(bends), torch.tensor(event_bends), torch.eye(3)
        offset[:LEVELS, 0] = 1 - torch.arange(LEVELS)
        offset[LEVELS], offset[LEVELS + 1] = start - self.first_level - LEVEL_STEP * (LEVELS - 1), event_start
        self._keep("decades", table)
        self._keep("decades_start", offset)

    def _counting(self, scale: Tensor) -> None:
        """`counts` after an event = fading · counts + counting @ [levels reached, exposure, clipped strengths]."""
        c, K, L = self.calibration, self.signals, LEVELS
        base, rho = 10**-self.first_level, 10**-LEVEL_STEP
        rate, chain = 1 - 1 / self.memory_rate, 1 - 1 / self.memory_chain
        counting = torch.zeros(2 * L + K, L + 1 + K)
        counting[:L, :L], counting[L, L], counting[L + 1 : 2 * L, : L - 1] = torch.eye(L), base, torch.eye(L - 1)
        counting[2 * L :, L + 1 :] = torch.diag(scale[:, 0])
        self._keep("counting", counting)
        self._keep("fading", torch.tensor([rate] + [chain] * (L - 1) + [rate] + [chain] * (L - 1) + [1.0] * K).unsqueeze(1))
        self._keep("passed_prior", torch.tensor([c.shape] + [c.weight * rho] * (L - 1)).unsqueeze(1))
        self._keep("tried_prior", torch.tensor([c.shape] + [c.weight] * (L - 1)).unsqueeze(1))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """`counts`: onsets and passes of the levels above the first, exposure in expected onsets and tries, sums of the strengths."""
        counts = Slot("counts", 2 * LEVELS + self.signals, Keeps.STREAM)
        return (Slot("onset_height", 1), Slot("onset_age", 1), counts, Slot("audit", 1, Keeps.STREAM))

    def forward(self, strengths: Tensor, judge: Tensor, age: Tensor, alpha: Tensor, parts: Parts) -> tuple[Tail.Answer, Parts]:
        """Strengths [K, B], 0 where the event has no value; age [1, B] events learned before; alpha [B] asked.

        Where not `judge` [1, B] bool, the probabilities are NaN.
        """
        live = (age >= self.burn).to(strengths.dtype)
        passed, tried, sums = torch.split(parts["counts"], [LEVELS, LEVELS, self.signals])
        ratio = strengths * (age + (self.calibration.prior_events - self.burn)).clamp(min=self.calibration.prior_events)
        growth = torch.reciprocal(age + 1) * self.calibration.tau + 1
        chain = (passed + self.passed_prior) / (tried + self.tried_prior)
        asked = alpha.clamp(1e-12, 1.0).unsqueeze(0)
        logs = torch.log(torch.cat([ratio / (sums + self.pooled_sums) + 1, asked, growth, chain]))
        evidence, log_growth, log_chain = torch.split(logs, [self.signals + 1, 1, LEVELS])
        places, beyond, event, height, total, factor = self._decades(evidence, strengths)

        onset_age = parts["onset_age"] + 1
        onset = height > parts["onset_height"] * (onset_age <= HOLD).to(live.dtype)
        counted = onset.to(live.dtype)
        terms = [places.clamp(0.0, 1.0) * log_chain, beyond.clamp(min=0.0), event, log_growth, parts["audit"]]
        exponents = torch.addmm(self.exponents_start, self.exponents, torch.cat(terms)) * torch.cat([torch.sign(total), counted])
        p_value, onset_p = torch.split(torch.where(judge, torch.exp(exponents.clamp(SMALLEST, 0.0)), torch.nan), 1)
        surprise = (onset_p < alpha).to(live.dtype) - alpha
        reached = (places >= 1).to(live.dtype) * counted
        news = torch.cat([reached, growth, torch.minimum(strengths, self.most)]) * live
        after = {
            "onset_height": torch.where(onset, height, parts["onset_height"]),
            "onset_age": onset_age * (1 - counted),
            "audit": (parts["audit"] + self.audit_step * live * surprise).clamp(-self.audit_limit, 0.0),
            "counts": torch.addmm(parts["counts"] * self.fading, self.counting, news),
        }
        return self.Answer(p_value, onset_p, factor), after

    def _decades(self, evidence: Tensor, strengths: Tensor) -> tuple[Tensor, ...]:
        """See `_curves_of_sums`; [LEVELS, B], then [1, B] each."""
        hinged = torch.relu(torch.addmm(self.signal_knots, self.signal_pick, evidence))
        summed = torch.relu(torch.addmm(self.surprise_start, self.surprise, torch.cat([hinged, torch.sign(strengths)])))
        hinged = torch.relu(torch.addmm(self.sum_knots, self.sum_pick, summed))
        return torch.split(torch.addmm(self.decades_start, self.decades, hinged), [LEVELS, 1, 1, 1, 1, 1])

    class Answer(NamedTuple):
        """All [1, B]."""

        p_value: Tensor
        onset_p: Tensor
        factor: Tensor  # half width of the band ÷ spread

    most: Tensor
    pooled_sums: Tensor
    signal_pick: Tensor
    signal_knots: Tensor
    surprise: Tensor
    surprise_start: Tensor
    sum_pick: Tensor
    sum_knots: Tensor
    decades: Tensor
    decades_start: Tensor
    counting: Tensor
    fading: Tensor
    passed_prior: Tensor
    tried_prior: Tensor
    exponents: Tensor
    exponents_start: Tensor


class Band(nn.Module):
    """lower, upper = expected ∓ k(α)·spread: spread is the stream's own rms residual, k the pooled quantile of their ratio (`Tail`)."""

    memory = 2000.0

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The spread's square."""
        return (Slot("spread", self.features, Keeps.FEATURE),)

    def forward(self, residual: Tensor, seen: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """Residual [F, B] raw, seen [F, B] before → spread [F, B] before this event, parts."""
        square, size = parts["spread"], residual * residual
        # Of a stream that stood still so far, the first move is all there is to learn from.
        clipped = torch.where((seen > 30) & (square > 0), torch.minimum(size, 36 * square), size)
        # The first event has no forecast, so the second one is the first to be learned.
        learned = square + (clipped - square) / seen.clamp(1.0, self.memory)
        return torch.sqrt(square), {"spread": learned}
