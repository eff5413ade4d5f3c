"""The whole detector as one pure step: what is exported, and what calibration runs. Every operation is row-wise.

    x, t ─► normaliser, clock ─► z ─► residual = actual - forecast made BEFORE this event ─► signals ─► tail ─► p_value, onset_p
                                 └─► autoencoder ─► forecast of the next event, kept in the state
                                                     expected, lower, upper ◄─ band

The state is S floats (`layout` names its slices); zeros are a fresh stream. Shapes: B streams, F features, S state, K signals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.autoencoder import Autoencoder, NoNetwork, Sizes
from training.layout import Keeps, Layout, Parts, Slot, row_sum
from training.normaliser import Clock, Normalised, Normaliser
from training.signals import SCALED_LIMIT, MemorySignals, Residual, ResidualSignals
from training.tail import Band, Calibration, Curve, Tail

WARMUP = 100

OUTPUTS = ("state_out", "p_value", "onset_p", "expected", "lower", "upper", "contribution")


@dataclass(frozen=True)
class Judged:
    """One event after the network and the signals, before the tail; what calibration learns from."""

    event: Normalised
    strengths: Tensor  # [B, K]
    weights: Tensor  # [B, F]
    expected: Tensor  # [B, F] relative to the reference
    residual: Tensor  # [B, F] raw
    ratio: Tensor  # [B, F] |residual| ÷ spread
    margin: Tensor  # [B, F] half width of the band


def flat_calibration(signals: int) -> Calibration:
    """Constants before calibration: any strength is worth what it says."""
    line = Curve((0.0, 10.0), (0.0, 10.0), 1.0)
    ones = (1.0,) * signals
    return Calibration(ones, ones, (line,) * signals, line, line, line, tau=0.0, shape=10.0, weight=10.0)


class DetectorStep(nn.Module):
    """One event for each of B streams. `forward` has the signature of the artifact's step function."""

    scored: Tensor

    def __init__(self, features: int, sizes: Sizes, clip: float = 1e4, intervals: int = 12, scored: Sequence[bool] | None = None) -> None:
        """`scored` [F]: False for context, which the network sees and nothing judges. By default all are scored."""
        super().__init__()
        self.features = features
        self.register_buffer("scored", torch.tensor(scored or [True] * features))
        self.normaliser = Normaliser(features, clip, memory=2000.0 if features == 1 else 10_000.0)
        self.clock = Clock()
        network: type[Autoencoder | NoNetwork] = NoNetwork if sizes.cell == "none" else Autoencoder
        self.autoencoder = network(3 * features + Clock.inputs, features, sizes)
        several = features > 1
        self.signals: MemorySignals | ResidualSignals = ResidualSignals(features, scored) if several else MemorySignals(intervals)
        self.calibrate(flat_calibration(len(self.signals.names)))

    def calibrate(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.tail = Tail(len(self.signals.names), self.signals.burn, calibration)
        self.band = Band(self.features, calibration.band)
        counters = (Slot("events", 1), Slot("age", 1, Keeps.STREAM), Slot("previous_z", self.features), Slot("forecast", self.features))
        slots = (self.normaliser.slots, self.clock.slots, self.autoencoder.slots, self.signals.slots, self.band.slots, self.tail.slots)
        self.layout = Layout([*counters, *(slot for part in slots for slot in part)])

    @property
    def state_size(self) -> int:
        return self.layout.size

    def fresh_state(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.state_size)

    def forward(self, state: Tensor, x: Tensor, t: Tensor, learn: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        """The step function: see the service's contract for shapes and meaning of inputs and outputs."""
        parts = self.layout.split(state)
        may_learn, asked = learn.unsqueeze(1) > 0.5, alpha.unsqueeze(1)
        judged, after = self.judge(parts, x, t, may_learn, asked)
        event = judged.event
        any_value = self.judges(event)
        p_value, onset_p, tail_parts = self.tail(judged.strengths, any_value, parts["age"], asked, parts)
        state_out = self.layout.join(state, {**after, **tail_parts}, event.learns)

        silent = ~any_value | (parts["events"] < WARMUP)
        p_value, onset_p = (torch.where(silent, torch.nan, p).squeeze(1) for p in (p_value, onset_p))
        expected = torch.where(event.known, judged.expected + event.reference, torch.nan)
        contribution = _shares(judged, event.present & self.scored)
        return state_out, p_value, onset_p, expected, expected - judged.margin, expected + judged.margin, contribution

    def judges(self, event: Normalised) -> Tensor:
        """[B, 1] bool: there is a value to be scored."""
        return (event.present & self.scored).any(dim=1, keepdim=True)

    def judge(self, parts: Parts, x: Tensor, t: Tensor, may_learn: Tensor, alpha: Tensor) -> tuple[Judged, Parts]:
        """Everything before the tail; all [B, ·]. Returns the parts after the event, for `Layout.join`, without those of the tail."""
        event, normalised_parts = self.normaliser(x, may_learn, parts)
        clock, clock_parts = self.clock(t, parts["events"], parts)
        expected = torch.where(event.known, self.normaliser.raw(parts["forecast"], event), event.u)
        residual = Residual(
            raw=torch.where(event.present, event.u - expected, 0.0),
            scaled=torch.where(event.present & event.known, (event.u - expected) / event.scale, 0.0).clamp(-SCALED_LIMIT, SCALED_LIMIT),
            z=torch.where(event.present & event.known, event.z - parts["forecast"], 0.0),
        )
        strengths, weights, signal_parts = self.signals(event, residual, parts, parts["age"])
        margin, ratio, band_parts = self.band(residual.raw, parts["seen"], alpha, parts)
        forecast, network_parts = self.autoencoder.step(self.inputs(event, clock, parts["previous_z"]), parts)
        after = {
            **normalised_parts,
            **clock_parts,
            **network_parts,
            **signal_parts,
            **band_parts,
            "events": parts["events"] + 1,
            "age": parts["age"] + 1,
            "previous_z": torch.where(event.present, event.z, parts["previous_z"]),
            "forecast": forecast,
        }
        return Judged(event, strengths, weights, expected, residual.raw, ratio, margin), after

    def inputs(self, event: Normalised, clock: Tensor, previous_z: Tensor) -> Tensor:
        """What the network sees of an event: z, its change, what is present, and the clock [B, 3F + 5]."""
        change = torch.where(event.present & event.known, event.z - previous_z, 0.0)
        return torch.cat([event.z, change, event.present.to(event.z.dtype), clock], dim=1)


def _shares(judged: Judged, scored: Tensor) -> Tensor:
    """Attribution: weights as shares of 1 over the features that are present and scored [B, F]."""
    present = scored.to(judged.weights.dtype)
    if present.shape[1] == 1:
        return present
    weights = (judged.weights + 1e-6) * present
    return weights / row_sum(weights).clamp(min=1e-12)


def example_inputs(step: DetectorStep, rows: int) -> tuple[Any, ...]:
    """Inputs of the right shapes, for the exporter."""
    F = step.features
    ones = torch.ones(rows)
    return torch.zeros(rows, step.state_size), torch.zeros(rows, F), torch.ones(rows, 3), ones, ones * 1e-3
