"""The command line: help, mistakes, versions, completion; answered before torch is imported."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.commands.arguments import count, local, split_overrides
from llmnorm.config.generation import GenerationSettings
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


@pytest.mark.parametrize("words", [("--foo",), ("run", "--foo"), ("--foo=3",)])
def test_an_unknown_option_is_answered_by_the_commands_own(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """Oracle: the options of `generate`, written out; those that it requires come later."""
    code, _, err = answer(capsys, "generate", *words)
    own = (
        "--adapter, --chat, --checkpoint, --draft, --ema, --help, --import, --max-tokens, "
        "--output, --prompt, --prompts, --seed, --temperature, --user"
    )
    assert code == 2
    assert f"there is no option --foo; valid: {own} (`llmnorm generate --help`" in err
    assert "valid: --completion, --help, --version (`llmnorm --h" in answer(capsys, "--foo")[2]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("generate run --top-k 1", "generation.top_k=VALUE"),
        ("generate run --max-new-tokens 3", "generation.max_new_tokens=VALUE"),
        ("train x.yaml --lr 1e-3", "optimizer.lr=VALUE"),
        ("train x.yaml --steps=3", "training.steps=VALUE"),
    ],
)
def test_an_option_that_is_a_setting_is_told_as_one(capsys, words: str, hint: str) -> None:
    """Oracle: the setting of the same name; a command without settings knows none."""
    assert f"; a setting is written {hint}" in answer(capsys, *words.split())[2]
    assert "a setting is written" not in answer(capsys, "export", "a", "b", "--lr", "1")[2]


def test_generate_shows_every_setting_of_the_sampling(capsys) -> None:
    """Oracle: the fields of the section."""
    _, out, _ = answer(capsys, "generate", "--help")
    assert all(f"generation.{name}=" in out for name in GenerationSettings.model_fields)


def options_with_a_value() -> list[tuple[str, str]]:
    """Every option of every command that takes one word, written out by argparse."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [
        (command, option)
        for command, parser in commands.choices.items()
        for action in parser._actions
        for option in action.option_strings
        if action.nargs is None
    ]


@pytest.mark.parametrize(("command", "option"), options_with_a_value())
def test_the_word_after_an_option_is_its_value(command: str, option: str) -> None:
    """Oracle: where the words stand; the option is written whole and as `--option=value`."""
    parser = cli._parser()
    words = [command, "a", "seed=1", option, "x=2", "seed=3"]
    assert split_overrides(words, parser) == (["seed=1", "seed=3"], [command, "a", option, "x=2"])
    words = [command, "a", "seed=1", f"{option}=x=2", "seed=3"]
    overrides, others = split_overrides(words, parser)
    assert (overrides, others) == (["seed=1", "seed=3"], [command, "a", f"{option}=x=2"])


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "x=2", "seed=1", "--prompt", "E=mc2", "seed=2"],
        ["seed=1", "--us", "x=2", "seed=2", "--user", "E=mc2"],
        ["seed=1", "--prompt=x=2", "--ema", "seed=2", "--prompt", "E=mc2"],
    ],
)
def test_prompts_and_settings_may_alternate(words: list[str]) -> None:
    """Oracle: the prompts and settings, written out; argparse reads an option's beginning too."""
    parser = cli._parser()
    overrides, others = split_overrides(["generate", "run", *words], parser)
    assert overrides == ["seed=1", "seed=2"]
    parsed = parser.parse_args(others)
    assert (parsed.prompt or parsed.user) == ["x=2", "E=mc2"]


def test_an_option_without_a_value_takes_no_word() -> None:
    """Oracle: the settings behind a flag, behind --profile, and behind an option of others."""
    parser = cli._parser()
    assert split_overrides(["export", "a", "--stock", "x.y=1"], parser)[0] == ["x.y=1"]
    assert split_overrides(["train", "a", "--profile", "x.y=1"], parser)[0] == ["x.y=1"]
    assert split_overrides(["train", "a", "--prompt", "x.y=1"], parser)[0] == ["x.y=1"]


def test_a_value_that_begins_like_an_option_is_told_how_to_be_written(capsys) -> None:
    """Oracle: argparse takes `--prompt=-x` for the text -x and refuses the two words."""
    err = answer(capsys, "generate", "run", "--prompt", "-x")[2]
    assert "a value that begins with - is written --prompt=VALUE" in err
    assert cli._parser().parse_args(["generate", "run", "--prompt=-x"]).prompt == ["-x"]


def test_settings_of_an_arm_stay_with_it(capsys) -> None:
    """Oracle: the words of each arm, written out; `--arm=NAME` takes no settings in argparse."""
    parser = cli._parser()
    words = ["compare", "c", "seed=1", "--arm", "a", "x=1", "--out", "d=e", "--arm", "b", "x=2"]
    overrides, others = split_overrides(words, parser)
    assert overrides == ["seed=1"]
    parsed = parser.parse_args(others)
    assert parsed.arm == [["a", "x=1"], ["b", "x=2"]] and parsed.out == Path("d=e")
    for misplaced in (["--arm=a", "x=1"], ["--arm", "a", "--plan", "x=1"]):
        code, _, err = answer(capsys, "compare", "c", *misplaced)
        assert code == 2 and "an arm's own right after --arm NAME" in err


def path_arguments() -> list[tuple[str, str]]:
    """Every argument of every command that is a path: the command, and the argument's name."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [
        (command, (action.option_strings or [action.dest])[0])
        for command, parser in commands.choices.items()
        for action in parser._actions
        if action.type in (local, Path)
    ]


@pytest.mark.parametrize(("command", "name"), path_arguments())
def test_every_path_is_of_this_machine(command: str, name: str, monkeypatch) -> None:
    """Oracle: HOME, and a refusal of what lies elsewhere, for every argument that is a path."""
    monkeypatch.setenv("HOME", "/home/of/somebody")
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    (action,) = (a for a in actions if name in (*a.option_strings, a.dest))
    assert action.type("~/run") == Path("/home/of/somebody/run")
    assert action.type("llmnorm:smoke.yaml") == Path("llmnorm:smoke.yaml")
    for elsewhere in ("s3://bucket/run", "file:///run", "a" * 300):
        with pytest.raises(argparse.ArgumentTypeError):
            action.type(elsewhere)


@pytest.mark.parametrize("number", ["0", "-1", "²", "x", "1e3", "9" * 5_000, "1.0"])
def test_a_count_is_a_whole_number(number: str) -> None:
    """Oracle: what `int` takes and is at least 1."""
    assert count("007") == 7
    with pytest.raises(argparse.ArgumentTypeError):
        count(number)
