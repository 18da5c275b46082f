"""Break a run, a checkpoint, an export, a prepared corpus or a tokenizer, then use it.

    python tools/campaigns/directories.py --trials 300 --seed 1 [--out FILE]

A trial copies one run (three checkpoints, its data) and two exports, damages one thing, and gives
the result to one command. Beside the harness's judgement (`trials.py`) it checks that no whole file
of the others is gone or changed, and that weights are never wrong in silence: what `export`
writes, or the loss that `eval` finds, is that of one of the run's checkpoints, to the bit.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.campaigns.trials import Result, Trial, campaign, command

STEPS = (4, 8, 12)
CONFIG = """\
run_dir: run
data:
  sources: [{name: s, path: text.jsonl}]
  context_length: 32
  validation_bytes: 20000
  dir: data
tokenizer: {vocab_size: 300}
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64,
  depth_scaling: lns}
optimizer: {name: adamw, lr: 3e-3}
training: {steps: 12, global_batch: 4, device: cpu}
evaluation: {samples: 0, every: 4}
checkpoint: {every: 4, keep: 3}
"""
VALUES: list[Any] = [
    *(None, True, -1, 0, 3.5, 2**62, 1e308, "nope", "../../x", "a:B", "", [], {}, [3], {"a": 1}),
    *(["x"], "bfloat16", "\u2028", "x" * 300, float("nan")),
]


@cache
def whole() -> Path:
    """The run and its exports that every trial copies; made once."""
    place = Path(tempfile.mkdtemp(prefix="directories-"))
    rng = random.Random(1)
    words = ("river", "stone", "light", "green", "under", "window", "paper", "morning", "seven")
    texts = [" ".join(rng.choice(words) for _ in range(60)) + ".\n" for _ in range(300)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (place / "text.jsonl").write_text(lines, encoding="utf-8")
    (place / "base.yaml").write_text(CONFIG, encoding="utf-8")
    made = [
        ["train", "base.yaml"],
        ["export", "run", "ours"],
        ["export", "run", "stock", "--stock"],
    ]
    made += [["export", "run", f"step_{step}", "--checkpoint", str(step)] for step in STEPS]
    for typed in made:
        result = command(typed, place, seconds=300)
        assert result.code == 0, result.err
    return place


@cache
def weights() -> set[str]:
    """The checksums of the weights of each checkpoint, as `export` writes them."""
    names = [*(f"step_{step}" for step in STEPS), "stock"]  # whose gains hold the depth scales
    return {_digest(whole() / name / "model.safetensors") for name in names}


@cache
def losses() -> set[float]:
    """The validation losses of each checkpoint."""
    lines = (whole() / "run/metrics.jsonl").read_text(encoding="utf-8").split("\n")
    entries = [json.loads(line) for line in lines if line]
    return {entry["validation"]["loss"] for entry in entries if "validation" in entry}


def make(_: int, rng: random.Random, folder: Path) -> Trial:
    """A trial: what is damaged, and the command that meets it."""
    for name in ("run", "data", "ours", "stock", "text.jsonl", "base.yaml"):
        source = whole() / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, folder / name)
    words = _command(rng)
    targets = (
        ["run", "data"] if "run" in words else [words[1] if words[1] in _DIRECTORIES else "run"]
    )
    if "model.pretrained=ours" in words or "model.pretrained=stock" in words:
        targets = [words[-1].partition("=")[2]]
    where = rng.choice(targets)
    files = sorted(p for p in (folder / where).rglob("*") if p.is_file() and p.suffix != ".lock")
    if where == "data":
        files = [p for p in files if p.name in ("MANIFEST.json",) or "tokenizer" in str(p)] or files
    victim = rng.choice(files)
    what, also = rng.choice(DAMAGES)(rng, victim)
    before = _contents(folder)
    return Trial(
        what=f"{victim.relative_to(folder)}: {what}; {' '.join(words)}",
        words=words,
        folder=folder,
        names=[where, victim.name, "run", "data", "checkpoint", "tokenizer", "--", also],
        codes=(0, 2),
        check=lambda result: _lost(folder, before, victim) + _wrong(folder, words, victim, result),
    )


_DIRECTORIES = ("run", "ours", "stock")


def _command(rng: random.Random) -> list[str]:
    model = rng.choice(_DIRECTORIES)
    generate = ["generate", model, "--prompt", "river", "generation.max_new_tokens=2"]
    return rng.choice(
        [
            ["train", "run", "training.steps=13"],
            generate,
            ["export", model, "out"],
            ["export", "run", "out", "--average", "2"],
            ["eval", "run"],
            ["eval", model, "--data", "base.yaml"],
            ["inspect", model, "--rows", "2", "--data", "base.yaml", "--out", "page"],
            ["convert", model, "out", "--to", "unscaled" if model != "stock" else "lns"],
            ["doctor", "run"],
            ["runs", "run"],
            [
                "train",
                "base.yaml",
                "run_dir=new",
                "training.steps=1",
                "tokenizer=null",
                "model=null",
            ]
            + [f"model.pretrained={model}"],
        ]
    )


# Damages: each changes one file, and says how.


def _flip(rng: random.Random, file: Path) -> tuple[str, str]:
    content = bytearray(file.read_bytes())
    if not content:
        return _replace(rng, file)
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"a bit of byte {at} is flipped", file.name


def _replace(rng: random.Random, file: Path) -> tuple[str, str]:
    content = rng.choice([b"", b"\0" * 100, b"[]", b"3", b"null", b"\xff\xfe", b"[" * 100_000])
    file.write_bytes(content)
    return f"is {content[:10]!r} ({len(content)} bytes)", file.name


def _cut(rng: random.Random, file: Path) -> tuple[str, str]:
    size = rng.randrange(file.stat().st_size + 1)
    os.truncate(file, size)
    return f"is cut to {size} bytes", file.name


def _longer(rng: random.Random, file: Path) -> tuple[str, str]:
    with file.open("ab") as opened:
        opened.write(rng.randbytes(rng.randrange(1, 50)))
    return "has bytes at its end", file.name


def _kind(rng: random.Random, file: Path) -> tuple[str, str]:
    kind = rng.choice(["missing", "directory", "fifo", "loop", "dangling", "zero"])
    file.unlink()
    match kind:
        case "directory":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "loop":
            file.symlink_to(file.name)
        case "dangling":
            file.symlink_to("nowhere")
        case "zero":
            file.symlink_to("/dev/zero")
    return f"is {kind}", file.name


def _renamed(rng: random.Random, file: Path) -> tuple[str, str]:
    """The file, or the checkpoint that it is in, under another name."""
    checkpoint = file.parent if file.parent.name.startswith("step_") else None
    if checkpoint and rng.random() < 0.7:
        other = rng.choice(["step_00000099", "step_00000006", "step_6", "x"])
        checkpoint.rename(checkpoint.with_name(other))
        return f"its checkpoint is renamed to {other}", other
    file.rename(file.with_name(f"{file.name}.bak"))
    return "is renamed", file.name


def _value(rng: random.Random, file: Path) -> tuple[str, str]:
    """One JSON value is another, and the checksum of a manifest is right again."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return _flip(rng, file)
    if not isinstance(tree, dict | list):
        return _flip(rng, file)
    key = _changed(rng, tree)
    if isinstance(tree, dict) and "crc32" in tree and rng.random() < 0.8:
        from llmnorm.config.manifest import checksum_of

        tree["crc32"] = checksum_of(tree)
    file.write_text(json.dumps(tree), encoding="utf-8")
    return f"forged: {key}", file.name


def _changed(rng: random.Random, tree: Any, path: str = "") -> str:
    """Change a value at a random place; returns where and to what."""
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    if not entries:
        return f"{path} is empty"
    key, value = rng.choice(entries)
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        return _changed(rng, value, f"{path}.{key}")
    if rng.random() < 0.2:
        del tree[key]
        return f"{path}.{key} is gone"
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        tree[key] = value + rng.choice([-1, 1, 7])
    else:
        tree[key] = rng.choice(VALUES)
    return f"{path}.{key} = {str(tree[key])[:40]!r}"


DAMAGES: list[Callable[[random.Random, Path], tuple[str, str]]] = [
    *(_flip, _replace, _cut, _longer, _kind, _renamed),
    *([_value] * 5),
]


def _lost(folder: Path, before: dict[str, str], victim: Path) -> list[str]:
    """Whole files that the command has changed or removed.

    A run that goes on writes its records and removes checkpoints that are damaged or superfluous;
    all else stays as it was. Two whole checkpoints must be left of three.
    """
    after = _contents(folder)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    allowed: tuple[str, ...] = (
        "run/checkpoints/",
        "run/metrics.jsonl",
        "run/samples.jsonl",
        "run/config.yaml",
    )
    allowed += (
        "run/tracker.json",
        "run/DONE",
        "run/run.lock",
        "run/tokenizer/",
        "run/eval",
        "run/plots",
    )
    own = str(victim.relative_to(folder))
    wrong = [n for n in changed if not n.startswith(allowed) and n != own and "/found/" not in n]
    found = [f"{name} is changed or gone" for name in wrong[:3]]
    saved = [f for f in (folder / "run/checkpoints").glob("step_*/*.safetensors") if f.is_file()]
    if len(saved) < 2 and "checkpoints" not in own:
        found.append(f"only {len(saved)} checkpoints are left")
    return found


def _wrong(folder: Path, words: list[str], victim: Path, result: Result) -> list[str]:
    """Weights or losses that are none of the run's, from a command that says nothing.

    An exported directory holds no checksum, so a changed number in its weights cannot be noticed.
    """
    if result.code or victim == folder / words[1] / "model.safetensors":
        return []
    if words[0] == "export" and "--average" not in words:
        written = folder / "out" / "model.safetensors"
        if not written.is_file() or _digest(written) not in weights():
            return ["the exported weights are those of no checkpoint"]
    if words[:2] == ["eval", "run"] and len(words) == 2:
        for file in (folder / "run/eval").glob("*.json"):
            loss = json.loads(file.read_text(encoding="utf-8"))["validation"]["loss"]
            if loss not in losses():
                return [f"the loss {loss} is that of no checkpoint"]
    return []


def _contents(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    return {str(p.relative_to(folder)): _digest(p) for p in files}


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


if __name__ == "__main__":
    sys.exit(campaign("directories", make, default=300, about=__doc__.split("\n")[0]))
