"""Bad inputs through the real command line, and the page that lists them.

Every mistake is answered by exit code 2, one line on stderr that begins with "llmnorm: error:", and
nothing written: the working directory is compared before and after. The tables below hold the whole
message of each; `<...>` stands for what differs from case to case, `needs` for what must be in it.
docs/troubleshooting.md shows no message that is not produced here.
"""

import argparse
import gzip
import hashlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from llmnorm import cli
from llmnorm.runs.lock import RunLock
from tests.machine.test_gpus import no_gpu, nvidia_smi
from tests.running import CHILDREN, PATIENCE, ROOT, assert_same_run

SMOKE = "configs/smoke.yaml"
CONFIGURATION = "data: {sources: default}\ntraining: {steps: 10}\n"


class Case(NamedTuple):
    """A command that must be refused.

    Attributes:
        words: the command line, in a working directory that holds the configurations and texts.
        message: the whole line after "llmnorm: error: ".
        needs: parts of it that the placeholders stand for.
        prepare: what spoils the working directory before.
        real: run as `python -m llmnorm` instead of in this process.
    """

    words: str
    message: str
    needs: tuple[str, ...] = ()
    prepare: Callable[[], object] | None = None
    real: bool = False


def write(name: str, content: str | bytes) -> Callable[[], object]:
    """Makes a file of the working directory."""
    raw = content.encode() if isinstance(content, str) else content

    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(raw)

    return make


COMMAND_LINE = {
    "unknown command": Case(
        "tran x.yaml",
        "'<word>' is not a command; <hint> (`llmnorm --help` shows the usage)",
        ("'tran'", "did you mean 'train'?"),
        real=True,
    ),
    "no configuration": Case(
        "train",
        "the following arguments are required: CONFIG (`llmnorm train --help` shows the usage)",
        real=True,
    ),
    "option that is a setting": Case(
        "generate run --top-k 1",
        "there is no option <option>; <hint> (`llmnorm <command> --help` shows the usage)",
        ("--top-k; a setting is written generation.top_k=VALUE",),
    ),
    "unknown option": Case(
        f"train {SMOKE} --dryrun",
        "there is no option <option>; <hint> (`llmnorm <command> --help` shows the usage)",
        ("--dryrun", "did you mean '--dry-run'?"),
    ),
    "setting without a value": Case(
        f"train {SMOKE} seed",
        "unrecognized arguments: <word>; a setting is written key.sub=value "
        "(`llmnorm <command> --help` shows the usage)",
        ("seed",),
    ),
    "number of rows that is none": Case(
        f"data {SMOKE} --show 0",
        "argument --show: expected a whole number of at least 1, got '0' "
        "(`llmnorm data --help` shows the usage)",
        real=True,
    ),
    "unknown part": Case(
        "parts rmss", "no part is called '<word>'; <hint>", ("did you mean 'rms'?",), real=True
    ),
    "settings where none belong": Case(
        "doctor seed=3", "<command>: takes no settings, got '<setting>'", ("doctor", "seed=3")
    ),
    "config of nothing": Case(
        "config", "config: give a configuration file or a run directory, or --schema"
    ),
    "schema of something": Case(
        "config --schema seed=3",
        "config: --schema takes no CONFIG and no settings; the schema is always the same",
    ),
    "configuration that is not here": Case(
        "data hf://org/name.yaml",
        "argument <name>: '<path>' is not on this machine: <scheme>:// is not taken here; "
        "mount it, or copy it, and give the local path "
        "(`llmnorm <command> --help` shows the usage)",
        ("CONFIG: 'hf://org/name.yaml'",),
    ),
    "text of no run": Case(
        "generate configs/smoke.yaml", "generate: there is no directory <path>", ("smoke.yaml",)
    ),
    "export of no model": Case(
        "export tests out",
        "export: <directory> has neither config.yaml (a run) nor config.json<more>",
        ("tests",),
        real=True,
    ),
    "inspection of no model": Case(
        "inspect tests out",
        "inspect: <directory> has neither config.yaml (a run) nor config.json<more>",
        ("tests",),
    ),
    "checkpoint that is no name": Case(
        "generate run --checkpoint lates",
        "argument --checkpoint: '<word>' is no checkpoint; <hint> "
        "(`llmnorm generate --help` shows the usage)",
        ("did you mean 'latest'?",),
        real=True,
    ),
}

UNKNOWN_KEY = "<place>: <key>: unknown key; <hint>"
NOT_YAML = "<file>:<line>: not valid YAML: <problem>"

FILES = {
    "missing file": Case(
        "train configs/smok.yaml",
        "<file>: there is no such file; did you mean '<file>'?",
        ("configs/smok.yaml:", "'configs/smoke.yaml'"),
        real=True,
    ),
    "missing directory": Case(
        "config nowhere/x.yaml", "<file>: there is no such file", ("nowhere/x.yaml",)
    ),
    "directory that is no run": Case(
        "train tests",
        "<directory>: is a directory without config.yaml, so it is no run directory",
        ("tests:",),
    ),
    "empty file": Case(
        "train x.yaml", "<file>: the file is empty", ("x.yaml",), write("x.yaml", "")
    ),
    "binary file": Case(
        "train x.yaml",
        "<file>: is not UTF-8 text (byte <n>)",
        ("x.yaml",),
        write("x.yaml", b"\xff\0"),
    ),
    "tab": Case("train x.yaml", NOT_YAML, ("x.yaml:2:",), write("x.yaml", "seed: 1\n\tdata: 2\n")),
    "unclosed bracket": Case(
        "train x.yaml", NOT_YAML, ("x.yaml:2:",), write("x.yaml", "seed: [1\n")
    ),
    "key given twice": Case(
        "train x.yaml",
        "<file>:<line>: <key> is given twice",
        ("x.yaml:3: training.steps",),
        write("x.yaml", "training:\n  steps: 1\n  steps: 2\n"),
    ),
    "list in the place of sections": Case(
        "train x.yaml",
        "<file>: expected a mapping of sections, got list",
        ("x.yaml",),
        write("x.yaml", "- 1\n"),
    ),
    "brackets without end": Case(
        "train x.yaml",
        "<file>:<line>: nested deeper than 64 levels",
        ("x.yaml:1:",),
        write("x.yaml", "seed: " + "[" * 100_000),
        real=True,
    ),
    "required section missing": Case(
        "train x.yaml",
        "<place>: <key>: is required",
        ("x.yaml", "data:"),
        write("x.yaml", "training: {steps: 1}\n"),
    ),
    "base that leads back": Case(
        "train x.yaml",
        "<file>: 'base' leads back to this file",
        ("x.yaml",),
        write("x.yaml", "base: x.yaml\n"),
    ),
    "misspelt key in a file": Case(
        "train x.yaml",
        UNKNOWN_KEY,
        ("x.yaml:5: model.norn:", "did you mean 'norm'?"),
        write("x.yaml", f"{CONFIGURATION}model:\n  hidden_size: 64\n  norn: rms\n"),
    ),
}

WHOLE_NUMBER = "<place>: <key>: expected a whole number, got <value>"
NOT_HERE = (
    "<place>: <key>: '<path>' is not on this machine: <scheme>:// is not taken here; mount it, or "
    "copy it, and give the local path"
)
AT_LEAST = "<place>: <key>: must be at least <number>, got <number>"
NOT_VALID = "<place>: <key>: '<word>' is not valid; <hint>"


def setting(words: str, message: str, *needs: str, real: bool = False) -> Case:
    """A wrong setting: the message places it on the command line."""
    return Case(f"train {SMOKE} {words}", message, ("command line: ", *needs), real=real)


SETTINGS = {
    "replicas of nothing": setting(
        "parallel.replicas=2 parallel.sharding=ddp",
        "<place>: parallel.replicas <n> has no meaning for parallel.sharding '<sharding>'; "
        "valid: fsdp2, hsdp",
    ),
    "hsdp without replicas": setting(
        "parallel.sharding=hsdp",
        "<place>: parallel.sharding 'hsdp' needs parallel.replicas; 1 is 'fsdp2'",
    ),
    "less time for the first step": setting(
        "parallel.timeout=2000",
        "<place>: parallel.timeout_first is less than parallel.timeout <n>",
    ),
    "unknown key": setting("model.nrom=rms", UNKNOWN_KEY, "model.nrom:", "did you mean 'norm'?"),
    "unknown section": setting("optimiser.lr=1", UNKNOWN_KEY, "did you mean 'optimizer'?"),
    "unknown key of a list's item": setting(
        "data.sources.0.pth=x", UNKNOWN_KEY, "data.sources.0.pth:", "did you mean 'path'?"
    ),
    "near-miss name": setting(
        "model.norm=rmss",
        "<place>: <key>: no part is called '<word>'; <hint>",
        "model.norm:",
        "did you mean 'rms'?",
    ),
    "near-miss choice": setting(
        "training.precision=fp16", NOT_VALID, "training.precision:", "did you mean 'bf16'?"
    ),
    "text for a number": setting("training.steps=many", WHOLE_NUMBER, "training.steps", "'many'"),
    "fraction for a whole number": setting("training.steps=1.5", WHOLE_NUMBER, "training.steps"),
    "negative steps": setting("training.steps=-4", AT_LEAST, "training.steps", "at least 1, got"),
    "truth value for a number": setting(
        "seed=true", "<place>: <key>: expected a number, got true", "seed:"
    ),
    "number for a truth value": setting(
        "training.deterministic=1", "<place>: <key>: expected true or false, got 1"
    ),
    "no number at all": setting(
        "optimizer.lr=.nan", "<place>: <key>: expected a finite number, got nan", "optimizer.lr"
    ),
    "momentum of a run that never forgets": setting(
        "optimizer=muon optimizer.momentum=1",
        "<place>: <key>: expected a number of at least 0 and less than 1, or a warm-up like "
        "{from: 0.85, to: 0.95, steps: 300}; got 1",
        "optimizer.momentum",
    ),
    "momentum warmed up in no step": setting(
        "optimizer=normuon optimizer.momentum.from=0.85 optimizer.momentum.to=0.9 "
        "optimizer.momentum.steps=0",
        AT_LEAST,
        "optimizer.momentum.steps",
        "at least 1, got 0",
    ),
    "decay under nap": setting(
        "optimizer=muon optimizer.nap=true",
        "<place>: optimizer.nap takes the place of decay on hidden matrices; "
        "set optimizer.weight_decay=0",
    ),
    "tasks between evaluations": setting(
        "evaluation.tasks=[a.yaml] evaluation.every=50 evaluation.tasks_every=120",
        "<place>: evaluation.tasks_every 120 is no multiple of evaluation.every 50: tasks are "
        "scored at evaluations",
    ),
    "limit of no tasks": setting(
        "evaluation.tasks_limit=5",
        "<place>: evaluation.tasks_limit: there are no evaluation.tasks; leave it out",
    ),
    "tasks of an encoder": setting(
        "objective=masked_lm tokenizer.mask=true model.mixer=hydra model.mlp=none "
        "evaluation.tasks=[a.yaml]",
        "<place>: evaluation.tasks: lm-eval's tasks ask for a causal language model, and this "
        "objective trains a LlmNormForMaskedLM; leave it out",
    ),
    "window of few steps": setting(
        "training.spike.window=4", AT_LEAST, "training.spike.window", "at least 8, got 4"
    ),
    "group that is given nothing": setting(
        "optimizer.groups=[{'match':'*.mlp.*'}]",
        "<place>: optimizer.groups.0: '*.mlp.*' is given nothing; give lr, weight_decay or rule",
    ),
    "rule of another optimizer": setting(
        "optimizer=muon optimizer.groups=[{'match':'*.mlp.*','rule':'mun'}]",
        "<place>: optimizer.groups.0.rule: 'mun' is no rule of this optimizer; <hint>",
        "did you mean 'muon'?",
    ),
    "rule that is everybody's": setting(
        "optimizer.groups=[{'match':'*.mlp.*','rule':'adamw'}]",
        "<place>: optimizer.groups.0.rule: 'adamw' updates every parameter here; leave it out",
    ),
    "gram form in bf16": setting(
        "optimizer=normuon optimizer.orthogonalize=gram optimizer.precision=bf16",
        "<place>: optimizer.orthogonalize=gram diverges in bf16; "
        "set optimizer.precision=fp32 or optimizer.orthogonalize=standard",
    ),
    "a law below its models": Case(
        f"train {SMOKE} optimizer.lr=auto",
        "optimizer.lr: auto: the Step Law was fitted to models of 0.2 to 1.1 billion parameters; "
        "this one has <n> million outside the embedding, and it says nothing below 10 million; "
        "give a number",
    ),
    "pieces that do not add up": Case(
        f"train {SMOKE} --print-groups optimizer=muon "
        "optimizer.split_sizes={'*.q_proj.weight':[9,9]}",
        "optimizer.split_sizes: *.q_proj.weight: [9, 9] are 18 rows, <name> has <n>",
        ("has 64",),
    ),
    "pattern of no name": Case(
        f"train {SMOKE} --print-groups "
        "optimizer.groups=[{'match':'norm.weight','lr':2},{'match':'*.mpl.*','lr':0.5}]",
        "optimizer.groups.1.match: '<pattern>' matches no parameter that is trained; <hint>",
        ("'*.mpl.*'", "did you mean '*.mlp.*'?"),
    ),
    "rule of a vector": Case(
        f"train {SMOKE} --print-groups optimizer=muon "
        "optimizer.groups=[{'match':'*','rule':'muon'}]",
        "optimizer.groups.0.rule: muon updates matrices of two axes, and <name> has the shape "
        "(64,); choose a pattern that does not match it",
    ),
    "two lengths": setting(
        "training.tokens=9",
        "<place>: give exactly one of training.steps, training.tokens, training.epochs; got <keys>",
        "training.steps and training.tokens",
    ),
    "batch that does not divide": setting(
        "training.micro_batch=5",
        "<place>: training.micro_batch <n> does not divide training.global_batch <n>; "
        "the nearest that does is <n>",
        "the nearest that does is 4",
        real=True,
    ),
    "context longer than the model's": setting(
        "data.context_length=999",
        "<place>: data.context_length <n> is more than model.max_position_embeddings <n>",
    ),
    "heads that do not divide": setting(
        "model.num_attention_heads=3",
        "<place>: hidden_size <n> is not a multiple of num_attention_heads <n>; "
        "change one of them or give head_dim",
    ),
    "warm-up longer than the run": setting(
        "schedule.warmup=99", "<place>: schedule.warmup <n> is not less than training.steps <n>"
    ),
    "index past a list": setting(
        "data.sources.5.weight=1",
        "<place>: <key>: the list has 2 items, the last index is 1",
        "data.sources.5",
    ),
    "weights for some": Case(
        f"train {SMOKE} data.sources.0.weight=null",
        "<place>: data.sources: '<source>' has no weight; give all sources one, or none",
        ("'prose'",),
    ),
    "stages that do not end": setting(
        'data.stages=[{"weights":{"prose":1}},{"weights":{"notes":1}}]',
        "<place>: data.stages.<n>: does not end; give it 'until' (a share of the run, e.g. 0.8), "
        "'rows' or 'tokens'; only the last stage lasts to the end of the run",
    ),
    "stage of an unknown source": setting(
        'data.stages=[{"weights":{"prosa":1}}]',
        "<place>: data.stages.<n>.weights: no source is called '<source>'; <hint>",
        "'prosa'; did you mean 'prose'?",
    ),
    "decay longer than the run": setting(
        "schedule=wsd schedule.decay=99",
        "<place>: schedule.decay <n> is not less than training.steps <n>; give fewer steps, or a "
        "share",
    ),
    "two origins": setting(
        "data.sources.0.dataset=x", "<place>: exactly one of 'path' and 'dataset' must be given"
    ),
    "vocabulary too small": setting("tokenizer.vocab_size=10", AT_LEAST, "tokenizer.vocab_size"),
    "part that cannot be imported": setting(
        "model.norm=no_such:Norm", "<place>: <key>: cannot import '<path>': <reason>", "no_such"
    ),
    "part of another kind": setting(
        "optimizer=llmnorm.nn.norms.settings:RMSNormSettings",
        "<place>: <key>: '<path>' is of another kind; what is wanted here is derived from <class> "
        "of <module>",
        "optimizer:",
        "OptimizerSettings of llmnorm.optim.settings",
    ),
    "part that builds nothing": setting(
        "model.norm=llmnorm.nn.norms.settings:NormSettings",
        "<place>: <key>: '<path>' lacks the method <method>",
        "model.norm:",
        "build",
    ),
    "number with a digit too many": setting(
        "training.global_batch=1e12",
        "<place>: <key>: must be at most <number>, got <number>",
        "training.global_batch:",
        "got 1000000000000",
    ),
    "nothing for a text": setting(
        "logging.project=null", "<place>: <key>: expected text, got null", "logging.project:"
    ),
    "store that is not here": setting(
        "tokenizer.path=s3://bucket/run",
        NOT_HERE,
        "tokenizer.path: 's3://bucket/run'",
        real=True,
    ),
    "bucket alone": setting(
        "run_dir=s3://bucket",
        "<place>: <key>: '<address>' is no place in a store; write SCHEME://BUCKET/NAME",
        "run_dir: 's3://bucket'",
    ),
    "name that is too long": setting(
        f"run_dir={'a' * 300}",
        "<place>: <key>: the name '<name>' has more than 255 bytes",
        "run_dir:",
    ),
    "environment variable that is not set": setting(
        "seed=${NOT_SET_ANYWHERE}",
        "<place>: the environment variable <name> is not set",
        "NOT_SET_ANYWHERE",
    ),
}


def source(content: str | bytes, name: str = "bad.txt", *more: str) -> dict[str, object]:
    """The words and the preparation of a corpus that is one bad file."""
    return {
        "words": " ".join([f"data {SMOKE} data.sources.0.path={name}", *more]),
        "prepare": write(name, content),
    }


SKIP = "; <key>=skip leaves such records out"
LOOKED = " (looked in <directory>; paths are relative to it)"
NO_FIELD = (
    "<file>:<line>: there is no field '<field>' (text_field); the fields are: <fields>" + SKIP
)
DATA = {
    "missing text": Case(
        f"data {SMOKE} data.sources.0.path=tests/data/text/prosa.jsonl",
        f"<key>: there is no file <file>{LOOKED}; <hint>",
        ("data.sources.0.path", "did you mean 'tests/data/text/prose.jsonl'?"),
        real=True,
    ),
    "glob without a file": Case(
        f"data {SMOKE} data.sources.0.path=*.jsonl",
        "<key>: no file matches <pattern>" + LOOKED,
        ("data.sources.0.path",),
    ),
    "directory of texts": Case(
        f"data {SMOKE} data.sources.0.path=tests/data/text",
        "<key>: <directory> is a directory; write a glob like <directory>/*.txt",
    ),
    "kind that is not read": Case(
        **source("x", "bad.pdf"),
        message="<key>: <file> is not of a kind that is read; "
        "valid: .txt, .jsonl, .parquet, .arrow, and .gz, .zst after the first two",
        needs=("data.sources.0.path", "bad.pdf"),
    ),
    "empty corpus": Case(
        **source(""), message="<source>: the source has no text", needs=("data.sources.0 (prose)",)
    ),
    "binary corpus": Case(
        **source(bytes(range(256)) * 400),
        message="<file>: this is a binary file, not text" + SKIP,
        needs=("bad.txt",),
    ),
    "corpus in Latin-1": Case(
        **source("é".encode("latin-1") * 50_000),
        message="<file>: not UTF-8 text (byte <n>); convert it" + SKIP,
        needs=("bad.txt", "byte 0"),
    ),
    "one-line corpus": Case(
        **source("a line\n"),
        message="<source>: <n> bytes of text are too few to hold some out for validation; "
        "give more text, or a validation file",
        needs=("data.sources.0 (prose): 7 bytes",),
    ),
    "missing text field": Case(
        **source('{"text": "fine"}\n{"body": "not"}\n', "bad.jsonl"),
        message=NO_FIELD,
        needs=("bad.jsonl:2:", "'text'", "the fields are: body"),
        real=True,
    ),
    "field that holds a number": Case(
        **source('{"text": 3}\n', "bad.jsonl"),
        message="<file>:<line>: the field '<field>' holds int, not text" + SKIP,
        needs=("bad.jsonl:1:",),
    ),
    "record that is no JSON": Case(
        **source('{"text": "fine"}\n{oops\n', "bad.jsonl"),
        message="<file>:<line>: not JSON (<reason>)" + SKIP,
        needs=("bad.jsonl:2:",),
    ),
    "truncated gzip": Case(
        **source(gzip.compress(b"words " * 9000)[:-20], "bad.txt.gz"),
        message="<file>: cannot be read (<reason>)",
        needs=("bad.txt.gz",),
    ),
    "file that is no parquet": Case(
        **source("x" * 100, "bad.parquet"),
        message="<file>: not a readable .parquet file (<reason>)",
        needs=("bad.parquet",),
    ),
    "source without a full row": Case(
        **source(
            "words " * 20,
            "few.txt",
            "data.sources.0.validation=tests/data/text/prose.jsonl",
            "data.context_length=256",
        ),
        message="<source>: <tokens> tokens do not fill a row of data.context_length <n>; "
        "give more text, or a shorter context_length",
        needs=("data.sources.0 (prose)", "256"),
    ),
    "context longer than the corpus": Case(
        f"data {SMOKE} data.context_length=1000000 model.max_position_embeddings=1000000",
        "<source>: <tokens> tokens do not fill a row of data.context_length <n>; "
        "give more text, or a shorter context_length",
        ("data.sources.0 (prose)", "1000000"),
    ),
    "validation without text": Case(
        f"data {SMOKE} data.sources.0.validation=none.txt",
        "<key>: <file> has no text",
        ("data.sources.0.validation", "none.txt"),
        write("none.txt", ""),
    ),
    "validation that is binary": Case(
        f"data {SMOKE} data.sources.0.validation=none.txt",
        "<file>: this is a binary file, not text" + SKIP,
        ("none.txt",),
        write("none.txt", b"\0" * 99),
    ),
    "dataset that is not there": Case(
        f"data {SMOKE} data.sources.0.path=null data.sources.0.dataset=nobody/nothing",
        f"<key>: '<dataset>' is no local directory{LOOKED}, and the hub did not show it (<reason>)",
        ("data.sources.0.dataset", "nobody/nothing"),
    ),
    "tokenizer that is not there": Case(
        f"data {SMOKE} tokenizer.vocab_size=32768 tokenizer.path=none",
        f"tokenizer.path: there is no directory none{LOOKED}; <cure>",
    ),
    "tokenizer directory without one": Case(
        f"data {SMOKE} tokenizer.vocab_size=32768 tokenizer.path=tests",
        "tokenizer.path: <directory> holds no tokenizer.json; <cure>",
        ("tests", "save_pretrained"),
    ),
    "tokenizer that is none": Case(
        f"data {SMOKE} tokenizer.vocab_size=32768 tokenizer.path=bad",
        "tokenizer.path: <file> is no tokenizer (<reason>)",
        ("bad/tokenizer.json",),
        write("bad/tokenizer.json", "{"),
    ),
    "output below a file": Case(
        f"data {SMOKE} data.dir={SMOKE}/data",
        "data.dir: <path>: <reason>; set another data.dir",
        ("Not a directory",),
        real=True,
    ),
    "output that the system refuses": Case(
        f"data {SMOKE} data.dir=/proc/data",
        "data.dir: <path>: <reason>; set another data.dir",
        ("/proc/data",),
    ),
    "shard with a flipped bit": Case(
        f"data {SMOKE}",
        "<file>: the shard does not have its checksum; "
        "delete <directory> and prepare the data again",
        ("/prose/train-00000.tokens.npy",),
        lambda: spoil_data(flip),
    ),
    "truncated shard": Case(
        f"train {SMOKE}",
        "<file>: the shard has <n> bytes, expected <n>; "
        "delete <directory> and prepare the data again",
        ("/prose/train-00000.tokens.npy",),
        lambda: spoil_data(truncate),
    ),
    "missing shard": Case(
        f"train {SMOKE}",
        "<file>: the shard is missing; delete <directory> and prepare the data again",
        ("/prose/train-00000.tokens.npy",),
        lambda: spoil_data(Path.unlink),
    ),
    "damaged manifest of the data": Case(
        f"train {SMOKE}",
        "<file>: is damaged (<reason>); delete <directory> and prepare the data again",
        ("MANIFEST.json",),
        lambda: spoil_data(truncate, "MANIFEST.json"),
    ),
}


def spoil_data(how: Callable[[Path], object], name: str = "prose/train-00000.tokens.npy") -> None:
    """Prepared data of which one file is spoilt."""
    assert cli.main(["data", SMOKE]) == 0
    (file,) = Path("data/packed").glob(f"*/{name}")
    how(file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def workplace(directory: Path) -> None:
    """What a user's checkout has: the configurations and the texts of the smoke run."""
    shutil.copytree(ROOT / "configs", directory / "configs")
    shutil.copytree(ROOT / "tests" / "data" / "text", directory / "tests" / "data" / "text")
    smoke = directory / SMOKE  # reads the copies, so that a case can change them
    smoke.write_text(smoke.read_text().replace("llmnorm:text/", "tests/data/text/"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prepared data and a finished run of 4 steps, `run`."""
    directory = tmp_path_factory.mktemp("trained")
    workplace(directory)
    done = llmnorm(directory, f"train {SMOKE} run_dir=run {LENGTH}")
    assert done.returncode == 0, done.stderr
    return directory


LENGTH = "training.steps=4 checkpoint.every=2 evaluation.every=4"
POINT = "run/checkpoints/step_00000004"
RUNS = {
    "run of other settings": Case(
        f"train {SMOKE} run_dir=run {LENGTH} optimizer.lr=1",
        "run_dir: <run>: <key> (<old> there, <new> here): is another run; "
        "go on with the old settings, or start a new one with run_dir=<free>",
        ("optimizer.lr (0.003 there, 1.0 here)", "run_dir=run-2"),
        real=True,
    ),
    "key that a run cannot change": Case(
        "train run model.norm=layer",
        "run_dir: <run>: <key> (<old> there, <new> here): an existing run cannot change this key; "
        "start another with run_dir=<free>",
        ("model.norm.name (rms there, layer here)", "run_dir=run-2"),
    ),
    "run of other data": Case(
        "train run training.steps=6",
        "<checkpoint>: was trained on the data <identity>, this run's data is now <identity> "
        "(<directory>); restore the corpus or start a new run_dir",
        ("step_00000004",),
        lambda: other_text(),
    ),
    "stages of rows that were read": Case(
        'train run training.steps=6 data.stages=[{"weights":{"notes":1}}]',
        "data.stages: <checkpoint> has read the rows before <n> as it was told, so only what "
        "begins at row <n> (step <n>) or later can change; for another mixture from there on, "
        "start a branch: run_dir=NEW training.branch_from=<checkpoint>",
        ("step_00000004",),
    ),
    "branch of another model": Case(
        f"train {SMOKE} run_dir=b {LENGTH} training.branch_from={POINT} model.norm=layer",
        "training.branch_from: <checkpoint> has model.norm.name <part>, and this run <part>; a "
        "branch keeps its parent's model: give model.norm.name=<part>, or leave "
        "training.branch_from out and train from the first step",
        ("step_00000004", "rms, and this run layer"),
    ),
    "branch of another optimizer": Case(
        f"train {SMOKE} run_dir=b {LENGTH} training.branch_from={POINT} optimizer=conda",
        "training.branch_from: <checkpoint> was trained by optimizer '<part>', whose state is none "
        "of '<part>'; give optimizer=<part>, or begin with these weights and a new optimizer: "
        "model.pretrained=<checkpoint> in the place of training.branch_from",
        ("'adamw'", "'conda'"),
    ),
    "branch with another tokenizer": Case(
        f"train {SMOKE} run_dir=b {LENGTH} training.branch_from={POINT} "
        'data.sources=[{"name":"prose","path":"tests/data/text/prose.jsonl"}]',
        "tokenizer: this run branches from <checkpoint> onto other data, and would train a "
        "tokenizer of its own; keep its parent's: tokenizer.path=<directory> <setting> (the "
        "default, since none is trained)",
        ("tokenizer.path=run/tokenizer tokenizer.vocab_size=32768",),
    ),
    "branch in epochs onto other rows": Case(
        f"train {SMOKE} run_dir=b training.branch_from={POINT} data.context_length=32 "
        "training.steps=null training.epochs=2",
        "training.epochs: counts passes over one corpus, and this branch reads other rows than its "
        "parent; give training.steps or training.tokens, which count its parent's too",
    ),
    "run directory that is a file": Case(
        f"train {SMOKE} run_dir={SMOKE}", "run_dir: <path> is a file", (SMOKE,)
    ),
    "run directory of something else": Case(
        f"train {SMOKE} run_dir=configs",
        "run_dir: <directory> holds other files and no config.yaml; a free directory is <free>",
        ("configs-2",),
    ),
    "run whose checkpoints are gone": Case(
        "train run training.steps=6",
        "<checkpoints>: a checkpoint of step <n> was written (<file>), but there is none: is a "
        "disk not mounted, or a copy not complete? Bring it back; to train from step 1 again, use "
        "run_dir=<free>, or remove the files <files> there",
        ("run/checkpoints", "of step 4", "(DONE)", "run_dir=run-2", "DONE and metrics.jsonl"),
        lambda: shutil.rmtree("run/checkpoints"),
    ),
    "run whose settings are gone": Case(
        f"train {SMOKE} run_dir=run",
        "run_dir: <run> has checkpoints, but no config.yaml; bring it back (each checkpoint's "
        "MANIFEST.json holds its settings), or use <free>",
        ("run-2",),
        lambda: Path("run/config.yaml").unlink(),
    ),
    "record that is a directory": Case(
        "train run training.steps=6",
        "<file>: is a directory, not a file",
        ("run/metrics.jsonl",),
        lambda: (Path("run/metrics.jsonl").unlink(), Path("run/metrics.jsonl").mkdir()),
    ),
    "run directory below a file": Case(
        f"train {SMOKE} run_dir={SMOKE}/run",
        "run_dir: <path> cannot be made: <path> is a file",
        (f"{SMOKE}/run",),
    ),
    "run directory that the system refuses": Case(
        f"train {SMOKE} run_dir=/proc/run",
        "run_dir: <path> cannot be made: <reason>",
        ("/proc/run",),
    ),
    "model smaller than its vocabulary": Case(
        f"train {SMOKE} model.vocab_size=10",
        "model.vocab_size: <n> is less than the tokenizer's <n>; "
        "leave it out, or give at least that",
        ("10", "512"),
    ),
    "no whole checkpoint": Case(
        "train run training.steps=6",
        "<file> is truncated (<n> bytes instead of <n>); <more>; no checkpoint is whole: restore "
        "one, or begin anew in another run_dir",
        ("step_00000004/rank_00000.safetensors", "step_00000002/rank_00000.safetensors"),
        lambda: [truncate(f) for f in Path("run/checkpoints").glob("step_*/*.safetensors")],
    ),
    "checkpoint of a step that is not there": Case(
        "generate run --checkpoint 7",
        "<checkpoints>: there is no checkpoint of step <n>; nearest: <steps>",
        ("run/checkpoints", "step 7", "nearest: 2, 4"),
    ),
    "damaged checkpoint asked for by name": Case(
        "generate run --checkpoint 4",
        "<file> is damaged (its checksum differs); the nearest whole checkpoint is of step <n>",
        ("step_00000004/rank_00000.safetensors", "of step 2"),
        lambda: flip(Path("run/checkpoints/step_00000004/rank_00000.safetensors")),
    ),
    "no checkpoint": Case(
        "generate run",
        "<run> has no checkpoint yet; `llmnorm train run` makes one",
        ("run",),
        lambda: shutil.rmtree("run/checkpoints"),
    ),
    "damaged tokenizer of a run": Case(
        "generate run",
        "<directory>: no tokenizer can be read (<reason>)",
        ("run/tokenizer",),
        lambda: truncate(Path("run/tokenizer/tokenizer.json")),
    ),
}


def other_text() -> None:
    with Path("tests/data/text/notes.txt").open("a") as file:
        file.write("One more line.\n")
    assert cli.main(["data", SMOKE]) == 0


def pattern(message: str) -> re.Pattern[str]:
    """A message in which `<...>` stands for any text."""
    parts = re.split(r"(<[a-z ]+>)", message)
    return re.compile("".join(".+" if p.startswith("<") else re.escape(p) for p in parts))


def contents(directory: Path) -> dict[str, str]:
    """Every path below the directory with a hash of its content."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(directory.rglob("*"))
        # The lock of a run says who held it last; Python's own files come with an import.
        if path.name not in ("run.lock", "__pycache__") and path.suffix != ".pyc"
    }


def check(case: Case, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Runs the case in `place` and checks code, line and directory."""
    if case.prepare:
        case.prepare()
    capfd.readouterr()
    before = contents(place)
    if case.real:
        done = subprocess.run(
            [sys.executable, "-m", "llmnorm", *case.words.split()],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        try:
            code = cli.main(case.words.split())
        except SystemExit as leaving:
            code = int(str(leaving.code))
        out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("llmnorm: error: ") and err.count("\n") == 1, err
    message = err.removeprefix("llmnorm: error: ").rstrip("\n")
    assert pattern(case.message).fullmatch(message), message
    missing = [need for need in case.needs if need not in message]
    assert not missing, message
    assert contents(place) == before


WITHOUT_A_RUN = {**COMMAND_LINE, **FILES, **SETTINGS, **DATA}


@pytest.mark.parametrize("name", WITHOUT_A_RUN)
def test_a_mistake_is_one_line_with_its_cure(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    check(WITHOUT_A_RUN[name], tmp_path, capfd)


@pytest.mark.parametrize("name", RUNS)
def test_a_mistake_about_a_run_leaves_it_as_it_was(
    name: str,
    tmp_path: Path,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    place = shutil.copytree(trained, tmp_path / "place", copy_function=shutil.copy2)
    monkeypatch.chdir(place)
    assert cli.main(["data", SMOKE]) == 0  # the same files at another place: looked at once more
    check(RUNS[name], place, capfd)


(COMMANDS,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))


@pytest.mark.parametrize("command", sorted(COMMANDS.choices))
def test_every_command_refuses_an_option_that_it_does_not_have(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = [o for o in COMMANDS.choices[command]._option_string_actions if o.startswith("--")]
    message = (
        f"there is no option --qqq; valid: {', '.join(sorted(own))} "
        f"(`llmnorm {command} --help` shows the usage)"
    )
    check(Case(f"{command} --qqq x y z", message), tmp_path, capfd)


# What can stop, or be said of, a run that is well configured.

TROUBLE = {
    "gpu": "nvidia-smi shows a GPU (<gpus>, driver <version>, which runs CUDA up to <version>) "
    "that torch <version> (<build>) cannot use: <reason>; <cure>, "
    "or train on the CPU with training.device=cpu (setup: LLMNORM_DEVICE=cpu)",
    "launch": "one process was started, but <n> GPUs are free; to use them all, run: <command>",
    "extra": "<module> is not installed; run: bash tools/bootstrap.sh <extra>",
    "locked": "<run>: <owner> is training in this directory; "
    "wait for it, stop it, or set another run_dir",
    "full disk": "<checkpoints>: the checkpoint of step <n> was not saved: <reason>; "
    "the ones before it are as they were",
    "full disk, metrics": "<file>: cannot be written: <reason>; "
    "the run goes on from its newest checkpoint when it can",
    "full disk, data": "data.dir: <path>: <reason>; "
    "finished shards are kept, so make room and run it again",
    "diverged": "training: stopped at step <n>: <n> steps in a row with a non-finite loss or "
    "gradient (rows <rows>); they were skipped, and the weights of before them are saved in "
    "<checkpoint>; go on from it: llmnorm train <run> run_dir=<run> "
    "training.branch_from=<checkpoint> optimizer.lr=LOWER",
    "diverged, spoilt": "training: stopped at step <n>: <n> steps in a row with a non-finite loss "
    "or gradient (rows <rows>); the update before them has spoilt the weights, which are not "
    "saved; no checkpoint; start again with a lower optimizer.lr",
    "damaged line": "<file>: line <n> is damaged and is kept in <file>; whole lines stay",
    "stretched": "the schedule is stretched from <n> to <n> steps: the learning rate goes from "
    "<rate> at step <n> to <rate> at step <n>; a decayed run is better continued from a checkpoint "
    "before its decay<more>",
    "fallen back": "<file> is damaged (its checksum differs); going back to step <n>",
    "bits": "going on from <checkpoint>; the last bits may differ from an uninterrupted run: "
    "<what> <there> -> <here>",
    "file and key": "parallel.sharding: is '<sharding>', but the launch file asks for <sharding>; "
    "leave the key out, or launch with <file>",
    "precision": "the launch file asks for mixed precision '<precision>', training.precision is "
    "'<precision>' and alone decides; write mixed_precision: 'no' there",
    "file section": "the launch file says <key>: <value>, but <reason>; write <key>: <value>",
    "other library": "the launch file asks for <what>, which parallel.sharding does not offer; "
    "valid: ddp, fsdp2, zero1, zero2, zero3 (launch/accelerate/)",
    "zero stage": "the launch file says zero_stage: <stage>; valid: 1, 2, 3 (without sharding: "
    "launch with launch/accelerate/ddp.yaml)",
    "replicas": "parallel.replicas: <n> does not divide the <n> processes; "
    "the nearest that does is <n>",
    "processes": "training.global_batch: <n> rows do not divide over <n> processes; start <n>, the "
    "nearest number that they divide over (a new run could have training.global_batch=<n>)",
    "none of several": "parallel.sharding: 'none' is one process, but <n> were launched; "
    "did you mean 'ddp'?",
    "replicas, ddp": "parallel.replicas: <n> has no meaning for sharding '<sharding>'; "
    "launch with launch/accelerate/fsdp2.yaml",
    "whole model": "--adapter: needs the whole model on every process, which sharding '<sharding>' "
    "does not give; launch with launch/accelerate/ddp.yaml and parallel.sharding=auto",
    "silent process": "rank <n> (host <host>, process <n>): not heard of for <n> s: it was killed "
    "or stopped, or its host is gone; last step <n>, in phase <phase><more>",
    "stuck process": "rank <n> (host <host>, process <n>): nothing has advanced there for <n> s; "
    "last step <n>, in phase <phase><more>",
    "failed process": "rank <n> (host <host>, process <n>): <error>; last step <n>, in phase "
    "<phase><more>",
    "one of several fails": "rank <n> (host <host>, process <n>): <error>; <line>; to leave its "
    "host out: --exclude=<host>",
    "slow process": "rank <n> (host <host>, process <n>) is slow, and the others wait for it: in "
    "the steps <n> to <n> it worked <n> ms a step, the median of the processes <n> ms",
    "dropped": "<key> was dropped: a later override chose another part",
    "short of a row": "<source>: <tokens> tokens do not fill a row of data.context_length <n>; "
    "give more text, or a shorter context_length",
}


def lines(text: str) -> list[str]:
    """What a command says, without who says it."""
    return [re.sub("^llmnorm: (error|note): ", "", line) for line in text.splitlines()]


def says(trouble: str, text: str) -> str | None:
    """The line of `text` that is this trouble's message."""
    found = pattern(TROUBLE[trouble])
    return next((line for line in lines(text) if found.fullmatch(line)), None)


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def llmnorm(
    place: Path, words: str, file_size: int = -1, missing: str = "", **environment: str
) -> Done:
    """A command in a process of its own.

    No file may grow there beyond `file_size` bytes, and the module `missing` is not installed.
    """
    out, err = place.parent / "out.txt", place.parent / "err.txt"
    arguments = (words.split(), place, out, err, file_size, missing, environment)
    process = CHILDREN.Process(target=_child, args=arguments)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None, f"still running: {err.read_text()}"
    return Done(process.exitcode, out.read_text(), err.read_text())


def _child(
    words: list[str],
    place: Path,
    out: Path,
    err: Path,
    size: int,
    missing: str,
    environment: dict[str, str],
) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    if missing:
        # None in sys.modules is a module that Python does not find.
        sys.modules[missing] = None  # type: ignore[assignment]
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == missing else find(name, *a)
    sys.exit(cli.main(words))


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "place")


@no_gpu
def test_a_gpu_that_torch_cannot_use_stops_training(place: Path, tmp_path: Path) -> None:
    nvidia_smi(tmp_path, used=[3])
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    before = contents(place)
    done = llmnorm(place, f"train {SMOKE} run_dir=other", PATH=path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says("gpu", done.stderr) and contents(place) == before


def test_free_gpus_are_pointed_at(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # The check of torch's own CUDA is left out: on this machine it would stop the run.
    nvidia_smi(tmp_path, used=[3, 3])
    monkeypatch.setattr("llmnorm.machine.gpus.check_gpu", lambda device: None)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(place)
    words = ["train", SMOKE, "--dry-run", "run_dir=two words"]
    assert cli.main(words) == 0
    said = says("launch", capfd.readouterr().err)
    assert said and said.endswith(f"--num_processes 2 -m llmnorm train {SMOKE} 'run_dir=two words'")
    assert cli.main([*words, "training.device=cpu"]) == 0
    assert not says("launch", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("module", "extra", "override"),
    [
        ("tensorboard", "track", "logging.trackers=[tensorboard]"),
        ("deepspeed", "deepspeed", "parallel.sharding=zero2"),
        ("s3fs", "remote", "run_dir=s3://bucket/x"),
    ],
)
def test_a_missing_extra_names_the_line_that_installs_it(
    place: Path, module: str, extra: str, override: str
) -> None:
    done = llmnorm(place, f"train {SMOKE} run_dir=x {override}", missing=module)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says("extra", done.stderr) == (
        f"{module} is not installed; run: bash tools/bootstrap.sh {extra}"
    )
    assert not (place / "x").exists()


def test_a_directory_in_which_another_process_trains(place: Path) -> None:
    with RunLock(place / "run"):
        done = llmnorm(place, "train run training.steps=6")
    assert done.returncode == 2 and f"process {os.getpid()} on " in str(says("locked", done.stderr))


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_disk_that_is_full_in_the_middle_of_a_save(place: Path, asynchronous: str) -> None:
    # Oracle: the kernel's own refusal, the checkpoints of before, and a run that was never refused.
    constant = f"train {SMOKE} {LENGTH} schedule=constant schedule.warmup=0"
    assert llmnorm(place, f"{constant} run_dir=first").returncode == 0
    before = contents(place / "first" / "checkpoints")
    longer = f"train first training.steps=8 checkpoint.asynchronous={asynchronous}"
    done = llmnorm(place, longer, file_size=1_000_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "step 6 was not saved: File too large" in str(says("full disk", done.stderr))
    assert contents(place / "first" / "checkpoints") == before
    assert llmnorm(place, longer).returncode == 0
    assert llmnorm(place, f"{constant} run_dir=straight training.steps=8").returncode == 0
    assert_same_run(place / "first", place / "straight", 8)


def test_a_disk_that_is_full_when_a_step_is_recorded(place: Path) -> None:
    metrics = place / "run" / "metrics.jsonl"
    line = metrics.read_text().splitlines()[-1] + "\n"
    with metrics.open("a") as file:  # until the next line does not fit
        file.write(line * ((400_000 - metrics.stat().st_size) // len(line)))
    done = llmnorm(place, "train run training.steps=6", file_size=400_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert says("full disk, metrics", done.stderr)
    assert llmnorm(place, "train run training.steps=6").returncode == 0


def test_a_disk_that_is_full_while_data_is_prepared(place: Path) -> None:
    words = f"data {SMOKE} data.dir=other"
    done = llmnorm(place, words, file_size=10_000)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert says("full disk, data", done.stderr)
    assert llmnorm(place, words).returncode == 0


def test_a_run_that_diverges_says_where(place: Path) -> None:
    words = "run_dir=other training.steps=20 schedule=constant optimizer.lr=1e38"
    done = llmnorm(place, f"train {SMOKE} {words}")
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert says("diverged, spoilt", done.stderr)
    assert (place / "other" / "DIVERGED").read_text() == "6\n"


def test_a_damaged_record_and_a_longer_schedule_are_told(place: Path) -> None:
    metrics = place / "run" / "metrics.jsonl"
    whole = metrics.read_bytes().split(b"\n")
    metrics.write_bytes(b"\n".join([whole[0], b"[1, 2]", *whole[2:]]))
    done = llmnorm(place, "train run training.steps=6")
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl: line 2 is damaged" in str(says("damaged line", done.stderr))
    assert "from 4 to 6 steps" in str(says("stretched", done.stderr))
    assert metrics.read_bytes().split(b"\n")[:4] == [whole[0], *whole[2:5]]


def test_what_is_said_when_a_run_goes_on(place: Path) -> None:
    flip(place / "run/checkpoints/step_00000004/rank_00000.safetensors")
    plain = os.environ.get("ATEN_CPU_CAPABILITY", "").lower() == "default"
    other = "avx2" if plain else "default"  # than the run was made with
    done = subprocess.run(
        [sys.executable, "-m", "llmnorm", "train", "run", "training.steps=6"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ATEN_CPU_CAPABILITY": other},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step_00000004" in str(says("fallen back", done.stderr))
    assert str(says("bits", done.stderr)).endswith(f"-> {other.upper()}")
    assert "going on from run/checkpoints/step_00000002;" in done.stderr


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
PROCESSES = {"WORLD_SIZE": "4", "RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}
# What accelerate exports, overrides, which message, what it says.
LAUNCHES = {
    "another key": (FSDP, "parallel.sharding=ddp", "file and key", "asks for fsdp2"),
    "ddp file": (PROCESSES, "parallel.sharding=fsdp2", "file and key", "asks for ddp"),
    "bf16": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "", "precision", "'bf16'"),
    "fsdp 1": (FSDP | {"FSDP_VERSION": "1"}, "", "file section", "fsdp_version: 1"),
    "offloading": (
        FSDP | {"FSDP_OFFLOAD_PARAMS": "true"},
        "",
        "file section",
        "write fsdp_offload_params: false",
    ),
    "megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "", "other library", "Megatron-LM"),
    "zero 0": (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "", "zero stage", "zero_stage: 0"),
    "zero 3 and 2": (ZERO, "parallel.sharding=zero2", "file and key", "asks for zero3"),
    "zero, offloading": (
        ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
        "",
        "file section",
        "write offload_optimizer_device: none",
    ),
    "zero, clipping": (
        ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"},
        "",
        "file section",
        "the key is training.max_grad_norm",
    ),
    "zero, fp16": (ZERO | {"ACCELERATE_MIXED_PRECISION": "fp16"}, "", "precision", "'fp16'"),
    "zero, replicas": (ZERO, "parallel.replicas=2", "replicas, ddp", "'zero3'"),
    "three of four": (FSDP | PROCESSES, "parallel.replicas=3", "replicas", "does is 2"),
    "replicas of ddp": (PROCESSES, "parallel.replicas=2", "replicas, ddp", "'ddp'"),
    "three of sixteen rows": ({"WORLD_SIZE": "3", "RANK": "0"}, "", "processes", "start 2, "),
    "none": (PROCESSES, "parallel.sharding=none", "none of several", "4 were launched"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_launch_file_and_key_disagree_in(name: str, place: Path) -> None:
    environment, words, trouble, needs = LAUNCHES[name]
    before = contents(place)
    done = llmnorm(place, f"train {SMOKE} run_dir=other {words}", **environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert needs in str(says(trouble, done.stderr)), done.stderr
    assert contents(place) == before


def test_an_adapter_wants_the_whole_model(place: Path) -> None:
    done = llmnorm(place, "eval run parallel.sharding=fsdp2 --adapter adapter")
    assert done.returncode == 2 and says("whole model", done.stderr), done.stderr


def test_a_dropped_override_is_noted(place: Path) -> None:
    done = llmnorm(place, f"config {SMOKE} schedule.final=0.5 schedule=linear")
    assert done.returncode == 0
    assert str(says("dropped", done.stderr)).startswith("schedule.final")


def test_a_source_that_is_too_short_once_it_is_tokens(place: Path) -> None:
    # Its bytes would fill a row, its tokens do not: what is prepared serves a shorter context.
    write(str(place / "few.txt"), "words " * 60)()
    sources = "data.sources.0.path=few.txt data.sources.0.validation=tests/data/text/prose.jsonl"
    done = llmnorm(place, f"data {SMOKE} {sources} data.context_length=256")
    assert done.returncode == 2 and says("short of a row", done.stderr)
    again = llmnorm(place, f"data {SMOKE} {sources} data.context_length=32")
    assert (again.returncode, again.stderr) == (0, "")


# The page.


def test_the_page_shows_only_messages_that_are_produced_here() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    shown = [line for block in blocks for line in block.splitlines()]
    cases = {**WITHOUT_A_RUN, **RUNS}.values()
    known = {*(case.message for case in cases), *TROUBLE.values()}
    assert len(shown) >= 40 and len(set(shown)) == len(shown)
    assert [line for line in shown if line not in known] == []
    assert [message for message in TROUBLE.values() if message not in shown] == []
