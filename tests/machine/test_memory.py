"""What cannot fit is refused before it is allocated."""

import resource

import pytest

from llmnorm.machine import memory
from llmnorm.part import InputError


def test_the_limit_is_the_smallest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a limit of the shell that is smaller than any machine."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_000_000, resource.RLIM_INFINITY))
    assert memory.limit() == 1_000_000


def test_a_model_beyond_all_memory_is_refused_with_both_numbers() -> None:
    """Oracle: one byte more than the limit, and the limit itself."""
    there = memory.limit()
    assert there is not None
    memory.refuse_what_cannot_fit(there, "model: the weights")
    with pytest.raises(InputError, match=f"model: the weights need {there + 1:,} bytes.*{there:,}"):
        memory.refuse_what_cannot_fit(there + 1, "model: the weights")
