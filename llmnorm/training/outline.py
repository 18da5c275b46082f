"""A run's model on the meta device, to look at its parameters before anything is prepared.

What would surprise: a vocabulary of `auto` is taken from the tokenizer's directory; where the run
trains its tokenizer it is the largest that this can have. It only changes the embedding and the
head.
"""

import torch

from llmnorm.config.pretrained import describe as describe_weights
from llmnorm.config.tree import RunConfig
from llmnorm.data.templates import missing_tokens
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.models.adapters import rate_factors
from llmnorm.models.building import class_of
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.models.modeling import LlmNormForCausalLM
from llmnorm.optim.build import describe
from llmnorm.optim.groups import split
from llmnorm.training.foreign import outline_of_foreign
from llmnorm.training.model import choose_trained


def outline(config: RunConfig) -> LlmNormForCausalLM:
    """The run's model on the meta device, of our own class: shapes without numbers."""
    assert not config.model.foreign, "outline_of_foreign"
    rows, path = config.model.vocab_size, config.tokenizer.directory
    tokens, new = config.tokenizer.vocab_size, range(0)
    packs = config.objective.packs  # other objectives do not use the chat template
    added = missing_tokens(path, config.tokenizer) if path is not None and packs else []
    if path is not None and (rows == "auto" or added):
        first = TextEncoder(path).vocab_size
        new = range(first, first + len(added))
        tokens = new.stop
    rows = tokens if rows == "auto" else max(rows, new.stop)
    classes = [config.objective.architecture]
    with torch.device("meta"):
        settings = LlmNormConfig.from_settings(config.model, vocab_size=rows, architectures=classes)
        model: LlmNormForCausalLM = class_of(settings)(settings)
    if config.freezes:
        assert config.model.pretrained is not None
        loaded = describe_weights(config.model.pretrained, "model.pretrained", ()).architectures
        same = (loaded or ["LlmNormForCausalLM"])[0] == classes[0]
        model.tie_weights()  # making it on the meta device has parted them
        new_head = not (config.objective.keeps_head and same)
        choose_trained(config, model, new_head=new_head, new_tokens=new)
    return model


def parameters_outside_the_embedding(config: RunConfig) -> int:
    """How many parameters the model has outside of embedding and head: what scaling laws count."""
    model = outline(config)
    outside = {
        id(p)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None  # a classifier has no head of the embedding's shape
        for p in module.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


def groups_table(config: RunConfig) -> str:
    """A table of the parameters and their optimizer rules: `train CONFIG --print-groups`."""
    model = outline_of_foreign(config) if config.model.foreign else outline(config)
    return describe(config.optimizer, split(model), rate_factors(model, config.adapter))
