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
OUTSET = 20
"""Events of a stream within which a feature may begin again, for 65535, -9999 or 0 while a device starts were none of its readings. It does
where a reading confirms the one before: that was OFF in z, ten deviations, and is NEARER times as near to this one as to the mean.
"""
OFF, NEARER = 3.0, 10.0


@dataclass(frozen=True)
class Normalised:
    """One event of B streams; all [F, B]."""

    u: Tensor  # raw units relative to the reference; the mean where missing
    z: Tensor  # 0 where missing
    present: Tensor  # bool
    known: Tensor  # bool: seen at least once before this event
    learns: Tensor  # bool: present and not frozen
    reference: Tensor
    mean: Tensor  # before this event, relative to the reference
    scale: Tensor  # before this event
    settled: Tensor  # bool: seen and moved often enough for its own deviation to say what is far off


class Normaliser(nn.Module):
    """Per feature and stream: reference, events seen, mean, variance. Shapes: F features, B streams, the batch last."""

    floor: Tensor

    def __init__(self, features: int, clip: float, memory: float) -> None:
        super().__init__()
        self.features, self.clip, self.memory = features, clip, memory
        self.register_buffer("floor", torch.zeros(features))  # pooled from unlabelled history; 0 = none

    @property
    def slots(self) -> tuple[Slot, ...]:
        learned = tuple(Slot(name, self.features, Keeps.FEATURE) for name in ("seen", "mean", "variance"))
        return (Slot("reference", self.features), *learned)

    def begins_again(self, x: Tensor, learn: Tensor, events: Tensor, parts: Parts) -> Tensor:
        """Whether what was seen so far is to be forgotten [F, B] bool, of x [F, B], learn [B] bool, events [1, B] of the stream before."""
        previous = parts["previous"] if "previous" in parts else self._previous(parts)
        step, far = x - parts["reference"] - previous, previous - parts["mean"]
        return (NEARER * step.abs() < far.abs()) & (parts["previous_z"].abs() > OFF) & (events < OUTSET) & learn

    def _previous(self, parts: Parts) -> Tensor:
        """The last value relative to the reference [F, B], of a feature that has learned from each but the first with a = 1/n: from z = d/s
        and v = (1-a)(s² - floor² + a·d²).
        """
        n, deviations = parts["seen"].clamp(min=1.0), self._sinh(parts["previous_z"])
        squares = parts["variance"] * n + (self.floor * self.floor).unsqueeze(1) * (n - 1)
        return parts["mean"] + deviations * torch.sqrt(squares * (n - 1) / (n * (n + deviations * deviations)))

    def forward(self, x: Tensor, learn: Tensor, parts: Parts) -> tuple[Normalised, Parts]:
        """X [F, B] (NaN = missing), learn [B] bool."""
        seen, mean, variance = parts["seen"], parts["mean"], parts["variance"]
        present, known = ~torch.isnan(x), seen > 0.5
        value = torch.where(present, x, 0.0).clamp(-LIMIT, LIMIT)
        reference = torch.where(known, parts["reference"], value)
        u = torch.where(present, value - reference, mean)
        # The univariate detector pools no floor: one operator less for each event.
        floored = variance if self.features == 1 else variance + (self.floor * self.floor).unsqueeze(1)
        deviation = torch.sqrt(floored)
        scale = torch.maximum(deviation, 1e-6 * (mean + reference).abs()).clamp(min=TINY)
        difference = u - mean
        z = self._asinh((difference / scale).clamp(-self.clip, self.clip))
        settled = (seen > 30) & (deviation > 0)
        event = Normalised(u, z, present, known, present & learn, reference, mean, scale, settled)
        limit = torch.where(settled, 6 * deviation, 4 * LIMIT)
        return event, {"reference": reference, **self._learned(difference, limit, seen, mean, variance)}

    def _learned(self, difference: Tensor, limit: Tensor, seen: Tensor, mean: Tensor, variance: Tensor) -> Parts:
        count = seen + 1
        rate = torch.reciprocal(count).clamp(min=1 / self.memory)
        difference = torch.minimum(torch.maximum(difference, -limit), limit)
        step = rate * difference
        return {"seen": count, "mean": mean + step, "variance": (1 - rate) * (variance + step * difference)}

    def raw(self, forecast: Tensor, event: Normalised) -> Tensor:
        """A forecast in z [F, B] → raw units relative to the reference."""
        return (event.mean + event.scale * self._sinh(forecast.clamp(-FORECAST_LIMIT, FORECAST_LIMIT))).clamp(-2 * LIMIT, 2 * LIMIT)

    # ONNX Runtime takes 13 and 10 ns a number for Asinh and Sinh, 1.4 and 0.1 for Log and Exp: with one feature fewer operators win,
    # with several cheaper ones. What cancels near zero is 1e-7 of a deviation.
    def _asinh(self, value: Tensor) -> Tensor:
        if self.features == 1:
            return torch.asinh(value)
        return torch.sign(value) * torch.log(value.abs() + torch.sqrt(value * value + 1))

    def _sinh(self, value: Tensor) -> Tensor:
        if self.features == 1:
            return torch.sinh(value)
        grown = torch.exp(value)
        return 0.5 * (grown - torch.reciprocal(grown))


class Clock(nn.Module):
    """Time of day, day of week and the gap since the previous event, as the network sees them."""

    inputs = 5
    slots = (Slot("cadence", 1),)
    memory = 200.0
    angles: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        day, week = 2 * math.pi / 86400, 2 * math.pi / 7
        self.register_buffer("angles", torch.tensor([[day, 0.0], [day / 7, week]] * 2), persistent=False)
        # A cosine is a sine a quarter turn on: one operator for all four.
        self.register_buffer("phases", torch.tensor([[0.0], [0.0], [math.pi / 2], [math.pi / 2]]), persistent=False)

    def forward(self, t: Tensor, events: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """T [3, B] = seconds since the previous event (NaN on the first), second of the day, day of the week; events [1, B] before.

        Returns [5, B]: sin of the day and of the week, their cos, log of gap ÷ the stream's usual gap. An unknown time is zeros.
        """
        gap, clock = torch.split(t, [1, 2])
        waves = torch.sin(torch.addmm(self.phases, self.angles, clock))
        waves = torch.where(torch.isnan(waves), 0.0, waves)
        cadence = parts["cadence"]
        change = torch.where(torch.isnan(gap), 0.0, torch.log(gap.clamp(1e-3, 1e9)) - cadence)
        surprise = change.clamp(-4, 4) * (events > 1.5).to(change.dtype)
        return torch.cat([waves, surprise]), {"cadence": cadence + change / events.clamp(1.0, self.memory)}
