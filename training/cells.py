"""The LSTM family, written out from its equations. A cell turns one input and its state into the next state.

    f = σ(W_f·[h, x] + b_f)     forget gate          C̃ = tanh(W_C·[h, x] + b_C)    candidate
    i = σ(W_i·[h, x] + b_i)     input gate           C' = f∗C + i∗C̃               cell state
    o = σ(W_o·[h, x] + b_o)     output gate          h' = o∗tanh(C')              hidden state

(Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000: the standard cell.) The variants change this much:

    peephole   the gates see the cell state: f, i = σ(… + p∗C), o = σ(… + p_o∗C')       Gers, Schraudolph & Schmidhuber 2002
    coupled    what is forgotten makes room for what enters: i = 1 - f                   CIFG in Greff et al. 2017

Shapes: T steps, B streams, I inputs, H hidden, G gates' width, L layers.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn


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
        hidden_state, cell_state = state
        H = self.hidden_size
        gates = projected + self.from_hidden(hidden_state)
        forget_gate, input_gate, output_gate = torch.split(torch.sigmoid(gates[:, : 3 * H]), H, dim=1)
        candidate = torch.tanh(gates[:, 3 * H :])
        cell_state = forget_gate * cell_state + input_gate * candidate
        hidden_state = output_gate * torch.tanh(cell_state)
        return CellState(hidden_state, cell_state)


class PeepholeCell(StandardCell):
    """Gates that see the cell state: forget and input gate the one before, the output gate the one after."""

    variant = "peephole"

    def _initialise(self) -> None:
        self.from_cell = nn.Parameter(torch.empty(3, self.hidden_size))  # diagonal weights of forget, input, output gate
        super()._initialise()

    def advance(self, projected: Tensor, state: CellState) -> CellState:
        hidden_state, cell_state = state
        H = self.hidden_size
        forget_raw, input_raw, output_raw, candidate_raw = torch.split(projected + self.from_hidden(hidden_state), H, dim=1)
        forget_gate = torch.sigmoid(forget_raw + self.from_cell[0] * cell_state)
        input_gate = torch.sigmoid(input_raw + self.from_cell[1] * cell_state)
        cell_state = forget_gate * cell_state + input_gate * torch.tanh(candidate_raw)
        output_gate = torch.sigmoid(output_raw + self.from_cell[2] * cell_state)
        return CellState(output_gate * torch.tanh(cell_state), cell_state)


class CoupledCell(StandardCell):
    """Coupled input and forget gate (CIFG): i = 1 - f. Its gates are in the order forget, output, candidate."""

    variant = "coupled"
    gates = 3

    def advance(self, projected: Tensor, state: CellState) -> CellState:
        hidden_state, cell_state = state
        H = self.hidden_size
        gates = projected + self.from_hidden(hidden_state)
        forget_gate, output_gate = torch.split(torch.sigmoid(gates[:, : 2 * H]), H, dim=1)
        candidate = torch.tanh(gates[:, 2 * H :])
        cell_state = candidate + forget_gate * (cell_state - candidate)
        return CellState(output_gate * torch.tanh(cell_state), cell_state)


CellName = Literal["standard", "peephole", "coupled"]
CELLS: dict[CellName, type[StandardCell]] = {"standard": StandardCell, "peephole": PeepholeCell, "coupled": CoupledCell}


class Stack(nn.Module):
    """L cells on top of each other. Its state is two tensors [B, L·H]: all hidden states, all cell states."""

    def __init__(self, input_size: int, hidden_size: int, layers: int = 1, cell: type[StandardCell] = StandardCell) -> None:
        super().__init__()
        self.hidden_size, self.layers = hidden_size, layers
        self.cells = nn.ModuleList([cell(input_size if i == 0 else hidden_size, hidden_size) for i in range(layers)])

    @property
    def variant(self) -> str:
        return str(self.cells[0].variant)

    @property
    def state_size(self) -> int:
        """Floats of each of the state's two tensors."""
        return self.layers * self.hidden_size

    def fresh(self, rows: int) -> CellState:
        parameter = next(self.parameters())
        return CellState(parameter.new_zeros(rows, self.state_size), parameter.new_zeros(rows, self.state_size))

    def step(self, inputs: Tensor, state: CellState) -> CellState:
        """One event: inputs [B, I]. The top layer's hidden state is `top(state)`."""
        before, after, value = self._layers_of(state), [], inputs
        for cell, layer_state in zip(self.cells, before, strict=True):
            advanced = cell.advance(cell.project(value), layer_state)  # type: ignore[operator]
            after.append(advanced)
            value = advanced.hidden_state
        return _joined(after)

    def sequence(self, inputs: Tensor, state: CellState) -> tuple[Tensor, CellState]:
        """Many events: inputs [T, B, I] → the top layer's hidden states [T, B, H] and the last state."""
        last, values = [], inputs
        for cell, layer_state in zip(self.cells, self._layers_of(state), strict=True):
            projected, outputs, current = cell.project(values), [], layer_state  # type: ignore[operator]
            for step in projected.unbind(0):
                current = cell.advance(step, current)  # type: ignore[operator]
                outputs.append(current.hidden_state)
            values = torch.stack(outputs)
            last.append(current)
        return values, _joined(last)

    def top(self, state: CellState) -> Tensor:
        """The top layer's hidden state [B, H]."""
        return state.hidden_state[:, -self.hidden_size :]

    def _layers_of(self, state: CellState) -> list[CellState]:
        if self.layers == 1:
            return [state]
        hidden, cell = (torch.split(part, self.hidden_size, dim=1) for part in state)
        return [CellState(h, c) for h, c in zip(hidden, cell, strict=True)]


def _joined(states: list[CellState]) -> CellState:
    if len(states) == 1:
        return states[0]
    return CellState(torch.cat([s.hidden_state for s in states], dim=1), torch.cat([s.cell_state for s in states], dim=1))
