"""Weights of a class of transformers, read and written by the names that they have on disk.

The names in a directory are not always those of the model's parameters: a mixture's experts lie
there one by one and are stacks in the model, other files hold q, k and v as one matrix.
transformers has a table of what it renames, stacks and splits for each class. Both ways are gone
here a group at a time: a group is what one conversion makes of some stored tensors, mostly one
tensor, at most the experts of one layer. So memory is needed for a group, never for the model.

    stored = ForeignWeights(directory, skeleton)     headers alone are read
    stored.read_into({name: parameter})              by parameter names
    on_disk(skeleton, tensors, read_into)            the way back, as `save_pretrained` names them

What would surprise:
- The table is looked up by class. `fully_shard` gives a model another class, and conversions ask
  the model for shapes. So the names are those of a skeleton: the class's model on the meta device,
  which nobody shards or puts an adapter into.
- A quantised directory (`quantization_config`) is read as plain weights, where transformers can
  compute them from its tensors alone, one by one.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from llmnorm.models.convert import Stored, Weights
from llmnorm.part import InputError

Reader = Callable[[Mapping[str, Tensor]], None]

# Tensors of older files that today's classes compute instead.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class _Group(NamedTuple):
    """One conversion of stored tensors.

    Attributes:
        first: the name in the model that all sources are renamed to.
        converter: what makes parameters of them; None: the one source is the parameter.
        sources: the names on disk, each with the converter's pattern that it matches.
    """

    first: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]]


class ForeignWeights:
    """The weights of a directory, by the parameter names of a class of transformers.

    Attributes:
        tensors: dtype and shape of the model's tensors, a tied one once, in its order. The dtype is
            that of the files; of what is quantised there, the argument's.
        files: the files that hold them.
    """

    def __init__(
        self,
        directory: Path,
        skeleton: PreTrainedModel,
        quantization: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Match the names in the files with those of the model; headers alone are read.

        Args:
            directory: holds safetensors files.
            skeleton: of the directory's configuration, its parameters on the meta device; buffers
                may have values.
            quantization: `quantization_config` of its config.json.
            dtype: what `tensors` say of what is quantised.

        Raises:
            InputError: there are no weights or not whole ones; a tensor is missing, has another
                shape, or has no place in the model; or they are quantised in a way that
                transformers cannot undo here.
        """
        self._directory, self._skeleton, self._dtype = directory, skeleton, dtype
        quantizer = None if not quantization else _dequantizer(quantization, directory)
        self._weights = Weights(directory, packed=quantizer is not None)
        self.files = self._weights.files
        groups, unasked = self._match(quantizer)
        made = {
            name: (group, stored) for group in groups for name, stored in self._made(group).items()
        }
        state = skeleton.state_dict(keep_vars=True)
        self._refuse_unasked([*unasked, *(name for name in made if name not in state)])
        names_of: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names_of.setdefault(id(tensor), []).append(name)
        # Of every tensor of the model: the group that makes it, and what it is called there.
        self._sources: dict[str, tuple[_Group, str]] = {}
        self.tensors: dict[str, Stored] = {}
        missing = []
        for names in names_of.values():
            own, there = names[0], [name for name in names if name in made]
            if not there:
                missing.append(own)
                continue
            group, stored = made[there[0]]
            if stored.shape != tuple(state[own].shape):
                raise InputError(
                    f"{directory}: '{own}' has shape {stored.shape}, and config.json asks for "
                    f"{tuple(state[own].shape)}"
                )
            self._sources[own], self.tensors[own] = (group, there[0]), stored
            if len(there) > 1:
                self._refuse_unequal({name: made[name][0] for name in there})
        self._refuse_missing(missing, state)

    def read_into(self, into: Mapping[str, Tensor]) -> None:
        """Convert stored tensors and copy them into those of `into`, a group at a time.

        Args:
            into: by parameter names; of any dtype. A buffer that the files may lack is left as it
                is.

        Raises:
            InputError: a file cannot be read, or a tensor not converted.
        """
        wanted: dict[str, list[str]] = {}
        for name in into:
            if name in self._sources:
                wanted.setdefault(self._sources[name][0].first, []).append(name)
        with self._weights.opened() as read, torch.no_grad():
            for names in wanted.values():
                made = self._convert(self._sources[names[0]][0], read)
                for name in names:
                    into[name].copy_(made[self._sources[name][1]])

    def _match(self, quantizer: HfQuantizer | None) -> tuple[list[_Group], list[str]]:
        """The groups of all stored tensors, and the names of those without a place in the model.

        The order and the two attempts at a name are those of transformers'
        `convert_and_load_state_dict_in_model`.
        """
        model, state = self._skeleton, self._skeleton.state_dict()
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        prefix = model.base_model_prefix
        groups: dict[str, _Group] = {}
        unasked = []
        for stored in sorted(self._weights.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
            if name not in state and stored in state:
                name, pattern = rename_source_key(stored, [], [], prefix, state)
            if name not in state:
                unasked.append(stored)
                continue
            converter = None if pattern is None else of_pattern[pattern]
            group = groups.setdefault(name, _Group(name, converter, []))
            if group.converter is not converter or (converter is None and group.sources):
                raise InputError(
                    f"{self._directory}: '{group.sources[0][0]}' and '{stored}' are both '{name}' "
                    "of the model"
                )
            group.sources.append((stored, pattern or stored))
        return list(groups.values()), unasked

    def _made(self, group: _Group) -> dict[str, Stored]:
        """What a group makes, from the headers of its sources."""
        headers = self._weights.tensors
        if group.converter is None:
            return {group.first: headers[group.sources[0][0]]}
        if _dequantizes(group.converter) and len(group.sources) > 1:
            # The shapes of packed numbers tell nothing: `read_into` finds out what they hold.
            first = group.converter.target_patterns[0]
            names = [group.first.replace(first, p) for p in group.converter.target_patterns]
            state = self._skeleton.state_dict()
            return {n: Stored(self._dtype, tuple(state[n].shape)) for n in names if n in state}

        def on_meta(name: str) -> Tensor:
            return torch.empty(headers[name].shape, dtype=headers[name].dtype, device="meta")

        made = self._convert(group, on_meta)
        return {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors that a group makes, by names in the model.

        Raises:
            InputError: transformers' conversion fails with these tensors.
        """
        if group.converter is None:
            return {group.first: read(group.sources[0][0])}
        converter = deepcopy(group.converter)
        for stored, pattern in group.sources:
            converter.add_tensor(group.first, stored, pattern, partial(read, stored))
        try:
            made = converter.convert(
                group.first, model=self._skeleton, config=self._skeleton.config
            )
        except InputError:
            raise
        except Exception as error:  # of any kind: it is transformers' own code
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{self._directory}: '{group.sources[0][0]}' and what belongs to it cannot be made "
                f"into '{group.first}': {reason}"
            ) from None
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def _refuse_unasked(self, names: Sequence[str]) -> None:
        """Raise an InputError for stored tensors that the class does not say it leaves out."""
        ignored = [*_COMPUTED, *(self._skeleton._keys_to_ignore_on_load_unexpected or ())]
        unasked = [n for n in names if not any(re.search(pattern, n) for pattern in ignored)]
        if unasked:
            more = f" and {len(unasked) - 1} more" if len(unasked) > 1 else ""
            raise InputError(
                f"{self._directory}: '{unasked[0]}'{more} has no place in "
                f"{type(self._skeleton).__name__}"
            )

    def _refuse_missing(self, names: Sequence[str], state: Mapping[str, Tensor]) -> None:
        """Raise an InputError for tensors of the model that the files lack.

        A buffer that the class says may be missing has its first value.
        """
        optional = self._skeleton._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name in names
            if state[name].is_meta or not any(re.search(pattern, name) for pattern in optional)
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{self._directory}: holds no tensor for '{missing[0]}'{more}, which "
                f"{type(self._skeleton).__name__} has"
            )

    def _refuse_unequal(self, groups: Mapping[str, _Group]) -> None:
        """Raise an InputError if tensors that are one in the model differ in the files."""
        with self._weights.opened() as read:
            (name, first), *others = [(n, self._convert(g, read)[n]) for n, g in groups.items()]
            for other, tensor in others:
                if not torch.equal(first, tensor):
                    raise InputError(
                        f"{self._directory}: '{name}' and '{other}' differ, and config.json ties "
                        "them (tie_word_embeddings)"
                    )


def on_disk(
    skeleton: PreTrainedModel, tensors: Mapping[str, Stored], read_into: Reader
) -> tuple[dict[str, Stored], Reader]:
    """Tensors of a model under the names and in the shapes that `save_pretrained` writes.

    Args:
        skeleton: a model of the class, its parameters on the meta device.
        tensors: of the whole model, by parameter names, a tied one once.
        read_into: fills tensors, by parameter names.

    Returns:
        Dtypes and shapes by names on disk, and a function that fills tensors by these names. It
        holds what one conversion needs at a time.
    """
    own_name = _saved_names(skeleton, tensors)
    tensors = {saved: tensors[own] for saved, own in own_name.items()}

    def read_saved(into: Mapping[str, Tensor]) -> None:
        read_into({own_name[saved]: tensor for saved, tensor in into.items()})

    # As `revert_weight_conversion` chooses them for a model that was not loaded.
    mapping = get_model_conversion_mapping(skeleton, add_legacy=False)
    kept = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    skeleton._weight_conversions = kept  # which it would look up again for every group
    back = [entry.reverse_transform() for entry in kept[::-1]]
    renamings = [entry for entry in back if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in back if isinstance(entry, WeightConverter)]
    unsaved = set(skeleton._keys_to_ignore_on_save or ())
    plain: dict[str, str] = {}  # name on disk -> parameter
    groups: dict[str, list[str]] = {}  # what a conversion makes first -> the parameters it needs
    for name in sorted(set(tensors) - unsaved, key=dot_natural_key):
        first, pattern = apply_converters(name, converters)
        if pattern is None:
            plain[apply_renamings(name, renamings)] = name
        else:
            groups.setdefault(first, []).append(name)

    stored = {there: tensors[name] for there, name in plain.items()}
    group_of: dict[str, str] = {}
    for first, names in groups.items():
        empty = {
            n: torch.empty(tensors[n].shape, dtype=tensors[n].dtype, device="meta") for n in names
        }
        for there, tensor in revert_weight_conversion(skeleton, empty).items():
            stored[there] = Stored(tensor.dtype, tuple(tensor.shape))
            group_of[there] = first

    def fill(into: Mapping[str, Tensor]) -> None:
        read_saved({plain[there]: tensor for there, tensor in into.items() if there in plain})
        for first in dict.fromkeys(group_of[there] for there in into if there in group_of):
            own = {n: torch.empty(tensors[n].shape, dtype=tensors[n].dtype) for n in groups[first]}
            read_saved(own)
            with torch.no_grad():
                for there, tensor in revert_weight_conversion(skeleton, own).items():
                    if there in into:
                        into[there].copy_(tensor)

    return {name: stored[name] for name in sorted(stored, key=dot_natural_key)}, fill


def _saved_names(skeleton: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The name that each tensor is saved under -> its name in `names`; a tied one has several."""
    state = skeleton.state_dict(keep_vars=True)
    alike: dict[int, list[str]] = {}
    for name, tensor in state.items():
        alike.setdefault(id(tensor), []).append(name)
    kept = remove_tied_weights_from_state_dict(skeleton.state_dict(), skeleton)
    return {next(n for n in alike[id(state[own])] if n in kept): own for own in names}


def _dequantizer(quantization: Mapping[str, Any], directory: Path) -> HfQuantizer:
    """What makes plain weights of quantised ones.

    Raises:
        InputError: transformers cannot, or not tensor by tensor.
    """
    method = quantization.get("quant_method")
    where = f"{directory / 'config.json'}: quantization_config: '{method}'"
    cure = "give the model in float32 or bfloat16"
    try:
        settings = AutoQuantizationConfig.from_dict(dict(quantization))
        if not hasattr(settings, "dequantize"):
            raise InputError(f"{where} cannot be read as plain weights; {cure}")
        settings.dequantize = True
        quantizer: HfQuantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        if "dequantize" not in quantizer.get_load_operations():
            raise InputError(f"{where} cannot be read as plain weights; {cure}")
        quantizer.validate_environment()
    except InputError:
        raise
    except Exception as error:  # of any kind: a package that is not installed, keys of the method
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where} cannot be read as plain weights: {reason}; {cure}") from None
    return quantizer


def _dequantizes(converter: WeightConverter) -> bool:
    return any(getattr(op, "hf_quantizer", None) is not None for op in converter.operations)
