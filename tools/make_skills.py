"""Six generated sources of tasks with one right answer each, for configs/finetune/skills.yaml.

    python tools/make_skills.py data/skills

Each source is a .jsonl file of conversations (a question, an answer) and a file of held-out ones,
whose questions are in no other file. The largest source has 50 times as many examples as the
smallest, which is also the hardest: so a mixture, and a selection of examples, have something to
do. The files are functions of the seed.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llmnorm.machine.files import write_whole

WORDS = [
    "river",
    "stone",
    "light",
    "green",
    "window",
    "paper",
    "morning",
    "seven",
    "water",
    "house",
    "night",
    "world",
    "tree",
    "fire",
    "horse",
    "garden",
    "summer",
    "winter",
    "table",
    "letter",
    "silver",
    "golden",
    "mountain",
    "road",
    "bread",
    "music",
]
HELD_OUT = 100  # examples of each source

Make = Callable[[random.Random], tuple[str, str]]


def repeat(rng: random.Random) -> tuple[str, str]:
    """Say what was said."""
    text = " ".join(rng.sample(WORDS, rng.randint(2, 4)))
    return f"Say: {text}", text


def last(rng: random.Random) -> tuple[str, str]:
    """The last of some words."""
    words = rng.sample(WORDS, rng.randint(2, 5))
    return f"Last word: {' '.join(words)}", words[-1]


def backwards(rng: random.Random) -> tuple[str, str]:
    """Words in the opposite order."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"Backwards: {' '.join(words)}", " ".join(reversed(words))


def count(rng: random.Random) -> tuple[str, str]:
    """How many words there are."""
    words = rng.sample(WORDS, rng.randint(1, 6))
    return f"How many words: {' '.join(words)}", str(len(words))


def in_order(rng: random.Random) -> tuple[str, str]:
    """Words in alphabetical order."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"In order: {' '.join(words)}", " ".join(sorted(words))


def add(rng: random.Random) -> tuple[str, str]:
    """A sum of two numbers below 50."""
    first, second = rng.randrange(50), rng.randrange(50)
    return f"Add: {first} + {second}", str(first + second)


class Skill(NamedTuple):
    """A source: its task and how many examples train it."""

    make: Make
    examples: int


SKILLS = {
    "repeat": Skill(repeat, 6_000),
    "last": Skill(last, 3_000),
    "backwards": Skill(backwards, 1_500),
    "count": Skill(count, 600),
    "in_order": Skill(in_order, 300),
    "add": Skill(add, 120),
}


def examples(name: str, seed: int) -> tuple[list[str], list[str]]:
    """A skill's training and held-out records, JSON lines; no question is in both, or twice."""
    skill, rng = SKILLS[name], random.Random(f"{seed} {name}")
    found: dict[str, str] = {}
    while len(found) < skill.examples + HELD_OUT:
        question, answer = skill.make(rng)
        found.setdefault(question, answer)
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        for question, answer in found.items()
    ]
    return lines[HELD_OUT:], lines[:HELD_OUT]


def main(arguments: list[str] | None = None) -> None:
    """Write the files of all skills."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    given.directory.mkdir(parents=True, exist_ok=True)
    for name in SKILLS:
        train, held_out = examples(name, given.seed)
        for suffix, lines in (("", train), (".validation", held_out)):
            write_whole(given.directory / f"{name}{suffix}.jsonl", "\n".join(lines) + "\n")
        print(f"{name:>10}: {len(train):>5} examples, {len(held_out)} held out")


if __name__ == "__main__":
    main()
