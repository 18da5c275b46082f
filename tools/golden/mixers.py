"""Recurrences and the mixers made of them: both directions, decoding states, gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tools.golden.vectors import NotServed, Result, Vectors, built, grad, leaf, serves


def _recurrence(
    vectors: Vectors, run: Callable[..., tuple[Tensor, Tensor]], state: str = "initial_state"
) -> Iterator[Result]:
    """A function (inputs by name, state) -> (out, state): both, gradients, and token by token.

    What the file does not hold is not compared: a final state, gradients, single steps.
    """
    # All but `scale`, the factor of the queries, is seen in the tensors.
    sizes = ("heads", "d_k", "d_v", "headdim", "d_state", "gate_scale", "initial_state")
    vectors.hyperparameters.ignore(*sizes, "block_len")
    for precision, dtype, tolerance, measure in vectors.limits():
        leaves = {key: leaf(value, dtype) for key, value in vectors.below("in").items()}
        inputs = {key: value for key, value in leaves.items() if key != state}
        out, after = run(inputs, leaves.get(state))
        torch.autograd.backward(
            [out, after],
            [
                vectors.tensors.get(key, torch.zeros_like(like)).to(dtype)
                for key, like in (("grad_out", out), ("grad_final_state", after))
            ],
        )
        pairs = [(out, vectors["out"])]
        if "final_state" in vectors.tensors:
            pairs.append((after, vectors["final_state"]))
        pairs += [(grad(leaves[key]), ref) for key, ref in vectors.below("grad_in").items()]
        with torch.no_grad():
            now, outs, states = leaves.get(state), [], []
            for step in range(len(vectors.tensors.get("step/out", ()))):
                token = {key: value[:, step : step + 1] for key, value in inputs.items()}
                y, now = run(token, now)
                outs.append(y.squeeze(1))
                states.append(now)
        if outs:
            pairs += [(torch.stack(outs), vectors["step/out"])]
            pairs += [(torch.stack(states), vectors["step/state"])]
        worst = max(measure(got, reference) for got, reference in pairs)
        yield Result(precision, worst, tolerance)


def _scaled(vectors: Vectors, q: Tensor) -> Tensor:
    """q times the header's `scale`, or 1 / sqrt(key width) as in fla."""
    return q * vectors.hyperparameters.get("scale", q.shape[-1] ** -0.5)


@serves("linear_recurrence/simple_gla")
@serves("linear_recurrence/retention")
@serves("linear_recurrence/linear")
def linear_recurrences(vectors: Vectors) -> Iterator[Result]:
    """The engine of linear attention and SSD; retention's decays are constants."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        decay = t.get("g")
        if vectors.part.endswith("retention"):
            powers = -5.0 - torch.arange(t["v"].shape[2], dtype=torch.float64)
            decay = vectors.tensors.get("mid/log_decay", torch.log1p(-(2.0**powers)))
            decay = decay.to(t["v"].dtype).expand(t["v"].shape[:3])
        return linear_recurrence(_scaled(vectors, t["q"]), t["k"], t["v"], decay, state=state)

    return _recurrence(vectors, run)


@serves("linear_recurrence/gla")
def gated_linear_attention(vectors: Vectors) -> Iterator[Result]:
    """GLA's recurrence, a gate a channel."""
    from llmnorm.nn.mixers.gla import channel_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        return channel_recurrence(_scaled(vectors, t["q"]), t["k"], t["v"], t["g"], state=state)

    return _recurrence(vectors, run)


@serves("linear_recurrence/gdn")
@serves("linear_recurrence/delta")
def gated_delta(vectors: Vectors) -> Iterator[Result]:
    """The gated delta rule; the delta rule has no gate."""
    from llmnorm.nn.mixers.gated_delta import delta_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        q = _scaled(vectors, t["q"])
        return delta_recurrence(q, t["k"], t["v"], t["beta"], t.get("g"), state=state)

    return _recurrence(vectors, run)


@serves("gated_deltanet/module")
def gated_deltanet(vectors: Vectors) -> Iterator[Result]:
    """The layer of Qwen3-Next."""
    from llmnorm.nn.mixers.settings import GatedDeltaSettings

    p = vectors.hyperparameters
    p.only(l2_eps=1e-6)
    names = {"num_key_heads": "num_k_heads", "num_value_heads": "num_v_heads"}
    names |= {"key_head_dim": "head_k_dim", "value_head_dim": "head_v_dim"}
    names |= {"conv_kernel": "conv_kernel", "norm_eps": "norm_eps"}
    part = vectors.settings(GatedDeltaSettings, names)

    def states(mixer: Any, state: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # Theirs keeps the current input in the window, one more than ours.
        return {"step/state": state[0], "step/conv_state": state[1].mT}

    mids = {"mid/beta": lambda p: p.b, "mid/g": lambda p: p.log_decay, "mid/v": lambda p: p.v}
    mids |= {"mid/z": lambda p: p.z}
    return _module(vectors, part, p["hidden_size"], lambda mixer: None, states, mids)


@serves("mamba2/ssd")
def state_space_dual(vectors: Vectors) -> Iterator[Result]:
    """The engine with Mamba-2's names; its states are (value, key)."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = None if state is None else state.mT
        y, after = linear_recurrence(t["C"], t["B"], t["x_dt"], t["log_decay"], state=state)
        return y, after.mT

    return _recurrence(vectors, run)


@serves("nala/core")
@serves("nala/causal_prefix")
def nala(vectors: Vectors) -> Iterator[Result]:
    """Features, matrix, output and gradients of NaLa's core; causal: packed documents too.

    Their rotation turns neighbouring dimensions, ours the halves of a head: q and k are reordered.
    """
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.linear import LinearParameters
    from llmnorm.nn.mixers.settings import NaLaSettings
    from llmnorm.nn.settings import ModelSettings
    from llmnorm.nn.visibility import packed

    p, causal = vectors.hyperparameters, vectors.part.endswith("causal_prefix")
    p.ignore("grid", "rope", "q_std", "k_std")  # the tables and inputs are recorded
    heads, head_dim = p["heads"], p["head_dim"]
    shape = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "head_dim": head_dim}
    settings = built(ModelSettings, shape)
    names = {"eps": "eps", "lam": "lam", "tau": "tau"}
    fixed = {"bidirectional": not causal, "query_eps": 0.0, "conv_kernel": 0}
    mixer: Any = vectors.settings(NaLaSettings, names, **fixed).build(settings, 0)
    halves = _halves(p["head_dim"])
    for precision, dtype, tolerance, measure in vectors.limits():
        q, k, v = (leaf(vectors[f"in/{name}"].transpose(1, 2), dtype) for name in "qkv")
        cos, sin = (vectors[f"in/{t}"][None, :, None, ::2].to(dtype) for t in ("cos", "sin"))
        context = Context(cos, sin)
        parameters = LinearParameters(q[..., halves], k[..., halves], v, None, None, None)
        out = mixer.mix(parameters, context)
        out.backward(vectors["grad_out"].transpose(1, 2).to(dtype))
        pairs = [(out.transpose(1, 2), vectors["out"])]
        pairs += [
            (grad(t).transpose(1, 2), vectors[f"grad_in/{name}"])
            for t, name in zip((q, k, v), "qkv", strict=True)
        ]
        if "M" in vectors.tensors:
            pairs.append((mixer.materialize(parameters, context), vectors["M"]))
        recorded = ("phi_q", "phi_k", "phi_q_rope", "phi_k_rope")
        features = mixer.both_features(parameters.q, parameters.k, cos, sin, None)
        for name, feature in zip(recorded, features, strict=True):
            both = torch.cat((halves, halves + head_dim))
            pairs.append((feature.transpose(1, 2), vectors[f"mid/{name}"][..., both]))
        if causal and "out_packed" in vectors.tensors:
            with torch.no_grad():
                lengths = vectors["packed/cu_seqlens"].diff()
                documents = tuple(lengths.tolist()) * len(q)
                apart = Context(cos, sin, packed(documents, len(q), q.device))
                pairs.append((mixer.mix(parameters, apart).transpose(1, 2), vectors["out_packed"]))
        worst = max(measure(got, reference) for got, reference in pairs)
        yield Result(precision, worst, tolerance)


@serves("nala/module")
def nala_module(vectors: Vectors) -> Iterator[Result]:
    """The official layer on a grid; its two-dimensional local convolution stands in for ours."""
    import torch.nn.functional as F

    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.settings import NaLaSettings
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    # The grid, its tables and the convolution's kernel are seen in the tensors.
    p.ignore("grid", "rope", "lepe_kernel", "q_weight_scale", "k_weight_scale")
    heads = p["num_heads"]
    names = {"hidden_size": "dim", "num_attention_heads": "num_heads"}
    settings = vectors.settings(ModelSettings, names)
    names = {"norm_eps": "ln_eps", "eps": "eps", "lam": "lam", "tau": "tau"}
    bias = "state/qkvg.bias" in vectors.tensors
    if bias != ("state/out_proj.bias" in vectors.tensors):
        raise NotServed("bias", "on one projection", "ours are on all or none")
    fixed = {"bidirectional": True, "bias": bias, "norm": "layer", "query_eps": 0.0}
    part = vectors.settings(NaLaSettings, names, **fixed, conv_kernel=0)
    halves = _halves(settings.head_dim)
    rows = torch.cat([halves + head * settings.head_dim for head in range(heads)])
    for precision, dtype, tolerance, measure in vectors.limits():
        state = {key: leaf(value, dtype) for key, value in vectors.below("state").items()}
        own: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            own[f"norm.{kind}"] = state[f"ln.{kind}"]
            if kind == "bias" and not bias:
                continue
            q, k, v, g = state[f"qkvg.{kind}"].chunk(4)
            own |= {f"q_proj.{kind}": q[rows], f"k_proj.{kind}": k[rows], f"v_proj.{kind}": v}
            own |= {f"g_proj.{kind}": g, f"o_proj.{kind}": state[f"out_proj.{kind}"]}
        x = leaf(vectors["x"], dtype)
        cos, sin = (vectors[f"mid/{t}"][None, :, None, ::2].to(dtype) for t in ("cos", "sin"))
        context = Context(cos, sin)
        layer = _Layer(part.build(settings, 0).to(dtype), state, F.conv2d)
        out, matrix = torch.func.functional_call(
            layer, {f"mixer.{key}": value for key, value in own.items()}, (x, context)
        )
        out.backward(vectors["grad_out"].to(dtype))
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        pairs += [(matrix, vectors["M"])] if "M" in vectors.tensors else []
        pairs += [(state[name].grad, value) for name, value in vectors.below("grad").items()]
        worst = max(measure(got, reference) for got, reference in pairs)
        yield Result(precision, worst, tolerance)


class _Layer(nn.Module):
    """Our mixer with the official local term, from a grid (batch, dim, height, width) to one."""

    def __init__(self, mixer: Any, state: dict[str, Tensor], convolve: Any) -> None:
        super().__init__()
        self.mixer, self.state, self.convolve = mixer, state, convolve

    def forward(self, grid: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        x = grid.flatten(2).mT
        p = self.mixer.prepare(x, context)
        v = p.v.flatten(2).mT.view_as(grid)
        weight, bias = self.state["lepe.weight"], self.state.get("lepe.bias")
        local = self.convolve(v, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
        p = p._replace(local=local.flatten(2).mT.reshape_as(p.v))
        out = self.mixer.finish(self.mixer.mix(p, context), x, p)
        return out.mT.view_as(grid), self.mixer.materialize(p, context)


def _halves(head_dim: int) -> Tensor:
    """The order of a head's dimensions in which their pairs (0, 1), (2, 3), ... are our halves."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


# Our settings -> the header's, of both state-space mixers.
STATE_SPACE = {
    "state_size": "d_state",
    "head_dim": "headdim",
    "expand": "expand",
    "n_groups": "ngroups",
    "conv_kernel": "d_conv",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "norm_eps": "norm_eps",
}


def _time_step_limit(vectors: Vectors) -> list[float] | None:
    """`dt_limit`, or None where it is absent or the official default, which limits nothing.

    Also refuses what neither state-space mixer has, and passes over how the code was run.
    """
    p = vectors.hyperparameters
    p.only(learnable_init_states=False, activation=("swish", "silu"))
    p.ignore("chunk_size", "use_mem_eff_path", "layer_idx")
    limit = p.get("dt_limit")
    return None if limit is None or limit == [0.0, float("inf")] else limit


@serves("mamba2/module")
@serves("mamba2/simple_module")
def mamba2(vectors: Vectors) -> Iterator[Result]:
    """Mamba-2's layer; the simple one norms all channels together whatever the groups."""
    from llmnorm.nn.mixers.settings import SSDSettings
    from llmnorm.nn.mixers.ssd import GroupedRMSNorm

    p = vectors.hyperparameters
    p.only(rmsnorm=True, norm_before_gate=False, D_has_hdim=False)
    part = vectors.settings(SSDSettings, STATE_SPACE, time_step_limit=_time_step_limit(vectors))

    def change(mixer: Any) -> None:
        if vectors.part == "mamba2/simple_module":
            inner = part.expand * p["d_model"]
            mixer.norm = GroupedRMSNorm(inner, groups=1, eps=part.norm_eps)

    def states(mixer: Any, state: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # Theirs keeps the current input in the window, one more than ours.
        return {"step/ssm_state": state[0].mT, "step/conv_state": state[1].mT}

    mids = {"mid/dt": lambda p: p.dt, "mid/B": lambda p: p.B, "mid/C": lambda p: p.C}
    mids |= {"mid/v": lambda p: p.v}
    return _module(vectors, part, p["d_model"], change, states, mids)


@serves("hydra")
def hydra(vectors: Vectors) -> Iterator[Result]:
    """Hydra's layer; learnable initial states are not offered."""
    from llmnorm.nn.mixers.settings import HydraSettings

    p = vectors.hyperparameters
    part = vectors.settings(HydraSettings, STATE_SPACE, time_step_limit=_time_step_limit(vectors))
    mids = {
        "mid/v": lambda p: p.v,
        "mid/delta": lambda p: p.delta,
        "mid/dt_fwd": lambda p: p.forward.dt,
        "mid/B_fwd": lambda p: p.forward.B,
        "mid/C_bwd_flipped": lambda p: p.backward.C.flip(1),
    }
    return _module(vectors, part, p["d_model"], lambda mixer: None, lambda mixer, state: {}, mids)


def _module(
    vectors: Vectors,
    part: Any,
    hidden_size: int,
    change: Callable[[Any], None],
    states: Callable[[Any, tuple[Tensor, ...]], dict[str, Tensor]],
    mids: dict[str, Callable[[Any], Tensor]],
) -> Iterator[Result]:
    """A recurrent layer: parameters, matrix, output, gradients, packed documents, decoding."""
    from llmnorm.nn.cache import RaggedCache
    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.settings import ModelSettings
    from llmnorm.nn.visibility import Cached, packed

    # Heads are the mixer's own; the model's must only be possible, with a hidden size that is odd.
    settings = built(
        ModelSettings,
        {"hidden_size": hidden_size, "num_attention_heads": 1, "head_dim": 2, "mixer": part},
    )
    for precision, dtype, tolerance, measure in vectors.limits():
        nothing = torch.zeros(1, 1, 1, 1, dtype=dtype)
        mixer = part.build(settings, 0)
        change(mixer)
        mixer.to(dtype).load_state_dict(vectors.below("state"))
        x, context = leaf(vectors["x"], dtype), Context(nothing, nothing)
        parameters, out = mixer.prepare(x, context), mixer(x, context)
        out.backward(vectors["grad_out"].to(dtype))
        y = mixer.mix(parameters, context)
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        if "M" in vectors.tensors:
            pairs += [(mixer.materialize(parameters, context), vectors["M"])]
        if (mixed := vectors.tensors.get("mid/y_mixed")) is not None:
            pairs += [(y.reshape(mixed.shape), mixed)]
        pairs += [(g(parameters), vectors[k]) for k, g in mids.items() if k in vectors.tensors]
        grads = vectors.below("grad")
        pairs += [(weight.grad, grads[name]) for name, weight in mixer.named_parameters()]
        with torch.no_grad():
            if "packed/x" in vectors.tensors:
                lengths = tuple(vectors["packed/cu_seqlens"].diff().tolist())
                apart = Context(nothing, nothing, packed(lengths, 1, x.device))
                out = mixer(vectors["packed/x"].to(dtype), apart)
                pairs.append((out, vectors["packed/out"]))
            steps = vectors.tensors.get("step/out", ())
            cache = RaggedCache([mixer.new_cache()] if len(steps) else [])
            for step in range(len(steps)):
                token = x[:, step : step + 1]
                places = cache.places(len(x), 1, x.device)
                here = Context(nothing, nothing, Cached(places))
                pairs.append((mixer(token, here, cache.layers[0]).squeeze(1), steps[step]))
                for key, state in states(mixer, cache.layers[0].state).items():  # type: ignore
                    if key in vectors.tensors:
                        pairs.append((state, vectors[key][step][..., -state.shape[-1] :]))
        worst = max(measure(got, reference) for got, reference in pairs)
        yield Result(precision, worst, tolerance)


@serves("linear_recurrence/linear_norm")
def linear_attention(vectors: Vectors) -> Iterator[Result]:
    """Linear attention's sums with given features; their eps is on the sum, ours on the mean.

    The sum of the keys is that of k v^T with v = 1, so both are one recurrence with one more value.
    """
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    p = vectors.hyperparameters
    p.ignore("heads", "d_k", "d_v", "gate_scale", "initial_state")  # seen in the tensors
    eps = p.get("eps", 1e-10)

    def run(t: dict[str, Tensor], state: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor]:
        q, k, v = (t[name][:, tokens] for name in "qkv")
        values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        sums, after = linear_recurrence(_scaled(vectors, q), k, values, state=state)
        return sums[..., :-1] / (sums[..., -1:] + eps), after

    for precision, dtype, tolerance, measure in vectors.limits():
        leaves = {key: leaf(value, dtype) for key, value in vectors.below("in").items()}
        begun, (batch, _, heads, keys) = None, leaves["k"].shape
        if leaves.keys() & {"initial_state", "initial_z"}:
            nothing = leaves["v"].new_zeros(batch, heads, keys, leaves["v"].shape[-1])
            sums = leaves.get("initial_state", nothing)
            begun = torch.cat((sums, leaves.get("initial_z", nothing[..., 0])[..., None]), -1)
        out, after = run(leaves, begun, slice(None))
        out.backward(vectors["grad_out"].to(dtype))
        got: dict[str, Tensor | None] = {f"grad_in/{k}": t.grad for k, t in leaves.items()}
        got |= {"out": out, "final_state": after[..., :-1], "final_z": after[..., -1]}
        steps = []
        with torch.no_grad():
            for step in range(len(vectors.tensors.get("step/out", ()))):
                y, begun = run(leaves, begun, slice(step, step + 1))
                steps.append((y.squeeze(1), begun[..., :-1], begun[..., -1]))
        for name, values in zip(("out", "state", "z"), zip(*steps, strict=True), strict=False):
            got[f"step/{name}"] = torch.stack(values)
        recorded = {name: value for name, value in got.items() if name in vectors.tensors}
        worst = max(measure(value, vectors[name]) for name, value in recorded.items())
        yield Result(precision, worst, tolerance)
