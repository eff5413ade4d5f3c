"""Python imports this at its start where its folder is on the path: the clock of such a process is AHEAD seconds ahead of the machine's.

The monotonic one is as it is, as on any machine whose time is wrong.
"""

import os
import time

_ahead, _time, _time_ns = float(os.environ["AHEAD"]), time.time, time.time_ns
time.time = lambda: _time() + _ahead
time.time_ns = lambda: _time_ns() + round(1e9 * _ahead)
