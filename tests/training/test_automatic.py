"""`auto`: the Step Law's numbers, where they come from, when they are refused; --print-groups."""

import pytest

from llmnorm import cli
from llmnorm.config.file import load
from llmnorm.optim import step_law
from llmnorm.part import InputError
from llmnorm.runs import directory as run_directory
from llmnorm.training.automatic import resolve
from llmnorm.training.outline import outline, parameters_outside_the_embedding
from tests.running import SMOKE, llmnorm, metrics_of

# 12 layers of 768 / 2048: 84.9M in matrices, 25 norms of 768.
SIZE = [
    *("model.hidden_size=768", "model.intermediate_size=2048", "model.num_hidden_layers=12"),
    *("model.num_attention_heads=12", "model.num_key_value_heads=12"),
]
PARAMETERS = 12 * (4 * 768**2 + 3 * 768 * 2048) + 25 * 768
TOKENS = ["training.steps=null", "training.tokens=2.62e9", "data.context_length=256"]


def resolved(*words: str):
    config = load(SMOKE, [*SIZE, *TOKENS, *words]).config
    return resolve(config)


def test_the_law_is_the_papers() -> None:
    """Oracle: its published optima for Llama sizes, as the specification gives them, and the
    largest and smallest points of its grid."""
    for parameters, tokens, expected in (
        *((25.3e6, 1.31e9, 5.9e-3), (85e6, 2.62e9, 3.1e-3)),
        *((302e6, 7.86e9, 1.8e-3), (1.21e9, 13.1e9, 7.6e-4)),
    ):
        assert step_law.learning_rate(parameters, tokens) == pytest.approx(expected, rel=0.03)
    assert step_law.batch_tokens(200e6) == pytest.approx(32e3, rel=0.02)


def test_parameters_are_counted_without_embedding_and_head() -> None:
    """Oracle: the sizes written out; neither tying nor the vocabulary matters."""
    for words in ([], ["model.tie_word_embeddings=false"], ["model.vocab_size=999"]):
        config = load(SMOKE, [*SIZE, *words]).config
        assert parameters_outside_the_embedding(config) == PARAMETERS
    assert outline(load(SMOKE).config).config.vocab_size == 512


@pytest.mark.parametrize(
    ("words", "factor"),
    [
        (["optimizer=adamw"], 1),
        (["optimizer=adamp"], 1),
        (["optimizer=muon"], 1.5),
        (["optimizer=muon", "optimizer.update_rms=original"], 1.5 * 0.2 * 768**0.5),
        (["optimizer=normuon"], 1.5 * 0.2 * 768**0.5),
        (["optimizer=normuon", "optimizer.preset=paper"], 1.5),
        (["optimizer=conda"], 4),
        (["optimizer=soap"], 0.7),
    ],
)
def test_every_rule_has_a_multiple_of_adamws_rate(words, factor) -> None:
    """Oracle: the law and the factors, to three digits; the rest gets AdamW's own."""
    config, notes = resolved(*words, "optimizer.lr=auto", "training.global_batch=auto")
    law = step_law.learning_rate(PARAMETERS, 2.62e9)
    assert config.optimizer.lr == pytest.approx(law * factor, rel=0.01)
    assert config.optimizer.auxiliary.lr == pytest.approx(law, rel=0.005)
    rows = step_law.batch_tokens(2.62e9) / 256
    assert config.training.global_batch % 8 == 0
    assert abs(config.training.global_batch - rows) <= 4
    assert config.automatic() == []
    assert "1.79 N^-0.713 D^0.307" in notes[1] and "0.58 D^0.571" in notes[0]
    assert "extrapolation, good to a factor of 2" in notes[2]


def test_a_smaller_batch_gets_a_smaller_rate_and_a_larger_one_the_same() -> None:
    """Oracle: sqrt(B / B*) below the law's batch; a rate that was given stays."""
    law = step_law.learning_rate(PARAMETERS, 2.62e9)
    best = step_law.batch_tokens(2.62e9)
    small = resolved("optimizer.lr=auto", "training.global_batch=32").config
    expected = law * (32 * 256 / best) ** 0.5
    assert small.optimizer.lr == pytest.approx(expected, rel=0.005)
    large = resolved("optimizer.lr=auto", "training.global_batch=4096").config
    assert large.optimizer.lr == pytest.approx(law, rel=0.005)
    given = resolved("training.global_batch=auto", "training.micro_batch=24").config
    assert given.optimizer.lr == 3e-3 and given.training.global_batch % 24 == 0
    kept = resolved("optimizer.lr=auto", "optimizer.auxiliary.lr=0.5").config
    assert kept.optimizer.auxiliary.lr == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*TOKENS, "optimizer.lr=auto"], "0.09 million outside the embedding"),
        ([*TOKENS, "training.global_batch=auto"], "training.global_batch: auto"),
        (
            [*SIZE, "optimizer.lr=auto", "training.steps=null", "training.epochs=1"],
            "tokens or steps",
        ),
        ([*SIZE, "training.global_batch=auto"], "length as training.tokens"),
    ],
)
def test_what_the_law_does_not_know_is_refused(words, message) -> None:
    """Oracle: the messages."""
    with pytest.raises(InputError, match=message):
        resolve(load(SMOKE, words).config)


def test_a_run_keeps_the_numbers_and_says_how_they_came_about(
    tmp_path, smoke_data, monkeypatch, capsys
) -> None:
    """Oracle: the run directory; going on by either name finds the same settings."""
    monkeypatch.setattr(step_law, "SMALLEST", 1000)
    words = [f"run_dir={tmp_path / 'run'}", f"data.dir={smoke_data}", "optimizer.lr=auto"]
    llmnorm("train", SMOKE, *words, "training.steps=3")
    saved = load(tmp_path / "run").config
    assert saved.optimizer.lr == pytest.approx(metrics_of(tmp_path / "run")[0]["lr"])
    notes = (tmp_path / "run" / "automatic.txt").read_text()
    assert f"optimizer.lr = {saved.optimizer.lr:g}" in notes
    assert f"llmnorm: note: {notes.splitlines()[0]}" in capsys.readouterr().err
    llmnorm("train", SMOKE, *words, "training.steps=3")
    assert "is finished" in capsys.readouterr().out
    longer = load(tmp_path / "run", ["training.steps=5"]).config
    run_directory.agree(longer, going_on=True)


def test_print_groups_prints_and_does_nothing(tmp_path, monkeypatch, capsys) -> None:
    """Oracle: a 70B model's table, without its memory, and no file."""
    config = SMOKE.resolve()
    monkeypatch.chdir(tmp_path)
    words = [
        *("model.hidden_size=8192", "model.intermediate_size=28672", "model.num_hidden_layers=80"),
        *("model.num_attention_heads=64", "model.num_key_value_heads=8", "optimizer=conda"),
    ]
    assert cli.main(["train", str(config), "--print-groups", *words]) == 0
    text = capsys.readouterr().out
    assert "560 hidden matrices" in text
    line = next(x for x in text.splitlines() if "layers.79.mlp.down_proj" in x)
    assert line.split()[1:] == ["8192", "x", "28672", "conda", "0.01", "0.025"]
    assert list(tmp_path.iterdir()) == []
