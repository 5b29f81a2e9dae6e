"""`ptb_captions.jsonl` holds captions and the tokens that pycocoevalcap 1.2 gave them (Java 17, UTF-8)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.evaluation.ptb import PUNCTUATION, ptb_tokens
from qwen_vl_lora.evaluation.tokenization import character_tokens, choose_tokenizer

CAPTIONS = [
    json.loads(line) for line in (Path(__file__).parent / "ptb_captions.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_tokens_are_those_of_the_official_tokenizer() -> None:
    wrong = [(caption, ptb_tokens(caption), tokens) for caption, tokens in CAPTIONS if ptb_tokens(caption) != tokens]
    assert len(CAPTIONS) > 300
    assert wrong == []


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer runs on Java")
def test_stored_tokens_are_what_java_says_now(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Before Java 18 the tokenizer reads its file in the system's encoding.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    official = PTBTokenizer().tokenize({row: [{"caption": caption}] for row, (caption, _) in enumerate(CAPTIONS)})
    assert [official[row][0].split(" ") for row in range(len(CAPTIONS))] == [tokens for _, tokens in CAPTIONS]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("The man's dog doesn't bark.", ["the", "man", "'s", "dog", "does", "n't", "bark"]),
        ("“Stop” — it’s red…", ["stop", "it", "'s", "red"]),
        ("a (big) red/white bus", ["a", "-lrb-", "big", "-rrb-", "red/white", "bus"]),
        ("Mr. Lee at 5 p.m. in St. Louis.", ["mr.", "lee", "at", "5", "p.m.", "in", "st.", "louis"]),
        ("...", []),
        ("", []),
    ],
)
def test_ptb_examples(caption: str, tokens: list[str]) -> None:
    assert ptb_tokens(caption) == tokens


@given(st.text(max_size=60))
def test_any_text_gives_lower_case_tokens_without_blanks_or_punctuation(text: str) -> None:
    for tokens in (ptb_tokens(text), character_tokens(text)):
        assert all(token and " " not in token and token not in PUNCTUATION for token in tokens)


def test_chinese_is_cut_by_character_and_latin_words_stay_whole() -> None:
    tokens = character_tokens("一只狗在看iPhone-15，很Ｃｏｏｌ！")
    assert tokens == ["一", "只", "狗", "在", "看", "iphone-15", "很", "cool"]
    assert character_tokens("犬はボール。개") == ["犬", "は", "ボ", "ー", "ル", "개"]


@pytest.mark.parametrize(
    ("references", "name"),
    [
        (["一只狗在公园里。", "草地上的狗。"], "characters"),
        (["A dog in the park.", "a dog"], "ptb"),
        (["A sign that reads 停 in a quiet street"], "ptb"),
        (["一台iPhone手机放在Apple Store的桌上"], "characters"),
        (["...", ""], "ptb"),
    ],
)
def test_auto_follows_the_references(references: list[str], name: str) -> None:
    assert choose_tokenizer("auto", references) == name


def test_a_named_tokenizer_is_taken_whatever_the_references_are() -> None:
    assert choose_tokenizer("ptb", ["一只狗"]) == "ptb"
    assert choose_tokenizer("characters", ["a dog"]) == "characters"
