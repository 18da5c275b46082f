"""Checkpoints in one process: finding, falling back, keeping, failing, in the background."""

import errno
import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmnorm.checkpoints import checkpoints as module
from llmnorm.checkpoints import store
from llmnorm.checkpoints.checkpoints import Checkpoint, Checkpoints, Interval
from llmnorm.checkpoints.format import checksum
from llmnorm.config.manifest import checksum_of
from llmnorm.part import InputError
from tests.running import PATIENCE

FILE = "rank_00000.safetensors"


def state(step: int) -> dict[str, torch.Tensor]:
    """A model and its optimizer that are a function of the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(8, 4, generator=generator),
        "model.norm": torch.randn(4, generator=generator).bfloat16(),
        "optimizer.weight.step": torch.tensor(float(step)),
    }


def saved(directory: Path, *steps: int, **settings: Any) -> Checkpoints:
    checkpoints = Checkpoints(directory, **settings)
    for step in steps:
        checkpoints.save(step, state(step), {"tokens": 100 * step})
    checkpoints.wait()
    return checkpoints


def newest(checkpoints: Checkpoints) -> Checkpoint:
    """There is one."""
    found = checkpoints.newest()
    assert found is not None
    return found


def holds(checkpoints: Checkpoints, found: Checkpoint, step: int) -> bool:
    """Whether this is the checkpoint of `step`, every bit of it."""
    into = {name: torch.full_like(tensor, 9) for name, tensor in state(0).items()}
    checkpoints.load(found, into)
    assert found.meta == {"tokens": 100 * step, "step": step, "validation_loss": None}
    return all(into[name].equal(tensor) for name, tensor in state(step).items())


def leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


# Finding


def test_what_was_saved_is_found_and_loaded(tmp_path: Path) -> None:
    """Oracle: the state as a function of its step."""
    checkpoints = saved(tmp_path / "run" / "checkpoints", 10, 20)
    assert holds(checkpoints, newest(checkpoints), 20)
    assert holds(checkpoints, checkpoints.find(10), 10)
    assert holds(checkpoints, checkpoints.find("10"), 10)
    assert newest(checkpoints).path.name == "step_00000020"
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000020\n"
    assert leftovers(tmp_path / "run" / "checkpoints") == []


def test_meta_comes_back_as_json_says_it(tmp_path: Path) -> None:
    """Oracle: JSON's own round trip; a number keeps its last bit."""
    meta = {"tokens": 2**60, "loss": 0.1 + 0.2, "config": {"a": [1, None, "é\u2028"]}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"x": torch.zeros(1)}, meta, validation_loss=1 / 3)
    expected = {**json.loads(json.dumps(meta)), "step": 3, "validation_loss": 1 / 3}
    assert newest(checkpoints).meta == expected


def test_what_json_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Oracle: the directory's names."""
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(TypeError):
        checkpoints.save(2, state(2), {"config": Path()})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


@pytest.mark.parametrize(
    ("which", "what"),
    [
        (15, "no checkpoint of step 15; nearest: 10, 20, 30"),
        ("lastest", "did you mean 'latest'?"),
        ("-1", "valid: latest, best, a step"),
        ("best", "no checkpoint has a validation loss; valid: latest, 10, 20, 30"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    tmp_path: Path, which: str | int, what: str
) -> None:
    """Oracle: the steps that were saved."""
    checkpoints = saved(tmp_path, 10, 20, 30, keep=3)
    with pytest.raises(InputError) as caught:
        checkpoints.find(which)
    assert what in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_without_checkpoints_says_so(tmp_path: Path) -> None:
    """Oracle: nothing was ever saved."""
    checkpoints = Checkpoints(tmp_path / "missing")
    assert checkpoints.steps() == [] and checkpoints.newest() is None
    with pytest.raises(InputError, match="there is no checkpoint yet"):
        checkpoints.find("latest")
    assert not (tmp_path / "missing").exists()


def test_a_checkpoint_with_more_than_was_asked_for(tmp_path: Path) -> None:
    """Oracle: the names that were saved."""
    checkpoints = saved(tmp_path, 1)
    into = {"model.weight": torch.zeros(8, 4)}
    with pytest.raises(InputError, match="2 tensors that are not loaded: model.norm, optim"):
        checkpoints.load(newest(checkpoints), into)
    assert not into["model.weight"].any()


# Damage


def truncate(path: Path) -> None:
    os.truncate(path / FILE, (path / FILE).stat().st_size - 1)


def append(path: Path) -> None:
    with open(path / FILE, "ab") as file:
        file.write(b"x")


def flip(path: Path) -> None:
    content = bytearray((path / FILE).read_bytes())
    content[-3] ^= 4
    (path / FILE).write_bytes(content)


def half_deleted(path: Path) -> None:
    (path / "MANIFEST.json").unlink()
    (path / FILE).unlink()


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, f"step_00000030/{FILE} is truncated"),
    (append, f"step_00000030/{FILE} is too long"),
    (flip, f"step_00000030/{FILE} is damaged (its checksum differs)"),
    (lambda path: (path / FILE).unlink(), f"step_00000030/{FILE} is missing"),
    (lambda path: (path / "MANIFEST.json").unlink(), "step_00000030/MANIFEST.json is missing"),
    (lambda path: os.truncate(path / "MANIFEST.json", 50), "MANIFEST.json is damaged"),
    (half_deleted, "step_00000030/MANIFEST.json is missing"),
]


@pytest.mark.parametrize(("damage", "what"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], what: str
) -> None:
    """Oracle: damage done by hand to the newest of three."""
    checkpoints = saved(tmp_path, 10, 20, 30, keep=3)
    damage(tmp_path / "step_00000030")
    assert holds(checkpoints, newest(checkpoints), 20)
    (message,) = caplog.messages
    assert what in message and "going back to step 20" in message
    with pytest.raises(InputError) as caught:
        checkpoints.find(30)
    assert what in str(caught.value)
    assert "the nearest whole checkpoint is of step 20" in str(caught.value)


def test_two_damaged_checkpoints_are_both_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: damage done by hand to two of three, then to the third."""
    checkpoints = saved(tmp_path, 10, 20, 30, keep=3)
    flip(tmp_path / "step_00000030")
    truncate(tmp_path / "step_00000020")
    assert holds(checkpoints, newest(checkpoints), 10)
    assert "step_00000030" in caplog.text and "step_00000020" in caplog.text
    flip(tmp_path / "step_00000010")
    with pytest.raises(InputError, match="_00000030.*_00000020.*_00000010.*no checkpoint is whole"):
        newest(checkpoints)


def test_a_dangling_latest_is_named_and_does_no_harm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the directory that `latest` names was removed by hand."""
    checkpoints = saved(tmp_path, 10, 20)
    shutil.rmtree(tmp_path / "step_00000020")
    assert holds(checkpoints, newest(checkpoints), 10)
    assert "latest names 'step_00000020', which is not there" in caplog.text


def test_a_damaged_step_is_written_anew_and_a_whole_one_is_left(tmp_path: Path) -> None:
    """Oracle: the inode of the file."""
    checkpoints = saved(tmp_path, 10, 20)
    file = tmp_path / "step_00000020" / FILE
    before = file.stat().st_ino
    checkpoints.save(20, state(20), {"tokens": 2000})
    assert file.stat().st_ino == before
    flip(tmp_path / "step_00000020")
    checkpoints.save(20, state(20), {"tokens": 2000})
    assert holds(checkpoints, checkpoints.find(20), 20)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_step_that_is_saved_again_takes_over_its_validation_loss(
    tmp_path: Path, asynchronous: bool
) -> None:
    """Oracle: losses given by hand; bytes and checksums of the files are as they were."""
    checkpoints = saved(tmp_path, 10, 20, 30, keep=3, asynchronous=asynchronous)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    checkpoints.save(20, state(20), {"tokens": 7}, validation_loss=1.5)
    checkpoints.save(30, state(30), {"tokens": 7}, validation_loss=2.5)
    assert checkpoints.find("best").meta == {"tokens": 2000, "step": 20, "validation_loss": 1.5}
    assert checkpoints.find(30).meta == {"tokens": 3000, "step": 30, "validation_loss": 2.5}
    checkpoints.save(20, state(20), {})
    assert checkpoints.find("best").meta["validation_loss"] == 1.5
    checkpoints.save(20, state(20), {}, validation_loss=3.5)
    assert checkpoints.find("best").meta["step"] == 30
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == files
    assert leftovers(tmp_path) == []


def test_a_loss_that_comes_later_decides_what_is_kept(tmp_path: Path) -> None:
    """Oracle: the rule of `keep_best` applied by hand; 20 becomes the best by its second save."""
    checkpoints = Checkpoints(tmp_path, keep_best=True)
    checkpoints.save(10, {"x": torch.zeros(2)}, {}, validation_loss=2.0)
    checkpoints.save(20, {"x": torch.zeros(2)}, {})
    checkpoints.save(20, {"x": torch.zeros(2)}, {}, validation_loss=1.0)
    for step in (30, 40):
        checkpoints.save(step, {"x": torch.zeros(2)}, {})
    assert checkpoints.steps() == [20, 30, 40]


def test_a_step_that_could_not_be_read_for_a_while_takes_over_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an input/output error while the run resumes that is gone when step 20 comes again."""
    saved(tmp_path, 10, 20)
    checkpoints = Checkpoints(tmp_path)

    def unreadable(file: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(
            "llmnorm.checkpoints.format.checksum",
            lambda file: unreadable(file) if "_00000020" in str(file) else checksum(file),
        )
        assert holds(checkpoints, newest(checkpoints), 10)
    checkpoints.save(20, state(20), {"tokens": 2000}, validation_loss=1.5)
    assert newest(checkpoints).meta["validation_loss"] == 1.5
    assert Checkpoints(tmp_path).find("best").meta["step"] == 20


@pytest.mark.parametrize("step", [20, 23])
def test_the_last_good_weights_are_saved_at_a_skipped_step(tmp_path: Path, step: int) -> None:
    """Oracle: the state of step 20, saved once more under its own step or that of the skip."""
    checkpoints = saved(tmp_path, 10, 20)
    meta = {"tokens": 2000, "skipped_in_a_row": 3}
    checkpoints.save(step, state(20), meta)
    found = newest(checkpoints)
    into = {name: torch.full_like(tensor, 9) for name, tensor in state(0).items()}
    checkpoints.load(found, into)
    assert found.meta["step"] == step
    assert all(into[name].equal(tensor) for name, tensor in state(20).items())


def test_damage_at_any_place_is_found_and_nothing_whole_is_lost(tmp_path: Path) -> None:
    """Oracle: the state as a function of its step; 200 damages drawn with a fixed seed.

    The newest checkpoint is damaged; the one before it is used and said, and no other file changes.
    """
    place = tmp_path / "checkpoints"
    saved(place, 10, 20, 30, keep=3)
    whole = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    victims = sorted(p for p in whole if "step_00000030" in str(p))
    rng = random.Random(5)
    for _ in range(200):
        victim = rng.choice(victims)
        kind = damaged(victim, rng)
        others = {p: p.read_bytes() for p in whole if p != victim}
        checkpoints = Checkpoints(place, keep=3)
        checkpoints.clean()
        with warnings_of("llmnorm.checkpoints") as said:
            found = newest(checkpoints)
        if found.path.name != "step_00000030":  # flipping a blank of the manifest means nothing
            assert any("step_00000030" in line and "going back to step 20" in line for line in said)
        assert holds(checkpoints, found, found.meta["step"]), (victim.name, kind)
        assert {p: p.read_bytes() for p in others} == others, (victim.name, kind)
        if victim.is_dir():
            victim.rmdir()
        victim.unlink(missing_ok=True)
        victim.write_bytes(whole[victim])


def damaged(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "more", "gone", "directory", "pipe", "loop", "empty"])
    match kind:
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        case "cut":
            os.truncate(file, rng.randrange(len(content)))
        case "more":
            file.write_bytes(content + rng.randbytes(3))
        case "empty":
            os.truncate(file, 0)
        case _:
            file.unlink()
            if kind == "directory":
                file.mkdir()
            elif kind == "pipe":
                os.mkfifo(file)
            elif kind == "loop":
                file.symlink_to(file.name)
    return kind


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """The texts that a logger is given."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("how", ["file", "pipe", "directory", "loop"])
@pytest.mark.parametrize("name", ["latest", "step_00000030"])
def test_names_of_ours_that_are_something_else_do_no_harm(
    tmp_path: Path, name: str, how: str
) -> None:
    """Oracle: step 20 is found; step 30 is saved in its place; 10 and 20 stay."""
    checkpoints = saved(tmp_path, 10, 20, keep=3)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    match how:
        case "file":
            path.write_text("x", encoding="utf-8")
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(name)
    assert holds(checkpoints, newest(checkpoints), 20)
    checkpoints.save(30, state(30), {"tokens": 3000})
    assert holds(checkpoints, newest(checkpoints), 30)
    assert checkpoints.steps() == [10, 20, 30]


def test_a_file_in_the_place_of_the_checkpoints_is_not_no_checkpoint(tmp_path: Path) -> None:
    """Oracle: one line, where a run would else begin at its first step."""
    (tmp_path / "checkpoints").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="checkpoints: is no directory"):
        Checkpoints(tmp_path / "checkpoints").newest()


def test_a_file_that_holds_other_rows_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    """Oracle: a forged manifest; one row copied into eight would fill them all."""
    checkpoints = saved(tmp_path, 10)
    file = tmp_path / "step_00000010" / FILE
    tensors = load_file(file)
    save_file({**tensors, "model.weight": tensors["model.weight"][:1].clone()}, file)
    manifest = json.loads((file.parent / "MANIFEST.json").read_text(encoding="utf-8"))
    manifest["files"][FILE] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
    manifest["crc32"] = checksum_of(manifest)
    (file.parent / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match="the manifest says that 'model.weight' is float32"):
        holds(checkpoints, newest(checkpoints), 10)


# Keeping


def kept(directory: Path, losses: dict[int, float | None], **settings: Any) -> list[int]:
    checkpoints = Checkpoints(directory, **settings)
    for step, loss in losses.items():
        checkpoints.save(step, {"x": torch.zeros(2)}, {}, validation_loss=loss)
        for whole in checkpoints.steps():
            checkpoints.find(whole)
        assert len(checkpoints.steps()) >= min(2, sum(s <= step for s in losses))
    return checkpoints.steps()


NAN = float("nan")
LOSSES: dict[int, float | None] = {10: NAN, 20: 1.0, 30: 2.0, 40: 1.5, 50: None, 60: 3.0}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [50, 60]),
        ({"keep": 4}, [30, 40, 50, 60]),
        ({"keep_every": 30}, [30, 50, 60]),
        ({"keep_best": True}, [20, 50, 60]),
        ({"keep": 3, "keep_every": 20, "keep_best": True}, [20, 40, 50, 60]),
    ],
)
def test_what_is_kept(tmp_path: Path, settings: dict[str, Any], steps: list[int]) -> None:
    """Oracle: the rules applied by hand to six saves."""
    assert kept(tmp_path, LOSSES, **settings) == steps
    assert leftovers(tmp_path) == []


def test_the_best_is_that_of_the_lowest_loss_and_of_equal_ones_the_newest(tmp_path: Path) -> None:
    """Oracle: losses given by hand."""
    kept(tmp_path, LOSSES, keep=6)
    assert Checkpoints(tmp_path).find("best").path.name == "step_00000020"
    Checkpoints(tmp_path, keep=9).save(70, {"x": torch.zeros(2)}, {}, validation_loss=1.0)
    assert Checkpoints(tmp_path).find("best").path.name == "step_00000070"
    flip(tmp_path / "step_00000070")
    with pytest.raises(InputError, match="the nearest whole checkpoint is of step 60"):
        Checkpoints(tmp_path).find("best")


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path: Path) -> None:
    """Oracle: two whole ones must stay; of four, two were damaged by hand."""
    saved(tmp_path, 10, 20, 30, 40, keep=4)
    (tmp_path / "step_00000020" / "MANIFEST.json").unlink()
    flip(tmp_path / "step_00000040")
    checkpoints = Checkpoints(tmp_path)
    assert newest(checkpoints).path.name == "step_00000030"
    checkpoints.save(35, state(35), {})
    assert checkpoints.steps() == [30, 35, 40]  # 40 is not whole, and newer: it stays for now
    checkpoints.save(40, state(40), {"tokens": 4000})
    assert checkpoints.steps() == [35, 40]
    assert holds(checkpoints, newest(checkpoints), 40)


def test_a_flipped_bit_that_find_saw_is_remembered_when_others_are_removed(tmp_path: Path) -> None:
    """Oracle: of 10, 20, 30 (flipped by hand) and 40 the newest two whole ones are 20 and 40."""
    saved(tmp_path, 10, 20, 30, keep=3)
    flip(tmp_path / "step_00000030")
    checkpoints = Checkpoints(tmp_path)
    assert newest(checkpoints).path.name == "step_00000020"
    checkpoints.save(40, state(40), {})
    assert checkpoints.steps() == [20, 40]


def test_damaged_ones_stay_until_two_whole_ones_are_there(tmp_path: Path) -> None:
    """Oracle: somebody may want to rescue what can be read of the only others."""
    saved(tmp_path, 10, 20)
    for step in ("10", "20"):
        (tmp_path / f"step_000000{step}" / "MANIFEST.json").unlink()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(30, state(30), {})
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(40, state(40), {})
    assert checkpoints.steps() == [30, 40]


def test_a_removal_that_fails_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: an operating system that refuses to rename anything into the trash."""
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".trash-" in str(target):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    checkpoints = saved(tmp_path, 10, 20, 30)
    assert checkpoints.steps() == [10, 20, 30]
    assert "step_00000010: cannot be removed (Permission denied)" in caplog.text


def test_clean_removes_what_dead_saves_left_and_nothing_else(tmp_path: Path) -> None:
    """Oracle: names made by hand."""
    checkpoints = saved(tmp_path, 10)
    (tmp_path / ".tmp-step_00000020-0123abcd").mkdir()
    (tmp_path / ".tmp-step_00000020-0123abcd" / FILE).write_bytes(b"half")
    (tmp_path / ".trash-step_00000005-0123abcd").mkdir()
    (tmp_path / ".tmp-latest").write_text("step_00000020\n")
    (tmp_path / "notes.txt").write_text("mine")
    assert newest(checkpoints).path.name == "step_00000010"
    checkpoints.clean()
    assert sorted(os.listdir(tmp_path)) == ["latest", "notes.txt", "step_00000010"]


# Failing


def test_intervals_that_do_not_tile_leave_no_trace(tmp_path: Path) -> None:
    """Oracle: the directory's names before and after."""
    checkpoints = saved(tmp_path, 10)
    hole = {"x": Interval(torch.zeros(2, 3), 0, (4, 3))}
    with pytest.raises(ValueError, match=r"'x': no process gave rows \[2, 4\) of 4"):
        checkpoints.save(20, hole, {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000010"]


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """Oracle: a file stands where the run directory should be."""
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError) as caught:
        Checkpoints(tmp_path / "run" / "checkpoints").save(1, state(1), {})
    assert "run/checkpoints: the checkpoint of step 1 was not saved: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_at_any_call_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Oracle: the n-th call that touches the disk fails, for every n until a save comes through."""
    directory = tmp_path / "checkpoints"
    checkpoints = saved(directory, 10, asynchronous=asynchronous)
    real = {name: getattr(os, name) for name in ("mkdir", "fsync", "rename", "replace")}
    counted, fail_at = 0, 0

    def failing(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[name](*arguments, **settings)

        return call

    for name in real:
        monkeypatch.setattr(os, name, failing(name))
    while fail_at < 100:
        counted, fail_at = 0, fail_at + 1
        try:
            checkpoints.save(20, state(20), {"tokens": 2000})
            checkpoints.wait()
            break
        except InputError as error:
            assert "step 20 was not saved: No space left on device" in str(error)
        assert leftovers(directory) == []
        whole = newest(checkpoints)
        named = int((directory / "latest").read_text().strip()[5:])
        assert holds(checkpoints, whole, whole.meta["step"])
        assert holds(checkpoints, checkpoints.find(named), named)
        if whole.meta["step"] == 20:  # the failure came after the rename: it is whole
            shutil.rmtree(whole.path)
            (directory / "latest").write_text("step_00000010\n")
    assert fail_at > 8 and holds(checkpoints, newest(checkpoints), 20)


def test_half_a_file_and_then_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what safetensors says of a full disk, after half of its bytes."""
    checkpoints = saved(tmp_path, 10)

    def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        from safetensors import SafetensorError

        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("llmnorm.checkpoints.format.save_file", half)
    with pytest.raises(
        InputError, match="step 20 was not saved: No space left on device; the ones"
    ):
        checkpoints.save(20, state(20), {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000010"]
    assert holds(checkpoints, newest(checkpoints), 10)


def test_everything_is_on_the_disk_before_the_name_that_promises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the order that a crash of the machine asks for, written down by hand."""
    checkpoints = saved(tmp_path, 10, 20)
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
    calls: list[str] = []

    def short(path: Any) -> str:
        name = Path(path).relative_to(tmp_path).as_posix()
        return name[: -len("-01234567")] if Path(path).name.startswith((".tmp-s", ".tra")) else name

    def fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        path = next(p for p in (tmp_path, *tmp_path.rglob("*")) if p.stat().st_ino == inode)
        inside = path.relative_to(tmp_path).parts
        calls.append("fsync " + (f".tmp/{inside[1]}" if len(inside) > 1 else short(path)))
        real["fsync"](descriptor)

    def move(kind: str) -> Callable[[Any, Any], None]:
        def call(source: Any, target: Any) -> None:
            calls.append(f"{kind} {short(source)} {short(target)}")
            real[kind](source, target)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", move("rename"))
    monkeypatch.setattr(os, "replace", move("replace"))
    checkpoints.save(30, state(30), {})
    assert calls == [
        f"fsync .tmp/{FILE}",
        "fsync .tmp/MANIFEST.json",
        "fsync .tmp-step_00000030",
        "fsync .tmp-latest",
        "rename .tmp-step_00000030 step_00000030",
        "fsync .",
        "replace .tmp-latest latest",
        "fsync .",
        "rename step_00000010 .trash-step_00000010",
    ]


# In the background


class Gate:
    """Holds the writing thread back until it is opened, and notes what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.addresses: list[dict[str, int]] = []
        self.failure: Exception | None = None
        real = module.write_file

        def write_file(path: Path, parts: dict[str, Interval]) -> Any:
            assert self.open.wait(timeout=PATIENCE)
            self.addresses.append({name: part.tensor.data_ptr() for name, part in parts.items()})
            if self.failure is not None:
                raise self.failure
            return real(path, parts)

        monkeypatch.setattr(module, "write_file", write_file)


def test_what_happens_after_save_returned_does_not_leak_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the state at the time of the call; nothing was written yet when it is destroyed."""
    gate = Gate(monkeypatch)
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    live, meta = state(10), {"tokens": 1000, "nested": [1]}
    checkpoints.save(10, live, meta)
    for tensor in live.values():
        tensor.zero_()
    meta["nested"].append(2)  # type: ignore[attr-defined]
    assert checkpoints.steps() == []
    gate.open.set()
    found = newest(checkpoints)  # waits
    into = {name: torch.full_like(tensor, 9) for name, tensor in live.items()}
    checkpoints.load(found, into)
    assert found.meta["nested"] == [1]
    assert all(into[name].equal(tensor) for name, tensor in state(10).items())


def test_the_buffers_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the addresses that are written from; a tensor that has grown gets a new one."""
    gate = Gate(monkeypatch)
    gate.open.set()
    checkpoints = saved(tmp_path, 10, 20, asynchronous=True)
    assert gate.addresses[0] == gate.addresses[1]
    checkpoints.save(30, {**state(30), "model.norm": torch.ones(5)}, {})
    checkpoints.wait()
    assert gate.addresses[2]["model.weight"] == gate.addresses[0]["model.weight"]
    into = {**state(0), "model.norm": torch.zeros(5)}
    checkpoints.load(newest(checkpoints), into)
    assert into["model.norm"].equal(torch.ones(5))


@pytest.mark.parametrize("meet", ["save", "wait", "find"])
def test_an_error_in_the_background_is_raised_at_the_next_call_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet: str
) -> None:
    """Oracle: a disk that is full for one save."""
    gate = Gate(monkeypatch)
    gate.open.set()
    checkpoints = saved(tmp_path, 10, asynchronous=True)
    gate.failure = OSError(errno.ENOSPC, "No space left on device")
    checkpoints.save(20, state(20), {})
    calls = {
        "save": lambda: checkpoints.save(30, state(30), {}),
        "wait": checkpoints.wait,
        "find": checkpoints.newest,
    }
    with pytest.raises(InputError, match="step 20 was not saved: No space left on device"):
        calls[meet]()
    gate.failure = None
    assert checkpoints.steps() == [10]
    checkpoints.save(30, state(30), {"tokens": 3000})
    assert holds(checkpoints, newest(checkpoints), 30)


def test_one_save_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the second call returns only after the first checkpoint is there."""
    gate = Gate(monkeypatch)
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(10, state(10), {})
    second = threading.Thread(target=lambda: checkpoints.save(20, state(20), {}))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive() and checkpoints.steps() == []
    gate.open.set()
    second.join(timeout=PATIENCE)
    assert 10 in checkpoints.steps()
    checkpoints.wait()
    assert checkpoints.steps() == [10, 20]


def test_milestones_of_a_long_run_cost_no_whole_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files that are read in full during a save: its own, and no other."""
    checkpoints = saved(tmp_path, 10, 20, 30, keep_every=10)
    read: list[Path] = []
    real = store.check_file

    def check_file(file: Path, recorded: Any, *, contents: bool) -> None:
        if contents:
            read.append(file)
        real(file, recorded, contents=contents)

    monkeypatch.setattr("llmnorm.checkpoints.format.check_file", check_file)
    checkpoints.save(40, state(40), {})
    assert checkpoints.steps() == [10, 20, 30, 40] and read == []
