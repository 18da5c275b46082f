"""Text to tokens and back, as vLLM's and llama.cpp's clients ask for it."""

import asyncio
from typing import Any

from llmnorm.part import InputError
from llmnorm.serving.asking import LONG, Model
from llmnorm.serving.fields import DetokenizeFields, TokenizeFields
from llmnorm.serving.refusals import Refusal
from llmnorm.serving.service import of_input


async def tokenize(model: Model, fields: TokenizeFields) -> dict[str, Any]:
    """The tokens of a text, or of messages by the chat template.

    Raises:
        Refusal: there are none.
    """
    model.check_name(fields)

    def make() -> list[int]:
        if fields.messages is not None:
            return model.chat.tokens(fields.messages, {}, answer=fields.add_generation_prompt)
        assert fields.prompt is not None
        if fields.add_special_tokens:
            return model.asker.text(fields.prompt)
        return list(model.tokenizer.encode(fields.prompt, add_special_tokens=False))

    try:
        long = len(fields.prompt or "") > LONG
        ids = await asyncio.to_thread(make) if long else make()
    except InputError as error:
        raise of_input(str(error)) from None
    found = {"tokens": ids, "count": len(ids), "max_model_len": model.context}
    if fields.return_token_strs:
        found["token_strs"] = [model.texts.text(token) for token in ids]
    return found


def detokenize(model: Model, fields: DetokenizeFields) -> dict[str, Any]:
    """The text of tokens, special ones spelled out.

    Raises:
        Refusal: one is none of the model's.
    """
    model.check_name(fields)
    wrong = next((token for token in fields.tokens if token >= model.vocabulary), None)
    if wrong is not None:
        message = f"tokens: {wrong} is none of the model's {model.vocabulary:,} tokens"
        raise Refusal(400, message, "invalid_value", param="tokens")
    return {"prompt": model.decode(fields.tokens, skip_special=False)}


def tokenizer_info(model: Model) -> dict[str, Any]:
    """What lm-eval asks: special tokens as text, and the chat template."""
    tokenizer = model.tokenizer
    return {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template,
        "vocab_size": model.vocabulary,
        "max_model_len": model.context,
    }
