"""torch.export and torch.compile(fullgraph=True): every mixer, masks, packed rows, gradients."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

from llmnorm.models import LlmNormConfig, LlmNormForMaskedLM, LlmNormForSequenceClassification
from llmnorm.models.building import build_model
from llmnorm.part import InputError

MIXERS: dict[str, Any] = {
    "softmax": "softmax",
    "window": {"name": "softmax", "sliding_window": 5},
    "linear": "linear",
    "nala": "nala",
    "cosine": {"name": "nala", "direction": "cosine"},
    "ssd": {"name": "ssd", "head_dim": 8, "state_size": 6},
    "gla": "gla",
    "gated_delta": "gated_delta",
    "hybrid": ["nala", "softmax"],
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
IDS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(7))
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[0, :4] = 0
BOTH = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], list(range(12))])
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "plain": {},
    "padded": {"attention_mask": MASK},
    "numbered": {"attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)},
    "packed and padded": {"position_ids": PACKED, "attention_mask": BOTH},
}


def build(**keys: Any) -> Any:
    layers = len(keys["mixer"]) if isinstance(keys.get("mixer"), list) else 1
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return build_model(LlmNormConfig(**shape | heads | keys), seed=0).double().eval()


def real(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs.get("attention_mask", torch.ones_like(IDS)).bool()


@every_mixer
def test_an_exported_program_is_the_model_and_the_model_stays_itself(mixer: Any) -> None:
    """Oracle: the eager logits of real tokens before; of the same model, to the bit, after."""
    for name, inputs in INPUTS.items():
        gradients = name == "packed and padded"
        expected = build(mixer=mixer)(IDS, **inputs).logits[real(inputs)]
        model = build(mixer=mixer)  # nothing has run before the tracing
        with torch.set_grad_enabled(gradients):
            program = export(model, (IDS,), inputs, strict=False)
            got = program.module()(IDS, **inputs).logits[real(inputs)]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        assert torch.equal(model(IDS, **inputs).logits[real(inputs)], expected)


def test_an_exported_program_takes_other_lengths() -> None:
    """Oracle: the eager logits of a shorter and a longer row."""
    model = build()
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "attention_mask": {0: Dim.AUTO, 1: Dim.AUTO}}
    with torch.no_grad():
        program = export(
            model, (), {"input_ids": IDS, "attention_mask": MASK}, dynamic_shapes=shapes
        )
        for length in (7, 19):
            ids, mask = IDS.repeat(1, 2)[:, :length], MASK.repeat(1, 2)[:, :length]
            got = program.module()(input_ids=ids, attention_mask=mask).logits[1]
            expected = model(ids, attention_mask=mask).logits[1]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@every_mixer
def test_one_graph_without_a_break(mixer: Any) -> None:
    """Oracle: the eager logits of real tokens."""
    for inputs in INPUTS.values():
        torch._dynamo.reset()
        model = build(mixer=mixer)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            expected = model(IDS, **inputs).logits[real(inputs)]
            got = compiled(IDS, **inputs).logits[real(inputs)]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@every_mixer
def test_a_training_step_in_one_graph(mixer: Any) -> None:
    """Oracle: loss and gradients of the eager model."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build(mixer=mixer).train()
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        loss = run(IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3", "longrope"])
def test_every_kind_of_rotary_positions_is_exported(kind: str) -> None:
    """Oracle: the eager logits, of rows beyond the original context."""
    rope: dict[str, Any] = {
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 8},
        "llama3": {
            **{"factor": 2.0, "original_max_position_embeddings": 8},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        "longrope": {
            **{"short_factor": [1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 3.0]},
            "original_max_position_embeddings": 8,
        },
    }[kind]
    keys = {"rope_parameters": {"rope_type": kind, **rope}, "max_position_embeddings": 8}
    expected = build(**keys)(IDS).logits
    model = build(**keys)
    with torch.no_grad():
        program = export(model, (IDS,), strict=False)
    torch.testing.assert_close(program.module()(IDS).logits, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)


def test_a_pass_of_fake_tensors_leaves_nothing_behind() -> None:
    """Oracle: the eager logits of a model that has seen none (as tools that plan memory do)."""
    expected = build()(IDS).logits
    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        model.model.rotary(fake.from_tensor(torch.arange(12)[None]), torch.float64)
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("head", [LlmNormForMaskedLM, LlmNormForSequenceClassification])
def test_encoders_are_exported_and_compiled(head: Any) -> None:
    """Oracle: the eager logits, a padded row among them."""
    mixers = [
        {"name": "softmax", "bidirectional": True},
        {"name": "hydra", "head_dim": 8, "state_size": 3},
    ]
    for mixer in mixers:
        torch._dynamo.reset()
        model = build(mixer=mixer, architectures=[head.__name__])
        expected = model(IDS, attention_mask=MASK).logits
        with torch.no_grad():
            program = export(model, (IDS, MASK), strict=False).module()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        places = MASK.bool() if expected.ndim == 3 else slice(None)
        for run in (program, compiled):
            got = run(IDS, MASK).logits
            torch.testing.assert_close(got[places], expected[places], rtol=0, atol=1e-10)


def test_what_a_program_cannot_look_at_is_refused_when_it_runs() -> None:
    """Oracle: the message of the eager model, from the exported program."""
    model = build()
    zeros = torch.zeros_like(IDS)
    with pytest.raises(InputError, match="token_type_ids"):
        model(IDS, token_type_ids=zeros + 1)
    with torch.no_grad():
        program = export(model, (IDS,), {"token_type_ids": zeros}, strict=False).module()
    got = program(IDS, token_type_ids=zeros).logits
    torch.testing.assert_close(got, model(IDS).logits, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="token_type_ids"):
        program(IDS, token_type_ids=zeros + 1)
