"""What a Redis that answers but does not do what it is told has against it, and what helps: one sentence for each kind of refusal.

Known by the server's words, since clients take the code off some errors and leave it at others.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Refusal(NamedTuple):
    """Why the server refuses, and what whoever runs it can do."""

    why: str
    lasting: bool
    """Whether it stays so until somebody changes the server or our settings."""


_KINDS = [
    ("MasterDown|ClusterDown|TryAgain|BUSY|LOADING", "it is between two states, which passes", False),
    (
        "maxmemory",
        "its memory is full (maxmemory): give it more or keep less (ONSET_MAX_STREAMS, ONSET_STATE_TTL_SECONDS, ONSET_STREAMS_MAX_RESULTS)",
        True,
    ),
    ("MISCONF", "it cannot write its data to the disk: mostly that is full; its own log says why", True),
    ("read.?only replica|READONLY", "it is a replica: a new primary is looked for; if it stays so, ONSET_REDIS_URL is of a replica", False),
    ("NOREPLICAS", "fewer of its replicas are in step than its min-replicas-to-write asks for", False),
    (
        "permission|ACL failure|NOPERM",
        "its user may not do this: docs/deploy.md says which commands and keys (ACL) the service needs",
        True,
    ),
    ("NOAUTH|WRONGPASS|authenticated|invalid username-password", "it wants another user or password: ONSET_REDIS_URL", True),
    ("WRONGTYPE", "a key of the service's holds what another program has written: leave it all keys that begin with onset:", True),
]
_REFUSALS = [(re.compile(pattern, re.IGNORECASE), Refusal(why, lasting)) for pattern, why, lasting in _KINDS]
UNKNOWN = Refusal("it may be too old, or this is a bug", True)


def refusal(text: str) -> Refusal | None:
    """By the error's name and what the server said; None = nothing that is known."""
    return next((found for pattern, found in _REFUSALS if pattern.search(text)), None)
