"""The state vector's named slices: how S opaque floats become the parts of a detector and back.

    state [B, S]  ──split──►  {"mean": [F, B], "encoder_hidden": [B, L·H], ...}  ──join──►  state [B, S]

Inside, the batch is the LAST axis: slices are then contiguous, and a scalar of each stream meets a table of constants a row at a time.
With rows of 3 or 12 numbers ONNX Runtime takes several times as long. Only the network's parts stay rows, as its products want them.

A fresh stream's state is zeros, so every part is stored in a form whose "nothing seen yet" is zero. What is learned of a stream
stays as it was when learning is frozen or the reading is missing; `join` sees to that, so the parts themselves need not, except
those that keep themselves (`Keeps.ITSELF`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Slice name → [size, B]; those of `Keeps.ROWS` [B, size]."""
LEARNED = "learned"
"""Under this name `split` also gives all slots that `join` keeps, as one piece [n, B]."""


class Keeps(enum.Enum):
    """When a slot keeps its old values. Members are in the order of the state."""

    ROWS = "rows"  # follows every event; the network's and a waveform's rings, [B, size]
    NEVER = "running"  # follows every event
    ITSELF = "itself"  # when its part says so
    FEATURE = "feature"  # [n·F, B]: where the feature is missing, and when learning is frozen
    STREAM = "stream"  # when no feature has a value, and when learning is frozen


@dataclass(frozen=True)
class Slot:
    """A named part of the state: `size` float32."""

    name: str
    size: int
    keeps: Keeps = Keeps.NEVER


class Layout:
    """The order of the slots of a whole detector: group by group as in `Keeps`."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        everything = tuple(slots)
        self._groups = {keeps: tuple(slot for slot in everything if slot.keeps is keeps) for keeps in Keeps}
        self.slots = tuple(slot for group in self._groups.values() for slot in group)
        self.size = sum(slot.size for slot in self.slots)

    def split(self, state: Tensor) -> Parts:
        """State [B, S] → its parts."""
        rows, kept = self._groups[Keeps.ROWS], (*self._groups[Keeps.FEATURE], *self._groups[Keeps.STREAM])
        running = (*self._groups[Keeps.NEVER], *self._groups[Keeps.ITSELF])
        rest = self.size - _size(rows)
        *row_parts, columns = torch.split(state, [*(slot.size for slot in rows), rest], dim=1)
        *parts, learned = torch.split(columns.t(), [*(slot.size for slot in running), _size(kept)])
        kept_parts = torch.split(learned, [slot.size for slot in kept])
        pieces = (*row_parts, *parts, *kept_parts)
        return {LEARNED: learned, **dict(zip([slot.name for slot in (*rows, *running, *kept)], pieces, strict=True))}

    def join(self, before: Parts, after: Parts, learns: Tensor) -> Tensor:
        """The state [B, S] after an event; of `before` remains what may not be learned, where `learns` [F, B] bool says so."""
        kept = self._kept(before[LEARNED], after, learns)
        running = [after[slot.name] for keeps in (Keeps.NEVER, Keeps.ITSELF) for slot in self._groups[keeps]]
        columns = torch.cat([*running, *kept]).t()
        return torch.cat([*(after[slot.name] for slot in self._groups[Keeps.ROWS]), columns], dim=1)

    def _kept(self, before: Tensor, after: Parts, learns: Tensor) -> list[Tensor]:
        feature, stream = ([after[slot.name] for slot in self._groups[keeps]] for keeps in (Keeps.FEATURE, Keeps.STREAM))
        F = learns.shape[0]
        if F == 1:
            return [torch.where(learns, torch.cat([*feature, *stream]), before)]
        of_features, of_stream = torch.split(before, [_size(self._groups[keeps]) for keeps in (Keeps.FEATURE, Keeps.STREAM)])
        masks = learns.repeat(of_features.shape[0] // F, 1)
        any_learns = any_of(learns)
        return [torch.where(masks, torch.cat(feature), of_features), torch.where(any_learns, torch.cat(stream), of_stream)]


def _size(slots: Iterable[Slot]) -> int:
    return sum(slot.size for slot in slots)


def any_of(marked: Tensor) -> Tensor:
    """Whether any feature of bool [F, B] is, as [1, B]; by a product with ones: `any` becomes a ReduceMax, several times slower."""
    return marked if marked.shape[0] == 1 else torch.ones(1, marked.shape[0]) @ marked.to(torch.float32) > 0.5


def row_sum(values: Tensor) -> Tensor:
    """Σ over the columns of [B, N] as [B, 1], by a product with ones: unlike a row sum, the same wherever in the batch a row lies."""
    return values @ torch.ones(values.shape[1], 1)


def hinges(knots_x: Iterable[float], knots_y: Iterable[float], last_slope: float) -> tuple[list[float], list[float], float]:
    """A piecewise linear function as Σ relu(x - knot)·bend + start: (knots, bends, start). Flat left of the first knot."""
    x, y = list(knots_x), list(knots_y)
    slopes = [(y[i + 1] - y[i]) / max(x[i + 1] - x[i], 1e-6) for i in range(len(x) - 1)] + [last_slope]
    bends = [slope - before for slope, before in zip(slopes, [0.0, *slopes[:-1]], strict=True)]
    return x, bends, y[0]
