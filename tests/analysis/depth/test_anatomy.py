"""Where blocks, branches and norms are found, in architectures of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmnorm.analysis.depth.anatomy import SIDES, anatomy
from llmnorm.analysis.depth.hooks import Place, recorded
from llmnorm.part import InputError
from tests.analysis.depth.tiny import VOCABULARY, ours, stock

IDS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))

# Architecture -> the classes whose outputs are added, and the names of the block's norms.
STOCK: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "llama": ({}, ["LlamaAttention", "LlamaMLP"], ["input_layernorm", "post_attention_layernorm"]),
    "qwen3": ({}, ["Qwen3Attention", "Qwen3MLP"], ["input_layernorm", "post_attention_layernorm"]),
    "gpt2": ({}, ["GPT2Attention", "GPT2MLP"], ["ln_1", "ln_2"]),
    "gpt_neox": (  # both read the block's input
        {"use_parallel_residual": True},
        ["GPTNeoXAttention", "GPTNeoXMLP"],
        ["input_layernorm", "post_attention_layernorm"],
    ),
    "falcon": ({}, ["FalconAttention", "FalconMLP"], ["input_layernorm"]),  # adds in place
    "gemma2": (  # a norm stands between the branch and the sum
        {},
        ["Gemma2RMSNorm", "Gemma2RMSNorm"],
        [
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ],
    ),
    "olmo2": (
        {},
        ["Olmo2RMSNorm", "Olmo2RMSNorm"],
        ["post_attention_layernorm", "post_feedforward_layernorm"],
    ),
}


PRE = ["before the mixer", "before the MLP"]
ROLES = dict.fromkeys(STOCK, PRE) | {
    "falcon": PRE[:1],
    "gemma2": ["before the mixer", "after the mixer", "before the MLP", "after the MLP"],
    "olmo2": ["after the mixer", "after the MLP"],
}


@pytest.mark.parametrize("kind", STOCK)
def test_the_branches_of_stock_blocks_are_found(kind: str) -> None:
    """Oracle: the source of transformers, read by a person; and x + f + g = the block's output."""
    settings, added, norms = STOCK[kind]
    model = stock(kind, **settings)
    blocks = anatomy(model, IDS)
    assert len(blocks) == 3
    for block in blocks:
        assert [type(block.branches[side].added).__name__ for side in SIDES] == added
        assert list(block.norms) == norms
        assert list(block.roles.values()) == ROLES[kind]
        assert [block.branches[side].carry for side in SIDES] == [1.0, 1.0]
        places = [Place(block.branches[side].added, "out") for side in SIDES]
        ends = [Place(block.module, "in"), Place(block.module, "out")]
        with torch.no_grad(), recorded([*places, *ends]) as seen:
            model(input_ids=IDS, use_cache=False)
        x, y = (seen[end] for end in ends)
        torch.testing.assert_close(x + seen[places[0]] + seen[places[1]], y)


@pytest.mark.parametrize(("kind", "sides"), [("mpt", {"mixer"}), ("opt", set()), ("bloom", set())])
def test_a_branch_that_no_child_gives_is_not_invented(kind: str, sides: set[str]) -> None:
    """Oracle: these blocks add the residual inside their MLP, or flatten it between the layers."""
    assert all(set(block.branches) == sides for block in anatomy(stock(kind), IDS))


class Placed(nn.Module):
    """A block of our own with its norms elsewhere."""

    def __init__(self, placement: str, alpha: float) -> None:
        super().__init__()
        self.placement, self.alpha = placement, alpha
        self.attn, self.mlp = nn.Linear(16, 16), nn.Linear(16, 16)
        self.first, self.second = nn.RMSNorm(16), nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        if self.placement == "post":
            x = self.first(self.alpha * x + self._mix(x))
            return self.second(self.alpha * x + self.mlp(x))
        x = x + self.first(self._mix(x))
        return x + self.second(self.mlp(x))

    def _mix(self, x: Tensor) -> Tensor:
        return self.attn(x).cumsum(1)


class Model(nn.Module):
    """What `anatomy` needs of a model, in a few lines."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCABULARY, 16), nn.ModuleList(blocks)
        count = len(blocks)

        class Config:
            num_hidden_layers = count

            def get_text_config(self) -> "Config":
                return self

        self.config = Config()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return type("Output", (), {"logits": x @ self.embedding.weight.t()})


@pytest.mark.parametrize(("placement", "alpha"), [("post", 1.0), ("post", 1.9), ("reordered", 1.0)])
def test_the_stream_is_found_in_any_placement(placement: str, alpha: float) -> None:
    """Oracle: the equations of the block above; DeepNorm's alpha comes out as the carry."""
    torch.manual_seed(0)

    class Summed(Placed):  # the mixer as one child, as everywhere
        def _mix(self, x: Tensor) -> Tensor:
            return self.attn(x)

    blocks = anatomy(Model(Placed(placement, alpha), Summed(placement, alpha)).double(), IDS)
    assert blocks[0].branches.keys() == {"mlp"}  # its mixer's output is summed up by no child
    branches = blocks[1].branches
    found = blocks[1].module
    assert [branches[side].carry for side in SIDES] == pytest.approx([alpha, alpha])
    assert [branches[side].norm for side in SIDES] == [None, None]
    assert branches["mlp"].stream == (found.mlp, "in")
    behind = placement == "reordered"
    assert branches["mixer"].added is (found.first if behind else found.attn)
    assert branches["mlp"].added is (found.second if behind else found.mlp)


def test_our_own_blocks_are_found() -> None:
    """Oracle: the block's source (pre-norm)."""
    for block in anatomy(ours(norm="layer", mlp="gelu"), IDS):
        module: Any = block.module
        mixer, mlp = (block.branches[side] for side in SIDES)
        assert mixer.added is module.self_attn and mlp.added is module.mlp
        assert mixer.stream == (module, "in")
        assert mlp.stream == (module.post_attention_layernorm, "in")
        assert mixer.norm is module.input_layernorm and mlp.norm is module.post_attention_layernorm


def test_what_is_no_causal_decoder_is_refused() -> None:
    """Oracle: an encoder, whose earlier tokens see later ones; and a model without a list."""
    with pytest.raises(InputError, match="earlier logits depend on later tokens"):
        anatomy(stock("bert"), IDS)
    model = ours()
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="has no list of 7 blocks"):
        anatomy(model, IDS)
