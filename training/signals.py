"""What of an event is unusual, as K non-negative strengths: the exchangeable part between the network and the tail.

    one feature        `MemorySignals`    how far the value, its level and the residual lie from where they have been before
    several features   `ResidualSignals`  size of the residuals over the stream's own scale, and their slow level

A strength of 0 means: nothing to see. What a strength is worth as a probability is the tail's business, not theirs.
Shapes: B streams, F features, K signals, M intervals.
"""

from __future__ import annotations

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
FAR = 1e20
"""Beyond every reading (`LIMIT`), yet far from overflow."""


@dataclass(frozen=True)
class Residual:
    """Expected against actual, of one event; 0 where the feature is missing or was never seen before."""

    raw: Tensor  # [B, F]
    scaled: Tensor  # [B, F] over the stream's scale, within ±SCALED_LIMIT


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
    """For several features: rms of |residual| over the stream's own scale, and rms of the residuals' slow level over its own.

    Both scales of each feature start at pooled sizes and become the stream's own within some hundred events: a feature that always
    drifts has a large level and must not drown the others, in the score or in the attribution.
    """

    names = ("residual", "level")
    prior, memory, cap = 200.0, 5000.0, 100.0

    usual: Tensor
    usual_level: Tensor

    def __init__(self, features: int, burn: int = 60) -> None:
        super().__init__()
        self.features, self.burn = features, burn
        self.register_buffer("usual", torch.full((features,), 0.3))  # pooled mean |residual|, fitted
        self.register_buffer("usual_level", torch.full((features,), 0.1))  # pooled mean |level of the residual|, fitted

    @property
    def slots(self) -> tuple[Slot, ...]:
        scales = tuple(Slot(name, self.features, Keeps.FEATURE) for name in ("residual_scale", "level_scale"))
        return (Slot("residual_level", self.features), *scales)

    def forward(self, event: Normalised, residual: Residual, parts: Parts, age: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Age [B, 1]: events learned before this one. The scales are kept as differences from the pooled ones."""
        present = event.present.to(residual.scaled.dtype)
        given = row_sum(present).clamp(min=1.0)
        rate = (1 / (age + 1)).clamp(min=1 / LEVEL_MEMORY)
        level = torch.where(
            event.present, parts["residual_level"] + rate * (residual.scaled - parts["residual_level"]), parts["residual_level"]
        )
        squares, scale = self._against_scale(residual.scaled, self.usual, parts["residual_scale"], age)
        level_squares, level_scale = self._against_scale(level, self.usual_level, parts["level_scale"], age)
        squares, level_squares = squares * present, level_squares * present
        strengths = torch.sqrt(torch.cat([row_sum(squares), row_sum(level_squares)], dim=1) / given)
        strengths = torch.where(age >= self.burn, strengths, 0.0)
        learned = {"residual_level": level, "residual_scale": scale, "level_scale": level_scale}
        return strengths, squares + level_squares, learned

    def _against_scale(self, value: Tensor, usual: Tensor, learned: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
        """Squared size of values [B, F] over their scale, and the scale's new difference from `usual` [F]."""
        size, scale = value.abs(), usual + learned
        ratio = (size / scale).clamp(max=self.cap)
        step = (torch.minimum(size, 3 * scale) - scale) / (self.prior + age).clamp(max=self.memory)
        return ratio * ratio, learned + torch.where(age >= 30, step, 0.0)
