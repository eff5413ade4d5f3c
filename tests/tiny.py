"""A tiny detector built without torch: a running mean and deviation per feature, in the shape of a real step function.

It keeps every promise of the artifact (warm-up, missing values, onset, frozen learning), so tests of the service need no training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from service.artifact import MANIFEST_KEY, SELFTEST_KEY, SHA256_KEY, UNSEALED, Cell, Feature, Manifest, SelfTest, Slice, Training, seal

WARMUP = 5
UNTRAINED = Training(
    command="none", seed=0, data="none", data_sha256="", streams=0, rows=0, commit="", torch_version="", created="2026-01-01"
)

# e = largest |x - mean| / deviation; p = exp(-e). State: n, mean [F], deviation [F].
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
tiny (float[B, S] state, float[B, F] x, float[B, 3] t, float[B] learn, float[B] alpha)
  => (float[B, S] state_out, float[B] p_value, float[B] onset_p, float[B, F] expected, float[B, F] lower, float[B, F] upper,
      float[B, F] contribution)
<float[1] one = {1.0}, float[1] nan = {nan}, float[1] floor = {1e-3}, float[1] smallest = {1e-30},
 float[1] warmup = {WARMUP}, float[1] memory = {100.0}, float[1] three = {3.0}, float lowest = {-1e30},
 float highest = {1e30}, int64[1] axis = {1}, int64[3] sizes = {1, F, F}>
{
  n, mean, deviation = Split <axis = 1> (state, sizes)
  missing = IsNaN(x)
  bounded = Clip(x, lowest, highest)
  first = Less(n, one)
  filled = Where(missing, mean, bounded)
  known = Where(first, filled, mean)
  error = Sub(filled, known)
  size = Abs(error)
  scale = Add(deviation, floor)
  z = Div(size, scale)
  e = ReduceMax <keepdims = 1> (z, axis)
  surprise = Neg(e)
  chance = Exp(surprise)
  p = Max(chance, smallest)
  cold = Less(n, warmup)
  present = Not(missing)
  present_number = Cast <to = 1> (present)
  given = ReduceMax <keepdims = 1> (present_number, axis)
  nothing = Less(given, one)
  silent = Or(cold, nothing)
  judged = Where(silent, nan, p)
  p_value = Squeeze(judged, axis)
  asked = Unsqueeze(alpha, axis)
  calm = GreaterOrEqual(p, asked)
  onset = Where(calm, one, p)
  onset_judged = Where(silent, nan, onset)
  onset_p = Squeeze(onset_judged, axis)
  learning = Unsqueeze(learn, axis)
  n_out = Add(n, one)
  window = Min(n_out, memory)
  rate = Div(learning, window)
  mean_step = Mul(rate, error)
  mean_out = Add(known, mean_step)
  deviation_error = Sub(size, deviation)
  deviation_step = Mul(rate, deviation_error)
  deviation_out = Add(deviation, deviation_step)
  state_out = Concat <axis = 1> (n_out, mean_out, deviation_out)
  expected = Where(first, nan, mean)
  margin = Mul(three, scale)
  lower = Sub(expected, margin)
  upper = Add(expected, margin)
  total = ReduceSum <keepdims = 1> (z, axis)
  divisor = Max(total, smallest)
  contribution = Div(z, divisor)
}
"""


def tiny_manifest(features: tuple[str, ...], name: str = "tiny", version: str = "1") -> Manifest:
    F = len(features)
    return Manifest(
        name=name,
        version=version,
        features=[Feature(name=feature) for feature in features],
        state_size=1 + 2 * F,
        layout=[Slice(name="events", size=1), Slice(name="mean", size=F), Slice(name="deviation", size=F)],
        warmup=WARMUP,
        cell=Cell(variant="none", layers=1, hidden=1, code=1, decoder_hidden=1),
        training=UNTRAINED,
    )


def build_tiny(folder: Path, features: tuple[str, ...] = ("value",), name: str = "tiny", version: str = "1", graph: str = GRAPH) -> Path:
    """Write a sealed artifact into `folder` and return its path."""
    manifest = tiny_manifest(features, name, version)
    model = onnx.parser.parse_model(_text(len(features), graph))
    return sealed(folder, manifest, model, _answers(model, manifest))


def sealed(folder: Path, manifest: Manifest, model: onnx.ModelProto, vectors: SelfTest) -> Path:
    """The artifact in `folder`."""
    onnx.checker.check_model(model)
    set_metadata(model, {MANIFEST_KEY: manifest.model_dump_json(), SELFTEST_KEY: vectors.encode(), SHA256_KEY: UNSEALED})
    path = folder / manifest.filename
    path.write_bytes(seal(model.SerializeToString()))
    return path


def set_metadata(graph: Any, entries: dict[str, str]) -> None:
    onnx.helper.set_model_props(graph, entries)


def _text(F: int, graph: str) -> str:
    sizes = {"WARMUP": f"{WARMUP:.1f}", "{1, F, F}": f"{{1, {F}, {F}}}", ", F]": f", {F}]", ", S]": f", {1 + 2 * F}]"}
    text = graph
    for mark, size in sizes.items():
        text = text.replace(mark, size)
    return text


def _answers(graph: Any, manifest: Manifest) -> SelfTest:
    T, B, F = 32, 8, len(manifest.features)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, B, F)).astype(np.float32)
    x[rng.random(x.shape) < 0.05] = np.nan
    t = np.ones((T, B, 3), np.float32)
    learn, alpha = np.ones((T, B), np.float32), np.full((T, B), 1e-3, np.float32)
    session = ort.InferenceSession(graph.SerializeToString())
    names = ["state_out", "p_value", "onset_p", "expected", "lower", "upper", "contribution"]
    state, answers = np.zeros((B, manifest.state_size), np.float32), []
    for i in range(T):
        out = dict(
            zip(names, session.run(names, {"state": state, "x": x[i], "t": t[i], "learn": learn[i], "alpha": alpha[i]}), strict=True)
        )
        state = out.pop("state_out")
        answers.append(out)
    nothing = np.zeros((T, B, 0), np.float32)
    return SelfTest(
        x,
        t,
        learn,
        alpha,
        **{name: np.stack([a[name] for a in answers]) for name in names[1:]},
        likely=nothing,
        before=nothing,
        state=state,
    )
