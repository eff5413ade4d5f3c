"""Cells run over a stream, one event at a time; the state between two events is named tensors [B, size].

    Stack           L cells on top of each other
    Bidirectional   a stack forwards, and one cell backwards over a ring of the last R events (latency-controlled: Zhang et al. 2016)
    Convolutional   a stack of convolutional cells whose positions are that ring
    Memoryless      a perceptron of the newest event: what an LSTM has to beat

No network looks ahead: what is backward of an event are the events that came before it, read from the newest to the oldest.
Shapes: T steps, B streams, I inputs, H hidden, L layers, R positions of the ring, E numbers an event in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.cells import CellState, ConvolutionalCell, StandardCell
from training.layout import Parts

RING = 16
"""Events in a ring."""
EMBEDDED = 8
"""Numbers each of them is reduced to: the ring's share of a stream's state is RING · EMBEDDED floats."""


class Network(nn.Module, ABC):
    """Inputs [B, I] and a state → output [B, output_size] and the next state."""

    output_size: int
    sizes: dict[str, int]
    """Floats of each part of the state."""

    @abstractmethod
    def step(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        """One event [B, I]."""

    @abstractmethod
    def sequence(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        """Many events [T, B, I] → outputs [T, B, output_size] and the last state: what as many steps would give."""

    def fresh(self, rows: int) -> Parts:
        parameter = next(self.parameters())
        return {name: parameter.new_zeros(rows, size) for name, size in self.sizes.items()}


class Stack(Network):
    """Cells on top of each other. Its state is all their hidden states and all their cell states, [B, L·H] each."""

    def __init__(self, cells: Sequence[StandardCell | ConvolutionalCell]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.output_size = cells[-1].hidden_size
        self.sizes = dict.fromkeys(("hidden", "cell"), len(cells) * self.output_size)

    @classmethod
    def of(cls, cell: type[StandardCell], input_size: int, hidden_size: int, layers: int = 1) -> Stack:
        return cls([cell(hidden_size if i else input_size, hidden_size) for i in range(layers)])

    def step(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        before, after, value = self._layers_of(state), [], inputs
        for cell, layer_state in zip(self.cells, before, strict=True):
            after.append(cell.step(value, layer_state))  # type: ignore[operator]
            value = after[-1].hidden_state
        return value, _joined(after)

    def sequence(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        last, values = [], inputs
        for cell, layer_state in zip(self.cells, self._layers_of(state), strict=True):
            values, after = cell.run(values, layer_state)  # type: ignore[operator]
            last.append(after)
        return values, _joined(last)

    def _layers_of(self, state: Parts) -> list[CellState]:
        if len(self.cells) == 1:
            return [CellState(state["hidden"], state["cell"])]
        hidden, cell = (torch.split(state[name], self.output_size, dim=1) for name in ("hidden", "cell"))
        return [CellState(h, c) for h, c in zip(hidden, cell, strict=True)]


def _joined(states: list[CellState]) -> Parts:
    if len(states) == 1:
        return {"hidden": states[0].hidden_state, "cell": states[0].cell_state}
    hidden, cell = zip(*states, strict=True)
    return {"hidden": torch.cat(hidden, dim=1), "cell": torch.cat(cell, dim=1)}


class Ring(nn.Module):
    """The last R events, each reduced to E numbers, the newest last: [B, R·E]. Before the first event there are zeros."""

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(input_size, EMBEDDED)

    def step(self, inputs: Tensor, ring: Tensor) -> Tensor:
        return torch.cat([ring[:, EMBEDDED:], self.embed(inputs)], dim=1)

    def sequence(self, inputs: Tensor, ring: Tensor) -> Tensor:
        """[T, B, I] → all events an output of these T may look at [R - 1 + T, B, E]: those of event t are rows t to t + R - 1."""
        before = ring.reshape(-1, RING, EMBEDDED).transpose(0, 1)[1:]
        return torch.cat([before, self.embed(inputs)])

    def last(self, events: Tensor) -> Tensor:
        """The ring after the last of `events` [R - 1 + T, B, E]."""
        return events[-RING:].transpose(0, 1).flatten(1)


class Bidirectional(Network):
    """A stack forwards, never reset, beside one cell that reads the ring backwards anew at each event. Output [forward, backward]."""

    def __init__(self, input_size: int, hidden_size: int, layers: int = 1) -> None:
        super().__init__()
        self.forwards = Stack.of(StandardCell, input_size, hidden_size, layers)
        self.ring = Ring(input_size)
        self.backwards = StandardCell(EMBEDDED, hidden_size)
        self.output_size = 2 * hidden_size
        self.sizes = {**self.forwards.sizes, "ring": RING * EMBEDDED}

    def step(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        onward, after = self.forwards.step(inputs, state)
        ring = self.ring.step(inputs, state["ring"])
        projected = self.backwards.project(ring.reshape(-1, RING, EMBEDDED))
        backward = self._read(list(projected.unbind(1)))
        return torch.cat([onward, backward], dim=1), {**after, "ring": ring}

    def sequence(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        onward, after = self.forwards.sequence(inputs, state)
        events = self.ring.sequence(inputs, state["ring"])
        T, B, _ = inputs.shape
        projected = self.backwards.project(events)
        backward = self._read([projected[k : k + T].flatten(0, 1) for k in range(RING)])
        return torch.cat([onward, backward.reshape(T, B, -1)], dim=2), {**after, "ring": self.ring.last(events)}

    def _read(self, oldest_first: list[Tensor]) -> Tensor:
        """The backward cell's last hidden state, from the newest to the oldest of R projected events [rows, G]."""
        zeros = oldest_first[0].new_zeros(oldest_first[0].shape[0], self.backwards.hidden_size)
        state = CellState(zeros, zeros)
        for projected in reversed(oldest_first):
            state = self.backwards.advance(projected, state)
        return state.hidden_state


class Convolutional(Network):
    """Convolutional cells with hidden_size // 4 channels along the ring's positions. Output: all channels at all positions."""

    def __init__(self, input_size: int, hidden_size: int, layers: int = 1) -> None:
        super().__init__()
        channels = max(1, hidden_size // 4)
        self.ring = Ring(input_size)
        self.cells = Stack([ConvolutionalCell(channels if i else EMBEDDED, channels, RING) for i in range(layers)])
        self.output_size = self.cells.output_size
        self.sizes = {**self.cells.sizes, "ring": RING * EMBEDDED}

    def step(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        ring = self.ring.step(inputs, state["ring"])
        rows = ring.reshape(-1, RING, EMBEDDED).transpose(1, 2).flatten(1)
        output, after = self.cells.step(rows, state)
        return output, {**after, "ring": ring}

    def sequence(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        events = self.ring.sequence(inputs, state["ring"])
        rows = events.unfold(0, RING, 1).flatten(2)  # [T, B, E, R] → [T, B, E·R]
        outputs, after = self.cells.sequence(rows, state)
        return outputs, {**after, "ring": self.ring.last(events)}


class Memoryless(Network):
    """L layers of tanh over the newest event alone."""

    def __init__(self, input_size: int, hidden_size: int, layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden_size if i else input_size, hidden_size) for i in range(layers)])
        self.output_size, self.sizes = hidden_size, {}

    def step(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        value = inputs
        for layer in self.layers:
            value = torch.tanh(layer(value))
        return value, {}

    def sequence(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        return self.step(inputs, state)
