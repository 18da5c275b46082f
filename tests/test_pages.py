"""The pages say what is true: their commands run, their links, options, keys and files exist.

A page's bash blocks are run in order, from the directory of a user's checkout (configurations,
launch files and the texts of the smoke run), with the smoke run trained. A python block that the
page tells the reader to save is saved under that name before the commands below it.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from llmnorm import cli
from llmnorm.analysis.compare.command import compare
from llmnorm.config.docs import json_schema, key_paths
from llmnorm.config.file import load
from llmnorm.config.tree import RunConfig
from llmnorm.config.yaml_text import read_yaml
from tests.running import CHILDREN, PATIENCE, ROOT, ForkedRun

# Below docs/results are reports that programs wrote, of runs that took hours.
WRITTEN = [p for p in (ROOT / "docs").rglob("*.md") if "results" not in p.parts]
PAGES = {str(p.relative_to(ROOT)): p for p in [ROOT / "README.md", *WRITTEN]}

# The beginning of a command that no test can run -> why. Each stands in a page.
NOT_RUN = {
    "bash launch/quickstart.sh": "installs from the network and trains for minutes",
    "bash launch/exspec_pair.sh": "trains for an hour; tests/objectives/test_distill.py trains one",
    "llmnorm train configs/recipes/anneal/": "trains for minutes on a corpus from the network; "
    "tests/training/test_branches.py goes this way",
    "bash tools/test.sh": "runs this test",
    "bash tools/bootstrap.sh": "installs from the network",
    "accelerate launch": "tests/distributed launches several processes",
    "sbatch": "tests/launch/test_slurm.py submits it, tools/slurm_here.sh to a real Slurm",
    "LLMNORM_TORCH_INDEX=": "installs from the network",
    "LLMNORM_PYTHON=": "installs from the network",
    "python3 -m venv": "makes the environment that the tests run in",
    "pip download": "needs the network",
    "pip wheel": "tests/test_wheel.py builds it, without a network",
    "PIP_NO_INDEX=1": "needs the files that were downloaded",
    "source .venv/bin/activate": "the tests run in an environment already",
    **dict.fromkeys(
        (
            "llmnorm finetune configs/finetune/qwen3-8b-24gb.yaml",
            "llmnorm data configs/finetune/qwen3-8b-24gb.yaml",
            "llmnorm generate runs/chat",
            "llmnorm export runs/chat",
            "vllm serve",
            "llama-cli",
        ),
        "needs the weights of an 8B model, a GPU, and other programs",
    ),
    **dict.fromkeys(
        (
            "python tools/make_skills.py",
            "llmnorm data configs/finetune/skills.yaml",
            "llmnorm finetune configs/finetune/skills.yaml",
            "llmnorm compare configs/finetune/skills.yaml",
            "llmnorm eval runs/skills",
            "llmnorm generate runs/skills",
            "llmnorm export runs/skills",
        ),
        "trains for minutes on the quickstart; tests/commands/test_generate.py goes this way",
    ),
    **dict.fromkeys(
        ("llmnorm serve", "curl -fsS", "python tools/check_serving.py"),
        "needs a server that runs; tests/serving/test_page.py asks one by the page's lines",
    ),
    **dict.fromkeys(
        ("sudo", "openssl rand", "docker", "promtool", "prometheus"),
        "installs into the system, or needs other programs; tools/check_serving.py runs some",
    ),
    **dict.fromkeys(
        (
            "llmnorm train configs/smoke.yaml run_dir=s3://",
            "llmnorm train s3://",
            "llmnorm export runs/smoke s3://",
        ),
        "needs a store; tests/remote goes these ways to a server",
    ),
    "rm -rf .venv": "removes the environment that the tests run in",
}


class Block(NamedTuple):
    """A fenced block, and the paragraph above it."""

    kind: str
    text: str
    above: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [
        Block(m[1], m[2], text[: m.start()].rstrip().rpartition("\n\n")[2].strip()) for m in found
    ]


def commands(block: Block) -> list[str]:
    """The commands of a bash block, continued lines joined, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def run(place: Path, command: str) -> tuple[int, str]:
    """A page's command: exit code and what it printed.

    `llmnorm` is forked from a server that has imported torch, and so are a comparison's runs; bash
    gets everything else.
    """
    log = place.parent / "log.txt"
    process = CHILDREN.Process(target=_child, args=(place, command, log))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None, f"still running: {command}\n{log.read_text()}"
    return process.exitcode, log.read_text()


def _child(place: Path, command: str, log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(place)
    words = shlex.split(command)
    if words[0] == "llmnorm" and not re.search(r"[|<>;&$`*]", command):
        torch.set_num_threads(1)  # so that a fork of this process is sound
        compare.__kwdefaults__["start"] = ForkedRun
        sys.exit(cli.main(words[1:]))
    binaries = place.parent / "bin"  # `source .venv/bin/activate` puts these first
    binaries.mkdir(exist_ok=True)
    (binaries / "llmnorm").write_text(f'#!/bin/sh\nexec {sys.executable} -m llmnorm "$@"\n')
    (binaries / "llmnorm").chmod(0o755)
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    os.execvpe("bash", ["bash", "-euo", "pipefail", "-c", command], environment)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's checkout in which the smoke run was trained."""
    place = tmp_path_factory.mktemp("checkout") / "place"
    for name in ("configs", "launch", "tests/data"):
        shutil.copytree(ROOT / name, place / name)
    code, said = run(place, "llmnorm train configs/smoke.yaml")
    assert code == 0, said
    return place


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind == "bash" for b in blocks(p))])
def test_the_commands_of_a_page_run(page: str, checkout: Path, tmp_path: Path) -> None:
    # Oracle: exit code 0 of every command, in the order of the page.
    place = shutil.copytree(checkout, tmp_path / "place")
    for block in blocks(page):
        saved = re.search(r"Save this as `([\w./]+)`", block.above)
        if block.kind == "python" and saved:
            (place / saved[1]).write_text(block.text, encoding="utf-8")
        for command in commands(block) if block.kind == "bash" else []:
            if not command.startswith(tuple(NOT_RUN)):
                code, said = run(place, command)
                assert code == 0, f"{command}\n{said}"


def test_every_command_that_is_not_run_stands_in_a_page() -> None:
    shown = [c for page in PAGES for b in blocks(page) if b.kind == "bash" for c in commands(b)]
    unused = [start for start in NOT_RUN if not any(c.startswith(start) for c in shown)]
    assert unused == []


def test_the_readme_adds_a_norm_in_under_30_lines_from_outside_the_package(
    checkout: Path, tmp_path: Path
) -> None:
    # Oracle: the section itself, taken literally; the run's own files say what was trained.
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    section = readme.partition("## Add your own part")[2].partition("\n## ")[0]
    found = [block for block in blocks("README.md") if block.text in section]
    (code,) = (block for block in found if block.kind == "python")
    (command,) = (c for block in found if block.kind == "bash" for c in commands(block))
    assert len([line for line in code.text.splitlines() if line.strip()]) < 30
    place = shutil.copytree(checkout, tmp_path / "place")
    assert not place.is_relative_to(ROOT)
    (name,) = re.findall(r"Save this as `([\w./]+)`", section)
    (place / name).write_text(code.text, encoding="utf-8")
    # Through bash, so that the process begins as a user's does, in this directory.
    status, said = run(place, f"env -u PYTHONSTARTUP {command} training.steps=5")
    assert status == 0, said
    (run_dir,) = re.findall(r"run_dir=(\S+)", command)
    (part,) = re.findall(r"model\.norm=(\S+)", command)
    saved = read_yaml(place / run_dir / "config.yaml")
    assert saved["model"]["norm"] == {"name": part, "eps": 1e-5}
    lines = (place / run_dir / "metrics.jsonl").read_text().splitlines()
    assert sum('"grad_norm"' in line for line in lines) == 5
    (weights,) = (place / run_dir).glob("checkpoints/step_00000005/*.safetensors")
    gains = {k: v for k, v in load_file(weights).items() if k.startswith("model.") and "gain" in k}
    assert len(gains) == 2 * 2 + 1  # two a block, one at the end
    assert all(gain.item() != 64**0.5 for gain in gains.values())  # they have learned


# What the pages mention.

(_COMMANDS,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
OPTIONS = {name: set(p._option_string_actions) for name, p in _COMMANDS.choices.items()}
OWN = set(cli._parser()._option_string_actions)


def code_of(page: str) -> list[str]:
    """Inline code and the commands of bash blocks."""
    text = re.sub(
        r"^```.*?^```", "", PAGES[page].read_text(encoding="utf-8"), flags=re.M | re.S
    ).replace("\\|", "|")
    inline = re.findall(r"`([^`\n]+)`", text)
    return inline + [c for b in blocks(page) if b.kind == "bash" for c in commands(b)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    # Oracle: the parser.
    wrong = []
    for code in code_of(page):
        for words in re.findall(r"(?:^|[\s(])llmnorm ([a-z-][^`;|)]*)", code):
            command, *rest = words.split()
            known = OPTIONS.get(command, OWN if command in OWN else None)
            options = [re.sub(r"[=\]].*", "", w).lstrip("[") for w in rest]
            options = [w for w in options if w.startswith("--")]
            if known is None or not set(options) <= known:
                wrong.append(code)
        option = re.match(r"--[a-z-]+", code)
        if option and option[0] not in OWN.union(*OPTIONS.values()):
            wrong.append(code)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_keys_exist(page: str) -> None:
    # Oracle: the configuration tree, whose sections a dotted word may begin with.
    known = {part for key in key_paths() for part in _prefixes(key)}
    wrong = []
    for code in code_of(page):
        for word in code.split():
            key = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)+)(?:=|:|$)", word)
            if key and key[1].partition(".")[0] in RunConfig.model_fields:
                path = re.sub(r"\.\d+", "", key[1])
                if path not in known and not path.endswith((".yaml", ".json", ".py", ".md")):
                    wrong.append(word)
    assert wrong == []


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    # Oracle: the file system; for `#anchors`, the headings of the page.
    text = PAGES[page].read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            wrong.append(target)
    rooms = r"`((?:llmnorm|tools|launch|configs|docs|tests)/[\w./-]+)`"
    wrong += [name for name in re.findall(rooms, prose) if not (ROOT / name).exists()]
    assert wrong == []


def _anchors(file: Path) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind == "yaml" for b in blocks(p))])
def test_yaml_blocks_are_configurations(page: str, checkout: Path, tmp_path: Path) -> None:
    # Oracle: the schema for a part of one, the validation itself for a whole one.
    shutil.copytree(checkout / "configs", tmp_path / "configs")
    for number, block in enumerate(b for b in blocks(page) if b.kind == "yaml"):
        path = tmp_path / "configs" / f"block-{number}.yaml"
        path.write_text(block.text, encoding="utf-8")
        tree: Any = read_yaml(path)
        jsonschema.Draft202012Validator(json_schema()).validate(tree)
        if {"data", "training"} <= tree.keys():
            load(path)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python(page: str) -> None:
    for block in blocks(page):
        if block.kind == "python":
            compile(block.text, page, "exec")
