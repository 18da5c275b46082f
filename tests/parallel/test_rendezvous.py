"""Each life of a run agrees on a name that no life before it had, over one store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from llmnorm.parallel.rendezvous import agreed_name

WAIT = timedelta(minutes=10)


def life(store: dist.Store, world: int, first: int) -> list[str]:
    """The names that the processes of a life agree on; process `first` comes first."""
    names = [""] * world

    def agree(rank: int) -> None:
        names[rank] = agreed_name(store, rank, world, WAIT)

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in range(world)]
    order = threads[first:] + threads[:first]
    order[0].start()
    order[0].join(0.1)  # it may have read what the life before has left
    for thread in order[1:]:
        thread.start()
    for thread in threads:
        thread.join(WAIT.total_seconds())
    return names


def test_each_life_has_one_name_of_its_own_whoever_comes_first() -> None:
    """Oracle: lives over one store, of 3, 3, 2, 3 and 1 processes, as nodes come and go."""
    store = dist.HashStore()
    lives = [life(store, world, first) for world, first in ((3, 0), (3, 1), (2, 1), (3, 2), (1, 0))]
    assert all(len(set(names)) == 1 and names[0] for names in lives)
    assert len({names[0] for names in lives}) == len(lives)


def test_a_process_that_waits_in_vain_says_for_whom() -> None:
    """Oracle: a store that holds the name of a life that is over."""
    store = dist.HashStore()
    life(store, 2, 0)
    with pytest.raises(RuntimeError, match="process 0 of 2 has not come in 0.2 s"):
        agreed_name(store, 1, 2, timedelta(seconds=0.2))
