"""The golden vectors notice every plausible mistake: each mutation of a rule breaks one of them."""

import importlib
import types
from pathlib import Path

import pytest

from tools.golden.vectors import Vectors, serving

VECTORS = Path("tests/data/golden")
# What is changed -> (vectors, file, old text, new text).
MUTATIONS = {
    "no Nesterov": (
        "muon_kj_f64ns",
        "muon",
        "grad.lerp(momentum, mu) if self.nesterov else momentum",
        "momentum",
    ),
    "the other axis": (
        "normuon_5320abe_f64ns",
        "normuon",
        'by_row = self.axis == "rows" or rows >= columns',
        "by_row = False",
    ),
    "decay by the scaled rate": (
        "muon_torch_match_rms_adamw_f32ns",
        "stacks",
        "kept = 1 - hyperparameters.lr * hyperparameters.weight_decay",
        "kept = 1 - 0.2 * max(weight.shape) ** 0.5 * hyperparameters.lr"
        " * hyperparameters.weight_decay",
    ),
    "basis of the gradient": (
        "conda_wd_f64",
        "conda",
        "torch.lerp(plain, grad[member], 1 - self.betas[0])",
        "grad[member]",
    ),
    "second moment rotated": (
        "conda_wd_f64",
        "conda",
        'self.on_refresh == "rotate" and not first',
        "not first",
    ),
    "eps inside the root": (
        "normuon_5320abe_f64ns",
        "normuon",
        "v.sqrt().add_(EPS)",
        "(v + EPS).sqrt()",
    ),
    "bias correction on eps": (
        "conda_wd_f64",
        "conda",
        ".add_(self.eps)",
        ".add_(self.eps * (1 - beta2**t) ** 0.5)",
    ),
    "decay before the step": ("conda_wd_f64", "conda", '] = "after"', '] = "before"'),
    "refresh counted from 1": (
        "conda_wd_f64",
        "conda",
        "if step % period == 0 else",
        "if step == 0 or (step + 1) % period == 0 else",
    ),
    "momentum not rotated": (
        "conda_wd_f64",
        "conda",
        "momentum.copy_(_rotate(plain, new))",
        "pass",
    ),
    "guard by the larger": (
        "muon_kj_f64ns",
        "orthogonalize",
        "norm + iteration.guard if",
        "norm.clamp(min=iteration.guard) if",
    ),
    "columns of the second moment stay": (
        "soap_f64",
        "soap",
        "second_moment.copy_(",
        "(lambda _: None)(",
    ),
    "full decay where projected": (
        "adamp_f64",
        "adamp",
        "(1 - self.wd_ratio)",
        "0.0",
    ),
    "projection without eps": (
        "adamp_f64",
        "adamp",
        "weight.norm(dim=dims, keepdim=True) + eps",
        "weight.norm(dim=dims, keepdim=True)",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_golden_vector_notices(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the file's own tolerance, kept by the rule as it is and missed by the mutant."""
    file, module, old, new = MUTATIONS[mutation]
    vectors = Vectors(VECTORS / f"{file}.safetensors")
    serve = serving(vectors.kind)
    assert serve is not None
    assert all(result.error <= result.tolerance for result in serve(vectors))
    original = importlib.import_module(f"llmnorm.optim.{module}")
    source = Path(str(original.__file__)).read_text()
    assert source.count(old) == 1
    mutant = types.ModuleType(original.__name__)
    # A dataclass looks its module up; what other files have imported is changed in place.
    monkeypatch.setitem(importlib.sys.modules, original.__name__, mutant)
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    monkeypatch.setitem(importlib.sys.modules, original.__name__, original)
    for name, value in vars(mutant).items():
        if getattr(value, "__module__", "") == original.__name__:
            for user in ("build", "muon", "normuon", "soap", "conda", "adamp", "stacks"):
                users = importlib.import_module(f"llmnorm.optim.{user}")
                if hasattr(users, name):
                    monkeypatch.setattr(users, name, value)
    assert any(result.error > result.tolerance for result in serve(vectors))
