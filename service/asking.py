"""What may be asked for: the false-alarm rate, as a number or in words, where steps run, the models that ship, and what is written back.
Imports next to nothing: settings are read before all else.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Provider = Literal["cpu", "cuda"]
"""Where a step runs."""
SHIPPED, SHIPPED_MODELS = "shipped", Path(__file__).parent / "models"
"""The word that stands for the models that ship with the service, and their folder."""
WRITTEN_BACK = ("anomaly_score", "alert_score", "onset_anomaly", "y", "yhat", "yhat_lower", "yhat_upper")
"""Names of series that can be written back (ONSET_REMOTE_WRITE_METRICS)."""
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-9, 0.5
"""What may be asked for: the first included, the second not."""
ALPHA_RANGE = f"from {SMALLEST_ALPHA:g} to below {LARGEST_ALPHA:g}"
PERIODS = {"hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000, "year": 31_536_000}


def per_event(false_alarms: str, cadence: float) -> float:
    """False onsets per event that '1 per week' and stream means, with an event every `cadence` s. Raises ValueError, a sentence."""
    if not re.fullmatch(rf"[0-9]+(\.[0-9]+)? per ({'|'.join(PERIODS)})", false_alarms):
        raise ValueError(f"it reads like '1 per week' ({', '.join(PERIODS)})")
    number, _, period = false_alarms.split()
    alpha = float(number) * cadence / PERIODS[period]
    if not SMALLEST_ALPHA <= alpha < LARGEST_ALPHA:
        raise ValueError(f"with an event every {cadence:g} s it means {alpha:g} false alarms per event, which may be {ALPHA_RANGE}")
    return alpha
