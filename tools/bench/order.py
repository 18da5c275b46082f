"""Measure what stages cost in finding the run's rows.

usage: python tools/bench/order.py [--rounds 200]

Of six sources, 1,024 rows are located at once in a run of one stage and in a run of four, in turns,
so that a busy machine slows both alike. Printed are the median microseconds a row of each, and the
median of the ratios of neighbouring turns; the rows lie across a boundary of the four stages.
"""

import argparse
import statistics
import time

from llmnorm.data.order import Order

ROWS = [2_000_000, 300_000, 40_000, 900, 75_000, 1_200_000]
WEIGHTS = [[8, 2, 4, 1, 1, 6], [4, 2, 4, 1, 3, 6], [1, 0, 5, 0, 3, 2], [0, 5, 0, 0, 5, 9]]
BEGINS = [4_000_000, 6_000_000, 7_000_000]
FIRST = 6_999_500
COUNT = 1024


def seconds(order: Order) -> float:
    """How long it takes to locate the rows once."""
    start = time.perf_counter()
    order.locate(FIRST, COUNT)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    one = Order(WEIGHTS[0], ROWS, 0)
    four = Order(WEIGHTS[0], ROWS, 0, [*zip(BEGINS, WEIGHTS[1:], strict=True)])
    for order in (one, four):
        seconds(order)
    turns = [(seconds(one), seconds(four)) for _ in range(rounds)]
    alone, staged = (1e6 * statistics.median(column) / COUNT for column in zip(*turns, strict=True))
    ratio = statistics.median(b / a for a, b in turns)
    print(f"one stage {alone:.3f} us a row, four stages {staged:.3f} us a row: {ratio:.2f} times")


if __name__ == "__main__":
    main()
