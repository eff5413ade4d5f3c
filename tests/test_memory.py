"""How a serving process uses memory."""

from __future__ import annotations

import subprocess
import sys


def test_garbage_is_collected_again_once_what_stays_is_loaded() -> None:
    code = "import gc; gc.disable(); from service import memory; memory.settle(); print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.split() == ["True", "True"]
