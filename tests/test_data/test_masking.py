"""Masks: shares, what is never masked, and that a row's number alone decides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from llmnorm.data.masking import Masking
from llmnorm.data.settings import TokenizerSettings
from llmnorm.data.tokenizer import TextEncoder, train

VOCABULARY, MASK, ORDINARY = 1000, 3, list(range(4, 1000))
masking = Masking(VOCABULARY, MASK, ORDINARY, random=0.1, kept=0.1)


def rows(count: int, length: int = 128, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count, length), generator=generator)


def test_the_shares_are_those_asked_for() -> None:
    """Oracle: binomial counts of 128,000 tokens, within 5 standard deviations."""
    ids = rows(1000)
    seen, labels = masking(ids, torch.arange(1000), share=0.3, key=5)
    may = ids >= 4
    masked = labels != -100
    assert torch.equal(labels[masked], ids[masked]) and torch.equal(seen[~masked], ids[~masked])
    assert not masked[~may].any()

    def near(count: int, of: int, share: float) -> bool:
        return abs(count - of * share) < 5 * (of * share * (1 - share)) ** 0.5

    total = int(masked.sum())
    assert near(total, int(may.sum()), 0.3)
    gone, changed = seen == MASK, (seen != ids) & (seen != MASK)
    assert near(int((gone & masked).sum()), total, 0.8)
    assert near(int((changed & masked).sum()), total, 0.1 * (1 - 1 / len(ORDINARY)))
    drawn = seen[changed]
    assert drawn.min() >= 4 and len(drawn.unique()) > 900
    # Neither columns nor neighbours go together: counts a column, and pairs.
    assert abs(masked.double().mean(0) - 0.3 * 0.996).max() < 5 * (0.21 / 1000) ** 0.5
    both = (masked[:, 1:] & masked[:, :-1]).double().mean()
    assert abs(float(both) - 0.09) < 0.005


@given(
    first=st.integers(0, 2**40),
    cut=st.integers(1, 7),
    seed=st.integers(0, 9),
    key=st.integers(0, 2**63),
)
def test_a_row_is_masked_alike_in_any_batch(first: int, cut: int, seed: int, key: int) -> None:
    """Oracle: the rows in one batch, against two batches, against other rows and keys."""
    ids, numbers = rows(8, 16, seed), torch.arange(first, first + 8)
    seen, labels = masking(ids, numbers, share=0.5, key=key)
    for part in (slice(0, cut), slice(cut, 8)):
        one, two = masking(ids[part], numbers[part], share=0.5, key=key)
        assert torch.equal(one, seen[part]) and torch.equal(two, labels[part])
    same = ids[:1].expand(8, -1)
    places = masking(same, numbers, share=0.5, key=key)[1] != -100
    assert len({tuple(row) for row in places.tolist()}) == 8
    other = masking(ids, numbers, share=0.5, key=key + 1)[1]
    assert not torch.equal(other, labels)


def test_all_or_nothing() -> None:
    """Oracle: a share of 1 masks every ordinary token; random and kept of 0 leave the mask only."""
    ids = rows(3)
    plain = Masking(VOCABULARY, MASK, ORDINARY, random=0.0, kept=0.0)
    seen, labels = plain(ids, torch.arange(3), share=1.0, key=0)
    assert torch.equal(labels != -100, ids >= 4) and bool((seen[ids >= 4] == MASK).all())
    kept = Masking(VOCABULARY, MASK, ORDINARY, random=0.0, kept=1.0)
    assert torch.equal(kept(ids, torch.arange(3), share=1.0, key=0)[0], ids)


def test_the_trained_tokenizers_mask(tmp_path) -> None:
    """Oracle: a fourth special token; text that spells it out is text."""
    from transformers import AutoTokenizer

    train(["some words of text"] * 9, 270, tmp_path, mask=True)
    encoder = TextEncoder(tmp_path)
    assert encoder.special == {0, 1, 2, 3} and encoder.mask == 3
    assert encoder.ordinary == list(range(4, encoder.vocab_size))
    assert not set(encoder.encode_alone(["a <|mask|> b"])[0]) & encoder.special
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == 3 and theirs.decode([3], skip_special_tokens=True) == ""
    with pytest.raises(ValueError, match="at least 260 with a mask"):
        TokenizerSettings(vocab_size=259, mask=True)
    with pytest.raises(ValueError, match="'mask' belongs to a tokenizer that is trained"):
        TokenizerSettings(path=tmp_path, mask=True)


def test_berts_tokenizer_stands_for_itself(tmp_path) -> None:
    """Oracle: [CLS] and [SEP] around a document, where there is neither bos nor eos."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]
    tokenizer = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")  # type: ignore[call-arg]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.add_special_tokens(words[:5])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = ("pad", "unk", "cls", "sep", "mask")
    named = ", ".join(f'"{n}_token": "{w}"' for n, w in zip(names, words, strict=False))
    (tmp_path / "tokenizer_config.json").write_text(f"{{{named}}}")
    encoder = TextEncoder(tmp_path)
    assert (encoder.bos, encoder.eos, encoder.pad, encoder.mask) == (2, 3, 0, 4)
    assert encoder.ordinary == [5, 6, 7] and encoder.special == {0, 1, 2, 3, 4}
    (block,) = encoder.encode(["a bc"], 1)
    assert np.array_equal(block.tokens, [2, 5, 6, 7, 3])
