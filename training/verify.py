"""What a model must prove before it is published. Each check raises ArtifactError with a sentence that says what differs.

verify_step       PyTorch = ONNX Runtime · sequence = step by step · any slicing into batches gives the same scores
verify_manifest   the manifest survives its own encoding
verify_file       a published file: hash, self-test, rows independent of their batch (what the service does on load)
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
import torch

from service.artifact import NEW, NEW_KINDS, Manifest
from service.detector import Detector, StepOutput, bucket
from service.errors import ArtifactError
from training.data import Float32
from training.detector import ArtifactStep
from training.logs import LogStep

TOLERANCE = 1e-5
"""PyTorch against ONNX Runtime, relative to the size of what is compared (p-values: in decades)."""
PROBE_STEPS, PROBE_ROWS = 160, 24
_ANSWERS = tuple(field.name for field in fields(StepOutput))


class StepFunction(Protocol):
    """One event for each of B streams, as arrays."""

    def __call__(self, state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput: ...


class Runner:
    """A graph in ONNX Runtime as a step function, padded like the service does."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]

    def __call__(self, state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        rows = len(x)
        extra = bucket(rows) - rows
        feed = {"state": state, "x": x, "t": t, "learn": learn, "alpha": alpha}
        padded = {name: np.concatenate([part, np.zeros((extra, *part.shape[1:]), np.float32)]) for name, part in feed.items()}
        return StepOutput.of(self._session.run(self._outputs, padded), rows)


def probe_inputs(steps: int, rows: int, features: int, seed: int = 0) -> tuple[Float32, Float32, Float32, Float32]:
    """X [T,B,F], t [T,B,3], learn [T,B], alpha [T,B]: noise, steps, outliers, gaps, frozen learning, large offsets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(steps, rows, features)) + np.where(np.arange(steps) > 0.7 * steps, 6.0, 0.0)[:, None, None]
    x = x * np.exp(rng.normal(size=(1, rows, features))) + 10.0 * rng.normal(size=(1, rows, features))
    x += (rng.random(x.shape) < 0.02) * 50
    x[1:][rng.random(x[1:].shape) < 0.05] = np.nan
    t = np.stack([np.full((steps, rows), 60.0), np.zeros((steps, rows)), np.full((steps, rows), 2.0)], axis=2)
    t[:, :, 1] = (np.arange(steps)[:, None] * 60.0 + rng.uniform(0, 80000, rows)) % 86400
    t[0, :, 0] = np.nan
    learn = (rng.random((steps, rows)) > 0.05).astype(np.float32)
    return x.astype(np.float32), t.astype(np.float32), learn, np.full((steps, rows), 1e-3, np.float32)


def line_inputs(steps: int, rows: int, step: LogStep, seed: int) -> tuple[Float32, Float32, Float32, Float32]:
    """The same of lines: codes as they come and repeated, new patterns of all kinds, ends of sessions, gaps over eight decades, numbers in
    part, some of them huge; now and then what is rare is accepted.
    """
    rng = np.random.default_rng(seed)
    x = np.full((steps, rows, step.features), np.nan)
    x[:, :, 0] = rng.integers(NEW, step.codes - 1, (steps, rows))
    for i in range(1, steps):
        x[i, :, 0] = np.where(rng.random(rows) < 0.3, x[i - 1, :, 0], x[i, :, 0])
    x[:, :, 0] = np.where(rng.random((steps, rows)) < 0.08, step.codes - 1, x[:, :, 0])
    x[:, :, 1] = np.where(rng.random((steps, rows)) < 0.9, 10 ** rng.uniform(-4, 4, (steps, rows)), np.nan)
    numbers = rng.normal(size=x[:, :, 2:].shape) * 10 ** rng.uniform(-2, 6, x[:, :, 2:].shape)
    x[:, :, 2:] = np.where(rng.random(numbers.shape) < 0.6, numbers, np.nan)
    _, t, learn, alpha = probe_inputs(steps, rows, 1, seed)
    x[:, :, 0] += np.where(x[:, :, 0] == NEW, rng.integers(0, NEW_KINDS, (steps, rows)) / (2 * NEW_KINDS), 0.0)
    learn = np.where(rng.random((steps, rows)) < 0.05, np.float32(2), learn)
    return x.astype(np.float32), t, learn, alpha


def inputs_of(step: ArtifactStep, steps: int, rows: int, seed: int = 0) -> tuple[Float32, Float32, Float32, Float32]:
    """What a step is probed with, x [T, B, F], t, learn, alpha."""
    return line_inputs(steps, rows, step, seed) if isinstance(step, LogStep) else probe_inputs(steps, rows, step.features, seed)


def verify_step(step: ArtifactStep, run: StepFunction) -> None:
    """All checks of a model against its exported graph."""
    verify_same_answers(step, run)
    verify_sequence(step)
    verify_slicing(run, step)


def verify_same_answers(step: ArtifactStep, run: StepFunction) -> None:
    """PyTorch and ONNX Runtime agree, step for step, each from the same state."""
    x, t, learn, alpha = inputs_of(step, PROBE_STEPS, PROBE_ROWS)
    state = np.zeros((PROBE_ROWS, step.state_size), np.float32)
    for i in range(PROBE_STEPS):
        inputs = (state, x[i], t[i], learn[i], alpha[i])
        with torch.no_grad():
            expected = [part.numpy() for part in step(*(torch.from_numpy(part) for part in inputs))]
        got = run(*inputs)
        reach = np.fmax(np.abs(got.lower), np.abs(got.upper))  # an end of the band near 0 is a difference of larger numbers
        for name, want in zip(step.outputs[1:], expected[1:], strict=True):
            _compare(name, i, getattr(got, name), want, reach if name in ("lower", "upper") else None, step.magnitude(name))
        after, wanted = (step.layout.split(torch.from_numpy(part)) for part in (got.state, expected[0]))
        for slot in step.layout.slots:
            part, want = after[slot.name].numpy(), wanted[slot.name].numpy()
            _compare(f"state slice '{slot.name}'", i, part, want, np.abs(want) + step.magnitude(slot.name))
        state = got.state


def _compare(name: str, step: int, got: Float32, want: Float32, size: Float32 | None = None, magnitude: float | Float32 = 0.0) -> None:
    """`size` is what a difference is relative to, by default what is wanted; `magnitude` is added to it."""
    if name in ("p_value", "onset_p"):
        got, want = np.log10(got), np.log10(want)
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        raise ArtifactError(f"Refused: {name} of step {step} is a number in one of PyTorch and ONNX Runtime and none in the other.")
    difference = np.abs(np.nan_to_num(got) - np.nan_to_num(want)) / (1 + magnitude + np.abs(np.nan_to_num(want if size is None else size)))
    if difference.max() > TOLERANCE:
        raise ArtifactError(
            f"Refused: {name} of step {step} differs by {difference.max():.1e} between PyTorch and ONNX Runtime "
            f"({TOLERANCE:.0e} is allowed)."
        )


@torch.no_grad()
def verify_sequence(step: ArtifactStep) -> None:
    """The network answers a sequence, as trained, with what it answers event by event, as served."""
    network = step.network
    T, B = 40, 8
    values = torch.randn(T, B, network.inputs, generator=torch.Generator().manual_seed(0))
    whole = network.sequence(values, network.fresh(B))
    parts = network.fresh(B)
    for i in range(T):
        answer, parts = network.step(values[i], parts)
        difference = float((answer - whole.answers[i]).abs().max())
        if difference > TOLERANCE:
            raise ArtifactError(f"Refused: event {i} of a sequence differs by {difference:.1e} from the same events one by one.")
    if not all(torch.allclose(part, whole.state[name], atol=TOLERANCE) for name, part in parts.items()):
        raise ArtifactError("Refused: the network's state after a sequence differs from the state after the same events one by one.")


def verify_slicing(run: StepFunction, step: ArtifactStep) -> None:
    """However rows are sliced into batches, every row is answered the same to the last bit."""
    rows, steps = 67, 130
    x, t, learn, alpha = inputs_of(step, steps, rows, seed=1)
    state = np.zeros((rows, step.state_size), np.float32)
    for i in range(steps):
        inputs = (state, x[i], t[i], learn[i], alpha[i])
        whole = run(*inputs)
        size = (1, 3, 8, 20, 33)[i % 5]
        slices = [run(*(part[j : j + size] for part in inputs)) for j in range(0, rows, size)] if i % 10 >= 5 else [whole]
        for name in _ANSWERS:
            again = np.concatenate([getattr(part, name) for part in slices])
            if not np.array_equal(again, getattr(whole, name), equal_nan=True):
                raise ArtifactError(
                    f"Refused: {name} of step {i} differs when {rows} rows are run in batches of {size}: a row feels its batch-mates."
                )
        state = whole.state


def verify_manifest(manifest: Manifest) -> None:
    """What is read back is what was written."""
    again = Manifest.model_validate_json(manifest.model_dump_json())
    if again != manifest:
        changed = [name for name in Manifest.model_fields if getattr(again, name) != getattr(manifest, name)]
        raise ArtifactError(f"Refused: the manifest's {', '.join(changed)} changes when it is written and read back.")


def verify_file(path: Path) -> Manifest:
    """Load a published file as the service does. Raises ArtifactError."""
    return Detector.load(path).manifest
