"""Every measurement of the depth against an explicit computation, in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import SIDES, anatomy
from llmnorm.analysis.depth.gains import effective_gain
from llmnorm.analysis.depth.gradients import gradients
from llmnorm.analysis.depth.measure import dead_blocks, findings, measure, spans
from llmnorm.analysis.depth.pieces import Text, documents, held_out
from llmnorm.analysis.depth.removal import KINDS, passes, removal
from llmnorm.analysis.depth.streams import Streams, ranks
from llmnorm.analysis.depth.variance_law import predicted_variance, second_moment
from llmnorm.models.building import build_model
from llmnorm.models.configuration import LlmNormConfig
from llmnorm.nn.mixers.contract import Context
from llmnorm.nn.norms.layer import LayerNorm
from llmnorm.nn.norms.rms import RMSNorm
from tests.analysis.depth.tiny import VOCABULARY, kill, ours, stock, text

ROWS = ((7, 5), (12,), (3, 4, 5), (12,), (9,))


def nothing() -> None:
    """No progress to show."""


def streams_of(model: Any, words: Text) -> dict[str, Any]:
    blocks = anatomy(model, words.batches[0].ids)
    streams = Streams(blocks, 16, torch.device("cpu"))
    for batch in words.batches:
        streams.add(lambda ids=batch.ids: model(input_ids=ids, use_cache=False), batch)
    return {**streams.figures(), "absent": streams.absent}


def lines(words: Text) -> list[tuple[int, Tensor, Tensor]]:
    """Row, tokens and labels of every document, without padding."""
    found = []
    for batch in words.batches:
        for row, ids, labels, real in zip(
            batch.row.tolist(), batch.ids, batch.labels, batch.real, strict=True
        ):
            found.append((row, ids[real], labels[real]))
    return found


@torch.no_grad()
def by_hand(model: Any, ids: Tensor) -> dict[str, Any]:
    """Streams, branches and attention of our model on one document (length,), block by block."""
    base = model.model
    x = base.embed_tokens(ids[None])
    context = Context(*base.rotary(torch.arange(x.shape[1]).unsqueeze(0), x.dtype))
    found: dict[str, Any] = {"x": [x[0]], "mixer": [], "mlp": [], "weights": []}
    for block in base.layers:
        normed = block.input_layernorm(x)
        parameters = block.self_attn.prepare(normed, context)
        found["weights"].append(block.self_attn.materialize(parameters, context)[0])
        f = block.self_attn(normed, context)
        g = block.mlp(block.post_attention_layernorm(x + f))
        found["mixer"].append((f[0], x[0]))
        found["mlp"].append((g[0], (x + f)[0]))
        x = x + f + g
        found["x"].append(x[0])
    return found


def test_streams_are_measured_over_real_tokens() -> None:
    """Oracle: our model block by block, document by document; numpy and loops for every figure."""
    model, words = ours(norm="layer", num_key_value_heads=1), text(*ROWS)
    found = streams_of(model, words)
    whole = [by_hand(model, ids) for _, ids, _ in lines(words)]
    layers = 3
    x = [np.concatenate([one["x"][n].numpy() for one in whole]) for n in range(layers + 1)]
    assert found["tokens"] == len(x[0]) == sum(sum(row) for row in ROWS)
    assert found["variance"] == pytest.approx([s.var(1).mean() for s in x], rel=1e-12)
    assert found["mean_square"] == pytest.approx([(s**2).mean() for s in x], rel=1e-12)
    for one in range(layers + 1):
        for other in range(layers + 1):
            angles = [
                math.acos(min(1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))) / math.pi
                for a, b in zip(x[one], x[other], strict=True)
            ]
            assert found["angular_distance"][one][other] == pytest.approx(np.mean(angles), abs=3e-8)
    for side in SIDES:
        for layer in range(layers):
            pairs = [one[side][layer] for one in whole]
            energies = [sum(float((t[i] ** 2).sum()) for t in pairs) for i in (0, 1)]
            ratio = found["branch_ratio"][side][layer]
            assert ratio == pytest.approx(energies[0] / energies[1], rel=1e-10)
    for n in range(layers + 1):
        cosines = []
        for one in whole:
            u = one["x"][n].numpy()
            u = u / np.linalg.norm(u, axis=1, keepdims=True)
            cosines += [u[i] @ u[j] for i in range(len(u)) for j in range(len(u)) if i != j]
        assert found["token_cosine"][n] == pytest.approx(np.mean(cosines), abs=1e-12)
        singular = np.linalg.svd(x[n] - x[n].mean(0), compute_uv=False)
        p = singular / singular.sum()
        effective = math.exp(-sum(a * math.log(a) for a in p if a > 0))
        assert found["effective_rank"][n] == pytest.approx(effective, rel=1e-6)
        e = singular**2
        assert found["participation_ratio"][n] == pytest.approx(e.sum() ** 2 / (e**2).sum())
        assert found["stable_rank"][n] == pytest.approx(e.sum() / e[0])
    for layer in range(layers):
        nats, shares = [], []
        for one in whole:
            for weights in one["weights"][layer].transpose(0, 1)[1:]:  # (heads, keys) of a query
                seen = int((weights[0] > 0).sum())
                entropies = [-sum(a * math.log(a) for a in h.tolist() if a > 0) for h in weights]
                nats.append(entropies)
                shares.append([entropy / math.log(seen) for entropy in entropies])
        by_head = np.mean(shares, axis=0)
        entropy = found["attention_entropy"]
        assert entropy["nats"][layer] == pytest.approx(np.mean(nats))
        assert entropy["mean"][layer] == pytest.approx(by_head.mean())
        assert entropy["lowest"][layer] == pytest.approx(by_head.min())
        assert entropy["highest"][layer] == pytest.approx(by_head.max())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "olmo2"])
def test_streams_of_stock_models(kind: str) -> None:
    """Oracle: their own hidden_states and attentions, a document at a time (the last hidden state
    is behind the final norm and is left out).

    Llama's and OLMo 2's norms and softmax compute in float32 even where the model is float64, and a
    padded batch adds in another order than one document.
    """
    model, words = stock(kind), text(*ROWS)
    found = streams_of(model, words)
    assert found["absent"] == {}
    states, entropies = [], []
    for _, ids, _ in lines(words):
        with torch.no_grad():
            asked = {"output_hidden_states": True, "output_attentions": True}
            output = model(input_ids=ids[None], use_cache=False, **asked)
        states.append(torch.stack(output.hidden_states[:-1])[:, 0])
        if len(ids) > 1:
            nats = torch.special.entr(torch.stack(output.attentions)[:, 0].double()).sum(-1)
            entropies.append(nats[..., 1:].mean(1))
    x = torch.cat(states, 1)
    expected = x.var(-1, correction=0).mean(-1).tolist()
    rounding = 1e-6 if kind in ("llama", "olmo2") else 1e-9
    assert found["variance"][:-1] == pytest.approx(expected, rel=rounding)
    nats = torch.cat(entropies, -1).mean(-1).tolist()
    assert found["attention_entropy"]["nats"] == pytest.approx(nats, rel=1e-5)


def test_ranks_of_known_covariances() -> None:
    """Oracle: k equal directions have rank k by any of the three; zeros have none."""
    covariance = torch.zeros(2, 6, 6, dtype=torch.float64)
    covariance[0, range(4), range(4)] = 2.5
    found = ranks(covariance)
    for key in ("effective_rank", "participation_ratio", "stable_rank"):
        assert found[key][0] == pytest.approx(4) and found[key][1] <= 1


@torch.no_grad()
def loss_of(model: Any, words: Text) -> tuple[Tensor, Tensor]:
    """Summed loss and labels of every row."""
    losses, counts = torch.zeros(len(ROWS)).double(), torch.zeros(len(ROWS)).double()
    for row, ids, labels in lines(words):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        losses[row] += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        counts[row] += (labels != -100).sum()
    return losses, counts


@pytest.mark.parametrize("kind", ["ours", "gpt2", "falcon"])
def test_removal_is_the_loss_without_the_part(kind: str) -> None:
    """Oracle: the list of blocks without the block; zeroed output projections for a branch."""

    def build() -> Any:
        return ours() if kind == "ours" else stock(kind)

    def listed(model: Any) -> nn.ModuleList:
        return model.model.layers if kind == "ours" else model.transformer.h

    words, model = text(*ROWS), build()
    found = removal(model, anatomy(model, words.batches[0].ids), words, nothing)
    whole, counts = loss_of(model, words)
    assert found["loss"]["mean"] == pytest.approx(float(whole.sum() / counts.sum()))
    outputs = {
        "ours": ("self_attn.o_proj", "mlp.down_proj"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    }[kind]
    for layer in range(3):
        for part in KINDS:
            model = build()
            if part == "block":
                del listed(model)[layer]
            else:
                output = listed(model)[layer].get_submodule(outputs[SIDES.index(part)])
                for parameter in output.parameters():
                    nn.init.zeros_(parameter)
            change = loss_of(model, words)[0] - whole
            mean = float(change.sum() / counts.sum())
            assert found[part]["mean"][layer] == pytest.approx(mean, abs=1e-9), (part, layer)
            residual = change - mean * counts
            n = len(ROWS)
            error = math.sqrt(n / (n - 1) * float((residual**2).sum())) / float(counts.sum())
            assert found[part]["standard_error"][layer] == pytest.approx(error, abs=1e-9)


def test_standard_errors_of_equal_rows_are_those_of_a_mean() -> None:
    """Oracle: std / sqrt(rows) of the rows' mean losses; a single row has no error."""
    model, words = ours(), text(*((12,),) * 6)
    found = removal(model, anatomy(model, words.batches[0].ids), words, nothing)
    losses = torch.tensor(
        [
            F.cross_entropy(model(input_ids=i[None]).logits[0, :-1].detach(), y[:-1])
            for _, i, y in lines(words)
        ]
    )
    assert found["loss"]["standard_error"] == pytest.approx(float(losses.std() / 6**0.5), rel=1e-5)
    one = text((12,))
    found = removal(model, anatomy(model, one.batches[0].ids), one, nothing)
    assert found["block"]["standard_error"] == [None, None, None]


def test_removal_says_how_far_it_is() -> None:
    """Oracle: the calls counted."""
    model, words, calls = ours(), text(*ROWS), []
    blocks = anatomy(model, words.batches[0].ids)
    removal(model, blocks, words, lambda: calls.append(1))
    assert len(calls) == passes(blocks, words) == 3 * (1 + 3 * 3)


def test_gradients_are_means_of_norms() -> None:
    """Oracle: one backward pass of our own loss a batch, matrix by matrix."""
    model, words = ours(), text((7,), (12,), (5,), (9,), at_once=1)
    found = gradients(model, anatomy(model, words.batches[0].ids), words, nothing)
    norms: dict[str, float] = {}
    for batch in words.batches:
        model.zero_grad()
        model(input_ids=batch.ids, shift_labels=batch.labels).loss.backward()
        for layer, block in enumerate(model.model.layers):
            squares = [(name, p.grad.square().sum()) for name, p in block.named_parameters()]
            for name, square in squares:
                key = f"{layer}.{name}"
                norms[key] = norms.get(key, 0) + float(square.sqrt()) / 4
            total = float(sum(square for _, square in squares)) ** 0.5
            norms[f"{layer}"] = norms.get(f"{layer}", 0) + total / 4
    assert found["batches"] == 4 and len(found["matrices"]) == 7
    for layer in range(3):
        assert found["block"][layer] == pytest.approx(norms[f"{layer}"], rel=1e-9)
        for name, values in found["matrices"].items():
            assert values[layer] == pytest.approx(norms[f"{layer}.{name}"], rel=1e-9)
            weight = model.model.layers[layer].get_parameter(name)
            assert found["weights"][name][layer] == pytest.approx(float(weight.detach().norm()))


def test_the_jacobians_distance_is_estimated_without_bias() -> None:
    """Oracle: the whole Jacobian of a block; 300 probes come within 5 %, zero is zero."""
    model, words = ours(layers=2), text((5,), at_once=1)
    kill(model.model.layers[1])
    many = words._replace(batches=words.batches * 300)
    found = gradients(model, anatomy(model, words.batches[0].ids), many, nothing)
    x = model.model.embed_tokens(words.batches[0].ids)
    context = Context(*model.model.rotary(torch.arange(x.shape[1]).unsqueeze(0), x.dtype))
    block = model.model.layers[0]
    jacobian = torch.autograd.functional.jacobian(lambda t: block(t, context), x.detach())
    off = jacobian.reshape(5 * 16, 5 * 16) - torch.eye(5 * 16)
    assert found["jacobian"][0] == pytest.approx(float(off.square().sum()) / (5 * 16), rel=0.05)
    assert found["jacobian"][1] == 0


class Scaled(nn.Module):
    """A norm whose gain hides: s (1 + gain), as folded scales and Gemma's."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.gain, self.scale = nn.Parameter(0.3 * torch.randn(hidden_size)), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (1 + self.gain) * F.rms_norm(x, x.shape[-1:], eps=1e-6)


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_gains_are_read_from_what_the_norm_does(width: int) -> None:
    """Oracle: the gains that were put in; offsets and the stream's size play no part."""
    torch.manual_seed(0)
    rms, scaled = RMSNorm(width, eps=0), Scaled(width, 0.5)
    nn.init.normal_(rms.weight)
    for size in (1e-2, 1.0, 300.0):
        expected = rms.weight.detach().double().abs()
        torch.testing.assert_close(effective_gain(rms, width, size), expected, rtol=1e-5, atol=0)
    expected = 0.5 * (1 + scaled.gain.detach()).double().abs()
    torch.testing.assert_close(effective_gain(scaled, width, 1.0), expected, rtol=1e-4, atol=1e-6)
    if width > 1:  # of one channel, layer norm leaves the offset alone
        layer = LayerNorm(width, eps=1e-9, bias=True)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        expected = layer.weight.detach().double().abs()
        torch.testing.assert_close(effective_gain(layer, width, 1.0), expected, rtol=1e-4, atol=0)


class ByDepth(nn.Module):
    """LayerNorm Scaling as the paper writes it: a norm's output over the root of the block."""

    def __init__(self, norm: nn.Module, block: int) -> None:
        super().__init__()
        self.norm, self.block = norm, block

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) / self.block**0.5


@pytest.mark.parametrize(
    ("scaled", "recorded"),
    [
        (False, {1: 0.034, 8: 0.574, 16: 1.35, 32: 2.80, 64: 6.19}),
        (True, {1: 0.034, 8: 0.121, 16: 0.175, 32: 0.218, 64: 0.279}),
    ],
)
def test_variance_grows_by_the_law_at_initialisation(
    scaled: bool, recorded: dict[int, float]
) -> None:
    """Oracle: the law, within 20 %, and values recorded for a deep and narrow model (width 64, MLP
    172, 64 blocks, std 0.0693, 64 tokens), Pre-LN and with LayerNorm Scaling.
    """
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=64,
        num_attention_heads=4,
        initializer_range=0.0693,
    )
    model = build_model(config, seed=0).eval()
    for number, block in enumerate(model.model.layers, 1):
        for name in ("input_layernorm", "post_attention_layernorm") if scaled else ():
            setattr(block, name, ByDepth(getattr(block, name), number))
    words = text((64,), (64,), (64,), (64,), at_once=4)
    (batch,) = words.batches
    blocks = anatomy(model, batch.ids[:1])
    streams = Streams(blocks, 64, torch.device("cpu"))
    streams.add(lambda: model(input_ids=batch.ids, use_cache=False), batch)
    found = streams.figures()
    harmonic = sum(1 / t for t in range(1, 65)) / 64
    assert streams.harmonic / streams.tokens == pytest.approx(harmonic)
    law = predicted_variance(
        blocks,
        64,
        first=found["variance"][0],
        token_cosine=found["token_cosine"],
        harmonic=harmonic,
    )
    assert found["variance"] == pytest.approx(law, rel=0.2)
    for block, variance in recorded.items():
        assert law[block] == pytest.approx(variance, rel=0.2)


def test_the_second_moment_of_silu() -> None:
    """Oracle: E[silu(z)^2] = 0.09099 at variance 0.3072; E[z^2] is the variance."""
    assert second_moment(F.silu, 0.3072) == pytest.approx(0.09099, abs=1e-5)
    assert second_moment(lambda z: z, 0.7) == pytest.approx(0.7)


def test_a_planted_dead_block_is_found_and_named() -> None:
    """Oracle: the block whose output weights are zero."""
    model = ours(layers=4)
    kill(model.model.layers[2])
    found = measure(model, text(*ROWS), name="dead")
    figures = found["figures"]
    assert found["absent"] == {} and found["dead"] == [3]
    assert figures["removal"]["block"]["mean"][2] == 0
    assert figures["removal"]["block"]["standard_error"][2] == 0
    assert [figures["branch_ratio"][side][2] for side in SIDES] == [0, 0]
    assert figures["gradients"]["jacobian"][2] == 0
    assert list(figures["gains"]) == ["before the mixer", "before the MLP"]
    assert figures["gains"]["before the MLP"]["name"] == "post_attention_layernorm"
    assert figures["gains"]["before the MLP"]["rms"] == pytest.approx([1] * 4, rel=1e-4)
    assert figures["angular_distance"][2][3] == pytest.approx(0, abs=1e-7)
    assert found["findings"][0] == "Block 3 is dead: the stream is not changed."


def test_findings_are_sentences() -> None:
    """Oracle: figures made up so that each sentence is due."""
    angles = [[0.1] * 4 for _ in range(4)]
    angles[2][3] = 0.0
    figures = {
        "removal": {"block": {"mean": [3.0, -0.5, 0.0], "standard_error": [0.1, 0.1, 0.0]}},
        "angular_distance": angles,
        "branch_ratio": {"mixer": [0.0, 0.1, 0.0], "mlp": [0.1, None, 0.0]},
        "variance": [0.5, 1.0, 2.0, 2.0],
    }
    assert dead_blocks(figures) == [3]
    assert findings(figures) == [
        "Block 3 is dead: the stream is not changed.",
        "The mixer of block 1 adds nothing.",
        "Without block 2 (removed one at a time) the loss is lower by more than two "
        "standard errors.",
        "The deeper half of the blocks accounts for 0 % of the summed cost of removing single "
        "blocks.",
        "The stream's variance goes from 0.5 to 2 (4 times).",
    ]
    assert spans([2]) == "block 2" and spans([1, 2, 3, 7]) == "blocks 1-3, 7"


def test_rows_become_documents(smoke_data) -> None:
    """Oracle: the loader's rows: same labels in all, each document's tokens from place 1 on."""
    from llmnorm.config.file import load
    from llmnorm.data import packing
    from llmnorm.data.loader import evaluation_batches
    from tests.running import SMOKE

    config = load(SMOKE, [f"data.dir={smoke_data}"]).config
    packed = packing.prepare(config.data, config.tokenizer)
    total = sum(source.validation_rows for source in packed.sources)
    whole = held_out(packed, 10**6, at_once=7)
    assert whole.total == total
    assert whole.rows == {s.name: s.validation_rows for s in packed.sources}
    labels = 0
    for index in range(len(packed.sources)):
        for batch in evaluation_batches(packed, index):
            labels += int((batch["shift_labels"] != -100).sum())
            for ids, targets in documents(batch):
                assert ids[1:].equal(targets[: len(ids) - 1]) or targets[-1] == -100
    assert whole.tokens == labels
    part = held_out(packed, 21, at_once=16)  # 2 rows a batch, so that there are 8 of them
    assert part.total == 21 and len(part.rows) == 2 and len(part.batches) == 11
    for batch in part.batches:
        assert bool(batch.real[:, 0].all()) and not bool((batch.labels[~batch.real] != -100).any())
