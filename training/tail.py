"""From strengths to probabilities: what makes the score a p-value. Method and figures: LOG.md, "Calibration" and "A rate for each signal".

    strength ─► evidence     e_k = max(log1p(strength_k / c_k) - LEAST, 0)     c_k the stream's own scale, shrunk to the pooled one
             ─► event p      pooled tail of Σ e_k, of the e_k that the event upholds, corrected for the stream's age
             ─► decades      d_k = -log10 of this stream's own rate of onsets of e_k as large
             ─► onset        T = Σ w_k·max(d_k - floor, 0) above the last emission of the past 125 events
             ─► onset p      this stream's rate of onsets T as large, at its age;
                        then the audit: up to a decade more sensitive where onsets rarer than α are rarer than α

False alarms come in bursts, so onsets are calibrated, not events: an onset exceeds the last emission of the past 125 events, for each e_k
as for T. Novelty gets rarer with age, g(n) = 1 + τ/n, so all are corrected for age. Where a stream begins no emission is held yet, so
what is usual for it is an onset once: while n is below the m events after which one may be held, onsets are (g(n)/g(m))^start times
as frequent on top. A stream's own rate is gamma-Poisson for the first
level of the pooled tail and a beta chain above: streams differ most in how often a single signal is new in them, so each signal has
a rate of its own before they are summed, and the sum has one again. How fast novelty fades differs between streams too (an ECG repeats
itself within a thousand events), and no count of the past says how the tail will go on: so the audit follows the realised rate, a
bounded, one-sided adaptive conformal step: `audit` is in [-1, 0] decades, falls by 0.2·α with every event and rises by 0.2 with every
onset rarer than α. α above what the floor resolves (about 2e-3 for an old stream) is monotone and safe: fewer onsets than asked. All
constants are pooled from unlabelled history or from the synthetic generator: no label is ever used.
Shapes: B streams, K signals, N knots, L levels; the batch is the last axis.
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
LEAST = 1e-3
"""Less evidence is none: near 0 log1p has steps of 1e-7, and what rounds differently must not be an onset in one runtime alone."""
LEVELS, LEVEL_STEP = 4, 0.5
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
class Onsets:
    """How often onsets of some height come: what is known of all streams before one begins, and how much they differ."""

    tail: Curve  # at infinite age
    tau: float  # rates are (1 + tau/n) times those of an old stream
    shape: float  # gamma prior of a stream's rate
    weight: float  # beta prior of a stream's chain

    @property
    def first_level(self) -> float:
        return float(self.tail.y[0])


@dataclass(frozen=True)
class Calibration:
    """Everything the tail knows before a stream begins. `training.calibrate` fits it."""

    quantile: Sequence[float]  # [K] pooled 99 % quantile of the strengths
    mean: Sequence[float]  # [K] pooled mean of min(strength, 3·quantile)
    signals: Sequence[Onsets]  # [K] onsets of each evidence
    events: Curve  # tail of Σ evidence, at infinite age
    onsets: Onsets  # of the sum
    band: Curve  # tail of |residual| ÷ spread
    start: float = 0.0  # by how much faster onsets get rarer where a stream begins, see above
    floor: float = 3.2  # decades of a signal that do not count towards an onset of the sum
    prior_events: float = 1000.0  # events the pooled scale weighs
    margin: float = 0.0  # by how much an onset exceeds the last emission: where the same strength comes again, rounding must not
    weights: Sequence[float] | None = None  # [K] of the signals' decades above the floor; None = 1 each
    support: Support | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: plain lists and numbers, as JSON gives them back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**plain, "tau": self.onsets.tau, "age_correction": "1 + tau/n", "hold_events": HOLD}


class Tail(nn.Module):
    """Strengths → p_value, onset_p, both in [1e-30, 1], and the band's width. `burn`: events before strengths are judged.

    All pooled curves are sums of hinges, Σ bend·relu(x - knot), so that a curve is two products with constants:

        evidence, log α, log g ──pick──► relu ──own──► places on the signals' chains ──► decades of each signal above the floor
                                                       ──pick──► relu ──decades──► event, onset, chain, band

    What is counted of the K signals and of the sum, in this order, is counted by the same operators.
    """

    memory_rate, memory_chain = 6000.0, 20000.0
    audit_step, audit_limit = 0.2, 1.0
    """Decades an onset rarer than α gives back, and the most that quiet can earn. One-sided: alerts never raise p-values through it."""

    def __init__(self, signals: int, burn: int, calibration: Calibration) -> None:
        super().__init__()
        self.signals, self.burn, self.calibration = signals, burn, calibration
        c = calibration
        self.chains = (*c.signals, c.onsets)
        quantile, mean = torch.tensor(c.quantile).unsqueeze(1), torch.tensor(c.mean).unsqueeze(1)
        self._keep("most", 3 * quantile)
        self._keep("tau", torch.tensor([[c.onsets.tau]]))
        self._keep("one", torch.ones(1, 1))
        self._keep("together", torch.ones(1, signals))
        self._curves_of_signals()
        self._decades_of_signals()
        self._curves_of_sums()
        self._counting(quantile / mean)
        event, onset = [0.0] * LEVELS + [0.0, -LOG10, 1.0, 0.0, 0.0], [1.0] * LEVELS + [-LOG10, 0.0, 0.0, 1.0, LOG10]
        self._keep("exponents", torch.tensor([event, onset]))
        self._keep("exponents_start", torch.tensor([[0.0], [-LOG10 * c.onsets.first_level]]))

    def _keep(self, name: str, table: Tensor) -> None:
        self.register_buffer(name, table.float(), persistent=False)

    def _curves_of_signals(self) -> None:
        """[log1p of K signals, log α, log g] → see `_above_floor`; growth is log g, that of onsets has the start's on top."""
        c, K, L = self.calibration, self.signals, LEVELS
        # The band's curve gives decades for a ratio; here the ratio for the asked decades, -log10 α.
        band = hinges(c.band.y, c.band.x, 1 / max(c.band.slope, 1e-3))
        begun = math.log1p(c.onsets.tau / (self.burn + HOLD + 1))
        growth = ([0.0, begun], [1.0, c.start], 0.0)
        curves = [*((*_hinges(signal.tail), k) for k, signal in enumerate(c.signals)), (*band, K), (*growth, K + 1)]
        scale = torch.tensor([1.0] * K + [-1 / LOG10, 1.0])
        picks = [scale[k] * torch.eye(K + 2)[k] for knots, _, _, k in curves for _ in knots]
        self._keep("signal_pick", torch.stack([*picks, *torch.eye(K + 2)[:K]]))  # the last K: evidence as it is
        knots_of_all = [knot + LEAST * (k < K) for knots, _, _, k in curves for knot in knots]
        self._keep("signal_knots", -torch.tensor([*knots_of_all, *[LEAST] * K]).unsqueeze(1))
        N, at = len(picks), 0
        table, offset = torch.zeros(K * L + 2 * K + 4, N + K), torch.zeros(K * L + 2 * K + 4, 1)
        for knots, bends, start, k in curves:
            own = slice(at, at + len(knots))
            rows = [*range(k * L, (k + 1) * L), K * L + k] if k < K else [-3] if k == K else [-1]
            table[rows, own], offset[rows] = _on_levels(bends) if k < K else (torch.tensor([bends]), torch.tensor([[start]]))
            at += len(knots)
        table[-2, at - 2] = 1.0
        table[K * L + K : -4, N:], table[-4, N:] = torch.eye(K), torch.ones(K)
        self._keep("own", table)
        self._keep("own_start", offset)

    def _decades_of_signals(self) -> None:
        """[K·L places times logarithms of the chains, K decades beyond] → K decades above the floor."""
        K, L = self.signals, LEVELS
        per_signal = torch.eye(K).repeat_interleave(L, dim=1)
        weights = torch.tensor(self.calibration.weights or [1.0] * K).unsqueeze(1)
        self._keep("above", torch.cat([per_signal / -LOG10, torch.eye(K)], dim=1) * weights)
        first = torch.tensor([signal.first_level for signal in self.calibration.signals])
        self._keep("above_start", (first - self.calibration.floor).unsqueeze(1) * weights)

    def _curves_of_sums(self) -> None:
        """[K decades above the floor, K evidences, their sum, factor, growths] → see `_sums`."""
        K, L = self.signals, LEVELS
        (event_knots, event_bends, event_start), (knots, bends, _) = (
            _hinges(curve) for curve in (self.calibration.events, self.calibration.onsets.tail)
        )
        as_it_is = torch.eye(2 * K + 4)
        height, total = torch.cat([torch.ones(K), torch.zeros(K + 4)]), as_it_is[2 * K]
        kept = torch.cat([as_it_is[K : 2 * K], height.unsqueeze(0), as_it_is[2 * K :]])
        self._keep("sum_pick", torch.cat([torch.stack([total] * len(event_knots) + [height] * len(knots)), kept]))
        self._keep("sum_knots", -torch.tensor([*event_knots, *knots, *[0.0] * len(kept)]).unsqueeze(1))
        E, N = len(event_knots), len(event_knots) + len(knots)
        table, offset = torch.zeros(L + 2 + len(kept), N + len(kept)), torch.zeros(L + 2 + len(kept), 1)
        table[: L + 1, E:N], offset[: L + 1] = _on_levels(bends)
        table[L + 1, :E], offset[L + 1], table[L + 2 :, N:] = torch.tensor(event_bends), event_start, torch.eye(len(kept))
        self._keep("decades", table)
        self._keep("decades_start", offset)

    def _counting(self, scale: Tensor) -> None:
        """What is counted, one column of `recall` and one row of `counting` each:

            passed     [C·L] onsets that reached a level of a chain
            first      [C] the same of each first level, remembered as long as the chains: the tries of the second
            exposure   [2] events, and Σ 1/(age + 1) of them: of these are made the onsets that each chain was expected to have
            sums       [K] of the strengths

        `counts` after an event = fading · counts + counting @ [levels reached, one more event, 1/(age + 1), clipped strengths].
        Passes, tries and sums with what is known before a stream begins = recall @ counts + prior.
        """
        K, C, L = self.signals, len(self.chains), LEVELS
        first, exposed, sums = C * L, C * (L + 1), C * (L + 1) + 2
        counting, recall = torch.zeros(sums + K, C * L + 2 + K), torch.zeros(2 * C * L + K, sums + K)
        counting[:first, : C * L] = recall[: C * L, :first] = torch.eye(C * L)
        counting[exposed:sums, C * L : C * L + 2] = torch.eye(2)
        counting[sums:, C * L + 2 :] = torch.diag(scale[:, 0])
        recall[2 * C * L :, sums:] = torch.eye(K)
        for c, onsets in enumerate(self.chains):
            counting[first + c, c * L] = 1.0
            tried = C * L + c * L
            recall[tried, exposed:sums] = 10**-onsets.first_level * torch.tensor([1.0, onsets.tau])
            recall[tried + 1, first + c] = 1.0
            recall[tried + 2 : tried + L, c * L + 1 : c * L + L - 1] = torch.eye(L - 2)
        rho, rate, chain = 10**-LEVEL_STEP, 1 - 1 / self.memory_rate, 1 - 1 / self.memory_chain
        fading = ([rate] + [chain] * (L - 1)) * C + [chain] * C + [rate] * 2 + [1.0] * K
        passed = [weight for c in self.chains for weight in [c.shape] + [c.weight * rho] * (L - 1)]
        tried_prior = [weight for c in self.chains for weight in [c.shape] + [c.weight] * (L - 1)]
        self._keep("counting", counting)
        self._keep("recall", recall)
        self._keep("fading", torch.tensor(fading).unsqueeze(1))
        pooled = self.calibration.prior_events * torch.tensor(self.calibration.quantile)
        self._keep("prior", torch.cat([torch.tensor(passed + tried_prior), pooled]).unsqueeze(1))
        self._keep("of_levels", torch.eye(C).repeat_interleave(L, dim=0))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Of the K signals and the sum: the last emission, and for how many events it is held; for `counts` see `_counting`."""
        C = self.signals + 1
        counts = Slot("counts", C * (LEVELS + 1) + 2 + self.signals, Keeps.STREAM)
        return (Slot("onset_height", C), Slot("onset_hold", C), counts, Slot("audit", 1, Keeps.STREAM))

    def forward(
        self, strengths: Tensor, judge: Tensor, age: Tensor, alpha: Tensor, parts: Parts, upheld: Tensor | None = None
    ) -> tuple[Tail.Answer, Parts]:
        """Strengths [K, B], 0 where the event has no value and before `burn`; age [1, B] events learned before; alpha [B] asked.

        Where not `judge` [1, B] bool, the probabilities are NaN. `upheld` [K, B] = 0 where a strength counts towards an onset alone.
        """
        K, C, L = self.signals, self.signals + 1, LEVELS
        live = (age >= self.burn).to(strengths.dtype)
        passed, tried, sums = torch.split(torch.addmm(self.prior, self.recall, parts["counts"]), [C * L, C * L, K])
        ratio = strengths * (age + (self.calibration.prior_events - self.burn)).clamp(min=self.calibration.prior_events)
        newness = torch.reciprocal(age + 1)
        growth = torch.addmm(self.one, self.tau, newness)
        asked = alpha.clamp(1e-12, 1.0).unsqueeze(0)
        logs = torch.log(torch.cat([ratio / sums + 1, asked, growth, passed / tried]))
        evidence, own_chains, chain = torch.split(logs, [K + 2, K * L, L])
        own_places, summed = self._above_floor(evidence, own_chains, upheld)
        places, beyond, event, heights, total, factor, growths = self._sums(summed)

        last = parts["onset_height"] * parts["onset_hold"].clamp(max=1.0)
        onset, height = self._onset(heights, last)
        counted = onset.to(live.dtype)
        climbed = places.clamp(0.0, 1.0)
        terms = [climbed * chain, beyond.clamp(min=0.0), event, growths, parts["audit"]]
        exponents = torch.addmm(self.exponents_start, self.exponents, torch.cat(terms)) * torch.cat([torch.sign(total), counted[K:]])
        p_value, onset_p = torch.where(judge, torch.exp(exponents.clamp(SMALLEST, 0.0)), torch.nan)
        surprise = (onset_p < alpha).to(live.dtype) - alpha
        reached = torch.floor(torch.cat([own_places, climbed])) * (self.of_levels @ counted)
        news = torch.cat([reached, live, newness * live, torch.minimum(strengths, self.most)])
        after = {
            "onset_height": height,
            "onset_hold": torch.maximum(parts["onset_hold"] - 1, HOLD * counted),
            "audit": (parts["audit"] + self.audit_step * live * surprise).clamp(-self.audit_limit, 0.0),
            "counts": torch.addmm(parts["counts"] * self.fading, self.counting, news),
        }
        return self.Answer(p_value, onset_p, factor), after

    def _onset(self, heights: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Which heights [C, B] are onsets above the last emissions, 0 where none is held any more; and the last ones after this event."""
        margin = self.calibration.margin
        if margin == 0:
            return heights > last, torch.maximum(heights, last)
        onset = heights > last + margin
        return onset, torch.where(onset, heights, last)

    def _above_floor(self, logs: Tensor, chains: Tensor, upheld: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logarithms [K + 2, B] → places on the signals' levels, 0 to 1 [K·L, B]; and what `_sums` takes: decades above the floor, ..."""
        K, L = self.signals, LEVELS
        hinged = torch.relu(torch.addmm(self.signal_knots, self.signal_pick, logs))
        places, beyond, evidence, rest = torch.split(torch.addmm(self.own_start, self.own, hinged), [K * L, K, K, 4])
        places = places.clamp(0.0, 1.0)
        terms = torch.cat([places * chains, beyond.clamp(min=0.0)])
        above = torch.relu(torch.addmm(self.above_start, self.above, terms)) * torch.sign(evidence)
        if upheld is None:
            return places, torch.cat([above, evidence, rest])
        _, rest = torch.split(rest, [1, 3])
        return places, torch.cat([above, evidence, torch.mm(self.together, evidence * upheld), rest])

    def _sums(self, summed: Tensor) -> tuple[Tensor, ...]:
        """Places on the levels of the sum [L, B]; decades beyond the last, and of the event; the heights [K + 1, B]; Σ evidence; factor;
        logarithms of how much more frequent events and onsets are at this age [2, B].
        """
        hinged = torch.relu(torch.addmm(self.sum_knots, self.sum_pick, summed))
        sizes = [LEVELS, 1, 1, self.signals + 1, 1, 1, 2]
        return torch.split(torch.addmm(self.decades_start, self.decades, hinged), sizes)

    class Answer(NamedTuple):
        """What is known of an event."""

        p_value: Tensor  # [B]
        onset_p: Tensor  # [B]
        factor: Tensor  # [1, B] half width of the band ÷ spread

    most: Tensor
    tau: Tensor
    one: Tensor
    together: Tensor
    signal_pick: Tensor
    signal_knots: Tensor
    own: Tensor
    own_start: Tensor
    above: Tensor
    above_start: Tensor
    sum_pick: Tensor
    sum_knots: Tensor
    decades: Tensor
    decades_start: Tensor
    counting: Tensor
    recall: Tensor
    fading: Tensor
    prior: Tensor
    of_levels: Tensor
    exponents: Tensor
    exponents_start: Tensor


def _hinges(curve: Curve) -> tuple[list[float], list[float], float]:
    return hinges(curve.x, curve.y, curve.slope)


def _on_levels(bends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A tail's bends → table [L + 1, knots], offset [L + 1, 1]: places on its levels, 1 where reached, and decades beyond the last."""
    table, offset = torch.zeros(LEVELS + 1, len(bends)), 1 - torch.arange(LEVELS + 1, dtype=torch.float32)
    table[1:LEVELS], table[LEVELS] = torch.tensor(bends) / LEVEL_STEP, torch.tensor(bends)
    offset[LEVELS] = -LEVEL_STEP * (LEVELS - 1)
    return table, offset.unsqueeze(1)


class Band(nn.Module):
    """lower, upper = expected ∓ k(α)·spread: spread is the stream's own rms residual, k the pooled quantile of their ratio (`Tail`)."""

    memory = 2000.0
    haste = 3.0
    """The n-th residual counts for haste/n of the square, not for 1/n: the first ones, of a sensor that was just switched on, are as
    good as forgotten after some hundred events (the first weighs 6/n³)."""

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
        learned = square + (clipped - square) / ((seen + (self.haste - 1)) / self.haste).clamp(1.0, self.memory)
        return torch.sqrt(square), {"spread": learned}
