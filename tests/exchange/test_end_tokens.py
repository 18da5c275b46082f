"""Every end token of the weights that a run starts from: kept, and text ends at each of them."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.config.manifest import read_manifest
from llmnorm.config.pretrained import describe
from llmnorm.config.stock import all_tokens
from llmnorm.data import packing
from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from tests.running import SMOKE, llmnorm

# So small a rate that float32 weights stay as they are.
STILL = ["optimizer.lr=1e-30", "optimizer.auxiliary.lr=1e-30", "training.steps=1"]
PROMPTS = ["The", "It was", "of course", "once upon"]


class Base(NamedTuple):
    """A stock directory with two end tokens of its own beside the tokenizer's, and a run from it.

    Attributes:
        directory: its config.json names the tokenizer's end token and `ends[1]`, its
            generation_config.json that and `ends[2]`.
        texts: of each prompt, the tokens that follow it up to the first end token, that included.
        run: one step that changes nothing.
    """

    directory: Path
    file: Path
    ends: list[int]
    prompts: list[list[int]]
    texts: list[list[int]]
    run: Path


def with_keys(file: Path, **keys: Any) -> None:
    tree = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**tree, **keys}))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Base:
    place = tmp_path_factory.mktemp("ends")
    config = load(SMOKE, [f"data.dir={smoke_data}"]).config
    found = packing.find(config.data, config.tokenizer)
    assert found is not None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        transformers.MistralConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.5,
            max_position_embeddings=128,
            sliding_window=None,
        )
    ).eval()
    directory = place / "stock"
    model.save_pretrained(directory)
    shutil.copytree(found.tokenizer_directory, directory, dirs_exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    free = []
    for ids in prompts:
        whole = torch.tensor([ids])
        out = model.generate(whole, max_new_tokens=12, do_sample=False, eos_token_id=-1)
        free.append(out[0, len(ids) :].tolist())
    # Of two prompts a token that comes late, and that the other prompt's text does not hold.
    first = next(t for n, t in enumerate(free[0]) if n > 2 and t not in free[0][:n] + free[1])
    second = next(t for n, t in enumerate(free[1]) if n > 3 and t not in free[1][:n] + free[0])
    ends = [tokenizer.eos_token_id, first, second]
    with_keys(directory / "config.json", eos_token_id=ends[:2])
    with_keys(directory / "generation_config.json", eos_token_id=[ends[0], ends[2]])
    stop = lambda ids: next((n + 1 for n, t in enumerate(ids) if t in ends), len(ids))  # noqa: E731

    tree = yaml.safe_load(SMOKE.read_text())
    del tree["model"], tree["tokenizer"]
    tree["data"]["dir"] = str(smoke_data)
    tree["training"] = {"global_batch": 16}
    tree["evaluation"] = {"prompts": PROMPTS, "sample_tokens": 12}
    tree["generation"] = {"temperature": 0}
    file = place / "bare.yaml"
    file.write_text(yaml.safe_dump(tree))
    run = place / "run"
    llmnorm("train", file, f"model.pretrained={directory}", *STILL, f"run_dir={run}")
    texts = [ids[: stop(ids)] for ids in free]
    assert 3 <= len(texts[0]) < 12 and 4 <= len(texts[1]) < 12  # both end before the limit
    return Base(directory, file, ends, prompts, texts, run)


def ends_of(run: Path, step: int) -> Any:
    return read_manifest(run / "checkpoints" / f"step_{step:08d}")["meta"]["model"]["eos_token_id"]


def test_a_run_keeps_every_end_token_of_its_base(base: Base, tmp_path: Path) -> None:
    """Oracle: the tokenizer's, then those of config.json and generation_config.json; also when the
    base is gone, for a branch, and for a run that starts from the run."""
    assert ends_of(base.run, 1) == base.ends
    moved = shutil.copytree(base.run, tmp_path / "run")
    tree = yaml.safe_load((moved / "config.yaml").read_text())
    tree["model"]["pretrained"] = tree["tokenizer"]["path"] = str(tmp_path / "gone")
    (moved / "config.yaml").write_text(yaml.safe_dump(tree))
    llmnorm("train", moved, "training.steps=2")
    assert ends_of(moved, 2) == base.ends
    words = ["training.steps=2", f"model.pretrained={base.directory}", *STILL[:2]]
    branch = f"training.branch_from={base.run / 'checkpoints' / 'step_00000001'}"
    llmnorm("train", base.file, *words, branch, f"run_dir={tmp_path / 'branch'}")
    assert ends_of(tmp_path / "branch", 2) == base.ends
    words = [f"model.pretrained={base.run}", *STILL, f"run_dir={tmp_path / 'child'}"]
    llmnorm("train", base.file, *words)
    assert ends_of(tmp_path / "child", 1) == base.ends


def test_another_tokenizer_has_its_own_end_token_alone(base: Base, tmp_path: Path) -> None:
    """Oracle: the tokenizer's end token; the base's numbers are of its own tokens."""
    words = [f"model.pretrained={base.directory}", "tokenizer.vocab_size=300", *STILL]
    places = [f"run_dir={tmp_path / 'run'}", f"data.dir={tmp_path / 'data'}"]
    llmnorm("train", base.file, *words, *places)
    own = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer").eos_token_id
    assert ends_of(tmp_path / "run", 1) == own


def test_generate_and_samples_stop_at_each(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: greedy tokens of the stock class without any end, cut by hand; run and base alike.
    The end token is no part of the printed text; samples show it."""
    tokenizer = AutoTokenizer.from_pretrained(base.directory)
    words = [word for text in PROMPTS for word in ("--prompt", text)]
    expected = [
        tokenizer.decode(ids + [t for t in text if t not in base.ends], skip_special_tokens=True)
        for ids, text in zip(base.prompts, base.texts, strict=True)
    ]
    for path in (base.run, base.directory):
        capsys.readouterr()
        settings = ["generation.temperature=0", "generation.max_new_tokens=12"]
        llmnorm("generate", path, *words, *settings)
        assert capsys.readouterr().out == "\n\n".join(expected) + "\n"
    (line,) = (json.loads(text) for text in (base.run / "samples.jsonl").read_text().splitlines())
    assert [sample["continuation"] for sample in line["samples"]] == [
        tokenizer.decode(text, skip_special_tokens=True) for text in base.texts
    ]


@pytest.mark.parametrize("options", [(), ("--stock",)])
def test_an_export_stops_at_each_without_any_argument(
    base: Base, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Oracle: as above, in transformers' `generate` of a batch and of each prompt alone."""
    llmnorm("export", base.run, tmp_path / "out", *options)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == base.ends
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    width = batch.input_ids.shape[1]
    together = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, width:]
    for row, ids, expected in zip(together.tolist(), base.prompts, base.texts, strict=True):
        alone = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert alone[0, len(ids) :].tolist() == expected
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {tokenizer.pad_token_id}


def test_a_default_of_the_class_ends_nothing_where_a_file_names_an_end(
    base: Base, tmp_path: Path
) -> None:
    """Oracle: Mistral's class has 2 where config.json names none; then generation_config.json."""
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    tree = json.loads((copy / "config.json").read_text())
    del tree["eos_token_id"]
    (copy / "config.json").write_text(json.dumps(tree))
    with_keys(copy / "generation_config.json", eos_token_id=[5, 9, 5])
    assert describe(copy, "key").config["eos_token_id"] == [5, 9]
    assert load_model(copy)[0].config.eos_token_id == [5, 9]
    (copy / "generation_config.json").unlink()
    assert describe(copy, "key").config["eos_token_id"] == 2


def test_tokens_are_listed_once() -> None:
    """Oracle: by hand."""
    assert all_tokens(None, 3, [5, 3], [], [9]) == [3, 5, 9]
    assert all_tokens(3, [3]) == 3 and all_tokens(None, []) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"eos_token_id": "x"}', "generation_config.json: eos_token_id"), ("{", "generation_config")],
)
def test_a_broken_generation_config_is_named(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    """Oracle: the file and key that were spoilt, in a line."""
    copy = shutil.copytree(base.directory, tmp_path / "copy")
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        load_model(copy)
    assert cli.main(["generate", str(copy)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
