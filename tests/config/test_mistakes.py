"""Every mistake in a configuration is a line with the key that the user wrote."""

from pathlib import Path
from typing import Any

import pytest

from llmnorm.config.docs import parts
from llmnorm.config.file import load, section
from llmnorm.config.saved import to_yaml
from llmnorm.config.tree import RunConfig
from llmnorm.part import InputError, Settings, settings_in
from llmnorm.runs.address import on_this_machine

SMOKE = Path("configs/smoke.yaml")
MINIMAL = "data: {sources: default}\ntraining: {steps: 10}\n"


def refused(*overrides: str, path: Path = SMOKE) -> list[str]:
    """The lines of the refusal, without their places."""
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return [line.partition(": ")[2] for line in str(caught.value).split("\n")]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Keys.


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=atuo", "optimizer.lr"),
        ("optimizer.betas=[2, 0.9]", "optimizer.betas.0"),
        ("optimizer.name=[adamw]", "optimizer.name"),
        ("schedule={name: {a: 1}}", "schedule.name"),
        ("schedule.warmup=-1", "schedule.warmup"),
        ("schedule.warmup=.inf", "schedule.warmup"),
        ("model.mixer=[softmax, nalaa]", "model.mixer.1"),
        ("model.mixer=[softmax, null]", "model.mixer.1"),
        ("model.mixer.attention_bias=kv", "model.mixer.attention_bias"),
        ("model.vocab_size=0", "model.vocab_size"),
        ("data.sources=[{name: a, path: b, weight: x}]", "data.sources.0.weight"),
        ("data.sources=defalt", "data.sources"),
        ("optimizer.auxiliary.lr=x", "optimizer.auxiliary.lr"),
        ("evaluation.prompts=[[1]]", "evaluation.prompts.0"),
        ("training.ema=1", "training.ema"),
        ("data.sources.²=9", "data.sources.²"),
        ("data.sources.-1.weight=9", "data.sources.-1"),
    ],
)
def test_the_key_is_the_users(override: str, key: str) -> None:
    """Oracle: the key path as it is typed; pydantic's own names of branches are not in it."""
    (line,) = refused(override)
    assert line.startswith(f"{key}: "), line


@pytest.mark.parametrize(
    "key", ["list", "bool", "int", "a[b", "constrained-float", "function-wrap"]
)
def test_a_key_may_be_called_as_a_branch(key: str) -> None:
    """Oracle: the key that was typed."""
    for where in ("", "model.", "optimizer.", "optimizer.auxiliary.schedule.", "data.sources.0."):
        (line,) = refused(f"{where}{key}=1")
        assert line.startswith(f"{where}{key}: unknown key; "), line


def test_an_unknown_key_is_told_before_what_follows_from_it(tmp_path: Path) -> None:
    """Oracle: one misspelt key in a model whose heads do not divide the width that is left."""
    model = "model: {hidden_sizes: 768, num_attention_heads: 3}\n"
    assert refused(path=written(tmp_path, MINIMAL + model)) == [
        "model.hidden_sizes: unknown key; did you mean 'hidden_size'?"
    ]
    lines = refused("seed=-1", "training.setps=1")
    assert [line.partition(":")[0] for line in lines] == ["training.setps", "seed"]


def test_what_a_value_may_be_is_told_for_all_branches() -> None:
    """Oracle: the line, written out."""
    (line,) = refused("optimizer.lr=atuo")
    assert line.endswith("expected a number or 'auto', got 'atuo'; did you mean 'auto'?")
    (line,) = refused("schedule.warmup=1.5")
    assert "0 or a whole number of steps, or a share of all steps that is less than 1" in line


def test_the_first_twenty_are_printed(tmp_path: Path) -> None:
    """Oracle: 20 lines and how many are left; a part's keys count too."""
    unknown = "".join(f"  key{n}: 1\n" for n in range(3_000))
    for where in ("model:\n", "schedule:\n  name: wsd\n"):
        lines = refused(path=written(tmp_path, f"{MINIMAL}{where}{unknown}"))
        assert len(lines) == 21 and lines[-1] == "and 2,980 more"


def test_text_is_what_was_typed_but_null_is_no_text() -> None:
    """Oracle: the words as typed."""
    typed = load(SMOKE, ["logging.project=007", "logging.name=1e3", "run_dir=null_"]).config
    assert (typed.logging.project, typed.logging.name) == ("007", "1e3")
    for key in ("logging.project", "data.sources.0.text_field", "data.sources.0.name"):
        for nothing in ("null", "~", ""):
            assert refused(f"{key}={nothing}") == [f"{key}: expected text, got null"]


def test_sections_alone_are_refused_alike() -> None:
    """Oracle: the key and the bound of a seed."""
    with pytest.raises(InputError, match="command line: generation.seed: must be less than 184467"):
        section("generation", ["generation.seed=18446744073709551616"])


# Numbers.


def whole_numbers(cls: type[Settings], path: str = "") -> list[tuple[str, type[Settings], str]]:
    """Key path, class and field of every whole number of a settings class and those in it."""
    found = []
    for name, field in cls.model_fields.items():
        key = f"{path}{field.alias or name}"
        if "int" in str(field.annotation) and "print" not in name:
            found.append((key, cls, field.alias or name))
        for inner in settings_in(field.annotation):
            found += whole_numbers(inner, f"{key}.")
    return found


NUMBERS = {(cls.__name__, name): cls for _, cls, name in whole_numbers(RunConfig)}


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_every_whole_number_has_an_end(cls: str, name: str) -> None:
    """Oracle: 2**64, which nothing that computes takes, is refused under the number's key."""
    from pydantic import ValidationError

    from llmnorm.part import explain

    found = NUMBERS[cls, name]
    for value in (2**64, [2**64]):
        with pytest.raises(ValidationError) as caught:
            found.model_validate({name: value})
        assert name in {m.loc[0] for m in explain(caught.value, found)}


def test_a_number_that_no_run_reaches_is_answered_at_once() -> None:
    """Oracle: each of these took minutes, or ended in an allocation."""
    big = {
        "training.global_batch": "1e12",
        "training.micro_batch": "1e12",
        "model.vocab_size": "1e12",
        "model.num_hidden_layers": "1e8",
        "tokenizer.vocab_size": "99999999999",
        "seed": str(2**64),
        "data.seed": str(2**64),
        "generation.seed": str(2**64),
        "data.context_length": "1e11",
    }
    lines = refused(*(f"{key}={value}" for key, value in big.items()))
    assert {line.partition(":")[0] for line in lines} == set(big)
    assert load(SMOKE, [f"seed={2**64 - 1}"]).config.seed == 2**64 - 1
    (line,) = refused("training.steps=null", "training.epochs=1e308")
    assert line == "training.epochs: must be at most 1000000, got 1e+308"


# Paths.

PLACES = ["run_dir", "data.dir", "data.sources.0.path", "data.sources.0.validation"]
PATHS = [
    "checkpoint.local",
    "data.local",
    "data.sources.0.dataset",
    "tokenizer.path",
    "training.branch_from",
    "model.pretrained",
]


@pytest.mark.parametrize("key", PATHS)
def test_an_address_is_refused_by_the_keys_that_take_none(key: str) -> None:
    """Oracle: the key, and the reason of `local_path`."""
    for address in ("s3://bucket/run", "hf://org/name"):
        line = refused(f"{key}={address}")[0]
        assert line.startswith(f"{key}: '{address}' is not on this machine: "), line


@pytest.mark.parametrize("key", PLACES)
def test_an_address_is_taken_as_it_was_typed(key: str) -> None:
    """Oracle: the text, without a slash at its end; an address that names no place is refused."""
    config = load(SMOKE, [f"{key}=s3://bucket/run/"]).config
    found: Any = config
    for name in key.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    assert found == "s3://bucket/run" and not isinstance(found, Path)
    for address in ("s3://bucket", "s3://bucket/../x", "gs://bucket//x"):
        line = refused(f"{key}={address}")[0]
        assert line == f"{key}: '{address}' is no place in a store; write SCHEME://BUCKET/NAME"


def test_a_place_of_this_machine_is_for_an_address_alone() -> None:
    """Oracle: the line of each key, by hand; beside an address it is taken."""
    with pytest.raises(InputError, match="checkpoint.local: is for a run_dir that is an address"):
        on_this_machine(load(SMOKE, ["run_dir=x", "checkpoint.local=y"]).config)
    (line,) = refused("data.local=y")
    assert line.startswith("data: 'local' is for a 'dir' that is an address (s3://bucket/data)")
    config = load(SMOKE, ["run_dir=s3://b/x", "checkpoint.local=y"]).config
    assert config.checkpoint.local == Path("y")
    config = load(SMOKE, ["data.dir=s3://b/x", "data.local=y"]).config
    assert config.data.directory == Path("y")
    assert load(SMOKE, ["data.dir=s3://b/x"]).config.data.directory == Path("data")


@pytest.mark.parametrize("key", [*PATHS, *PLACES])
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("file:///x", "'file:///x' is a URL; write the path alone"),
        ("'" + "a" * 300 + "'", "the name 'aaaaaaaaaaaaaaaaaaaa...' has more than 255 bytes"),
        ('"a\\0b"', r"'a\x00b' has a NUL byte"),
        ("a/" * 3000, "has more than 4,095 bytes"),
    ],
)
def test_a_path_that_cannot_be_one_is_refused_by_its_key(key: str, path: str, why: str) -> None:
    """Oracle: the key, and the reason of `local_path`."""
    line = refused(f"{key}={path}")[0]
    assert line.startswith(f"{key}: ") and why in line, line


def test_the_same_holds_for_examples_and_bases(tmp_path: Path) -> None:
    """Oracle: the same reason under the same key."""
    given = ["objective=classification", "objective.train=s3://b/x", "objective.validation=v.tsv"]
    assert refused(*given)[0].startswith("objective.train: 's3://b/x' is not on this machine")
    base = written(tmp_path, "base: s3://bucket/x.yaml\n")
    assert refused(path=base)[0].startswith("base: 's3://bucket/x.yaml' is not on this machine")


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: HOME, in a file and on the command line; `llmnorm:` names stay as they are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = written(tmp_path, f"base: {SMOKE.absolute()}\nrun_dir: ~/run\n")
    config = load(path, ["data.sources.0.path=~/t/*.txt", "data.sources.1.path=llmnorm:a"]).config
    assert config.run_dir == tmp_path / "run"
    assert [s.path for s in config.data.sources] == [f"{tmp_path}/t/*.txt", "llmnorm:a"]
    written(tmp_path, MINIMAL)
    assert load(written(tmp_path / "..", "base: ~/run.yaml\n")).config.training.steps == 10


# Import paths.

MODULES = {
    "fails": ("raise RuntimeError('no luck')", "RuntimeError: no luck (MODULE.py, line 1)"),
    "leaves": ("raise SystemExit('bye')", "SystemExit: bye (MODULE.py, line 1)"),
    "is_no_python": ("def f(:", "SyntaxError: invalid syntax (MODULE.py, line 1)"),
    "lacks_another": ("import not_there_at_all", "No module named 'not_there_at_all'"),
    "fails_at_a_name": ("def __getattr__(n): raise OSError('odd')", "OSError: odd (MODULE.py, li"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_fails_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the key, the path, and the last line of Python's own traceback."""
    source, last = MODULES[name]
    module = f"part_that_{name}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = refused(f"model.norm={module}:Norm")
    why = last.replace("MODULE", module)
    assert line.startswith(f"model.norm: cannot import '{module}:Norm': {why}")


@pytest.mark.parametrize("path", ["..x:Y", ":x", "a-b:C", "a.:C", "os:path", "os:Nothing"])
def test_what_is_no_import_path_is_refused(path: str) -> None:
    """Oracle: the key and the path."""
    (line,) = refused(f"model.norm={path}")
    assert line.startswith(f"model.norm: '{path}' is no ")


def test_a_class_whose_settings_fail_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the key, and the exception of the class's own validator."""
    (tmp_path / "part_that_is_picky.py").write_text(
        "from pydantic import model_validator\n"
        "from llmnorm.nn.norms.settings import NormSettings\n"
        "class Norm(NormSettings):\n"
        "    @model_validator(mode='after')\n"
        "    def _check(self): raise KeyError('odd')\n"
        "    def build(self, hidden_size): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = refused("model.norm=part_that_is_picky:Norm")
    assert line.startswith("model.norm: 'part_that_is_picky:Norm' fails on its settings: KeyError")


@pytest.mark.parametrize("key", parts())
def test_a_part_of_another_kind_is_refused(key: str) -> None:
    """Oracle: a class of another kind for every part of the tree, and the base class named."""
    part, _ = parts()[key]
    foreign = "llmnorm.nn.norms.settings:RMSNormSettings"
    if part.base.__name__ == "NormSettings":
        foreign = "llmnorm.optim.settings:AdamWSettings"
    encoder = ["model.mixer=matrix", "objective=masked_lm", "tokenizer.mask=true"]
    above = encoder if key.startswith("model.mixer.") else []
    (line,) = refused(*above, f"{key}={foreign}")
    assert line.startswith(f"{key}: '{foreign}' is of another kind; ")
    assert line.endswith(f"derived from {part.base.__name__} of {part.base.__module__}")
    bare = f"{part.base.__module__}:{part.base.__name__}"
    (line,) = refused(*above, f"{key}={bare}")
    assert line.startswith(f"{key}: '{bare}' lacks the method ")


@pytest.mark.parametrize("key", parts())
def test_an_import_path_is_what_it_names(key: str, tmp_path: Path) -> None:
    """Oracle: the settings, or the refusal, of the same class by its short name."""
    (tmp_path / "run.yaml").write_text(MINIMAL)

    def outcome(part: str) -> str:
        encoder = ["model.mixer=matrix", "objective=masked_lm", "tokenizer.mask=true"]
        above = encoder if key.startswith("model.mixer.") else []
        try:
            return to_yaml(load(tmp_path / "run.yaml", [*above, f"{key}={part}"]).config)
        except InputError as error:
            return str(error)

    _, classes = parts()[key]
    for name, cls in classes.items():
        assert outcome(f"{cls.__module__}:{cls.__name__}") == outcome(name)
