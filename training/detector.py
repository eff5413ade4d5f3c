"""The whole detector as one pure step: what is exported, and what calibration runs. Every operation is row-wise.

    x, t ─► normaliser, clock ─► z ─► residual = actual - forecast made BEFORE this event ─► signals ─► tail ─► p_value, onset_p
                                 └─► autoencoder ─► forecast of the next event, kept in the state
                                                     expected, lower, upper ◄─ band

Models that are fitted to one feature have a linear forecast beside the network (`training.linear`), judged by a signal of its own.
A waveform's network sees the event before the signals do: they ask what its code makes of it.
The state is S floats (`layout` names its slices); zeros are a fresh stream. Shapes: B streams, F features, S state, K signals.
Outside, the batch is the first axis of everything; inside the last (see `layout`), but for the network's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from training.autoencoder import Autoencoder, FleetAutoencoder, NoNetwork, Outlook, Sizes, WaveformAutoencoder
from training.data import Float32
from training.layout import Keeps, Layout, Parts, Slot, any_of, row_sum
from training.linear import LinearForecast
from training.normaliser import Clock, Normalised, Normaliser
from training.signals import SCALED_LIMIT, MemorySignals, Residual, ResidualSignals, WaveformSignals
from training.stillness import Overdue, Runs, Stillness
from training.tail import SMALLEST, Band, Calibration, Curve, Onsets, Tail

WARMUP = 100
WAVEFORM_MEMORY = 5000.0
"""Events of a waveform's normaliser: tens of its periods."""

OUTPUTS = ("state_out", "p_value", "onset_p", "expected", "lower", "upper", "contribution")


@dataclass(frozen=True)
class Judged:
    """One event after the network and the signals, before the tail; what calibration learns from."""

    event: Normalised
    strengths: Tensor  # [K, B]
    upheld: Tensor | None  # [K, B] 1 where a strength counts in the event's p-value, 0 where not; None = all do
    weights: Tensor  # [F, B]
    forecast: Tensor  # [F, B] relative to the reference; means nothing where not known
    residual: Tensor  # [F, B] raw
    spread: Tensor  # [F, B] of the residuals so far
    runs: Runs | None = None  # of several features


def flat_calibration(signals: int) -> Calibration:
    """Constants before calibration: any strength is worth what it says."""
    line = Curve((0.0, 10.0), (0.0, 10.0), 1.0)
    ones, onsets = (1.0,) * signals, Onsets(line, tau=0.0, shape=10.0, weight=10.0)
    return Calibration(ones, ones, (onsets,) * signals, line, onsets, line)


class Recurrent(Protocol):
    """The network of a step, for what looks at it from outside: an event by itself is answered as within a sequence."""

    sizes: Sizes
    inputs: int

    def fresh(self, rows: int) -> Parts: ...

    def step(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """One event [B, I] → answers [B, ...], and the state's parts after it."""
        ...

    def sequence(self, inputs: Tensor, parts: Parts) -> Sequenced:
        """T events [T, B, I]."""
        ...


class Sequenced(Protocol):
    @property
    def answers(self) -> Tensor: ...  # [T, B, ...]

    @property
    def state(self) -> Parts: ...


class StepModule(nn.Module, ABC):
    """What can be exported as a step function."""

    features: int
    outputs: tuple[str, ...] = OUTPUTS

    @property
    @abstractmethod
    def state_size(self) -> int: ...


class ArtifactStep(StepModule):
    """What can be published as an artifact: it has a layout of its state, a network, signals and their calibration."""

    layout: Layout
    calibration: Calibration
    warmup: int
    """Events of a fresh stream without a score."""

    @property
    def state_size(self) -> int:
        return self.layout.size

    @property
    @abstractmethod
    def network(self) -> Recurrent: ...

    @property
    @abstractmethod
    def signal_names(self) -> tuple[str, ...]: ...

    def magnitude(self, slot: str) -> float | Float32:
        """The size of what a slot, or an output, is the difference from, 0 where it is none: its rounding is relative to that."""
        return 0.0


class DetectorStep(ArtifactStep):
    """One event for each of B streams. `forward` has the signature of the artifact's step function."""

    scored: Tensor
    warmup = WARMUP

    def __init__(self, features: int, sizes: Sizes, clip: float = 1e4, scored: Sequence[bool] | None = None, linear: bool = False) -> None:
        """`scored` of F: False for context, which the network sees and nothing judges. By default all are scored.

        `linear`: of a single feature that is no waveform, with a linear forecast beside the network. The shipped default has none.
        """
        super().__init__()
        self.features = features
        self.register_buffer("scored", torch.tensor(scored or [True] * features).unsqueeze(1))
        memory = WAVEFORM_MEMORY if sizes.waveform else 2000.0 if features == 1 else 10_000.0
        self.normaliser = Normaliser(features, clip, memory)
        self.clock = Clock()
        self.autoencoder = _network(features, sizes)
        self.linear = LinearForecast() if linear else None
        self.signals: MemorySignals | ResidualSignals | WaveformSignals
        if features > 1:
            self.signals = ResidualSignals(features, scored)
        else:
            self.signals = WaveformSignals() if isinstance(self.autoencoder, WaveformAutoencoder) else MemorySignals(linear=linear)
        self.stillness = Stillness(scored or [True] * features, memory) if features > 1 else None
        self.calibrate(flat_calibration(len(self.signals.names)))

    def calibrate(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.tail = Tail(len(self.signals.names), self.signals.burn, calibration)
        self.band = Band(self.features)
        counters = [Slot("events", 1), Slot("previous_z", self.features)]
        if not self._recalls:
            counters.append(Slot("forecast", self.features))
        if self.stillness is not None:
            counters += [Slot("age", 1, Keeps.STREAM), *self.stillness.slots]
        if self.linear is not None:
            counters += self.linear.slots
        slots = (self.normaliser.slots, self.clock.slots, self.autoencoder.slots, self.signals.slots, self.band.slots, self.tail.slots)
        self.layout = Layout([*counters, *(slot for part in slots for slot in part)])

    @property
    def _recalls(self) -> bool:
        return isinstance(self.autoencoder, FleetAutoencoder) and self.autoencoder.recalls

    @property
    def network(self) -> Recurrent:
        return self.autoencoder

    @property
    def signal_names(self) -> tuple[str, ...]:
        return self.signals.names

    def magnitude(self, slot: str) -> float | Float32:
        """A precision near the pooled one is a small difference of large numbers; so is a forecast within the pooled deviation, whose
        distance from the reading is squared in the spread.
        Chances and heights are sums of weighed logarithms of distances in deviations, which are differences themselves.
        """
        if slot in ("expected", "lower", "upper"):
            return self.normaliser.floor.numpy()
        if slot == "spread":
            return self.normaliser.floor.numpy()[:, None] ** 2
        if slot in ("p_value", "onset_p", "onset_height"):
            return 10.0
        if slot == "precision" and isinstance(self.signals, ResidualSignals):
            return float(self.signals.usual_precision.abs().max())
        return 0.0

    def fresh_state(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.state_size)

    def age(self, parts: Parts) -> Tensor:
        """Events learned of each stream [1, B]. With one feature that is how often the feature was."""
        return parts["seen" if self.features == 1 else "age"]

    def forward(self, state: Tensor, x: Tensor, t: Tensor, learn: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        """The step function: see the service's contract for shapes and meaning of inputs and outputs."""
        parts = self.split(state, x.t(), learn > 0.5)
        judged, after = self.judge(parts, x.t(), t.t(), learn > 0.5)
        event = judged.event
        judges = self.judges(event) & (parts["events"] >= WARMUP)
        answer, tail_parts = self.tail(judged.strengths, judges, self.age(parts), alpha, parts, judged.upheld)
        overdue: Overdue | None = None
        if self.stillness is not None and judged.runs is not None:
            overdue = self.stillness.overdue(judged.runs, parts["events"] >= WARMUP, learn > 0.5, alpha)
            after = {**after, **overdue.parts}
        state_out = self.layout.join(parts, {**after, **tail_parts}, event.learns)

        expected = torch.where(event.known, judged.forecast + event.reference, torch.nan)
        margin = answer.factor * judged.spread
        band = (expected, expected - margin, expected + margin)
        p_value, onset_p, shares = answer.p_value, answer.onset_p, self._shares(judged)
        if overdue is not None:
            some, likely = overdue.log_p < 0, torch.exp(overdue.log_p.clamp(min=SMALLEST))
            named = some & ~(p_value < likely)  # NaN is not less: an event without any value is judged, too
            p_value = torch.where(named, likely, p_value)
            onset_p = torch.where(some & (learn > 0.5) & ~(onset_p < likely), likely, onset_p)
            dead = overdue.features / row_sum(overdue.features.t()).t().clamp(min=1.0)
            # Beside what is rarer still, a dead sensor has its part of the decades.
            part = torch.where(some, overdue.log_p / (overdue.log_p + torch.log(answer.p_value)), 0.0)
            shares = torch.where(named, dead, shares + part * (dead - shares))
        return state_out, p_value, onset_p, *(part.t() for part in (*band, shares))

    def judges(self, event: Normalised) -> Tensor:
        """[1, B] bool: there is a value to be scored."""
        if self.features == 1:
            return event.present
        return any_of(event.present & self.scored)

    def _shares(self, judged: Judged) -> Tensor:
        """Attribution [F, B]: weights as shares of 1 over the features that are present and scored."""
        if self.features == 1:
            return judged.event.present.to(judged.weights.dtype)
        weights = (judged.weights + 1e-6) * (judged.event.present & self.scored).to(judged.weights.dtype)
        return weights / row_sum(weights.t()).t().clamp(min=1e-12)

    def split(self, state: Tensor, x: Tensor, may_learn: Tensor) -> Parts:
        """The parts of a state [B, S] that meet x [F, B], may_learn [B] bool; where a feature begins again, what is kept of it is fresh.

        With `MemorySignals` what they keep is fresh, too. The network goes on, and so does the count of events: no stream may begin again
        for ever.
        """
        parts = self.layout.split(state)
        again = self.normaliser.begins_again(x, may_learn, parts["events"], parts)
        kept = [slot.name for slot in self.normaliser.slots]
        if isinstance(self.signals, MemorySignals):
            kept += self.signals.outlast
        return {**parts, **{name: torch.where(again, 0.0, parts[name]) for name in kept}}

    def judge(self, parts: Parts, x: Tensor, t: Tensor, may_learn: Tensor) -> tuple[Judged, Parts]:
        """Everything before the tail, from x [F, B], t [3, B], may_learn [B] bool.

        Returns the parts after the event, for `Layout.join`, without those of the tail.
        """
        if isinstance(self.autoencoder, FleetAutoencoder) and self._recalls:
            parts = {**parts, "forecast": self.autoencoder.recalled(parts).t()}
        event, normalised_parts = self.normaliser(x, may_learn, parts)
        clock, clock_parts = self.clock(t, parts["events"], parts)
        forecast, both = self.normaliser.raw(parts["forecast"], event), (event.present & event.known).to(x.dtype)
        error = (event.u - forecast) * both
        residual = Residual(
            raw=error,
            scaled=(error / event.scale).clamp(-SCALED_LIMIT, SCALED_LIMIT),
            z=(event.z - parts["forecast"]) * both,
        )
        linear_parts: Parts = {}
        if self.linear is not None:
            ahead = self.normaliser.raw(self.linear(parts["past"]), event)
            residual = replace(residual, linear=(event.u - ahead) * both)
            linear_parts = {"past": self.linear.after(event.z, event.present, parts["past"])}
        location, outlook, network_parts = self._next(self.inputs(event, clock, parts["previous_z"]), parts)
        residual = replace(residual, outlook=outlook)
        strengths, weights, upheld, signal_parts = self._signals(event, residual, parts)
        spread, band_parts = self.band(residual.raw, parts["seen"], parts)
        runs, still_parts = (None, {}) if self.stillness is None else self.stillness.follow(event, parts, may_learn)
        after = {
            **normalised_parts,
            **clock_parts,
            **network_parts,
            **linear_parts,
            **signal_parts,
            **band_parts,
            **still_parts,
            "events": parts["events"] + 1,
            "age": self.age(parts) + 1,
            "previous_z": torch.where(event.present, event.z, parts["previous_z"]),
            "forecast": location.t(),
        }
        return Judged(event, strengths, upheld, weights, forecast, residual.raw, spread, runs), after

    def _signals(self, event: Normalised, residual: Residual, parts: Parts) -> tuple[Tensor, Tensor, Tensor | None, Parts]:
        if isinstance(self.signals, MemorySignals):
            return self.signals.forward(event, residual, parts, self.age(parts))
        columns = {slot.name for slot in self.signals.slots if slot.keeps is not Keeps.ROWS}
        by_rows = {slot.name: parts[slot.name].t() if slot.name in columns else parts[slot.name] for slot in self.signals.slots}
        strengths, weights, upheld, after = self.signals.forward(_turned(event), _turned(residual), by_rows, self.age(parts).t())
        strengths = torch.where(self.judges(event), strengths.t(), 0.0)
        return strengths, weights.t(), upheld, {name: part.t() if name in columns else part for name, part in after.items()}

    def _next(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Outlook | None, Parts]:
        """Forecast of the next event [B, F], a waveform's outlook, and the network's parts after this event."""
        if isinstance(self.autoencoder, WaveformAutoencoder):
            outlook, after = self.autoencoder.look(inputs, parts)
            return outlook.location[:, :1], outlook, after
        forecast, after = self.autoencoder.step(inputs, parts)
        return forecast, None, after

    def inputs(self, event: Normalised, clock: Tensor, previous_z: Tensor) -> Tensor:
        """What the network sees of an event: z, its change, what is present, and the clock [B, 3F + 5].

        Of a waveform z and its change [B, 2]: its shape knows no time of day. A missing value is the last one; of a single feature that
        is no waveform 0, the mean.
        """
        change = (event.z - previous_z) * (event.present & event.known).to(event.z.dtype)
        if isinstance(self.autoencoder, WaveformAutoencoder):
            return torch.cat([torch.where(event.present, event.z, previous_z), change]).t()
        z = event.z if self.features == 1 else torch.where(event.present, event.z, previous_z)
        return torch.cat([z, change, event.present.to(event.z.dtype), clock]).t()


def _network(features: int, sizes: Sizes) -> Autoencoder | WaveformAutoencoder | NoNetwork:
    if sizes.cell == "none":
        return NoNetwork(3 * features + Clock.inputs, features, sizes)
    if sizes.waveform:
        return WaveformAutoencoder(2, features, sizes)
    network = Autoencoder if features == 1 else FleetAutoencoder
    return network(3 * features + Clock.inputs, features, sizes)


Turned = TypeVar("Turned", Normalised, Residual)


def _turned(columns: Turned) -> Turned:
    """All its tensors [F, B] as [B, F]; an outlook has the batch first as it is."""
    parts = {field.name: getattr(columns, field.name) for field in fields(columns)}
    turned: dict[str, Any] = {name: part.t() for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(columns, **turned)


def example_inputs(step: StepModule, rows: int) -> tuple[Any, ...]:
    """Inputs of the right shapes, for the exporter."""
    F = step.features
    ones = torch.ones(rows)
    return torch.zeros(rows, step.state_size), torch.zeros(rows, F), torch.ones(rows, 3), ones, ones * 1e-3
