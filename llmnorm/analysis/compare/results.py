"""What a comparison found: from the lines of its finished runs to numbers.

    results(protocol, records)    a JSON tree: `arms` (what each reached), `against` (for each
                                  baseline, every other arm), `notes` (what to beware of)

Everything that a clock has measured stands under a key `timing`; all else is the same whenever and
wherever the runs are made (up to the rounding of other hardware).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from llmnorm.analysis.compare.ledger import Record
from llmnorm.analysis.compare.plan import Protocol, Run
from llmnorm.analysis.compare.statistics import (
    Array,
    Interval,
    gap_interval,
    log_speed_up,
    resolvable,
    slope,
    speed_up_interval,
    standard_error,
)
from llmnorm.config.tree import differences, to_tree

ENOUGH_TOKENS = 500_000  # of validation text


def results(
    protocol: Protocol, records: Mapping[str, Record], validation_tokens: int | None = None
) -> dict[str, Any]:
    """The numbers of a finished comparison.

    Args:
        records: of every run that the protocol needs.
        validation_tokens: how long the validation text is, for a note where it is short.
    """
    losses = {key: record.final for key, record in records.items()}
    arms = {name: _arm(name, protocol, records, losses) for name in protocol.arms}
    against = {
        baseline: {
            name: _against(baseline, name, protocol, records, losses)
            for name in protocol.arms
            if name != baseline
        }
        for baseline in protocol.baselines
    }
    found = {
        "seeds": protocol.paired_seeds,
        "tokens": protocol.tokens_of(Run(protocol.baselines[0], None, 0)),
        "horizons": protocol.horizons,
        "validation_tokens": validation_tokens,
        "arms": arms,
        "against": against,
    }
    used = [records[run.key] for run in protocol.needed(losses)]
    made = {key: sorted({getattr(r, key) for r in used}) for key in ("place", "version")}
    return found | {"notes": _notes(protocol, found, made), "timing": made}


def _arm(
    name: str, protocol: Protocol, records: Mapping[str, Record], losses: Mapping[str, float]
) -> dict[str, Any]:
    tuned = protocol.tuned(name)
    grid = protocol.grid(name, losses) if tuned else []
    lr = protocol.best_lr(name, losses) if tuned else None
    runs = protocol.paired(name, lr)
    full = [records[run.key] for run in runs if run.horizon == 1]
    final = np.array([record.final for record in full])
    rates = [record.tokens_per_second for record in full if record.tokens_per_second]
    bits = [math.nan if r.bits_per_byte is None else r.bits_per_byte for r in full]
    config = protocol.configs[name]
    first = to_tree(protocol.configs[protocol.baselines[0]])
    own = differences(first, to_tree(config))
    arm = protocol.arms[name]
    common = set.intersection(*(set(other.overrides) for other in protocol.arms.values()))
    paths = {other.path for other in protocol.arms.values()}
    return {
        "written": [str(arm.path)] * (len(paths) > 1)
        + [word for word in arm.overrides if word not in common],
        "settings": {key: new for key, (_, new) in own.items() if key != "run_dir"},
        "tuned": tuned,
        "lr": getattr(config.optimizer, "lr", None) if lr is None else lr,
        "weight_decay": protocol.weight_decay(runs[0]),
        "at_edge": tuned and protocol.at_edge(name, losses),
        "tuning": [{"lr": run.lr, "loss": losses[run.key]} for run in grid],
        "losses": final.tolist(),
        "loss": float(final.mean()),
        "standard_error": standard_error(final),
        "bits_per_byte": float(np.mean(bits)),
        "diverged": [run.key for run in [*grid, *runs] if math.isinf(losses[run.key])],
        "horizons": {
            f"{h:g}": [losses[run.key] for run in runs if run.horizon == h]
            for h in protocol.horizons_of(name)
        },
        "curves": [record.curve for record in full],
        "timing": {"tokens_per_second": median(rates) if rates else None},
    }


def _against(
    baseline: str,
    name: str,
    protocol: Protocol,
    records: Mapping[str, Record],
    losses: Mapping[str, float],
) -> dict[str, Any]:
    def runs(arm: str) -> list[Run]:
        lr = protocol.best_lr(arm, losses) if protocol.tuned(arm) else None
        return protocol.paired(arm, lr)

    def at(arm: str, horizon: float) -> Array:
        return np.array([losses[run.key] for run in runs(arm) if run.horizon == horizon])

    # Whose length is varied: the baseline's, or the arm's.
    whose = name if protocol.horizons == "arms" and name != protocol.baselines[0] else baseline
    horizons = protocol.horizons_of(whose)
    curve = np.stack([at(whose, h) for h in horizons], axis=1)
    base, own = at(baseline, 1.0), at(name, 1.0)
    beta = float(slope(horizons, curve.mean(axis=0)))
    gap = gap_interval(base, own)
    factor = speed_up_interval(base, own, horizons, curve)
    longest = max(math.log(h) for h in horizons) - min(math.log(h) for h in horizons)
    log_factor = float(log_speed_up(gap.value, beta))
    return {
        "gap": _interval(gap),
        "nats_for_e_times_the_length": beta,
        "converted_by": whose,
        "tokens": {
            **_interval(factor),
            "resolvable": resolvable(base, own, beta),
            "extrapolated": longest + 1e-9 < abs(log_factor) < math.inf,
        },
        "verdict": _verdict(gap, factor),
        "timing": _timing(records, runs(baseline), runs(name), base, own, horizons, curve, beta),
    }


def _timing(
    records: Mapping[str, Record],
    baseline: Sequence[Run],
    arm: Sequence[Run],
    base: Array,
    own: Array,
    horizons: Sequence[float],
    curve: Array,
    beta: float,
) -> dict[str, Any] | None:
    """The same in seconds: each seed's two runs have been timed on the same machine."""
    rates = [[records[r.key] for r in runs if r.horizon == 1] for runs in (baseline, arm)]
    pairs = [
        (one.tokens_per_second, other.tokens_per_second)
        for one, other in zip(*rates, strict=True)
        if one.tokens_per_second and other.tokens_per_second
    ]
    if len(pairs) < len(base):  # one has diverged
        return None
    log_ratio = np.log([other / one for one, other in pairs])
    return {
        "relative_speed": float(np.exp(log_ratio.mean())),
        "seconds": _interval(speed_up_interval(base, own, horizons, curve, log_ratio)),
        "gap_at_equal_seconds": _interval(gap_interval(base + beta * log_ratio, own)),
    }


def _interval(found: Interval) -> dict[str, float]:
    return found._asdict()


def _verdict(gap: Interval, factor: Interval) -> str:
    """`better`, `worse` or `not resolved`, by intervals that leave out no difference."""
    if math.isnan(gap.low):
        return "one seed"
    converted = not math.isnan(factor.value)
    if gap.low > 0 and not (converted and factor.low <= 1):
        return "better"
    if gap.high < 0 and not (converted and factor.high >= 1):
        return "worse"
    return "not resolved"


def _notes(
    protocol: Protocol, found: Mapping[str, Any], made: Mapping[str, Sequence[str]]
) -> list[str]:
    """What a reader should beware of, each a sentence."""
    notes = []
    for name, arm in found["arms"].items():
        if arm["diverged"]:
            notes.append(
                f"{name}: diverged, counted as infinite loss: {', '.join(arm['diverged'])}"
            )
        if arm["at_edge"]:
            notes.append(f"{name}: the best learning rate is the outermost that was tried")
    for baseline, arms in found["against"].items():
        for name, one in arms.items():
            if one["tokens"]["extrapolated"]:
                notes.append(
                    f"{name} against {baseline}: the factor lies beyond the lengths that were run"
                )
            if one["nats_for_e_times_the_length"] <= 0:
                notes.append(
                    f"{name} against {baseline}: {one['converted_by']} gains nothing from a longer "
                    "run, so no length makes up for a gap in loss"
                )
    if protocol.seeds == 1:
        notes.append("one seed says nothing about chance: give --seeds 3 or more")
    if protocol.lr_points == 1:
        notes.append("no learning rate was tuned: an arm may be behind for its learning rate alone")
    untuned = [name for name, arm in found["arms"].items() if not arm["tuned"]]
    if protocol.lr_points > 1 and untuned:
        notes.append(f"as written, not tuned: {', '.join(untuned)}")
    tokens = found["validation_tokens"]
    if tokens is not None and tokens < ENOUGH_TOKENS:
        notes.append(
            f"the validation text has {tokens:,} tokens; below {ENOUGH_TOKENS:,} its choice matters"
        )
    if len(made["place"]) > 1:
        places = "; ".join(made["place"])
        notes.append(f"timed in unequal places, seconds are not comparable: {places}")
    if len(made["version"]) > 1:
        notes.append("the runs were made by more than one version of the code")
    others = len(protocol.arms) - 1
    if others > 2:
        notes.append(
            f"each interval holds 95 % by itself; one of {others} is wrong more often than that"
        )
    return notes
