"""The command line: help, mistakes, versions, completion; answered before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm import cli
from tests.running import SMOKE


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(words))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_help_lists_every_command(capsys) -> None:
    code, out, _ = answer(capsys, "--help")
    assert code == 0
    assert all(f"    {name} " in out for name in ("train", "data", "config", "parts", "doctor"))
    assert answer(capsys)[1] == out


def test_only_the_first_process_complains(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert answer(capsys, "train", "nowhere.yaml") == (2, "", "")


def test_version_names_torch_and_cuda_without_importing_it() -> None:
    code = (
        "import sys\nfrom llmnorm.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "llmnorm" in done.stdout and "torch" in done.stdout and "CUDA" in done.stdout


def test_bash_completes_commands_and_keys(tmp_path: Path) -> None:
    # Oracle: bash itself runs the function on a half-typed line.
    script = tmp_path / "completion.sh"
    script.write_text(
        subprocess.run(
            [sys.executable, "-m", "llmnorm", "--completion", "bash"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        + '\nCOMP_WORDS=(llmnorm "$@"); COMP_CWORD=$#; _llmnorm; echo "${COMPREPLY[@]}"\n'
    )

    def completed(*words: str) -> list[str]:
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True)
        return done.stdout.split()

    assert completed("tr") == ["train"]
    assert completed("train", "x.yaml", "optimizer.we") == ["optimizer.weight_decay="]
    assert completed("train", "x.yaml", "--dry") == ["--dry-run"]


def test_overrides_may_stand_anywhere(capsys) -> None:
    plain = answer(capsys, "config", str(SMOKE), "seed=3")
    assert plain == answer(capsys, "config", "seed=3", str(SMOKE))
    assert "seed: 3" in plain[1]
