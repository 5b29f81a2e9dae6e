"""Every sentence of pages, cards and the terminal's summary stands in both languages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest

import qwen_vl_lora
from qwen_vl_lora.pages.language import (
    CHINESE,
    ENGLISH,
    SENTENCES,
    TAGS,
    choose_language,
    lang,
    language_of_page,
)
from qwen_vl_lora.samples.data_page import KINDS
from qwen_vl_lora.samples.records import Reason

CATALOGUE = [
    (key, texts)
    for file in sorted(SENTENCES.glob("*.toml"))
    for key, texts in tomllib.loads(file.read_text(encoding="utf-8")).items()
]
BUILT = (
    "kind",
    "reason",
    "suspicious",
    "end",
    "next",
    "misses",
    "card",
    "summary",
    "side",
    "tower",
    "curve",
    "skip_to",
)
"""Beginnings of keys that code completes: `language(f"kind_{facet}")`."""


def test_each_sentence_has_one_key_and_both_languages() -> None:
    keys = [key for key, _ in CATALOGUE]
    assert len(set(keys)) == len(keys)
    assert [key for key, texts in CATALOGUE if texts.keys() != TAGS.keys()] == []


def test_both_languages_have_the_same_placeholders_and_tags() -> None:
    def parts(text: str) -> tuple[list[str], list[str]]:
        return sorted({name for _, name, _, _ in Formatter().parse(text) if name}), sorted(re.findall("<[^>]+>", text))

    # Chinese writes units behind each number, and a date in words.
    differing = {key for key, texts in CATALOGUE if parts(texts["en"]) != parts(texts["zh"])}
    assert differing == {"date"}


def test_no_sentence_is_left_over() -> None:
    package = Path(qwen_vl_lora.__file__).parent
    files = [file for ending in ("py", "html") for file in package.rglob(f"*.{ending}")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    named = set(re.findall(r"""["'](\w+)["']""", source))
    endings = {"_of_answer", "_ranges", "_merged"}
    left = [key for key, _ in CATALOGUE if key not in named and not key.startswith(BUILT)]
    assert [key for key in left if not key.endswith(tuple(endings))] == []


@pytest.mark.parametrize("language", [ENGLISH, CHINESE])
def test_every_reason_and_kind_of_the_data_has_its_sentence(language) -> None:
    for reason in get_args(Reason):
        assert reason in language(f"reason_{reason}")
    for facet in KINDS:
        assert language(f"kind_{facet}")
    for kind in ("picture_of_one_colour", "one_picture_under_many_ids"):
        assert language(f"suspicious_{kind}")


def test_a_number_has_its_noun() -> None:
    assert [ENGLISH("n_pictures", count=count) for count in (0, 1, 2)] == ["0 pictures", "1 picture", "2 pictures"]
    assert CHINESE("n_pictures", count=1) == "1 张图片"


def test_what_is_put_into_a_piece_of_html_is_escaped() -> None:
    assert str(ENGLISH.markup("report_lead", base="<b>", change="+1")) == "&lt;b&gt;, adapted with LoRA. +1."
    assert "<code>&lt;i&gt;</code>" in CHINESE.markup("scorers", tokenizer="<i>")


def test_days_and_durations_are_written_as_usual() -> None:
    assert ENGLISH.date("2026-11-05T03:52:45Z") == "2026-11-05"
    assert CHINESE.date("2026-11-05T03:52:45Z") == "2026 年 11 月 5 日"
    assert CHINESE.date("yesterday evening") == "yesterday "
    assert [CHINESE.duration(seconds) for seconds in (7, 60, 7380)] == ["7 秒", "1 分 0 秒", "2 小时 3 分"]


@pytest.mark.parametrize(
    ("setting", "captions", "code"),
    [
        ("auto", ["一只狗", "a dog"], "zh"),
        ("auto", ["一只狗", "a dog", "a cat"], "en"),
        ("auto", ["犬がいる", "개 한 마리"], "en"),
        ("auto", [], "en"),
        ("auto", ["a dog"] * 1000 + ["一只狗"] * 5000, "en"),
        ("zh", ["a dog"], "zh"),
        ("en", ["一只狗"], "en"),
    ],
)
def test_auto_reads_the_captions(setting, captions, code) -> None:
    chosen = choose_language(setting, iter(captions))
    assert (chosen.code, chosen.setting) == (code, setting)


def test_a_page_states_its_language() -> None:
    assert language_of_page('<!doctype html>\n<html lang="zh-CN">') is not ENGLISH
    assert language_of_page('<html lang="zh-CN">').code == "zh"
    assert language_of_page("<html>").code == "en"


def test_texts_in_other_scripts_have_their_tag() -> None:
    assert [lang(text) for text in ("イヌ", "개", "狗", "dog")] == ["ja", "ko", "zh", None]
