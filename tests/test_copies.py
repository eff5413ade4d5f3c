"""Copies of states: what is kept is what is taken, nobody gets another stream's, and memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from service.copies import LEARNERS_PART, Copies
from service.state import LEARNER, Rows, StateCodec

CODEC = StateCodec(features=2, state_size=3, model=7)


def states(versions: list[int], learning: Sequence[bool] = ()) -> Rows:
    rows = CODEC.fresh(len(versions))
    rows["version"], rows["vector"] = versions, np.array(versions)[:, None]
    if len(learning):
        rows["flags"][learning] = LEARNER
        rows["learner"][learning] = -rows["vector"][learning]
    return rows


def taken(copies: Copies, stream_ids: list[str]) -> dict[str, int]:
    """Stream → version of its copy, of those that have one."""
    places = copies.find(stream_ids)
    here = np.flatnonzero(places >= 0)
    rows = CODEC.fresh(len(stream_ids))
    copies.take(places[here], rows, here)
    assert (rows["learner"] == np.where(rows["flags"][:, None] & LEARNER, -rows["vector"], 0)).all()
    return {stream_ids[i]: int(rows["version"][i]) for i in here.tolist()}


def test_the_last_kept_state_is_taken_and_a_dropped_one_is_gone() -> None:
    copies = Copies(CODEC, 100 * CODEC.bytes)
    copies.keep(["a", "b", "c"], states([1, 2, 3]))
    copies.keep(["b"], states([5]))
    copies.drop(["c", "unknown"])
    assert taken(copies, ["a", "b", "c", "d"]) == {"a": 1, "b": 5}


def test_a_state_with_a_learner_is_kept_whole_and_one_that_has_none_any_more_without_it() -> None:
    copies = Copies(CODEC, 100 * CODEC.bytes)
    copies.keep(["a", "b"], states([1, 2]))
    copies.keep(["a", "b"], states([3, 4], [True, False]))
    assert taken(copies, ["a", "b"]) == {"a": 3, "b": 4}
    copies.keep(["b", "a"], states([5, 6], [True, False]))
    assert taken(copies, ["a", "b"]) == {"a": 6, "b": 5}
    assert len(copies) == 2


def test_without_memory_nothing_is_kept() -> None:
    copies = Copies(CODEC, 0)
    copies.keep(["a"], states([1]))
    assert taken(copies, ["a"]) == {}


Turn = tuple[bool, list[tuple[str, bool]]]
TURNS = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), unique_by=lambda one: one[0])), max_size=30
)


@given(st.integers(2, 6), TURNS)
def test_a_copy_is_always_the_last_kept_state_of_its_own_stream(room: int, turns: list[Turn]) -> None:
    copies, last, version = Copies(CODEC, room * LEARNERS_PART * CODEC.bytes), dict[str, int](), 0
    learners = room * CODEC.bytes // CODEC.value.itemsize
    assert (copies.capacity, learners > 0) == (7 * room + learners, True)
    for kept, some in turns:
        streams = [stream for stream, _ in some]
        if kept:
            versions = list(range(version + 1, version + 1 + len(streams)))
            version += len(streams)
            copies.keep(streams, states(versions, [learning for _, learning in some]))
            last |= dict(zip(streams, versions, strict=True))
        else:
            copies.drop(streams)
            last = {stream: v for stream, v in last.items() if stream not in streams}
        found = taken(copies, list("abcdefgh"))
        assert found.items() <= last.items()
        assert len(copies) <= copies.capacity
        if kept:
            for kind in (False, True):
                own = {stream for stream, learning in some if learning == kind}
                assert bool(own & found.keys()) == bool(own)
