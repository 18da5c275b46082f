"""A run lives where its directory lies, and is not begun anew where its checkpoints are gone."""

import json
import shutil
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.checkpoints.format import read_checkpoint
from llmnorm.config.file import load
from llmnorm.part import InputError
from llmnorm.runs.directory import RunDirectory, agree, begin, free
from llmnorm.runs.signs import end, step_in
from tests.running import SMOKE, assert_same_run, metrics_of

QUICK = ["training.steps=4", "checkpoint.every=2", "evaluation.samples=0", "schedule=constant"]


def files_of(run: Path) -> dict[str, bytes]:
    """Every file below a run, by its path."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def train(*words: object) -> int:
    return cli.main(["train", *map(str, words)])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A finished run of 4 steps."""
    run = tmp_path_factory.mktemp("original") / "run"
    assert train(SMOKE, f"run_dir={run}", f"data.dir={smoke_data}", *QUICK) == 0
    return run


def test_a_copy_and_a_renamed_run_go_on_from_themselves(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the original's files, untouched; the same numbers under every name."""
    before = files_of(original)
    copy, renamed = tmp_path / "copy", tmp_path / "deep" / "renamed"
    shutil.copytree(original, copy)
    assert train(copy, "training.steps=6") == 0
    assert f"going on from {copy}/checkpoints/step_00000004" in capsys.readouterr().err
    assert files_of(original) == before
    shutil.copytree(original, tmp_path / "second")
    renamed.parent.mkdir()
    (tmp_path / "second").rename(renamed)
    assert train(renamed, "training.steps=6") == 0
    assert_same_run(copy, renamed, 6)
    assert not (tmp_path / "second").exists()


def test_nothing_in_a_run_remembers_its_path(original: Path) -> None:
    """Oracle: its own path, looked for in every file; the lock names a process, not a path."""
    assert not [name for name, text in files_of(original).items() if str(original).encode() in text]
    meta = read_checkpoint(original / "checkpoints" / "step_00000004").meta
    assert "run_dir" not in meta["config"]


def test_the_path_that_an_older_version_saved_is_ignored(tmp_path: Path, original: Path) -> None:
    """Oracle: the directory that is named; also through its config.yaml, and not for others."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"run_dir: {tmp_path}/elsewhere\n{text}")
    for path in (run, run / "config.yaml"):
        assert load(path).config.run_dir == run
        assert load(path, ["run_dir=other"]).config.run_dir == Path("other")
    assert train(run, "training.steps=5") == 0
    assert not (tmp_path / "elsewhere").exists() and step_in(run / "DONE") == 5
    (tmp_path / "config.yaml").write_text(f"run_dir: {tmp_path}/elsewhere\n{text}")
    assert load(tmp_path / "config.yaml").config.run_dir == tmp_path / "elsewhere"


def test_a_free_path_beside_the_working_directory_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: by hand."""
    monkeypatch.chdir(tmp_path)
    assert free(Path()) == tmp_path.with_name(f"{tmp_path.name}-2")
    assert free(Path("a")) == Path("a-2")


def begun(path: Path, *words: str) -> RunDirectory:
    """A run directory as the first process leaves it before its first step."""
    config = load(SMOKE, [f"run_dir={path}", *words]).config
    (path.parent / "tokenizer").mkdir(exist_ok=True)
    begin(RunDirectory(path), config, path.parent / "tokenizer")
    return RunDirectory(path)


def reaches(run: RunDirectory, step: int, *saved: int) -> None:
    """Write metrics up to a step, and the names of checkpoints."""
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in range(1, step + 1)]
    run.metrics.write_text("".join(f"{line}\n" for line in lines))
    for number in saved:
        (run.checkpoints / f"step_{number:08d}").mkdir(parents=True)


@pytest.mark.parametrize("mount", [False, True], ids=["gone", "empty"])
@pytest.mark.parametrize(
    ("sign", "every", "step", "saved"),
    [
        ("DONE", None, 60, 60),
        ("PREEMPT", None, 51, 51),
        (None, 5, 60, 55),  # killed: two intervals are not passed without a save
        ("DONE", 5, 60, 60),
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    tmp_path: Path, mount: bool, sign: str | None, every: int | None, step: int, saved: int
) -> None:
    """Oracle: one line that names the step and both ways on; the record as it was."""
    run = begun(tmp_path / "run", f"checkpoint.every={every or 'null'}", "training.steps=60")
    reaches(run, step)
    if sign:
        end(run.path / sign, step)
    if mount:
        run.checkpoints.mkdir()
    before = files_of(run.path)
    config = load(run.path, ["training.steps=70"]).config
    with pytest.raises(InputError) as caught:
        agree(config, going_on=True)
    message = str(caught.value)
    assert message.startswith(f"{run.checkpoints}: a checkpoint of step {saved} was written")
    assert f"run_dir={run.path}-2" in message and "metrics.jsonl there" in message
    assert "\n" not in message and files_of(run.path) == before
    for name in (sign, "metrics.jsonl"):  # what the message says: begins anew on purpose
        if name:
            (run.path / name).unlink()
    assert agree(config, going_on=True) == run


def test_a_run_whose_newest_checkpoint_is_gone_says_which(tmp_path: Path) -> None:
    """Oracle: by hand; PREEMPT is written after the save of its step."""
    run = begun(tmp_path / "run", "checkpoint.every=5")
    reaches(run, 51, 45, 50)
    end(run.preempted, 51)
    with pytest.raises(InputError, match="of step 51 was written .* newest is of step 50.*PREEMPT"):
        agree(load(run.path).config, going_on=True)


@pytest.mark.parametrize(("every", "step"), [(None, 60), (30, 60), (5, 10)])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    tmp_path: Path, every: int | None, step: int
) -> None:
    """Oracle: it is not refused; one asynchronous save may be under way for a whole interval."""
    run = begun(tmp_path / "run", f"checkpoint.every={every or 'null'}")
    reaches(run, step)
    assert agree(load(run.path).config, going_on=True) == run


def test_a_finished_run_is_finished_without_its_checkpoints(
    tmp_path: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: exit code 0 and the word; a longer run is refused."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    shutil.rmtree(run / "checkpoints")
    before = metrics_of(run)
    assert train(run) == 0 and "is finished (step 4)" in capsys.readouterr().out
    assert train(run, "training.steps=9") == 2
    assert "a checkpoint of step 4 was written (DONE)" in capsys.readouterr().err
    assert metrics_of(run) == before


def test_a_run_without_its_config_is_not_begun_anew(
    tmp_path: Path, original: Path, smoke_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one line, and the files as they were."""
    run = tmp_path / "run"
    shutil.copytree(original, run)
    (run / "config.yaml").unlink()
    before = files_of(run)
    assert train(SMOKE, f"run_dir={run}", f"data.dir={smoke_data}", *QUICK) == 2
    assert "has checkpoints, but no config.yaml; bring it back" in capsys.readouterr().err
    assert files_of(run) == before


@pytest.mark.parametrize("text", [b"", b"\x00\x00", b"x\n", b"-3", "٣".encode()])
def test_a_sign_without_a_number_is_no_step(tmp_path: Path, text: bytes) -> None:
    """Oracle: None; a damaged sign stops nothing."""
    (tmp_path / "DONE").write_bytes(text)
    assert step_in(tmp_path / "DONE") is None
    assert step_in(tmp_path) is None
