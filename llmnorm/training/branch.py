"""A run that branches from the checkpoint of another (`training.branch_from`): what goes on there.

    goes on        weights, optimizer state, steps, tokens
    may change     data and its mixture (data/stages.py), `data.context_length` with
                   `model.rope_parameters`, schedule, batch, rates, how the model is laid out
    may not        the tokenizer, the model's shape and norms, the optimizer's rule

A branch in which nothing changed is the parent that was not interrupted, to the bit.
"""

from collections.abc import Mapping
from typing import Any

from llmnorm.config.saved import differences, to_tree
from llmnorm.config.tree import RunConfig
from llmnorm.data.run_data import RunData
from llmnorm.data.stages import Course, Start, already_read
from llmnorm.data.tokenizer import TextEncoder
from llmnorm.machine.reading import read_object
from llmnorm.part import InputError

# What a branch may change of its model: what is no weight and belongs to none, where weights came
# from, and what they were drawn by. Settings of a mixer that change its weights are found when the
# checkpoint is read.
FREE = (
    *("dropout", "embedding_dropout", "export_as", "max_position_embeddings", "rope_parameters"),
    *("pretrained", "classes", "trust_remote_code", "quantize"),
    *("initializer_range", "initialization", "embedding_std", "mixer"),
)


def check_branch(config: RunConfig, data: RunData, start: Start) -> None:
    """Refuse a branch that would make something else of its parent's weights and state.

    Raises:
        InputError: the model, the optimizer's rule or the tokenizer is another than the parent's.
    """
    there, here = start.meta["config"], to_tree(config)
    for key, (old, new) in sorted(_changes(there["model"], here["model"]).items(), key=_by_name):
        raise InputError(
            f"training.branch_from: {start.path} has model.{key} {old}, and this run {new}; a "
            f"branch keeps its parent's model: give model.{key}={old}, or leave "
            "training.branch_from out and train from the first step"
        )
    old, new = there["optimizer"]["name"], here["optimizer"]["name"]
    if old != new:
        raise InputError(
            f"training.branch_from: {start.path} was trained by optimizer '{old}', whose state is "
            f"none of '{new}'; give optimizer={old}, or begin with these weights and a new "
            f"optimizer: model.pretrained={start.path} in the place of training.branch_from"
        )
    old, new = _moved(there["optimizer"]), _moved(here["optimizer"])
    if old != new:
        raise InputError(
            f"training.branch_from: {start.path} was trained with {old} by optimizer.groups, and "
            f"this run has {new}; a branch keeps the rules that its parent's state is of"
        )
    if start.meta["data"] != data.identity:
        _check_tokenizer(data, start)


def _moved(optimizer: Mapping[str, Any]) -> str:
    """Which parameters have another rule than others of their kind, in words."""
    given = [(group["match"], group.get("rule")) for group in optimizer.get("groups", ())]
    return ", ".join(f"{match}: {rule}" for match, rule in given if rule) or "no other rules"


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of the model that differ and may not, with both values.

    A key that only one of the two has belongs to another version of llmnorm, or to a part whose
    name differs too.
    """
    found = {
        key: values
        for key, values in differences(there, here).items()
        if key.split(".")[0] not in FREE and None not in values and "auto" not in values
    }
    old, new = _names(there.get("mixer")), _names(here.get("mixer"))
    return found if old == new else {**found, "mixer": (old, new)}


def _names(mixer: Any) -> Any:
    """The name of a mixer, or those of a list."""
    if isinstance(mixer, list):
        return [_names(part) for part in mixer]
    return mixer.get("name") if isinstance(mixer, Mapping) else mixer


def _by_name(change: tuple[str, Any]) -> bool:
    """Puts the name of a part before what follows from it."""
    return not change[0].endswith(("name", "mixer"))


def _check_tokenizer(data: RunData, start: Start) -> None:
    """Compare the tokenizer of other data with that of the parent.

    Raises:
        InputError: they cut a text into other tokens, or the parent's is gone.
    """
    theirs, key = start.path.parent.parent / "tokenizer", "training.branch_from"
    if not (theirs / "tokenizer.json").is_file():
        raise InputError(
            f"{key}: {theirs}/tokenizer.json is not there, and only with it can a branch onto "
            "other data be told to have its parent's tokenizer; bring it back"
        )
    old = TextEncoder(theirs, key).spellings
    new = TextEncoder(data.tokenizer_directory).spellings
    if differing := len(dict(old.items() ^ new.items())):
        what = f"{differing} of its tokens are not the parent's"
    else:
        files = [directory / "tokenizer.json" for directory in (theirs, data.tokenizer_directory)]
        one, other = (read_object(file) for file in files)
        keys = "model", "normalizer", "pre_tokenizer"
        if all(one.get(name) == other.get(name) for name in keys):
            return
        what = "it cuts a text otherwise than the parent's"
    raise InputError(
        f"tokenizer: of this branch is another than that of {start.path} ({what}); keep its "
        f"parent's: tokenizer.path={theirs}"
    )


def where_a_branch_reads(course: Course, start: Start, data: RunData) -> str:
    """What of its rows is not its parent's: the end of a sentence; empty where they go on."""
    if course.anew is not None:
        text = f"; weights, optimizer state, steps and tokens go on, the rows {course.anew} from 0"
        if start.meta["data"] != data.identity:
            return text
        read = ", ".join(f"{name} {n:.2f}" for name, n in already_read(start.meta).items())
        return f"{text}; epochs that were read of the same text: {read}"
    if any(stage.row == course.pace.row > 0 for stage in course.stages):
        return (
            f"; another mixture begins at row {course.pace.row}, and each source goes on with its "
            "next row"
        )
    return ""


def ancestors(course: Course, start: Start | None) -> list[dict[str, Any]]:
    """The branches that led to a run, the oldest first, as its checkpoints keep them."""
    if start is None:
        return []
    before = list(start.meta.get("branches", ()))
    if start.own:
        return before
    branch = {
        "path": str(start.path),
        "step": start.meta["step"],
        "data": start.meta["data"],
        "row": course.pace.row,
        "anew": course.anew is not None,
    }
    return [*before, branch]
