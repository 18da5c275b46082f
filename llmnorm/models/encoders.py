"""Heads of encoders: a masked token from its context on both sides, a class from a whole text.

Source: Devlin et al. 2019, BERT (arXiv 1810.04805), sections 3.1 and 4, whose heads these are:
    masked token    logits = E norm(gelu(W h + b)) + c    at masked positions, E the embedding if
                                                          tied, as in BERT
    class           logits = A tanh(P h + p) + a          h of the first token; of the last real one
                                                          in a decoder, where only it has seen all
    several classes at once, numbers                      the same logits, other losses

Shapes: input_ids, token_type_ids, attention_mask, position_ids and labels of masked tokens (batch,
length); hidden (batch, length, hidden); labels of texts (batch,) or (batch, num_labels).

Surprises: a masked model's labels stand at their tokens' own positions; nothing is shifted. With
`loss_only` its head runs at the labelled positions only, with the chunked loss of loss.py, and
makes no logits; on a GPU, finding those positions waits for it. A loss is divided by what is
counted in the whole step (num_items_in_batch), as in the causal model.
"""

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormModel
from llmnorm.models.pretrained_model import Keywords, LlmNormPreTrainedModel, WithLanguageHead
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.linear import Linear
from llmnorm.nn.loss import IGNORED, cross_entropy
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

    def forward(self, hidden: Tensor, counted: Tensor | None = None) -> Tensor:
        """hidden (..., hidden) -> the same shape; a norm with statistics counts where `counted`."""
        if isinstance(self.norm, RunningNorm):
            self.norm.begin(counted)
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
        loss_only: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **more: Unpack[Keywords],
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits (batch, length, vocabulary), and the loss where labels are given.

        Args:
            labels: the true tokens at their own positions; -100 is not counted.
            num_items_in_batch: what the summed loss is divided by; the real labels if None.
            loss_only: make no logits, whose memory is batch x length x vocabulary, and run the head
                where there are labels; the loss is the same.

        The others are as in `LlmNormModel.forward`.
        """
        if loss_only and labels is None:
            raise InputError("loss_only: there is no loss without labels; give them")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **more,
        )
        hidden, loss, logits = output.last_hidden_state, None, None
        counted = None if labels is None else labels != IGNORED
        if loss_only and labels is not None:
            loss = self._loss(self.head(hidden[counted]), labels[counted], num_items_in_batch)
        else:
            logits = self.lm_head(self.head(hidden, counted))
            if labels is not None:
                loss = cross_entropy(logits, labels, num_items_in_batch)
        result = MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self._asked(None, return_dict)[1] else result.to_tuple()


class LlmNormForSequenceClassification(LlmNormPreTrainedModel):
    """A text's class, its several classes, or numbers for it; of any encoder or decoder.

    config.problem_type says which, as in Hugging Face's models. If it is None, one label is a
    number; several are one class if the labels are whole numbers, else several classes at once.
    """

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
        **more: Unpack[Keywords],
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Logits (batch, num_labels), and the loss where labels are given.

        Args:
            labels: (batch,) class numbers; (batch, num_labels) 1 or 0 for each class
                (multi_label_classification: binary cross-entropy); (batch,) or (batch, num_labels)
                real numbers (regression: squared error). Not counted: -100 among classes, nan among
                numbers.
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
            return_dict=True,
            **more,
        )
        pooled = torch.tanh(self.pooler(self._read(output.last_hidden_state, attention_mask)))
        if self.dropout:
            pooled = F.dropout(pooled, self.dropout, self.training)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        result = SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self._asked(None, return_dict)[1] else result.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | float | None) -> Tensor:
        problem = self.config.problem_type
        if problem is None and self.num_labels == 1:
            problem = "regression"
        elif problem is None:
            several = labels.is_floating_point()
            problem = "multi_label_classification" if several else "single_label_classification"
        wanted: list[tuple[int, ...]] = [(len(logits), self.num_labels)]
        if problem == "single_label_classification":
            wanted = [(len(logits),)]
        elif self.num_labels == 1:
            wanted.append((len(logits),))
        if labels.shape not in wanted:
            raise InputError(
                f"labels: problem_type '{problem}' with num_labels {self.num_labels} wants shape "
                f"{wanted[0]}, got {tuple(labels.shape)}"
            )
        if problem == "single_label_classification":
            return cross_entropy(logits, labels, items)
        labels = labels.view_as(logits)
        if problem == "regression":
            return squared_error(logits, labels, items)
        return binary_cross_entropy(logits, labels, items)

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
    """Sum of (values - labels)^2 over `items`, the real labels if None; nan is not counted."""
    values = values.to(wide_dtype(values.dtype))
    losses = (values - labels.to(values.dtype)).square()
    return _mean(losses, ~labels.isnan(), items)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, items: Tensor | float | None = None
) -> Tensor:
    """Sum of every class's own cross-entropy over `items`, the real labels if None.

    labels (batch, num_labels), of which nan and -100 are not counted.
    """
    logits = logits.to(wide_dtype(logits.dtype))
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
    return _mean(losses, ~(labels.isnan() | (labels == IGNORED)), items)


def _mean(losses: Tensor, real: Tensor, items: Tensor | float | None) -> Tensor:
    total = losses.masked_fill(~real, 0).sum()
    return total / (real.sum().clamp(min=1) if items is None else items)
