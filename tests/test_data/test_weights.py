"""`data.weights`: another mixture of the same prepared data."""

from pathlib import Path

import numpy as np
import pytest

from llmnorm.config.file import load
from llmnorm.data import default_corpus
from llmnorm.data.prepared import sources_of
from llmnorm.objectives.causal_lm import CausalLM
from llmnorm.part import InputError
from tests.running import SMOKE

NAMED = ["llmnorm:text/prose.jsonl", "llmnorm:text/notes.txt"]
SOURCES = f"data.sources=[{{name: prose, path: '{NAMED[0]}'}}, {{name: notes, path: '{NAMED[1]}'}}]"


def test_the_mixture_is_what_the_weights_say(smoke_data: Path) -> None:
    """Oracle: counting a cycle of rows; the data is that of other weights, prepared once."""
    words = [f"data.dir={smoke_data}", "data.weights={prose: 1, notes: 4}"]
    found = CausalLM(load(SMOKE, words).config, alone=False, command="")
    assert np.bincount(found.sources(np.arange(50))).tolist() == [10, 40]
    plain = CausalLM(load(SMOKE, [f"data.dir={smoke_data}"]).config, alone=False, command="")
    assert found.data.identity == plain.data.identity
    assert [source.weight for source in plain.data.sources] == [2, 1]


def test_the_default_corpus_has_weights_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the sources' settings, by a corpus of two names; none before it is fetched."""
    words = ["data.sources=default", f"data.dir={tmp_path}", "data.weights={code: 3, speech: 1}"]
    data = load(SMOKE, words).config.data
    names = ["code", "speech"]
    monkeypatch.setattr(default_corpus, "source_names", lambda _: names)
    assert [(s.name, s.weight) for s in sources_of(data)] == [("code", 3), ("speech", 1)]
    names.append("topics")
    with pytest.raises(InputError, match="data.weights: 'topics' has no weight"):
        sources_of(data)
    names.clear()
    assert sources_of(data) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SOURCES, "data.weights={pros: 1, notes: 4}"], "called 'pros'; did you mean 'prose'"),
        ([SOURCES, "data.weights={prose: 1}"], "'notes' has no weight; give all sources one"),
        ([SOURCES, "data.weights={prose: 0, notes: 4}"], "greater than or equal to 1|at least 1"),
        (
            [SOURCES, "data.weights={prose: 2147483647, notes: 4}"],
            "must sum to less than 2147483648",
        ),
    ],
)
def test_what_does_not_fit_the_sources_is_refused(words: list[str], message: str) -> None:
    """Oracle: the message, one line."""
    with pytest.raises(InputError, match=message) as error:
        load(SMOKE, words)
    assert "\n" not in str(error.value)
