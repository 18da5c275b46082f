"""How a run's configuration is saved, how two of them differ, and what a run may change.

The saved tree holds all settings, so that reading it back gives the same configuration. Nothing
here imports torch, so that a mistake is answered at once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from llmnorm.config.foreign import KEPT
from llmnorm.config.tree import RunConfig, RunModelSettings
from llmnorm.part import Settings

# What `train RUN_DIR key=value` may change; any other key makes another run.
CHANGEABLE = (
    "training.steps",
    "training.tokens",
    "training.epochs",
    "training.micro_batch",
    "training.device",
    "data.stages",  # what was read already stays: data/stages.py
    "evaluation",
    "checkpoint",
    "parallel",
    "logging",
    "generation",
    "serving",
    "run_dir",
)


def portable(config: RunConfig) -> RunConfig:
    """The settings as a run saves them: without the places that are of this machine."""
    own: dict[str, Any] = {
        "run_dir": None,
        "checkpoint": config.checkpoint.model_copy(update={"local": None}),
        "data": config.data.model_copy(update={"local": None}),
    }
    return config.model_copy(update=own)


def to_tree(config: Settings) -> dict[str, Any]:
    """The resolved settings as plain JSON values.

    Three kinds of keys are left out: one that is derived from other fields and was not written
    (`head_dim`), so that it follows when those are overridden later; one that has no value (most of
    `rope_parameters`); and the settings of our own classes where the model is of another.
    """
    tree = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        derived = field.default_factory is not None and name not in config.model_fields_set
        if derived or (value is None and field.default is None):
            del tree[name if name in tree else str(field.alias)]
        elif isinstance(value, Settings):
            tree[name] = _named(tree[name], value)
        elif isinstance(value, list):
            pairs = zip(tree[name], value, strict=True)
            tree[name] = [_named(t, v) if isinstance(v, Settings) else v for t, v in pairs]
    if isinstance(config, RunModelSettings) and config.foreign:
        tree = {name: value for name, value in tree.items() if name in KEPT}
    return tree


def _named(dumped: dict[str, Any], part: Settings) -> dict[str, Any]:
    """A part's tree under the name by which it is found: of one from outside, its import path."""
    name = {"name": dumped["name"]} if "name" in dumped else {}
    return name | to_tree(part) | name  # name stands first


def to_yaml(config: RunConfig) -> str:
    """The resolved settings as YAML; reading it back gives the same settings."""
    tree = to_tree(config)
    return yaml.safe_dump(tree, sort_keys=False, width=100, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key path -> (old value, new value) for every leaf that differs."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = dict.fromkeys([*before, *after])
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def changeable(key: str, config: RunConfig | None = None) -> bool:
    """Whether `train RUN_DIR key=value` may change this key of an existing run.

    Args:
        config: the run's; one that freezes weights may be told where its base was moved to, and one
            that learns from a teacher where that was. It compares it with the one that it had.
    """
    if key == "objective.teacher":
        return True
    if key == "model.pretrained" and config is not None and config.freezes:
        return True
    return any(key == c or key.startswith(f"{c}.") for c in CHANGEABLE)
