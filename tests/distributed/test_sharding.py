"""Every optimizer under every sharding against one process: same steps, same checkpoints.

All scenarios of a world run in one launch; what they save one process reads.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from llmnorm.config import ParallelSettings, TrainingSettings
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.initialization import initialize
from llmnorm.models.modeling import empty_model
from llmnorm.nn.norms.running import RunningStatistics
from llmnorm.optim import sharded
from llmnorm.optim.groups import matrices, split
from llmnorm.optim.settings import Optimizer
from llmnorm.optim.sharded import Exchange, owners
from llmnorm.training import loop
from llmnorm.training.checkpoint import Checkpoints, Interval
from llmnorm.training.layout import check
from llmnorm.training.parallel import Parallel, local
from llmnorm.training.state import named_tensors
from tests.distributed.processes import run

KINDS = {kind.model_fields["name"].default: kind for kind in get_args(get_args(Optimizer)[0])}
# Each optimizer, and the projection of weights on one with and one without a rule.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"weight_decay": 0.1}) for name in KINDS},
    "adamw+nap": ("adamw", {"nap": True, "weight_decay": 0.0}),
    "muon+nap": ("muon", {"nap": True, "weight_decay": 0.0, "precision": "fp32"}),
}
# SOAP's bases are eigenvectors, which only a Gram matrix of full rank determines: hence no side
# longer than the other one has a basis, and key and value are square.
OPTIMIZERS["soap"][1]["max_precond_dim"] = 16
TOLERANCE = {"soap": 1e-7}
SHAPE: dict[str, dict[str, Any]] = {"soap": {"num_key_value_heads": 4}}
# Norms whose statistics are sums over the processes.
for norm in ("power", "unified"):
    OPTIMIZERS[f"adamw+{norm}"] = ("adamw", {})
    SHAPE[f"adamw+{norm}"] = {"norm": {"name": norm, "allow_leak": True}}
# Rules that read weights, which travel to the owners too.
READERS = ("adamp", "soap")
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
ROWS, LENGTH, STEPS = 24, 12, 2


def settings_of(name: str) -> Any:
    kind, keys = OPTIMIZERS[name]
    precision = {"precision": "fp32"} if "precision" in KINDS[kind].model_fields else {}
    return KINDS[kind](lr=1e-2, **(precision | keys))


class Run:
    """A run of the tiny model in float64, its steps a function of their number."""

    def __init__(self, sharding: str, optimizer: str, replicas: int = 1) -> None:
        self.parallel = Parallel(
            ParallelSettings(sharding=sharding, replicas=replicas),
            TrainingSettings(steps=1, device="cpu"),
        )
        config = LlmNormConfig(**(CONFIG | SHAPE.get(optimizer, {})))
        model = empty_model(config, device="meta", dtype=torch.float64).train()
        self.replica = self.parallel.prepare(
            model, lambda modules: initialize(model, seed=3, modules=modules)
        )
        # Statistics of a batch are those of its rows on all processes: not the same rows as of one.
        self.micro_batches = 1 if "norm" in SHAPE.get(optimizer, {}) else 2
        self.statistics = RunningStatistics(model, self.parallel.reduce)
        self.model, groups = model, split(model)
        self.parameters = [*groups.matrices.values(), *groups.auxiliary.values()]
        self.optimizer = settings_of(optimizer).build(groups, self.parallel.exchange())
        self.state = named_tensors(model, self.optimizer, None)

    def rows(self, step: int) -> torch.Tensor:
        """The numbers of the rows that this process reads."""
        share = ROWS // self.parallel.world
        return torch.arange(share) + step * ROWS + self.parallel.rank * share

    def train(self, first: int, last: int) -> list[float]:
        """The gradient norms of the steps first .. last - 1, accumulated over micro-batches."""
        norms = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(3, 40, (ROWS, LENGTH), generator=generator)
            ids = ids[self.rows(step) - step * ROWS]
            micro_batches = [
                {
                    "input_ids": part,
                    "shift_labels": nn.functional.pad(part[:, 1:], (0, 1), value=-100),
                    "position_ids": torch.arange(LENGTH).expand(len(part), -1),
                }
                for part in ids.chunk(self.micro_batches)
            ]
            labels = loop._count_labels(micro_batches, self.parallel)
            loop._forward_backward(self.replica, micro_batches, labels, self.parallel)
            norms.append(float(self.parallel.clip(self.parameters, 0.5)))
            self.optimizer.step()
            self.statistics.commit()
            self.optimizer.zero_grad(set_to_none=True)
        return norms

    def save(self, directory: Path, step: int) -> None:
        checkpoints = self._in(directory)
        checkpoints.save(step, checkpoints.without_copies(self.state), {})

    def load(self, directory: Path, step: int) -> None:
        checkpoints = self._in(directory)
        checkpoints.load(checkpoints.find(step), self.state)

    def _in(self, directory: Path) -> Checkpoints:
        return Checkpoints(directory, keep=9, rank=self.parallel.rank, world=self.parallel.world)

    def equals(self, other: "Run") -> bool:
        """Whether this process holds the same bits in both."""
        return all(_tensor(part).equal(_tensor(other.state[n])) for n, part in self.state.items())


def _tensor(part: torch.Tensor | Interval) -> torch.Tensor:
    return part.tensor if isinstance(part, Interval) else part


# One launch a world: (sharding, replicas) of each.
WORLDS = {2: [("ddp", 1), ("fsdp2", 1)], 3: [("fsdp2", 1)], 4: [("hsdp", 2)]}
CELLS = [
    (world, kind, name)
    for world, kinds in WORLDS.items()
    for kind, _ in kinds
    for name in OPTIMIZERS
]


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells of a world; with two processes each goes on under the other sharding too."""
    said: dict[str, Any] = {}
    sharded.BUCKET_BYTES = 4096  # several buckets
    for sharding, replicas in WORLDS[world]:
        for name in OPTIMIZERS:
            one = Run(sharding, name, replicas)
            norms = one.train(0, STEPS)
            where = directory.parent / f"{sharding}-{name}"
            one.save(where, STEPS)
            norms += one.train(STEPS, 2 * STEPS)
            one.save(where, 2 * STEPS)
            again = Run(sharding, name, replicas)
            again.load(where, STEPS)
            again.train(STEPS, 2 * STEPS)
            said[f"{sharding} {name}"] = {"norms": norms, "resumed": again.equals(one)}
    if world == 2:
        for name in OPTIMIZERS:
            for old, new in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
                run = Run(new, name)
                run.load(directory.parent / f"{old}-{name}", STEPS)
                run.train(STEPS, 2 * STEPS)
                run.save(directory.parent / f"{old}-{new}-{name}", 2 * STEPS)
        said["from one"] = from_one(directory.parent / "one")
    said["exchanged"] = {
        f"{kind} {name}": exchanged(kind, replicas, name)
        for kind, replicas in WORLDS[world]
        for name in OPTIMIZERS
    }
    said["rounded"] = {
        kind: exchanged(kind, replicas, "muon", torch.bfloat16) for kind, replicas in WORLDS[world]
    }
    said["checks"] = checks(rank) if world == 2 else {}
    return said


def from_one(directory: Path) -> dict[str, bool]:
    """Whether two processes hold what one has saved."""
    found = {}
    for sharding in ("ddp", "fsdp2"):
        run = Run(sharding, "conda")
        run.load(directory, STEPS)
        run.save(directory.parent / f"one-{sharding}", STEPS)
    return found


# The exchange by itself: equal gradients, equal bits.

SHAPES = [(9, 6), (6, 9), (5, 4), (1, 7), (2, 8), (8, 2), (12, 12), (3, 6), (9, 6)]


class Matrices(nn.Module):
    """Linear layers of many shapes, some with fewer rows than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(c, r, bias=False) for r, c in SHAPES)


def exchanged(
    kind: str, replicas: int, name: str, payload: torch.dtype | None = None
) -> dict[str, Any]:
    """Three steps on the same gradients, shared and alone: largest difference, collectives."""
    world = dist.get_world_size()
    whole, shared = Matrices(), Matrices()
    group, spread = dist.group.WORLD, kind != "ddp"
    if spread:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("r", "s"))
        fully_shard(shared, mesh=mesh if replicas > 1 else mesh["s"])
        group = mesh.get_group("s")
    assert group is not None
    alone = settings_of(name).build(split(whole))
    exchange = Exchange(group, spread=spread, payload=payload)
    together = settings_of(name).build(split(shared), exchange)
    calls: list[str] = []
    with counted(calls):
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for full, part in zip(whole.parameters(), shared.parameters(), strict=True):
                full.grad = torch.randn(full.shape, generator=generator)
                part.grad = full.grad.clone()
                if spread:
                    part.grad = distribute_tensor(full.grad, part.device_mesh, part.placements)
            del calls[:]
            alone.step()
            together.step()
    difference = max(
        float((full - (part.full_tensor() if spread else part)).abs().max())
        for full, part in zip(whole.parameters(), shared.parameters(), strict=True)
    )
    return {
        "difference": difference,
        "sum": sum(float(local(p).double().sum()) for p in shared.parameters()),
        "calls": [*calls],
        "buckets": len(getattr(together, "buckets", [])),
    }


class counted:
    """Collects the names of the collectives that are called inside."""

    NAMES = ("all_to_all_single", "all_gather_into_tensor", "all_reduce")

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.real = calls, {name: getattr(dist, name) for name in self.NAMES}

    def __enter__(self) -> None:
        for name, real in self.real.items():
            setattr(dist, name, self._counting(name, real))

    def __exit__(self, *_: object) -> None:
        for name, real in self.real.items():
            setattr(dist, name, real)

    def _counting(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **keys: Any) -> Any:
            self.calls.append(name)
            return real(*arguments, **keys)

        return call


# The loud check.


def checks(rank: int) -> dict[str, str]:
    """What it says of planted faults."""
    run = Run("fsdp2", "adamw")
    said = {"good": failure(run, run.rows(0)), "same rows": failure(run, torch.arange(12))}
    plain = Run("ddp", "adamw")
    run.parallel._model = plain.model
    said["plain model"] = failure(run, run.rows(0))
    run = Run("ddp", "adamw")
    run.parallel._model = run.model
    said["no replica"] = failure(run, run.rows(0))
    run = Run("ddp", "adamw")
    run.model.model.norm.half()
    said["half"] = failure(run, run.rows(0))
    return said


def failure(run: Run, rows: torch.Tensor) -> str:
    try:
        check(run.parallel, run.model, rows)
    except RuntimeError as error:
        return str(error)
    return "fine"


# One process.


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """By optimizer: the norms and the state after 2 * STEPS steps of one process."""
    found: dict[str, dict[str, Any]] = {}
    for name in OPTIMIZERS:
        run = Run("none", name)
        norms = run.train(0, STEPS)
        if name == "conda":
            run.save(tmp_path_factory.getbasetemp() / "one", STEPS)
        norms += run.train(STEPS, 2 * STEPS)
        found[name] = {"norms": norms, "state": {n: _tensor(p) for n, p in run.state.items()}}
    yield found


@pytest.fixture(scope="module")
def launched(
    alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, tuple[Path, list[Any]]]]:
    """By world: where its runs were saved, and what every process says."""
    found = {}
    for world in WORLDS:
        place = tmp_path_factory.mktemp(f"world{world}")
        if world == 2:
            (tmp_path_factory.getbasetemp() / "one").rename(place / "one")
        found[world] = place, run(everything, place, world)
        assert all(isinstance(said, dict) for said in found[world][1]), found[world][1]
    yield found


def read(directory: Path, step: int, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(directory)
    into = {name: torch.full_like(tensor, -1) for name, tensor in like.items()}
    checkpoints.load(checkpoints.find(step), into)
    return into


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    limit = TOLERANCE.get(name, 1e-9)
    for key, tensor in expected.items():
        if key.startswith("model."):
            assert (found[key] - tensor).abs().max() <= limit, key


@pytest.mark.parametrize(("world", "sharding", "name"), CELLS)
def test_a_sharded_run_is_the_run_of_one_process(launched, alone, world, sharding, name) -> None:
    """Oracle: one process, in float64, on the same rows; weights read from the checkpoint."""
    place, said = launched[world]
    expected = alone[name]
    for process in said:
        norms = process[f"{sharding} {name}"]["norms"]
        assert norms == pytest.approx(expected["norms"], rel=TOLERANCE.get(name, 1e-9))
    state = read(place / f"{sharding}-{name}", 2 * STEPS, expected["state"])
    compare(state, expected["state"], name)


@pytest.mark.parametrize(("world", "sharding", "name"), CELLS)
def test_a_resumed_run_is_the_same_to_the_bit(launched, world, sharding, name) -> None:
    """Oracle: the run that was not stopped, every tensor that a process holds."""
    assert all(process[f"{sharding} {name}"]["resumed"] for process in launched[world][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ways", ["ddp-fsdp2", "fsdp2-ddp"])
def test_a_run_goes_on_under_another_sharding(launched, alone, ways, name) -> None:
    """Oracle: one process that never stopped."""
    place, _ = launched[2]
    state = read(place / f"{ways}-{name}", 2 * STEPS, alone[name]["state"])
    compare(state, alone[name]["state"], name)


@pytest.mark.parametrize(("world", "sharding", "name"), CELLS)
def test_one_process_goes_on_from_several(launched, alone, world, sharding, name) -> None:
    """Oracle: one process that never stopped."""
    place, _ = launched[world]
    run = Run("none", name)
    run.load(place / f"{sharding}-{name}", STEPS)
    run.train(STEPS, 2 * STEPS)
    compare({n: _tensor(p) for n, p in run.state.items()}, alone[name]["state"], name)


def test_what_one_process_saved_passes_through_two_unchanged(launched) -> None:
    """Oracle: the files of one process, every tensor to the bit."""
    place, _ = launched[2]
    state = {n: _tensor(p) for n, p in Run("none", "conda").state.items()}
    expected = read(place / "one", STEPS, state)
    for sharding in ("ddp", "fsdp2"):
        found = read(place / f"one-{sharding}", STEPS, state)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("world", "sharding", "name"), CELLS)
def test_the_exchange_changes_no_bit_and_calls_what_it_should(
    launched, world, sharding, name
) -> None:
    """Oracle: the optimizer of one process on the same gradients; collectives as they happened."""
    for process in launched[world][1]:
        found = process["exchanged"][f"{sharding} {name}"]
        # No rule: torch's fused AdamW rounds the last elements of a shard as it does a tensor's
        # last ones. The projection's norms are sums in another order.
        inexact = name.startswith("adamw") or "nap" in name
        assert found["difference"] <= (1e-6 if inexact else 0.0)
        expected = []
        if found["buckets"]:
            each = ["all_gather_into_tensor"]
            if sharding != "ddp":
                each = ["all_to_all_single"] * (3 if name in READERS else 2)
            expected = each * found["buckets"]
        if "nap" in name and sharding != "ddp":
            expected.append("all_reduce")
        assert sorted(found["calls"]) == sorted(expected)


def test_a_rounded_exchange_rounds_and_keeps_replicas_alike(launched) -> None:
    """Oracle: one process without rounding; lr = 0.01, bf16 has 8 bits."""
    for world, (_, said) in launched.items():
        for sharding, _ in WORLDS[world]:
            found = [process["rounded"][sharding] for process in said]
            assert all(0 < one["difference"] < 1e-3 for one in found)
            if sharding == "ddp":
                assert len({one["sum"] for one in found}) == 1


def test_the_check_stops_what_is_not_what_was_asked_for(launched) -> None:
    """Oracle: the planted faults."""
    for process in launched[2][1]:
        said = process["checks"]
        assert said["good"] == "fine"
        assert "several processes read the same rows" in said["same rows"]
        assert "'fsdp2' was asked for, but the model's is 'none'" in said["plain model"]
        assert "'ddp' was asked for, but the model's is 'none'" in said["no replica"]
        assert "is torch.float16, no master weight" in said["half"]


# Owners.


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_matrix_of_a_llama_has_one_owner_and_none_has_much_more(world: int) -> None:
    """Oracle: counting; 12 layers."""
    layers = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 12}
    model = empty_model(LlmNormConfig(**(CONFIG | layers)), device="meta")
    found = matrices(split(model), {})
    buckets, load = owners(found, world)
    numbers = sorted(n for owned in buckets for part in owned for n in part)
    assert numbers == list(range(len(found)))
    assert max(load) * world / sum(load) <= 1.2
    held = [
        sum(found[n].rows * found[n].columns for o in buckets for n in o[r]) for r in range(world)
    ]
    assert max(held) * world / sum(held) <= 1.2
