"""Copies of states: what is kept is what is taken, nobody gets another stream's, and memory is bounded."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from service.copies import Copies
from service.state import LEARNER, Rows, StateCodec

CODEC = StateCodec(features=2, state_size=3, model=7)


def states(versions: list[int]) -> Rows:
    rows = CODEC.fresh(len(versions))
    rows["version"], rows["vector"] = versions, np.array(versions)[:, None]
    return rows


def taken(copies: Copies, stream_ids: list[str]) -> dict[str, int]:
    """Stream → version of its copy, of those that have one."""
    places = copies.find(stream_ids)
    here = np.flatnonzero(places >= 0)
    rows = CODEC.fresh(len(stream_ids))
    copies.take(places[here], rows, here)
    return {stream_ids[i]: int(rows["version"][i]) for i in here.tolist()}


def test_the_last_kept_state_is_taken_and_a_dropped_one_is_gone() -> None:
    copies = Copies(CODEC, 100 * CODEC.bytes)
    copies.keep(["a", "b", "c"], states([1, 2, 3]))
    copies.keep(["b"], states([5]))
    copies.drop(["c", "unknown"])
    assert taken(copies, ["a", "b", "c", "d"]) == {"a": 1, "b": 5}


def test_a_state_with_a_learner_is_not_kept_and_its_older_copy_is_dropped() -> None:
    copies = Copies(CODEC, 100 * CODEC.bytes)
    copies.keep(["a", "b"], states([1, 2]))
    rows = states([3, 4])
    rows["flags"][0] = LEARNER
    copies.keep(["a", "b"], rows)
    assert taken(copies, ["a", "b"]) == {"b": 4}


def test_without_memory_nothing_is_kept() -> None:
    copies = Copies(CODEC, 0)
    copies.keep(["a"], states([1]))
    assert taken(copies, ["a"]) == {}


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8)), max_size=30))
def test_a_copy_is_always_the_last_kept_state_of_its_own_stream(room: int, turns: list[tuple[bool, list[str]]]) -> None:
    copies, last, version = Copies(CODEC, room * CODEC.bytes), dict[str, int](), 0
    for kept, streams in turns:
        if kept:
            versions = list(range(version + 1, version + 1 + len(streams)))
            version += len(streams)
            copies.keep(streams, states(versions))
            last |= dict(zip(streams, versions, strict=True))
        else:
            copies.drop(streams)
            last = {stream: v for stream, v in last.items() if stream not in streams}
        assert taken(copies, list("abcdefgh")).items() <= last.items()
        assert len(copies) <= room
        if kept:
            assert bool(taken(copies, streams)) == bool(streams)
