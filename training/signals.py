"""What of an event is unusual, as K non-negative strengths: the exchangeable part between the network and the tail.

    one feature        `MemorySignals`    how far value, level, residual and how much it moves lie from where they have been before
    a waveform         `WaveformSignals`  how far the last window lies from what the code gives back, and the forecasts from what came
    several features   `ResidualSignals`  size of the residuals, their slow level, and how unusual they are together

Each judges an event with what was known before it, then learns it. Their `forward` gives strengths, 0 where no feature is present; weights
of the features for attribution; 1 where a strength counts in the event's p-value and 0 where not, None = all do; and the parts after the
event. A strength of 0 means: nothing to see. What a strength is worth as a probability is the tail's business, not theirs.

Shapes: B streams, F features, K signals, M intervals: strengths [K, B], weights [F, B], what counts [K, B]. The batch is the last axis for
`MemorySignals`, the first for the others (`DetectorStep` turns them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.autoencoder import HORIZONS, WINDOW, Outlook
from training.layout import Keeps, Parts, Slot, row_sum
from training.normaliser import LIMIT, TINY, Normalised

LEVEL_MEMORY = 30.0
"""Events of the exponentially weighted level."""
MOTION_MEMORY, USUAL_MEMORY = 10.0, 2000.0
"""Events over which a stream's motion is averaged, now and usually."""
MOST_MOTION = 10.0
"""Times the usual motion that one change counts for at most in it."""
STEADY = 2.0
"""Deviations, or times the usual motion, that one event counts for at most in the steady level and motion."""
STILL = 0.02
"""Of the usual motion: less of it is as good as none."""
SCALED_LIMIT = 50.0
"""Residuals over the stream's scale beyond this count as this."""
WIDEST = 40
"""Features up to which the precision matrix is of the features themselves: WIDEST·(WIDEST + 1)/2 floats of state at most."""
FAR = 1e20
"""Beyond every reading (`LIMIT`), yet far from overflow."""


@dataclass(frozen=True)
class Residual:
    """Expected against actual, of one event [F, B]; 0 where the feature is missing or was never seen before."""

    raw: Tensor
    scaled: Tensor  # over the stream's scale, within ±SCALED_LIMIT
    z: Tensor  # in asinh units, as the network sees them
    outlook: Outlook | None = None  # a waveform's, after the network has seen this event, [B, ·]
    linear: Tensor | None = None  # raw, of the linear forecast beside the network, where there is one


class MemorySignals(nn.Module):
    """Interval memory with forgetting, for a single feature.

        value      as it came
        level      its exponentially weighted mean (1/30)
        residual   actual - forecast
        activity   log of how much the value moves (mean |change|, 1/10) over how much it usually does (1/2000): a sensor that froze
        linear     actual - linear forecast, in models that have one

    Each signal remembers up to M intervals [low, high] with the life left to them, and its range. Novelty of a value = distance to
    the nearest interval ÷ range. Each visit gives an interval `forget` more events to live; after them the range shrinks to the hull
    of the rest. A value extends the nearest interval if that stays within `widest` of the range, or, where no slot is free, if it is
    no farther away than that. Else it opens its own, where none is free in place of the one that would live shortest: an interval that
    reached from what is usual to a reading far off would be visited for ever, and all between would be known. The range grows at most
    by its own width per event.

    Level and motion have steady twins, for which no event counts for more than STEADY. A single reading far off moves level and motion for
    tens of events that are as they always were: of them the p-value hears nothing (`upheld`), because the twins have not gone half as far.

    Stored so that both ends are one tensor and every comparison has the same sign: low with -high [2, M, K, B], the range likewise;
    `debt` = -life, which grows by 1 with every event that is no visit (0: dead, as in a fresh stream).
    """

    names: tuple[str, ...] = ("value", "level", "residual", "activity")
    outlast = ("previous", "steady_level", "debt")
    """What an age of 0 does not make fresh by itself: of all means the weight is 1 then, and without an interval there is no range."""
    widest = 0.3
    sides: Tensor
    far: Tensor
    rates: Tensor
    bounds: Tensor
    motion: Tensor
    least: Tensor
    gone: Tensor
    usual_gone: Tensor
    halfway: Tensor
    slow: Tensor
    at_once: Tensor

    def __init__(self, intervals: int = 6, burn: int = 100, forget: float = 1000.0, linear: bool = False) -> None:
        super().__init__()
        if linear:
            self.names = (*self.names, "linear")
        self.intervals, self.burn, self.forget = intervals, burn, forget
        self.register_buffer("sides", torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1), persistent=False)
        # Each slot has a distance of its own when it is dead, so that of several dead ones exactly one is the farthest: the free one.
        self.register_buffer("far", FAR * (1 + torch.arange(intervals) / 16).reshape(1, -1, 1, 1), persistent=False)
        steady, usual = [1 / LEVEL_MEMORY] * 2 + [1 / MOTION_MEMORY] * 2, [1 / USUAL_MEMORY]
        for name, table in (
            ("rates", [[rate] for rate in steady + usual]),  # of level, steady level, motion, steady motion, usual motion
            ("bounds", [[STEADY, 0], [0, STEADY], [0, MOST_MOTION]]),  # of scale and usual motion
            ("motion", [[0, 0, 1, 0, STILL], [0, 0, 0, 1, STILL], [0, 0, 0, 0, 1]]),
            # How far level and motion have gone, and their twins, in STEADY; then twice how much farther than halfway the twins are.
            ("gone", [[1 / STEADY, 0, 0, 0], [0, 0, 1, 0], [0, 1 / STEADY, 0, 0], [0, 0, 0, 1]]),
            ("usual_gone", [[0], [-1], [0], [-1]]),
            ("halfway", [[-1, 0, 2, 0], [0, -1, 0, 2], [1, 0, 0, 0], [0, 1, 0, 0]]),
            ("slow", [[0, 0], [1, 0], [0, 0], [0, 1]] + [[0, 0]] * linear),
            ("at_once", [[1], [0], [1], [0]] + [[1]] * linear),
        ):
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=False)
        self.register_buffer("least", torch.full((3, 1), TINY), persistent=False)

    @property
    def slots(self) -> tuple[Slot, ...]:
        K, M = len(self.names), self.intervals
        memory = (("ends", 2 * M * K), ("debt", M * K))
        return (
            *(Slot(name, 1) for name in ("level", "steady_level", "motion", "steady_motion", "previous")),
            *(Slot(name, size, Keeps.ITSELF) for name, size in memory),
            Slot("usual_motion", 1, Keeps.FEATURE),
            Slot("range", 2 * K, Keeps.STREAM),
        )

    def forward(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Parts]:
        """Age [1, B]: events learned before this one."""
        present = event.present.to(event.u.dtype)
        steps = event.u - torch.cat([parts["steady_level"], parts["previous"], parts["previous"]])
        most = torch.mm(self.bounds, torch.cat([event.scale, parts["usual_motion"]]))
        sizes = steps.abs()
        # A burst must not make all that follows look calm, nor a single reading all that follows unusual.
        step, moved, counted = torch.split(torch.minimum(sizes, torch.where(event.settled, most, 4 * LIMIT)), 1)
        names = ("level", "steady_level", "motion", "steady_motion", "usual_motion")
        means = torch.cat([parts[name] for name in names])
        steady = parts["steady_level"] + torch.sign(steps[:1]) * step
        news = torch.cat([event.u, steady, sizes[1:2], moved, counted])
        means = means + torch.maximum(torch.reciprocal(age + 1), self.rates) * present * (news - means)
        levels, _ = torch.split(means, [2, 3])
        now, usually = torch.split(torch.addmm(self.least, self.motion, means), [2, 1])
        ratios = now / usually
        level, activity = levels[:1], torch.log(ratios[:1])
        gone = torch.addmm(self.usual_gone, self.gone, torch.cat([(levels - event.mean) / event.scale, ratios])).clamp(-1, 1)
        beyond, side = torch.split(torch.mm(self.halfway, gone), 2)
        upheld = torch.addmm(self.at_once, self.slow, (beyond * side >= 0).to(means.dtype))
        values = [event.u, level, residual.raw, activity]
        if residual.linear is not None:
            values.append(residual.linear)
        strengths, memory = self.visit(torch.cat(values), parts, (age >= self.burn) & event.present, event.learns)
        previous = torch.where(event.present, event.u, parts["previous"])
        after = dict(zip(names, torch.split(means, 1), strict=True))
        return strengths, present, upheld, {"previous": previous, **after, **memory}

    def visit(self, values: Tensor, parts: Parts, live: Tensor, learns: Tensor) -> tuple[Tensor, Parts]:
        """Values [K, B], live and learns [1, B] bool → novelty [K, B], 0 where not live, and the memory's parts after the visit.

        Where not `learns`, all parts but `range` are as they were.
        """
        K, M = len(self.names), self.intervals
        ends, debt = parts["ends"].reshape(2, M, K, -1), parts["debt"].reshape(1, M, K, -1)
        value = self.sides * values  # [2, 1, K, B]
        dead = (debt + 1).clamp(0.0, 1.0) * self.far  # [1, M, K, B]; debt is a whole number
        alive = ends + dead
        hull = torch.maximum(parts["range"].reshape(2, 1, K, -1), alive.amin(1, keepdim=True))
        narrow = hull.sum(0, keepdim=True).clamp(max=-TINY)  # -width [1, 1, K, B]

        beyond_low, beyond_high = torch.split(alive - value, 1)  # the greater is the gap, the lesser -(gap + width)
        gap = torch.maximum(beyond_low, beyond_high)
        distance = gap.amin(1, keepdim=True).clamp(min=0.0)
        span = torch.where(gap <= distance, torch.minimum(beyond_low, beyond_high), 0.0).amin(1, keepdim=True)  # of the nearest, negative
        growth = torch.where(live, narrow, -torch.inf)  # the most a range grows by, negative; without end while nothing is judged
        novelty = -(distance / growth).clamp(min=-1e3)

        hull = torch.minimum(hull, torch.maximum(value, hull + growth))
        spare = dead + debt  # the greatest is a dead slot, else the one that lives shortest
        most = spare.amax(1, keepdim=True)
        limit = self.widest * hull.sum(0, keepdim=True).clamp(max=-TINY)  # negative
        apart = torch.maximum(most, limit + distance)  # beyond 0 where a slot is free, or the value is far from all that is known
        extends = torch.minimum(torch.minimum(distance, apart), limit - span) <= 0
        visited = (gap <= torch.where(extends, distance, -FAR)) | (spare >= torch.where(extends, 4 * FAR, most))
        visited = visited & learns
        # A new interval is one that grows to the value from FAR away, where a dead slot's ends are.
        ends = torch.where(visited, torch.minimum(torch.where(extends, alive, FAR), value), ends)
        debt = torch.where(visited, debt * extends.to(values.dtype) - self.forget, debt + learns.to(values.dtype))
        after = {"ends": ends, "debt": debt, "range": hull}
        return novelty.reshape(K, -1), {name: part.reshape(parts[name].shape[0], -1) for name, part in after.items()}


class WaveformSignals(nn.Module):
    """For a waveform: is the shape of the last window, and are the values forecast some time ago, what the code holds for usual?

        window     mean |value - reconstruction| over the last WINDOW values
        forecast   |value - forecast| over the network's own scale, averaged over SMOOTHED events, combined over the JUDGED horizons

    Rings have the newest first. A pending forecast is its location and its precision exp(-log-scale): zeros say nothing, so a fresh
    stream's errors are 0. Nothing is learned of a stream here: frozen streams are judged on.
    """

    names = ("window", "forecast")
    JUDGED = (8, 16, 32)
    SMOOTHED = 64

    def __init__(self, burn: int = 200) -> None:
        super().__init__()
        self.burn = burn

    @property
    def slots(self) -> tuple[Slot, ...]:
        pending = [Slot(f"{name}_{h}", h, Keeps.ROWS) for h in self.JUDGED for name in ("pending_location", "pending_precision")]
        errors = [Slot(f"errors_{h}", self.SMOOTHED, Keeps.ROWS) for h in self.JUDGED]
        return (Slot("recent", WINDOW, Keeps.ROWS), *pending, *errors)

    def forward(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Parts]:
        """Age [B, 1]: events learned before this one. Where the value is missing, the last one stands for it, and the last error."""
        outlook = residual.outlook
        if outlook is None:
            raise ValueError("WaveformSignals need the outlook of a WaveformAutoencoder.")
        after = {"recent": _pushed(outlook.seen, parts["recent"])}
        window = row_sum((after["recent"] - outlook.window).abs()) / WINDOW
        logs = torch.zeros_like(window)
        for h in self.JUDGED:
            location, precision, errors = (parts[f"{name}_{h}"] for name in ("pending_location", "pending_precision", "errors"))
            error = (outlook.seen - location[:, -1:]).abs() * precision[:, -1:]
            errors = _pushed(torch.where(event.present, error, errors[:, :1]), errors)
            logs = logs + torch.log1p(row_sum(errors) / self.SMOOTHED)
            at = HORIZONS.index(h)
            after |= {
                f"errors_{h}": errors,
                f"pending_location_{h}": _pushed(outlook.location[:, at : at + 1], location),
                f"pending_precision_{h}": _pushed(torch.exp(-outlook.log_scale[:, at : at + 1]), precision),
            }
        strengths = torch.cat([window, torch.exp(logs / len(self.JUDGED)) - 1], dim=1)
        strengths = torch.where(event.present & (age >= self.burn), strengths, 0.0)
        return strengths, torch.ones_like(event.u), None, after


def _pushed(newest: Tensor, ring: Tensor) -> Tensor:
    """The ring [B, N] with the newest [B, 1] before all, and without its oldest."""
    return torch.cat([newest, ring[:, :-1]], dim=1)


class ResidualSignals(nn.Module):
    """For several features: three looks at the residuals of those that are scored. LOG.md, "Fleets", has what else was tried.

        residual   rms of |residual| in asinh units over the stream's own scale: one feature far off must not hide the others
        level      rms of the residuals' slow level (1/30) in linear units: small offsets that last
        distance   Mahalanobis distance of the linear residuals, averaged (1/5): values unusual together that are not alone

    Scale, mean and precision P start at pooled ones and become the stream's own. P follows d by one step of Sherman and Morrison,
    (1 + a)·(P - a·Pd·dᵀP / (1 + a·dᵀPd)). Where nothing moves (a constant feature) that grows without end; so P is drawn back to the
    pooled one as soon as a diagonal element is some tens of times the pooled one's: it stays positive definite in float32 for ever.
    d is of the scored features; beyond WIDEST of them, of their projection on as many pooled principal directions.
    """

    names = ("residual", "level", "distance")
    burn = 60
    prior, memory, cap = 200.0, 5000.0, 100.0
    prior_rows, smoothing = 500.0, 0.2
    growth_free, growth_bound, most_drawn = 30.0, 100.0, 1.05

    scored: Tensor
    usual: Tensor
    usual_mean: Tensor
    directions: Tensor
    usual_precision: Tensor
    first: Tensor
    second: Tensor
    unpack: Tensor
    diagonal: Tensor

    def __init__(self, features: int, scored: Sequence[bool] | None = None) -> None:
        """`scored` [F]: False for features that are context, seen by the network and never judged."""
        super().__init__()
        self.features = features
        judged = torch.tensor(scored or [True] * features)
        self.width = D = min(int(judged.sum()), WIDEST)
        first, second = torch.triu_indices(D, D)
        place = torch.zeros(D, D, dtype=torch.long)
        place[first, second] = place[second, first] = torch.arange(len(first))
        self.register_buffer("scored", judged)
        self.register_buffer("usual", torch.full((features,), 0.3))  # pooled mean |residual|, fitted
        self.register_buffer("usual_mean", torch.zeros(features))  # pooled mean of the linear residuals, fitted
        self.register_buffer("directions", torch.eye(features)[:, judged][:, :D].contiguous())
        self.register_buffer("usual_precision", (first == second).float())  # packed upper triangle, fitted
        for name, index in (("first", first), ("second", second), ("unpack", place.flatten()), ("diagonal", place.diagonal().clone())):
            self.register_buffer(name, index, persistent=False)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (
            Slot("residual_level", self.features),
            Slot("distance", 1),
            Slot("residual_scale", self.features, Keeps.FEATURE),
            Slot("residual_mean", self.features, Keeps.FEATURE),
            Slot("precision", len(self.first), Keeps.STREAM),
        )

    @torch.no_grad()
    def fit(self, residual: Tensor, linear: Tensor) -> None:
        """The pooled constants, from residuals [N, F] of unlabelled rows in asinh and in linear units; NaN where missing."""
        given = ~torch.isnan(residual)
        count = given.sum(dim=0).clamp(min=1)
        size = torch.where(given, residual.abs(), 0.0).clamp(max=3.0).sum(dim=0) / count
        self.usual.copy_(size.clamp(min=0.05 * float(size.mean()) + 1e-4))
        clipped = torch.where(given, linear, 0.0).clamp(-6.0, 6.0).double()
        mean = clipped.sum(dim=0) / count
        centred = torch.where(given & self.scored, clipped - mean, 0.0)
        covariance = centred.T @ centred / max(len(centred), 1)
        if self.width < int(self.scored.sum()):
            self.directions.copy_(torch.linalg.eigh(covariance)[1][:, -self.width :])  # context varies in none of them
        covariance = self.directions.double().T @ covariance @ self.directions.double()
        ridge = 0.05 * covariance.trace() / self.width + 1e-6
        precision = torch.linalg.inv(covariance + ridge * torch.eye(self.width, dtype=torch.float64))
        self.usual_mean.copy_(mean)
        self.usual_precision.copy_(precision[self.first, self.second])

    def forward(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Parts]:
        """Age [B, 1]: events learned before this one. Scale, mean and precision are kept as differences from the pooled ones."""
        judged = event.present & self.scored
        present = judged.to(residual.scaled.dtype)
        given = row_sum(present).clamp(min=1.0)
        squares, scale = self._against_scale(residual.z, parts["residual_scale"], age)
        rate = (1 / (age + 1)).clamp(min=1 / LEVEL_MEMORY)
        level = torch.where(
            event.present, parts["residual_level"] + rate * (residual.scaled - parts["residual_level"]), parts["residual_level"]
        )
        squares, level_squares = squares * present, level * level * present
        distance, learned = self._distance(residual.scaled, present, given, parts, age)
        sums = torch.sqrt(torch.cat([row_sum(squares), row_sum(level_squares)], dim=1) / given)
        strengths = torch.where(age >= self.burn, torch.cat([sums, distance], dim=1), 0.0)
        after = {"residual_level": level, "distance": distance, "residual_scale": scale, **learned}
        return strengths, squares + level_squares, None, after

    def _against_scale(self, value: Tensor, learned: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """Squared size of values [B, F] over their scale, and the scale's new difference from the pooled one."""
        size, scale = value.abs(), self.usual + learned
        ratio = (size / scale).clamp(max=self.cap)
        step = (torch.minimum(size, 3 * scale) - scale) / (self.prior + age).clamp(max=self.memory)
        return ratio * ratio, learned + torch.where(age >= 30, step, 0.0)

    def _distance(self, value: Tensor, present: Tensor, given: Tensor, parts: Parts, age: Tensor) -> tuple[Tensor, Parts]:
        """Smoothed Mahalanobis distance [B, 1] of values [B, F], judged by the precision before, and what is learned of them."""
        deviation = (value - self.usual_mean - parts["residual_mean"]) * present
        projected = deviation @ self.directions if self.width < self.features else deviation
        packed = self.usual_precision + parts["precision"]
        precision = packed[:, self.unpack].reshape(-1, self.width, self.width)
        pulled = torch.matmul(precision, projected.unsqueeze(2)).squeeze(2)
        square = row_sum(projected * pulled).clamp(min=0.0)
        smoothing = (1 / (age + 1)).clamp(min=self.smoothing)
        distance = parts["distance"] + smoothing * (torch.sqrt(square) - parts["distance"])

        rate = torch.where(age >= 30, 1 / (self.prior_rows + age).clamp(max=self.memory), 0.0)
        near = torch.minimum(10 * torch.sqrt(given / square.clamp(min=1e-9)), torch.ones_like(square))  # what is far off teaches less
        gain = rate * near * near / (1 + rate * square * near * near)
        growth = (packed[:, self.diagonal] / self.usual_precision[self.diagonal]).amax(dim=1, keepdim=True)
        drawn = rate * ((growth - self.growth_free) / (self.growth_bound - self.growth_free)).clamp(0.0, self.most_drawn)
        learned = (1 + rate - drawn) * (packed - gain * pulled[:, self.first] * pulled[:, self.second])
        learned = learned - (1 - drawn) * self.usual_precision
        mean = parts["residual_mean"] + rate * near * deviation
        return distance, {"precision": learned, "residual_mean": mean}
