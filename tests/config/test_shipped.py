"""The files that the package brings: their names, their descriptions, copies of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm import cli
from llmnorm.config import shipped
from llmnorm.config.file import load
from llmnorm.config.saved import to_yaml
from llmnorm.config.tree import RunConfig
from llmnorm.config.yaml_text import read_yaml
from llmnorm.data import corpus, identity
from llmnorm.data.settings import SourceSettings, TokenizerSettings
from llmnorm.objectives.classification import Classification
from llmnorm.objectives.heldout import configuration
from llmnorm.part import InputError
from tests.running import ROOT

NAMES = sorted(str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that must end with exit code 2."""
    assert cli.main(list(words)) == 2
    return capsys.readouterr().err.removeprefix("llmnorm: error: ").strip()


# Names.


def test_every_name_means_the_file_of_the_checkout() -> None:
    """Oracle: the files below configs, and the folders of the texts."""
    assert sorted(shipped.configurations()) == NAMES
    for name in NAMES:
        assert shipped.locate(f"llmnorm:{name}") == ROOT / "configs" / name
    assert shipped.locate("llmnorm:text/notes.txt") == ROOT / "tests/data/text/notes.txt"
    assert shipped.locate("runs/a") == Path("runs/a")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smok.yaml", "did you mean 'llmnorm:smoke.yaml'?"),
        ("smoke", "did you mean 'llmnorm:smoke.yaml'?"),
        ("nala.yaml", "did you mean 'llmnorm:recipes/nala/nala.yaml'?"),
        ("text/prosa.jsonl", "did you mean 'llmnorm:text/prose.jsonl'?"),
        ("../pyproject.toml", "`llmnorm configs` lists what there is"),
        ("/etc/passwd", "`llmnorm configs` lists what there is"),
        ("", "`llmnorm configs` lists what there is"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(capsys, name: str, hint: str) -> None:
    """Oracle: the message, written out; exit code 2."""
    expected = f"llmnorm:{name}: the package has no such file; {hint}"
    assert refused(capsys, "config", f"llmnorm:{name}") == expected


def test_the_run_is_called_by_the_name(tmp_path: Path) -> None:
    """Oracle: what the file itself gives, read by its path."""
    config = load(Path("llmnorm:recipes/nala/hybrid.yaml")).config
    assert config == load(ROOT / "configs/recipes/nala/hybrid.yaml").config
    assert config.run_dir == Path("runs/hybrid")


def test_a_base_may_be_shipped(tmp_path: Path) -> None:
    """Oracle: the same file beside its base."""
    text = "base: [llmnorm:models/tiny.yaml, more.yaml]\ntraining: {steps: 3}\n"
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "more.yaml").write_text("data: {sources: default}\n")
    model = load(tmp_path / "own.yaml").config.model
    assert model.hidden_size == read_yaml(ROOT / "configs/models/tiny.yaml")["model"]["hidden_size"]
    (tmp_path / "own.yaml").write_text("base: llmnorm:models/tin.yaml\n")
    with pytest.raises(InputError, match="did you mean 'llmnorm:models/tiny.yaml'"):
        load(tmp_path / "own.yaml")


# Data and tokenizers.


def test_the_data_are_those_of_the_path() -> None:
    """Oracle: the hash of the same files, named by their path as before `llmnorm:` was there."""

    def hash_of(text: str) -> str:
        source = SourceSettings(name="prose", path=text, validation=text)
        data = load(Path("llmnorm:smoke.yaml")).config.data
        return identity.hash_of(identity.made_of(data, TokenizerSettings(), [source]))

    assert hash_of("llmnorm:text/prose.jsonl") == hash_of(str(ROOT / "tests/data/text/prose.jsonl"))


def test_resolved_settings_keep_the_name() -> None:
    """Oracle: the text of the file; a path of this machine would mean nothing on another."""
    text = to_yaml(load(Path("llmnorm:smoke.yaml")).config)
    assert "path: llmnorm:text/prose.jsonl" in text and str(ROOT) not in text


def test_texts_that_are_not_shipped_are_refused_by_their_key() -> None:
    """Oracle: the message, written out."""
    with pytest.raises(InputError, match=r"^data\.sources\.0 \(a\)\.path: llmnorm:text/n: the"):
        corpus.files("llmnorm:text/n", "data.sources.0 (a).path")
    words = ["model.hidden_size=64", "objective.train=llmnorm:labelled/trai.tsv"]
    config = load(Path("llmnorm:finetune/smoke.yaml"), [*words, "tokenizer.path=t"]).config
    with pytest.raises(InputError, match=r"^objective\.train: .* 'llmnorm:labelled/train\.tsv'\?$"):
        Classification(config, config.objective)  # type: ignore[arg-type]


def test_a_tokenizer_may_be_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a directory in the package's place; none is shipped today."""
    (tmp_path / "shipped" / "words").mkdir(parents=True)
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    settings = TokenizerSettings(path=Path("llmnorm:words"))
    assert settings.directory == tmp_path / "shipped" / "words"
    with pytest.raises(InputError, match=r"^tokenizer\.path: llmnorm:word: the package has no"):
        _ = TokenizerSettings(path=Path("llmnorm:word")).directory


# Commands that read a configuration.


def test_compare_takes_names(capsys) -> None:
    """Oracle: the command lines that the plan prints."""
    words = ["--arm", "a", "llmnorm:smoke.yaml", "--arm", "b", "model.norm=layer", "--plan"]
    assert cli.main(["compare", "llmnorm:smoke.yaml", *words, "--lr-points", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("llmnorm train llmnorm:smoke.yaml") >= 2
    assert "comparisons/smoke/runs/a" in out


def test_data_of_an_evaluation_takes_a_name() -> None:
    """Oracle: the configuration itself."""
    config = configuration("eval", Path("exported"), None, Path("llmnorm:smoke.yaml"), [])
    assert isinstance(config, RunConfig)
    assert config.data == load(Path("llmnorm:smoke.yaml")).config.data


# The list, and what it says.


def test_the_list_describes_every_configuration(capsys) -> None:
    """Oracle: the names, each once; what is printed of one is its own comment."""
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines[: len(NAMES)]) == NAMES
    mute = [name for name in NAMES if not shipped.describe(name).what]
    assert not mute, "no sentence in the comment at the top"
    unsized = [line for line in lines[: len(NAMES)] if "size" not in line]
    assert all("finetune/" in line for line in unsized), "no line `# size: ...` at the top"
    (smoke,) = (line for line in lines if line.startswith("smoke.yaml"))
    comment = (ROOT / "configs/smoke.yaml").read_text().splitlines()[1:3]
    assert smoke.split("  ", 1)[1].strip() == (
        f"{comment[0][2:-1]} [{comment[1][2:].replace('size: ', 'size ').replace('time: ', '')}]"
    )
    assert cli.main(["configs", "models/"]) == 0
    assert capsys.readouterr().out.startswith("models/bert.yaml")
    assert cli.main(["configs", "models/tiny.yaml"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/models/tiny.yaml").read_text()


def test_sizes_and_hours_are_counted() -> None:
    """Oracle: the matrices of the model that the file builds, and its operations a token."""
    import torch

    from llmnorm.models.building import class_of
    from llmnorm.models.configuration import LlmNormConfig
    from llmnorm.models.flops import flops_per_token
    from llmnorm.optim.groups import split

    peak, share = 989e12, 0.4  # of an H100 in bf16, dense; what is reached of it
    built: dict[str, tuple[int, float]] = {}
    wrong = []
    for name in NAMES:
        said = shipped.describe(name)
        if not said.size:
            continue
        words = ["training.steps=1", "data.sources=default", "data.context_length=64"]
        words += ["objective=masked_lm", "tokenizer.mask=true"] if "bert" in name else []
        config = load(Path(f"llmnorm:{name}"), words if name.startswith("models/") else []).config
        objective, vocabulary = config.objective, config.model.vocab_size
        if vocabulary == "auto":
            vocabulary = config.tokenizer.vocab_size
        head = getattr(objective, "mask_share", 1.0)
        key = f"{config.model!r} {vocabulary} {config.data.context_length} {objective!r}"
        if key not in built:
            settings = LlmNormConfig.from_settings(
                config.model, vocab_size=vocabulary, architectures=[objective.architecture]
            )
            with torch.device("meta"):
                model = class_of(settings)(settings)
            size = sum(p.numel() for p in split(model).matrices.values())
            operations = flops_per_token(model, config.data.context_length, head_share=head)
            built[key] = size, operations
        size, operations = built[key]
        written = float(said.size[:-1]) * {"M": 1e6, "B": 1e9}[said.size[-1]]
        if written != pytest.approx(size, rel=0.06):  # two digits, below a million one
            wrong.append(f"{name}: size: {size / 1e6:.2f}M, not {said.size}")
        if said.time.endswith("H100, counted"):
            rows = config.training.global_batch
            assert isinstance(rows, int)
            steps = config.training.steps
            tokens = steps * rows * config.data.context_length if steps else config.training.tokens
            assert tokens is not None
            hours = operations * tokens / (peak * share * 3600)
            if float(said.time.split()[0]) != pytest.approx(hours, rel=0.06):
                wrong.append(f"{name}: time: {hours:.2g} hours, not {said.time}")
    assert wrong == []


def test_the_list_needs_no_torch(tmp_path: Path) -> None:
    """Oracle: sys.modules of a fresh interpreter."""
    code = (
        "import sys\nfrom llmnorm import cli\n"
        "cli.main(['configs']); cli.main(['configs', 'quickstart.yaml', '--copy', 'c'])\n"
        "cli.main(['config', 'llmnorm:smok.yaml'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "c/models/tiny.yaml").is_file()


# Copies.


def test_a_copy_is_the_same_configuration(tmp_path: Path, capsys) -> None:
    """Oracle: the settings of the shipped file; the schema that the first line names is there."""
    assert cli.main(["configs", "recipes/nala/hybrid.yaml", "--copy", "mine"]) == 0
    out = capsys.readouterr().out.splitlines()
    files = sorted(str(p) for p in Path("mine").rglob("*") if p.is_file())
    assert files == [
        *("mine/config.schema.json", "mine/models/tiny.yaml", "mine/quickstart.yaml"),
        "mine/recipes/nala/hybrid.yaml",
    ]
    assert sorted(out[:-1]) == files
    copied = Path("mine/recipes/nala/hybrid.yaml")
    assert out[-1].endswith(f"llmnorm train {copied}")
    assert load(copied).config == load(Path("llmnorm:recipes/nala/hybrid.yaml")).config
    schema = copied.read_text().splitlines()[0].partition("$schema=")[2]
    json.loads((copied.parent / schema).read_text())


def test_a_copy_of_a_size_is_a_base(tmp_path: Path, capsys) -> None:
    """Oracle: the configuration that the last line tells to write."""
    assert cli.main(["configs", "models/tiny.yaml", "--copy", "mine"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    base = last.partition("`")[2].partition("`")[0]
    Path("own.yaml").write_text(f"{base}\ndata: {{sources: default}}\ntraining: {{steps: 1}}\n")
    assert load(Path("own.yaml")).config.model.hidden_size == 192


def test_a_directory_is_no_configuration(capsys) -> None:
    """Oracle: the message, written out."""
    message = "llmnorm:models: is a directory, not a YAML file"
    assert refused(capsys, "config", "llmnorm:models") == message


def test_a_copy_overwrites_nothing(tmp_path: Path, capsys) -> None:
    """Oracle: the files' contents before and after."""
    assert cli.main(["configs", "llmnorm:quickstart.yaml", "--copy", "mine"]) == 0
    assert cli.main(["configs", "recipes/nala/nala.yaml", "--copy", "mine"]) == 0  # shares two
    capsys.readouterr()
    (tmp_path / "mine/models/tiny.yaml").write_text("model: {hidden_size: 8}\n")
    message = refused(capsys, "configs", "recipes/mixers/ssd.yaml", "--copy", "mine")
    assert message.startswith("--copy mine: mine/models/tiny.yaml exists and is not")
    assert not Path("mine/recipes/mixers").exists()
    assert Path("mine/models/tiny.yaml").read_text() == "model: {hidden_size: 8}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--copy", "x"], "configs: name what to copy: llmnorm configs NAME --copy DIR"),
        (["text/notes.txt", "--copy", "x"], "llmnorm:text/notes.txt: is no configuration; "),
        (["models", "--copy", "x"], "llmnorm:models: is no configuration; "),
        (["smok.yaml", "--copy", "x"], "llmnorm:smok.yaml: the package has no such file; did you"),
        (["smoke.yaml", "--copy", "file"], "--copy file: cannot be written: "),
        (["smoke.yaml", "seed=3"], "configs: takes no settings, got 'seed=3'"),
    ],
)
def test_what_cannot_be_copied(tmp_path: Path, capsys, words: list[str], message: str) -> None:
    """Oracle: the messages, written out; nothing is written."""
    (tmp_path / "file").write_text("")
    assert refused(capsys, "configs", *words).startswith(message)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
