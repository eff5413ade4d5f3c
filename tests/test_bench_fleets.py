"""What bench.fleets counts, and that its machines are the same each time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer

from bench.fleets import SENSORS, machines, main, measure
from training.data import Stream

NOWHERE = Path("nowhere")


def test_later_rows_are_counted_at_the_rate_that_is_asked_for() -> None:
    def step(state: Any, x: Any, t: Any, learn: Any, alpha: Any) -> Any:
        return SimpleNamespace(state=state, onset_p=0.9 * alpha * (x[:, 0] > 0))  # below the rate, and only just, in every row

    streams = [Stream(f"s{i}", np.ones((rows, 1), np.float32), np.zeros((rows, 3), np.float32)) for i, rows in enumerate((50, 30))]
    found = measure(streams, [40, 25], step, 4)
    assert [(row["onsets"], row["events"]) for row in found.values()] == [(15, 15)] * 3


@pytest.mark.parametrize("fleet", ["mixed:2", "apart:2"])
def test_machines_follow_from_the_seed(fleet: str) -> None:
    one, again, other = machines(fleet, NOWHERE, 0, 300), machines(fleet, NOWHERE, 0, 300), machines(fleet, NOWHERE, 1, 300)
    assert [stream.x.shape for stream in one] == [(300, SENSORS)] * 2
    np.testing.assert_array_equal(one[1].x, again[1].x)
    assert not np.array_equal(one[1].x, other[1].x)


def test_an_unknown_fleet_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="no fleet is named 'pumps'"):
        main(fleets="pumps")
