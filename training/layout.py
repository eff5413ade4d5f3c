"""The state vector's named slices: how S opaque floats become the parts of a detector and back.

    state [B, S]  ──split──►  {"mean": [B, F], "encoder_hidden": [B, L·H], ...}  ──join──►  state [B, S]

A fresh stream's state is zeros, so every part is stored in a form whose "nothing seen yet" is zero. What is learned of a stream
stays as it was when learning is frozen or the reading is missing; `join` sees to that, so the parts themselves need not.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Slice name → [B, size]."""


class Keeps(enum.Enum):
    """When a slot keeps its old values."""

    NEVER = "running"  # follows every event
    FEATURE = "feature"  # [B, F]: where the feature is missing, and when learning is frozen
    STREAM = "stream"  # when no feature has a value, and when learning is frozen


@dataclass(frozen=True)
class Slot:
    """A named part of the state: `size` float32."""

    name: str
    size: int
    keeps: Keeps = Keeps.NEVER


class Layout:
    """The order of the slots of a whole detector: running ones first, then those learned per feature, then per stream."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        everything = tuple(slots)
        self._groups = {keeps: tuple(slot for slot in everything if slot.keeps is keeps) for keeps in Keeps}
        self.slots = tuple(slot for group in self._groups.values() for slot in group)
        self.size = sum(slot.size for slot in self.slots)

    def split(self, state: Tensor) -> Parts:
        pieces = torch.split(state, [slot.size for slot in self.slots], dim=1)
        return dict(zip([slot.name for slot in self.slots], pieces, strict=True))

    def join(self, before: Tensor, after: Parts, learns: Tensor) -> Tensor:
        """The state after an event: `before` [B, S] where `learns` [B, F] bool says that nothing may be learned."""
        running, feature, stream = (self._gather(after, keeps) for keeps in Keeps)
        first, second = running.shape[1], running.shape[1] + feature.shape[1]
        F = learns.shape[1]
        if F == 1:
            learned = torch.where(learns, torch.cat([feature, stream], dim=1), before[:, first:])
            return torch.cat([running, learned], dim=1)
        masks = learns.repeat(1, feature.shape[1] // F)
        any_learns = learns.any(dim=1, keepdim=True)
        feature = torch.where(masks, feature, before[:, first:second])
        return torch.cat([running, feature, torch.where(any_learns, stream, before[:, second:])], dim=1)

    def _gather(self, parts: Parts, keeps: Keeps) -> Tensor:
        return torch.cat([parts[slot.name] for slot in self._groups[keeps]], dim=1)


def row_sum(values: Tensor) -> Tensor:
    """Σ over the columns of [B, N] as [B, 1], by a product with ones: unlike a row sum, the same wherever in the batch a row lies."""
    return values @ torch.ones(values.shape[1], 1)


def hinges(knots_x: Iterable[float], knots_y: Iterable[float], last_slope: float) -> tuple[list[float], list[float], float]:
    """A piecewise linear function as Σ relu(x - knot)·bend + start: (knots, bends, start). Flat left of the first knot.

    Padded with idle knots to a multiple of four: ONNX Runtime's row sums of other widths depend on where in the batch a row lies.
    """
    x, y = list(knots_x), list(knots_y)
    slopes = [(y[i + 1] - y[i]) / max(x[i + 1] - x[i], 1e-6) for i in range(len(x) - 1)] + [last_slope]
    bends = [slope - before for slope, before in zip(slopes, [0.0, *slopes[:-1]], strict=True)]
    idle = -len(x) % 4
    return x + [0.0] * idle, bends + [0.0] * idle, y[0]
