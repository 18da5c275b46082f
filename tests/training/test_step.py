"""A step waits for its device once: where it reads loss, norm, counts and stop request together."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmnorm.config.file import load
from llmnorm.runs import directory as run_directory
from llmnorm.training.prepare import prepare
from llmnorm.training.signals import StopRequest
from llmnorm.training.step import step
from tests.running import ROOT, SMOKE

MICRO_BATCHES = 4
# Operators after which a GPU would have to be waited for: a number, or a shape, comes from it.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
# What reads a tensor without an operator, and what copies numbers of the host to a device.
METHODS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, torch.tensor, Tensor.new_tensor)


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "nonzero"  # how many are True is the result's shape
        if name in READS:
            self.found.append((name, _where()))
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in METHODS:
            self.found.append((function.__name__, _where()))
        return function(*args, **(kwargs or {}))


def _where() -> str:
    """The innermost function of llmnorm that is running."""
    package = f"{ROOT}/llmnorm/"
    inside = [f for f in traceback.extract_stack() if f.filename.startswith(package)]
    return f"{inside[-1].filename.removeprefix(package)}: {inside[-1].name}" if inside else ""


@contextmanager
def reads() -> Iterator[list[tuple[str, str]]]:
    """What is read from tensors inside, and where."""
    found: list[tuple[str, str]] = []
    with _Operators(found), _Methods(found):
        yield found


def test_reads_are_seen() -> None:
    """Oracle: one of every kind, written out."""
    values = torch.tensor([1.0, 0.0])
    with reads() as found:
        float(values[0]), values[0].item(), bool(values[0]), values.tolist(), values.numpy()
        values.nonzero(), values[values > 0]
    names = Counter(name for name, _ in found)
    assert names == {"_local_scalar_dense": 3, "tolist": 1, "numpy": 1, "nonzero": 2}


@pytest.mark.parametrize(
    "words",
    [["optimizer=adamw"], ["optimizer=muon", "training.ema=0.9"], ["model.norm=power"]],
    ids=" ".join,
)
def test_a_step_reads_its_device_once(tmp_path: Path, smoke_data: Path, words: list[str]) -> None:
    """Oracle: the one line that may read. Loading the rows is on the host and not counted; what the
    loss's backward pass and RMSNorm's kernel do here, they do on CPUs alone."""
    words = [*words, "training.micro_batch=4", "model.dropout=0.1", "parallel.sharding=none"]
    words += [f"run_dir={tmp_path}/run", f"data.dir={smoke_data}"]
    config = load(SMOKE, words).config
    directory = run_directory.agree(config, going_on=False)
    with ExitStack() as stack:
        run = prepare(config, directory, stack, data_command="", dry_run=True)
        batches = run.batches()
        for _ in range(2):  # momentum begins with the first
            micro_batches = next(batches)
            assert len(micro_batches) == MICRO_BATCHES
            with reads() as found:
                outcome = step(run, micro_batches, StopRequest())
        assert outcome.finite and run.progress.step == 2
    counted = Counter(found)
    assert counted.pop(("tolist", "training/step.py: step")) == 1
    assert counted.pop(("tensor", "training/step.py: count")) == 1  # goes there without a wait
    assert counted.pop(("_local_scalar_dense", "nn/loss.py: backward")) == MICRO_BATCHES
    counted.pop(("tensor", "nn/norms/rms_cpu.py: _by_pieces"), None)
    # The model reads where documents lie on a CPU alone (counted in tests/models/test_context.py).
    for name, where in [*counted]:
        if where.startswith(("models/context.py", "nn/visibility.py")):
            assert name == "tolist"
            del counted[name, where]
    assert not counted
