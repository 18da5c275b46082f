"""Fragments as rows and back, all processes of a tensor in one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llmnorm.checkpoints.fragments import begun_rows, fill, touched_rows
from llmnorm.optim.fragments import Fragment


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[list[torch.Size], list[tuple[int, ...]]]:
    """Shapes, and where each is cut; processes may be left with nothing."""
    world = draw(st.integers(1, 4))
    sizes = st.lists(st.integers(1, 5), max_size=3).map(torch.Size)
    shapes = draw(st.lists(sizes, min_size=1, max_size=3))
    cuts = []
    for shape in shapes:
        inner = st.lists(st.integers(0, shape.numel()), min_size=world - 1, max_size=world - 1)
        cuts.append((0, *sorted(draw(inner)), shape.numel()))
    return shapes, cuts


@given(cut_tensors())
def test_rows_that_are_begun_tile_the_tensor_and_fill_the_fragments(drawn) -> None:
    """Oracle: the whole tensors."""
    shapes, cuts = drawn
    wholes = [torch.arange(shape.numel()).float().view(shape) for shape in shapes]
    processes: list[dict[str, Fragment]] = []
    for rank in range(len(cuts[0]) - 1):
        pieces = [w.reshape(-1)[c[rank] : c[rank + 1]] for w, c in zip(wholes, cuts, strict=True)]
        made = [
            Fragment.of(piece.clone(), shape, cut, rank)
            for piece, shape, cut in zip(pieces, shapes, cuts, strict=True)
        ]
        processes.append({str(number): fragment for number, fragment in enumerate(made)})
    begun = [
        begun_rows(fragments, lambda name, like, numel: torch.full((numel,), -1.0))
        for fragments in processes
    ]
    rows, exchanged = [found for found, _ in begun], [ends for _, ends in begun if ends is not None]
    for rank, ends in enumerate(exchanged):
        arrived = [other.sent.split(other.sent_counts)[rank] for other in exchanged]
        assert [len(data) for data in arrived] == ends.received_counts
        torch.cat(arrived, out=ends.received)
        ends.put_in_place()
    for number, whole in enumerate(wholes):
        parts = [found[str(number)] for found in rows]
        joined = torch.cat([part.tensor.reshape(-1) for part in parts])
        assert joined.equal(whole.reshape(-1))
        assert all(part.global_shape == tuple(whole.shape) for part in parts)
        written = [part for part in parts if part.stop > part.start]
        starts = [part.start for part in written]
        assert starts == [0, *(part.stop for part in written)][:-1]
        for fragments in processes:
            fragment = fragments[str(number)]
            touched = touched_rows(fragment)
            if whole.dim():
                touched.tensor.copy_(whole[touched.start : touched.stop])
            elif touched.tensor.dim() == 0:
                touched.tensor.copy_(whole)
            empty = fragment.like(torch.full_like(fragment.detach(), -1))
            fill(empty, touched)
            assert empty.equal(fragment)
