"""Tiny models in float64 and texts of random tokens: all of it can be computed by hand."""

from typing import Any

import torch
import transformers
from torch import nn

from llmnorm.analysis.depth.pieces import Batch, Text
from llmnorm.models.building import build_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormForCausalLM

VOCABULARY = 61


def ours(*, layers: int = 3, width: int = 16, std: float = 0.2, **settings: Any) -> Any:
    """A model of our class, std large enough that all tokens and blocks matter."""
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=std,
        max_position_embeddings=64,
        **settings,
    )
    model: LlmNormForCausalLM = build_model(config, seed=1)
    return model.double().eval()


def stock(kind: str, **settings: Any) -> Any:
    """A model of transformers' own, of 3 blocks, attention computed eagerly."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_head": 2, "n_positions": 64}
    if kind in ("opt", "falcon", "mpt"):
        shape.pop("intermediate_size")
    if kind in ("llama", "qwen3", "gemma2", "olmo2"):
        shape |= {"num_key_value_heads": 1, "head_dim": 8}
    config = transformers.AutoConfig.for_model(
        kind,
        **shape,
        **{"num_hidden_layers": 3, "vocab_size": VOCABULARY, "initializer_range": 0.2},
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        **settings,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.double().eval()


def text(*lengths: tuple[int, ...], seed: int = 0, at_once: int = 2) -> Text:
    """Rows of documents of these lengths: `text((7, 5), (12,))`."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, len(lengths), at_once):
        documents = [
            (row, length)
            for row in range(start, min(start + at_once, len(lengths)))
            for length in lengths[row]
        ]
        shape = len(documents), max(length for _, length in documents)
        ids = torch.randint(VOCABULARY, shape, generator=generator)
        real = torch.arange(shape[1]) < torch.tensor([[length] for _, length in documents])
        labels = ids.roll(-1, 1).masked_fill(~real.roll(-1, 1), -100)
        labels[:, -1] = -100
        batches.append(Batch(ids, labels, real, torch.tensor([row for row, _ in documents])))
    tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    return Text(batches, {"random": len(lengths)}, tokens)


@torch.no_grad()
def kill(block: nn.Module) -> None:
    """A dead block: what its branches write into the stream is zero."""
    for name, parameter in block.named_parameters():
        if "o_proj" in name or "down_proj" in name or "c_proj" in name:
            parameter.zero_()
