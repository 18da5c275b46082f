"""The gate for YAML: what it understands, and what it refuses before it costs time or memory."""

from pathlib import Path

import pytest

from llmnorm.config.file import load
from llmnorm.config.yaml_text import NotYAML, find, override, parse, plain, where_of
from llmnorm.part import InputError

MINIMAL = "data: {sources: default}\ntraining: {steps: 10}\n"


def values(text: str) -> object:
    node = parse(text, "x.yaml", line_numbers=True)
    return None if node is None else plain(node)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("on", "on"),
        ("2024-01-02", "2024-01-02"),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("!!int 3", 3),
        ("!!float 3", 3.0),
        ("!!bool true", True),
        ("! 3", "3"),
        ("!!seq [1]", [1]),
        ("-.inf", float("-inf")),
        ("0e-999", 0.0),
        ("&a 3", 3),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """Oracle: the core schema of YAML 1.2, chapter 10.3."""
    assert values(f"key: {text}") == {"key": value}


def test_aliases_repeat_what_they_name() -> None:
    """Oracle: the tree written out; the place is the alias's own."""
    text = "a: &x {b: [1, 2]}\nc: *x\nd:\n  - *x\n"
    node = parse(text, "x.yaml", line_numbers=True)
    assert node is not None
    assert plain(node) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": [{"b": [1, 2]}]}
    assert where_of(node, ("c",)) == "x.yaml:2" and where_of(node, ("d", 0)) == "x.yaml:4"
    assert find(node, ("d", 1)) is None and where_of(node, ("e", "f")) == "x.yaml:1"


BILLION = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20)
)
LADDER = "a0: &a0 []\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3_000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!int abc", "x.yaml:1: a: abc is not a whole number"),
        ("a:\n  b: !!bool maybe", "x.yaml:2: a.b: maybe is not true or false"),
        ("a: !!null 3", "x.yaml:1: a: 3 is not null"),
        ("a: !!float x", "x.yaml:1: a: x is not a number"),
        ("a: !!python/object:os.system []", "x.yaml:1: a: the YAML tag"),
        ("a: !own {b: 1}", "x.yaml:1: a: the YAML tag !own is not understood"),
        ("a: !!set {b}", "x.yaml:1: a: the YAML tag tag:yaml.org,2002:set is not understood"),
        ("a: 1e-999", "x.yaml:1: a: 1e-999 is so small that it would be 0"),
        ("a: " + "9" * 5_000, "x.yaml:1: a: a number of 5,000 digits; at most 300 are read"),
        ("a: &a [*a]", r"x.yaml:1: a.0: \*a stands inside of &a"),
        ("a: &a {b: *a}", r"x.yaml:1: a.b: \*a stands inside of &a"),
        ("a: *b", "x.yaml:1: not valid YAML: there is no &b before"),
        ("? [a]\n: 1", "x.yaml:1: a key is not plain text"),
        ("a: {? {b: 1} : 1}", "x.yaml:1: a key of a is not plain text"),
        ("a: {b: 1, b: 2}", "x.yaml:1: a.b is given twice"),
        ("a: 1\n---\nb: 2", "x.yaml:2: not valid YAML: a second document"),
        ("[" * 3_000 + "]" * 3_000, "x.yaml:1: nested deeper than 64 levels"),
        ("[" * 100_000, "x.yaml:1: nested deeper than 64 levels"),
        ("a: " + "{b: " * 100_000, "x.yaml:1: nested deeper than 64 levels"),
        ("- " * 100_000, "x.yaml:1: nested deeper than 64 levels"),
        (LADDER, "x.yaml:64: nested deeper than 64 levels"),
        (BILLION, "x.yaml:5: more than 100,000 values, those of aliases counted"),
        ("a: [" + "1," * 100_001 + "]", "x.yaml:1: more than 100,000 values"),
        ("a: b\0c", "x.yaml: not valid YAML"),
    ],
    ids=range(24),
)
def test_what_is_refused_has_file_line_and_key(text: str, message: str) -> None:
    """Oracle: the place in the text, counted by hand."""
    with pytest.raises(InputError, match=message):
        values(text)


def test_a_value_that_is_no_yaml_is_text_on_the_command_line() -> None:
    """Oracle: the text as typed; what is YAML, but refused in a file, is refused here too."""
    for text in ("[x", "a: b: c", "*.txt", "*x", "@x"):
        assert plain(override(f"key={text}")) == {"key": text}
    for text in ("!!int x", "[" * 3_000, "1e-999"):
        with pytest.raises(InputError, match="command line: "):
            override(f"key={text}")
    with pytest.raises(InputError, match="command line: key: is not UTF-8 text"):
        override("key=\udcff")
    with pytest.raises(InputError, match="no setting is nested so deep"):
        override("a." * 5_000 + "b=1")
    assert issubclass(NotYAML, InputError)


def test_bases_that_double_are_read_once_each(tmp_path: Path) -> None:
    """Oracle: 2**40 readings would not end; the settings are those of the last file."""
    for n in range(40):
        (tmp_path / f"b{n}.yaml").write_text(f"base: [b{n + 1}.yaml, b{n + 1}.yaml]\n")
    (tmp_path / "b40.yaml").write_text(MINIMAL)
    assert load(tmp_path / "b0.yaml").config.training.steps == 10


def test_a_chain_of_bases_has_an_end(tmp_path: Path) -> None:
    """Oracle: a chain longer than the limit; Python's own recursion limit is not reached."""
    for n in range(100):
        (tmp_path / f"b{n}.yaml").write_text(f"base: b{n + 1}.yaml\n")
    with pytest.raises(InputError, match="'base' leads to more than 1,000 files, or through more"):
        load(tmp_path / "b0.yaml")


def test_a_file_that_is_no_configuration_is_refused_by_its_size_and_kind(tmp_path: Path) -> None:
    """Oracle: the sizes written; a device is not read at all."""
    large = tmp_path / "large.yaml"
    large.write_text("#" * (1 << 22) + "\n")
    with pytest.raises(InputError, match="is larger than 4,194,304 bytes"):
        load(large)
    with pytest.raises(InputError, match="/dev/zero: is a device"):
        load(Path("/dev/zero"))
    base = tmp_path / "base.yaml"
    base.write_text("base: /dev/zero\n")
    with pytest.raises(InputError, match="/dev/zero: is a device"):
        load(base)
