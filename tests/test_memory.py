"""How a serving process uses memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_garbage_is_collected_again_once_what_stays_is_loaded() -> None:
    code = "import gc; gc.disable(); from service import memory; memory.settle(); print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.split() == ["True", "True"]


HELD = """
import re
from service import memory

def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\\s+(\\d+)", file.read())[1]) >> 10

memory.settle()
pieces = [b"x" * (100_000 + i) for i in range(3000)]
kept, pieces = pieces[::50], None  # between what is free
held = resident()
memory.give_back()
print(held - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads from /proc what is resident")
def test_what_a_peak_left_free_is_given_back_also_between_what_stays() -> None:
    answer = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, timeout=60)
    assert int(answer.stdout) > 200  # of 286 MiB
