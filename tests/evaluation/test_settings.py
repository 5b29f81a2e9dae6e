"""Pictures are asked about as was said, or the saying is refused in words."""

from __future__ import annotations

import pytest

from qwen_vl_lora.evaluation.settings import asking
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import validate_parameters
from samples.pictures import PARAMETERS


@pytest.fixture
def settings():
    return validate_parameters(PARAMETERS)


def test_another_question_changes_nothing_else(settings):
    asked = asking(settings, "Which shapes are there?")
    assert asked.prompt.user == "Which shapes are there?"
    assert (asked.prompt.system, asked.image) == (settings.prompt.system, settings.image)


@pytest.mark.parametrize("question", ["", "caf\udce9"])
def test_a_question_that_is_no_text_is_refused_in_words(settings, question):
    with pytest.raises(ParameterError, match=r"The prompt '.*' is not valid: .* Give a text or omit the option"):
        asking(settings, question)
