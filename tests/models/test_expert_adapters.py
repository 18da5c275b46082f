"""Where the stacks of experts are, and what the layers around them are called."""

import torch
from torch import nn

from llmnorm.models.expert_adapters import Stack, expert_stacks, target_stacks


class Experts(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_experts = 4
        self.is_transposed = count == 4
        self.up = nn.Parameter(torch.empty(count, 6, 3))
        self.bias = nn.Parameter(torch.empty(count, 6))
        self.down = nn.Parameter(torch.empty(count, 3, 6))


def model() -> nn.Module:
    """Experts, beside what could be taken for them."""
    return nn.ModuleDict({"a": Experts(4), "b": Experts(5), "convolution": nn.Conv1d(4, 4, 3)})


def test_stacks_are_told_by_their_module() -> None:
    """Oracle: by hand; a convolution has three axes, and another first size is no stack."""
    mixture = model()
    assert [*expert_stacks(mixture)] == ["a.up", "a.down"]
    assert expert_stacks(mixture)["a.up"] is mixture.get_parameter("a.up")


def test_the_first_stack_of_a_module_has_the_inner_layer() -> None:
    """Oracle: PEFT's names, by hand; they do not follow the order in which stacks are asked for."""
    both = [Stack("a.up", "a.base_layer", True), Stack("a.down", "a", True)]
    assert target_stacks(model(), ["down", "a.up"]) == both
    assert target_stacks(model(), ["down"]) == [Stack("a.down", "a", True)]
    assert target_stacks(model(), None) == []
