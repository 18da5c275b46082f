"""Scripts, packaging and launch files, by running them (no test installs anything)."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in [
        ROOT / ".ci/run",
        *(ROOT / "tools").rglob("*.sh"),
        *(ROOT / "launch").rglob("*.sh"),
    ]
]


def bash(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LLMNORM_")}
    return subprocess.run(
        ["bash", *arguments],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_stop_at_errors(script: str) -> None:
    """Oracle: bash -n, and the shell options that the first command sets."""
    assert bash("-n", script).stderr == ""
    commands = [line for line in (ROOT / script).read_text().splitlines() if line[:1] not in "#"]
    assert next(filter(None, commands)) == "set -euo pipefail"
    assert os.access(ROOT / script, os.X_OK)


def test_ci_runs_the_tests_script(tmp_path: Path) -> None:
    """Oracle: a stand-in tools/test.sh that says that it ran, called from another directory."""
    for directory in (".ci", "tools"):
        (tmp_path / directory).mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "tools/test.sh").write_text('echo "tests of $PWD"; exit 7')
    done = bash(str(tmp_path / ".ci/run"), cwd=Path("/"))
    assert (done.returncode, done.stdout) == (7, f"tests of {tmp_path.resolve()}\n")


def test_bootstrap_knows_the_extras_of_the_package() -> None:
    """Oracle: pyproject.toml; the answer to a wrong name, and the help, list them all."""
    extras = " ".join(PROJECT["optional-dependencies"])
    done = bash("tools/bootstrap.sh", "nonsense")
    assert done.returncode == 2
    assert done.stderr == (f"bootstrap: error: no extra is called 'nonsense'; valid: {extras}\n")
    assert f"extras: {extras}\n" in bash("tools/bootstrap.sh", "--help").stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv is this interpreter, except that `pip install` only writes a log."""
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "llmnorm/part.py",
        "llmnorm/machine/doctor.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/bootstrap.sh", tmp_path / "tools/bootstrap.sh")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(
        '#!/bin/bash\nif [[ "$1 $2" == "-m pip" ]]; then shift 2; echo "$*" >>pip.log; exit; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path


def test_bootstrap_does_nothing_twice(checkout: Path) -> None:
    """Oracle: the log of pip's calls after each run."""
    log = checkout / "pip.log"

    def bootstrap(*extras: str) -> list[str]:
        log.write_text("")
        done = bash(
            str(checkout / "tools/bootstrap.sh"), *extras, cwd=Path("/"), LLMNORM_DEVICE="cpu"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return log.read_text().splitlines()

    installed = bootstrap()
    assert len(installed) == 1 and installed[0].endswith("-e .")  # the torch that is there is kept
    pinned = (checkout / ".venv/llmnorm-constraints.txt").read_text()
    assert f"torch=={torch.__version__.split('+')[0]}\n" in pinned
    assert bootstrap() == []
    assert bootstrap("dev")[0].endswith("-e .[dev]")
    assert bootstrap() == bootstrap("dev") == []  # extras add up
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert bootstrap()[0].endswith("-e .[dev]")


def test_bootstrap_says_what_python_lacks(tmp_path: Path) -> None:
    """Oracle: one line each for an interpreter that is too old or without venv."""
    (tmp_path / "tools").mkdir()
    script = shutil.copy(ROOT / "tools/bootstrap.sh", tmp_path / "tools/bootstrap.sh")
    old = bash(str(script), LLMNORM_PYTHON="false")
    assert old.returncode == 2
    assert old.stderr == "bootstrap: error: LLMNORM_PYTHON=false is no Python 3.11 or 3.12\n"
    bare = tmp_path / "python"
    bare.write_text(
        f'#!/bin/bash\n[[ "$2" != *ensurepip* ]] || exit 1\nexec {sys.executable} "$@"\n'
    )
    bare.chmod(0o755)
    without_venv = bash(str(script), LLMNORM_PYTHON=str(bare))
    name = f"python3.{sys.version_info.minor}"
    assert without_venv.returncode == 2
    assert without_venv.stderr == (
        f"bootstrap: error: {name} has no venv module; install it "
        f"(Debian, Ubuntu: apt install {name}-venv)\n"
    )


def test_constraints_pin_what_is_installed() -> None:
    """Oracle: pyproject's ranges, and the versions of the environment that runs this test."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pairs}
    assert all("+" not in version for version in pins.values()), "no local versions"
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"]]
    for text in extras["dev"]:
        requirement = Requirement(text)
        own = requirement.name == PROJECT["name"]
        wanted += [t for extra in requirement.extras for t in extras[extra]] if own else [text]
    for text in wanted:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), text
        if requirement.name != "torch":  # one that was there before is kept
            assert metadata.version(requirement.name) == pin


def test_citation_has_the_version() -> None:
    """Oracle: pyproject.toml."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]


def test_bootstrap_pins_the_torch_of_the_constraints() -> None:
    """Oracle: constraints.txt."""
    pin = re.search(r"^TORCH_PIN=(.*)$", (ROOT / "tools/bootstrap.sh").read_text(), re.M)
    assert pin is not None
    assert pin.group(1) in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs or none")
@pytest.mark.parametrize("processes", [1, 2])
def test_ddp_launch_file_starts_a_process_group(tmp_path: Path, processes: int) -> None:
    """Oracle: 1 + 2 summed over real processes that accelerate launched; nothing on stderr."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import torch\nfrom accelerate import Accelerator\n"
        "a = Accelerator(cpu=not torch.cuda.is_available())\n"
        "total = a.reduce(torch.tensor([a.process_index + 1.0], device=a.device)).item()\n"
        "open(__file__ + str(a.process_index), 'w').write(f'{a.num_processes} {total}')\n"
        "a.end_training()\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    done = subprocess.run(
        [*launch, "--config_file", "launch/accelerate/ddp.yaml", str(script)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = f"{processes} {sum(range(1, processes + 1)):.1f}"
    for rank in range(processes):
        assert Path(f"{script}{rank}").read_text() == expected
