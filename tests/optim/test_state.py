"""An optimizer's state: complete before the first step, copied into, equal in another process."""

from pathlib import Path

import pytest
import torch
from torch import nn

from llmnorm.checkpoints.checkpoints import Checkpoints
from llmnorm.optim.state import named_state
from tests.optim.rules import RULES, SHAPES, Run, draw, gradients
from tests.running import CHILDREN, PATIENCE

BEFORE, STEPS = 4, 9  # the refreshes of Conda (3) and SOAP (2) lie on both sides
WEIGHTS = {name: draw(*shape, seed=5, dtype=torch.float32) for name, shape in SHAPES.items()}
GRADS = gradients(SHAPES | {"b": (7, 1)}, STEPS, torch.float32)


def started(name: str) -> Run:
    decay = {"weight_decay": 0.0, "nap": True} if name in ("muon", "adamw") else {}
    return Run(RULES[name](**decay), WEIGHTS, {"b": draw(7, 1, dtype=torch.float32)})


def everything(run: Run) -> dict[str, torch.Tensor]:
    """Weights and state by name, as a checkpoint holds them."""
    model = nn.ParameterDict(run.weights | run.auxiliary)
    weights = {f"model.{k}": p.detach() for k, p in model.named_parameters()}
    return weights | {f"optimizer.{k}": t for k, t in named_state(run.optimizer, model).items()}


def _continue(directory: Path) -> None:
    """Another process: load every rule's state, go on, write what comes out."""
    torch.set_num_threads(1)
    for number, name in enumerate(RULES):
        saved = torch.load(directory / f"{number}.pt", weights_only=True)
        run = started(name)
        with torch.no_grad():
            for k, p in (run.weights | run.auxiliary).items():
                p.copy_(saved["weights"][k])
        run.optimizer.load_state_dict(saved["optimizer"])
        for grads in GRADS[BEFORE:]:
            run.step(grads)
        torch.save(everything(run), directory / f"{number}.done")


def test_saved_in_the_middle_and_gone_on_in_another_process(tmp_path: Path) -> None:
    """Oracle: the uninterrupted run, to the bit, for every rule; torch.load with weights_only."""
    expected = {}
    for number, name in enumerate(RULES):
        run = started(name)
        for step, grads in enumerate(GRADS):
            if step == BEFORE:
                weights = {k: p.detach().clone() for k, p in (run.weights | run.auxiliary).items()}
                saved = {"weights": weights, "optimizer": run.optimizer.state_dict()}
                torch.save(saved, tmp_path / f"{number}.pt")
            run.step(grads)
        expected[number] = everything(run)
    child = CHILDREN.Process(target=_continue, args=(tmp_path,))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    for number, name in enumerate(RULES):
        found = torch.load(tmp_path / f"{number}.done", weights_only=True)
        assert found.keys() == expected[number].keys()
        for key, value in found.items():
            assert torch.equal(value, expected[number][key]), f"{name} {key}"


@pytest.mark.parametrize("name", RULES)
def test_a_checkpoint_fills_the_tensors_that_there_are(name: str, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run; the tensors of the optimizer are the same objects after."""
    run, other = started(name), started(name)
    for grads in GRADS[:BEFORE]:
        run.step(grads)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(BEFORE, everything(run), {})
    into = everything(other)
    checkpoints.load(checkpoints.find("latest"), into)
    assert all(into[k] is t or k.startswith("model.") for k, t in everything(other).items())
    for grads in GRADS[BEFORE:]:
        expected, got = run.step(grads), other.step(grads)
    assert all(torch.equal(got[k], expected[k]) for k in got)


@pytest.mark.parametrize("name", RULES)
def test_a_state_from_before_the_first_step_changes_nothing(name: str) -> None:
    """Oracle: a run that loaded nothing; the fields are all there and none is replaced."""
    run, other = started(name), started(name)
    before = everything(other)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    for grads in GRADS[:4]:
        expected, got = run.step(grads), other.step(grads)
    assert all(torch.equal(got[k], expected[k]) for k in got)
    after = everything(other)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert tensor.data_ptr() == after[key].data_ptr(), key


@pytest.mark.parametrize("name", [name for name in RULES if name != "adamw"])
def test_states_are_views_into_one_stack_a_shape(name: str) -> None:
    """Oracle: addresses; `step` is one CPU tensor for all members."""
    weights = {f"w{i}": draw(6, 10, seed=i) for i in range(3)}
    run = Run(RULES[name](), weights)
    (stack,) = run.optimizer.stacks
    for number, parameter in enumerate(run.weights.values()):
        for field, value in run.optimizer.state[parameter].items():
            whole = stack.state[field]
            if field == "step":
                assert value is whole and value.device.type == "cpu" and value.ndim == 0
            else:
                assert value.data_ptr() == whole[number].data_ptr(), field
    if "step" in stack.state:
        run.step(gradients({k: (6, 10) for k in weights}, 1)[0])
        assert stack.state["step"] == 1


def test_another_states_shape_or_rule_is_refused_before_anything_is_copied() -> None:
    """Oracle: the messages, and the state as it was."""
    run, other = Run(RULES["conda"](), WEIGHTS), Run(RULES["muon"](), WEIGHTS)
    with pytest.raises(ValueError, match="other fields"):
        run.optimizer.load_state_dict(other.optimizer.state_dict())
    few = Run(RULES["conda"](), {"wide": WEIGHTS["wide"]})
    with pytest.raises(ValueError, match="other parameter groups"):
        run.optimizer.load_state_dict(few.optimizer.state_dict())
    turned = Run(RULES["muon"](), {k: w.T for k, w in WEIGHTS.items()})
    with pytest.raises(ValueError, match="another shape"):
        other.optimizer.load_state_dict(turned.optimizer.state_dict())
