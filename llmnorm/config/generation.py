"""Settings of generated text, the section `generation`: how tokens are chosen, and the engine."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmnorm.config.values import Count, Rows
from llmnorm.part import Settings


class GenerationSettings(Settings):
    """Generated text: how tokens are chosen, and the engine that runs the model."""

    max_new_tokens: Rows = 64
    """Tokens generated at most."""
    temperature: float = Field(default=0.8, ge=0)
    """0 is greedy."""
    top_k: Count | None = None
    """Sample from this many likeliest tokens."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    min_p: float = Field(default=0.0, ge=0, lt=1)
    """Sample from tokens that have at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(default=1.0, ge=0.001, le=1000)
    """Divides the logits of tokens that the prompt or the answer has already, and multiplies those
    below 0 (Keskar et al. 2019, arXiv 1909.05858)."""
    presence_penalty: float = Field(default=0.0, ge=-1000, le=1000)
    """Taken from the logits of tokens that the answer has already."""
    frequency_penalty: float = Field(default=0.0, ge=-1000, le=1000)
    """Taken from a token's logit as often as the answer has it already."""
    stop: list[str] = []
    """Texts that end an answer, and are no part of it."""
    n: Count = 1
    """Answers to each prompt."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = 0
    """Seed of the sampling: with one, a text is the same with and without a draft, alone and among
    others. `null`: new noise each time, which accepts a few more drafted tokens."""
    method: Literal["auto", "plain", "ragged", "eqspec", "exspec"] = "auto"
    """`plain`: a token a row and pass; the others verify a draft's tokens in one pass: `ragged` in
    rows of any lengths, `eqspec` and `exspec` as arXiv 2510.22876 (rows padded to one length; rows
    of equal lengths together). `auto`: `ragged` with a draft, else `plain`."""
    draft: str = "none"
    """What proposes tokens: `none`, `lookup` (what followed the last tokens earlier in the text) or
    a directory of a smaller model with the same tokenizer."""
    draft_tokens: Annotated[int, Field(ge=1, le=16)] | Literal["auto"] = "auto"
    """Tokens that are drafted a row and round; `auto`: from the measured acceptance and a table of
    costs, down to none where a draft does not pay."""
    slots: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rows that are generated at once."""
    context: Count | None = None
    """Tokens that a row may have, prompt and answer; left out, the model's."""
    cache_memory: Annotated[float, Field(gt=0)] | None = None
    """GiB that the cache may take, and that of a draft beside it; both are made at the start. Left
    out, what is free."""
    prefill_chunk: Count = 128
    """Tokens of a prompt that are run at once, between two rounds of the other rows; `eqspec` and
    `exspec` run it whole."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; `auto`: a GPU if there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of the weights and the cache; `auto`: those of the files."""
    deterministic: bool = False
    """Bit-equal text whatever else is in the batch, on a CPU in float32; refused where a self-test
    at the start does not show it."""

    @model_validator(mode="after")
    def _check(self) -> "GenerationSettings":
        if not self.draft:
            raise ValueError("generation.draft is empty; give none, lookup or a directory")
        if "" in self.stop:
            raise ValueError("generation.stop has an empty text, which every answer ends with")
        if self.method in ("eqspec", "exspec") and self.cache_memory is not None:
            raise ValueError(
                f"generation.method '{self.method}' makes caches anew in every round, and "
                "generation.cache_memory cannot bound them; leave one of them out"
            )
        self._check_deterministic()
        return self

    def check_draft(self) -> None:
        """Refuse a method and a draft that do not go together.

        Raises:
            ValueError: they do not.
        """
        if self.draft == "none" and self.method not in ("auto", "plain"):
            raise ValueError(
                f"generation.method '{self.method}' verifies a draft's tokens, and "
                "generation.draft is none; give lookup or the directory of a model"
            )
        if self.draft == "none" and self.draft_tokens != "auto":
            raise ValueError(
                f"generation.draft_tokens is {self.draft_tokens}, and generation.draft is none; "
                "give lookup or the directory of a model"
            )
        if self.draft != "none" and self.method == "plain":
            raise ValueError(
                f"generation.method 'plain' uses no draft, and generation.draft is '{self.draft}'; "
                "leave one of them out"
            )
        if self.draft_tokens == "auto" and self.method in ("eqspec", "exspec"):
            raise ValueError(
                f"generation.method '{self.method}' drafts as many tokens in every round: give "
                "generation.draft_tokens (5 in the paper)"
            )

    def _check_deterministic(self) -> None:
        found = {"device": ("cuda",), "dtype": ("bf16",), "method": ("eqspec", "exspec")}
        for key, excluded in found.items():
            if self.deterministic and getattr(self, key) in excluded:
                raise ValueError(
                    f"generation.deterministic is shown on a CPU in float32, row by row, and "
                    f"generation.{key} is '{getattr(self, key)}'; leave one of them out"
                )
