"""ONNX Runtime behind one pure call. The service knows nothing of what is in the graph: a state is S opaque float32.

Rows are padded with dummies to a bucket of rows, because ONNX Runtime's CPU kernels answer a row to the last bit the same
whatever its batch-mates only at such sizes. Loading checks this on the machine at hand, and the self-test vectors with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.artifact import (
    MANIFEST_KEY,
    SELFTEST_KEY,
    SELFTEST_ROWS,
    Manifest,
    SelfTest,
    check_metadata,
    find_artifacts,
    parse_manifest,
    read_bytes,
    verify_seal,
)
from service.asking import Provider
from service.errors import ArtifactError, BadSetting
from service.lines import Matcher
from service.state import StateCodec

Float32 = NDArray[np.float32]

MAX_ROWS = 1024
"""Largest inference batch; more rows are stepped in slices."""
SELFTEST_TOLERANCE = 1e-3
"""Other processors round differently; 32 steps of that stay far below this, relative (p-values: in log p)."""

_DISABLED = ["TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider"]
"""It would push the two transposes of the state through the whole graph and multiply them: 9 become 39, a third of the time."""

_EXECUTION: dict[Provider, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 keeps 10 bits of a product's factors; an algorithm found by trial may be another one after a restart, and round differently.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
}

_INPUTS = {"state", "x", "t", "learn", "alpha"}
_OUTPUTS = ["state_out", "p_value", "onset_p", "expected", "lower", "upper", "contribution"]
_LOG_OUTPUTS = [*_OUTPUTS, "likely", "before"]


@dataclass(frozen=True)
class StepOutput:
    """Answers of one step for B streams of F features, see `Detector.step`."""

    state: Float32  # [B, S]
    p_value: Float32  # [B], NaN while the stream warms up
    onset_p: Float32  # [B]
    expected: Float32  # [B, F]
    lower: Float32  # [B, F]
    upper: Float32  # [B, F]
    contribution: Float32  # [B, F]
    likely: Float32  # [B, 2·likely] codes of the likeliest next lines as they stood before this event, then their chances
    before: Float32  # [B, before] codes of the session's lines before this one, the newest first, NaN = none; both of width 0 for sensors

    @classmethod
    def of(cls, outputs: Sequence[Float32], rows: int) -> StepOutput:
        """The first `rows` of what the graph answered, in its order."""
        parts = [out[:rows] for out in outputs]
        if len(parts) == len(_OUTPUTS):
            parts += [np.zeros((rows, 0), np.float32)] * 2
        return cls(*parts)


def bucket(rows: int) -> int:
    """Rows of the padded batch: 8, then multiples of 16, so that few are stepped for nothing and ONNX Runtime plans for few sizes."""
    return 8 if rows <= 8 else -(-rows // 16) * 16


class Detector:
    """One loaded artifact. `step` is thread-safe and blocks for the time of the inference."""

    def __init__(self, manifest: Manifest, sha256: str, session: ort.InferenceSession) -> None:
        self.manifest = manifest
        self.sha256 = sha256
        self._session = session
        self._outputs = _OUTPUTS if manifest.lines is None else _LOG_OUTPUTS
        # On a GPU the kernels depend on the number of rows at every size, and 1,024 take hardly longer than 8: one size is all it gets.
        self._whole_batches = self.providers[0] != _EXECUTION["cpu"][0]

    @classmethod
    def load(cls, path: Path, intra_op_threads: int = 1, provider: Provider = "cpu") -> Detector:
        """Read, verify and self-test one file. Raises ArtifactError that says why it is refused, BadSetting without that provider."""
        content = read_bytes(path)
        sha256 = verify_seal(content, path)
        check_metadata(content, path)
        try:
            session = session_of(content, intra_op_threads, provider)
        except BadSetting:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ArtifactError(f"{path} is not a model ONNX Runtime can load: {error}") from error
        metadata = session.get_modelmeta().custom_metadata_map
        missing = [key for key in (MANIFEST_KEY, SELFTEST_KEY) if key not in metadata]
        if missing:
            raise ArtifactError(f"{path} has no {' and no '.join(missing)} in its metadata.")
        detector = cls(parse_manifest(metadata[MANIFEST_KEY], path), sha256, session)
        detector._check_interface(path)
        vectors = SelfTest.decode(metadata[SELFTEST_KEY])
        detector._check_vectors(vectors, path)
        detector.self_test(vectors)
        return detector

    @property
    def name(self) -> str:
        return self.manifest.name

    def under(self, name: str) -> Detector:
        """The same detector by another name, which keeps its states apart; any name, so also one that no file can have."""
        return Detector(self.manifest.model_copy(update={"name": name}), self.sha256, self._session)

    @property
    def features(self) -> int:
        return len(self.manifest.features)

    @property
    def state_size(self) -> int:
        return self.manifest.state_size

    @cached_property
    def fingerprint(self) -> int:
        """First 64 bits of the file's hash: marks the states that belong to it."""
        return int(self.sha256[:16], 16)

    @cached_property
    def audit(self) -> slice | None:
        """See `Manifest.audit`."""
        return self.manifest.audit

    @cached_property
    def matcher(self) -> Matcher | None:
        """Of a log model: lines → codes."""
        return None if self.manifest.lines is None else Matcher(self.manifest.lines)

    def codec(self) -> StateCodec:
        """For the states of its streams."""
        return StateCodec(self.features, self.state_size, self.fingerprint, *self._widths)

    @property
    def _widths(self) -> tuple[int, int]:
        """Of `likely` and `before`."""
        lines = self.manifest.lines
        return (0, 0) if lines is None else (2 * lines.likely, lines.before)

    @property
    def providers(self) -> list[str]:
        """Execution providers really in use, as the session says."""
        return list(self._session.get_providers())

    def fresh_states(self, rows: int) -> Float32:
        return np.zeros((rows, self.state_size), np.float32)

    def step(self, state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        """One event for each of B distinct streams: state [B,S], x [B,F] (NaN = missing), t [B,3], learn [B], alpha [B].

        `t`: seconds since the stream's previous event (NaN = it is the first), second of the day, day of the week from Monday on, in UTC.
        `learn`: 0 = the state learns nothing of what is usual from it, 2 = what a log stream just heard is accepted. `alpha`: false-alarm
        rate that the band is for. More: docs/model-file.md.
        """
        rows, inputs = len(x), (state, x, t, learn, alpha)
        if rows <= MAX_ROWS:
            return self._step_padded(*inputs)
        parts = [self._step_padded(*(part[i : i + MAX_ROWS] for part in inputs)) for i in range(0, rows, MAX_ROWS)]
        return StepOutput(*(np.concatenate([getattr(part, name) for part in parts]) for name in StepOutput.__dataclass_fields__))

    def self_test(self, vectors: SelfTest) -> None:
        """Run the artifact's vectors, then the last step again in batches of several sizes. Raises ArtifactError on another answer."""
        steps, rows, _ = vectors.x.shape
        state = self.fresh_states(rows)
        for i in range(steps):
            before = state
            out = self.step(before, vectors.x[i], vectors.t[i], vectors.learn[i], vectors.alpha[i])
            for name in ("p_value", "onset_p", "expected", "lower", "upper", "contribution", "likely", "before"):
                self._compare(name, i, getattr(out, name), getattr(vectors, name)[i])
            state = out.state
        self._compare("state", steps - 1, state, vectors.state)
        last = (before, vectors.x[-1], vectors.t[-1], vectors.learn[-1], vectors.alpha[-1])
        self._check_row_invariance(last, out)

    def retest(self) -> SelfTest:
        """Run the file's own vectors once more, which blocks; returns them. Raises ArtifactError on another answer."""
        vectors = SelfTest.decode(self._session.get_modelmeta().custom_metadata_map[SELFTEST_KEY])
        self.self_test(vectors)
        return vectors

    def _step_padded(self, state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        rows, padded = len(x), MAX_ROWS if self._whole_batches else bucket(len(x))
        feed = {"state": state, "x": x, "t": t, "learn": learn, "alpha": alpha}
        if padded != rows:
            feed = {name: _pad(values, padded) for name, values in feed.items()}
        try:
            return StepOutput.of(self._session.run(self._outputs, feed), rows)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if "bad_alloc" in str(error):
                raise MemoryError(str(error)) from error
            raise

    def _check_interface(self, path: Path) -> None:
        inputs = {node.name for node in self._session.get_inputs()}
        outputs = {node.name: _width(node) for node in self._session.get_outputs()}
        if inputs != _INPUTS or not outputs.keys() >= set(self._outputs):
            raise ArtifactError(
                f"{path} has inputs {sorted(inputs)} and outputs {sorted(outputs)}; "
                f"a step function has {sorted(_INPUTS)} and {self._outputs}."
            )
        if self.manifest.lines is not None and (outputs["likely"], outputs["before"]) != self._widths:
            got = f"'likely' of {outputs['likely']} and 'before' of {outputs['before']} columns"
            raise ArtifactError(f"{path}: the graph gives {got}, the manifest says {' and '.join(map(str, self._widths))}.")
        width = {node.name: _width(node) for node in self._session.get_inputs()}
        if width["state"] != self.state_size or width["x"] != self.features:
            raise ArtifactError(
                f"{path}: the graph takes a state of {width['state']} and {width['x']} features, "
                f"the manifest says {self.state_size} and {self.features}."
            )

    def _check_vectors(self, vectors: SelfTest, path: Path) -> None:
        T, B = vectors.x.shape[:2] if vectors.x.ndim == 3 else (0, 0)
        F, S = self.features, self.state_size
        likely, before = self._widths
        shapes: dict[str, tuple[int, ...]] = {"state": (B, S), "t": (T, B, 3), "likely": (T, B, likely), "before": (T, B, before)}
        shapes |= dict.fromkeys(("learn", "alpha", "p_value", "onset_p"), (T, B))
        shapes |= dict.fromkeys(("x", "expected", "lower", "upper", "contribution"), (T, B, F))
        wrong = next((name for name, shape in shapes.items() if getattr(vectors, name).shape != shape), None)
        if wrong is not None or T * B == 0:
            raise ArtifactError(
                f"{path}: the self-test's '{wrong or 'x'}' has shape {getattr(vectors, wrong or 'x').shape}, which fits no test."
            )

    def _compare(self, name: str, step: int, got: Float32, want: Float32) -> None:
        if name in ("p_value", "onset_p"):
            got, want = np.log(got), np.log(want)
        if got.shape != want.shape or not np.allclose(got, want, rtol=SELFTEST_TOLERANCE, atol=SELFTEST_TOLERANCE, equal_nan=True):
            raise ArtifactError(
                f"Model {self.manifest.filename} does not pass its self-test: "
                f"{name} of step {step} differs from what it answered when it was published."
            )

    def _check_row_invariance(self, inputs: tuple[Float32, ...], want: StepOutput) -> None:
        """A row must not feel its batch-mates: exact replay rests on it."""
        rows = len(inputs[1])
        for size in (SELFTEST_ROWS, 16, 32, 48, 64, 80, 112, 192, 256, MAX_ROWS):
            if size < rows:
                continue
            copies = -(-size // rows)
            repeated = self.step(*(np.concatenate([values] * copies)[:size] for values in inputs))
            for name in StepOutput.__dataclass_fields__:
                got = getattr(repeated, name)[:rows]
                if not np.array_equal(got, getattr(want, name), equal_nan=True):
                    raise ArtifactError(
                        f"Model {self.manifest.filename} answers differently in a batch of {size} than in one of {bucket(rows)}: "
                        "exact replay is impossible on this machine."
                    )


def load_detectors(path: Path, intra_op_threads: int = 1, provider: Provider = "cpu") -> dict[str, Detector]:
    """All detectors that `path` names, by name. Raises ArtifactError when two files carry the same name."""
    detectors: dict[str, Detector] = {}
    for file in find_artifacts(path):
        detector = Detector.load(file, intra_op_threads, provider)
        if detector.name in detectors:
            raise ArtifactError(
                f"{path} holds two models named '{detector.name}': keep one version of each, or name yours otherwise (`fit --name`)."
            )
        detectors[detector.name] = detector
    return detectors


def session_of(graph: bytes, intra_op_threads: int = 1, provider: Provider = "cpu") -> ort.InferenceSession:
    """As every step function is run. Raises BadSetting where `provider` cannot be had, and what ONNX Runtime raises for a bad graph.

    ONNX Runtime itself goes on with its CPU provider when another one fails: what the session says it got is compared.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Weights in another file, which the seal does not cover, would be looked for where the service was started. There is no such folder.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    name, settings = _EXECUTION[provider]
    if name not in ort.get_available_providers():
        raise BadSetting(f"ONSET_PROVIDER is '{provider}', but this ONNX Runtime was built without {name}: install onset[gpu].")
    if provider == "cuda":
        with contextlib.redirect_stdout(sys.stderr):  # where it says what it misses
            ort.preload_dlls()  # NVIDIA's libraries from their wheels; the loader would not look there
    session = ort.InferenceSession(graph, options, providers=[(name, settings)], disabled_optimizers=_DISABLED)
    if (got := session.get_providers())[0] != name:
        raise BadSetting(
            f"ONSET_PROVIDER is '{provider}', but ONNX Runtime got no further than {got[0]}: {name} needs an NVIDIA GPU with its driver, "
            "and CUDA and cuDNN (pip install 'onset[gpu]'). Its own words are on standard error."
        )
    return session


def _width(node: ort.NodeArg) -> int | str | None:
    """The last axis of an input or an output, as far as the graph says it."""
    return node.shape[-1] if node.shape else None


def _pad(values: Float32, rows: int) -> Float32:
    padded = np.zeros((rows, *values.shape[1:]), np.float32)
    padded[: len(values)] = values
    return padded
