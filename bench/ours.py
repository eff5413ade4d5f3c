"""Our detector on a set, as an operator gets it: `training fit` on the unlabelled rows, then the served step and policy over every row.

    fit rows ─► npz files ─► python -m training fit ─► NAME.onnx ─► service.backtest.score ─► p_value, is_anomaly, alerts

All that this benchmark knows of the detector is in `fit_and_score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.baselines import Answer
from bench.fitting import fit
from bench.metrics import Float64
from bench.sets import MONDAY, Case, DataSet
from service.artifact import find_artifacts
from service.asking import SHIPPED_MODELS
from service.backtest import Scored, Series, score
from service.detector import Detector
from service.policy import THRESHOLD, Policy

ALPHA = 1e-3
NEVER = 2**62


@dataclass(frozen=True)
class Recipe:
    """How a detector is made and run."""

    cell: str | None
    """`--cell` of `training fit`; None = the shipped default, nothing is fitted."""
    signal_only: bool = False
    """Of telemetry only column 0 is given."""
    context: bool = False
    """Of telemetry only column 0 is scored; the commands are context."""
    waveform: bool = False
    """`--waveform`, with its own number of steps."""

    @property
    def seeded(self) -> bool:
        return self.cell not in (None, "none")


@dataclass(frozen=True)
class Setting:
    """What is the same for all detectors of a run."""

    steps: int
    raw: bool
    """Every event is learned from; else the policy freezes streams with an open alert, as served."""


def fit_and_score(data: DataSet, recipe: Recipe, setting: Setting, seed: int, folder: Path) -> list[Answer]:
    """Fit in `folder` (unless that was done; what was interrupted continues), score. Raises FitFailed."""
    data = data.signal() if recipe.signal_only else data
    model = SHIPPED_MODELS if recipe.cell is None else _fitted(data, recipe, setting.steps, seed, folder)
    detector = Detector.load(find_artifacts(model)[0])
    policy = Policy(alpha=ALPHA, tau=detector.manifest.age_constant, settled=NEVER if setting.raw else Policy.settled)
    return _scored(data, detector, policy)


def _fitted(data: DataSet, recipe: Recipe, steps: int, seed: int, folder: Path) -> Path:
    rows, model = folder / "rows", folder / "model"
    if any(model.glob("*.onnx")):
        return model
    rows.mkdir(parents=True, exist_ok=True)
    for case in data.cases:
        seconds = np.maximum.accumulate(case.seconds[: case.fit])  # a clock that was set back in the recording
        np.savez(rows / f"{case.name.replace('/', '-')}.npz", train=case.x[: case.fit], timestamps=seconds)
    for i, x in enumerate(data.history):
        np.savez(rows / f"history-{i}.npz", train=x, timestamps=MONDAY + np.arange(len(x), dtype=np.float64))
    options = ["--name", "quality", "--cell", str(recipe.cell), "--seed", str(seed), "--resume", "--keep-network"]
    options += [option for i in range(1, data.features if recipe.context else 1) for option in ("--context", f"f{i}")]
    options += ["--waveform", "--steps", str(steps * 9 // 4)] if recipe.waveform else ["--steps", str(steps)]  # 900 for 400: the defaults
    fit(rows, model, *options, log=folder / "fit.log")
    return model


def _scored(data: DataSet, detector: Detector, policy: Policy) -> list[Answer]:
    series = [Series(case.name, [], case.seconds, case.x) for case in data.cases]
    pieces: list[list[Scored]] = [[] for _ in series]
    score(series, detector, policy, lambda i, first, scored: pieces[i].append(scored))
    return [_answer(case, parts) for case, parts in zip(data.cases, pieces, strict=True)]


def _answer(case: Case, parts: list[Scored]) -> Answer:
    p_value = np.concatenate([part.p_value for part in parts])[case.scored :].astype(np.float64)
    flagged = np.concatenate([part.is_anomaly for part in parts])[case.scored :]
    alarm = np.concatenate([part.alert_score for part in parts])[case.scored :] > THRESHOLD
    contribution = np.concatenate([part.contribution for part in parts])[case.scored :] if case.named else None
    rarity: Float64 = -np.log10(p_value)
    return Answer(rarity, flagged, alarm, contribution)


RECIPES: dict[str, Recipe] = {
    "detector": Recipe("standard"),
    "without LSTM": Recipe("none"),
    "memoryless": Recipe("memoryless"),
}
SIGNAL_RECIPES: dict[str, Recipe] = {f"{name}, signal only": Recipe(recipe.cell, signal_only=True) for name, recipe in RECIPES.items()}
CONTEXT_RECIPES: dict[str, Recipe] = {
    f"{name}, commands as context": Recipe(recipe.cell, context=True) for name, recipe in RECIPES.items() if recipe.cell != "memoryless"
}
WAVEFORM_RECIPES: dict[str, Recipe] = {
    "detector, waveform": Recipe("standard", waveform=True),
    "memoryless, waveform": Recipe("memoryless", waveform=True),
}
SHIPPED: dict[str, Recipe] = {"shipped default": Recipe(None)}
SHIPPED_SIGNAL: dict[str, Recipe] = {"shipped default, signal only": Recipe(None, signal_only=True)}


def recipes(data: DataSet) -> dict[str, Recipe]:
    """Those that make sense on this set."""
    if data.telemetry:
        return RECIPES | CONTEXT_RECIPES | SIGNAL_RECIPES | SHIPPED_SIGNAL
    if data.waveform:
        return WAVEFORM_RECIPES | RECIPES | SHIPPED
    return RECIPES | (SHIPPED if data.features == 1 else {})
