"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.detector import Detector
from tests.tiny import build_tiny


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed one-feature artifact (`value`), built without torch."""
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_detector(tiny_model_path: Path) -> Detector:
    return Detector.load(tiny_model_path)
