"""Encoders: BERT's heads, losses, packed and padded rows, parameter counts, saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from llmnorm.config.file import load
from llmnorm.models import (
    LlmNormConfig,
    LlmNormForCausalLM,
    LlmNormForMaskedLM,
    LlmNormForSequenceClassification,
)
from llmnorm.models.building import build_model, class_of
from llmnorm.part import InputError
from llmnorm.training.outline import outline

VOCABULARY = 61
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], list(range(12))])
SOFTMAX = {"name": "softmax", "bidirectional": True, "attention_bias": True}
HYDRA = {"name": "hydra", "head_dim": 8, "state_size": 3}
NALA = {"name": "nala", "bidirectional": True, "conv_kernel": 3}
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
    "norm": {"name": "layer", "eps": 1e-12},
    "placement": "post",
    "mlp": {"name": "gelu", "bias": True},
    "type_vocab_size": 2,
    "embedding_norm": True,
    "final_norm": False,
    "tie_word_embeddings": True,
    "architectures": ["LlmNormForMaskedLM"],
}


def build(mixer: dict[str, Any] = SOFTMAX, **keys: Any) -> Any:
    return build_model(LlmNormConfig(**BERT | {"mixer": mixer} | keys), seed=0).double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(7))


MATRIX = {"name": "matrix", "head_dim": 16}
TOEPLITZ = MATRIX | {"family": "toeplitz"}
DENSE = MATRIX | {"family": "dense"}


mixers = pytest.mark.parametrize(
    "mixer",
    [SOFTMAX, HYDRA, NALA, TOEPLITZ, DENSE],
    ids=lambda m: m.get("family", m["name"]),
)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("112m/hydra", 112_082_098), ("70m/hydra", 69_987_738), ("112m/softmax", 109_121_082)],
)
def test_parameter_counts(recipe: str, parameters: int) -> None:
    """Oracle: the paper's 112.08M, its 12 layers by hand, Hugging Face's BERT without positions.

    12 of the 23 layers: 11 times 3,825,224 of the mixer and 1,536 of its norm are gone.
    """
    config = load(Path(f"configs/recipes/hydra/{recipe}.yaml")).config
    model = config.model.model_copy(update={"vocab_size": 30522})
    built = outline(config.model_copy(update={"model": model}))
    assert built.num_parameters() == parameters
    assert 112_082_098 - 11 * (3_825_224 + 1_536) == 69_987_738
    with torch.device("meta"):
        bert = BertForMaskedLM(BertConfig())
    positions = bert.bert.embeddings.position_embeddings.weight.numel()
    assert bert.num_parameters() - positions == 109_121_082


@pytest.mark.parametrize(
    ("family", "keys", "millions"),
    [
        ("dense", [], 69.2),
        ("toeplitz", ["hidden_size=800", "num_attention_heads=10", "mixer.head_dim=64"], 72.0),
        ("cauchy", [], 70.4),
        ("low_rank", [], 70.4),
        ("attention", [], 70.4),
        ("quasiseparable", [], 70.8),
    ],
)
def test_parameter_counts_of_matrix_mixers(family: str, keys: list[str], millions: float) -> None:
    """Oracle: the paper's millions, less the learned positions of those models, 128 rows."""
    overrides = ["vocab_size=30522", f"mixer.family={family}", *keys]
    path = Path("configs/recipes/hydra/70m/matrix.yaml")
    config = load(path, [f"model.{key}" for key in overrides]).config
    count = outline(config).num_parameters() + 128 * config.model.hidden_size
    assert round(count / 1e6, 1) == millions


def from_bert(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """BERT's weights by our names."""
    names = {
        "bert.embeddings.word_embeddings": "model.embed_tokens",
        "bert.embeddings.token_type_embeddings": "model.embed_types",
        "bert.embeddings.LayerNorm": "model.embed_norm",
        "bert.encoder.layer.": "model.layers.",
        "attention.self.query": "self_attn.q_proj",
        "attention.self.key": "self_attn.k_proj",
        "attention.self.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.o_proj",
        "attention.output.LayerNorm": "post_attention_layernorm",
        "intermediate.dense": "mlp.up_proj",
        "output.dense": "mlp.down_proj",
        "output.LayerNorm": "post_feedforward_layernorm",
        "cls.predictions.transform.dense": "head.dense",
        "cls.predictions.transform.LayerNorm": "head.norm",
        "cls.predictions.decoder": "lm_head",
        "cls.predictions.bias": "lm_head.bias",
        "bert.pooler.dense": "pooler",
        "classifier": "score",
    }
    found = {}
    for name, tensor in theirs.items():
        if "position_embeddings" in name:
            continue
        for one, other in names.items():
            name = name.replace(one, other)
        found[name] = tensor
    return found


@pytest.mark.parametrize("cls", [BertForMaskedLM, BertForSequenceClassification])
def test_the_same_weights_are_berts(cls: Any) -> None:
    """Oracle: transformers' BERT without positions, float64, padded rows of two sentences."""
    torch.manual_seed(0)
    theirs = cls(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            initializer_range=0.1,
            num_labels=3,
        )
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.2)
    theirs.bert.embeddings.position_embeddings.weight.data.zero_()
    ours = build(
        architectures=[cls.__name__.replace("Bert", "LlmNorm")], id2label={0: "a", 1: "b", 2: "c"}
    ).eval()
    ours.load_state_dict(from_bert(theirs.state_dict()))
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    types = (torch.arange(9) > 3).long().expand(3, -1)
    # The same position everywhere: rotations are relative.
    given = {"attention_mask": mask, "token_type_ids": types}
    got = ours(ids, **given, position_ids=torch.ones(3, 9, dtype=torch.long)).logits
    expected = theirs(ids, **given).logits
    if cls is BertForMaskedLM:
        got, expected = got[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@mixers
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_gradients_are_those_of_full_logits(mixer: Any, tied: bool) -> None:
    """Oracle: F.cross_entropy of the logits at the labelled places, float64; none of no label."""
    model = build(mixer, tie_word_embeddings=tied).train()
    ids = tokens(3, 11)
    labels = ids.masked_fill(torch.arange(11) % 3 > 0, -100)
    output = model(ids, labels=labels, num_items_in_batch=7.0, loss_only=True)
    assert output.logits is None
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 7
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-8, atol=1e-13)
    mean = model.eval()(ids, labels=labels)
    torch.testing.assert_close(mean.loss, expected * 7 / 12, rtol=1e-12, atol=0)
    assert torch.equal(mean.logits, model(ids).logits)
    for loss_only in (False, True):
        nothing = model.train()(ids, labels=torch.full_like(ids, -100), loss_only=loss_only)
        assert nothing.loss.item() == 0


@mixers
@pytest.mark.parametrize("fixed", [False, True])
def test_packed_documents_never_see_each_other(mixer: Any, fixed: bool) -> None:
    """Oracle: gradients exactly zero outside of the document, not before and after inside."""
    model = build(mixer)
    model.model.fixed_shapes = fixed
    ids = tokens(2, 12)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = torch.full_like(ids, -100)
    labels[0, 6] = ids[0, 6]
    model(inputs_embeds=embeds, position_ids=PACKED, labels=labels).loss.backward()
    assert embeds.grad is not None
    assert embeds.grad[0, 5:8].abs().amin(-1).min() > 0
    assert not embeds.grad[0, :5].any()
    assert not embeds.grad[0, 8:].any() and not embeds.grad[1].any()
    alone = model(ids[:1, 5:8]).logits
    packed = model(ids, position_ids=PACKED).logits[:1, 5:8]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


@mixers
def test_padding_changes_nothing(mixer: Any) -> None:
    """Oracle: the row without padding, left or right, float64; a class of the same row."""
    model, ids = build(mixer).eval(), tokens(2, 12)
    classes = build(mixer, architectures=["LlmNormForSequenceClassification"]).eval()
    for start, stop in ((0, 7), (5, 12), (3, 9)):
        mask = torch.zeros(2, 12, dtype=torch.long)
        mask[0, start:stop] = 1
        mask[1] = 1
        got = model(ids, attention_mask=mask).logits[0, start:stop]
        alone = model(ids[:1, start:stop]).logits[0]
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-12)
        got = classes(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[:1], classes(ids[:1, start:stop]).logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(got[1:], classes(ids[1:]).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", [SOFTMAX, {"name": "softmax"}], ids=["encoder", "decoder"])
def test_a_class_is_read_where_everything_has_been_seen(mixer: Any) -> None:
    """Oracle: the gradient reaches every token; F.cross_entropy and the mean squared error."""
    keys = {"architectures": ["LlmNormForSequenceClassification"], "num_labels": 3}
    model, ids = build(mixer, **keys), tokens(4, 6)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = torch.tensor([0, 2, 1, 1])
    output = model(inputs_embeds=embeds, labels=labels)
    (grad,) = torch.autograd.grad(output.loss, embeds)
    assert grad.abs().amin(-1).min() > 0
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    one = build(mixer, **keys | {"num_labels": 1})
    values = torch.tensor([0.5, 2.0, -1.0, 3.0])
    output = one(ids, labels=values, num_items_in_batch=8.0)
    expected = F.mse_loss(output.logits.squeeze(1), values.double()) / 2
    torch.testing.assert_close(output.loss, expected)


def test_dropout_of_embeddings_and_of_what_is_classified() -> None:
    """Oracle: two passes differ in training only."""
    ids = tokens(2, 9)
    for name in ("LlmNormForMaskedLM", "LlmNormForSequenceClassification"):
        model = build(architectures=[name], embedding_dropout=0.5)
        for training in (False, True):
            model.train(training)
            assert model(ids).logits.equal(model(ids).logits) is not training


def test_saving_and_loading_are_exact(tmp_path: Path) -> None:
    """Oracle: bit-equal weights through the Auto classes, logits up to where memory is aligned."""
    ids = tokens(2, 9)
    learned = TOEPLITZ | {"family": {"name": "toeplitz", "data_dependent": False}}
    for auto, cls in (
        (AutoModelForMaskedLM, LlmNormForMaskedLM),
        (AutoModelForSequenceClassification, LlmNormForSequenceClassification),
    ):
        for tied, mixer in ((False, learned), (True, HYDRA)):
            model = build(
                mixer, architectures=[cls.__name__], num_labels=3, tie_word_embeddings=tied
            ).eval()
            assert type(model) is cls
            path = tmp_path / f"{cls.__name__}{tied}"
            model.save_pretrained(path)
            loaded = auto.from_pretrained(path)
            assert type(loaded) is cls and class_of(loaded.config) is cls
            theirs = loaded.state_dict()
            assert theirs.keys() == model.state_dict().keys()
            assert all(theirs[name].equal(t) for name, t in model.state_dict().items())
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-13)
            base, own = AutoModel.from_pretrained(path)(ids), model.model(ids)
            torch.testing.assert_close(base[0], own[0], rtol=0, atol=1e-13)
    assert loaded.config.num_labels == 3


def test_a_resized_vocabulary_keeps_the_offsets() -> None:
    """Oracle: the logits of the old tokens."""
    model, ids = build().eval(), tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    after = model(ids)
    torch.testing.assert_close(after.logits[..., :VOCABULARY], before)
    assert model.train()(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LlmNormForCausalLM(LlmNormConfig(**BERT | {"mixer": HYDRA})), "later tokens"),
        (lambda: LlmNormForCausalLM(LlmNormConfig(**BERT | {"mixer": DENSE})), "later tokens"),
        (lambda: build(DENSE)(tokens(1, 17)), "max_position_embeddings = 16 tokens, got 17"),
        (lambda: LlmNormForMaskedLM(LlmNormConfig(**BERT)), "no later tokens.*from one side"),
        (lambda: build().model(tokens(1, 4), use_cache=True), "no cache"),
        (lambda: build().model(tokens(1, 4), past_key_values=object()), "no cache"),
        (
            lambda: build(type_vocab_size=0)(tokens(1, 4), token_type_ids=tokens(1, 4)),
            "type_vocab_size is 0",
        ),
        (lambda: build(architectures=["LlmNormForMaskdLM"]), "did you mean 'LlmNormForMaskedLM'"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    """Oracle: the message."""
    with pytest.raises(InputError, match=message):
        make()
