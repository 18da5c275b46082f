"""Settings of the data room: where text comes from and how it becomes tokens.

Imports only the standard library, pydantic and the ground floor, so that a mistake in a
configuration is answered before torch is loaded.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from llmnorm.config.shipped import locate
from llmnorm.config.values import Count, LocalPath, LocalText, Place, PlaceText, Seed
from llmnorm.part import InputError, Settings, nearest

# Version of the rules by which sources and settings become tokens; raised when they would give
# others. Format 1 held 32 kB of the smallest sources out, trained on documents that another source
# held out, trained its tokenizer on words of any length, and cut long documents where a word ends,
# with whatever tokenizer. Data of an older format is still made for runs that began with it.
FORMAT = 2
FORMATS = (FORMAT, 1)
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
MASK_TOKEN = "<|mask|>"
CHAT_TEMPLATE = "chat_template.jinja"
# The files of a tokenizer; weights and other files beside them are not copied.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
)
# Names of a record's fields (data/messages.py); `fields` of a source gives others.
FIELDS = ("messages", "prompt", "completion", "tools", "role", "content", "system", "input")
PRESETS = {
    "sharegpt": {
        "messages": "conversations",
        "role": "from",
        "content": "value",
        "system": "system",
    },
    "alpaca": {
        "prompt": "instruction",
        "input": "input",
        "completion": "output",
        "system": "system",
    },
}
# Keys of a tokenizer's section that say how it is used, beside one that a model brings.
OF_TEMPLATE = ("chat_template", "template_arguments")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class SourceSettings(Settings):
    """A named corpus in the mixture: files (`path`) or a Hugging Face dataset (`dataset`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """What the source is called in metrics and plots: letters, digits, `_`, `-` and `.`."""
    path: PlaceText | None = None
    """A file or a glob (`**` allowed) of .txt (a file is a document), .jsonl, .parquet or .arrow (a
    record is); .txt and .jsonl may end in .gz or .zst. Relative to the working directory;
    `llmnorm:NAME` is a file that the package brings. Or an address of such files in a store
    (`s3://bucket/text/*.jsonl`; needs `llmnorm[remote]`), which are fetched once."""
    dataset: LocalText | None = None
    """Instead of `path`: a dataset's name on the Hugging Face hub (streamed while preparing), or a
    local directory that `datasets` saved or can load."""
    subset: str | None = None
    """The dataset's configuration name, for datasets that have several."""
    split: str = "train"
    """Which split of the dataset is read."""
    text_field: str = "text"
    """The field of a record that holds the text."""
    fields: str | dict[str, str] | None = None
    """Of conversations (objective `sft`): names of a record's fields where they are not `messages`,
    `prompt`, `completion`, `tools`, or of a message's where they are not `role` and `content`, e.g.
    `{messages: dialogue}`; or `sharegpt` or `alpaca` for all of theirs. `system` and `input` name
    fields that hold a system message, and what is put behind a prompt."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What is done with a record that cannot be read (no JSON, not UTF-8, no text in its field):
    `error` stops at the first one, `skip` leaves them out, counts them and names the first."""
    weight: int | None = Field(default=None, ge=1, lt=2**31)
    """Share of this source among all rows, as a whole number beside the other sources' weights;
    left out by all sources: their numbers of rows, so that an epoch shows every row once."""
    validation: PlaceText | None = None
    """File, glob or address of the source's own validation text; left out: 2 % of the source is
    held out."""

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, fields: str | dict[str, str] | None) -> str | dict[str, str] | None:
        if isinstance(fields, str) and fields not in PRESETS:
            raise ValueError(f"'{fields}' is no preset; {nearest(fields, list(PRESETS))}")
        for name in fields if isinstance(fields, dict) else ():
            if name not in FIELDS:
                raise ValueError(f"'{name}' is not known; {nearest(name, list(FIELDS))}")
        return fields

    @model_validator(mode="after")
    def _path_or_dataset(self) -> "SourceSettings":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("exactly one of 'path' and 'dataset' must be given")
        if self.subset is not None and self.dataset is None:
            raise ValueError("'subset' belongs to 'dataset', not to 'path'")
        return self


Weights = dict[str, Annotated[int, Field(ge=1, lt=2**31)]]
"""Whole numbers by the names of sources."""


class StageSettings(Settings):
    """A stretch of the run with a mixture of its own. All but the last say where they end, by one
    of `until`, `rows` and `tokens`."""

    until: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Where it ends: a share of the run's length, e.g. 0.8; that of a whole step."""
    rows: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Where it ends: so many rows after the run's first (of `sft` examples)."""
    tokens: Annotated[int, Field(ge=1, le=10**18)] | None = None
    """Where it ends: so many tokens after the run's first, rounded up to whole global batches."""
    weights: Weights | None = None
    """Weights by the names of sources; a source that is not named gives no row of this stage. Left
    out: the weights that all sources have without stages."""

    @property
    def ends(self) -> list[str]:
        """The keys that say where it ends."""
        return [key for key in ("until", "rows", "tokens") if getattr(self, key) is not None]


class DataSettings(Settings):
    """What the run reads."""

    sources: Literal["default"] | list[SourceSettings] = "default"
    """The corpora of the mixture; `default`: the six small corpora that `llmnorm data` fetches."""
    weights: Weights | None = None
    """Weights of all sources by their names, e.g. `{books: 3, web: 1}`, also of `default`; they are
    used in the place of the sources' own. Nothing is prepared anew for them."""
    stages: list[StageSettings] | None = None
    """Mixtures that follow each other along the run, e.g. `[{until: 0.8, weights: {web: 8, code:
    2}}, {weights: {books: 5, code: 5}}]`. A source goes on in a stage with the row that it would
    have given next. `train RUN data.stages=...` may change what lies ahead of a run."""
    context_length: int = Field(default=1024, ge=2, le=2**24)
    """Labels in a row; a row holds one token more."""
    validation_bytes: Count = 4_000_000
    """At most this much text of each source is held out for validation."""
    seed: Seed | None = None
    """Seed of the order of rows; left out: the run's seed."""
    dir: Place = Path("data")
    """Where the default corpus and the tokens are kept, relative to the working directory; or the
    address of a store (`s3://bucket/data`; needs `llmnorm[remote]`) through which machines share
    the tokens."""
    local: LocalPath | None = None
    """Where this machine keeps what it has prepared or fetched where `dir` is an address; left out,
    `data`."""
    processes: int | None = Field(default=None, ge=1, le=4096)
    """How many texts are tokenised at once; left out: one a core."""

    @property
    def directory(self) -> Path:
        """Where the data are on this machine."""
        return self.dir if isinstance(self.dir, Path) else self.local or Path("data")

    @field_validator("sources")
    @classmethod
    def _sources_agree(cls, sources: str | list[SourceSettings]) -> str | list[SourceSettings]:
        if isinstance(sources, str):
            return sources
        if not sources:
            raise ValueError("the list is empty; name a source, or write 'default'")
        names = [source.name for source in sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are called '{repeated[0]}'; names must differ")
        if missing := [source.name for source in sources if source.weight is None]:
            if len(missing) < len(sources):
                raise ValueError(f"'{missing[0]}' has no weight; give all sources one, or none")
        elif sum(source.weight or 0 for source in sources) >= 2**31:
            raise ValueError("the weights must sum to less than 2147483648 (2**31)")
        return sources

    @model_validator(mode="after")
    def _local_belongs_to_an_address(self) -> "DataSettings":
        if self.local is not None and isinstance(self.dir, Path):
            raise ValueError(
                f"'local' is for a 'dir' that is an address (s3://bucket/data), and 'dir' is "
                f"{self.dir}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _weights_agree(self) -> "DataSettings":
        if self.stages is not None:
            _check_ends(self.stages)
            if self.weights is not None and all(stage.weights for stage in self.stages):
                raise InputError(
                    "data.weights: would not be used, since all of data.stages have weights; "
                    "leave it out"
                )
        if isinstance(self.sources, list):
            self.weighted(self.sources)
        return self

    def weighted(self, sources: list[SourceSettings]) -> list[SourceSettings]:
        """The sources of the run with their weights.

        Args:
            sources: those of `sources`, or of the default corpus.

        Raises:
            InputError: `weights` names what is no source, or not all sources; or a stage names
                what is no source.
        """
        names = [source.name for source in sources]
        for number, stage in enumerate(self.stages or ()):
            _check_weights(f"data.stages.{number}.weights", stage.weights, names)
        if self.weights is None:
            return sources
        _check_weights("data.weights", self.weights, names)
        if missing := [name for name in names if name not in self.weights]:
            raise InputError(
                f"data.weights: '{missing[0]}' has no weight; give all sources one, or leave "
                "data.weights out"
            )
        return [s.model_copy(update={"weight": self.weights[s.name]}) for s in sources]


def _check_ends(stages: list[StageSettings]) -> None:
    """Refuse stages that do not end, or do not follow each other as far as their keys tell."""
    if not stages:
        raise InputError("data.stages: is empty; give at least one stage, or leave the key out")
    for number, stage in enumerate(stages[:-1]):
        if not stage.ends:
            raise InputError(
                f"data.stages.{number}: does not end; give it 'until' (a share of the run, e.g. "
                "0.8), 'rows' or 'tokens'; only the last stage lasts to the end of the run"
            )
        if len(stage.ends) > 1:
            raise InputError(
                f"data.stages.{number}: has {' and '.join(stage.ends)}; give one of them"
            )
    if stages[-1].ends:
        raise InputError(
            f"data.stages.{len(stages) - 1}: is the last and has '{stages[-1].ends[0]}', but it "
            "lasts to the end of the run; leave the key out, or add the stage that follows"
        )
    for number, (one, two) in enumerate(zip(stages, stages[1:-1], strict=False)):
        (key,) = one.ends
        before, end = getattr(one, key), getattr(two, key)
        if end is not None and end <= before:
            raise InputError(
                f"data.stages.{number + 1}.{key}: {end} is not behind {before}, where the stage "
                "before it ends"
            )


def _check_weights(key: str, weights: Weights | None, names: list[str]) -> None:
    """Refuse weights of what is no source, and sums that the order of rows cannot hold."""
    if weights is None:
        return
    if not weights:
        raise InputError(f"{key}: names no source; give at least one a weight, or leave it out")
    for name in weights:
        if name not in names:
            raise InputError(f"{key}: no source is called '{name}'; {nearest(name, names)}")
    if sum(weights.values()) >= 2**31:
        raise InputError(f"{key}: must sum to less than 2147483648 (2**31)")


class TokenizerSettings(Settings):
    """How text becomes tokens: a byte-level BPE trained on the sources, or one that exists."""

    vocab_size: int = Field(default=32768, ge=SMALLEST_VOCABULARY, le=2**24)
    """Tokens of the byte-level BPE that is trained, the three special ones included."""
    path: LocalPath | None = None
    """A local Hugging Face tokenizer directory to use instead of training one."""
    train_bytes: Count = 32_000_000
    """At most this much text, shared evenly by the sources, is read to train the BPE."""
    mask: bool = False
    """A fourth special token, `<|mask|>`, which the objective `masked_lm` needs."""
    chat_template: LocalPath | None = None
    """How messages become one text: `chatml`, or a file with a Jinja template; left out, the
    tokenizer's own template. It is kept with the run's tokenizer and exported. Special tokens that
    it writes (`<|im_end|>`) and the tokenizer lacks are added."""
    template_arguments: dict[str, bool | int | float | str] = {}
    """Values that the template is given, e.g. `{enable_thinking: false}`; they become its defaults
    in the run's tokenizer and its exports."""

    @field_validator("template_arguments")
    @classmethod
    def _are_names(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments:
            if not name.isidentifier():
                raise ValueError(f"'{name}' is no name of a template's variable")
        return arguments

    @property
    def directory(self) -> Path | None:
        """`path` as a directory of this machine; None where a BPE is trained.

        Raises:
            InputError: `path` is `llmnorm:NAME` and the package has nothing of this name.
        """
        return None if self.path is None else locate(self.path, "tokenizer.path")

    def of_training(self) -> list[str]:
        """The keys that say how a tokenizer is trained and are not at their defaults."""
        fields = type(self).model_fields
        keys = "vocab_size", "train_bytes", "mask"
        return [key for key in keys if getattr(self, key) != fields[key].default]

    @model_validator(mode="after")
    def _train_or_load(self) -> "TokenizerSettings":
        # A run's saved configuration holds every default, so a default counts as left out.
        if self.path is not None and (given := self.of_training()):
            raise ValueError(f"'{given[0]}' belongs to a tokenizer that is trained, not to 'path'")
        if self.mask and self.vocab_size == SMALLEST_VOCABULARY:
            raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY + 1} with a mask")
        return self


class TrainedOn(NamedTuple):
    """The data that a run was trained on.

    Attributes:
        where: the run or checkpoint that says so.
        identity: of the data.
        otherwise: what else can be done where the corpus is another, for the message.
        branch: whether it is the run that this one branches from, so that another corpus will do.
    """

    where: Path
    identity: str
    otherwise: str = "start a new run_dir"
    branch: bool = False


def source_keys(sources: list[SourceSettings]) -> list[str]:
    """The sources' keys: `data.sources.0`."""
    return [f"data.sources.{index}" for index in range(len(sources))]


def source_names(sources: list[SourceSettings]) -> list[str]:
    """What messages about a whole source call it: `data.sources.0 (books)`."""
    return [f"data.sources.{index} ({source.name})" for index, source in enumerate(sources)]
