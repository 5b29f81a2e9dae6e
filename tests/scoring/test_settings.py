"""Pictures are asked about as was said, or the saying is refused in words."""

from __future__ import annotations

import pytest

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import GenerationParameters
from qwen_vl_lora.scoring.settings import CaptionSettings
from samples.pictures import PARAMETERS, image_parameters, prompt_parameters


@pytest.fixture
def settings():
    generation = GenerationParameters.model_validate(PARAMETERS["generation"])
    return CaptionSettings(prompt_parameters(), image_parameters(), generation, "frozen", "float32", "cpu", None)


def test_another_question_changes_nothing_else(settings):
    asked = settings.asking("Which shapes are there?")
    assert asked.prompt.user == "Which shapes are there?"
    assert (asked.prompt.system, asked.image) == (settings.prompt.system, settings.image)


@pytest.mark.parametrize("question", ["", "caf\udce9"])
def test_a_question_that_is_no_text_is_refused_in_words(settings, question):
    with pytest.raises(
        ParameterError, match=r"The prompt '.*' cannot be asked: .* Give a text or leave the option out"
    ):
        settings.asking(question)
