from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from evaluation.rows import Row, with_contender
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.evaluation.predictions import language_of_references
from qwen_vl_lora.evaluation.report import ReportFacts, ReportRun, headline, render_report, run_labels
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.pages.language import CHINESE, ENGLISH, Language
from qwen_vl_lora.pages.page import signed
from qwen_vl_lora.parameters import ScoringParameters
from qwen_vl_lora.samples.tally import sentence
from viz.browser import findings_of_axe, needs_chromium, open_page

HOSTILE = '</script><script>document.title="taken"</script><img src=x onerror="document.title=1">'
ROWS: list[Row] = [
    (["a red dog runs over the wide grass"], "a picture", "a red dog runs over the wide grass"),
    (["a blue cat sits on a chair", "one cat"], "a picture", "a blue cat sits on a table"),
    (["a tall tree stands by a lake"], "a picture", "nothing"),
]
MakeRun = Callable[..., ReportRun]
TYPE = "(f => { f.value = '%s'; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))"


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


def test_a_caption_that_was_cut_is_marked_and_the_mark_explained(make_run: MakeRun, scoring: ScoringParameters) -> None:
    run = make_run()
    uncut = Page(render_report([run], open_image))
    assert "marked cut" not in uncut.text
    assert not [mark for mark in uncut.all("abbr") if mark.get("title")]
    table = run.predictions.assign(base_cut=["true"] * 3, tuned_cut=["false", "true", "false"])
    metrics, scores = score_predictions(table, scoring)
    page = Page(render_report([ReportRun(run.facts, table, scores, metrics)], open_image))
    marks = [mark for mark in page.all("abbr") if mark.get("title")]
    assert len(marks) == 2 * 4  # in the cards, and in the three of them to begin with
    assert {mark["title"] for mark in marks} == {"ended by generation.max_new_tokens, not by the model"}
    text = " ".join(page.text.split())
    assert "A caption marked cut was ended by generation.max_new_tokens, not by the model." in text
    assert "Cut at generation.max_new_tokens: 3 base and 1 tuned captions of 3." in text


def test_contenders_stand_in_a_table_and_under_every_picture(make_run: MakeRun, scoring: ScoringParameters) -> None:
    plain = make_run(contenders={"older": "adapter 2026-01-01", "rival": "server http://127.0.0.1:1/v1"})
    table = with_contender(plain.predictions, "older", ["a <b>cat</b>", "", "three"])
    table = with_contender(table, "rival", ["one", "two", "three"])
    metrics, scores = score_predictions(table, scoring)
    html = render_report([replace(plain, predictions=table, scores=scores, metrics=metrics)], open_image)
    text = Page(html).text
    assert headline(plain) in text
    assert "a <b>cat</b>" in text
    assert "<b>cat</b>" not in html
    assert html.count('<dt>older <span class="score">CIDEr ') == html.count("<dt>rival ") > 3
    assert "All that captioned these pictures" in text
    low, high = metrics["confidence"]["contenders"]["older"]["delta"]["ROUGE-L"]
    assert f"{signed(low, 3)} … {signed(high, 3)}" in text
    assert "adapter 2026-01-01" in text
    assert "All that captioned" not in Page(render_report([plain], open_image)).text


def _judged(run: ReportRun, share: float | None) -> dict[str, object]:
    """The metrics with a judge's verdicts and CLIPScore."""
    counts = {"tuned_wins": 2, "ties": 0, "judged": 3, "not_judged": 1, "tuned_share": share, "interval": [0.4, 0.9]}
    clip = {"value": 0.777, "interval": [0.7, 0.8]}
    sides = {side: {"CLIPScore": clip, "RefCLIPScore": clip, "truncated": 3} for side in ("base", "tuned")}
    judge = {"model": "<i>judge</i>", "kind": "vllm", "against": {"base": counts}}
    return {**run.metrics, "judge": judge, "clip_score": {"model": "a-clip", "tokens": 77, "sides": sides}}


@pytest.mark.parametrize("language", [ENGLISH, CHINESE])
def test_verdicts_clip_score_and_lengths_are_shown_and_explained(make_run: MakeRun, language: Language) -> None:
    run = make_run()
    html = render_report([replace(run, metrics=_judged(run, 2 / 3))], open_image, language)
    text = Page(html).text
    assert language("judge_explained", judge="<i>judge</i>") in text
    assert "<i>judge" not in html
    assert language("percent", value="67") in text
    assert language("judge_left", count=1) in text
    assert "0.777" in text
    assert language("clip_cut", limit=77, count=3, side=language("base")) in text
    assert language("median_words") in text
    plain = Page(render_report([run], open_image, language)).text
    assert language("median_words") in plain
    assert language("judged") not in plain
    assert "CLIPScore" not in plain


def test_long_references_give_another_headline_and_say_why(make_run: MakeRun) -> None:
    run = make_run()
    long = replace(run, metrics={**run.metrics, "words": {**run.metrics["words"], "references": 41.0}})
    base, tuned = (run.metrics[side]["ROUGE-L"] for side in ("base", "tuned"))
    assert headline(long) == f"ROUGE-L {base:.2f} → {tuned:.2f} on 3 held-out images"
    text = Page(render_report([long], open_image)).text
    assert "The references have 41 words in the median, above 40" in text
    assert "Mean change of ROUGE-L per image" in text
    judged = replace(long, metrics=_judged(long, 2 / 3))
    fewer = replace(long, metrics={**long.metrics, "num_images": 2})
    assert headline(long, fewer).endswith(" on 2 to 3 held-out images")
    assert headline(judged) == "The judge prefers the tuned caption in 67 % of 3 held-out images"
    assert headline(replace(long, metrics=_judged(long, None))).startswith("ROUGE-L ")
    assert headline(replace(run, metrics=_judged(run, 2 / 3))).startswith("CIDEr ")
    assert headline(long, long).startswith("ROUGE-L ")


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
    assert not [image for image in page.all("img") if "src" in image]
    assert page.text.count("no picture") == 6  # cards, and the three of them to begin with


@pytest.mark.parametrize(("count", "size"), [(3, (640, 480)), (500, (224, 168))])
def test_pictures_are_the_smaller_the_more_there_are(make_run: MakeRun, count: int, size: tuple[int, int]) -> None:
    run = make_run([([f"a dog number {i}"], "x", "a dog") for i in range(count)])
    source = Page(render_report([run], open_image)).all("img")[0]["src"]
    assert source is not None
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
    assert picture.size == size


def test_pictures_say_what_they_show_by_their_reference(make_run: MakeRun) -> None:
    alts = {image["alt"] for image in Page(render_report([make_run()], open_image)).all("img") if image["alt"]}
    assert "image_0: a red dog runs over the wide grass" in alts
    assert len(alts) == 3


def test_beyond_the_limit_captions_come_without_pictures(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_vl_lora.evaluation.report._MAX_PICTURES", 2)
    html = render_report([make_run()], open_image)
    page = Page(html)
    assert html.partition('<h2 id="captions"')[2].count("data:image/webp") == 2
    assert "The 1 best captions come without a picture" in page.text


def test_empty_and_chinese_captions_are_shown(make_run: MakeRun) -> None:
    text = Page(render_report([make_run([(["一只狗在公园里"], "", "一只猫")])], open_image)).text
    assert "一只狗在公园里" in text
    assert "empty caption" in text


def test_runs_stand_side_by_side(make_run: MakeRun) -> None:
    other = [(references, base, "another answer") for references, base, _ in ROWS]
    page = Page(render_report([make_run(name="first"), make_run(other, name="second")], open_image))
    assert page.text.partition("lowest CIDEr of first")[2].count("another answer") == 3
    assert len(page.cards()) == 3
    assert "different images" not in page.text


def test_runs_are_named_by_what_differs_and_compared_with_an_interval(make_run: MakeRun) -> None:
    other = [(references, base, "another answer") for references, base, _ in ROWS]
    named = [{"lora.r": "8", "split.seed": "1"}, {"lora.r": "64", "split.seed": "1"}]
    runs = [make_run(differences=named[0]), make_run(other, differences=named[1])]
    text = " ".join(Page(render_report(runs, open_image)).text.split())
    one, two = (run.metrics["tuned"]["CIDEr"] for run in runs)
    assert f"CIDEr {one:.2f} with r=8, seed=1, {two:.2f} with r=64, seed=1 on 3 held-out images" in text
    assert f"r=64, seed=1 minus r=8, seed=1: −{one - two:.2f} (95 % interval " in text
    assert "largest disagreement" in text
    assert text.count("Base ") < 12  # equal base metrics stand once
    page = Page(render_report(runs, open_image))
    assert [card["data-spread"] for card in page.all("article")] != ["0.0"] * 3


def test_runs_that_settings_do_not_tell_apart_keep_their_names(make_run: MakeRun) -> None:
    long = {"lora.target_modules": "['q_proj', 'k_proj', 'v_proj', 'o_proj']"}
    runs = [make_run(name="first", differences=long), make_run(name="second", differences={"lora.r": "8"})]
    assert run_labels(runs) == ["first", "second"]
    assert run_labels([make_run(name="first"), make_run(name="second")]) == ["first", "second"]


def test_the_first_screen_shows_a_gain_a_typical_caption_and_a_failure(make_run: MakeRun) -> None:
    rows: list[Row] = [(["a big dog"], "x", "a small dog"), (["a big cat on grass"], "x", "a cat on grass")]
    html = render_report([make_run([*ROWS, *rows])], open_image)
    page = Page(html)
    figures = [figure["data-card"] for figure in page.all("figure")]
    assert len(set(figures)) == 3
    assert figures[-1] == "picture-image_2"
    assert {"picture-" + str(card) for card in page.cards()} >= set(figures)
    text = " ".join(page.text.split())
    assert "Base captions have 2 words in the median, tuned ones 4, their references 7." in text
    assert "1 of 5 tuned captions equal a reference. The 4 others most often lack “big” (2)." in text


def test_a_change_that_is_none_has_no_sign_and_no_colour(make_run: MakeRun) -> None:
    html = render_report(
        [make_run([(["a dog runs"], "a dog", "a dog"), (["a cat sits"], "a cat", "a cat")])], open_image
    )
    assert "−0.00" not in html
    assert "+0.00" not in html
    assert 'class="worse"' not in html
    assert "(95 % interval 0.00 to 0.00, no difference)" in html


def test_a_change_of_exact_matches_is_in_percentage_points(make_run: MakeRun) -> None:
    assert re.search(r">\+33<span class=\"interval\">percentage points", render_report([make_run()], open_image))


def test_cards_can_be_linked_and_are_told_apart(make_run: MakeRun) -> None:
    run = make_run()
    run.predictions["image_id"] = run.scores["image_id"] = ["a b/c.jpg", "a b:c.jpg", "图.jpg"]
    page = Page(render_report([run], open_image))
    assert sorted(str(card["id"]) for card in page.all("article")) == [
        "picture-a-b-c.jpg", "picture-a-b-c.jpg-2", "picture-图.jpg",
    ]  # fmt: skip
    linked = {link["href"] for link in page.all("a")}
    assert linked >= {f"#{card['id']}" for card in page.all("article")}


def test_buttons_and_columns_select_cards_by_their_facets(make_run: MakeRun) -> None:
    page = Page(render_report([make_run([*ROWS, (["a bird"], "a bird", "x")])], open_image))
    facets = [str(card["data-facets"]).split() for card in page.all("article")]
    assert sum("exact" in marks for marks in facets) == 1
    assert sum("differs" in marks for marks in facets) == 3
    assert sum("worse" in marks for marks in facets) == 1
    assert {"exact", "differs", "worse"} | {marks[-1] for marks in facets} <= {
        button.get("data-facet") for button in page.all("button")
    }
    assert "worse than base 1" in page.text


def test_the_curves_of_the_training_and_what_made_it_are_shown(make_run: MakeRun) -> None:
    curve = [{"step": 1, "loss": 4.0}, {"step": 20, "loss": 1.5}, {"step": 20, "validation_loss": 1.75}]
    page = Page(render_report([make_run(curve=curve, made="trained in 3 min 20 s")], open_image))
    (drawing,) = page.all("svg")
    assert drawing["aria-label"] == "Loss over 20 steps: training 4.00 to 1.50; validation 1.75 to 1.75"
    assert "trained in 3 min 20 s" in page.text
    assert not Page(render_report([make_run()], open_image)).all("svg")


def test_captions_carry_their_language(make_run: MakeRun) -> None:
    html = render_report([make_run([(["一只狗"], "a dog", "イヌ")])], open_image)
    assert '<dd class="text" dir="auto" lang="zh">' in html
    assert '<dd class="text" dir="auto" lang="ja">' in html
    assert '<dd class="text" dir="auto">a dog</dd>' in html


COLLECTED = {"samples": 29, "rows": 30, "rejected": {}, "forms": {}, "ignored_keys": {"x": 1}, "suspicious": []}
CHINESE_ROWS: list[Row] = [
    (["一只红色的狗在草地上奔跑"], "一张图片", "一只红色的狗在草地上奔跑"),
    (["一只蓝色的猫坐在椅子上", "一只猫"], "一张图片", "一只蓝色的猫坐在桌子上"),
    (["湖边有一棵大树"], "一张图片", ""),
]
KNOWN = re.compile(
    r"(LoRA|CIDEr|COCO|BLEU-\d|ROUGE-L|token|nat|epoch|px|id|lora_alpha|lora_dropout|image_\d|tiny|"
    r"report\.language|Describe it|ptb|auto|zh|characters|"
    r"generation\.max_new_tokens|split\.test_images|base/model|r=\d+)(?![a-z])"
)
"""Names, and words that Chinese pages leave in English."""


def english_in(html: str) -> set[str]:
    """English words that a reader of a page sees or hears."""
    page = Page(html)
    heard = ("alt", "title", "aria-label", "placeholder", "data-text", "data-one", "data-many")
    texts = [page.text, *(value or "" for _, tag in page.tags for name, value in tag.items() if name in heard)]
    return set(re.findall(r"[A-Za-z]{2,}", KNOWN.sub("", re.sub(r"\{\w+\}", "", " ".join(texts)))))


@pytest.mark.parametrize("count", [1, 2])
def test_a_page_in_chinese_has_no_english_word(make_run: MakeRun, count: int) -> None:
    runs = [
        make_run(
            CHINESE_ROWS,
            adapter={CHINESE("fact_rank"): 8},
            data={CHINESE("fact_source"): sentence(COLLECTED, CHINESE)},
            differences={"r": 8 + number} if count > 1 else {},
            curve=[{"step": 1, "loss": 4.0}, {"step": 20, "loss": 1.5}, {"step": 20, "validation_loss": 1.75}],
            made=CHINESE("made_in", duration=CHINESE.duration(200)),
        )
        for number in range(count)
    ]
    for run in runs:
        run.metrics["cut_captions"] = {"base": 1, "tuned": 0}
    language = language_of_references("auto", runs[0].predictions)
    html = render_report(runs, open_image, language)
    assert '<html lang="zh-CN">' in html
    assert english_in(html) == set()
    assert "因为多数描述是中文" in html


def test_captions_that_are_not_chinese_are_tagged_on_a_chinese_page(make_run: MakeRun) -> None:
    html = render_report([make_run()], open_image, CHINESE)
    assert '<dd class="text" dir="auto" lang="en">a picture</dd>' in html


def test_runs_on_different_images_are_not_compared_silently(make_run: MakeRun) -> None:
    page = Page(render_report([make_run(), make_run(ROWS[:2], name="second")], open_image))
    assert "scored on different images" in page.text
    assert len(page.cards()) == 3


def test_a_lead_without_a_difference_ends_in_one_full_stop(make_run: MakeRun) -> None:
    other = make_run(name="second")
    other.predictions["prompt"] = "What is this?"  # no question in common, so no difference
    html = render_report([make_run(), other], open_image)
    assert "adapted with LoRA.</p>" in html


def test_runs_without_a_picture_in_common_are_refused(make_run: MakeRun) -> None:
    other = make_run(ROWS[:2], name="other")
    other.predictions["image_path"] = "images/elsewhere.png"
    with pytest.raises(DataFormatError, match="'other' captioned none of the pictures of 'tiny"):
        render_report([make_run(), other], open_image)


def test_one_picture_may_be_asked_about_twice(make_run: MakeRun) -> None:
    run = make_run()
    run.predictions["image_path"] = "images/0.png"
    assert len(Page(render_report([run], open_image)).cards()) == 3


def test_scores_of_other_predictions_are_refused(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(DataFormatError, match="'tiny' lists other images than its predictions"):
        render_report([ReportRun(run.facts, run.predictions, run.scores.iloc[::-1], run.metrics)], open_image)


def test_no_run_is_an_error() -> None:
    with pytest.raises(DataFormatError, match="at least one run"):
        render_report([], open_image)


def _colour(number: int) -> tuple[int, int, int]:
    return (number % 5 * 60, number // 5 % 5 * 60, number // 25 * 50)


@needs_chromium
def test_the_page_filters_links_enlarges_and_prints_in_a_browser(make_run: MakeRun, tmp_path: Path) -> None:
    pytest.importorskip("websockets")
    file = tmp_path / "report.html"
    rows: list[Row] = [*ROWS, ([HOSTILE], HOSTILE, HOSTILE), *[([f"bird {i}"], "x", f"bird {i}") for i in range(110)]]
    colours = iter(range(len(rows)))
    html = render_report([make_run(rows)], lambda path: Image.new("RGB", (20, 20), _colour(next(colours))))
    file.write_text(html, encoding="utf-8")
    shown = "Array.from(document.querySelectorAll('.card:not([hidden])'), (card) => card.dataset.id).join()"
    with open_page(tmp_path / "profile") as page:
        page.open(file.as_uri())
        page.wait_for("document.getElementById('shown')?.textContent == '114 of 114 shown'")
        assert page.js("document.title").startswith("CIDEr")
        for label in ("tuned", "cider", "reference"):
            page.js(TYPE % label)
            assert page.js(shown) == "", label
        page.js(TYPE % "chair")
        assert page.js(shown) == "image_1"
        page.js("location.hash = 'picture-image_0'")
        page.wait_for(f"{shown}.includes('image_0,')")
        assert page.js("document.getElementById('filter').value") == ""
        page.js("document.querySelector('[data-facet=exact]').click()")
        assert page.js("document.getElementById('shown').textContent") == "112 of 114 shown"
        page.js("document.querySelector('#picture-image_5 .zoom').click()")
        assert page.js("document.querySelector('dialog').open")
        page.js("document.querySelector('dialog [data-step=\"1\"]').click()")
        assert page.js("document.querySelector('dialog img').alt") != "image_5: bird 1"
        page.js("document.querySelector('[data-facet=exact]').click()")
        assert len(re.findall(rb"/Subtype ?/Image", page.pdf())) >= 114
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []


@needs_chromium
@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE names no axe.min.js (from `npm pack axe-core`)")
@pytest.mark.parametrize(("count", "language"), [(1, ENGLISH), (2, CHINESE)])
def test_axe_finds_nothing(make_run: MakeRun, tmp_path: Path, count: int, language: Language) -> None:
    file = tmp_path / "report.html"
    curve = [{"step": 1, "loss": 4.0}, {"step": 20, "loss": 1.5}]
    runs = [make_run(name=f"run {number}", curve=curve) for number in range(count)]
    file.write_text(render_report(runs, open_image, language), encoding="utf-8")
    with open_page(tmp_path / "profile") as page:
        assert findings_of_axe(page, file.as_uri()) == []


def test_pictures_of_two_recipes_are_the_same_pictures(make_run: MakeRun) -> None:
    one, other = make_run(), make_run()
    other.predictions["image_path"] = "elsewhere/" + other.predictions["image_path"].str.rpartition("/")[2]
    page = Page(render_report([one, other], open_image))
    assert "different images" not in page.text


def test_cider_of_a_single_caption_is_explained(make_run: MakeRun) -> None:
    assert "CIDEr cannot be anything but 0" in Page(render_report([make_run(ROWS[:1])], open_image)).text
    assert "anything but 0" not in Page(render_report([make_run()], open_image)).text


def test_the_page_says_in_one_sentence_what_was_left_out_of_the_source(make_run: MakeRun) -> None:
    summary = {"samples": 29, "rows": 30, "rejected": {"missing_image": 1}, "forms": {}, "ignored_keys": {}}
    said = sentence({**summary, "suspicious": []})
    assert said == "29 samples of 30 rows; 1 rejected (missing_image 1)"
    assert said in Page(render_report([make_run(data={"source": said})], open_image)).text


def test_notes_on_the_base_and_captions_with_nothing_of_the_references_are_said_first(make_run: MakeRun) -> None:
    rows: list[Row] = [([f"dog number {i} runs"], "a a a a", "a white.") for i in range(4)]
    page = Page(render_report([make_run(rows, notes=["It knows drawings only."])], open_image))
    said = " ".join(page.text.split())
    assert said.index("It knows drawings only.") < said.index("no telling word in common") < said.index("Metrics")
    assert "no telling word in common" not in Page(render_report([make_run()], open_image)).text
