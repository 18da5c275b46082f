"""How processes come together, as far as a machine without a GPU can show it."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, PartialState

from llmnorm.training.launch import accelerator


@pytest.fixture
def own_state() -> Iterator[None]:
    """accelerate keeps one state a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_one_process_for_a_gpu_needs_no_process_group(
    own_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a backend without a launcher made accelerate ask for a group that nobody had made."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    found = accelerator(cuda=True)
    assert (found.process_index, found.num_processes) == (0, 1)
