"""The Hugging Face classes: embedding, blocks, final norm, head.

Shapes: input_ids, labels, position_ids and attention_mask (batch, length); hidden (batch, length,
hidden). Parameter names are Llama's, so a stock Llama, Qwen or Mistral state dict maps one to one.

Surprises:
- Documents of packed rows are kept apart where position_ids restart at 0, with and without an
  attention_mask; a cache is refused for them. context.py has the rules.
- `loss_only=True` makes no logits (loss.py): our own training asks for it.
- There is no cache without `use_cache=True` or past_key_values, and none for an encoder.
- In `generate`, rows of a left-padded batch are stored without their padding, each at its length.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llmnorm.models.cache import LlmNormCache, check_cache_class
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.context import (
    Documents,
    Rules,
    check_claims,
    check_numbers,
    given_documents,
    require,
    with_cache,
    without_cache,
)
from llmnorm.models.generation import LlmNormGenerationMixin
from llmnorm.models.pretrained_model import (
    CausalKeywords,
    Keywords,
    LastBlock,
    LlmNormPreTrainedModel,
    WithLanguageHead,
    check_keywords,
)
from llmnorm.models.recomputed import recomputable
from llmnorm.nn.block import Block
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.layer_cache import LayerCache
from llmnorm.nn.loss import IGNORED
from llmnorm.nn.mixers import varlen
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.rotary import Rotary
from llmnorm.nn.norms.running import RunningNorm
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.visibility import Visibility
from llmnorm.part import InputError


class LlmNormModel(LlmNormPreTrainedModel):
    """Embedding, blocks and final norm.

    `fixed_shapes` is set by the caller that compiles the blocks: documents of packed rows are then
    kept apart without shapes that depend on their lengths (nn/visibility.py).
    """

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        settings = config.settings()
        assert isinstance(settings.vocab_size, int)
        self.causal = settings.causal
        self.embed_tokens = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.embed_types: nn.Embedding | None = None
        if settings.type_vocab_size:
            self.embed_types = nn.Embedding(settings.type_vocab_size, settings.hidden_size)
        self.embed_norm: nn.Module | None = None
        if settings.embedding_norm:
            self.embed_norm = settings.norm.build(settings.hidden_size)
        self.embedding_dropout = settings.embedding_dropout
        self.layers = nn.ModuleList(
            recomputable(settings.placement.build(settings, layer))
            for layer in range(settings.num_hidden_layers)
        )
        self.norm = settings.norm.build(settings.hidden_size) if settings.final_norm else None
        self.running_norms = [m for m in self.modules() if isinstance(m, RunningNorm)]
        self.rotary = Rotary(
            settings.rope_parameters, settings.head_dim, settings.max_position_embeddings
        )
        self.fixed_shapes = False
        self.head_dim = settings.head_dim
        for layer, block in enumerate(self.layers):
            assert isinstance(block, Block)
            if block.self_attn.causal != self.causal:  # a part of another package's
                raise InputError(
                    f"model.mixer: the mixer of layer {layer} has causal = "
                    f"{block.self_attn.causal}, and its settings say {self.causal}; make the "
                    "class and its settings agree"
                )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlmNormCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **more: Unpack[Keywords],
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Last hidden states (batch, length, hidden); arguments as Hugging Face's.

        Args:
            token_type_ids: (batch, length), 0 for the first sentence and 1 for the second; all 0 if
                None, and where the model has no types.
            loss_mask: (batch, length), True where a token counts for norms that keep statistics;
                the attention mask's tokens, or all, if None.
            output_attentions: give each mixer's matrix (batch, heads, length, length), by which it
                then mixes; not with a cache.
            more: `Keywords` (pretrained_model.py).

        Raises:
            InputError: both or neither of input_ids and inputs_embeds, a foreign cache, a mask that
                is not (batch, keys), packed documents with a cache, a cache for an encoder, token
                types that the model does not know, documents that are not as above, matrices with
                a cache, keywords that are unknown or say what is not so.
            ValueError: more rows, or tokens, than the cache takes (nn/cache.py).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds")
        check_keywords(more)
        output_hidden_states, return_dict = self._asked(output_hidden_states, return_dict)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InputError(
                f"attention_mask must be (batch, keys), got {tuple(attention_mask.shape)}"
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is not None:
            position_ids = position_ids.expand(hidden.shape[:2])
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache()
        check_claims(more, cache, attention_mask, position_ids, hidden, causal=self.causal)
        documents = given_documents(
            more.get("cu_seq_lens_q"),
            more.get("cu_seq_lens_k"),
            more.get("max_length_q"),
            more.get("max_length_k"),
            hidden,
        )
        visibility: Visibility
        order = None
        counts = more.get("counts")
        if cache is None:
            if counts is not None:
                raise InputError(
                    "counts: are of a pass with a cache; give past_key_values, or an attention_mask"
                )
            kernel = varlen.serves(hidden) and varlen.has_kernel(self.head_dim)
            rules = Rules(self.causal, kernel, self.fixed_shapes)
            visibility, position_ids = without_cache(
                attention_mask, position_ids, documents, hidden, rules
            )
            check_numbers(more.get("seq_idx"), visibility)
        else:
            if output_attentions:
                raise InputError(
                    "output_attentions: behind a cache there is no whole matrix; leave one of them "
                    "out (use_cache=False)"
                )
            self._check_cache(cache, documents)
            visibility, position_ids, order = with_cache(
                attention_mask, position_ids, cache, hidden, counts
            )
        tables = self.rotary(position_ids, wide_dtype(hidden.dtype))
        context = Context(*tables, visibility, [] if output_attentions else None)
        if loss_mask is None and attention_mask is not None and cache is None:
            loss_mask = attention_mask.bool()
        states = self.hidden_states(
            hidden,
            context,
            None if cache is None else cache.slots.layers,
            token_type_ids=token_type_ids,
            loss_mask=loss_mask,
            order=order,
            every=bool(output_hidden_states),
            last_block=more.get("last_block"),
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=None if context.matrices is None else tuple(context.matrices),
        )
        return output if return_dict else output.to_tuple()

    def hidden_states(
        self,
        hidden: Tensor,
        context: Context,
        layers: Sequence[LayerCache] | None,
        *,
        token_type_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        order: Tensor | None = None,
        every: bool = False,
        last_block: LastBlock | None = None,
    ) -> list[Tensor]:
        """The hidden states (batch, length, hidden) behind the final norm, as the last item.

        `forward` and the decode step (decoding.py) both run this.

        Args:
            hidden: embedded tokens (batch, length, hidden).
            context: of the tokens, in `order`.
            layers: the layers' caches; None: there is no cache.
            token_type_ids, loss_mask: as in `forward`.
            order: (batch, length), the order to take the tokens in; the result is in the first one.
            every: put what entered each layer before it.
            last_block: as in `Keywords`.
        """
        for norm in self.running_norms:
            norm.begin(loss_mask, counts=torch.is_grad_enabled())
        hidden = self.embedded(hidden, token_type_ids)
        if order is not None:
            hidden = hidden.take_along_dim(order[..., None], 1)
        states = [hidden]
        assert layers is None or last_block is None, "rows are measured without a cache"
        for number, block in enumerate(self.layers):
            if last_block is not None and number == len(self.layers) - 1:
                hidden = last_block(block, hidden, context)
            else:
                hidden = block(hidden, context, None if layers is None else layers[number])
            states = [*states, hidden] if every else [hidden]
        if last_block is None:
            states[-1] = hidden if self.norm is None else self.norm(hidden)
        if order is not None:
            back = order.argsort(1)[..., None]
            states = [state.take_along_dim(back, 1) for state in states]
        return states

    def embedded(self, hidden: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """What enters the first block: token types added, normed, dropped out."""
        if self.embed_types is None and token_type_ids is not None:
            require(
                (token_type_ids == 0).all(),
                "token_type_ids: model.type_vocab_size is 0, so all must be 0; leave them out",
            )
        if self.embed_types is not None:
            if token_type_ids is None:
                token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
            hidden = hidden + self.embed_types(token_type_ids)
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        if self.embedding_dropout:
            hidden = F.dropout(hidden, self.embedding_dropout, self.training)
        return hidden

    def new_cache(self) -> LlmNormCache:
        """An empty cache for this model's mixers."""
        if not self.causal:
            raise InputError("use_cache: an encoder reads its tokens all at once and has no cache")
        # An adapter may stand around a block or a mixer.
        mixers = [next(m for m in block.modules() if isinstance(m, Mixer)) for block in self.layers]
        return LlmNormCache([mixer.new_cache() for mixer in mixers])

    def _check_cache(self, cache: object, documents: Documents | None) -> None:
        """Refuse what a pass with a cache cannot do."""
        if not self.causal:
            raise InputError("past_key_values: an encoder has no cache")
        check_cache_class(cache)
        if self.training and torch.is_grad_enabled():
            raise InputError("use_cache: gradients do not flow through the cache; train without it")
        if documents is not None:
            raise InputError("cu_seq_lens_q: packed rows have no cache; leave one of them out")


class LlmNormForCausalLM(WithLanguageHead, LlmNormGenerationMixin):
    """The language model: base model and head."""

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__(config)
        self.model = LlmNormModel(config)
        if not self.model.causal:
            raise InputError(
                "model.mixer: looks at later tokens and cannot serve a causal language model; "
                "LlmNormForMaskedLM can have it"
            )
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LlmNormCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_only: bool = False,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        **more: Unpack[CausalKeywords],
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (batch, length, vocabulary), and the loss where labels are given.

        Args:
            labels: Hugging Face's, (batch, length), shifted inside; -100 is not counted.
            num_items_in_batch: what the summed loss is divided by; the real labels if None.
            logits_to_keep: logits of the last n positions (0: all), or of the positions given.
            loss_only: make no logits, whose memory is batch x length x vocabulary; the loss is the
                same.
            more: `CausalKeywords` (pretrained_model.py), shift_labels, label_positions and
                soft_targets among them.

        The others are as in `LlmNormModel.forward`.
        """
        shift_labels = more.pop("shift_labels", None)
        positions = more.pop("label_positions", None)
        soft_targets = more.pop("soft_targets", None)
        loss, logits, loss_mask = None, None, None
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if loss_only and shift_labels is None:
            raise InputError("loss_only: there is no loss without labels; give them")
        if positions is not None and shift_labels is None:
            raise InputError("label_positions: are those of shift_labels; give them too")
        if soft_targets is not None and (shift_labels is None or positions is not None):
            raise InputError("soft_targets: want shift_labels beside them, and no label_positions")
        if shift_labels is not None:
            loss_mask = shift_labels != IGNORED
        feature = more.pop("feature", None)
        if feature is not None:
            more["last_block"] = self._measured(feature, self.model.norm, shift_labels, positions)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            loss_mask=loss_mask,
            token_type_ids=token_type_ids,
            **more,
        )
        hidden = output.last_hidden_state
        if feature is not None:
            return CausalLMOutputWithPast()
        if shift_labels is not None:
            loss = self._loss(hidden, shift_labels, num_items_in_batch, positions, soft_targets)
        if not loss_only:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden[:, keep])
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return result if self._asked(None, return_dict)[1] else result.to_tuple()
