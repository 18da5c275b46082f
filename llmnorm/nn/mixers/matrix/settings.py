"""Settings of the families of mixing matrices: the registry of `model.mixer.family`.

A family gets its heads and their width from the mixer's settings; the longest document that its
tables serve, where it has tables, is the model's max_position_embeddings.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.nn.mixers.matrix.family import Family as FamilyModule


class FamilySettings(Settings):
    """What every family's settings can do."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        raise NotImplementedError


class DenseSettings(FamilySettings):
    """A free weight for every pair of positions (MLP-Mixer, arXiv 2105.01601). Documents may be
    shorter than max_position_embeddings, never longer."""

    name: Literal["dense"] = "dense"

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.dense import Dense

        return Dense(heads, longest)


class ToeplitzSettings(FamilySettings):
    """A weight for every distance: a convolution as long as the document."""

    name: Literal["toeplitz"] = "toeplitz"
    data_dependent: bool = True
    """Token r brings the weights of distances r and -r; `false`: learned ones, for documents of up
    to max_position_embeddings tokens."""
    official_compat: bool = False
    """As the official code: every weight one place off, the last one wrapped around, scaled by
    max_position_embeddings, which every row must be as long as."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.toeplitz import Toeplitz

        return Toeplitz(
            heads,
            longest,
            data_dependent=self.data_dependent,
            official_compat=self.official_compat,
        )


class VandermondeSettings(FamilySettings):
    """Waves over the positions, their frequencies made from the tokens."""

    name: Literal["vandermonde"] = "vandermonde"
    data_dependent: bool = True
    """Frequencies are made from the token; `false`: learned ones of its position, for documents of
    up to max_position_embeddings tokens."""
    qk_dim: int = Field(16, ge=1)
    """Frequencies of a head: as many of the rows as of the columns."""
    official_compat: bool = False
    """As the official code: frequencies times 1e-3 for good, scaled by max_position_embeddings;
    with learned frequencies no mixing at all (its einsum multiplies a token by its row's sum)."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.vandermonde import Vandermonde

        return Vandermonde(
            heads,
            longest,
            qk_dim=self.qk_dim,
            data_dependent=self.data_dependent,
            official_compat=self.official_compat,
        )


class DFTSettings(FamilySettings):
    """The real part of the discrete Fourier transform of the document, the Vandermonde matrix
    without parameters (FNet, arXiv 2105.03824)."""

    name: Literal["dft"] = "dft"

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of any length."""
        from llmnorm.nn.mixers.matrix.vandermonde import DFT

        return DFT(heads)


class CauchySettings(FamilySettings):
    """1 / (e^q + e^k), summed over the channels: a positive, bounded similarity."""

    name: Literal["cauchy"] = "cauchy"
    data_dependent: bool = True
    """q and k are made from the token; `false`: learned ones of its position, for documents of up
    to max_position_embeddings tokens."""
    qk_dim: int = Field(16, ge=1)
    """Width of a head's queries and keys."""
    official_compat: bool = False
    """Scaled by max_position_embeddings, as the official code, instead of the document's length."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.cauchy import Cauchy

        return Cauchy(
            heads,
            longest,
            qk_dim=self.qk_dim,
            data_dependent=self.data_dependent,
            official_compat=self.official_compat,
        )


class LowRankSettings(FamilySettings):
    """q . k: linear attention without a normaliser, silu its feature map."""

    name: Literal["low_rank"] = "low_rank"
    data_dependent: bool = True
    """q and k are made from the token; `false`: learned ones of its position, for documents of up
    to max_position_embeddings tokens."""
    qk_dim: int = Field(16, ge=1)
    """Width of a head's queries and keys, the rank."""
    official_compat: bool = False
    """Scaled by max_position_embeddings, as the official code, instead of the document's length."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.low_rank import LowRank

        return LowRank(
            heads,
            longest,
            qk_dim=self.qk_dim,
            data_dependent=self.data_dependent,
            official_compat=self.official_compat,
        )


class AttentionSettings(FamilySettings):
    """softmax(q . k / sqrt(qk_dim)), without positions."""

    name: Literal["attention"] = "attention"
    data_dependent: bool = True
    """q and k are made from the token; `false`: learned ones of its position, for documents of up
    to max_position_embeddings tokens."""
    qk_dim: int = Field(16, ge=1)
    """Width of a head's queries and keys."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.attention import Attention

        return Attention(heads, longest, qk_dim=self.qk_dim, data_dependent=self.data_dependent)


class QuasiseparableSettings(FamilySettings):
    """Hydra's matrix, B and C shared by both directions and all heads."""

    name: Literal["quasiseparable"] = "quasiseparable"
    data_dependent: bool = True
    """B, C and the time steps are made from the token; `false`: learned B and C of its position
    and one time step a head, for documents of up to max_position_embeddings tokens."""
    qk_dim: int = Field(16, ge=1)
    """Width of B and C over the number of heads."""

    def build(self, heads: int, head_dim: int, longest: int) -> "FamilyModule":
        """The matrices of `heads` heads, for documents of up to `longest` tokens."""
        from llmnorm.nn.mixers.matrix.quasiseparable import Quasiseparable

        return Quasiseparable(
            heads, head_dim, longest, qk_dim=self.qk_dim, data_dependent=self.data_dependent
        )


Family = Annotated[
    DenseSettings
    | ToeplitzSettings
    | VandermondeSettings
    | DFTSettings
    | CauchySettings
    | LowRankSettings
    | AttentionSettings
    | QuasiseparableSettings,
    Part(default="quasiseparable"),
]
