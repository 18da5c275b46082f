"""The sections of a run's configuration.

The tree is the registry of parts: a part's field is a union of settings classes
(`llmnorm/part.py`). `file.py` makes such a tree from a YAML file. Nothing here imports torch, so
that a mistake is answered at once.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmnorm.config.adapter import (
    Adapter,
    AdapterSettings,
    NoAdapterSettings,
    frozen_refusal,
)
from llmnorm.config.foreign import foreign_refusal
from llmnorm.config.generation import GenerationSettings
from llmnorm.config.serving import ServingSettings
from llmnorm.config.values import Count, LocalPath, Place, Rows, Seed
from llmnorm.data.settings import DataSettings, TokenizerSettings
from llmnorm.nn.mixers.settings import MixerSettings
from llmnorm.nn.settings import ModelSettings
from llmnorm.objectives.settings import CausalLMSettings, Objective, ObjectiveSettings
from llmnorm.optim.schedule import CosineSettings, Schedule
from llmnorm.optim.settings import AdamWSettings, Optimizer
from llmnorm.part import Settings
from llmnorm.selection.settings import NoSelectionSettings, Selection, SelectionSettings

Share = Annotated[float, Field(ge=0, lt=1)]
# accelerate's trackers. Asking accelerate would import torch, so they are written here.
Tracker = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]


class SpikeSettings(Settings):
    """Which steps are left out since their loss or gradient norm leaps out of those before."""

    sigma: float = Field(default=6.0, gt=0)
    """How many deviations above the mean a value is a spike."""
    window: Annotated[int, Field(ge=8, le=10_000)] = 128
    """Of how many steps mean and deviation are; from half as many on they are used."""


class TrainingSettings(Settings):
    """Length, batch and arithmetic of a run. Exactly one of steps, tokens, epochs is the length."""

    steps: Count | None = None
    """Length in global batches."""
    tokens: Annotated[int, Field(ge=1, le=10**18)] | None = None
    """Length in tokens, rounded up to whole global batches."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Length in passes over the training rows, rounded up to whole global batches."""
    global_batch: Rows | Literal["auto"] = 32
    """Rows a step, over all processes; `auto`: the Step Law's (needs `tokens`). A row of `sft` is
    an example."""
    micro_batch: Rows | None = None
    """Rows that one process runs at once; left out, all of its share of the global batch. Of `sft`
    rows of `data.context_length` tokens, each with several examples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: matrix products in bfloat16; weights, optimizer state, norm statistics, rotary
    angles, softmax, loss and reductions stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    deterministic: bool = False
    """Only kernels that give the same bits every time (slower on a GPU)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 = never (the norm is still logged)."""
    max_skipped_steps: Count = 5
    """The run stops after this many steps in a row with a non-finite loss or gradient. So many
    spikes are left out in a row at most."""
    spike: SpikeSettings | None = None
    """Leave the update of a step out whose finite loss or gradient norm is a spike; `{}`: by 6
    deviations of the last 128 steps. Left out, never."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay, e.g. 0.999."""
    trainable: Literal["all", "norms", "adapter"] | None = None
    """What is trained of the weights of `model.pretrained`: `all`; `norms`, gains and offsets of
    the norms (beside an adapter, where there is one); `adapter`, the adapter alone. A new head is
    trained in any case. Left out, `adapter` where there is one, else `all`."""
    branch_from: LocalPath | None = None
    """Start with weights, optimizer state and rows of this checkpoint (RUN/checkpoints/step_N); the
    run's length counts its steps too. On other data, or with another `data.context_length`, rows
    begin at 0."""

    @model_validator(mode="after")
    def _check(self) -> "TrainingSettings":
        given = [k for k in ("steps", "tokens", "epochs") if getattr(self, k) is not None]
        if len(given) != 1:
            found = " and ".join(f"training.{k}" for k in given) if given else "none"
            raise ValueError(
                f"give exactly one of training.steps, training.tokens, training.epochs; got {found}"
            )
        return self

    def check_micro_batch(self) -> None:
        """Refuse a micro-batch that does not divide the global batch.

        Raises:
            ValueError: it does not.
        """
        batch, wanted = self.global_batch, self.micro_batch
        if wanted is None or batch == "auto" or not batch % wanted:
            return
        # 1 is nearer than any divisor above its double
        divisors = (d for d in range(1, min(batch, 2 * wanted) + 1) if batch % d == 0)
        close = min(divisors, key=lambda d: abs(d - wanted))
        raise ValueError(
            f"training.micro_batch {wanted} does not divide training.global_batch {batch}; "
            f"the nearest that does is {close}"
        )

    def check_processes(self, count: int) -> None:
        """Refuse a number of processes that the rows of a step do not divide over.

        Raises:
            ValueError: they do not; the nearest number of which they do is named.
        """
        if self.rows % count == 0:
            return
        close = min(
            (d for d in range(1, self.rows + 1) if self.rows % d == 0),
            key=lambda d: (abs(d - count), d),
        )
        raise ValueError(
            f"training.global_batch: {self.rows} rows do not divide over {count} processes; start "
            f"{close}, the nearest number that they divide over (a new run could have "
            f"training.global_batch={max(1, round(self.rows / count)) * count})"
        )

    @property
    def rows(self) -> int:
        """Rows a step, where `auto` has become a number."""
        assert self.global_batch != "auto", "resolved before a run begins"
        return self.global_batch

    def total_steps(self, rows: int, context_length: int, pool: int | None = None) -> int:
        """The length in global batches, for `rows` training rows of `context_length` tokens.

        Args:
            pool: rows read a step, which epochs are counted by; those trained on if None.
        """
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(self.tokens / (self.rows * context_length))
        assert self.epochs is not None
        return math.ceil(self.epochs * rows / (pool or self.rows))


class EvaluationSettings(Settings):
    """Validation: the objective's figures (loss, perplexity and bits per byte; of masked tokens
    loss and accuracy; a classification's scores; of sft loss, perplexity, right answers) of every
    source. Always done at the end."""

    every: Count | None = None
    """Steps between two evaluations; left out, only at the end."""
    patience: Count | None = None
    """The run ends early after this many evaluations in a row without a lower validation loss than
    before; left out, never. With it the step of every lowest loss is saved."""
    micro_batch: Rows | None = None
    """Rows that one process runs at once; left out, as in training."""
    prompts: list[str] = []
    """Texts to continue at every evaluation, with the sampling of `generation` and fixed noise."""
    samples: int = Field(default=2, ge=0, le=100_000)
    """Without `prompts`: how many validation rows' first tokens are continued instead; 0: none.
    Only objectives of a causal language model continue text. `sft` answers instead, greedily: each
    prompt as a user's turn, or so many held-out examples."""
    sample_tokens: Rows = 32
    """Tokens generated at most for each of them; of a held-out example as many as its reference
    has, and a few more."""
    answers: int = Field(default=0, ge=0, le=100_000)
    """How many held-out examples of each source are answered greedily at every evaluation; the
    share of them whose answer is the reference is `exact_match`. For `sft` alone."""
    tasks: list[str] = []
    """lm-eval's tasks that the weights, and their moving average, are scored on: names, YAML files,
    or directories of them. For causal language models alone; needs `llmnorm[eval]`."""
    tasks_every: Count | None = None
    """Steps between two scorings, a multiple of `every`; left out, with every evaluation. Always
    done at the end."""
    tasks_limit: Count | None = None
    """How many examples of every task are scored at most; left out, all."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluationSettings":
        if self.patience is not None and self.every is None:
            raise ValueError(
                f"evaluation.patience {self.patience} counts evaluations, and there is only the "
                "one at the end; give evaluation.every"
            )
        for key in ("tasks_every", "tasks_limit"):
            if getattr(self, key) is not None and not self.tasks:
                raise ValueError(f"evaluation.{key}: there are no evaluation.tasks; leave it out")
        if self.tasks_every is not None and (
            self.every is None or self.tasks_every % self.every != 0
        ):
            raise ValueError(
                f"evaluation.tasks_every {self.tasks_every} is no multiple of evaluation.every "
                f"{self.every or '(not given)'}: tasks are scored at evaluations"
            )
        return self


class CheckpointSettings(Settings):
    """Checkpoints of a run. One is always written at the end, and when a signal or a PREEMPT file
    stops it."""

    every: Count | None = None
    """Steps between two checkpoints; left out, only at the end."""
    keep: int = Field(default=2, ge=2, le=10**12)
    """How many of the newest are kept."""
    keep_every: Count | None = None
    """Checkpoints of steps that this divides are never removed."""
    keep_best: bool = True
    """Keep the one with the lowest validation loss too."""
    asynchronous: bool = False
    """Copy the state and write it in the background while training goes on."""
    local: LocalPath | None = None
    """Where a run works whose `run_dir` is an address; left out, `runs/<its last name>`."""
    grace: Annotated[float, Field(gt=0, le=10**6)] = 25.0
    """Seconds that a stopped run has for its last step and checkpoint; then it ends without them.
    torchrun and accelerate kill 30 seconds after they were told to stop. Ctrl-C has no limit."""


class ParallelSettings(Settings):
    """How the model is laid out over processes, and the per-block switches."""

    sharding: Literal["auto", "none", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "auto"
    """`auto`: what the launch file asks for; `none`: one process; `ddp`: every process holds the
    whole model; `fsdp2`: weights, gradients and optimizer state are spread over the processes;
    `hsdp`: spread over groups of processes that hold the same; `zero1` to `zero3`: DeepSpeed."""
    replicas: Annotated[int, Field(ge=1, le=2**20)] = 1
    """How many groups of processes hold the whole model each; more than 1 makes `fsdp2` `hsdp`."""
    exchange: Literal["fp32", "bf16"] = "fp32"
    """Numbers in which gradients and updates of matrix optimizers travel between processes; `fp32`
    computes what one process would, `bf16` is half the traffic."""
    compile: bool = False
    """torch.compile every block (wants a C++ compiler on a CPU)."""
    activation_checkpointing: bool = False
    """Keep only each block's input and recompute the rest in the backward pass."""
    timeout: Annotated[float, Field(ge=1, le=1e7)] = 100.0
    """Seconds without progress (a micro-batch, a file, a token), or without a sign of life, after
    which a process is lost; all others end and name it."""
    timeout_first: Annotated[float, Field(ge=1, le=1e7)] = 1800.0
    """The same for progress until the first step, where blocks are compiled, and at the end."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelSettings":
        if self.timeout_first < self.timeout:
            raise ValueError(f"parallel.timeout_first is less than parallel.timeout {self.timeout}")
        if self.sharding == "hsdp" and self.replicas == 1:
            raise ValueError("parallel.sharding 'hsdp' needs parallel.replicas; 1 is 'fsdp2'")
        if self.replicas > 1 and self.sharding not in ("auto", "fsdp2", "hsdp"):
            raise ValueError(
                f"parallel.replicas {self.replicas} has no meaning for parallel.sharding "
                f"'{self.sharding}'; valid: fsdp2, hsdp"
            )
        return self


class LoggingSettings(Settings):
    """What a run writes down, and which trackers (accelerate's) it is shown in."""

    every: Count = 1
    """Steps between two lines of metrics.jsonl."""
    health_every: Count | None = None
    """Steps between two lines that hold the mixers' health too (entropies, denominators, decays),
    or of transformers' mixtures the load of every expert; measured by one more forward pass over a
    micro-batch; left out, never."""
    trackers: list[Tracker] = []
    """Trackers beside metrics.jsonl; `llmnorm[track]` brings tensorboard, wandb and trackio."""
    project: str = "llmnorm"
    """What the trackers file the run under."""
    name: str | None = None
    """What the trackers call the run; left out, the name of the run directory."""


class RunModelSettings(ModelSettings):
    """The model of a run; its settings are given, or brought by a directory of weights."""

    pretrained: LocalPath | None = None
    """Start from the weights in this directory with a new optimizer: a run (its newest checkpoint),
    RUN/checkpoints/step_N, an exported model, or any causal language model of transformers with
    safetensors files. It brings the model's settings (beside it only dropout,
    max_position_embeddings and export_as may be given) and, where the file has no `tokenizer`
    section, its tokenizer."""
    classes: Literal["auto", "own", "transformers"] = "auto"
    """Whose class the model of a stock directory is: llmnorm's `own` (Llama, Mistral, Qwen2 and
    Qwen3: faster, with all parts), or the one that `transformers` has for it, whose configuration
    nothing here changes. `auto`: our own where it fits."""
    trust_remote_code: bool = False
    """Run the code that lies in the directory of a class that transformers does not have."""
    dropout: Share | Literal["config"] = 0.0  # type: ignore[assignment]
    """Share of each mixer's and MLP's output that is dropped in training. Of a class of
    transformers 0 or `config`: dropout and router noise as its config.json has them."""
    router_loss: Literal["auto", "off"] | Annotated[float, Field(gt=0, le=1000)] = "auto"
    """What the balancing loss of a mixture of experts is multiplied by (of a class of
    transformers). `auto`: the class's own coefficient where its config.json says
    `output_router_logits: true`, which few do; else `off`. A run's loss is logged without it."""
    quantize: Literal["nf4"] | None = None
    """`nf4`: store the linear layers of the blocks in 4 bits beside an adapter (QLoRA: Dettmers et
    al. 2023, arXiv 2305.14314); one process, needs `llmnorm[quant]`. Left out, weights that are not
    trained are stored in the dtype of the products."""

    @property
    def foreign(self) -> bool:
        """Whether the model is of a class of transformers."""
        return self.classes == "transformers"


class RunConfig(Settings):
    """The whole of a run."""

    run_dir: Place | None = None
    """Where the run lives, or the address (`s3://bucket/run`) that it is copied up to; left out,
    `runs/<name of the configuration file>`."""
    seed: Seed = 0
    """Seed of the initial weights and of all randomness in training."""
    imports: list[str] = []
    """Modules of your own, e.g. `[my_package.my_norm]`, that are imported once all settings are
    valid; needed where the weights of `model.pretrained` name a class outside llmnorm."""
    data: DataSettings
    """The corpus and the rows made of it."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """Text to tokens."""
    model: RunModelSettings = RunModelSettings()
    """The transformer."""
    objective: Objective = CausalLMSettings()
    """What is learned from the rows."""
    adapter: Adapter = NoAdapterSettings()
    """What is trained beside the weights of `model.pretrained`, which then stay as they are."""
    optimizer: Optimizer = AdamWSettings()
    """The update rule."""
    schedule: Schedule = CosineSettings()
    """The learning rate's course."""
    training: TrainingSettings
    """Length, batch and arithmetic."""
    selection: Selection = NoSelectionSettings()
    """Which rows of a larger pool are trained on."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Validation."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """What is saved when."""
    parallel: ParallelSettings = ParallelSettings()
    """Processes and per-block switches."""
    logging: LoggingSettings = LoggingSettings()
    """Metrics."""
    generation: GenerationSettings = GenerationSettings()
    """Sampling."""
    serving: ServingSettings = ServingSettings()
    """The HTTP server."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.data.context_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.context_length {self.data.context_length} is more than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        warmup, steps = getattr(self.schedule, "warmup", 0), self.training.steps
        if steps is not None and warmup >= max(steps, 2):
            raise ValueError(f"schedule.warmup {warmup} is not less than training.steps {steps}")
        decay = getattr(self.schedule, "decay", 0)
        if steps is not None and decay >= max(steps, 2):
            raise ValueError(
                f"schedule.decay {decay} is not less than training.steps {steps}; give fewer "
                "steps, or a share"
            )
        if getattr(self.objective, "even_batches", True):
            self.training.check_micro_batch()
        if self.evaluation.answers and not getattr(self.objective, "answers", False):
            name = getattr(self.objective, "name", "this objective")
            raise ValueError(
                f"evaluation.answers: the rows of '{name}' have no answers; leave it out"
            )
        architecture = getattr(self.objective, "architecture", "LlmNormForCausalLM")
        if self.evaluation.tasks and architecture != "LlmNormForCausalLM":
            raise ValueError(
                "evaluation.tasks: lm-eval's tasks ask for a causal language model, and this "
                f"objective trains a {architecture}; leave it out"
            )
        loaded = all(isinstance(mixer, MixerSettings) for mixer in self.model.mixers())
        if loaded and isinstance(self.objective, ObjectiveSettings):
            why = self.objective.refusal(self)
            if why is not None:
                raise ValueError(why)
        if isinstance(self.adapter, AdapterSettings):
            why = self.adapter.refusal(self) or frozen_refusal(self)
            if why is not None:
                raise ValueError(why)
        if isinstance(self.selection, SelectionSettings):
            why = self.selection.refusal(self)
            if why is not None:
                raise ValueError(why)
        if (why := foreign_refusal(self)) is not None:
            raise ValueError(why)
        return self

    @property
    def pool(self) -> int:
        """Rows read a step: those of a selection's pool, else those trained on."""
        selection = self.selection
        return selection.pool if isinstance(selection, SelectionSettings) else self.training.rows

    def total_steps(self, rows: int) -> int:
        """The length in global batches, for so many training rows."""
        return self.training.total_steps(rows, self.data.context_length, self.pool)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained."""
        return not isinstance(self.adapter, NoAdapterSettings)

    @property
    def trainable(self) -> str:
        """What is trained of the model: `all`, `norms` or `adapter`."""
        return self.training.trainable or ("adapter" if self.has_adapter else "all")

    @property
    def freezes(self) -> bool:
        """Whether weights of `model.pretrained` stay as they are; then the run needs them."""
        return self.trainable != "all"

    def automatic(self) -> list[str]:
        """The keys that are `auto` and become numbers before a run begins."""
        values = {
            "optimizer.lr": getattr(self.optimizer, "lr", None),
            "training.global_batch": self.training.global_batch,
        }
        return [key for key, value in values.items() if value == "auto"]

    @property
    def data_seed(self) -> int:
        """Seed of the order of the rows."""
        return self.seed if self.data.seed is None else self.data.seed
