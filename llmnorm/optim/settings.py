"""Settings of the optimizers (parts)."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llmnorm.config.values import Count, Width
from llmnorm.optim.rates import (
    AuxiliaryAdamWSettings,
    AuxiliarySettings,
    GroupSettings,
    Rate,
    check_rules,
)
from llmnorm.optim.schedule import (
    Beta,
    HyperparameterSchedule,
    Momentum,
    MomentumWarmup,
    Multiplier,
    SameSettings,
)
from llmnorm.part import Part, Settings

if TYPE_CHECKING:
    from llmnorm.optim.adamw import AdamW
    from llmnorm.optim.groups import Groups
    from llmnorm.optim.sharded import Exchange
    from llmnorm.optim.stacks import Rule, RuleOptimizer


class OptimizerSettings(Settings):
    """What the settings of every optimizer have; base class of an optimizer of your own."""

    auxiliary: AuxiliarySettings = AuxiliarySettings()
    """Embeddings, head, norms, biases and scalars."""
    groups: list[GroupSettings] = []
    """Parameters with another learning rate, decay or rule, chosen by their names, e.g.
    [{match: "*.mlp.*", lr: 0.5}]; of several that match a name the last counts, alone."""
    nap: bool = False
    """Normalize-and-Project: after every step each hidden matrix is scaled back to its initial
    norm (Lyle et al. 2024, arXiv 2407.01800)."""

    if TYPE_CHECKING:
        lr: Rate
        weight_decay: float

    @property
    def label(self) -> str:
        """Its name in tables."""
        return str(getattr(self, "name", type(self).__name__))

    @property
    def over_adamw(self) -> float:
        """The best learning rate divided by AdamW's best, both in AdamW's unit (`adamw_lr`)."""
        return 1.0

    @model_validator(mode="after")
    def _groups_have_rules(self) -> "OptimizerSettings":
        check_rules(self.groups, self.label)
        return self

    @model_validator(mode="after")
    def _nothing_decays_under_nap(self) -> "OptimizerSettings":
        for key in ("lr", "weight_decay"):
            if key not in type(self).model_fields:
                raise ValueError(f"{self.label} lacks the setting '{key}', which optimizers have")
        if self.nap and self.weight_decay:
            raise ValueError(
                "optimizer.nap takes the place of decay on hidden matrices; "
                "set optimizer.weight_decay=0"
            )
        return self

    def adamw_lr(self, lr: float, width: int) -> float:
        """The learning rate at which AdamW's steps are as large as this rule's at `lr`.

        A step of AdamW has a root mean square of about .2 of its rate. So a rule whose steps are
        exactly `lr` large would give lr / .2 here.

        Args:
            width: the number of columns that most hidden matrices of the model have.
        """
        return lr

    def auxiliary_lr(self, width: int) -> float:
        """Peak learning rate of the auxiliary parameters."""
        assert self.lr != "auto", "resolved before a run begins"
        return self.adamw_lr(self.lr, width) if self.auxiliary.lr is None else self.auxiliary.lr

    def hyperparameters(self, of_the_run: Multiplier, steps: int) -> HyperparameterSchedule:
        """What every step of a run of `steps` steps sets in the param groups.

        Args:
            of_the_run: the run's `schedule`: step (from 0) -> factor on the peak learning rate.
        """
        own = self.auxiliary.schedule
        auxiliary = of_the_run if isinstance(own, SameSettings) else own.build(steps)
        lr = {"matrices": of_the_run, "auxiliary": auxiliary}
        return HyperparameterSchedule(lr, self.momentum_at)

    def momentum_at(self, step: int) -> float:
        """The rule's momentum at a step (from 0); 0 where no setting moves one."""
        return 0.0

    @abstractmethod
    def build(
        self, groups: "Groups", exchange: "Exchange | None" = None
    ) -> "AdamW | RuleOptimizer":
        """The optimizer over `groups`, its state allocated.

        Each of its param groups has a `kind` ("matrices" or "auxiliary") and its peak learning rate
        as `peak_lr`; `hyperparameters` sets the rate of a step. `optim/build.py` serves `groups`.

        Args:
            exchange: the processes that share the matrices; None for a single process.
        """


class AdamWSettings(OptimizerSettings):
    """AdamW with decoupled weight decay on hidden matrices only (torch's fused kernel).

    Source: Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2; torch.optim.AdamW.
    """

    name: Literal["adamw"] = "adamw"
    lr: Rate = 1e-3
    """Peak learning rate of the hidden matrices; `auto`: the Step Law's (needs training.tokens or
    training.steps)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the bias-corrected root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of the hidden matrices, times the learning rate."""

    def build(
        self, groups: "Groups", exchange: "Exchange | None" = None
    ) -> "AdamW | RuleOptimizer":
        """The optimizer over `groups`, its state allocated."""
        from llmnorm.optim.build import adamw

        return adamw(self, groups, exchange)


class MatrixSettings(OptimizerSettings):
    """What the optimizers with a rule for whole matrices have."""

    auxiliary: AuxiliaryAdamWSettings = AuxiliaryAdamWSettings()
    """Embeddings, head, norms, biases and scalars: AdamW."""
    split_sizes: dict[str, list[Width]] = {}
    """How fused projections are cut, where it is not found out: pattern of parameter names -> rows
    of each matrix, e.g. {"*.qkv_proj.weight": [512, 512, 512]}; all rows as one number: not cut."""

    @abstractmethod
    def rule(self) -> "Rule":
        """The update of one matrix."""

    def build(
        self, groups: "Groups", exchange: "Exchange | None" = None
    ) -> "AdamW | RuleOptimizer":
        """The optimizer over `groups`, its state allocated."""
        from llmnorm.optim.build import with_rule

        return with_rule(self, groups, exchange)


class OrthogonalizedSettings(MatrixSettings):
    """What the settings of Muon and NorMuon share."""

    momentum: Momentum = 0.95
    """Decay rate of the momentum, at least 0 and less than 1; `{from: 0.85, to: 0.95, steps: 300}`:
    in a straight line from 0.85 at the first step to 0.95 at step 300, and 0.95 from there on."""
    orthogonalize: Literal["standard", "gram"] = "standard"
    """Form of the Newton-Schulz iteration; `gram`: long matrices by their Gram matrix, half the
    work, with errors of up to 2e-4."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the iteration's matrix products; `auto`: bf16 where the hardware multiplies in it,
    float32 elsewhere and for `orthogonalize: gram`."""

    if TYPE_CHECKING:
        update_rms: Literal["match_adamw", "original"]
        coefficients: Literal["jordan", "quintic", "polar_express"]
        nesterov: bool

    @model_validator(mode="after")
    def _gram_is_not_for_bf16(self) -> "OrthogonalizedSettings":
        if self.orthogonalize == "gram" and self.precision == "bf16":
            raise ValueError(
                "optimizer.orthogonalize=gram diverges in bf16; "
                "set optimizer.precision=fp32 or optimizer.orthogonalize=standard"
            )
        return self

    @property
    def over_adamw(self) -> float:
        """Tuned rates are 1.3 to 2 times AdamW's (modded-nanogpt's, converted)."""
        return 1.5

    def adamw_lr(self, lr: float, width: int) -> float:
        """For `original` lr / (.2 sqrt(width)), exact for matrices of `width` columns; else lr."""
        return lr if self.update_rms == "match_adamw" else lr / (0.2 * width**0.5)

    def momentum_at(self, step: int) -> float:
        """The momentum of a step (from 0)."""
        momentum = self.momentum
        return momentum.at(step) if isinstance(momentum, MomentumWarmup) else momentum

    def _muon(self, variant: Literal["jordan", "torch", "moonlight"] = "jordan") -> Any:
        from llmnorm.optim.muon import Muon

        return Muon(
            variant=variant,
            nesterov=self.nesterov,
            update_rms=self.update_rms,
            orthogonalize=self.orthogonalize,
            coefficients=self.coefficients,
            precision=self.precision,
        )


class MuonSettings(OrthogonalizedSettings):
    """Momentum whose singular values are all set near 1.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; `match_adamw`: Liu et al. 2025,
    arXiv 2502.16982.
    """

    name: Literal["muon"] = "muon"
    update_rms: Literal["match_adamw", "original"] = "match_adamw"
    """Size of a step: `match_adamw`, about that of AdamW at the same lr; `original`, a spectral
    norm of lr sqrt(max(1, rows / columns)). lr (original) = lr (match_adamw) * .2 sqrt(columns),
    and weight_decay is divided by the same factor."""
    lr: Rate = Field(default_factory=lambda data: _muon_lr(data["update_rms"]))
    """Peak learning rate of the hidden matrices; 2e-3 (match_adamw) or 0.02 (original) if not
    given, `auto`: the Step Law's."""
    weight_decay: float = Field(default_factory=lambda data: _muon_wd(data["update_rms"]), ge=0)
    """Decay of the hidden matrices, times the learning rate; 0.1 or 0.02 if not given."""
    nesterov: bool = True
    """Look one step ahead: orthogonalise (1 - mu) G + mu M instead of M."""
    coefficients: Literal["jordan", "quintic", "polar_express"] = "jordan"
    """The iteration's polynomials."""
    variant: Literal["jordan", "torch", "moonlight"] = "jordan"
    """Whose arithmetic, where official codes differ by less than float32 shows: `moonlight` sums
    gradients (M <- mu M + G), the others average them (M <- mu M + (1 - mu) G); `torch` takes the
    norm before the iteration for at least 1e-7, the others add 1e-7 to it. Under a momentum warm-up
    a sum and an average mix gradients differently."""

    def rule(self) -> "Rule":
        """The update of one matrix."""
        return self._muon(self.variant)


# The options in which NorMuon's sources differ.
_NORMUON: dict[str, dict[str, Any]] = {
    "official": {
        "update_rms": "original",
        "nesterov": True,
        "axis": "rows",
        "beta2": 0.95,
        "coefficients": "jordan",
        "cautious_decay": False,
    },
    "paper": {
        "update_rms": "match_adamw",
        "nesterov": False,
        "axis": "rows",
        "beta2": 0.95,
        "coefficients": "jordan",
        "cautious_decay": False,
    },
    "speedrun": {
        "update_rms": "original",
        "nesterov": True,
        "axis": "longer",
        "beta2": 0.9,
        "coefficients": "polar_express",
        "cautious_decay": True,
    },
}


class NorMuonSettings(OrthogonalizedSettings):
    """Muon with every neuron's row brought to the same running size.

    Source: Li et al. 2025, arXiv 2510.05491; official code zichongli5/NorMuon.
    """

    name: Literal["normuon"] = "normuon"
    preset: Literal["official", "paper", "speedrun"] = "official"
    """Whose values the settings below have that are not given."""
    update_rms: Literal["match_adamw", "original"] = Field(
        default_factory=lambda data: _NORMUON[data["preset"]]["update_rms"]
    )
    """Size of a step: `match_adamw`, a root mean square of exactly .2 lr (paper); `original`, as
    Muon's (official, speedrun)."""
    lr: Rate = Field(default_factory=lambda data: _muon_lr(data["update_rms"]))
    """Peak learning rate of the hidden matrices; 2e-3 (match_adamw) or 0.02 (original) if not
    given, `auto`: the Step Law's."""
    weight_decay: float = Field(default_factory=lambda data: _muon_wd(data["update_rms"]), ge=0)
    """Decay of the hidden matrices, times the learning rate; 0.1 or 0.02 if not given."""
    nesterov: bool = Field(default_factory=lambda data: _NORMUON[data["preset"]]["nesterov"])
    """Look one step ahead: orthogonalise (1 - mu) G + mu M instead of M (official, speedrun)."""
    axis: Literal["rows", "longer"] = Field(
        default_factory=lambda data: _NORMUON[data["preset"]]["axis"]
    )
    """What has a running size: every row, or every index along the longer side (speedrun)."""
    beta2: Beta = Field(default_factory=lambda data: _NORMUON[data["preset"]]["beta2"])
    """Decay rate of the running size; .95 (speedrun: .9)."""
    coefficients: Literal["jordan", "quintic", "polar_express"] = Field(
        default_factory=lambda data: _NORMUON[data["preset"]]["coefficients"]
    )
    """The iteration's polynomials; jordan (speedrun: polar_express)."""
    cautious_decay: bool = Field(
        default_factory=lambda data: _NORMUON[data["preset"]]["cautious_decay"]
    )
    """Decay only weights that the step moves towards zero (speedrun; arXiv 2510.12402)."""

    def rule(self) -> "Rule":
        """The update of one matrix."""
        from llmnorm.optim.normuon import NorMuon

        return NorMuon(self._muon(), self.beta2, self.axis, self.cautious_decay)


class CondaSettings(MatrixSettings):
    """Adam in the basis of the momentum's singular vectors, at full rank.

    Source: Wang et al. 2025, arXiv 2509.24218; official code jie040109/Conda.
    """

    name: Literal["conda"] = "conda"
    lr: Rate = 1e-2
    """Peak learning rate of the hidden matrices, whose steps are those of Adam at lr * scale;
    `auto`: the Step Law's."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment; not bias-corrected."""
    weight_decay: float = Field(default=0.025, ge=0)
    """Decay of the hidden matrices, times the learning rate; AdamW's 0.1 times `scale`."""
    scale: float = Field(default=0.25, gt=0)
    """Factor on the matrices' steps."""
    refresh_every: Count = 2000
    """Steps between two bases. 2000 is for the paper's runs of 10k to 100k steps; a short run needs
    about a fiftieth of its length."""
    refresh: Literal["together", "staggered"] = "together"
    """`together`: all matrices get new bases in the same step; `staggered`: each at a step of its
    own, so that no step takes much longer than the others."""
    basis: Literal["svd", "eigh"] = "svd"
    """How the basis is found; `eigh`: from the Gram matrix in float64, faster and as exact."""
    on_refresh: Literal["keep", "rotate", "reset"] = "keep"
    """What a change of basis does to the second moment: `keep` leaves it as it is (official code),
    `rotate` turns it into the new basis, `reset` sets it to 0."""
    correct_bias: bool = True
    """Multiply the step by sqrt(1 - beta2^t) / (1 - beta1^t), since both moments start at 0."""

    def adamw_lr(self, lr: float, width: int) -> float:
        """lr * scale."""
        return lr * self.scale

    def rule(self) -> "Rule":
        """The update of one matrix."""
        from llmnorm.optim.conda import Conda

        return Conda(
            betas=self.betas,
            eps=self.eps,
            scale=self.scale,
            refresh_every=self.refresh_every,
            refresh=self.refresh,
            basis=self.basis,
            on_refresh=self.on_refresh,
            correct_bias=self.correct_bias,
        )


class AdamPSettings(MatrixSettings):
    """AdamW without the radial part of steps on weights whose scale does not matter.

    Source: Heo et al. 2021, arXiv 2006.08217, Algorithm 2; official code clovaai/AdamP.
    """

    name: Literal["adamp"] = "adamp"
    lr: Rate = 1e-3
    """Peak learning rate of the hidden matrices; `auto`: the Step Law's."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the bias-corrected root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of the hidden matrices, times the learning rate."""
    delta: float = Field(default=0.1, ge=0)
    """Project where |cos(gradient, weight)| < delta / sqrt(numbers compared)."""
    wd_ratio: float = Field(default=0.1, ge=0)
    """Factor on the decay of a matrix whose step is projected."""
    nesterov: bool = False
    """Look one step ahead: (1 - beta1) G + beta1 M in the place of M."""

    def rule(self) -> "Rule":
        """The update of one matrix."""
        from llmnorm.optim.adamp import AdamP

        return AdamP(self.betas, self.eps, self.delta, self.wd_ratio, self.nesterov)


class SOAPSettings(MatrixSettings):
    """Adam in the eigenbasis of Shampoo's two Gram matrices.

    Source: Vyas et al. 2024, arXiv 2409.11321, Algorithm 3; official code nikhilvyas/SOAP.
    """

    name: Literal["soap"] = "soap"
    lr: Rate = 3e-3
    """Peak learning rate of the hidden matrices; `auto`: the Step Law's."""
    betas: tuple[Beta, Beta] = (0.95, 0.95)
    """Decay rates of the first and the second moment."""
    shampoo_beta: Beta | None = None
    """Decay rate of the Gram matrices; left out, that of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment; not bias-corrected."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of the hidden matrices, times the learning rate."""
    precondition_frequency: Count = 10
    """Steps between two refreshes of the bases."""
    max_precond_dim: int = Field(default=10_000, ge=0, le=2**31)
    """Sides longer than this are not rotated."""
    correct_bias: bool = True
    """Multiply the step by sqrt(1 - beta2^t) / (1 - beta1^t), since both moments start at 0."""
    normalize_grads: bool = False
    """Divide every matrix's step by its root mean square before the learning rate and the bias
    correction; a step is then as large as one of AdamW's at 5 lr."""

    @property
    def over_adamw(self) -> float:
        """Public recipes give SOAP about 0.7 of AdamW's rate."""
        return 0.7

    def adamw_lr(self, lr: float, width: int) -> float:
        """With `normalize_grads` lr / .2, since AdamW's steps are about .2 of its rate; else lr."""
        return lr / 0.2 if self.normalize_grads else lr

    def rule(self) -> "Rule":
        """The update of one matrix."""
        from llmnorm.optim.soap import SOAP

        return SOAP(
            betas=self.betas,
            shampoo_beta=self.shampoo_beta,
            eps=self.eps,
            precondition_frequency=self.precondition_frequency,
            max_precond_dim=self.max_precond_dim,
            correct_bias=self.correct_bias,
            normalize_grads=self.normalize_grads,
        )


def _muon_lr(update_rms: str) -> float:
    return 2e-3 if update_rms == "match_adamw" else 0.02


def _muon_wd(update_rms: str) -> float:
    return 0.1 if update_rms == "match_adamw" else 0.02


Optimizer = Annotated[
    AdamWSettings | MuonSettings | NorMuonSettings | CondaSettings | AdamPSettings | SOAPSettings,
    Part(OptimizerSettings, default="adamw"),
]
