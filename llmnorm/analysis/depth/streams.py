"""Figures of the streams between blocks: variance, branches, angles, ranks, attention.

Sources: variance and angular distance, Sun et al. 2025 (arXiv 2502.05795), figure 4 and equation 1;
effective rank, Roy & Vetterli 2007; the others are defined below.

Shapes: L blocks; the stream x_l is what block l reads (l from 0), x_L what the last block returns,
before the final norm; streams (L + 1, tokens, hidden), real tokens only.

What would surprise: all sums are float64, because of angles near zero: from float32 cosines two
equal streams would be 1e-4 apart.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from llmnorm.analysis.depth.anatomy import SIDES, Block
from llmnorm.analysis.depth.hooks import Place, recorded
from llmnorm.analysis.depth.pieces import Batch
from llmnorm.nn.mixers.contract import Mixer

Figures = dict[str, Any]
TOKENS = 512  # whose angles are computed at a time


class Streams:
    """Sums over batches, which `add` extends and `figures` divides.

    Args:
        blocks: the model's blocks.
        hidden_size: width of the stream.
        device: where the sums are kept.

    Attributes:
        tokens: real tokens so far.
        harmonic: sum over them of 1 / (position in the document, from 1).
        absent: figures that cannot be measured, with the reason.
    """

    def __init__(self, blocks: list[Block], hidden_size: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.blocks = blocks
        self.layers = layers = len(blocks)
        self.tokens = 0
        self.harmonic = 0.0
        self.variance, self.square = zeros(layers + 1), zeros(layers + 1)
        self.angles = zeros(layers + 1, layers + 1)
        self.sums, self.products = (
            zeros(layers + 1, hidden_size),
            zeros(layers + 1, hidden_size, hidden_size),
        )
        self.pairs, self.cosines = 0.0, zeros(layers + 1)
        self.branches = {side: zeros(2, layers) for side in SIDES}  # energies of f and of carry x
        # (2, heads) by layer: nats, and the share of uniform attention's entropy
        self.entropy: list[Tensor | None] = [None] * layers
        self.queries = 0
        self.absent: dict[str, str] = {}
        self._without_entropy: dict[str, set[int]] = {}  # reason -> blocks, counted from 1
        self.places = [Place(block.module, "in") for block in blocks]
        self.places.append(Place(blocks[-1].module, "out"))

    @torch.no_grad()
    def add(self, forward: Callable[[], object], batch: Batch) -> None:
        """Add a batch to the sums.

        Args:
            forward: passes `batch` through the model once.
            batch: documents on the model's device.
        """
        places = list(self.places)
        for block in self.blocks:
            for branch in block.branches.values():
                places += [branch.stream, Place(branch.added, "out")]
        attention = [block.branches.get("mixer") for block in self.blocks]
        hooks = [
            branch.module.register_forward_hook(self._attention(layer, batch), with_kwargs=True)
            for layer, branch in enumerate(attention)
            if branch is not None
        ]
        try:
            with recorded(places) as seen:
                forward()
        finally:
            for hook in hooks:
                hook.remove()
        for layer, block in enumerate(self.blocks):
            for side, branch in block.branches.items():
                f, x = seen[Place(branch.added, "out")], seen[branch.stream]
                energies = [_energy(f, batch), branch.carry**2 * _energy(x, batch)]
                self.branches[side][:, layer] += torch.stack(energies)
        x = torch.stack([seen[place] for place in self.places])
        self._pairs(x, batch)
        self._tokens(x[:, batch.real].double())
        self.tokens += int(batch.real.sum())
        self.queries += int((batch.real & (batch.positions > 1)).sum())
        self.harmonic += float((1 / batch.positions[batch.real].double()).sum())

    def _tokens(self, x: Tensor) -> None:
        """Sums over single tokens; x (L + 1, tokens, hidden) float64."""
        self.variance += x.var(-1, correction=0).sum(-1)
        self.square += x.square().mean(-1).sum(-1)
        self.sums += x.sum(1)
        self.products += x.mT @ x
        for part in normalize(x, dim=-1).split(TOKENS, dim=1):
            cosines = torch.einsum("ltd,ntd->tln", part, part).clamp(-1, 1)
            self.angles += cosines.arccos().sum(0) / math.pi

    def _pairs(self, x: Tensor, batch: Batch) -> None:
        """Cosines of all pairs of different tokens of a document.

        For unit vectors u of n tokens, |sum u|^2 = n + the sum of the cosines of all pairs.
        x: (L + 1, lines, length, hidden).
        """
        unit = normalize(x.double(), dim=-1) * batch.real.unsqueeze(-1)
        counts = batch.real.sum(-1).double()
        self.cosines += (unit.sum(-2).square().sum(-1) - unit.square().sum((-1, -2))).sum(-1)
        self.pairs += float((counts * (counts - 1)).sum())

    def _attention(self, layer: int, batch: Batch) -> Callable[..., None]:
        """A forward hook that adds the entropy of a layer's attention weights."""

        def add_entropy(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            kind = type(module).__name__
            matrix = mixing_matrix(module, args, output)
            if matrix is None:
                self._no_entropy(layer, f"{kind} does not return its mixing matrix")
                return
            queries = batch.real & (batch.positions > 1)  # the first token sees itself alone
            if not bool(queries.any()):
                return
            p = matrix.transpose(1, 2)[queries].double()  # (queries, heads, keys)
            if float(p.min()) < 0 or not torch.allclose(p.sum(-1), p.new_ones(()), atol=1e-3):
                self._no_entropy(layer, f"the weights of {kind} are not distributions")
                return
            nats = torch.special.entr(p).sum(-1)
            share = nats / batch.positions[queries].double().log().unsqueeze(-1)
            found = torch.stack((nats.sum(0), share.sum(0)))
            before = self.entropy[layer]
            self.entropy[layer] = found if before is None else before + found

        return add_entropy

    def _no_entropy(self, layer: int, reason: str) -> None:
        self._without_entropy.setdefault(reason, set()).add(layer + 1)
        self.absent["attention_entropy"] = "; ".join(
            f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, sorted(blocks)))}: {why}"
            for why, blocks in self._without_entropy.items()
        )

    def figures(self) -> Figures:
        """The figures by name; lists have an entry per block (L) or per stream (L + 1)."""
        n = self.tokens
        mean = self.sums / n
        covariance = self.products / n - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        found: Figures = {
            "tokens": n,
            "variance": (self.variance / n).tolist(),
            "mean_square": (self.square / n).tolist(),
            "angular_distance": (self.angles / n).tolist(),
            "token_cosine": (self.cosines / max(self.pairs, 1)).tolist(),
            "branch_ratio": {
                side: [
                    float(f / x) if side in block.branches and float(x) > 0 else None
                    for block, f, x in zip(self.blocks, *self.branches[side], strict=True)
                ]
                for side in SIDES
            },
            **ranks(covariance),
        }
        picks: dict[str, Callable[[Tensor], Tensor]] = {
            "mean": Tensor.mean,
            "lowest": Tensor.min,
            "highest": Tensor.max,
        }
        sums = [None if e is None else e / self.queries for e in self.entropy]
        found["attention_entropy"] = {
            "nats": [None if s is None else float(s[0].mean()) for s in sums],
            **{
                name: [None if s is None else float(pick(s[1])) for s in sums]
                for name, pick in picks.items()
            },
        }
        return found


def mixing_matrix(module: nn.Module, args: Any, output: Any) -> Tensor | None:
    """The mixing matrix of a module, given the arguments and the output of its last call.

    Returns:
        (batch, heads, length, length); None if the module does not offer it.
    """
    if isinstance(module, Mixer):
        return module.materialize(module.prepare(*args[:2]), args[1])
    if isinstance(output, tuple) and len(output) > 1:
        weights = output[1]  # Hugging Face's, where attention is computed eagerly
        if isinstance(weights, Tensor) and weights.ndim == 4:
            return weights
    return None


def ranks(covariance: Tensor) -> Figures:
    """Three ranks of centred streams with the covariances (..., hidden, hidden).

    With eigenvalues e and singular values s = sqrt(e): effective rank exp(-sum p log p) for
    p = s / sum s; participation ratio (sum e)^2 / sum e^2; stable rank sum e / max e.
    """
    e = torch.linalg.eigvalsh(covariance).clamp(min=0)
    p = e.sqrt() / e.sqrt().sum(-1, keepdim=True).clamp(min=1e-300)
    total = e.sum(-1)
    return {
        "effective_rank": torch.special.entr(p).sum(-1).exp().tolist(),
        "participation_ratio": (total**2 / e.square().sum(-1).clamp(min=1e-300)).tolist(),
        "stable_rank": (total / e.amax(-1).clamp(min=1e-300)).tolist(),
    }


def _energy(x: Tensor, batch: Batch) -> Tensor:
    """The sum of squares over real tokens."""
    return x[batch.real].double().square().sum()
