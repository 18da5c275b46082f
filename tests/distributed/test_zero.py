"""Every optimizer under DeepSpeed's ZeRO against one process: same steps, same checkpoints.

DeepSpeed's masters are float32, so two runs that sum in another order differ. The yardstick is what
the same rows in twice as many micro-batches do to one process. All scenarios run in one launch of
two processes; what they save one process reads. The exchange by itself: test_exchange.py.
"""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.optim import sharded
from llmnorm.optim.fragments import Fragment, master
from llmnorm.parallel.check import check, describe
from tests.distributed.processes import run
from tests.distributed.test_sharding import CASES, NORMS, STEPS, failure, read, started
from tests.distributed.tiny import Run, tensor_of

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")

STAGES = ("zero1", "zero2", "zero3")
CELLS = [(stage, case) for stage in STAGES for case in CASES]
# Directions without a gradient hold rounding errors alone, which these bring to a step's size.
NOISY = {"conda": 1e-4, "soap": 1e-4}
LIMIT = 2e-6  # of weights, after 2 * STEPS steps


def single(sharding: str, case: str, **keys: Any) -> Run:
    """The case's run in float32."""
    return started(sharding, case, dtype=torch.float32, **keys)


def everything(directory: Path, rank: int, world: int) -> dict[str, Any]:
    """All cells; what each process finds of its own part is said, the rest is saved."""
    sharded.BUCKET_BYTES = 4096  # several buckets
    said: dict[str, Any] = {}
    place = directory.parent
    single("zero3", "muon").train(0, 1)
    gc.freeze()  # DeepSpeed looks for garbage with every model
    for stage, name in CELLS:
        one = single(stage, name)
        if name == "muon":
            check(one.parallel, one.model, one.rows(0))
            said[f"{stage} described"] = describe(one.parallel, one.model, one.optimizer)
        norms = one.train(0, STEPS)
        one.save(place / f"{stage}-{name}", STEPS)
        norms += one.train(STEPS, 2 * STEPS)
        one.save(place / f"{stage}-{name}", 2 * STEPS)
        again = single(stage, name)
        again.load(place / f"{stage}-{name}", STEPS)
        again.train(STEPS, 2 * STEPS)
        said[f"{stage} {name}"] = {
            "norms": norms,
            "resumed": again.equals(one),
            # The model's own weights, which forward passes see, are the masters.
            "faults": [*one.parallel.zero.faults()],
        }
    for stage in STAGES:
        passed = single(stage, "conda")
        passed.load(place / "one", STEPS)
        passed.save(place / f"one-{stage}", STEPS)
        behind = passed._in(place / f"behind-{stage}", asynchronous=True)
        behind.save(STEPS, behind.without_copies(passed.state), {})
        passed.train(STEPS, 2 * STEPS)  # while that is written
        behind.wait()
        passed.save(place / f"one-{stage}", 2 * STEPS)
        said[f"{stage} odd"] = odd(stage)
    said["faults"] = faults()
    return said


def odd(stage: str) -> dict[str, Any]:
    """What is not a plain run: bf16, recomputation, skipped steps, no gradient."""
    said: dict[str, Any] = {}
    replica, zero = (single(s, "muon", precision="bf16", micro_batches=1) for s in ("ddp", stage))
    for of in (replica, zero):
        of.forward_backward(0)
        of.parallel.clip(of.parameters, 0.0)
    whole = dict(replica.model.named_parameters())
    said["bf16"] = all(
        part.grad is not None and part.grad.equal(elements(whole[name].grad, part))
        for name, part in fragments(zero).items()
    )

    plain, again = single(stage, "muon"), single(stage, "muon", activation_checkpointing=True)
    said["recomputed"] = plain.train(0, 2) == again.train(0, 2) and again.equals(plain)

    skipping = single(stage, "muon")
    skipping.train(0, 1)
    before = {name: tensor_of(part).clone() for name, part in skipping.state.items()}
    skipping.forward_backward(1, scale=float("nan"))
    said["not finite"] = bool(skipping.parallel.clip(skipping.parameters, 0.5).isnan())
    skipping.optimizer.zero_grad(set_to_none=True)
    skipping.parallel.end_step()
    said["skipped"] = all(tensor_of(p).equal(before[n]) for n, p in skipping.state.items())
    skipping.train(1, 2)
    said["after it"] = skipping.equals(plain)

    idle = single(stage, "muon")
    idle.model.model.layers[1].mlp.forward = torch.zeros_like
    try:
        idle.train(0, 1)
    except ValueError as error:
        said["without gradient"] = str(error)
    return said


def faults() -> dict[str, str]:
    """What the check before the first step says of planted ones."""
    good = single("zero2", "muon")
    said = {"good": failure(good, good.rows(0))}
    good.parallel._model = good.model
    said["plain model"] = failure(good, good.rows(0))
    run = single("zero2", "muon")
    next(iter(fragments(run).values())).detach().add_(1.0)
    said["other masters"] = failure(run, run.rows(0))
    run = single("zero3", "muon", deepspeed={"gradient_clipping": 1.0})
    said["clips"] = failure(run, run.rows(0))
    return said


def fragments(of: Run) -> dict[str, Fragment]:
    found = {name: master(p) for name, p in of.model.named_parameters()}
    return {name: part for name, part in found.items() if isinstance(part, Fragment)}


def elements(whole: torch.Tensor | None, part: Fragment) -> torch.Tensor:
    """Those of a whole tensor that a fragment has."""
    assert whole is not None
    return whole.reshape(-1)[part.cuts[part.rank] : part.cuts[part.rank + 1]]


# One process.


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """By optimizer: norms and state of one process, and how far cutting the batch moves weights."""
    found: dict[str, dict[str, Any]] = {}
    for name in CASES:
        one = single("none", name)
        norms = one.train(0, STEPS)
        if name == "conda":
            one.save(tmp_path_factory.getbasetemp() / "one32", STEPS)
        norms += one.train(STEPS, 2 * STEPS)
        cut = single("none", name)
        cut.micro_batches = 1 if name.endswith(NORMS) else 4
        cut.train(0, 2 * STEPS)
        state, other = ({n: tensor_of(p) for n, p in r.state.items()} for r in (one, cut))
        found[name] = {"norms": norms, "state": state, "noise": difference(other, state)}
    yield found


@pytest.fixture(scope="module")
def launched(
    alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[Any]]]:
    """Where the runs of two processes were saved, and what each says."""
    place = tmp_path_factory.mktemp("zero")
    (tmp_path_factory.getbasetemp() / "one32").rename(place / "one")
    said = run(everything, place, 2)
    assert all(isinstance(process, dict) for process in said), said
    yield place, said


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest of a weight."""
    names = [name for name in expected if name.startswith("model.")]
    return max(float((found[name] - expected[name]).abs().max()) for name in names)


def limit(alone: dict[str, dict[str, Any]], name: str) -> float:
    if name.endswith(NORMS):  # whose statistics are a micro-batch's, so that cutting it shows more
        return 3 * LIMIT
    noise = 3 * alone[name]["noise"]
    # Or it would excuse anything: 1/300 of a step of AdamW, whose learning rate is 0.01. Without
    # vector instructions a sum has more terms in a row; the noise is then 1.3e-5 (SOAP: 5e-5).
    assert noise <= NOISY.get(name, 3e-5)
    return max(noise, LIMIT)


@pytest.mark.parametrize(("stage", "name"), CELLS)
def test_a_run_under_zero_is_the_run_of_one_process(launched, alone, stage, name) -> None:
    """Oracle: one process in float32 on the same rows; three times what cutting the batch does."""
    place, said = launched
    expected = alone[name]
    for process in said:
        tolerance = 1e-4 if name in NOISY else 1e-6
        assert process[f"{stage} {name}"]["norms"] == pytest.approx(
            expected["norms"], rel=tolerance
        )
    state = read(place / f"{stage}-{name}", 2 * STEPS, expected["state"])
    moved = difference(state, expected["state"])
    print(f"{stage} {name}: {moved:.1e}, cut batch {expected['noise']:.1e}")
    assert moved <= limit(alone, name)


@pytest.mark.parametrize(("stage", "name"), CELLS)
def test_a_resumed_run_is_the_same_to_the_bit(launched, stage, name) -> None:
    """Oracle: the run that was not stopped, every tensor that a process holds."""
    assert all(process[f"{stage} {name}"]["resumed"] for process in launched[1])


@pytest.mark.parametrize(("stage", "name"), CELLS)
def test_the_models_weights_are_the_masters_after_a_step(launched, stage, name) -> None:
    """Oracle: the check before the first step, which compares them to the bit."""
    assert all(process[f"{stage} {name}"]["faults"] == [] for process in launched[1])


@pytest.mark.parametrize(("stage", "name"), CELLS)
def test_one_process_goes_on_from_several(launched, alone, stage, name) -> None:
    """Oracle: one process that never stopped."""
    one = single("none", name)
    one.load(launched[0] / f"{stage}-{name}", STEPS)
    one.train(STEPS, 2 * STEPS)
    state = {n: tensor_of(p) for n, p in one.state.items()}
    assert difference(state, alone[name]["state"]) <= limit(alone, name)


@pytest.mark.parametrize("stage", STAGES)
def test_what_one_process_saved_passes_through_unchanged(launched, alone, stage) -> None:
    """Oracle: the files of one process, every tensor to the bit; then its own run.

    What every sharding reads and writes to the bit, any two of them hand on.
    """
    place, _ = launched
    expected = read(place / "one", STEPS, alone["conda"]["state"])
    for directory in (f"one-{stage}", f"behind-{stage}"):
        found = read(place / directory, STEPS, expected)
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    later = read(place / f"one-{stage}", 2 * STEPS, expected)
    assert difference(later, alone["conda"]["state"]) <= limit(alone, "conda")


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_no_plain_run(launched, stage) -> None:
    """Oracles: replicas' gradients to the bit, the plain run."""
    for process in launched[1]:
        odd = process[f"{stage} odd"]
        assert odd["bf16"] and odd["recomputed"]
        assert odd["not finite"] and odd["skipped"] and odd["after it"]
        assert odd["without gradient"].endswith("trainable, but without a gradient")
        assert odd["without gradient"].startswith("model.layers.1.mlp.")


def test_decay_on_the_wrong_side_is_found(launched, alone, monkeypatch) -> None:
    """Oracle: the limit of the equality above, against the planted fault."""
    place, _ = launched
    wrong = single("none", "muon")
    monkeypatch.setattr(type(wrong.optimizer.rule), "decay", "after")
    wrong.train(0, 2 * STEPS)
    state = {name: tensor_of(part) for name, part in wrong.state.items()}
    found = read(place / "zero1-muon", 2 * STEPS, state)
    assert difference(found, state) > limit(alone, "muon")


def test_the_check_stops_what_is_not_what_was_asked_for(launched) -> None:
    """Oracle: the planted faults, and the bytes of 6,672 numbers over two processes."""
    for process in launched[1]:
        said = process["faults"]
        assert said["good"] == "fine"
        assert "is 'zero2', but the model is laid out as 'none'" in said["plain model"]
        assert "DeepSpeed clips gradients to 1.0" in said["clips"]
        for stage in STAGES:
            assert f"sharding {stage}, precision fp32" in process[f"{stage} described"]
    found = [process["faults"]["other masters"] for process in launched[1]]
    assert any("the master weights of shape (40, 16) are not the model's" in text for text in found)
