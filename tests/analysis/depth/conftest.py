"""A run that several modules look at."""

from pathlib import Path

import pytest

from tests.running import SMOKE, llmnorm


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A smoke run of 3 blocks, 12 steps, checkpoints of the steps 6 and 12."""
    directory = tmp_path_factory.mktemp("depth") / "deep"
    settings = ["training.steps=12", "checkpoint.every=6", "evaluation.every=12"]
    model = ["model.num_hidden_layers=3", "model.initializer_range=0.1", "training.ema=0.9"]
    llmnorm("train", SMOKE, *settings, *model, f"run_dir={directory}", f"data.dir={smoke_data}")
    return directory
