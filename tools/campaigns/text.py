"""Odd corpora, prepared by `llmnorm data` with tiny settings: they pass or are refused in a line.

    python tools/campaigns/text.py --trials 300 --seed 1

A trial is a corpus of one or two sources in one of four kinds of files, odd in one way of
`ODDITIES`, and sometimes in two. A refusal must name a file or the key of a source or tokenizer,
and must leave no prepared data behind that the next command would take for whole.
"""

import gzip
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import zstandard

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.campaigns.trials import Result, Trial, campaign

WORDS = ["river", "stone", "light", "ÿ", "漢字", "🙂", "don't", "12345", "--", "\u2028", "a\u0301"]
Documents = list[str]


def _documents(rng: random.Random) -> Documents:
    count = rng.choice([0, 1, 2, 19, 20, 21, 80, 200])
    size = rng.choice([0, 1, 10, 60])
    return [" ".join(rng.choice(WORDS) for _ in range(size)) for _ in range(count)]


def _equal(texts: Documents, rng: random.Random) -> Documents:
    return texts[:1] * rng.choice([5, 500])


def _few_texts(texts: Documents, rng: random.Random) -> Documents:
    return texts[:3] * rng.choice([10, 100])


def _long_word(texts: Documents, rng: random.Random) -> Documents:
    word = rng.choice(["a", "ACGT", "漢字", " ", "\n", "1", "-", "=_", "\u0301"])
    return [*texts, word * rng.choice([300, 300_000 // len(word)])]


def _separators(texts: Documents, rng: random.Random) -> Documents:
    end = rng.choice(["\r", "\r\n", "\u2028", "\u2029", "\x85", "\x1c", "\v", "\x00", "\ufeff"])
    return [text + end * rng.choice([1, 3]) for text in texts]


def _special(texts: Documents, rng: random.Random) -> Documents:
    return [text + rng.choice(["<|bos|>", "<|eos|>", "<|pad|>", "[UNK]"]) for text in texts]


TEXTS: list[Callable[[Documents, random.Random], Documents]] = [
    lambda texts, rng: texts,
    _equal,
    _few_texts,
    _long_word,
    _separators,
    _special,
]


def _cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw) + 1)]


def _flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 5])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _record(raw: bytes, rng: random.Random) -> bytes:
    bad = rng.choice(
        [
            b'{"text": null}',
            b'{"text": ["a"]}',
            b'{"text": "\\ud800"}',
            b'{"text": "\\u0000"}',
            b'{"txt": "a"}',
            b'"text"',
            b"null",
            b"{",
            b"[" * 200_000,
            b'{"text": ' * 2000,
            b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
            b'{"text": "a", "n": 1e999, "m": NaN}',
            b'{"text": "a\xff"}',
            b'{"text": "' + b"x" * 300_000,
            b'{"text": "a"}' * 2,
            b"\xef\xbb\xbf{}",
        ]
    )
    lines = raw.split(b"\n")
    lines.insert(rng.randrange(len(lines)), bad)
    return b"\n".join(lines)


BYTES: list[Callable[[bytes, random.Random], bytes]] = [
    lambda raw, rng: raw,
    _cut,
    _flip,
    _record,
    lambda raw, rng: b"\xef\xbb\xbf" + raw,
    lambda raw, rng: raw.decode(errors="replace").encode("utf-16"),
    lambda raw, rng: raw.decode(errors="replace").encode("latin-1", errors="replace") + b"\xe9",
    lambda raw, rng: raw + bytes(rng.choice([1, 1 << 22])),
    lambda raw, rng: raw.replace(b"\n", b"\r\n"),
    lambda raw, rng: raw.replace(b"\n", b"\r"),
    lambda raw, rng: raw.rstrip(b"\n"),
    lambda raw, rng: b"\n \n\t\n" + raw,
    lambda raw, rng: b"x" * (80 << 20 if raw.startswith(b"{") else 1 << 20),  # more than a record
]


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _circle(path: Path) -> None:
    for name in ("x", "y"):
        (path.parent / name).symlink_to(".")


PLACES: list[Callable[[Path], None]] = [
    lambda path: None,
    _fifo,
    _loop,
    _link_to("/dev/zero"),
    _link_to("nowhere"),
    _directory,
    _circle,
    lambda path: path.unlink(),
    lambda path: path.chmod(0),
]


def make(number: int, rng: random.Random, folder: Path) -> Trial:
    """A corpus and the command that prepares it."""
    texts, change, place = TEXTS[0], BYTES[0], PLACES[0]
    odd = rng.choice(["texts", "bytes", "place", "both"])
    if odd in ("texts", "both"):
        texts = rng.choice(TEXTS)
    if odd in ("bytes", "both"):
        change = rng.choice(BYTES)
    if odd == "place":
        place = rng.choice(PLACES)
    suffix = rng.choice([".jsonl", ".jsonl", ".txt", ".parquet", ".arrow", ".json", ".JSONL"])
    pack = rng.choice(["", "", ".gz", ".zst"]) if suffix in (".jsonl", ".txt") else ""
    inputs = folder / "in"
    inputs.mkdir()
    path = inputs / f"{rng.choice(['a', 'ä b', 'a[1]', 'a*', '~a'])}{suffix}{pack}"
    documents = texts(_documents(rng), rng)
    raw = change(_content(documents, suffix, path), rng)
    pressed = raw
    if pack:
        pressed = gzip.compress(raw) if pack == ".gz" else zstandard.compress(raw)
    if pack and rng.random() < 0.3:
        pressed = rng.choice([_cut, _flip])(pressed, rng)
    path.write_bytes(pressed)
    place(path)
    name = rng.choice([str(path.relative_to(folder)), "in/**/*", f"in/*{suffix}{pack}"])
    source: dict[str, object] = {"name": "s", "path": name}
    if rng.random() < 0.3:
        source["on_bad_record"] = "skip"
    sources = [source]
    if rng.random() < 0.3:
        sources.append({"name": "t", "path": name})
    data = {"sources": sources, "context_length": rng.choice([2, 16, 64]), "processes": 1}
    data["validation_bytes"] = rng.choice([50, 4_000_000])
    config = {
        "data": data,
        "tokenizer": {"vocab_size": rng.choice([259, 300, 2000])},
        "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "training": {"steps": 1, "global_batch": 1},
    }
    (folder / "c.yaml").write_text(json.dumps(config))

    def check(result: Result) -> list[str]:
        whole = list((folder / "data").glob("packed/*/MANIFEST.json"))
        wrong = [] if (result.code == 0) == bool(whole) else ["half-prepared data"]
        # A refusal for too few tokens comes after the preparation, which serves other lengths.
        return [] if "not fill a row" in result.err else wrong

    what = f"{odd}: {suffix}{pack}, {TEXTS.index(texts)}, {BYTES.index(change)}, "
    names = ["data.", "tokenizer", "in/", "c.yaml"]
    words = ["data", "c.yaml", *rng.choice([[], ["--show", "2"], ["--stats"]])]
    return Trial(f"{what}{PLACES.index(place)}", words, folder, names, check=check)


def _content(documents: Documents, suffix: str, path: Path) -> bytes:
    if suffix == ".txt":
        return "\n".join(documents).encode()
    if suffix in (".parquet", ".arrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": pa.array(documents, pa.string())})
        if suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
        return path.read_bytes()
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


if __name__ == "__main__":
    sys.exit(campaign("text", make, default=300, about=__doc__ or ""))
