"""A tiny log detector built without torch: a table of how often one line follows another, in the shape of a real step function.

It keeps every promise that a log artifact makes beyond a sensor's: `likely`, `before`, sessions that end and begin afresh.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort

from service.artifact import (
    Cell,
    Feature,
    Lines,
    Manifest,
    SelfTest,
    Slice,
)
from service.lines import DEFAULT_MASKS
from tests.tiny import UNTRAINED, sealed

TEMPLATES = ["Accepted connection from <IP>", "Took <NUM> ms for <*>", "Closed connection from <IP>", "Disk <*> is <NUM> percent full"]
LIKELY, BEFORE = 3, 4
OUTPUTS = ["state_out", "p_value", "onset_p", "expected", "lower", "upper", "contribution", "likely", "before"]

# State: 0 where a session begins, else the code before + 1; then the codes before that one, each + 1. p = the table's chance.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
tiny_log (float[B, S] state, float[B, 4] x, float[B, 3] t, float[B] learn, float[B] alpha)
  => (float[B, S] state_out, float[B] p_value, float[B] onset_p, float[B, 4] expected, float[B, 4] lower, float[B, 4] upper,
      float[B, 4] contribution, float[B, L] likely, float[B, K] before)
<float[1] one = {1.0}, float[1] zero = {0.0}, float[1] nan = {nan}, float[1] end = {END}, int64[1] first = {0}, int64[1] second = {1},
 int64[1] axis = {1}, int64[1] most = {MOST}, int64[1] kept = {KEPT}, float[1, 4] gap = {nan, 2.0, nan, nan},
 float[1, 4] low = {nan, 1.0, nan, nan}, float[1, 4] high = {nan, 3.0, nan, nan}, float[1, 4] whole = {1.0, 0.0, 0.0, 0.0}>
{
  code = Slice(x, first, second, axis)
  was = Slice(state, first, second, axis)
  row = Cast <to = 7> (was)
  place = Squeeze(row, axis)
  chances = Gather <axis = 0> (table, place)
  at = Cast <to = 7> (code)
  chance = GatherElements <axis = 1> (chances, at)
  p_value = Squeeze(chance, axis)
  calm = GreaterOrEqual(p_value, alpha)
  onset_p = Where(calm, one, p_value)
  best, best_code = TopK(chances, most)
  best_number = Cast <to = 1> (best_code)
  likely = Concat <axis = 1> (best_number, best)
  none = Equal(state, zero)
  codes = Sub(state, one)
  before = Where(none, nan, codes)
  mark = Add(code, one)
  older = Slice(state, first, kept, axis)
  ring = Concat <axis = 1> (mark, older)
  over = Equal(code, end)
  state_out = Where(over, zero, ring)
  nothing = Mul(x, zero)
  blank = IsNaN(x)
  level = Where(blank, zero, nothing)
  expected = Add(level, gap)
  lower = Add(level, low)
  upper = Add(level, high)
  contribution = Add(level, whole)
}
"""


def build_tiny_log(folder: Path, name: str = "tiny-log", **lines: object) -> Path:
    """Write a sealed artifact into `folder` and return its path; `lines` in place of the usual ones."""
    manifest = tiny_log_manifest(name, **lines)
    model = onnx.parser.parse_model(_text(manifest))
    table = onnx.numpy_helper.from_array(chances(manifest), "table")
    model.graph.initializer.append(table)
    return sealed(folder, manifest, model, _answers(model, manifest))


def tiny_log_manifest(name: str = "tiny-log", **lines: object) -> Manifest:
    return Manifest(
        name=name,
        version="1",
        kind="log",
        features=[Feature(name=feature) for feature in ("template", "gap", "number_1", "number_2")],
        lines=Lines.model_validate({"masks": DEFAULT_MASKS, "templates": TEMPLATES, "likely": LIKELY, "before": BEFORE} | lines),
        state_size=BEFORE,
        layout=[Slice(name="ring", size=BEFORE)],
        warmup=0,
        cell=Cell(variant="none", layers=1, hidden=1, code=1, decoder_hidden=1),
        training=UNTRAINED,
    )


def chances(manifest: Manifest) -> np.ndarray:
    """[V + 3, V + 2]: of each code after each one, the first row being a session's start. A session is 1, 2, …, 2, 3, end."""
    assert manifest.lines is not None
    V = len(manifest.lines.templates)
    table = np.full((V + 3, V + 2), 1e-4)
    table[0, 1] = table[1 + 1, 2] = 0.9
    table[1 + 2, [2, 3]] = 0.6, 0.3
    table[1 + 3, V + 1] = 0.9
    table /= table.sum(axis=1, keepdims=True)
    return table.astype(np.float32)


def _text(manifest: Manifest) -> str:
    assert manifest.lines is not None
    sizes = {"{END}": f"{{{manifest.lines.end}.0}}", "{MOST}": f"{{{LIKELY}}}", "{KEPT}": f"{{{BEFORE - 1}}}"}
    sizes |= {", S]": f", {BEFORE}]", ", L]": f", {2 * LIKELY}]", ", K]": f", {BEFORE}]"}
    text = GRAPH
    for mark, size in sizes.items():
        text = text.replace(mark, size)
    return text


def _answers(graph: onnx.ModelProto, manifest: Manifest) -> SelfTest:
    assert manifest.lines is not None
    T, B, F = 32, 8, len(manifest.features)
    rng = np.random.default_rng(0)
    x = np.full((T, B, F), np.nan, np.float32)
    x[:, :, 0] = rng.integers(0, manifest.lines.end + 1, (T, B))
    t, learn, alpha = np.ones((T, B, 3), np.float32), np.ones((T, B), np.float32), np.full((T, B), 1e-3, np.float32)
    session = ort.InferenceSession(graph.SerializeToString())
    state, answers = np.zeros((B, manifest.state_size), np.float32), []
    for i in range(T):
        feed = {"state": state, "x": x[i], "t": t[i], "learn": learn[i], "alpha": alpha[i]}
        out = dict(zip(OUTPUTS, session.run(OUTPUTS, feed), strict=True))
        state = out.pop("state_out")
        answers.append(out)
    return SelfTest(x, t, learn, alpha, **{name: np.stack([a[name] for a in answers]) for name in OUTPUTS[1:]}, state=state)
