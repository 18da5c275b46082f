"""Optimizers, norms and mixers under every sharding against one process; the same checkpoints.

All scenarios of a world run in one launch; what they save one process reads.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.nn.mixers.settings import Mixer
from llmnorm.optim import sharded
from llmnorm.parallel.check import check
from tests.distributed.processes import run
from tests.distributed.tiny import OPTIMIZERS, Run, tensor_of

STEPS = 2  # and as many after them
NORMS = ("power", "unified")  # whose statistics are sums over the processes
FROZEN = ("embed_tokens.weight", "q_proj.weight", "up_proj.weight")
GROUPS: list[dict[str, Any]] = [
    {"match": "*.mlp.*", "lr": 0.5, "weight_decay": 0.0},
    {"match": "layers.0.*_proj.weight", "rule": "adamw", "weight_decay": 0.2},
    {"match": "embed_tokens.weight", "rule": "muon", "lr": 0.5},
    {"match": "model.norm.weight", "lr": 2.0, "weight_decay": 0.1},
]
CASES = [*OPTIMIZERS, *(f"adamw, {norm}" for norm in NORMS), "muon, frozen", "muon, groups"]
TOLERANCE = 1e-9
MIXERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax"},
    "window": {"name": "softmax", "sliding_window": 4},
    "linear": {"name": "linear"},
    "nala": {"name": "nala"},
    "ssd": {"name": "ssd", "head_dim": 8, "state_size": 5},
    "gla": {"name": "gla", "num_heads": 2},
    "gated_delta": {"name": "gated_delta", "num_key_heads": 2, "key_head_dim": 3},
    "softmax both": {"name": "softmax", "bidirectional": True},
    "hydra": {"name": "hydra", "head_dim": 8, "state_size": 3},
    "matrix": {"name": "matrix", "head_dim": 8},
}
# One launch a world: (sharding, replicas) of each.
WORLDS = {2: [("ddp", 1), ("fsdp2", 1)], 3: [("fsdp2", 1)], 4: [("hsdp", 2)]}
CELLS = [
    (f"{sharding} {world}", case)
    for world, kinds in WORLDS.items()
    for sharding, _ in kinds
    for case in CASES
]
# Who saved, who goes on; the last two are launched when all others have ended. Every kind of state:
# elementwise, a row's, bases and their age, without and with a projection's norm.
CARRIED = ("adamw", "normuon", "conda", "soap", "muon+nap")
PAIRS = [
    ("ddp 2", "fsdp2 2"),
    ("fsdp2 2", "ddp 2"),
    ("fsdp2 2", "fsdp2 3"),
    ("ddp 2", "fsdp2 3"),
    ("fsdp2 2", "fsdp2 4"),
    ("fsdp2 2", "hsdp 4"),
    ("fsdp2 3", "fsdp2 2"),
    ("hsdp 4", "ddp 2"),
]


def started(sharding: str, case: str, replicas: int = 1, **keys: Any) -> Run:
    """The case's run before its first step."""
    optimizer, _, special = case.partition(", ")
    if special == "frozen":
        keys["frozen"] = FROZEN
    elif special == "groups":
        keys["groups"] = GROUPS
    elif special:
        # Statistics of a batch are those of its rows on all processes: not the same rows as of one.
        keys |= {"model": {"norm": {"name": special, "allow_leak": True}}, "micro_batches": 1}
    return Run(sharding, optimizer, replicas, **keys)


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells of a world."""
    said: dict[str, Any] = {}
    place = directory.parents[1]
    sharded.BUCKET_BYTES = 4096  # several buckets
    for sharding, replicas in WORLDS[world]:
        for case in CASES:
            one = started(sharding, case, replicas)
            norms = one.train(0, STEPS)
            where = place / f"{sharding} {world} {case}"
            one.save(where, STEPS)
            norms += one.train(STEPS, 2 * STEPS)
            one.save(where, 2 * STEPS)
            again = started(sharding, case, replicas)
            again.load(where, STEPS)
            again.train(STEPS, 2 * STEPS)
            said[f"{sharding} {world} {case}"] = {"norms": norms, "resumed": again.equals(one)}
    go_on(place, [pair for pair in PAIRS[:-2] if pair[1].endswith(str(world))])
    if world == 2:
        from_one(place)
        said["losses"] = gradients(place, rank)
        said["checks"] = checks()
    return said


def go_on(place: Path, pairs: list[tuple[str, str]]) -> None:
    """Load what others saved, train and save."""
    for old, new in pairs:
        for case in CARRIED:
            sharding = new.split()[0]
            one = started(sharding, case, 2 if sharding == "hsdp" else 1)
            one.load(place / f"{old} {case}", STEPS)
            one.train(STEPS, 2 * STEPS)
            one.save(place / f"{old} to {new} {case}", 2 * STEPS)


def back(directory: Path, rank: int, world: int) -> bool:
    """From more processes to two."""
    go_on(directory.parents[1], PAIRS[-2:])
    return True


def from_one(place: Path) -> None:
    """Two processes read what one has saved, and save it."""
    for sharding in ("ddp", "fsdp2"):
        two = started(sharding, "conda")
        two.load(place / "one", STEPS)
        two.save(place / f"one to {sharding}", STEPS)


def gradients(place: Path, rank: int) -> dict[str, float]:
    """Losses under every mixer; the gradients are saved."""
    losses = {}
    for sharding in ("ddp", "fsdp2"):
        for name in MIXERS:
            one = with_mixer(sharding, name)
            losses[f"{sharding} {name}"] = one.forward_backward(0)
            found = whole_gradients(one)
            if rank == 0:
                torch.save(found, place / f"{sharding} {name}.pt")
    return losses


def with_mixer(sharding: str, name: str) -> Run:
    """One that reads both ways is in a masked language model."""
    kind = TypeAdapter(Mixer).validate_python(MIXERS[name])
    model = "LlmNormForCausalLM" if kind.causal else "LlmNormForMaskedLM"
    return Run(sharding, "adamw", model={"mixer": MIXERS[name], "architectures": [model]})


def whole_gradients(one: Run) -> dict[str, Tensor]:
    """By parameter name."""
    found = {name: p.grad for name, p in one.model.named_parameters()}
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()}


def checks() -> dict[str, str]:
    """What the loud check says of planted faults."""
    one = Run("fsdp2", "adamw")
    said = {"good": failure(one, one.rows(0)), "same rows": failure(one, torch.arange(12))}
    counted = [torch.arange(3), torch.empty(0, dtype=torch.int64)][one.parallel.rank]
    said["unequal counts"] = failure(one, counted)
    shared = [torch.arange(3), torch.tensor([2])][one.parallel.rank]
    said["a row of both"] = failure(one, shared)
    plain = Run("ddp", "adamw")
    one.parallel._model = plain.model
    said["plain model"] = failure(one, one.rows(0))
    one = Run("ddp", "adamw")
    one.parallel._model = one.model
    said["no replica"] = failure(one, one.rows(0))
    one = Run("ddp", "adamw")
    one.parameters[0].data += one.parallel.rank
    said["other weights"] = failure(one, one.rows(0))
    one = Run("ddp", "adamw")
    one.model.model.norm.half()
    said["half"] = failure(one, one.rows(0))
    return said


def failure(one: Run, rows: Tensor) -> str:
    """The check's error, or that it has none."""
    try:
        check(one.parallel, one.model, rows)
    except RuntimeError as error:
        return str(error)
    return "fine"


# One process, and what the others say.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all processes save."""
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, dict[str, Any]]:
    """By case: the norms and the state after 2 * STEPS steps of one process."""
    found: dict[str, dict[str, Any]] = {}
    for case in CASES:
        one = started("none", case)
        norms = one.train(0, STEPS)
        if case == "conda":
            one.save(place / "one", STEPS)
        norms += one.train(STEPS, 2 * STEPS)
        found[case] = {"norms": norms, "state": {n: tensor_of(p) for n, p in one.state.items()}}
    return found


@pytest.fixture(scope="module")
def launched(alone: dict[str, Any], place: Path) -> Iterator[dict[int, list[Any]]]:
    """By world: what every process says."""
    found = {}
    for world in WORLDS:
        found[world] = run(everything, place / f"launch {world}", world)
        assert all(isinstance(said, dict) for said in found[world]), found[world]
    assert run(back, place / "launch back") == [True, True]
    yield found


def read(directory: Path, step: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors."""
    checkpoints = Checkpoints(directory)
    into = {name: torch.full_like(tensor, -1) for name, tensor in like.items()}
    checkpoints.load(checkpoints.find(step), into)
    return into


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Weights and statistics within the tolerance."""
    for key, tensor in expected.items():
        if key.startswith("model."):
            assert (found[key] - tensor).abs().max() <= TOLERANCE, key


@pytest.mark.parametrize(("cell", "case"), CELLS)
def test_a_sharded_run_is_the_run_of_one_process(launched, place, alone, cell, case) -> None:
    """Oracle: one process, in float64, on the same rows; weights read from the checkpoint."""
    expected = alone[case]
    for process in launched[int(cell[-1])]:
        norms = process[f"{cell} {case}"]["norms"]
        assert norms == pytest.approx(expected["norms"], rel=TOLERANCE)
    state = read(place / f"{cell} {case}", 2 * STEPS, expected["state"])
    compare(state, expected["state"])


@pytest.mark.parametrize(("cell", "case"), CELLS)
def test_a_resumed_run_is_the_same_to_the_bit(launched, cell, case) -> None:
    """Oracle: the run that was not stopped, every tensor that a process holds."""
    assert all(process[f"{cell} {case}"]["resumed"] for process in launched[int(cell[-1])])


@pytest.mark.parametrize("case", CARRIED)
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_run_goes_on_under_another_sharding(launched, place, alone, old, new, case) -> None:
    """Oracle: one process that never stopped."""
    state = read(place / f"{old} to {new} {case}", 2 * STEPS, alone[case]["state"])
    compare(state, alone[case]["state"])


@pytest.mark.parametrize(("cell", "case"), CELLS)
def test_one_process_goes_on_from_several(launched, place, alone, cell, case) -> None:
    """Oracle: one process that never stopped."""
    one = started("none", case)
    one.load(place / f"{cell} {case}", STEPS)
    one.train(STEPS, 2 * STEPS)
    compare({n: tensor_of(p) for n, p in one.state.items()}, alone[case]["state"])


def test_what_one_process_saved_passes_through_two_unchanged(launched, place) -> None:
    """Oracle: the files of one process, every tensor to the bit."""
    state = {n: tensor_of(p) for n, p in started("none", "conda").state.items()}
    expected = read(place / "one", STEPS, state)
    for sharding in ("ddp", "fsdp2"):
        found = read(place / f"one to {sharding}", STEPS, state)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_the_gradients_of_one_process(launched, place, mixer) -> None:
    """Oracle: one process, in float64, on the same rows; the loss is summed in float32."""
    one = with_mixer("none", mixer)
    loss, expected = one.forward_backward(0), whole_gradients(one)
    for sharding in ("ddp", "fsdp2"):
        for process in launched[2]:
            assert process["losses"][f"{sharding} {mixer}"] == pytest.approx(loss, rel=1e-6)
        found = torch.load(place / f"{sharding} {mixer}.pt")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert 0 < gradient.abs().max() * 1e-9 >= (found[name] - gradient).abs().max(), name


def test_every_mixer_is_listed() -> None:
    """Oracle: the union that is the registry."""
    kinds = get_args(get_args(Mixer)[0])
    names = {kind.model_fields["name"].default for kind in kinds}
    assert {mixer["name"] for mixer in MIXERS.values()} == names


def test_the_check_stops_what_is_not_what_was_asked_for(launched) -> None:
    """Oracle: the planted faults."""
    for process in launched[2]:
        said = process["checks"]
        assert said["good"] == said["unequal counts"] == "fine"
        for fault in ("same rows", "a row of both"):
            assert "several processes read the same rows" in said[fault]
        assert "is 'fsdp2', but the model is laid out as 'none'" in said["plain model"]
        assert "is 'ddp', but the model is laid out as 'none'" in said["no replica"]
        assert "replicas hold different weights" in said["other weights"]
        assert "is torch.float16, but weights are kept in float32" in said["half"]
