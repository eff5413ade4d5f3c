"""The LSTM autoencoder, running continuously: encoder → code → decoder, one event at a time, never reset.

    inputs_TBI ─► encoder LSTM ─► code = tanh(W·h) ─► decoder LSTM ─┬► location, log-scale of the NEXT event (per feature)
                                                                     └► reconstruction of the events 0, 1, 3, 7, 15, 31 steps back

The narrow code must carry what is regular of the recent past; the reconstruction of the lags trains it to. What a stream's
next event is expected to be is the decoder's location. Shapes: T steps, B streams, F features, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.cells import CELLS, CellName, CellState, Stack
from training.layout import Parts, Slot

LAGS = (0, 1, 3, 7, 15, 31)


@dataclass(frozen=True)
class Sizes:
    """What the network is made of."""

    hidden: int = 32
    layers: int = 1
    code: int = 8
    decoder_hidden: int = 16
    cell: CellName = "standard"


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
    encoder: CellState
    decoder: CellState


class Autoencoder(nn.Module):
    """`inputs` numbers an event in, `features` forecasts out."""

    def __init__(self, inputs: int, features: int, sizes: Sizes) -> None:
        super().__init__()
        self.inputs, self.features, self.sizes = inputs, features, sizes
        cell = CELLS[sizes.cell]
        self.encoder = Stack(inputs, sizes.hidden, sizes.layers, cell)
        self.bottleneck = nn.Linear(sizes.hidden, sizes.code)
        self.decoder = Stack(sizes.code, sizes.decoder_hidden, cell=cell)
        self.heads = Forecast(sizes.decoder_hidden, features)

    @property
    def slots(self) -> tuple[Slot, ...]:
        encoder, decoder = self.encoder.state_size, self.decoder.state_size
        return (
            Slot("encoder_hidden", encoder),
            Slot("encoder_cell", encoder),
            Slot("decoder_hidden", decoder),
            Slot("decoder_cell", decoder),
        )

    def step(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """One event [B, I] → location of the next one [B, F], and the state's parts after it."""
        encoder = self.encoder.step(inputs, CellState(parts["encoder_hidden"], parts["encoder_cell"]))
        code = torch.tanh(self.bottleneck(self.encoder.top(encoder)))
        decoder = self.decoder.step(code, CellState(parts["decoder_hidden"], parts["decoder_cell"]))
        location = self.heads.location(self.decoder.top(decoder))
        after = {
            "encoder_hidden": encoder.hidden_state,
            "encoder_cell": encoder.cell_state,
            "decoder_hidden": decoder.hidden_state,
            "decoder_cell": decoder.cell_state,
        }
        return location, after

    def sequence(self, inputs: Tensor, encoder: CellState, decoder: CellState, code_noise: Tensor | None = None) -> Outputs:
        """T events [T, B, I], the states carried in and out. `code_noise` [T, B, code] is added to the code (training only)."""
        hidden, encoder = self.encoder.sequence(inputs, encoder)
        code = torch.tanh(self.bottleneck(hidden))
        if code_noise is not None:
            code = code + code_noise
        decoded, decoder = self.decoder.sequence(code, decoder)
        lags = self.heads.lags(decoded).unflatten(-1, (self.features, len(LAGS)))
        return Outputs(lags, self.heads.location(decoded), self.heads.log_scale(decoded), encoder, decoder)
