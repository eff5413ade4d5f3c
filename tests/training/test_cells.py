"""The cells against their equations in NumPy, in PyTorch and in ONNX Runtime, and against torch.nn.LSTM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.detector import session_of
from training.autoencoder import Sizes, Variant, encoder_of
from training.cells import CELLS, ConvolutionalCell, FusedCell, PeepholeCell, StandardCell
from training.networks import EMBEDDED, RING, Bidirectional, Convolutional, Memoryless, Network, Ring, Stack

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
ORACLES: dict[str, Oracle] = {"standard": standard, "peephole": peephole, "coupled": coupled}


def stacked(oracle: Oracle, cells: Iterable[nn.Module], x: Float64) -> Float64:
    """The top layer's hidden states of x [T, B, I], layer by layer."""
    values = x
    for cell in cells:
        assert isinstance(cell, StandardCell)
        h = c = np.zeros((x.shape[1], cell.hidden_size))
        outputs = []
        for row in values:
            h, c = oracle(cell, row, h, c)
            outputs.append(h)
        values = np.stack(outputs)
    return values


def rings(ring: Ring, x: Float64) -> Float64:
    """The last R events as each event sees them, oldest first, zeros before the first: [T, B, R, E]."""
    W, b = (part.detach().double().numpy() for part in (ring.embed.weight, ring.embed.bias))
    events = np.concatenate([np.zeros((RING - 1, x.shape[1], EMBEDDED)), x @ W.T + b])
    return np.stack([events[t : t + RING].transpose(1, 0, 2) for t in range(len(x))])


def bidirectional(network: Network, x: Float64) -> Float64:
    """Zhang et al. 2016: forwards without end, backwards from the newest event over what is at hand, from a fresh state."""
    assert isinstance(network, Bidirectional)
    cell, backwards = network.backwards, []
    for window in rings(network.ring, x):
        h = c = np.zeros((x.shape[1], cell.hidden_size))
        for position in reversed(range(RING)):
            h, c = standard(cell, window[:, position], h, c)
        backwards.append(h)
    return np.concatenate([stacked(standard, network.forwards.cells, x), np.stack(backwards)], axis=2)


def convolve(weight: Float64, rows: Float64) -> Float64:
    """Weight [O, I, 3] along the last axis of rows [B, I, R], zeros beyond both ends."""
    R = rows.shape[2]
    padded = np.pad(rows, ((0, 0), (0, 0), (1, 1)))
    return np.stack([np.einsum("oik,bik->bo", weight, padded[:, :, r : r + 3]) for r in range(R)], axis=2)


def convolutional(network: Network, x: Float64) -> Float64:
    """Shi et al. 2015, along the ring."""
    assert isinstance(network, Convolutional)
    values = [window.transpose(0, 2, 1) for window in rings(network.ring, x)]  # [B, E, R]
    for cell in network.cells.cells:
        assert isinstance(cell, ConvolutionalCell)
        assert cell.from_input.bias is not None
        C, R = cell.channels, cell.positions
        W, U, b, P = (
            part.detach().double().numpy()
            for part in (cell.from_input.weight, cell.from_hidden.weight, cell.from_input.bias, cell.from_cell)
        )
        p_f, p_i, p_o = P.reshape(3, C, R)
        h = c = np.zeros((x.shape[1], C, R))
        outputs = []
        for rows in values:
            raw = convolve(W, rows) + convolve(U, h) + b[:, None]
            f, i = sigmoid(raw[:, :C] + p_f * c), sigmoid(raw[:, C : 2 * C] + p_i * c)
            c = f * c + i * np.tanh(raw[:, 3 * C :])
            o = sigmoid(raw[:, 2 * C : 3 * C] + p_o * c)
            h = o * np.tanh(c)
            outputs.append(h)
        values = outputs
    return np.stack([h.reshape(len(h), -1) for h in values])


def memoryless(network: Network, x: Float64) -> Float64:
    assert isinstance(network, Memoryless)
    for layer in network.layers:
        x = np.tanh(x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy())  # type: ignore[operator]
    return x


def expected(network: Network, variant: Variant, x: Float64) -> Float64:
    """What the literature's equations say of x [T, B, I]."""
    others = {"bidirectional": bidirectional, "convolutional": convolutional, "memoryless": memoryless}
    if variant in others:
        return others[variant](network, x)
    assert isinstance(network, Stack)
    return stacked(ORACLES[variant], network.cells, x)


FAMILY: tuple[Variant, ...] = ("standard", "peephole", "coupled", "bidirectional", "convolutional", "memoryless")
INPUTS = 5


def network_of(variant: Variant, layers: int) -> Network:
    torch.manual_seed(0)
    return encoder_of(INPUTS, Sizes(hidden=12, layers=layers, cell=variant))


def inputs(T: int, seed: int = 0) -> Float64:
    return 3 * np.random.default_rng(seed).normal(size=(T, 3, INPUTS))


def test_the_whole_family_is_held_to_its_equations() -> None:
    assert {*FAMILY, "none"} == set(get_args(Variant))
    assert set(ORACLES) == set(CELLS)


@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("layers", [1, 3])
def test_a_network_follows_its_equations(variant: Variant, layers: int) -> None:
    network = network_of(variant, layers).double()
    x = inputs(50)
    outputs, _ = network.sequence(torch.from_numpy(x), network.fresh(3))
    np.testing.assert_allclose(outputs.detach().numpy(), expected(network, variant, x), atol=1e-6, rtol=0)


class OneStep(nn.Module):
    """A network's step with one plain tensor for its state, for the exporter."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        sizes = self.network.sizes
        parts = dict(zip(sizes, torch.split(state, [*sizes.values()], dim=1), strict=True))
        output, after = self.network.step(inputs, parts)
        return output, torch.cat([after[name] for name in sizes], dim=1) if sizes else state


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("variant", FAMILY)
def test_onnx_runtime_follows_the_equations_event_by_event(variant: Variant) -> None:
    network = network_of(variant, 2)
    S = sum(network.sizes.values())
    rows = {0: torch.export.Dim("B")}
    example = (torch.zeros(4, INPUTS), torch.zeros(4, S))
    program = torch.onnx.export(OneStep(network), example, dynamo=True, dynamic_shapes=(rows, rows), verbose=False)
    assert program is not None
    session = session_of(program.model_proto.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]
    x = inputs(50)
    state = np.zeros((3, S), np.float32)
    for row, wanted in zip(x, expected(network, variant, x), strict=True):
        output, state = session.run(None, dict(zip(names, (row.astype(np.float32), state), strict=True)))
        np.testing.assert_allclose(output, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_stack_equals_torchs_own_lstm(layers: int) -> None:
    torch.manual_seed(1)
    stack = Stack.of(StandardCell, 4, 6, layers).double()
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
    outputs, state = stack.sequence(x, stack.fresh(3))
    theirs, (h, c) = reference(x)
    assert torch.allclose(outputs, theirs, atol=1e-9)
    assert torch.allclose(state["hidden"], h.transpose(0, 1).flatten(1), atol=1e-9)
    assert torch.allclose(state["cell"], c.transpose(0, 1).flatten(1), atol=1e-9)


@pytest.mark.parametrize("layers", [1, 2])
def test_fused_cells_answer_a_sequence_with_the_same_numbers_and_learn_the_same_from_it(layers: int) -> None:
    torch.manual_seed(2)
    plain, fused = (Stack.of(cell, INPUTS, 12, layers) for cell in (StandardCell, FusedCell))
    fused.load_state_dict(plain.state_dict())
    x, state = torch.from_numpy(inputs(40)).float(), {name: torch.randn(3, size) for name, size in plain.sizes.items()}
    (wanted, last), (got, ended) = (stack.sequence(x, state) for stack in (plain, fused))
    assert torch.allclose(got, wanted, atol=1e-6)
    assert all(torch.allclose(ended[name], last[name], atol=1e-6) for name in last)
    for outputs in (wanted, got):
        outputs.square().sum().backward()  # type: ignore[no-untyped-call]
    for theirs, ours in zip(plain.parameters(), fused.parameters(), strict=True):
        assert theirs.grad is not None
        assert ours.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    output, _ = fused.step(x[0], state)
    assert torch.allclose(output, wanted[0], atol=1e-6)


def test_fused_cells_keep_their_cell_state_in_float32_where_products_are_in_bfloat16() -> None:
    torch.manual_seed(2)
    fused = Stack.of(FusedCell, INPUTS, 12)
    x = torch.from_numpy(inputs(10)).float()
    with torch.autocast("cpu", torch.bfloat16):
        _, after = fused.sequence(x, fused.fresh(3))
    assert after["cell"].dtype == torch.float32


@pytest.mark.parametrize("variant", FAMILY)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("first", [1, 7, RING + 4])
def test_a_sequence_equals_its_steps_whatever_the_chunks(variant: Variant, layers: int, first: int) -> None:
    network = network_of(variant, layers)
    x = torch.from_numpy(inputs(RING + 10)).float()
    whole, last = network.sequence(x, network.fresh(3))
    one, carried = network.sequence(x[:first], network.fresh(3))
    two, ended = network.sequence(x[first:], carried)
    assert torch.allclose(torch.cat([one, two]), whole, atol=1e-6)
    state = network.fresh(3)
    for row, wanted in zip(x, whole, strict=True):
        output, state = network.step(row, state)
        assert torch.allclose(output, wanted, atol=1e-6)
    for name, size in network.sizes.items():
        assert last[name].shape == (3, size)
        assert torch.allclose(state[name], last[name], atol=1e-6)
        assert torch.allclose(ended[name], last[name], atol=1e-6)
