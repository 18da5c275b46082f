"""What transformers, and the tools around it, ask of every model class of ours.

    class and configuration     names, hooks, initialisation, recomputation, attention kernels
    keywords                    of a forward pass, beyond those in its signature

Surprises:
- Trainer takes every named argument of `forward` with "label" in its name for a label that each
  batch must have. So `shift_labels` is in `Keywords`, not in a signature.
- A mixer chooses its kernel by itself, so `attn_implementation` can ask for nothing else.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.initialization import initialize_module
from llmnorm.models.new_rows import tie_new_rows
from llmnorm.models.row_features import Ending
from llmnorm.nn import block as blocks
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import IGNORED, cross_entropy
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.soft_targets import SoftTargets
from llmnorm.part import InputError, nearest

LastBlock = Callable[[nn.Module, Tensor, Context], Tensor]
Measure = Callable[[nn.Module, Tensor, Context, Ending], Tensor]


class Keywords(TypedDict, total=False):
    """Keywords of a forward pass that only some callers have; what says nothing is None.

    The first four are transformers' FlashAttentionKwargs: where the documents of packed rows are,
    from a caller who knows it. Nothing is then read back from a GPU (context.py).
    """

    cu_seq_lens_q: Tensor | None
    """(documents + 1,) int32, where the documents start."""
    cu_seq_lens_k: Tensor | None
    """The same: queries and keys are the same tokens."""
    max_length_q: int | None
    """Tokens of the longest document, or more."""
    max_length_k: int | None
    """The same."""
    seq_idx: Tensor | None
    """(batch, length), the number of each token's document, beside position_ids or cu_seq_lens."""
    cache_position: Tensor | None
    """(length,), the columns of the new tokens: behind those in the cache, and nowhere else."""
    counts: Sequence[int] | None
    """How many of each row's new tokens are real, the first ones, in a pass with a cache: in place
    of an attention_mask, and without its reordering or a question to a GPU (context.py)."""
    is_causal: bool | None
    """Whether no token sees later ones: what the mixers do, and nothing else."""
    last_block: LastBlock | None
    """Called with the last block, its input and its context, in the place of the block and of the
    final norm behind it."""


class CausalKeywords(Keywords, total=False):
    """Those, and what a causal language model has besides."""

    shift_labels: Tensor | None
    """(batch, length), labels already shifted: the label of position i stands at i. They win over
    `labels`: context parallelism passes both, and a process's `labels` are a part of the row."""
    label_positions: Tensor | None
    """(labels,) int64, the positions of all labels of `shift_labels` in the rows laid end to end,
    from a caller who knows them on the host. The loss's head then runs there alone, and nothing is
    read back from a GPU; a label at another position is not counted."""
    soft_targets: SoftTargets | None
    """A frozen model's distributions of all tokens, in the place of labels: `shift_labels` then say
    which tokens count. The loss is the cross-entropy with them; not beside label_positions."""
    feature: Measure | None
    """Measures the rows (row_features.py) in the last block's place; neither loss nor logits are
    made then."""


def check_keywords(given: Any) -> None:
    """Refuse keywords that no class knows.

    Args:
        given: what is left of a forward pass's keywords; None says nothing.

    Raises:
        InputError: names the first unknown one.
    """
    known = Keywords.__annotations__
    for name, value in given.items():
        if name not in known and value is not None:
            raise InputError(f"{name}: the model has no such argument; {nearest(name, [*known])}")


class LlmNormPreTrainedModel(PreTrainedModel):
    """What the base model and the models with a head share with Hugging Face."""

    config_class = LlmNormConfig
    base_model_prefix = "model"
    _no_split_modules = [name for name in vars(blocks) if name.endswith("Block")]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch

    def units(self) -> dict[str, nn.Module]:
        """The blocks by name: what is sharded and recomputed."""
        blocks: nn.ModuleList = self.base_model.layers
        inside = f"{self.base_model_prefix}." if self.base_model is not self else ""
        return {f"{inside}layers.{number}": block for number, block in enumerate(blocks)}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: the installed package is what a saved directory names (configuration.py)."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Hugging Face's hook (plain construction, keys missing from a checkpoint)."""
        own = list(module.parameters(recurse=False))
        if not own or any(p.is_meta for p in own):
            return
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if len(loaded) < len(own):
            initialize_module(module, self.config, int(torch.randint(2**62, ())))
        for parameter, value in loaded:
            parameter.copy_(value)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Hugging Face's hook, when a model is made or told another implementation.

        Raises:
            InputError: one that no layer of ours would follow.
        """
        if attn_implementation not in (None, "sdpa", "eager"):
            raise InputError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported: a '
                "mixer chooses its kernel by itself (flash-attn for packed rows, where it is "
                "installed), and none knows paged caches; leave the key out"
            )
        return attn_implementation or ("eager" if self.config.output_attentions else "sdpa")

    def _asked(
        self, output_hidden_states: bool | None, return_dict: bool | None
    ) -> tuple[bool, bool]:
        """The two options, the configuration's where the caller says nothing."""
        config = self.config
        hidden = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        return bool(hidden), bool(config.return_dict if return_dict is None else return_dict)


class WithLanguageHead(LlmNormPreTrainedModel):
    """What models share that end in logits over the vocabulary, `lm_head`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    lm_head: nn.Module

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As Hugging Face's; rows of new tokens are tied where the weights are."""
        super().tie_weights(*args, **kwargs)
        tie_new_rows(self)

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        items: Tensor | float | None,
        positions: Tensor | None = None,
        soft_targets: SoftTargets | None = None,
    ) -> Tensor:
        """The loss of hidden (..., hidden) against labels (...), at flat `positions` if given."""
        if positions is not None:
            hidden = hidden.flatten(0, -2).index_select(0, positions)
            labels = labels.flatten().index_select(0, positions)
        if isinstance(self.lm_head, LanguageHead):
            return self.lm_head(hidden, labels, items, soft_targets)
        if soft_targets is not None:
            raise InputError(
                "soft_targets: the head has an adapter around it, whose loss knows labels only"
            )
        # An adapter around the head: its logits are more than hidden @ weight.
        return cross_entropy(self.lm_head(hidden), labels, items)

    def _measured(
        self,
        feature: Measure,
        norm: nn.Module | None,
        labels: Tensor | None,
        positions: Tensor | None,
    ) -> LastBlock:
        """A feature of rows with these labels (batch, length), to be called as the last block."""
        if labels is None:
            raise InputError("feature: rows are measured by their labels; give them")
        flat = labels.flatten()
        losses = partial(self._token_losses, labels=flat, positions=positions)
        end = Ending(norm or nn.Identity(), losses, flat)
        return lambda block, hidden, context: feature(block, hidden, context, end)

    def _token_losses(self, hidden: Tensor, labels: Tensor, positions: Tensor | None) -> Any:
        """The loss of every token (tokens,) of hidden (tokens, hidden), 0 without a label.

        Where gradients are enabled also the gradient of each by its hidden state, (tokens, hidden).
        The head runs at `positions` alone, if they are given.
        """
        if positions is not None:
            at = hidden.index_select(0, positions), labels.index_select(0, positions)
            found = self._token_losses(*at, None)
            each, slope = found if torch.is_grad_enabled() else (found, None)
            losses = each.new_zeros(len(hidden)).index_copy(0, positions, each)
            if slope is None:
                return losses
            return losses, torch.zeros_like(hidden).index_copy(0, positions, slope)
        if isinstance(self.lm_head, LanguageHead):
            return self.lm_head(hidden, labels, each=True)
        leaf = hidden.detach().requires_grad_(torch.is_grad_enabled())
        logits = self.lm_head(leaf).to(hidden.dtype)
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        if not torch.is_grad_enabled():
            return losses
        (slope,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), slope

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Hugging Face's hook (a resized vocabulary): a plain linear head becomes ours again."""
        if type(new_embeddings) is nn.Linear:
            shape = new_embeddings.in_features, new_embeddings.out_features
            with torch.device("meta"):
                head = LanguageHead(*shape, bias=new_embeddings.bias is not None)
            head.weight, head.bias = new_embeddings.weight, new_embeddings.bias
            head.training = new_embeddings.training
            # Their mark, by which `post_init` leaves it as it is.
            marked = getattr(new_embeddings, "_is_hf_initialized", False)
            head._is_hf_initialized = marked  # type: ignore[assignment]
            new_embeddings = head
        self.lm_head = new_embeddings
