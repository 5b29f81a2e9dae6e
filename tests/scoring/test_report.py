from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import ScoringParameters
from qwen_vl_lora.scoring.metrics import score_predictions
from qwen_vl_lora.scoring.report import ReportFacts, ReportRun, render_report
from scoring.rows import Row

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror="document.title=1">'
ROWS: list[Row] = [
    (["a red dog runs over the wide grass"], "a picture", "a red dog runs over the wide grass"),
    (["a blue cat sits on a chair", "one cat"], "a picture", "a blue cat sits on a table"),
    (["a tall tree stands by a lake"], "a picture", "nothing"),
]
MakeRun = Callable[..., ReportRun]


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._silent = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def cards(self) -> list[str | None]:
        return [attributes["data-id"] for attributes in self.all("article")]


@pytest.fixture
def make_run(make_predictions: Callable[[list[Row]], pd.DataFrame], scoring: ScoringParameters) -> MakeRun:
    def make(rows: list[Row] = ROWS, name: str = "tiny", **facts: object) -> ReportRun:
        table = make_predictions(rows)
        metrics, scores = score_predictions(table, scoring)
        known = {"adapter": {"r": 8}, "data": {"training captions": 496}, "settings": {}, "lineage": {}} | facts
        return ReportRun(ReportFacts(name, "2026-01-02", "base/model", **known), table, scores, metrics)

    return make


def open_image(path: str) -> Image.Image:
    return Image.new("RGB", (640, 480), "teal")


def test_the_page_asks_nothing_of_the_network(make_run: MakeRun) -> None:
    page = Page(render_report([make_run()], open_image))
    addresses = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(address is not None and address.startswith(("data:", "#")) for address in addresses)
    assert not page.all("iframe") + page.all("object")
    assert "url(" not in render_report([make_run()], open_image)


def test_only_the_pages_own_script_may_run(make_run: MakeRun) -> None:
    html = render_report([make_run()], open_image)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(tag["content"] for tag in Page(html).all("meta") if tag.get("http-equiv"))
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    run = make_run([([HOSTILE], HOSTILE, HOSTILE)], name=HOSTILE, settings={HOSTILE: HOSTILE})
    run.predictions["image_id"] = run.scores["image_id"] = f'"{HOSTILE}'
    page = Page(render_report([run], open_image))
    assert len(page.all("script")) == 1
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert page.cards() == [f'"{HOSTILE}']
    assert HOSTILE in page.text


def test_failures_come_first(make_run: MakeRun) -> None:
    assert Page(render_report([make_run()], open_image)).cards() == ["image_2", "image_1", "image_0"]


def test_headline_intervals_and_facts_are_told(make_run: MakeRun) -> None:
    run = make_run(settings={"lora": {"r": 8}}, lineage={"commit": "abc123"})
    text = Page(render_report([run], open_image)).text
    base, tuned = run.metrics["base"]["CIDEr"], run.metrics["tuned"]["CIDEr"]
    assert f"CIDEr {base:.2f} → {tuned:.2f} on 3 held-out images" in text
    assert "base/model" in text
    assert "abc123" in text
    low, high = run.metrics["confidence"]["tuned"]["ROUGE-L"]
    assert f"{low:.3f} … {high:.3f}" in text


def test_few_images_are_warned_about_and_many_are_not(make_run: MakeRun) -> None:
    assert "Metrics on 3 images mean little" in Page(render_report([make_run()], open_image)).text
    many = make_run([([f"a dog number {i}"], "x", "a dog") for i in range(50)])
    assert "mean little" not in Page(render_report([many], open_image)).text


def test_differing_words_are_marked(make_run: MakeRun) -> None:
    html = render_report([make_run()], open_image)
    assert '<mark class="extra">table</mark>' in html
    assert '<mark class="missing">chair</mark>' in html


def test_a_picture_that_cannot_be_opened_leaves_a_placeholder(make_run: MakeRun) -> None:
    def fail(path: str) -> Image.Image:
        raise FileNotFoundError(path)

    page = Page(render_report([make_run()], fail))
    assert not page.all("img")
    assert page.text.count("no picture") == 3


def test_thumbnails_are_small_pictures(make_run: MakeRun) -> None:
    source = Page(render_report([make_run()], open_image)).all("img")[0]["src"]
    assert source is not None
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
    assert picture.size == (320, 240)


def test_beyond_the_limit_captions_come_without_pictures(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_vl_lora.scoring.report._MAX_THUMBNAILS", 2)
    page = Page(render_report([make_run()], open_image))
    assert len(page.all("img")) == 2
    assert "The 1 best captions come without a picture" in page.text


def test_empty_and_chinese_captions_are_shown(make_run: MakeRun) -> None:
    text = Page(render_report([make_run([(["一只狗在公园里"], "", "一只猫")])], open_image)).text
    assert "一只狗在公园里" in text
    assert "empty caption" in text


def test_runs_stand_side_by_side(make_run: MakeRun) -> None:
    other = [(references, base, "another answer") for references, base, _ in ROWS]
    page = Page(render_report([make_run(name="first"), make_run(other, name="second")], open_image))
    assert page.text.count("another answer") == 3
    assert len(page.cards()) == 3
    assert "different images" not in page.text


def test_runs_on_different_images_are_not_compared_silently(make_run: MakeRun) -> None:
    page = Page(render_report([make_run(), make_run(ROWS[:2], name="second")], open_image))
    assert "scored on different images" in page.text
    assert len(page.cards()) == 3


def test_one_picture_may_be_asked_about_twice(make_run: MakeRun) -> None:
    run = make_run()
    run.predictions["image_path"] = "images/0.png"
    assert len(Page(render_report([run], open_image)).cards()) == 3


def test_scores_of_other_predictions_are_refused(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(DataFormatError, match="'tiny' name other images than its predictions"):
        render_report([ReportRun(run.facts, run.predictions, run.scores.iloc[::-1], run.metrics)], open_image)


def test_no_run_is_an_error() -> None:
    with pytest.raises(DataFormatError, match="at least one run"):
        render_report([], open_image)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_script_runs_in_a_browser_and_hostile_text_does_not(make_run: MakeRun, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(render_report([make_run([*ROWS, ([HOSTILE], HOSTILE, HOSTILE)])], open_image), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = ["chromium", *flags.split(), "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "4 of 4 shown" in dom
    assert "<title>CIDEr" in dom


def test_pictures_of_two_recipes_are_the_same_pictures(make_run: MakeRun) -> None:
    one, other = make_run(), make_run()
    other.predictions["image_path"] = "elsewhere/" + other.predictions["image_path"].str.rpartition("/")[2]
    page = Page(render_report([one, other], open_image))
    assert "different images" not in page.text


def test_cider_of_a_single_caption_is_explained(make_run: MakeRun) -> None:
    assert "of a single one it is always 0" in Page(render_report([make_run(ROWS[:1])], open_image)).text
    assert "always 0" not in Page(render_report([make_run()], open_image)).text
