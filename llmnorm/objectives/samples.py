"""A few generated texts at every evaluation, to be read beside the figures.

    samples = Samples(config, packed)
    samples.generate(model, parallel)      -> [{"prompt": ..., "continuation": ...}, ...]

Prompts and noise are the same every time, so only the model makes a difference. Without
`evaluation.prompts` the first tokens of validation rows are continued, of each source in turn. How
tokens are chosen is `generation`'s to say, in its keys of a request (`requests.SAMPLED` but `n`).

What would surprise: every process generates the same text, because a sharded model needs all of
them for a forward pass. Random states and the model's mode are restored, so a run with samples has
the numbers of a run without.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmnorm.config.tree import RunConfig
from llmnorm.data.packed import PackedData
from llmnorm.generation.continuations import continuations
from llmnorm.generation.prompts import end_tokens, open_tokenizer, prompt_tokens
from llmnorm.generation.requests import request_of
from llmnorm.parallel.processes import Parallel
from llmnorm.part import InputError

if TYPE_CHECKING:
    from llmnorm.models.modeling import LlmNormForCausalLM

PROMPT_TOKENS = 16  # of a validation row


class Samples:
    """The prompts of a run, to be continued at every evaluation.

    Attributes:
        prompts: each prompt's token ids; empty where nothing is to be generated.

    Raises:
        InputError: a prompt is longer than the model's context.
    """

    def __init__(self, config: RunConfig, packed: PackedData) -> None:
        self.prompts: list[list[int]] = []
        evaluation = config.evaluation
        if not (evaluation.prompts or evaluation.samples):
            return
        self._tokenizer = open_tokenizer(packed.tokenizer_directory, first=packed.bos)
        self._settings = config.generation.model_copy(
            update={"max_new_tokens": evaluation.sample_tokens, "n": 1}
        )
        if evaluation.prompts:
            self.prompts = [prompt_tokens(self._tokenizer, text) for text in evaluation.prompts]
            refuse_long(self.prompts, config)
        else:
            self.prompts = _validation_prompts(packed, evaluation.samples)

    def generate(self, model: "LlmNormForCausalLM", parallel: Parallel) -> list[dict[str, str]]:
        """The model's continuations: `{"prompt": text, "continuation": text}` for each prompt.

        Raises:
            Interrupted: a process was asked to stop.
        """
        if not self.prompts:
            return []
        ends = end_tokens(model.config, self._tokenizer)
        was_training = model.training
        model.eval()
        texts = []
        try:
            # Shapes change with every token, so compiled blocks would be compiled again and again.
            with parallel.autocast(), torch.compiler.set_stance("force_eager"):
                for prompt in self.prompts:
                    parallel.poll()
                    (ids,) = continuations(
                        model,
                        self._tokenizer,
                        [request_of(prompt, self._settings)],
                        ends=ends,
                        together=parallel.spread,
                        advance=parallel.phases.advance,
                    )
                    texts.append({"prompt": self._text(prompt), "continuation": self._text(ids)})
        finally:
            model.train(was_training)
        return texts

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def refuse_long(prompts: Sequence[Sequence[int]], config: RunConfig) -> None:
    """Raise an InputError if one of `evaluation.prompts` is longer than the model's context."""
    context = config.model.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if len(prompt) > context:
            raise InputError(
                f"evaluation.prompts.{number}: has {len(prompt)} tokens, and the model takes "
                f"{context} (model.max_position_embeddings)"
            )


def _validation_prompts(packed: PackedData, count: int) -> list[list[int]]:
    """The first tokens of `count` validation rows; of fewer if the sources have no more."""
    prompts: list[list[int]] = []
    for row in range(max(source.validation_rows for source in packed.sources)):
        for source in packed.sources:
            start = row * packed.context_length
            length = min(PROMPT_TOKENS, packed.context_length, source.validation.tokens - start)
            if length > 0 and len(prompts) < count:
                ids = np.empty(length, np.int64)
                source.validation.read(start, ids)
                prompts.append(ids.tolist())
        if len(prompts) == count:
            break
    return prompts
