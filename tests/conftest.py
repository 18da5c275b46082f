"""Fixtures that several test modules share."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are bit-equal only at equal threads

import pytest

from tests.running import ROOT, SMOKE, Child


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke corpus, tokenized and packed once a session."""
    from llmnorm.config_file import load
    from llmnorm.data import packing

    directory = tmp_path_factory.mktemp("data")
    config = load(SMOKE, [f"data.dir={directory}"]).config
    packing.prepare(config.data, config.tokenizer)
    return directory


@pytest.fixture
def start(tmp_path: Path, smoke_data: Path) -> Callable[..., Child]:
    """`start("train", config, "key=value")` -> a running child on the smoke data."""

    def begin(command: str, *arguments: str | Path) -> Child:
        words = [command, *map(str, arguments), f"data.dir={smoke_data}"]
        return Child(words, tmp_path / "log.txt")

    return begin
