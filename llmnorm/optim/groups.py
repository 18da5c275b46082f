"""Which parameter gets which rule. No other file decides it.

Hidden matrices (weights of linear layers inside the blocks, and the experts of a mixture) go to the
matrix rule. Embeddings, all heads (an encoder's too), routers, norms, biases, scalars, convolutions
and any other parameter are auxiliary: they go to AdamW, with a learning rate of their own. A tied
head counts as the embedding. Frozen parameters are in no group.

    matrices                 found by
    linear layers            nn.Linear; Conv1D of transformers, which stores the transpose
    a stack of experts       three axes, the first as long as the `num_experts` of its module; gate
                             and up are two matrices where the module says `is_concatenated`
    fused projections        `model.fused` (models/fused.py), or `optimizer.split_sizes`

What would surprise:
- Two axes do not make a parameter a matrix. A gain of (heads, head_dim) or a table is not a linear
  map, and orthogonalising it would be wrong. So the kind of module decides, not the shape. Three
  axes do not make a stack: a depthwise convolution has them too. `optimizer.groups` may move a
  parameter of two axes to the rule all the same.
- A linear layer with an output an expert, beside a stack, is a router: auxiliary.
- What holds several projections whose rows cannot be told apart is one matrix, and
  `--print-groups` says so.
"""

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmnorm.optim.fragments import master, whole_shape
from llmnorm.optim.matrix import AS_ITS_GROUP, Layout, Layouts, Matrix, Rates, matrix_shape
from llmnorm.part import InputError, nearest

if TYPE_CHECKING:
    from llmnorm.optim.rates import GroupSettings
    from llmnorm.optim.settings import OptimizerSettings
GATE_AND_UP = "gate_up_proj"  # of every module of experts in transformers that has a gate
ALTERNATING = "rows of gate and up alternate"
UNCLEAR = "rows of its projections cannot be told apart"


class Groups(NamedTuple):
    """Trainable parameters by name, each in exactly one group.

    Attributes:
        layouts: of parameters of `matrices` that are not one matrix as they are stored.
    """

    matrices: dict[str, nn.Parameter]
    auxiliary: dict[str, nn.Parameter]
    layouts: Layouts = {}


class Assigned(NamedTuple):
    """Parameters as `optimizer.groups` has them.

    Attributes:
        groups: which are updated by the matrix rule, and which by AdamW.
        rates: name -> what differs from the parameter's group; other names are left out.
    """

    groups: Groups
    rates: dict[str, Rates]


def split(model: nn.Module) -> Groups:
    """Sort the trainable parameters of a Hugging Face model (or of any module) into groups."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    base = getattr(model, "base_model", model)  # Hugging Face's name for the model without a head
    if isinstance(base, nn.Module):
        outside |= {id(p) for p in model.parameters()} - {id(p) for p in base.parameters()}
    layouts = {id(p): layout for p, layout in _found(model) if id(p) not in outside}
    groups, known = Groups({}, {}), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups.matrices if id(parameter) in layouts else groups.auxiliary
            group[name] = master(parameter)
            if layouts.get(id(parameter), Layout()) != Layout():
                known[name] = layouts[id(parameter)]
    groups = groups._replace(layouts=known)
    check(groups, model)
    return groups


def _found(model: nn.Module) -> Iterator[tuple[nn.Parameter, Layout]]:
    """The parameters that are matrices, heads among them, each with its layout."""
    modules, fused = dict(model.named_modules()), getattr(model, "fused", {})
    routers = _routers(modules)
    for name, module in modules.items():
        if isinstance(module, nn.Linear | Conv1D):
            if name not in routers:
                pieces = fused.get(name, ())
                note = UNCLEAR if name in fused and not pieces else ""
                transposed, weight = isinstance(module, Conv1D), module.get_parameter("weight")
                yield weight, Layout(transposed, tuple(pieces), note)
            continue
        for own, parameter in _stacks(module).items():
            transposed = bool(getattr(module, "is_transposed", False))
            if own != GATE_AND_UP:
                yield parameter, Layout(transposed)
            elif getattr(module, "is_concatenated", False):
                half = matrix_shape(master(parameter), transposed)[0] // 2
                yield parameter, Layout(transposed, (half, half))
            else:
                said = hasattr(module, "is_concatenated")
                yield parameter, Layout(transposed, (), ALTERNATING if said else UNCLEAR)


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own stacks of experts by name, each (experts, *, *)."""
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int):
        return {}
    shapes = {name: whole_shape(master(p)) for name, p in module.named_parameters(recurse=False)}
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if len(shapes[name]) == 3 and shapes[name][0] == experts
    }


def _routers(modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of linear layers that choose experts.

    They have an output an expert, and stand beside a stack, or in a module that has `num_experts`.
    """
    beside = [
        (f"{name.rpartition('.')[0]}.".lstrip("."), module.num_experts)
        for name, module in modules.items()
        if _stacks(module)
    ]
    found = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            inside = modules[name.rpartition(".")[0]] if name else module
            near = {experts for block, experts in beside if name.startswith(block)}
            if module.out_features in near | {getattr(inside, "num_experts", None)}:
                found.add(name)
    return found


def check(groups: Groups, model: nn.Module) -> None:
    """Refuse groups unless every trainable parameter, and no other, is in exactly one of them.

    Raises:
        ValueError: a parameter is in no group or in several, or does not belong there; names it.
    """
    claims = Counter(id(p) for members in groups[:2] for p in members.values())
    for name, parameter in model.named_parameters():
        count = claims.pop(id(master(parameter)), 0)
        if count != int(parameter.requires_grad):
            trained = "trainable" if parameter.requires_grad else "frozen"
            raise ValueError(f"{name}: {trained}, but in {count} optimizer groups")
    if claims:
        raise ValueError("an optimizer group has a parameter that the model does not have")


def assign(groups: Groups, settings: "OptimizerSettings") -> Assigned:
    """Give parameters what `optimizer.groups` says of them.

    Of several patterns that match a name the last counts, alone.

    Raises:
        InputError: a pattern matches nothing, the rule cannot update a parameter, or a hidden
            matrix is to decay under NaP.
    """
    names = [*groups.matrices, *groups.auxiliary]
    of_name: dict[str, tuple[str, GroupSettings]] = {}
    for number, group in enumerate(settings.groups):
        matched = [name for name in names if _matches(name, group.match)]
        if not matched:
            raise InputError(
                f"optimizer.groups.{number}.match: '{group.match}' matches no parameter that is "
                f"trained; {_near(group.match, names)}"
            )
        of_name |= dict.fromkeys(matched, (f"optimizer.groups.{number}", group))

    hidden, auxiliary = dict(groups.matrices), dict(groups.auxiliary)
    rates = {}
    for name in [name for name in names if name in of_name]:
        key, group = of_name[name]
        if group.rule == "adamw" and name in hidden:
            auxiliary[name] = hidden.pop(name)
        elif group.rule not in (None, "adamw") and name in auxiliary:
            shape = tuple(whole_shape(auxiliary[name]))
            if len(shape) != 2:
                raise InputError(
                    f"{key}.rule: {group.rule} updates matrices of two axes, and {name} has the "
                    f"shape {shape}; choose a pattern that does not match it"
                )
            hidden[name] = auxiliary.pop(name)
        if settings.nap and group.weight_decay and name in groups.matrices:
            raise InputError(
                f"{key}.weight_decay: optimizer.nap takes the place of decay on hidden matrices "
                f"such as {name}; leave it out"
            )
        own = Rates(1.0 if group.lr is None else group.lr, group.weight_decay)
        if own != AS_ITS_GROUP:
            rates[name] = own
    layouts = {name: layout for name, layout in groups.layouts.items() if name in hidden}
    return Assigned(Groups(hidden, auxiliary, layouts), rates)


def _matches(name: str, pattern: str) -> bool:
    """Whether the name of a parameter, or its end from some dot on, matches a pattern."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _near(pattern: str, names: list[str]) -> str:
    """What a pattern may have meant that matches none of the names: the end of a message.

    `*.mpl.*` -> `*.mlp.*`: every part between dots that no name has becomes the nearest that one
    has, if that makes it match.
    """
    parts = list(dict.fromkeys(part for name in names for part in name.split(".")))
    changed = []
    for part in pattern[:200].split("."):
        close = difflib.get_close_matches(part, parts, n=1)
        word = not (part.isdigit() or set(part) & set("*?["))  # layer 17 is not layer 1 misspelt
        changed.append(close[0] if close and word else part)
    meant = ".".join(changed)
    if any(_matches(name, meant) for name in names):
        return f"did you mean '{meant}'?"
    return f"names are such as {', '.join(names[:3])} (--print-groups lists all)"


def matrices(
    groups: Groups, split_sizes: Mapping[str, list[int]], rates: Mapping[str, Rates] | None = None
) -> list[Matrix]:
    """The matrices in the order of the model's parameters, fused projections cut into pieces.

    Args:
        split_sizes: pattern of parameter names (`*.qkv.weight`) -> rows of each piece, in the place
            of the pieces that were found.
        rates: as in `Assigned`.

    Raises:
        InputError: a pattern matches nothing, two match one parameter, or the rows do not add up.
    """
    found: list[Matrix] = []
    used: set[str] = set()
    number = 0
    for name, parameter in groups.matrices.items():
        patterns = [p for p in split_sizes if fnmatch.fnmatchcase(name, p)]
        if len(patterns) > 1:
            raise InputError(f"optimizer.split_sizes: {' and '.join(patterns)} both match {name}")
        used.update(patterns)
        layout, shape = groups.layouts.get(name, Layout()), whole_shape(parameter)
        rows = matrix_shape(parameter, layout.transposed)[0]
        sizes = split_sizes[patterns[0]] if patterns else layout.pieces or [rows]
        if sum(sizes) != rows:
            raise InputError(
                f"optimizer.split_sizes: {patterns[0]}: {sizes} are {sum(sizes)} rows, "
                f"{name} has {rows}"
            )
        own = (rates or {}).get(name, AS_ITS_GROUP)
        experts = shape[0] if len(shape) == 3 else 1
        for piece, (start, stop) in enumerate(pairwise(accumulate(sizes, initial=0))):
            suffix = f".{piece}" if len(sizes) > 1 else ""
            place = layout.transposed, 0, experts, number, own
            found.append(Matrix(name, parameter, suffix, start, stop, *place))
            number += experts
    for pattern in split_sizes:
        if pattern not in used:
            hint = nearest(pattern, list(groups.matrices)[:100])  # a model may have thousands
            raise InputError(f"optimizer.split_sizes: {pattern} matches no hidden matrix; {hint}")
    return found


def check_gradients(matrices: Mapping[str, nn.Parameter]) -> None:
    """Refuse a matrix without a gradient: the optimizer's momentum would move it all the same.

    Raises:
        ValueError: names the parameter.
    """
    for name, parameter in matrices.items():
        if parameter.grad is None:
            raise ValueError(f"{name}: trainable, but without a gradient")


def width(groups: Groups) -> int:
    """The width of the model: the most frequent number of columns of its hidden matrices."""
    columns = (
        whole_shape(p)[-2 if groups.layouts.get(name, Layout()).transposed else -1]
        for name, p in groups.matrices.items()
    )
    return Counter(columns).most_common(1)[0][0]
