"""Records -> examples: rendered and encoded, cut to their length, and counted.

    block, counts, problems = Encoder(template, texts, context, too_long).block(records)

A conversation becomes one example or several (chat.py), which are cut at their end or left out if
they are too long. A plain text becomes bos + tokens + eos, cut into rows that overlap by one token.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmnorm.data.chat import ChatTemplate, Refused, Rendering, Tokens
from llmnorm.data.messages import Conversation
from llmnorm.data.pieces import Block
from llmnorm.data.tokenizer import TextEncoder

# What is counted of a stream, in this order in its shards' tallies.
COUNTS = (
    "records",  # read, those of which nothing is left included
    "bytes",  # of the records that became examples: what their messages say
    "examples",
    "tokens",
    "trained",  # tokens
    "split",  # conversations that became an example for each answer
    "cut",  # texts that became several examples
    "truncated",  # examples that lost tokens at their end
    "unended",  # trained answers after which the template writes no end
    "too long",  # examples that were left out, here and below
    "nothing trained left",
    "refused by the template",  # records
)
DROPPED = COUNTS[-3:]


class Item(NamedTuple):
    """A record: where it stands, and the conversation or text that it holds."""

    where: str
    content: Conversation | str

    @property
    def canonical(self) -> str:
        """The same text for the same content, whatever file it stood in."""
        return self.content if isinstance(self.content, str) else self.content.canonical

    @property
    def size(self) -> int:
        """UTF-8 bytes of what it says."""
        content = self.content
        return len(content.encode()) if isinstance(content, str) else content.bytes


@dataclass(frozen=True)
class Encoder:
    """Makes examples of records.

    Attributes:
        template: renders conversations.
        texts: encodes plain texts.
        context: an example has at most one token more.
        too_long: what is done with longer ones, `truncate` or `drop`.
    """

    template: ChatTemplate
    texts: TextEncoder
    context: int
    too_long: str

    def block(self, records: list[Item]) -> tuple[Block, NDArray[np.int64], list[str]]:
        """The examples of some records.

        Returns:
            Them, with the counts up to each end; the counts of all the records; and the problems
            of those that the template refuses.
        """
        rendered: list[list[Rendering] | Refused | None] = [self._render(i) for i in records]
        renderings = [r for found in rendered if isinstance(found, list) for r in found]
        encoded = iter(self.template.encode(renderings))
        counts = dict.fromkeys(COUNTS, 0)
        tokens: list[Tokens] = []
        ends, tallies, size = [], [], 0
        problems = []
        for item, found in zip(records, rendered, strict=True):
            counts["records"] += 1
            if isinstance(found, Refused):
                counts["refused by the template"] += 1
                problems.append(f"{item.where}: {found}")
                continue
            if found is None:
                made = self._cut(str(item.content), counts)
            else:
                counts["split"] += len(found) > 1
                counts["unended"] += sum(rendering.unended for rendering in found)
                made = [e for e in itertools.islice(encoded, len(found)) if self._fits(e, counts)]
                stop = self.context + 1
                made = [Tokens(e.ids[:stop], e.trained[:stop]) for e in made]
            if not made:
                continue
            tokens += made
            size += sum(len(example.ids) for example in made)
            counts["bytes"] += item.size
            counts["examples"] += len(made)
            counts["tokens"] = size
            counts["trained"] += sum(int(example.trained[1:].sum()) for example in made)
            ends.append(size)
            tallies.append([*counts.values()])
        return self._joined(tokens, ends, tallies), np.array([*counts.values()]), problems

    def _render(self, item: Item) -> list[Rendering] | Refused | None:
        """What the template makes of a conversation; None of a text."""
        if isinstance(item.content, str):
            return None
        try:
            return self.template.examples(*item.content)
        except Refused as error:
            return error

    def _fits(self, example: Tokens, counts: dict[str, int]) -> bool:
        """Whether an example is kept, cut to its length; counts it."""
        long = len(example.ids) > self.context + 1
        if long and self.too_long == "drop":
            counts["too long"] += 1
            return False
        if not example.trained[1 : self.context + 1].any():
            counts["nothing trained left"] += 1
            return False
        counts["truncated"] += long
        return True

    def _cut(self, text: str, counts: dict[str, int]) -> list[Tokens]:
        """A text's rows; every token but bos is a label of one of them."""
        ids = self.texts.encode_document(text).astype(np.int64)
        rows = [ids[i : i + self.context + 1] for i in range(0, len(ids) - 1, self.context)]
        counts["cut"] += len(rows) > 1
        return [Tokens(row, np.ones(len(row), bool)) for row in rows]

    def _joined(self, tokens: list[Tokens], ends: list[int], tallies: list[list[int]]) -> Block:
        sizes = np.array([len(example.ids) for example in tokens], np.int64)
        starts = np.cumsum(sizes) - sizes
        ids = np.concatenate([np.empty(0, np.int64), *(example.ids for example in tokens)])
        trained = np.concatenate([np.empty(0, bool), *(example.trained for example in tokens)])
        trained[starts] = False  # an example's first token is no label
        return Block(
            ids.astype(self.texts.dtype),
            starts,
            np.array(ends, np.int64),
            trained,
            np.array(tallies, np.int64).reshape(-1, len(COUNTS)),
        )
