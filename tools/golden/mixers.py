"""Recurrences and the mixers made of them: both directions, decoding states, gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tools.golden.vectors import FLOATS, Result, Vectors, grad, leaf, relative, serves

LIMITS = {"float64": "float64", "float32": "float32_vs_these_values"}


def _recurrence(
    vectors: Vectors, run: Callable[..., tuple[Tensor, Tensor]], state: str = "initial_state"
) -> Iterator[Result]:
    """A function (inputs by name, state) -> (out, state): both, gradients, and token by token."""
    for precision, dtype in FLOATS.items():
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
        pairs = [(out, vectors["out"]), (after, vectors["final_state"])]
        pairs += [(grad(leaves[key]), ref) for key, ref in vectors.below("grad_in").items()]
        with torch.no_grad():
            now, outs, states = leaves.get(state), [], []
            for step in range(len(vectors["step/out"])):
                token = {key: value[:, step : step + 1] for key, value in inputs.items()}
                y, now = run(token, now)
                outs.append(y.squeeze(1))
                states.append(now)
        pairs += [(torch.stack(outs), vectors["step/out"])]
        pairs += [(torch.stack(states), vectors["step/state"])]
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


@serves("linear_recurrence/simple_gla")
@serves("linear_recurrence/retention")
@serves("linear_recurrence/linear")
def linear_recurrences(vectors: Vectors) -> Iterator[Result]:
    """The engine of linear attention and SSD; retention's decays are constants."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        decay = t.get("g")
        if "mid/log_decay" in vectors.tensors:
            decay = vectors["mid/log_decay"].to(t["v"].dtype).expand(t["v"].shape[:3])
        scaled = t["q"] * t["q"].shape[-1] ** -0.5
        return linear_recurrence(scaled, t["k"], t["v"], decay, state=state)

    return _recurrence(vectors, run)


@serves("linear_recurrence/gla")
def gated_linear_attention(vectors: Vectors) -> Iterator[Result]:
    """GLA's recurrence, a gate a channel."""
    from llmnorm.nn.mixers.gla import channel_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = t["q"] * t["q"].shape[-1] ** -0.5
        return channel_recurrence(scaled, t["k"], t["v"], t["g"], state=state)

    return _recurrence(vectors, run)


@serves("linear_recurrence/gdn")
@serves("linear_recurrence/delta")
def gated_delta(vectors: Vectors) -> Iterator[Result]:
    """The gated delta rule; the delta rule has no gate."""
    from llmnorm.nn.mixers.gated_delta import delta_recurrence

    def run(t: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        scaled = t["q"] * t["q"].shape[-1] ** -0.5
        return delta_recurrence(scaled, t["k"], t["v"], t["beta"], t.get("g"), state=state)

    return _recurrence(vectors, run)


@serves("gated_deltanet/module")
def gated_deltanet(vectors: Vectors) -> Iterator[Result]:
    """The layer of Qwen3-Next."""
    from llmnorm.nn.mixers.settings import GatedDeltaSettings

    p = vectors.hyperparameters
    part = GatedDeltaSettings(
        num_key_heads=p["num_k_heads"],
        num_value_heads=p["num_v_heads"],
        key_head_dim=p["head_k_dim"],
        value_head_dim=p["head_v_dim"],
        conv_kernel=p["conv_kernel"],
        norm_eps=p["norm_eps"],
    )

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

    p, causal = vectors.hyperparameters, vectors.kind.endswith("causal_prefix")
    width = p["heads"] * p["head_dim"]
    settings = ModelSettings(
        hidden_size=width, num_attention_heads=p["heads"], head_dim=p["head_dim"]
    )
    part = NaLaSettings(
        bidirectional=not causal,
        query_eps=0,
        eps=p["eps"],
        lam=p["lam"],
        tau=p["tau"],
        conv_kernel=0,
    )
    mixer: Any = part.build(settings, 0)
    halves = _halves(p["head_dim"])
    for precision, dtype in FLOATS.items():
        q, k, v = (leaf(vectors[f"in/{name}"].transpose(1, 2), dtype) for name in "qkv")
        cos, sin = (vectors[f"in/{t}"][None, :, None, ::2].to(dtype) for t in ("cos", "sin"))
        context = Context(cos, sin)
        parameters = LinearParameters(q[..., halves], k[..., halves], v, None, None)
        out = mixer.mix(parameters, context)
        out.backward(vectors["grad_out"].transpose(1, 2).to(dtype))
        pairs = [(out.transpose(1, 2), vectors["out"])]
        pairs += [
            (grad(t).transpose(1, 2), vectors[f"grad_in/{name}"])
            for t, name in zip((q, k, v), "qkv", strict=True)
        ]
        if "M" in vectors.tensors:
            pairs.append((mixer.materialize(parameters, context), vectors["M"]))
        names = ("phi_q", "phi_k", "phi_q_rope", "phi_k_rope")
        features = mixer.both_features(parameters.q, parameters.k, cos, sin, None)
        for name, feature in zip(names, features, strict=True):
            both = torch.cat((halves, halves + p["head_dim"]))
            pairs.append((feature.transpose(1, 2), vectors[f"mid/{name}"][..., both]))
        if causal:
            with torch.no_grad():
                lengths = vectors["packed/cu_seqlens"].diff()
                documents = tuple(lengths.tolist()) * len(q)
                apart = Context(cos, sin, packed(documents, len(q), q.device))
                pairs.append((mixer.mix(parameters, apart).transpose(1, 2), vectors["out_packed"]))
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


@serves("nala/module")
def nala_module(vectors: Vectors) -> Iterator[Result]:
    """The official layer on a grid; its two-dimensional local convolution stands in for ours."""
    import torch.nn.functional as F

    from llmnorm.nn.mixers.contract import Context
    from llmnorm.nn.mixers.settings import NaLaSettings
    from llmnorm.nn.settings import ModelSettings

    p = vectors.hyperparameters
    dim, heads = p["dim"], p["num_heads"]
    settings = ModelSettings(hidden_size=dim, num_attention_heads=heads)
    part = NaLaSettings(
        bidirectional=True,
        bias=True,
        norm="layer",
        norm_eps=p["ln_eps"],
        query_eps=0,
        eps=p["eps"],
        lam=p["lam"],
        tau=p["tau"],
        conv_kernel=0,
    )
    halves = _halves(settings.head_dim)
    rows = torch.cat([halves + head * settings.head_dim for head in range(heads)])
    for precision, dtype in FLOATS.items():
        state = {key: leaf(value, dtype) for key, value in vectors.below("state").items()}
        own: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            q, k, v, g = state[f"qkvg.{kind}"].chunk(4)
            own |= {f"q_proj.{kind}": q[rows], f"k_proj.{kind}": k[rows], f"v_proj.{kind}": v}
            own |= {f"g_proj.{kind}": g, f"o_proj.{kind}": state[f"out_proj.{kind}"]}
            own[f"norm.{kind}"] = state[f"ln.{kind}"]
        x = leaf(vectors["x"], dtype)
        cos, sin = (vectors[f"mid/{t}"][None, :, None, ::2].to(dtype) for t in ("cos", "sin"))
        context = Context(cos, sin)
        layer = _Layer(part.build(settings, 0).to(dtype), state, F.conv2d)
        out, matrix = torch.func.functional_call(
            layer, {f"mixer.{key}": value for key, value in own.items()}, (x, context)
        )
        out.backward(vectors["grad_out"].to(dtype))
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"]), (matrix, vectors["M"])]
        pairs += [(state[name].grad, value) for name, value in vectors.below("grad").items()]
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


class _Layer(nn.Module):
    """Our mixer with the official local term, from a grid (batch, dim, height, width) to one."""

    def __init__(self, mixer: Any, state: dict[str, Tensor], convolve: Any) -> None:
        super().__init__()
        self.mixer, self.state, self.convolve = mixer, state, convolve

    def forward(self, grid: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        x = grid.flatten(2).mT
        p = self.mixer.prepare(x, context)
        v = p.v.flatten(2).mT.view_as(grid)
        weight, bias = self.state["lepe.weight"], self.state["lepe.bias"]
        local = self.convolve(v, weight, bias, padding=weight.shape[-1] // 2, groups=len(bias))
        p = p._replace(local=local.flatten(2).mT.reshape_as(p.v))
        out = self.mixer.finish(self.mixer.mix(p, context), x, p)
        return out.mT.view_as(grid), self.mixer.materialize(p, context)


def _halves(head_dim: int) -> Tensor:
    """Dimensions that their rotation pairs as neighbours, in the order in which ours does."""
    return torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))


@serves("mamba2/module")
@serves("mamba2/simple_module")
def mamba2(vectors: Vectors) -> Iterator[Result]:
    """Mamba-2's layer; the simple one norms all channels together whatever the groups."""
    from llmnorm.nn.mixers.settings import SSDSettings
    from llmnorm.nn.mixers.ssd import GroupedRMSNorm

    p = vectors.hyperparameters
    part = SSDSettings(
        state_size=p["d_state"],
        head_dim=p["headdim"],
        expand=p["expand"],
        n_groups=p["ngroups"],
        conv_kernel=p.get("d_conv", 4),
        use_bias=p.get("bias", False),
        norm_eps=p["norm_eps"],
        time_step_limit=p.get("dt_limit"),
    )

    def change(mixer: Any) -> None:
        if vectors.kind == "mamba2/simple_module":
            inner = p["expand"] * p["d_model"]
            mixer.norm = GroupedRMSNorm(inner, groups=1, eps=p["norm_eps"])

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
    if p.get("learnable_init_states"):
        return iter(())
    part = HydraSettings(
        state_size=p["d_state"],
        head_dim=p["headdim"],
        expand=p["expand"],
        n_groups=p["ngroups"],
        conv_kernel=p.get("d_conv", 7),
        use_bias=p.get("bias", False),
        time_step_limit=p.get("dt_limit"),
    )
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

    settings = ModelSettings(hidden_size=hidden_size, num_attention_heads=1)
    for precision, dtype in FLOATS.items():
        nothing = torch.zeros(1, 1, 1, 1, dtype=dtype)
        mixer = part.build(settings, 0)
        change(mixer)
        mixer.to(dtype).load_state_dict(vectors.below("state"))
        x, context = leaf(vectors["x"], dtype), Context(nothing, nothing)
        parameters, out = mixer.prepare(x, context), mixer(x, context)
        out.backward(vectors["grad_out"].to(dtype))
        y = mixer.mix(parameters, context)
        pairs = [(out, vectors["out"]), (x.grad, vectors["grad_x"])]
        pairs += [(mixer.materialize(parameters, context), vectors["M"])]
        pairs += [(y.reshape(vectors["mid/y_mixed"].shape), vectors["mid/y_mixed"])]
        pairs += [(get(parameters), vectors[key]) for key, get in mids.items()]
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
                here = Context(nothing, nothing, Cached(places, places.mask()))
                pairs.append((mixer(token, here, cache.layers[0]).squeeze(1), steps[step]))
                for key, state in states(mixer, cache.layers[0].state).items():  # type: ignore
                    pairs.append((state, vectors[key][step][..., -state.shape[-1] :]))
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])


@serves("linear_recurrence/linear_norm")
def linear_attention(vectors: Vectors) -> Iterator[Result]:
    """Linear attention's sums with given features; their eps is on the sum, ours on the mean."""
    from llmnorm.nn.mixers.linear_recurrence import linear_recurrence

    for precision, dtype in FLOATS.items():
        leaves = {key: leaf(value, dtype) for key, value in vectors.below("in").items()}
        q, k, v = leaves["q"] * leaves["q"].shape[-1] ** -0.5, leaves["k"], leaves["v"]
        y, after = linear_recurrence(q, k, v, state=leaves["initial_state"])
        one = v.new_ones(()).expand(*v.shape[:3], 1)
        total, _ = linear_recurrence(q, k, one, state=leaves["initial_z"][..., None])
        out = y / (total + 1e-10)
        out.backward(vectors["grad_out"].to(dtype))
        pairs = [(out, vectors["out"]), (after, vectors["final_state"])]
        pairs += [(grad(leaves[key]), ref) for key, ref in vectors.below("grad_in").items()]
        worst = max(relative(got, reference) for got, reference in pairs)
        yield Result(precision, worst, vectors.tolerance[LIMITS[precision]])
