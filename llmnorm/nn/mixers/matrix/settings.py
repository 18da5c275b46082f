"""Settings of the families of mixing matrices: the registry of `model.mixer.family`.

A family gets its heads and their width from the mixer's settings; the longest document that learned
tables serve is the model's max_position_embeddings.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from llmnorm.config.values import Width
from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.nn.mixers.matrix.family import Family as FamilyModule


def _with_a_middle(kernel: int) -> int:
    if not kernel % 2:
        raise ValueError(f"must be odd, got {kernel}; e.g. {kernel + 1}")
    return kernel


OddKernel = Annotated[Width, AfterValidator(_with_a_middle)]
"""Width of a symmetric convolution, here and in Hydra."""


class FamilySettings(Settings):
    """What every family's settings can do."""

    @abstractmethod
    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""

    def _keys(self) -> dict[str, Any]:
        return self.model_dump(exclude={"name"})


class DenseSettings(FamilySettings):
    """A free weight for every pair of positions, for documents of up to max_position_embeddings
    tokens (MLP-Mixer, arXiv 2105.01601)."""

    name: Literal["dense"] = "dense"

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.dense import Dense

        return Dense(heads, longest)


class ToeplitzSettings(FamilySettings):
    """A weight for every distance: a convolution as long as the document."""

    name: Literal["toeplitz"] = "toeplitz"
    data_dependent: bool = True
    """Token r of a document brings the weights of distances r and -r; `false`: they are learned,
    for documents of up to max_position_embeddings tokens."""
    official_compat: bool = False
    """As the official code: every weight one place off, the last one wrapped around, scaled by
    max_position_embeddings, which every row must be as long as."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.toeplitz import Toeplitz

        return Toeplitz(heads, longest, **self._keys())


class DFTSettings(FamilySettings):
    """The real part of the discrete Fourier transform of the document: the Vandermonde matrix
    without parameters (FNet, arXiv 2105.03824)."""

    name: Literal["dft"] = "dft"

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrix, one for all heads and for documents of any length."""
        from llmnorm.nn.mixers.matrix.vandermonde import DFT

        return DFT(heads)


class _QueryKeySettings(FamilySettings):
    data_dependent: bool = True
    """What rows and columns are made of comes from the token; `false`: it is learned for each
    position, for documents of up to max_position_embeddings tokens."""
    qk_dim: Width = 16
    """Channels of a head that its rows, and as many that its columns are made of."""


class VandermondeSettings(_QueryKeySettings):
    """Waves over the positions, their frequencies the rows' and the columns'."""

    name: Literal["vandermonde"] = "vandermonde"
    official_compat: bool = False
    """As the official code: frequencies times 1e-3 for good, scaled by max_position_embeddings;
    learned frequencies never mix (its einsum multiplies a token by the sum of its row)."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.vandermonde import Vandermonde

        return Vandermonde(heads, longest, **self._keys())


class CauchySettings(_QueryKeySettings):
    """1 / (e^q + e^k + c), summed over the channels: positive and bounded."""

    name: Literal["cauchy"] = "cauchy"
    official_compat: bool = False
    """Scaled by max_position_embeddings, as the official code, not by the document's length."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.cauchy import Cauchy

        return Cauchy(heads, longest, **self._keys())


class LowRankSettings(_QueryKeySettings):
    """q . k: linear attention without a normaliser; silu on q and k that tokens bring."""

    name: Literal["low_rank"] = "low_rank"
    official_compat: bool = False
    """Scaled by max_position_embeddings, as the official code, not by the document's length."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.low_rank import LowRank

        return LowRank(heads, longest, **self._keys())


class AttentionSettings(_QueryKeySettings):
    """softmax(q . k / sqrt(qk_dim)), without positions."""

    name: Literal["attention"] = "attention"

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.attention import Attention

        return Attention(heads, longest, **self._keys())


class QuasiseparableSettings(_QueryKeySettings):
    """Hydra's matrix, with B and C shared by both directions and all heads. Where they are learned,
    a head's time step is the same at all tokens."""

    name: Literal["quasiseparable"] = "quasiseparable"

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, whose tables serve documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.quasiseparable import Quasiseparable

        return Quasiseparable(heads, head_dim, longest, **self._keys())


Family = Annotated[
    DenseSettings
    | ToeplitzSettings
    | VandermondeSettings
    | DFTSettings
    | CauchySettings
    | LowRankSettings
    | AttentionSettings
    | QuasiseparableSettings,
    Part(FamilySettings, default="quasiseparable"),
]
