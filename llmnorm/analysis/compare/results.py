"""From the records of a comparison's finished runs to its numbers.

    results(protocol, records)    a JSON tree: `arms` (what each reached), `against` (for each
                                  baseline, every other arm), `notes` (caveats)

Whatever a clock has measured is under a key `timing`. The rest is the same when the runs are made
again, up to the rounding of other hardware; tests/analysis/compare/test_command.py compares two
such trees.
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
from llmnorm.config.saved import differences, to_tree

ENOUGH_TOKENS = 500_000  # of validation text


def results(
    protocol: Protocol, records: Mapping[str, Record], validation_tokens: int | None = None
) -> dict[str, Any]:
    """The numbers of a finished comparison.

    Args:
        protocol: what was compared.
        records: the records of all runs that the protocol needs, by key.
        validation_tokens: length of the validation text; a note is added where it is short.
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
    origins = {key: sorted({getattr(r, key) for r in used}) for key in ("place", "version")}
    return found | {"notes": _notes(protocol, found, origins), "timing": origins}


def _arm(
    name: str, protocol: Protocol, records: Mapping[str, Record], losses: Mapping[str, float]
) -> dict[str, Any]:
    """What one arm reached."""
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
    """One arm against one baseline."""

    def runs(arm: str) -> list[Run]:
        lr = protocol.best_lr(arm, losses) if protocol.tuned(arm) else None
        return protocol.paired(arm, lr)

    def at(arm: str, horizon: float) -> Array:
        return np.array([losses[run.key] for run in runs(arm) if run.horizon == horizon])

    # beta is taken from the one of the two that also ran at other lengths.
    varied = name if protocol.horizons == "arms" and name != protocol.baselines[0] else baseline
    horizons = protocol.horizons_of(varied)
    curve = np.stack([at(varied, h) for h in horizons], axis=1)
    base, own = at(baseline, 1.0), at(name, 1.0)
    beta = float(slope(horizons, curve.mean(axis=0)))
    gap = gap_interval(base, own)
    factor = speed_up_interval(base, own, horizons, curve)
    longest = max(math.log(h) for h in horizons) - min(math.log(h) for h in horizons)
    log_factor = float(log_speed_up(gap.value, beta))
    return {
        "gap": _interval(gap),
        "nats_for_e_times_the_length": beta,
        "converted_by": varied,
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
    """The comparison in seconds: the two runs of a seed were timed on the same machine.

    None where a run has no speed because it diverged.
    """
    full = [[records[r.key] for r in runs if r.horizon == 1] for runs in (baseline, arm)]
    speeds = [
        (of_baseline.tokens_per_second, of_arm.tokens_per_second)
        for of_baseline, of_arm in zip(*full, strict=True)
        if of_baseline.tokens_per_second and of_arm.tokens_per_second
    ]
    if len(speeds) < len(base):
        return None
    log_ratio = np.log([of_arm / of_baseline for of_baseline, of_arm in speeds])
    return {
        "relative_speed": float(np.exp(log_ratio.mean())),
        "seconds": _interval(speed_up_interval(base, own, horizons, curve, log_ratio)),
        "gap_at_equal_seconds": _interval(gap_interval(base + beta * log_ratio, own)),
    }


def _interval(found: Interval) -> dict[str, float]:
    return found._asdict()


def _verdict(gap: Interval, factor: Interval) -> str:
    """`better` or `worse` where the intervals exclude "no difference", else `not resolved`.

    With one seed there is no interval, and the verdict is `one seed`.
    """
    if math.isnan(gap.low):
        return "one seed"
    converted = not math.isnan(factor.value)
    if gap.low > 0 and not (converted and factor.low <= 1):
        return "better"
    if gap.high < 0 and not (converted and factor.high >= 1):
        return "worse"
    return "not resolved"


def _notes(
    protocol: Protocol, found: Mapping[str, Any], origins: Mapping[str, Sequence[str]]
) -> list[str]:
    """What weakens the answer, in sentences without their full stop."""
    notes = []
    for name, arm in found["arms"].items():
        if arm["diverged"]:
            notes.append(
                f"{name}: diverged, counted as infinite loss: {', '.join(arm['diverged'])}"
            )
        if arm["at_edge"]:
            notes.append(f"{name}: the best learning rate is the outermost that was tried")
    for baseline, arms in found["against"].items():
        for name, pair in arms.items():
            if pair["tokens"]["extrapolated"]:
                notes.append(
                    f"{name} against {baseline}: the factor lies beyond the lengths that were run"
                )
            if pair["nats_for_e_times_the_length"] <= 0:
                notes.append(
                    f"{name} against {baseline}: longer runs of {pair['converted_by']} have no "
                    "lower loss, so a gap in loss cannot be converted into a factor in length"
                )
    if protocol.seeds == 1:
        notes.append("one seed says nothing about chance; give --seeds 3 or more")
    if protocol.lr_points == 1:
        notes.append(
            "no learning rate was tuned, so an arm may be behind because of its learning rate alone"
        )
    untuned = [name for name, arm in found["arms"].items() if not arm["tuned"]]
    if protocol.lr_points > 1 and untuned:
        notes.append(f"not tuned, as written: {', '.join(untuned)}")
    tokens = found["validation_tokens"]
    if tokens is not None and tokens < ENOUGH_TOKENS:
        notes.append(
            f"the validation text has only {tokens:,} tokens; with fewer than {ENOUGH_TOKENS:,}, "
            "another text may give another answer"
        )
    if len(origins["place"]) > 1:
        places = "; ".join(origins["place"])
        notes.append(f"the runs were timed in different places, so seconds mislead: {places}")
    if len(origins["version"]) > 1:
        notes.append("the runs were made by more than one version of the code")
    others = len(protocol.arms) - 1
    if others > 2:
        notes.append(
            f"each of the {others} intervals is wrong in 5 % of comparisons, so one among "
            f"{others} is wrong more often than that"
        )
    return notes
