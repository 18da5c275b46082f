"""Fine-tunes the quickstart's model on six small skills, and asks the held-out questions.

usage: python tools/bench/skills.py [--base runs/quickstart] [--runs runs]
           [--out docs/results/skills.json]

The recipe is configs/finetune/skills.yaml on what `python tools/make_skills.py data/skills`
writes, once for each kind of what is trained (KINDS; what a kind sets beside the recipe is in the
table). A run that is done is not done again, one that was stopped goes on. Of each:
  exact match   greedy answers to 100 held-out questions a source that are the reference and end by
                themselves, as the run's last evaluation counts them; before: `llmnorm eval BASE`
  ended         answers to all held-out questions that the model ends by itself: ours, greedy, and
                stock transformers' `generate` of the export (--stock, of an adapter --merge too),
                which is given the questions and no argument
  logits        the largest difference to ours, as a share of the largest logit: of the exported
                adapter in plain PEFT on the stock export of the base, and of the export in stock
                transformers
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from report import ROOT, Table, publish
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm.data.chat import ChatTemplate
from llmnorm.exchange.loading import model_of, open_source
from llmnorm.generation.continuations import continuations
from llmnorm.generation.contract import Request, Sampling
from llmnorm.runs.lines import read_lines

RECIPE = ROOT / "configs" / "finetune" / "skills.yaml"
KINDS = {
    "LoRA": [],
    "DoRA": ["adapter=dora"],
    "full": ["adapter=none"],
    "norms": ["adapter=none", "training.trainable=norms", "optimizer.lr=3e-2"],
}
LONGEST = 64  # tokens of an answer of ours


class Asked(NamedTuple):
    """A held-out question."""

    question: str
    answer: str


def llmnorm(*words: str | Path) -> None:
    """Run a command, which must succeed."""
    subprocess.run([sys.executable, "-m", "llmnorm", *map(str, words)], check=True, cwd=ROOT)


def held_out() -> dict[str, list[Asked]]:
    """The held-out questions of each source, with their answers."""
    found = {}
    for source in yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["data"]["sources"]:
        lines = (ROOT / source["validation"]).read_text(encoding="utf-8").splitlines()
        turns = [json.loads(line)["messages"] for line in lines]
        found[source["name"]] = [Asked(ask["content"], say["content"]) for ask, say in turns]
    return found


def shares(validation: dict[str, Any]) -> dict[str, float]:
    """Exact match, a source."""
    return {name: found["exact_match"] for name, found in validation["sources"].items()}


def turn(asked: Asked) -> list[dict[str, str]]:
    """The conversation that is to be answered."""
    return [{"role": "user", "content": asked.question}]


@torch.no_grad()
def ended_by_ours(run: Path, asked: list[Asked]) -> int:
    """How many answers the run's model ends by itself."""
    source = open_source(run)
    model, tokenizer = model_of(source, run)
    assert source.tokenizer is not None
    template = ChatTemplate(source.tokenizer)
    prompts = [template.render(turn(one), generation_prompt=True) for one in asked]
    stops, greedy = template.stops, Sampling(max_tokens=LONGEST, temperature=0)
    requests = [Request(tuple(prompt), greedy) for prompt in prompts]
    found = continuations(model, tokenizer, requests, ends=stops)
    return sum(ids[-1] in stops for ids in found)


@torch.no_grad()
def ended_by_stock(directory: Path, asked: list[Asked]) -> int:
    """How many answers stock transformers ends, which is given the questions alone."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    batch = tokenizer.apply_chat_template(
        [turn(one) for one in asked],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    answers = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    return int(torch.isin(answers, torch.tensor(ends)).any(1).sum())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits of random tokens."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (4, 64), generator=drawn)
    found: Tensor = model.eval()(ids).logits
    return found


def difference(logits: Tensor, ours: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((logits - ours).abs().max() / ours.abs().max())


def other_tools(run: Path, base: Path, place: Path, asked: list[Asked]) -> dict[str, Any]:
    """What is made of a run's exports."""
    from peft import PeftModel

    adapter = yaml.safe_load((run / "config.yaml").read_text())["adapter"]["name"] != "none"
    llmnorm("export", run, place / "stock", "--stock", *(["--merge"] if adapter else []))
    ours = logits(model_of(open_source(run), run)[0])
    stock = logits(AutoModelForCausalLM.from_pretrained(place / "stock"))
    found: dict[str, Any] = {
        "stock": difference(stock, ours),
        "ended": ended_by_stock(place / "stock", asked),
    }
    if adapter:
        llmnorm("export", run, place / "adapter")
        model = AutoModelForCausalLM.from_pretrained(base)
        peft = logits(PeftModel.from_pretrained(model, str(place / "adapter")))
        found["peft"] = difference(peft, ours)
    return found


def of_a_run(run: Path, base: Path, place: Path, asked: list[Asked]) -> dict[str, Any]:
    """The figures of a run that is done."""
    entries = [entry.value for entry in read_lines(run / "metrics.jsonl").entries]
    validation = [entry["validation"] for entry in entries if "validation" in entry][-1]
    steps = [entry for entry in entries if "loss" in entry]
    return {
        "exact_match": shares(validation),
        "loss": validation["loss"],
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "ended": ended_by_ours(run, asked),
        "exported": other_tools(run, base, place, asked),
    }


def tables(before: dict[str, float], kinds: dict[str, dict[str, Any]], asked: int) -> list[Table]:
    """What is shown."""
    rows = [
        [name, *(f"{100 * share:.0f} %" for share in found)]
        for name, found in (
            (name, [share, *(kind["exact_match"][name] for kind in kinds.values())])
            for name, share in before.items()
        )
    ]
    rest = [
        [
            name,
            " ".join(KINDS[name]) or "(the recipe)",
            f"{found['loss']:.3f}",
            f"{found['ended']} of {asked}",
            f"{found['exported']['ended']} of {asked}",
            f"{found['exported']['peft']:.0e}" if "peft" in found["exported"] else "",
            f"{found['exported']['stock']:.0e}",
        ]
        for name, found in kinds.items()
    ]
    columns = ["trained", "beside the recipe", "loss", "ended: ours", "ended: stock export"]
    return [
        Table("Right answers to 100 held-out questions", ["source", "before", *kinds], rows),
        Table(
            "Loss in nats a trained token, answers that end by themselves, and differences of "
            "logits",
            [*columns, "logits in PEFT", "logits in stock"],
            rest,
        ),
    ]


def main() -> None:
    """Train what is not trained yet, ask, and publish."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    llmnorm("eval", given.base, "--data", RECIPE)
    newest = max((given.base / "eval").glob("step_*.json"), key=lambda file: file.stat().st_mtime)
    before = shares(json.loads(newest.read_text(encoding="utf-8"))["validation"])
    asked = [one for questions in held_out().values() for one in questions]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        stock = Path(scratch) / "base"
        llmnorm("export", given.base, stock, "--stock")
        for name, words in KINDS.items():
            run = given.runs / f"skills-{name.lower()}"
            if not (run / "DONE").exists():
                places = [f"model.pretrained={given.base}", f"run_dir={run}"]
                llmnorm("finetune", RECIPE, *places, *words)
            found[name] = of_a_run(run, stock, Path(scratch) / name, asked)
    publish(
        given.out,
        "Fine-tuning the quickstart's model on six skills",
        tables(before, found, len(asked)),
        {"before": before, "kinds": found},
    )


if __name__ == "__main__":
    main()
