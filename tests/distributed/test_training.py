"""Real processes, two of them under `accelerate launch`, against one process on the same rows.

One launch file is given to the launcher itself; of the others the processes are forked with the
environment that the launcher would give them.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmnorm.checkpoints import checkpoints as module
from tests.benchmarks import INSTALLED, write_tasks
from tests.distributed.processes import command, launch_environment
from tests.distributed.processes import run as run_processes
from tests.running import (
    MASKED,
    PATIENCE,
    ROOT,
    SMOKE,
    assert_same_run,
    llmnorm,
    metrics_of,
    state_of,
)

COMMON = ["schedule=constant", "evaluation.every=5", "checkpoint.every=5", "training.ema=0.9"]
COMMON += ["logging.health_every=2"]
# MiB of weights, gradients and state that a process holds (DeepSpeed: masters beside weights).
SHARDINGS = {
    "ddp": ("0.5", "0.5", "0.9"),
    "fsdp2": ("0.2", "0.2", "0.5"),
    "zero3": ("0.5", "0.2", "0.5"),
}


REAL = "fsdp2"


def launch(sharding: str, directory: Path, words: list[str]) -> str:
    """What two processes print that begin as the launch file of that name says."""
    file = f"launch/accelerate/{sharding}.yaml"
    if sharding != REAL:
        scenario, environment = partial(command, words=words), launch_environment(file)
        answers = run_processes(scenario, directory, environment=environment)
        assert [answer[0] for answer in answers] == [0, 0], answers
        return "".join(err for _, _, err in answers)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", file),
            *("--num_processes", "2", "-m", "llmnorm", *words),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def codes(directory: Path, words: list[str], world: int = 2, scenario: Any = command) -> list[Any]:
    """The exit code of a command on every process."""
    answers = run_processes(partial(scenario, words=words), directory, world)
    return [answer[0] if isinstance(answer, list) else answer for answer in answers]


def dying(directory: Path, rank: int, world: int, *, words: list[str]) -> Any:
    """The second process is killed in the middle of its second checkpoint."""
    real, files = module.write_file, []

    def die(path: Path, parts: Any) -> Any:
        files.append(path)
        if len(files) < 2:
            return real(path, parts)
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        module.write_file = die
    return command(directory, rank, world, words=words)


@pytest.fixture(scope="module", params=SHARDINGS)
def sharding(request: pytest.FixtureRequest) -> str:
    """What the launch file asks for."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    return str(request.param)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """lm-eval's, where it is installed: of unequal work for two processes."""
    return write_tasks(tmp_path_factory.mktemp("tasks")) if INSTALLED else []


@pytest.fixture(scope="module")
def scored(tasks: list[str]) -> list[str]:
    """The setting of a run that scores them."""
    return [f"evaluation.tasks={json.dumps(tasks)}"]


@pytest.fixture(scope="module")
def two(sharding, scored, tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A run of 5 steps of 2 processes, each accumulating over 2 micro-batches."""
    if sharding == "zero3":
        pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed")
    directory = tmp_path_factory.mktemp(sharding)
    run = directory / "run"
    words = ["train", str(SMOKE), f"run_dir={run}", f"data.dir={smoke_data}", "training.steps=5"]
    words += [*COMMON, *scored, "training.micro_batch=4"]
    said = launch(sharding, directory / "launch", words)
    assert said.count(f"2 process(es) on cpu (gloo), sharding {sharding}, precision") == 1
    weights, gradients, state = SHARDINGS[sharding]
    assert f"holds {weights} MiB of weights, {gradients} MiB of gradients, {state}" in said
    return run


@pytest.fixture(scope="module")
def one(scored, tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """8 steps of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    words = [f"run_dir={run}", f"data.dir={smoke_data}", "training.steps=8", *COMMON, *scored]
    llmnorm("train", SMOKE, *words)
    return run


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """5 steps of one process in 4 micro-batches."""
    run, more = (
        tmp_path_factory.mktemp("cut") / "run",
        ["training.steps=5", "training.micro_batch=4"],
    )
    llmnorm("train", SMOKE, f"run_dir={run}", f"data.dir={smoke_data}", *more, *COMMON)
    return run


def test_two_processes_compute_the_same_steps_as_one(two, one, cut) -> None:
    """Oracle: one process on the same rows."""
    ours = metrics_of(two)
    theirs = [line for line in metrics_of(one) if line["step"] <= 5]
    assert len(ours) == len(theirs) == 6
    for found, other in zip(ours, theirs, strict=True):
        assert found["tokens"] == other["tokens"]
        if "loss" in found:
            for key in ("loss", "grad_norm"):
                assert found[key] == pytest.approx(other[key], rel=1e-6)
            # Of the first micro-batch of both processes, which is half of the rows.
            assert found.keys() == other.keys()
            for layer, figures in found.get("health", {}).items():
                whole = other["health"][layer]
                assert figures["entropy"] == pytest.approx(whole["entropy"], rel=0.01)
                assert 0.5 < figures["max_logit"] / whole["max_logit"] < 1 + 1e-5
            continue
        pairs = [(found["validation"], other["validation"])]
        pairs.append((pairs[0][0]["ema"], pairs[0][1]["ema"]))
        for figures, expected in pairs:
            for key in ("loss", "bits_per_byte"):
                assert figures[key] == pytest.approx(expected[key], rel=1e-6)
        assert found.keys() == other.keys()
        for key in {"tasks", "ema_tasks"} & found.keys():  # a choice may turn with the last bits
            assert found[key].keys() == other[key].keys() == {"weather", "tides", "winds"}
            assert found[key]["tides"] == pytest.approx(other[key]["tides"], rel=1e-5)
    # Adam divides by the root of a second moment that may be nearly 0: the yardstick is what the
    # same rows in other micro-batches do to one process.
    assert difference(two, one) <= 3 * difference(cut, one)


def difference(run: Path, other: Path) -> float:
    """The largest relative difference of a weight or average after step 5."""
    first, second = state_of(run, 5), state_of(other, 5)
    assert first.keys() == second.keys()
    return max(
        float((tensor - second[name]).norm() / second[name].norm())
        for name, tensor in first.items()
        if name.startswith(("model.", "ema."))
    )


def test_the_time_of_a_run_is_told_to_the_last_line(two, one) -> None:
    """Oracle: the monotonic clock; two processes wait for each other, one waits for nobody."""
    for run, waits in ((two, True), (one, False)):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first, *_, last = lines
        passed = last["clock"]["monotonic"] - first["clock"]["monotonic"]
        assert last["wall"] - first["wall"] == pytest.approx(passed, rel=0.05)
        assert sum(sum(line["spent"].values()) for line in lines) == pytest.approx(last["wall"])
        assert waits == any(line["spent"].get("waiting", 0) > 0 for line in lines)
        counted = sum(
            line["spent"].get(part, 0) for line in lines for part in ("training", "data", "waiting")
        )
        assert last["goodput"] == pytest.approx(counted / last["wall"], rel=1e-4)


def test_two_processes_generate_what_one_does(two, one) -> None:
    """Oracle: the samples of one process, whose logits differ in the last bits."""
    found, expected = ((run / "samples.jsonl").read_text().splitlines() for run in (two, one))
    assert found[0] == expected[0]


def test_eval_under_the_same_sharding_gives_the_last_validation_again(
    two, sharding, tasks, tmp_path
) -> None:
    """Oracle: the line of metrics.jsonl that the run itself wrote; its scores are the same too."""
    words = ["eval", str(two), f"parallel.sharding={sharding}"]
    words += ["--tasks", ",".join(tasks)] if tasks else []
    assert codes(tmp_path / "eval", words) == [0, 0]
    written = json.loads((two / "eval" / "step_00000005.json").read_text())
    (line,) = [line for line in metrics_of(two) if "validation" in line]
    assert written["validation"]["loss"] == line["validation"]["loss"]
    for task, values in line["tasks"].items() if tasks else ():
        for metric, value in values.items():
            assert written["tasks"]["results"][task][f"{metric},none"] == value


def test_a_sharded_run_is_exported_from_its_files(two, sharding, tmp_path) -> None:
    """Oracle: the rows that each process wrote, two files of them where weights are spread."""
    files = list((two / "checkpoints" / "step_00000005").glob("*.safetensors"))
    assert len(files) == (1 if sharding == "ddp" else 2)
    llmnorm("export", two, tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")
    state = state_of(two, 5)
    expected = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_killed_run_goes_on_to_the_same_numbers(
    two, sharding, scored, tmp_path, smoke_data
) -> None:
    """Oracle: the run that was not stopped, to the bit; kill -9 of one process while it saves."""
    words = ["train", str(SMOKE), f"run_dir={tmp_path}/run", f"data.dir={smoke_data}", *COMMON]
    words += ["training.steps=5", "training.micro_batch=4", "checkpoint.every=2", *scored]
    words += [f"parallel.sharding={sharding}"]
    first, second = codes(tmp_path / "killed", words, scenario=dying)
    assert (first, second) == (74, -signal.SIGKILL)
    assert not (tmp_path / "run" / "checkpoints" / "step_00000004").exists()
    assert codes(tmp_path / "on", words) == [0, 0]
    assert_same_run(tmp_path / "run", two, 5)


def test_replicas_of_shards_compute_the_same_steps_as_one(one, tmp_path, smoke_data) -> None:
    """Oracle: one process on the same rows; four processes, a whole run of two steps."""
    words = ["train", str(SMOKE), f"run_dir={tmp_path}/run", f"data.dir={smoke_data}", *COMMON]
    words += ["training.steps=2", "parallel.sharding=hsdp", "parallel.replicas=2"]
    assert codes(tmp_path / "four", words, 4) == [0] * 4
    assert len(list((tmp_path / "run" / "checkpoints" / "step_00000002").glob("*.safe*"))) == 2
    ours = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    for found, other in zip(ours, metrics_of(one), strict=False):
        assert found["tokens"] == other["tokens"]
        assert found["loss"] == pytest.approx(other["loss"], rel=1e-6)
    health, expected = ours[1]["health"], metrics_of(one)[1]["health"]
    for layer in ("0", "1"):
        assert health[layer] == pytest.approx(expected[layer], rel=1e-5)


def test_a_run_of_two_goes_on_with_one(two, one, start) -> None:
    child = start("train", two, "training.steps=8", "training.micro_batch=16")
    assert child.finish() == 0, child.log.read_text()
    assert "processes 2 -> 1" in child.log.read_text()
    for found, other in zip(metrics_of(two), metrics_of(one), strict=True):
        if "loss" in found:
            assert found["loss"] == pytest.approx(other["loss"], rel=5e-6)


@pytest.mark.parametrize("objective", ["masked_lm", "classification"])
def test_other_objectives_are_those_of_one_process(tmp_path, smoke_data, objective) -> None:
    """Oracle: one process, which masks (or pads) and averages over the whole batch at once."""
    words = ["train", str(SMOKE), *MASKED, f"data.dir={smoke_data}"]
    if objective == "classification":
        tokenizer = next((smoke_data / "packed").glob("*/tokenizer"))
        words = ["train", "configs/finetune/smoke.yaml", f"tokenizer.path={tokenizer}"]
        words += ["model.hidden_size=32", "model.num_hidden_layers=1", "model.vocab_size=512"]
        words += ["training.epochs=null", "evaluation.micro_batch=5"]
    words += ["training.steps=3", "evaluation.every=3", "training.device=cpu"]
    one, two = (f"run_dir={tmp_path}/{name}" for name in ("one", "two"))
    llmnorm(*words, one)
    words += [two, "training.micro_batch=2", "parallel.sharding=ddp"]
    assert codes(tmp_path / "launch", words) == [0, 0]
    alone, together = (metrics_of(tmp_path / name) for name in ("one", "two"))
    for line, other in zip(alone, together, strict=True):
        assert line["tokens"] == other["tokens"]
        found = [line, other] if "loss" in line else [line["validation"], other["validation"]]
        for key in ("loss", "grad_norm", "accuracy", "f1", "matthews"):
            if key in found[0]:
                assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)


def test_what_several_processes_cannot_do_is_said_once(tmp_path) -> None:
    """Oracle: the line, from one of two processes; both end."""
    # Missing data stands for all: the batch that does not divide is tested in one process.
    words = ["train", str(SMOKE), f"run_dir={tmp_path}/r", f"data.dir={tmp_path}/none"]
    words += ["parallel.sharding=ddp"]
    answers = run_processes(partial(command, words=words), tmp_path / "launch")
    assert all(code != 0 for code, _, _ in answers)
    said = "".join(err for _, _, err in answers).splitlines()
    assert [line for line in said if line.startswith("llmnorm: error:")] == [
        f"llmnorm: error: data: not prepared yet; run once, by itself: llmnorm data {SMOKE} "
        f"run_dir={tmp_path}/r data.dir={tmp_path}/none parallel.sharding=ddp"
    ]
