"""Attention over documents laid end to end: what a compiler sees of it, and the kernel on a GPU."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from llmnorm.nn.masks import document_boundaries
from llmnorm.nn.mixers import varlen
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.mixers.softmax import SoftmaxAttention
from llmnorm.nn.mixers.varlen import serves
from llmnorm.nn.visibility import Packed

DOCUMENTS = (70, 1, 57, 128)  # two rows of 128
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel wants a GPU")


def attention() -> SoftmaxAttention:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return SoftmaxAttention(64, **shape)


def test_a_compiler_needs_no_more_than_one_graph_for_any_documents() -> None:
    """Oracle: torch's own operator, without a break, in what is compiled; fake tensors need no
    GPU, and shapes, dtypes and derivatives are the operator's own."""
    compiled: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixer = attention()
        mix = torch.compile(mixer, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        tables = [torch.empty(2, 128, 1, 8) for _ in range(2)]
        for count in (4, 9, 2):
            x = torch.empty(2, 128, 64, requires_grad=True)
            boundaries = torch.empty(count + 1, dtype=torch.int32)
            torch._dynamo.maybe_mark_dynamic(boundaries, 0)
            segments = torch.empty(2, 128, dtype=torch.long)
            rows = Packed(boundaries, segments, 128, kernel=True, fixed_shapes=True)
            y = mix(x, Context(*tables, rows))
            y.sum().backward()
            assert x.grad is not None and mixer.k_proj.weight.grad is not None
            assert y.dtype == torch.bfloat16
    operators = [[str(node.target) for node in graph.graph.nodes] for graph in compiled]
    assert [["torch_attn._varlen_attn" in " ".join(names)] for names in operators] == [[True]] * 2


def test_a_kernel_serves_a_gpu_below_float32() -> None:
    """Oracle: what the kernels refuse."""
    with FakeTensorMode():
        found = {
            (device, dtype): serves(torch.empty(1, dtype=dtype, device=device))
            for device in ("cpu", "cuda")
            for dtype in (torch.float32, torch.bfloat16)
        }
    assert [key for key, served in found.items() if served] == [("cuda", torch.bfloat16)]


@GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_the_kernel_is_each_document_alone(window: int | None, compiled: bool) -> None:
    """Oracle: scores, mask and softmax in float32 of the same bf16 numbers; gradients too. Rounding
    to bf16 is 0.4 % at most."""
    torch.manual_seed(0)
    make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    inputs = [torch.randn(256, heads, 64, **make) for heads in (4, 2, 2)]  # type: ignore[call-overload]
    boundaries = document_boundaries(DOCUMENTS, torch.device("cuda"))
    attend = torch.compile(varlen.attention) if compiled else varlen.attention
    out = attend(*inputs, boundaries, 128, window)
    weight = torch.randn_like(out)
    found = [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    wide = [t.detach().float().requires_grad_() for t in inputs]
    expected = by_document(*wide, window)
    wanted = [expected, *torch.autograd.grad((expected * weight).sum(), wide)]
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other).norm() < 1e-2 * other.norm()


def by_document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    outs = []
    for one in zip(*(t.split(DOCUMENTS) for t in (q, k, v)), strict=True):
        heads_first = [t.transpose(0, 1)[None] for t in one]
        place = torch.arange(len(one[0]), device=q.device)
        behind = place[:, None] - place
        visible = (behind >= 0) & (behind < (window or len(one[0])))
        mixed = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=True)
        outs.append(mixed[0].transpose(0, 1))
    return torch.cat(outs)
