"""The arms of a comparison: from the words of the command line to a checked `Protocol`.

    read_arms(base, shared, given)        the arms that the `--arm` options name
    read_protocol(arms, seeds=3, ...)     their settings, checked: can they be compared?
    check_same_arms(protocol, directory)  against what an earlier comparison ran in this directory
    save_arms(protocol, directory)        for the next call of `check_same_arms`

No run is made here, and only `save_arms` writes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmnorm.analysis.compare.plan import Arm, Horizons, Protocol, Run
from llmnorm.config.file import load
from llmnorm.config.saved import changeable, differences, portable, to_tree
from llmnorm.config.tree import RunConfig
from llmnorm.data.stages import course
from llmnorm.machine.files import write_whole
from llmnorm.machine.reading import read_settings
from llmnorm.part import InputError, Settings, nearest

LENGTHS = ("training.steps", "training.tokens", "training.epochs")

# Settings that a comparison writes itself, in every run; an arm must not change them.
SET_BY_COMPARISON = (
    "run_dir",
    "seed",
    "data.seed",
    "evaluation.every",
    "evaluation.patience",
    "evaluation.prompts",
    "evaluation.samples",
    "checkpoint",
    "logging.every",
)


class _Saved(Settings):
    """comparison.json."""

    arms: dict[str, dict[str, Any]]
    """Each arm's settings, by its name."""


def read_arms(base: Path, shared: Sequence[str], given: Sequence[Sequence[str]]) -> list[Arm]:
    """The arms of the command line.

    A single arm is compared with the configuration as it is, which becomes the arm `base`.

    Args:
        base: the configuration that arms start from.
        shared: overrides of all arms.
        given: for each `--arm` its words: a name, optionally a configuration file of its own, then
            overrides.

    Raises:
        InputError: a word is none of these.
    """
    arms = []
    for name, *words in given:
        if "=" in name or "/" in name or name.startswith("."):
            raise InputError(f"--arm {name}: give the arm a name first: --arm NAME key=value ...")
        path = base
        if words and "=" not in words[0]:
            path, words = Path(words[0]), words[1:]
        if wrong := [word for word in words if "=" not in word]:
            raise InputError(f"--arm {name}: '{wrong[0]}' is not an override; write key.sub=value")
        arms.append(Arm(name, path, (*shared, *words)))
    if len(arms) == 1:
        if arms[0].name == "base":
            raise InputError(
                "--arm base: this is the name of the arm without changes, which a single arm is "
                "compared with; choose another name"
            )
        arms.insert(0, Arm("base", base, tuple(shared)))
    if not arms:
        raise InputError("give at least one --arm NAME key=value ...")
    return arms


def read_protocol(
    arms: Sequence[Arm],
    *,
    baselines: Sequence[str] = (),
    untuned: Sequence[str] = (),
    seeds: int = 3,
    lr_points: int = 5,
    horizons: Horizons = "baseline",
) -> Protocol:
    """Load every arm and check that their losses can be compared; nothing is run or written.

    Args:
        arms: at least two.
        baselines: names of the arms that the others are compared with; left out, the first arm.
        untuned: names of the arms that keep the learning rate they write.
        seeds, lr_points, horizons: as in `Protocol`.

    Raises:
        InputError: an arm's setting is not valid, or what it changes makes losses incomparable; one
            line that names the arm and the key.
    """
    if lr_points % 2 == 0:
        raise InputError(
            f"--lr-points {lr_points}: give an odd number, so that the grid has a centre"
        )
    names = [arm.name for arm in arms]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--arm {repeated[0]}: two arms have this name; rename one of them")
    for option, chosen in (("--baseline", baselines), ("--untuned", untuned)):
        for name in chosen:
            if name not in names:
                raise InputError(f"{option} {name}: there is no such arm; {nearest(name, names)}")
    all_baselines = tuple(dict.fromkeys(baselines)) or (names[0],)
    configs = {arm.name: _load(arm) for arm in arms}
    for name, config in configs.items():
        if not config.objective.packs:
            raise InputError(
                f"--arm {name}: objective: '{config.objective.name}' does not train on "
                "prepared data, whose losses a comparison compares; choose causal_lm, masked_lm or "
                "sft"
            )
        if automatic := config.automatic():
            raise InputError(
                f"--arm {name}: {automatic[0]} is auto; give a number, around which the comparison "
                "tunes learning rates"
            )
    trees = {name: _comparable_settings(config) for name, config in configs.items()}
    for number, name in enumerate(names):
        for other in names[:number]:
            if trees[name] == trees[other]:
                raise InputError(f"--arm {name}: resolves to the same settings as arm {other}")
    reference = all_baselines[0]
    for name in names:
        _check_comparable(name, trees[name], reference, trees[reference])
    row_tokens = {name: _row_tokens(name, configs[name]) for name in names}
    steps = {name: _steps(name, configs[name]) for name in names}
    protocol = Protocol(
        {arm.name: arm for arm in arms},
        configs,
        steps,
        row_tokens,
        all_baselines,
        tuple(untuned),
        seeds,
        lr_points,
        horizons,
    )
    _check_lengths(protocol)
    for name in names:
        if protocol.tuned(name):
            _check_rate(name, configs[name])
    for run in protocol.needed({}, expected=True):  # a warm-up may not fit the shortest horizon
        _load(protocol.arms[run.arm], protocol.train_arguments(run, Path("run"))[1:])
    return protocol


def check_same_arms(protocol: Protocol, directory: Path) -> None:
    """Check that the arms have the settings with which this directory's runs were made.

    Seeds, learning rates, horizons and arms may be added to a comparison.

    Raises:
        InputError: an arm had other settings there.
    """
    file = directory / "comparison.json"
    if not file.is_file():
        return
    saved = read_settings(file, _Saved).arms
    for name, config in protocol.configs.items():
        if name not in saved:
            continue
        changed = differences(_with_new_defaults(saved[name]), _comparable_settings(config))
        listed = ", ".join(
            f"{key} ({old} there, {new} here)"
            for key, (old, new) in changed.items()
            if not changeable(key) or key in (*LENGTHS, "data.stages")
        )
        if listed:
            raise InputError(
                f"--out {directory}: the runs of arm {name} there have other settings: {listed}; "
                "give the arm another name, or another --out"
            )


def save_arms(protocol: Protocol, directory: Path) -> None:
    """Write the arms' settings to `directory/comparison.json`, for `check_same_arms`."""
    file = directory / "comparison.json"
    arms = dict(read_settings(file, _Saved).arms) if file.is_file() else {}
    arms |= {name: _comparable_settings(config) for name, config in protocol.configs.items()}
    write_whole(file, json.dumps({"arms": arms}, indent=1) + "\n")


def _load(arm: Arm, overrides: Sequence[str] | None = None) -> RunConfig:
    try:
        return load(arm.path, arm.overrides if overrides is None else overrides).config
    except InputError as error:
        raise InputError(
            "\n".join(f"--arm {arm.name}: {line}" for line in str(error).splitlines())
        ) from None


def _comparable_settings(config: RunConfig) -> dict[str, Any]:
    """An arm's settings without its directories."""
    tree = to_tree(portable(config))
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "dir"}
    return tree


def _with_new_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A saved arm's settings, and the defaults of keys that were added since it was saved."""
    try:
        return _comparable_settings(RunConfig.model_validate(tree))
    except ValidationError:  # a key that no longer exists will be listed as a difference
        return tree


def _check_comparable(
    name: str, tree: Mapping[str, Any], reference: str, other: Mapping[str, Any]
) -> None:
    """Refuse what a comparison sets itself, and what changes the tokens that are predicted.

    Args:
        name, tree: an arm and its settings.
        reference, other: the first baseline and its settings.
    """
    for key, (reference_value, value) in differences(other, tree).items():
        if any(key == k or key.startswith(f"{k}.") for k in SET_BY_COMPARISON):
            why = "a comparison sets it for all arms alike"
        elif key in ("objective.name", "objective.evaluation_mask_share"):
            why = "losses of different objectives cannot be compared"
        elif key.startswith("tokenizer.") or (
            key.startswith("data.") and not key.endswith(".weight") and "data.weights" not in key
        ):
            why = "losses on different tokens cannot be compared"
        else:
            continue
        raise InputError(
            f"--arm {name}: {key} is {value}, but {reference_value} in arm {reference}: {why}; "
            "set it before the first --arm"
        )


def _check_rate(name: str, config: RunConfig) -> None:
    rate = getattr(config.optimizer, "lr", None)
    if not isinstance(rate, float | int) or rate <= 0:
        raise InputError(
            f"--arm {name}: optimizer.lr {rate} cannot be the centre of a grid of learning rates; "
            f"give a number above 0, --lr-points 1 or --untuned {name}"
        )


def _row_tokens(name: str, config: RunConfig) -> float:
    """The tokens of an average row of an arm."""
    if config.objective.full_rows:
        return config.data.context_length
    prepared = _prepared(config)
    if prepared is None:
        raise InputError(
            f"--arm {name}: objective: how many tokens the examples of '{config.objective.name}' "
            "have is known once the data is prepared; run `llmnorm data` once"
        )
    in_stages = prepared.in_stages(course(config, prepared).stages)
    return float(in_stages.row_tokens(config.total_steps(prepared.rows) * config.pool))


def _steps(name: str, config: RunConfig) -> int:
    rows = 0
    if config.training.epochs is not None:
        prepared = _prepared(config)
        if prepared is None:
            raise InputError(
                f"--arm {name}: training.epochs: the length of an epoch is known once the data is "
                "prepared; run `llmnorm data` once, or give training.tokens"
            )
        rows = prepared.rows
    return config.total_steps(rows)


def _prepared(config: RunConfig) -> Any:
    """The prepared data of a run; None where there are none yet."""
    preparation = config.objective.preparation(config)
    return None if preparation is None else preparation.find()


def _check_lengths(protocol: Protocol) -> None:
    reference = protocol.baselines[0]
    expected = protocol.tokens_of(Run(reference, None, 0))
    baseline = protocol.configs[reference]
    baseline_step = baseline.training.rows * protocol.row_tokens[reference]
    for name, config in protocol.configs.items():
        tokens = protocol.tokens_of(Run(name, None, 0))
        step = config.training.rows * protocol.row_tokens[name]
        # Less than a step apart: lengths in tokens are rounded to whole steps.
        if abs(tokens - expected) >= max(step, baseline_step) and not math.isclose(
            tokens, expected
        ):
            length = "tokens" if config.objective.full_rows else "epochs"
            raise InputError(
                f"--arm {name}: trains {tokens} tokens, arm {reference} {expected}; "
                f"give all arms the same training.{length}"
            )
