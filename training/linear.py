"""A linear forecast of a single feature from its last LAGS values, beside the network: in a short history few numbers learn more than many.

    history ─► z of each value and of the LAGS before it ─► ridge regression, its strength by the error on the later rows ─► P + 1 numbers

It is fitted in one go, without a seed, and the step keeps nothing for it but those values. What it says judges one signal (`linear`);
what is expected of a stream, and its band, is the network's.
Shapes: T rows, B lanes, P = LAGS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.data import Float32, Float64
from training.layout import Keeps, Slot

Bool = NDArray[np.bool_]
LAGS = 8
"""As good a forecast as 16 or 32 give (LOG.md), and one reading far off is among them for fewer events than an alert takes to close."""
RIDGES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Of the mean square of what is regressed on."""
LATER = 0.15
"""Of a lane's rows: those that say which ridge is best."""
SETTLED = 60
"""First rows of a lane, whose z are of a deviation still unknown."""


class LinearForecast(nn.Module):
    """The last P values in z [B, P], the newest first, are its part of the state: zeros, the mean, in a fresh stream."""

    slots = (Slot("past", LAGS, Keeps.ROWS),)
    weights: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(LAGS, 1))
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, past: Tensor) -> Tensor:
        """Past [B, P] → the next z [1, B]."""
        return torch.addmm(self.offset, past, self.weights).t()

    def after(self, z: Tensor, present: Tensor, past: Tensor) -> Tensor:
        """The past after z [1, B], present [1, B] bool. A missing value is the last one."""
        newest, before = past[:, :1], past[:, :-1]
        return torch.cat([torch.where(present.t(), z.t(), newest), before], dim=1)

    @torch.no_grad()
    def fit(self, z: Float32, present: Bool, rows: Sequence[int]) -> None:
        """From z and present [T, B], of whose lanes so many rows count. Each lane weighs the same, however long it is."""
        grams, moments, squares = np.zeros((2, LAGS + 1, LAGS + 1)), np.zeros((2, LAGS + 1)), 0.0  # of the earlier and the later rows
        for lane, count in enumerate(rows):
            past, ahead = _pairs(z[:count, lane], present[:count, lane])
            first = min(SETTLED, count // 4)
            split = max(first, int(count * (1 - LATER)))
            for part, (start, stop) in enumerate(((first, split), (split, count))):
                known = present[start + 1 : stop, lane]
                x, y = past[start : stop - 1][known], ahead[start : stop - 1][known]
                grams[part] += x.T @ x / max(len(x), 1)
                moments[part] += x.T @ y / max(len(x), 1)
                squares += part * float(y @ y) / max(len(x), 1)

        def error(ridge: float) -> float:
            weights = _solved(grams[0], moments[0], ridge)
            return float(squares - 2 * weights @ moments[1] + weights @ grams[1] @ weights)

        weights = torch.from_numpy(_solved(grams.sum(axis=0), moments.sum(axis=0), min(RIDGES, key=error)))
        self.weights.copy_(weights[:-1, None])
        self.offset.copy_(weights[-1:])


def _pairs(z: Float32, present: Bool) -> tuple[Float64, Float64]:
    """Of z [T]: what is known after each row but the last, and 1 [T - 1, P + 1]; the z of the row behind it [T - 1]."""
    row = np.maximum.accumulate(np.where(present, np.arange(1, len(z) + 1), 0))  # of the newest value that was not missing
    newest = np.concatenate([np.zeros(1), z.astype(np.float64)])[row]
    padded = np.concatenate([np.zeros(LAGS - 1), newest])
    past = np.lib.stride_tricks.sliding_window_view(padded, LAGS)[:-1, ::-1]
    return np.concatenate([past, np.ones((len(past), 1))], axis=1), z[1:].astype(np.float64)


def _solved(gram: Float64, moment: Float64, ridge: float) -> Float64:
    weights: Float64 = np.linalg.solve(gram + (ridge * np.trace(gram) / len(gram) + 1e-12) * np.eye(len(gram)), moment)
    return weights
