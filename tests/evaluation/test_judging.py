"""A judge with a rule of its own: wins, ties by contradiction, answers that are none, and a judge that dies."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from evaluation.rows import table_of, with_contender
from evaluation.servers import FaultyServer, Reply
from qwen_vl_lora.evaluation.judging import judge_captions, summarize_verdicts
from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.evaluation_parameters import JudgeParameters
from qwen_vl_lora.exceptions import ServerError
from qwen_vl_lora.parameters import ScoringParameters
from tiny_models import store_bytes

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


@pytest.fixture
def album(tmp_path):
    """The paths of a red, a green and a blue picture, the red one larger than is sent, and their store."""
    made = {}
    for name, colour in COLOURS.items():
        file = io.BytesIO()
        Image.new("RGB", (1500, 300) if name == "red" else (60, 40), colour).save(file, "PNG")
        made[name] = file.getvalue()
    images = store_bytes(tmp_path, made)
    return {entry.id: entry.path for entry in images}, images


def seen(body):
    """Picture and captions of a question."""
    picture, question = body["messages"][0]["content"]
    data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    captions = re.fullmatch(r".*Caption A: (.*?)\n\nCaption B: (.*?)\n\n.*", question["text"], re.DOTALL)
    return Image.open(io.BytesIO(base64.b64decode(data))), list(captions.groups())


def by_colour(body):
    """Prefers the caption that names the colour of the picture."""
    picture, captions = seen(body)
    colour = {rgb: name for name, rgb in COLOURS.items()}[picture.getpixel((5, 5))]
    right = [colour in caption for caption in captions]
    return Reply("tie" if right[0] == right[1] else "AB"[right.index(True)])


def predictions_on(album, rows, **contenders):
    paths, _ = album
    table = table_of([([colour], base, tuned) for colour, base, tuned in rows])
    table["image_path"] = [paths.get(colour, "") for colour, *_ in rows]
    for name, captions in contenders.items():
        table = with_contender(table, name, captions)
    return read_predictions(table)


def judged(server, album, predictions, sides=("base",), **changes):
    settings = JudgeParameters(address=server.address, retries=0, **changes)
    return judge_captions(predictions, list(sides), album[1], settings)


def test_the_side_that_says_what_is_in_the_picture_wins_in_both_orders(album):
    rows = [
        ("red", "a red cat", "a blue cat"),
        ("green", "a red cat", "a green cat"),
        ("blue", "a red cat", "a green cat"),
        ("blue", "the same", "the same"),
        ("no picture", "a", "b"),
    ]
    predictions = predictions_on(album, rows, older=["a red dog", "a green dog", "a blue dog", "the same", "c"])
    with FaultyServer(by_colour) as server:
        verdicts, served = judged(server, album, predictions, ("base", "older"))
    assert verdicts == {
        "base": ["base", "tuned", "tie", "tie", None],
        "older": ["older", "tie", "older", "tie", None],
    }
    assert served.model == "captions"
    assert len(server.asked) == 3 * 2 * 2  # equal captions are not asked about
    pairs = [seen(body)[1] for body in server.asked]
    assert all(pair[::-1] in pairs for pair in pairs)
    assert max(max(seen(body)[0].size) for body in server.asked) == 1024
    assert {body["temperature"] for body in server.asked} == {0.0}
    assert not re.search("base|tuned|older", str([body["messages"][0]["content"][1] for body in server.asked]))


def test_a_judge_that_always_prefers_the_first_caption_makes_ties(album):
    predictions = predictions_on(album, [("red", "a red cat", "a blue cat")] * 2)
    with FaultyServer(lambda body: Reply("A")) as server:
        assert judged(server, album, predictions)[0] == {"base": ["tie", "tie"]}


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("{}", "base"),
        ("**{}**", "base"),
        ("Answer: {}.", "base"),
        ("Caption {}", "base"),
        ("{}. It names the colour.", "base"),
        ("{}\nIt names the colour.", "base"),
        ("{} or B", None),
        ("A {} caption", None),
        ("I prefer {}", None),
        ("Both are fine", None),
    ],
)
def test_an_answer_is_one_word_and_what_is_none_gives_no_verdict(album, said, verdict):
    first, second = predictions_on(album, [("red", "a red cat", "a cat"), ("green", "x", "a green cat")])

    def answer(body):
        reply = by_colour(body)
        return Reply(said.format(reply.text)) if seen(body)[0].getpixel((5, 5)) == COLOURS["red"] else reply

    with FaultyServer(answer) as server:
        assert judged(server, album, [first, second])[0] == {"base": [verdict, "tuned"]}


def test_one_unusable_answer_of_two_leaves_a_pair_without_verdict(album):
    predictions = predictions_on(album, [("red", "a red cat", "a cat"), ("green", "x", "a green cat")])
    with FaultyServer(
        lambda body: Reply("hm") if seen(body)[1] == ["a red cat", "a cat"] else by_colour(body)
    ) as server:
        assert judged(server, album, predictions)[0] == {"base": [None, "tuned"]}


def test_a_judge_without_any_usable_answer_is_an_error_that_shows_one(album):
    predictions = predictions_on(album, [("red", "a red cat", "a blue cat")])
    with (
        FaultyServer(lambda body: Reply("What a lovely picture!")) as server,
        pytest.raises(
            ServerError, match=r"gave no usable answer to any of 2 questions: .*got 'What a lovely picture!'"
        ),
    ):
        judged(server, album, predictions)


def test_a_judge_that_is_gone_is_named_with_its_block(album):
    predictions = predictions_on(album, [("red", "a red cat", "a blue cat")])
    with FaultyServer(by_colour) as server:
        gone = server.address
    with pytest.raises(ServerError, match=r"No server answers at .*check evaluation.judge.address"):
        judge_captions(predictions, ["base"], album[1], JudgeParameters(address=gone, retries=0))
    with (
        FaultyServer(lambda body: Reply(status=503)) as server,
        pytest.raises(ServerError, match=r"gave no answer after 1 attempts.*evaluation.judge.timeout"),
    ):
        judged(server, album, predictions)


def test_the_share_of_the_tuned_side_counts_wins_and_half_the_ties():
    scoring = ScoringParameters(tokenizer="ptb", bootstrap_samples=500, seed=1, settings_from="parameters")
    verdicts = ["tuned", "tuned", "tie", "base", None, "tuned"]
    found = summarize_verdicts(verdicts, [f"{n}.png" for n in range(6)], scoring)
    assert (found["tuned_wins"], found["ties"], found["judged"], found["not_judged"]) == (3, 1, 5, 1)
    assert found["tuned_share"] == pytest.approx(3.5 / 5)
    low, high = found["interval"]
    assert 0 <= low < 0.7 < high <= 1
    nothing = summarize_verdicts([None], ["0.png"], scoring)
    assert (nothing["tuned_share"], nothing["interval"], nothing["not_judged"]) == (None, None, 1)
