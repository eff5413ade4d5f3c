"""Copies of the states that this replica committed last, so that streams which come again need not be loaded and decoded again.

A copy may be stale: another replica may have stepped, accepted or deleted the stream since. That is safe: nothing is written, and
nothing answered, unless the commit finds the token the copy was made with. A loser is dropped here and loaded from the store.

    take   ─► rows of the streams that are here, in one copy
    keep   ─► after a commit; the oldest copies make room

One owner (a scorer); no locks. Memory is bounded by `most_bytes` and taken from the system only as streams come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from service.state import LEARNER, Rows, StateCodec, bytes_of

LEARNERS_PART = 8
"""One part in so many of the memory is for states with a learner. Few streams have one, but most batches hold some of these."""


class Copies:
    """Two rings of states, those with a learner in their own: they are twice as long. The one kept longest ago is overwritten."""

    def __init__(self, codec: StateCodec, most_bytes: int) -> None:
        sizes, parts = (codec.bytes, codec.value.itemsize), (most_bytes - most_bytes // LEARNERS_PART, most_bytes // LEARNERS_PART)
        self._rings = [np.zeros((part // size, size), np.uint8) for size, part in zip(sizes, parts, strict=True)]
        self._first = [0, len(self._rings[0])]
        """The place that each ring's first one has among all."""
        self._next = list(self._first)
        self.capacity = sum(map(len, self._rings))
        self._owners: list[str | None] = [None] * self.capacity
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, stream_ids: Sequence[str]) -> NDArray[np.intp]:
        """[B] where each stream's copy is, -1 = nowhere. Good until the next `keep`."""
        get = self._places.get
        return np.array([get(stream_id, -1) for stream_id in stream_ids], np.intp)

    def take(self, places: NDArray[np.intp], rows: Rows, at: NDArray[np.intp]) -> None:
        """Copy the states at `places` into `rows[at]`."""
        content = bytes_of(rows)
        for ring, first, mine in self._each(places >= self._first[1]):
            content[at[mine], : ring.shape[1]] = ring[places[mine] - first]

    def keep(self, stream_ids: Sequence[str], rows: Rows) -> None:
        """These distinct streams were just committed with these states [B]."""
        learning = rows["flags"] & LEARNER != 0
        places = self.find(stream_ids)
        elsewhere = (places < 0) | ((places >= self._first[1]) != learning)
        if elsewhere.any():
            for i in np.flatnonzero(elsewhere).tolist():
                self._make_room(stream_ids[i], int(learning[i]))
            places = self.find(stream_ids)
        content = bytes_of(rows)
        for ring, first, mine in self._each(learning):
            here = mine[places[mine] >= 0]  # making room may have pushed out some of this batch, too
            ring[places[here] - first] = content[here, : ring.shape[1]]

    def drop(self, stream_ids: Sequence[str]) -> None:
        """Forget these streams' copies."""
        for stream_id in stream_ids:
            place = self._places.pop(stream_id, None)
            if place is not None:
                self._owners[place] = None

    def _each(self, learning: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.uint8], int, NDArray[np.intp]]]:
        """Each ring that is meant, the number of its first place, and which of [B] are meant."""
        for which, ring in enumerate(self._rings):
            mine = np.flatnonzero(learning == which)
            if len(mine):
                yield ring, self._first[which], mine

    def _make_room(self, stream_id: str, which: int) -> None:
        self.drop([stream_id])
        first, size = self._first[which], len(self._rings[which])
        if size == 0:
            return
        place = self._next[which]
        self._next[which] = first + (place + 1 - first) % size
        owner = self._owners[place]
        if owner is not None:
            del self._places[owner]
        self._owners[place] = stream_id
        self._places[stream_id] = place
