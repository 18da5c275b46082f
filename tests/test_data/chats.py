"""Small tokenizers and chat templates for tests of conversations."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from llmnorm.data.templates import CHATML

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
TWO_TURNS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]
SPECIAL = ["<s>", "</s>", "[UNK]", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIAL += [
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
]
SPECIAL += ["<|end|>", "<|return|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEXT = ["It is 4. 2+2? 3+3? system\n user\n\n assistant\n thoughts final analysis\n"] * 20


def byte_level() -> Tokenizer:
    """As GPT-2's: every text can be spelled."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def metaspace() -> Tokenizer:
    """As Llama 2's: a space is put before the text, and its special tokens swallow spaces."""
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    tree = json.loads(made.to_str())
    for token in tree["added_tokens"][-3:]:
        token["rstrip"] = True
    return Tokenizer.from_str(json.dumps(tree))


def word_pieces() -> Tokenizer:
    """As BERT's: letters are made small, and white space is lost."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return made


def unigram() -> Tokenizer:
    """As T5's."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def save_tokenizer(
    directory: Path,
    template: str | None = "chatml",
    make: Callable[[], Tokenizer] = byte_level,
    **config: str,
) -> Path:
    """Write a tokenizer directory; the tokenizer begins every text with bos of its own accord.

    Args:
        template: `chatml`, the name of a file in tests/data/templates, or None.
        config: more keys of tokenizer_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = make()
    made.add_tokens(["<think>", "</think>"])
    made.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, **config}))
    if template is not None:
        text = CHATML
        if template != "chatml":
            text = (TEMPLATES / f"{template}.jinja").read_text()
        (directory / "chat_template.jinja").write_text(text)
    return directory
