"""What settings of an objective from outside the package must say."""

import pytest

from llmnorm.objectives.settings import CausalLMSettings, ObjectiveSettings
from llmnorm.part import InputError


def test_an_objective_names_the_class_that_it_trains() -> None:
    """Oracle: one line that says what is missing, when the class is made."""
    with pytest.raises(InputError, match="objective Nothing: has no `architecture`"):
        type("Nothing", (ObjectiveSettings,), {"__module__": __name__})


def test_an_objective_without_words_of_its_own_has_a_next_command() -> None:
    """Oracle: the command that takes any run."""

    class Second(CausalLMSettings):
        uses = ObjectiveSettings.uses

    assert Second().uses("runs/x") == "evaluate it:   llmnorm eval runs/x"
