"""Exported directories in other people's tools, against the run and against stock classes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmnorm.exchange.export import export
from llmnorm.exchange.loading import load_model
from llmnorm.models import LlmNormForCausalLM
from llmnorm.part import InputError
from tests.running import SMOKE, llmnorm, state_of


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def of_checkpoint(run: Path, step: int, prefix: str = "model.") -> dict[str, torch.Tensor]:
    state = state_of(run, step)
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].equal(tensor), name


def test_the_exported_directory_is_the_checkpoint(run: Path, exported: Path) -> None:
    """Oracle: the checkpoint's own tensors, bit for bit; the model that load_model makes."""
    assert_equal(weights(exported), of_checkpoint(run, 12))
    ours, tokenizer = load_model(run)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert type(model) is LlmNormForCausalLM
    ids = torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        assert model(ids).logits.equal(ours(ids).logits)
    again = AutoTokenizer.from_pretrained(exported)
    assert again("The same text.").input_ids == tokenizer("The same text.").input_ids
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not list(exported.parent.glob(".exported*"))


def test_qwen3_gives_the_same_logits(exported: Path, stock: Path) -> None:
    """Oracle: transformers' Qwen3ForCausalLM; 1e-5 in float32."""
    model, ours = AutoModelForCausalLM.from_pretrained(stock), load_model(exported)[0]
    assert type(model) is transformers.Qwen3ForCausalLM
    ids = torch.randint(0, 512, (3, 29))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
        assert model(ids).logits.std() > 0.1


def test_llama_gives_the_same_logits(tmp_path: Path, smoke_data: Path) -> None:
    """Oracle: transformers' LlamaForCausalLM; biases, own head_dim, untied, YaRN; 1e-5."""
    model = ["model.mixer.attention_bias=true", "model.mlp={name: swiglu, bias: true}"]
    model += ["model.head_dim=12", "model.tie_word_embeddings=false"]
    model += ["model.rope_parameters={rope_type: yarn, factor: 4, "]
    model[-1] += "original_max_position_embeddings: 16}"
    places = [f"run_dir={tmp_path / 'run'}", f"data.dir={smoke_data}", "training.steps=3"]
    llmnorm("train", SMOKE, *model, *places)
    llmnorm("export", tmp_path / "run", tmp_path / "out", "--stock")
    llama, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        load_model(tmp_path / "run")[0],
    )
    assert type(llama) is transformers.LlamaForCausalLM
    ids = torch.randint(0, 512, (3, 29))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)


ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, AutoConfig, AutoModel
assert not any(name.startswith("llmnorm") for name in sys.modules)
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
base = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__module__, type(base).__name__, type(config).__module__)
model.save_pretrained(sys.argv[2])
"""


def test_a_script_that_does_not_import_the_package_gets_its_classes(
    exported: Path, tmp_path: Path
) -> None:
    """Oracle: sys.modules of a fresh process; what it saves names the package again."""
    words = [sys.executable, "-c", ELSEWHERE, str(exported), str(tmp_path / "saved")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    # transformers imports DeepSpeed to save, if it is installed, which talks on standard output.
    assert done.stdout.split()[:3] == [
        "llmnorm.models.modeling",
        "LlmNormModel",
        "llmnorm.models.configuration",
    ]
    for name in ("modeling_llmnorm.py", "config.json"):
        assert (tmp_path / "saved" / name).read_text() == (exported / name).read_text()
    source = (exported / "modeling_llmnorm.py").read_text()
    assert len(source.splitlines()) == 4  # a docstring and an import a file of classes
    assert len(list((tmp_path / "saved").glob("*.py"))) == 1
    assert_equal(weights(tmp_path / "saved"), weights(exported))


def test_the_average_is_the_float32_mean(run: Path, tmp_path: Path) -> None:
    """Oracle: torch's mean over the stacked tensors of the last two and three checkpoints."""
    for count in (2, 3):
        llmnorm("export", run, tmp_path / f"{count}", "--average", f"{count}")
        got = weights(tmp_path / f"{count}")
        states = [of_checkpoint(run, step) for step in (4, 8, 12)[-count:]]
        for name, tensor in got.items():
            expected = torch.stack([state[name] for state in states]).mean(0)
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
            assert name.endswith("_norm.weight") or not tensor.equal(states[-1][name])


def test_the_moving_average_and_older_checkpoints(run: Path, tmp_path: Path) -> None:
    """Oracle: the checkpoint's `ema.` tensors; the tensors of step 4."""
    llmnorm("export", run, tmp_path / "ema", "--ema")
    assert_equal(weights(tmp_path / "ema"), of_checkpoint(run, 12, "ema."))
    assert not weights(tmp_path / "ema")["model.norm.weight"].equal(
        of_checkpoint(run, 12)["model.norm.weight"]
    )
    llmnorm("export", run, tmp_path / "old", "--checkpoint", "4")
    assert_equal(weights(tmp_path / "old"), of_checkpoint(run, 4))
    model, _ = load_model(run, ema=True)
    assert model.model.norm.weight.equal(of_checkpoint(run, 12, "ema.")["model.norm.weight"])
    model, _ = load_model(run / "checkpoints" / "step_00000004")
    assert model.model.norm.weight.equal(of_checkpoint(run, 4)["model.norm.weight"])


@pytest.mark.parametrize("file", ["MANIFEST.json", "rank_00000.safetensors"])
def test_readers_pass_a_damaged_newest_checkpoint_over(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    """Oracle: the tensors of step 8, and of 4 and 8; step 12 was cut off by hand."""
    copy = shutil.copytree(run, tmp_path / "copy")
    damaged = copy / "checkpoints" / "step_00000012" / file
    os.truncate(damaged, damaged.stat().st_size // 2)
    model, _ = load_model(copy)
    assert model.model.norm.weight.equal(of_checkpoint(run, 8)["model.norm.weight"])
    assert file in caplog.text and "going back to step 8" in caplog.text
    export(copy, tmp_path / "mean", average=2)
    states = [of_checkpoint(run, step) for step in (4, 8)]
    for name, tensor in weights(tmp_path / "mean").items():
        assert tensor.equal((states[0][name] + states[1][name]) / 2), name


@pytest.mark.parametrize("content", [b"", b"\xff\x00\xfe", b"[]", b"{}", None], ids=str)
def test_every_command_goes_by_the_newest_checkpoint_that_is_whole(
    run: Path,
    smoke_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
) -> None:
    """Oracle: the weights of step 8, from a run whose newest manifest says nothing (None: a pipe).

    Where a command writes a step or weights, they are those of step 8; all of them say so.
    """
    copy, out = shutil.copytree(run, tmp_path / "copy"), tmp_path / "out"
    manifest = copy / "checkpoints" / "step_00000012" / "MANIFEST.json"
    manifest.unlink()
    if content is None:
        os.mkfifo(manifest)
    else:
        manifest.write_bytes(content)
    commands = [
        ["generate", copy, "--prompt", "The", "generation.max_new_tokens=2"],
        ["export", copy, out],
        ["eval", copy],
        ["inspect", copy, "--rows", "2", "--out", tmp_path / "page"],
        ["train", SMOKE, "model=null", f"model.pretrained={copy}", "training.steps=1"],
    ]
    commands[-1] += ["tokenizer=null", f"data.dir={smoke_data}", f"run_dir={tmp_path / 'new'}"]
    commands[-1] += ["optimizer.lr=1e-30", "optimizer.auxiliary.lr=1e-30"]
    for words in commands:
        caplog.clear()
        llmnorm(*words)
        assert "going back to step 8" in caplog.text, words
    assert_equal(weights(out), of_checkpoint(run, 8))
    assert (copy / "eval" / "step_00000008.json").is_file()
    assert_equal(of_checkpoint(tmp_path / "new", 1), of_checkpoint(run, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"average": 4}, r"--average: .* has 3 checkpoints \(4, 8, 12\), not 4"),
        ({"average": 2, "checkpoint": "best"}, "--average: means the last checkpoints"),
        ({"checkpoint": "7"}, "there is no checkpoint of step 7; nearest: 4, 8"),
    ],
)
def test_what_is_not_there_is_refused(
    run: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    """Oracle: one line, and nothing written."""
    with pytest.raises(InputError, match=words) as error:
        export(run, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_directories_are_refused_where_a_run_is_meant(exported: Path, tmp_path: Path) -> None:
    """Oracle: the option that means a run."""
    for options, words in (
        ({"ema": True}, "--ema"),
        ({"checkpoint": "best"}, "--checkpoint"),
        ({"average": 2}, "--average"),
    ):
        with pytest.raises(InputError, match=f"{words}: .* is no run"):
            export(exported, tmp_path / "out", **options)
    with pytest.raises(InputError, match="is not empty"):
        export(exported, exported)


def test_a_run_without_an_average_or_a_stock_class_is_refused(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the key; nothing is left of the attempt."""
    run = tmp_path / "run"
    llmnorm(
        "train",
        SMOKE,
        "model.norm=layer",
        f"run_dir={run}",
        f"data.dir={smoke_data}",
        "training.steps=2",
    )
    with pytest.raises(InputError, match="--ema: .* holds no moving average"):
        load_model(run, ema=True)
    with pytest.raises(InputError, match="model.norm: no stock architecture has 'layer'"):
        export(run, tmp_path / "out", stock=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export(run, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), of_checkpoint(run, 2))
    assert ours.config.norm["name"] == "layer"


def test_readers_before_transformers_5_find_the_rotary_positions(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the keys of transformers 4, and what transformers 5 reads beside them."""
    scaled = "{rope_type: yarn, factor: 4, original_max_position_embeddings: 64, rope_theta: 5e5}"
    for name, rope in (("plain", "{rope_theta: 5e5}"), ("yarn", scaled)):
        run = tmp_path / name
        words = [f"model.rope_parameters={rope}", f"data.dir={smoke_data}", f"run_dir={run}"]
        llmnorm("train", SMOKE, *words, "training.steps=1", "evaluation.samples=0")
        llmnorm("export", run, tmp_path / f"{name}-out", "--stock")
        file = tmp_path / f"{name}-out" / "config.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        assert tree["rope_theta"] == 5e5
        config = AutoConfig.from_pretrained(file.parent)
        without = {k: v for k, v in tree.items() if k not in ("rope_theta", "rope_scaling")}
        file.write_text(json.dumps(without), encoding="utf-8")
        assert AutoConfig.from_pretrained(file.parent).to_dict() == config.to_dict()
        if name == "plain":
            assert tree.get("rope_scaling") is None
        else:
            wanted = {"rope_type": "yarn", "factor": 4.0}
            wanted["original_max_position_embeddings"] = 64
            assert tree["rope_scaling"] == wanted


def test_a_mean_of_weights_is_refused_where_norms_keep_statistics(
    tmp_path: Path, smoke_data: Path
) -> None:
    """Oracle: the reason; the weights of one step are exported with the statistics of that step."""
    run, words = tmp_path / "run", ["model.norm=power", "training.ema=0.5", "training.steps=4"]
    words += ["checkpoint.every=2", f"data.dir={smoke_data}", f"run_dir={run}"]
    llmnorm("train", SMOKE, *words, "evaluation.samples=0")
    for options in ({"average": 2}, {"ema": True}):
        with pytest.raises(InputError, match="model.norm keeps running statistics, which belong"):
            export(run, tmp_path / "out", **options)
    export(run, tmp_path / "out")
    assert_equal(weights(tmp_path / "out"), of_checkpoint(run, 4))


def reshaped(file: Path, name: str, shape: list[int]) -> None:
    """Change a shape in a safetensors header; the bytes stay."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[name]["shape"] = shape
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def config_key(key: str, value: Any) -> Any:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**tree, key: value}), encoding="utf-8")

    return change


def index(value: Any) -> Any:
    def change(directory: Path) -> None:
        file = directory / "model.safetensors.index.json"
        file.write_text(json.dumps(value), encoding="utf-8")

    return change


EMBEDDING = "model.embed_tokens.weight"
SPOILT = {
    "classes that are numbers": (config_key("architectures", [3]), "config.json: architectures.0"),
    "a class that is none": (config_key("architectures", ["Nope"]), "config.json: .*'Nope'"),
    "an unknown dtype": (config_key("dtype", "nope"), "config.json: dtype: 'nope'"),
    "2**62 tokens": (config_key("vocab_size", 2**62), "vocab_size"),
    "5,000 layers": (config_key("num_hidden_layers", 5000), "num_hidden_layers is 5000"),
    "labels that are a list": (config_key("id2label", [1]), "config.json: id2label"),
    "a token that is text": (config_key("eos_token_id", "x"), "config.json: eos_token_id"),
    "an index with a list": (index({"weight_map": [1]}), "index.json: weight_map"),
    "an index that is a list": (index([]), "index.json: expected a JSON object, got a list"),
    "an index without a map": (index({}), "index.json: weight_map: is required"),
    "an index that leads away": (
        index({"weight_map": {EMBEDDING: "../model.safetensors"}}),
        "index.json: weight_map: '../model.safetensors' is no file of this directory",
    ),
    "a header of other rows": (
        lambda d: reshaped(d / "model.safetensors", EMBEDDING, [2**40, 64]),
        "model.safetensors: cannot be read",
    ),
    "a pipe": (
        lambda d: ((d / "model.safetensors").unlink(), os.mkfifo(d / "model.safetensors")),
        "model.safetensors: is a named pipe",
    ),
}


@pytest.mark.parametrize(("spoil", "what"), SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_directory_is_refused_in_one_line(
    exported: Path, tmp_path: Path, spoil: Any, what: str
) -> None:
    """Oracle: the file and key that were spoilt."""
    copy = shutil.copytree(exported, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(InputError, match=what) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_many_shards(run: Path, tmp_path: Path) -> None:
    """Oracle: the one-file export; no file above the limit."""
    export(run, tmp_path / "out", max_shard_bytes=140_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 150_000 for file in files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal(dict(load_model(tmp_path / "out")[0].state_dict()), dict(model.state_dict()))
    assert_equal(weights(tmp_path / "out"), of_checkpoint(run, 12))


def test_the_model_card_says_what_the_run_was(run: Path, exported: Path, stock: Path) -> None:
    """Oracle: metrics.jsonl and the corpus."""
    card = (exported / "README.md").read_text()
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    last = [line["validation"] for line in lines if "validation" in line][-1]
    for name, figures in last["sources"].items():
        row = f"| {name} | {figures['loss']:.4f} | {figures['perplexity']:.4f} |"
        assert row in card
    assert "| prose | 377 | 131,888 |" in card and "| notes | 1 | 91,723 |" in card
    assert "12 steps" in card and "trust_remote_code=True" in card and "None" not in card
    assert "trust_remote_code" not in (stock / "README.md").read_text()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_a_stock_directory_goes_out_again_unchanged(tmp_path: Path, family: str) -> None:
    """Oracle: the directory that came in; by way of our class too; bf16 stays bf16."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **({"sliding_window": None} if family == "Mistral" else {}),
    )
    there, back, ours, again = (tmp_path / name for name in ("there", "back", "ours", "again"))
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(there, max_shard_size="10KB")
    export(there, back, stock=True)
    export(there, ours)
    export(ours, again, stock=True, max_shard_bytes=10_000)
    assert isinstance(AutoModelForCausalLM.from_pretrained(ours), LlmNormForCausalLM)
    for directory in (back, again):
        assert_equal(weights(directory), weights(there))
        assert type(AutoModelForCausalLM.from_pretrained(directory)) is type(model)
        got, expected = (AutoConfig.from_pretrained(d).to_dict() for d in (directory, there))
        got.pop("_name_or_path"), expected.pop("_name_or_path")
        assert got == expected
    assert AutoModelForCausalLM.from_pretrained(ours).dtype == torch.bfloat16
    with pytest.raises(InputError, match="has no tokenizer"):
        load_model(ours)
