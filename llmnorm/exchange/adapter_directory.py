"""`llmnorm export` of a run with an adapter: the directory that PEFT reads beside the base.

    adapter_model.safetensors   A and B (and DoRA's m), float32, and what was trained whole
    adapter_config.json         PEFT's: rank, scale, targets, and where the base lies
    tokenizer.json, ...         the tokenizer, its chat template too
    README.md                   how to load it, data and losses of the run

What was trained beside weights in NF4 belongs to the base in NF4: the card loads it so.

PEFT reads adapters of stacks of experts as its `target_parameters`, what was trained whole beside
an adapter (a new head, norms) as its `modules_to_save`, and rows of new tokens as its
`trainable_token_indices`. vLLM and llama.cpp do not read what was trained whole, and no new rows,
which is said when such a directory is written.

What would surprise: PEFT does not give a base the rows that its embedding lacks. So where the new
tokens are more than the base's rows, the base is resized before the adapter is loaded; the card has
the line.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmnorm.data import tokenizer
from llmnorm.exchange.directories import new_directory
from llmnorm.exchange.loading import plain_model
from llmnorm.exchange.model_card import adapter_card
from llmnorm.exchange.source import Source
from llmnorm.generation.prompts import begin_with
from llmnorm.models.adapters import WEIGHTS, peft_name, write_config
from llmnorm.models.four_bit_layers import skipped_by_name, stored_in_four_bits


def write_adapter(source: Source, directory: Path, *, ema: bool) -> None:
    """Write the adapter of a run to the new or empty `directory`.

    Args:
        source: of a run with an adapter.
        ema: whether `source` reads the moving average.

    Raises:
        InputError: PEFT is not installed, it cannot express what was trained, or the directory
            cannot be written; nothing has been written.
    """
    trained = source.trained
    assert trained is not None and trained.adapter is not None
    model, skipped = plain_model(source), []
    if trained.quantize is not None and source.kind is not None:
        skipped = skipped_by_name(model, stored_in_four_bits(model))
    card = adapter_card(directory.name, source, ema=ema, not_in_four_bits=skipped)
    with new_directory(directory, card) as temporary:
        write_config(
            temporary,
            trained.adapter,
            model=model,
            trained=trained.tensors,
            base=str(trained.base),
            new_tokens=trained.new_tokens,
        )
        tensors = {
            name: torch.empty(stored.shape, dtype=stored.dtype)
            for name, stored in trained.tensors.items()
        }
        trained.read_into(tensors)
        named = {peft_name(name): tensor for name, tensor in tensors.items()}
        try:
            save_file(named, temporary / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # gives the system's errors as text
            raise OSError(f"{WEIGHTS}: {error}") from None
        if source.tokenizer is not None:
            tokenizer.copy(source.tokenizer, temporary)
            if source.first_token is not None:
                begin_with(temporary, source.first_token, where=source.tokenizer)
    total = sum(tensor.numel() for tensor in tensors.values())
    print(f"{directory}: adapter of {total / 1e6:.2f}M parameters beside {trained.base}")
    if trained.base_is_run:
        print(
            "its base is a run, which other tools do not read; for them: "
            f"llmnorm export {trained.base} BASE"
        )
    if trained.quantize == "nf4":
        print(
            "it was trained beside weights in NF4: load its base in NF4 too, as README.md shows; "
            "--merge writes a whole model of what was trained, for tools that do not"
        )
    if trained.adapter.parameters is not None:
        print(
            "it has adapters of stacks of experts: PEFT reads them here (target_parameters); "
            "--merge writes a whole model for tools that do not"
        )
    if whole := trained.whole:
        more = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
        print(
            f"'{whole[0]}'{more} was trained whole: PEFT reads it here (modules_to_save), vLLM and "
            "llama.cpp do not; --merge writes a whole model"
        )
    if new := trained.new_tokens:
        resized = ""
        if new.stop > trained.base_rows:
            resized = f", after base.resize_token_embeddings({new.stop})"
        print(
            f"it has the rows of {len(new)} new tokens: PEFT reads them here{resized}, vLLM and "
            "llama.cpp do not; --merge writes a whole model"
        )
