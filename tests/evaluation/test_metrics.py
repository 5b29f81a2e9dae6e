from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.blocks import shown_under
from evaluation.rows import Row, table_of, with_contender
from qwen_vl_lora.evaluation import metrics as metrics_module
from qwen_vl_lora.evaluation import sheets
from qwen_vl_lora.evaluation.metrics import METRICS, score_predictions
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import ScoringParameters

Make = Callable[[list[Row]], pd.DataFrame]
PARAMETERS = ScoringParameters(tokenizer="ptb", bootstrap_samples=50, seed=0, settings_from="parameters")


def test_bleu_is_clipped_precision_times_brevity_penalty(make_predictions: Make, scoring: ScoringParameters) -> None:
    # Tuned: 3 of 3 words, 2 of 2 bigrams, 1 of 1 trigram; 3 words against 4 give the penalty e^(1 - 4/3).
    # Base: "the" counts once of 3, as often as the reference has it; no bigram of 2.
    metrics, _ = score_predictions(make_predictions([(["the cat sat down"], "the the the", "the cat sat")]), scoring)
    penalty = math.exp(1 - 4 / 3)
    assert metrics["tuned"]["BLEU-1"] == pytest.approx(penalty)
    assert metrics["tuned"]["BLEU-3"] == pytest.approx(penalty)
    assert metrics["base"]["BLEU-1"] == pytest.approx(1 / 3 * penalty)
    assert metrics["base"]["BLEU-2"] == pytest.approx(0, abs=1e-6)


def test_bleu_takes_the_closest_reference_length(make_predictions: Make, scoring: ScoringParameters) -> None:
    # 4 words between references of 3 and 5: the shorter of two equally close, so no penalty. 3 of 4 words match.
    row: Row = (["red dog runs", "one red dog runs fast"], "red dog runs away", "red dog runs fast")
    metrics, _ = score_predictions(make_predictions([row]), scoring)
    assert metrics["base"]["BLEU-1"] == pytest.approx(3 / 4)
    assert metrics["tuned"]["BLEU-4"] == pytest.approx(1)


def test_corpus_bleu_pools_counts_and_is_no_mean_of_sentences(
    make_predictions: Make, scoring: ScoringParameters
) -> None:
    # 2 of 2 and 1 of 4 words: 3 of 6 pooled, where the mean of sentences is 0.625. Lengths agree: no penalty.
    rows: list[Row] = [(["red dog"], "x", "red dog"), (["blue cat sits there"], "x", "blue dogs run fast")]
    metrics, _ = score_predictions(make_predictions(rows), scoring)
    assert metrics["tuned"]["BLEU-1"] == pytest.approx(3 / 6)


def test_rouge_l_is_the_f_measure_with_beta_1_2(make_predictions: Make, scoring: ScoringParameters) -> None:
    # Longest common subsequence "two dogs play": precision 3/4, recall 3/5.
    row: Row = (["two dogs play on grass"], "", "two big dogs play")
    metrics, _ = score_predictions(make_predictions([row]), scoring)
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert metrics["tuned"]["ROUGE-L"] == pytest.approx(expected)


def test_cider_weighs_words_by_rarity(make_predictions: Make, scoring: ScoringParameters) -> None:
    # Two images, so a word of one image weighs ln 2 - ln 1 and "red", in both, weighs ln 2 - ln 2 = 0.
    # Tuned 1: words and bigram point the same way (1 and 1), no longer n-grams (0 and 0): 10 · 2/4.
    # Base 1: "dog" alone gives 1 for words, nothing else; one bigram fewer is the penalty e^(-1/(2·6²)).
    # Image 2: no weighty word is shared.
    rows: list[Row] = [(["red dog"], "dog", "red dog"), (["red cat"], "red", "red dog")]
    metrics, scores = score_predictions(make_predictions(rows), scoring)
    assert list(scores["tuned_cider"]) == pytest.approx([5.0, 0.0])
    assert list(scores["base_cider"]) == pytest.approx([10 / 4 * math.exp(-1 / 72), 0.0])
    assert metrics["tuned"]["CIDEr"] == pytest.approx(2.5)
    assert list(scores["cider_gain"]) == pytest.approx([5.0 - 2.5 * math.exp(-1 / 72), 0.0])


@pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer runs on Java")
def test_scores_are_those_of_the_official_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """pycocoevalcap ships no example data, so its own steps are run here on captions of this folder."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    lines = (Path(__file__).parent / "ptb_captions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)[0] for line in lines]
    rows: list[Row] = [(texts[i : i + 3], texts[i + 3], texts[i][:40]) for i in range(0, len(texts) - 3, 4)]
    metrics, scores = score_predictions(table_of(rows), PARAMETERS)
    for side, column in (("base", 1), ("tuned", 2)):
        results = PTBTokenizer().tokenize({i: [{"caption": row[column]}] for i, row in enumerate(rows)})
        truths = PTBTokenizer().tokenize({i: [{"caption": text} for text in row[0]] for i, row in enumerate(rows)})
        bleu, bleu_sentences = Bleu(4).compute_score(truths, results, verbose=0)
        rouge, _ = Rouge().compute_score(truths, results)
        cider, cider_images = Cider().compute_score(truths, results)
        official = dict(zip(METRICS, [*bleu, rouge, cider], strict=True))
        assert metrics[side] == pytest.approx(official)
        assert list(scores[f"{side}_cider"]) == pytest.approx(list(cider_images))
        assert list(scores[f"{side}_bleu_4"]) == pytest.approx(bleu_sentences[3])


def test_metrics_have_the_agreed_form(make_predictions: Make, scoring: ScoringParameters) -> None:
    rows: list[Row] = [(["a red dog"], "there is a dog", "a red dog"), (["a cat", "one cat"], "", "One cat.")]
    metrics, scores = score_predictions(make_predictions(rows), scoring)
    assert (metrics["num_images"], metrics["tokenizer"]) == (2, "ptb")
    assert all(list(metrics[side]) == list(METRICS) for side in ("base", "tuned", "delta"))
    assert all(type(metrics[side][name]) is float for side in ("base", "tuned", "delta") for name in METRICS)
    assert metrics["exact_match"] == {"base": 0.0, "tuned": 1.0}
    assert list(scores["image_id"]) == ["image_0", "image_1"]
    assert list(scores["tuned_exact_match"]) == [True, True]


def test_an_empty_caption_scores_zero_even_against_an_empty_reference(
    make_predictions: Make, scoring: ScoringParameters
) -> None:
    metrics, scores = score_predictions(make_predictions([(["a dog"], "...", ""), (["..."], "", "")]), scoring)
    assert set(metrics["tuned"].values()) == {0.0}
    assert not scores.drop(columns="image_id").to_numpy().any()


def test_chinese_is_scored_by_character(make_predictions: Make) -> None:
    auto = ScoringParameters(tokenizer="auto", bootstrap_samples=10, seed=0, settings_from="parameters")
    # 4 of 5 characters match, lengths agree.
    metrics, _ = score_predictions(make_predictions([(["一只大黑狗"], "x", "一只大黑猫。")]), auto)
    assert metrics["tokenizer"] == "characters"
    assert metrics["tuned"]["BLEU-1"] == pytest.approx(4 / 5)


def test_nothing_is_printed(
    make_predictions: Make, scoring: ScoringParameters, capsys: pytest.CaptureFixture[str]
) -> None:
    score_predictions(make_predictions([(["a dog"], "a cat", "a dog")]), scoring)
    assert capsys.readouterr() == ("", "")


def test_intervals_depend_on_the_seed_alone(make_predictions: Make) -> None:
    rows: list[Row] = [(["a red dog and a cat"], "a dog", " ".join(["a red dog and"] * i)) for i in range(12)]
    table = make_predictions(rows)
    first, again, other = (
        score_predictions(
            table, ScoringParameters(tokenizer="ptb", bootstrap_samples=100, seed=seed, settings_from="parameters")
        )[0]["confidence"]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_interval_of_the_change_is_paired(make_predictions: Make, scoring: ScoringParameters) -> None:
    # Base and tuned say the same: each varies over images, their difference never.
    rows: list[Row] = [([f"a {word} dog"], text, text) for word, text in (("red", "a red dog"), ("old", "no"))]
    confidence = score_predictions(make_predictions(rows), scoring)[0]["confidence"]
    low, high = confidence["tuned"]["ROUGE-L"]
    assert low < high
    assert all(confidence["delta"][name] == [0.0, 0.0] for name in METRICS)


def test_contenders_are_scored_as_base_is_and_change_no_figure_of_the_others(
    make_predictions: Make, scoring: ScoringParameters
) -> None:
    rows: list[Row] = [([f"a dog number {i}"], f"answer {i}", f"a dog number {i % 7}") for i in range(20)]
    table = make_predictions(rows).assign(base_cut="false", tuned_cut="true")
    both = with_contender(
        with_contender(table, "twin", [row[1] for row in rows]), "better", [row[0][0] for row in rows]
    )
    plain, scores = score_predictions(table, scoring)
    metrics, columns = score_predictions(both, scoring)
    assert "contenders" not in plain
    twin, better = metrics.pop("contenders").values()
    ranges = metrics["confidence"].pop("contenders")
    assert twin == {"scores": plain["base"], "delta": plain["delta"]}
    assert ranges["twin"] == {"scores": plain["confidence"]["base"], "delta": plain["confidence"]["delta"]}
    assert better["scores"]["CIDEr"] - metrics["tuned"]["CIDEr"] == pytest.approx(-better["delta"]["CIDEr"])
    assert ranges["better"]["delta"]["CIDEr"][1] < 0 < better["scores"]["CIDEr"]
    assert metrics.pop("exact_match") == {**plain.pop("exact_match"), "twin": 0.0, "better": 1.0}
    assert metrics.pop("cut_captions") == {**plain.pop("cut_captions"), "twin": 0, "better": 0}
    assert metrics.pop("words") == {**plain.pop("words"), "twin": 2.0, "better": 4.0}
    assert metrics.pop("loops") == {**plain.pop("loops"), "twin": 0, "better": 0}
    assert metrics == plain
    assert columns[scores.columns].equals(scores)
    assert list(columns.columns[len(scores.columns) :]) == [
        f"{name}_{column}" for name in ("twin", "better") for column in ("cider", "rouge_l", "bleu_4", "exact_match")
    ]
    assert columns["better_cider"].mean() == pytest.approx(better["scores"]["CIDEr"])


def test_resampling_in_blocks_gives_the_intervals_of_one_block(
    make_predictions: Make, scoring: ScoringParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_predictions([(["a red dog"], "a dog", "a red dog"), (["a cat"], "cat", "a dog"), (["sky"], "", "sky")])
    whole = score_predictions(table, scoring)[0]["confidence"]
    monkeypatch.setattr("qwen_vl_lora.evaluation.metrics._RESAMPLED_CELLS", 50)
    blocks = score_predictions(table, scoring)[0]["confidence"]
    for side in ("base", "tuned", "delta"):
        for name in METRICS:
            assert blocks[side][name] == pytest.approx(whole[side][name])


WORDS = st.lists(st.sampled_from(["red", "dog", "sits", "on", "grass", "two", "big"]), max_size=8).map(" ".join)
ROWS = st.lists(st.tuples(st.lists(WORDS, min_size=1, max_size=3), WORDS, WORDS), min_size=2, max_size=6)


@settings(deadline=None, max_examples=40)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows: list[Row], random: object) -> None:
    rows = [([*references, f"word{i}"], base, tuned) for i, (references, base, tuned) in enumerate(rows)]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    metrics, scores = score_predictions(table_of(rows), PARAMETERS)
    shuffled, shuffled_scores = score_predictions(table_of([rows[i] for i in order]), PARAMETERS)
    for side in ("base", "tuned", "delta"):
        assert shuffled[side] == pytest.approx(metrics[side], abs=1e-9)
    assert list(shuffled_scores["tuned_cider"]) == pytest.approx([scores["tuned_cider"][i] for i in order])


@settings(deadline=None, max_examples=40)
@given(ROWS)
def test_scores_stay_on_their_scales(rows: list[Row]) -> None:
    rows = [([*references, "word"], base, tuned) for references, base, tuned in rows]
    metrics, scores = score_predictions(table_of(rows), PARAMETERS)
    for side in ("base", "tuned"):
        assert all(0 <= metrics[side][name] <= (10 if name == "CIDEr" else 1) + 1e-6 for name in METRICS)
        assert metrics["delta"]["CIDEr"] == pytest.approx(np.mean(scores["cider_gain"]), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(WORDS, min_size=2, max_size=6))
def test_a_caption_that_equals_its_reference_has_the_highest_scores(texts: list[str]) -> None:
    # Four words of its own let every image have n-grams of each order that weigh something.
    references = [f"{text} one{i} two{i} three{i} four{i}" for i, text in enumerate(texts)]
    metrics, _ = score_predictions(table_of([([text], "", text.upper() + ".") for text in references]), PARAMETERS)
    assert metrics["tuned"] == pytest.approx(dict.fromkeys(METRICS, 1.0) | {"CIDEr": 10.0})
    assert metrics["exact_match"]["tuned"] == 1.0


def test_no_predictions_is_an_error(make_predictions: Make, scoring: ScoringParameters) -> None:
    with pytest.raises(DataFormatError, match=r"has no rows.*split\.test_images"):
        score_predictions(make_predictions([(["a"], "a", "a")]).iloc[:0], scoring)


def test_missing_columns_are_named(make_predictions: Make, scoring: ScoringParameters) -> None:
    table = make_predictions([(["a"], "a", "a")]).drop(columns=["prompt", "references"])
    with pytest.raises(DataFormatError, match="lacks the columns prompt, references"):
        score_predictions(table, scoring)


@pytest.mark.parametrize("cell", ["[]", "a dog", '{"a": 1}', "[1]", "", float("nan")])
def test_references_that_are_no_list_of_texts_are_named(
    make_predictions: Make, scoring: ScoringParameters, cell: object
) -> None:
    table = make_predictions([(["a"], "a", "a")]).astype({"references": object})
    table.loc[0, "references"] = cell
    with pytest.raises(DataFormatError, match="image 'image_0': references must be a JSON list"):
        score_predictions(table, scoring)


def test_a_missing_caption_is_named_with_the_remedy(make_predictions: Make, scoring: ScoringParameters) -> None:
    table = make_predictions([(["a"], "a", "a"), (["b"], "b", "b")]).astype({"tuned_caption": object})
    table.loc[1, "tuned_caption"] = float("nan")
    with pytest.raises(DataFormatError, match=r"'image_1': tuned_caption must be a text; got nan.*keep_default_na"):
        score_predictions(table, scoring)


def test_references_without_a_word_are_an_error(make_predictions: Make, scoring: ScoringParameters) -> None:
    with pytest.raises(DataFormatError, match="No reference in predictions holds a token"):
        score_predictions(make_predictions([(["..."], "a", "a")]), scoring)


def test_questions_about_one_picture_are_one_observation(make_predictions: Make) -> None:
    rows: list[Row] = [(["a red dog"], "a cat", "a red dog"), (["a blue car"], "a cat", "a car")] * 10
    apart = make_predictions(rows)
    together = apart.assign(image_path=[f"images/{number // 4}.png" for number in range(len(rows))])
    often = PARAMETERS.model_copy(update={"bootstrap_samples": 400})
    metrics = [score_predictions(table, often)[0] for table in (apart, together)]
    assert [found["num_images"] for found in metrics] == [20, 5]
    assert metrics[0]["tuned"] == metrics[1]["tuned"]
    widths = [low_high[1] - low_high[0] for found in metrics for low_high in [found["confidence"]["tuned"]["CIDEr"]]]
    assert widths[0] > 0.1
    assert widths[1] == pytest.approx(0, abs=1e-9)  # the four captions of each picture are the same four


def test_a_metric_made_as_contributing_says_is_scored_resampled_and_plotted(
    make_predictions: Make, scoring: ScoringParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, means = shown_under("Add a metric")
    source = inspect.getsource(metrics_module)
    names = dict(vars(metrics_module))
    exec(source.replace("METRICS = (", f"{function}\n{means}\nMETRICS = (", 1), names)
    # Tuned: 1 of 2 words, then 2 of 2; base: none of no words, then 0 of 1.
    rows: list[Row] = [(["a red dog"], "", "red fish"), (["a cat", "one cat"], "tree", "one cat")]
    metrics, scores = names["score_predictions"](make_predictions(rows), scoring)
    assert list(scores["tuned_known_words"]) == [0.5, 1.0]
    assert list(scores["base_known_words"]) == [0.0, 0.0]
    assert {side: metrics[side]["Known words"] for side in ("base", "tuned", "delta")} == {
        "base": 0.0,
        "tuned": 0.75,
        "delta": 0.75,
    }
    low, high = metrics["confidence"]["tuned"]["Known words"]
    assert (low, high) == (0.5, 1.0)
    usual, _ = score_predictions(make_predictions(rows), scoring)
    assert {name: metrics["tuned"][name] for name in METRICS} == pytest.approx(usual["tuned"])
    monkeypatch.setattr(sheets, "METRICS", names["METRICS"])
    assert "Known words" in sheets.plot_metrics(metrics).to_json()
