"""The card of a merged model asks what was trained, and lists the questions where there are several."""

import json
import re

import pytest

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.merging import MergeCheck
from qwen_vl_lora.model.model_card import model_card
from samples.pictures import PARAMETERS

CHECK = MergeCheck("float32", error=1e-7, effect=1e-1, tolerance=1e-3)
METRICS = {"num_images": 60, "tokenizer": "ptb", **{side: {"CIDEr": 1.0} for side in ("base", "tuned", "delta")}}
SIDE = {"samples": 3, "sha256": "aa"}


def messages_of(tmp_path, prompt, family="qwen2_vl"):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    names = ("image", "generation", "max_length", "vision", "rows", "lora", "training_args")
    record = {
        "base_model": {"name": "base", "revision": None, "fingerprint": "ff"},
        "data": {"train_conversations": SIDE, "validation_conversations": SIDE},
        "prompt": prompt,
        **{name: PARAMETERS[name] for name in names},
    }
    card = model_card(BaseModel("base", tmp_path), record, METRICS, CHECK)
    return card, re.search(r"^messages = (.*)$", card, re.MULTILINE)[1]


def test_one_question_is_asked_with_the_picture_where_it_was(tmp_path):
    card, messages = messages_of(tmp_path, {"user": "See <image>, say.", "system": "Be brief.", "override": False})
    assert "Ask it as it was trained" in card
    text = [{"type": "text", "text": text} for text in ("Be brief.", "See ", ", say.")]
    picture = {"type": "image"}
    assert messages == repr(
        [{"role": "system", "content": text[:1]}, {"role": "user", "content": [text[1], picture, text[2]]}]
    )


def test_a_question_about_two_pictures_is_asked_with_two(tmp_path):
    card, messages = messages_of(
        tmp_path, {"user": "<image>Left, and <image>right?", "system": None, "override": False}
    )
    picture, text = {"type": "image"}, [{"type": "text", "text": text} for text in ("Left, and ", "right?")]
    assert messages == repr([{"role": "user", "content": [picture, text[0], picture, text[1]]}])
    assert "for file in ['picture_1.jpg', 'picture_2.jpg']]" in card
    assert "images=pictures," in card


def test_several_questions_are_listed_and_none_is_asked(tmp_path):
    questions = [{"text": "How many?", "samples": 20}, {"text": "Where?", "samples": 10}]
    prompt = {"user": None, "system": None, "override": False, "questions": questions, "other_questions": 4}
    card, messages = messages_of(tmp_path, prompt)
    assert 'with 6 questions:\n- "How many?": 20 samples\n- "Where?": 10 samples\n- 4 more\n' in card
    asked = [{"type": "image"}, {"type": "text", "text": "YOUR TEXT"}]
    assert messages == repr([{"role": "user", "content": asked}])


@pytest.mark.parametrize(("family", "asks"), [("qwen2_vl", False), ("qwen3_vl", False), ("qwen3_5", True)])
def test_the_cards_code_turns_thinking_off_where_the_base_would_think(tmp_path, family, asks):
    card, _ = messages_of(tmp_path, {"user": "What is it?", "system": None, "override": False}, family)
    assert ("add_generation_prompt=True, enable_thinking=False)" in card) == asks
    assert ("add_generation_prompt=True)" in card) != asks
