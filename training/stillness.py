"""Which sensors of a machine have brought nothing new for improbably long: missing, or standing still. Figures: LOG.md, "Dead sensors".

    run       events in a row in which a feature was missing, or in a row in which it was what it was before
    usual     what of both has been seen, of this stream and of the fleet's history
    overdue   a run of twice the usual, LEAST events at least, is as improbable as it was in the history (`fit`), a longer one the more

A run is told once, as an onset. While learning is frozen it stays overdue for as long as it lasts; where learning goes on (no alert, or an
accepted one) it is known from then on. What a run has reached is learned when it ends. A feature that a stream has never had is not missed,
and one that has never moved there is not expected to: of all valves and switches of a fleet some are never used.
Shapes: B streams, F features, the batch is the last axis; of two kinds of runs the first is of missing values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.data import Float32, Float64, pieces
from training.layout import Parts, Slot
from training.normaliser import Normalised

LEAST = 10.0
"""Events of the shortest run that may be overdue: as many as end an anomaly."""
SPAN, STEPS, KNOWN = 4096, 64, 2048
"""A feature's float is SPAN·(STEPS·level + level) + run, and KNOWN if the run is, negative while a value is missing: exact in float32."""
PER_OCTAVE = 4.0
"""Levels: a run of n events is of level PER_OCTAVE·log2(n + 1), rounded up."""
NEVER = 1000.0
"""A level that no run reaches."""
UNUSUAL = 0.9
"""Share of the fleet's streams whose longest run is usual for all: one of ten may be dead."""
HAIR = 1e-4
"""Of a logarithm: where integers meet, all runtimes shall round alike."""
YOUNG = 100
"""Values of a feature before which its mean and deviation move too much to say that it stands still."""
ROUNDED = 1e-6
"""Of z, ten times what float32 loses of it near 0."""
ALIKE = 10.0
"""Deviations, by the normaliser's memory in events, between values that are the same to a settled stream: of `_same` at z = 1.2."""


@dataclass(frozen=True)
class Runs:
    """Of one event, all [F, B]."""

    length: Tensor  # with this event, 0 where a feature brought something new
    log_length: Tensor  # natural logarithm where a run goes on, else 0
    missing: Tensor  # bool: what the run is of
    moved: Tensor  # bool: the feature has had different values in this stream
    known: Tensor  # bool: it goes on, was told before, and learning was not frozen since
    levels: tuple[Tensor, Tensor]  # the longest of this stream's runs that are over, of missing values and of the same ones

    def packed(self, known: Tensor) -> Tensor:
        """As the state keeps them."""
        runs = (SPAN * STEPS) * self.levels[0] + SPAN * self.levels[1] + torch.where(known, self.length + KNOWN, self.length)
        return torch.where(self.missing, -runs, runs)

    def signed(self) -> Float32:
        """Lengths [B, F], negative where values are missing."""
        return torch.where(self.missing, -self.length, self.length).t().numpy()


@dataclass(frozen=True)
class Overdue:
    features: Tensor  # [F, B] 1 where overdue
    log_p: Tensor  # [B] natural logarithm; 0 where nothing is overdue
    parts: Parts  # after the event


class Stillness(nn.Module):
    """Before `fit` nothing is overdue."""

    usual: Tensor
    log_rate: Tensor

    def __init__(self, scored: Sequence[bool], memory: float) -> None:
        """`memory` of the normaliser, in events."""
        super().__init__()
        self.scored, self.memory = np.array(scored), memory
        self.register_buffer("usual", torch.full((2, len(scored), 1), NEVER))  # levels, fitted
        self.register_buffer("log_rate", torch.zeros(2, len(scored), 1))  # of runs of twice the usual, an event, fitted

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot("still", len(self.scored)),)

    def follow(self, event: Normalised, parts: Parts, learns: Tensor) -> tuple[Runs, Parts]:
        """Runs with this event; learns [B] bool."""
        packed = parts["still"]
        size = packed.abs()
        both = torch.floor(size * (1 / SPAN))
        first = torch.floor(both * (1 / STEPS))
        held, was_missing = size - SPAN * both, packed < 0
        was_known = held >= KNOWN
        next_one = torch.where(was_known, held - (KNOWN - 1), held + 1)
        missing, same = event.known & ~event.present, event.present & self._same(event, parts)
        still = missing | same
        goes_on = still & ~(missing ^ was_missing)
        log_next = torch.log(next_one)  # where a run is over, of one more than it was
        length = torch.where(goes_on, next_one, still.to(size.dtype)).clamp(max=KNOWN - 1)
        reached = torch.where(learns & ~goes_on, _level(log_next), 0.0)
        of_missing = torch.maximum(first, torch.where(was_missing, reached, 0.0))
        of_same = torch.maximum(both - STEPS * first, torch.where(was_missing, 0.0, reached))
        moved = parts["variance"] > 0
        runs = Runs(length, torch.where(goes_on, log_next, 0.0), missing, moved, goes_on & was_known, (of_missing, of_same))
        return runs, {"still": runs.packed(runs.known)}

    def _same(self, event: Normalised, parts: Parts) -> Tensor:
        """Whether a value is the last one but for what mean and deviation have learned of that since.

        That moves z by rate·tanh|z|·(1 + |sinh²z - 1|/2) where nothing is clipped, and less elsewhere: below the parabola at any z.
        """
        rate, size = torch.reciprocal(parts["seen"]).clamp(min=1 / self.memory), event.z.abs()
        return ((event.z - parts["previous_z"]).abs() <= rate * size * (2.5 * size + 1.6) + ROUNDED) & (parts["seen"] >= YOUNG)

    def overdue(self, runs: Runs, judges: Tensor, learns: Tensor, alpha: Tensor) -> Overdue:
        """What is improbable at alpha [B], of streams that are judged by now [1, B] bool."""
        usual, log_rate = (torch.where(runs.missing, fitted[0], fitted[1]) for fitted in (self.usual, self.log_rate))
        level = torch.maximum(torch.where(runs.missing, runs.levels[0], runs.levels[1]), usual)
        twice = (level * (math.log(2) / PER_OCTAVE) + math.log(2)).clamp(min=math.log(LEAST))
        # The chance falls with the square of the length: the tail of runs that come in bursts, not of those that come by themselves.
        log_p = log_rate - 2 * (runs.log_length - twice)
        asked = torch.log(alpha.clamp(1e-12, 1.0)) - HAIR
        over = (runs.log_length >= twice - HAIR) & (log_p < asked) & judges & ~runs.known & (runs.missing | runs.moved)
        least = torch.where(over, log_p, 0.0).amin(0)
        return Overdue(over.to(log_p.dtype), least, {"still": runs.packed(runs.known | (over & learns))})

    @torch.no_grad()
    def fit(self, runs: Float32, lengths: Sequence[int], longest_ever: Float32 | None = None) -> None:
        """From runs [T, B, F] of different streams, of `lengths` rows: negative where values are missing, as `signed` gives them.

        Of streams that go on beyond these rows `longest_ever` [2, B, F] are the longest of each kind, 0 where unknown.
        """
        B, F = runs.shape[1:]
        longest_ever = np.zeros((2, B, F), np.float32) if longest_ever is None else longest_ever
        inside = np.arange(len(runs))[:, None, None] < np.array(lengths)[:, None]
        exposure, number = float(max(1, inside.sum())), 2 * int(self.scored.sum())
        for kind, sign in enumerate((-1, 1)):
            own = np.where(inside, np.maximum(sign * runs, 0), 0).astype(np.float32)
            longest = np.maximum(own.max(axis=0), longest_ever[kind])  # [B, F]
            others = np.stack([_usual(np.delete(longest, b, axis=0)) for b in range(B)])
            # As often as it happens to a stream of which the other streams are all that is known.
            told = _told(own, others)
            if sign > 0:
                told &= ~_since_the_first(own)
            found = told[YOUNG:].sum(axis=(0, 1))
            usual = np.where(self.scored, _levels(_usual(longest)), NEVER)
            self.usual[kind, :, 0] = torch.from_numpy(usual).float()
            self.log_rate[kind, :, 0] = torch.from_numpy(np.log(np.minimum(number * (found + 0.5) / exposure, 1.0))).float()


def longest_runs(x: Float32, alike: Float64) -> Float32:
    """The longest runs in x [T, F] of a stream as [2, F]: missing once there was a value, and not `alike` [F] away from the one before.

    Reads a piece at a time: `x` may be a file's.
    """
    F = x.shape[1]
    run, longest, ever, before = np.zeros((2, F)), np.zeros((2, F)), np.zeros((1, F), bool), np.full((1, F), np.nan)
    for piece in pieces(x):
        present = np.isfinite(piece)
        seen = np.logical_or.accumulate(np.concatenate([ever, present]))
        same = np.abs(np.diff(np.concatenate([before, piece]), axis=0)) <= alike
        row = np.arange(len(piece), dtype=np.float64)[:, None]
        for kind, still in enumerate((~present & seen[:-1], same)):
            ended = np.maximum.accumulate(np.where(still, -1.0, row))  # the last row that was not of a run
            runs = row - ended + np.where(ended < 0, run[kind], 0)
            longest[kind], run[kind] = np.maximum(longest[kind], runs.max(axis=0)), runs[-1]
        before, ever = piece[-1:], seen[-1:]
    return np.minimum(longest, KNOWN - 1).astype(np.float32)


def _level(log_next: Tensor) -> Tensor:
    """The level of runs, from the logarithms of one event more."""
    return torch.ceil(log_next * (PER_OCTAVE / math.log(2)) - 0.01)


def _levels(run: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(np.ceil(PER_OCTAVE * np.log2(run.astype(np.float64) + 1) - 0.01))


def _usual(longest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the longest runs [B, F] of streams what is usual for all of them [F]."""
    if len(longest) == 0:
        return np.zeros(longest.shape[1], np.float32)
    return np.asarray(np.quantile(longest, UNUSUAL, axis=0, method="lower"))


def _since_the_first(runs: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where runs [T, B, F] go on since the first row."""
    rows = np.minimum(np.arange(len(runs)), KNOWN - 1)[:, None, None]
    return np.asarray(np.logical_and.accumulate(runs == rows, axis=0))


def _told(runs: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where runs [T, B, F] become twice what is usual: what was of others [B, F], and of the stream's own that were over by then."""
    before = np.concatenate([np.zeros_like(runs[:1]), runs[:-1]])
    over = np.where(runs > before, 0, before)
    usual = np.maximum(np.maximum.accumulate(over, axis=0), others)
    twice = np.maximum(2 * 2 ** (_levels(usual) / PER_OCTAVE), LEAST)
    return np.asarray((runs >= twice) & (before < twice))
