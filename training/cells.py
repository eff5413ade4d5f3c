"""The LSTM family, written out from its equations. A cell turns one input and its state into the next state.

    f = σ(W_f·[h, x] + b_f)     forget gate          C̃ = tanh(W_C·[h, x] + b_C)    candidate
    i = σ(W_i·[h, x] + b_i)     input gate           C' = f∗C + i∗C̃               cell state
    o = σ(W_o·[h, x] + b_o)     output gate          h' = o∗tanh(C')              hidden state

(Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000: the standard cell.) The variants change this much:

    peephole   the gates see the cell state: f, i = σ(… + p∗C), o = σ(… + p_o∗C')       Gers, Schraudolph & Schmidhuber 2002
    coupled    what is forgotten makes room for what enters: i = 1 - f                   CIFG in Greff et al. 2017
    convolutional   x, h and C are rows of R positions; W∗x and W∗h are convolutions along them, peepholes as above   Shi et al. 2015

How cells are stacked, and run over a ring of recent events, is in `training.networks`.
Shapes: T steps, B streams, I inputs, H hidden, G gates' width; of a convolutional cell also E input channels, C channels, R positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class CellState(NamedTuple):
    """What a cell hands to its own next step."""

    hidden_state: Tensor  # [B, H]
    cell_state: Tensor  # [B, H]


class Cell(Protocol):
    """What callers need of any member of the family; another variant is another class of this shape."""

    variant: str
    input_size: int
    hidden_size: int

    def project(self, inputs: Tensor) -> Tensor:
        """The inputs' share of the gates: [..., I] → [..., G]. Known for a whole sequence at once."""
        ...

    def advance(self, projected: Tensor, state: CellState) -> CellState:
        """One step from the projected input [B, G] and the state before."""
        ...

    def step(self, inputs: Tensor, state: CellState) -> CellState:
        """The same from the input [B, I] itself, as it is served."""
        ...

    def run(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        """Many events [T, B, I], as they are trained on → hidden states [T, B, H] and the last state."""
        ...


def advanced(cell: Cell, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
    """`run` of any cell: its `advance`, event by event."""
    outputs = []
    for projected in cell.project(inputs).unbind(0):
        state = cell.advance(projected, state)
        outputs.append(state.hidden_state)
    return torch.stack(outputs), state


class StandardCell(nn.Module):
    """The standard LSTM cell. Its gates are one matrix, in the order forget, input, output, candidate."""

    variant = "standard"
    gates = 4

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.from_input = nn.Linear(input_size, self.gates * hidden_size)
        self.from_hidden = nn.Linear(hidden_size, self.gates * hidden_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        with torch.no_grad():
            self.from_input.bias[: self.hidden_size] += 1.0  # remember at first (Jozefowicz et al. 2015)

    def project(self, inputs: Tensor) -> Tensor:
        projected: Tensor = self.from_input(inputs)
        return projected

    def advance(self, projected: Tensor, state: CellState) -> CellState:
        gates = projected + self.from_hidden(state.hidden_state)
        open_raw, candidate_raw = torch.split(gates, [(self.gates - 1) * self.hidden_size, self.hidden_size], dim=1)
        return self.opened(torch.sigmoid(open_raw), torch.tanh(candidate_raw), state.cell_state)

    def step(self, inputs: Tensor, state: CellState) -> CellState:
        """`advance` of inputs [B, I] in fewer operators: two products, each with its activation."""
        joined, H = torch.cat([inputs, state.hidden_state], dim=1), self.hidden_size
        weight, bias = torch.cat([self.from_input.weight, self.from_hidden.weight], dim=1), self.from_input.bias
        gates = torch.sigmoid(functional.linear(joined, weight[:-H], bias[:-H]))
        return self.opened(gates, torch.tanh(functional.linear(joined, weight[-H:], bias[-H:])), state.cell_state)

    def run(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        return advanced(self, inputs, state)

    def opened(self, gates: Tensor, candidate: Tensor, cell_state: Tensor) -> CellState:
        """The next state from open gates [B, (G - 1)·H], without the candidate, and the candidate [B, H]."""
        forget_gate, input_gate, output_gate = torch.split(gates, self.hidden_size, dim=1)
        cell_state = forget_gate * cell_state + input_gate * candidate
        return CellState(output_gate * torch.tanh(cell_state), cell_state)


class FusedCell(StandardCell):
    """The standard cell, a sequence by PyTorch's own LSTM: the same answers in a quarter of the time, gradients rounded otherwise.

    On a GPU, cuDNN's: an eleventh of the time. It stays in float32 where the rest of the network is in bfloat16.
    """

    def run(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        weights = [self._in_torchs_order(part) for part in (self.from_input.weight, self.from_hidden.weight, self.from_input.bias)]
        weights.append(torch.zeros_like(weights[-1]))  # torch has a bias of its own for what comes from the hidden state
        before = (state.hidden_state.unsqueeze(0), state.cell_state.unsqueeze(0))
        weights = _in_one_piece(weights)
        with torch.autocast(inputs.device.type, enabled=False):  # bfloat16 would round the cell state at every event
            inputs = inputs.to(weights[0].dtype)
            outputs, hidden, cell = torch.lstm(inputs, before, weights, True, 1, 0.0, self.training, False, False)
        return outputs, CellState(hidden[0], cell[0])

    def _in_torchs_order(self, gates: Tensor) -> Tensor:
        """Rows of forget, input, output gate and candidate → of input, forget gate, candidate, output gate."""
        forget_gate, input_gate, output_gate, candidate = gates.chunk(4)
        return torch.cat([input_gate, forget_gate, candidate, output_gate])


def _in_one_piece(weights: Sequence[Tensor]) -> list[Tensor]:
    """Views of one tensor: cuDNN would copy them together at every call, and warn of it."""
    whole = torch.cat([weight.flatten() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(torch.split(whole, [weight.numel() for weight in weights]), weights, strict=True)]


class PeepholeCell(StandardCell):
    """Gates that see the cell state: forget and input gate the one before, the output gate the one after."""

    variant = "peephole"

    def _initialise(self) -> None:
        self.from_cell = nn.Parameter(torch.empty(3, self.hidden_size))  # diagonal weights of forget, input, output gate
        super()._initialise()

    def advance(self, projected: Tensor, state: CellState) -> CellState:
        return _peephole(projected + self.from_hidden(state.hidden_state), state.cell_state, self.from_cell)

    def step(self, inputs: Tensor, state: CellState) -> CellState:
        return self.advance(self.project(inputs), state)


def _peephole(gates: Tensor, cell_state: Tensor, from_cell: Tensor) -> CellState:
    """Gates [B, 4H] without the peepholes' share, in the order forget, input, output, candidate; from_cell [3, H]."""
    forget_raw, input_raw, output_raw, candidate_raw = torch.split(gates, cell_state.shape[1], dim=1)
    forget_gate = torch.sigmoid(forget_raw + from_cell[0] * cell_state)
    input_gate = torch.sigmoid(input_raw + from_cell[1] * cell_state)
    cell_state = forget_gate * cell_state + input_gate * torch.tanh(candidate_raw)
    output_gate = torch.sigmoid(output_raw + from_cell[2] * cell_state)
    return CellState(output_gate * torch.tanh(cell_state), cell_state)


class CoupledCell(StandardCell):
    """Coupled input and forget gate (CIFG): i = 1 - f. Its gates are in the order forget, output, candidate."""

    variant = "coupled"
    gates = 3

    def opened(self, gates: Tensor, candidate: Tensor, cell_state: Tensor) -> CellState:
        forget_gate, output_gate = torch.split(gates, self.hidden_size, dim=1)
        cell_state = candidate + forget_gate * (cell_state - candidate)
        return CellState(output_gate * torch.tanh(cell_state), cell_state)


class ConvolutionalCell(nn.Module):
    """ConvLSTM along R positions. To others a cell like any: inputs [.., E·R], hidden size C·R, gates [.., 4·C·R]."""

    variant = "convolutional"
    width = 3

    def __init__(self, input_channels: int, channels: int, positions: int) -> None:
        super().__init__()
        self.input_channels, self.channels, self.positions = input_channels, channels, positions
        self.input_size, self.hidden_size = input_channels * positions, channels * positions
        self.from_input = nn.Conv1d(input_channels, 4 * channels, self.width, padding=self.width // 2)
        self.from_hidden = nn.Conv1d(channels, 4 * channels, self.width, padding=self.width // 2, bias=False)
        self.from_cell = nn.Parameter(torch.empty(3, channels * positions))  # weights of forget, input, output gate
        bound = 1 / math.sqrt(channels * self.width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.from_input.bias is not None:
            with torch.no_grad():
                self.from_input.bias[:channels] += 1.0

    def project(self, inputs: Tensor) -> Tensor:
        rows = inputs.reshape(-1, self.input_channels, self.positions)
        convolved: Tensor = self.from_input(rows)
        return convolved.reshape(*inputs.shape[:-1], 4 * self.hidden_size)

    def advance(self, projected: Tensor, state: CellState) -> CellState:
        hidden_state, cell_state = state
        convolved = self.from_hidden(hidden_state.reshape(-1, self.channels, self.positions)).flatten(1)
        return _peephole(projected + convolved, cell_state, self.from_cell)

    def step(self, inputs: Tensor, state: CellState) -> CellState:
        return self.advance(self.project(inputs), state)

    def run(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        return advanced(self, inputs, state)


CELLS: dict[str, type[StandardCell]] = {"standard": StandardCell, "peephole": PeepholeCell, "coupled": CoupledCell}
FAST_CELLS = CELLS | {"standard": FusedCell}
"""For all but the univariate network: the shipped default's recorded command must go on giving its weights to the last bit."""
