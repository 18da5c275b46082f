"""Any rule on all hidden matrices of a model, AdamW on the rest: one torch optimizer.

A rule (muon.py, conda.py, ...) gets stacks (n, rows, columns) of matrices of one shape, experts
among them: gradients in float32 and the state of the n matrices. This file makes stacks of
matrices, and new weights of what the rule returns:

    decay "before"  W <- W (1 - lr wd) - delta
    decay "after"   W <- (W - delta) (1 - lr wd)
    decay "inside"  W <- W - delta; the rule reads W and has put the decay into delta

What would surprise:
- State is allocated once, before the first step, as one tensor per shape and field; the state of a
  parameter is a view into it. So a state saved before the first step is complete, and loading
  copies into these tensors.
- State is float32 whatever dtype the weights have (float64 for float64 weights).
- A rule gets a stack in chunks of a few matrices, which bounds the memory of its temporaries. Its
  result must not depend on the number of matrices (tests/optim/test_rules.py).
- `step`, the number of updates so far, is on the CPU and a single number for a whole stack. `phase`
  is the index of a matrix divided by the number of all matrices, in [0, 1); a rule spreads work
  over steps by it.
- A parameter of several fused projections is several matrices: the names of its state end in .0,
  .1, ...
- The state of a stack of experts is one tensor (experts, ...) for each field. A rule gets many
  experts at once, as views where they lie next to each other. An expert that no token came to has a
  gradient of zeros, and its momentum moves it all the same, as under AdamW.
- The members of a stack have one learning rate and one decay: matrices to which `optimizer.groups`
  gives others are in stacks of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llmnorm.nn.precision import wide_dtype
from llmnorm.optim.adamw import AdamW
from llmnorm.optim.groups import check_gradients
from llmnorm.optim.matrix import Matrix
from llmnorm.optim.state import load_in_place

Decay = Literal["before", "after", "inside"]
State = dict[str, Tensor]

# Bytes of matrices that a rule gets at once. More gains nothing on a CPU, whose caches are small; a
# GPU needs more to be busy.
CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**26}


class Hyperparameters(NamedTuple):
    """The numbers of one step that a schedule may move.

    Attributes:
        lr: learning rate.
        weight_decay: decoupled decay, to be multiplied by `lr`.
        momentum: decay rate of the momentum, for rules whose settings have `momentum`; 0 for the
            others. The kin of Adam keep `betas`: their bias correction needs a constant rate.
    """

    lr: float
    weight_decay: float
    momentum: float


class Rule(Protocol):
    """The update of whole matrices."""

    @property
    def scalars(self) -> tuple[str, ...]:
        """Which of `step` (0-dim) and `phase` (n,), both on the CPU, the state has too."""

    @property
    def decay(self) -> Decay:
        """When the caller decays weights; `inside`: the rule does, and is given the weights."""

    def fields(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """The state of one matrix: name -> shape."""

    def update(
        self,
        grad: Tensor,
        state: State,
        hyperparameters: Hyperparameters,
        weight: Tensor | None = None,
    ) -> Tensor:
        """What is subtracted from the weights, (n, rows, columns), learning rate included.

        Args:
            grad: (n, rows, columns); must stay as it is.
            state: the fields of the n matrices; change in place.
            weight: (n, rows, columns) for `decay` "inside"; else None.
        """


class Part(NamedTuple):
    """Some of a matrix's experts, counted from its own first; the whole matrix without a stack."""

    matrix: Matrix
    experts: slice

    @property
    def size(self) -> int:
        """How many experts."""
        return int(self.experts.stop - self.experts.start)


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape, dtype, device, learning rate and decay; n of them, with each expert.

    Attributes:
        matrices: its members.
        state: their state, fields (n, ...).
        chunk_bytes: bytes of matrices that the rule gets at once, unless one has more.
    """

    matrices: list[Matrix]
    state: State
    chunk_bytes: int

    def chunks(self) -> Iterator[tuple[slice, list[Part]]]:
        """The stack in chunks of at most `chunk_bytes`: which of its n, and whose they are."""
        first = self.matrices[0]
        most = max(1, self.chunk_bytes // (4 * first.rows * first.columns))
        parts: list[Part] = []
        start, taken = 0, 0
        for matrix in self.matrices:
            done = 0
            while done < matrix.count:
                new = min(matrix.count - done, most - taken)
                parts.append(Part(matrix, slice(done, done + new)))
                done, taken = done + new, taken + new
                if taken == most:
                    yield slice(start, start + taken), parts
                    start, parts, taken = start + taken, [], 0
        if parts:
            yield slice(start, start + taken), parts


class RuleOptimizer(torch.optim.Optimizer):
    """`rule` on the matrices, AdamW on the auxiliary parameters.

    The first param group (`kind` "matrices") holds the hyperparameters of the rule, under their
    names, and the peak learning rate as `peak_lr`. `HyperparameterSchedule.set` writes a step's
    values into the groups before that step.

    Args:
        matrices: the matrices of the rule; at least one.
        auxiliary: an optimizer over the other parameters, its state allocated; None if there are
            none.
        hyperparameters: those of the first step, but for the learning rate, which is the peak.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        auxiliary: AdamW | None,
        rule: Rule,
        hyperparameters: Hyperparameters,
    ) -> None:
        parameters = list(dict.fromkeys(m.parameter for m in matrices))
        group = {"params": parameters, "kind": "matrices", "peak_lr": hyperparameters.lr}
        super().__init__([group | hyperparameters._asdict()], {})
        self.rule = rule
        self._named = {m.name: m.parameter for m in matrices}
        self.stacks = self._allocate(matrices)
        for stack in self.stacks:
            first = 0
            for matrix in stack.matrices:
                members = slice(first, first + matrix.count)
                for field, value in stack.state.items():
                    part = value if field == "step" else matrix.named(value[members])
                    self.state[matrix.parameter][field + matrix.suffix] = part
                first += matrix.count
        self._auxiliary = auxiliary
        if auxiliary is not None:
            self.param_groups += auxiliary.param_groups  # the same dicts, so both see a new lr
            self.state.update(auxiliary.state)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update of every parameter.

        Raises:
            ValueError: a matrix has no gradient; nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self._named)
        group = self.param_groups[0]
        self._update(Hyperparameters(*(group[field] for field in Hyperparameters._fields)))
        if self._auxiliary is not None:
            self._auxiliary.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a saved state into the tensors that there are."""
        load_in_place(self, state_dict)

    def _allocate(self, matrices: list[Matrix]) -> list[Stack]:
        """The stacks whose state this process has."""
        return allocate(matrices, sum(matrix.count for matrix in matrices), self.rule)

    def _update(self, hyperparameters: Hyperparameters) -> None:
        """Give every matrix its new weights."""
        for stack in self.stacks:
            weights, grads = Matrix.weight, Matrix.grad
            for (matrix, experts), delta in deltas(
                stack, self.rule, hyperparameters, grads, weights
            ):
                own = hyperparameters_of(matrix, hyperparameters)
                apply(self.rule, matrix.weight()[experts], delta, own)


def hyperparameters_of(matrix: Matrix, hyperparameters: Hyperparameters) -> Hyperparameters:
    """The hyperparameters of one matrix, from those of all matrices."""
    lr, weight_decay = matrix.rates.of(hyperparameters.lr, hyperparameters.weight_decay)
    return hyperparameters._replace(lr=lr, weight_decay=weight_decay)


def deltas(
    stack: Stack,
    rule: Rule,
    hyperparameters: Hyperparameters,
    grad: Callable[[Matrix], Tensor],
    weight: Callable[[Matrix], Tensor],
) -> Iterator[tuple[Part, Tensor]]:
    """Each part of a stack with its delta (experts, rows, columns); updates the stack's state.

    Args:
        hyperparameters: those of all matrices.
        grad, weight: gradient and weights of a matrix, (count, rows, columns).
    """
    hyperparameters = hyperparameters_of(stack.matrices[0], hyperparameters)
    for members, parts in stack.chunks():
        state = {k: v if k == "step" else v[members] for k, v in stack.state.items()}
        dtype = wide_dtype(parts[0].matrix.parameter.dtype)
        inside = rule.decay == "inside"
        delta = rule.update(
            _stacked([grad(matrix)[experts] for matrix, experts in parts], dtype),
            state,
            hyperparameters,
            _stacked([weight(m)[experts] for m, experts in parts], dtype) if inside else None,
        )
        yield from zip(parts, delta.split([part.size for part in parts]), strict=True)
    if "step" in stack.state:
        stack.state["step"] += 1


def apply(rule: Rule, weight: Tensor, delta: Tensor, hyperparameters: Hyperparameters) -> None:
    """Change weights in place by their delta and by decay, both of any one shape.

    Args:
        hyperparameters: those of the matrix that the weights belong to.
    """
    kept = 1 - hyperparameters.lr * hyperparameters.weight_decay
    if rule.decay == "before" and kept != 1:
        weight.mul_(kept)  # torch._foreach_mul_ would round `kept` to bf16
    weight.sub_(delta)
    if rule.decay == "after" and kept != 1:
        weight.mul_(kept)


def allocate(matrices: Sequence[Matrix], total: int, rule: Rule) -> list[Stack]:
    """Stacks of matrices that are alike (`Stack`), their state as before the first step.

    Args:
        total: number of all matrices of the model, experts counted one by one.
    """
    members: dict[Any, list[Matrix]] = {}
    for matrix in matrices:
        parameter = matrix.parameter
        kind = (matrix.rows, matrix.columns, parameter.dtype, parameter.device, matrix.rates)
        members.setdefault(kind, []).append(matrix)
    stacks = []
    for (rows, columns, _, device, _), alike in members.items():
        dtype = wide_dtype(alike[0].parameter.dtype)
        count = sum(matrix.count for matrix in alike)
        state = {
            field: torch.zeros(count, *shape, dtype=dtype, device=device)
            for field, shape in rule.fields(rows, columns).items()
        }
        if "step" in rule.scalars:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        if "phase" in rule.scalars:
            numbers = [m.number + expert for m in alike for expert in range(m.first, m.last)]
            state["phase"] = torch.tensor(numbers, dtype=torch.float32, device="cpu") / total
        chunk = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
        stacks.append(Stack(alike, state, chunk))
    return stacks


def _stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors (count, rows, columns) as one in `dtype`, contiguous; of one it may be a view."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(dtype).contiguous()
