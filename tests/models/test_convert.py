"""Stock directories as our class and back: settings, weights, memory, and what is refused."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmnorm.config.stock import KINDS, from_stock, to_stock
from llmnorm.models import LlmNormConfig, convert
from llmnorm.models.building import empty_model
from llmnorm.models.convert import Stored, Weights, named_weights, open_weights, write_weights
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError
from tests.running import CHILDREN, PATIENCE

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 3,
    "eos_token_id": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases, own head_dim, yarn": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rope_parameters": YARN},
    ),
    "llama, tied, llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2, own head_dim": ("Qwen2", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3, biases": ("Qwen3", {"head_dim": 6, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 10}),
}


def saved(directory: Path, name: str, **options: Any) -> Any:
    """The stock model of that name, randomly initialised and saved by transformers."""
    family, keys = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | keys)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # gains and offsets away from 1 and 0
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory, **options)
    return model


def load(directory: Path) -> LlmNormForCausalLM:
    config = json.loads((directory / "config.json").read_text())
    ours = LlmNormConfig(**from_stock(config, "config.json"))
    model = empty_model(ours, device="cpu")
    open_weights(directory, ours).read_into(named_weights(model))
    return model.eval()


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one", "sharded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_stock_directory_gives_the_stock_logits(tmp_path: Path, name: str, options: Any) -> None:
    """Oracle: transformers' own class on its own file; 1e-5 in float32."""
    stock = saved(tmp_path, name, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == bool(options)
    model = load(tmp_path)
    ids = torch.randint(0, 97, (3, 29))
    with torch.no_grad():
        expected = stock(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.1  # a difference could show


@pytest.mark.parametrize("name", MODELS)
def test_settings_go_there_and_back(tmp_path: Path, name: str) -> None:
    """Oracle: the file that transformers wrote, key by key (those that say where it came from)."""
    saved(tmp_path / "in", name)
    given = json.loads((tmp_path / "in" / "config.json").read_text())
    ours = from_stock(given, "config.json")
    settings = ModelSettings.model_validate(
        {k: v for k, v in ours.items() if k in ModelSettings.model_fields}
    )
    architecture, keys = to_stock(settings)
    assert [architecture] == given["architectures"]
    tokens = {k: ours[k] for k in ours if k.endswith("_token_id")}
    back = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**keys, **tokens)
    back.save_pretrained(tmp_path / "out")
    came = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    went = AutoConfig.from_pretrained(tmp_path / "in").to_dict()
    for about in ("_name_or_path", "architectures", "dtype"):
        came.pop(about, None), went.pop(about, None)
    assert came == went


@pytest.mark.parametrize("name", KINDS)
def test_what_a_file_leaves_out_is_the_class_default(name: str) -> None:
    """Oracle: transformers' configuration classes without arguments."""
    family = KINDS[name].architecture.removesuffix("ForCausalLM")
    config = getattr(transformers, f"{family}Config")
    default = config().to_dict() | {"sliding_window": None}  # Qwen's is None when it is not used
    for key, value in KINDS[name].defaults.items():
        if key == "sliding_window":
            assert config.__dataclass_fields__[key].default == value
        elif key == "head_dim" and value is None:
            assert default.get(key, 128) == 128  # derived, or not a key of the class
        elif key == "num_key_value_heads" and value is None:
            assert default[key] == default["num_attention_heads"]
        else:
            assert default[key] == value, key


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 2.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    ],
)
def test_rotary_keys_of_any_age(rope: dict[str, Any]) -> None:
    """Oracle: rope_parameters as transformers' LlamaConfig understands the same file."""
    file = {"model_type": "llama", **SHAPE, **rope}
    expected = transformers.LlamaConfig.from_dict(json.loads(json.dumps(file))).rope_parameters
    found = from_stock(file, "config.json")["rope_parameters"]
    assert found == {key: value for key, value in expected.items() if key != "type"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "gemma"}, "model_type: 'gemma' cannot be loaded"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_slid"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "layer_types: sliding"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures: LlamaForSequ"),
    ],
)
def test_what_our_class_would_compute_differently_is_refused(
    keys: dict[str, Any], words: str
) -> None:
    """Oracle: one line with the file and the key."""
    with pytest.raises(InputError, match="config.json: " + words) as error:
        from_stock({"model_type": "llama", **SHAPE, **keys}, "config.json")
    assert "\n" not in str(error.value)


def test_windows_that_do_nothing_are_loaded() -> None:
    """Oracle: transformers makes full attention of these."""
    for keys in (
        {"use_sliding_window": False, "sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"layer_types": ["full_attention"] * 3},
    ):
        stock = transformers.Qwen2Config(**SHAPE, **keys)
        assert set(stock.layer_types) == {"full_attention"}
        from_stock({"model_type": "qwen2", **SHAPE, **keys}, "config.json")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"norm": "layer"}, "model.norm: no stock architecture has 'layer'"),
        ({"mlp": "gelu"}, "model.mlp: no stock architecture has 'gelu'"),
        ({"mixer": ["softmax", {"name": "softmax", "qk_norm": True}]}, "model.mixer: "),
        ({"mixer": {"qk_norm": True, "attention_bias": "qkv"}}, "model.mixer.attention_bias: qkv"),
        ({"mixer": {"qk_norm": True, "qk_norm_eps": 1e-3}}, "model.mixer.qk_norm_eps"),
        ({"mixer": {"qk_norm": True}, "export_as": "llama"}, "model.mixer.qk_norm: LlamaFor"),
        ({"mixer": {"sliding_window": 8}, "export_as": "llama"}, "model.mixer.sliding_window: Ll"),
        ({"export_as": "qwen3"}, "model.mixer.qk_norm: Qwen3ForCausalLM always has"),
        ({"export_as": "qwen2"}, "model.mixer.attention_bias: False"),
        ({"mlp": {"bias": True}, "export_as": "mistral"}, "model.mlp.bias: MistralFor"),
        ({"hidden_size": 26, "head_dim": 8}, "model.hidden_size: LlamaForCausalLM wants"),
    ],
)
def test_what_no_stock_architecture_computes_is_refused(keys: dict[str, Any], words: str) -> None:
    """Oracle: one line with our key."""
    with pytest.raises(InputError, match=words) as error:
        to_stock(ModelSettings(num_attention_heads=4, **{"hidden_size": 24} | keys))
    assert "\n" not in str(error.value)


def test_the_fitting_architecture_is_found() -> None:
    """Oracle: the table of the documentation."""
    for mixer, architecture in (
        ({}, "LlamaForCausalLM"),
        ({"attention_bias": True}, "LlamaForCausalLM"),
        ({"attention_bias": "qkv"}, "Qwen2ForCausalLM"),
        ({"qk_norm": True}, "Qwen3ForCausalLM"),
        ({"sliding_window": 8}, "MistralForCausalLM"),
    ):
        assert to_stock(ModelSettings(mixer={"name": "softmax"} | mixer))[0] == architecture
    assert to_stock(ModelSettings(export_as="mistral"))[0] == "MistralForCausalLM"


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of the directory's one file."""
    file = directory / "model.safetensors"
    kept = {k: v for k, v in (load_file(file) | tensors).items() if v is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """Oracle: the tensor's name and what is wrong with it."""
    name = "model.layers.1.mlp.up_proj.weight"
    for tensors, words in (
        ({name: None}, f"holds no tensor '{name}'"),
        ({name: torch.zeros(3, 4)}, rf"'{name}' has shape \(3, 4\), and config.json asks for"),
        ({"model.extra": torch.zeros(3)}, "'model.extra' has no place in the model"),
    ):
        saved(tmp_path, "llama")
        change(tmp_path, **tensors)
        with pytest.raises(InputError, match=words):
            load(tmp_path)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    """Oracle: the embedding itself is taken, another tensor is not; old rotary tables are."""
    stock = saved(tmp_path, "llama, tied, llama3")
    weight = stock.lm_head.weight.detach().clone()
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    change(tmp_path, **{"lm_head.weight": weight, **old})
    assert load(tmp_path).lm_head.weight.equal(weight)
    change(tmp_path, **{"lm_head.weight": weight + 1})
    with pytest.raises(InputError, match="tie_word_embeddings is true, but lm_head.weight"):
        load(tmp_path)


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    """Oracle: the reason in one line; nothing is unpickled."""
    saved(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="model.safetensors: cannot be read"):
        load(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="is a pickle"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="holds neither model.safetensors nor"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safet"}}')
    with pytest.raises(InputError, match=r"gone.safet: there is no such file"):
        load(tmp_path)


def test_bf16_files_are_read_as_they_are(tmp_path: Path) -> None:
    """Oracle: the file's own tensors; float32 parameters hold the same numbers."""
    stock = saved(tmp_path, "llama").bfloat16()
    stock.save_pretrained(tmp_path)
    weights = Weights(tmp_path)
    assert {stored.dtype for stored in weights.tensors.values()} == {torch.bfloat16}
    for name, tensor in named_weights(load(tmp_path)).items():
        assert tensor.dtype == torch.float32
        assert tensor.bfloat16().equal(stock.state_dict()[name])


class Held:
    """Counts the bytes of the shards that `write_weights` asks to fill and that are still alive."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.alive: list[Any] = []
        self.peak = 0

    def read_into(self, into: Any) -> None:
        self.alive += [(weakref.ref(t.untyped_storage()), t.nbytes) for t in into.values()]
        self.peak = max(self.peak, sum(n for ref, n in self.alive if ref() is not None))
        self.weights.read_into(into)


@pytest.mark.parametrize("limit", [15_000, 40_000, 10**9])
def test_shards_are_whole_and_one_is_held_at_a_time(tmp_path: Path, limit: int) -> None:
    """Oracle: transformers reads them back bit for bit; the storages alive at every read."""
    stock = saved(tmp_path / "in", "llama")
    (tmp_path / "out").mkdir()
    weights = Weights(tmp_path / "in")
    held = Held(weights)
    write_weights(tmp_path / "out", weights.tensors, held.read_into, max_shard_bytes=limit)
    total = sum(t.nbytes for t in stock.state_dict().values())
    assert held.peak <= limit
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= total / limit
    stock.config.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in stock.state_dict().items():
        assert again.state_dict()[name].equal(tensor)


def test_a_tensor_above_the_limit_stands_alone() -> None:
    """Oracle: counting by hand, 4 bytes a number."""
    sizes = {"a": 3, "b": 1, "c": 9, "d": 2, "e": 2}
    tensors = {name: Stored(torch.float32, (size,)) for name, size in sizes.items()}
    assert convert._plan(tensors, 16) == [["a", "b"], ["c"], ["d", "e"]]


def _memory(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def _load(directory: Path, how: str, out: Path) -> None:
    """Load in a process of its own; write the model's bytes and those that loading held more."""
    config = LlmNormConfig.from_pretrained(directory)
    before = _memory("VmRSS")
    model = empty_model(config, device="cpu")
    for tensor in named_weights(model).values():
        tensor.zero_()
    weights = open_weights(directory, config)
    full = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    if how == "ours":
        weights.read_into(named_weights(model))
    else:
        files = directory.glob("*.safetensors")
        model.load_state_dict({k: v for file in files for k, v in load_file(file).items()})
    out.write_text(f"{full - before} {_memory('VmHWM') - full}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_loading_holds_one_shard_besides_the_model(tmp_path: Path) -> None:
    """Oracle: the resident memory of a process of its own, and of one that reads all at once."""
    config = LlmNormConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8
    )
    model = empty_model(config, device="cpu")
    weights = named_weights(model)
    for tensor in weights.values():
        tensor.zero_()
    stored = {name: Stored(t.dtype, tuple(t.shape)) for name, t in weights.items()}

    def read_into(into: Any) -> None:
        for name, tensor in into.items():
            tensor.copy_(weights[name])

    write_weights(tmp_path, stored, read_into, max_shard_bytes=20_000_000)
    config.save_pretrained(tmp_path)
    size = sum(tensor.nbytes for tensor in weights.values())
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert largest < size / 6
    extra = {}
    for how in ("ours", "all at once"):
        process = CHILDREN.Process(target=_load, args=(tmp_path, how, tmp_path / "memory"))
        process.start()
        process.join(PATIENCE)
        assert process.exitcode == 0
        model_bytes, extra[how] = map(int, (tmp_path / "memory").read_text().split())
        assert model_bytes > 0.9 * size
    assert extra["ours"] < 1.5 * largest
    assert extra["all at once"] > 0.9 * size
