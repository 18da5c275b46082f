"""model.pretrained: where weights come from, what comes with them, what may stand beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.data import packing
from llmnorm.exchange.loading import load_model
from llmnorm.part import InputError
from tests.running import SMOKE, llmnorm, metrics_of, state_of

# So small a rate that float32 weights stay as they are.
STILL = ["optimizer.lr=1e-30", "optimizer.auxiliary.lr=1e-30"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """The smoke configuration without its model and tokenizer."""
    tree = yaml.safe_load(SMOKE.read_text())
    del tree["model"], tree["tokenizer"]
    tree["data"]["dir"] = str(smoke_data)
    tree["training"] = {"steps": 1, "global_batch": 16}
    file = tmp_path_factory.mktemp("config") / "bare.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory, smoke_data: Path) -> Path:
    """A randomly initialised Mistral with the smoke tokenizer, in shards."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=520,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        initializer_range=0.1,
        max_position_embeddings=128,
        sliding_window=None,
    )
    directory = tmp_path_factory.mktemp("stock") / "mistral"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size="50KB")
    config = load(SMOKE, [f"data.dir={smoke_data}"]).config
    found = packing.find(config.data, config.tokenizer)  # other tests prepare data there too
    assert found is not None
    packed = found.tokenizer_directory
    shutil.copytree(packed, directory, dirs_exist_ok=True)
    return directory


def of_checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    state = state_of(run, step)
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def test_a_run_starts_from_a_stock_directory_and_outlives_it(
    bare: Path, mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the stock weights after a step that changes nothing; then the directory is gone."""
    gone = tmp_path / "gone"
    shutil.copytree(mistral, gone)
    run, pretrained = tmp_path / "run", f"model.pretrained={gone}"
    llmnorm("train", bare, pretrained, *STILL, f"run_dir={run}", "training.steps=1")
    assert f"tokenizer.path is {gone}, which model.pretrained brings" in capsys.readouterr().err
    tree = yaml.safe_load((run / "config.yaml").read_text())
    assert tree["tokenizer"]["path"] == str(gone)
    assert (tree["model"]["hidden_size"], tree["model"]["head_dim"]) == (32, 10)
    stock = AutoModelForCausalLM.from_pretrained(gone)
    expected = stock.state_dict()
    for name, tensor in of_checkpoint(run, 1).items():
        assert tensor.equal(expected[name]), name
    ids = torch.randint(0, 512, (2, 20))
    logits = stock(ids).logits

    shutil.rmtree(gone)
    llmnorm("data", run)  # the tokenizer is the run's own copy now
    llmnorm("train", run, "training.steps=2")
    assert [m["step"] for m in metrics_of(run) if "loss" in m] == [1, 2]
    llmnorm("export", run, tmp_path / "out", "--stock")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back) is transformers.MistralForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(load_model(run)[0](ids).logits, logits, rtol=0, atol=1e-5)
    llmnorm("generate", run, "--prompt", "The", "generation.max_new_tokens=3")


def test_a_template_is_set_beside_the_tokenizer_that_is_brought(
    bare: Path, mistral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: what transformers renders of the export; a resume without the base's directory."""
    gone, run, file = tmp_path / "gone", tmp_path / "run", tmp_path / "mine.jinja"
    shutil.copytree(mistral, gone)
    file.write_text("{{ bos_token }}{{ greeting }}, {{ messages[0].content }}")
    words = [f"tokenizer.chat_template={file}", "tokenizer.template_arguments.greeting=Hello"]
    where = [f"run_dir={run}", f"data.dir={tmp_path / 'data'}"]
    llmnorm("train", bare, f"model.pretrained={gone}", *STILL, *words, *where)
    assert f"tokenizer.path is {gone}, which model.pretrained brings" in capsys.readouterr().err

    shutil.rmtree(gone)
    llmnorm("train", run, "training.steps=2")
    assert [m["step"] for m in metrics_of(run) if "loss" in m] == [1, 2]
    llmnorm("export", run, tmp_path / "out")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "you"}]
    for more, greeting in (({}, "Hello"), ({"greeting": "Bye"}, "Bye")):
        text = other.apply_chat_template(messages, tokenize=False, **more)
        assert text == f"{other.bos_token}{greeting}, you"


def test_a_run_starts_from_a_run_an_export_and_a_checkpoint(
    run: Path, exported: Path, bare: Path, tmp_path: Path
) -> None:
    """Oracle: the tensors of the run's step 12 and step 4; the optimizer starts anew."""
    for number, (path, step) in enumerate(
        ((run, 12), (exported, 12), (run / "checkpoints" / "step_00000004", 4))
    ):
        new = tmp_path / f"{number}"
        llmnorm("train", bare, f"model.pretrained={path}", *STILL, f"run_dir={new}")
        expected = of_checkpoint(run, step)
        got = of_checkpoint(new, 1)
        assert got.keys() == expected.keys()
        assert all(got[name].equal(expected[name]) for name in got)
        assert metrics_of(new)[0]["step"] == 1
        steps = [t for name, t in state_of(new, 1).items() if name.endswith(".step")]
        assert all(float(t) == 1 for t in steps)


def test_it_learns_and_is_resumed_bit_equal(mistral: Path, bare: Path, tmp_path: Path) -> None:
    """Oracle: the same run without a pause."""
    settings = [f"model.pretrained={mistral}", "model.dropout=0.1", "training.steps=4"]
    settings += ["schedule=constant"]
    for name, first in (("whole", 4), ("paused", 2)):
        run = tmp_path / name
        llmnorm("train", bare, *settings, f"run_dir={run}", f"training.steps={first}")
        if first < 4:
            llmnorm("train", run, "training.steps=4")
    whole, paused = (state_of(tmp_path / name, 4) for name in ("whole", "paused"))
    assert all(whole[name].equal(paused[name]) for name in whole)
    losses = [line["loss"] for line in metrics_of(tmp_path / "whole") if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_size=64", "model.hidden_size: .*mistral brings its own; leave it out"),
        ("model.norm=layer", "model.norm: .*mistral brings its own"),
        ("model.norm.eps=1e-3", "model.norm: .*mistral brings its own"),
        ("model.tie_word_embeddings=true", "model.tie_word_embeddings: "),
        ("model.rope_parameters.rope_theta=5e5", "model.rope_parameters: "),
        ("model.hiden_size=3", "model.hiden_size: unknown key; did you mean 'hidden_size'"),
        ("model.pretrained=nowhere", "command line: model.pretrained: there is no directory now"),
        ("model.pretrained=docs", "model.pretrained: docs has neither config.yaml"),
        ("model.vocab_size=520", None),  # what it brings anyway
        ("model.dropout=0.1", None),
        ("model.max_position_embeddings=4096", None),
    ],
)
def test_beside_it_stands_only_what_leaves_the_function_as_it_is(
    bare: Path, mistral: Path, override: str, words: str | None
) -> None:
    """Oracle: the place and the key, before torch is asked for anything."""
    words_there = [f"model.pretrained={mistral}", override]
    if words is None:
        model = load(bare, words_there).config.model
        key, value = override.removeprefix("model.").split("=")
        assert getattr(model, key) == float(value) and model.hidden_size == 32
        return
    with pytest.raises(InputError, match=words) as error:
        load(bare, words_there)
    assert "\n" not in str(error.value)


def test_a_longer_context_is_refused_where_the_rotation_depends_on_it(
    bare: Path, mistral: Path, tmp_path: Path
) -> None:
    """Oracle: dynamic scaling reads max_position_embeddings, no scaling does not."""
    shutil.copytree(mistral, tmp_path / "dynamic")
    file = tmp_path / "dynamic" / "config.json"
    tree = json.loads(file.read_text())
    tree["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    file.write_text(json.dumps(tree))
    longer = "model.max_position_embeddings=4096"
    with pytest.raises(InputError, match="model.max_position_embeddings: "):
        load(bare, [f"model.pretrained={tmp_path / 'dynamic'}", longer])


def test_the_tokenizer_must_fit(
    bare: Path, mistral: Path, tmp_path: Path, smoke_data: Path, capsys: Any
) -> None:
    """Oracle: 520 rows hold no 600 tokens, nor 500 the directory's own 512; a directory without a
    tokenizer needs one named."""
    words = [f"model.pretrained={mistral}", f"run_dir={tmp_path / 'run'}"]
    words += [f"data.dir={tmp_path / 'data'}", "tokenizer.vocab_size=600"]
    assert cli.main(["train", str(bare), *words]) == 2
    said = capsys.readouterr().err
    assert "own tokenizer is not used, since the configuration has a tokenizer section" in said
    assert "mistral has 520 embedding rows, the tokenizer 600 tokens; leave the tokenizer" in said
    assert not (tmp_path / "run").exists()
    short = shutil.copytree(mistral, tmp_path / "short")
    tree = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**tree, "vocab_size": 500}))
    words = [f"model.pretrained={short}", f"run_dir={tmp_path / 'run'}", f"data.dir={smoke_data}"]
    assert cli.main(["train", str(bare), *words]) == 2
    said = capsys.readouterr().err
    assert "short has 500 embedding rows, the tokenizer 512 tokens; give it 512 (trans" in said
    shutil.copytree(mistral, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(InputError, match="mute has no tokenizer.json; give the tokenizer"):
        load(bare, [f"model.pretrained={tmp_path / 'mute'}"])


def test_generate_reads_a_stock_directory(mistral: Path, capsys: Any) -> None:
    """Oracle: greedy text of the stock class."""
    words = ["--prompt", "The", "generation.temperature=0", "generation.max_new_tokens=6"]
    llmnorm("generate", mistral, *words)
    stock = AutoModelForCausalLM.from_pretrained(mistral)
    tokenizer = transformers.AutoTokenizer.from_pretrained(mistral)
    batch = tokenizer(["The"], return_tensors="pt")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = stock.generate(**batch, max_new_tokens=6, do_sample=False, **ends)
    assert (
        capsys.readouterr().out.strip()
        == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    )
    assert cli.main(["generate", str(mistral), "training.steps=3"]) == 2
    assert "training: only generation.* is read here" in capsys.readouterr().err
    assert cli.main(["generate", str(mistral), "generation.top_q=3"]) == 2
    assert "generation.top_q: unknown key; did you mean 'top_p'?" in capsys.readouterr().err
