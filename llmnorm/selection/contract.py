"""What a selector is: it chooses the rows of a step out of a larger pool.

The training step reads a pool of rows, makes of each what the selector needs, and trains on the
rows that it chooses. Every process calls the selector with the same numbers, so all know all picks.

What would surprise: rows are told by their numbers in the run, never by their places in the pool.
A draw or a tie that depends on numbers alone is the same on any number of processes, and after a
run was resumed.
"""

from abc import abstractmethod

from torch import Tensor


class Selector:
    """Chooses the rows of a step; base class of one of your own."""

    @abstractmethod
    def select(
        self, features: Tensor, losses: Tensor, sources: Tensor, budget: int, numbers: Tensor
    ) -> Tensor:
        """The chosen rows' places in the pool, (budget,) int64 in ascending order.

        Args:
            features: (n, k) float32 of each row, on the CPU; k is 0 where the settings ask for
                none.
            losses: (n,) float32, each row's mean loss; zeros where the settings ask for none.
            sources: (n,) int64, the number of each row's source.
            budget: how many rows are trained on, 1 to n.
            numbers: (n,) int64, the rows' numbers in the run, in ascending order.
        """

    def state(self) -> dict[str, Tensor]:
        """What must outlive a step, by name: live tensors, which a checkpoint saves and fills."""
        return {}

    def figures(self) -> dict[str, float]:
        """Numbers of the last selection, which metrics.jsonl gets."""
        return {}
