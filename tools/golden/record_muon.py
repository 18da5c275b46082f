"""Record torch.optim.Muon in float64.

    python -m tools.golden.record_muon [FILE]

FILE is tests/data/golden/muon_torch_match_rms_adamw_f64ns.safetensors if it is left out. Before its
Newton-Schulz iteration torch casts to bf16 whatever the dtype of the weights. Here the source of
that function runs with `grad.clone()` in the place of `grad.bfloat16()`; nothing else is changed.
Gradients of size .01 make the guard on the norm (1e-7, which torch does not add) worth 2e-8 of a
weight, far above the tolerance of 1e-11.
"""

import inspect
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import _muon

FILE = Path("tests/data/golden/muon_torch_match_rms_adamw_f64ns.safetensors")
SHAPES = ((6, 10), (10, 6), (8, 8), (7, 5))
STEPS = 8
SETTINGS = {
    "lr": 2e-3,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": [3.4445, -4.7750, 2.0315],
    "eps": 1e-7,
    "ns_steps": 5,
    "adjust_lr_fn": "match_rms_adamw",
}
HEADER = {
    "kind": "optimizer/muon_torch",
    "source": f"torch {torch.__version__} torch/optim/_muon.py, by tools/golden/record_muon.py",
    "hyperparameters": json.dumps(SETTINGS),
    "dtype": "float64 parameters; the bfloat16 cast before Newton-Schulz left out",
    "steps": str(STEPS),
    "tolerance": json.dumps({"f64_max_abs": 1e-11}),
    "note": "param_i: initial parameter i; grad_TTT/i: its gradient at step TTT (from 0); "
    "param_after_TTT/i: the parameter after that step",
    "trap": "the norm is clamped at eps, not increased by it; decay with the unadjusted lr",
}


def record() -> dict[str, Tensor]:
    """The tensors of the file."""
    generator = torch.Generator().manual_seed(19)

    def draw(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = [nn.Parameter(draw(shape)) for shape in SHAPES]
    optimizer = _muon.Muon(parameters, **SETTINGS)  # type: ignore[arg-type]
    tensors = {f"param_{i}": p.detach().clone() for i, p in enumerate(parameters)}
    original = _muon._zeropower_via_newtonschulz
    source = inspect.getsource(original)
    assert source.count("grad.bfloat16()") == 1
    try:
        exec(source.replace("grad.bfloat16()", "grad.clone()"), vars(_muon))
        for step in range(STEPS):
            for i, parameter in enumerate(parameters):
                parameter.grad = 0.01 * draw(SHAPES[i])
                tensors[f"grad_{step:03d}/{i}"] = parameter.grad.clone()
            optimizer.step()
            for i, parameter in enumerate(parameters):
                tensors[f"param_after_{step:03d}/{i}"] = parameter.detach().clone()
    finally:
        _muon._zeropower_via_newtonschulz = original
    return tensors


if __name__ == "__main__":
    save_file(record(), Path(sys.argv[1]) if len(sys.argv) > 1 else FILE, metadata=HEADER)
