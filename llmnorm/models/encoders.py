"""Heads of encoders: a masked token from its context on both sides, a class from a whole text.

Source: Devlin et al. 2019, BERT (arXiv 1810.04805), sections 3.1 and 4, whose heads these are:
    masked token    logits = E norm(gelu(W h + b)) + c    at masked positions, E the embedding if
                                                          tied, as in BERT
    class           logits = A tanh(P h + p) + a          h of the first token; of the last real one
                                                          in a decoder, where only it has seen all

Shapes: input_ids, token_type_ids, attention_mask, position_ids and labels of masked tokens (batch,
length); hidden (batch, length, hidden); labels of texts (batch,), class numbers or (num_labels = 1)
real numbers.

Surprises: a masked model's labels stand at their tokens' own positions; nothing is shifted. In
training its head runs at the labelled positions only, with the chunked loss of loss.py, and makes
no logits; on a GPU, finding those positions waits for it. A loss is divided by what is counted in
the whole step (num_items_in_batch), as in the causal model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormModel, LlmNormPreTrainedModel, WithLanguageHead
from llmnorm.nn.linear import Linear
from llmnorm.nn.loss import IGNORED, LanguageHead, cross_entropy
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError


class MaskedHead(nn.Module):
    """What stands between the last block and the vocabulary: norm(gelu(dense(h)))."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.dense = Linear(settings.hidden_size, settings.hidden_size)
        self.norm = settings.norm.build(settings.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., hidden) -> the same shape."""
        if isinstance(self.norm, RunningNorm):
            self.norm.begin(None)  # of what comes here, all counts
        return self.norm(F.gelu(self.dense(hidden)))


class LlmNormForMaskedLM(WithLanguageHead):
    """The masked language model: an encoder and BERT's head.

    Raises:
        InputError: the mixers look back only.
    """

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        self.model = LlmNormModel(config)
        if self.model.causal:
            raise InputError(
                "model.mixer: sees no later tokens, so that a masked language model would fill a "
                "gap from one side; nearest: hydra, or `bidirectional: true` where there is one"
            )
        self.head = MaskedHead(config.settings())
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits (batch, length, vocabulary), or the loss.

        Args:
            labels: the true tokens at their own positions; -100 is not counted.
            num_items_in_batch: what the summed loss is divided by; the real labels if None.

        The others are as in `LlmNormModel.forward`. Logits are None where a loss is asked for in
        training.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        hidden, loss, logits = output.last_hidden_state, None, None
        if labels is None or not self.training:
            logits = self.lm_head(self.head(hidden))
        if labels is not None and logits is not None:
            loss = cross_entropy(logits, labels, num_items_in_batch)
        elif labels is not None:
            counted = labels != IGNORED
            loss = self._loss(self.head(hidden[counted]), labels[counted], num_items_in_batch)
        result = MaskedLMOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
        return result.to_tuple() if return_dict is False else result


class LlmNormForSequenceClassification(LlmNormPreTrainedModel):
    """A text's class, or (config.num_labels = 1) a number for it; of any encoder or decoder."""

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlmNormModel(config)
        self.dropout = config.embedding_dropout
        self.pooler = Linear(config.hidden_size, config.hidden_size)
        self.score = Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits (batch, num_labels), and the loss where labels are given.

        Args:
            labels: (batch,) class numbers, or real numbers where num_labels is 1 (squared error);
                -100 (nan) is not counted.
            num_items_in_batch: what the summed loss is divided by; the real labels if None.

        The others are as in `LlmNormModel.forward`.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            max_length_q=max_length_q,
            max_length_k=max_length_k,
        )
        pooled = torch.tanh(self.pooler(self._read(output.last_hidden_state, attention_mask)))
        if self.dropout:
            pooled = F.dropout(pooled, self.dropout, self.training)
        logits = self.score(pooled)
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = squared_error(logits.squeeze(-1), labels, num_items_in_batch)
        elif labels is not None:
            loss = cross_entropy(logits, labels, num_items_in_batch)
        result = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states
        )
        return result.to_tuple() if return_dict is False else result

    def _read(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The hidden state (batch, hidden) that the class is read from."""
        batch, length, _ = hidden.shape
        if attention_mask is None:
            return hidden[:, -1 if self.model.causal else 0]
        positions = torch.arange(length, device=hidden.device).expand(batch, length)
        real = attention_mask.bool()
        if self.model.causal:
            position = positions.masked_fill(~real, -1).amax(1)
        else:
            position = positions.masked_fill(~real, length - 1).amin(1)
        return hidden[torch.arange(batch, device=hidden.device), position]


def squared_error(values: Tensor, labels: Tensor, items: Tensor | float | None = None) -> Tensor:
    """Sum of (values - labels)^2 over `items`; labels (batch,), nan is not counted."""
    values = values.to(wide_dtype(values.dtype))
    real = ~labels.isnan()
    total = (values - labels.to(values.dtype)).masked_fill(~real, 0).square().sum()
    return total / (real.sum().clamp(min=1) if items is None else items)
