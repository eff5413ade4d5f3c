"""The network of several features: its code sees the newest event itself, and what is missing is the last value."""

from __future__ import annotations

import numpy as np
import torch

from tests.training.conftest import TINY, random_step
from training.autoencoder import Autoencoder, FleetAutoencoder
from training.cells import FusedCell, StandardCell
from training.data import Block, clock
from training.detector import DetectorStep
from training.fit import Lanes, Prepared, corrupted, prepare
from training.networks import Stack

F, B = 3, 4


def prepared(step: DetectorStep, rows: int, missing: float) -> Prepared:
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(rows, B, F)), axis=0).astype(np.float32)
    x[rng.random(x.shape) < missing] = np.nan
    t = np.stack([clock(1.7e9 + np.cumsum(rng.uniform(50, 70, rows))) for _ in range(B)], axis=1)
    block = Block(x, t)
    return prepare(step, torch.from_numpy(block.x), torch.from_numpy(block.t), Lanes.fresh(step, B))


def test_its_code_sees_the_newest_event_past_closed_gates() -> None:
    step = random_step(F)
    network = step.autoencoder
    assert isinstance(network, FleetAutoencoder)
    cell = network.encoder.get_submodule("cells.0")
    assert isinstance(cell, StandardCell)
    H = cell.hidden_size
    with torch.no_grad():
        for one in network.encoder.get_submodule("cells").children():
            assert isinstance(one, StandardCell)
            one.from_input.bias[2 * H : 3 * H] = -1e4  # output gates
        first, _ = network.step(torch.zeros(1, network.inputs), network.fresh(1))
        second, _ = network.step(torch.ones(1, network.inputs), network.fresh(1))
    assert (first != second).all()


def test_a_missing_value_is_shown_as_the_last_one_where_it_is_served_and_where_it_is_hidden_in_training() -> None:
    step = random_step(F)
    clean = prepared(step, 60, missing=0.3)
    shown, given, z = clean.inputs[:, :, :F], clean.present, clean.z
    seen = torch.where(given, torch.arange(60).reshape(-1, 1, 1), -1).cummax(dim=0).values
    last = torch.gather(z, 0, seen.clamp(min=0))
    assert torch.equal(shown, torch.where(seen < 0, 0.0, last))

    hidden = corrupted(clean, np.random.default_rng(1), B, slice(0, B))
    covered = hidden[:, :, 2 * F : 3 * F] == 0
    assert (covered & given).any()
    same_as_before = hidden[1:, :, :F] == hidden[:-1, :, :F]
    assert same_as_before[covered[1:]].all()
    assert not same_as_before[~covered[1:]].any()


def test_the_network_of_one_feature_is_the_shipped_defaults() -> None:
    """Its recorded command gives its weights again only if none of this touches it."""
    step = random_step(1)
    assert type(step.autoencoder) is Autoencoder
    for stack in (step.autoencoder.encoder, step.autoencoder.decoder):
        assert isinstance(stack, Stack)
        assert {type(cell) for cell in stack.cells} == {StandardCell}
    x = torch.tensor([[[1.0]], [[3.0]], [[torch.nan]]])
    said = prepare(step, x, torch.ones(3, 1, 3), Lanes.fresh(step, 1)).inputs[:, 0, 0]
    assert said[1] != 0
    assert said[2] == 0
    other = random_step(F).autoencoder
    assert isinstance(other, FleetAutoencoder)
    assert isinstance(other.encoder.get_submodule("cells.0"), FusedCell)
    assert other.bottleneck.in_features == TINY.hidden + other.inputs
