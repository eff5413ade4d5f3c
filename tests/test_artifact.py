"""An artifact describes itself, and one that does not match is refused with the reason."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from service.artifact import (
    MANIFEST_KEY,
    METADATA_BYTES,
    MODEL_BYTES,
    SELFTEST_BYTES,
    SELFTEST_KEY,
    SHA256_KEY,
    UNSEALED,
    Manifest,
    SelfTest,
    find_artifacts,
    seal,
)
from service.detector import Detector, load_detectors
from service.errors import ArtifactError
from tests.tiny import build_tiny, set_metadata, tiny_manifest


def resealed(path: Path, change: dict[str, str]) -> Path:
    """The artifact at `path` with other metadata and a valid hash."""
    model = onnx.load(path)
    entries = {entry.key: entry.value for entry in model.metadata_props} | {SHA256_KEY: UNSEALED} | change
    set_metadata(model, {key: value for key, value in entries.items() if value})
    path.write_bytes(seal(model.SerializeToString()))
    return path


def test_a_sealed_artifact_loads_and_knows_its_features(tmp_path: Path) -> None:
    detector = Detector.load(build_tiny(tmp_path, ("a", "b")))
    assert detector.manifest == tiny_manifest(("a", "b"))
    assert detector.manifest.feature_names == ("a", "b")
    assert detector.providers == ["CPUExecutionProvider"]


@pytest.mark.parametrize("offset", [100, -100, -2000])
def test_one_changed_byte_is_refused(tmp_path: Path, offset: int) -> None:
    path = build_tiny(tmp_path)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was changed after it was published"):
        Detector.load(path)


def test_a_file_that_was_never_sealed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"carries no 'onset\.sha256'"):
        Detector.load(path)


def test_weights_in_another_file_are_refused_as_the_seal_does_not_cover_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_tiny(tmp_path)
    model, weights = onnx.load(path), np.zeros(4096, np.float32)
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(weights.tobytes())  # where the service was started, and beside the model file
    outside = onnx.TensorProto(
        name="outside", data_type=onnx.TensorProto.FLOAT, dims=weights.shape, data_location=onnx.TensorProto.EXTERNAL
    )
    outside.external_data.add(key="location", value="weights.bin")
    model.graph.initializer.append(outside)
    [last] = [node for node in model.graph.node if "p_value" in node.output]
    last.output[:] = ["p_inside" if name == "p_value" else name for name in last.output]
    made = onnx.helper.make_node
    model.graph.node.extend(
        [
            made("IsNaN", ["alpha"], ["never"]),
            made("Cast", ["never"], ["place"], to=onnx.TensorProto.INT64),
            made("Gather", ["outside", "place"], ["taken"]),
            made("Add", ["p_inside", "taken"], ["p_value"]),
        ]
    )
    set_metadata(model, {entry.key: entry.value for entry in model.metadata_props} | {SHA256_KEY: UNSEALED})
    path.write_bytes(seal(model.SerializeToString()))
    with pytest.raises(ArtifactError, match="External data path does not exist"):
        Detector.load(path)


def test_other_answers_than_the_self_test_are_refused(tmp_path: Path) -> None:
    path = build_tiny(tmp_path)
    props = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    vectors = SelfTest.decode(props[SELFTEST_KEY])
    vectors.p_value[20, 3] *= 0.9
    with pytest.raises(ArtifactError, match="does not pass its self-test: p_value of step 20"):
        Detector.load(resealed(path, {SELFTEST_KEY: vectors.encode()}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: {"x": v.x[:0]}, "shape"),
        (lambda v: {"x": v.x[:, :, 0]}, "shape"),
        (lambda v: {"x": np.repeat(v.x, 2, axis=2)}, r"'x' has shape \(32, 8, 2\)"),
        (lambda v: {"p_value": v.p_value[:3]}, r"'p_value' has shape \(3, 8\)"),
        (lambda v: {"likely": np.zeros((32, 8, 2))}, r"'likely' has shape \(32, 8, 2\)"),
    ],
)
def test_a_self_test_of_another_shape_is_refused(tmp_path: Path, change: Callable[[SelfTest], dict[str, Any]], says: str) -> None:
    path = build_tiny(tmp_path)
    vectors = SelfTest.decode({entry.key: entry.value for entry in onnx.load(path).metadata_props}[SELFTEST_KEY])
    with pytest.raises(ArtifactError, match=says):
        Detector.load(resealed(path, {SELFTEST_KEY: replace(vectors, **change(vectors)).encode()}))


def test_a_graph_that_does_not_say_its_widths_is_refused(tmp_path: Path) -> None:
    path = build_tiny(tmp_path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="takes a state of None"):
        Detector.load(resealed(path, {}))


def test_an_artifact_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no onset\.manifest"):
        Detector.load(resealed(build_tiny(tmp_path), {MANIFEST_KEY: ""}))


def test_a_manifest_of_another_format_is_refused_by_field(tmp_path: Path) -> None:
    manifest = tiny_manifest(("value",)).model_dump_json().replace('"format":1', '"format":2')
    with pytest.raises(ArtifactError, match="manifest field format"):
        Detector.load(resealed(build_tiny(tmp_path), {MANIFEST_KEY: manifest}))


def test_a_manifest_for_another_graph_is_refused(tmp_path: Path) -> None:
    manifest = tiny_manifest(("a", "b")).model_dump_json()
    with pytest.raises(ArtifactError, match="the graph takes a state of 3 and 1 features, the manifest says 5 and 2"):
        Detector.load(resealed(build_tiny(tmp_path), {MANIFEST_KEY: manifest}))


def test_unreadable_self_test_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="self-test vectors cannot be read"):
        Detector.load(resealed(build_tiny(tmp_path), {SELFTEST_KEY: "???"}))


def test_a_self_test_that_unpacks_to_more_than_one_has_is_refused_before_it_is(tmp_path: Path) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, x=np.zeros((SELFTEST_BYTES // 4 + 1,), np.float32))
    assert len(packed.getvalue()) < 100_000
    path = resealed(build_tiny(tmp_path), {SELFTEST_KEY: base64.b64encode(packed.getvalue()).decode()})
    with pytest.raises(ArtifactError, match=f"unpack to 6710[0-9]+ bytes, at most {SELFTEST_BYTES}"):
        Detector.load(path)


def test_a_file_that_is_too_large_is_refused_unread_and_one_that_says_too_much_before_it_is_copied(tmp_path: Path) -> None:
    path = resealed(build_tiny(tmp_path), {"notes": "x" * METADATA_BYTES})
    with pytest.raises(ArtifactError, match=f"has 3356[0-9]+ bytes of metadata; a model has {METADATA_BYTES} at most"):
        Detector.load(path)
    with path.open("wb") as file:
        file.truncate(MODEL_BYTES + 1)  # which takes no room on the disk
    with pytest.raises(ArtifactError, match=f"has {MODEL_BYTES + 1} bytes; a model has {MODEL_BYTES} at most"):
        Detector.load(path)


def test_what_is_wrong_with_a_manifest_is_told_in_a_sentence_however_long_it_is(tmp_path: Path) -> None:
    path = resealed(build_tiny(tmp_path), {MANIFEST_KEY: "[" * 1_000_000})
    with pytest.raises(ArtifactError, match="manifest field the whole") as refused:
        Detector.load(path)
    assert len(str(refused.value)) < 1000


def test_a_layout_that_does_not_add_up_is_refused() -> None:
    good = tiny_manifest(("value",)).model_dump()
    with pytest.raises(ValidationError, match="add up to 3 floats, state_size says 4"):
        Manifest.model_validate(good | {"state_size": 4})
    with pytest.raises(ValidationError, match="not unique"):
        Manifest.model_validate(good | {"features": [{"name": "a"}, {"name": "a"}]})


def test_sealing_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it must have exactly one"):
        seal(build_tiny(tmp_path).read_bytes())


def test_a_folder_of_models_is_loaded_by_name_and_two_of_a_name_are_refused(tmp_path: Path) -> None:
    build_tiny(tmp_path, name="one")
    build_tiny(tmp_path, name="two")
    assert set(load_detectors(tmp_path)) == {"one", "two"}
    build_tiny(tmp_path, name="one", version="2")
    with pytest.raises(ArtifactError, match="two models named 'one'"):
        load_detectors(tmp_path)


def test_several_places_with_commas_between_and_the_shipped_detector_by_its_word(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_tiny(tmp_path / name, name=name)
    assert set(load_detectors(Path(f"shipped,{tmp_path / 'one'}, {tmp_path / 'two'}"))) == {"default", "one", "two"}
    assert set(load_detectors(Path("shipped"))) == {"default"}
    with pytest.raises(ArtifactError, match="No model at nowhere"):
        load_detectors(Path("shipped,nowhere"))


def test_a_place_without_models_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"give an \.onnx file or a folder"):
        find_artifacts(tmp_path)
    with pytest.raises(ArtifactError, match="No model at"):
        find_artifacts(tmp_path / "absent.onnx")


def test_self_test_vectors_round_trip(tmp_path: Path) -> None:
    props = {entry.key: entry.value for entry in onnx.load(build_tiny(tmp_path)).metadata_props}
    vectors = SelfTest.decode(props[SELFTEST_KEY])
    assert np.array_equal(SelfTest.decode(vectors.encode()).p_value, vectors.p_value, equal_nan=True)
