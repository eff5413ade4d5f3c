"""What accepting an alert of log lines that is over teaches its stream.

While an alert is open its stream's state has noted the rare lines of late, and accepts those (training/logs.py). One that is over is
accepted by what it shows: a fresh stream hears the lines before the onset and then the onset's, and accepts. Which of them are rare enough
is so the model's own judgement. What that stream then has in its slice OWN_LINES, the accepted one gets where it has less.

Pure, and blocks for some steps of the detector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.alerts import MESSAGE_LENGTH, Alert
from service.artifact import NEW
from service.detector import Detector
from service.features import coded

OWN_LINES = "own_lines"
"""The slice of a state with what a stream has accepted of its lines: from 1 on a line is accepted. Models of sessions have none."""
UNHEARD, HEARD, ACCEPTS = 0.0, 1.0, 2.0
"""`learn` of the oldest line, of which nobody knows what it followed, and of new ones before the onset, of which kind nobody knows; of the
others before it; and of the onset's."""

Float32 = NDArray[np.float32]


def teaches(alert: Alert) -> bool:
    """Whether it may have something to teach: a line began it, it is over, and nobody has accepted it."""
    line = alert.onset.line if alert.onset is not None else None
    return bool(line) and not alert.open and alert.kind == "anomaly" and alert.resolution not in ("accepted", "accepted_by_age")


def heard(detector: Detector, alerts: Sequence[Alert]) -> Float32 | None:
    """[B, 1 + before, F] what a stream hears of these alerts, the onset's line at the end, NaN = nothing; None = the model learns no lines.

    New patterns before it are not known apart. Not for two threads at once.
    """
    lines, matcher, width = detector.manifest.lines, detector.matcher, detector.features
    if lines is None or matcher is None or detector.manifest.part(OWN_LINES) is None:
        return None
    codes = {text: code for code, text in enumerate(lines.texts)}
    x = np.full((len(alerts), 1 + lines.before, width), np.nan, np.float32)
    for i, alert in enumerate(alerts):
        line = alert.onset.line if alert.onset is not None else None
        if not line or line.message is None:  # the end of a session
            continue
        if len(line.message) < MESSAGE_LENGTH:
            x[i, -1] = coded([line.message], width, lines, matcher)[0]
        elif line.template in codes:  # of a new pattern that was cut off nobody knows how many words it has
            x[i, -1, 0] = codes[line.template]
        before = [codes.get(text, NEW) for text in line.before[: lines.before]]
        x[i, lines.before - len(before) : lines.before, 0] = before[::-1]
    return x


def learned(detector: Detector, x: Float32) -> Float32:
    """[B, W] of OWN_LINES that these lines teach, 0 = nothing."""
    own = detector.manifest.part(OWN_LINES)
    state, oldest, known = detector.fresh_states(len(x)), np.isfinite(x[:, :, 0]).argmax(axis=1), x[:, :, 0] > NEW
    last = x.shape[1] - 1
    t, alpha = np.zeros((len(x), 3), np.float32), np.full(len(x), 1e-3, np.float32)
    for j in range(x.shape[1]):
        learn = np.full(len(x), ACCEPTS) if j == last else np.where((oldest < j) & known[:, j], HEARD, UNHEARD)
        state = detector.step(state, np.ascontiguousarray(x[:, j]), t, learn.astype(np.float32), alpha).state
    noted: Float32 = state[:, own]
    return np.where(noted >= 1, noted, np.float32(0))
