"""For which numbers of rows an operator gives a row the same bits, by kind of processor.

Libraries choose their blocks, and with them the order of sums, by the number of rows. So the logits
of a row depend on how many rows it is computed with, in the last bits. Where they must not (a mode
that is exact for any batch), the operators are those of one class.

    FIRST_ROWS[processor][operator][threads] = (1, 2, 16)      classes 1 | 2 to 15 | 16 to 72

For float32 and 1 to 72 rows, over the shapes of `tests/nn/test_row_classes.py`, which measures the
table again: a number of rows starts a class where it does so for one shape at least. A row's result
depends neither on its place nor on the other rows.

What would surprise: packed weights, of one class on an AVX2 processor for any shape that was tried,
have two here where the inner axis is long (1,376).
"""

from typing import Literal, get_args

from llmnorm.machine.processor import Processor

Operator = Literal[
    "linear", "transposed", "packed", "sdpa, one query", "two products", "norm", "rotation", "sum"
]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
MOST = 72  # rows that were tried: 8 of 9 tokens

Classes = dict[int, tuple[int, ...]]
ONE: Classes = {1: (1,), 2: (1,)}

FIRST_ROWS: dict[Processor, dict[Operator, Classes]] = {
    # Xeon, model 207; torch 2.13.0 with MKL and oneDNN; 2026-11-30.
    Processor("Intel", 6, "AVX512"): {
        "linear": {1: (1, 2, 3, 16), 2: (1, 2, 3, 16, 57)},
        "transposed": {1: (1, 2), 2: (1, 2, 17)},
        "packed": {1: (1, 2), 2: (1, 2)},
        "sdpa, one query": ONE,
        "two products": ONE,
        "norm": ONE,
        "rotation": ONE,
        "sum": ONE,
    },
}
