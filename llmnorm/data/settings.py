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


class DataSettings(Settings):
    """What the run reads."""

    sources: Literal["default"] | list[SourceSettings] = "default"
    """The corpora of the mixture; `default`: the six small corpora that `llmnorm data` fetches."""
    weights: dict[str, Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    """Weights of all sources by their names, e.g. `{books: 3, web: 1}`, also of `default`; they are
    used in the place of the sources' own. Nothing is prepared anew for them."""
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
        if isinstance(self.sources, list):
            self.weighted(self.sources)
        return self

    def weighted(self, sources: list[SourceSettings]) -> list[SourceSettings]:
        """The sources of the run with their weights.

        Args:
            sources: those of `sources`, or of the default corpus.

        Raises:
            InputError: `weights` names what is no source, or not all sources.
        """
        if self.weights is None:
            return sources
        names = [source.name for source in sources]
        for name in self.weights:
            if name not in names:
                raise InputError(
                    f"data.weights: no source is called '{name}'; {nearest(name, names)}"
                )
        if missing := [name for name in names if name not in self.weights]:
            raise InputError(
                f"data.weights: '{missing[0]}' has no weight; give all sources one, or leave "
                "data.weights out"
            )
        if sum(self.weights.values()) >= 2**31:
            raise InputError("data.weights: must sum to less than 2147483648 (2**31)")
        return [s.model_copy(update={"weight": self.weights[s.name]}) for s in sources]


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

    @model_validator(mode="after")
    def _train_or_load(self) -> "TokenizerSettings":
        # A run's saved configuration holds every default, so a default counts as left out.
        fields = type(self).model_fields
        for name in ("vocab_size", "train_bytes", "mask"):
            if self.path is not None and getattr(self, name) != fields[name].default:
                raise ValueError(f"'{name}' belongs to a tokenizer that is trained, not to 'path'")
        if self.mask and self.vocab_size == SMALLEST_VOCABULARY:
            raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY + 1} with a mask")
        return self


class TrainedOn(NamedTuple):
    """The data that a run was trained on.

    Attributes:
        where: the run or checkpoint that says so.
        identity: of the data.
        otherwise: what else can be done where the corpus is another, for the message.
    """

    where: Path
    identity: str
    otherwise: str = "start a new run_dir"


def source_keys(sources: list[SourceSettings]) -> list[str]:
    """The sources' keys: `data.sources.0`."""
    return [f"data.sources.{index}" for index in range(len(sources))]


def source_names(sources: list[SourceSettings]) -> list[str]:
    """What messages about a whole source call it: `data.sources.0 (books)`."""
    return [f"data.sources.{index} ({source.name})" for index, source in enumerate(sources)]
