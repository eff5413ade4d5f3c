"""Copies of the states that this replica committed last, so that streams which come again need not be loaded and decoded again.

A copy may be stale: another replica may have stepped, accepted or deleted the stream since. That is safe: nothing is written, and
nothing answered, unless the commit finds the token the copy was made with. A loser is dropped here and loaded from the store.

    take   ─► rows of the streams that are here, in one copy
    keep   ─► after a commit; the oldest copies make room

One owner (a scorer); no locks. Memory is bounded by `most_bytes` and taken from the system only as streams come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.state import LEARNER, Rows, StateCodec, bytes_of


class Copies:
    """A ring of states by stream; the one kept longest ago is overwritten. States with a learner are few and twice as long: not kept."""

    def __init__(self, codec: StateCodec, most_bytes: int) -> None:
        self._bytes = codec.bytes
        self.capacity = most_bytes // codec.bytes
        self._ring = np.zeros((self.capacity, codec.bytes), np.uint8)
        self._owners: list[str | None] = [None] * self.capacity
        self._places: dict[str, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._places)

    def find(self, stream_ids: Sequence[str]) -> NDArray[np.intp]:
        """[B] where each stream's copy is, -1 = nowhere. Good until the next `keep`."""
        get = self._places.get
        return np.array([get(stream_id, -1) for stream_id in stream_ids], np.intp)

    def take(self, places: NDArray[np.intp], rows: Rows, at: NDArray[np.intp]) -> None:
        """Copy the states at `places` into `rows[at]`."""
        bytes_of(rows)[at, : self._bytes] = self._ring[places]

    def keep(self, stream_ids: Sequence[str], rows: Rows) -> None:
        """These distinct streams were just committed with these states [B]."""
        learning = rows["flags"] & LEARNER != 0
        if learning.any():
            self.drop([stream_ids[i] for i in np.flatnonzero(learning).tolist()])
            stream_ids, rows = [stream_ids[i] for i in np.flatnonzero(~learning).tolist()], rows[~learning]
        places = self.find(stream_ids)
        if (places < 0).any():
            for i in np.flatnonzero(places < 0).tolist():
                self._make_room(stream_ids[i])
            places = self.find(stream_ids)
        here = places >= 0  # making room may have pushed out some of this batch, too
        self._ring[places[here]] = bytes_of(rows)[here, : self._bytes]

    def drop(self, stream_ids: Sequence[str]) -> None:
        """Forget these streams' copies."""
        for stream_id in stream_ids:
            place = self._places.pop(stream_id, None)
            if place is not None:
                self._owners[place] = None

    def _make_room(self, stream_id: str) -> None:
        if self.capacity == 0:
            return
        place = self._next
        self._next = (place + 1) % self.capacity
        owner = self._owners[place]
        if owner is not None:
            del self._places[owner]
        self._owners[place] = stream_id
        self._places[stream_id] = place
