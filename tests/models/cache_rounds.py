"""A state machine over the cache's verbs, on small models of every mixer.

    python -m tests.models.cache_rounds MODEL ROUNDS SEED

A round does something to the rows of a cache: a pass of the first rows with uneven counts of real
tokens, a rollback, an admission from this cache or from another, a release (of a row that holds nan
too), a selection. The oracle of every pass is one without a cache, over each row's tokens, in
float64: logits within 1e-12 where a mixer keeps keys and values, within 1e-10 where it keeps a
state. What a rollback replays and how much memory is held is bounded in every round.

Choices come from a function `choose(low, high)`, an integer between both: hypothesis in the suite,
random numbers in tools/campaigns/cache.py.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmnorm.models import LlmNormConfig, LlmNormForCausalLM
from llmnorm.models.building import build_model
from llmnorm.models.cache import LlmNormCache
from llmnorm.nn.cache import KEPT, KeyValues, RaggedCache
from llmnorm.nn.layer_cache import PADDING
from llmnorm.nn.recurrent_cache import RecurrentCache

SSD = {"name": "ssd", "head_dim": 8, "state_size": 6}
WINDOW = {"name": "softmax", "sliding_window": 5}
MODELS: dict[str, Any] = {
    "softmax": "softmax",
    "window": WINDOW,
    "linear": {"name": "linear", "conv_kernel": 3},
    "nala": "nala",
    "ssd": SSD,
    "gla": {"name": "gla", "num_heads": 2},
    "gated_delta": {"name": "gated_delta", "num_key_heads": 2, "key_head_dim": 4},
    "softmax before nala": ["softmax", "nala"],
    "gated_delta, ssd, window": ["gated_delta", SSD, WINDOW],
}
VOCABULARY = 31
ROWS = 4  # at most
LONGEST = 260  # tokens of a row, after which it is released
VERBS = {
    "append": 10,
    "reject": 7,
    "deep": 2,
    "admit": 2,
    "release": 1,
    "overflow": 1,
    "select": 1,
    "beams": 1,
}

Choose = Callable[[int, int], int]


class BrokenPromiseError(AssertionError):
    """The cache has done something else than it promises."""


def build(name: str) -> LlmNormForCausalLM:
    """A model whose logits tell its tokens apart: weights of 0.02 would hide a wrong position."""
    mixer = MODELS[name]
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=len(mixer) if isinstance(mixer, list) else 2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.1,
        mixer=mixer,
    )
    return build_model(config, seed=1).double().eval()


@dataclass
class Row:
    """What the cache should hold of a row.

    Attributes:
        tokens: all of them.
        floor: the least number of tokens that it can surely be taken back to.
        last: tokens that are left of the last pass, if the row was in it and the state before it
            is still this row's.
        free: it was released.
    """

    tokens: list[int] = field(default_factory=list)
    floor: int = 0
    last: int | None = None
    free: bool = False


@dataclass
class Figures:
    """What a machine has seen.

    Attributes:
        worst: largest difference of a logit.
        replayed: widths of the replays of each rollback, of the first recurrent layer.
        held: bytes of the whole cache after each round.
    """

    worst: float = 0.0
    replayed: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


class Machine:
    """A cache under its verbs, beside lists of tokens."""

    def __init__(self, model: LlmNormForCausalLM, choose: Choose, *, reserve: bool) -> None:
        self.model, self.choose, self.reserved = model, choose, reserve
        self.figures = Figures()
        self.rows: list[Row] = []
        self.cache = model.model.new_cache()
        self.limit = _reserve(model.model.new_cache())
        # Of a cache that only grows, no layer of keys and values is bounded by what it would have
        # reserved: its buffers are doubled.
        self.bounded: list[Any] = [self.cache.slots]
        if reserve:
            _reserve(self.cache)
        else:
            self.bounded = [n for n in self.cache.slots.layers if isinstance(n, RecurrentCache)]
        self.buffers = _storages(self.cache.slots)
        self.widths: list[int] = []
        for layer in self.cache.slots.layers:
            if isinstance(layer, RecurrentCache):
                layer.advance = _spied(layer.advance, self.widths)
        for _ in range(choose(1, ROWS)):
            self.cache.slots.admit()
            self.rows.append(Row())

    def round(self) -> None:
        """One verb, and a look at what it has left."""
        names = [name for name, weight in VERBS.items() for _ in range(weight)]
        verb = names[self.choose(0, len(names) - 1)]
        if all(row.free for row in self.rows):
            verb = "admit"
        getattr(self, verb)()
        self.look(verb)
        for number, row in enumerate(self.rows):
            if len(row.tokens) > LONGEST - 40:
                self._release(number)

    def look(self, verb: str) -> None:
        """All layers agree on the rows' lengths, and no more is held than may be."""
        expected = [len(row.tokens) for row in self.rows]
        for number, layer in enumerate(self.cache.slots.layers):
            if layer.lengths != expected:
                raise BrokenPromiseError(
                    f"{verb}: layer {number} has rows of {layer.lengths}, not of {expected} tokens"
                )
        self.figures.held.append(held(self.cache.slots))
        if held(self.bounded) > self.limit:
            raise BrokenPromiseError(f"{verb}: {held(self.bounded)} bytes of {self.limit}")
        if not self.buffers <= _storages(self.cache.slots):
            raise BrokenPromiseError(f"{verb}: a buffer has moved that was reserved")

    def append(self) -> None:
        """A pass of the first rows; counts are uneven, and padding stands behind."""
        batch = self.choose(1, len(self.rows))
        widths = [1, 1, 1, 2, 5, 9, PADDING, *([] if self.reserved else [30, KEPT, 90, 150])]
        new = widths[self.choose(0, len(widths) - 1)]
        counts = [
            0 if row.free else new if self.choose(0, 2) else self.choose(0, new)
            for row in self.rows[:batch]
        ]
        room = LONGEST - 17 - max(len(row.tokens) for row in self.rows[:batch])
        if new <= room:
            self._pass(new, counts)

    def reject(self) -> None:
        """Drafted tokens, and a rollback of some of them."""
        new = self.choose(2, PADDING)
        batch = self.choose(1, len(self.rows))
        counts = [0 if row.free else self.choose(1, new) for row in self.rows[:batch]]
        self._pass(new, counts)
        self._rollback([self.choose(0, max(0, count - 1)) for count in counts])

    def deep(self) -> None:
        """A rollback as deep as is promised, and one that may be refused."""
        batch = self.choose(1, len(self.rows))
        rows = self.rows[:batch]
        self._rollback([self.choose(0, len(row.tokens) - row.floor) for row in rows])
        row = self.choose(0, batch - 1)
        count = self.choose(0, len(self.rows[row].tokens))
        try:
            self.cache.slots.rollback([0] * row + [count])
        except ValueError:
            if len(self.rows[row].tokens) - count >= self.rows[row].floor:
                raise BrokenPromiseError("a rollback within what is promised is refused") from None
            return
        self._cut([0] * row + [count])

    def admit(self) -> None:
        """A row that is empty, a copy of another row, or one from a cache of its own."""
        numbers = [number for number, row in enumerate(self.rows) if not row.free]
        if len(numbers) == ROWS:
            return
        slots, kind = self.cache.slots, self.choose(0, 2)
        if kind == 0 or (kind == 1 and not numbers):
            got, fresh = slots.admit(), Row()
        elif kind == 1:
            source = numbers[self.choose(0, len(numbers) - 1)]
            got, fresh = slots.admit(slots, source), self.rows[source]
        else:
            other = Machine(self.model, self.choose, reserve=False)
            source = self.choose(0, len(other.rows) - 1)
            for _ in range(self.choose(1, 3)):
                other.append()
            got, fresh = slots.admit(other.cache.slots, source), other.rows[source]
            self.figures.worst = max(self.figures.worst, other.figures.worst)
        fresh = replace(fresh, tokens=list(fresh.tokens), last=None)
        expected = min((n for n, row in enumerate(self.rows) if row.free), default=len(self.rows))
        if got != expected:
            raise BrokenPromiseError(f"row {got} is given, and {expected} is the first free one")
        self.rows[got : got + 1] = [fresh]

    def release(self) -> None:
        """One of the rows in use."""
        numbers = [number for number, row in enumerate(self.rows) if not row.free]
        self._release(numbers[self.choose(0, len(numbers) - 1)])

    def overflow(self) -> None:
        """A row's numbers become nan, which the others must not see, and it is released."""
        numbers = [number for number, row in enumerate(self.rows) if not row.free]
        row = numbers[self.choose(0, len(numbers) - 1)]
        new = self.choose(1, 3)
        self._pass(new, [0 if row.free else new for row in self.rows], broken=row)
        self._release(row)

    def select(self) -> None:
        """Rows in another order, some of them more than once."""
        order = [self.choose(0, len(self.rows) - 1) for _ in range(self.choose(1, ROWS))]
        self.cache.slots.select(order)
        self.rows = [replace(self.rows[n], tokens=list(self.rows[n].tokens)) for n in order]

    def beams(self) -> None:
        """Copies of one row go on by themselves, each step selected from those of the last."""
        numbers = [number for number, row in enumerate(self.rows) if not row.free]
        order = [numbers[self.choose(0, len(numbers) - 1)]] * self.choose(1, ROWS)
        for _ in range(self.choose(1, 12)):
            self.cache.slots.select(order)
            self.rows = [replace(self.rows[n], tokens=list(self.rows[n].tokens)) for n in order]
            self._pass(1, [1] * len(order))
            order = [self.choose(0, len(order) - 1) for _ in order]

    def finish(self) -> None:
        """A token more for every row that is in use."""
        self._pass(1, [0 if row.free else 1 for row in self.rows])
        self.look("finish")

    def _release(self, number: int) -> None:
        if not self.rows[number].free:
            self.cache.slots.release(number)
            self.rows[number] = Row(free=True)

    @torch.no_grad()
    def _pass(self, new: int, counts: list[int], broken: int | None = None) -> None:
        """A pass of the first rows, checked; `broken`: a row whose embeddings are nan."""
        ids = torch.tensor([[self.choose(0, VOCABULARY - 1) for _ in range(new)] for _ in counts])
        hidden = self.model.get_input_embeddings()(ids)
        if broken is not None:
            hidden[broken] = torch.nan
        logits = self.model(inputs_embeds=hidden, past_key_values=self.cache, counts=counts).logits
        for row in self.rows[len(counts) :]:
            row.last = None
        for row, count, tokens in zip(self.rows, counts, ids.tolist(), strict=False):
            start = len(row.tokens)
            row.floor = max(row.floor, (start if count <= PADDING else start + count) - KEPT)
            row.tokens += tokens[:count]
            row.last = min(count, KEPT)
        checked = [n for n, count in enumerate(counts) if count and n != broken]
        if not checked:
            return
        whole = torch.zeros(len(checked), max(len(self.rows[n].tokens) for n in checked)).long()
        for place, number in enumerate(checked):
            tokens = self.rows[number].tokens
            whole[place, : len(tokens)] = torch.tensor(tokens)
        expected = self.model(whole).logits  # what stands behind a row, it does not see
        bound = self._bound()
        for place, number in enumerate(checked):
            count, end = counts[number], len(self.rows[number].tokens)
            difference = logits[number, :count] - expected[place, end - count : end]
            worst = float(difference.abs().max())
            if not worst <= bound:
                raise BrokenPromiseError(
                    f"row {number} of {end} tokens, {count} of them new: logits are off by {worst}"
                )
            self.figures.worst = max(self.figures.worst, worst)

    def _bound(self) -> float:
        states = [isinstance(layer, RecurrentCache) for layer in self.cache.slots.layers]
        return 1e-10 if any(states) else 1e-12

    def _rollback(self, counts: list[int]) -> None:
        """A rollback, of which no more is replayed than need be."""
        del self.widths[:]
        try:
            self.cache.slots.rollback(counts)
        except ValueError as error:
            raise BrokenPromiseError(f"what is promised is refused: {error}") from None
        self._cut(counts)

    def _cut(self, counts: list[int]) -> None:
        """Take tokens from the lists, and look at what was replayed for it."""
        left = [0]
        for row, count in zip(self.rows, counts, strict=False):
            if not count:
                continue
            del row.tokens[len(row.tokens) - count :]
            row.floor = min(row.floor, len(row.tokens))
            row.last = row.last - count if row.last is not None and row.last >= count else None
            left.append(2 * KEPT if row.last is None else row.last)
        if max(self.widths, default=0) > max(left):
            raise BrokenPromiseError(f"{self.widths} tokens are replayed, at most {max(left)} stay")
        self.figures.replayed += self.widths[:1]
        del self.widths[:]


def play(name: str, rounds: int, choose: Choose, *, reserve: bool) -> Figures:
    """A machine's figures after so many rounds.

    Raises:
        BrokenPromiseError: says what is wrong, and in which round.
    """
    machine = Machine(build(name), choose, reserve=reserve)
    try:
        for _ in range(rounds):
            machine.round()
        machine.finish()
    except BrokenPromiseError as error:
        raise BrokenPromiseError(f"{name}, round {len(machine.figures.held)}: {error}") from None
    return machine.figures


def held(value: Any) -> int:
    """Bytes of all tensors that an object holds, each storage counted once and whole."""
    return sum(_sizes(value).values())


def _sizes(value: Any) -> dict[int, int]:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    if isinstance(value, KeyValues | RecurrentCache | RaggedCache):
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        return {pointer: size for item in value for pointer, size in _sizes(item).items()}
    return {}


def _storages(value: Any) -> set[int]:
    return set(_sizes(value))


def _reserve(cache: LlmNormCache) -> int:
    return cache.slots.reserve(
        ROWS, LONGEST, PADDING, dtype=torch.float64, device=torch.device("cpu")
    )


def _spied(advance: Callable[..., Any], widths: list[int]) -> Callable[..., Any]:
    """`advance`, which notes how many tokens it is given."""

    def noting(state: Any, inputs: Any, counts: Tensor) -> Any:
        widths.append(inputs[0].shape[1])
        return advance(state, inputs, counts)

    return noting


def main(words: list[str]) -> int:
    """Play on one model; print the figures."""
    name, rounds, seed = words[0], int(words[1]), words[2]
    chance = random.Random(seed)
    figures = play(name, rounds, chance.randint, reserve=chance.random() < 0.5)
    replayed = figures.replayed or [0]
    print(
        f"{name}: {rounds} rounds: logits within {figures.worst:.1e}; replayed at most "
        f"{max(replayed)} tokens, {sorted(replayed)[len(replayed) // 2]} in the middle; at most "
        f"{max(figures.held)} bytes"
    )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
