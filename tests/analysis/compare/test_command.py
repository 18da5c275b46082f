"""A comparison from the command line to the report: real runs, killed and gone on with."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from llmnorm import cli
from llmnorm.analysis.compare import launch as launch_file
from llmnorm.analysis.compare.arms import check_same_arms, read_arms, read_protocol, save_arms
from llmnorm.analysis.compare.command import compare
from llmnorm.analysis.compare.launch import Slots, launch, slots
from llmnorm.analysis.compare.ledger import Ledger, Record
from llmnorm.analysis.compare.plan import Arm, Protocol, Run
from llmnorm.analysis.compare.runs import execute
from llmnorm.machine.gpus import GPU
from llmnorm.part import InputError
from tests.running import CHILDREN, PATIENCE, SMOKE, TIMES, ForkedRun


def arms(*given: str, shared: Sequence[str] = ()) -> list[Arm]:
    return read_arms(SMOKE, shared, [words.split() for words in given])


def tuned(protocol: Protocol, loss: Callable[[Run], float]) -> tuple[dict[str, float], list[Run]]:
    """Every run of a protocol, by a law instead of training."""
    losses: dict[str, float] = {}
    order = []
    while todo := [run for run in protocol.needed(losses) if run.key not in losses]:
        order.append(todo[0])
        losses[todo[0].key] = loss(todo[0])
    return losses, order


# The protocol, without a run.


def test_arms_may_choose_rows_and_weigh_sources() -> None:
    """Oracle: the settings of each arm; all are as long in tokens that are trained on."""
    shared = ["training.steps=null", "training.tokens=20000"]
    given = [["plain"], ["weights", "data.weights={prose: 1, notes: 2}"]]
    given += [["colm", "selection=colm", "selection.pool=32"]]
    protocol = read_protocol(read_arms(SMOKE, shared, given))
    assert protocol.configs["weights"].data.weights == {"prose": 1, "notes": 2}
    assert protocol.configs["colm"].pool == 2 * protocol.configs["plain"].pool == 32
    assert len({*protocol.steps.values()}) == 1


def test_the_runs_of_a_comparison_are_counted() -> None:
    """Oracle: by hand: 2 arms x 5 rates, 2 x 3 seeds, and the baseline's 2 further horizons."""
    protocol = read_protocol(arms("a model.norm=layer"), seeds=3, lr_points=5)
    losses, order = tuned(protocol, lambda run: (math.log2(run.lr or 1) - math.log2(3e-3)) ** 2)
    assert len(order) == 2 * 5 + 2 * 3 + 3 * 2 == len(set(losses))
    assert [run.arm for run in order[:4]] == ["base", "a", "base", "a"]
    assert {run.horizon for run in order if run.arm == "base"} == {1.0, 1.25, 1.5}
    assert {run.horizon for run in order if run.arm == "a"} == {1.0}
    paired = [run for run in order if run.seed != protocol.tuning_seed]
    assert {run.seed for run in paired} == {1, 2, 3}  # none of them chose a rate
    assert all(run.lr == 3e-3 for run in paired)
    full = read_protocol(arms("a model.norm=layer"), seeds=3, lr_points=1, horizons="arms")
    _, order = tuned(full, lambda run: 1.0)
    assert len(order) == 3 + 3 * 5
    assert sorted({run.horizon for run in order if run.arm == "a"}) == [0.6, 0.7, 0.8, 0.9, 1.0]
    assert full.steps_of(Run("a", None, 1, 0.6)) == 18


@pytest.mark.parametrize(
    ("best", "points", "edge"),
    [(0, 5, False), (-2, 6, False), (2, 6, False), (3, 7, False), (9, 9, True), (-9, 9, True)],
)
def test_a_grid_grows_until_its_best_has_worse_neighbours(
    best: int, points: int, edge: bool
) -> None:
    """Oracle: a parabola in log2 of the rate with its vertex `best` octaves from the centre."""
    protocol = read_protocol(arms("a model.norm=layer"), seeds=1)
    losses, _ = tuned(protocol, lambda run: abs(math.log2((run.lr or 3e-3) / 3e-3) - best))
    assert len(protocol.grid("a", losses)) == points
    assert protocol.at_edge("a", losses) is edge
    if not edge:
        assert protocol.best_lr("a", losses) == pytest.approx(3e-3 * 2.0**best)


def test_high_rates_that_diverge_are_not_chosen() -> None:
    """Oracle: infinite losses above the centre."""
    protocol = read_protocol(arms("a model.norm=layer"), seeds=1)
    losses, _ = tuned(
        protocol, lambda run: math.inf if (run.lr or 0) > 4e-3 else -math.log(run.lr or 1)
    )
    assert protocol.best_lr("a", losses) == pytest.approx(3e-3)


def test_rate_times_decay_is_held_and_rows_are_shared(tmp_path: Path) -> None:
    """Oracle: the resolved settings of the runs' own command lines."""
    from llmnorm.config.file import load

    protocol = read_protocol(arms("base", "a model.norm=layer optimizer.weight_decay=0.3"))
    for arm, decay in (("base", 0.1), ("a", 0.3)):
        for k in (-2, 0, 1):
            run = Run(arm, 3e-3 * 2.0**k, 0)
            path, *words = protocol.train_arguments(run, tmp_path)
            config = load(Path(path), words).config
            assert config.optimizer.lr == run.lr
            assert config.optimizer.lr * config.optimizer.weight_decay == pytest.approx(
                3e-3 * decay
            )
    seeded = load(SMOKE, protocol.train_arguments(Run("a", None, 7), tmp_path)[1:]).config
    assert (seeded.seed, seeded.data_seed) == (7, 7)
    fixed = read_protocol(arms("a model.norm=layer", shared=["data.seed=3"]))
    seeded = load(SMOKE, fixed.train_arguments(Run("a", None, 7), tmp_path)[1:]).config
    assert (seeded.seed, seeded.data_seed) == (7, 3)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--arm a model.norm=layr", "--arm a: command line: model.norm: no part is called 'layr'"),
        ("--arm a model.norm=rms", "--arm a: resolves to the same settings as arm base"),
        ("--arm a seed=3", "--arm a: seed is 3, but 0 in arm base: a comparison sets it"),
        ("--arm a logging.every=7", "--arm a: logging.every is 7, but 1 in arm base"),
        ("--arm a tokenizer.vocab_size=600", "--arm a: tokenizer.vocab_size is 600"),
        ("--arm a data.context_length=32", "--arm a: data.context_length is 32"),
        ("--arm a training.steps=60", "--arm a: trains 61440 tokens, arm base 30720"),
        ("--arm a optimizer.lr=0", "--arm a: optimizer.lr 0.0 cannot be the centre of a grid"),
        ("--arm a schedule.warmup=30", "--arm a: command line: schedule.warmup 30 is not less"),
        ("--arm a model.norm=layer --horizons arms schedule.warmup=1", "'schedule.warmup=1': sett"),
        ("--arm a schedule.warmup=20 --horizons arms", "--arm a: command line: schedule.warmup 20"),
        ("--arm a model.norm=layer --lr-points 4", "--lr-points 4: give an odd number"),
        ("--arm a model.norm=layer --baseline b", "--baseline b: there is no such arm"),
        ("--arm a model.norm=layer --untuned A", "--untuned A: there is no such arm"),
        ("--arm a optimizer.lr=1 --arm a optimizer.lr=2", "--arm a: two arms have this name"),
        ("--arm model.norm=layer", "--arm model.norm=layer: give the arm a name first"),
        ("--arm a seed=1 layer", "--arm a: 'layer' is not an override"),
        ("--arm a nowhere.yaml", "--arm a: nowhere.yaml: there is no such file"),
        ("--arm base model.norm=layer", "--arm base: this is the name of the arm without changes"),
        ("--arm a model.norm=layer --parallel 999", "--parallel 999: there are "),
        ("--seeds 3", "the following arguments are required: --arm"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    words: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 2, one line that begins with what is wrong, nothing written."""
    out = tmp_path / "out"
    assert cli.main(["compare", str(SMOKE), *words.split(), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"llmnorm: error: {complaint}") and said.count("\n") == 1, said
    assert not out.exists()


def test_the_plan_names_every_run_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the protocol's own list; the directory is not made."""
    words = ["--arm", "a", "model.norm=layer", "--seeds", "2", "--lr-points", "3"]
    out = tmp_path / "out"
    assert cli.main(["compare", str(SMOKE), *words, "--plan", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    protocol = read_protocol(arms("a model.norm=layer"), seeds=2, lr_points=3)
    expected = protocol.needed({}, expected=True)
    table, _, commands = said.partition("\nTheir commands:\n")
    header, *rows = table.splitlines()
    assert header.split() == ["run", "steps", "tokens", "time"]
    assert [row.split()[0] for row in rows[:14]] == [run.key for run in expected]
    assert rows[14].startswith("14 of 14 runs to make")
    assert commands.count("  llmnorm train ") == len(commands.splitlines()) == 14
    assert not out.exists()


def test_an_arm_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    """Oracle: the settings it resolves to, shared overrides over the file."""
    own = tmp_path / "own.yaml"
    own.write_text(f"base: {SMOKE}\nmodel: {{norm: layer}}\ntraining: {{steps: 5}}\n")
    protocol = read_protocol(arms(f"a {own} optimizer.lr=1e-2", shared=["training.steps=9"]))
    assert protocol.configs["a"].model.norm.name == "layer"  # type: ignore[union-attr]
    assert (protocol.steps["a"], protocol.centre("a")) == (9, 1e-2)


# What a kill leaves, and where runs go.

RECORD = Record("a/seed1-x1", 5, 50, 2.0, 1.0, [[10, 3.0]], 9.0, "CPU", "0")


def test_a_torn_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    """Oracle: every prefix of the file that a kill can leave."""
    path = tmp_path / "runs.jsonl"
    ledger = Ledger(path)
    other = Record("b/seed1-x1", 5, 50, None, None, [], None, "CPU", "0")
    for record in (RECORD, other):
        ledger.add(record)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = Ledger(path)
        assert found.records == ({RECORD.run: RECORD} if length >= first else {})
        for record in (RECORD, other):
            if record.run not in found.records:
                found.add(record)
        assert path.read_bytes() == whole
    assert ledger.losses == {"a/seed1-x1": 2.0, "b/seed1-x1": math.inf}
    first_line = whole[:first]
    for broken in (
        b'{"run": "a"}',
        b"[1]",
        b"\xff",
        first_line.replace(b'"a/seed1-x1"', b"[]").strip(),
        first_line.replace(b"2.0", b"NaN").strip(),
        first_line.replace(b"5", b'"five"', 1).strip(),
    ):
        path.write_bytes(first_line + broken + b"\n")
        with pytest.raises(InputError, match="line 2: not a line of runs.jsonl"):
            Ledger(path)
        assert path.read_bytes() == first_line + broken + b"\n"


def test_another_meaning_of_an_arm_is_refused_and_more_seeds_are_not(tmp_path: Path) -> None:
    """Oracle: the message names arm and key."""
    save_arms(read_protocol(arms("a model.norm=layer")), tmp_path)
    check_same_arms(
        read_protocol(arms("base", "a model.norm=layer", "b optimizer.eps=1e-6"), seeds=9),
        tmp_path,
    )
    saved = tmp_path / "comparison.json"
    older = json.loads(saved.read_text())
    del older["arms"]["a"]["optimizer"]["eps"]  # written before the key was there
    saved.write_text(json.dumps(older))
    check_same_arms(read_protocol(arms("a model.norm=layer")), tmp_path)
    with pytest.raises(InputError, match="runs of arm a there have other settings: model.norm.eps"):
        changed = arms("a model.norm=layer model.norm.eps=1e-3")
        check_same_arms(read_protocol(changed), tmp_path)
    with pytest.raises(InputError, match="arm base there have other settings: training.steps"):
        check_same_arms(
            read_protocol(arms("a model.norm=layer", shared=["training.steps=9"])), tmp_path
        )


def test_each_run_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the environment that a slot's process is given."""
    monkeypatch.setenv("RANK", "3")
    two = Slots((4, 6), 8, 2)
    assert [two.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4", "6"]
    assert two.environment(0)["OMP_NUM_THREADS"] == "8" and "RANK" not in two.environment(0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert slots(2, "cpu") == Slots((), 4, 2)
    gpus = [GPU(index, "", "", "", 80000, used) for index, used in enumerate((0, 9000, 5))]
    monkeypatch.setattr(launch_file, "visible_gpus", lambda: gpus)
    assert slots(2, "auto").gpus == (0, 2) and slots(3, "auto", 2).gpus == (0, 2, 0)
    with pytest.raises(InputError, match="--parallel 3: 2 of 3 GPUs are free"):
        slots(3, "auto")
    with pytest.raises(InputError, match="--runs-per-gpu 2: there is no GPU"):
        slots(2, "cpu", 2)


def test_a_run_is_an_ordinary_command(tmp_path: Path) -> None:
    """Oracle: a real process that refuses a file, its exit code and its line in the log."""
    with (tmp_path / "log").open("wb") as log:
        process = launch(["nowhere.yaml"], log, os.environ)
        while (code := process.poll()) is None:
            time.sleep(0.02)
    assert code == 2
    assert (tmp_path / "log").read_text() == "llmnorm: error: nowhere.yaml: there is no such file\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (143, "was stopped by a signal of its own (exit code 143), and has saved: it ends so"),
        (75, "was stopped by a signal of its own (exit code 75), and has saved: it ends so"),
        (-9, "was killed by signal 9: it ends so"),
        (2, "failed (exit code 2): it ends so"),
        (70, "failed (exit code 70): it ends so"),
    ],
)
def test_a_run_that_gives_no_result_is_told_by_its_exit_code(
    tmp_path: Path, code: int, words: str
) -> None:
    """Oracle: the line by hand; the run is a process that only ends."""

    class Ended:
        def poll(self) -> int:
            return code

        def terminate(self) -> None:
            raise AssertionError

    def start(_: Sequence[str], log: IO[bytes], __: Mapping[str, str]) -> Ended:
        log.write(b"llmnorm: error: it ends so\n")
        return Ended()

    protocol = read_protocol(arms("a model.norm=layer"), seeds=1, lr_points=1)
    ledger, places = Ledger(tmp_path / "runs.jsonl"), Slots((), 1, 1)
    with pytest.raises(InputError) as caught:
        execute(protocol, ledger, tmp_path / "runs", places, lambda _: 0.0, start=start)
    assert f"run base/seed1-x1 {words}; its log is " in str(caught.value)
    assert "\n" not in str(caught.value) and not ledger.records


def test_a_run_uses_the_package_of_its_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the file that Python finds first on the PYTHONPATH which the run is given."""
    started: dict[str, Any] = {}
    monkeypatch.setattr(
        subprocess, "Popen", lambda words, **options: started.update(options, words=words)
    )
    with (tmp_path / "log").open("wb") as log:
        launch(["x.yaml"], log, {"PYTHONPATH": "elsewhere"})
    first, *rest = started["env"]["PYTHONPATH"].split(os.pathsep)
    assert Path(first, "llmnorm", "cli.py").samefile(str(cli.__file__)) and rest == ["elsewhere"]
    assert started["words"][1:] == ["-m", "llmnorm", "train", "x.yaml"]


# Real runs.

ARMS = ["rms", "same generation.top_k=7", "wild optimizer.lr=1e38", "layer model.norm=layer"]
# Nothing here depends on the size of the model.
SHARED = ["training.steps=10", "schedule=constant", "evaluation.samples=0"]
SHARED += ["model.num_hidden_layers=1", "model.hidden_size=32", "model.intermediate_size=64"]


def _comparison(directory: Path, data: Path, out: Path) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    # OpenMP's other threads would not be there in what is forked, and it would wait for them.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    given = [words.split() for words in ARMS]
    shared = [*SHARED, f"data.dir={data}"]
    protocol = read_protocol(read_arms(SMOKE, shared, given), seeds=2, lr_points=1)
    sys.exit(compare(protocol, directory, command="llmnorm compare", start=ForkedRun))


def start(directory: Path, data: Path) -> Any:
    log = directory.with_suffix(".log")
    process = CHILDREN.Process(target=_comparison, args=(directory, data, log))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Iterator[Path]:
    """A comparison that was not stopped."""
    directory = tmp_path_factory.mktemp("comparison") / "whole"
    process = start(directory, smoke_data)
    process.join(PATIENCE)
    assert process.exitcode == 0, directory.with_suffix(".log").read_text()
    yield directory


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key != "timing"}
    return tree


def found(directory: Path) -> dict[str, Any]:
    return without_times(json.loads((directory / "result.json").read_text()))


def test_a_part_that_changes_nothing_is_no_better_and_no_worse(whole: Path) -> None:
    """Oracle: the null hypothesis holds exactly: equal losses, a factor of 1."""
    result = found(whole)
    same = result["against"]["rms"]["same"]
    assert result["arms"]["same"]["losses"] == result["arms"]["rms"]["losses"]
    assert same["tokens"]["low"] <= 1 <= same["tokens"]["high"]
    assert same["tokens"]["value"] == 1 and same["verdict"] == "not resolved"
    assert result["against"]["rms"]["layer"]["gap"]["value"] != 0


def test_divergence_loses_and_is_named(whole: Path) -> None:
    """Oracle: an absurd learning rate."""
    result = found(whole)
    wild = result["against"]["rms"]["wild"]
    assert wild["verdict"] == "worse" and wild["tokens"]["value"] == 0
    assert result["arms"]["wild"]["diverged"] == ["wild/seed1-x1", "wild/seed2-x1"]
    report = (whole / "report.md").read_text()
    assert "wild: diverged, counted as infinite loss: wild/seed1-x1, wild/seed2-x1" in report
    assert "**wild** is worse" in report


def test_the_results_agree_with_the_runs_own_files(whole: Path) -> None:
    """Oracle: the last validation line of each run directory."""
    result = found(whole)
    for arm in ("rms", "layer"):
        for seed, loss in zip((1, 2), result["arms"][arm]["losses"], strict=True):
            lines = (whole / f"runs/{arm}/seed{seed}-x1/metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["validation"]["loss"] == loss
            assert not (whole / f"runs/{arm}/seed{seed}-x1/checkpoints").exists()
    rows = (whole / "table.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["same", "wild", "layer"]
    assert (whole / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_killed_in_the_middle_it_goes_on_to_the_same_report(
    whole: Path, tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the comparison that was not stopped; finished runs keep their lines."""
    directory = tmp_path / "killed"
    process = start(directory, smoke_data)
    ledger, third = directory / "runs.jsonl", directory / "runs/layer/seed1-x1"
    while not list(third.glob("checkpoints/step_*/MANIFEST.json")):  # the fourth run has begun
        assert process.is_alive(), directory.with_suffix(".log").read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    before = ledger.read_bytes()
    assert 1 <= before.count(b"\n") <= 4
    process = start(directory, smoke_data)
    fourth = directory / "runs/rms/seed2-x1"
    while not list(fourth.glob("checkpoints/step_*/MANIFEST.json")):
        assert process.is_alive(), directory.with_suffix(".log").read_text()
        time.sleep(0.005)
    process.terminate()  # the run saves before the comparison ends
    process.join(PATIENCE)
    assert process.exitcode == 128 + signal.SIGTERM
    assert (fourth / "PREEMPT").exists() or b'rms/seed2-x1"' in ledger.read_bytes()
    process = start(directory, smoke_data)
    process.join(PATIENCE)
    assert process.exitcode == 0, directory.with_suffix(".log").read_text()
    assert ledger.read_bytes().startswith(before)
    assert len(ledger.read_text().splitlines()) == len(
        (whole / "runs.jsonl").read_text().splitlines()
    )
    assert "going on from" in third.with_name(f"{third.name}.log").read_text()
    assert found(directory) == found(whole)
    for run in ("rms/seed2-x1.5", "layer/seed1-x1"):
        lines = [
            [
                {k: v for k, v in json.loads(line).items() if k not in TIMES}
                for line in (place / "runs" / run / "metrics.jsonl").read_text().splitlines()
            ]
            for place in (directory, whole)
        ]
        assert lines[0] == lines[1]
    shutil.rmtree(directory / "runs")  # the lines are enough
    process = start(directory, smoke_data)
    process.join(PATIENCE)
    assert process.exitcode == 0 and not (directory / "runs").exists()
    assert found(directory) == found(whole)
