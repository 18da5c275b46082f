"""What the tests' children stand on."""

import gc
import sys

from tests.running import CHILDREN


def _look() -> None:
    loaded = {"llmnorm.training.loop", "accelerate", "pytest"} <= sys.modules.keys()
    sys.exit(0 if loaded and gc.get_freeze_count() > 100_000 else 1)


def test_children_find_everything_loaded() -> None:
    """Oracle: sys.modules of a child that has imported nothing itself.

    The server is one for all files: one that set its preload again once made every child of every
    file import torch and transformers for itself.
    """
    child = CHILDREN.Process(target=_look)
    child.start()
    child.join()
    assert child.exitcode == 0
