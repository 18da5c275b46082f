"""Adapters in a model: PEFT's layers, their first values, their names, and the merged weight.

`config/adapter.py` has the equations. PEFT puts a layer around each target, and its forward pass is
PEFT's. So names in an injected model are (`default` is PEFT's name of the one adapter):

    ...q_proj.base_layer.weight                    the frozen weight W (out, in)
    ...q_proj.lora_A.default.weight                A (rank, in)
    ...q_proj.lora_B.default.weight                B (out, rank)
    ...q_proj.lora_magnitude_vector.default.weight DoRA's m (out,)

What would surprise:
- PEFT gives A and B the dtype of W. Here they are float32 (float64 beside float64), since they are
  what an optimizer changes.
- First values are llmnorm's own (PEFT's distributions, each drawn from the seed and the layer's
  name), so that they are the same on every process and device: `initialize` would draw a B that is
  not 0, and step 0 would not be the base.
- m needs the loaded W, so first values are set after the weights of a block are read.
"""

import hashlib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmnorm.config.adapter import ALL_LINEAR, AdapterSettings, LowRankSettings
from llmnorm.machine import reading
from llmnorm.machine.doctor import missing_extra
from llmnorm.models.expert_adapters import target_stacks, written_stacks
from llmnorm.models.new_rows import NEW_ROWS, is_new_rows
from llmnorm.models.nf4 import bitsandbytes
from llmnorm.nn.precision import wide_dtype
from llmnorm.part import InputError, nearest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)\.default")
_PEFT = "base_model.model."


def inject(model: PreTrainedModel, settings: LowRankSettings) -> None:
    """Put an adapter around every target of `model`, in place; all other weights are frozen.

    Args:
        model: on the meta device; the adapter's parameters hold nothing yet.

    Raises:
        InputError: PEFT is not installed, or a target is no linear layer of the model.
    """
    peft = peft_package()
    names = target_modules(model, settings.targets)
    config = peft.LoraConfig(target_modules=names, **settings.peft_keys())
    peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    widen(model)


def widen(model: nn.Module) -> None:
    """Give the parameters of an adapter, which hold nothing yet, the dtype that they train in."""
    layers = dict(model.named_modules())
    for name, module in layers.items():
        if match := _MODULE.fullmatch(name):
            around: Any = layers[match[1]]
            stack = hasattr(around, "get_param")  # a layer around a stack of experts
            base = around.get_param() if stack else around.base_layer.weight
            assert isinstance(base, Tensor) and isinstance(module.weight, Tensor)
            module.weight.data = module.weight.data.to(wide_dtype(base.dtype))


def peft_package() -> Any:
    """The package peft.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        bitsandbytes()  # which PEFT would import in its own way
    try:
        import peft
    except ImportError:
        raise missing_extra("peft") from None
    return peft


def target_modules(model: PreTrainedModel, targets: list[str] | str) -> list[str]:
    """The names of the linear layers that `adapter.targets` asks for.

    Args:
        targets: last names of layers, or `all-linear`: all in the blocks.

    Raises:
        InputError: a name is that of no linear layer, or of the head of a tied model.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets == ALL_LINEAR:
        blocks = re.compile(rf"(?:{model.base_model_prefix}\.)?layers\.\d+\.")
        return [name for name in linear if blocks.match(name)]
    found: list[str] = []
    for target in targets:
        own = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not own:
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise InputError(
                f"adapter.targets: the model has no linear layer '{target}'; "
                f"{nearest(target, [*known, ALL_LINEAR])}"
            )
        found += own
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        tied = next((name for name in found if model.get_submodule(name) is head), None)
        if tied is not None:
            raise InputError(
                f"adapter.targets: '{tied}' is the embedding in a model with "
                "model.tie_word_embeddings, and an adapter would part them; leave it out"
            )
    return list(dict.fromkeys(found))


def is_adapter(name: str) -> bool:
    """Whether a parameter of an injected model belongs to the adapter, or is new tokens' rows."""
    return is_new_rows(name) or _MODULE.fullmatch(name.rpartition(".")[0]) is not None


def loaded_name(name: str) -> str:
    """The name that a parameter has in a model without an adapter: W's, without `.base_layer`.

    Of a module with two stacks of experts the name has it twice (expert_adapters.py).
    """
    return re.sub(r"(\.base_layer)+\.", ".", name)


@torch.no_grad()
def set_first_values(modules: Mapping[str, nn.Module], *, seed: int) -> None:
    """Give the adapters among `modules` their first values: the model computes what it did before.

    A is uniform between plus and minus 1 / sqrt(in), as torch's linear layers and PEFT's begin; B
    is 0; m is the norms of the rows of W.

    Args:
        modules: some of `model.named_modules()`; with an adapter its `base_layer`, which is loaded.
        seed: of the run; numbers are drawn on the CPU, a generator a layer.
    """
    for name, module in modules.items():
        match = _MODULE.fullmatch(name)
        if match is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        if match[2] == "A":
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            bound = weight.shape[1] ** -0.5
            draws = torch.rand(weight.shape, generator=generator)
            weight.copy_(draws.mul_(2 * bound).sub_(bound))
        elif match[2] == "B":
            weight.zero_()
        else:
            base = modules[f"{match[1]}.base_layer"]
            loaded = base.weight
            assert isinstance(loaded, Tensor)
            turned = isinstance(base, Conv1D) or getattr(base, "turned", False)
            inputs = 0 if turned else 1
            weight.copy_(torch.linalg.norm(loaded.to(weight.dtype), dim=inputs))


def rate_factors(model: nn.Module, settings: AdapterSettings) -> dict[str, float]:
    """Factors on the learning rate of parameters, by name: LoRA+'s `b_lr_ratio` on every B."""
    ratio = settings.b_lr_ratio if isinstance(settings, LowRankSettings) else 1.0
    if ratio == 1:
        return {}
    return {n: ratio for n, _ in model.named_parameters() if n.endswith(".lora_B.default.weight")}


class Factors(NamedTuple):
    """An adapter of one weight: A (rank, in), B (out, rank), and DoRA's m (out,) or None."""

    a: Tensor
    b: Tensor
    m: Tensor | None


def merged(weight: Tensor, factors: Factors, scale: float, *, turned: bool = False) -> Tensor:
    """The weight (out, in) of a plain layer that computes the same; in float32 or float64.

    The operations are those of PEFT's `merge_and_unload`, in its order.

    Args:
        turned: the weight is (in, out), and so is what is returned: GPT-2's `Conv1D`.
    """
    if turned:
        return merged(weight.T, factors, scale).T
    total = weight.to(wide_dtype(weight.dtype)) + (factors.b @ factors.a) * scale
    if factors.m is None:
        return total
    return (factors.m / torch.linalg.norm(total, dim=1)).unsqueeze(1) * total


def factor_names(name: str) -> tuple[str, str, str]:
    """The names of A, B and m in an injected model for a weight of the plain one."""
    layer = name.removesuffix(".weight")
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
    a, b, m = (f"{layer}.{kind}.default.weight" for kind in kinds)
    return a, b, m


# PEFT's files


def peft_name(name: str) -> str:
    """What PEFT's files call a parameter of an injected model."""
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    if is_new_rows(name):
        name = name.removesuffix(NEW_ROWS) + "token_adapter.trainable_tokens_delta"
    return _PEFT + name.replace(".default.", ".")


def write_config(
    directory: Path,
    settings: LowRankSettings,
    *,
    model: PreTrainedModel,
    trained: Iterable[str],
    base: str,
    new_tokens: range = range(0),
) -> None:
    """Write adapter_config.json, by which PEFT puts the same layers into the base.

    Args:
        model: of the run's class, without an adapter, on the meta device.
        trained: the names of all trained parameters in the injected model.
        base: where PEFT finds the base.
        new_tokens: the ids of new tokens whose rows are trained.

    Raises:
        InputError: PEFT is not installed; a layer is trained in part, which PEFT cannot express.
    """
    names = list(trained)
    stacks = target_stacks(model, settings.parameters)
    layers = {match[1] for n in names if (match := _MODULE.fullmatch(n.rpartition(".")[0]))}
    layers -= {stack.layer for stack in stacks}
    whole = dict.fromkeys(n.rpartition(".")[0] for n in names if not is_adapter(n))
    for module in whole:
        own = [n for n, _ in model.get_submodule(module).named_parameters()]
        if lacking := [n for n in own if f"{module}.{n}" not in names]:
            raise InputError(
                f"export: '{module}' is trained without its '{lacking[0]}', which PEFT's files "
                "cannot say; add --merge for a whole model"
            )
    class_name = type(model).__name__
    tasks = {"ForSequenceClassification": "SEQ_CLS", "ForMaskedLM": None}
    peft_package().LoraConfig(
        target_modules=written_targets(model, layers),
        target_parameters=written_stacks(model, stacks) or None,
        modules_to_save=[*whole] or None,
        trainable_token_indices=token_indices(names, new_tokens) or None,
        base_model_name_or_path=base,
        # transformers' classes of language models have several endings
        task_type=next((t for end, t in tasks.items() if class_name.endswith(end)), "CAUSAL_LM"),
        inference_mode=True,
        fan_in_fan_out={type(model.get_submodule(n)) for n in layers} == {Conv1D},
        **settings.peft_keys(),
    ).save_pretrained(str(directory))


def written_targets(model: nn.Module, layers: set[str]) -> list[str]:
    """PEFT's `target_modules` for these layers: last names where they name nothing else.

    Args:
        model: without an adapter.
    """
    last = {layer.rpartition(".")[2] for layer in layers}
    alike = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in last}
    return sorted(last if alike == layers else layers)


def token_indices(trained: Iterable[str], new_tokens: range) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the ids whose rows are trained, by the modules' last names.

    Args:
        trained: the names of all trained parameters.
        new_tokens: the ids of new tokens.
    """
    return {n.split(".")[-2]: [*new_tokens] for n in trained if is_new_rows(n)}


class PeftFiles:
    """An adapter directory of PEFT's, to begin with; headers are read here, weights later.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._file = directory, directory / WEIGHTS
        if not directory.is_dir():
            raise InputError(f"adapter.from: there is no directory {directory}")
        self._config = reading.read_object(directory / CONFIG, "adapter.from")
        reading.open_file(self._file, "adapter.from").close()  # safetensors waits for a named pipe
        try:
            with safe_open(self._file, framework="pt", device="cpu") as stored:
                self._shapes = {
                    name: tuple(stored.get_slice(name).get_shape())
                    for name in stored.keys()  # noqa: SIM118 (no mapping)
                }
        except (OSError, SafetensorError) as error:
            raise InputError(f"adapter.from: {self._file}: cannot be read ({error})") from None

    def check(
        self, model: nn.Module, settings: LowRankSettings, new_tokens: range = range(0)
    ) -> None:
        """Compare with the run's settings and with its model, an adapter injected.

        Args:
            new_tokens: the ids of new tokens whose rows the run trains.

        Raises:
            InputError: they differ; the message says in what.
        """
        where = f"adapter.from: {self._directory}"
        config = self._config
        if config.get("peft_type") != "LORA":
            raise InputError(f"{where} is of PEFT's type {config.get('peft_type')}, not LORA")
        written = {
            "r": "rank",
            "lora_alpha": "alpha",
            "use_rslora": "rslora",
            "use_dora": "name",
        }
        wanted = settings.peft_keys()
        changed = []
        for key, ours in written.items():
            there = config.get(key) or False  # older files lack use_dora
            if there != wanted[key]:
                value = str(there).lower() if ours != "name" else ("dora" if there else "lora")
                changed.append(f"adapter.{ours}={value}")
        if changed:
            raise InputError(f"{where} was trained with other settings; add {' '.join(changed)}")
        for key in ("rank_pattern", "alpha_pattern", "lora_bias"):
            if config.get(key):
                raise InputError(f"{where}: {key} is given there, which llmnorm cannot go on with")
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        rows = config.get("trainable_token_indices")
        if rows and rows != token_indices(names, new_tokens):
            ours = f"{new_tokens.start} to {new_tokens.stop - 1}" if new_tokens else "none"
            raise InputError(
                f"{where}: trained the rows of other tokens (trainable_token_indices {rows}) than "
                f"those that tokenizer.chat_template adds here ({ours})"
            )
        if config.get("bias", "none") != "none":
            raise InputError(f"{where}: bias is '{config['bias']}' there; llmnorm trains none")
        layers = ", ".join(sorted({_layer(n) for n in self._shapes if ".lora_" in n}))
        trained = {peft_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            if name not in self._shapes:
                if ".lora_" not in name:
                    continue  # a head that is new here
                raise InputError(
                    f"{where} is for another base or other targets: it holds no '{name}'; its "
                    f"layers are {layers}"
                )
            if self._shapes[name] != tuple(parameter.shape):
                raise InputError(
                    f"{where} is for another base: '{name}' has shape {self._shapes[name]} there, "
                    f"and this model asks for {tuple(parameter.shape)}"
                )
        if unasked := sorted(set(self._shapes) - set(trained)):
            raise InputError(
                f"{where}: holds '{unasked[0]}', which this run does not train; its layers are "
                f"{layers} (adapter.targets, adapter.parameters)"
            )

    def read_into(self, into: Mapping[str, Tensor]) -> None:
        """Copy the tensors that the files have into those of `into`, by names in the model."""
        try:
            with safe_open(self._file, framework="pt", device="cpu") as stored, torch.no_grad():
                for name, tensor in into.items():
                    if peft_name(name) in self._shapes:
                        tensor.copy_(stored.get_tensor(peft_name(name)))
        except (OSError, SafetensorError) as error:
            raise InputError(f"adapter.from: {self._file}: cannot be read ({error})") from None


def _layer(name: str) -> str:
    """The last name of the layer of an adapter's tensor in PEFT's files."""
    return loaded_name(name).partition(".lora_")[0].rpartition(".")[2]
