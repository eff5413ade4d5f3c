"""The demo as a newcomer runs it: real readings, a real disturbance, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

# Like `python -m service demo` in a terminal, also where whoever started the tests ignores Ctrl-C.
RUN = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module('service', run_name='__main__')"
COMMAND = [sys.executable, "-c", RUN, "demo"]
FOLDERS = [Path("/var/tmp"), Path("/tmp")]


def leftovers() -> set[Path]:
    return {path for folder in FOLDERS for path in folder.glob("onset-demo-*")}


def start() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
    return subprocess.Popen(COMMAND, env=environment | {"DEMO_SECONDS": "25"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_demo_flags_the_disturbance_and_leaves_nothing_running() -> None:
    before = leftovers()
    demo = start()
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, output
    assert "DISTURBANCE: all processors busy" in output
    assert "after it began" in output
    assert "Where to go next" in output
    assert re.search(r"The page is at http://127\.0\.0\.1:\d+/", output)
    assert leftovers() == before


def test_an_interrupted_demo_ends_everything_it_started() -> None:
    demo = start()
    deadline = time.monotonic() + 90
    assert demo.stdout
    while "DISTURBANCE" not in (line := demo.stdout.readline()):
        assert line, "the demo ended before its disturbance"
        assert time.monotonic() < deadline
    while len(family := psutil.Process(demo.pid).children(recursive=True)) < 4:  # the service, its store, a burner and the writer
        assert time.monotonic() < deadline
        time.sleep(0.05)
    begun = " ".join(word for process in family for word in process.cmdline())
    [folder] = {path for path in leftovers() if str(path) in begun}
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert demo.returncode == 130
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not folder.exists()
