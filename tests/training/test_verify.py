"""A model that does not prove itself is not published; each refusal says what differs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.artifact import Feature, Manifest
from service.detector import Detector, StepOutput, session_of
from service.errors import ArtifactError
from tests.training.conftest import TINY, random_step
from training.autoencoder import Autoencoder
from training.cells import StandardCell
from training.data import Float32
from training.detector import WARMUP, DetectorStep
from training.export import manifest_of, publish, to_onnx, training_record
from training.fit import Plan
from training.layout import Parts
from training.networks import Stack
from training.pipeline import _published, default_job
from training.signals import ResidualSignals
from training.verify import (
    Runner,
    StepFunction,
    probe_inputs,
    verify_file,
    verify_manifest,
    verify_same_answers,
    verify_sequence,
    verify_slicing,
    verify_step,
)


@pytest.fixture
def manifest(univariate: DetectorStep) -> Manifest:
    record = training_record(command="python -m training", seed=0, data="none", data_sha256="", streams=1, rows=1)
    return manifest_of(univariate, name="probe", version="1", features=[Feature(name="value")], training=record)


def test_an_honest_model_is_published_and_loads(univariate: DetectorStep, graph: bytes, manifest: Manifest, tmp_path: Path) -> None:
    path = publish(univariate, graph, manifest, tmp_path)
    assert verify_file(path) == manifest
    assert [file.name for file in tmp_path.iterdir()] == ["probe-1.onnx"]
    assert manifest.warmup == WARMUP
    assert manifest.calibration["tau"] == univariate.calibration.onsets.tau
    assert {"reference", "encoder_hidden", "ends", "onset_height"} <= {part.name for part in manifest.layout}


def test_a_graph_that_answers_differently_from_pytorch_is_refused(
    univariate: DetectorStep, graph: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    changed = copy.deepcopy(univariate)
    assert isinstance(changed.autoencoder, Autoencoder)
    with torch.no_grad():
        changed.autoencoder.heads.location.bias.add_(0.01)
    with pytest.raises(ArtifactError, match=r"Refused: .* of step \d+ differs by .* between PyTorch and ONNX Runtime"):
        publish(changed, graph, manifest, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_number_where_the_other_has_none_is_refused(univariate: DetectorStep, run: Runner) -> None:
    def eager(state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        out = run(state, x, t, learn, alpha)
        return dataclasses.replace(out, p_value=np.nan_to_num(out.p_value, nan=1.0))

    with pytest.raises(ArtifactError, match="p_value of step 0 is a number in one of PyTorch and ONNX Runtime and none in the other"):
        verify_same_answers(univariate, eager)


class ForgetfulStack(Stack):
    """In a sequence it forgets its state at every event."""

    def sequence(self, inputs: Tensor, state: Parts) -> tuple[Tensor, Parts]:
        steps = [self.step(row, self.fresh(len(row))) for row in inputs.unbind(0)]
        return torch.stack([output for output, _ in steps]), steps[-1][1]


def test_a_network_that_answers_a_sequence_otherwise_than_its_steps_is_refused(univariate: DetectorStep) -> None:
    verify_sequence(univariate)
    changed = copy.deepcopy(univariate)
    assert isinstance(changed.autoencoder, Autoencoder)
    forgetful = ForgetfulStack.of(StandardCell, changed.autoencoder.inputs, TINY.hidden, TINY.layers)
    forgetful.load_state_dict(changed.autoencoder.encoder.state_dict())
    changed.autoencoder.encoder = forgetful
    with pytest.raises(ArtifactError, match=r"event 1 of a sequence differs by .* from the same events one by one"):
        verify_sequence(changed)


def by_batch_mean(run: StepFunction) -> StepFunction:
    def step(state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        out = run(state, x, t, learn, alpha)
        return dataclasses.replace(out, expected=(out.expected + 1e-3 * np.nan_to_num(x).mean()).astype(np.float32))

    return step


def by_position(run: StepFunction) -> StepFunction:
    def step(state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        out = run(state, x, t, learn, alpha)
        return dataclasses.replace(out, upper=np.nextafter(out.upper, (np.arange(len(x)) % 4 * 1e30).astype(np.float32)[:, None]))

    return step


@pytest.mark.parametrize(("sabotage", "name"), [(by_batch_mean, "expected"), (by_position, "upper")])
def test_a_row_that_feels_its_batch_mates_is_refused(univariate: DetectorStep, run: Runner, sabotage: object, name: str) -> None:
    assert callable(sabotage)
    with pytest.raises(ArtifactError, match=f"{name} of step .* a row feels its batch-mates"):
        verify_slicing(sabotage(run), univariate)


def test_a_manifest_that_does_not_survive_its_encoding_is_refused(manifest: Manifest) -> None:
    verify_manifest(manifest)
    with pytest.raises(ArtifactError, match="manifest's quality changes when it is written and read back"):
        verify_manifest(manifest.model_copy(update={"quality": {"false_onsets": (1, 2)}}))


def test_a_refusal_names_what_in_the_history_may_be_no_readings(
    univariate: DetectorStep, graph: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    """Of -9999 in the history all that was said, after the training, was that PyTorch and ONNX Runtime differ."""
    refused = manifest.model_copy(update={"quality": {"false_onsets": (1, 2)}})
    job = default_job(Plan(), "1", "", lanes=2, length=50)
    with pytest.raises(ArtifactError, match=r"written and read back[^-]*\. -9999 in load \(1\)\.$"):
        _published(univariate, graph, refused, tmp_path, dataclasses.replace(job, sentinels="-9999 in load (1)."))
    with pytest.raises(ArtifactError, match=r"written and read back[^-]*\.$"):
        _published(univariate, graph, refused, tmp_path, job)


def test_the_served_model_answers_as_pytorch_does(univariate: DetectorStep, graph: bytes, manifest: Manifest, tmp_path: Path) -> None:
    detector = Detector.load(publish(univariate, graph, manifest, tmp_path))
    verify_same_answers(univariate, detector.step)


def test_probe_inputs_reach_beyond_the_warm_up_and_raise_onsets(univariate: DetectorStep, run: Runner) -> None:
    x, t, learn, alpha = probe_inputs(160, 24, 1)
    state, onsets = np.zeros((24, univariate.state_size), np.float32), 0
    for i in range(160):
        out = run(state, x[i], t[i], learn[i], alpha[i])
        state, onsets = out.state, onsets + int((out.onset_p < 1).sum())
    assert onsets > 10


def test_a_fleet_of_commands_that_hardly_ever_change_is_published() -> None:
    """Their pooled precision is large, and what a stream adds to it a small difference of large numbers."""
    step = random_step(45)
    assert isinstance(step.signals, ResidualSignals)
    commands = torch.from_numpy((np.random.default_rng(0).random((3000, 45)) < 0.002).astype(np.float32))
    step.signals.fit(commands, commands)
    assert step.signals.usual_precision.max() > 100
    verify_step(step, Runner(session_of(to_onnx(step))))


def test_a_fleet_of_features_that_are_counted_in_thousands_is_published() -> None:
    """Their pooled deviation is large, and a forecast within it a small difference of large ones: litres a day, or a 65535 now and then."""
    step = random_step(4)
    step.normaliser.floor.copy_(torch.tensor([1e3, 1e4, 1e5, 1.0]))
    verify_step(step, Runner(session_of(to_onnx(step))))


def test_a_spread_is_verified_within_the_square_of_the_pooled_deviation() -> None:
    """A history with 65535 left in was refused for 1.2e-5 in it: the square of a reading's distance from a forecast of hundreds."""
    step = random_step(2)
    step.normaliser.floor.copy_(torch.tensor([600.0, 0.1]))
    assert step.magnitude("spread") == pytest.approx(np.array([[360_000], [0.01]]))


def test_what_is_made_of_an_events_distances_is_verified_by_one_measure(univariate: DetectorStep) -> None:
    """On one kind of processor the default was refused for 1.5e-5 of a decade in a height, and an ECG's for 1.4e-5 in a p-value."""
    assert univariate.magnitude("onset_height") == univariate.magnitude("onset_p") == univariate.magnitude("p_value") == 10
    assert univariate.magnitude("onset_hold") == 0


def test_a_p_value_that_is_off_by_a_thousandth_of_a_decade_is_refused(univariate: DetectorStep, run: Runner) -> None:
    def off(state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        out = run(state, x, t, learn, alpha)
        return dataclasses.replace(out, p_value=out.p_value * np.float32(10**0.001))

    with pytest.raises(ArtifactError, match="p_value of step"):
        verify_same_answers(univariate, off)
