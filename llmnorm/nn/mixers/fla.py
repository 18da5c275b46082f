"""The recurrences by the Triton kernels of fla-core (Yang & Zhang 2024, flash-linear-attention).

`serves` alone chooses between them and the engines of linear_recurrence.py, gla.py and
gated_delta.py, which then call the three functions below. The mapping, ours to fla's: q is scaled
already (scale=1); log_decay, log_gate -> g, float32; b -> beta; state (batch, heads, K, V) ->
initial_state and final_state; boundaries of documents -> cu_seqlens, the rows laid end to end, one
state a document. What is given and returned is as in those files.

Precision: the kernels serve bf16 training alone. Their products are bf16; decays, sums and the
states handed over stay float32 (between chunks the forward pass keeps bf16 states). Float32 is left
to our engines, since fla's products of it are TF32, off by 1e-3 (tools/bench/gpu_kernels.py).

Surprises: fla has no grouped heads but for the delta rule's values, so keys or values are repeated.
Its kernels choose their tiles by timing at their first call, which takes minutes for gla, so two
runs agree up to rounding only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmnorm.machine.gpus import fla_problem, one_decay_problem

SHORTEST = 64  # tokens; fewer, as in decoding, fill no chunk
WIDEST_DELTA_KEY = 256


def serves(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    widest: int | None = None,
    one_decay: bool = False,
) -> bool:
    """Whether fla's kernels compute a recurrence; else ours does.

    Ours takes what is not on a GPU with fla (`llmnorm doctor` says why), what is not bf16 at all,
    float16 (whose range the states leave), rows under 64 tokens, odd widths, keys wider than
    `widest`, keys given once for all rows, everything where deterministic algorithms are asked for,
    and a single decay (or none) a head where Triton gets its gradients wrong (Hopper, before
    3.7.1).
    """
    if not q.is_cuda or q.shape[1] < SHORTEST:
        return False
    usable, gradients = _environment()
    dtypes = {q.dtype, k.dtype, v.dtype}
    return (
        usable
        and (gradients or not one_decay)
        and torch.bfloat16 in dtypes
        and dtypes <= {torch.bfloat16, torch.float32}
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and q.shape[3] % 2 == v.shape[3] % 2 == 0
        and (widest is None or q.shape[3] <= widest)
    )


@torch.compiler.assume_constant_result
def _environment() -> tuple[bool, bool]:
    """Whether there are kernels to use, and those with one decay a head have right gradients."""
    usable = fla_problem() is None and not torch.are_deterministic_algorithms_enabled()
    return usable, one_decay_problem() is None


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    segments: Tensor | None = None,
    boundaries: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """linear_recurrence by chunk_simple_gla."""
    from fla.ops.simple_gla import chunk_simple_gla

    heads = max(q.shape[2], v.shape[2])
    readers = heads // v.shape[2]
    q, k, v = (_repeated(t, heads // t.shape[2], 2).to(dtype) for t in (q, k, v))
    inputs = {"q": q, "k": k, "v": v}
    if log_decay is not None:
        inputs["g"] = _repeated(log_decay, readers, 2).float()
    if state is not None:
        state = _repeated(state, readers, 1)
    y, after = _run(chunk_simple_gla, inputs, segments, boundaries, state)
    return y, after[:, ::readers]


def channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    segments: Tensor | None = None,
    boundaries: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """channel_recurrence by chunk_gla."""
    from fla.ops.gla import chunk_gla

    q, k, v = (t.to(dtype) for t in (q, k, v))
    inputs = {"q": q, "k": k, "v": v, "g": log_gate.float()}
    return _run(chunk_gla, inputs, segments, boundaries, state)


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    segments: Tensor | None = None,
    boundaries: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """delta_recurrence by chunk_gated_delta_rule."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (t.to(dtype) for t in (q, k, v))
    inputs = {"q": q, "k": k, "v": v, "g": log_decay.float(), "beta": b.float()}
    return _run(chunk_gated_delta_rule, inputs, segments, boundaries, state)


def document_starts(segments: Tensor) -> Tensor:
    """`Context.boundaries` from the documents' numbers (batch, length); waits for the GPU."""
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return F.pad(first.flatten().nonzero().flatten(), (0, 1), value=segments.numel()).int()


def flipped(boundaries: Tensor | None, length: int) -> Tensor | None:
    """The boundaries of the same rows, each of `length` tokens, read from behind.

    [0, 2, 3, 6] with length 3, documents of 2 and 1, and 3 -> [0, 1, 3, 6].
    """
    if boundaries is None:
        return None
    starts = boundaries[:-1]
    ends = (2 * (starts // length) + 1) * length - starts
    return F.pad(ends.sort().values, (1, 0)).to(boundaries.dtype)


@torch.compiler.disable
def _run(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    segments: Tensor | None,
    boundaries: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the states behind the rows, float32."""
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if state is not None:
        state = state.float()
    if segments is None:
        y, after = kernel(**inputs, initial_state=state, **options)
        return y.float(), after
    if boundaries is None:
        boundaries = document_starts(segments)
    batch, length = segments.shape
    # The first and the last document of every row: the one the state is for, and the one it is of.
    rows = length * torch.arange(batch, device=boundaries.device, dtype=boundaries.dtype)
    first = torch.searchsorted(boundaries, rows)
    last = F.pad(first[1:], (0, 1), value=len(boundaries) - 1) - 1
    if state is not None:
        state = state.new_zeros(len(boundaries) - 1, *state.shape[1:]).index_copy(0, first, state)
    inputs = {name: t.flatten(0, 1).unsqueeze(0) for name, t in inputs.items()}
    y, after = kernel(**inputs, initial_state=state, cu_seqlens=boundaries, **options)
    return y.squeeze(0).unflatten(0, (batch, length)).float(), after[last]


def _repeated(t: Tensor, times: int, dim: int) -> Tensor:
    return t if times == 1 else t.repeat_interleave(times, dim)
