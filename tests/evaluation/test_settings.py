"""Pictures are asked about as was said, or the saying is refused in words."""

from __future__ import annotations

import pytest

from qwen_vl_lora.evaluation.settings import asking, changed
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


def test_given_keys_of_size_and_decoding_replace_those_of_the_training(settings):
    made = changed(settings, {"generation": {"max_new_tokens": 9}, "lora": {"r": 1}})
    assert made.generation == settings.generation.model_copy(update={"max_new_tokens": 9})
    assert (made.image, made.lora) == (settings.image, settings.lora)
    with pytest.raises(ParameterError, match="not valid: give resized_height and resized_width"):
        changed(settings, {"image": {"min_pixels": 3136}})
