"""The cells against their equations in NumPy, in PyTorch and in ONNX Runtime, and against torch.nn.LSTM."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.cells import CELLS, CellName, CellState, PeepholeCell, Stack, StandardCell
from training.verify import session_of

Float64 = NDArray[np.float64]


def sigmoid(x: Float64) -> Float64:
    return np.asarray(1 / (1 + np.exp(-x)))


class Weights:
    """A cell's weights by gate, as the literature names them: raw(gate) = W·x + U·h + b, in float64."""

    def __init__(self, cell: StandardCell, order: tuple[str, ...]) -> None:
        H = cell.hidden_size
        self._rows = {gate: slice(k * H, (k + 1) * H) for k, gate in enumerate(order)}
        self._W, self._U, self._b = (
            part.detach().double().numpy() for part in (cell.from_input.weight, cell.from_hidden.weight, cell.from_input.bias)
        )

    def raw(self, gate: str, x: Float64, h: Float64) -> Float64:
        rows = self._rows[gate]
        return np.asarray(x @ self._W[rows].T + h @ self._U[rows].T + self._b[rows])


def standard(cell: StandardCell, x: Float64, h: Float64, c: Float64) -> tuple[Float64, Float64]:
    """Hochreiter & Schmidhuber 1997, Gers et al. 2000: six equations."""
    weights = Weights(cell, ("f", "i", "o", "c"))
    f = sigmoid(weights.raw("f", x, h))
    i = sigmoid(weights.raw("i", x, h))
    candidate = np.tanh(weights.raw("c", x, h))
    c = f * c + i * candidate
    o = sigmoid(weights.raw("o", x, h))
    return o * np.tanh(c), c


def peephole(cell: StandardCell, x: Float64, h: Float64, c: Float64) -> tuple[Float64, Float64]:
    """Gers, Schraudolph & Schmidhuber 2002: the output gate sees the new cell state."""
    assert isinstance(cell, PeepholeCell)
    weights = Weights(cell, ("f", "i", "o", "c"))
    p_f, p_i, p_o = cell.from_cell.detach().double().numpy()
    f = sigmoid(weights.raw("f", x, h) + p_f * c)
    i = sigmoid(weights.raw("i", x, h) + p_i * c)
    c = f * c + i * np.tanh(weights.raw("c", x, h))
    o = sigmoid(weights.raw("o", x, h) + p_o * c)
    return o * np.tanh(c), c


def coupled(cell: StandardCell, x: Float64, h: Float64, c: Float64) -> tuple[Float64, Float64]:
    """Greff et al. 2017, CIFG: i = 1 - f."""
    weights = Weights(cell, ("f", "o", "c"))
    f = sigmoid(weights.raw("f", x, h))
    c = f * c + (1 - f) * np.tanh(weights.raw("c", x, h))
    o = sigmoid(weights.raw("o", x, h))
    return o * np.tanh(c), c


Oracle = Callable[[StandardCell, Float64, Float64, Float64], tuple[Float64, Float64]]
ORACLES: dict[CellName, Oracle] = {"standard": standard, "peephole": peephole, "coupled": coupled}


def oracle_sequence(stack: Stack, oracle: Oracle, x: Float64) -> Float64:
    """The top layer's hidden states of x [T, B, I], layer by layer."""
    values = x
    for cell in stack.cells:
        assert isinstance(cell, StandardCell)
        h = c = np.zeros((x.shape[1], cell.hidden_size))
        outputs = []
        for row in values:
            h, c = oracle(cell, row, h, c)
            outputs.append(h)
        values = np.stack(outputs)
    return values


def test_every_cell_has_an_oracle() -> None:
    assert set(ORACLES) == set(CELLS) == set(get_args(CellName))
    assert all(cell.variant == name for name, cell in CELLS.items())


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_stack_follows_the_equations_of_its_cell(name: CellName, layers: int) -> None:
    torch.manual_seed(0)
    stack = Stack(5, 7, layers, CELLS[name]).double()
    x = 3 * np.random.default_rng(0).normal(size=(50, 3, 5))
    outputs, _ = stack.sequence(torch.from_numpy(x), stack.fresh(3))
    np.testing.assert_allclose(outputs.detach().numpy(), oracle_sequence(stack, ORACLES[name], x), atol=1e-6, rtol=0)


class OneStep(nn.Module):
    """A stack's step with plain tensors, for the exporter."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, inputs: Tensor, hidden_state: Tensor, cell_state: Tensor) -> tuple[Tensor, Tensor]:
        after = self.stack.step(inputs, CellState(hidden_state, cell_state))
        return after.hidden_state, after.cell_state


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", CELLS)
def test_onnx_runtime_follows_the_equations_event_by_event(name: CellName) -> None:
    torch.manual_seed(0)
    stack = Stack(5, 7, 2, CELLS[name])
    example = (torch.zeros(4, 5), torch.zeros(4, stack.state_size), torch.zeros(4, stack.state_size))
    program = torch.onnx.export(OneStep(stack), example, dynamo=True, dynamic_shapes=({0: torch.export.Dim("B")},) * 3, verbose=False)
    assert program is not None
    session = session_of(program.model_proto.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    x = 3 * np.random.default_rng(0).normal(size=(50, 3, 5))
    wanted = oracle_sequence(stack, ORACLES[name], x)
    hidden = cell = np.zeros((3, stack.state_size), np.float32)
    for row, want in zip(x.astype(np.float32), wanted, strict=True):
        hidden, cell = session.run(None, dict(zip(names, (row, hidden, cell), strict=True)))
        np.testing.assert_allclose(hidden[:, -7:], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_stack_equals_torchs_own_lstm(layers: int) -> None:
    torch.manual_seed(1)
    stack = Stack(4, 6, layers).double()
    reference = nn.LSTM(4, 6, layers).double()
    with torch.no_grad():
        for i, cell in enumerate(stack.cells):
            assert isinstance(cell, StandardCell)
            # torch orders the gates input, forget, candidate, output; ours forget, input, output, candidate.
            for name, ours in (
                ("weight_ih", cell.from_input.weight),
                ("weight_hh", cell.from_hidden.weight),
                ("bias_ih", cell.from_input.bias),
            ):
                forget, enter, output, candidate = ours.chunk(4)
                getattr(reference, f"{name}_l{i}").copy_(torch.cat([enter, forget, candidate, output]))
            getattr(reference, f"bias_hh_l{i}").zero_()
    x = torch.randn(20, 3, 4, dtype=torch.float64)
    ours, state = stack.sequence(x, stack.fresh(3))
    theirs, (h, c) = reference(x)
    assert torch.allclose(ours, theirs, atol=1e-9)
    assert torch.allclose(state.hidden_state, h.transpose(0, 1).flatten(1), atol=1e-9)
    assert torch.allclose(state.cell_state, c.transpose(0, 1).flatten(1), atol=1e-9)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_sequence_equals_its_steps_whatever_the_chunks(name: CellName, layers: int) -> None:
    torch.manual_seed(2)
    stack = Stack(3, 5, layers, CELLS[name])
    x = torch.randn(12, 2, 3)
    whole, last = stack.sequence(x, stack.fresh(2))
    first, carried = stack.sequence(x[:7], stack.fresh(2))
    second, ended = stack.sequence(x[7:], carried)
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-6)
    state = stack.fresh(2)
    for i in range(12):
        state = stack.step(x[i], state)
        assert torch.allclose(stack.top(state), whole[i], atol=1e-6)
    assert torch.allclose(state.cell_state, last.cell_state, atol=1e-6)
    assert torch.allclose(ended.cell_state, last.cell_state, atol=1e-6)
