"""Breaks the shipped configurations in many small ways, and trains what is still valid.

    python tools/campaigns/settings.py --trials 200 --seed 1

A trial takes one of the shipped files, changes one to three places of it (types, names, nesting,
numbers, keys, paths, bytes of the text, settings on the command line) and gives it to
`llmnorm config`, or, made tiny before, to `llmnorm train` for two steps. It passes if the mutation
is refused by a line that names file or key, or trains; if what `config` prints reads back as the
same settings; and if no traceback, hang or gigabyte comes of it.
"""

import json
import random
import string
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tools.campaigns.trials import Result, Trial, campaign  # noqa: E402

FILES = sorted((ROOT / "configs").rglob("*.yaml"))
SECTIONS = (
    *("run_dir", "seed", "data", "tokenizer", "model", "objective", "optimizer", "schedule"),
    *("training", "evaluation", "checkpoint", "parallel", "logging", "generation", "base"),
    "imports",
)
NAMES = ["run.yaml", "command line: ", "argument ", *(f"{name}." for name in SECTIONS), *SECTIONS]

TINY = [
    "data.context_length=32",
    "data.validation_bytes=2000",
    "training.steps=2",
    "training.tokens=null",
    "training.epochs=null",
    "training.global_batch=2",
    "training.micro_batch=null",
    "training.device=cpu",
    "evaluation.every=null",
    "evaluation.samples=0",
    "evaluation.prompts=[]",
    "checkpoint.every=null",
    "logging.trackers=[]",
    "parallel.compile=false",
    "schedule.warmup=1",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "model.intermediate_size=64",
    "model.max_position_embeddings=64",
]
# Sizes that some mixers have of their own.
OF_MIXERS = [
    ["model.mixer.head_dim=16"],
    ["model.mixer.0.head_dim=16"],
    ["model.mixer.num_heads=2"],
    ["model.mixer=softmax"],
    [],
]
VALUES: list[Any] = [
    None,
    True,
    False,
    *(0, 1, 2, 3, -1, 10**30, 2**63, 2**64, 0.5, 1.5, -0.0, 1e-300, 1e300),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "x", "auto", "none", "null", "1e-3", "3", "true", "üñí", "\u2028", "a\0b", "x" * 300),
    *(
        "[",
        "{",
        "*",
        "&a",
        "!!int x",
        "${HOME}",
        "${NOT_SET}",
        "a:b",
        "no.such:Class",
        ":",
        "..x:Y",
    ),
    *(
        "~",
        "~/x",
        "s3://bucket/x",
        "file:///x",
        "/dev/zero",
        "/dev/null",
        ".",
        "/",
        "llmnorm:smoke",
    ),
    *("llmnorm.nn.norms.settings:RMSNormSettings", "llmnorm.part:Settings", "os:path"),
    [],
    {},
    [None],
    [[]],
    ["x"],
    [1, 2],
    {"name": "x"},
    {"name": ["x"]},
    {"list": 1},
    {"name": None, "name2": 1},
]
KEYS = [
    "list",
    "int",
    "name",
    "a[b",
    "",
    "0",
    "²",
    "from",
    "x.y",
    "eps ",
    "Model",
    "__class__",
    "ß",
]


@cache
def original(file: Path) -> dict[str, Any]:
    """A shipped file's own tree, its base by its whole path."""
    from llmnorm.config.yaml_text import read_yaml

    tree = read_yaml(file)
    bases = tree.get("base", [])
    if bases:
        named = [bases] if isinstance(bases, str) else bases
        tree["base"] = [str((file.parent / base).resolve()) for base in named]
    return tree


@cache
def tiny(file: Path) -> dict[str, Any] | None:
    """The same configuration, small enough to train in a second; None where that is not found."""
    from llmnorm.config.file import load
    from llmnorm.config.saved import to_tree
    from llmnorm.part import InputError

    for own in OF_MIXERS:
        try:
            config = load(file, [*TINY, *own]).config
        except InputError:
            continue
        tree = to_tree(config)
        tree["run_dir"] = "runs/run"
        tree["model"].pop("vocab_size", None)
        if tree["objective"]["name"] != "classification":
            tree["data"]["sources"] = [{"name": "s", "path": "text.jsonl"}]
        tree["data"]["dir"] = "data"
        if tree["tokenizer"].get("path") is None:
            tree["tokenizer"] |= {"vocab_size": 300, "train_bytes": 20_000}
        return tree
    return None


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The key path of every value below the root."""
    items = node.items() if isinstance(node, dict) else ()
    for key, value in enumerate(node) if isinstance(node, list) else items:
        yield (*path, key)
        yield from places(value, (*path, key))


def holder(tree: Any, path: tuple[Any, ...]) -> Any:
    """The mapping or list that holds the last key of a path."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


# Mutations of a tree.


def replace(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """Another value, mostly of another kind."""
    value = rng.choice(VALUES)
    holder(tree, path)[path[-1]] = value
    return f"= {value!r:.40}"


def scale(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """Another number."""
    at = holder(tree, path)
    value = at[path[-1]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return replace(rng, tree, path)
    at[path[-1]] = rng.choice([-value, value + 1, value - 1, value / 2, value * 1e-9, 3 * value])
    return f"{value} -> {at[path[-1]]}"


def wrap(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """The value inside of lists or mappings."""
    at = holder(tree, path)
    depth = rng.choice([1, 1, 1, 2, 70])
    as_list = rng.random() < 0.5
    for _ in range(depth):
        at[path[-1]] = [at[path[-1]]] if as_list else {rng.choice(KEYS): at[path[-1]]}
    return f"inside {depth} {'lists' if as_list else 'mappings'}"


def unwrap(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """The first value of a mapping or list in its place."""
    at = holder(tree, path)
    value = at[path[-1]]
    if not isinstance(value, dict | list) or not value:
        return delete(rng, tree, path)
    at[path[-1]] = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return "its first value in its place"


def delete(_: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """Nothing."""
    del holder(tree, path)[path[-1]]
    return "gone"


def rename(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """A misspelt key, or one that is none."""
    at, key = holder(tree, path), path[-1]
    if not isinstance(at, dict):
        return replace(rng, tree, path)
    spot = rng.randrange(len(key) + 1)
    typo = key[:spot] + rng.choice(["", *string.ascii_lowercase]) + key[spot + 1 :]
    new = rng.choice([typo, typo, typo, key.upper(), rng.choice(KEYS)])
    at[new] = at.pop(key)
    return f"called {new!r}"


def swap(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """Two values, each in the place of the other."""
    other = rng.choice(list(places(tree)))
    shorter, longer = sorted((path, other), key=len)
    if longer[: len(shorter)] == shorter:
        return delete(rng, tree, path)
    here, there = holder(tree, path), holder(tree, other)
    here[path[-1]], there[other[-1]] = there[other[-1]], here[path[-1]]
    return f"<-> {'.'.join(map(str, other))}"


def add(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """One more key or item beside it."""
    at = holder(tree, path)
    key, value = rng.choice(KEYS), rng.choice(VALUES)
    if isinstance(at, dict):
        at[key] = value
    else:
        at.append(value)
    return f"beside it {key!r}: {value!r:.40}"


def choose(rng: random.Random, tree: Any, _: tuple[Any, ...]) -> str:
    """Another part, or another of a setting's choices: most of these are valid."""
    from llmnorm.config.docs import parts

    key, (_part, classes) = rng.choice(list(parts().items()))
    *above, last = key.split(".")
    at = tree
    for name in above:
        below = at.setdefault(name, {})
        if not isinstance(below, dict):
            below = at[name] = {}
        at = below
    at[last] = rng.choice([*classes])
    return f"and {key} = {at[last]}"


def flip(rng: random.Random, tree: Any, path: tuple[Any, ...]) -> str:
    """The other truth value, or a number near the old one: most of these are valid."""
    at = holder(tree, path)
    value = at[path[-1]]
    if isinstance(value, bool):
        at[path[-1]] = not value
    elif isinstance(value, int):
        at[path[-1]] = max(0, value + rng.choice([-1, 1, 2]))
    elif isinstance(value, float):
        at[path[-1]] = value * rng.choice([0.5, 0.9, 1.1, 2])
    else:
        return choose(rng, tree, path)
    return f"{value} -> {at[path[-1]]}"


TREE: list[Callable[[random.Random, Any, tuple[Any, ...]], str]] = [
    *(replace, replace, replace, scale, scale),
    *(wrap, unwrap, delete, rename, rename, swap, add),
    *(choose, choose, flip, flip, flip),
]


# Mutations of the text.


def of_text(rng: random.Random, text: str) -> tuple[str, bytes]:
    """What was done, and the bytes of the file."""
    lines = text.split("\n")
    row = rng.randrange(len(lines))
    where = rng.randrange(len(text) + 1)
    odd = rng.choice(
        ["\t", "\0", "\u2028", "[", "]", "{", "}", ":", "*a", "&a ", "!!int ", "'", "|"]
    )
    match rng.randrange(10):
        case 0:
            return f"{odd!r} at {where}", (text[:where] + odd + text[where:]).encode()
        case 1:
            return f"line {row} gone", "\n".join(lines[:row] + lines[row + 1 :]).encode()
        case 2:
            return f"line {row} twice", "\n".join(
                lines[:row] + lines[row:][:1] + lines[row:]
            ).encode()
        case 3:
            return f"cut at {where}", text[:where].encode()
        case 4:
            return "a byte that is not UTF-8", text[:where].encode() + b"\xff" + text[
                where:
            ].encode()
        case 5:
            return "a byte order mark", b"\xef\xbb\xbf" + text.encode()
        case 6:
            return "carriage returns", text.replace("\n", "\r\n").encode()
        case 7:
            indented = (
                lines[:row] + ["  " + line for line in lines[row : row + 1]] + lines[row + 1 :]
            )
            return f"line {row} further in", "\n".join(indented).encode()
        case 8:
            depth = rng.choice([70, 3_000, 100_000])
            return f"{depth} brackets", (text + f"\nextra: {'[' * depth}").encode()
    return "in UTF-16", text.encode("utf-16")


def words_of(rng: random.Random) -> list[str]:
    """Settings for the command line."""
    from llmnorm.config.docs import key_paths

    found = []
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(key_paths())
        if rng.random() < 0.2:
            key = f"{key}.{rng.choice([key for key in KEYS if key])}"
        value = rng.choice([v for v in VALUES if not (isinstance(v, str) and "\0" in v)])
        text = value if isinstance(value, str) else json.dumps(value)
        found.append(f"{key}={text}")
    return found


# What is valid, but would train for longer than a trial has, is only read.
DEAR = {"steps": 10, "tokens": 4_000, "epochs": 3, "global_batch": 32, "context_length": 256}
DEAR |= {"hidden_size": 512, "num_hidden_layers": 16, "intermediate_size": 4_096, "head_dim": 512}
DEAR |= {"num_attention_heads": 64, "num_key_value_heads": 64, "max_position_embeddings": 10**5}


def is_dear(tree: Any) -> bool:
    """Whether a mutation made a run much larger."""
    for path in places(tree):
        value = holder(tree, path)[path[-1]]
        dear = DEAR.get(path[-1], 10**9)
        if isinstance(value, int | float) and not isinstance(value, bool) and dear < value < 10**13:
            return True
    return False


def make(number: int, rng: random.Random, folder: Path) -> Trial:
    """The trial of a number."""
    train = number % 2 == 0
    file = rng.choice(FILES)
    tree = tiny(file) if train else original(file)
    while tree is None:
        file = rng.choice(FILES)
        tree = tiny(file)
    tree = json.loads(json.dumps(tree))
    done, overrides = [], []
    content = b""
    kind = rng.random()
    if kind < 0.7:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            there = list(places(tree))
            if there:
                path = rng.choice(there)
                done.append(f"{'.'.join(map(str, path))} {rng.choice(TREE)(rng, tree, path)}")
    elif kind < 0.85:
        overrides = words_of(rng)
        done += overrides
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    content = text.encode()
    train = train and not is_dear(tree)
    if kind >= 0.85:
        what, content = of_text(rng, text)
        done.append(what)
    (folder / "run.yaml").write_bytes(content)
    (folder / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) + "\n" for _ in range(120)
        ),
        encoding="utf-8",
    )
    words = ["train" if train else "config", "run.yaml", *overrides]
    compiles = b"compile: true" in content or "parallel.compile=true" in overrides
    return Trial(
        what=f"{words[0]} {file.relative_to(ROOT)}: {'; '.join(done)}"[:300],
        words=words,
        folder=folder,
        names=NAMES,
        codes=(0, 2, 3) if train else (0, 2),
        check=(lambda result: trained(result, folder)) if train else reads_back,
        environment={"HOME": str(folder)},
        times=5 if train and compiles else 1,  # a C++ compiler takes as long as all else together
    )


WORDS = ["river", "stone", "light", "green", "under", "window", "paper", "morning", "seven"]


def trained(result: Result, folder: Path) -> list[str]:
    """A run that ended well has a record, wherever it was put."""
    if result.code == 0 and not any(folder.rglob("metrics.jsonl")):
        return ["exit code 0, but no run was written"]
    return []


def reads_back(result: Result) -> list[str]:
    """What `config` prints is the same configuration."""
    if result.code != 0:
        return []
    from llmnorm.config.file import load

    file = Path("printed.yaml").absolute()
    try:
        file.write_text(result.out, encoding="utf-8")
        from llmnorm.config.saved import to_yaml

        again = to_yaml(load(file).config)
    except Exception as error:
        return [f"what was printed is not read: {str(error)[:200]}"]
    finally:
        file.unlink(missing_ok=True)
    return [] if again == result.out else ["what was printed reads back as something else"]


if __name__ == "__main__":
    raise SystemExit(campaign("settings", make, default=120, about=str(__doc__).split("\n")[0]))
