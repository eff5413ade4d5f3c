"""How this process uses memory: batches come and go by the megabyte, many times a second."""

from __future__ import annotations

import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
KEPT_BYTES = 256 * 1024 * 1024
"""Freed memory that glibc keeps for the next batch."""
_LARGEST_BYTES = 32 * 1024 * 1024
YOUNG_OBJECTS = 50_000


def give_back() -> None:
    """Give what is free back to the system, where glibc is the C library: after a peak that was no batch.

    Who takes memory meanwhile waits, in other threads too: some 0.1 s for 300 MB.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def settle() -> None:
    """Call once, when everything that stays has been loaded.

    The collector works from here on, also where it was switched off while loading. It leaves alone what is here now, and looks at new
    objects by the fifty thousand: a batch makes tens of thousands that hold no cycles and are gone with it. And glibc, where it is the C
    library, keeps what a batch frees: given back to the system, each page would be zeroed and mapped again for the next one (1.1 faults
    an event, a tenth of an event's processor time).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 100)
    gc.enable()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
