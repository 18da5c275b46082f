"""One model as another of the same function: Pre-LN, Pre-RMSNorm, Pre-CRMSNorm; scales folded.

Source: Jiang et al. 2023 (arXiv 2305.14858), section 3; depth scaling: arXiv 2502.05795; Unified
Normalization: arXiv 2208.01313. Shapes: E (vocabulary, d) embedding; A (out, d), b (out,) a linear
layer that reads a norm's output (an input matrix); O (d, in), o (d,) one that writes to the
residual stream (an output matrix); gain g, offset h (d,), scale s of a norm.

    centre      E, O, o less their mean over d. The stream then has mean zero, and on such a stream
                layer norm and RMS norm are the same. A layer norm sees no difference: always exact.
    fold        s (g x^ + h) into what reads it: b <- b + A (s h), A <- A diag(g)
    compress    on a centred stream the last entry is minus the sum of the others and is left out:
                A <- A[:, :-1] - A[:, -1:], E, O, o without their last entry; the norm is CRMSNorm
    expand      the way back: E, O, o with minus their sum as the last entry, A with a zero column

What would surprise: CRMSNorm has no gain and no offset, so all must have been folded; the head has
no offset, so that of the final norm cannot be folded; a tied head reads what the embedding writes,
and each of them changes in its own way; RMS norm sees the mean of its stream, so a Llama cannot be
centred after the fact. What cannot be done exactly is refused with the reason.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from llmnorm.nn.mixers.settings import SoftmaxSettings
from llmnorm.nn.norms.depth_scaling import depth_scale
from llmnorm.nn.norms.settings import (
    CRMSNormSettings,
    LayerNormSettings,
    PreSettings,
    RMSNormSettings,
    UnifiedNormSettings,
)
from llmnorm.nn.settings import GELUSettings, ModelSettings, SwiGLUSettings
from llmnorm.part import InputError, part_name

EMBEDDING, HEAD, FINAL = "model.embed_tokens.weight", "lm_head.weight", "model.norm"
CENTRED = 1e-5  # of the weights' size: what float32 leaves of an exact zero mean


class Weights(NamedTuple):
    """A model's settings and its tensors by parameter name, in float64."""

    settings: ModelSettings
    tensors: dict[str, Tensor]


class _Site(NamedTuple):
    """A norm, the input matrices that read it, and its scale."""

    norm: str
    reads: list[str]
    scale: float


def convert(weights: Weights, target: str, *, untie: bool = False) -> Weights:
    """The same function with another norm.

    Args:
        weights: any model of ours whose blocks are pre-norm.
        target: one of `TARGETS`.
        untie: give a tied head its own matrix where that is needed.

    Raises:
        InputError: the algebra does not hold for this model; the reason is given.
    """
    settings = weights.settings
    if not settings.causal:
        _refuse(target, "only decoders are converted, this is an encoder (model.mixer)")
    if settings.type_vocab_size or settings.embedding_norm or not settings.final_norm:
        _refuse(target, "only models that begin and end as Llama does are converted")
    if not isinstance(settings.placement, PreSettings):
        _refuse(target, "the blocks are not pre-norm (model.placement)")
    if not all(isinstance(mixer, SoftmaxSettings) for mixer in settings.mixers()):
        _refuse(target, "only blocks with the softmax mixer are converted (model.mixer)")
    if not isinstance(settings.mlp, SwiGLUSettings | GELUSettings):
        _refuse(target, "only blocks with swiglu or gelu are converted (model.mlp)")
    wide = {
        name: tensor.to(torch.float64) if tensor.is_floating_point() else tensor
        for name, tensor in weights.tensors.items()
    }
    return TARGETS[target](Weights(settings, wide), untie)


def depth_factors(settings: ModelSettings) -> dict[str, float]:
    """The tensors that hold a depth-scaled norm's gain or offset, and the factor of each."""
    return {
        f"{site.norm}.{part}": site.scale
        for site in _sites(settings)
        for part in ("weight", "bias")
        if site.scale != 1.0
    }


# The targets.


def to_centred(weights: Weights, untie: bool) -> Weights:
    """The same Pre-LN model with a stream of mean zero."""
    settings, w = weights
    if not isinstance(settings.norm, LayerNormSettings):
        _refuse(
            "centred",
            f"'{_name(settings)}' sees the mean of the stream; only layer norm does not",
        )
    if settings.tie_word_embeddings:
        gain, offset = w[f"{FINAL}.weight"], w.get(f"{FINAL}.bias", torch.zeros(1))
        constant = torch.allclose(gain, gain.mean(), rtol=CENTRED, atol=0)
        if not (constant and abs(offset.sum()) <= CENTRED * offset.norm()):
            why = "the tied head would lose what the final norm's gain and offset add along the"
            weights = _untied(weights, untie, "centred", f"{why} mean")
    return weights._replace(tensors=_centre(weights))


def to_rms(weights: Weights, untie: bool) -> Weights:
    """Pre-RMSNorm from Pre-LN or Pre-CRMSNorm."""
    norm = weights.settings.norm
    if isinstance(norm, CRMSNormSettings):
        return _expand(weights, untie)
    if not isinstance(norm, LayerNormSettings):
        _refuse("rms", f"the norm is '{_name(weights.settings)}', not layer or crms")
    settings, w = to_centred(weights, untie)
    offsets = norm.bias and any(w[f"{s.norm}.bias"].any() for s in _sites(settings))
    if norm.bias and not (offsets and w[f"{FINAL}.bias"].any()):
        settings, w = _fold_offsets(Weights(settings, w)) if offsets else (settings, w)
        w = {k: t for k, t in w.items() if k not in {f"{s.norm}.bias" for s in _sites(settings)}}
        offsets = False
    return Weights(_with(settings, norm=RMSNormSettings(eps=norm.eps, bias=offsets)), w)


def to_crms(weights: Weights, untie: bool) -> Weights:
    """Pre-CRMSNorm from Pre-LN, or from Pre-RMSNorm on a centred stream."""
    if isinstance(weights.settings.norm, LayerNormSettings):
        weights = to_rms(weights, untie)
    norm = weights.settings.norm
    if not isinstance(norm, RMSNormSettings):
        _refuse("crms", f"the norm is '{_name(weights.settings)}', not layer or rms")
    _refuse_uncentred(weights, "crms")
    if norm.bias:
        if weights.tensors[f"{FINAL}.bias"].any():
            _refuse("crms", "the final norm has an offset, for which the head has no place")
        weights = _fold_offsets(weights)
    weights = _untied(weights, untie, "crms", "the head reads what the embedding does not hold")
    settings, w = _fold_gains(weights)
    w = w | {EMBEDDING: w[EMBEDDING][:, :-1]}
    w |= {name: w[name][:-1] for name in _outputs(settings, w)}
    w |= {name: w[name][:, :-1] - w[name][:, -1:] for name in _inputs(settings)}
    changed = {"norm": CRMSNormSettings(eps=norm.eps), "hidden_size": settings.hidden_size - 1}
    return Weights(_with(settings, **changed), w)


def to_layer(weights: Weights, untie: bool) -> Weights:
    """Pre-LN from Pre-RMSNorm on a centred stream, or from Pre-CRMSNorm."""
    if isinstance(weights.settings.norm, CRMSNormSettings):
        weights = _expand(weights, untie)
    norm = weights.settings.norm
    if not isinstance(norm, RMSNormSettings):
        _refuse("layer", f"the norm is '{_name(weights.settings)}', not rms or crms")
    _refuse_uncentred(weights, "layer")
    layer = LayerNormSettings(eps=norm.eps, bias=norm.bias)
    return weights._replace(settings=_with(weights.settings, norm=layer))


def to_lns(weights: Weights, untie: bool) -> Weights:
    """The gains without depth scaling, which `export --stock` multiplied into them."""
    return _rescale(weights, "lns")


def to_unscaled(weights: Weights, untie: bool) -> Weights:
    """Depth scaling folded into the gains: blocks may then be removed and renumbered."""
    return _rescale(weights, "none")


def to_identity(weights: Weights, untie: bool) -> Weights:
    """Unified Normalization folded into the linear layers; no norm is left.

    The final norm's offset goes into the last MLP's: nothing but that norm follows it.
    """
    settings, w = weights
    norm = settings.norm
    if not isinstance(norm, UnifiedNormSettings):
        _refuse(
            "identity",
            f"'{_name(settings)}' has statistics of the token; only unified has none",
        )
    weights = _untied(weights, untie, "identity", "the head takes in the final norm's factors")
    sites = _sites(settings)
    for site in sites:
        factor = torch.rsqrt(w[f"{site.norm}.running_square"] + norm.eps)
        weights.tensors[f"{site.norm}.weight"] = w[f"{site.norm}.weight"] * factor * site.scale
    gain, offset = (weights.tensors[f"{FINAL}.{part}"] for part in ("weight", "bias"))
    if bool(((gain == 0) & (offset != 0)).any()):
        _refuse("identity", "the final norm has an offset where its gain is zero")
    moved = torch.where(offset == 0, 0.0, offset / torch.where(gain == 0, 1.0, gain))
    settings, w = _fold_gains(_fold_offsets(weights))
    w[f"model.layers.{settings.num_hidden_layers - 1}.mlp.down_proj.bias"] += moved
    gone = tuple(f"{site.norm}." for site in sites)
    w = {name: tensor for name, tensor in w.items() if not name.startswith(gone)}
    return Weights(_with(settings, norm="identity", depth_scaling="none"), w)


TARGETS: dict[str, Callable[[Weights, bool], Weights]] = {
    "centred": to_centred,
    "rms": to_rms,
    "crms": to_crms,
    "layer": to_layer,
    "lns": to_lns,
    "unscaled": to_unscaled,
    "identity": to_identity,
}


def centre_gpt2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same GPT-2 with a stream of mean zero and a head of its own.

    Its blocks are Pre-LN; positions are learned and enter the stream as the embedding does. Output
    matrices are (in, d) here. Names may lack the prefix `transformer.`, as on the hub.
    """
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    head = tensors.get(HEAD, tensors[f"{prefix}wte.weight"])
    writes = ("wte.weight", "wpe.weight", ".c_proj.weight", ".c_proj.bias")
    return {
        name: tensor - tensor.mean(-1, keepdim=True) if name.endswith(writes) else tensor
        for name, tensor in tensors.items()
    } | {HEAD: head.clone()}


# The steps that the targets are made of.


def _centre(weights: Weights) -> dict[str, Tensor]:
    settings, w = weights
    centred = {name: w[name] - w[name].mean(0) for name in _outputs(settings, w)}
    return w | {EMBEDDING: w[EMBEDDING] - w[EMBEDDING].mean(1, keepdim=True)} | centred


def _refuse_uncentred(weights: Weights, target: str) -> None:
    settings, w = weights
    for name in (EMBEDDING, *_outputs(settings, w)):
        means = w[name].mean(1 if name == EMBEDDING else 0)
        if means.abs().max() > CENTRED * w[name].abs().max():
            _refuse(
                target,
                f"'{name}' gives the residual stream a mean, which RMS norm sees; only models that "
                "were Pre-LN (`--to rms`) have none",
            )


def _fold_gains(weights: Weights) -> Weights:
    """Gains into the matrices that read them; the scales stay with the norms."""
    settings, w = weights.settings, dict(weights.tensors)
    for site in _sites(settings):
        gain = w.pop(f"{site.norm}.weight")
        w |= {name: w[name] * gain for name in site.reads}
    return Weights(settings, w)


def _fold_offsets(weights: Weights) -> Weights:
    """Offsets of the blocks' norms, times their scale, into the biases of what reads them."""
    settings, w = weights.settings, dict(weights.tensors)
    for site in _sites(settings):
        offset = w.pop(f"{site.norm}.bias")
        for name in site.reads if site.norm != FINAL else []:
            bias = name.replace(".weight", ".bias")
            w[bias] = w.get(bias, 0.0) + w[name] @ (site.scale * offset)
    for layer in range(settings.num_hidden_layers):
        down = w[f"model.layers.{layer}.mlp.down_proj.weight"]
        w.setdefault(f"model.layers.{layer}.mlp.down_proj.bias", torch.zeros_like(down[:, 0]))
    mixers = [
        mixer if mixer.attention_bias else mixer.model_copy(update={"attention_bias": "qkv"})
        for mixer in settings.mixers()
        if isinstance(mixer, SoftmaxSettings)
    ]
    same = all(mixer == mixers[0] for mixer in mixers)
    mlp = settings.mlp.model_copy(update={"bias": True})
    return Weights(_with(settings, mixer=mixers[0] if same else mixers, mlp=mlp), w)


def _expand(weights: Weights, untie: bool) -> Weights:
    """Pre-RMSNorm from Pre-CRMSNorm: the entry that was left out, gains of one."""
    weights = _untied(weights, untie, "rms", "the head reads what the embedding does not hold")
    settings, w = weights
    assert isinstance(settings.norm, CRMSNormSettings)
    table = w[EMBEDDING]
    w = w | {EMBEDDING: torch.cat((table, -table.sum(1, keepdim=True)), 1)}
    outputs = _outputs(settings, w)
    w |= {name: torch.cat((w[name], -w[name].sum(0, keepdim=True))) for name in outputs}
    inputs = _inputs(settings)
    w |= {name: torch.cat((w[name], torch.zeros_like(w[name][:, :1])), 1) for name in inputs}
    gains = {f"{site.norm}.weight": torch.ones_like(w[EMBEDDING][0]) for site in _sites(settings)}
    norm = RMSNormSettings(eps=settings.norm.eps)
    return Weights(_with(settings, norm=norm, hidden_size=settings.hidden_size + 1), w | gains)


def _rescale(weights: Weights, scaling: str) -> Weights:
    settings, w = weights
    target = "lns" if scaling == "lns" else "unscaled"
    if settings.depth_scaling == scaling:
        _refuse(target, f"model.depth_scaling is '{scaling}' already")
    if f"{FINAL}.weight" not in w:
        _refuse(target, f"'{_name(settings)}' has no gain that could hold the scale")
    scaled = settings if scaling == "none" else _with(settings, depth_scaling="lns")
    power = 1 if scaling == "none" else -1
    factors = {k: s for k, s in depth_factors(scaled).items() if k in w}
    w = w | {name: w[name] * factor**power for name, factor in factors.items()}
    return Weights(_with(settings, depth_scaling=scaling), w)


def _untied(weights: Weights, untie: bool, target: str, why: str) -> Weights:
    settings, w = weights
    if not settings.tie_word_embeddings:
        return Weights(settings, dict(w))
    if not untie:
        _refuse(target, f"{why} (model.tie_word_embeddings); --untie gives the head its own")
    return Weights(_with(settings, tie_word_embeddings=False), {**w, HEAD: w[EMBEDDING].clone()})


# Names of the norms and matrices.


def _sites(settings: ModelSettings) -> list[_Site]:
    """Every norm in front of what reads it; the final one last."""
    found = []
    gate = ["gate_proj"] if isinstance(settings.mlp, SwiGLUSettings) else []
    for layer in range(settings.num_hidden_layers):
        scale = depth_scale(layer) if settings.depth_scaling == "lns" else 1.0
        for norm, room, linears in (
            ("input_layernorm", "self_attn", ["q_proj", "k_proj", "v_proj"]),
            ("post_attention_layernorm", "mlp", [*gate, "up_proj"]),
        ):
            block = f"model.layers.{layer}"
            reads = [f"{block}.{room}.{linear}.weight" for linear in linears]
            found.append(_Site(f"{block}.{norm}", reads, scale))
    return [*found, _Site(FINAL, [HEAD], 1.0)]


def _inputs(settings: ModelSettings) -> list[str]:
    return [name for site in _sites(settings) for name in site.reads]


def _outputs(settings: ModelSettings, tensors: dict[str, Tensor]) -> list[str]:
    """The output matrices and their biases, where there are any."""
    names = _output_names(settings.num_hidden_layers)
    return [name for name in names if name in tensors]


def _output_names(layers: int) -> Iterator[str]:
    for layer in range(layers):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            for part in ("weight", "bias"):
                yield f"model.layers.{layer}.{linear}.{part}"


def _with(settings: ModelSettings, **changed: Any) -> ModelSettings:
    return ModelSettings.model_validate(settings.model_dump() | changed)


def _name(settings: ModelSettings) -> str:
    return part_name(type(settings.norm))


def _refuse(target: str, why: str) -> NoReturn:
    raise InputError(f"--to {target}: {why}")
