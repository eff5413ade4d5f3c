"""Sessions of a small made-up service: five lines in order, one of them optional, with gaps and a duration."""

from __future__ import annotations

import numpy as np

from training.autoencoder import Sizes
from training.logfit import LogPlan
from training.sessions import Session, Sessions

OPEN, READ, WRITE, CACHE, CLOSE = 1, 2, 3, 4, 5
TEMPLATES = ["open <*>", "read <*>", "write <*> in <NUM> ms", "cache hit", "close"]
END = len(TEMPLATES) + 1
TINY = Sizes(hidden=6, layers=1, code=3, decoder_hidden=5)
QUICK = LogPlan(steps=15, lines=400, folds=2)


def session(codes: list[int], rng: np.random.Generator, name: str = "s", ended: bool = True) -> Session:
    """Gaps of about a second, before a read ten; a write takes 50 ms."""
    T = len(codes)
    gaps = np.where(np.array(codes) == READ, 10.0, 1.0) * np.exp(0.2 * rng.normal(size=T))
    gaps[0] = np.nan
    numbers = np.full((T, 4), np.nan, np.float32)
    numbers[:, 0] = np.where(np.array(codes) == WRITE, 50.0 * np.exp(0.1 * rng.normal(size=T)), np.nan)
    return Session(name, np.array(codes, np.int64), gaps.astype(np.float32), numbers, ended)


def normal(rng: np.random.Generator) -> list[int]:
    """Open, two or three reads, always two writes, now and then a hit of the cache in between, close."""
    reads = [READ] * int(rng.integers(2, 4))
    return [OPEN, *reads, *([CACHE] if rng.random() < 0.3 else []), WRITE, WRITE, CLOSE]


def sessions(count: int = 400, seed: int = 0) -> Sessions:
    rng = np.random.default_rng(seed)
    return Sessions([session(normal(rng), rng, f"s{i}") for i in range(count)], TEMPLATES, "0" * 64)


def one_host(lines: int = 3000) -> Sessions:
    """A stream that never ends."""
    rng = np.random.default_rng(0)
    codes: list[int] = []
    while len(codes) < lines:
        codes += normal(rng)
    return Sessions([session(codes, rng, "host", ended=False)], TEMPLATES, "0" * 64)
