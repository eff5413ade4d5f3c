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

from training.layout import Parts, Slot, row_sum
from training.normaliser import TINY, Normalised

LEVEL_MEMORY = 30.0
"""Events of the exponentially weighted level."""
FAR = 3e38


@dataclass(frozen=True)
class Residual:
    """Expected against actual, of one event; 0 where the feature is missing or was never seen before."""

    raw: Tensor  # [B, F]
    z: Tensor  # [B, F]


class Signals(Protocol):
    """A head over the residuals. `forward` judges with what was known before the event, then learns it."""

    names: tuple[str, ...]
    burn: int

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    def __call__(self, event: Normalised, residual: Residual, parts: Parts, seen: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Strengths [B, K], weights of the features [B, F] for attribution (not normalised), and the parts after the event."""
        ...


class MemorySignals(nn.Module):
    """Interval memory with forgetting, for a single feature.

    Each signal remembers up to M intervals [low, high] with visits and the time since the last one, and its range. Novelty of a
    value = distance to the nearest interval ÷ range. An interval lives `forget`·visits events after its last visit (the most
    visited one for ever); then the range shrinks to the hull of the rest. A value extends the nearest interval if that stays
    within `widest` of the range (or no slot is free), else it opens its own. The range grows at most by its own width per event.
    """

    names = ("value", "level", "residual")

    def __init__(self, intervals: int = 12, burn: int = 100, widest: float = 0.3, forget: float = 1000.0) -> None:
        super().__init__()
        self.intervals, self.burn, self.widest, self.forget = intervals, burn, widest, forget
        self.register_buffer("index", torch.arange(intervals).reshape(1, 1, -1), persistent=False)

    index: Tensor

    @property
    def slots(self) -> tuple[Slot, ...]:
        K, M = len(self.names), self.intervals
        wide = tuple(Slot(name, K * M) for name in ("memory_low", "memory_high", "memory_visits", "memory_idle"))
        return (Slot("level", 1), *wide, Slot("memory_minimum", K), Slot("memory_maximum", K))

    def forward(self, event: Normalised, residual: Residual, parts: Parts, seen: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Seen [B, 1]: events learned before this one."""
        rate = (1 / (seen + 1)).clamp(min=1 / LEVEL_MEMORY)
        level = torch.where(event.present, parts["level"] + rate * (event.u - parts["level"]), parts["level"])
        values = torch.cat([event.u, level, residual.raw], dim=1)
        novelty, after = self._visit(values, parts, seen >= self.burn, event.learns)
        strengths = torch.where(event.present, novelty, 0.0)
        return strengths, torch.ones_like(event.u), {"level": level, **after}

    def _visit(self, values: Tensor, parts: Parts, live: Tensor, learns: Tensor) -> tuple[Tensor, Parts]:
        """Values [B, K] → novelty [B, K] and the memory after them."""
        shape = (-1, len(self.names), self.intervals)
        low, high, visits, idle = (parts[f"memory_{name}"].reshape(shape) for name in ("low", "high", "visits", "idle"))
        value = values.unsqueeze(2)
        idle_now = idle + 1
        favourite = self.index == visits.argmax(dim=2, keepdim=True)
        alive = favourite | (idle_now <= self.forget * visits)
        lowest, highest = torch.where(alive, low, FAR).amin(dim=2), torch.where(alive, high, -FAR).amax(dim=2)
        minimum, maximum = torch.maximum(parts["memory_minimum"], lowest), torch.minimum(parts["memory_maximum"], highest)
        width = (maximum - minimum).clamp(min=TINY)

        gap = torch.where(alive, torch.maximum(value - high, low - value).clamp(min=0.0), FAR)
        distance, nearest = gap.min(dim=2)
        novelty = torch.where(live, (distance / width).clamp(max=1e3), 0.0)

        reach_up = torch.where(live, torch.minimum(values, maximum + width), values)
        reach_down = torch.where(live, torch.maximum(values, minimum - width), values)
        maximum, minimum = torch.maximum(maximum, reach_up), torch.minimum(minimum, reach_down)
        width = (maximum - minimum).clamp(min=TINY)

        nearest_slot = self.index == nearest.unsqueeze(2)
        grown_low, grown_high = torch.minimum(low, value), torch.maximum(high, value)
        span = torch.where(nearest_slot, grown_high - grown_low, 0.0).sum(dim=2)
        dead = (~alive).to(values.dtype)
        full = dead.amax(dim=2) < 0.5
        extend = ((distance <= 0) | (span <= self.widest * width) | full).unsqueeze(2)
        free_slot = self.index == dead.argmax(dim=2, keepdim=True)
        touched, opened = nearest_slot & extend, free_slot & ~extend
        learned = {
            "memory_low": torch.where(opened, value, torch.where(touched, grown_low, low)),
            "memory_high": torch.where(opened, value, torch.where(touched, grown_high, high)),
            "memory_visits": torch.where(opened, 1.0, torch.where(alive, visits, 0.0) + touched),
            "memory_idle": torch.where(touched | opened, 0.0, idle_now),
        }
        after = {name: part.flatten(1) for name, part in learned.items()}
        after |= {"memory_minimum": minimum, "memory_maximum": maximum}
        return novelty, {name: torch.where(learns, part, parts[name]) for name, part in after.items()}


class ResidualSignals(nn.Module):
    """For several features: rms of |residual| over the stream's own scale, and rms of the residuals' slow level.

    The scale of each feature starts at the pooled `usual` size and becomes the stream's own within some hundred events.
    """

    names = ("residual", "level")
    prior, memory, cap = 200.0, 5000.0, 100.0

    usual: Tensor

    def __init__(self, features: int, burn: int = 60) -> None:
        super().__init__()
        self.features, self.burn = features, burn
        self.register_buffer("usual", torch.full((features,), 0.3))  # pooled mean |residual|, fitted

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot("residual_level", self.features), Slot("residual_scale", self.features))

    def forward(self, event: Normalised, residual: Residual, parts: Parts, seen: Tensor) -> tuple[Tensor, Tensor, Parts]:
        """Seen [B, 1]: events learned before this one. `residual_scale` is kept as the difference from `usual`."""
        present = event.present.to(residual.z.dtype)
        given = row_sum(present).clamp(min=1.0)
        size, scale = residual.z.abs(), self.usual + parts["residual_scale"]
        ratio = (size / scale).clamp(max=self.cap) * present
        rate = (1 / (seen + 1)).clamp(min=1 / LEVEL_MEMORY)
        level = torch.where(event.present, parts["residual_level"] + rate * (residual.z - parts["residual_level"]), parts["residual_level"])
        level_ratio = (level / scale).clamp(-self.cap, self.cap) * present
        squares, level_squares = ratio * ratio, level_ratio * level_ratio
        strengths = torch.sqrt(torch.cat([row_sum(squares), row_sum(level_squares)], dim=1) / given)
        strengths = torch.where(seen >= self.burn, strengths, 0.0)
        step = (torch.minimum(size, 3 * scale) - scale) / (self.prior + seen).clamp(max=self.memory)
        learned = torch.where(event.learns & (seen >= 30), parts["residual_scale"] + step, parts["residual_scale"])
        # White noise would ask for 2·30 - 1 to weigh both alike; residuals are not white, and then a slow bias hides a jump.
        weights = squares + 10 * level_squares
        return strengths, weights, {"residual_level": level, "residual_scale": learned}
