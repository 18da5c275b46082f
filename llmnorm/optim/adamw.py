"""AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, Alg. 2.

t <- t + 1;  W <- W (1 - lr wd);  M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G^2
W <- W - lr / (1 - b1^t) * M / (sqrt(V) / sqrt(1 - b2^t) + eps)

The arithmetic is torch's own, always its fused kernel (it exists for CPUs too, where the default
one takes three times as long). What is added: the state is allocated before the first step, so that
a checkpoint is copied into it in place and one taken before the first step is complete.
"""

from typing import TYPE_CHECKING

import torch

from llmnorm.optim.groups import Groups

if TYPE_CHECKING:
    from llmnorm.optim.settings import AdamWSettings


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW over `Groups`; decay on hidden matrices only.

    Each param group keeps its peak learning rate under `peak_lr`; the caller sets
    `lr = peak_lr * schedule(step)` before every step.
    """

    def __init__(self, groups: Groups, settings: "AdamWSettings") -> None:
        auxiliary_lr = settings.auxiliary.lr
        peaks = [settings.lr, settings.lr if auxiliary_lr is None else auxiliary_lr]
        param_groups = [
            {"params": list(members.values()), "lr": lr, "peak_lr": lr, "weight_decay": decay}
            for members, lr, decay in zip(groups, peaks, [settings.weight_decay, 0.0], strict=True)
            if members
        ]
        super().__init__(param_groups, betas=settings.betas, eps=settings.eps, fused=True)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter] = {
                # The fused kernel wants the counter beside the parameter, in float32.
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
