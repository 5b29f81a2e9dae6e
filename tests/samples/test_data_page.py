"""The data page shows every row that a person should look at, with its picture and reason."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from evaluation.test_report import english_in
from qwen_vl_lora.pages.language import CHINESE, ENGLISH, Language
from qwen_vl_lora.parameters import SplitParameters, validate_parameters
from qwen_vl_lora.samples import data_page
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.records import SourceSample, Turn
from qwen_vl_lora.samples.splitting import split_conversations
from qwen_vl_lora.samples.statistics import describe_captions
from samples.pictures import PARAMETERS, encode, jpeg, quarantine_parameters, workspace_folder
from viz.browser import findings_of_axe, needs_chromium, open_page

Rows = Sequence[tuple[str, bytes, str]]
"""Image id, bytes, caption."""

GOOD: Rows = [(f"{seed}.jpg", jpeg(seed), f"Picture number {seed}.") for seed in range(12)]
PLAIN = encode(Image.new("RGB", (40, 30), "white"), "PNG")


def found_in(folder: Path, rows: Rows, language: Language = ENGLISH, **changes):
    """What the node finds, and the page."""
    settings = validate_parameters({**PARAMETERS, **changes})
    source = [
        SourceSample(row, name, (data,), (Turn("assistant", text),), id_is_given=False)
        for row, (name, data, text) in enumerate(rows, start=1)
    ]
    made = collect(source, workspace_folder(folder), settings.captions, settings.image, quarantine_parameters())
    described = describe_captions(made.samples, made.images, made.summary).statistics
    conversations = build_conversations(made.samples, made.images, settings.prompt)
    split = SplitParameters(test_images=2, validation_images=1, seed=0)
    summary = split_conversations(conversations, made.images, split).summary
    found = data_page.find_all(
        made.samples,
        made.images,
        made.rejected_samples,
        made.rejected_pictures,
        made.summary,
        summary,
        settings,
        language,
    )
    return found, data_page.render_data_page(found, made.samples, described, summary, settings, language)


def reasons(found):
    return {(row.key[1], facet): reason for row in found.cards for facet, reason in row.reasons}


def test_good_rows_are_counted_and_not_shown(tmp_path):
    found, page = found_in(tmp_path, GOOD)
    assert (found.cards, found.number) == ([], 0)
    assert "12 samples of 12 pictures" in page
    assert "Training uses 9 samples, validation 1, the test 2." in " ".join(page.split())
    assert "No row is rejected, suspicious, doubled or long." in page
    assert "data:image/webp" not in page


def test_every_kind_of_row_to_look_at_is_found_with_its_reason(tmp_path):
    again = ("0.jpg", jpeg(0), "Picture number 0.")
    renamed = ("other.jpg", jpeg(1), "Another name.")
    white = ("white.png", PLAIN, "A wall.")
    empty = ("empty.jpg", jpeg(20), "")
    broken = ("broken.jpg", jpeg(21)[:200], "A dog.")
    long = ("long.jpg", jpeg(22), "word " * 300)
    found, page = found_in(tmp_path, [*GOOD, again, renamed, white, empty, broken, long])
    told = reasons(found)
    assert told[13, "duplicate"] == "the same picture and text as row 1"
    assert told[14, "duplicate"] == "the same picture as 1.jpg"
    assert told[15, "suspicious"] == "picture of one colour"
    assert told[16, "rejected"].startswith("empty_caption: ")
    assert told[17, "rejected"].startswith("damaged_image: ")
    assert re.fullmatch(r"about 4\d\d tokens; training leaves out more than max_length 256", told[18, "long"])
    assert found.number == 6
    assert found.counts == {"split": 0, "suspicious": 1, "duplicate": 2, "long": 1, "rejected": 2}
    pictures = {row.key[1]: row.picture for row in found.cards}
    assert pictures[16], "a text is the fault: the picture is shown"
    assert pictures[17] is None
    assert "by an estimate 1." in page
    assert page.count("<article") == 6


def test_a_page_in_chinese_keeps_english_in_the_details_of_rejected_rows_only(tmp_path):
    large = [(f"{seed}.jpg", jpeg(seed, (320, 240)), f"第 {seed} 张图片。") for seed in range(12)]
    copies = [(f"copy{seed}.jpg", jpeg(seed, (240, 180)), f"第 {seed} 张的副本。") for seed in range(12)]
    others = [
        ("a.jpg", jpeg(0, (320, 240)), "第 0 张图片。"),
        ("b.jpg", PLAIN, "一面墙。"),
        ("c.jpg", jpeg(22), "字" * 999),
    ]
    language = data_page.language_of_samples("auto", [{"turns": [{"role": "assistant", "text": "一面墙。"}]}])
    found, page = found_in(tmp_path, [*large, *copies, *others], language)
    assert {facet for row in found.cards for facet, _ in row.reasons} == {"split", "suspicious", "duplicate", "long"}
    page = re.sub(r"\w+\.jpg|[0-9a-f]{12}|kedro run --params|captions\.exclude=exclude\.csv|max_length", "", page)
    assert english_in(page.replace("left_out_samples", "")) == set()
    assert "答案的字数" in page
    _, rejected = found_in(tmp_path / "rejected", [*large, ("d.jpg", jpeg(30), "")], language)
    assert "描述为空（empty_caption）：" in rejected


def test_pictures_that_look_alike_across_the_split_are_shown_on_both_sides(tmp_path):
    large = [(f"{seed}.jpg", jpeg(seed, (320, 240)), f"Picture number {seed}.") for seed in range(12)]
    copies = [(f"copy{seed}.jpg", jpeg(seed, (240, 180)), f"Copy of {seed}.") for seed in range(12)]
    found, page = found_in(tmp_path, [*large, *copies])
    alike = {row for row, facet in reasons(found) if facet == "split"}
    assert alike
    assert alike == {(row + 11) % 24 + 1 for row in alike}, "a picture and its copy, 12 rows later"
    assert f"near-duplicate across the split {len(alike)}" in " ".join(page.split())


def test_the_page_of_twenty_thousand_rows_stays_light(tmp_path, monkeypatch):
    monkeypatch.setattr(data_page, "MAX_PICTURES", 3)
    monkeypatch.setattr(data_page, "MAX_CARDS", 5)
    again = [(name, data, text) for name, data, text in GOOD]
    found, page = found_in(tmp_path, [*GOOD, *again])
    assert (found.number, found.counts["duplicate"], len(found.cards)) == (12, 12, 5)
    assert [row.key[1] for row in found.cards] == [13, 14, 15, 16, 17]
    assert page.count("<article") == 5
    assert page.count("data:image/webp") == 3
    assert "The page shows the first 5 of 12 rows." in " ".join(page.split())


def test_hostile_texts_stay_texts(tmp_path):
    attack = '"></label><script>document.title=1</script><img src=x onerror=alert(1)>'
    _, page = found_in(tmp_path, [*GOOD, (attack, jpeg(0), attack), (f"={attack}", jpeg(30), "")])
    assert page.count("<script") == 1
    assert "<img src=x" not in page
    assert attack in unescape(page)


@needs_chromium
def test_ticked_rows_are_saved_as_a_list(tmp_path):
    pytest.importorskip("websockets")
    name = '=a "b",c.jpg'
    _, html = found_in(tmp_path / "data", [*GOOD, (name, jpeg(0), "Again."), ("1.jpg", jpeg(1), "Picture number 1.")])
    file = tmp_path / "data_page.html"
    file.write_text(html, encoding="utf-8")
    saved = tmp_path / "saved"
    with open_page(tmp_path / "profile") as page:
        page.download_to(saved)
        page.open(file.as_uri())
        page.wait_for("document.getElementById('shown')?.textContent == '2 of 2 shown'")
        assert page.js("document.getElementById('save').disabled")
        page.js("document.getElementById('tick').click()")
        assert page.js("document.getElementById('save').textContent") == "Save the list of 2 rows"
        page.js("document.getElementById('save').click()")
        for _ in range(100):
            if (saved / "exclude.csv").is_file():
                break
            page.wait_for("new Promise((done) => setTimeout(() => done(true), 50))")
        assert page.errors == []
    assert (saved / "exclude.csv").read_text(encoding="utf-8") == (
        'row,image_id,source\n"13","\'=a ""b"",c.jpg",""\n"14","1.jpg",""\n'
    )


@needs_chromium
@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE names no axe.min.js (from `npm pack axe-core`)")
def test_axe_finds_nothing(tmp_path):
    rows = [*GOOD, ("white.png", PLAIN, "A wall."), ("empty.jpg", jpeg(20), "")]
    _, html = found_in(tmp_path / "data", rows, CHINESE)
    file = tmp_path / "data_page.html"
    file.write_text(html, encoding="utf-8")
    with open_page(tmp_path / "profile") as page:
        assert findings_of_axe(page, file.as_uri()) == []
