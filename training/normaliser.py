"""Raw readings → what the network sees, with statistics of the stream's own past only.

u = x - reference                       raw units, relative to the stream's first value (float32 keeps its digits)
s = max(√(v + floor²), 1e-6·|μ|, tiny)  the stream's scale so far
z = asinh(clip((u - μ)/s))              judged first ...
μ += a·d,  v = (1-a)(v + a·d²)          ... then learned, a = max(1/n, 1/memory), d clipped to ±6 deviations once n > 30
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.layout import Keeps, Parts, Slot

LIMIT = 1e18
"""Readings beyond ±LIMIT are taken as ±LIMIT: squares of their differences must stay below float32's 3e38."""
FORECAST_LIMIT = 8.0
"""|forecast| in z: sinh(8) = 1490 deviations."""
TINY = 1e-18


@dataclass(frozen=True)
class Normalised:
    """One event of B streams."""

    u: Tensor  # [B, F] raw units relative to the reference; the mean where missing
    z: Tensor  # [B, F] 0 where missing
    present: Tensor  # [B, F] bool
    known: Tensor  # [B, F] bool: seen at least once before this event
    learns: Tensor  # [B, F] bool: present and not frozen
    reference: Tensor  # [B, F]
    mean: Tensor  # [B, F] before this event, relative to the reference
    scale: Tensor  # [B, F] before this event


class Normaliser(nn.Module):
    """Per feature and stream: reference, events seen, mean, variance."""

    floor: Tensor

    def __init__(self, features: int, clip: float = 1e4, memory: float = 2000.0) -> None:
        super().__init__()
        self.features, self.clip, self.memory = features, clip, memory
        self.register_buffer("floor", torch.zeros(features))  # pooled from unlabelled history; 0 = none

    @property
    def slots(self) -> tuple[Slot, ...]:
        learned = tuple(Slot(name, self.features, Keeps.FEATURE) for name in ("seen", "mean", "variance"))
        return (Slot("reference", self.features), *learned)

    def forward(self, x: Tensor, learn: Tensor, parts: Parts) -> tuple[Normalised, Parts]:
        """X [B, F] (NaN = missing), learn [B, 1] bool."""
        seen, mean, variance = parts["seen"], parts["mean"], parts["variance"]
        present, known = ~torch.isnan(x), seen > 0.5
        value = torch.where(present, x, 0.0).clamp(-LIMIT, LIMIT)
        reference = torch.where(present & ~known, value, parts["reference"])
        u = torch.where(present, value - reference, mean)
        deviation = torch.sqrt(variance + self.floor * self.floor)
        scale = torch.maximum(deviation, 1e-6 * (mean + reference).abs()).clamp(min=TINY)
        z = torch.asinh(((u - mean) / scale).clamp(-self.clip, self.clip))
        learns = present & learn
        event = Normalised(u, z, present, known, learns, reference, mean, scale)
        return event, {"reference": reference, **self._learned(event, seen, deviation, variance)}

    def _learned(self, event: Normalised, seen: Tensor, deviation: Tensor, variance: Tensor) -> Parts:
        count = seen + 1
        rate = (1 / count).clamp(min=1 / self.memory)
        difference = event.u - event.mean
        limit = torch.where((seen > 30) & (deviation > 0), 6 * deviation, 4 * LIMIT)
        difference = torch.minimum(torch.maximum(difference, -limit), limit)
        mean = event.mean + rate * difference
        return {"seen": count, "mean": mean, "variance": (1 - rate) * (variance + rate * difference * difference)}

    def raw(self, forecast: Tensor, event: Normalised) -> Tensor:
        """A forecast in z [B, F] → raw units relative to the reference."""
        return (event.mean + event.scale * torch.sinh(forecast.clamp(-FORECAST_LIMIT, FORECAST_LIMIT))).clamp(-2 * LIMIT, 2 * LIMIT)


class Clock(nn.Module):
    """Time of day, day of week and the gap since the previous event, as the network sees them."""

    inputs = 5
    slots = (Slot("cadence", 1),)
    memory = 200.0

    def forward(self, t: Tensor, events: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """T [B, 3] = seconds since the previous event (NaN on the first), second of the day, day of the week; events [B, 1] before.

        Returns [B, 5]: sin, cos of the day, sin, cos of the week, log of gap ÷ the stream's usual gap. An unknown time is zeros.
        """
        clock = t[:, 1:]
        day = clock[:, :1] * (2 * math.pi / 86400)
        week = day / 7 + clock[:, 1:] * (2 * math.pi / 7)
        angle = torch.cat([day, week], dim=1)
        waves = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
        waves = torch.where(torch.isnan(waves), 0.0, waves)
        cadence, gap = parts["cadence"], t[:, :1]
        timed = ~torch.isnan(gap)
        pace = torch.log(torch.where(timed, gap, 1.0).clamp(1e-3, 1e9))
        surprise = torch.where(timed & (events > 1.5), (pace - cadence).clamp(-4, 4), 0.0)
        rate = (1 / events.clamp(min=1.0)).clamp(min=1 / self.memory)
        learned = torch.where(timed, cadence + rate * (pace - cadence), cadence)
        return torch.cat([waves, surprise], dim=1), {"cadence": learned}
