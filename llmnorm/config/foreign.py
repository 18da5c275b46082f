"""What a run of a class of transformers cannot have, told before torch is loaded.

    foreign_refusal(config)     one line, or None

Such a model is trained as its class has it: rows, loss, optimizer, sharding and adapters are
llmnorm's, its parts are not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig

# What config.yaml holds of such a model; llmnorm's own settings have no meaning for it.
KEPT = (
    "pretrained",
    "classes",
    "trust_remote_code",
    "dropout",
    "router_loss",
    "quantize",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
LONGEST = 2**31  # of a configuration that does not say


def brought(values: dict[str, Any]) -> dict[str, Any]:
    """The model settings that a stock config.json brings, as far as it has them.

    A file leaves out what has its default; the class itself is asked when it is made.
    """
    text = values.get("text_config") or values
    found: dict[str, Any] = {}
    for key, kind in (("vocab_size", int), ("tie_word_embeddings", bool)):
        if type(value := text.get(key, values.get(key))) is kind:
            found[key] = value
    lengths = [text[key] for key in _LENGTHS if type(text.get(key)) is int]
    return found | {"max_position_embeddings": lengths[0] if lengths else LONGEST}


def foreign_refusal(config: "RunConfig") -> str | None:
    """Why a setting cannot be had with the run's class of model; None if all can."""
    model = config.model
    if not model.foreign:
        if model.dropout == "config":
            return (
                "model.dropout: 'config' is for a class of transformers, and the model is "
                "llmnorm's own; give a number"
            )
        if model.trust_remote_code:
            return (
                "model.trust_remote_code: is for a class of transformers, and the model is "
                "llmnorm's own; leave it out"
            )
        if model.router_loss != "auto":
            return (
                f"model.router_loss: {model.router_loss}; llmnorm's own model has no experts to "
                "balance; leave it out"
            )
        return None
    if model.pretrained is None:
        return "model.classes: 'transformers' is the class of a directory; add model.pretrained"
    if model.dropout not in (0, "config"):
        return (
            f"model.dropout: {model.dropout}; a class of transformers has its own places for it: "
            "give 0, or config for the values of its config.json"
        )
    if not getattr(config.objective, "foreign", False):
        name = getattr(config.objective, "name", "this one")
        return (
            f"objective '{name}' trains llmnorm's own classes; choose causal_lm or sft for a "
            "class of transformers"
        )
    if getattr(config.selection, "name", "") != "none":
        return "selection: measures rows in llmnorm's own classes; leave it out"
    if automatic := config.automatic():
        return (
            f"{automatic[0]}: auto: the Step Law is about training all weights from the start; "
            "give a number"
        )
    if config.parallel.compile:
        return "parallel.compile: is for llmnorm's own blocks; leave it out"
    return None
