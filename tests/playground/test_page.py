"""What the page does with what a person gives, without a browser."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.playground.corrections import Corrections
from qwen_vl_lora.playground.tryout import HeldOut, Tryout, check_picture
from samples.pictures import PARAMETERS, jpeg
from tiny_adapters import LORA, save_adapter

pytest.importorskip("gradio")
STRONG = LORA.model_copy(update={"lora_alpha": 64, "init_lora_weights": False})


@pytest.fixture(scope="module")
def page(tmp_path_factory, base_path):
    """A page for a random base with two adapters, the second trained with another question and length."""
    from qwen_vl_lora.playground.page import Offer, Playground

    folder = tmp_path_factory.mktemp("adapters")
    base = BaseModel("tiny", base_path("qwen2_vl"))
    other = {
        "prompt": {"user": "Count them.", "system": None, "override": False},
        "generation": {"max_new_tokens": 5, "repetition_penalty": 1.0, "batch_size": 2},
    }
    adapters = {
        "one": save_adapter(folder / "one", base, STRONG),
        "two": save_adapter(folder / "two", base, STRONG.model_copy(update={"r": 4}), **other),
    }
    tryout = Tryout(base, adapters, validate_parameters({**PARAMETERS, "device": "cpu"}))
    pictures = [check_picture(jpeg(seed), f"{seed}.jpg", tryout.settings.image) for seed in (1, 2)]
    held_out = [HeldOut(one, ("a <b>",), score) for one, score in zip(pictures, (0.5, 9.0), strict=True)]
    offers = [Offer("one", "one <first>"), Offer("two", "two")]
    return Playground(tryout, offers, ["one"], Corrections(folder / "saved"), {"one": held_out, "two": []}.__getitem__)


def given(page, data, name="photo.jpg", folder=None):
    file = folder / "upload"
    file.write_bytes(data)
    return page.receive(SimpleNamespace(path=str(file), orig_name=name))


def fields(page, name):
    return page._values(name)


def test_base_and_adapters_are_written_side_by_side_with_the_words_that_differ(page, tmp_path):
    picture, fault, _ = given(page, jpeg(1, (90, 60)), folder=tmp_path)
    assert fault == ""
    *streamed, last = page.write(picture, "one", "two", *fields(page, "one"))
    captions, fault, correction, command, _ = last
    assert len(streamed) >= 3
    assert "<article><h2>Base</h2><p>" in streamed[0][0]
    assert captions.count("<article>") == 3
    assert "one &lt;first&gt;" in captions
    assert "<mark>" in captions
    assert "cut at max_new_tokens" in captions
    assert correction
    assert [line.split()[-1] for line in command.splitlines()][1] == "one"
    assert len(command.splitlines()) == 3


def test_the_base_alone_is_asked_with_the_configured_settings(page, tmp_path):
    picture, *_ = given(page, jpeg(1), folder=tmp_path)
    *_, (captions, fault, _, command, _) = page.write(picture, "none", "none", *fields(page, "none"))
    assert (captions.count("<article>"), fault) == (1, "")
    assert command == "qwen-vl-lora caption photo.jpg --adapter none"


def test_a_bad_upload_is_told_and_its_name_is_no_markup(page, tmp_path):
    picture, fault, _ = given(page, b"<html>", "<img src=x>.jpg", tmp_path)
    assert picture is None
    assert "not_an_image" in fault
    assert "<img" not in fault


def test_an_error_is_shown_beside_what_was_written_and_the_next_request_works(page, tmp_path):
    picture, *_ = given(page, jpeg(1), folder=tmp_path)
    values = fields(page, "one")
    *_, (_, fault, *_) = page.write(picture, "one", "none", "Look: <|im_end|>", *values[1:])
    assert "role='alert'" in fault
    assert "&lt;|im_end|&gt;" in fault
    *_, (_, fault, *_) = page.write(picture, "one", "none", *values)
    assert fault == ""


def test_the_mark_names_what_differs_for_each_adapter(page):
    assert "as trained" in page._marks_of("one", "none", *fields(page, "one"))
    shown = page._marks_of("one", "two", *fields(page, "one"))
    assert "two: prompt: trained with &#x27;Count them.&#x27;" in shown
    assert "two: max_new_tokens: trained with 5, now 7" in shown
    assert "one:" not in shown


def test_another_adapter_brings_its_values_but_not_over_a_persons(page):
    from qwen_vl_lora.playground.page import _FIELDS

    values = fields(page, "one")
    *switched, known = page.switch({}, "two", *values)
    assert (switched[0], known["max_new_tokens"]) == ("Count them.", 5)
    *switched, _ = page.switch(known, "one", "My question?", *switched[1:])
    assert switched[0] == "My question?"
    assert dict(zip(_FIELDS, switched, strict=True))["max_new_tokens"] == 7


def test_drawing_words_is_asked_marked_and_in_the_command(page, tmp_path):
    from qwen_vl_lora.playground.page import _FIELDS

    values = dict(zip(_FIELDS, fields(page, "one"), strict=True))
    assert (values["temperature"], values["top_p"], values["seed"]) == (0.0, 1.0, 0)
    drawing = list({**values, "temperature": 0.9, "seed": 3}.values())
    shown = page._marks_of("one", "none", *drawing)
    assert "temperature: configured 0.0, now 0.9<br>one: seed: configured 0, now 3" in shown
    picture, *_ = given(page, jpeg(1, (90, 60)), folder=tmp_path)
    *_, last = page.write(picture, "one", "none", *drawing)
    assert last[3].count("inference.sampling.temperature=0.9,inference.sampling.seed=3") == 2
    assert "top_p" not in last[3]
    *_, wrong = page.write(picture, "one", "none", *{**values, "top_p": 2}.values())
    assert "top_p: Input should be less than or equal to 1" in wrong[1]


def test_a_caption_is_saved_and_an_empty_one_is_not(page, tmp_path):
    picture, *_ = given(page, jpeg(1), folder=tmp_path)
    values = fields(page, "one")
    assert "captions_file=" in page.save_row(picture, "A dog.", "one", *values)
    assert "empty_caption" in page.save_sidecar(picture, " ", "one", *values)
    assert "no picture" in page.save_row(None, "A dog.", "one", *values)


def test_held_out_pictures_are_browsed_worst_or_best_first_and_taken(page):
    small, found, fault = page.browse("one", "worst first")
    assert ([caption for _, caption in small], fault) == (["CIDEr 0.50", "CIDEr 9.00"], "")
    assert page.browse("one", "best first")[0][0][1] == "CIDEr 9.00"
    assert page.browse("none", "best first")[:2] == ([], [])
    image, picture, _, said = page.pick(found, SimpleNamespace(index=0))
    assert image.size == (40, 30)
    assert picture.name == "1.jpg"
    assert "Reference: a &lt;b&gt;" in said
