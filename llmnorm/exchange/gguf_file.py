"""`llmnorm export RUN FILE.gguf`: one file for llama.cpp and the programs that are built on it.

It holds the weights of a model that a stock architecture computes, its tokenizer
(`gguf_tokenizer.py`) and its chat template. Sources: the format, docs/gguf.md of
github.com/ggml-org/ggml; names and fields, convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp.

What would surprise:
- llama.cpp's Llama rotates neighbours (2i, 2i + 1), ours and Hugging Face's the two halves
  (i, i + head_dim/2). So the rows of its q and k are interleaved; those of a Qwen are not.
- Norm gains and biases are float32 in a file of any type, and so is a matrix's scale in q8_0. A
  matrix whose rows are no multiple of 32 numbers has no blocks of q8_0 and is f16.
- Weights go tensor by tensor: in memory is the largest of them.
"""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmnorm.config.pretrained import refuse_encoder
from llmnorm.config.stock import to_stock
from llmnorm.exchange import gguf_tokenizer
from llmnorm.exchange.export import folding, open_sources, reader
from llmnorm.exchange.source import Source
from llmnorm.machine.doctor import missing_extra
from llmnorm.models.equivalence import depth_factors
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def export_gguf(
    path: Path,
    file: Path,
    *,
    type: str = "f16",
    average: int = 1,
    ema: bool = False,
    checkpoint: str = "latest",
) -> None:
    """Write the model at `path` to the new file `file`.

    Args:
        path: a run, or a directory that was exported before or holds a stock model.
        file: the target; it must not be there.
        type: of the matrices, one of `TYPES`.
        average, ema, checkpoint: which weights, as in `export`.

    Raises:
        InputError: the file is there, the weights are not, llama.cpp cannot express the model or
            its tokenizer, `gguf` is not installed, the disk is full; nothing has been written.
    """
    try:
        from gguf import GGUFWriter
    except ModuleNotFoundError:
        raise missing_extra("gguf") from None
    if file.exists() or file.is_symlink():
        raise InputError(f"{file}: is there already; name a new file")
    sources = open_sources(path, average=average, ema=ema, checkpoint=checkpoint)
    source = sources[-1]
    source.refuse_foreign(f"{file}: {path}")
    refuse_encoder(
        source.config.architectures, f"{file}: {path}", "llama.cpp's architectures are of"
    )
    settings = source.own.settings()
    architecture, keys = to_stock(settings, str(file), "export a directory")
    _check(settings, architecture, file)
    if source.tokenizer is None:
        raise InputError(
            f"{path}: has no tokenizer (no tokenizer.json), and a .gguf file holds one"
        )
    tokenizer = gguf_tokenizer.fields(
        source.tokenizer,
        rows=keys["vocab_size"],
        bos=source.config.bos_token_id,
        first=source.first_token,
    )
    read_into = folding(reader(sources), depth_factors(settings))
    temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(temporary, _ARCHITECTURES[architecture])
        _add_settings(writer, settings, keys, file.stem, type)
        _add_tokenizer(writer, tokenizer, source)
        narrow = _write_tensors(writer, settings, architecture, source, read_into, type)
        temporary.rename(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    total = sum(torch.Size(stored.shape).numel() for stored in source.tensors.values())
    print(
        f"{file}: {architecture}, {total / 1e6:.2f}M parameters, {type}, words as {tokenizer.rule}"
    )
    if narrow:
        print(f"{narrow} matrices are f16: their rows are no multiple of 32 numbers")


def _check(settings: ModelSettings, architecture: str, file: Path) -> None:
    """Refuse what transformers' architecture computes and llama.cpp's does not.

    Raises:
        InputError: the key is named.
    """

    def refuse(key: str, why: str) -> None:
        raise InputError(f"{file}: model.{key}: {why}; export a directory")

    window = getattr(settings.mixers()[0], "sliding_window", None)
    if window is not None and window < settings.max_position_embeddings:
        refuse("mixer.sliding_window", f"{window} is ignored by llama.cpp's Llama")
    rope, kind = settings.rope_parameters, settings.rope_parameters.rope_type
    if kind in ("dynamic", "longrope"):
        refuse("rope_parameters.rope_type", f"'{kind}' is not in llama.cpp")
    if kind == "llama3" and _ARCHITECTURES[architecture] != "llama":
        refuse("rope_parameters.rope_type", "'llama3' is for llama.cpp's Llama alone")
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if kind == "yarn" and getattr(rope, key) is not None:
            refuse(f"rope_parameters.{key}", "llama.cpp has the paper's value alone")
    if kind == "yarn" and rope.truncate is False:
        refuse("rope_parameters.truncate", "llama.cpp rounds the ramp's range")


def _add_settings(
    writer: "GGUFWriter", settings: ModelSettings, keys: Mapping[str, Any], name: str, type: str
) -> None:
    """The model's sizes."""
    from gguf import LlamaFileType, RopeScalingType

    file_types = {
        "f32": LlamaFileType.ALL_F32,
        "f16": LlamaFileType.MOSTLY_F16,
        "bf16": LlamaFileType.MOSTLY_BF16,
        "q8_0": LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_name(name)
    writer.add_file_type(file_types[type])
    writer.add_quantization_version(2)
    writer.add_vocab_size(keys["vocab_size"])
    writer.add_context_length(keys["max_position_embeddings"])
    writer.add_embedding_length(keys["hidden_size"])
    writer.add_block_count(keys["num_hidden_layers"])
    writer.add_feed_forward_length(keys["intermediate_size"])
    writer.add_head_count(keys["num_attention_heads"])
    writer.add_head_count_kv(keys["num_key_value_heads"])
    writer.add_key_length(settings.head_dim)
    writer.add_value_length(settings.head_dim)
    writer.add_rope_dimension_count(settings.head_dim)
    writer.add_layer_norm_rms_eps(keys["rms_norm_eps"])
    rope = settings.rope_parameters
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type in ("linear", "yarn"):
        assert rope.factor is not None
        writer.add_rope_scaling_type(RopeScalingType(rope.rope_type))
        writer.add_rope_scaling_factor(rope.factor)
    if rope.rope_type == "yarn":
        assert rope.original_max_position_embeddings is not None
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)


def _add_tokenizer(writer: "GGUFWriter", fields: gguf_tokenizer.Fields, source: Source) -> None:
    writer.add_tokenizer_model(fields.kind)
    writer.add_tokenizer_pre(fields.rule)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    if fields.kind == "llama":
        writer.add_token_scores(fields.scores)
        writer.add_add_space_prefix(fields.space)
    else:
        writer.add_token_merges(fields.merges)
    config = source.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for add, number in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, ends[0]),
        (writer.add_eot_token_id, ends[-1] if len(ends) > 1 else None),
        (writer.add_pad_token_id, config.pad_token_id),
        (writer.add_unk_token_id, fields.unknown),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(fields.begins)
    writer.add_add_eos_token(False)
    if fields.template is not None:
        writer.add_chat_template(fields.template)


def _write_tensors(
    writer: "GGUFWriter",
    settings: ModelSettings,
    architecture: str,
    source: Source,
    read_into: Callable[[Mapping[str, Tensor]], None],
    type: str,
) -> int:
    """Write the fields that were added, then every tensor.

    Returns:
        How many matrices are f16 because they have no blocks of q8_0.
    """
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    from gguf.quants import quant_shape_to_byte_shape, quantize

    arch = _ARCHITECTURES[architecture]
    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], settings.num_hidden_layers)
    heads = {
        "q_proj": settings.num_attention_heads,
        "k_proj": settings.num_key_value_heads,
    }
    if arch != "llama":
        heads = {}  # a Qwen rotates halves there too
    wanted = GGMLQuantizationType[type.upper()]
    types = {}
    for name, stored in source.tensors.items():
        shape = tuple(stored.shape)
        kind = wanted if len(shape) > 1 else GGMLQuantizationType.F32
        if kind == GGMLQuantizationType.Q8_0 and shape[-1] % 32:
            kind = GGMLQuantizationType.F16
        types[name] = kind
        stem, _, what = name.rpartition(".")
        there = names.get_name(stem)
        assert there is not None, f"llama.cpp has no tensor for {name}"
        dtype: Any = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        if dtype is np.uint8:
            shape = quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(f"{there}.{what}", shape, np.dtype(dtype), size, raw_dtype=kind)
    factors = _rotary_factors(settings)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in types.items():
        tensor = torch.empty(source.tensors[name].shape)
        read_into({name: tensor})
        of = name.split(".")[-2]
        if of in heads:
            tensor = _interleaved(tensor, heads[of])
        writer.write_tensor_data(quantize(tensor.numpy(), kind))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    return sum(types[name] != wanted for name in types if len(source.tensors[name].shape) > 1)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * head_dim, ...) with the two halves of each head interleaved.

    One head of four rows: [a0, a1, b0, b1] -> [a0, b0, a1, b1].
    """
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def _rotary_factors(settings: ModelSettings) -> np.ndarray | None:
    """What llama.cpp divides each frequency by, (head_dim/2,) float32; None: none of them."""
    rope = settings.rope_parameters
    if rope.rope_type != "llama3":
        return None
    plain = rope.model_validate({"rope_theta": rope.rope_theta})
    before, after = (
        Rotary(p, settings.head_dim, settings.max_position_embeddings).frequencies(torch.float64)
        for p in (plain, rope)
    )
    return (before / after).float().numpy()
