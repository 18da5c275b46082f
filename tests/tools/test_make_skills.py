"""The generated sources of the fine-tuning recipe."""

import json
from pathlib import Path

import pytest

from tools import make_skills


@pytest.mark.parametrize("name", make_skills.SKILLS)
def test_answers_are_right_and_questions_are_held_out(name: str) -> None:
    """Oracle: each task solved from the text of its question."""
    solve = {
        "repeat": lambda words: " ".join(words),
        "last": lambda words: words[-1],
        "backwards": lambda words: " ".join(words[::-1]),
        "count": lambda words: str(len(words)),
        "in_order": lambda words: " ".join(sorted(words)),
        "add": lambda words: str(int(words[0]) + int(words[2])),
    }[name]
    train, held_out = make_skills.examples(name, seed=1)
    assert len(train) == make_skills.SKILLS[name].examples and len(held_out) == 100
    questions = []
    for line in (*train, *held_out):
        user, assistant = json.loads(line)["messages"]
        questions.append(user["content"])
        assert assistant["content"] == solve(user["content"].partition(": ")[2].split())
    assert len(set(questions)) == len(questions)
    assert make_skills.examples(name, seed=1) == (train, held_out)
    assert make_skills.examples(name, seed=2)[0] != train


def test_the_largest_source_is_fifty_times_the_smallest(tmp_path: Path) -> None:
    make_skills.main([str(tmp_path / "skills")])
    sizes = [
        len((tmp_path / "skills" / f"{name}.jsonl").read_text().splitlines())
        for name in make_skills.SKILLS
    ]
    assert len(sizes) >= 6 and max(sizes) == 50 * min(sizes)
