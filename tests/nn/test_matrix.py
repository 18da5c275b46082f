"""The families of mixing matrices: every entry against its definition; their structure."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.nn.mixers.contract import Context, Mixer
from llmnorm.nn.mixers.matrix.vandermonde import FIRST_EPS
from llmnorm.nn.mixers.settings import MatrixSettings
from llmnorm.nn.settings import ModelSettings
from llmnorm.nn.visibility import packed as packed_rows
from llmnorm.part import InputError

HEADS, DOCUMENTS = 3, (4, 1, 3, 2, 6)  # two rows
LENGTH, LONGEST = 8, 9
DATA_DEPENDENT = ("toeplitz", "vandermonde", "cauchy", "low_rank", "attention", "quasiseparable")
every_family = pytest.mark.parametrize(
    "family",
    ["dense", "dft", *(f"{name}{form}" for name in DATA_DEPENDENT for form in ("", " learned"))],
)


def build(family: str, longest: int = LONGEST, std: float = 0.7, **keys: Any) -> Any:
    name, _, learned = family.partition(" ")
    if learned:
        keys["data_dependent"] = False
    if name not in ("dense", "dft", "toeplitz"):
        keys["qk_dim"] = 2
    part = MatrixSettings.model_validate({"head_dim": 4, "family": {"name": name, **keys}})
    torch.manual_seed(0)
    model = ModelSettings(hidden_size=6, num_attention_heads=1, max_position_embeddings=longest)
    mixer = part.build(model, 0).double()
    for key, parameter in mixer.named_parameters():
        if key.endswith("bias"):
            parameter.data.uniform_(0.1, 1.0)
        elif key.endswith("log_eps"):
            parameter.data.fill_(-2.0)
        else:
            parameter.data.normal_(std=std)
    return mixer


def inputs(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 6, dtype=torch.float64, generator=generator)


def context(*, packed: bool = False) -> Context:
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if not packed:
        return Context(nothing, nothing)
    return Context(nothing, nothing, packed_rows(DOCUMENTS, 2, nothing.device))


def matrix_of(mixer: Mixer, x: Tensor, given: Context) -> Tensor:
    return mixer.materialize(mixer.prepare(x, given), given).detach()


class Document:
    """What the definitions need to know of one document and one head, as Python numbers."""

    def __init__(self, mixer: Any, made: Any, row: int, head: int, start: int, n: int) -> None:
        self.family, self.made, self.n = mixer.matrix_mixer, made, n
        self.row, self.head, self.start = row, head, start

    def at(self, tensor: Tensor, i: int) -> Any:
        """The numbers of token i of the document."""
        row = self.row if len(tensor) > 1 else 0
        return tensor[row, self.start + i, self.head].tolist()

    def entry(self, name: str, i: int, j: int) -> float:
        """M_ij without the identity, from the formulas of the files' first lines."""
        made, family, n = self.made, self.family, self.n
        if name == "dense":
            return family.M[self.head, i, j].item() / math.sqrt(n)
        if name == "dft":
            return math.cos(2 * math.pi * i * j / n) / math.sqrt(n)
        if name == "toeplitz":
            taps = made.forward if i >= j else made.reverse
            return 0.5 * self.at(taps, abs(i - j)) / math.sqrt(n)
        if name == "quasiseparable":
            return self.quasiseparable(i, j)
        q, k = self.at(made.q, i), self.at(made.k, j)
        width = len(q)
        if name == "low_rank":
            return sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(width * n)
        if name == "attention":
            exps = [
                math.exp(sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(width))
                for key in (self.at(made.k, t) for t in range(n))
            ]
            return exps[j] / sum(exps)
        if name == "cauchy":
            offset = 2 * family.bias.item() if family.data_dependent else 0.0
            terms = (math.exp(a) + math.exp(b) + offset + 1e-8 for a, b in zip(q, k, strict=True))
            return sum(1 / term for term in terms) / math.sqrt(width * n)
        assert name == "vandermonde"
        sign, eps = (-1, family.log_eps.exp().item()) if family.data_dependent else (1, 1.0)
        waves = (
            math.cos(2 * math.pi * eps * a * j) + sign * math.cos(2 * math.pi * eps * b * i)
            for a, b in zip(q, k, strict=True)
        )
        return sum(waves) / math.sqrt(2 * width * n)

    def quasiseparable(self, i: int, j: int) -> float:
        """Proposition 3.7, with C of the neighbour (section 2.1 of the official code)."""
        if i == j:
            return self.at(self.made.delta, i)
        p = self.made.forward if i > j else self.made.backward
        step = 1 if i > j else -1
        C = p.C[self.row, self.start + i - step, 0]
        B = p.B[self.row, self.start + j, 0]
        between = range(j + step, i, step)
        decay = math.exp(sum(self.at(p.log_decay, t) for t in between))
        return (C @ B).item() * decay * self.at(p.dt, j)


@every_family
@pytest.mark.parametrize("packed", [False, True])
def test_every_entry_is_the_definition(family: str, packed: bool) -> None:
    """Oracle: the formulas in Python numbers, of each document alone; other documents weigh 0."""
    mixer, given = build(family), context(packed=packed)
    p = mixer.prepare(inputs(), given)
    expected = torch.zeros(2, HEADS, LENGTH, LENGTH, dtype=torch.float64)
    start = 0
    for n in DOCUMENTS if packed else (LENGTH, LENGTH):
        row, first = divmod(start, LENGTH)
        for head in range(HEADS):
            document = Document(mixer, p.made, row, head, first, n)
            for i in range(n):
                for j in range(n):
                    value = document.entry(family.split()[0], i, j)
                    identity = float(i == j and family.split()[0] != "quasiseparable")
                    expected[row, head, first + i, first + j] = value + identity
        start += n
    got = mixer.materialize(p, given)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@every_family
def test_under_autocast(family: str) -> None:
    """Oracle: the float64 output; bf16 holds in plain and in packed rows."""
    mixer, x = build(family, std=0.3), inputs()
    for given in (context(), context(packed=True)):
        expected = mixer(x, given)
        narrow = mixer.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = narrow(x.float(), given)
        mixer = narrow.double()
        assert (out.double() - expected).abs().max() / expected.abs().max() < 3e-2


def test_toeplitz_is_constant_along_diagonals_and_as_long_as_the_document() -> None:
    """Oracle: M_ij = M_{i+1,j+1}; a tap far away is not 0."""
    matrix = matrix_of(build("toeplitz"), inputs(), context())
    torch.testing.assert_close(matrix[..., 1:, 1:], matrix[..., :-1, :-1], rtol=0, atol=0)
    assert matrix[..., 0, -1].abs().min() > 0 and matrix[..., -1, 0].abs().min() > 0


def test_cauchy_is_positive_whatever_its_offset() -> None:
    """Oracle: the sign; with an offset of -9 the official denominator would change its own."""
    mixer = build("cauchy")
    for offset in (0.5, -9.0):
        mixer.matrix_mixer.bias.data.fill_(offset)
        assert matrix_of(mixer, inputs(), context()).min() > 0


def test_rows_of_attention_sum_to_one() -> None:
    """Oracle: one, and one more for the identity; nothing is negative."""
    for family in ("attention", "attention learned"):
        matrix = matrix_of(build(family), inputs(), context(packed=True))
        assert matrix.min() >= 0
        total = matrix.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, 2.0), rtol=0, atol=1e-12)


def test_ranks() -> None:
    """Oracle: qk_dim for low_rank; heads * qk_dim beside the diagonal of quasiseparable."""
    one = torch.eye(24, dtype=torch.float64)
    matrix = matrix_of(build("low_rank"), inputs(24), context()) - one
    assert set(torch.linalg.matrix_rank(matrix, rtol=1e-9).flatten().tolist()) == {2}
    matrix = matrix_of(build("quasiseparable"), inputs(24), context())
    for block in (matrix[..., 12:, :12], matrix[..., :12, 12:]):
        ranks = torch.linalg.matrix_rank(block, rtol=1e-12)
        assert set(ranks.flatten().tolist()) == {HEADS * 2}


@pytest.mark.parametrize("length", [1, 7, 8])
def test_the_transform_twice_is_the_even_part(length: int) -> None:
    """Oracle: for real C of a unitary Fourier matrix, (C C v)_j = (v_j + v_{-j}) / 2."""
    mixer = build("dft")
    matrix = matrix_of(mixer, inputs(length), context())[0, 0]
    cosines = matrix - torch.eye(length, dtype=torch.float64)
    v = inputs(length)[0]
    mirrored = v[-torch.arange(length) % length]
    torch.testing.assert_close(cosines @ cosines @ v, (v + mirrored) / 2, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("family", "hidden_size", "head_dim", "count"),
    [
        ({"name": "dense"}, 768, 128, 3_749_376),
        ({"name": "toeplitz"}, 800, 64, 3_894_800),
        ({"name": "vandermonde", "official_compat": True}, 768, 128, 3_850_752),
        ({"name": "vandermonde"}, 768, 128, 3_850_753),  # and eps, which the official code fixes
        ({"name": "cauchy"}, 768, 128, 3_850_753),
        ({"name": "low_rank"}, 768, 128, 3_850_752),
        ({"name": "attention"}, 768, 128, 3_850_752),
        ({"name": "quasiseparable"}, 768, 128, 3_887_652),
    ],
    ids=lambda value: str(value.get("name")) if isinstance(value, dict) else str(value),
)
def test_layers_of_the_papers_berts(
    family: dict[str, Any], hidden_size: int, head_dim: int, count: int
) -> None:
    """Oracle: parameters of a mixer counted in the official modules (rows of 128 tokens)."""
    part = MatrixSettings.model_validate({"family": family, "head_dim": head_dim})
    model = ModelSettings(hidden_size=hidden_size, max_position_embeddings=128)
    with torch.device("meta"):
        mixer = part.build(model, 0)
    assert sum(p.numel() for p in mixer.parameters()) == count


@every_family
def test_initial_mixing_is_of_the_values_size(family: str) -> None:
    """Oracle: the root mean square of what enters; no parameter starts where it cannot move.

    Cauchy's entries are all positive, so that its sums grow with the root of the length, 8.
    """
    name, _, learned = family.partition(" ")
    own = {"data_dependent": False} if learned else {}
    part = MatrixSettings.model_validate({"head_dim": 16, "family": {"name": name, **own}})
    torch.manual_seed(0)
    mixer: Any = part.build(ModelSettings(hidden_size=32, max_position_embeddings=64), 0).double()
    x = torch.randn(4, 64, 32, dtype=torch.float64)
    p = mixer.prepare(x, context())
    y = mixer.mix(p, context())
    largest = 12 if name == "cauchy" else 4
    assert 0.5 < (y.square().mean() / p.v.square().mean()).sqrt() < largest
    mixer(x, context()).square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("family", ["dense", *(f"{name} learned" for name in DATA_DEPENDENT)])
def test_documents_longer_than_the_tables_are_refused(family: str) -> None:
    """Oracle: the message names the key and both lengths; packed rows may be longer."""
    mixer = build(family, longest=6)
    assert mixer(inputs(), context(packed=True)).isfinite().all()
    with pytest.raises(InputError, match=r"max_position_embeddings = 6 tokens, got 8"):
        mixer(inputs(), context())


@pytest.mark.parametrize("family", ["toeplitz", "vandermonde", "low_rank", "quasiseparable"])
def test_made_from_tokens_no_document_is_too_long(family: str) -> None:
    """Oracle: four times max_position_embeddings, by the fast way and by the matrix."""
    mixer, x = build(family, longest=2), inputs()
    p = mixer.prepare(x, context())
    expected = mixer.materialize(p, context()) @ p.v.transpose(1, 2)
    torch.testing.assert_close(mixer.mix(p, context()), expected.transpose(1, 2))


@pytest.mark.parametrize("form", ["", " learned"])
def test_the_official_toeplitz_serves_whole_rows_of_one_length(form: str) -> None:
    """Oracle: the message; the recorded runs hold its numbers (test_golden.py)."""
    mixer = build(f"toeplitz{form}", longest=LENGTH, official_compat=True)
    assert mixer(inputs(), context()).isfinite().all()
    for x, given, word in (
        (inputs(5), context(), "got 5; nearest: false"),
        (inputs(), context(packed=True), "with documents or padding"),
    ):
        with pytest.raises(InputError, match=word):
            mixer(x, given)


@pytest.mark.parametrize("name", ["cauchy", "low_rank", "vandermonde"])
def test_official_compat_scales_by_the_longest(name: str) -> None:
    """Oracle: ours times sqrt(length / max_position_embeddings); eps as it is at first."""
    ours, theirs = build(name), build(name, official_compat=True)
    if name == "vandermonde":
        ours.matrix_mixer.log_eps.data.fill_(math.log(FIRST_EPS))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    one = torch.eye(LENGTH, dtype=torch.float64)
    ratio = math.sqrt(LENGTH / LONGEST)
    expected = (matrix_of(ours, inputs(), context()) - one) * ratio
    got = matrix_of(theirs, inputs(), context()) - one
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("cauchyy", "did you mean 'cauchy'"),
        ({"name": "dense", "data_dependent": True}, "data_dependent: unknown key"),
        ({"name": "dft", "qk_dim": 4}, "qk_dim: unknown key"),
        ({"name": "attention", "official_compat": True}, "official_compat: unknown key"),
        ({"name": "low_rank", "qk_dim": 0}, "qk_dim: must be at least 1"),
    ],
)
def test_what_a_family_does_not_have_is_refused(family: Any, words: str) -> None:
    """Oracle: the key and the way out."""
    with pytest.raises(ValueError, match=words):
        ModelSettings.model_validate({"mixer": {"name": "matrix", "family": family}})
