"""A manifest with a right checksum is still refused where reading by it would go wrong."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm.config.manifest import (
    MANIFEST,
    Damaged,
    checksum_of,
    meta_of_run,
    read_manifest,
    steps_in,
)
from llmnorm.part import InputError
from tests.running import ROOT

OLD = ROOT / "tests/data/ae96d74/run/checkpoints/step_00000008"
FILE = "rank_00000.safetensors"
NAME = "model.model.embed_tokens.weight"


def forged(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint directory whose manifest was changed and given its checksum again."""
    manifest = copy.deepcopy(json.loads((OLD / MANIFEST).read_text(encoding="utf-8")))
    change(manifest)
    manifest["crc32"] = checksum_of(manifest)
    path = directory / "step_00000008"
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path


def of_tensor(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["tensors"][NAME].update(values)


def key(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update({name: value})


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a hole": (of_tensor(intervals={FILE: [0, 319]}), f"{NAME}.*no process gave rows .319, 320"),
    "no interval": (of_tensor(intervals={}), f"{NAME}.*no process gave rows .0, 320"),
    "rows that run back": (of_tensor(intervals={FILE: [0, 400]}), f"{NAME}.*there are no rows"),
    "a negative row": (of_tensor(intervals={FILE: [-1, 320]}), "must be at least 0, got -1"),
    "a row that is text": (of_tensor(intervals={FILE: ["0", 320]}), "intervals"),
    "three numbers": (of_tensor(intervals={FILE: [0, 1, 320]}), "intervals"),
    "an unknown dtype": (of_tensor(dtype="nope"), f"{NAME}.*dtype 'nope'"),
    "a negative size": (of_tensor(shape=[320, -32]), "must be at least 0, got -32"),
    "a size of 2**62": (of_tensor(shape=[320, 2**62]), f"files.{FILE}: is too small"),
    "a size that is no whole number": (of_tensor(shape=[320, 32.0]), "shape"),
    "another file": (of_tensor(intervals={"other.safetensors": [0, 320]}), "files does not list"),
    "a path": (key("files", {"../x.safetensors": {"bytes": 1, "crc32": "0" * 8}}), "files"),
    "a hidden file": (key("files", {".x.safetensors": {"bytes": 1, "crc32": "0" * 8}}), "files"),
    "no files": (lambda m: m.pop("files"), "files: is required"),
    "an unknown key": (key("more", 1), "more: unknown key"),
    "another step": (key("step", 9), "it is the checkpoint of step 9"),
    "a step that is true": (key("step", True), "step"),
    "a loss that is text": (key("validation_loss", "low"), "validation_loss"),
    "a meta that is a list": (key("meta", []), "meta"),
    "tensors that are a list": (key("tensors", []), "tensors"),
    "a format that is text": (key("format", "1"), "format"),
}


@pytest.mark.parametrize(("change", "what"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_forged_manifest_is_damage(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    """Oracle: what was forged; one line that names the file."""
    path = forged(tmp_path, change)
    with pytest.raises(Damaged, match=what) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_an_older_version_wrote_is_let_through(tmp_path: Path) -> None:
    """Oracle: the manifest of ae96d74, unchanged and with its checksum made anew."""
    assert read_manifest(OLD) == read_manifest(forged(tmp_path, lambda manifest: None))
    assert meta_of_run(OLD, read_manifest(OLD))["step"] == 8


def test_a_renamed_checkpoint_says_its_own_step(tmp_path: Path) -> None:
    """Oracle: a directory renamed by hand."""
    path = forged(tmp_path, lambda manifest: None).rename(tmp_path / "step_00000020")
    with pytest.raises(Damaged, match="was renamed: it is the checkpoint of step 8"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", None), ("tokens", "x"), ("model", []), ("data", "../x"), ("row", -1)],
)
def test_a_meta_that_no_run_has_written_is_one_line(tmp_path: Path, name: str, value: Any) -> None:
    """Oracle: the key that was changed, or taken away where the value is None."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["meta"][name] = value
        if value is None:
            del manifest["meta"][name]

    path = forged(tmp_path, change)
    with pytest.raises(InputError, match=f"meta.{name}") as caught:
        meta_of_run(path, read_manifest(path))
    assert "\n" not in str(caught.value)


def test_only_names_of_steps_are_checkpoints(tmp_path: Path) -> None:
    """Oracle: the names; a file in the place of the directory is not "no checkpoint"."""
    for name in ("step_00000008", "step_8", "step_000000009", "latest", "x", "step_00000020.bak"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [8]
    assert steps_in(tmp_path / "nowhere") == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="file: is no directory"):
        steps_in(tmp_path / "file")
