"""PyTorch → one sealed ONNX file that describes itself. Nothing is published that `training.verify` refuses.

ArtifactStep ──torch.onnx.export──► bytes ──verify──► self-test vectors ──► metadata ──► seal ──► NAME-VERSION.onnx
"""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from pydantic import ValidationError

from service.artifact import (
    MANIFEST_KEY,
    MAX_FEATURES,
    SELFTEST_KEY,
    SELFTEST_ROWS,
    SELFTEST_STEPS,
    SHA256_KEY,
    UNSEALED,
    Cell,
    Feature,
    Lines,
    Manifest,
    Outset,
    SelfTest,
    Slice,
    Training,
    seal,
)
from service.detector import Detector, StepOutput, session_of
from service.errors import TableError
from service.outputs import whole
from training.detector import ArtifactStep, StepModule, example_inputs
from training.verify import Runner, inputs_of, verify_manifest, verify_step

OPSET = 18
INPUTS = ("state", "x", "t", "learn", "alpha")
NAMED = {
    "name": "1 to 64 lower case letters, digits, - and _, the first a letter or a digit",
    "version": "1 to 32 letters, digits, '.', '+', '-' and '_', the first a letter or a digit",
}
"""What `Outset` demands, in words."""


def to_onnx(step: StepModule) -> bytes:
    """The step function as one ONNX graph with a dynamic number of rows."""
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    step = step.eval()
    # The exporter prints its progress and, on every call, warnings about its own internals. With gradients it would trace them, too.
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            example_inputs(step, 8),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(step.outputs),
            dynamic_shapes=tuple({0: rows} for _ in INPUTS),
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program: this is a bug.")
    model = program.model_proto
    _anonymous(model)
    content: bytes = model.SerializeToString()
    return content


@contextlib.contextmanager
def _quiet(*loggers: str) -> Any:
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _anonymous(model: Any) -> None:
    """The exporter writes source paths and stack traces into the nodes: half of the file, and none of its business."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]


def manifest_of(
    step: ArtifactStep,
    *,
    name: str,
    version: str,
    features: list[Feature],
    training: Training,
    description: str = "",
    quality: dict[str, Any] | None = None,
    lines: Lines | None = None,
) -> Manifest:
    """`lines` of a log detector. Raises pydantic's ValidationError when name, version or features are not what an artifact may carry."""
    sizes = step.network.sizes
    return Manifest(
        name=name,
        version=version,
        kind="sensor" if lines is None else "log",
        lines=lines,
        description=description,
        features=features,
        state_size=step.state_size,
        layout=[Slice(name=slot.name, size=slot.size) for slot in step.layout.slots],
        warmup=step.warmup,
        cell=Cell(variant=sizes.cell, layers=sizes.layers, hidden=sizes.hidden, code=sizes.code, decoder_hidden=sizes.decoder_hidden),
        training=training,
        calibration={**step.calibration.as_dict(), "signals": _signals(step)},
        quality=quality or {},
    )


def _signals(step: ArtifactStep) -> dict[str, Any]:
    """Each signal's name with its pooled tail."""
    return dict(zip(step.signal_names, step.calibration.as_dict()["signals"], strict=True))


def refuse_unfit(name: str, version: str, features: Sequence[str]) -> None:
    """Raises TableError where no artifact could be named so or have these features: at the outset, not after hours of training."""
    try:
        Outset.model_validate({"name": name, "version": version, "features": [{"name": feature} for feature in features]})
    except ValidationError as error:
        where, given = error.errors()[0]["loc"], error.errors()[0]["input"]
        if where == ("features",):
            why = (
                f"{len(features)} columns are more than a model takes ({MAX_FEATURES}). Leave some out (--exclude COLUMN), or make "
                "files of parts of a machine and a model of each part."
            )
        elif where[0] == "features":
            why = f"{_excerpt(given)} is no name of a column: 1 to 128 characters. Rename it in the files, or leave it out with --exclude."
        else:
            why = f"{_excerpt(given)} is no {where[0]} of a model: {NAMED[str(where[0])]}."
        raise TableError(f"No model can be published so: {why}") from None


def _excerpt(given: str) -> str:
    return repr(given if len(given) <= 80 else given[:80] + "…")


def publish(step: ArtifactStep, graph: bytes, manifest: Manifest, folder: Path) -> Path:
    """Verify, describe, seal and write NAME-VERSION.onnx. Raises ArtifactError that says why a model is refused, and NotWritten; then
    nothing is left.
    """
    run = Runner(session_of(graph))
    verify_step(step, run)
    verify_manifest(manifest)
    model = onnx.load_from_string(graph)
    entries = {MANIFEST_KEY: manifest.model_dump_json(), SELFTEST_KEY: selftest(run, step).encode(), SHA256_KEY: UNSEALED}
    onnx.helper.set_model_props(model, entries)
    path, sealed = folder / manifest.filename, seal(model.SerializeToString())
    with whole(path, len(sealed)) as place:
        place.write_bytes(sealed)
        Detector.load(place)
    return path


def selftest(run: Runner, step: ArtifactStep) -> SelfTest:
    """Inputs with gaps, outliers and frozen rows, and what the graph answers to them; the last steps are beyond the warm-up."""
    x, t, learn, alpha = inputs_of(step, SELFTEST_STEPS, SELFTEST_ROWS)
    state = np.zeros((SELFTEST_ROWS, step.state_size), np.float32)
    answers: list[StepOutput] = []
    for i in range(SELFTEST_STEPS):
        answers.append(run(state, x[i], t[i], learn[i], alpha[i]))
        state = answers[-1].state
    names = ("p_value", "onset_p", "expected", "lower", "upper", "contribution", "likely", "before")
    return SelfTest(x, t, learn, alpha, **{name: np.stack([getattr(answer, name) for answer in answers]) for name in names}, state=state)


def training_record(*, command: str, seed: int, data: str, data_sha256: str, streams: int, rows: int) -> Training:
    return Training(
        command=command,
        seed=seed,
        data=data,
        data_sha256=data_sha256,
        streams=streams,
        rows=rows,
        commit=_commit(),
        torch_version=torch.__version__,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _commit() -> str:
    """The commit this code is at, '' outside a repository."""
    folder = Path(__file__).parent
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
