"""Fixtures that several test modules share."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # runs are bit-equal only at equal threads

import pytest

from tests.running import MASKED, ROOT, SMOKE, Child, llmnorm

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which children inherit


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke corpus, tokenized and packed once a session."""
    from llmnorm.config.file import load
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


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A smoke run with QK-norm, a moving average and checkpoints of the steps 4, 8 and 12."""
    directory = tmp_path_factory.mktemp("run") / "qk"
    settings = ["training.steps=12", "training.ema=0.9", "checkpoint.every=4", "checkpoint.keep=3"]
    # 0.1: at 0.02 all logits of so small a model are alike and any token would do.
    model = ["model.mixer.qk_norm=true", "model.initializer_range=0.1", "optimizer.lr=1e-2"]
    places = [f"run_dir={directory}", f"data.dir={smoke_data}"]
    llmnorm("train", SMOKE, *settings, *model, "evaluation.every=4", *places)
    return directory


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    """The run's newest checkpoint as a directory of our class."""
    directory = run.parent / "exported"
    llmnorm("export", run, directory)
    return directory


@pytest.fixture(scope="session")
def stock(run: Path) -> Path:
    """The same as a Qwen3."""
    directory = run.parent / "stock"
    llmnorm("export", run, directory, "--stock")
    return directory


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A masked run of 6 steps, evaluated and saved at 3 and 6."""
    run = tmp_path_factory.mktemp("masked") / "run"
    words = ["training.steps=6", "evaluation.every=3", "checkpoint.every=3", "training.ema=0.5"]
    llmnorm("train", SMOKE, *MASKED, f"run_dir={run}", f"data.dir={smoke_data}", *words)
    return run
