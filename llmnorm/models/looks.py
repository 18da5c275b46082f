"""What is looked at in a class of transformers before it is trained, and how it is run then.

    found = look(model, autocast=, recomputes=)     sets model.ways
    print(found.table())

No list of families and no key of a configuration says how a class treats packed documents or what
its head adds. So a row of three short documents is run:

- isolation: the gradient of the second document's hidden states by the embeddings of the others is
  exactly 0 where nothing passes between documents, in any precision and under any sharding.
- positions: hidden states are those of the document alone.
- head: the class's own logits are those of a linear head, also of hidden states 30 times as large,
  since a cap is invisible in small logits; else those of its own forward pass on hidden states.
- loss: the class's own `labels=` loss is the cross-entropy of its logits.
- router loss: the balancing loss of a row is the class's own, where it is to be trained.
- recomputation: gradients are those without it.

All processes make the same passes on the same tokens.

What would surprise: windows and chunks that are longer than these documents cannot be looked at;
the table names them. The looks are made in training mode, in which some classes run other code.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from llmnorm.models.foreign import Foreign, Head, Rows, Ways
from llmnorm.models.router_loss import balance_beside_own
from llmnorm.nn.head import LanguageHead
from llmnorm.nn.loss import cross_entropy
from llmnorm.part import InputError

WIDTH = 13  # of the names in the table
LENGTHS = (9, 17, 14)  # tokens of the documents; the second is the one that is looked at
_SPANS = ((0, 9), (9, 26), (26, 40))
_LARGER = 30.0  # times as large hidden states, for caps
# Differences by rounding, over the largest number: in float32, and where products are bf16. Of bf16
# the median token counts, since a router may send a token elsewhere by rounding alone.
_ROUNDING, _ROUNDING_OF_HALVES = 1e-4, 5e-2
_REACH = re.compile(r"(window|chunk|block)(_size|_length)?$")
_SAYS: dict[str, str] = {
    "positions": "positions that restart at 0",
    "mask": "transformers' packed mask",
    "kernels": "arguments of kernels (seq_idx, cu_seq_lens)",
    "apart": "a document a row, padded on the right",
    "linear": "a linear head: loss in chunks, no logits",
    "own": "the class's own forward pass on hidden states, in chunks",
    "logits": "all logits of the class",
}


class Look(NamedTuple):
    """A line of the table.

    Attributes:
        name: what was looked at.
        found: what was seen, and what follows.
    """

    name: str
    found: str


class Looks(NamedTuple):
    """What was seen of a model.

    Attributes:
        ways: how it is run.
        lines: of the table.
    """

    ways: Ways
    lines: list[Look]

    def table(self) -> str:
        """A line a look."""
        return "\n".join(f"  {line.name:{WIDTH}}  {line.found}" for line in self.lines)


def look(
    model: Foreign,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
    recomputes: bool = False,
    dropout: bool = False,
) -> Looks:
    """Look at a model with its weights, whole or laid out over processes; sets its `ways`.

    Args:
        model: of a run; every process calls this.
        autocast: gives the context of a forward pass.
        gradient: of a loss by a tensor, where the model is laid out (`Parallel.gradient`).
        recomputes: whether its blocks are recomputed in a backward pass.
        dropout: whether the class's own dropout is on.

    Raises:
        InputError: no way keeps documents apart; numbers are not finite; recomputation gives other
            gradients; the class draws random numbers that dropout does not name; or its balancing
            loss is not that of the router logits it returns.
    """
    was_training, ways = model.training, model.ways
    with autocast():
        try:
            model.train()
            looks = _Looks(model, gradient or _by_autograd, recomputes, dropout, was_training)
            return looks.all()
        finally:
            model.ways = model.ways or ways
            model.train(was_training)


class _Looks:
    """The passes of one look at a model, and what they have found."""

    def __init__(
        self,
        model: Foreign,
        gradient: Callable[[Tensor, Tensor], Tensor],
        recomputes: bool,
        dropout: bool,
        trains: bool = True,
    ) -> None:
        self.model, self.name = model, model.kind.__name__
        self.gradient = gradient
        self.recomputes, self.dropout, self.trains = recomputes, dropout, trains
        self.device = next(model.parameters()).device
        rows = model.get_input_embeddings().num_embeddings
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(rows, (1, sum(LENGTHS)), generator=draws)
        self.ids = ids.to(self.device)
        self.positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(self.device)
        bounds = torch.tensor([0, *(end for _, end in _SPANS)], dtype=torch.int32)
        self.documents = {
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds.to(self.device)),
            **dict.fromkeys(("max_length_q", "max_length_k"), max(LENGTHS)),
        }
        self.weights = torch.randn(64, generator=draws)
        halves = torch.is_autocast_enabled(self.device.type)
        self.bound = _ROUNDING_OF_HALVES if halves else _ROUNDING
        self.halves = halves
        self.lines: list[Look] = []

    def all(self) -> Looks:
        self._noise()
        rows = self._rows()
        head = self._head()
        self.model.ways = Ways(rows, head)
        self._loss()
        if self.model.is_mixture and self.trains:
            ids = self.ids[:, slice(*_SPANS[1])]
            self._say("router loss", balance_beside_own(self.model, ids, self.bound))
        self._reach()
        if self.recomputes:
            self._recomputation(rows)
        return Looks(self.model.ways, self.lines)

    def _noise(self) -> None:
        if self.dropout:
            self.model.eval()  # what is compared below is compared without it
            return
        first, second = self._alone(1), self._alone(1)
        if not bool(first.isfinite().all()):
            raise InputError(f"{self.name}: its hidden states are not finite, before any step")
        if not self._close(first, second):
            raise InputError(
                f"{self.name}: two passes over the same tokens differ in training mode, so the "
                "class draws random numbers that no key of dropout or jitter switches off; "
                "model.dropout=config trains with them"
            )

    def _rows(self) -> Rows:
        """The first way that keeps documents apart."""
        failed: list[str] = []
        for rows in get_args(Rows):
            why = self._fault(rows)
            if why is None:
                also = f" ({'; '.join(failed)})" if failed else ""
                self._say("documents", f"{_SAYS[rows]}{also}")
                return cast(Rows, rows)
            failed.append(f"{_SAYS[rows]}: {why}")
        raise InputError(
            f"{self.name}: documents of a batch reach each other whatever is done: "
            f"{'; '.join(failed)}"
        )

    def _fault(self, rows: Rows) -> str | None:
        """Why a way does not keep documents apart; None if it does."""
        try:
            gradient, hidden = self._gradient(rows)
        except Exception as error:  # of any kind: it is the class's own code
            return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        if rows == "apart":  # rows of the second and of the third document
            own, others = gradient[:1, : LENGTHS[1]], [gradient[:1, LENGTHS[1] :], gradient[1:]]
            found = {1: hidden[0, : LENGTHS[1]], 2: hidden[1, : LENGTHS[2]]}
        else:
            first, last = _SPANS[1]
            own, others = gradient[:, first:last], [gradient[:, :first], gradient[:, last:]]
            found = {n: hidden[0, slice(*_SPANS[n])] for n in (1, 2)}
        if not float(own.abs().max()) > 0 or not bool(gradient.isfinite().all()):
            return "no finite gradient"
        leak = max(float(part.abs().max()) for part in others if part.numel())
        if leak:
            return f"another document's gradient is {leak:.1e}"
        for number, states in found.items():
            alone = self._alone(number)[0]
            if not self._close(states, alone):
                return f"hidden states are off by {self._off(states, alone):.1e}"
        return None

    def _gradient(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Of the second document's hidden states by the embeddings; and all hidden states."""
        model = self.model
        embedded: list[Tensor] = []

        def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_(True))
            return embedded[-1]

        def run(inner: Foreign) -> Tensor:
            if rows == "apart":
                return inner.hidden(self._padded(), None, None, rows)
            return inner.hidden(self.ids, self.positions, self.documents, rows)

        hook = model.get_input_embeddings().register_forward_hook(cut)
        try:
            with torch.enable_grad():
                hidden = model(inside=run)
                first, last = (0, LENGTHS[1]) if rows == "apart" else _SPANS[1]
                part = hidden[0, first:last].float()
                weights = self.weights.repeat(-(-part.shape[-1] // 64))[: part.shape[-1]]
                loss = (part * weights.to(part.device)).sum()
                gradient = self.gradient(loss, embedded[0])
        finally:
            hook.remove()
        return gradient.detach().float(), hidden.detach().float()

    def _padded(self) -> Tensor:
        """The second and the third document, each a row, with another token behind the shorter."""
        rows = [self.ids[0, slice(*_SPANS[n])] for n in (1, 2)]
        rows[1] = torch.cat((rows[1], self.ids[0, : LENGTHS[1] - LENGTHS[2]]))
        return torch.stack(rows)

    @torch.no_grad()
    def _alone(self, number: int) -> Tensor:
        """Hidden states (1, length, hidden) of a document by itself."""
        ids = self.ids[:, slice(*_SPANS[number])]
        hidden: Tensor = self.model(inside=lambda m: m.hidden(ids, None, None, "apart"))
        return hidden.float()

    @torch.no_grad()
    def _head(self) -> Head:
        """The cheapest way that gives the class's own logits, as they are and of larger numbers."""
        ids = self.ids[:, slice(*_SPANS[1])]
        head = self.model.get_output_embeddings()
        plain = isinstance(head, LanguageHead)
        fits = {"linear": plain, "own": True}
        for factor in (1.0, _LARGER):
            asked = self._own_logits(ids, factor)
            if asked is None:
                fits = dict.fromkeys(fits, False)
                break
            wanted, hidden = asked
            for name in [name for name, so_far in fits.items() if so_far]:
                try:
                    if name == "linear":
                        logits = self.model(inside=lambda m, h=hidden: m.get_output_embeddings()(h))
                    else:
                        logits = self.model(inside=lambda m, h=hidden: m.own_logits(h, ids))
                    same = logits.shape == wanted.shape and self._same(logits, wanted)
                except Exception:  # of any kind: a class that asks its base for more
                    same = False
                fits[name] = same
        way: Head = "linear" if fits["linear"] else "own" if fits["own"] else "logits"
        found = _SAYS[way]
        if way == "logits":
            rows = self.model.get_input_embeddings().num_embeddings
            found += f": {rows * 8 / 2**20:.2g} MiB for every token of a micro-batch"
        self._say("head", found)
        return way

    def _own_logits(self, ids: Tensor, factor: float) -> tuple[Tensor, Tensor] | None:
        """The class's logits where its base gives hidden states `factor` times as large; those.

        None where the class calls a part of its base and not the base itself (OPT).
        """
        kept: list[Tensor] = []

        def enlarge(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] * factor
            kept.append(hidden)
            if isinstance(output, tuple):
                return (hidden, *output[1:])
            output.last_hidden_state = hidden
            return output

        hook = self.model.base_model.register_forward_hook(enlarge)
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
        finally:
            hook.remove()
        return (logits, kept[0]) if kept else None

    @torch.no_grad()
    def _loss(self) -> None:
        """Compare with the class's own loss, and say what that has besides."""
        ids = self.ids[:, slice(*_SPANS[1])]
        try:
            output = self.model(input_ids=ids, labels=ids, use_cache=False, return_dict=True)
        except Exception as error:  # of any kind: it is the class's own code
            reason = " ".join(str(error).split())[:80]
            self._say("loss", f"the class has none of its own ({type(error).__name__}: {reason})")
            return
        labels = torch.cat((ids[:, 1:], ids.new_full((1, 1), -100)), 1)
        ours = self.model(input_ids=ids, shift_labels=labels).loss
        plain = float(cross_entropy(output.logits, labels))
        if abs(float(ours) - plain) > self.bound * max(1.0, abs(plain)):
            raise InputError(
                f"{self.name}: the loss of its logits is {plain:.6g}, and {float(ours):.6g} as "
                "it would be trained"
            )
        more = float(output.loss) - plain
        if abs(more) > self.bound * max(1.0, abs(plain)):
            self._say("loss", f"cross-entropy; the class adds {more:+.3g}, which is not trained")
        else:
            self._say("loss", "that of the class")

    def _reach(self) -> None:
        """Name windows and chunks that the documents were too short for."""
        config, longest = self.model.config.get_text_config(), max(LENGTHS)
        found = [
            f"{name} {value}"
            for name, value in vars(config).items()
            if _REACH.search(name) and type(value) is int and value > longest
        ]
        if found:
            self._say("not looked at", f"{', '.join(found)}: documents of {longest} tokens")

    def _recomputation(self, rows: Rows) -> None:
        with _kept(self.model):
            wanted, _ = self._gradient(rows)
        found, _ = self._gradient(rows)
        if not self._close(found, wanted):
            raise InputError(
                f"parallel.activation_checkpointing: recomputed blocks of {self.name} give other "
                f"gradients (by {self._off(found, wanted):.1e}); leave it out"
            )
        self._say("recomputation", "gradients as without it")

    def _say(self, name: str, found: str) -> None:
        self.lines.append(Look(name, found))

    def _same(self, found: Tensor, wanted: Tensor) -> bool:
        """Whether logits are those of the same operations: but for the kernels' last bits."""
        bound = 1e-6 * float(wanted.abs().max()) if not self.halves else 0.0
        return bool(((found.float() - wanted.float()).abs() <= bound).all())

    def _close(self, found: Tensor, wanted: Tensor) -> bool:
        return self._off(found, wanted) <= self.bound

    def _off(self, found: Tensor, wanted: Tensor) -> float:
        """The difference over the largest number: the worst token's, in halves the median's."""
        apart = (found - wanted).abs().flatten(0, -2).amax(-1)
        worst = apart.median() if self.halves else apart.max()
        return float(worst / wanted.abs().max().clamp(min=1e-30))


@contextmanager
def _kept(model: Foreign) -> Iterator[None]:
    """Context manager: the blocks are not recomputed (`Parallel.prepare` wraps their forward)."""
    wrapped = {block: block.forward for block in model.units().values()}
    for block, forward in wrapped.items():
        assert isinstance(forward, partial), "recomputed by Parallel.prepare"
        block.forward = forward.args[0]
    try:
        yield
    finally:
        for block, forward in wrapped.items():
            block.forward = forward


def _by_autograd(loss: Tensor, tensor: Tensor) -> Tensor:
    return torch.autograd.grad(loss, tensor)[0]
