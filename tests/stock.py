"""A model of transformers that is small enough for any test."""

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CONTEXT = 256


def stock_llama(directory: Path, context: int = CONTEXT) -> PreTrainedModel:
    """A Llama of two layers for the tokenizer of a directory, always with the same weights.

    They are random and large (0.5), so that greedy texts are long and varied.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model
