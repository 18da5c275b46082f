"""One checkpoint directory: what is written comes back bit for bit, whoever cut it how."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.checkpoints import format as module
from llmnorm.checkpoints.format import (
    Interval,
    as_interval,
    as_text,
    check_files,
    check_names,
    copy_into,
    make_manifest,
    read_checkpoint,
    write_file,
)
from llmnorm.config.manifest import MANIFEST, Damaged
from llmnorm.part import InputError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes: nan equals nan here, and -0 does not equal 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bits(one).equal(bits(other))


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bit pattern (of bool: 0 and 1), nans and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return (
        torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        .view(dtype)
        .reshape(shape)
    )


def write(path: Path, writers: list[dict[str, torch.Tensor | Interval]]) -> dict[str, object]:
    """A checkpoint by several writers, without the processes."""
    path.mkdir(exist_ok=True)
    reports = []
    for rank, state in enumerate(writers):
        parts = {name: as_interval(value) for name, value in state.items()}
        reports.append(write_file(path / f"rank_{rank:05d}.safetensors", parts))
    manifest = make_manifest(7, {"tokens": 1}, None, reports)
    (path / MANIFEST).write_text(as_text(manifest))
    return manifest


def read(path: Path, into: dict[str, torch.Tensor | Interval]) -> None:
    checkpoint = read_checkpoint(path)
    check_names(checkpoint, into)
    copy_into(checkpoint, into)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (2, 3, 4), (0,), (0, 4), (4, 0)], ids=str)
def test_a_tensor_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Oracle: the bytes that were saved."""
    before = noise(shape, dtype)
    write(tmp_path, [{"x": before}])
    after = torch.zeros(shape, dtype=dtype)
    read(tmp_path, {"x": after})
    assert same(after, before)


def test_strided_overlapping_and_tied_tensors_come_back(tmp_path: Path) -> None:
    """Oracle: the values that the tensors had; `save_file` alone refuses all of these."""
    base = torch.randn(6, 4, 2)
    state = {
        "base": base,
        "tied": base,
        "transposed": base.transpose(0, 2),
        "every_other": base[::2],
        "overlapping": base.view(-1)[3:20],
        "expanded": torch.randn(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(base[2]),
    }
    write(tmp_path, [dict(state)])
    into = {name: torch.full(value.shape, torch.nan) for name, value in state.items()}
    read(tmp_path, dict(into))
    assert all(same(into[name], value) for name, value in state.items())


def test_what_can_be_written_in_place_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the addresses that `save_file` is handed, against those of the state."""
    handed = {}

    def spy(tensors: dict[str, torch.Tensor], path: Path) -> None:
        handed.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        path.touch()

    monkeypatch.setattr("llmnorm.checkpoints.format.save_file", spy)
    stack = torch.randn(3, 4, 5)
    state = {"plain": torch.randn(8), "stack.0": stack[0], "stack.1": stack[1], "stack.2": stack[2]}
    write_file(tmp_path / "x", {name: as_interval(value) for name, value in state.items()})
    assert handed == {name: value.data_ptr() for name, value in state.items()}


@st.composite
def cuts(draw: st.DrawFn, rows: int) -> list[tuple[int, int]]:
    """`rows` cut into 1 to 5 intervals, empty ones among them."""
    inner = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
    return list(zip([0, *inner], [*inner, rows], strict=True))


@given(data=st.data(), rows=st.integers(0, 9), columns=st.integers(0, 3))
def test_any_readers_read_what_any_writers_wrote(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, columns: int
) -> None:
    """Oracle: the full tensors, sliced by the readers' own intervals."""
    path = tmp_path_factory.mktemp("checkpoint")
    full = {"matrix": torch.randn(rows, columns), "vector": noise((rows,), torch.bfloat16)}
    written = {name: data.draw(cuts(rows), label=f"writers of {name}") for name in full}
    writers: list[dict[str, torch.Tensor | Interval]] = [{} for _ in range(5)]
    for name, intervals in written.items():
        order = data.draw(st.permutations(range(5)))
        for rank, (start, stop) in zip(order, intervals, strict=False):
            shape = tuple(full[name].shape)
            writers[rank][name] = Interval(full[name][start:stop], start, shape)
    write(path, writers)
    for name, tensor in full.items():
        for start, stop in data.draw(cuts(rows), label=f"readers of {name}"):
            mine = torch.full_like(tensor[start:stop], torch.nan)
            read(path, {name: Interval(mine, start, tuple(tensor.shape))})
            assert same(mine, tensor[start:stop])


def test_a_writer_that_has_no_rows_writes_no_file(tmp_path: Path) -> None:
    """Oracle: the directory; one row, cut for two processes."""
    full = torch.randn(1, 4)
    writers: list[dict[str, torch.Tensor | Interval]] = [
        {"x": full},
        {"x": Interval(full[1:], 1, (1, 4))},
    ]
    write(tmp_path, writers)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, "rank_00000.safetensors"]


@pytest.mark.parametrize(
    ("intervals", "what"),
    [
        ([(0, 3), (4, 6)], "no process gave rows [3, 4) of 6"),
        ([(1, 6)], "no process gave rows [0, 1) of 6"),
        ([(0, 5)], "no process gave rows [5, 6) of 6"),
        ([(0, 4), (3, 6)], "two processes gave rows [3, 4) of 6"),
        ([(0, 6), (0, 6)], "two processes gave rows [0, 6) of 6"),
        ([(0, 6), (6, 8)], "there are no rows [6, 8) of 6"),
    ],
)
def test_intervals_that_do_not_tile_are_refused(
    tmp_path: Path, intervals: list[tuple[int, int]], what: str
) -> None:
    """Oracle: the rows that are missing or doubled, counted by hand."""
    writers: list[dict[str, torch.Tensor | Interval]] = [
        {"x": Interval(torch.zeros(stop - start, 2), start, (6, 2))} for start, stop in intervals
    ]
    with pytest.raises(ValueError, match="checkpoint key 'x'") as caught:
        write(tmp_path, writers)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "other", [torch.zeros(3, 2).double(), torch.zeros(3, 3)], ids=["dtype", "shape"]
)
def test_writers_that_disagree_are_refused(tmp_path: Path, other: torch.Tensor) -> None:
    """Oracle: the second writer's dtype or shape differs."""
    first = Interval(torch.zeros(3, 2), 0, (6, 2))
    second = Interval(other, 3, (6, *other.shape[1:]))
    with pytest.raises(ValueError, match="checkpoint key 'x': .* in rank_00001"):
        write(tmp_path, [{"x": first}, {"x": second}])


@pytest.mark.parametrize(
    ("into", "what"),
    [
        ({"y": torch.ones(6, 2)}, "holds no tensor 'y'"),
        ({"model.weigth": torch.ones(6, 2)}, "did you mean 'model.weight'?"),
        ({"model.weight": torch.ones(6, 3)}, r"is float32 (6, 2) in the checkpoint"),
        ({"model.weight": torch.ones(6, 2).bfloat16()}, r"bfloat16 (6, 2) here"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, into: dict[str, torch.Tensor], what: str
) -> None:
    """Oracle: the key, dtype and shape that were saved; nothing is copied, or cast."""
    write(tmp_path, [{"model.weight": torch.zeros(6, 2)}])
    with pytest.raises(InputError) as caught:
        read(tmp_path, dict(into))
    assert what in str(caught.value) and "\n" not in str(caught.value)
    assert all(bool((tensor == 1).all()) for tensor in into.values())


def test_loading_keeps_the_tensors_and_lets_go_of_the_file(tmp_path: Path) -> None:
    """Oracle: addresses before and after, and the process's own memory map."""
    write(tmp_path, [{"weight": torch.arange(12.0).reshape(3, 4)}])
    stack = torch.zeros(2, 3, 4)
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    address = weight.data_ptr()
    read(tmp_path, {"weight": stack[1]})
    read(tmp_path, {"weight": weight})
    assert weight.data_ptr() == address and weight.requires_grad and weight.grad_fn is None
    assert weight.detach().flatten().tolist() == list(range(12))
    assert stack[1].equal(weight) and not stack[0].any()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) not in maps.read_text()


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    """Oracle: a checkpoint in which one byte was flipped by hand; every byte of both files."""
    write(tmp_path, [{"x": torch.randn(3, 2), "step": torch.tensor(7)}])
    check_files(read_checkpoint(tmp_path), contents=True)
    for name in ("rank_00000.safetensors", MANIFEST):
        good = (tmp_path / name).read_bytes()
        for index in range(len(good)):
            changed = bytearray(good)
            changed[index] ^= 1
            if name == MANIFEST and _means_the_same(bytes(changed), good):
                continue
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(Damaged, match=name):
                check_files(read_checkpoint(tmp_path), contents=True)
        (tmp_path / name).write_bytes(good)


def _means_the_same(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is damaged .not JSON"),
        ("[]", "is damaged .expected a JSON object, got a list"),
        ("3", "is damaged .expected a JSON object, got a number"),
        ('{"format": 1}', "is damaged .crc32: is required"),
        ('{"format": 1, "crc32": "00000000"}', "checksum differs"),
    ],
)
def test_text_that_is_no_manifest_is_damage(tmp_path: Path, text: str, what: str) -> None:
    """Oracle: files that nobody wrote as a manifest."""
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match=what):
        read_checkpoint(tmp_path)


def test_a_later_format_is_not_misread(tmp_path: Path) -> None:
    """Oracle: a manifest that is sound but for a format number that does not exist yet."""
    manifest = write(tmp_path, [{"x": torch.zeros(2)}])
    manifest["format"] = 2
    manifest.pop("crc32")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["crc32"] = f"{zlib.crc32(text.encode()):08x}"
    (tmp_path / MANIFEST).write_text(as_text(manifest))
    with pytest.raises(Damaged, match="has format 2, this version of llmnorm reads 1"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("offered", [True, False])
def test_what_reaches_the_disk_piece_by_piece_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    """Oracle: a call for each piece of a large file, none for one of a single piece, or where the
    system has no such call; the file is fsynced either way."""
    monkeypatch.setattr(module, "PIECE", 4096)
    if not offered:
        monkeypatch.setattr(module, "_sync_range", None)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
    for pieces, expected in ((1, 0), (5, 5)):
        told: list[int] = []
        (tmp_path / "x").write_bytes(bytes(4096 * pieces))
        module.sync(tmp_path / "x", lambda told=told: told.append(1))  # type: ignore[misc]
        assert len(told) == (expected if offered else 0)
    assert len(synced) == 2
