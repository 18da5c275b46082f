"""What others generate from the same weights, for generation.py: transformers and llama.cpp.

Every function returns the tokens behind each prompt, as many as are asked for: no token ends a row.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode_candidates import Clock, LlamaCpp

from llmnorm.generation.contract import Sampling

Answers = list[list[int]]


@dataclass(frozen=True)
class Work:
    """Prompts to be continued by `new` tokens each, so many at a time."""

    prompts: Answers
    new: int
    batch: int
    temperature: float

    def sampling(self, row: int) -> Sampling:
        """Of a row: seeded by its number."""
        return Sampling(self.new, temperature=self.temperature, seed=row, ignore_end=True)


def without_ends(model: Any) -> Any:
    """The model, no token of which ends a row."""
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def sampled(temperature: float) -> dict[str, Any]:
    """How tokens are chosen, as arguments of `generate`: of the whole distribution, or greedily."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def generated(model: Any, work: Work, **more: Any) -> Answers:
    """`generate` on batches of prompts, padded on the left; more: arguments of it."""
    answers = []
    for start in range(0, len(work.prompts), work.batch):
        some = work.prompts[start : start + work.batch]
        width = max(map(len, some))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in some])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in some])
        torch.manual_seed(start)
        how = sampled(work.temperature) | more
        out = model.generate(ids, attention_mask=mask, max_new_tokens=work.new, **how)
        answers += out[:, width:].tolist()
    return answers


class ContinuousBatching:
    """transformers' `generate_batch`, whose manager stays between calls.

    Args:
        model: of transformers.
        prompts: that it will be asked to continue.
        new: tokens behind each.
        page: tokens of a page of its cache; there are as many as the prompts need.
        together: tokens of a pass at most.
    """

    def __init__(self, model: Any, prompts: Answers, new: int, page: int, together: int) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._model = model
        self._chosen = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        self._settings = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=sum(-(-(len(prompt) + new) // page) for prompt in prompts),
            max_batch_tokens=together,
            use_cuda_graph=False,
        )

    def run(self, work: Work) -> Answers:
        """The work's prompts, or a part of them; all get as many tokens."""
        out = self._model.generate_batch(
            work.prompts,
            generation_config=self._chosen,
            continuous_batching_config=self._settings,
            persistent_manager=True,
        )
        return [found.generated_tokens for found in out.values()]

    def close(self) -> None:
        """End the manager."""
        self._model.destroy_cached_continuous_batching_manager()


def llama_cpp_seconds(
    python: str,
    file: Path,
    prompts: Answers,
    batches: Sequence[int],
    steps: int,
    rounds: int,
    clock: Clock,
    directory: Path,
) -> dict[int, float]:
    """Seconds of a greedy step of llama.cpp by rows, the median of the rounds.

    The prompts' first tokens, as many of each, are run before; a step is one more token a row.
    """
    length = min(map(len, prompts))
    listed = directory / "prompts.json"
    listed.write_text(json.dumps([prompt[:length] for prompt in prompts]), encoding="utf-8")
    peer = LlamaCpp(python, file, torch.get_num_threads(), steps, listed, clock)
    try:
        found = {rows: sorted(peer.run(rows)[0] for _ in range(rounds)) for rows in batches}
    finally:
        peer.close()
    return {rows: times[len(times) // 2] for rows, times in found.items()}
