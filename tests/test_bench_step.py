"""What bench.step reports, from a real quick run."""

from __future__ import annotations

import json
from pathlib import Path

from bench.step import BATCHES, main
from service.detector import Detector


def test_a_quick_run_times_the_shipped_default_beside_its_floor_at_every_batch(tmp_path: Path) -> None:
    main(quick=True, json_file=tmp_path / "step.json")
    rows = json.loads((tmp_path / "step.json").read_text())
    assert [(row["model"], row["batch"]) for row in rows] == [
        (name, batch) for batch in BATCHES for name in ("floor, 1 feature", "default")
    ]
    shipped = Detector.load(next(Path("service/models").glob("default-*.onnx")))
    for floor, default in zip(rows[::2], rows[1::2], strict=True):
        assert floor["ratio_to_floor"] == 1
        assert default["ratio_to_floor"] > 1  # it does all that the floor does, and more
        assert default["state_bytes"] == 4 * shipped.state_size
        assert 0 < default["least_microseconds_per_event"] <= default["microseconds_per_event"]
        # Below 64 rows an event costs what its operators cost to start: who adds many should say why.
        assert 40 < floor["nodes"] < default["nodes"] <= 330  # 20 of them let a stream begin again
