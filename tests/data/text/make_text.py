"""Writes the two small sources that the smoke run and the tests train on; python make_text.py

`prose.jsonl` holds many short documents, `notes.txt` is one long one. Both come from a few sentence
patterns, so that a tiny model learns them in seconds; the words are our own.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
NAMES = [
    "Ada",
    "Bruno",
    "Clio",
    "Dario",
    "Edda",
    "Fenn",
    "Greta",
    "Hugo",
    "Iris",
    "Jonas",
    "Kaya",
    "Leo",
    "Mira",
    "Nils",
    "Oda",
    "Pavel",
]
PLACES = [
    "the mill",
    "the harbour",
    "the old bridge",
    "the market",
    "the orchard",
    "the lighthouse",
    "the square",
]
THINGS = [
    "a lantern",
    "a red kite",
    "three apples",
    "a loaf of bread",
    "a letter",
    "a blue cup",
    "a length of rope",
]
WEATHER = ["rain fell", "snow fell", "the wind rose", "the sun came out", "fog lay over the fields"]
FEELINGS = ["glad", "tired", "curious", "proud", "hungry", "calm"]
GOODS = ["flour", "salt", "oats", "honey", "wool", "candles", "nails", "rope", "soap", "tea"]


def tale(draw: random.Random) -> str:
    """A story of a few sentences about two people, a place and a thing."""
    one, other = draw.sample(NAMES, 2)
    place, thing = draw.choice(PLACES), draw.choice(THINGS)
    lines = [f"{one} and {other}", "", f"One morning {one} walked to {place}."]
    for _ in range(draw.randint(2, 7)):
        middle = draw.choice(THINGS)
        lines.append(
            draw.choice(
                [
                    f"On the way {draw.choice(WEATHER)}, and {one} was {draw.choice(FEELINGS)}.",
                    f'"What do you carry?" asked {other}. "I carry {middle}," said {one}.',
                    f"At {place} stood {other} with {middle}.",
                    f"They counted to {draw.randint(2, 12)} until {draw.choice(WEATHER)}.",
                    f"{other} looked for {middle} but found {thing}.",
                ]
            )
        )
    lines.append(
        f"In the evening {other} gave {one} {thing}, and both were {draw.choice(FEELINGS)}."
    )
    return "\n".join(lines) + "\n"


def ledger(draw: random.Random, days: int) -> str:
    """A shop's book: every day some sales, their sum and a remark."""
    lines = []
    for day in range(1, days + 1):
        lines.append(f"Day {day}")
        total = 0
        for good in draw.sample(GOODS, draw.randint(2, 5)):
            count, price = draw.randint(1, 9), draw.randint(1, 9)
            total += count * price
            lines.append(
                f"  {draw.choice(NAMES)} bought {count} {good} at {price}: {count * price}"
            )
        lines.append(f"  sum: {total}; {draw.choice(WEATHER)}.")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Writes both files; the same every time."""
    draw = random.Random(20)
    records = ({"text": tale(draw)} for _ in range(420))
    text = "".join(json.dumps(record) + "\n" for record in records)
    (HERE / "prose.jsonl").write_text(text, encoding="utf-8")
    (HERE / "notes.txt").write_text(ledger(draw, 700), encoding="utf-8")


if __name__ == "__main__":
    main()
