"""What our recurrences hand to fla's kernels, and which ones: no GPU is needed.

Two stand for the kernels: the recurrence that fla documents, written out, and the kernels
themselves in Triton's interpreter, which knows no bf16 (its numbers are numpy's):

    pip install --no-deps triton fla-core; TRITON_INTERPRET=1 pytest tests/nn/test_fla.py

The variable has to be there before torch is imported, which imports triton.
"""

import builtins
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.nn.masks import document_boundaries, document_segments
from llmnorm.nn.mixers import fla
from llmnorm.nn.mixers.gated_delta import delta_recurrence
from llmnorm.nn.mixers.gla import channel_recurrence
from llmnorm.nn.mixers.linear_recurrence import linear_recurrence
from llmnorm.nn.mixers.nala import NaLa
from llmnorm.nn.mixers.normalised_sums import normalised_sums, sums_at_once

BATCH, LENGTH, K, V = 2, 80, 16, 8
DOCUMENTS = (1, 30, 49, 65, 15)
KERNELS = {
    "fla.ops.simple_gla": "chunk_simple_gla",
    "fla.ops.gla": "chunk_gla",
    "fla.ops.gated_delta_rule": "chunk_gated_delta_rule",
}
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not (find_spec("triton") and find_spec("fla")),
    reason="needs triton, fla-core and TRITON_INTERPRET=1",
)


def documented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = decay S + k (beta (v - S k))^T (or k v^T), y = scale q S, every sequence alone."""
    assert scale is not None and output_final_state
    assert q.dtype == k.dtype == v.dtype
    # Grouped heads are the delta rule's alone.
    assert beta is not None or q.shape[2] == k.shape[2] == v.shape[2]
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    rows: Any = [(n, 0, q.shape[1]) for n in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1 and cu_seqlens[-1] == q.shape[1]
        rows = [(0, *ends) for ends in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    assert initial_state is None or len(initial_state) == len(rows)
    outs, states = [], []
    for n, (row, start, end) in enumerate(rows):
        S = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
        S = S if initial_state is None else initial_state[n]
        for t in range(start, end):
            if g is not None:
                S = S * g[row, t].exp().reshape(S.shape[0], -1, 1)
            new = v[row, t]
            if beta is not None:
                new = beta[row, t, :, None] * (new - torch.einsum("hkv,hk->hv", S, k[row, t]))
            S = S + torch.einsum("hk,hv->hkv", k[row, t], new)
            outs.append(scale * torch.einsum("hk,hkv->hv", q[row, t], S))
        states.append(S)
    return torch.stack(outs).view(*q.shape[:3], -1), torch.stack(states)


def interpreted() -> None:
    """One choice of tiles a kernel (choosing times them on a GPU), and loops over tensors."""
    import fla.ops  # noqa: F401
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def over_tensors(*ends: Any) -> Iterator[Any]:
        # The compiler's loop variables are tensors, the interpreter's are int.
        plain = (int(e.handle.data.item()) if hasattr(e, "handle") else int(e) for e in ends)
        for i in builtins.range(*plain):
            yield tl.core.tensor(TensorHandle(numpy.array([i], numpy.int32), tl.int32), tl.int32)

    for name, module in list(sys.modules.items()):
        if not name.startswith("fla.ops"):
            continue
        vars(module)["range"] = over_tensors
        for kernel in list(vars(module).values()):
            while type(kernel).__module__.startswith(("triton", "fla")):
                if isinstance(configs := getattr(kernel, "configs", None), list):
                    del configs[1:]
                kernel = getattr(kernel, "fn", None)


@pytest.fixture(params=["documented", pytest.param("interpreted", marks=INTERPRETED)])
def kernels(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `from fla.ops... import` finds."""
    if request.param == "interpreted":
        interpreted()
        return
    for module, name in KERNELS.items():
        stand_in = ModuleType(module)
        vars(stand_in)[name] = documented
        monkeypatch.setitem(sys.modules, module, stand_in)
    for package in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))


def leaves(q_heads: int, k_heads: int, v_heads: int, decay: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, LENGTH, *shape, generator=generator)

    made = {"q": normal(q_heads, K), "k": normal(k_heads, K), "v": normal(v_heads, V)}
    made["k"] = F.normalize(made["k"], dim=-1)
    if decay == "channel":
        made["log_gate"] = F.logsigmoid(normal(v_heads, K))
    elif decay:
        made["log_decay"] = F.logsigmoid(normal(v_heads))
    if decay == "delta":
        made["b"] = normal(v_heads).sigmoid()
    made["state"] = torch.randn(BATCH, v_heads, K, V, generator=generator)
    return made


def same(
    theirs: Callable[..., tuple[Tensor, ...]],
    ours: Callable[..., tuple[Tensor, ...]],
    made: dict[str, Tensor],
) -> None:
    """Outputs and gradients, within rounding of float32."""
    found = []
    for run in (theirs, ours):
        given = {name: t.clone().requires_grad_() for name, t in made.items()}
        outs = run(**given)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator) for t in outs]
        torch.autograd.backward(outs, grads)
        found.append({**dict(enumerate(outs)), **{n: t.grad for n, t in given.items()}})
    for name, expected in found[1].items():
        assert expected is not None and found[0][name] is not None, name
        assert found[0][name].dtype == torch.float32
        bound = 2e-5 * float(expected.detach().abs().max())
        torch.testing.assert_close(found[0][name], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("theirs", "ours", "heads", "decay"),
    [
        (fla.linear, linear_recurrence, (4, 2, 2), ""),
        (fla.linear, linear_recurrence, (4, 2, 2), "head"),
        (fla.linear, linear_recurrence, (2, 2, 4), "head"),
        (fla.channel, channel_recurrence, (2, 2, 2), "channel"),
        (fla.delta, delta_recurrence, (2, 2, 4), "delta"),
    ],
)
def test_kernels_compute_what_our_engines_do(
    kernels: None, theirs: Any, ours: Any, heads: tuple[int, int, int], decay: str, packed: bool
) -> None:
    """Oracle: our engines, with a state before the rows, documents or none, and gradients."""
    apart: dict[str, Tensor] = {}
    if packed:
        apart["segments"] = document_segments(
            document_boundaries(DOCUMENTS, torch.device("cpu")), BATCH, LENGTH
        )

    def run(**given: Any) -> tuple[Tensor, Tensor]:
        if not decay:
            given["log_decay"] = None
        return theirs(**given, **apart, dtype=torch.float32)

    same(run, lambda **given: ours(**given, **apart), leaves(*heads, decay))


@pytest.mark.parametrize("packed", [True, False])
def test_the_sums_of_nala_by_kernel(kernels: None, packed: bool) -> None:
    """Oracle: our sums, which know no kernel; grouped heads, padding, rotary positions."""
    nala = NaLa(8, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    angle = torch.rand(1, LENGTH, 1, 4)
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    segments = None
    if packed:
        segments = document_segments(
            document_boundaries(DOCUMENTS, torch.device("cpu")), BATCH, LENGTH
        )
    else:
        real[1, :7] = False
    row = angle.cos(), angle.sin(), real, segments

    def sums(run: Any) -> Callable[..., tuple[Tensor, ...]]:
        def given(q: Tensor, k: Tensor, v: Tensor, state: Tensor, keys: Tensor) -> Any:
            return run(nala.both_features, (state, keys), q, k, v, *row)

        return given

    generator = torch.Generator().manual_seed(2)
    shapes = {"q": (LENGTH, 4, 8), "k": (LENGTH, 2, 8), "v": (LENGTH, 2, 8)}
    shapes |= {"state": (2, 16, 8), "keys": (2, 16, 1)}
    made = {n: torch.randn(BATCH, *shape, generator=generator) for n, shape in shapes.items()}
    same(sums(partial(sums_at_once, kernel=True)), sums(normalised_sums), made)


def test_boundaries() -> None:
    """Oracle: by hand, and the documents of rows that are flipped one by one."""
    number = document_segments(document_boundaries(DOCUMENTS, torch.device("cpu")), BATCH, LENGTH)
    boundaries = document_boundaries(DOCUMENTS, number.device)
    assert fla.document_starts(number).tolist() == boundaries.tolist() == [0, 1, 31, 80, 145, 160]
    flipped = fla.flipped(boundaries, LENGTH)
    assert flipped is not None and flipped.dtype == torch.int32
    assert torch.equal(flipped, fla.document_starts(number.flip(1)))
    assert fla.flipped(torch.tensor([0, 2, 3, 6]), 3).tolist() == [0, 1, 3, 6]  # type: ignore[union-attr]
    assert fla.flipped(None, 3) is None


BF16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"v": FLOAT32}, True),
        ({"q": FLOAT32, "k": FLOAT32, "v": FLOAT32}, False),
        ({"v": torch.float64}, False),
        ({"v": torch.float16}, False),
        ({"length": 63}, False),
        ({"width": 15}, False),
        ({"width": 256}, True),
        ({"width": 258}, False),
        ({"cuda": False}, False),
        ({"usable": False}, False),
        ({"right": False}, False),
        ({"right": False, "one_decay": False}, True),
        ({"rows": 1}, False),
    ],
)
def test_who_computes(change: dict[str, Any], expected: bool, monkeypatch: Any) -> None:
    """Oracle: what the docstring of `serves` says, case by case."""
    case = {"q": BF16, "k": BF16, "v": BF16, "length": 64, "width": 16, "rows": 2}
    case |= {"cuda": True, "usable": True, "right": True, "one_decay": True, **change}
    monkeypatch.setattr(fla, "_environment", lambda: (case["usable"], case["right"]))

    def stub(name: str, rows: int) -> Any:
        shape = torch.Size((rows, case["length"], 2, case["width"]))
        return SimpleNamespace(is_cuda=case["cuda"], dtype=case[name], shape=shape)

    q, k, v = stub("q", 2), stub("k", case["rows"]), stub("v", 2)
    assert fla.serves(q, k, v, widest=256, one_decay=case["one_decay"]) == expected
