"""The matrix mixer, family by family: outputs, matrices, what they are made of, gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tools.golden.vectors import Result, Vectors, built, leaf, serves


@serves("matrix_mixer/*")
def matrix_mixer(vectors: Vectors) -> Iterator[Result]:
    """The block of every family: what its matrix is made of, the matrix, output, gradients.

    `derived/*`, where a file has it, is the matrix of the definition that the official code misses.
    """
    from llmnorm.nn.mixers.contract import Context

    state, grads = (_our_layout(vectors.below(key)) for key in ("state", "grad"))
    mids = {"v": "v", "z": "z", "y": "y_mixed", "q": "q", "k": "k", "delta": "delta"}
    mids |= {"forward": "forward_conv", "reverse": "reverse_conv"}
    mids |= {"dt": "dt_fwd", "flipped_dt": "dt_bwd_flipped"}
    for precision, dtype, tolerance, measure in vectors.limits():
        nothing = torch.zeros(1, 1, 1, 1, dtype=dtype)
        mixer = _of_a_family(vectors, state, official=True).to(dtype)
        x, context = leaf(vectors["x"], dtype), Context(nothing, nothing)
        p, out = mixer.prepare(x, context), mixer(x, context)
        out.backward(vectors["grad_out"].to(dtype))
        ours = {"v": p.v, "z": p.z, "y": mixer.mix(p, context).flatten(2)}
        ours |= p.made._asdict() if hasattr(p.made, "_asdict") else {}
        if "mid/dt_fwd" in vectors.tensors:
            ours |= {"dt": p.made.forward.dt, "flipped_dt": p.made.backward.dt.flip(1)}
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        if "M" in vectors.tensors:
            matrix = mixer.materialize(p, context)
            pairs += [(matrix, vectors["M"].expand_as(matrix))]
        pairs += [
            (ours[key], vectors[f"mid/{name}"])
            for key, name in mids.items()
            if f"mid/{name}" in vectors.tensors
        ]
        pairs += [(weight.grad, grads[key]) for key, weight in mixer.named_parameters()]
        for definition in vectors.below("derived").values():
            right = _of_a_family(vectors, state, official=False).to(dtype)
            matrix = right.materialize(right.prepare(x, context), context)
            pairs.append((matrix, definition.expand_as(matrix)))
        worst = max(measure(got, reference) for got, reference in pairs)
        yield Result(precision, worst, tolerance)


def _of_a_family(vectors: Vectors, state: dict[str, Tensor], *, official: bool) -> Any:
    """Our mixer of the file's family, with its weights; as the official code, or as defined."""
    from llmnorm.nn.mixers.settings import MatrixSettings
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    p.only(conv_bias=True, activation=("swish", "silu"))
    p.ignore("chunk_size", "layer_idx")  # how the official code was run
    name = vectors.part.removeprefix("matrix_mixer/").removesuffix("_dd").removesuffix("_di")
    name = "dft" if "matrix_mixer.dft_matrix" in state else name.removesuffix("_nondft")
    family: dict[str, Any] = {"name": name}
    if name in ("dense", "dft"):
        p.only(is_data_dependent=False)
        p.ignore("qk_dim")
    else:
        family["data_dependent"] = p["is_data_dependent"]
    if name == "toeplitz":
        p.ignore("qk_dim")
    elif name not in ("dense", "dft"):
        family["qk_dim"] = p["qk_dim"]
    if name in ("toeplitz", "vandermonde", "cauchy", "low_rank"):
        family["official_compat"] = official
    names = {"expand": "expand", "head_dim": "headdim", "conv_kernel": "d_conv"}
    names |= {"use_bias": "bias", "norm_eps": "norm_eps"}
    part = vectors.settings(MatrixSettings, names, family=family)
    # Heads are the mixer's own; the model's must only be possible, with a hidden size that is odd.
    shape = {"hidden_size": p["d_model"], "num_attention_heads": 1, "head_dim": 2, "mixer": part}
    longest = p.get("max_seq_len") or vectors["x"].shape[1]
    mixer: Any = part.build(built(ModelSettings, {**shape, "max_position_embeddings": longest}), 0)
    mixer.double()  # before the weights come, which may not be float32 numbers
    own = {key: value for key, value in mixer.state_dict().items() if key.endswith("log_eps")}
    fixed = ("matrix_mixer.dft_matrix",)
    mixer.load_state_dict(own | {key: value for key, value in state.items() if key not in fixed})
    return mixer


def _our_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded tensors with our names and axes.

    Scalars get an axis. The official code's learned frequencies, `q_bias` (heads, qk_dim, length),
    are our `q_matrix` (length, heads, qk_dim), as in other families.
    """
    found = {}
    for key, value in tensors.items():
        if key.endswith(("q_bias", "k_bias")):
            key, value = key.replace("_bias", "_matrix"), value.permute(2, 0, 1)
        found[key] = value.reshape(1) if value.ndim == 0 else value
    return found
