"""Every mixer against its oracles: explicit matrix, one token at a time, recorded official runs.

usage: python tools/bench/mixer_accuracy.py [--mixers nala ssd] [--out FILE]

The mixers are those of the tests, and a model that is a hybrid of three. Each computes three rows
of 131 tokens: plain, packed (documents of 1 to 67 tokens, with borders inside and at the ends of
chunks), and padded (on the left in one row, on the right in another).

Oracles use the same rounded weights and inputs in float64: `mix` by the explicit matrix, or by a
loop over the tokens (in both directions where the mixer has both). An error is max|got - oracle| /
max|oracle| of a tensor at real tokens. The tables show it for the mixed values y (for the hybrid:
its output), and the largest one of all gradients, of the input and of the parameters. bfloat16 is
that of autocast. Decoding, one token at a time from the start and after 64 tokens, is compared with
the pass over the whole row. The last table shows the largest change in a document when another
document, or the padding, changes; it must be exactly 0.

With `--mixers` no file is written unless `--out` is given.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import RESULTS, ROOT, Table, publish
from torch import Tensor, nn

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormModel
from llmnorm.nn.cache import RaggedCache
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.matrix.vandermonde import FIRST_EPS
from llmnorm.nn.precision import wide_dtype
from tests.nn import test_mixers as tests
from tests.nn.recurrences import mixed_token_by_token
from tools.golden import parts_of
from tools.golden.vectors import Vectors, relative, serving

LENGTH, STD = 131, 0.2
BOTH = {"name": "nala", "bidirectional": True, "direction": "cosine", "conv_kernel": 3}
MIXERS: dict[str, Any] = tests.MIXERS | {"nala both cosine": BOTH}
HYBRID = [
    "nala",
    {"name": "ssd", "head_dim": 8, "state_size": 5},
    {"name": "softmax", "sliding_window": 32},
]
ROWS = ("plain", "packed", "padded")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
BARS = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 3e-2}
# Some gradients (of one decay a head) are sums over all tokens that nearly cancel.
GRADIENT_BARS = {"float64": 1e-11, "float32": 2e-5, "bfloat16": math.inf}
DECODING = {"float64": 1e-10, "float32": 2e-5}
# The kinds of recorded runs that a mixer, or the engine under it, is held to.
OFFICIAL = {
    "softmax": ["attention/gqa_rope"],
    "linear": ["linear_recurrence/linear", "linear_recurrence/linear_norm"],
    "nala": ["nala/causal_prefix"],
    "nala both": ["nala/core", "nala/module"],
    "ssd": ["mamba2/module", "mamba2/simple_module", "mamba2/ssd"],
    "retention, simple gla (ssd's engine)": [
        "linear_recurrence/simple_gla",
        "linear_recurrence/retention",
    ],
    "gla": ["linear_recurrence/gla"],
    "gated_delta": ["gated_deltanet/module", "linear_recurrence/gdn", "linear_recurrence/delta"],
    "hydra": ["hydra"],
    **{
        f"matrix {family}": [f"matrix_mixer/{family}_{form}" for form in ("dd", "di")]
        for family in ("dense", "toeplitz", "cauchy", "low_rank", "attention", "quasiseparable")
    },
    "matrix vandermonde": ["matrix_mixer/vandermonde_dd", "matrix_mixer/vandermonde_nondft_di"],
    "matrix dft": ["matrix_mixer/vandermonde_di"],  # which is what theirs builds
}


class Rows(NamedTuple):
    """One kind of rows: positions (3, length), which tokens are real, and both as a context."""

    positions: Tensor | None
    real: Tensor | None
    context: Context


def rows(kind: str, *, causal: bool, by_mask: bool = False) -> Rows:
    """The rows of a kind."""
    if kind == "plain":
        return Rows(None, None, tests.plain(LENGTH))
    if kind == "padded":
        context = tests.padded(LENGTH, causal=causal)
        return Rows(None, context.real, context)
    lengths = ((10, 1, 22, 31, 67), (64, 64, 3), (LENGTH,))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return Rows(positions, None, tests.packed(positions, by_mask=by_mask, causal=causal))


def build(mixer: Any) -> nn.Module:
    """A mixer, or the model of several, in float64."""
    if isinstance(mixer, dict):
        built = tests.build(mixer, std=STD)
        for name, parameter in built.named_parameters():
            if name.endswith("log_eps"):  # float32 cannot hold waves of a turn a position
                parameter.data.fill_(math.log(FIRST_EPS))
        return built
    shape = tests.settings().model_dump(
        include={"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"}
    )
    config = LlmNormConfig(
        **shape, mixer=mixer, num_hidden_layers=3, vocab_size=8, intermediate_size=24
    )
    torch.manual_seed(0)
    model = LlmNormModel(config).double()
    for parameter in model.layers.parameters():
        parameter.data.normal_(std=STD)
    model.embed_tokens = None  # it is given vectors
    return model


def run(module: nn.Module, x: Tensor, given: Rows) -> tuple[Tensor, Tensor]:
    """The mixed values (of a model, its output), and the output (3, length, hidden)."""
    if isinstance(module, Mixer):
        wide = wide_dtype(x.dtype)
        tables = {name: getattr(given.context, name).to(wide) for name in ("cos", "sin")}
        context = replace(given.context, **tables)
        parameters = module.prepare(x, context)
        y = module.mix(parameters, context)
        return y, module.finish(y, x, parameters)
    mask = None if given.real is None else given.real.long()
    out = module(inputs_embeds=x, position_ids=given.positions, attention_mask=mask)
    return out.last_hidden_state, out.last_hidden_state


@contextmanager
def mixing(
    module: nn.Module, way: Callable[[Mixer, Any, Context], Tensor | None]
) -> Iterator[None]:
    """Inside the `with`, `way` replaces every mixer's `mix`; where it returns None, the matrix."""

    def mix(mixer: Mixer, parameters: Any, context: Context, cache: Any = None) -> Tensor:
        y = way(mixer, parameters, context)
        return tests.mixed_by_matrix(mixer, parameters, context) if y is None else y

    mixers = [m for m in module.modules() if isinstance(m, Mixer)]
    for mixer in mixers:
        mixer.mix = partial(mix, mixer)  # type: ignore[method-assign]
    yield
    for mixer in mixers:
        del mixer.mix


def passes(module: nn.Module, x: Tensor, given: Rows) -> list[Tensor]:
    """The mixed values at real tokens, and the gradients of the input and of all parameters."""
    leaf = x.clone().requires_grad_()
    y, out = run(module, leaf, given)
    if given.real is not None:
        y, out = y[given.real], out[given.real]
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    return [y.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], upstream)]


class Errors(NamedTuple):
    """Of the mixed values by kind of rows, and the largest of all gradients."""

    mixed: dict[str, float]
    gradients: float


def against(mixer: Any, precision: str, way: Callable[[Mixer, Any, Context], Any]) -> Errors:
    """Errors in a precision against the oracle that mixes by `way`."""
    module, x = build(mixer), tests.inputs(LENGTH)
    causal = not isinstance(module, Mixer) or module.causal
    if precision != "float64":
        dtype = DTYPES[precision]
        module, x = module.to(dtype).double(), x.to(dtype).double()  # what `dtype` holds
    narrow = torch.float64 if precision == "float64" else torch.float32
    mixed, gradients = {}, 0.0
    for kind in ROWS:
        given = rows(kind, causal=causal)
        with mixing(module, way):
            expected = passes(module, x, given)
        module.to(narrow)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            got = passes(module, x.to(narrow), given)
        module.double()
        mixed[kind], *others = (relative(a, b) for a, b in zip(got, expected, strict=True))
        gradients = max(gradients, *others)
    return Errors(mixed, gradients)


@torch.no_grad()
def decoding(mixer: Any) -> dict[str, float]:
    """Tokens one at a time against the pass over the whole rows, by precision."""
    found = {}
    for precision in DECODING:
        dtype = DTYPES[precision]
        module, x = build(mixer).to(dtype), tests.inputs(LENGTH).to(dtype)
        _, whole = run(module.double(), x.double(), rows("plain", causal=True))
        module.to(dtype)
        errors = []
        for begun in (0, 64):
            outs = list(_stepwise(module, x, [begun, *[1] * (LENGTH - begun)]))
            errors.append(relative(torch.cat(outs, 1), whole))
        found[precision] = max(errors)
    return found


def _stepwise(module: nn.Module, x: Tensor, cuts: list[int]) -> Iterator[Tensor]:
    pieces = [piece for piece in x.split(cuts, 1) if piece.shape[1]]
    if isinstance(module, Mixer):
        layers = RaggedCache([module.new_cache()])
        yield from (tests.through_the_cache(module, layers, piece) for piece in pieces)
        return
    assert isinstance(module, LlmNormModel)
    cache = module.new_cache()
    for piece in pieces:
        yield module(inputs_embeds=piece, past_key_values=cache).last_hidden_state


def isolation(mixer: Any) -> dict[str, float]:
    """The largest change in a document's output and gradient when others or padding change."""
    found = dict.fromkeys(("document", "document, by a mask", "padding"), 0.0)
    for dtype in (torch.float64, torch.float32):
        module = build(mixer).to(dtype)
        causal = not isinstance(module, Mixer) or module.causal
        x = tests.inputs(LENGTH).to(dtype)
        for kind in found:
            by_mask = kind == "document, by a mask"
            if kind == "padding":
                given = rows("padded", causal=causal)
                assert given.real is not None
                mine = given.real
            else:
                given = rows("packed", causal=causal, by_mask=by_mask)
                mine = torch.zeros(x.shape[:2], dtype=torch.bool)
                mine[0, 33:64] = True  # the fourth document of the first row
            if isinstance(module, LlmNormModel):
                module.fixed_shapes = by_mask
            leaf = x.clone().requires_grad_()
            out = run(module, leaf, given)[1][mine]
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
            changed = run(module, torch.where(mine[..., None], x, 7.0), given)[1][mine]
            change = max(float(t.detach().abs().max()) for t in (out - changed, grad[~mine]))
            found[kind] = max(found[kind], change)
            assert grad[mine].abs().max() > 0
    return found


def official(kinds: list[str]) -> list[dict[str, Any]]:
    """Errors and tolerances of the recorded runs of these kinds, file by file."""
    found = []
    for path in sorted((ROOT / "tests" / "data" / "golden").glob("*.safetensors")):
        vectors = Vectors(path)
        for part in parts_of(vectors.kind):
            check = serving(part)
            if part in kinds and check is not None:
                for result in check(vectors):
                    found.append({"file": path.stem, **result._asdict()})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    every = {**MIXERS, "hybrid": HYBRID}
    parser.add_argument("--mixers", nargs="+", choices=every, metavar="NAME", help="only these")
    parser.add_argument("--out", type=Path, help="where the figures go")
    options = parser.parse_args(arguments)
    if options.out is None and not options.mixers:
        options.out = RESULTS / "mixer_accuracy.json"
    torch.set_num_threads(1)
    chosen = {name: every[name] for name in options.mixers or every}
    figures: dict[str, dict[str, Any]] = {}
    for name, mixer in chosen.items():
        whole = {p: against(mixer, p, lambda *_: None)._asdict() for p in DTYPES}
        row = figures[name] = {"matrix": whole}
        if isinstance(mixer, list) or tests.is_recurrence(mixer):
            row["loop"] = against(mixer, "float64", mixed_token_by_token)._asdict()
        if isinstance(mixer, list) or mixer in tests.CAUSAL.values():
            row["decoding"] = decoding(mixer)
        row["isolation"] = isolation(mixer)
        print(name, file=sys.stderr)
    recorded = {
        n: official(kinds) for n, kinds in OFFICIAL.items() if n in chosen or not options.mixers
    }
    found = list(tables(figures, recorded))
    publish(
        options.out,
        "Mixers against their oracles",
        found,
        {"mixers": figures, "official": recorded},
    )
    return int(any("MISSES" in cell for table in found for row in table.rows for cell in row))


def tables(
    figures: dict[str, dict[str, Any]], recorded: dict[str, list[dict[str, Any]]]
) -> Iterator[Table]:
    """The tables of the figures; a figure above its bar is marked MISSES."""

    def cell(error: float, bar: float) -> str:
        return f"{error:.1e}" + ("" if error <= bar else " MISSES")

    def said(bars: dict[str, float]) -> str:
        known = {name: bar for name, bar in bars.items() if math.isfinite(bar)}
        return "bars: " + ", ".join(f"{name} {bar:.0e}" for name, bar in known.items())

    yield Table(
        f"mixed values against the explicit matrix ({said(BARS)})",
        ["mixer", *(f"{precision}, {kind}" for precision in DTYPES for kind in ROWS)],
        [
            [name, *(cell(row["matrix"][p]["mixed"][k], BARS[p]) for p in DTYPES for k in ROWS)]
            for name, row in figures.items()
        ],
    )
    yield Table(
        f"gradients against the explicit matrix ({said(GRADIENT_BARS)})",
        ["mixer", *DTYPES],
        [
            [name, *(cell(row["matrix"][p]["gradients"], bar) for p, bar in GRADIENT_BARS.items())]
            for name, row in figures.items()
        ],
    )
    lines = []
    for name, row in figures.items():
        cells = ["-"] * 6
        if "loop" in row:
            errors = [*row["loop"]["mixed"].values(), row["loop"]["gradients"]]
            cells[:4] = [cell(e, BARS["float64"]) for e in errors]
        if "decoding" in row:
            cells[4:] = [cell(row["decoding"][p], bar) for p, bar in DECODING.items()]
        if set(cells) != {"-"}:
            lines.append([name, *cells])
    if lines:
        columns = [*(f"loop, {kind}" for kind in ROWS), "loop, gradients"]
        columns += [f"decoding, {precision}" for precision in DECODING]
        yield Table(
            f"one token at a time: against a loop over the tokens (float64, bar "
            f"{BARS['float64']:.0e}), and decoding against the whole row ({said(DECODING)})",
            ["mixer", *columns],
            lines,
        )
    lines = []
    for name, results in recorded.items():
        files = sorted({result["file"] for result in results})
        cells = []
        for precision in ("float64", "float32"):
            of = [r for r in results if r["precision"] == precision]
            nearest = max(of, key=lambda r: r["error"] / (r["tolerance"] or math.inf))
            cells += [cell(nearest["error"], nearest["tolerance"]), f"{nearest['tolerance']:.0e}"]
        lines.append([name, ", ".join(files), *cells])
    if lines:
        columns = ["mixer", "files", "float64", "tolerance", "float32", "tolerance"]
        yield Table(
            "recorded runs of the official code (outputs, gradients, matrices, states: the error "
            "nearest to its tolerance)",
            columns,
            lines,
        )
    columns = list(next(iter(figures.values()))["isolation"])
    lines = [
        [
            name,
            *(f"{row['isolation'][c]:.0e} MISSES" if row["isolation"][c] else "0" for c in columns),
        ]
        for name, row in figures.items()
    ]
    yield Table(
        "what changes when another document, or what padding holds, does",
        ["mixer", *columns],
        lines,
    )


if __name__ == "__main__":
    sys.exit(main())
