"""Which operators give a row one result for any number of rows: the committed table, measured."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.machine.processor import processor
from llmnorm.nn.linear import Linear
from llmnorm.nn.mixers.rotary import rotate
from llmnorm.nn.mixers.softmax import SoftmaxAttention
from llmnorm.nn.norms.rms import rms_norm
from llmnorm.nn.projections import Product, has_packing
from llmnorm.nn.row_classes import FIRST_ROWS, MOST, OPERATORS, Operator

SHAPES = [(24, 61), (64, 192), (384, 1024), (512, 1536), (1376, 512)]  # in, out
TRIED = [*range(1, 20), 24, 32, 33, 40, 48, 56, 57, 64, 65, MOST]
OfRows = Callable[[int], Tensor]


def products(layout: Operator) -> Iterator[OfRows]:
    for inner, outer in SHAPES:
        linear, x = Linear(inner, outer, bias=False), torch.randn(MOST, inner)
        if layout == "linear":
            yield lambda rows, linear=linear, x=x: F.linear(x[:rows], linear.weight)
        else:
            assert layout in ("transposed", "packed")
            product = Product([linear], layout)
            yield lambda rows, product=product, x=x: product(x[:rows])


def attentions(by_products: bool) -> Iterator[OfRows]:
    q = torch.randn(MOST, 8, 1, 64)
    k, v = torch.randn(2, MOST, 8, 129, 64)
    mask = torch.zeros(MOST, 1, 1, 129)
    mask[1:, ..., 100:] = -torch.inf
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    mixer = SoftmaxAttention(512, **heads)

    def attend(rows: int) -> Tensor:
        if by_products:  # an only row has no mask (Places.mask)
            of_heads = None if rows == 1 else mask[:rows, 0].repeat_interleave(8, 0)
            queries = q[:rows].transpose(1, 2)
            return mixer._attend_by_products(queries, k[:rows], v[:rows], of_heads)
        return F.scaled_dot_product_attention(q[:rows], k[:rows], v[:rows], attn_mask=mask[:rows])

    yield attend


def others(name: Operator) -> Iterator[OfRows]:
    x, gain = torch.randn(MOST, 512), torch.randn(512)
    heads, (cos, sin) = torch.randn(MOST, 1, 8, 64), torch.randn(2, MOST, 1, 1, 32)
    yield {
        "norm": lambda rows: rms_norm(x[:rows], gain, 1e-6),
        "rotation": lambda rows: rotate(heads[:rows], cos[:rows], sin[:rows]),
        "sum": lambda rows: x[:rows].sum(-1),
    }[name]


def candidates(name: Operator) -> Iterator[OfRows]:
    if name in ("linear", "transposed", "packed"):
        return products(name)
    if name in ("sdpa, one query", "two products"):
        return attentions(name == "two products")
    return others(name)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("name", OPERATORS)
@torch.no_grad()
def test_a_rows_bits_change_only_where_the_table_says(name: Operator, threads: int) -> None:
    """Oracle: the first row's bits with 1 to 72 rows, of which all to 19 are tried."""
    known = FIRST_ROWS.get(processor())
    if known is None:
        pytest.skip(f"no table for {processor()}; add its entry to nn/row_classes.py")
    if name == "packed" and not has_packing():
        pytest.skip("this torch has no oneDNN operator to pack weights")
    torch.manual_seed(0)
    for of_rows in candidates(name):
        before = of_rows(1)[0]
        for fewer, rows in pairwise(TRIED):
            now = of_rows(rows)[0]
            if not torch.equal(now, before):
                starts = [start for start in known[name][threads] if fewer < start <= rows]
                assert starts, f"{rows} rows give other bits than {fewer}"
            before = now


@pytest.mark.parametrize("threads", [1], indirect=True)
@torch.no_grad()
def test_a_rows_bits_depend_neither_on_its_place_nor_on_its_neighbours(threads: int) -> None:
    """Oracle: the same row at another place among other rows, for every layout of a product."""
    torch.manual_seed(0)
    for layout in ("plain", "transposed", *(["packed"] if has_packing() else [])):
        product, x = Product([Linear(96, 80)], layout), torch.randn(9, 96)
        moved = torch.randn(9, 96)
        moved[6] = x[2]
        assert torch.equal(product(x)[2], product(moved)[6]), layout
