"""What counting knows of sessions, as constants of the graph: which lines follow each other, and how often each comes in one session.

Lines are counted in K classes: the new pattern, the commonest templates each by itself, all other templates, the end of the session.

    transitions   log-chance of the next line's class after a class: a 2-gram table, what it never saw by Good and Turing's estimate
    prototypes    which counts normal sessions have. A session's distance to them is in nats, so as a likelihood:
                      0 where a prototype has the same counts, else base + the least Σ of the weights of the classes that differ

`base` is how rare a new combination of counts is, by those that came once. A class weighs more, the fewer normal combinations there are
that differ in it alone: how often a block was read varies from one to the next, how often it was written does not. While a session goes
on, only counts that are too large differ, at its end also those that are too small. Counts are exact up to 8, then in steps of a fifth.

Where streams never end, nothing is counted. There `usual` and `spread` say how rare lines ordinarily are: many in a row that are rarer are
a run (`training.logs.Counts`), though each of them by itself may come.
Shapes: N sessions, V templates, K classes, M prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.artifact import NEW
from training.data import Float64
from training.sessions import Ints, Session

CLASSES, PROTOTYPES = 64, 256
MOST = 1024
"""Counts are counted up to here."""
LEAST_SPREAD = 0.25
"""Nats."""
_EDGES = (*range(1, 9), *(int(step * 2**octave) for octave in range(3, 10) for step in (1.25, 1.5, 1.75, 2.0)))
BINS: Ints = np.searchsorted(_EDGES, np.arange(MOST + 1), side="right").astype(np.int64)
"""Count → its bin."""


@dataclass(frozen=True)
class Counting:
    """Fitted by `count`."""

    classes: Ints  # [V + 2] of each code
    within: Float64  # [V + 2] log-chance of the code in its class
    transitions: Float64  # [K + 1, K]; the last row is after nothing
    prototypes: Ints  # [M, K] bins of counts; none where streams never end
    weights: Float64  # [K] nats
    base: float  # nats
    usual: float  # nats of a line by `transitions` and `within`: the mean over the sessions
    spread: float  # and their standard deviation

    @property
    def width(self) -> int:
        return len(self.weights)

    @property
    def worth(self) -> Float64:
        """[K] 0 to 1: what the surprise at a line of each class is worth. What normal sessions have or do not have may come anywhere."""
        return self.weights / self.weights.max() if len(self.prototypes) else np.ones(self.width)


def count(sessions: Sequence[Session], codes: int) -> Counting:
    """`codes` = V + 2."""
    seen = np.bincount(np.concatenate([session.codes for session in sessions]), minlength=codes).astype(np.float64)
    classes = _classes(seen)
    K = int(classes.max()) + 1
    within = np.log(_share(seen + 0.5, classes, K))
    prototypes, weights, base = _combinations([session for session in sessions if session.first and session.ended], classes, K)
    transitions = _transitions(sessions, classes, K)
    return Counting(classes, within, transitions, prototypes, weights, base, *_ordinary(sessions, classes, within, transitions))


def _classes(seen: Float64) -> Ints:
    templates = len(seen) - 2
    alone = min(templates, CLASSES - (2 if templates <= CLASSES - 2 else 3))
    classes = np.full(templates + 2, alone + 1)
    common = 1 + np.argsort(-seen[1:-1], kind="stable")[:alone]
    classes[np.sort(common)] = np.arange(1, alone + 1)
    classes[NEW], classes[-1] = 0, alone + (2 if templates > alone else 1)
    return classes


def _share(seen: Float64, classes: Ints, K: int) -> Float64:
    return np.asarray(seen / np.bincount(classes, weights=seen, minlength=K)[classes])


def _transitions(sessions: Sequence[Session], classes: Ints, K: int) -> Float64:
    counts = np.zeros((K + 1, K))
    for session in sessions:
        met = with_end(session, len(classes))[: None if session.ended else -1]
        of = classes[met]
        if session.first:
            counts[K, of[0]] += 1
        np.add.at(counts, (of[:-1], of[1:]), 1)
    total, unseen = counts.sum(axis=1, keepdims=True), counts == 0
    # Good and Turing: what comes next for the first time has the weight of what came once.
    escape = np.where(unseen.any(axis=1, keepdims=True), ((counts == 1).sum(axis=1, keepdims=True) + 0.5) / (total + 1), 0.0)
    escape = np.where(total == 0, 1.0, escape)
    overall = (counts[:K].sum(axis=0) + 0.5) * unseen
    rest = overall / np.maximum(overall.sum(axis=1, keepdims=True), 1e-9)
    return np.asarray(np.log(np.where(unseen, escape * rest, (1 - escape) * counts / np.maximum(total, 1)) + 1e-12))


def _ordinary(sessions: Sequence[Session], classes: Ints, within: Float64, transitions: Float64) -> tuple[float, float]:
    """Mean and standard deviation of the nats of lines whose line before is known."""
    nats = [-transitions[classes[one.codes[:-1]], classes[one.codes[1:]]] - within[one.codes[1:]] for one in sessions if len(one) > 1]
    every = np.concatenate(nats) if nats else np.zeros(1)
    return float(every.mean()), max(float(every.std()), LEAST_SPREAD)


def with_end(session: Session, codes: int) -> Ints:
    """Its codes and behind them the end's."""
    return np.append(session.codes, codes - 1)


def counts_of(session: Session, classes: Ints, K: int) -> Ints:
    """Lines of each class before each line and at the end [T + 1, K]."""
    counted = np.zeros((len(session) + 1, K), np.int64)
    counted[np.arange(1, len(session) + 1), classes[session.codes]] = 1
    return np.asarray(np.minimum(np.cumsum(counted, axis=0), MOST))


def _combinations(sessions: Sequence[Session], classes: Ints, K: int) -> tuple[Ints, Float64, float]:
    """The commonest combinations of counts [M, K], weights [K], base."""
    if not sessions:
        return np.zeros((0, K), np.int64), np.zeros(K), 0.0
    whole = np.stack([np.bincount(classes[session.codes], minlength=K) for session in sessions])
    combinations, times = np.unique(BINS[np.minimum(whole, MOST)], axis=0, return_counts=True)
    kept = combinations[np.argsort(-times, kind="stable")[:PROTOTYPES]]
    base = float(np.log((len(sessions) + 1) / ((times == 1).sum() + 1)))
    return kept, _weights(kept), base


def _weights(combinations: Ints) -> Float64:
    """-log of the share of combinations [M, K] that have a neighbour from which they differ in this class alone."""
    differs = combinations[:, None, :] != combinations[None]  # [M, M, K]
    alone = (differs.sum(axis=2, keepdims=True) == 1) & differs
    return np.asarray(-np.log((alone.any(axis=1).sum(axis=0) + 0.3) / (len(combinations) + 1.0)))
