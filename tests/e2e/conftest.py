"""Real fleets for tests, and the releases they run: the real models and files made from them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from controller.cli.demo import models
from tests.e2e.world import World


@pytest.fixture
def controller_environment() -> dict[str, str]:
    """Settings of the controller, for a module to override."""
    return {}


@pytest.fixture
def world(tmp_path: Path, controller_environment: dict[str, str]) -> Iterator[World]:
    """A controller without devices."""
    world = World(tmp_path, controller_environment)
    try:
        world.start()
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="session")
def tuned(real_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The newer real model with a slightly different final layer: a small patch away."""
    file = tmp_path_factory.mktemp("models") / "tuned.onnx"
    models.recalibrated(real_models[1], np.linspace(-0.1, 0.1, 214, dtype=np.float32), file)
    return file


@pytest.fixture(scope="session")
def broken(real_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that loads and warms up, and answers NaN to content with the letter e."""
    file = tmp_path_factory.mktemp("models") / "broken.onnx"
    models.broken(real_models[1], file)
    return file
