"""Equal bits in any batch: of logits, and of what an engine says of its tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.config.generation import GenerationSettings
from llmnorm.generation import exact
from llmnorm.generation.contract import Event, Request, Sampling
from llmnorm.generation.draft import Lookup
from llmnorm.generation.engine import Engine
from llmnorm.generation.exact import ExactStep
from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.part import InputError

VOCABULARY, CONTEXT = 61, 60


def build(mixer: Any = "softmax", **changed: Any) -> LlmNormForCausalLM:
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "pad_token_id": 2,
        "max_position_embeddings": CONTEXT,
        "mixer": mixer,
    }
    return build_model(LlmNormConfig(**{**config, **changed}), seed=3).eval()


@pytest.fixture(scope="module")
def model() -> LlmNormForCausalLM:
    return build()


@pytest.fixture(scope="module")
def step(model: LlmNormForCausalLM) -> ExactStep:
    return ExactStep(model)


def texts(rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCABULARY, (rows, 40), generator=generator).tolist()


def alone(step: ExactStep, text: list[int]) -> Tensor:
    """A token a pass, in a cache without reserved buffers."""
    cache = step.new_cache()
    return torch.cat([step.step(torch.tensor([[token]]), cache)[0] for token in text])


def test_logits_are_those_of_a_pass_without_a_cache(
    model: LlmNormForCausalLM, step: ExactStep
) -> None:
    """Oracle: the model's own forward pass, within float32's rounding."""
    ids = torch.tensor(texts(3))
    cache = step.new_cache()
    found = step.step(ids, cache)
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)
    last = step.step(ids[:, :4], cache, [4, 0, 2], last=True)
    whole = model(torch.cat([ids, ids[:, :4]], 1)).logits
    torch.testing.assert_close(last[[0, 2], 0], whole[[0, 2], [43, 41]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "block"), [(1, 6), (3, 1), (5, 4), (8, 6), (12, 17)])
def test_bits_depend_on_no_other_row_no_block_and_no_thread(
    step: ExactStep, rows: int, block: int, threads: int
) -> None:
    """Oracle: each row alone, a token a pass, one thread; bits are compared.

    Prompts are run in pieces in a cache of one row and admitted, as the engine does it.
    """
    given = texts(rows)
    want = [alone(step, text) for text in given[:2]]
    cache = step.new_cache()
    cache.reserve(rows, CONTEXT, 0, dtype=step.dtype, device=step.device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = [3 + number % 4 for number in range(rows)]
        for text, prompt in zip(given, start, strict=True):
            side = step.new_cache()
            for at in range(0, prompt, 2):
                step.step(torch.tensor([text[at : min(at + 2, prompt)]]), side, last=True)
            cache.admit(side)
        done, found = list(start), [[] for _ in range(rows)]
        for passes in range(100):
            if all(count >= 40 for count in done):
                break
            # Some drafts are right, the others are token 0.
            kept = [min(40 - a, 1 + (row + passes) % block) for row, a in enumerate(done)]
            ids = torch.zeros(rows, block, dtype=torch.long)
            for row, (a, keep) in enumerate(zip(done, kept, strict=True)):
                ids[row, :keep] = torch.tensor(given[row][a : a + keep], dtype=torch.long)
            counts = [block if keep else 0 for keep in kept]
            logits = step.step(ids, cache, counts)
            cache.rollback([count - keep for count, keep in zip(counts, kept, strict=True)])
            for row, keep in enumerate(kept):
                found[row] += logits[row, :keep].unbind()
                done[row] += keep
    finally:
        torch.set_num_threads(before)
    for line, bits, prompt in zip(want, found, start, strict=False):
        assert torch.equal(torch.stack(bits), line[prompt:])


def ran(step: ExactStep, requests: list[Request], drafts: bool) -> dict[int, list[Event]]:
    settings = GenerationSettings(
        slots=8,
        deterministic=True,
        context=CONTEXT,
        prefill_chunk=3 if drafts else 128,
        draft_tokens=4,
        draft="lookup" if drafts else "none",
    )
    engine = Engine(step, None, settings, Lookup() if drafts else None, ends=[7])
    found: dict[int, list[Event]] = {engine.add(request): [] for request in requests}
    while not engine.idle:
        for event in engine.step():
            found[event.request].append(event)
    return found


def test_an_engine_says_the_same_bits_alone_and_among_others_with_and_without_a_draft(
    step: ExactStep,
) -> None:
    """Oracle: each request alone, without a draft; tokens and log-probabilities are compared."""
    kinds: list[dict[str, Any]] = [{"seed": 5, "temperature": 0.7}, {"temperature": 0.0}]
    requests = [
        Request(
            tuple(text[: 2 + 3 * number]),
            Sampling(max_tokens=20, logprobs=3, ignore_end=number % 3 > 0, **kinds[number % 2]),
        )
        for number, text in enumerate(texts(9))
    ]

    def told(events: list[Event]) -> tuple[Any, ...]:
        assert events[-1].finish in ("stop", "length")
        chosen = [one for event in events for one in event.chosen or ()]
        return [token for event in events for token in event.tokens], chosen

    want = [told(ran(step, [request], drafts=False)[0]) for request in requests]
    together = ran(step, requests, drafts=True)
    assert [told(events) for events in together.values()] == want
    assert sum(event.accepted for events in together.values() for event in events) > 5


def test_the_self_test_refuses_what_depends_on_the_number_of_rows(
    model: LlmNormForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a planted error of 1e-6 in products of an odd number of rows."""
    right = exact._OneClass.forward

    def wrong(self: exact._OneClass, x: Tensor) -> Tensor:
        y = right(self, x)
        return y + 1e-6 * y * (x.flatten(0, -2).shape[0] % 2)

    monkeypatch.setattr(exact._OneClass, "forward", wrong)
    with pytest.raises(InputError) as raised:
        ExactStep(model)
    message = str(raised.value)
    assert message.startswith(
        "generation.deterministic: a self-test found other logits with 1 row(s), 6 token(s) a pass"
    )
    assert message.endswith("leave generation.deterministic out") and "\n" not in message


@pytest.mark.parametrize("mixer", ["linear", ["gated_delta", "softmax"]])
def test_recurrent_models_are_served_only_where_the_self_test_passes(mixer: Any) -> None:
    """Oracle: what the class says of itself is so; without a draft, each row alone."""
    try:
        step = ExactStep(build(mixer), context=24, rows=2, drafts=False)
    except InputError as refused:
        assert "a self-test found other logits" in str(refused)
        return
    given, cache = texts(2), step.new_cache()
    found = step.step(torch.tensor(given)[:, :20], cache)
    for text, bits in zip(given, found, strict=True):
        assert torch.equal(bits, alone(step, text[:20]))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dtype": torch.bfloat16}, "is for float32 on a CPU, and the model is bfloat16 on cpu"),
        ({"dtype": torch.float64}, "is for float32 on a CPU, and the model is float64 on cpu"),
        ({"mixer": {"name": "softmax", "sliding_window": 5}}, "layers with a sliding window"),
    ],
)
def test_other_models_are_refused(changed: dict[str, Any], told: str) -> None:
    """Oracle: the message."""
    dtype = changed.pop("dtype", torch.float32)
    with pytest.raises(InputError, match=f"^generation.deterministic: {told}"):
        ExactStep(build(**changed).to(dtype))
    with pytest.raises(InputError, match="training mode"):
        ExactStep(build().train())


def test_a_context_that_was_extended_is_not_gone_beyond() -> None:
    """Oracle: with longrope a longer row would turn all rows of its pass by other frequencies."""
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 3, "long_factor": [8.0] * 3}
    rope |= {"original_max_position_embeddings": 30}
    for context in (None, 50):
        assert ExactStep(build(rope_parameters=rope), context=context, rows=1).context == 30
