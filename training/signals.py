"""What of an event is unusual, as K non-negative strengths: the exchangeable part between the network and the tail.

    one feature        `MemorySignals`    how far the value, its level and the residual lie from where they have been before
    several features   `ResidualSignals`  size of the residuals, their slow level, and how unusual they are together

A strength of 0 means: nothing to see. What a strength is worth as a probability is the tail's business, not theirs.
Shapes: B streams, F features, K signals, M intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from training.layout import Keeps, Parts, Slot, row_sum
from training.normaliser import TINY, Normalised

LEVEL_MEMORY = 30.0
"""Events of the exponentially weighted level."""
SCALED_LIMIT = 50.0
"""Residuals over the stream's scale beyond this count as this."""
WIDEST = 40
"""Features up to which the precision matrix is of the features themselves: WIDEST·(WIDEST + 1)/2 floats of state at most."""
FAR = 1e20
"""Beyond every reading (`LIMIT`), yet far from overflow."""


@dataclass(frozen=True)
class Residual:
    """Expected against actual, of one event; 0 where the feature is missing or was never seen before."""

    raw: Tensor  # [B, F]
    scaled: Tensor  # [B, F] over the stream's scale, within ±SCALED_LIMIT
    z: Tensor  # [B, F] in asinh units, as the network sees them


class Signals(Protocol):
    """A head over the residuals. `forward` judges with what was known before the event, then learns it."""

    names: tuple[str, ...]
    burn: int

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    def __call__(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Strengths [B, K], weights of the features [B, F] for attribution (not normalised), and the parts after the event."""
        ...


class MemorySignals(nn.Module):
    """Interval memory with forgetting, for a single feature.

    Each signal remembers up to M intervals [low, high] with visits and the life left to them, and its range. Novelty of a value =
    distance to the nearest interval ÷ range. An interval lives `forget`·visits events after its last visit; then the range shrinks
    to the hull of the rest. A value extends the nearest interval if that stays within `widest` of the range (or no slot is free),
    else it opens its own. The range grows at most by its own width per event.

    Inside, the batch is the last axis: [M, K, B]. Rows of 12 numbers cost ONNX Runtime several times as much.
    """

    names = ("value", "level", "residual")
    tie_break: Tensor

    def __init__(self, intervals: int = 12, burn: int = 100, widest: float = 0.3, forget: float = 1000.0) -> None:
        super().__init__()
        self.intervals, self.burn, self.widest, self.forget = intervals, burn, widest, forget
        self.register_buffer("tie_break", (torch.arange(intervals) / 16).reshape(-1, 1, 1), persistent=False)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """`memory` is low, high, visits, life of M intervals × K signals, then minimum and maximum of the K signals."""
        K = len(self.names)
        return (Slot("level", 1), Slot("memory", (4 * self.intervals + 2) * K, Keeps.STREAM))

    def forward(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Age [B, 1]: events learned before this one."""
        rate = (1 / (age + 1)).clamp(min=1 / LEVEL_MEMORY)
        level = torch.where(event.present, parts["level"] + rate * (event.u - parts["level"]), parts["level"])
        values = torch.cat([event.u, level, residual.raw], dim=1)
        novelty, memory = self.visit(values.t(), parts["memory"].t(), (age >= self.burn).t())
        strengths = torch.where(event.present, novelty.t(), 0.0)
        return strengths, torch.ones_like(event.u), {"level": level, "memory": memory.t()}

    def visit(self, value: Tensor, memory: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Value [K, B], memory [(4M + 2)·K, B], live [1, B] bool → novelty [K, B] and the memory after the visit."""
        K, M = len(self.names), self.intervals
        wide, minimum, maximum = torch.split(memory, [4 * M * K, K, K])
        low, high, visits, life = wide.reshape(4, M, K, -1).unbind(0)
        life = (life - 1).clamp(min=-1000.0)
        dead = (-life).clamp(0.0, 1.0)  # life is a whole number
        low_alive, high_alive = low + FAR * dead, high - FAR * dead
        minimum, maximum = torch.maximum(minimum, low_alive.amin(0)), torch.minimum(maximum, high_alive.amax(0))
        width = (maximum - minimum).clamp(min=TINY)

        gap = torch.maximum(value - high_alive, low_alive - value).clamp(min=0.0)
        distance = gap.amin(0)
        novelty = torch.where(live, (distance / width).clamp(max=1e3), 0.0)

        maximum = torch.maximum(maximum, torch.where(live, torch.minimum(value, maximum + width), value))
        minimum = torch.minimum(minimum, torch.where(live, torch.maximum(value, minimum - width), value))
        widest = self.widest * (maximum - minimum).clamp(min=TINY)

        nearest = (gap <= distance).to(value.dtype)
        order = life + self.tie_break  # the deadest slot is the free one; none is when all live
        weakest = order.amin(0)
        free = (order <= weakest).to(value.dtype)
        span = (nearest * (high - low)).amax(0) + distance
        extend = ((distance <= 0) | (span <= widest) | (weakest >= 0)).to(value.dtype)
        touched = free + extend * (nearest - free)
        visited = touched > 0.5
        visits = visits - visits * dead + touched
        # A dead slot's ends are FAR away, so growing to the value is also how a new interval opens.
        low, high = torch.where(visited, torch.minimum(low_alive, value), low), torch.where(visited, torch.maximum(high_alive, value), high)
        life = torch.where(visited, self.forget * visits, life)
        return novelty, torch.cat([torch.stack([low, high, visits, life]).reshape(4 * M * K, -1), minimum, maximum])


class ResidualSignals(nn.Module):
    """For several features: three looks at the residuals of those that are scored. LOG.md, "Fleets", has what else was tried.

        residual   rms of |residual| in asinh units over the stream's own scale: one feature far off must not hide the others
        level      rms of the residuals' slow level (1/30) in linear units: small offsets that last
        distance   Mahalanobis distance of the linear residuals, averaged (1/5): values unusual together that are not alone

    Scale, mean and precision P start at pooled ones and become the stream's own. P follows d by one step of Sherman and Morrison,
    (1 + a)·(P - a·Pd·dᵀP / (1 + a·dᵀPd)). Where nothing moves (a constant feature) that grows without end; so P is drawn back to the
    pooled one as soon as a diagonal element is some tens of times the pooled one's: it stays positive definite in float32 for ever.
    Beyond WIDEST features, d is their projection on as many pooled principal directions.
    """

    names = ("residual", "level", "distance")
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

    def __init__(self, features: int, scored: Sequence[bool] | None = None, burn: int = 60) -> None:
        """`scored` [F]: False for features that are context, seen by the network and never judged."""
        super().__init__()
        self.features, self.burn = features, burn
        self.width = D = min(features, WIDEST)
        first, second = torch.triu_indices(D, D)
        place = torch.zeros(D, D, dtype=torch.long)
        place[first, second] = place[second, first] = torch.arange(len(first))
        self.register_buffer("scored", torch.tensor(scored or [True] * features))
        self.register_buffer("usual", torch.full((features,), 0.3))  # pooled mean |residual|, fitted
        self.register_buffer("usual_mean", torch.zeros(features))  # pooled mean of the linear residuals, fitted
        self.register_buffer("directions", torch.eye(features)[:, :D].contiguous())
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
        if self.width < self.features:
            self.directions.copy_(torch.linalg.eigh(covariance)[1][:, -self.width :])
            covariance = self.directions.double().T @ covariance @ self.directions.double()
        ridge = 0.05 * covariance.trace() / self.width + 1e-6
        precision = torch.linalg.inv(covariance + ridge * torch.eye(self.width, dtype=torch.float64))
        self.usual_mean.copy_(mean)
        self.usual_precision.copy_(precision[self.first, self.second])

    def forward(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Parts]:
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
        return strengths, squares + level_squares, after

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
