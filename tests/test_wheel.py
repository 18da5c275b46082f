"""The wheel works alone: built, installed where nothing of the checkout is, and trained with.

The environment is empty but for the packages that llmnorm needs, which it sees in the one that the
tests run in. That one's .pth files are not read there, so an editable llmnorm is out of sight.
Nothing is fetched.
"""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from llmnorm.config import shipped
from tests.running import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="hatchling builds the wheel: bash tools/bootstrap.sh dev",
)


class Installed(NamedTuple):
    """The wheel's file, and the interpreter of the environment that it was installed into."""

    wheel: Path
    python: Path


def run(python: Path | str, *words: str, cwd: Path) -> str:
    """What a command printed; it must succeed. Nothing of this process' PYTHONPATH reaches it."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [str(python), *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """`pip wheel .`, then that wheel in an environment of its own."""
    place = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    run(sys.executable, "-m", "pip", *build, str(ROOT), cwd=place)
    (wheel,) = place.glob("llmnorm-*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "empty", cwd=place)
    python = place / "empty" / "bin" / "python"
    into = ["--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    run(sys.executable, "-m", "pip", *into, cwd=place)
    (packages,) = (place / "empty").glob("lib/python*/site-packages")
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "of-the-tests.pth").write_text("\n".join(seen) + "\n")
    return Installed(wheel, python)


def test_the_wheel_holds_what_the_checkout_ships(installed: Installed) -> None:
    """Oracle: the checkout's own files, name by name and byte by byte."""
    with zipfile.ZipFile(installed.wheel) as archive:
        names = [n.removeprefix("llmnorm/shipped/") for n in archive.namelist() if "/shipped/" in n]
        assert sorted(names) == shipped._names()
        for name in names:
            assert archive.read(f"llmnorm/shipped/{name}") == shipped._path_of(name).read_bytes()
        for file in (ROOT / "llmnorm/serving/static").iterdir():
            assert archive.read(f"llmnorm/serving/static/{file.name}") == file.read_bytes()
        assert not [n for n in archive.namelist() if n.startswith(("tests", "tools", "configs"))]


def test_an_editable_install_reads_the_checkout(tmp_path: Path) -> None:
    """Oracle: the archive that pip unpacks, which holds a .pth file alone."""
    from hatchling.build import build_editable

    name = build_editable(str(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as archive:
        files = [n for n in archive.namelist() if ".dist-info/" not in n]
        assert files == ["_llmnorm.pth"]
        assert archive.read(files[0]).decode().strip() == str(ROOT)


def test_the_wheel_trains_the_smoke_run_from_another_folder(
    installed: Installed, tmp_path: Path
) -> None:
    """Oracle: the run's own files; the package that ran is the installed one."""
    where = "import llmnorm, sys; print(llmnorm.__file__); print('\\n'.join(sys.path))"
    package, *path = run(installed.python, "-c", where, cwd=tmp_path).splitlines()
    assert Path(package).is_relative_to(installed.wheel.parent)
    assert str(ROOT) not in path
    where = "from llmnorm.machine.gpus import launch_file; print(launch_file('ddp'))"
    file = run(installed.python, "-c", where, cwd=tmp_path).strip()
    assert Path(file).read_bytes() == (ROOT / "launch/accelerate/ddp.yaml").read_bytes()
    launch = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "1"]
    words = ["-m", "llmnorm", "train", "llmnorm:smoke.yaml"]
    run(installed.python, *launch, *words, cwd=tmp_path)
    lines = (tmp_path / "runs/smoke/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 30
    assert (tmp_path / "runs/smoke/DONE").is_file()
    text = (tmp_path / "runs/smoke/config.yaml").read_text()
    assert "path: llmnorm:text/prose.jsonl" in text and "site-packages" not in text


def test_the_wheel_lists_and_copies(installed: Installed, tmp_path: Path) -> None:
    """Oracle: what the checkout lists."""
    script = installed.python.with_name("llmnorm")
    assert run(script, "configs", cwd=tmp_path) == shipped.listing() + "\n"
    run(script, "configs", "quickstart.yaml", "--copy", ".", cwd=tmp_path)
    copied = run(script, "config", "quickstart.yaml", cwd=tmp_path)
    assert copied == run(script, "config", "llmnorm:quickstart.yaml", cwd=tmp_path)
