"""The exchange of whole-matrix optimizers by itself: bits, collectives, bytes, owners, faults."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.models.building import empty_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.optim import sharded
from llmnorm.optim.fragments import Fragment, master
from llmnorm.optim.groups import matrices, split
from llmnorm.optim.owners import blocks, owners
from llmnorm.optim.sharded import Exchange, ShardedRuleOptimizer
from llmnorm.parallel.processes import local
from llmnorm.training.state import named_tensors
from tests.distributed.processes import run
from tests.distributed.tiny import CONFIG, KINDS, OPTIMIZERS, settings_of, tensor_of

# One launch a world: (sharding, replicas) of each; DeepSpeed's cuts are made without it.
WORLDS = {
    2: [("ddp", 1), ("fsdp2", 1), ("zero2", 1), ("zero3", 1)],
    3: [("fsdp2", 1), ("zero2", 1), ("zero3", 1)],
    4: [("hsdp", 2)],
}
CELLS = [
    (world, kind, name)
    for world, kinds in WORLDS.items()
    for kind, _ in kinds
    for name in OPTIMIZERS
]
SAVED = ("conda", "muon+nap")  # whose state of a mixture is saved and read
# Rules that read weights, which travel to the owners too.
READERS = ("adamp", "soap")
SHAPES = [(9, 6), (6, 9), (5, 4), (1, 7), (2, 8), (8, 2), (12, 12), (3, 6), (9, 6)]
EVEN = [shape for _ in range(6) for shape in [(48, 48)] * 4 + [(96, 48), (96, 48), (48, 96)]]


class Experts(nn.Module):
    """A stack of gate and up, and one of down, as modules of transformers hold them."""

    def __init__(self, experts: int, inner: int, transposed: bool, concatenated: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = experts, transposed
        self.is_concatenated = concatenated
        up, down = (experts, 2 * inner, 8), (experts, 8, inner)
        if transposed:
            up, down = (experts, 8, 2 * inner), (experts, inner, 8)
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))


class Mixtures(nn.Module):
    """Experts in every layout, more and fewer than processes; a transposed fused layer.

    Args:
        even: as many experts as 2, 3 and 4 processes can share out, and nothing else.
    """

    def __init__(self, even: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        if even:
            self.layers = nn.ModuleList(Experts(12, 6, False, True) for _ in range(2))
            return
        self.layers = nn.ModuleList(
            [
                Experts(4, 6, False, True),
                Experts(5, 5, True, False),
                Experts(2, 6, True, True),
                nn.Linear(7, 9, bias=False),
            ]
        )
        self.attention = Conv1D(24, 8)
        self.attention.bias = None
        self.fused = {"attention": (12, 6, 6)}


class Matrices(nn.Module):
    """Linear layers of (rows, columns) each."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(c, r, bias=False) for r, c in shapes)


def cut_as_zero(shared: Matrices, sharding: str) -> None:
    """Give every parameter its fragment: of all laid end to end (zero2), or of each (zero3)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size, start = -(-sum(p.numel() for p in shared.parameters()) // world), 0
    for parameter in shared.parameters():
        numel = parameter.numel()
        size = -(-numel // world) if sharding == "zero3" else size
        cuts = tuple(min(max(r * size - start, 0), numel) for r in range(world + 1))
        start += numel if sharding != "zero3" else 0
        data = parameter.detach().reshape(-1)[cuts[rank] : cuts[rank + 1]].clone()
        parameter.master = Fragment.of(data, parameter.shape, cuts, rank)


def share_of(full: Tensor, part: Tensor) -> Tensor:
    """What a process holds of a tensor that is laid out as `part`."""
    if isinstance(part, Fragment):
        return full.reshape(-1)[part.cuts[part.rank] : part.cuts[part.rank + 1]].clone()
    if isinstance(part, DTensor):
        return distribute_tensor(full, part.device_mesh, part.placements)
    return full.clone()


class Counted(list[tuple[str, int]]):
    """The collectives that are called inside `with`: names, bytes that this process sends."""

    NAMES = ("all_to_all_single", "all_gather", "all_reduce")

    def __enter__(self) -> "Counted":
        self.real = {name: getattr(dist, name) for name in self.NAMES}
        for name in self.NAMES:
            setattr(dist, name, self._counting(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, real in self.real.items():
            setattr(dist, name, real)

    def _counting(self, name: str) -> Any:
        def call(first: Any, *more: Any, group: Any = None, **keys: Any) -> Any:
            sent = more[0] if more else first
            others = dist.get_world_size(group) - 1
            numbers = sent.numel() * others  # to each of them
            if name == "all_to_all_single":
                numbers = sent.numel() - more[2][dist.get_rank(group)]
            self.append((name, numbers * sent.element_size()))
            return self.real[name](first, *more, group=group, **keys)

        return call


def exchanged(
    sharding: str,
    replicas: int,
    name: str,
    payload: torch.dtype | None = None,
    made: Callable[[], nn.Module] = lambda: Matrices(SHAPES),
    directory: Path | None = None,
) -> dict[str, Any]:
    """Three steps on the same gradients, shared and alone: largest difference, collectives.

    Args:
        directory: where the processes save at the end, and each reads what they have saved.
    """
    world = dist.get_world_size()
    whole, shared = made(), made()
    group, spread = dist.group.WORLD, sharding != "ddp"
    if sharding.startswith("zero"):
        cut_as_zero(shared, sharding)
    elif spread:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("r", "s"))
        fully_shard(shared, mesh=mesh if replicas > 1 else mesh["s"])
        group = mesh.get_group("s")
    assert group is not None
    settings = settings_of(name)
    alone = settings.build(split(whole))
    exchange = Exchange(group, spread=spread, payload=payload)
    together = settings.build(split(shared), exchange)
    hyperparameters = settings.hyperparameters(lambda step: 1.0, 3)
    parts = [master(parameter) for parameter in shared.parameters()]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for full, part in zip(whole.parameters(), parts, strict=True):
            full.grad = torch.randn(full.shape, generator=generator)
            part.grad = share_of(full.grad, part)
        for optimizer in (alone, together):
            hyperparameters.set(optimizer.param_groups, step)
        alone.step()
        with Counted() as calls:
            together.step()
    difference = 0.0
    for full, part in zip(whole.parameters(), parts, strict=True):
        apart = local(share_of(full.detach(), part)) - local(part.detach())
        difference = max([difference, *apart.abs().flatten().tolist()])
    state = [
        sum(t.nbytes for stack in optimizer.stacks for t in stack.state.values() if t.ndim)
        for optimizer in (alone, together)
        if hasattr(optimizer, "stacks")
    ]
    saved = None
    if directory is not None:
        one = named_tensors(whole, alone, None)
        several = named_tensors(shared, together, None)
        saved = read_as_one_process(directory, one, several, exact="nap" not in name)
    return {
        "saved": saved,
        "state": state,
        "balance": getattr(together, "balance", 1.0),
        "difference": difference,
        "sum": sum(float(local(p.detach()).double().sum()) for p in parts),
        "calls": sorted(call for call, _ in calls),
        "bytes": sum(count for _, count in calls),
        "buckets": len(getattr(together, "buckets", [])),
    }


def read_as_one_process(directory: Path, one: Any, several: Any, exact: bool) -> list[str]:
    """Save what the processes hold; the names whose tensors are not those of one process.

    Then what was saved is read into the processes' own tensors, which are changed before; the names
    of those that are not what they were.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    checkpoints = Checkpoints(directory, rank=rank, world=world)
    checkpoints.save(3, checkpoints.without_copies(several), {})
    found = {name: torch.empty_like(tensor_of(part)) for name, part in one.items()}
    reader = Checkpoints(directory)
    reader.load(reader.find(3), found)
    bound = 0.0 if exact else 1e-6
    wrong = [
        name
        for name, part in one.items()
        if not torch.allclose(tensor_of(part), found[name], rtol=bound, atol=bound)
    ]
    before = {name: tensor_of(part).clone() for name, part in several.items()}
    for part in several.values():
        tensor_of(part).detach().fill_(7)
    checkpoints.load(checkpoints.find(3), several)
    return wrong + [n for n, part in several.items() if not tensor_of(part).equal(before[n])]


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells of a world."""
    sharded.BUCKET_BYTES = 4096  # several buckets
    kinds = WORLDS[world]
    said: dict[str, Any] = {f"{k} {n}": exchanged(k, r, n) for k, r in kinds for n in OPTIMIZERS}
    for kind, replicas in kinds:
        for name in OPTIMIZERS:
            saved = directory / f"{kind} {name}" if name in SAVED else None
            key = f"mixtures {kind} {name}"
            said[key] = exchanged(kind, replicas, name, made=Mixtures, directory=saved)
    said["rounded"] = {k: exchanged(k, r, "muon", torch.bfloat16) for k, r in kinds}
    sharded.BUCKET_BYTES = 2**17
    said["even"] = {
        f"{k} {n}": exchanged(k, r, n, None, lambda: Matrices(EVEN))
        for k, r in kinds
        for n in ("muon", "adamp")
    }
    said["even experts"] = {
        f"{k} {n}": exchanged(k, r, n, None, lambda: Mixtures(even=True))
        for k, r in kinds
        for n in ("muon", "adamp")
    }
    said["faults"] = {}
    if world == 2:
        for fault in (RuleOnAShard, OwnerSkipped, DecayOnTheWrongSide):
            with planted(fault):
                said["faults"][fault.__name__] = exchanged("fsdp2", 1, "conda")["difference"]
        for moe_fault in (ExpertsExchanged, Transposed):
            with planted(moe_fault):
                found = exchanged("fsdp2", 1, "conda", made=Mixtures)
                said["faults"][moe_fault.__name__] = found["difference"]
    return said


# Planted faults.


class RuleOnAShard(ShardedRuleOptimizer):
    """The owner sees its own rows only."""

    def _gather(self, bucket: Any, *, gradient: bool) -> Any:
        wait = super()._gather(bucket, gradient=gradient)

        def own_rows() -> dict[int, Tensor]:
            found = wait()
            for matrix in bucket.owned[self.rank]:
                first, last = self._cut(matrix, self.rank)
                elements = found[id(matrix)].view(-1)
                elements[:first] = elements[last:] = 0
            return found

        return own_rows


class OwnerSkipped(ShardedRuleOptimizer):
    """The second owner's deltas never come."""

    def _from_owners(self, bucket: Any, found: Any, hyperparameters: Any) -> Any:
        found = {key: delta * (self.rank == 0) for key, delta in found.items()}
        return super()._from_owners(bucket, found, hyperparameters)


class DecayOnTheWrongSide(ShardedRuleOptimizer):
    """Conda decays after its step; here it is before."""

    def _from_owners(self, bucket: Any, found: Any, hyperparameters: Any) -> Any:
        kept = 1 - hyperparameters.lr * hyperparameters.weight_decay
        found = {key: delta / kept for key, delta in found.items()}
        return super()._from_owners(bucket, found, hyperparameters)


class ExpertsExchanged(ShardedRuleOptimizer):
    """An expert's gradient comes to its neighbour."""

    def _gather(self, bucket: Any, *, gradient: bool) -> Any:
        wait = super()._gather(bucket, gradient=gradient)
        return lambda: {key: whole.roll(1, 0) for key, whole in wait().items()}


class Transposed(ShardedRuleOptimizer):
    """The owner takes a transposed matrix's numbers for those of a plain one."""

    def _from_owners(self, bucket: Any, found: Any, hyperparameters: Any) -> Any:
        for block in bucket.owned[self.rank]:
            if block.pieces[0].transposed:
                found[id(block)] = found[id(block)].mT.reshape(block.shape)
        return super()._from_owners(bucket, found, hyperparameters)


@contextmanager
def planted(fault: type[ShardedRuleOptimizer]) -> Iterator[None]:
    """The fault in the place of the optimizer."""
    sharded.ShardedRuleOptimizer = fault  # type: ignore[misc]
    try:
        yield
    finally:
        sharded.ShardedRuleOptimizer = ShardedRuleOptimizer  # type: ignore[misc]


FAULTS = [RuleOnAShard, OwnerSkipped, DecayOnTheWrongSide, ExpertsExchanged, Transposed]

# What the processes say.


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """By world: what every process says."""
    found = {}
    for world in WORLDS:
        found[world] = run(everything, tmp_path_factory.mktemp("exchange"), world)
        assert all(isinstance(said, dict) for said in found[world]), found[world]
    return found


@pytest.mark.parametrize("of", ["", "mixtures "])
@pytest.mark.parametrize(("world", "sharding", "name"), CELLS)
def test_the_exchange_changes_no_bit_and_calls_what_it_should(
    launched, world, sharding, name, of
) -> None:
    """Oracle: the optimizer of one process on the same gradients; collectives as they happened."""
    for process in launched[world]:
        found = process[f"{of}{sharding} {name}"]
        # No rule: torch's fused AdamW rounds the last elements of a shard as it does a tensor's
        # last ones. The projection's norms are sums in another order.
        inexact = name.startswith("adamw") or "nap" in name
        assert found["difference"] <= (1e-6 if inexact else 0.0)
        expected = []
        if found["buckets"]:
            each = ["all_gather"]
            if sharding != "ddp":
                each = ["all_to_all_single"] * (3 if name in READERS else 2)
            expected = each * found["buckets"]
        if "nap" in name and sharding != "ddp":
            expected.append("all_reduce")
        assert found["calls"] == sorted(expected)


@pytest.mark.parametrize("name", ["muon", "adamp"])
def test_bytes_are_those_of_the_formula(launched, name) -> None:
    """Oracle: 2 H (W - 1) / W^2 a process (3 for rules that read weights), H (W - 1) / W for whole
    weights, within 5 %; H are the bytes of all matrices, W the processes that share them."""
    h = 4 * sum(rows * columns for rows, columns in EVEN)
    for world, said in launched.items():
        for sharding, replicas in WORLDS[world]:
            found = [process["even"][f"{sharding} {name}"] for process in said]
            assert found[0]["buckets"] >= 3 and found[0]["difference"] == 0
            w = world // replicas
            times = (3 if name in READERS else 2) / w if sharding != "ddp" else 1
            mean = sum(one["bytes"] for one in found) / world
            assert mean == pytest.approx(times * h * (w - 1) / w, rel=0.05)


@pytest.mark.parametrize(("world", "sharding", "name"), CELLS)
def test_a_mixtures_gradients_travel_once_and_its_state_is_shared_out(
    launched, world, sharding, name
) -> None:
    """Oracle: the bytes of all parameters, once to their owners and once back (for rules that read
    weights those too); the state of one process, which owners have once between them."""
    found = [process[f"mixtures {sharding} {name}"] for process in launched[world]]
    replicas = dict(WORLDS[world])[sharding]
    if not found[0]["buckets"]:
        return
    bytes_of_all = 4 * sum(p.numel() for p in Mixtures().parameters())
    norms = 8 * 24 * world * (world // replicas - 1) if "nap" in name else 0  # one a matrix
    sent = sum(one["bytes"] for one in found)
    if sharding != "ddp":  # which sends no gradients, and pads its deltas
        assert sent <= replicas * (3 if name in READERS else 2) * bytes_of_all + norms
    alone = found[0]["state"][0]
    assert sum(one["state"][1] for one in found) == replicas * alone


@pytest.mark.parametrize("name", ["muon", "adamp"])
def test_experts_that_divide_evenly_stay_where_fsdp2_has_them(launched, name) -> None:
    """Oracle: no byte is sent, and no owner has more than its share; each expert belongs to one
    process under every sharding."""
    for world, said in launched.items():
        for sharding, replicas in WORLDS[world]:
            found = [process["even experts"][f"{sharding} {name}"] for process in said]
            assert all(one["balance"] == 1 and one["difference"] == 0 for one in found)
            for one in found:
                assert one["state"][1] * world == one["state"][0] * replicas
                assert one["bytes"] == 0 or sharding not in ("fsdp2", "hsdp")


def test_a_checkpoint_of_shared_out_experts_is_that_of_one_process(launched) -> None:
    """Oracle: the state of one process, to the bit; read back it is what it was."""
    for world, said in launched.items():
        for sharding, _ in WORLDS[world]:
            for name in SAVED:
                for process in said:
                    assert process[f"mixtures {sharding} {name}"]["saved"] == []


def test_a_rounded_exchange_rounds_and_keeps_replicas_alike(launched) -> None:
    """Oracle: one process without rounding; lr = 0.01, bf16 has 8 bits."""
    for world, said in launched.items():
        for sharding, _ in WORLDS[world]:
            found = [process["rounded"][sharding] for process in said]
            assert all(0 < one["difference"] < 1e-3 for one in found)
            if sharding == "ddp":
                assert len({one["sum"] for one in found}) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(launched, fault) -> None:
    """Oracle: the comparison of the first test, whose limit is 0; three steps of lr = 0.01."""
    assert all(process["faults"][fault.__name__] > 1e-6 for process in launched[2])


# Owners.


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_matrix_of_a_llama_has_one_owner_and_none_has_much_more(world: int) -> None:
    """Oracle: counting; work, and bytes of state under every rule, of 12 layers of 768."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
    model = empty_model(LlmNormConfig(**(CONFIG | shape | heads)), device="meta")
    found = blocks(matrices(split(model), {}), world)
    buckets, load = owners(found, world, sharded.BUCKET_BYTES)
    numbers = sorted(n for owned in buckets for part in owned for n in part)
    assert numbers == list(range(len(found)))
    assert max(load) * world / sum(load) <= 1.2
    for name, kind in KINDS.items():
        if name != "adamw":
            rule = kind().rule()
            held = [0] * world
            for owned in buckets:
                for rank, part in enumerate(owned):
                    own = [m for n in part for m in found[n].pieces]
                    fields = [rule.fields(m.rows, m.columns) for m in own]
                    held[rank] += sum(prod(s) for each in fields for s in each.values())
            assert max(held) * world / sum(held) <= 1.2, name
