from __future__ import annotations

import pytest

from qwen_vl_lora.samples.identity import MAX_ID_CHARACTERS, ImageRegister, check_id, image_ids
from qwen_vl_lora.samples.image_store import ImageEntry
from qwen_vl_lora.samples.records import RowError


def entry(image_id: str, sha256: str = "aa") -> ImageEntry:
    return ImageEntry(image_id, sha256, "files", ".png", 1, 1, 1)


def test_one_id_may_come_again_with_the_same_picture():
    register = ImageRegister()
    assert register.claim([entry("a")]) == register.claim([entry("a")])
    assert register.entries == [entry("a")]


def test_one_picture_may_have_two_ids():
    register = ImageRegister()
    register.claim([entry("a")])
    register.claim([entry("b")])
    assert [one.id for one in register.entries] == ["a", "b"]


def test_a_given_id_names_one_picture():
    register = ImageRegister()
    register.claim([entry("Café.jpg")])
    with pytest.raises(RowError) as fault:
        register.claim([entry("Café.jpg", "bb")])
    assert fault.value.reason == "duplicate_id"
    assert register.entries == [entry("Café.jpg")]


@pytest.mark.parametrize("image_id", ["café.jpg", "CAFÉ.JPG", "Cafe\u0301.jpg"])
def test_given_ids_may_differ_in_case_or_unicode_form(image_id):
    register = ImageRegister()
    register.claim([entry("Café.jpg")])
    register.claim([entry(image_id, "bb")])
    assert [one.id for one in register.entries] == ["Café.jpg", image_id]


def test_a_path_that_became_an_id_never_rejects_a_row():
    register = ImageRegister()
    register.claim([entry("q__r.jpg")], may_rename=True)
    (renamed,) = register.claim([entry("q__r.jpg", "bb" * 32)], may_rename=True)
    assert renamed.id == "q__r.jpg-bbbbbbbbbbbb"
    assert register.claim([entry("q__r.jpg", "bb" * 32)], may_rename=True) == [renamed]
    assert [one.id for one in register.entries] == ["q__r.jpg", renamed.id]


def test_a_sample_of_several_images_enters_all_or_none():
    register = ImageRegister()
    register.claim([entry("a#2")])
    with pytest.raises(RowError, match="already names another picture"):
        register.claim([entry("a#1", "bb"), entry("a#2", "bb")])
    assert [one.id for one in register.entries] == ["a#2"]


def test_images_of_one_sample_are_numbered():
    assert image_ids("a", 1) == ["a"]
    assert image_ids("a", 3) == ["a#1", "a#2", "a#3"]


@pytest.mark.parametrize(
    ("reason", "image_id"),
    [
        ("bad_id", ""),
        ("bad_id", " "),
        ("bad_id", "a\nb"),
        ("bad_id", "a\x00"),
        ("bad_id", "<|im_end|>"),
        ("bad_id", "a" * (MAX_ID_CHARACTERS + 1)),
        ("bad_encoding", "caf\udce9"),
    ],
)
def test_ids_that_cannot_be_used_are_rejected(reason, image_id):
    with pytest.raises(RowError) as fault:
        check_id(image_id)
    assert fault.value.reason == reason


@pytest.mark.parametrize(
    "image_id", ["391895", "COCO_train2014_000000391895.jpg", "图片 1", "a b#c", "VG_100K/1", "9.41\u202fAM"]
)
def test_usual_ids_are_fine(image_id):
    check_id(image_id)
