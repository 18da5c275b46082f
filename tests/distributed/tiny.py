"""A tiny model, trained under any sharding with any optimizer; a step is a function of its number.

tools/bench/sharding.py trains it too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llmnorm.checkpoints.checkpoints import Checkpoints, Interval
from llmnorm.config.adapter import LowRankSettings
from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.models.adapters import inject, is_adapter, set_first_values
from llmnorm.models.building import empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.convert import named_weights
from llmnorm.models.frozen import freeze, narrow
from llmnorm.models.initialization import initialize
from llmnorm.models.new_rows import add_new_rows, set_new_rows
from llmnorm.nn.norms.running import RunningStatistics
from llmnorm.objectives.contract import MicroBatch
from llmnorm.optim.groups import split
from llmnorm.optim.settings import Optimizer
from llmnorm.parallel.processes import Parallel
from llmnorm.training.state import named_tensors
from llmnorm.training.step import count, forward_backward

KINDS = {kind.model_fields["name"].default: kind for kind in get_args(get_args(Optimizer)[0])}
# Every optimizer, and the projection of weights on one with and one without a rule.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"weight_decay": 0.1}) for name in KINDS},
    "adamw+nap": ("adamw", {"nap": True, "weight_decay": 0.0}),
    "muon+nap": ("muon", {"nap": True, "weight_decay": 0.0}),
}
# SOAP's bases are eigenvectors, which only a Gram matrix of full rank determines: hence no side
# longer than the other one has a basis, and key and value are square.
OPTIMIZERS["soap"][1]["max_precond_dim"] = 16
# A hyperparameter that moves over the steps, those after a resumption included.
OPTIMIZERS["normuon"][1]["momentum"] = {"from": 0.5, "to": 0.95, "steps": 4}
# Conda scales up directions in which a gradient has next to nothing. From the usual first weights
# the four heads attend alike, so o_proj's gradient has rank 4 and rounding errors beside it.
SHAPE: dict[str, dict[str, Any]] = {
    "soap": {"num_key_value_heads": 4},
    "conda": {"initializer_range": 0.1},
}
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 42,  # 14 rows a process of three
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # 4 rows of k and v: one each of four processes, 2 + 2 + 0 of three
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROWS, LENGTH = 24, 12


def settings_of(name: str, lr: float = 1e-2, **more: Any) -> Any:
    """Of an optimizer of the table, with more keys; products of matrices in full precision."""
    kind, keys = OPTIMIZERS[name]
    precision = {"precision": "fp32"} if "precision" in KINDS[kind].model_fields else {}
    return KINDS[kind](lr=lr, **(precision | keys | more))


def tensor_of(part: Tensor | Interval) -> Tensor:
    """What a process holds of a named tensor."""
    return part.tensor if isinstance(part, Interval) else part


class Run:
    """A run under a sharding; every process makes every call.

    Args:
        sharding, replicas: of `parallel`.
        optimizer: a name of the table.
        groups: of `optimizer`.
        model: other settings of the model.
        frozen: how the names end of parameters that are not trained.
        adapter: what is trained beside frozen weights, which are then stored for their products.
        new_tokens: whose rows are trained beside the adapter.
        micro_batches: how many a process cuts its rows of a step into.
        dtype: of the weights.
        lr: the matrices' learning rate.
        precision: of forward passes.
        deepspeed: other settings of it.
        parallel: others of `parallel`.
    """

    def __init__(
        self,
        sharding: str,
        optimizer: str,
        replicas: int = 1,
        *,
        groups: Sequence[dict[str, Any]] = (),
        model: dict[str, Any] | None = None,
        frozen: tuple[str, ...] = (),
        adapter: LowRankSettings | None = None,
        new_tokens: range = range(0),
        micro_batches: int = 2,
        dtype: torch.dtype = torch.float64,
        lr: float = 1e-2,
        precision: str = "fp32",
        deepspeed: dict[str, Any] | None = None,
        **parallel: Any,
    ) -> None:
        self.parallel = Parallel(
            ParallelSettings(sharding=sharding, replicas=replicas, **parallel),
            TrainingSettings(steps=1, device="cpu", precision=precision),
        )
        if self.parallel.zero is not None:
            self.parallel.zero.config |= deepspeed or {}
        config = LlmNormConfig(**(CONFIG | SHAPE.get(optimizer, {}) | (model or {})))
        self.model = empty_model(config, device="meta", dtype=dtype).train()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.endswith(frozen))
        if adapter is not None:
            inject(self.model, adapter)
            if new_tokens:
                add_new_rows(self.model, new_tokens)
            freeze(self.model, norms=False, new_head=False)
            if precision == "bf16":
                narrow(self.model)
        self._new_tokens = new_tokens
        self.replica = self.parallel.prepare(self.model, self._fill)
        self.micro_batches = micro_batches
        self.statistics = RunningStatistics(self.model, self.parallel.reduce)
        members = split(self.model)
        self.parameters = [*members.matrices.values(), *members.auxiliary.values()]
        settings = settings_of(optimizer, lr, groups=list(groups))
        self.optimizer = settings.build(members, self.parallel.exchange())
        self.hyperparameters = settings.hyperparameters(lambda step: 1.0, 1)
        self.state = named_tensors(self.model, self.optimizer, None)

    def _fill(self, modules: Mapping[str, nn.Module]) -> None:
        plain = {n: m for n, m in modules.items() if not is_adapter(f"{n}.weight")}
        initialize(self.model, seed=3, modules=plain)
        set_first_values(modules, seed=3)
        if self._new_tokens:
            set_new_rows(named_weights(modules), self._new_tokens)

    def rows(self, step: int) -> Tensor:
        """The numbers of the rows that this process reads."""
        share = ROWS // self.parallel.world
        return torch.arange(share) + step * ROWS + self.parallel.rank * share

    def forward_backward(self, step: int, scale: float = 1.0) -> float:
        """Gradients of a step, of its loss times `scale`; the loss over all processes."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 40, (ROWS, LENGTH), generator=generator)
        ids = ids[self.rows(step) - step * ROWS]
        micro_batches = [self._asked(part) for part in ids.chunk(self.micro_batches)]
        labels = count(micro_batches, self.parallel)[0].double() / scale
        loss = forward_backward(self.replica, micro_batches, labels, self.parallel)
        return float(self.parallel.reduce(loss))

    def _asked(self, ids: Tensor) -> MicroBatch:
        """The next tokens; of an encoder the tokens themselves."""
        positions = torch.arange(LENGTH).expand(len(ids), -1)
        inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
        if self.model.model.causal:
            del inputs["labels"]
            inputs["shift_labels"] = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        labels = int((inputs.get("shift_labels", ids) != -100).sum())
        return MicroBatch(inputs, labels, labels, rows=ids[:, 0])

    def train(
        self, first: int, last: int, after: Callable[[int], None] = lambda step: None
    ) -> list[float]:
        """The gradient norms of the steps first .. last - 1, accumulated over micro-batches."""
        norms = []
        for step in range(first, last):
            self.forward_backward(step)
            norms.append(float(self.parallel.clip(self.parameters, 0.5)))
            self.hyperparameters.set(self.optimizer.param_groups, step)
            self.optimizer.step()
            self.statistics.commit()
            self.optimizer.zero_grad(set_to_none=True)
            self.parallel.end_step()
            after(step)
        return norms

    def save(self, directory: Path, step: int) -> None:
        """Every process what it holds."""
        checkpoints = self._in(directory)
        checkpoints.save(step, checkpoints.without_copies(self.state), {})

    def load(self, directory: Path, step: int) -> None:
        """Every process what it holds."""
        checkpoints = self._in(directory)
        checkpoints.load(checkpoints.find(step), self.state)
        self.parallel.weights_changed()

    def _in(self, directory: Path, **keys: Any) -> Checkpoints:
        rank, world = self.parallel.rank, self.parallel.world
        return Checkpoints(directory, keep=9, rank=rank, world=world, **keys)

    def equals(self, other: "Run") -> bool:
        """Whether this process holds the same bits in both."""
        return all(tensor_of(p).equal(tensor_of(other.state[n])) for n, p in self.state.items())
