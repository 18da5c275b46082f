"""One process: how it begins on a GPU, and that its blocks really are compiled."""

from functools import partial
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.models import LlmNormConfig
from llmnorm.models.building import empty_model
from llmnorm.models.initialization import initialize
from llmnorm.parallel.launch import accelerator
from llmnorm.parallel.processes import Parallel, local

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 12,
}


def test_one_process_on_a_gpu_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: accelerate 1.15, which told of a backend asks a process group that nobody made."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert accelerator(cuda=True).num_processes == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_every_block_runs_one_compiled_graph(
    sharding: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what the compiler is given and how often that runs; gradients without a compiler."""
    compiled, ran = [], []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)

        def run(*inputs: Any) -> Any:
            ran.append(graph)
            return graph(*inputs)

        return run

    torch._dynamo.reset()  # what other tests compiled counts against its limit
    plain = gradients(sharding, compile=False, activation_checkpointing=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    found = gradients(sharding, compile=True, activation_checkpointing=recompute)
    assert len(compiled) == 1 and len(ran) == 3
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def gradients(sharding: Any, **switches: bool) -> list[Tensor]:
    """Of one step on two rows, the first of which holds two documents."""
    training = TrainingSettings(steps=1, device="cpu")
    parallel = Parallel(ParallelSettings(sharding=sharding, **switches), training)
    try:
        model = empty_model(LlmNormConfig(**SHAPE), device="meta").train()
        replica = parallel.prepare(model, lambda part: initialize(model, seed=0, modules=part))
        ids = torch.arange(24).view(2, 12)
        places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [*range(12)]])
        with parallel.accumulate(last=True):
            loss = replica(input_ids=ids, position_ids=places, shift_labels=ids).loss
        parallel.backward(loss)
        return [local(p.grad).clone() for p in model.parameters() if p.grad is not None]
    finally:
        parallel.close()
