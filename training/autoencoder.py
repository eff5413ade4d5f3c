"""The LSTM autoencoder, running continuously: encoder → code → decoder, one event at a time, never reset.

    inputs_TBI ─► encoder LSTM ─► code = tanh(W·h) ─► decoder LSTM ─┬► location, log-scale of the NEXT event (per feature)
                                                                     └► reconstruction of the events 0, 1, 3, 7, 15, 31 steps back

The narrow code must carry what is regular of the recent past; the reconstruction of the lags trains it to. What a stream's
next event is expected to be is the decoder's location. Where there are several features, the code is made of the newest event, too.

A waveform's (ECG, vibration, current) is asked for more: the code alone must give the whole last window and forecasts far ahead.

    z, change ─► encoder LSTM ─► code ─► perceptrons ─┬► window: the last WINDOW values
                                                       └► location, log-scale of the value HORIZONS events ahead

Shapes: T steps, B streams, F features, I inputs, W = WINDOW, H = len(HORIZONS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from training.cells import CELLS, FAST_CELLS, StandardCell
from training.layout import Keeps, Parts, Slot
from training.networks import Bidirectional, Convolutional, Memoryless, Network, Stack

LAGS = (0, 1, 3, 7, 15, 31)
WINDOW = 96
"""Values of a waveform that its code must give back."""
WINDOW_HIDDEN = 64
HORIZONS = (1, 8, 16, 32, 64)
"""Events ahead that a waveform is forecast; the first is the next event."""
LOG_SCALES = (-4.0, 2.0)
"""Bounds of a waveform's log-scales."""
Variant = Literal["standard", "peephole", "coupled", "bidirectional", "convolutional", "memoryless", "none"]


@dataclass(frozen=True)
class Sizes:
    """What the network is made of."""

    hidden: int = 32
    layers: int = 1
    code: int = 8
    decoder_hidden: int = 16
    cell: Variant = "standard"
    waveform: bool = False  # one feature, judged by the shape of its recent past


class Forecast(nn.Module):
    """The outputs: per feature the lags, the location and the log-scale of the next value."""

    def __init__(self, hidden: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.location = nn.Linear(hidden, features)
        self.log_scale = nn.Linear(hidden, features)
        self.lags = nn.Linear(hidden, features * len(LAGS))


@dataclass(frozen=True)
class Outputs:
    """What training looks at, for T steps."""

    lags: Tensor  # [T, B, F, len(LAGS)]
    location: Tensor  # [T, B, F] of the next event
    log_scale: Tensor  # [T, B, F]
    state: Parts  # after the last

    @property
    def answers(self) -> Tensor:
        return self.location


@dataclass(frozen=True)
class Outlook:
    """What a waveform's code says, for one event or T of them."""

    seen: Tensor  # [..., 1] the newest value, as the network was given it
    window: Tensor  # [..., W] the last values, the newest first
    location: Tensor  # [..., H] of the value HORIZONS ahead
    log_scale: Tensor  # [..., H] within LOG_SCALES


@dataclass(frozen=True)
class WaveformOutputs(Outputs):
    """As `Outputs`, which speak of the next event; the window stands for the lags."""

    outlook: Outlook


class Autoencoder(nn.Module):
    """`inputs` numbers an event in, `features` forecasts out. Its state's parts are named after encoder and decoder."""

    def __init__(self, inputs: int, features: int, sizes: Sizes) -> None:
        super().__init__()
        self.inputs, self.features, self.sizes = inputs, features, sizes
        cells = CELLS if features == 1 else FAST_CELLS
        self.encoder = encoder_of(inputs, sizes, cells)
        self.bottleneck = nn.Linear(self.encoder.output_size, sizes.code)
        self.decoder = decoder_of(sizes, cells)
        self.heads = Forecast(sizes.decoder_hidden, features)

    @property
    def slots(self) -> tuple[Slot, ...]:
        networks = (("encoder", self.encoder), ("decoder", self.decoder))
        return tuple(Slot(f"{prefix}_{name}", size, Keeps.ROWS) for prefix, network in networks for name, size in network.sizes.items())

    def fresh(self, rows: int) -> Parts:
        return prefixed(self.encoder.fresh(rows), self.decoder.fresh(rows))

    def step(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """One event [B, I] → location of the next one [B, F], and the state's parts after it."""
        hidden, encoder = self.encoder.step(inputs, parts_of("encoder", parts))
        decoded, decoder = self.decoder.step(self._code(hidden, inputs), parts_of("decoder", parts))
        return self.heads.location(decoded), prefixed(encoder, decoder)

    def sequence(self, inputs: Tensor, parts: Parts, code_noise: Tensor | None = None) -> Outputs:
        """T events [T, B, I], the state carried in and out. `code_noise` [T, B, code] is added to the code (training only)."""
        hidden, encoder = self.encoder.sequence(inputs, parts_of("encoder", parts))
        code = self._code(hidden, inputs)
        if code_noise is not None:
            code = code + code_noise
        decoded, decoder = self.decoder.sequence(code, parts_of("decoder", parts))
        lags = self.heads.lags(decoded).unflatten(-1, (self.features, len(LAGS)))
        return Outputs(lags, self.heads.location(decoded), self.heads.log_scale(decoded), prefixed(encoder, decoder))

    def _code(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(self.bottleneck(hidden))


class FleetAutoencoder(Autoencoder):
    """For several features. What passes through the gates reaches the code later and less exactly than what it sees itself.

    No share of the last value is added to the forecast: on servers that lowers its error by a third, and a forecast that follows a fault no
    longer finds it (LOG.md, 2026-11-26).
    """

    def __init__(self, inputs: int, features: int, sizes: Sizes) -> None:
        super().__init__(inputs, features, sizes)
        self.bottleneck = nn.Linear(self.encoder.output_size + inputs, sizes.code)

    @property
    def recalls(self) -> bool:
        """Whether its state says what it answered, so that the answer need not be kept."""
        return "hidden" in self.decoder.sizes

    def recalled(self, parts: Parts) -> Tensor:
        """What the last step answered [B, F]; of a fresh state what means nothing."""
        location: Tensor = self.heads.location(parts["decoder_hidden"])
        return location

    def _code(self, hidden: Tensor, inputs: Tensor) -> Tensor:
        return torch.tanh(self.bottleneck(torch.cat([hidden, inputs], dim=-1)))


class WaveformAutoencoder(nn.Module):
    """For one feature: inputs [B, 2] are z and its change. What is made of the code is memoryless: the code must hold the shape."""

    def __init__(self, inputs: int, features: int, sizes: Sizes) -> None:
        """Raises ValueError for several features."""
        super().__init__()
        if features != 1:
            raise ValueError(f"A waveform is one feature, not {features}.")
        self.inputs, self.features, self.sizes = inputs, features, sizes
        self.encoder = encoder_of(inputs, sizes, FAST_CELLS)
        self.bottleneck = nn.Linear(self.encoder.output_size, sizes.code)
        self.window = nn.Sequential(nn.Linear(sizes.code, WINDOW_HIDDEN), nn.Tanh(), nn.Linear(WINDOW_HIDDEN, WINDOW))
        self.forecasts = nn.Sequential(
            nn.Linear(sizes.code, sizes.decoder_hidden), nn.Tanh(), nn.Linear(sizes.decoder_hidden, 2 * len(HORIZONS))
        )

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(Slot(f"encoder_{name}", size, Keeps.ROWS) for name, size in self.encoder.sizes.items())

    def fresh(self, rows: int) -> Parts:
        return prefixed(self.encoder.fresh(rows), {})

    def look(self, inputs: Tensor, parts: Parts) -> tuple[Outlook, Parts]:
        """One event [B, 2] → what its code says, and the state's parts after it."""
        hidden, encoder = self.encoder.step(inputs, parts_of("encoder", parts))
        return self._outlook(inputs, torch.tanh(self.bottleneck(hidden))), prefixed(encoder, {})

    def step(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """One event [B, 2] → location of the next one [B, 1], and the state's parts after it."""
        outlook, after = self.look(inputs, parts)
        return outlook.location[:, :1], after

    def sequence(self, inputs: Tensor, parts: Parts, code_noise: Tensor | None = None) -> WaveformOutputs:
        """T events [T, B, 2], the state carried in and out. `code_noise` [T, B, code] is added to the code (training only)."""
        hidden, encoder = self.encoder.sequence(inputs, parts_of("encoder", parts))
        code = torch.tanh(self.bottleneck(hidden))
        if code_noise is not None:
            code = code + code_noise
        said = self._outlook(inputs, code)
        return WaveformOutputs(said.window.unsqueeze(2), said.location[..., :1], said.log_scale[..., :1], prefixed(encoder, {}), said)

    def _outlook(self, inputs: Tensor, code: Tensor) -> Outlook:
        location, log_scale = self.forecasts(code).split(len(HORIZONS), dim=-1)
        return Outlook(inputs[..., :1], self.window(code), location, log_scale.clamp(*LOG_SCALES))


class NoNetwork(nn.Module):
    """In the autoencoder's place where no network pays: every value is expected at its stream's mean, z = 0."""

    slots: tuple[Slot, ...] = ()

    def __init__(self, inputs: int, features: int, sizes: Sizes) -> None:
        super().__init__()
        self.inputs, self.features, self.sizes = inputs, features, sizes

    def fresh(self, rows: int) -> Parts:
        return {}

    def step(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        return torch.zeros_like(inputs[:, : self.features]), {}

    def sequence(self, inputs: Tensor, parts: Parts, code_noise: Tensor | None = None) -> Outputs:
        zeros = torch.zeros_like(inputs[:, :, : self.features])
        return Outputs(zeros.unsqueeze(-1).repeat(1, 1, 1, len(LAGS)), zeros, zeros, {})


Cells = Mapping[str, type[StandardCell]]


def encoder_of(inputs: int, sizes: Sizes, cells: Cells = CELLS) -> Network:
    """The encoder of a variant that has one. Raises KeyError for `none`."""
    cell = sizes.cell
    if cell == "bidirectional":
        return Bidirectional(inputs, sizes.hidden, sizes.layers)
    if cell == "convolutional":
        return Convolutional(inputs, sizes.hidden, sizes.layers)
    if cell == "memoryless":
        return Memoryless(inputs, sizes.hidden, sizes.layers)
    return Stack.of(cells[cell], inputs, sizes.hidden, sizes.layers)


def decoder_of(sizes: Sizes, cells: Cells = CELLS) -> Network:
    """Of the encoder's cell; of the standard cell where the encoder runs over a ring."""
    if sizes.cell == "memoryless":
        return Memoryless(sizes.code, sizes.decoder_hidden)
    return Stack.of(cells.get(sizes.cell, cells["standard"]), sizes.code, sizes.decoder_hidden)


def parts_of(prefix: str, parts: Parts) -> Parts:
    return {name.removeprefix(f"{prefix}_"): part for name, part in parts.items() if name.startswith(f"{prefix}_")}


def prefixed(encoder: Parts, decoder: Parts) -> Parts:
    return {f"encoder_{name}": part for name, part in encoder.items()} | {f"decoder_{name}": part for name, part in decoder.items()}
