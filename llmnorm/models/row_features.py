"""What is measured of every row of a batch in a forward pass, for a selection among them.

Shapes: rows of the batch r, their spans in the tokens laid end to end (start, stop); x (tokens, in)
what enters the last values' projection, y (tokens, out) what leaves it; L_i the mean loss of row i.

    Losses          L_i
    ZerothOrder     (L_i(W + eps z) - L_i(W - eps z)) / 2 eps for some directions z (SPSA: Spall
                    1992), W the last values' projection; CoLM, arXiv 2407.19580, section 4.2
    Gradient        G_i = sum over the row's tokens of (dL_i / dy)^T x, the exact gradient of W,
                    projected on some directions
    Hidden          the mean of the row's last hidden states

The model's forward calls the object (`feature=`) in place of its last block. All that is needed is
whole there under every sharding: a block gathers its weights when it is called, and final norm and
head are gathered for the model's own forward.

What would surprise:
- The projection's output is perturbed, x -> W x + eps z x, by a hook. To rounding that is the same
  as another weight. `torch.func.functional_call` would be wrong without a word under FSDP2, whose
  gathered weights replace the swapped one.
- Last block, norm and head run in float32 here, whatever the training's precision is: L+ - L- is a
  small difference of large numbers (in bf16 it was 5 to 11 % off, in float32 .07 %). The block is
  neither compiled nor recomputed.
- With an adapter W is its B matrix at the values' projection. A mixer whose values have no
  projection of their own is measured at its output projection (`projection`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmnorm.nn.loss import IGNORED
from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.precision import wide_dtype, without_autocast
from llmnorm.part import InputError

Span = tuple[int, int]


class Ending(NamedTuple):
    """What stands behind the last block, and the labels.

    Attributes:
        norm: hidden (batch, length, hidden) -> the same, by the final norm.
        losses: last hidden states (tokens, hidden) -> the loss of every token (tokens,), 0 where
            there is no label; where gradients are enabled also its gradient (tokens, hidden).
        labels: (tokens,), -100 where there is none.
    """

    norm: Callable[[Tensor], Tensor]
    losses: Callable[[Tensor], Any]
    labels: Tensor


class Measured(NamedTuple):
    """What was measured of the rows of a batch.

    Attributes:
        features: (rows, width), float32 or float64.
        losses: (rows,) mean losses; None where the feature needs none.
    """

    features: Tensor
    losses: Tensor | None


class Feature:
    """What is measured; `measure` runs the model for it.

    Attributes:
        width: numbers a row.
        has_losses: whether it knows the rows' losses.
    """

    width: int
    has_losses = True

    def __init__(self) -> None:
        self._spans: Sequence[Span] = ()
        self._found: Measured | None = None

    @torch.no_grad()
    def measure(self, model: nn.Module, inputs: dict[str, Any], spans: Sequence[Span]) -> Measured:
        """Run `model`, in evaluation mode, on `inputs`; every process calls it equally often.

        Args:
            model: a LlmNormForCausalLM, whole or a part of it.
            inputs: its keywords, labels among them.
            spans: where the tokens of each row are in the inputs laid end to end.
        """
        self._spans = spans
        model(**inputs, feature=self)
        assert self._found is not None
        found, self._found = self._found, None
        return found

    def __call__(self, block: nn.Module, hidden: Tensor, context: Context, end: Ending) -> Tensor:
        """Measure, by the model's own forward pass; returns what leaves the block."""
        hidden = hidden.to(wide_dtype(hidden.dtype))
        with without_autocast(hidden.device.type), _plain(block):
            out, self._found = self._measured(block, hidden, context, end)
        return out

    def _measured(
        self, block: nn.Module, hidden: Tensor, context: Context, end: Ending
    ) -> tuple[Tensor, Measured]:
        raise NotImplementedError

    def _means(self, of_tokens: Tensor, labels: Tensor) -> Tensor:
        """The rows' means over their labels, (rows,) float64, of numbers of tokens (tokens,)."""
        counts = (labels != IGNORED).double()
        return self._sums(of_tokens.double()) / self._sums(counts).clamp(min=1)

    def _sums(self, of_tokens: Tensor) -> Tensor:
        """The rows' sums, (rows, ...), of (tokens, ...)."""
        if not self._spans:
            return of_tokens.new_zeros(0, *of_tokens.shape[1:])
        return torch.stack([of_tokens[start:stop].sum(0) for start, stop in self._spans])


class Losses(Feature):
    """The rows' mean losses alone."""

    width = 0

    def _measured(
        self, block: nn.Module, hidden: Tensor, context: Context, end: Ending
    ) -> tuple[Tensor, Measured]:
        out = block(hidden, context)
        losses = self._means(end.losses(end.norm(out).flatten(0, -2)), end.labels)
        return out, Measured(losses.new_zeros(len(losses), 0), losses)


class Hidden(Feature):
    """The mean of each row's last hidden states.

    Args:
        width: of the model.
    """

    has_losses = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def _measured(
        self, block: nn.Module, hidden: Tensor, context: Context, end: Ending
    ) -> tuple[Tensor, Measured]:
        out = block(hidden, context)
        tokens = [stop - start for start, stop in self._spans]
        sums = self._sums(end.norm(out).flatten(0, -2))
        return out, Measured(sums / sums.new_tensor(tokens).unsqueeze(1), None)


class ZerothOrder(Feature):
    """Differences of losses along directions of the last values' projection.

    Args:
        at: the projection.
        directions: (width, out, in).
        eps: how far.
    """

    def __init__(self, at: nn.Module, directions: Tensor, eps: float) -> None:
        super().__init__()
        self.width = len(directions)
        self._at, self._directions, self._eps = at, directions, eps

    def _measured(
        self, block: nn.Module, hidden: Tensor, context: Context, end: Ending
    ) -> tuple[Tensor, Measured]:
        slopes, means = list[Tensor](), list[Tensor]()
        for direction in self._directions:
            above, below = (
                self._losses(block, hidden, context, end, direction, sign * self._eps)
                for sign in (1, -1)
            )
            slopes.append((above - below) / (2 * self._eps))
            means.append((above + below) / 2)
        return hidden, Measured(torch.stack(slopes, 1), torch.stack(means).mean(0))

    def _losses(
        self,
        block: nn.Module,
        hidden: Tensor,
        context: Context,
        end: Ending,
        direction: Tensor,
        eps: float,
    ) -> Tensor:
        with perturbed(self._at, direction, eps):
            out = block(hidden, context)
        return self._means(end.losses(end.norm(out).flatten(0, -2)), end.labels)


class Gradient(Feature):
    """The exact gradient of the last values' projection, on some directions.

    One backward pass leads from the losses to the projection's output and reaches no parameter.
    FSDP2 ends it as it ends every backward pass: what was gathered is given up, so that nothing of
    the model can run behind it in the same forward pass.

    Args:
        at: the projection.
        directions: (width, out, in).
    """

    def __init__(self, at: nn.Module, directions: Tensor) -> None:
        super().__init__()
        self.width = len(directions)
        self._at, self._directions = at, directions

    def _measured(
        self, block: nn.Module, hidden: Tensor, context: Context, end: Ending
    ) -> tuple[Tensor, Measured]:
        entered, left = list[Tensor](), list[Tensor]()

        def cut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not _of_tokens(inputs[0]):
                return None
            entered.append(inputs[0].detach())
            left.append(output.detach().requires_grad_())
            return left[0]

        handle = self._at.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                out = block(hidden, context)
                last = end.norm(out)
                each, gradient = end.losses(last.detach().flatten(0, -2))
        finally:
            handle.remove()
        assert len(left) == 1, "the projection was not called, or more than once"
        shares = self._sums((end.labels != IGNORED).to(gradient.dtype)).clamp(min=1)
        for (start, stop), labels in zip(self._spans, shares, strict=True):
            gradient[start:stop] /= labels  # of the row's mean loss
        (slope,) = torch.autograd.grad(last, left, gradient.view_as(last))
        slope, x = slope.flatten(0, -2), entered[0].flatten(0, -2).to(slope.dtype)
        flat = self._directions.to(slope.dtype).flatten(1)
        features = [
            flat @ (slope[start:stop].t() @ x[start:stop]).flatten() for start, stop in self._spans
        ]
        made = torch.stack(features) if features else slope.new_zeros(0, self.width)
        return out.detach(), Measured(made, self._means(each, end.labels))


def projection(block: nn.Module) -> tuple[str, nn.Module]:
    """The linear layer of a block at which its rows are measured, and its name in the block.

    That is the values' projection, or the mixer's output projection where one projection makes the
    values and other things; with an adapter the B matrix of the adapter's layer there.

    Raises:
        InputError: other layers of the model have an adapter, and this one does not.
    """
    mixer = next(module for module in block.modules() if isinstance(module, Mixer))
    try:
        found: nn.Module = mixer.values
    except InputError:
        found = mixer.output
    name = next(name for name, module in block.named_modules() if module is found)
    if isinstance(layers := getattr(found, "lora_B", None), nn.ModuleDict):
        return f"{name}.lora_B", layers["default"]
    return name, found


def directions(at: nn.Module, count: int, seed: int) -> Tensor:
    """Directions (count, out, in) of a linear layer's weight, N(0, 1), the same on every process.

    Args:
        at: the layer; its weight may be a part of the whole one.
        count: how many.
        seed: of the draws, which are made on the CPU.
    """
    sizes = at.out_features, at.in_features
    assert all(isinstance(size, int) for size in sizes), at
    parameter = next(at.parameters(), None)
    device = parameter.device if parameter is not None else next(at.buffers()).device
    wide = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, *sizes, generator=generator, dtype=wide)  # type: ignore[call-overload]
    return drawn.to(device)


@contextmanager
def perturbed(at: nn.Module, direction: Tensor, eps: float) -> Iterator[None]:
    """Context manager: the linear layer `at` computes with W + eps `direction` (out, in)."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not _of_tokens(inputs[0]):
            return None
        moved = F.linear(inputs[0], direction.to(inputs[0].dtype))
        return output.add(moved.to(output.dtype), alpha=eps)

    handle = at.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _of_tokens(x: Tensor) -> bool:
    """Whether a layer was called with tokens (batch, length, in).

    DoRA also calls B with an identity matrix, for the norms of W, which are a constant to it.
    """
    return x.dim() == 3


@contextmanager
def _plain(block: nn.Module) -> Iterator[None]:
    """Context manager: the block is neither compiled nor recomputed, and multiplies in float32.

    Linear layers that are stored narrower, since they are frozen, widen their weight for the
    product.
    """
    with ExitStack() as stack:
        own = vars(block).pop("forward", None)  # what parallel/processes.py has put there
        if own is not None:
            stack.callback(vars(block).__setitem__, "forward", own)
        for module in block.modules():
            if isinstance(module, nn.Linear) and module.weight.itemsize < 4:
                vars(module)["forward"] = _Widened(module)
                stack.callback(vars(module).pop, "forward")
        yield


class _Widened:
    """What a linear layer computes in the precision of its input."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)
