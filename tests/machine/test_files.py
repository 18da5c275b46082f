"""JSON that every reader takes."""

import json
import math
from typing import Any

import pytest

from llmnorm.machine.files import json_text


def strict(text: str) -> Any:
    """The value of a text that may hold nothing but JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_number_that_is_not_finite_is_null_and_named() -> None:
    """Oracle: written out by hand."""
    value = {"loss": math.nan, "figures": {"a": [1.5, -math.inf]}, "best": math.inf, "step": 3}
    assert strict(json_text(value)) == {
        "loss": None,
        "figures": {"a": [1.5, None]},
        "best": None,
        "step": 3,
        "not_finite": {"loss": "nan", "figures.a.1": "-infinity", "best": "infinity"},
    }


@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"ascii": False}])
def test_finite_values_are_what_json_writes(options: dict[str, Any]) -> None:
    """Oracle: json.dumps."""
    value = {"a": [1, 2.5, None, True], "b": {"c": "\u2028ä"}}
    ascii = options.get("ascii", True)
    expected = json.dumps(value, indent=options.get("indent"), ensure_ascii=ascii)
    assert json_text(value, **options) == expected
