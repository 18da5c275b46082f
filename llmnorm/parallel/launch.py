"""The sharding on which launch file and configuration agree, and accelerate's process group.

`accelerate launch --config_file FILE` exports the settings of FILE as environment variables;
torchrun exports only the processes. `parallel.sharding: auto` takes what was exported.

What would surprise:
- The FSDP and DeepSpeed variables are deleted before accelerate sees them. It would shard the model
  itself, or hand it to DeepSpeed; on CPUs it then falls back to plain data parallelism, or to
  processes that do not know of each other, without an error. Here llmnorm shards.
- A setting of the launch file that llmnorm does not carry out (offloading, a precision, ...) is
  refused, not ignored.
"""

import importlib.util
import os
from typing import TYPE_CHECKING

from llmnorm.config.tree import ParallelSettings, TrainingSettings
from llmnorm.machine.doctor import missing_extra
from llmnorm.machine.gpus import launch_file
from llmnorm.parallel.rendezvous import make_group
from llmnorm.part import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

# What an FSDP section must say: environment variable -> (key, value, why). Any other value would
# have no effect, so it is refused.
_FSDP_MUST = {
    "FSDP_VERSION": ("fsdp_version", "2", "only FSDP2 is offered"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "offloading is not offered"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        "fsdp_reshard_after_forward",
        "true",
        "blocks are always resharded",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "false",
        "the key is parallel.activation_checkpointing",
    ),
}
# The same for a DeepSpeed section, of which only the stage is used.
_DEEPSPEED_MUST = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (
        "deepspeed_config_file",
        "none",
        "the stage alone is taken from it",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "offload_optimizer_device",
        "none",
        "offloading is not offered (zero3 or fsdp2 spread most)",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
        "offload_param_device",
        "none",
        "offloading is not offered (zero3 or fsdp2 spread most)",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps",
        "1",
        "the key is training.micro_batch",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (
        "gradient_clipping",
        "0.0",
        "the key is training.max_grad_norm",
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": (
        "zero3_init_flag",
        "false",
        "zero3 cuts the weights block by block as they are made",
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        "zero3_save_16bit_model",
        "false",
        "`llmnorm export` reads the checkpoints",
    ),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": (
        "deepspeed_moe_layer_cls_names",
        "none",
        "there are no experts",
    ),
}


def agreed_sharding(parallel: ParallelSettings, training: TrainingSettings) -> str:
    """The run's sharding: `none`, `ddp`, `fsdp2`, `hsdp`, `zero1`, `zero2` or `zero3`.

    Raises:
        InputError: launch file, environment and configuration contradict each other, or DeepSpeed
            is needed and not installed.
    """
    file, processes = _of_file(), int(os.environ.get("WORLD_SIZE", "1"))
    key: str = parallel.sharding
    _refuse_precision(training)
    if key == "auto":
        key = file or ("ddp" if processes > 1 else "none")
    kind = "fsdp2" if key == "hsdp" else key
    if file is not None and kind != file and not (file == "ddp" and key == "none"):
        raise InputError(
            f"parallel.sharding: is '{parallel.sharding}', but the launch file asks for {file}; "
            f"leave the key out, or launch with {file_for(kind)}"
        )
    if key == "none" and processes > 1:
        raise InputError(
            f"parallel.sharding: 'none' is one process, but {processes} were launched; "
            "did you mean 'ddp'?"
        )
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise missing_extra("deepspeed")
    if key == "ddp" and processes == 1:
        key = "none"  # one replica
    if parallel.replicas == 1:
        return key
    if kind != "fsdp2":
        raise InputError(
            f"parallel.replicas: {parallel.replicas} has no meaning for sharding '{key}'; "
            f"launch with {launch_file('fsdp2')}"
        )
    if processes % parallel.replicas:
        divisors = [d for d in range(1, processes + 1) if processes % d == 0]
        close = min(divisors, key=lambda d: abs(d - parallel.replicas))
        raise InputError(
            f"parallel.replicas: {parallel.replicas} does not divide the {processes} processes; "
            f"the nearest that does is {close}"
        )
    return "hsdp"


def file_for(sharding: str) -> str:
    """The path of the launch file for a sharding, for messages."""
    return launch_file({"none": "ddp", "hsdp": "fsdp2"}.get(sharding, sharding))


def accelerator(cuda: bool) -> "Accelerator":
    """accelerate's object, which knows this process's rank and device; the process group is made.

    Removes the environment variables by which accelerate would shard (see above).
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # accelerate would shard because of these, or warn of a mixed precision; llmnorm does both.
    ours = (
        "FSDP_",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_MIXED_PRECISION",
    )
    for name in [*os.environ]:
        if name.startswith(ours):
            del os.environ[name]
    make_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    if not cuda:
        return Accelerator(cpu=True)
    if "LOCAL_RANK" not in os.environ:  # no launcher, so no group for a backend
        return Accelerator()
    # Checkpoints are written over gloo beside the GPUs' own backend.
    group = InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")
    return Accelerator(kwargs_handlers=[group])


def _of_file() -> str | None:
    """The launch file's sharding; None where accelerate did not start the processes.

    Raises:
        InputError: the file holds a setting that llmnorm does not carry out.
    """
    if _is_set("ACCELERATE_USE_FSDP"):
        _refuse_others(_FSDP_MUST)
        return "fsdp2"
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        _refuse_others(_DEEPSPEED_MUST)
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
        if stage not in ("1", "2", "3"):
            raise InputError(
                f"the launch file says zero_stage: {stage}; valid: 1, 2, 3 (without sharding: "
                f"launch with {launch_file('ddp')})"
            )
        return f"zero{stage}"
    for variable, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if _is_set(variable):
            raise InputError(
                f"the launch file asks for {what}, which parallel.sharding does not offer; "
                "valid: ddp, fsdp2, zero1, zero2, zero3 (launch/accelerate/)"
            )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # accelerate always exports it
    return "ddp" if launched and "WORLD_SIZE" in os.environ else None


def _refuse_others(must: dict[str, tuple[str, str, str]]) -> None:
    for variable, (key, value, why) in must.items():
        if os.environ.get(variable, value).lower() not in (value, "none"):
            raise InputError(
                f"the launch file says {key}: {os.environ[variable]}, but {why}; "
                f"write {key}: {value}"
            )


def _refuse_precision(training: TrainingSettings) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        raise InputError(
            f"the launch file asks for mixed precision '{asked}', training.precision is "
            f"'{training.precision}' and alone decides; write mixed_precision: 'no' there"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
