"""What decoding carries for a recurrent mixer: a state of constant size, and a few tokens' inputs.

A state is a tuple of tensors (rows, ...), zeros for an empty row; inputs are a tuple of tensors
(rows, new, ...). The mixer gives `advance(state, inputs, counts)`, a pure function: the state after
each row's first `counts` inputs. Inputs of zeros, which those behind are, leave a state as it is.

A state cannot be cut back, so a rollback is a replay: the inputs that stay are run again from an
earlier state. Three of those are at hand for every row:
  - the state before the last pass, by reference: a rollback within it replays what stays of it;
  - two snapshots, copied at least KEPT tokens apart; deeper rollbacks start from one of them.
The inputs since the older snapshot stand in a ring: that of a row's token t in slot t % RING.
Example, with passes of one token: snapshots are taken after 64, 128 and 192 tokens, so a row of
200 tokens has those of 128 and 192, and can go back to 128. Rows are strangers: each has snapshots
and a place in the ring of its own, and a copy of a row can go back as far as the row could.

What can be rolled back: the last KEPT tokens of every row. What a pass of at most VERIFIED tokens
brought, and a rollback has taken away again, does not use them up.

Sizes: a snapshot is due KEPT tokens after the last one and is taken at the start of the next pass,
so two are at most KEPT - 1 + VERIFIED tokens apart, and so is the end of a row from its newer one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmnorm.nn.layer_cache import KEPT, VERIFIED, LayerCache, check_places, lengths_after_rollback
from llmnorm.nn.places import Places
from llmnorm.nn.precision import wide_dtype
from llmnorm.nn.states import (
    Inputs,
    InputShape,
    RowMarks,
    State,
    as_index,
    copy_rows,
    first_inputs,
    owned,
    rows_of,
    write_inputs,
)

RING = 2 * (KEPT + VERIFIED)
PARKED = 2  # the plane of `_kept` behind those of the two snapshots

Advance = Callable[[State | None, Inputs, Tensor], State]


class RecurrentCache:
    """One recurrent layer's states.

    `inputs`: the shapes of what the mixer appends, which `reserve` has to know beforehand.
    """

    def __init__(self, advance: Advance, inputs: Sequence[InputShape]) -> None:
        self.advance, self.inputs = advance, tuple(inputs)
        self.clear()

    def clear(self) -> None:
        """Forget every row, memory included."""
        self.lengths: list[int] = []
        self._rows: list[RowMarks] = []
        # Of the rows of the last pass: their states, and those before it.
        self._states: State = ()
        self._before: State = ()
        # (3, rows, ...): two snapshots, and the states of rows that the last pass left out.
        self._kept: State = ()
        # (rows, RING + 1, ...): inputs; the last slot takes in padding and is not read.
        self._ring: Inputs = ()
        self._slots: Inputs = ()  # the same memory, the rows' rings end to end
        # After a selection, for each row: in which row each slot and both snapshots of it are.
        self._homes: list[list[int]] | None = None

    def reserve(
        self, rows: int, tokens: int, padding: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Make every buffer for so many rows; returns their bytes and the states' of two passes.

        Nothing that is made here grows with `tokens` or `padding`. `dtype`: the model's.
        """
        inputs = tuple(
            torch.zeros(1, 1, *shape, dtype=wide_dtype(dtype) if wide else dtype, device=device)
            for shape, wide in self.inputs
        )
        state = self.advance(None, inputs, as_index([0], device))
        self._make_room(rows, inputs, state)
        of_states = sum(2 * rows * t.nbytes for t in state)
        return of_states + sum(t.nbytes for t in (*self._kept, *self._ring))

    @property
    def state(self) -> State | None:
        """The states of all rows, to be read only; None if there is none yet."""
        return self._states_of(len(self.lengths))

    def before(self, places: Places) -> State | None:
        """The states of the pass's rows, to be read only; None if there is none yet.

        A rollback may start from these very tensors.
        """
        return self._states_of(len(places.lengths))

    def append(self, inputs: Inputs, state: State, places: Places) -> None:
        """Take in a pass of the first rows: its inputs, and the state that the mixer has computed.

        The state is kept by reference (the inputs are not), so nobody may write to it later.

        Raises:
            ValueError: the places are for rows of other lengths (`check_places`).
        """
        check_places(self, places)
        inputs, state, rows = tuple(t.detach() for t in inputs), owned(state), len(places.lengths)
        self._make_room(len(self.lengths), inputs, state)
        before = self._states_of(rows)
        assert before is not None, "there is room for it"
        whole = rows == len(self.lengths) and places.start is not None
        if not whole or places.new > KEPT:
            self._settle()
        if places.new <= KEPT:
            slots = places.ring(RING)
        else:
            inputs, before, slots = self._end_of_pass(inputs, before, places)
        write_inputs(self._slots, inputs, slots)
        self._count(before, state, places)

    def buffers(self, places: Places) -> Inputs:
        """The rings of all rows, (all rows' slots, ...), in which the caller writes a pass's inputs
        as `write_inputs` does, at `places.ring(RING)`; and then calls `extend`.

        For at most VERIFIED tokens in rows that hold some, at places of `RaggedCache.places`.
        """
        self._make_room(len(self.lengths), self._ring, self._states)
        self._settle()
        return self._slots

    def extend(self, state: State, places: Places) -> None:
        """Take in a pass whose inputs are written: its state, which is kept by reference."""
        before = self._states_of(len(places.lengths))
        assert before is not None, "its rows hold tokens"
        self._count(before, owned(state), places)

    def _count(self, before: State, state: State, places: Places) -> None:
        """The host's part of a pass: lengths, snapshots of the states before it, marks."""
        rows = len(places.lengths)
        tokens = enumerate(zip(places.lengths, places.counts, strict=True))
        due = [row for row, (start, count) in tokens if self._due(row, start, count)]
        self._take_snapshots(due, before)
        for row in self._rows[rows:]:
            row.began = None
        for number, homes in enumerate(self._homes or ()):
            start = places.lengths[number]
            for token in range(start, start + places.counts[number]):
                homes[token % RING] = number
            if number in due:
                homes[RING + self._rows[number].plane] = number
        self._before, self._states = before, state
        counts = [*places.counts, *[0] * (len(self.lengths) - rows)]
        self.lengths = [a + b for a, b in zip(self.lengths, counts, strict=True)]

    def _end_of_pass(
        self, inputs: Inputs, before: State, places: Places
    ) -> tuple[Inputs, State, Tensor]:
        """Of a pass of many tokens: each row's last KEPT inputs, the state before those, and slots.

        The inputs before them can no longer be rolled back, and are not kept.
        """
        device, new = before[0].device, inputs[0].shape[1]
        passed = [max(0, count - KEPT) for count in places.counts]
        if any(passed):
            with torch.no_grad():
                first = first_inputs(inputs, passed)
                before = self.advance(before, first, as_index(passed, device))
        rings = places.rows * (RING + 1)
        if places.start is not None:
            inputs = tuple(t[:, -KEPT:] for t in inputs)
            return inputs, before, (rings + places.index[:, -KEPT:] % RING).flatten()
        columns = as_index(passed, device)[:, None] + torch.arange(KEPT, device=device)
        padding = columns >= places.counted[:, None]
        columns = columns.clamp(max=new - 1)
        slots = (places.index.gather(1, columns) % RING).masked_fill(padding, RING)
        inputs = tuple(t[places.rows, columns] for t in inputs)
        return inputs, before, (rings + slots).flatten()

    def _due(self, number: int, start: int, count: int) -> bool:
        """Whether a row's state at the start of a pass becomes its newer snapshot; notes it.

        Of a pass of more than KEPT tokens the start is that of the last KEPT. A pass of more than
        VERIFIED is no verification, and may need its snapshot earlier for the ring's sake: only its
        end has to be KEPT tokens behind the older one.
        """
        row = self._rows[number]
        row.place = number
        if count > KEPT:
            row.newer = row.older = row.began = start + count - KEPT
            return True
        row.began = start
        since = start - row.newer + (count if count > VERIFIED else 0)
        if since < KEPT or row.newer == start:
            return False
        row.older, row.newer, row.plane = row.newer, start, 1 - row.plane
        return True

    def _take_snapshots(self, rows: list[int], state: State) -> None:
        if not rows:
            return
        index = as_index(rows, state[0].device)
        planes = as_index([self._rows[row].plane for row in rows], state[0].device)
        for kept, now in zip(self._kept, state, strict=True):
            kept[planes, index] = now.index_select(0, index)

    def check_rollback(self, counts: Sequence[int]) -> None:
        """Refuse a rollback that cannot be done; changes nothing.

        Raises:
            ValueError: more tokens than a row has, or than are kept.
        """
        lengths = lengths_after_rollback(self.lengths, counts)
        if any(length < row.older for length, row in zip(lengths, self._rows, strict=True)):
            kept = [a - row.older for a, row in zip(self.lengths, self._rows, strict=True)]
            raise ValueError(
                f"rollback of {list(counts)} tokens: of recurrent layers the last {kept} tokens of "
                "the rows are kept"
            )

    def rollback(self, counts: Sequence[int]) -> None:
        """Drop the last tokens of the first rows: those that stay are replayed.

        Raises:
            ValueError: more tokens than a row has, or than are kept; nothing is changed.
        """
        self.check_rollback(counts)
        self._settle()
        self.lengths = lengths_after_rollback(self.lengths, counts)
        near, far = [], []
        for number, count in enumerate(counts):
            if not count:
                continue
            row, length = self._rows[number], self.lengths[number]
            if row.began is not None and length >= row.began:
                near.append(number)
                continue
            row.began = None
            if length < row.newer:
                row.newer, row.plane = row.older, 1 - row.plane
            far.append(number)
        if near:
            # If most rows change, it is cheaper to run all of them than to pick those out.
            rows = list(range(len(self._before[0])))
            in_place = near[-1] < len(rows) and rows == [r.place for r in self._rows[: len(rows)]]
            if not in_place or 2 * len(near) <= len(rows):
                rows = near
            began = {n: self._rows[n].began or 0 for n in near}
            starts = [began.get(n, self.lengths[n]) for n in rows]
            before = rows_of(self._before, [self._rows[n].place for n in rows])
            self._replay(near, rows, starts, before)
        if far:
            device = self._kept[0].device
            planes = as_index([self._rows[n].plane for n in far], device)
            start = tuple(t[planes, as_index(far, device)] for t in self._kept)
            self._replay(far, far, [self._rows[n].newer for n in far], start)

    def _replay(self, changed: list[int], rows: list[int], starts: list[int], state: State) -> None:
        """Run the rows' tokens from `starts` on again; `state` is that before them.

        Those rows that have changed get the state after them.
        """
        counts = [self.lengths[row] - start for row, start in zip(rows, starts, strict=True)]
        if max(counts):
            with torch.no_grad():
                inputs = self._read(rows, starts, counts)
                state = self.advance(state, inputs, as_index(counts, state[0].device))
        self._put(changed, rows, state)

    def admit(self, row: int, source: LayerCache | None, source_row: int) -> None:
        """Start `row`, a released or the next new one: empty, or as a copy of a source's row.

        The copy can be rolled back as far as the source's row can.
        """
        if row == len(self.lengths):
            self.lengths.append(0)
            self._rows.append(RowMarks())
        assert self.lengths[row] == 0, "a row is admitted to a free slot"
        self._settle()
        if source is None or not source.lengths[source_row]:
            self._empty(row)
            return
        assert isinstance(source, RecurrentCache)
        source._settle()
        self._make_room(len(self.lengths), source._ring, source._states)
        state = rows_of(source._states_of(len(source.lengths)) or (), [source_row])
        for kept, theirs in zip(self._kept, source._kept, strict=True):
            kept[:PARKED, row] = theirs[:PARKED, source_row]
        for ring, inputs in zip(self._ring, source._ring, strict=True):
            ring[row] = inputs[source_row]
        self._put([row], [row], state)
        self._rows[row] = replace(source._rows[source_row], began=None)
        self.lengths[row] = source.lengths[source_row]

    def release(self, row: int) -> None:
        """Empty a row: what it held cannot reach the next sequence."""
        self._settle()
        self.lengths[row] = 0
        self._empty(row)

    def _empty(self, row: int) -> None:
        self._rows[row] = RowMarks()
        if self._kept:
            self._make_room(len(self.lengths), self._ring, self._states)
            for kept in self._kept:
                kept[:PARKED, row] = 0
            self._put([row], [row], tuple(t.new_zeros(1, *t.shape[1:]) for t in self._states))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may come more than once (beam search).

        Of rows of equal lengths and snapshots, as the beams of a prompt are, the states alone move;
        the rest waits for `_settle`, since a beam search would copy it for every token.
        """
        rows, states = list(rows), self._states_of(len(self.lengths))
        homes = self._homes or [[row] * (RING + 2) for row in range(len(self.lengths))]
        self.lengths = [self.lengths[row] for row in rows]
        self._rows = [replace(self._rows[row]) for row in rows]
        if states is None:
            return
        self._make_room(len(rows), self._ring, states)
        self._states = rows_of(states, rows)
        self._homes = [list(homes[row]) for row in rows]
        marks = [(row.newer, row.older, row.plane) for row in self._rows]
        if len(set(zip(self.lengths, marks, strict=True))) > 1:
            self._settle()

    def _settle(self) -> None:
        """Move every row's inputs and snapshots to where the row is now."""
        homes, self._homes = self._homes, None
        if homes is None:
            return
        rows, device = len(homes), self._ring[0].device
        numbers = [home * (RING + 1) + n for row in homes for n, home in enumerate(row[:RING])]
        slots = as_index(numbers, device)
        for ring, kept in zip(self._ring, self._slots, strict=True):
            ring[:rows, :RING] = kept.index_select(0, slots).unflatten(0, (rows, RING))
        for plane in range(PARKED):
            index = as_index([row[RING + plane] for row in homes], device)
            for kept in self._kept:
                kept[plane, :rows] = kept[plane].index_select(0, index)

    def _states_of(self, rows: int) -> State | None:
        """The first rows' states as one tensor each, which they become if they are not yet."""
        if not self._kept:
            return None
        have = len(self._states[0])
        if rows < have:
            for kept, state in zip(self._kept, self._states, strict=True):
                kept[PARKED, rows:have] = state[rows:]
            self._states = tuple(t[:rows].clone() for t in self._states)
        elif rows > have:
            self._states = tuple(
                torch.cat((state, kept[PARKED, have:rows]))
                for state, kept in zip(self._states, self._kept, strict=True)
            )
        return self._states

    def _put(self, changed: list[int], rows: list[int], fresh: State) -> None:
        """Change the states of some rows to what `fresh` (rows, ...) has for them."""
        states = self._states_of(max(len(self._states[0]), rows[-1] + 1)) or ()
        others = [row for row in rows if row not in changed]
        if rows == list(range(len(states[0]))):
            # A copy where nothing was run: the state before the pass must stay as it is.
            same = self._before and fresh[0].data_ptr() == self._before[0].data_ptr()
            self._states = tuple(t.clone() for t in fresh) if same else owned(fresh)
            copy_rows(states, others, self._states, others)
        else:
            copy_rows(fresh, [rows.index(row) for row in changed], states, changed)

    def _make_room(self, rows: int, inputs: Inputs, state: State) -> None:
        """Buffers for so many rows, shaped as inputs (.., .., ...) and state (.., ...)."""
        have = self._ring[0].shape[0] if self._ring else 0
        if rows <= have:
            return
        with torch.inference_mode(False):
            kept = tuple(t.new_zeros(3, rows, *t.shape[1:]) for t in state)
            ring = tuple(t.new_zeros(rows, RING + 1, *t.shape[2:]) for t in inputs)
        if have:
            for larger, smaller in zip(kept, self._kept, strict=True):
                larger[:, :have] = smaller
            for larger, smaller in zip(ring, self._ring, strict=True):
                larger[:have] = smaller
        else:
            self._states = tuple(t[PARKED, :0] for t in kept)
        self._kept, self._ring = kept, ring
        self._slots = tuple(t.flatten(0, 1) for t in ring)

    def _read(self, rows: list[int], starts: list[int], counts: list[int]) -> Inputs:
        """`counts` inputs of each of the rows from token `starts` on, zeros behind them."""
        device, width = self._ring[0].device, max(counts)
        slots = as_index(starts, device)[:, None] + torch.arange(width, device=device)
        slots = (slots % RING + as_index(rows, device)[:, None] * (RING + 1)).flatten()
        inputs = (t.index_select(0, slots).unflatten(0, (-1, width)) for t in self._slots)
        return first_inputs(tuple(inputs), counts)
