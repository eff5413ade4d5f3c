"""Whoever runs a model file by what its page says gets the service's numbers."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from service.__main__ import app
from service.artifact import find_artifacts
from service.asking import SHIPPED_MODELS

PAGE = (Path(__file__).parents[1] / "docs" / "model-file.md").read_text()
ROWS, FAULT = 900, 800


def test_the_script_of_the_page_gives_the_services_p_values_to_the_last_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = 20 + 5 * np.sin(np.arange(ROWS) / 20) + rng.normal(size=ROWS) + 40 * (np.arange(ROWS) >= FAULT)
    times = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=60.0 * i + 1800 * (i >= 400)) for i in range(ROWS)]
    cells = ["" if i % 97 == 5 else f"{value:.3f}" for i, value in enumerate(values)]
    table, script = tmp_path / "pump.csv", tmp_path / "script.py"
    table.write_text("timestamp,value\n" + "".join(f"{at:%Y-%m-%d %H:%M:%S},{cell}\n" for at, cell in zip(times, cells, strict=True)))
    assert CliRunner().invoke(app, ["backtest", str(table), "--strict", "--out", str(tmp_path / "scores")]).exit_code == 0
    served = list(csv.DictReader((tmp_path / "scores" / "pump.csv").read_text().splitlines()))
    opened = next(i for i, row in enumerate(served) if row["alert_score"] and float(row["alert_score"]) > 1)
    assert opened == FAULT

    script.write_text(re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
    (model,) = find_artifacts(SHIPPED_MODELS)
    ran = subprocess.run([sys.executable, str(script), str(model), str(table)], capture_output=True, text=True, check=True, timeout=120)
    alone = list(csv.DictReader(ran.stdout.splitlines()))
    assert len(alone) == ROWS
    scored = 0
    for wanted, got in zip(served[: opened + 1], alone, strict=False):
        p_value = np.float32(got["p_value"])
        if np.isfinite(p_value):
            assert np.float32(wanted["p_value"]) == p_value
            scored += 1
    assert scored > FAULT - 120
