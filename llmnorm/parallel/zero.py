"""DeepSpeed's ZeRO with llmnorm's optimizers.

Source: Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054. Stage 1 divides the optimizer's state
among the processes, stage 2 the reduced gradients too, stage 3 the weights as well.

DeepSpeed stores, reduces and gathers; llmnorm updates. DeepSpeed would hand an optimizer flat
pieces of tensors, on which a rule for matrices is silently wrong. So its optimizer is one that does
nothing. A "master" is the float32 elements of one weight that this process updates. A step is:

    engine.backward(loss)    every micro-batch; DeepSpeed reduces gradients into its partitions
    collect()                the masters get their `grad` from these partitions
    (the run's optimizer)    changes the masters; matrices by exchange (optim/sharded.py)
    step()                   engine.step: the masters become the model's weights again

What would surprise:
- Weights are float32 and are sent as float32, as under every sharding. DeepSpeed switches off an
  autocast that surrounds it, so its configuration asks it to make its own.
- DeepSpeed averages gradients over the processes; `collect` multiplies by their number, since
  llmnorm sums. DeepSpeed clips to 1.0 unless its configuration says 0.0; llmnorm clips by itself.
- Stages 1 and 2 lay all trainable parameters end to end and cut them into one piece a process;
  stage 3 cuts each parameter. Either way a piece may begin and end inside a row.
- A parameter that was not used gets a gradient of zeros from DeepSpeed, which momentum would
  follow. So a hook notes which parameters got a gradient, and the others get None.
- At stage 3 a block is gathered as a whole (DeepSpeed calls it a "leaf"), and no small parameter
  stays gathered: else changed masters would meet old copies.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmnorm.optim.fragments import Fragment

if TYPE_CHECKING:
    from llmnorm.models.foreign import Foreign
    from llmnorm.models.pretrained_model import LlmNormPreTrainedModel

REDUCE_ELEMENTS = 2**25  # gradients that are reduced at once: 128 MiB of float32


class Zero:
    """One process's part of a model that DeepSpeed shards.

    Args:
        stage: 1, 2 or 3.
        precision: of forward passes, `fp32` or `bf16`.
    """

    def __init__(self, stage: int, precision: str, device: torch.device) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")  # one process, started without a launcher
        os.environ["DS_ACCELERATOR"] = device.type
        import deepspeed

        self._deepspeed = deepspeed
        # In every step it calls collectives by names that torch 2.13 warns are old.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__ = {}  # else it compiles C++ operators, though none is used
        deepspeed.init_distributed(dist.get_backend(), dist_init_required=False)
        self.stage = stage
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._arrived: set[int] = set()
        self._masters: list[tuple[nn.Parameter, Fragment]] = []
        self.config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # no effect: llmnorm makes the batches
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,  # DeepSpeed has not tested one that does nothing
            "torch_autocast": {
                "enabled": precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # whose gradients would travel in bf16
            },
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": REDUCE_ELEMENTS,
                "memory_efficient_linear": False,  # would replace torch's linear everywhere
                "override_module_apply": False,
                "stage3_param_persistence_threshold": 0,
                # Not needed: llmnorm computes the norm.
                **({"compute_grad_norm": False} if stage < 3 else {}),
            },
        }

    def partition(self, module: nn.Module) -> None:
        """Shard a module's parameters that are not sharded yet (stage 3)."""
        self._deepspeed.zero.Init(module=module, config_dict_or_path=self.config)

    def wrap(self, model: "LlmNormPreTrainedModel | Foreign", *, trained: bool) -> nn.Module:
        """DeepSpeed's engine, to be called in place of `model`; sets each parameter's `master`.

        Args:
            model: its weights are set and, at stage 3, sharded.
            trained: whether it is trained; else it has no masters.
        """
        if self.stage < 3 and not trained:
            return model
        if self.stage == 3:
            kinds = {type(block) for block in model.units().values()}
            self._deepspeed.utils.set_z3_leaf_modules(model, [*kinds])
            if not model.get_input_embeddings().weight.requires_grad:
                # A block's gradients are reduced when its input's gradient is there.
                model.enable_input_require_grads()
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._engine, *_ = self._deepspeed.initialize(
            model=model,
            optimizer=_Nothing(parameters) if trained else None,
            config=self.config,
            dist_init_required=False,
        )
        if trained:
            self._hang_masters(model, parameters)
        return self._engine

    def _hang_masters(self, model: nn.Module, trained: list[Any]) -> None:
        """Give each parameter its `master`: the float32 elements that this process steps."""
        parameters: list[Any] = [*model.parameters()] if self.stage == 3 else trained
        start = 0  # of this parameter among all elements, which stages 1 and 2 cut as one row
        for parameter in parameters:
            if self.stage == 3:
                whole, size = parameter.ds_shape, parameter.partition_numel()
            else:
                whole, size = parameter.shape, self._engine.optimizer.partition_size[0]
            cuts = [min(max(r * size - start, 0), whole.numel()) for r in range(self._world + 1)]
            start += whole.numel() if self.stage < 3 else 0
            data = self._part(parameter)[: cuts[self._rank + 1] - cuts[self._rank]]
            fragment = Fragment.of(data, whole, tuple(cuts), self._rank)
            parameter.master = fragment
            if parameter.requires_grad:
                self._masters.append((parameter, fragment))
                parameter.register_post_accumulate_grad_hook(self._note_gradient)

    def _part(self, parameter: Any) -> Tensor:
        """This process's elements of a parameter's float32 weights; at stage 3 padding follows."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            if not parameter.requires_grad:
                return parameter.ds_tensor.detach()
            return safe_get_local_fp32_param(parameter).detach()
        mapping = parameter._hp_mapping
        return parameter.new_empty(0) if mapping is None else mapping.hp_fragment.detach()

    def _gradient(self, parameter: Any) -> Tensor:
        """This process's elements of a parameter's reduced gradient."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            return safe_get_local_grad(parameter)
        mapping = parameter._hp_mapping
        if mapping is None:
            return parameter.new_empty(0)
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)

    def _note_gradient(self, parameter: Tensor) -> None:
        self._arrived.add(id(parameter))

    def accumulate(self, *, last: bool) -> None:
        """Before a micro-batch's forward pass: whether it is the step's last."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of the micro-batch whose forward pass gave `loss`."""
        self._engine.backward(loss)

    def gradient(self, loss: Tensor, tensor: Tensor) -> Tensor:
        """As `Parallel.gradient`. DeepSpeed's hooks count a whole backward pass, so one is run."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(loss)
        self._arrived.clear()
        self.step()
        assert tensor.grad is not None
        return tensor.grad

    def collect(self) -> None:
        """Give every master its gradient, summed over the processes; None if it was not used."""
        for parameter, fragment in self._masters:
            if id(parameter) in self._arrived:
                fragment.grad = self._gradient(parameter)[: fragment.numel()].mul_(self._world)
        self._arrived.clear()

    def step(self) -> None:
        """Copy the masters into the model's weights and drop the gradients: DeepSpeed's step."""
        for _, fragment in self._masters:
            fragment.grad = None
        self._engine.step()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's weights outside of a step."""
        zero = self._engine.optimizer
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()  # releases gathered weights
        for parameter, fragment in self._masters:
            self._in_model(parameter, fragment).copy_(fragment)

    def found(self, model: Any) -> str:
        """The sharding of a model as its engine reports it."""
        engine = self._deepspeed.DeepSpeedEngine
        return f"zero{int(model.zero_optimization_stage())}" if type(model) is engine else "none"

    def faults(self) -> Iterator[str]:
        """Settings and weights of DeepSpeed that differ from what this file relies on."""
        engine, inner = self._engine, self._engine.optimizer.optimizer
        if engine.gradient_clipping() != 0:
            yield f"DeepSpeed clips gradients to {engine.gradient_clipping()}"
        if engine.dp_world_size != self._world:
            yield f"DeepSpeed has {engine.dp_world_size} processes, not {self._world}"
        if type(inner) is not _Nothing or len(inner.param_groups) != 1:
            yield f"DeepSpeed steps a {type(inner).__name__}"
        if engine.gradient_accumulation_steps() != 1:
            yield "DeepSpeed accumulates gradients"
        for parameter, fragment in self._masters:
            part = self._part(parameter)[: fragment.numel()]
            if part.data_ptr() != fragment.data_ptr():
                yield f"DeepSpeed's master weights of shape {tuple(fragment.whole)} lie elsewhere"
            if not fragment.equal(self._in_model(parameter, fragment)):
                yield f"the master weights of shape {tuple(fragment.whole)} are not the model's"

    def _in_model(self, parameter: Any, fragment: Fragment) -> Tensor:
        """A master's elements in the model's own weights."""
        if self.stage == 3:
            return parameter.ds_tensor[: fragment.numel()]
        first, last = fragment.cuts[self._rank : self._rank + 2]
        return parameter.detach().view(-1)[first:last]

    def weights(self, model: nn.Module) -> list[Tensor]:
        """All weights that this process holds between two steps, masters among them."""
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
        return weights + [fragment for _, fragment in self._masters]


class _Nothing(torch.optim.Optimizer):
    """DeepSpeed's optimizer. (SGD with lr = 0 would make NaN weights of a non-finite gradient.)"""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: the run's optimizer has updated the masters already."""
