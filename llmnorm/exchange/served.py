"""A directory of weights as an engine that continues text: target, draft, tokenizer, template.

    target = load_target(path, settings)        a run, an exported or a stock directory
    built = target.build(settings)              an engine, with the draft that the settings name
    target.asker.text("The river")              -> tokens

What is wrong with the settings or the directories is told before weights are read, as far as it can
be told from files of JSON.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmnorm.checkpoints.format import checksum
from llmnorm.config.generation import GenerationSettings
from llmnorm.config.pretrained import describe, refuse_encoder
from llmnorm.exchange.foreign import is_foreign, load_foreign
from llmnorm.exchange.loading import DTYPES, device_of, load_model, model_of, open_source
from llmnorm.exchange.peft_adapter import with_adapter
from llmnorm.exchange.prompting import Asker
from llmnorm.generation.build import Built, Loaded, engine_of
from llmnorm.generation.prompts import end_tokens
from llmnorm.machine.reading import local_path
from llmnorm.part import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Target(NamedTuple):
    """A model that text is continued by.

    Attributes:
        model: in evaluation mode.
        tokenizer: which begins texts as documents in training began.
        asker: makes tokens of what is asked.
        ends: the model's end tokens.
        identity: tells these weights from others, as a hash of their files.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    asker: Asker
    ends: frozenset[int]
    identity: Callable[[], str]

    @property
    def context(self) -> int:
        """Tokens that a row may have."""
        decoder = self.model.config.get_text_config(decoder=True)
        return int(decoder.max_position_embeddings)

    def build(self, settings: GenerationSettings) -> Built:
        """An engine by these settings; their draft is loaded.

        Raises:
            InputError: the settings, or the draft, cannot be served with this model.
        """
        draft = _draft(settings) if settings.draft not in ("none", "lookup") else None
        return engine_of(self.model, self.tokenizer, settings, self.ends, draft=draft)


def load_target(
    path: Path,
    settings: GenerationSettings,
    *,
    checkpoint: str = "latest",
    ema: bool = False,
    adapter: Path | None = None,
    merge: bool = False,
    key: str = "messages",
) -> Target:
    """The model in a directory, to be served by these settings.

    Args:
        path: a run, an exported or a stock directory, of this package's classes or another decoder.
        settings: its device and dtype.
        checkpoint, ema: of a run, as `open_source`.
        adapter: a PEFT adapter on the model; its tokenizer counts, where it has one.
        merge: add the adapter to the weights, which is faster and rounds once more.
        key: what asked for answers to messages, for errors of the chat template.

    Raises:
        InputError: there is no such model, or text cannot be continued by it.
    """
    if is_foreign(path):
        if adapter or ema or checkpoint != "latest":
            option = "--adapter" if adapter else "--ema" if ema else "--checkpoint"
            raise InputError(
                f"{option}: {path} is a model of transformers that this package does not take as "
                "its own, which is served as it is"
            )
        model, tokenizer = _foreign(path, settings)
        found, identity = path, lambda: _checksums(path)
    else:
        source = open_source(path, checkpoint=checkpoint, ema=ema)
        if adapter and (adapter / "tokenizer.json").is_file():
            source = source._replace(tokenizer=adapter)  # what it was trained with, template too
        model, tokenizer = model_of(source, path, device=settings.device, dtype=settings.dtype)
        if adapter:
            model = _adapted(model, adapter, merge=merge)
        assert source.tokenizer is not None  # or there would be no `tokenizer`
        found = source.tokenizer
        identity = lambda: source.contents() + (_checksums(adapter) if adapter else "")  # noqa: E731
    ends = end_tokens(model.config, tokenizer)
    asker = Asker(tokenizer, found, model.config.get_text_config().vocab_size, key)
    return Target(model, tokenizer, asker, ends, identity)


def _adapted(model: "PreTrainedModel", adapter: Path, *, merge: bool) -> "PreTrainedModel":
    """The model with an adapter's layers in it, or with its matrices added to the weights.

    Raises:
        InputError: as `with_adapter`; or the adapter is no layers, but tokens before the prompt.
    """
    peft = with_adapter(model, adapter)
    kind = next(iter(peft.peft_config.values()))
    if kind.is_prompt_learning:
        raise InputError(
            f"--adapter: {adapter} is of the kind {kind.peft_type.value}, which puts vectors "
            "before the prompt; adapters of layers (LoRA, DoRA, ...) are served"
        )
    inner: PreTrainedModel = peft.merge_and_unload() if merge else peft.get_base_model()
    return inner


def _draft(settings: GenerationSettings) -> Loaded:
    """The model that `settings.draft` names.

    Raises:
        InputError: there is none; the message names the setting.
    """
    key = "generation.draft"
    try:
        path = local_path(settings.draft)
        if is_foreign(path):
            return _foreign(path, settings)
        refuse_encoder(describe(path, key).architectures, f"{key}: {path}", "tokens are drafted by")
        return load_model(path, device=settings.device, dtype=settings.dtype)
    except ValueError as error:
        text = str(error)
        raise InputError(text if text.startswith(key) else f"{key}: {text}") from None


def _foreign(path: Path, settings: GenerationSettings) -> Loaded:
    """A model of transformers, where the settings want it."""
    model, tokenizer = load_foreign(path)
    model.to(device=device_of(settings.device), dtype=DTYPES.get(settings.dtype))
    return model, tokenizer


def _checksums(directory: Path) -> str:
    """Checksums of a directory's weights."""
    return "".join(checksum(file) for file in sorted(directory.glob("*.safetensors")))
