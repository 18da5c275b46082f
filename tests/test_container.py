"""launch/Dockerfile without an engine: its instructions as a script, over this machine's packages.

Where docker is, tools/check_serving.py builds the image. Here every COPY and RUN of it is carried
out below a directory that stands for the image's root. Its Python has the packages that the tests
run with, as the base image has torch; nothing is fetched. What is left out: the user is not made.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.running import ROOT

FILE = ROOT / "launch" / "Dockerfile"
EXTRAS = {"finetune": "peft", "remote": "s3fs", "track": "tensorboard", "serve": "fastapi"}


class Instruction(NamedTuple):
    """A line of the file, continued ones joined."""

    word: str
    rest: str


def instructions() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [Instruction(*line.split(None, 1)) for line in lines]


def stages() -> dict[str, list[Instruction]]:
    """The instructions of each stage, those of the stage that it is built from first."""
    found: dict[str, list[Instruction]] = {}
    name = ""
    for instruction in instructions():
        if instruction.word == "FROM":
            base, _, name = instruction.rest.split()
            found[name] = list(found.get(base, []))
        elif name:
            found[name].append(instruction)
    return found


def kept() -> list[str]:
    """What .dockerignore lets through."""
    lines = Path(f"{FILE}.dockerignore").read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_image_gets_what_the_wheel_is_built_from() -> None:
    """Oracle: pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    needed += [project["project"]["readme"], *project["project"]["license-files"]]
    assert set(needed) | {"pyproject.toml", "constraints.txt"} == set(kept())
    known = project["project"]["optional-dependencies"].keys()
    (default,) = re.findall(r"^ARG EXTRAS=(.*)$", FILE.read_text(), re.M)
    assert set(default.split(",")) | {"serve", "structured"} <= known


def test_both_images_end_without_root() -> None:
    """Oracle: the last USER of each target, and what a build without a target makes."""
    found = stages()
    assert [*found] == ["wheel", "installed", "serve", "train"]
    for name, entry in (("serve", '["llmnorm", "serve"]'), ("train", '["llmnorm"]')):
        last = {instruction.word: instruction.rest for instruction in found[name]}
        assert last["USER"] == "10001:10001" and last["ENTRYPOINT"] == entry
    assert "HEALTHCHECK" in dict(found["serve"])


class Image:
    """A directory that stands for the root of an image that is being built."""

    def __init__(self, root: Path, context: Path) -> None:
        self.root, self.context = root, context
        self.environment = {
            "PATH": f"{root}/bin:/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as: no isolation
            "HOME": str(root),
        }
        self.directory = root
        self.made_user = False

    def inside(self, text: str) -> str:
        """The same text with the image's directories where they are on this machine."""
        return re.sub(r"(?<![\w/.])/(opt|src|dist|work)\b", rf"{self.root}/\1", text)

    def carry_out(self, instruction: Instruction) -> None:
        word, rest = instruction.word, self.inside(instruction.rest)
        if word in ("ENV", "ARG"):
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        elif word == "WORKDIR":
            self.directory = Path(rest)
            self.directory.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            self.copy(rest.split())
        elif word == "RUN" and rest.startswith("useradd "):
            self.made_user = True
        elif word == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-ec", rest],
                cwd=self.directory,
                env=self.environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"

    def copy(self, words: list[str]) -> None:
        source = self.root if words[0].startswith("--from=") else self.context
        *names, target = [word for word in words if not word.startswith("--")]
        for name in names:
            path, to = source / name, self.directory / target
            if path.is_dir():
                shutil.copytree(path, to, dirs_exist_ok=True)
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)


def context(place: Path) -> Path:
    """The part of the checkout that is sent to the builder."""
    for name in kept():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / name)
    return place


def base(root: Path) -> None:
    """A base image: a `python3` whose environments see the packages that the tests run with.

    Python 3.11 puts an old setuptools into them, which pip would replace from the network.
    """
    (root / "bin").mkdir(parents=True)
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    script = f"""#!/bin/sh
{shlex.quote(sys.executable)} "$@" || exit
for last in "$@"; do :; done
[ "$1 $2" = "-m venv" ] || exit 0
for packages in "$last"/lib/python*/site-packages; do
    printf '%s\\n' {" ".join(shlex.quote(path) for path in seen)} > "$packages/of-the-base.pth"
    rm -rf "$packages"/setuptools*
done
"""
    (root / "bin" / "python3").write_text(script)
    (root / "bin" / "python3").chmod(0o755)


@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("hatchling", "ensurepip", *EXTRAS.values())),
    reason="needs the packages of the extra dev, and ensurepip",
)
def test_the_instructions_make_an_environment_that_works(tmp_path: Path) -> None:
    """Oracle: the entry's own answers from outside the checkout, and the package that answers."""
    root = tmp_path / "root"
    base(root)
    image = Image(root, context(tmp_path / "context"))
    done = stages()
    for instruction in [*done["wheel"], *done["serve"]]:
        image.carry_out(instruction)
    assert image.made_user

    def answer(*words: str) -> str:
        kept = {**image.environment, "PATH": image.environment["PATH"]}
        found = subprocess.run(words, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    assert (
        shutil.which("llmnorm", path=image.environment["PATH"]) == f"{root}/opt/llmnorm/bin/llmnorm"
    )
    where = answer("python", "-c", "import llmnorm; print(llmnorm.__file__)").strip()
    assert Path(where).is_relative_to(root / "opt" / "llmnorm")
    assert "quickstart.yaml" in answer("llmnorm", "configs")
    assert "usage: llmnorm serve" in answer("llmnorm", "serve", "--help")
    constraint = (root / "opt/llmnorm/constraints.txt").read_text()
    import torch

    assert f"torch=={torch.__version__.partition('+')[0]}\n" in constraint
    assert os.listdir(root / "opt/llmnorm/dist") == [w for w in os.listdir(root / "dist")]
