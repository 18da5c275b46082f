"""Sequence mixers at small size: causal and masked language models, associative recall.

usage: python tools/reproduce/mixers.py language|masked|recall [--arms NAME ...] [--seeds 3]
           [--plan] [--parallel 1] [--set key=value ...]

    language   causal mixers, equal parameters, on the default corpus
    masked     encoders' mixers in blocks without an MLP: both directions of softmax and SSD, and
               the families of mixing matrices; `own token` in the table is the share of a token in
               its own output before training
    recall     causal mixers: 8, 16, 32 or 64 random key-value pairs, then the same pairs in other
               orders until the row is full; every row is one text of 256 characters, a token each

Every arm's learning rate is tuned alike, then all train with the same paired seeds. Each finished
run is a line of docs/results/mixers_TASK/runs.jsonl, which is committed; such a run is not made
again. Run directories are in runs/reproduce.

Sources: Hwang et al. 2024 (Hydra), arXiv 2407.09941: table 2 (families, cross-entropy of masked
language models on C4) and table 3 (ways to two directions). The recall task: Arora et al. 2023
(Zoology), arXiv 2312.04927, section 3. For language we expected NaLa's loss to be at most that of
linear attention; the figures for language models in its paper could not be read.

What would surprise: the losses of `recall` mix what can be predicted (values whose keys have come
before) with what cannot (which pairs, in which order). The figure that counts is the accuracy on
the values when each key comes for the second time: how often the value that the model finds most
likely is right (chance: 1 in 30). It is measured on the checkpoints of the paired runs, which are
removed afterwards. Rows that ask once and are filled up with blanks teach the same, but many times
slower.
"""

import json
import random
import shutil
import string
import sys
from pathlib import Path
from typing import Any, NamedTuple

from arms import mean_and_error, parser, reproduce

from llmnorm.analysis.compare.arms import read_arms, read_protocol
from llmnorm.analysis.compare.plan import Protocol
from llmnorm.analysis.compare.report import markdown
from llmnorm.machine.files import write_whole

RECIPES = Path("configs/recipes/mixers")
RESULTS = Path("docs/results")
RUNS = Path("runs/reproduce")
LR_POINTS = 3


class Arm(NamedTuple):
    """An arm's overrides, and its cross-entropy in the paper (None: the paper has none)."""

    settings: tuple[str, ...]
    paper: float | None = None


def causal(mixer: str, inner: int) -> tuple[str, ...]:
    """Overrides of a causal mixer and of the MLP's inner width, which equalises the parameters."""
    return f"model.mixer={mixer}", f"model.intermediate_size={inner}"


def causal_arms(inner: int, nala: int, ssd: int, gla: int, gated_delta: int) -> dict[str, Arm]:
    """The causal mixers as arms of equal size.

    `linear` has NaLa's gate, convolution and norm, so that only the feature map differs.

    Args:
        inner: the MLP's inner width beside softmax attention.
        nala, ssd, gla, gated_delta: by how much the MLP is narrower beside these mixers, which
            have more parameters.
    """
    linear = "{name: linear, gate: true, conv_kernel: 4, norm: rms}"
    return {
        "softmax": Arm(causal("softmax", inner)),
        "linear_plain": Arm(causal("linear", inner)),
        "linear": Arm(causal(linear, inner - nala)),
        "nala": Arm(causal("nala", inner - nala)),
        "ssd": Arm(causal("{name: ssd, state_size: 32, head_dim: 32}", inner - ssd)),
        "gla": Arm(causal("gla", inner - gla)),
        "gated_delta": Arm(causal("gated_delta", inner - gated_delta)),
        "hybrid": Arm(causal("[nala, softmax]", inner - nala // 2)),
    }


def family(name: str) -> tuple[str, ...]:
    """Overrides of a family of mixing matrices, whose parameters are made from the tokens."""
    return (f"model.mixer={{name: matrix, family: {name}, head_dim: 64}}",)


def ssd_pair(combination: str) -> tuple[str, ...]:
    """Overrides of two SSDs, one per direction, and how they are combined."""
    return (f"model.mixer.combination={combination}",)


TASKS: dict[str, dict[str, Arm]] = {
    "language": causal_arms(344, nala=44, ssd=114, gla=8, gated_delta=49)
    | {  # where the losses of `linear` and `nala` come from
        "linear_no_conv": Arm(causal("{name: linear, gate: true, norm: rms}", 301)),
        "nala_power_1": Arm(causal("{name: nala, lam: 1, tau: 1}", 300)),
    },
    "masked": {
        "hydra": Arm((), 1.66),
        "add": Arm(ssd_pair("add"), 1.68),
        "concat": Arm(ssd_pair("concat"), 1.71),
        "softmax": Arm(("model.mixer={name: softmax, bidirectional: true}",)),
        "quasiseparable": Arm(family("quasiseparable"), 1.84),
        "attention": Arm(family("attention"), 1.87),
        "low_rank": Arm(family("low_rank"), 1.90),
        "toeplitz": Arm(family("toeplitz"), 1.91),
        "cauchy": Arm(family("cauchy"), 1.94),
        "vandermonde": Arm(family("vandermonde"), 2.04),
    },
    "recall": causal_arms(128, nala=23, ssd=71, gla=8, gated_delta=27),
}
PAIRS = (8, 16, 32, 64)
KEYS = string.ascii_letters + string.digits + "+-"
VALUES = "".join(c for c in string.punctuation if c not in KEYS)
CHARACTERS = 256
TEXTS = {"": 6000, "-validation": 100}  # of each number of pairs
DATA = Path("data/recall")


def recall_text(pairs: int, generator: random.Random) -> str:
    """256 characters: pairs of key and value, then all pairs in other orders, again and again."""
    keys = generator.sample(KEYS, pairs)
    first = [key + generator.choice(VALUES) for key in keys]
    rounds = CHARACTERS // (2 * pairs) - 1
    return "".join(first + [pair for _ in range(rounds) for pair in generator.sample(first, pairs)])


def write_recall_texts() -> None:
    """Write the files that configs/recipes/mixers/recall.yaml names; they are always the same."""
    DATA.mkdir(parents=True, exist_ok=True)
    for pairs in PAIRS:
        for part, count in TEXTS.items():
            generator = random.Random(f"{pairs}{part}")
            lines = [
                json.dumps({"text": recall_text(pairs, generator)}) + "\n" for _ in range(count)
            ]
            path = DATA / f"pairs{pairs:02}{part}.jsonl"
            text = "".join(lines)
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_whole(path, text)


def recall_accuracy(path: Path) -> dict[str, float]:
    """How often a run's model gets a value right when first asked, by the number of pairs."""
    import torch

    from llmnorm.exchange.loading import load_model

    model, tokenizer = load_model(path)
    found = {}
    for pairs in PAIRS:
        lines = (DATA / f"pairs{pairs:02}-validation.jsonl").read_text(encoding="utf-8")
        texts = [json.loads(line)["text"] for line in lines.splitlines()]
        ids = torch.tensor([tokenizer(text)["input_ids"][: CHARACTERS + 1] for text in texts])
        assert ids.shape == (len(texts), CHARACTERS + 1), "a token a character behind <|bos|>"
        with torch.no_grad():
            likely = model(input_ids=ids).logits.argmax(-1)
        keys, values = slice(2 * pairs + 1, 4 * pairs, 2), slice(2 * pairs + 2, 4 * pairs + 1, 2)
        found[str(pairs)] = float((likely[:, keys] == ids[:, values]).double().mean())
    return found


def measure_recall(protocol: Protocol, found: dict[str, Any], path: Path) -> dict[str, Any]:
    """The accuracy of every paired run, which is also written to `path`.

    The runs' checkpoints are removed afterwards.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for arm in found["arms"]:
        for job in protocol.paired(arm, found["arms"][arm]["lr"]):
            directory = RUNS / "mixers_recall" / job.key
            if job.horizon == 1 and job.key not in known:
                known[job.key] = recall_accuracy(directory)
                write_whole(path, json.dumps(known, indent=1) + "\n")
    for directory in (RUNS / "mixers_recall").glob("*/*/checkpoints"):
        shutil.rmtree(directory)
    return known


def measure_masked(protocol: Protocol, path: Path) -> dict[str, Any]:
    """Each arm's `own_token`, which is also written to `path`."""
    from own_token import own_token

    found = {name: own_token(config) for name, config in protocol.configs.items()}
    write_whole(path, json.dumps(found, indent=1) + "\n")
    return found


def table(task: str, found: dict[str, Any], measured: dict[str, Any]) -> str:
    """The arms beside the paper's figures, in Markdown.

    Args:
        task: language, masked or recall.
        found: the tree of result.json.
        measured: the tree of measured.json, empty for `language`.
    """
    head = ["arm", "lr", "loss"]
    head += [f"accuracy, {n} pairs" for n in PAIRS] if task == "recall" else []
    head += ["own token", "paper's loss"] if task == "masked" else []
    rows = []
    for name, arm in found["arms"].items():
        cells = [name, f"{arm['lr']:.3g}", mean_and_error(arm["losses"], 4)]
        if task == "recall":
            key = f"{name}/lr{arm['lr']:.6g}-"
            accuracies = [by_pairs for run, by_pairs in measured.items() if run.startswith(key)]
            cells += [mean_and_error([a[str(n)] for a in accuracies], 3) for n in PAIRS]
        if task == "masked":
            paper = TASKS[task][name].paper
            cells += [f"{measured[name]:.3f}", "-" if paper is None else f"{paper:.2f}"]
        rows.append(cells)
    return markdown(head, rows)


def read(task: str, chosen: list[str], seeds: int, shared: list[str]) -> Protocol:
    """The comparison of some arms of a task; the task's first arm is the baseline.

    Args:
        task: language, masked or recall.
        chosen: names of arms; the baseline is added.
        seeds: paired seeds.
        shared: overrides of all arms.
    """
    names = [name for name in TASKS[task] if name in chosen or name == next(iter(TASKS[task]))]
    arms = [[name, *TASKS[task][name].settings] for name in names]
    return read_protocol(
        read_arms(RECIPES / f"{task}.yaml", shared, arms),
        baselines=names[:1],
        seeds=seeds,
        lr_points=LR_POINTS,
        horizons="none",
    )


def main(arguments: list[str] | None = None) -> int:
    """Make the runs that are missing, then the report and the table."""
    every = list(dict.fromkeys(name for arms in TASKS.values() for name in arms))
    words = parser(__doc__, every, every)
    words.add_argument("task", choices=TASKS)
    words.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all arms")
    options = words.parse_args(arguments)
    task, results = options.task, RESULTS / f"mixers_{options.task}"

    def read_task() -> Protocol:
        if task == "recall":
            write_recall_texts()
        return read(task, options.arms, options.seeds, options.set)

    def measure(protocol: Protocol, found: dict[str, Any]) -> str:
        measured, path = {}, results / "measured.json"
        if task == "recall":
            measured = measure_recall(protocol, found, path)
        if task == "masked":
            measured = measure_masked(protocol, path)
        return table(task, found, measured)

    return reproduce(
        read_task,
        measure,
        results,
        RUNS / f"mixers_{task}",
        options,
        arguments,
        keep_checkpoints=task == "recall",
    )


if __name__ == "__main__":
    sys.exit(main())
