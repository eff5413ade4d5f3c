"""The cell against its six equations in NumPy and against torch.nn.LSTM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from training.cells import CellState, Stack, StandardCell

Float64 = NDArray[np.float64]


def sigmoid(x: Float64) -> Float64:
    return np.asarray(1 / (1 + np.exp(-x)))


def six_equations(cell: StandardCell, x: Float64, h: Float64, c: Float64) -> tuple[Float64, Float64]:
    """Standard LSTM, one gate at a time, float64."""
    W_x, b = cell.from_input.weight.detach().numpy(), cell.from_input.bias.detach().numpy()
    W_h, H = cell.from_hidden.weight.detach().numpy(), cell.hidden_size
    raw = [x @ W_x[k * H : (k + 1) * H].T + h @ W_h[k * H : (k + 1) * H].T + b[k * H : (k + 1) * H] for k in range(4)]
    forget_gate, input_gate, output_gate, candidate = sigmoid(raw[0]), sigmoid(raw[1]), sigmoid(raw[2]), np.tanh(raw[3])
    c = forget_gate * c + input_gate * candidate
    return output_gate * np.tanh(c), c


def test_the_cell_follows_its_six_equations() -> None:
    torch.manual_seed(0)
    cell = StandardCell(5, 7).double()
    rng = np.random.default_rng(0)
    h, c = np.zeros((3, 7)), np.zeros((3, 7))
    state = CellState(torch.from_numpy(h), torch.from_numpy(c))
    for _ in range(50):
        x = 3 * rng.normal(size=(3, 5))
        h, c = six_equations(cell, x, h, c)
        state = cell.advance(cell.project(torch.from_numpy(x)), state)
        np.testing.assert_allclose(state.hidden_state.detach().numpy(), h, atol=1e-6)
        np.testing.assert_allclose(state.cell_state.detach().numpy(), c, atol=1e-6)


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


@pytest.mark.parametrize("layers", [1, 2])
def test_a_sequence_equals_its_steps_whatever_the_chunks(layers: int) -> None:
    torch.manual_seed(2)
    stack = Stack(3, 5, layers)
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
