"""`.gguf` files, read back by the `gguf` package and by transformers' own reader of them."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from llmnorm import cli
from llmnorm.exchange import gguf_file
from llmnorm.exchange.gguf_file import TYPES, export_gguf
from llmnorm.exchange.gguf_tokenizer import RULES
from llmnorm.models.building import build_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.part import InputError

TEXTS = ["The river, it's 1234 stones!", "  two  spaces\n\n new line", "ÄÖ 漢字 🙂 don't"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tokenizer(directory: Path, rule: str | None, **changed: Any) -> None:
    """A small tokenizer directory whose text is split by a rule of llama.cpp; None: by spaces."""
    pattern = {r.name: r.pattern for r in RULES}.get(str(rule))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    made = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    made.pre_tokenizer = byte_level
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if rule == "qwen2":
        made.normalizer = normalizers.NFC()
    if rule is None:
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    save(directory, json.loads(made.to_str()), **changed)


def save(directory: Path, tree: dict[str, Any], **changed: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tree | changed))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def stock(directory: Path, family: str, rule: str, **changed: Any) -> Path:
    """A random stock model with a tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 410,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": 0.2,
            **({"sliding_window": None} if family == "Mistral" else {}),
            **changed,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer(directory, rule)
    return directory


CASES = {
    "llama": ("Llama", "gpt-2", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("Llama", "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    "linear": (
        "Llama",
        "gpt-2",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "mistral": ("Mistral", "llama-bpe", {}),
    "qwen2": ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen2", {"head_dim": 128}),  # which that reader takes for granted
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_model_and_tokenizer(case: str, tmp_path: Path) -> None:
    """Oracle: the stock class with its own files; transformers' reader knows llama.cpp's layout."""
    family, rule, changed = CASES[case]
    there = stock(tmp_path / "there", family, rule, **changed)
    export_gguf(there, tmp_path / "file.gguf", type="f32")
    model = AutoModelForCausalLM.from_pretrained(there)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="file.gguf")
    assert type(read) is type(model) or family == "Mistral"  # which llama.cpp calls a Llama
    if "rope_parameters" not in changed:  # of which transformers' reader knows the base alone
        assert read.config.rope_parameters == model.config.rope_parameters
    ids = torch.randint(0, 410, (2, 20))
    if not changed.get("mlp_bias"):  # transformers' reader leaves the biases out
        for name, tensor in model.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor), name
    if not {"mlp_bias", "rope_parameters"} & changed.keys():
        with torch.no_grad():
            assert torch.equal(read(ids).logits, model(ids).logits)
    if rule != "llama-bpe":  # it makes each of them from vocabulary and merges alone
        own = AutoTokenizer.from_pretrained(there)
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="file.gguf")
        for text in TEXTS:
            assert again(text, add_special_tokens=False) == own(text, add_special_tokens=False)
    fields = gguf.GGUFReader(tmp_path / "file.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == rule
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.ggml.tokens"].contents()[:2] == ["<s>", "</s>"]
    assert fields["tokenizer.ggml.token_type"].contents()[:3] == [3, 3, 1]  # control, normal
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD409]"


def test_neighbours_rotate_as_halves_do() -> None:
    """Oracle: q . k in float64 with llama.cpp's pairs (2i, 2i+1) and with ours (i, i + half)."""
    heads, dim, width = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * dim, width, generator=generator).double() for _ in range(2))
    x, y = (torch.randn(width, generator=generator).double() for _ in range(2))
    angles = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)

    def halves(v: torch.Tensor, position: int) -> torch.Tensor:
        a, b = v.view(heads, dim).chunk(2, -1)
        cos, sin = (angles * position).cos(), (angles * position).sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def neighbours(v: torch.Tensor, position: int) -> torch.Tensor:
        a, b = v.view(heads, dim // 2, 2).unbind(-1)
        cos, sin = (angles * position).cos(), (angles * position).sin()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(1)

    ours = (halves(q @ x, 7) * halves(k @ y, 3)).sum(-1)
    there = gguf_file._interleaved(q, heads) @ x, gguf_file._interleaved(k, heads) @ y
    theirs = (neighbours(there[0], 7) * neighbours(there[1], 3)).sum(-1)
    torch.testing.assert_close(theirs, ours, atol=1e-13, rtol=0)


def test_llama3_frequencies_are_divided_by_what_the_file_holds(tmp_path: Path) -> None:
    """Oracle: the formula of llama.cpp's script, frequency by frequency."""
    there = stock(tmp_path / "there", "Llama", "llama-bpe", rope_parameters=LLAMA3_ROPE)
    export_gguf(there, tmp_path / "file.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "file.gguf").tensors}
    expected = []
    for i in range(0, 16, 2):
        wavelength = 2 * math.pi * 500_000.0 ** (i / 16)
        if wavelength < 64 / 4.0:
            expected.append(1.0)
        elif wavelength > 64 / 1.0:
            expected.append(8.0)
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append(1 / ((1 - smooth) / 8.0 + smooth))
    found = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("type", TYPES)
def test_matrices_are_of_the_type_and_the_rest_is_exact(type: str, tmp_path: Path) -> None:
    """Oracle: the float32 file, rounded as the type rounds; bf16 and f16 by torch itself."""
    there = stock(tmp_path / "there", "Qwen3", "qwen2")
    export_gguf(there, tmp_path / "exact.gguf", type="f32")
    export_gguf(there, tmp_path / "file.gguf", type=type)
    exact = {t.name: t for t in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "file.gguf").tensors:
        want = torch.from_numpy(exact[tensor.name].data.copy())
        got = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).view_as(want)
        if want.ndim == 1 or type == "f32":
            assert torch.equal(got, want) and tensor.tensor_type.name == "F32"
        elif type == "q8_0":
            blocks = want.view(-1, 32)
            step = blocks.abs().amax(-1, keepdim=True) / 127
            bound = step * (0.5 + 127 * 2**-11) * (1 + 1e-6)  # rounded, by a scale that is f16
            assert ((got.view(-1, 32) - blocks).abs() <= bound).all()
        else:
            narrow = {"f16": torch.float16, "bf16": torch.bfloat16}[type]
            assert torch.equal(got, want.to(narrow).float())


def test_depth_scales_are_folded_and_odd_rows_stay_f16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: our own model's logits; its width is no multiple of q8_0's blocks."""
    config = LlmNormConfig(
        vocab_size=400,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        depth_scaling="lns",
        bos_token_id=0,
        eos_token_id=1,
    )
    model = build_model(config, seed=1).eval()
    model.save_pretrained(tmp_path / "ours")
    tokenizer(tmp_path / "ours", "gpt-2")
    export_gguf(tmp_path / "ours", tmp_path / "file.gguf", type="f32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="file.gguf")
    ids = torch.randint(0, 400, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=2e-5, rtol=0)
    export_gguf(tmp_path / "ours", tmp_path / "small.gguf", type="q8_0")
    assert "matrices are f16: their rows are no multiple of 32 numbers" in capsys.readouterr().out
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q8_0"


def test_a_sentencepiece_tokenizer_keeps_its_order_of_merges(tmp_path: Path) -> None:
    """Oracle: transformers' reader, which makes the merges anew from the scores."""
    there = stock(tmp_path / "there", "Llama", "gpt-2")
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc"]
    pairs = [("a", "b"), ("▁", "ab"), ("b", "c"), ("▁ab", "c"), ("a", "bc")]
    vocab = {text: i for i, text in enumerate(dict.fromkeys([*letters, *map("".join, pairs)]))}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tree = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for i, text in enumerate(letters[:3])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in pairs],
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
        },
        "decoder": {"type": "ByteFallback"},
    }
    save(there, tree)
    export_gguf(there, tmp_path / "file.gguf")
    fields = gguf.GGUFReader(tmp_path / "file.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [2, 3, 3, 6] and types[vocab["ab"]] == 1
    scores = fields["tokenizer.ggml.scores"].contents()
    merged = [scores[vocab["".join(pair)]] for pair in pairs[:4]]
    assert merged == sorted(merged, reverse=True) and min(merged) > scores[vocab["a"]]
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


def test_qwens_rule_is_transformers() -> None:
    """Oracle: the pattern in transformers' Qwen2 tokenizer."""
    assert {rule.name: rule.pattern for rule in RULES}["qwen2"] == PRETOKENIZE_REGEX


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("Mistral", {"sliding_window": 8}, "model.mixer.sliding_window: 8 is ignored"),
        (
            "Qwen3",
            {"rope_parameters": LLAMA3_ROPE},
            "rope_type: 'llama3' is for llama.cpp's Llama alone",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: 'dynamic' is not in llama.cpp",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    family: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    there = stock(tmp_path / "there", family, "gpt-2", **changed)
    with pytest.raises(InputError, match=message):
        export_gguf(there, tmp_path / "file.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    there = stock(tmp_path / "there", "Llama", "gpt-2")
    tokenizer(there, None)
    with pytest.raises(InputError, match="by a rule that is none of llama.cpp's gpt-2, qwen2"):
        export_gguf(there, tmp_path / "file.gguf")
    tokenizer(there, "gpt-2", normalizer={"type": "NFC"})
    with pytest.raises(InputError, match="by a rule that is none"):
        export_gguf(there, tmp_path / "file.gguf")
    (there / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        export_gguf(there, tmp_path / "file.gguf")


def test_the_command_tells_a_file_from_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, file = stock(tmp_path / "there", "Llama", "gpt-2"), tmp_path / "new" / "file.gguf"
    for words, message in (
        (["--stock"], "--stock: a .gguf file is of a stock architecture as it is"),
        (["--type", "q4"], "'q4' is not valid for --type"),
    ):
        assert cli.main(["export", str(there), str(file), *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["export", str(there), str(tmp_path / "out"), "--type", "f32"]) == 2
    assert "--type: belongs to a .gguf file" in capsys.readouterr().err
    assert cli.main(["export", str(there), str(file)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    before = file.read_bytes()
    assert cli.main(["export", str(there), str(file)]) == 2
    assert "is there already; name a new file" in capsys.readouterr().err
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]
