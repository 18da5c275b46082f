"""Settings of the objectives: the registry of `objective`, what a run learns from its rows.

Each settings class names the model class that its objective trains (`architecture`), refuses
configurations that it cannot serve, and builds the objective (a file of this directory). Training
and evaluation use only the interface in contract.py.
"""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmnorm.config.values import LocalPath
from llmnorm.nn.settings import ModelSettings
from llmnorm.part import InputError, Part, Settings, part_name

if TYPE_CHECKING:
    from llmnorm.config.tree import RunConfig
    from llmnorm.data.settings import TrainedOn
    from llmnorm.objectives.causal_lm import CausalLM
    from llmnorm.objectives.classification import Classification
    from llmnorm.objectives.contract import Objective as Learned
    from llmnorm.objectives.contract import Preparation
    from llmnorm.objectives.distill import Distill
    from llmnorm.objectives.masked_lm import MaskedLM
    from llmnorm.objectives.sft import SFT

Share = Annotated[float, Field(ge=0, le=1)]


class ObjectiveSettings(Settings):
    """What is known of an objective before torch is loaded."""

    architecture: ClassVar[str]
    """The name of the model class that it trains."""
    keeps_head: ClassVar[bool] = True
    """Whether it trains the head of a pretrained model of that class further; else a new one."""
    packs: ClassVar[bool] = True
    """Whether `llmnorm data` prepares its rows: of packed text, or of conversations."""
    even_batches: ClassVar[bool] = True
    """Whether a step's rows are cut into equal parts: `training.micro_batch` and the number of
    processes must divide `training.global_batch`."""
    full_rows: ClassVar[bool] = True
    """Whether every row has `data.context_length` tokens; else the prepared data, where there are
    any, say how many an average one has (`row_tokens`)."""
    selects: ClassVar[bool] = False
    """Whether its rows can be read by their numbers, for `selection`."""
    foreign: ClassVar[bool] = False
    """Whether it can train a causal language model of a class of transformers."""
    answers: ClassVar[bool] = False
    """Whether its held-out examples have answers, for `evaluation.answers`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "architecture"):
            raise InputError(
                f"objective {cls.__name__}: has no `architecture`, the name of the model class "
                'that it trains, e.g. architecture = "LlmNormForCausalLM"'
            )

    def refusal(self, config: "RunConfig") -> str | None:
        """Why a run with this configuration cannot have the objective; None if it can."""
        return None

    @property
    def teacher_directory(self) -> Path | None:
        """Where the frozen model lies that is learned from; None: there is none."""
        return None

    def uses(self, run: str) -> str:
        """What to type next with a trained run at this path: a line."""
        return f"evaluate it:   llmnorm eval {run}"

    def preparation(self, config: "RunConfig") -> "Preparation[Any] | None":
        """How the run's data are prepared, which `llmnorm data` does; None: nothing is."""
        if not self.packs:
            return None
        from llmnorm.objectives.packed_text import preparation

        return preparation(config)

    @abstractmethod
    def build(
        self,
        config: "RunConfig",
        *,
        alone: bool,
        command: str,
        trained_on: "TrainedOn | None" = None,
    ) -> "Learned":
        """The objective on the run's data.

        Args:
            config: the run's settings.
            alone: whether this is the only process; it then prepares data that are missing.
            command: the command that prepares the data, for messages.
            trained_on: the data of a run that goes on; packed text may be without its corpus then.
        """


class CausalLMSettings(ObjectiveSettings):
    """The next token, from those before it."""

    name: Literal["causal_lm"] = "causal_lm"
    architecture = "LlmNormForCausalLM"
    foreign = True
    selects = True

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse mixers that look at later tokens, and names of a conversation's fields."""
        if config.model.causal:
            return _conversations(config, self.name)
        return (
            f"model.mixer '{_first_mixer(config.model)}' looks at later tokens and cannot serve a "
            "causal language model; `objective: masked_lm` can have it"
        )

    def uses(self, run: str) -> str:
        """What to type next with a trained run at this path: a line."""
        return f"generate text: llmnorm generate {run} --prompt 'Once upon a time'"

    def build(
        self,
        config: "RunConfig",
        *,
        alone: bool,
        command: str,
        trained_on: "TrainedOn | None" = None,
    ) -> "CausalLM":
        """The objective on the run's data."""
        from llmnorm.objectives.causal_lm import CausalLM

        return CausalLM(config, alone=alone, command=command, trained_on=trained_on)


class MaskedLMSettings(ObjectiveSettings):
    """Masked tokens, from those on both sides (Devlin et al. 2019, BERT, arXiv 1810.04805); for
    encoders."""

    name: Literal["masked_lm"] = "masked_lm"
    architecture = "LlmNormForMaskedLM"
    mask_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the tokens that is masked in training."""
    evaluation_mask_share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """The same in evaluation, where the masks are the same every time and in every run."""
    random: Share = 0.1
    """Share of the masked tokens that become a random one instead of the mask."""
    kept: Share = 0.1
    """Share of the masked tokens that stay as they are."""

    @model_validator(mode="after")
    def _shares(self) -> "MaskedLMSettings":
        if self.random + self.kept > 1:
            raise ValueError(f"random {self.random} and kept {self.kept} are more than 1 together")
        return self

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse mixers that see one side only, a tokenizer without a mask token, prompts."""
        if config.model.causal:
            return (
                f"model.mixer '{_first_mixer(config.model)}' sees no later tokens and would fill a "
                "gap from one side; masked_lm wants model.mixer.bidirectional=true, or hydra"
            )
        if config.tokenizer.path is None and not config.tokenizer.mask:
            return "objective 'masked_lm' needs a mask token; add tokenizer.mask=true"
        if config.evaluation.prompts:
            return "evaluation.prompts are continued, which 'masked_lm' cannot; leave them out"
        return _conversations(config, self.name)

    def uses(self, run: str) -> str:
        """What to type next with a trained run at this path: a line."""
        return f"fine-tune it:  objective.name=classification model.pretrained={run}"

    def build(
        self,
        config: "RunConfig",
        *,
        alone: bool,
        command: str,
        trained_on: "TrainedOn | None" = None,
    ) -> "MaskedLM":
        """The objective on the run's data."""
        from llmnorm.objectives.masked_lm import MaskedLM

        return MaskedLM(config, self, alone=alone, command=command, trained_on=trained_on)


class ClassificationSettings(ObjectiveSettings):
    """The class of a text or of a pair of texts, or a number for it: fine-tuning on labelled files
    (Devlin et al. 2019, BERT, arXiv 1810.04805, section 4.1)."""

    name: Literal["classification"] = "classification"
    architecture = "LlmNormForSequenceClassification"
    keeps_head = False
    packs = False
    full_rows = False
    train: LocalPath
    """The examples to train on: .jsonl, .json, .csv or .tsv with a line of names."""
    validation: LocalPath
    """The examples to evaluate on."""
    text_field: str = "sentence"
    """The field of an example that holds the text."""
    pair_field: str | None = None
    """The field of the second text, where examples are pairs."""
    label_field: str = "label"
    """The field of the label."""
    labels: list[str] | None = None
    """The classes in their order; left out, those of `train`, sorted."""
    regression: bool = False
    """Labels are numbers to be met, by the squared error, and no classes."""

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse settings of packed text, and labels that are not at least two classes."""
        if self.regression and self.labels is not None:
            return "objective.labels are of classes; a regression has none"
        if self.labels is not None and len(set(self.labels)) != max(2, len(self.labels)):
            return "objective.labels must be at least two, each given once"
        for name, field in type(config.data).model_fields.items():
            given = getattr(config.data, name) != field.default
            if given and name not in ("context_length", "seed"):
                return f"data.{name}: a classification reads objective.train; leave it out"
        if config.evaluation.prompts:
            return "evaluation.prompts are continued, which 'classification' cannot; leave them out"
        return None

    def uses(self, run: str) -> str:
        """What to type next with a trained run at this path: a line."""
        return f"use elsewhere: llmnorm export {run} DIR"

    def build(
        self,
        config: "RunConfig",
        *,
        alone: bool,
        command: str,
        trained_on: "TrainedOn | None" = None,
    ) -> "Classification":
        """The objective on its files."""
        from llmnorm.objectives.classification import Classification

        return Classification(config, self)


class SFTSettings(ObjectiveSettings):
    """The answers of conversations, or other trained tokens of examples: supervised fine-tuning
    (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

    A row of the run is an example; `training.micro_batch` counts rows of `data.context_length`
    tokens, into which the examples of a step are laid."""

    name: Literal["sft"] = "sft"
    architecture = "LlmNormForCausalLM"
    even_batches = False
    full_rows = False
    foreign = True
    selects = True
    answers = True
    too_long: Literal["truncate", "drop"] = "truncate"
    """What is done with a conversation longer than `data.context_length`: cut off its end, or leave
    it out. Texts are cut into rows. What has no trained token left is left out and counted."""

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse mixers that look at later tokens, and lengths in tokens of rows."""
        if not config.model.causal:
            return (
                f"model.mixer '{_first_mixer(config.model)}' looks at later tokens and cannot "
                "answer; 'sft' trains a causal language model"
            )
        if config.training.tokens is not None:
            return (
                "training.tokens counts rows that are full, and rows of 'sft' are examples; give "
                "training.epochs or training.steps"
            )
        for number, stage in enumerate(config.data.stages or ()):
            if stage.tokens is not None:
                return (
                    f"data.stages.{number}.tokens counts rows that are full, and rows of 'sft' are "
                    "examples; give 'rows' or 'until'"
                )
        if automatic := config.automatic():
            return (
                f"{automatic[0]}: auto: the Step Law is one of pretraining and says nothing about "
                "'sft'; give a number"
            )
        return None

    def uses(self, run: str) -> str:
        """What to type next with a trained run at this path: a line."""
        return f"ask it:        llmnorm generate {run} --user 'A question'"

    def preparation(self, config: "RunConfig") -> "Preparation[Any]":
        """How the run's conversations are prepared."""
        from llmnorm.objectives.sft import preparation

        return preparation(config, self)

    def build(
        self,
        config: "RunConfig",
        *,
        alone: bool,
        command: str,
        trained_on: "TrainedOn | None" = None,
    ) -> "SFT":
        """The objective on the run's conversations."""
        from llmnorm.objectives.sft import SFT

        return SFT.on_disk(config, self, alone=alone, command=command, trained_on=trained_on)


class DistillSettings(ObjectiveSettings):
    """The next token as a trained model expects it: distillation (Hinton et al. 2015,
    arXiv 1503.02531), e.g. of a draft for speculative decoding (DistillSpec: Zhou et al. 2023,
    arXiv 2310.08461)."""

    name: Literal["distill"] = "distill"
    architecture = "LlmNormForCausalLM"
    teacher: LocalPath
    """The model that is learned from, of the same tokens: a run (its newest checkpoint),
    RUN/checkpoints/step_N, an exported model, or a Llama, Mistral, Qwen2 or Qwen3 with safetensors
    files. Every process holds it whole, and it stays as it is."""

    @property
    def teacher_directory(self) -> Path:
        """Where the teacher lies."""
        return self.teacher

    def refusal(self, config: "RunConfig") -> str | None:
        """Refuse mixers that look at later tokens, conversations, and what changes the loss."""
        if not config.model.causal:
            return (
                f"model.mixer '{_first_mixer(config.model)}' looks at later tokens and cannot "
                "learn the next token; 'distill' trains a causal language model"
            )
        if "lm_head" in getattr(config.adapter, "targets", ()):
            return (
                "adapter.targets: 'distill' computes its loss from the head's weight, which an "
                "adapter stands around; leave lm_head out"
            )
        if automatic := config.automatic():
            return (
                f"{automatic[0]}: auto: the Step Law is one of pretraining and says nothing about "
                "'distill'; give a number"
            )
        return _conversations(config, self.name)

    def uses(self, run: str) -> str:
        """What to type next with a trained run at this path: a line."""
        return f"draft with it: llmnorm generate {self.teacher} --draft {run}"

    def build(
        self,
        config: "RunConfig",
        *,
        alone: bool,
        command: str,
        trained_on: "TrainedOn | None" = None,
    ) -> "Distill":
        """The objective on the run's data, without its teacher's weights."""
        from llmnorm.objectives.distill import Distill

        return Distill(config, self, alone=alone, command=command, trained_on=trained_on)


# `llmnorm eval` of an exported model takes the first with the model's architecture.
Objective = Annotated[
    CausalLMSettings | MaskedLMSettings | ClassificationSettings | SFTSettings | DistillSettings,
    Part(ObjectiveSettings, default="causal_lm"),
]


def _conversations(config: "RunConfig", name: str) -> str | None:
    """Why an objective that reads text cannot have the sources; None if it can."""
    sources = config.data.sources if isinstance(config.data.sources, list) else []
    for number, source in enumerate(sources):
        if source.fields is not None:
            return (
                f"data.sources.{number}.fields names fields of conversations, which '{name}' does "
                "not read; leave it out, or choose objective sft"
            )
    return None


def _first_mixer(model: ModelSettings) -> str:
    return part_name(type(model.mixers()[0]))
