"""The detectors that are measured: the shipped default, and one of eight features, trained here once.

The sizes of its state and its network count, not its skill.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bench.fitting import fit
from service.artifact import find_artifacts
from service.asking import SHIPPED_MODELS

ROOT = Path(__file__).parent.parent
SOURCES = ("training/*.py", "service/artifact.py", "bench/fleet.py")
"""What the trained file depends on; its folder is named after their contents."""
FEATURES, FILES, ROWS, STEPS = 8, 6, 4000, 40


def default_model() -> Path:
    return find_artifacts(SHIPPED_MODELS)[0]


def fleet_model() -> Path:
    """Trained by `training fit` with its own sizes, and kept in out/bench until the sources change. Needs `.[train]`."""
    sha = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            sha.update(path.read_bytes())
    folder = Path("out/bench") / f"fleet-{sha.hexdigest()[:12]}"
    if not any(folder.glob("*.onnx")):
        _train(folder)
    return find_artifacts(folder)[0]


def _train(folder: Path) -> None:
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(FILES):
        hidden = np.cumsum(rng.normal(size=(ROWS, 3)), axis=0) * 0.05 + np.sin(np.arange(ROWS) / 40)[:, None]
        x = 20 + hidden @ rng.normal(size=(3, FEATURES)) + 0.2 * rng.normal(size=(ROWS, FEATURES))
        np.savez(data / f"line-{i}.npz", train=x, timestamps=1.7e9 + np.arange(ROWS, dtype=np.float64))
    fit(data, folder, "--name", "fleet", "--steps", str(STEPS), "--keep-network", log=folder / "fit.log")
